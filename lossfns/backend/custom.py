"""A loss of the model's outputs, guarded: its value, and its gradient with respect to them.

A loss which breaks the contract is refused before its gradient goes on into the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lossfns import BoundLoss, Loss, LossInputError
from lossfns.tokens import FlatLogprobs

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
    """Call the loss once, on leaves cut off from the model, and take its gradient.

    Our own losses run where the outputs are. Any other callable gets what the hosted services give it, tensors on
    the CPU, one for each datum. All of them are views of one flat leaf, which a loss of ours takes as it is, also
    within another callable: autograd has one leaf to fill then, in place of thousands.
    """
    if isinstance(loss_fn, str) or not callable(loss_fn):
        fix = "A built-in's name goes to forward_backward, a loss such as grpo() comes here."
        raise LossInputError("loss_fn", "a function (data, logprobs_list) -> (loss, metrics)", repr(loss_fn), fix)
    values = outputs.values.detach().flatten()
    if isinstance(loss_fn, (Loss, BoundLoss)):
        flat = FlatLogprobs(values.requires_grad_(), outputs.shapes)
        loss, metrics = checked(loss_fn(data, flat))
        go_back(loss, flat.flat)
    else:
        flat = FlatLogprobs(values.cpu().clone().requires_grad_(), outputs.shapes)
        loss, metrics = checked(loss_fn(data, list(flat)))  # it may do with its list what it likes
        go_back(loss, flat.flat)
        check_used(loss, flat, outputs.name)
    assert flat.flat.grad is not None
    gradient = flat.flat.grad.view_as(outputs.values).to(outputs.values)
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


def check_used(loss: Tensor, flat: FlatLogprobs, name: str) -> None:
    """Refuse a loss that leaves out a datum, as the services do."""
    if flat.flat.grad is None:
        raise not_used(name, 0)
    starts = np.cumsum([0, *(math.prod(view.shape) for view in flat.views[:-1])])
    still = np.flatnonzero(~np.logical_or.reduceat((flat.flat.grad != 0).numpy(), starts))
    if len(still):  # a gradient of 0, or none at all? The graph tells.
        reached = used(loss, flat)
        left_out = [int(i) for i in still if i not in reached]
        if left_out:
            raise not_used(name, left_out[0])


def used(loss: Tensor, flat: FlatLogprobs) -> set[int]:
    """The datums whose views, or whose common base, the graph of a loss leads to."""
    split = flat.views[0].grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    (base, _), *_ = split.next_functions  # type: ignore[union-attr]
    reached, seen, to_do = set(), {split}, [(loss.grad_fn, 0)]
    while to_do:
        node, output = to_do.pop()
        if node is split:
            reached.add(output)
        elif node is base:
            return set(range(len(flat.views)))
        if node is not None and node not in seen:
            seen.add(node)
            to_do.extend(node.next_functions)
    return reached


def not_used(name: str, datum: int) -> LossInputError:
    one = "logprob" if name == "logprobs" else name
    fix = f"Every datum's {name} must enter the loss, if only as 0.0 * {name}.sum()."
    return LossInputError(name, "a gradient", f"No gradient computed for {one} tensor", fix, datum=datum)


def check_finite(gradient: Tensor, outputs: Outputs, first: int = 0) -> None:
    """A loss may be finite where its gradient is not: sqrt at 0, or inf times 0. ``first`` counts the datums before."""
    if not gradient.isfinite().all():
        parts = torch.split(gradient, outputs.lengths)
        datum = first + next(i for i, part in enumerate(parts) if not part.isfinite().all())
        got, fix = "nan or inf", "Mask before the maths, not after; sqrt and log have no slope at 0."
        raise LossInputError(outputs.name, "a finite gradient", got, fix, datum=datum)
