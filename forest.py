"""A batch as a forest of shared prefixes, and attention over it."""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# A batch as a forest of shared prefixes

@dataclass
class Forest:
    """S token sequences laid out as a trie in depth-first order: N tokens, what is shared at the front stands once.

    Token j is seen by token i exactly when j <= i < end[j]. All tensors are int64 on the CPU.
    """
    tokens: torch.Tensor           # (N,) ids
    depth: torch.Tensor            # (N,) position in its own sequence
    end: torch.Tensor              # (N,) index behind the last descendant
    parent: torch.Tensor           # (N,) index of the token before it; -1 at a root
    paths: list                    # S tensors: where each sequence's tokens lie, in the order the sequences came in
    past: "Forest | None" = None   # one that was read before: indices below its length are its tokens, ours come behind
    branch: torch.Tensor | None = None     # (N,) then: the last token of the past that a token sees; -1 where there is none


def pack(sequences):
    """The Forest of token sequences (lists of ids, none empty).

    In lexicographic order sequences with a common front stand side by side, so each one adds only what lies behind the
    part it shares with the one before.
    """
    if any(len(sequence) == 0 for sequence in sequences):
        raise ValueError("an empty sequence cannot be packed")
    paths = [None] * len(sequences)
    ids, depths, parents = [], [], []
    end = np.zeros(sum(map(len, sequences)), dtype=np.int64)
    last, path, N = np.empty(0, np.int64), np.empty(0, np.int64), 0
    for s in sorted(range(len(sequences)), key=sequences.__getitem__):
        sequence = np.asarray(sequences[s], dtype=np.int64)
        common = min(len(sequence), len(last))
        differs = np.flatnonzero(sequence[:common] != last[:common])
        shared = int(differs[0]) if len(differs) else common
        end[path[shared:]] = N                                     # the branch left here is complete
        fresh = np.arange(N, N + len(sequence) - shared)
        path = np.concatenate((path[:shared], fresh))
        ids.append(sequence[shared:])
        depths.append(np.arange(shared, len(sequence)))
        parents.append(np.concatenate(([-1], path))[shared:len(sequence)])
        paths[s] = torch.from_numpy(path)
        last, N = sequence, N + len(fresh)
    end[path] = N
    tokens, depth, parent = (torch.from_numpy(np.concatenate(parts)) for parts in (ids, depths, parents))
    return Forest(tokens, depth, torch.from_numpy(end[:N]), parent, paths)


def grow(past, sequences):
    """The Forest of what `sequences` add to the forest `past`, whose keys and values were kept when it was read.

    In parent, end and paths the tokens of the past go in front and the new ones, N of them (maybe none), come behind. The
    past's j is seen by a new i exactly when j <= branch[i] < end[j], as if i stood where its branch leaves the past.
    """
    if past.past is not None:
        raise ValueError("a forest that has grown cannot grow again")
    known = len(past.tokens)
    both = pack([past.tokens[path].tolist() for path in past.paths] + sequences)
    place = torch.full_like(both.tokens, -1)
    for path, before in zip(both.paths, past.paths):
        place[path] = before
    new = place < 0
    count = torch.cat((torch.zeros(1, dtype=torch.int64), new.cumsum(0)))          # new tokens in front of each
    place[new] = known + count[:-1][new]
    paths, branch = both.paths[len(past.paths):], torch.full_like(place, -1)
    for path in paths:
        old = int((~new[path]).sum())              # what a sequence shares with the past is its front
        if old:
            branch[path[old:]] = place[path[old - 1]]
    parent = torch.where(both.parent < 0, -1, place[both.parent])
    return Forest(both.tokens[new], both.depth[new], known + count[both.end][new], parent[new],
                  [place[path] for path in paths], past, branch[new])


# ---------------------------------------------------------------------------------------------------------------------
# Attention over a forest, and the cache

QUERY_BLOCK = 256      # tokens a block; measured on 2 cores: 128 to 512 differ little, one block for all is 2-5x slower


