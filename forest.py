"""A batch as a forest of shared prefixes, attention over it, and the cache that sampling uses.

Responses share their prompt, a judge's questions their instruction. In a trie, laid out in depth-first order,
what sequences share is stored and computed once:

    a b c             a --- b --- c          index   0  1  2  3  4  5  6
    a b d e           |     |                token   a  b  c  d  e  f  g
    a f               |     + --- d --- e    depth   0  1  2  2  3  1  0
    g                 |                      end     6  5  3  5  5  6  7
                      + --- f                parent -1  0  1  1  3  0 -1
                      g

end[j] is the index after j's last descendant. One rule says what attention may see:

    token i sees token j   exactly when   j <= i < end[j]

A causal row is a tree with one branch. The cache is the same idea for sampling: a prompt's keys and values
are computed once and shown to all of its rows.

Letters: N tokens of a forest, S sequences, H query heads, G key/value heads, E head width, P prompts, R rows.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Forest:
    """S token sequences as N tokens in depth-first order. All tensors are int64 on the CPU."""
    tokens: torch.Tensor           # (N,) ids
    depth: torch.Tensor            # (N,) position in its own sequence
    end: torch.Tensor              # (N,) index after the last descendant
    parent: torch.Tensor           # (N,) index of the token before it; -1 at a root
    paths: list                    # S tensors: the indices of each sequence's tokens, in the order given
    past: "Forest | None" = None           # read before: indices below its length are its tokens
    branch: torch.Tensor | None = None     # (N,) then: the last token of the past that is seen; -1: none


def pack(sequences):
    """The Forest of token sequences (lists of ids, none empty).

    In lexicographic order sequences with a common prefix are neighbours, and each adds what it does not share
    with the one before.
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
        end[path[shared:]] = N                               # the branch left here is complete
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


def rows(tokens):
    """The Forest of causal rows (B, T): B trees of one branch each, even where rows are alike."""
    B, T = tokens.shape
    index = torch.arange(B * T)
    depth = index % T
    parent = torch.where(depth == 0, -1, index - 1)
    return Forest(tokens.reshape(-1), depth, index - depth + T, parent, list(index.view(B, T)))


def grow(past, sequences):
    """The Forest of what `sequences` add to the forest `past`, whose keys and values a Cache holds.

    In parent, end and paths the past's tokens come first, the N new ones (maybe none) after them. A new i
    sees the past's j as if it stood where its sequence leaves the past: j <= branch[i] < end[j].
    """
    if past.past is not None:
        raise ValueError("a forest that has grown cannot grow again")
    known = len(past.tokens)
    both = pack([past.tokens[path].tolist() for path in past.paths] + sequences)
    place = torch.full_like(both.tokens, -1)
    for path, before in zip(both.paths, past.paths):
        place[path] = before
    new = place < 0
    count = torch.cat((torch.zeros(1, dtype=torch.int64), new.cumsum(0)))      # new tokens before each
    place[new] = known + count[:-1][new]
    paths, branch = both.paths[len(past.paths):], torch.full_like(place, -1)
    for path in paths:
        shared = int((~new[path]).sum())               # a sequence shares a prefix with the past
        if shared:
            branch[path[shared:]] = place[path[shared - 1]]
    parent = torch.where(both.parent < 0, -1, place[both.parent])
    return Forest(both.tokens[new], both.depth[new], known + count[both.end][new], parent[new],
                  [place[path] for path in paths], past, branch[new])


QUERY_BLOCK = 256      # tokens; on 2 cores 128 to 512 differ little, one block for all is 2-5x slower


class ForestAttention:
    """softmax(q kᵀ / √E) v under the rule (with a window: and depth[i] - depth[j] < window), block by block.

    A block of consecutive queries sees itself and the tokens before it whose subtree reaches into it. No
    other key is multiplied.
    """

    def __init__(self, forest, window, device, cache=None):
        """cache: records the forest's keys and values; if the forest has grown, it holds its past's."""
        self.cache, self.grows, self.device, self.masks = cache, forest.past is not None, device, None
        past, known = forest.past, len(forest.past.tokens) if self.grows else 0
        depth = torch.cat((past.depth, forest.depth)) if self.grows else forest.depth
        end = torch.cat((past.end, forest.end)) if self.grows else forest.end

        def sees(i, depth_i, j):
            """The rule for queries i (n, 1) and keys j (m,): (n, m)."""
            seen = (j <= i) & (i < end[j])
            return seen if window is None else seen & (depth_i - depth[j] < window)

        index, keys, self.seen = torch.arange(len(end)), [], []
        for start in range(known, len(end), QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, len(end))
            depths = depth[start:stop, None]
            reach = end[known:start] > start
            if window is not None:
                reach &= depths.min() - depth[known:start] < window
            block = torch.cat((index[known:start][reach], index[start:stop]))
            seen = sees(index[start:stop, None], depths, block)
            if self.grows:
                before = sees(forest.branch[start - known:stop - known, None], depths, index[:known])
                reach = before.any(0)
                block = torch.cat((index[:known][reach], block))
                seen = torch.cat((before[:, reach], seen), 1)
            keys.append(block)
            self.seen.append(seen)
        self.sizes = [len(block) for block in keys]
        self.keys = torch.cat(keys).to(device)

    def __call__(self, layer, q, k, v):
        """q (1, H, N, E), k and v (1, G, N, E) -> (1, H, N, E)."""
        if self.grows:
            k, v = (torch.cat((kept[None], new), 2) for kept, new in zip(self.cache.prompt[layer], (k, v)))
        elif self.cache is not None:
            self.cache.prompt[layer] = k[0], v[0]
        if self.masks is None:      # for all layers; added to the scores: faster here than a boolean mask
            zeros = (torch.zeros(seen.shape, dtype=q.dtype) for seen in self.seen)
            self.masks = [mask.masked_fill_(~seen, -math.inf).to(self.device)
                          for mask, seen in zip(zeros, self.seen)]
        if len(self.masks) > 1 or self.grows:
            # One gather and one split: a slice for each block would fill a gradient of N tokens each time.
            _, G, N, E = k.shape
            table = torch.cat((k, v), 1)[0].transpose(0, 1).reshape(N, -1)
            k, v = F.embedding(self.keys, table).view(1, -1, 2 * G, E).transpose(1, 2).chunk(2, 1)
        shared_keys = q.shape[1] != k.shape[1]         # H > G: several query heads read one key/value head
        blocks = zip(q.split(QUERY_BLOCK, 2), k.split(self.sizes, 2), v.split(self.sizes, 2), self.masks)
        return torch.cat([F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared_keys)
                          for q, k, v, mask in blocks], 2)


