"""One forward and backward over a batch of any size: in a single pass, streamed in micro-batches, or in two passes.

All three leave the same gradient. A loss of ours is a sum over datums (or pairs) once its denominator is fixed, so
micro-batches stream through one pass. Any other callable may couple datums: then every micro-batch goes forward
without a graph, the loss sees the whole, and each goes forward again for its backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lossfns.backend.engine.batch import ModelInputs
from lossfns.backend.engine.budget import Plan, SpareBytes
from lossfns.backend.engine.differentiate import (
    Differentiated,
    Objective,
    Outputs,
    backward_to,
    native,
    packed_columns,
)
from lossfns.backend.engine.memory import trim_heap
from lossfns.errors import LossInputError
from lossfns.loss import BoundLoss, evaluate
from lossfns.pack import PackedColumns
from lossfns.tokens import Tokens


class Forward(NamedTuple):
    """The forward pass of a request.

    Attributes:
        name: the name of its outputs, ``"logprobs"`` or ``"embedding"``.
        inputs: the inputs of all datums.
        compute: ``compute(inputs, spare_bytes)`` returns the outputs of some of the datums, with their graph.
        empty_output: outputs of no datum, in the shape, dtype and on the device of those that are to come.
    """

    name: str
    inputs: ModelInputs
    compute: Callable[[ModelInputs, SpareBytes], Tensor]
    empty_output: Tensor

    def micro_batch(self, part: slice, plan: Plan) -> Tensor:
        """Return the outputs of a micro-batch."""
        own = self.inputs.part(part)
        if len(own.tokens) < len(self.inputs.tokens):
            trim_heap(self.empty_output.device)  # the one before has freed memory
        return self.compute(own, plan.spare_bytes)

    def outputs(self, values: Tensor) -> Outputs:
        """Return the outputs of all datums, given their values."""
        return Outputs(self.name, values, self.inputs.output_lengths, self.inputs.tensor_class)


def forward_only(forward: Forward, plan: Plan) -> Tensor:
    """Return the outputs of all datums, without a graph."""
    with torch.no_grad():
        return torch.cat([forward.micro_batch(part, plan) for part in plan.micro_batches])


def forward_backward(objective: Objective, data: list[Any], forward: Forward, plan: Plan) -> Differentiated:
    """Compute a loss, and add its gradient to that of the parameters, in as few passes as possible."""
    if len(plan.micro_batches) == 1:
        return single_pass(objective, data, forward, plan)
    if objective.bound and forward.name == "logprobs" and is_sum_over(plan.micro_batches, objective.group):
        return streamed(objective, objective.bound, data, forward, plan)
    return two_pass(objective, data, forward, plan)


def is_sum_over(micro_batches: Sequence[slice], group: int) -> bool:
    """Whether a loss is a sum over these micro-batches: no pair is torn apart."""
    return all(part.start % group == 0 for part in micro_batches)


def single_pass(objective: Objective, data: list[Any], forward: Forward, plan: Plan) -> Differentiated:
    """Differentiate the loss on outputs cut off from the model, and continue through the graph that they left."""
    differentiate = objective.bind(data, forward.outputs(forward.empty_output))
    outputs = forward.outputs(check_trainable(forward.micro_batch(plan.micro_batches[0], plan), forward.name))
    result = differentiate(outputs)
    torch.autograd.backward(outputs.values, result.gradient)
    return result


def streamed(objective: Objective, bound: BoundLoss, data: list[Any], forward: Forward, plan: Plan) -> Differentiated:
    """Take each micro-batch forward and backward, one after the other; then evaluate loss and metrics of the whole."""
    columns = packed_columns(bound, data, forward.outputs(forward.empty_output))
    denominator = divisor(bound, columns)
    if not denominator > 0:
        return two_pass(objective, data, forward, plan)  # which says what is wrong
    evaluate_part = partial(evaluate, bound.loss, denominator=denominator)
    values, gradients = zip(
        *(stream_part(evaluate_part, columns.part(part), forward, part, plan) for part in plan.micro_batches)
    )
    result = native(bound, columns, forward.outputs(torch.cat(values)))
    rest = result.gradient - torch.cat(gradients)
    if rest.norm() <= ROUNDING * result.gradient.norm():
        return result
    backward_again(rest, forward, plan)  # a user's terms may couple datums, and only their gradient shows it
    return result._replace(passes=2)


def stream_part(
    evaluate_part: Callable[[Tokens], Any], columns: PackedColumns, forward: Forward, part: slice, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Return outputs of a micro-batch and their gradient. Its graph is gone before the next needs the memory."""
    values = check_trainable(forward.micro_batch(part, plan), forward.name)
    leaf = values.detach().requires_grad_()
    loss, _ = evaluate_part(columns.at(leaf.flatten()))
    backward_to(leaf, loss)
    torch.autograd.backward(values, leaf.grad)
    assert leaf.grad is not None
    return values.detach(), leaf.grad


def divisor(bound: BoundLoss, columns: PackedColumns) -> float:
    """Return the denominator of the whole batch, which depends on no logprob."""
    if bound.divisor is not None or bound.loss.count is None:
        return bound.divisor or 1.0
    return float(bound.loss.count(Tokens(torch.zeros_like(columns.weights), columns.weights, columns.lengths)))


ROUNDING = 1e-5
"""How far the gradient of a loss's parts may be from that of the whole by rounding, relative to its norm."""


def two_pass(objective: Objective, data: list[Any], forward: Forward, plan: Plan) -> Differentiated:
    """Take all micro-batches forward without a graph, evaluate the loss on the whole, and go back through each."""
    differentiate = objective.bind(data, forward.outputs(forward.empty_output))
    result = differentiate(forward.outputs(forward_only(forward, plan)))
    backward_again(result.gradient, forward, plan)
    return result._replace(passes=2)


def backward_again(gradient: Tensor, forward: Forward, plan: Plan) -> None:
    """Take each micro-batch forward once more, and back from this gradient of its outputs."""
    lengths = forward.inputs.output_lengths
    parts = torch.split(gradient, [sum(lengths[part]) for part in plan.micro_batches])
    for part, own in zip(plan.micro_batches, parts):
        torch.autograd.backward(check_trainable(forward.micro_batch(part, plan), forward.name), own)


def check_trainable(values: Tensor, name: str) -> Tensor:
    """Return outputs; refuse those that no trainable parameter can move."""
    if not values.requires_grad:
        got, fix = "a model in which all that computes them is frozen", "Train a part that they depend on."
        raise LossInputError(name, "outputs that parameters can move", got, fix)
    return values
