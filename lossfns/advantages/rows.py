"""``TokenRows``: columns of tokens as one matrix, whether they come padded or as rows of different lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossfns.errors import LossInputError, show
from lossfns.pack import is_plain
from lossfns.values import LOGPROB_TOLERANCE

Columns = Tensor | np.ndarray | Sequence[Any]
"""A padded ``[B, T]`` tensor or array, or one row for each datum."""


@dataclass(frozen=True)
class TokenRows:
    """The form of the columns of a batch.

    Attributes:
        active: ``[B, T]`` bool, True at active tokens. Rows of different lengths are padded at the end.
        lengths: the length of each row; None: the columns are padded.
    """

    active: Tensor
    lengths: tuple[int, ...] | None

    def column(self, name: str, values: Any, bounds: tuple[float, float] = (-math.inf, math.inf)) -> Tensor:
        """Return a column as ``[B, T]`` float64, 0 at tokens that are not active. Refuse another form or value."""
        matrix, lengths = as_matrix(name, values, self.active.device)
        if matrix.shape != self.active.shape or lengths != self.lengths:
            fix = "Every column has the form of the weights, and one number for each token."
            raise LossInputError(name, form_text(self.active, self.lengths), form_text(matrix, lengths), fix)
        low, high = bounds
        within = (matrix >= low - LOGPROB_TOLERANCE) & (matrix <= high + LOGPROB_TOLERANCE) & matrix.isfinite()
        bad = self.active & ~within
        if bool(bad.any()):
            i, j = bad.nonzero()[0].tolist()
            expected = "a finite number" if math.isinf(high) else f"a finite number from {low:g} to {high:g}"
            fix = "Values at other tokens do not matter."
            got = f"{matrix[i, j].item()}"
            raise LossInputError(f"{name}[{j}]", f"{expected} at every active token", got, fix, datum=i)
        return torch.where(self.active, matrix, 0.0)

    def logprobs(self, name: str, values: Any) -> Tensor:
        """Return a column of logprobs."""
        return self.column(name, values, (-math.inf, 0.0))

    def mean(self, x: Tensor) -> Tensor:
        """Mean of x over the active tokens of the batch; 0 if there is none."""
        return x[self.active].sum() / max(int(self.active.sum()), 1)

    def next_active(self, x: Tensor) -> Tensor:
        """x at the next active token of the row; 0 if there is none: ``[B, T]``."""
        slots = torch.arange(x.shape[1], device=x.device).expand_as(x)
        at_or_after = torch.where(self.active, slots, x.shape[1]).flip(1).cummin(1).values.flip(1)
        end = at_or_after.new_full((len(x), 1), x.shape[1])
        after = torch.cat([at_or_after[:, 1:], end], 1)
        return torch.cat([x, x.new_zeros(len(x), 1)], 1).gather(1, after)

    def active_first(self) -> Tensor:
        """``[B, T]`` an order of each row in which its active tokens come first, in their own order."""
        return (~self.active).to(torch.uint8).argsort(dim=1, stable=True)

    def discounted_sum(self, x: Tensor, factor: float, steps: str) -> Tensor:
        """yₜ = xₜ + factor·yₜ₊₁ over the active tokens of each row, or over all its slots: ``[B, T]``."""
        if factor == 0:
            return x
        if factor == 1:
            return x.flip(1).cumsum(1).flip(1)
        total, sums = x.new_zeros(len(x)), torch.empty_like(x)
        for j in range(x.shape[1] - 1, -1, -1):
            step = x[:, j] + factor * total
            total = step if steps == "slots" else torch.where(self.active[:, j], step, total)
            sums[:, j] = total
        return sums

    def finish(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return a matrix in the form of the columns, with 0 at tokens that are not active."""
        x = torch.where(self.active, x, 0.0)
        return x if self.lengths is None else [row[:n].clone() for row, n in zip(x, self.lengths)]


def parse_token_rows(weights: Any) -> TokenRows:
    """Return the form of the columns from the weights."""
    matrix, lengths = as_matrix("weights", weights, first_device(weights))
    if not bool(matrix.isfinite().all()):
        raise LossInputError("weights", "finite numbers", "nan or inf", "A mask of 0 and 1 is enough.")
    return TokenRows(matrix != 0, lengths)


def first_device(rows: Any) -> torch.device:
    """Return the device of a tensor, or of the first row that is a tensor, else the CPU."""
    each = [rows] if isinstance(rows, Tensor) else rows if isinstance(rows, (list, tuple)) else []
    on = [row.device for row in each if isinstance(row, Tensor) and is_plain(row)]
    return on[0] if on else torch.device("cpu")


def as_matrix(name: str, values: Any, device: torch.device) -> tuple[Tensor, tuple[int, ...] | None]:
    """Return numbers as ``[B, T]`` float64, and the length of each row; None for a padded tensor or array."""
    expected, fix = "[B, T] numbers, or one row of numbers for each datum", "A row holds one number for each token."
    try:
        if isinstance(values, (Tensor, np.ndarray)):
            matrix, lengths = as_float64(values, device), None
            rank = matrix.ndim
        else:
            rows = [as_float64(row, device) for row in values]
            lengths, rank = tuple(map(len, rows)), 2 if all(row.ndim == 1 for row in rows) else 0
            matrix = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    except Exception:  # whatever values without plain numbers raise
        raise LossInputError(name, expected, show(values), fix) from None
    if rank != 2 or len(matrix) == 0:
        raise LossInputError(name, expected, f"shape {tuple(matrix.shape)}", fix)
    return matrix, lengths


def as_float64(row: Any, device: torch.device) -> Tensor:
    """Return numbers as a float64 tensor without graph."""
    if isinstance(row, Tensor):
        if not is_plain(row):
            raise TypeError("a tensor without plain numbers")
        return row.detach().to(device, torch.float64)
    return torch.from_numpy(np.array(row, dtype=np.float64)).to(device)


def form_text(matrix: Tensor, lengths: tuple[int, ...] | None) -> str:
    """Return the form of a column in words."""
    if lengths is None:
        return f"shape {list(matrix.shape)}"
    return f"rows of lengths {show(list(lengths))}"
