"""Log-sum-exp and gradient of the logits, one tile at a time.

The logits of a batch, [N, V], are often the largest tensor of a training step. Here they are computed in tiles of
``TILE_TOKENS`` × ``TILE_VOCAB``. A tile is reduced to a few numbers per token and then dropped, kept for the backward
pass, or overwritten with its own gradient.

Symbols: N tokens, width D, vocabulary V, K targets per token. A tile has n tokens and v vocabulary entries.

    raw  [n, v]   h·Wᵀ + b, as the matrix product gives it, in the dtype of the weight
    z    [n, v]   the logits c·tanh(raw / c) / T, with softcap c and temperature T; float32, float64 for float64

Forward pass. Each tile t gives lse_t = log Σ_{v in t} exp(z_v) and, with q = softmax of the tile alone, for the
entropy m_t = Σ_{v in t} q_v·z_v, and for Σp² the sum s_t = Σ_{v in t} q_v². These [N, tiles] numbers determine
everything about the whole vocabulary:

    lse      log Σ_t exp(lse_t)
    π_t      exp(lse_t − lse), the probability of tile t
    p_v      π_t·q_v
    m        Σ_v p_v·z_v = Σ_t π_t·m_t
    logprob  z_target − lse
    entropy  lse − m
    Σp²      Σ_t π_t²·s_t

Backward pass. With g_k = ∂loss/∂logprob_k, e = ∂loss/∂entropy and f = ∂loss/∂Σp², each tile becomes its own gradient
in place:

    ∂loss/∂z_v    Σ_k g_k·[v = target_k] − p_v·(Σ_k g_k + e·(z_v − m) − 2f·(p_v − Σp²))
    ∂loss/∂raw_v  ∂loss/∂z_v·(1 − (T·z_v / c)²) / T

and the chain rule gives ∂hidden = ∂raw·W, ∂W = ∂rawᵀ·h and ∂b = the sum of ∂raw over tokens. A low-rank addition
u·Upᵀ to raw has ∂u = ∂raw·Up and ∂Up = ∂rawᵀ·u, which are narrow products.

Precision: matrix products take and give the dtype of the weight; everything elementwise, and every sum over tiles or
tokens, is float32 or better. Memory: one tile in the dtype of the weight, the tiles that are kept, and float32 copies
of ``BLOCK_LOGITS`` logits at a time. On a GPU the elementwise functions are compiled, so that these copies stay in
registers.

``tile_lse``, ``running_lse`` and ``logit_grad`` are the equations. ``forward_tiles`` and ``backward_tiles`` are the
loops over all tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lossfns.devices import to_device
from lossfns.logprobs.head import Head, add_hidden_grad_, add_matmul_, compute_dtype, is_inside
from lossfns.tokens import MODEL_COLUMNS

TILE_TOKENS, TILE_VOCAB = 8192, 4096
"""The largest tile. With fewer tokens per tile, ∂weight would be read and written more often."""

BLOCK_LOGITS = 2**20
"""Logits that a CPU converts to float32 and processes at a time, so that they stay in its cache."""


class TileStats(NamedTuple):
    """Statistics of the logits of n tokens, one column per tile of the vocabulary. The tiles fill them in."""

    tile_lse: Tensor  # [n, tiles] log Σ exp(z) over the tile
    tile_mean: Tensor | None  # [n, tiles] Σ q·z over the tile, q its own softmax; None without entropy
    tile_squares: Tensor | None  # [n, tiles] Σ q² over the tile; None without Σp²
    target_logits: Tensor  # [n, K] z at the targets

    @staticmethod
    def empty(hidden: Tensor, vocabulary: int, targets: Tensor, extras: Sequence[str]) -> TileStats:
        """Allocate the statistics of all tokens of ``hidden``. ``extras`` are names in ``MODEL_COLUMNS``."""
        target_logits = torch.zeros(targets.shape, dtype=compute_dtype(hidden), device=hidden.device)
        tile_lse = target_logits.new_empty(len(hidden), -(-vocabulary // TILE_VOCAB))
        mean, squares = (torch.empty_like(tile_lse) if name in extras else None for name in MODEL_COLUMNS)
        return TileStats(tile_lse, mean, squares, target_logits)

    def rows(self, index: slice) -> TileStats:
        """Return a view of some of the tokens."""
        return TileStats(*index_each(self, index))

    def put(self, rows: slice, tile: int, lse: Tensor, mean: Tensor | None, squares: Tensor | None) -> None:
        """Write the statistics of one tile for some of the tokens."""
        for total, x in zip(self, (lse, mean, squares)):
            if total is not None and x is not None:
                total[rows, tile] = x

    @property
    def lse(self) -> Tensor:
        """[n] log Σ exp(z) over the vocabulary, never below a single z."""
        lse: Tensor = self.tile_lse.logsumexp(1)
        return lse

    @property
    def logprobs(self) -> Tensor:
        """[n, K] log-probabilities of the targets."""
        return self.target_logits - self.lse[:, None]

    @property
    def tile_prob(self) -> Tensor:
        """[n, tiles] π, the probability of each tile."""
        # Unlike exp(tile_lse − lse), softmax sums to 1 even where all logits are large and lse is rounded coarsely.
        return self.tile_lse.softmax(1)

    @property
    def mean_logit(self) -> Tensor | None:
        """[n] Σ p·z over the vocabulary."""
        return None if self.tile_mean is None else torch.linalg.vecdot(self.tile_prob, self.tile_mean)

    @property
    def entropy(self) -> Tensor | None:
        """[n] −Σ p·log p, never below 0."""
        mean = self.mean_logit
        return None if mean is None else (self.lse - mean).clamp_(min=0)

    @property
    def sum_square_probs(self) -> Tensor | None:
        """[n] Σ p² over the vocabulary."""
        return None if self.tile_squares is None else torch.linalg.vecdot(self.tile_prob.square(), self.tile_squares)


class OutputGrad(NamedTuple):
    """∂loss/∂outputs of n tokens, and the statistics that ∂loss/∂logits needs."""

    targets: Tensor  # [n, K] vocabulary ids
    tile_prob: Tensor  # [n, tiles]
    g: Tensor  # [n, K] ∂loss/∂logprob; it may be on the host, like d_entropy and d_squares
    mean_logit: Tensor | None = None  # [n] Σ p·z over the vocabulary
    d_entropy: Tensor | None = None  # [n] ∂loss/∂entropy
    sum_square_probs: Tensor | None = None  # [n] Σ p² over the vocabulary
    d_squares: Tensor | None = None  # [n] ∂loss/∂Σp²

    def rows(self, index: Any) -> OutputGrad:
        """Return the part for some of the tokens."""
        return OutputGrad(*index_each(self, index))

    def to(self, device: torch.device) -> OutputGrad:
        """Return the gradient with everything on the device of the logits."""
        entropy, squares = (x if x is None else to_device(x, device) for x in (self.d_entropy, self.d_squares))
        return self._replace(g=to_device(self.g, device), d_entropy=entropy, d_squares=squares)

    @property
    def nonzero(self) -> Tensor:
        """[n] bool, whether a token has any gradient."""
        nonzero = (self.g != 0).any(1)
        for d in (self.d_entropy, self.d_squares):
            nonzero = nonzero if d is None else nonzero | (d != 0)
        return nonzero

    def in_tile(self, tile: int, vocab: slice) -> TileGrad:
        """Return the part that one tile needs: tile number ``tile``, which covers ``vocab``."""
        local, tile_prob = self.targets - vocab.start, self.tile_prob[:, tile, None]
        grad_mass = tile_prob * self.g.sum(1, keepdim=True)
        g = torch.where(is_inside(local, vocab), self.g, 0)
        local = local.clamp(0, vocab.stop - vocab.start - 1)  # a target outside adds 0, so any valid index will do
        grad = TileGrad(local, g, grad_mass)
        if self.d_entropy is not None and self.mean_logit is not None:
            grad = grad._replace(d_entropy=tile_prob * self.d_entropy[:, None], mean_logit=self.mean_logit[:, None])
        if self.d_squares is not None and self.sum_square_probs is not None:
            d_squares, total = 2 * tile_prob * self.d_squares[:, None], self.sum_square_probs[:, None]
            grad = grad._replace(d_squares=d_squares, tile_prob=tile_prob, sum_square_probs=total)
        return grad


class TileGrad(NamedTuple):
    """The part of an ``OutputGrad`` that one tile of the vocabulary needs."""

    targets: Tensor  # [n, K] indices within the tile
    g: Tensor  # [n, K] ∂loss/∂logprob, 0 where the target lies outside the tile
    grad_mass: Tensor  # [n, 1] π·Σ_k g_k
    d_entropy: Tensor | None = None  # [n, 1] π·∂loss/∂entropy
    mean_logit: Tensor | None = None  # [n, 1] Σ p·z over the vocabulary
    d_squares: Tensor | None = None  # [n, 1] 2π·∂loss/∂Σp²
    tile_prob: Tensor | None = None  # [n, 1] π
    sum_square_probs: Tensor | None = None  # [n, 1] Σ p² over the vocabulary

    def rows(self, index: slice) -> TileGrad:
        """Return a view of some of the tokens."""
        return TileGrad(*index_each(self, index))


def index_each(tensors: Iterable[Tensor | None], index: Any) -> Any:
    """Return the rows ``index`` of each tensor; None stays None."""
    return (x if x is None else x[index] for x in tensors)


# The equations, for the logits z [n, v] of one tile


def softmax_and_lse(z: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax [n, v] of a tile and its log Σ exp(z) [n], which is never below a single z."""
    q = z.softmax(1)  # one kernel for exp and sum; max q = exp(max z − lse) gives the lse back
    return q, z.amax(1) - q.amax(1).log_()