class ForestAttention:
    """softmax(q kᵀ / √E) v with the mask j <= i < end[j] (and depth[i] - depth[j] < window), block by block.

    In depth-first order the tokens seen by a block of consecutive queries are the block itself and those before it
    whose subtree reaches into it. Keys that no query of the block can see are thus never multiplied, and what is left
    of the mask is one comparison.
    """

    def __init__(self, depth, end, window, device, cache=None, past=None):
        self.cache, self.grows, self.device, self.masks = cache, past is not None, device, None
        index, keys, self.seen = torch.arange(len(end)), [], []
        branch, past_depth, past_end = past or (None, None, index[:0])
        known = len(past_end)
        for start in range(0, len(end), QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, len(end))
            reach = end[:start] > start
            if window is not None:
                reach &= depth[start:stop].min() - depth[:start] < window
            block = torch.cat((index[:start][reach], index[start:stop]))
            query = index[start:stop, None]
            seen = (block <= query) & (query < end[block])
            if window is not None:
                seen &= depth[start:stop, None] - depth[block] < window
            block += known
            if past is not None:           # the same comparison, from where a token's branch leaves the past
                query = branch[start:stop, None]
                before = (torch.arange(known) <= query) & (query < past_end)
                if window is not None:
                    before &= depth[start:stop, None] - past_depth < window
                reach = before.any(0)
                block, seen = torch.cat((reach.nonzero()[:, 0], block)), torch.cat((before[:, reach], seen), 1)
            keys.append(block)
            self.seen.append(seen)
        self.sizes = [len(block) for block in keys]
        self.keys = torch.cat(keys).to(device)

    def __call__(self, layer, q, k, v):
        """q (1, H, N, E), k and v (1, G, N, E) -> (1, H, N, E)."""
        if self.grows:
            k, v = (torch.cat((kept[None], ours), 2) for kept, ours in zip(self.cache.prompt[layer], (k, v)))
        elif self.cache is not None:
            self.cache.record(layer, k, v)
        if self.masks is None:      # one for all layers; added, because that is faster here than a boolean mask
            self.masks = [torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -math.inf).to(self.device)
                          for seen in self.seen]
        if len(self.masks) > 1 or self.grows:
            # One gather for all blocks and one split: a slice a block would fill a gradient of all N tokens each time.
            _, G, N, E = k.shape
            rows = torch.cat((k, v), 1)[0].transpose(0, 1).reshape(N, -1)
            k, v = F.embedding(self.keys, rows).view(1, -1, 2 * G, E).transpose(1, 2).chunk(2, 1)
        blocks = zip(q.split(QUERY_BLOCK, 2), k.split(self.sizes, 2), v.split(self.sizes, 2), self.masks)
        return torch.cat([F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
                          for q, k, v, mask in blocks], 2)


