"""Log-probabilities of chosen tokens from hidden states and the unembedding weight, without the logits.

``linear_logprobs`` is one function with four exact plans. They differ in what the forward pass keeps for the
backward pass; with N tokens, width D and vocabulary V, one GEMM is 2·N·D·V operations:

    plan       kept                           GEMMs   when
    frozen     Σ p·∂z/∂hidden, [N, D]         2       weight and bias need no gradient
    separable  the gradients themselves       3       the gradient of the loss is known in the forward pass
    saved      the logits                     3       they fit
    tiled      [N, tiles] floats              4       otherwise

The last two are the ends of one scale: as many tiles of logits are kept as the budget holds, and turned into their
own gradient in place; the others are computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from lossfns.checks import number
from lossfns.errors import LossInputError, did_you_mean
from lossfns.logprobs.tiles import (
    ALL,
    TOKENS,
    VOCABULARY,
    Head,
    Reading,
    Slope,
    Sums,
    add_product,
    body,
    look,
    spans,
    strips,
    survey,
    sweep,
    unread,
    weigh,
    wide,
    within,
)

BLOCK = 2048
"""Tokens whose logits the separable plan holds at a time."""


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that has no derivative, and refuses to be taken for a constant."""

    @wraps(backward)
    def refusing(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("linear_logprobs has no second derivative: run backward without create_graph")
        return backward(ctx, *gradients)

    return refusing


# The plans


class Swept(torch.autograd.Function):
    """Keeps a float for each token and tile of the vocabulary, and what the budget holds of the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        entropy: bool,
        budget: float,
        *knobs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        seen, ctx.kept = survey(Head(weight, bias, *knobs), hidden, targets, entropy, budget)
        average = seen.average
        ctx.save_for_backward(hidden, weight, bias, targets, seen.share, average)
        ctx.knobs = knobs
        return logprobs_of(seen), None if average is None else seen.lse - average

    @staticmethod
    @once
    def backward(ctx: Any, g: Tensor, tilt: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, share, average = ctx.saved_tensors
        with plainly(hidden):
            slope, wanted = Slope(targets, share, average, g, tilt), ctx.needs_input_grad
            sums = Sums.of(weight, wanted[1:3], weight.dtype)
            d_hidden = sweep(Head(weight, bias, *ctx.knobs), hidden, slope, ctx.kept, sums, wanted[0])
        return d_hidden, sums.weight, None if sums.bias is None else sums.bias.to(weight.dtype), *[None] * 5


class Frozen(torch.autograd.Function):
    """Keeps Σ p·∂z/∂hidden over all but the targets: all there is to know if weight and bias need no gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *knobs: Any) -> Tensor:
        head, seen = Head(weight, bias, *knobs), unread(hidden, len(weight), targets, entropy=False)
        pull = torch.empty_like(hidden, dtype=wide(hidden))  # taken from a target's row, it may leave little
        for rows in spans(len(hidden), TOKENS):
            pull[rows] = pulled(head, hidden[rows], targets[rows], seen.rows(rows))
        logprobs = logprobs_of(seen)
        bend = head.bend(torch.ones_like(seen.chosen), seen.chosen)
        ctx.save_for_backward(pull, weight, targets, bend, logprobs.exp() * first_of_its_kind(targets))
        return logprobs

    @staticmethod
    @once
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        pull, weight, targets, bend, p = ctx.saved_tensors
        total = g.sum(1, keepdim=True)
        push = (g - total * p) * bend
        d_hidden = torch.empty_like(pull, dtype=weight.dtype)
        with plainly(pull):
            for rows in strips(pull):
                chosen = torch.einsum("nk,nkd->nd", push[rows], weight[targets[rows]].to(g.dtype))
                d_hidden[rows] = chosen - total[rows] * pull[rows]
        return d_hidden.masked_fill_((g == 0).all(1)[:, None], 0), *[None] * 5