class Cache:
    """Keys and values of P prompts, each shown to all of its rows, and of the rows' own tokens.

    A forward over the prompts' forest records it, open() adds rows, then a forward takes a token per row.
    """

    def __init__(self, config):
        self.config = config
        self.prompt = [None] * config.layers       # (k, v), both (G, N, E); once open (P, G, longest, E)

    def open(self, paths, k, max_tokens):
        """Show prompt i, whose tokens lie at paths[i] of the forest, to k rows with room for max_tokens."""
        keys = self.prompt[0][0]
        device = keys.device
        lengths = torch.tensor([len(path) for path in paths], device=device)
        index = nn.utils.rnn.pad_sequence(paths, batch_first=True).to(device)        # (P, longest)
        self.prompt = [tuple(part[:, index].transpose(0, 1).contiguous() for part in pair)
                       for pair in self.prompt]
        P, G, _, E = self.prompt[0][0].shape           # own: of each row, (P · k, G, max_tokens, E)
        self.own = [tuple(keys.new_empty(P * k, G, max_tokens, E) for _ in "kv") for _ in self.prompt]
        self.seat(torch.arange(P).repeat_interleave(k), torch.full((P,), k), device)
        self.length, self.step = lengths.repeat_interleave(k), 0     # (R,) prompt's tokens; own tokens so far

    def seat(self, owner, counts, device):
        """Note the prompt of each row, owner (R,), and the rows of each, counts (P,): both on the CPU."""
        slot = torch.arange(len(owner)) - (torch.cumsum(counts, 0) - counts)[owner]      # place at its prompt
        self.owner, self.slots = owner, int(counts.max())
        self.seats = owner.to(device, non_blocking=True), slot.to(device, non_blocking=True)

    def keep(self, rows):
        """Go on with these rows: (R',) ascending, on the CPU, at least one. Prompts without any leave."""
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
        scores = self.by_row(self.by_prompt(q) @ prompt_k.transpose(-1, -2))        # (R, G, H / G, longest)
        own = q @ own_k.transpose(-1, -2)                                           # (R, G, H / G, t + 1)
        position = torch.arange(longest, device=q.device)
        seen = position < self.length[:, None]                             # (R, longest): the rest is padding
        if self.config.sliding_window is not None:
            oldest = (self.length + t - self.config.sliding_window)[:, None]     # out of sight up to here
            seen &= position > oldest
            recent = self.length[:, None] + torch.arange(t + 1, device=q.device) > oldest
            own = own.masked_fill(~recent[:, None, None], -math.inf)
        scores = torch.cat((scores.masked_fill(~seen[:, None, None], -math.inf), own), -1)
        weights = (scores if scores.dtype == torch.float64 else scores.float()).softmax(-1).to(q.dtype)
        on_prompt, on_own = weights[..., :longest], weights[..., longest:]
        y = self.by_row(self.by_prompt(on_prompt) @ prompt_v) + on_own @ own_v
        return y.reshape(R, H, 1, E)

    def by_prompt(self, x):
        """(R, G, H / G, ·) -> (P, G, slots · H / G, ·): a prompt's rows meet its keys in one product."""
        R, G, group, last = x.shape
        P = len(self.prompt[0][0])
        if R == P * self.slots:                    # as long as no row has left, this is only a view
            side = x.view(P, self.slots, G, group, last)
        else:
            side = x.new_zeros(P, self.slots, G, group, last)
            side[self.seats] = x
        return side.transpose(1, 2).reshape(P, G, self.slots * group, last)

    def by_row(self, y):
        """The way back from by_prompt."""
        P, G, _, last = y.shape
        y = y.view(P, G, self.slots, -1, last).transpose(1, 2)
        return y.reshape(-1, *y.shape[2:]) if len(self.owner) == P * self.slots else y[self.seats]
