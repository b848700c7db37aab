"""Log-probabilities of chosen tokens from hidden states and the unembedding weight, without the logits.

``linear_logprobs`` has four exact plans. They differ in what the forward pass keeps for the backward pass. With N
tokens, width D and vocabulary V, one product of matrices (GEMM) is 2·N·D·V operations:

    plan       kept                           GEMMs   when
    frozen     Σ p·∂z/∂hidden, [N, D]         2       the head needs no gradient
    separable  the gradients themselves       3       the gradient of the loss is known in the forward pass
    saved      the logits                     3       they fit
    tiled      [N, tiles] floats              4       otherwise

Each of the last three has one GEMM less where the weight is frozen and only its low-rank ``adapter`` is trained.

Saved and tiled are the two extremes of one method. The forward pass keeps as many tiles of logits as the budget holds.
The backward pass overwrites these with their gradient, and computes the others again. ``lossfns.logprobs.tiles`` has
the maths of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from lossfns.checks import check_number
from lossfns.devices import to_device
from lossfns.errors import LossInputError, did_you_mean, show
from lossfns.logprobs.tiles import (
    ALL,
    TILE_TOKENS,
    TILE_VOCAB,
    Head,
    HeadGrads,
    OutputGrad,
    TileStats,
    add_matmul_,
    backward_tiles,
    blocks,
    compiled_on_gpu,
    compute_dtype,
    forward_tiles,
    gather_targets,
    is_inside,
    row_blocks,
    running_lse,
)
from lossfns.tokens import MODEL_COLUMNS

PLANS = ("auto", "tiled", "saved", "frozen", "separable")

SEPARABLE_TOKENS = 2048
"""Tokens whose logits the separable plan holds at a time, without a memory budget."""


def no_double_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a backward pass raise under ``create_graph``, where autograd would take its result for a constant."""

    @wraps(backward)
    def backward_once(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("these logprobs have no second derivative: run backward without create_graph")
        return backward(ctx, *gradients)

    return backward_once


# The plans


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
        ctx.set_materialize_grads(False)  # an entropy that no loss differentiates then costs nothing backward
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
    """Return the head for products in the dtype of the weight; a second factor of an adapter may be wider."""
    return Head(weight, bias, None if up is None else up.to(weight.dtype), *options)


def as_inputs(sums: HeadGrads, *inputs: Tensor | None) -> list[Tensor | None]:
    """Return the gradients of weight, bias and up in the dtypes of these; None stays None."""
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

    ``first`` [n, K] tells which indices of a token are its first of their kind: x − x is 0 once.
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


def without_autocast(x: Tensor) -> torch.autocast:
    """Switch autocast off on the device of ``x``, so that products have the dtypes of their factors."""
    return torch.autocast(x.device.type, enabled=False)


def apply(plan: type[torch.autograd.Function], *args: Any) -> Any:
    return plan.apply(*args)  # type: ignore[no-untyped-call]


# The function


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    adapter: Adapter | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    return_sum_square_probs: bool = False,
    plan: str = "auto",
    gradient: Gradient | None = None,
    memory_budget: float | None = None,
) -> Any:
    """log softmax(z) at ``targets``, z = c·tanh((hidden·weightᵀ + bias) / c) / T, never above 0.

    Exact, and without the logits [N, V]; the table of plans is at the top of this module. In half precision, z is the
    result of a half-precision product of matrices, and everything after it is float32. Tokens whose incoming gradient
    is exactly 0 cost nothing in the backward pass. There is no second derivative.

    Args:
        hidden: [N, D] hidden states, taken in the dtype of the weight (under autocast: in autocast's dtype).
        weight: [V, D] unembedding.
        targets: [N] token ids, or [N, K] for K targets per token; torch.long.
        bias: [V], taken in the dtype of the weight.
        adapter: ``(a, b, scale)`` with a [r, D] and b [V, r] of any dtype: the weight is then W + scale·b·a, as in LoRA
            (Hu et al. 2021, arXiv:2106.09685, equation 3). Neither this sum nor its gradient is ever computed: z gets
            scale·(hidden·aᵀ)·bᵀ. Freeze the weight, and only a and b are trained.
        rows: [N] bool, the tokens to compute. The others cost nothing, get 0 and have no gradient.
        temperature: T, above 0.
        softcap: c, above 0, or None.
        return_entropy: also return the entropy −Σ p·log p of each token, [N], in nats, at least 0.
        return_sum_square_probs: also return Σ p² over the vocabulary for each token, [N], in (0, 1].
        plan: ``"auto"``, the cheapest that is possible, or one of ``"tiled"``, ``"saved"``, ``"frozen"`` and
            ``"separable"``.
        gradient: for the separable plan, ``(logprobs of some tokens, their slice) -> ∂loss/∂logprob``;
            ``lossfns.token_gradient`` makes it from a loss. The gradient that arrives in the backward pass must be
            this one, up to one factor for all tokens.
        memory_budget: for auto, bytes of logits to keep for the backward pass; None keeps as many as hidden and
            weight take. For separable, bytes of logits to hold at a time; None holds 2048 tokens.

    Returns:
        Logprobs in the shape of ``targets``, float32 (float64 for a float64 weight). With ``return_entropy`` or
        ``return_sum_square_probs`` a tuple: the logprobs, and the ones asked for, in this order. All carry gradients.

    Raises:
        LossInputError: shapes, dtypes, devices, ids or options that do not fit.
        RuntimeError: in the backward pass, under ``create_graph`` or for another gradient than was declared.

    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 5.0]])
    >>> linear_logprobs(hidden, weight, torch.tensor([2])).exp()  # of three logits of 0
    tensor([0.3333])
    """
    check_arguments(hidden, weight, targets, bias, rows, temperature, softcap, memory_budget)
    check_adapter(adapter, weight)
    check_values(targets, len(weight), bias, weight.dtype)
    hidden, weight, bias = to_one_dtype(hidden, weight, bias)
    index: Any = ALL if rows is None else rows.nonzero().squeeze(1)
    hidden, up = with_adapter(hidden[index], adapter)
    inputs = (hidden, weight, bias, up, (targets[:, None] if targets.ndim == 1 else targets)[index])
    extras = [name for name, asked in zip(MODEL_COLUMNS, (return_entropy, return_sum_square_probs)) if asked]
    plan, head_options = choose_plan(plan, inputs, extras, gradient), (temperature, softcap)
    others: list[Tensor | None] = []

    def declared_gradient(logprobs: Tensor, block: slice) -> Tensor:
        """Call ``gradient`` with logprobs in the shape of ``targets``, and with their positions among all rows."""
        assert gradient is not None
        in_shape = logprobs.view(len(logprobs), *targets.shape[1:])
        return gradient(in_shape, block if rows is None else index[block]).view_as(logprobs)

    with without_autocast(hidden):
        if plan == "frozen":
            logprobs, *_ = apply(Frozen, *inputs, (), hidden.device, *head_options)
        elif plan == "separable":
            block = separable_tokens(memory_budget, weight)
            logprobs = apply(Separable, *inputs, declared_gradient, block, *head_options)
        else:
            auto_bytes = default_budget(hidden, weight) if memory_budget is None else memory_budget
            kept_bytes = {"auto": auto_bytes, "tiled": 0.0, "saved": math.inf}[plan] if needs_backward(*inputs) else 0.0
            logprobs, *others = apply(Swept, *inputs, extras, kept_bytes, hidden.device, *head_options)
    logprobs = scatter_rows(logprobs, rows, index).view_as(targets)
    return (logprobs, *(scatter_rows(x, rows, index) for x in others if x is not None)) if extras else logprobs


