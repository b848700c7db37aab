"""Both sides of a row as numbers: value, gradient, and whether the verdict holds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

import lossfns
from lossfns import Loss
from tools.rosetta.batch import Batch
from tools.rosetta.inputs import INPUTS
from tools.rosetta.row import DIFFERENT, Row

SAME = 1e-6
"""Largest difference of value and gradient of rows that are equal, or equal up to a factor."""
APART = 1e-4
"""Smallest difference of value or gradient, relative to the larger number, of rows that are different."""


@dataclass(frozen=True)
class Side:
    """One side of a row.

    Attributes:
        output: the loss, or one advantage for each sample or token.
        gradient: of the loss by the leaf of the batch; zeros where the output is no function of it.
    """

    output: Tensor
    gradient: Tensor

    @property
    def value(self) -> float:
        """The loss. Of several outputs, Σ cos(i)·output."""
        return float(self.output if self.output.ndim == 0 else along(self.output))

    @property
    def slope(self) -> float:
        """Σ cos(i)·gradient, the change of the loss along one fixed direction."""
        return float(along(self.gradient))

    def times(self, factor: float) -> Side:
        """Multiply both numbers."""
        return Side(self.output * factor, self.gradient * factor)


def along(x: Tensor) -> Tensor:
    """Σ cos(i)·x over the entries of a tensor, in order."""
    x = x.detach().flatten().double()
    return (torch.arange(len(x)).double().cos() * x).sum()


def side(function: Callable[[Batch], Tensor], batch: Batch) -> Side:
    """Evaluate one side at a batch."""
    leaf = batch.leaf.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of far off-policy tokens, which the inputs have on purpose
        output = function(replace(batch, leaf=leaf))
    if not output.requires_grad:
        return Side(output.detach().double(), torch.zeros_like(leaf))
    (gradient,) = torch.autograd.grad(output.sum(), leaf, allow_unused=True)
    return Side(output.detach().double(), torch.zeros_like(leaf) if gradient is None else gradient.double())


@cache
def batch_of(name: str) -> Batch:
    """Return a batch by its name."""
    return INPUTS[name]()


def ours(row: Row) -> Side:
    """Evaluate our call: a loss on the padded batch, or a function of the columns."""

    def function(b: Batch) -> Tensor:
        made = eval(row.call, {**vars(lossfns), **b.columns, "lp": b.lp, "mask": b.mask, "lengths": b.lengths})
        if not isinstance(made, Loss):
            return torch.as_tensor(made[0] if isinstance(made, tuple) else made)
        loss, _ = made.padded(b.lp, b.mask, **{name: b.column(name) for name in made.reads})
        return loss

    return side(function, batch_of(row.inputs))


def peers(row: Row) -> Side:
    """Evaluate the framework's functions, or the formula."""
    return side(row.peer, batch_of(row.inputs))


def factor(row: Row) -> float:
    """Return what our numbers are multiplied with."""
    b = batch_of(row.inputs)
    sizes: dict[str, Any] = {"B": len(b.mask), "T": b.mask.shape[1], "n": int(b.mask.sum())}
    return float(eval(row.factor, {**b.columns, **sizes, "lengths": b.lengths}))


def distance(x: Tensor, y: Tensor) -> float:
    """Return the largest difference, in units of the largest number of ``y`` if this is above 1."""
    if x.shape != y.shape:
        return float("inf")
    scale = max(1.0, float(y.abs().max()))
    return float(torch.nan_to_num(x - y, nan=torch.inf).abs().max()) / scale


def relative(x: Tensor, y: Tensor) -> float:
    """Return the largest difference in units of the largest number of both."""
    scale = max(float(x.abs().max()), float(y.abs().max()), 1e-12)
    return float(torch.nan_to_num(x - y, nan=torch.inf).abs().max()) / scale


def fault(row: Row, mine: Side, theirs: Side) -> str:
    """Return why the verdict does not hold, or an empty text."""
    scaled = mine.times(factor(row))
    gap = distance(scaled.output, theirs.output), distance(scaled.gradient, theirs.gradient)
    if row.verdict == DIFFERENT:
        apart = max(relative(mine.output, theirs.output), relative(mine.gradient, theirs.gradient))
        return "" if apart > APART else f"is different by {apart:.1e} only"
    return "" if max(gap) <= SAME else f"value differs by {gap[0]:.1e}, gradient by {gap[1]:.1e}"