def pulled(head: Head, hidden: Tensor, targets: Tensor, seen: Reading) -> Tensor:
    """Σ p·∂z/∂hidden [n, D] of the tokens of one tile over all but their targets; they are read into ``seen``.

    Where a target is nearly certain, all else is small, and so is its rounding: the target's own part g·(1 − p)
    is added in float32.
    """
    pull, raw = torch.zeros_like(hidden, dtype=wide(hidden)), None
    lse = torch.full_like(seen.own[:, 0], -math.inf)
    for tile, columns in enumerate(spans(len(head.weight), VOCABULARY)):
        raw, local = head.raw(hidden, columns, raw), targets - columns.start
        look(head, raw, seen, targets, columns)
        for rows in strips(raw):
            z, before = head.z(raw[rows]), lse[rows].clone()
            seen.own[rows, tile], lse[rows], p = body(weigh, raw.device.type)(z, before)
            pull[rows] *= (before - lse[rows]).exp_()[:, None]
            raw[rows] = head.bend(p, z)
        at, k = within(local, columns).nonzero(as_tuple=True)
        raw[at, local[at, k]] = 0
        add_product(pull, raw, head.weight[columns])
    return pull


def first_of_its_kind(targets: Tensor) -> Tensor:
    """[N, K] whether a target stands at no earlier place of its row."""
    k = targets.shape[1]
    earlier = torch.ones(k, k, dtype=torch.bool, device=targets.device).tril(-1)
    return ~((targets[:, :, None] == targets[:, None, :]) & earlier).any(2)


Gradient = Callable[[Tensor, slice], Tensor]
"""∂loss/∂logprob of a block of rows from its logprobs, [n] or [n, K] as the targets: of a sum over tokens."""


class Separable(torch.autograd.Function):
    """Asks for ∂loss/∂logprob block by block in the forward pass, and keeps the gradients that follow from it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        gradient: Gradient,
        block: int,
        *knobs: Any,
    ) -> Tensor:
        head, wanted = Head(weight, bias, *knobs), ctx.needs_input_grad
        sums = Sums.of(weight, wanted[1:3], weight.dtype if len(hidden) <= block else wide(weight))
        logprobs = torch.empty(targets.shape, dtype=wide(hidden), device=hidden.device)
        known, d_hidden = torch.empty_like(logprobs), [hidden[:0]]
        for rows in spans(max(1, len(hidden)), block):  # no tokens have gradients too: zeros
            seen, kept = survey(head, hidden[rows], targets[rows], entropy=False, budget=math.inf)
            logprobs[rows] = logprobs_of(seen)
            known[rows] = gradient(logprobs[rows], rows)
            slope = Slope(targets[rows], seen.share, None, known[rows], None)
            d = sweep(head, hidden[rows], slope, kept, sums, wanted[0], first=rows.start == 0)
            d_hidden += [] if d is None else [d]
        ctx.save_for_backward(known, torch.cat(d_hidden) if wanted[0] else None, *sums)
        ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype)
        return logprobs

    @staticmethod
    @once
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        known, *gradients = ctx.saved_tensors
        scale = torch.sum(g * known) / known.square().sum().clamp(min=torch.finfo(g.dtype).tiny)
        announced = scale * known
        if g.numel() and not ((g - announced).abs() <= 1e-4 * announced.abs() + 1e-6 * g.abs().max()).all():
            raise RuntimeError("the gradient that reaches linear_logprobs is not the one that was announced")
        return *(None if x is None else scaled(x, scale, d) for x, d in zip(gradients, ctx.dtypes)), *[None] * 5


def scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of its own; in one pass where the loss is what backward starts from, and the scale 1."""
    return x.to(dtype, copy=True) if scale == 1 else (scale * x).to(dtype)


def logprobs_of(seen: Reading) -> Tensor:
    return seen.chosen - seen.lse[:, None]


