"""One forward and backward over a batch of any size: at once, streamed in micro-batches, or in two passes.

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

from lossfns.backend.engine.batch import Rows
from lossfns.backend.engine.differentiate import LossFn, Outputs, Value, differentiate, go_back, of_ours
from lossfns.backend.engine.memory import give_back
from lossfns.errors import LossInputError
from lossfns.loss import BoundLoss, Loss, blaming, evaluate
from lossfns.pack import PackedColumns, pack_side_columns
from lossfns.tokens import PAIRS, Tokens


class Work(NamedTuple):
    """What a request computes of its datums: ``run`` gives some of them their values, with the graph.

    ``like`` is an empty tensor of the dtype and on the device of these.
    """

    name: str
    rows: Rows
    run: Callable[[Rows], Tensor]
    like: Tensor

    def values(self, part: slice) -> Tensor:
        """Of a micro-batch; what the one before has freed is handed back first."""
        own = self.rows.part(part)
        if len(own.tokens) < len(self.rows.tokens):
            give_back(self.like.device)
        return self.run(own)

    def outputs(self, values: Tensor) -> Outputs:
        return Outputs(self.name, values, self.lengths, self.rows.wrap)

    @property
    def lengths(self) -> list[int]:
        """How many rows of the values each datum has: its targets, or one embedding."""
        return self.rows.counts


Parts = Sequence[slice]
"""Micro-batches: slices of the datums, which cover them in order."""


def forward(work: Work, parts: Parts) -> Tensor:
    """The values of all datums, without a graph."""
    with torch.no_grad():
        return torch.cat([work.values(part) for part in parts])


def step(loss_fn: LossFn | Loss | BoundLoss, data: list[Any], work: Work, parts: Parts) -> Value:
    """A loss, and its gradient added to that of the parameters, in as few passes as are possible."""
    if len(parts) == 1:
        return at_once(loss_fn, data, work)
    bound = loss_fn.bind() if isinstance(loss_fn, Loss) else loss_fn
    if isinstance(bound, BoundLoss) and work.name == "logprobs" and splits(bound, parts):
        return streamed(bound, data, work, parts)
    return twice(loss_fn, data, work, parts)


def splits(bound: BoundLoss, parts: Parts) -> bool:
    """Whether the loss is a sum over these micro-batches: no pair is torn apart."""
    return bound.loss.rows != PAIRS or all(part.start % 2 == 0 for part in parts)


def at_once(loss_fn: LossFn | Loss | BoundLoss, data: list[Any], work: Work) -> Value:
    """The loss sees values cut off from the model; its gradient goes on through the graph that they left."""
    outputs = work.outputs(moved(work.values(slice(None)), work.name))
    value = differentiate(loss_fn, data, outputs)
    torch.autograd.backward(outputs.values, value.gradient)
    return value


def streamed(bound: BoundLoss, data: list[Any], work: Work, parts: Parts) -> Value:
    """Forward, loss and backward of one micro-batch after the other; then loss and metrics of the whole."""
    loss, shapes, align = bound.loss, work.rows.shapes, bound.align
    with blaming(loss):  # refuses, before the first forward, what does not fit together
        columns = pack_side_columns(data, shapes, work.like, loss.reads, bound.columns, rows=loss.rows, align=align)
    denominator = divisor(bound, columns)
    if not denominator > 0:
        return twice(bound, data, work, parts)  # which says what is wrong
    value_of = partial(evaluate, loss, denominator=denominator)
    values, gradients = zip(*(own_part(value_of, columns.part(part), work, part) for part in parts))
    value = of_ours(bound, columns, work.outputs(torch.cat(values)))
    rest = value.gradient - torch.cat(gradients)
    if rest.norm() <= ROUNDING * value.gradient.norm():
        return value
    add(rest, work, parts)  # terms of one's own may couple datums, and nothing but their gradient shows it
    return value._replace(passes=2)


def own_part(
    value_of: Callable[[Tokens], Any], columns: PackedColumns, work: Work, part: slice
) -> tuple[Tensor, Tensor]:
    """Values and their gradient of one micro-batch, all of whose graph is gone before the next needs the memory."""
    own = moved(work.values(part), work.name)
    leaf = own.detach().requires_grad_()
    loss, _ = value_of(columns.at(leaf.flatten()))
    go_back(loss, leaf)
    torch.autograd.backward(own, leaf.grad)
    assert leaf.grad is not None
    return own.detach(), leaf.grad


def divisor(bound: BoundLoss, columns: PackedColumns) -> float:
    """What the loss divides by, which takes no logprobs."""
    if bound.divisor is not None or bound.loss.count is None:
        return bound.divisor or 1.0
    return float(bound.loss.count(Tokens(torch.zeros_like(columns.weights), columns.weights, columns.lengths)))


ROUNDING = 1e-5
"""What the gradients of a loss's parts may differ by from that of the whole, in relation to its norm."""


def twice(loss_fn: LossFn | Loss | BoundLoss, data: list[Any], work: Work, parts: Parts) -> Value:
    """Forward without a graph, the loss of the whole, then forward again and backward, micro-batch by micro-batch."""
    value = differentiate(loss_fn, data, work.outputs(forward(work, parts)))
    add(value.gradient, work, parts)
    return value._replace(passes=2)


def add(gradient: Tensor, work: Work, parts: Parts) -> None:
    """Add to the parameters what a gradient of the values gives."""
    for part, own in zip(parts, torch.split(gradient, [sum(work.lengths[part]) for part in parts])):
        torch.autograd.backward(moved(work.values(part), work.name), own)


def moved(values: Tensor, name: str) -> Tensor:
    """The values, if a parameter can move them."""
    if not values.requires_grad:
        got, fix = "a model in which all that computes them is frozen", "Train a part that they depend on."
        raise LossInputError(name, "outputs that parameters can move", got, fix)
    return values
