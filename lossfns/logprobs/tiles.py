"""A tile of logits, tokens × vocabulary: read for its log-sum-exp, or turned into its own gradient.

Pure functions know the maths, ``absorb`` or ``weigh``, and ``slopes``; ``survey`` and ``sweep`` go over all tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

TOKENS, VOCABULARY = 8192, 4096
"""The largest tile. Fewer tokens at a time, and ∂weight would be read and written too often."""

STRIP = 2**20
"""Logits that a CPU works on at a time, so that they stay in its cache."""

ALL = slice(None)


class Head(NamedTuple):
    """The unembedding: logits z = c·tanh((h·Wᵀ + b) / c) / T, softcap c and temperature T."""

    weight: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float | None

    def raw(self, hidden: Tensor, columns: slice, spare: Tensor | None = None) -> Tensor:
        """h·Wᵀ + b in the dtype of the weight: [n, D] -> [n, v]; in the memory of a ``spare`` tile, if there is one."""
        weight = self.weight[columns].T
        out = fitted(spare, len(hidden), weight.shape[1])
        if self.bias is None:
            return torch.mm(hidden, weight, out=out)
        return torch.addmm(self.bias[columns], hidden, weight, out=out)

    def logits(self, hidden: Tensor) -> Tensor:
        """z of the whole vocabulary, [n, V]."""
        return self.z(self.raw(hidden.to(self.weight.dtype), ALL))

    def z(self, raw: Tensor) -> Tensor:
        """Logits of raw ones, in float32 or better; raw ones themselves where nothing is to be done."""
        z = raw.to(wide(raw))
        z = z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
        return z if self.temperature == 1 else z / self.temperature

    def bend(self, d: Tensor, z: Tensor) -> Tensor:
        """∂/∂z to ∂/∂raw."""
        d = d if self.softcap is None else d * (1 - (z * (self.temperature / self.softcap)).square())
        return d if self.temperature == 1 else d / self.temperature


class Reading(NamedTuple):
    """What is known of n tokens, a column for each tile of the vocabulary that was read."""

    own: Tensor  # [n, tiles] log Σ exp(z) over the tile
    mean: Tensor | None  # [n, tiles] Σ p·z over the tile, by the p of its own softmax; for the entropy
    chosen: Tensor  # [n, K] z at the targets, once their tile is read

    def rows(self, which: slice) -> Reading:
        return Reading(self.own[which], part(self.mean, which), self.chosen[which])

    @property
    def lse(self) -> Tensor:
        """[n] log Σ exp(z) over the vocabulary, never below a z."""
        lse: Tensor = self.own.logsumexp(1)
        return lse

    @property
    def share(self) -> Tensor:
        """[n, tiles] the probability of each tile: p of the whole is share·p of the tile."""
        return self.own.softmax(1)  # which sums to 1 also where all of z is large, and exp(own − lse) does not

    @property
    def average(self) -> Tensor | None:
        """[n] Σ p·z over the vocabulary."""
        return None if self.mean is None else torch.linalg.vecdot(self.share, self.mean)


class Slope(NamedTuple):
    """The gradient that reaches n tokens, and what it takes to carry it on to their logits."""

    targets: Tensor  # [n, K]
    share: Tensor  # [n, tiles]
    average: Tensor | None  # [n] Σ p·z
    g: Tensor  # [n, K] ∂/∂logprob
    tilt: Tensor | None  # [n] ∂/∂entropy

    def rows(self, which: Any) -> Slope:
        return Slope(
            self.targets[which], self.share[which], part(self.average, which), self.g[which], part(self.tilt, which)
        )

    @property
    def reached(self) -> Tensor:
        """[n] whether any gradient does."""
        reached = (self.g != 0).any(1)
        return reached if self.tilt is None else reached | (self.tilt != 0)

    def at(self, tile: int, columns: slice) -> Local:
        """What of it goes to the columns of a tile."""
        local, share = self.targets - columns.start, self.share[:, tile, None]
        pull = share * self.g.sum(1, keepdim=True)
        onehot = torch.where(within(local, columns), self.g, 0)
        local = local.clamp(0, columns.stop - columns.start - 1)  # of the others 0 is added, anywhere
        if self.tilt is None or self.average is None:
            return Local(local, onehot, pull, None, None)
        return Local(local, onehot, pull, share * self.tilt[:, None], self.average[:, None])


class Local(NamedTuple):
    """The gradient that reaches n tokens, as one tile of the vocabulary needs it."""

    targets: Tensor  # [n, K] columns of the tile
    g: Tensor  # [n, K] ∂/∂logprob, 0 where the target is none of its columns
    pull: Tensor  # [n, 1] share·Σ_k g
    tilt: Tensor | None  # [n, 1] share·∂/∂entropy
    average: Tensor | None  # [n, 1] Σ p·z over the vocabulary

    def rows(self, which: slice) -> Local:
        return Local(
            self.targets[which], self.g[which], self.pull[which], part(self.tilt, which), part(self.average, which)
        )


def part(x: Tensor | None, which: Any) -> Tensor | None:
    return None if x is None else x[which]


# The bodies


def softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ exp(z) [n], never below a z, and p [n, v]."""
    p = z.softmax(1)  # in one kernel exp and its sum; the largest p tells what it was divided by
    return z.amax(1) - p.amax(1).log_(), p


