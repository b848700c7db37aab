"""The plans of ``linear_logprobs``, as functions of autograd. ``lossfns.logprobs.linear`` says when each is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from lossfns.devices import to_device
from lossfns.logprobs.head import Head, add_matmul_, compute_dtype, is_inside, without_autocast
from lossfns.logprobs.tiles import (
    TILE_TOKENS,
    TILE_VOCAB,
    HeadGrads,
    OutputGrad,
    TileStats,
    backward_tiles,
    blocks,
    compiled_on_gpu,
    forward_tiles,
    gather_targets,
    row_blocks,
    running_lse,
)

SEPARABLE_TOKENS = 2048
"""Tokens whose logits the separable plan holds at a time, without a memory budget."""


def no_double_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a backward pass raise under ``create_graph``: autograd would treat its result as a constant."""

    @wraps(backward)
    def backward_once(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("these logprobs have no second derivative: run backward without create_graph")
        return backward(ctx, *gradients)

    return backward_once


class Swept(torch.autograd.Function):
    """Plans tiled and saved: keep [N, tiles] floats, and as many tiles of logits as the budget holds."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        up: Tensor | None,
        targets: Tensor,
        extras: Sequence[str],
        budget: float,
        result_device: torch.device,
        *head_options: Any,
    ) -> tuple[Tensor | None, ...]:
        head = head_like(weight, bias, up, *head_options)
        stats, ctx.kept = forward_tiles(head, hidden, targets, extras, budget)
        squares = stats.sum_square_probs
        ctx.save_for_backward(hidden, weight, bias, up, targets, stats.tile_prob, stats.mean_logit, squares)
        ctx.head_options = head_options
        ctx.set_materialize_grads(False)  # an output without a gradient then costs nothing in the backward pass
        return on_device(result_device, stats.logprobs, stats.entropy, squares)

    @staticmethod
    @no_double_backward
    def backward(
        ctx: Any, g: Tensor | None, d_entropy: Tensor | None, d_squares: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, up, targets, tile_prob, mean_logit, squares = ctx.saved_tensors
        with without_autocast(hidden):
            if g is None:
                g = torch.zeros(targets.shape, dtype=compute_dtype(hidden), device=hidden.device)
            grad = OutputGrad(targets, tile_prob, g, mean_logit, d_entropy, squares, d_squares)
            head, needed = head_like(weight, bias, up, *ctx.head_options), ctx.needs_input_grad
            sums = HeadGrads.allocate(head, needed[1:4], weight.dtype)
            d_hidden = backward_tiles(head, hidden, grad, ctx.kept, sums, needed[0])
        return d_hidden, *as_inputs(sums, weight, bias, up), *[None] * 6


def head_like(weight: Tensor, bias: Tensor | None, up: Tensor | None, *options: Any) -> Head:
    """Return the head with ``up`` in the dtype of the weight, for products; the adapter's own dtype may be wider."""
    return Head(weight, bias, None, None if up is None else up.to(weight.dtype), *options)


def as_inputs(sums: HeadGrads, *inputs: Tensor | None) -> list[Tensor | None]:
    """Return the gradients of weight, bias and up, each in the dtype of its input; None stays None."""
    return [d if d is None or x is None else d.to(x.dtype) for d, x in zip((sums.weight, sums.bias, sums.up), inputs)]


def on_device(device: torch.device, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the tensors on this device; None stays None."""
    return tuple(x if x is None else x.to(device) for x in tensors)


class Frozen(torch.autograd.Function):
    """Plan frozen: keep r = Σ p_v·∂z_v/∂hidden, [N, D], over all entries of the vocabulary that are no target.

    If weight and bias need no gradient, r and the p of the targets determine ∂hidden:

        ∂hidden = Σ_k (g_k − G·p_k)·∂z_k/∂hidden − G·r,  k over the targets and G = Σ_k g_k

    The targets are left out of r because of rounding. Where a target is nearly certain, p_k is near 1 and r is small:
    in a sum with p_k·∂z_k/∂hidden, r would lose its digits.

    Entropy and Σp² are constants here: their gradients would need sums of their own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        up: Tensor | None,
        targets: Tensor,
        extras: Sequence[str],
        result_device: torch.device,
        *head_options: Any,
    ) -> tuple[Tensor | None, ...]:
        head = head_like(weight, bias, up, *head_options)
        stats = TileStats.empty(hidden, len(weight), targets, extras)
        rest = torch.empty_like(hidden, dtype=compute_dtype(hidden))
        for rows in blocks(len(hidden), TILE_TOKENS):
            rest[rows] = mean_gradient_of_others(head, hidden[rows], targets[rows], stats.rows(rows))
        logprobs = stats.logprobs
        d_raw = head.chain_through_head(torch.ones_like(stats.target_logits), stats.target_logits)
        ctx.save_for_backward(rest, weight, head.up, targets, d_raw, logprobs.exp() * first_occurrence(targets))
        result = on_device(result_device, logprobs, stats.entropy, stats.sum_square_probs)
        ctx.mark_non_differentiable(*(x for x in result[1:] if x is not None))
        return result

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, g: Tensor, *constants: Tensor | None) -> tuple[Tensor | None, ...]:
        rest, weight, up, targets, d_raw, p = ctx.saved_tensors
        g = to_device(g, rest.device)
        total = g.sum(1, keepdim=True)
        factors = (g - total * p) * d_raw
        d_hidden = torch.empty_like(rest, dtype=weight.dtype)
        with without_autocast(rest):
            for rows in row_blocks(rest):
                of_targets = [x[targets[rows]] for x in (weight, up) if x is not None]
                summed = torch.einsum("nk,nkd->nd", factors[rows], torch.cat(of_targets, 2).to(g.dtype))
                d_hidden[rows] = summed - total[rows] * rest[rows]
        return d_hidden.masked_fill_((g == 0).all(1)[:, None], 0), *[None] * 8


