"""One forward and backward over a batch of any size: in a single pass, streamed in micro-batches, or in two passes.

All three leave the same gradient. A loss of this library is a sum over datums (or pairs) once its denominator is fixed,
so micro-batches stream through one pass. Any other callable may couple datums: then every micro-batch goes forward
without a graph, the loss is evaluated on all outputs, and each micro-batch goes forward again for its backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lossfns.backend.engine.budget import Plan
from lossfns.backend.engine.differentiate import (
    DeferredResult,
    Objective,
    backward_to,
    differentiate_loss,
    packed_columns,
    tokens_of,
)
from lossfns.backend.engine.forward import Forward
from lossfns.devices import to_device
from lossfns.loss import BoundLoss, count_of, evaluate
from lossfns.pack import PackedColumns
from lossfns.tokens import Tokens


def forward_only(forward: Forward, plan: Plan) -> Tensor:
    """Return the outputs of all datums, without a graph."""
    with torch.no_grad():
        return torch.cat([forward.micro_batch(part, plan.spare_bytes) for part in plan.micro_batches])


def forward_backward(objective: Objective, data: list[Any], forward: Forward, plan: Plan) -> DeferredResult:
    """Compute a loss, and add its gradient to the parameters' ``grad``, in as few passes as possible."""
    if objective.bound is None:
        forward = forward.on_host()  # the callable runs there
    if len(plan.micro_batches) == 1:
        return single_pass(objective, data, forward, plan)
    sums = forward.empty_outputs.name == "logprobs" and is_sum_over(plan.micro_batches, objective.group)
    if objective.bound is not None and sums and not objective.bound.loss.couples_groups:
        return streamed(objective, objective.bound, data, forward, plan)
    return two_pass(objective, data, forward, plan)


def is_sum_over(micro_batches: Sequence[slice], group: int) -> bool:
    """Return whether a loss is a sum over these micro-batches: none of them splits a group of datums."""
    return all(part.start % group == 0 for part in micro_batches)


def single_pass(objective: Objective, data: list[Any], forward: Forward, plan: Plan) -> DeferredResult:
    """Differentiate the loss with respect to detached outputs, then backpropagate through the model."""
    differentiate = objective.bind(data, forward.empty_outputs)
    outputs = forward.outputs(forward.micro_batch(plan.micro_batches[0], plan.spare_bytes))
    result = differentiate(outputs)
    torch.autograd.backward(outputs.values, result.gradient)
    return result


def streamed(objective: Objective, bound: BoundLoss, data: list[Any], forward: Forward, plan: Plan) -> DeferredResult:
    """Take each micro-batch forward and backward, one after the other; then evaluate loss and metrics of the whole."""
    columns = packed_columns(bound, data, forward.empty_outputs)
    denominator = divisor(bound, columns)
    if not can_divide(denominator):
        return two_pass(objective, data, forward, plan)  # which raises the error

    def evaluate_part(part: PackedColumns, leaf: Tensor) -> Tensor:
        return evaluate(bound.loss, tokens_of(bound, part, forward.empty_outputs, leaf), denominator)[0]

    values, gradients = zip(
        *(stream_part(evaluate_part, columns.part(part), forward, part, plan) for part in plan.micro_batches)
    )
    result = differentiate_loss(bound, columns, forward.outputs(torch.cat(values)))
    difference = result.gradient - torch.cat(gradients)
    if difference.norm() <= ROUNDING * result.gradient.norm():
        return result
    backward_again(difference, forward, plan)  # a user's term may couple datums; only the gradient shows that
    return result._replace(passes=2)


def stream_part(
    evaluate_part: Callable[[PackedColumns, Tensor], Tensor],
    columns: PackedColumns,
    forward: Forward,
    part: slice,
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """Return the outputs of a micro-batch and their gradient. On return, its graph has been freed."""
    values = forward.micro_batch(part, plan.spare_bytes)
    leaf = values.detach().requires_grad_()
    backward_to(leaf, evaluate_part(columns, leaf))
    torch.autograd.backward(values, leaf.grad)
    assert leaf.grad is not None
    return values.detach(), leaf.grad


def divisor(bound: BoundLoss, columns: PackedColumns) -> Tensor | float:
    """Return the denominator of the whole batch, which depends on no logprob; of a sum of losses one for each part."""
    loss = bound.loss
    if loss.count is None:
        return 1.0
    masks = {name: columns.columns[name] for name in loss.masks}
    zeros = torch.zeros_like(columns.weights)
    count = bound.divisor
    if count is None:
        t = Tokens(zeros, columns.weights, columns.lengths, masks, active=columns.active, targets=columns.targets)
        count = count_of(loss, t)
    return to_device(torch.as_tensor(count), zeros.device) if loss.parts else float(count)


def can_divide(denominator: Tensor | float) -> bool:
    """Return whether a denominator is above 0. Those of some parts of a sum, but not of all, may be 0."""
    if isinstance(denominator, Tensor):
        return bool(((denominator >= 0).all() & (denominator > 0).any()).item())
    return denominator > 0


ROUNDING = 1e-5
"""The largest difference by rounding between gradients of micro-batches and of the whole, relative to the norm."""


def two_pass(objective: Objective, data: list[Any], forward: Forward, plan: Plan) -> DeferredResult:
    """Take all micro-batches forward without a graph, evaluate the loss once, and take each forward and backward."""
    differentiate = objective.bind(data, forward.empty_outputs)
    result = differentiate(forward.outputs(forward_only(forward, plan)))
    backward_again(result.gradient, forward, plan)
    return result._replace(passes=2)


def backward_again(gradient: Tensor, forward: Forward, plan: Plan) -> None:
    """Take each micro-batch forward again, and backpropagate this gradient of its outputs."""
    lengths = forward.empty_outputs.lengths
    parts = torch.split(gradient, [sum(lengths[part]) for part in plan.micro_batches])
    for part, part_gradient in zip(plan.micro_batches, parts):
        torch.autograd.backward(forward.micro_batch(part, plan.spare_bytes), part_gradient)