Adapter = tuple[Tensor, Tensor, float]
"""``(a, b, scale)`` of the low-rank addition scale·b·a to a weight."""


def with_adapter(hidden: Tensor, adapter: Adapter | None) -> tuple[Tensor, Tensor | None]:
    """Return hidden and u = scale·hidden·aᵀ side by side, [N, D + r] in the dtype of hidden, and b."""
    if adapter is None:
        return hidden, None
    a, b, scale = adapter
    with without_autocast(hidden):
        u = scale * (hidden.to(a.dtype) @ a.T)
    return torch.cat((hidden, u.to(hidden.dtype)), 1), b


def head_of(model: Any) -> Head:
    """Return a model's unembedding: ``head`` [V, D] and, where it has them, its bias, temperature and softcap."""
    bias, softcap = getattr(model, "head_bias", None), getattr(model, "head_softcap", None)
    return Head(model.head, bias, None, getattr(model, "head_temperature", 1.0), softcap)


def model_logprobs(
    model: Any,
    hidden: Tensor,
    targets: Tensor,
    memory_budget: float = math.inf,
    result_device: torch.device | None = None,
) -> Tensor:
    """Return the logprobs of the targets with the head of a model; see ``model_outputs``."""
    return model_outputs(model, hidden, targets, (), (), memory_budget, result_device)[0]