def absorb(z: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """What there is to know of a tile [n, v]: log Σ exp(z) and Σ p·z, [n]."""
    own, p = softmax(z)
    return own, torch.linalg.vecdot(p, z) if entropy else None


def weigh(z: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log Σ exp(z) [n] of a tile, that of it and all before it, whose is ``lse``, and p [n, v] among all of these."""
    own, p = softmax(z)
    lse = torch.logaddexp(lse, own)
    return own, lse, p.mul_((own - lse).exp_()[:, None])


def slopes(slope: Local, z: Tensor) -> Tensor:
    """∂/∂z [n, v] of Σ g·logprob + tilt·entropy: g·onehot − p·(Σ_k g + tilt·(z − Σ p·z))."""
    pull = slope.pull
    if slope.tilt is not None and slope.average is not None:
        pull = pull + slope.tilt * (z - slope.average)
    return z.softmax(1).mul_(-pull).scatter_add_(1, slope.targets, slope.g)


def within(local: Tensor, columns: slice) -> Tensor:
    """Which columns of a tile, counted from its first, are columns of it."""
    size: int = columns.stop - columns.start
    return (local >= 0) & (local < size)


@cache
def body(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """A body as it runs on a device: fused by the compiler on a GPU, as it stands on a CPU, strip by strip."""
    return torch.compile(function, dynamic=True) if device == "cuda" else function


# Tiles


def wide(x: Tensor) -> torch.dtype:
    """The dtype that is computed in."""
    return torch.promote_types(x.dtype, torch.float32)


def spans(n: int, size: int) -> Iterator[slice]:
    """0 to n in steps of ``size``."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def strips(raw: Tensor) -> Iterator[slice]:
    """The rows of a tile, as many at a time as are worked on together."""
    return spans(len(raw), max(1, STRIP // raw.shape[1]) if raw.device.type == "cpu" else max(1, len(raw)))


def fitted(spare: Tensor | None, n: int, v: int) -> Tensor | None:
    """[n, v] in memory that is there already: a system takes its time to hand out fresh pages."""
    return None if spare is None or spare.numel() < n * v else spare.view(-1)[: n * v].view(n, v)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a·b, in float32 where the device can sum half precision so."""
    if a.is_cuda and a.dtype != wide(a):
        return torch.mm(a, b, out_dtype=wide(a))
    return a @ b


def add_product(to: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """to += a·b, or to = a·b for the first; in one step where the dtypes are the same."""
    if a.dtype == to.dtype:
        to.addmm_(a, b, beta=not first)
    elif first:
        to.copy_(product(a, b))
    else:
        to += product(a, b)


def add_rows(to: Tensor, d: Tensor, weight: Tensor, local: Tensor) -> None:
    """to += d·W, about as exact as one product over the whole vocabulary.

    A CPU rounds the product of each tile to half precision. What the chosen tokens add is by far the largest, so it is
    taken out of the product and added in float32. Where all rows of W have much in common, the tiles' rounding stays.
    """
    if d.dtype == to.dtype or d.is_cuda:
        return add_product(to, d, weight)
    rows, k = within(local, slice(0, d.shape[1])).nonzero(as_tuple=True)
    places = torch.unique(rows * d.shape[1] + local[rows, k])
    flat = d.view(-1)
    chosen = flat[places]
    flat[places] = 0
    add_product(to, d, weight)
    flat[places] = chosen
    for few, own in zip(torch.split(places, len(d)), torch.split(chosen, len(d))):
        to.index_add_(0, few // d.shape[1], own[:, None].to(to.dtype) * weight[few % d.shape[1]])


def unread(hidden: Tensor, vocabulary: int, targets: Tensor, entropy: bool) -> Reading:
    zeros = torch.zeros(targets.shape, dtype=wide(hidden), device=hidden.device)
    own = zeros.new_empty(len(hidden), -(-vocabulary // VOCABULARY))
    return Reading(own, torch.empty_like(own) if entropy else None, zeros)


def look(head: Head, raw: Tensor, seen: Reading, targets: Tensor, columns: slice) -> None:
    """Take z at the targets that are in a tile of raw logits into ``seen``, in place."""
    local = targets - columns.start
    found = head.z(raw.gather(1, local.clamp(0, raw.shape[1] - 1)))
    torch.where(within(local, columns), found, seen.chosen, out=seen.chosen)


def turn(head: Head, raw: Tensor, slope: Local) -> Tensor:
    """Turn a tile of raw logits into its own gradient, in place."""
    for rows in strips(raw):
        z = head.z(raw[rows])
        raw[rows] = head.bend(body(slopes, raw.device.type)(slope.rows(rows), z), z)
    return raw


Tiles = dict[tuple[int, int], Tensor]
"""Raw logits by their first row and column."""


def survey(head: Head, hidden: Tensor, targets: Tensor, entropy: bool, budget: float) -> tuple[Reading, Tiles]:
    """Read all of the vocabulary, tile by tile, and keep as many tiles as ``budget`` bytes hold."""
    seen, kept, spare = unread(hidden, len(head.weight), targets, entropy), Tiles(), None
    for rows in spans(len(hidden), TOKENS):
        here = seen.rows(rows)
        for tile, columns in enumerate(spans(len(head.weight), VOCABULARY)):
            raw = head.raw(hidden[rows], columns, spare)
            look(head, raw, here, targets[rows], columns)
            for strip in strips(raw):
                own, mean = body(absorb, raw.device.type)(head.z(raw[strip]), entropy)
                here.own[strip, tile] = own
                if here.mean is not None:
                    here.mean[strip, tile] = mean
            budget -= raw.nbytes
            if budget >= 0:
                kept[rows.start, columns.start] = raw
            else:
                spare = raw
    return seen, kept


class Sums(NamedTuple):
    """Where gradients are summed over tokens, None where none is wanted; ∂weight holds nothing yet."""

    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def of(weight: Tensor, wanted: tuple[bool, ...], dtype: torch.dtype) -> Sums:
        """For (weight, bias) as they are wanted; the dtype is that of ∂weight."""
        return Sums(
            torch.empty_like(weight, dtype=dtype) if wanted[0] else None,
            weight.new_zeros(len(weight), dtype=wide(weight)) if wanted[1] else None,
        )


def sweep(
    head: Head, hidden: Tensor, slope: Slope, kept: Tiles, sums: Sums, wanted: bool, first: bool = True
) -> Tensor | None:
    """Carry the gradient through the logits, tile by tile, to ``sums`` and, if wanted, to the hidden states.

    Tiles that were not kept are computed again. The vocabulary is the outer loop, so that each tile of ∂weight is
    summed in float32 and written once; the ``first`` to write it need not add. Tokens that no gradient reaches are
    left out.
    """
    blocks = [Block.of(rows, hidden, slope) for rows in spans(max(1, len(hidden)), TOKENS)]
    d_hidden = [torch.zeros_like(block.hidden, dtype=wide(hidden)) if wanted else None for block in blocks]
    spare: Tensor | None = None
    for number, columns in enumerate(spans(len(head.weight), VOCABULARY)):
        tile = None if sums.weight is None else sums.weight[columns]
        if tile is not None and len(blocks) > 1:
            tile = tile.to(wide(hidden))  # itself, unless it is narrower
        for block, d_block in zip(blocks, d_hidden):
            spare = d = turn(head, block.raw(head, columns, kept, spare), block.slope.at(number, columns))
            if d_block is not None:
                add_rows(d_block, d, head.weight[columns], block.slope.targets - columns.start)
            if tile is not None:
                add_product(tile, d.T, block.hidden, first=first and block is blocks[0])
            if sums.bias is not None:
                sums.bias[columns] += d.sum(0, dtype=sums.bias.dtype)
        if sums.weight is not None and tile is not None and tile.dtype != sums.weight.dtype:
            sums.weight[columns] = tile
    parts = [block.spread(d) for block, d in zip(blocks, d_hidden) if d is not None]
    return torch.cat([hidden[:0], *parts]) if wanted else None


class Block(NamedTuple):
    """The tokens of one tile that a gradient reaches."""

    start: int
    size: int
    reached: Tensor | None  # [m] which of them; None for all
    hidden: Tensor  # [m, D]
    slope: Slope

    @staticmethod
    def of(rows: slice, hidden: Tensor, slope: Slope) -> Block:
        hidden, slope = hidden[rows], slope.rows(rows)
        reached = slope.reached.nonzero().squeeze(1)
        if len(reached) == len(hidden):
            return Block(rows.start, len(hidden), None, hidden, slope)
        return Block(rows.start, len(hidden), reached, hidden[reached], slope.rows(reached))

    def raw(self, head: Head, columns: slice, kept: Tiles, spare: Tensor | None) -> Tensor:
        """Their logits; a tile that was kept is handed out once, to be overwritten."""
        raw = kept.pop((self.start, columns.start), None)
        if raw is None:
            return head.raw(self.hidden, columns, spare)
        return raw if self.reached is None else raw[self.reached]

    def spread(self, d: Tensor) -> Tensor:
        """∂hidden [m, D] as that of all tokens of the tile, in their dtype."""
        d = d.to(self.hidden.dtype)
        return d if self.reached is None else d.new_zeros(self.size, d.shape[1]).index_copy_(0, self.reached, d)
