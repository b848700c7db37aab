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
    """A loss, ``gradient`` = ∂loss/∂outputs in their shape, and the metrics that the loss itself returned."""

    loss: float
    gradient: Tensor
    metrics: dict[str, Any]
    outputs: Outputs

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

    Our own losses run where the outputs are, on one flat leaf. Any other callable gets what the hosted
    services give it: one leaf for each datum, on the CPU.
    """
    if isinstance(loss_fn, str) or not callable(loss_fn):
        fix = "A built-in's name goes to forward_backward, a loss such as grpo() comes here."
        raise LossInputError("loss_fn", "a function (data, logprobs_list) -> (loss, metrics)", repr(loss_fn), fix)
    if isinstance(loss_fn, (Loss, BoundLoss)):
        flat = FlatLogprobs(outputs.values.detach().reshape(-1).requires_grad_(), outputs.shapes)
        leaves = [flat.flat]
        loss, metrics = checked(loss_fn(data, flat))
    else:
        leaves = separate(outputs)
        loss, metrics = checked(loss_fn(data, leaves.copy()))  # it may do with its list what it likes
    go_back(loss, leaves)
    gradient = torch.cat([gradient_of(leaf, i, outputs.name).flatten() for i, leaf in enumerate(leaves)])
    gradient = gradient.view_as(outputs.values).to(outputs.values)
    check_finite(gradient, outputs)
    return Value(float(loss.detach()), gradient, metrics, outputs)


def separate(outputs: Outputs) -> list[Tensor]:
    """A leaf for each datum, on the CPU."""
    sizes = [math.prod(shape) for shape in outputs.shapes]
    parts = torch.split(outputs.values.detach().cpu().flatten(), sizes)
    return [part.reshape(shape).clone().requires_grad_() for part, shape in zip(parts, outputs.shapes)]


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


def go_back(loss: Tensor, leaves: list[Tensor]) -> None:
    """From the loss to the leaves, for the first time: what a loss added itself would count twice."""
    if any(leaf.grad is not None for leaf in leaves):
        got = "one whose loss_fn has called backward()"
        raise LossInputError("loss", "a loss without a gradient yet", got, "Return it, and leave backward() out.")
    try:
        torch.autograd.backward(loss)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        fix = "Change no tensor in place, and leave backward() out."
        raise LossInputError("loss", "a loss that autograd can differentiate", f"{error}", fix) from error


def gradient_of(leaf: Tensor, datum: int, name: str) -> Tensor:
    if leaf.grad is None:
        one = "logprob" if name == "logprobs" else name
        fix = f"Every datum's {name} must enter the loss, if only as 0.0 * {name}.sum()."
        raise LossInputError(name, "a gradient", f"No gradient computed for {one} tensor", fix, datum=datum)
    return leaf.grad


def check_finite(gradient: Tensor, outputs: Outputs) -> None:
    """A loss may be finite where its gradient is not: sqrt at 0, or inf times 0."""
    if not gradient.isfinite().all():
        parts = torch.split(gradient, outputs.lengths)
        datum = next(i for i, part in enumerate(parts) if not part.isfinite().all())
        got, fix = "nan or inf", "Mask before the maths, not after; sqrt and log have no slope at 0."
        raise LossInputError(outputs.name, "a finite gradient", got, fix, datum=datum)
