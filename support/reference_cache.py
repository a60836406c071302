"""What the reference says about a fixed data set is constant: it is computed once and kept."""
import hashlib
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from support import hf
from support.checkpoint import digest, reason
from support.cli import InputError

class ReferenceCache:
    """log π_ref of every pair's two responses behind x, and behind p⊕x where the recipe asks: one safetensors file a key.

    The key is a digest of the reference's folder, the compute type and all ids, which follow from data, tokenizer, lengths
    and p. `values` {"x": (N, 2), "px": (N, 2)} in float64, or None as long as nobody has computed them.
    """

    def __init__(self, settings, dtype, pairs, refined):
        self.pairs, self.queries = pairs, ("x", "px") if refined else ("x",)
        folder = Path(settings.reference or settings.model)
        files = sorted({path for path, *_ in hf.weight_files(folder).values()})
        key = hashlib.sha256(f"{dtype} {self.queries} {digest(folder / 'config.json', *files)}".encode())
        for pair in pairs:
            for ids in (*(getattr(pair, query) for query in self.queries), pair.chosen, pair.rejected):
                key.update(np.array([len(ids), *ids], dtype=np.int64).tobytes())
        self.path = Path(settings.reference_cache) / f"reference-{key.hexdigest()[:32]}.safetensors"
        self.values = self.read() if os.path.exists(self.path) else None

    def read(self):
        """The values of a file, checked: its name says what they belong to, not that the file is whole."""
        wanted = {query: ("F64", (len(self.pairs), 2)) for query in self.queries}
        if hf.read_header(self.path) != wanted:
            raise InputError(f"{self.path} does not hold the log-probabilities of {len(self.pairs)} pairs; remove it.")
        return load_file(self.path)

    def write(self):
        """Aside and renamed: two runs may compute the same file."""
        aside = self.path.with_name(f".writing-{os.getpid()}-{self.path.name}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(self.values, aside)
            os.replace(aside, self.path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"--reference_cache={self.path.parent} cannot be written: {reason(error)}.") from None

    def attach(self):
        """Give each pair its values; whoever scores it asks there first."""
        for i, pair in enumerate(self.pairs):
            pair.reference = {query: self.values[query][i].tolist() for query in self.queries}
