"""A loss of the model's outputs, guarded: its value, and its gradient with respect to them.

A loss which breaks the contract is refused before its gradient goes on into the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lossfns.errors import LossInputError
from lossfns.loss import BoundLoss, Loss, blaming
from lossfns.pack import PackedColumns, pack_side_columns

LossFn = Callable[[list[Any], list[Tensor]], tuple[Tensor, dict[str, float]]]


class Outputs(NamedTuple):
    """What the model computed of each datum: ``values`` [rows, ...] with their graph, datum after datum.

    ``name`` is what they are: ``"logprobs"``, ``lengths[i]`` rows of datum i, or ``"embedding"``, one row each.
    """

    name: str
    values: Tensor
    lengths: list[int]
    wrap: Any

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each datum's part: [N_i], [N_i, K], or [D] of an embedding."""
        own = tuple(self.values.shape[1:])
        return [own if self.name == "embedding" else (n, *own) for n in self.lengths]

    def records(self) -> list[dict[str, Any]]:
        """The parts as ``loss_fn_outputs``, in the datums' own class of tensors."""
        rows = np.split(self.values.detach().float().cpu().numpy(), np.cumsum(self.lengths)[:-1])
        return [{self.name: self.wrap.from_numpy(row.reshape(shape))} for row, shape in zip(rows, self.shapes)]


class Value(NamedTuple):
    """A loss, ``gradient`` = ∂loss/∂outputs in their shape, and the metrics that the loss itself returned.

    ``passes`` and ``micro_batches`` say how it was computed, ``peak_memory`` the bytes that this took at most.
    """

    loss: float
    gradient: Tensor
    metrics: dict[str, Any]
    outputs: Outputs
    passes: int = 1
    micro_batches: int = 1
    peak_memory: int = 0

    @property
    def surrogate(self) -> float:
        """Σ output·∂loss/∂output: what a service sees of a custom loss."""
        return float((self.outputs.values.detach() * self.gradient).sum())

    @property
    def nonzero(self) -> float:
        """How many entries have a gradient."""
        return float(self.gradient.count_nonzero())


def differentiate(loss_fn: LossFn | Loss | BoundLoss, data: list[Any], outputs: Outputs) -> Value:
    """Call the loss once, on leaves cut off from the model, and take its gradient."""
    return prepared(loss_fn, data, outputs)(outputs)


def prepared(loss_fn: LossFn | Loss | BoundLoss, data: list[Any], form: Outputs) -> Callable[[Outputs], Value]:
    """The loss as a function of outputs that are to have this form: its values may have no rows yet.

    What a loss of ours takes from the datums is checked and packed now, whenever the outputs come.
    """
    if isinstance(loss_fn, str) or not callable(loss_fn):
        fix = "A built-in's name goes to forward_backward, a loss such as grpo() comes here."
        raise LossInputError("loss_fn", "a function (data, logprobs_list) -> (loss, metrics)", repr(loss_fn), fix)
    bound = loss_fn.bind() if isinstance(loss_fn, Loss) else loss_fn
    if isinstance(bound, BoundLoss):
        loss, align = bound.loss, bound.align
        with blaming(loss):
            columns = pack_side_columns(
                data, form.shapes, form.values, loss.reads, bound.columns, rows=loss.rows, align=align
            )
        return partial(of_ours, bound, columns)
    return partial(of_callable, loss_fn, data)


def of_ours(bound: BoundLoss, columns: PackedColumns, outputs: Outputs) -> Value:
    """A loss of ours runs where the outputs are, on all of them end to end."""
    leaf = outputs.values.detach().requires_grad_()
    with blaming(bound.loss):
        result = bound.evaluate_packed(columns.at(leaf.flatten()))
    loss, metrics = checked(result)
    go_back(loss, leaf)
    return value(loss, metrics, leaf, outputs)


def of_callable(loss_fn: LossFn, data: list[Any], outputs: Outputs) -> Value:
    """Any other callable gets what the hosted services give it: tensors on the CPU, one for each datum.

    They are parts of one leaf, so that autograd has one to fill, not thousands; a loss of ours that is called within
    takes the leaf itself.
    """
    leaf = outputs.values.detach().cpu().clone().requires_grad_()
    parts = leaf.unbind() if outputs.name == "embedding" else torch.split(leaf, outputs.lengths)
    loss, metrics = checked(loss_fn(data, list(parts)))
    go_back(loss, leaf)
    check_used(loss, leaf, parts, outputs)
    return value(loss, metrics, leaf, outputs)


