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
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lossfns.errors import LossInputError, did_you_mean
from lossfns.logprobs.arguments import check_adapter, check_arguments, check_values
from lossfns.logprobs.head import ALL, Adapter, Head, head_of, low_rank, without_autocast
from lossfns.logprobs.plans import Frozen, Gradient, Separable, Swept, apply, separable_tokens
from lossfns.tokens import MODEL_COLUMNS

PLANS = ("auto", "tiled", "saved", "frozen", "separable")


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
            (Hu et al. 2021, arXiv:2106.09685, equation 3). This sum and its gradient are never computed: z gets
            scale·(hidden·aᵀ)·bᵀ, and a, b and hidden their gradients. A frozen weight has none and costs one product
            less; a weight that requires grad has one as without an adapter.
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
            weight take; with an adapter on a frozen weight, as many as hidden and b take. For separable, bytes of
            logits to hold at a time; None holds those of 2048 tokens.

    Returns:
        Logprobs in the shape of ``targets``, float32 (float64 for a float64 weight). With ``return_entropy`` or
        ``return_sum_square_probs`` a tuple: the logprobs, and the ones asked for, in this order. All carry gradients.

    Raises:
        LossInputError: shapes, dtypes, devices, ids or options that do not fit.
        RuntimeError: in the backward pass, under ``create_graph`` or for another gradient than was declared.

    >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 5.0]])
    >>> linear_logprobs(hidden, weight, torch.tensor([2])).exp()  # of three logits of 0
    tensor([0.3333])

    A low-rank adapter, here of rank 1:

    >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [0.0], [1.0]], requires_grad=True)
    >>> linear_logprobs(hidden, weight, torch.tensor([2]), adapter=(a, b, math.log(2))).exp()  # the last logit is log 2
    tensor([0.5000], grad_fn=<ExpBackward0>)
    """
    check_arguments(hidden, weight, targets, bias, rows, temperature, softcap, memory_budget)
    check_adapter(adapter, weight)
    check_values(targets, len(weight), bias, weight.dtype)
    hidden, weight, bias = to_one_dtype(hidden, weight, bias)
    index: Any = ALL if rows is None else rows.nonzero().squeeze(1)
    head = Head(weight, bias, *(() if adapter is None else low_rank(adapter)))
    hidden = head.with_low_rank(hidden[index])
    inputs = (hidden, weight, bias, head.up, (targets[:, None] if targets.ndim == 1 else targets)[index])
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
            auto_bytes = default_budget(hidden, weight, head.up) if memory_budget is None else memory_budget
            kept_bytes = {"auto": auto_bytes, "tiled": 0.0, "saved": math.inf}[plan] if needs_backward(*inputs) else 0.0
            logprobs, *others = apply(Swept, *inputs, extras, kept_bytes, hidden.device, *head_options)
    logprobs = scatter_rows(logprobs, rows, index).view_as(targets)
    return (logprobs, *(scatter_rows(x, rows, index) for x in others if x is not None)) if extras else logprobs


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
    """Return the result of ``linear_logprobs`` with the head of a model. The host does not wait in the forward pass.

    Args:
        model: a module with ``head`` [V, D] and, where it has them, bias, softcap and temperature.
        hidden, targets: as for ``linear_logprobs``, with ids that have been checked.
        extras: what to return besides the logprobs, names in ``MODEL_COLUMNS``.
        differentiates: those of the extras that carry a gradient. The others are constants.
        memory_budget: bytes of logits to keep at most.
        result_device: the device of the result; None is that of ``hidden``. With the CPU, the host does not wait in the
            backward pass either: it reads the gradient that arrives to find the tokens that have one.

    Returns:
        The logprobs, and the extras in the order of their names.
    """
    head = head_of(model)
    options = head.temperature, head.softcap
    check_arguments(hidden, head.weight, targets, head.bias, None, *options, None)
    hidden, weight, bias = to_one_dtype(hidden, head.weight, head.bias)
    hidden = head.with_low_rank(hidden)
    inputs = (hidden, weight, bias, head.up, targets[:, None] if targets.ndim == 1 else targets)
    device = hidden.device if result_device is None else result_device
    with without_autocast(hidden):
        if choose_plan("auto", inputs, differentiates, None) == "frozen":
            logprobs, *others = apply(Frozen, *inputs, extras, device, *options)
        else:
            kept_bytes = min(memory_budget, hidden.nbytes + weight.nbytes) if needs_backward(*inputs) else 0.0
            logprobs, *others = apply(Swept, *inputs, extras, kept_bytes, device, *options)
    columns = dict(zip(MODEL_COLUMNS, others))
    return [logprobs.view_as(targets), *(columns[x] if x in differentiates else columns[x].detach() for x in extras)]


def needs_backward(*inputs: Tensor | None) -> bool:
    """Return whether autograd will record a call with these inputs."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def default_budget(hidden: Tensor, weight: Tensor, up: Tensor | None) -> float:
    """Return the bytes of logits to keep: as many as hidden and weight take, or the adapter of a frozen weight."""
    return hidden.nbytes + (weight.nbytes if up is None or weight.requires_grad else up.nbytes)


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
        plan = "separable"  # refused below: it cannot return extras
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