def plainly(x: Tensor) -> torch.autocast:
    """Without autocast: every product has the dtypes that stand there."""
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
    rows: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    plan: str = "auto",
    gradient: Gradient | None = None,
    memory_budget: float | None = None,
) -> Any:
    """log softmax(z) at ``targets``, z = c·tanh((hidden·weightᵀ + bias) / c) / T, never above 0.

    Exact, and without the logits [N, V]: the table of plans is above. In half precision z is what a product of
    matrices of that precision gives, and all that follows is float32. Tokens that receive a gradient of exactly
    0 cost nothing in the backward pass. There is no second derivative.

    Args:
        hidden, weight, bias: [N, D], [V, D] and [V]; hidden and bias are taken in the dtype of the weight.
        targets: ids [N], or [N, K] of K targets for each token.
        rows: [N] bool, the tokens that are wanted; the others cost nothing, get 0 and have no gradient.
        temperature, softcap: T, and c or None.
        return_entropy: also return the entropy −Σ p·log p of each token, [N], in nats.
        plan: ``"auto"``, or one of ``"tiled"``, ``"saved"``, ``"frozen"`` and ``"separable"``.
        gradient: for separable, ``(logprobs of some tokens, index of these) -> ∂loss/∂logprob``, as
            ``lossfns.token_gradient`` makes it of a loss: up to one factor for all tokens it must be what arrives in
            the backward pass.
        memory_budget: bytes of logits that may be kept (separable: held at a time); None, without a plan: as many
            as hidden and weight take.

    Returns:
        Logprobs in the shape of ``targets``, float32 (float64 for float64); if asked, with the entropies.

    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 5.0]])
    >>> linear_logprobs(hidden, weight, torch.tensor([2])).exp()  # of three logits of 0
    tensor([0.3333])
    """
    check(hidden, weight, targets, bias, rows, temperature, softcap, memory_budget)
    hidden, weight, bias = in_one_dtype(hidden, weight, bias)
    wanted: Any = ALL if rows is None else rows.nonzero().squeeze(1)
    given = (hidden[wanted], weight, bias, (targets[:, None] if targets.ndim == 1 else targets)[wanted])
    knobs = (temperature, softcap)

    def swept(budget: float) -> tuple[Tensor, Tensor | None]:
        both: tuple[Tensor, Tensor | None] = apply(
            Swept, *given, return_entropy, budget if learns(*given) else 0.0, *knobs
        )
        return both

    def announced(logprobs: Tensor, index: slice) -> Tensor:
        assert gradient is not None
        shown = logprobs.view(len(logprobs), *targets.shape[1:])
        return gradient(shown, index if rows is None else wanted[index]).view_as(logprobs)

    plans: dict[str, Callable[[], tuple[Tensor, Tensor | None]]] = {
        "auto": lambda: swept(modest(hidden, weight) if memory_budget is None else memory_budget),
        "tiled": lambda: swept(0.0),
        "saved": lambda: swept(math.inf),
        "frozen": lambda: (apply(Frozen, *given, *knobs), None),
        "separable": lambda: (apply(Separable, *given, announced, block(memory_budget, weight), *knobs), None),
    }
    with plainly(hidden):
        logprobs, entropy = plans[chosen_plan(plan, plans, given, return_entropy, gradient)]()
    logprobs = whole(logprobs, rows, wanted).view_as(targets)
    return (logprobs, whole(entropy, rows, wanted)) if return_entropy else logprobs


def head_of(model: Any) -> Head:
    """A model's unembedding: ``head`` [V, D] and, where it has them, its bias, temperature and softcap."""
    bias, softcap = getattr(model, "head_bias", None), getattr(model, "head_softcap", None)
    return Head(model.head, bias, getattr(model, "head_temperature", 1.0), softcap)


def model_logprobs(model: Any, hidden: Tensor, targets: Tensor, memory_budget: float = math.inf) -> Tensor:
    """``linear_logprobs`` with the head of a model, and ``memory_budget`` bytes for logits at most."""
    weight, bias, temperature, softcap = head_of(model)
    logprobs: Tensor = linear_logprobs(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        memory_budget=min(memory_budget, modest(hidden, weight)),
    )
    return logprobs