def value(loss: Tensor, metrics: dict[str, Any], leaf: Tensor, outputs: Outputs) -> Value:
    """What came of a loss that has gone back to its leaf."""
    assert leaf.grad is not None
    gradient = leaf.grad.to(outputs.values)
    check_finite(gradient, outputs)
    return Value(float(loss.detach()), gradient, metrics, outputs)


def checked(result: Any) -> tuple[Tensor, dict[str, Any]]:
    """``(loss, metrics)`` as the contract has it: a finite scalar with a graph, and a dict."""
    if not isinstance(result, tuple) or len(result) != 2:
        got = f"a {type(result).__name__}" + (f" of {len(result)}" if isinstance(result, tuple) else "")
        raise LossInputError("loss_fn", "(loss, metrics)", got, "Return the loss and a dict of floats.")
    loss, metrics = result
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise LossInputError("loss", "a 0-d tensor", got, "Reduce it, and do not call .item().")
    if loss.is_complex():
        raise LossInputError("loss", "a real number", str(loss.dtype), "Take its real part or its absolute value.")
    if not loss.requires_grad:
        got = "a constant without grad_fn"
        raise LossInputError("loss", "a loss that depends on logprobs", got, "Was something detached?")
    if not math.isfinite(value_of(loss)):
        raise LossInputError("loss", "a finite value", f"{value_of(loss)}", "Mask before the maths, not after.")
    if not isinstance(metrics, dict) or not all(isinstance(name, str) for name in metrics):
        got = f"a {type(metrics).__name__}" + (" with other keys" if isinstance(metrics, dict) else "")
        raise LossInputError("metrics", "a dict of floats by name", got, "Return {} for none.")
    return loss, metrics


def value_of(loss: Tensor) -> float:
    try:
        return float(loss.detach())
    except RuntimeError as error:
        got, fix = f"{error}", "Compute it from the logprobs, on their device."
        raise LossInputError("loss", "a number", got, fix) from error


def go_back(loss: Tensor, leaf: Tensor) -> None:
    """From the loss to the leaf, for the first time: what a loss added itself would count twice."""
    if leaf.grad is not None:
        got = "one whose loss_fn has called backward()"
        raise LossInputError("loss", "a loss without a gradient yet", got, "Return it, and leave backward() out.")
    try:
        torch.autograd.backward(loss)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        fix = "Change no tensor in place, and leave backward() out."
        raise LossInputError("loss", "a loss that autograd can differentiate", f"{error}", fix) from error


def check_used(loss: Tensor, leaf: Tensor, parts: Sequence[Tensor], outputs: Outputs) -> None:
    """Refuse a loss that leaves out a datum, as the services do."""
    if leaf.grad is None:
        raise not_used(outputs.name, 0)
    rows = (leaf.grad != 0).reshape(len(leaf.grad), -1).any(1).numpy()
    moved = np.logical_or.reduceat(rows, np.cumsum([0, *outputs.lengths[:-1]]))
    if not moved.all():  # a gradient of 0, or none at all? The graph tells.
        reached = used(loss, parts)
        left_out = [int(i) for i in np.flatnonzero(~moved) if i not in reached]
        if left_out:
            raise not_used(outputs.name, left_out[0])


def used(loss: Tensor, parts: Sequence[Tensor]) -> set[int]:
    """Which of the parts of a leaf the graph of a loss leads to: all of them, where it leads to the leaf itself."""
    split: Any = parts[0].grad_fn
    leaf = split.next_functions[0][0]
    reached, seen, to_do = set(), set(), [(loss.grad_fn, loss.output_nr)]
    while to_do:
        node, output = to_do.pop()
        if node is leaf:
            return set(range(len(parts)))
        if node is split:
            reached.add(output)
        elif node is not None and node not in seen:
            seen.add(node)
            to_do.extend(node.next_functions)
    return reached


def not_used(name: str, datum: int) -> LossInputError:
    one = "logprob" if name == "logprobs" else name
    fix = f"Every datum's {name} must enter the loss, if only as 0.0 * {name}.sum()."
    return LossInputError(name, "a gradient", f"No gradient computed for {one} tensor", fix, datum=datum)


def check_finite(gradient: Tensor, outputs: Outputs) -> None:
    """A loss may be finite where its gradient is not: sqrt at 0, or inf times 0."""
    if not all(map(math.isfinite, torch.stack(torch.aminmax(gradient)).tolist())):
        parts = torch.split(gradient, outputs.lengths)
        datum = next(i for i, part in enumerate(parts) if not part.isfinite().all())
        got, fix = "nan or inf", "Mask before the maths, not after; sqrt and log have no slope at 0."
        raise LossInputError(outputs.name, "a finite gradient", got, fix, datum=datum)