def model_outputs(
    model: Any,
    hidden: Tensor,
    targets: Tensor,
    extras: Sequence[str],
    differentiates: Sequence[str],
    memory_budget: float = math.inf,
    result_device: torch.device | None = None,
) -> list[Tensor]:
    """Return what ``linear_logprobs`` returns with the head of a model. The host does not wait in the forward pass.

    Args:
        model: a module with ``head`` [V, D] and, where it has them, bias, softcap and temperature.
        hidden, targets: as for ``linear_logprobs``, with ids that have been checked.
        extras: what to return besides the logprobs, names in ``MODEL_COLUMNS``.
        differentiates: those of the extras that carry a gradient. The others are constants.
        memory_budget: bytes of logits to keep at most.
        result_device: the device of the result; None is that of ``hidden``. With the CPU, the host does not wait in the
            backward pass either, since it reads there which tokens have a gradient.

    Returns:
        The logprobs, and the extras in the order of their names.
    """
    weight, bias, _, temperature, softcap = head_of(model)
    check_arguments(hidden, weight, targets, bias, None, temperature, softcap, None)
    hidden, weight, bias = to_one_dtype(hidden, weight, bias)
    hidden, up = with_adapter(hidden, getattr(model, "head_adapter", None))
    inputs = (hidden, weight, bias, up, targets[:, None] if targets.ndim == 1 else targets)
    device = hidden.device if result_device is None else result_device
    with without_autocast(hidden):
        if choose_plan("auto", inputs, differentiates, None) == "frozen":
            logprobs, *others = apply(Frozen, *inputs, extras, device, temperature, softcap)
        else:
            kept_bytes = min(memory_budget, default_budget(hidden, weight)) if needs_backward(*inputs) else 0.0
            logprobs, *others = apply(Swept, *inputs, extras, kept_bytes, device, temperature, softcap)
    found = dict(zip(MODEL_COLUMNS, others))
    return [logprobs.view_as(targets), *(found[x] if x in differentiates else found[x].detach() for x in extras)]


