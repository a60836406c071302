"""What the reference says about a fixed data set is constant: it is computed once and kept."""
import hashlib
import os
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from support import hf
from support.cli import InputError, StepLine
from support.disk import digest, reason

SAVE_SECONDS = 10              # between two saves of what is computed so far


class ReferenceCache:
    """log π_ref of each pair's two responses after x, and after p⊕x where the recipe asks: one file per key.

    The key is a digest of the reference's folder, the compute type and all ids, which follow from data,
    tokenizer, lengths and p. `values` {"x": (N, 2), "refined_x": (N, 2)} in float64, of which the first
    `done` rows are computed.
    """

    def __init__(self, settings, dtype, pairs, refined):
        self.pairs, self.queries = pairs, ("x", "refined_x") if refined else ("x",)
        folder = Path(settings.reference or settings.model)
        files = sorted({path for path, *_ in hf.tensors_in(folder).values()})
        key = hashlib.sha256(f"2 {dtype} {self.queries} {digest(folder / 'config.json', *files)}".encode())
        for pair in pairs:
            for ids in (*(getattr(pair, query) for query in self.queries), pair.chosen, pair.rejected):
                key.update(np.array([len(ids), *ids], dtype=np.int64).tobytes())
        self.path = Path(settings.reference_cache) / f"reference-{key.hexdigest()[:32]}.safetensors"
        self.done = 0
        self.values = {query: torch.zeros(len(pairs), 2, dtype=torch.float64) for query in self.queries}
        if os.path.exists(self.path):
            self.read()

    def compute(self, logprobs_of, ranks, at_a_time):
        """The values of all pairs, each rank a part of them; the first rank writes them down.

        logprobs_of(pairs, query) -> (n, 2): the reference's, after pair.x or pair.refined_x. Sharded weights
        are gathered there, so all ranks call it equally often: one without pairs asks about the first pair.
        """
        n, saved = len(self.pairs), time.monotonic()
        self.done = n - ranks.largest(n - self.done)          # another run may have saved more since one read
        line = StepLine(n, "reference")
        line.resume_at(self.done)
        for values in self.values.values():
            values[self.done:] = 0
        while self.done < n:
            first, stop = self.done + ranks.rank * at_a_time, min(self.done + ranks.size * at_a_time, n)
            part = slice(first, first + at_a_time)
            for query, values in self.values.items():
                logprobs = logprobs_of(self.pairs[part] or self.pairs[:1], query)
                values[part] = logprobs.cpu().double()[:len(self.pairs[part])]
                ranks.add_up(values[self.done:stop])
            self.done = stop
            line.update(stop)
            if ranks.largest(stop == n or time.monotonic() - saved > SAVE_SECONDS):
                ranks.on_first(self.write)
                saved = time.monotonic()

    def state(self):
        """(2,): how many rows are computed, and a checksum of that and of all values."""
        total = self.done
        for query in self.queries:
            total = zlib.crc32(self.values[query].numpy(), total)
        return torch.tensor([self.done, total])

    def read(self):
        """The values in the file, checked: its name says what they belong to, not that it is whole."""
        wanted = {query: ("F64", (len(self.pairs), 2)) for query in self.queries} | {"state": ("I64", (2,))}
        if hf.header(self.path) != wanted:
            raise InputError(f"{self.path} does not hold the values of {len(self.pairs)} pairs; remove it.")
        self.values = load_file(self.path)
        state = self.values.pop("state")
        self.done = int(state[0])
        if not 0 <= self.done <= len(self.pairs) or not state.equal(self.state()):
            raise InputError(f"{self.path} is damaged; remove it.")

    def write(self):
        """Aside and renamed: two runs may compute the same file."""
        aside = self.path.with_name(f".writing-{os.getpid()}-{self.path.name}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(self.values | {"state": self.state()}, aside)
            os.replace(aside, self.path)
        except (OSError, SafetensorError) as error:
            folder = self.path.parent
            raise InputError(f"--reference_cache={folder} cannot be written: {reason(error)}.") from None

    def attach(self):
        """Give each pair its values; whoever scores it asks there first."""
        for i, pair in enumerate(self.pairs):
            pair.reference = {query: self.values[query][i].tolist() for query in self.queries}