def tile_sums(q: Tensor, z: Tensor, entropy: bool, squares: bool) -> tuple[Tensor | None, Tensor | None]:
    """Σ q·z [n] of a tile for the entropy, and Σ q² [n] for Σp², with q its softmax; None where not asked for."""
    return torch.linalg.vecdot(q, z) if entropy else None, torch.linalg.vecdot(q, q) if squares else None


def tile_lse(z: Tensor, entropy: bool, squares: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log Σ exp(z) [n] of a tile, and its ``tile_sums``."""
    q, lse = softmax_and_lse(z)
    return lse, *tile_sums(q, z, entropy, squares)


def running_lse(z: Tensor, lse: Tensor, entropy: bool, squares: bool) -> tuple[Any, Tensor, Tensor]:
    """Running softmax: what ``tile_lse`` returns, the new running lse, and the tile's probabilities under the new one.

    ``lse`` [n] is the log-sum-exp of all tiles before this one, −inf before the first. Sums of terms that were weighted
    by probabilities under the old ``lse`` have to be multiplied by exp(old − new).
    """
    q, lse_of_tile = softmax_and_lse(z)
    sums = tile_sums(q, z, entropy, squares)
    lse = torch.logaddexp(lse, lse_of_tile)
    return (lse_of_tile, *sums), lse, q.mul_((lse_of_tile - lse).exp_()[:, None])


def logit_grad(grad: TileGrad, z: Tensor) -> Tensor:
    """∂loss/∂z [n, v] = Σ_k g_k·[v = target_k] − p·(Σ_k g_k + e·(z − Σ p·z) − 2f·(p − Σp²)), with p = π·q.

    e = ∂loss/∂entropy and f = ∂loss/∂Σp².
    """
    q, grad_mass = z.softmax(1), grad.grad_mass
    if grad.d_entropy is not None and grad.mean_logit is not None:
        grad_mass = grad_mass + grad.d_entropy * (z - grad.mean_logit)
    if grad.d_squares is not None and grad.tile_prob is not None and grad.sum_square_probs is not None:
        grad_mass = grad_mass - grad.d_squares * (grad.tile_prob * q - grad.sum_square_probs)
    return q.mul_(-grad_mass).scatter_add_(1, grad.targets, grad.g)


@cache
def compiled_on_gpu(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Return the function fused by the compiler on a GPU, and as it is on a CPU."""
    return torch.compile(function, dynamic=True) if device == "cuda" else function


# Slices


def blocks(n: int, size: int) -> Iterator[slice]:
    """Split 0 to n into slices of at most ``size``."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def row_blocks(raw: Tensor) -> Iterator[slice]:
    """Split the rows of a tile into blocks that are processed together: ``BLOCK_LOGITS`` on a CPU, all on a GPU."""
    return blocks(len(raw), max(1, BLOCK_LOGITS // raw.shape[1]) if raw.device.type == "cpu" else max(1, len(raw)))


# All tiles, forward


KeptTiles = dict[tuple[int, int], Tensor]
"""Raw logits of the tiles that are kept, by their first token and first vocabulary entry."""


def forward_tiles(
    head: Head, hidden: Tensor, targets: Tensor, extras: Sequence[str], budget: float
) -> tuple[TileStats, KeptTiles]:
    """Compute all tiles of the logits and keep as many of them as ``budget`` bytes hold.

    Args:
        hidden, targets: [N, D] and [N, K].
        extras: names in ``MODEL_COLUMNS``, whose statistics are also collected.

    Returns:
        The statistics of all tokens, and the tiles that are kept for ``backward_tiles``.
    """
    stats, kept, buffer = TileStats.empty(hidden, len(head.weight), targets, extras), KeptTiles(), None
    asked = [name in extras for name in MODEL_COLUMNS]
    for tokens in blocks(len(hidden), TILE_TOKENS):
        block_stats = stats.rows(tokens)
        for tile, vocab in enumerate(blocks(len(head.weight), TILE_VOCAB)):
            raw = head.raw(hidden[tokens], vocab, buffer)
            gather_targets(head, raw, block_stats, targets[tokens], vocab)
            for rows in row_blocks(raw):
                sums = compiled_on_gpu(tile_lse, raw.device.type)(head.to_logits(raw[rows]), *asked)
                block_stats.put(rows, tile, *sums)
            budget -= raw.nbytes
            if budget >= 0:
                kept[tokens.start, vocab.start] = raw
            else:
                buffer = raw
    return stats, kept


def gather_targets(head: Head, raw: Tensor, stats: TileStats, targets: Tensor, vocab: slice) -> None:
    """Write z at the targets that lie in this tile of raw logits into ``stats.target_logits``."""
    local = targets - vocab.start
    z = head.to_logits(raw.gather(1, local.clamp(0, raw.shape[1] - 1)))
    torch.where(is_inside(local, vocab), z, stats.target_logits, out=stats.target_logits)


# All tiles, backward


class HeadGrads(NamedTuple):
    """Sums over tokens for the gradients of the head; None where a gradient is not needed."""

    weight: Tensor | None  # [V, D], uninitialised
    bias: Tensor | None  # [V] of zeros, in ``compute_dtype``
    up: Tensor | None  # [V, r], uninitialised, in ``compute_dtype``

    @staticmethod
    def allocate(head: Head, needed: tuple[bool, ...], dtype: torch.dtype) -> HeadGrads:
        """Allocate the gradients of weight, bias and up that are ``needed``; ∂weight has this ``dtype``."""
        weight, up, wide = head.weight, head.up, compute_dtype(head.weight)
        return HeadGrads(
            torch.empty_like(weight, dtype=dtype) if needed[0] else None,
            weight.new_zeros(len(weight), dtype=wide) if needed[1] else None,
            torch.empty_like(up, dtype=wide) if up is not None and needed[2] else None,
        )


def backward_tiles(
    head: Head,
    hidden: Tensor,
    grad: OutputGrad,
    kept: KeptTiles,
    head_grads: HeadGrads,
    needs_hidden: bool,
    overwrite: bool = True,
) -> Tensor | None:
    """Turn every tile of the logits into its gradient and multiply that with hidden states and weight.

    Tiles in ``kept`` are overwritten, so ``kept`` is empty afterwards. The other tiles are computed again. Tokens
    without gradient are left out. The vocabulary is the outer loop: ∂weight of one slice of it is summed over all
    tokens in float32 and written once.

    Args:
        hidden: [N, D], or [N, D + r] with a low-rank addition.
        head_grads: receives the gradients of the head.
        needs_hidden: whether ∂hidden is needed.
        overwrite: write ∂weight and ∂up over what ``head_grads`` holds instead of adding to it.

    Returns:
        ∂hidden in the shape and dtype of ``hidden``, or None.
    """
    nonzero = grad.nonzero.cpu().numpy()  # in one transfer for all tokens: the host waits for it
    grad = grad.to(hidden.device)
    active = [ActiveTokens.of(tokens, hidden, grad, nonzero) for tokens in blocks(max(1, len(hidden)), TILE_TOKENS)]
    d_hidden = [torch.zeros_like(a.hidden, dtype=compute_dtype(hidden)) if needs_hidden else None for a in active]
    buffer: Tensor | None = None
    for tile, vocab in enumerate(blocks(len(head.weight), TILE_VOCAB)):
        d_weight = None if head_grads.weight is None else head_grads.weight[vocab]
        if d_weight is not None and len(active) > 1:
            d_weight = d_weight.to(compute_dtype(hidden))  # a copy only if it is narrower than float32
        for a, d_a in zip(active, d_hidden):
            buffer = d = to_gradient_(head, a.raw(head, vocab, kept, buffer), a.grad.in_tile(tile, vocab))
            d_factors = (d_weight, None if head_grads.up is None else head_grads.up[vocab])
            for (columns, factor), d_factor in zip(head.factors, d_factors):
                if d_a is not None:
                    add_hidden_grad_(d_a[:, columns], d, factor[vocab], a.grad.targets - vocab.start)
                if d_factor is not None:
                    add_matmul_(d_factor, d.T, a.hidden[:, columns], overwrite=overwrite and a is active[0])
            if head_grads.bias is not None:
                head_grads.bias[vocab] += d.sum(0, dtype=head_grads.bias.dtype)
        if head_grads.weight is not None and d_weight is not None and d_weight.dtype != head_grads.weight.dtype:
            head_grads.weight[vocab] = d_weight
    parts = [a.scatter(d_a) for a, d_a in zip(active, d_hidden) if d_a is not None]
    return torch.cat([hidden[:0], *parts]) if needs_hidden else None


def to_gradient_(head: Head, raw: Tensor, grad: TileGrad) -> Tensor:
    """Overwrite a tile of raw logits [n, v] with ∂loss/∂raw, and return it."""
    for rows in row_blocks(raw):
        z = head.to_logits(raw[rows])
        raw[rows] = head.chain_through_head(compiled_on_gpu(logit_grad, raw.device.type)(grad.rows(rows), z), z)
    return raw


class ActiveTokens(NamedTuple):
    """The m tokens with a gradient, among up to ``TILE_TOKENS`` adjacent tokens."""

    start: int  # position of the first of the adjacent tokens in the batch
    size: int  # count of the adjacent tokens
    positions: Tensor | None  # [m] of the active ones, counted from ``start``; None if all are active
    hidden: Tensor  # [m, D]
    grad: OutputGrad  # of the m tokens

    @staticmethod
    def of(tokens: slice, hidden: Tensor, grad: OutputGrad, nonzero: np.ndarray) -> ActiveTokens:
        """Select the active ones among ``tokens`` of the batch. ``nonzero`` [N] tells which tokens are active."""
        hidden, grad = hidden[tokens], grad.rows(tokens)
        active = np.flatnonzero(nonzero[tokens])
        if len(active) == len(hidden):
            return ActiveTokens(tokens.start, len(hidden), None, hidden, grad)
        positions = to_device(active, hidden.device)
        return ActiveTokens(tokens.start, len(hidden), positions, hidden[positions], grad.rows(positions))

    def raw(self, head: Head, vocab: slice, kept: KeptTiles, buffer: Tensor | None) -> Tensor:
        """Return the active tokens' raw logits [m, v], to be overwritten: taken out of ``kept``, or computed again."""
        raw = kept.pop((self.start, vocab.start), None)
        if raw is None:
            return head.raw(self.hidden, vocab, buffer)
        return raw if self.positions is None else raw[self.positions]

    def scatter(self, d: Tensor) -> Tensor:
        """Return ∂hidden of all adjacent tokens, [size, D] in the dtype of hidden, from that of the active ones."""
        d = d.to(self.hidden.dtype)
        return d if self.positions is None else d.new_zeros(self.size, d.shape[1]).index_copy_(0, self.positions, d)