def needs_backward(*inputs: Tensor | None) -> bool:
    """Return whether autograd will record a call with these inputs."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def default_budget(hidden: Tensor, weight: Tensor) -> float:
    """Return the bytes of logits to keep: as many as hidden and weight take, which is what their gradients take."""
    return hidden.nbytes + weight.nbytes


def separable_tokens(memory_budget: float | None, weight: Tensor) -> int:
    """Return how many tokens' logits the separable plan holds at a time: as many as the budget allows, at least 1."""
    one_token = weight[:, :1].nbytes
    return SEPARABLE_TOKENS if memory_budget is None else max(1, int(min(memory_budget, 2**62) // one_token))


def to_one_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Convert all three to the dtype of the weight or, under autocast, to autocast's."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def scatter_rows(x: Tensor | None, rows: Tensor | None, index: Tensor) -> Any:
    """Put the values of the computed tokens at their positions among all tokens, and zeros elsewhere."""
    return x if x is None or rows is None else x.new_zeros(len(rows), *x.shape[1:]).index_copy(0, index, x)


def choose_plan(plan: str, inputs: tuple[Tensor | None, ...], extras: Sequence[str], gradient: Gradient | None) -> str:
    """Return the plan to use: for ``"auto"`` the one with the fewest products, or ``"auto"`` where the budget decides.

    Refuse a plan that does not exist, or that the other arguments rule out.
    """
    hidden, *head, _ = inputs
    if plan not in PLANS:
        raise LossInputError("plan", "the name of a plan", repr(plan), did_you_mean(str(plan), PLANS))
    if plan == "auto":
        if gradient is not None and not extras:
            return "separable"
        if gradient is None:
            return "frozen" if needs_backward(hidden) and not needs_backward(*head) and not extras else "auto"
        plan = "separable"  # which is refused below
    if (plan == "separable") != (gradient is not None):
        fix = "It returns ∂loss/∂logprob of a block of tokens. Without such a function, use plan='auto'."
        got = "none" if gradient is None else f"one for plan={plan!r}"
        raise LossInputError("gradient", "a function for the separable plan alone", got, fix)
    if plan == "frozen" and needs_backward(*head):
        got = "one that requires grad"
        raise LossInputError("weight", "a frozen head for plan='frozen'", got, "Detach it, or take plan='auto'.")
    if extras and plan in ("frozen", "separable"):
        fix = "Take plan='auto', 'tiled' or 'saved', without gradient=."
        raise LossInputError(f"return_{extras[0]}", f"False for plan={plan!r}", "True", fix)
    return plan


def check_arguments(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    softcap: float | None,
    memory_budget: float | None,
) -> None:
    """Refuse arguments of ``linear_logprobs`` that do not fit together. The host does not wait."""
    for name, x, ndims in (("hidden", hidden, (2,)), ("weight", weight, (2,)), ("targets", targets, (1, 2))):
        if not isinstance(x, Tensor) or x.ndim not in ndims:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            expected = {"hidden": "[N, D]", "weight": "[V, D]", "targets": "[N] or [N, K]"}[name]
            raise LossInputError(name, f"a tensor {expected}", got, "Flatten batch and time: x.flatten(0, 1).")
        if x.is_meta:
            raise LossInputError(name, "a tensor with values", "one on the meta device", "Load or compute it first.")
    (n, width), vocabulary = hidden.shape, len(weight)
    shapes = {
        "weight": (weight, (vocabulary, width), "One row for each token of the vocabulary."),
        "targets": (targets, (n, *targets.shape[1:]), "One target, or K, for each row of hidden."),
        "bias": (bias, (vocabulary,), "One number for each token of the vocabulary."),
        "rows": (rows, (n,), "One bool for each row of hidden."),
    }
    for name, (value, shape, fix) in shapes.items():
        if value is not None and not isinstance(value, Tensor):
            raise LossInputError(name, "a tensor", f"a {type(value).__name__}", fix)
        if value is not None and tuple(value.shape) != shape:
            raise LossInputError(name, f"shape {shape}", f"{tuple(value.shape)}", fix)
        if value is not None and value.device != hidden.device:
            raise LossInputError(name, f"a tensor on {hidden.device}", f"one on {value.device}", "Move it.")
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if value is not None and not value.is_floating_point():
            raise LossInputError(name, "a floating point tensor", str(value.dtype), "Were token ids passed?")
    if rows is not None and rows.dtype != torch.bool:
        raise LossInputError("rows", "a bool tensor", str(rows.dtype), "Pass mask != 0.")
    if targets.dtype != torch.long:
        raise LossInputError("targets", "ids of dtype torch.long", str(targets.dtype), "Call .long().")
    check_number("temperature", temperature, "a finite number above 0", lambda t: t > 0, "1.0 leaves the logits alone.")
    if softcap is not None:
        check_number(
            "softcap", softcap, "a finite number above 0, or None", lambda c: c > 0, "None leaves the logits alone."
        )
    if memory_budget is not None and memory_budget != math.inf:
        fix = "0 keeps no logits, math.inf all."
        check_number("memory_budget", memory_budget, "a number of bytes", lambda b: b >= 0, fix)


def check_adapter(adapter: Any, weight: Tensor) -> None:
    """Refuse anything but two factors of a matrix like the weight, and a scale."""
    if adapter is None:
        return
    vocabulary, width = weight.shape
    expected, fix = f"(a [r, {width}], b [{vocabulary}, r], scale)", "peft calls them lora_A, lora_B and scaling."
    if not isinstance(adapter, tuple) or len(adapter) != 3 or not all(isinstance(x, Tensor) for x in adapter[:2]):
        raise LossInputError("adapter", expected, show(adapter), fix)
    a, b, scale = adapter
    if a.ndim != 2 or a.shape[1] != width or b.shape != (vocabulary, len(a)):
        raise LossInputError("adapter", expected, f"shapes {tuple(a.shape)} and {tuple(b.shape)}", fix)
    for factor in (a, b):
        if not factor.is_floating_point():
            raise LossInputError("adapter", "floating point factors", str(factor.dtype), fix)
        if factor.device != weight.device:
            raise LossInputError("adapter", f"factors on {weight.device}", f"one on {factor.device}", "Move it.")
    check_number("adapter scale", scale, "a finite number", lambda x: True, "LoRA's is alpha / rank.")


def check_values(targets: Tensor, vocabulary: int, bias: Tensor | None, dtype: torch.dtype) -> None:
    """Refuse ids outside of the vocabulary, and a bias that is not finite in this dtype, in one transfer."""
    ids = targets if targets.numel() else targets.new_zeros(1)
    is_finite = ids.new_ones(()) if bias is None else bias.to(dtype).isfinite().all()
    low, high, finite = torch.stack((*ids.aminmax(), is_finite)).tolist()
    if not finite:
        fix = "For a token that cannot occur use a large negative number such as -1e30, in float16 -6e4."
        raise LossInputError("bias", f"finite numbers in {dtype}", "inf or nan among them", fix)
    if targets.numel() and (low < 0 or high >= vocabulary):
        fix = "A masked slot, such as -100, still needs an id: pass rows= and any id there."
        raise LossInputError("targets", f"ids in [0, {vocabulary})", f"ids from {low} to {high}", fix)