class Cache:
    """Keys and values of P prompts, each shown to all of its rows, and of the rows' own tokens.

    One forward over the prompts' forest records it; open() fans it out; then each forward takes one token a row.
    """

    def __init__(self, config):
        self.config = config
        self.prompt = [None] * config.layers       # the forest's (k, v), each (G, N, E); after open() (P, G, longest, E)
        self.own = None                            # per layer (k, v), each (R, G, max_tokens, E)
        self.is_open = False

    def record(self, layer, k, v):
        self.prompt[layer] = (k[0], v[0])

    def open(self, paths, k, max_tokens):
        """Show prompt i, whose tokens lie at paths[i] in the forest, to `k` rows, with room for max_tokens each."""
        keys = self.prompt[0][0]
        device = keys.device
        lengths = torch.tensor([len(path) for path in paths], device=device)
        index = nn.utils.rnn.pad_sequence(paths, batch_first=True).to(device)    # (P, longest)
        self.prompt = [tuple(part[:, index].transpose(0, 1).contiguous() for part in pair) for pair in self.prompt]
        P, G, longest, E = self.prompt[0][0].shape
        self.own = [tuple(keys.new_empty(P * k, G, max_tokens, E) for _ in range(2)) for _ in self.prompt]
        self.seat(torch.arange(P).repeat_interleave(k), torch.full((P,), k), device)
        self.length = lengths.repeat_interleave(k)                               # (R,) tokens of its prompt
        self.step, self.is_open = 0, True

    def seat(self, owner, counts, device):
        """Note the prompt of each row, `owner` (R,), and how many rows each prompt has, `counts` (P,): kept on the CPU too,
        so that nobody has to ask the device."""
        slot = torch.arange(len(owner)) - (torch.cumsum(counts, 0) - counts)[owner]        # a row's place at its prompt
        self.owner, self.slots = owner, int(counts.max())
        self.seats = owner.to(device, non_blocking=True), slot.to(device, non_blocking=True)

    def keep(self, rows):
        """Go on with these rows only: `rows` (R',) ascending indices on the CPU, at least one. Prompts without one leave."""
        device = self.length.device
        prompts, owner, counts = torch.unique(self.owner[rows], return_inverse=True, return_counts=True)
        self.seat(owner, counts, device)
        prompts, rows = prompts.to(device, non_blocking=True), rows.to(device, non_blocking=True)
        self.length = self.length[rows]
        if len(prompts) < len(self.prompt[0][0]):
            self.prompt = [tuple(part[prompts] for part in pair) for pair in self.prompt]
        for layer, pair in enumerate(self.own):
            self.own[layer] = tuple(part.new_empty(len(rows), *part.shape[1:]) for part in pair)
            for kept, part in zip(self.own[layer], pair):
                kept[:, :, :self.step] = part[rows, :, :self.step]

    def attend(self, layer, q, k, v):
        """q (R, H, 1, E), k and v (R, G, 1, E) of each row's newest token -> (R, H, 1, E)."""
        (prompt_k, prompt_v), (own_k, own_v) = self.prompt[layer], self.own[layer]
        (_, G, longest, E), (R, H), t = prompt_k.shape, q.shape[:2], self.step
        own_k[:, :, t], own_v[:, :, t] = k[:, :, 0], v[:, :, 0]
        own_k, own_v = own_k[:, :, :t + 1], own_v[:, :, :t + 1]
        q = q.view(R, G, H // G, E) / math.sqrt(E)
        scores = self.by_row(self.by_prompt(q) @ prompt_k.transpose(-1, -2))     # (R, G, H / G, longest)
        own = q @ own_k.transpose(-1, -2)                                        # (R, G, H / G, t + 1)
        position = torch.arange(longest, device=q.device)
        seen = position < self.length[:, None]                                   # (R, longest): the rest is padding
        if self.config.sliding_window is not None:
            oldest = (self.length + t - self.config.sliding_window)[:, None]     # positions up to here are out of sight
            seen &= position > oldest
            recent = self.length[:, None] + torch.arange(t + 1, device=q.device) > oldest
            own = own.masked_fill(~recent[:, None, None], -math.inf)
        scores = torch.cat((scores.masked_fill(~seen[:, None, None], -math.inf), own), -1)
        weights = (scores if scores.dtype == torch.float64 else scores.float()).softmax(-1).to(q.dtype)
        on_prompt, on_own = weights[..., :longest], weights[..., longest:]
        y = self.by_row(self.by_prompt(on_prompt) @ prompt_v) + on_own @ own_v
        return y.reshape(R, H, 1, E)

    def by_prompt(self, x):
        """(R, G, H / G, ·) -> (P, G, slots · H / G, ·): the rows of a prompt side by side, to meet its keys in one product."""
        R, G, group, last = x.shape
        P = len(self.prompt[0][0])
        if R == P * self.slots:                    # as long as no row has left, this is only a view
            side = x.view(P, self.slots, G, group, last)
        else:
            side = x.new_zeros(P, self.slots, G, group, last)
            side[self.seats] = x
        return side.transpose(1, 2).reshape(P, G, self.slots * group, last)

    def by_row(self, y):
        """The way back."""
        P, G, _, last = y.shape
        y = y.view(P, G, self.slots, -1, last).transpose(1, 2)
        return y.reshape(-1, *y.shape[2:]) if len(self.owner) == P * self.slots else y[self.seats]