def mean_gradient_of_others(head: Head, hidden: Tensor, targets: Tensor, stats: TileStats) -> Tensor:
    """Return r = Σ p_v·∂z_v/∂hidden over all but the targets, in the shape of hidden, and fill in ``stats``.

    p is known only after the last tile. Until then p is computed with the running log-sum-exp, and each tile scales the
    sum so far by exp(old − new).
    """
    rest, raw = torch.zeros_like(hidden, dtype=compute_dtype(hidden)), None
    asked = stats.tile_mean is not None, stats.tile_squares is not None
    lse, first = torch.full_like(stats.tile_lse[:, 0], -math.inf), first_occurrence(targets)
    for tile, vocab in enumerate(blocks(len(head.weight), TILE_VOCAB)):
        raw, local = head.raw(hidden, vocab, raw), targets - vocab.start
        gather_targets(head, raw, stats, targets, vocab)
        for rows in row_blocks(raw):
            z, before = head.to_logits(raw[rows]), lse[rows].clone()
            sums, lse[rows], p = compiled_on_gpu(running_lse, raw.device.type)(z, before, *asked)
            stats.put(rows, tile, *sums)
            rest[rows] *= (before - lse[rows]).exp_()[:, None]
            raw[rows] = head.chain_through_head(p, z)
        subtract_targets_(raw, local, first)
        for columns, factor in head.factors:
            add_matmul_(rest[:, columns], raw, factor[vocab])
    return rest


def subtract_targets_(raw: Tensor, local: Tensor, first: Tensor) -> None:
    """Set the entries of ``raw`` [n, v] to 0 at the indices ``local`` [n, K] that lie in it.

    ``first`` [n, K] tells which indices of a token do not repeat an earlier one: each entry is subtracted once.
    """
    inside, index = is_inside(local, slice(0, raw.shape[1])), local.clamp(0, raw.shape[1] - 1)
    raw.scatter_add_(1, index, torch.where(inside & first, -raw.gather(1, index), 0))


def first_occurrence(targets: Tensor) -> Tensor:
    """Return [N, K], whether a target is the first with its id among the K of its token."""
    k = targets.shape[1]
    earlier = torch.ones(k, k, dtype=torch.bool, device=targets.device).tril(-1)
    return ~((targets[:, :, None] == targets[:, None, :]) & earlier).any(2)


Gradient = Callable[[Tensor, slice], Tensor]
"""``(logprobs of some tokens [n] or [n, K], their slice) -> ∂loss/∂logprob`` of the same shape."""


class Separable(torch.autograd.Function):
    """Plan separable: call ``gradient`` for ∂loss/∂logprob in the forward pass, and keep the final gradients.

    The gradient that arrives in the backward pass must be what ``gradient`` returned, times one factor. That factor
    scales the kept gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        up: Tensor | None,
        targets: Tensor,
        gradient: Gradient,
        block: int,
        *head_options: Any,
    ) -> Tensor:
        head, needed = head_like(weight, bias, up, *head_options), ctx.needs_input_grad
        one_block = len(hidden) <= block
        sums = HeadGrads.allocate(head, needed[1:4], weight.dtype if one_block else compute_dtype(weight))
        logprobs = torch.empty(targets.shape, dtype=compute_dtype(hidden), device=hidden.device)
        declared, d_hidden = torch.empty_like(logprobs), [hidden[:0]]
        for rows in blocks(max(1, len(hidden)), block):  # one block even without tokens: gradients are then zeros
            stats, kept = forward_tiles(head, hidden[rows], targets[rows], extras=(), budget=math.inf)
            logprobs[rows] = stats.logprobs
            declared[rows] = gradient(logprobs[rows], rows)
            grad = OutputGrad(targets[rows], stats.tile_prob, declared[rows])
            d = backward_tiles(head, hidden[rows], grad, kept, sums, needed[0], overwrite=rows.start == 0)
            if d is not None:
                d_hidden.append(d)
        ctx.save_for_backward(declared, torch.cat(d_hidden) if needed[0] else None, *sums)
        ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype, None if up is None else up.dtype)
        return logprobs

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        declared, *gradients = ctx.saved_tensors
        scale = torch.sum(g * declared) / declared.square().sum().clamp(min=torch.finfo(g.dtype).tiny)
        expected = scale * declared
        bound = 1e-4 * expected.abs() + 1e-6 * (g.abs().max() if g.numel() else 0)
        is_declared, factor = torch.stack((((g - expected).abs() <= bound).all(), scale)).tolist()
        if not is_declared:
            raise RuntimeError("linear_logprobs: backward brings another gradient than the one that gradient= declared")
        return *(None if x is None else scaled(x, factor, d) for x, d in zip(gradients, ctx.dtypes)), *[None] * 5


def scaled(x: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Return factor·x as a new tensor. A factor of 1, the usual one, costs a single pass."""
    return x.to(dtype, copy=True) if factor == 1 else (factor * x).to(dtype)


def apply(plan: type[torch.autograd.Function], *args: Any) -> Any:
    return plan.apply(*args)  # type: ignore[no-untyped-call]


def separable_tokens(memory_budget: float | None, weight: Tensor) -> int:
    """Return how many tokens' logits the separable plan holds at a time: as many as the budget allows, at least 1."""
    one_token = weight[:, :1].nbytes
    return SEPARABLE_TOKENS if memory_budget is None else max(1, int(min(memory_budget, 2**62) // one_token))