def learns(*inputs: Tensor | None) -> bool:
    """Whether there will be a backward pass."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def modest(hidden: Tensor, weight: Tensor) -> float:
    """As much as the inputs take, and their gradients, if all are wanted."""
    return hidden.nbytes + weight.nbytes


def block(memory_budget: float | None, weight: Tensor) -> int:
    """Tokens whose logits the separable plan holds at a time: 2048, or as many as the budget allows."""
    return BLOCK if memory_budget is None else max(1, int(min(memory_budget, 2**62) // weight[:, :1].nbytes))


def in_one_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """That of the weight, or what autocast says."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def whole(x: Tensor | None, rows: Tensor | None, wanted: Tensor) -> Any:
    """Values of the wanted rows among zeros."""
    return x if x is None or rows is None else x.new_zeros(len(rows), *x.shape[1:]).index_copy(0, wanted, x)


def chosen_plan(
    plan: str,
    plans: Iterable[str],
    given: tuple[Tensor, Tensor, Tensor | None, Tensor],
    entropy: bool,
    gradient: Gradient | None,
) -> str:
    """The plan by name; ``"auto"`` is the one with the fewest products that is possible."""
    hidden, *head, _ = given
    if plan not in plans:
        raise LossInputError("plan", "the name of a plan", repr(plan), did_you_mean(str(plan), plans))
    if plan == "auto":
        if gradient is not None:
            return "separable"
        return "frozen" if learns(hidden) and not learns(*head) and not entropy else "auto"
    if (plan == "separable") != (gradient is not None):
        fix = "It is ∂loss/∂logprob of a block of tokens; without one take plan='auto'."
        got = "none" if gradient is None else f"one for plan={plan!r}"
        raise LossInputError("gradient", "a function for the separable plan alone", got, fix)
    if plan == "frozen" and learns(*head):
        got = "one that requires grad"
        raise LossInputError("weight", "a frozen head for plan='frozen'", got, "Detach it, or take plan='auto'.")
    if entropy and plan in ("frozen", "separable"):
        fix = "Take plan='auto', 'tiled' or 'saved'."
        raise LossInputError("return_entropy", f"False for plan={plan!r}", "True", fix)
    return plan


def check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    softcap: float | None,
    memory_budget: float | None,
) -> None:
    """Refuse what does not fit together."""
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
    for name, (given, shape, fix) in shapes.items():
        if given is not None and not isinstance(given, Tensor):
            raise LossInputError(name, "a tensor", f"a {type(given).__name__}", fix)
        if given is not None and tuple(given.shape) != shape:
            raise LossInputError(name, f"shape {shape}", f"{tuple(given.shape)}", fix)
        if given is not None and given.device != hidden.device:
            raise LossInputError(name, f"a tensor on {hidden.device}", f"one on {given.device}", "Move it.")
    for name, number_like in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if number_like is not None and not number_like.is_floating_point():
            raise LossInputError(name, "a floating point tensor", str(number_like.dtype), "Were token ids passed?")
    if bias is not None and not bias.to(weight.dtype).isfinite().all():
        fix = "Of a token that cannot occur, a large negative one such as -1e30, in float16 -6e4."
        raise LossInputError("bias", f"finite numbers in {weight.dtype}", "inf or nan among them", fix)
    if rows is not None and rows.dtype != torch.bool:
        raise LossInputError("rows", "a bool tensor", str(rows.dtype), "Pass mask != 0.")
    if targets.dtype != torch.long:
        raise LossInputError("targets", "ids of dtype torch.long", str(targets.dtype), "Call .long().")
    number("temperature", temperature, "a finite number above 0", lambda t: t > 0, "1.0 leaves the logits alone.")
    if softcap is not None:
        number("softcap", softcap, "a finite number above 0, or None", lambda c: c > 0, "None leaves the logits alone.")
    if memory_budget is not None and memory_budget != math.inf:
        fix = "0 keeps no logits, math.inf all."
        number("memory_budget", memory_budget, "a number of bytes", lambda b: b >= 0, fix)
    if not targets.numel():
        return
    low, high = torch.stack(targets.aminmax()).tolist()
    if low < 0 or high >= vocabulary:
        fix = "A masked slot, such as -100, still needs an id: pass rows= and any id there."
        raise LossInputError("targets", f"ids in [0, {vocabulary})", f"ids from {low} to {high}", fix)
