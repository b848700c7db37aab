"""``DeferredMetrics``: the numbers of a call, on the device until the host asks for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossfns.checks import check_denominator
from lossfns.errors import LossInputError, add_loss_name
from lossfns.tokens import Rows, Tokens
from lossfns.values import check_values, warn_if_far_off_policy

Numbers = Mapping[str, Tensor]
"""0-d tensors by name."""


@dataclass(frozen=True)
class DeferredMetrics:
    """The metrics of a call as tensors, with the checks of values that are still to be made.

    Attributes:
        loss, rows, signed: name of the loss, its kind of row, and whether its weights may be negative.
        divisor: the denominator of the whole batch, if one was given; 0-d if it is a tensor.
        batch: the packed batch.
        totals: metrics of every loss, 0-d.
        sums: each statistic summed over the active rows, 0-d, and their number as ``rows``.
        extrema: the numbers that ``check_values`` reads, 0-d.
    """

    loss: str
    rows: Rows
    signed: bool
    divisor: Tensor | float | None
    batch: Tokens
    totals: Numbers
    sums: Numbers
    extrema: Numbers

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Totals, and the mean of each statistic over the active rows, as 0-d tensors. No value is checked."""
        rows = self.sums["rows"]
        means = {name: x / rows.clamp(min=1) for name, x in self.sums.items() if name != "rows"}
        return {**self.totals, **means}

    def finalise(self) -> dict[str, float]:
        """Copy the metrics to the host, in one transfer, and check the values of the batch.

        Raises:
            LossInputError: if a value of the batch, or the loss, is not one that a loss can have.
        """
        with add_loss_name(self.loss):
            given = {"divisor": self.divisor} if isinstance(self.divisor, Tensor) else {}
            dtype = self.totals["loss"].dtype
            totals, sums, extrema, numbers = to_host(dtype, self.totals, self.sums, self.extrema, given)
            check_values(extrema, self.batch, signed=self.signed)
            return self.metrics(totals, sums, numbers["divisor"] if given else self.divisor)

    def metrics(self, totals: dict[str, float], sums: dict[str, float], divisor: Any) -> dict[str, float]:
        """Return the metrics from sums on the host. A statistic becomes its mean over the active rows."""
        rows = sums.pop("rows")
        count = totals.get("count", 1.0)
        if divisor is not None:
            check_denominator(divisor)
        elif rows == 0:
            fix = "Bind denominator= if this is one chunk of a larger batch."
            raise LossInputError("weights", "at least one active token in the batch", "only zeros", fix)
        if math.isnan(count) or (divisor is None and count <= 0):
            raise not_divisible(count)
        if not math.isfinite(totals["loss"]):
            fix = "A finite log_ratio_cap keeps exp from overflowing."
            raise LossInputError("loss", "a finite value", f"{totals['loss']:g}", fix)
        means = {name: total / rows if rows else 0.0 for name, total in sums.items()}
        row_counts = {} if self.rows.per_token else {self.rows.unit: rows}
        used = count if divisor is None or "count" not in totals else divisor  # a raw sum is never divided
        metrics = {**totals, "denominator": used, **row_counts, **means}
        warn_if_far_off_policy(metrics)
        return metrics | {"sequences": float(self.batch.sequences)}


def finalised(deferred: tuple[Tensor, DeferredMetrics]) -> tuple[Tensor, dict[str, float]]:
    """Return the loss with its metrics on the host."""
    total, metrics = deferred
    return total, metrics.finalise()


def to_host(dtype: torch.dtype, *tables: Numbers) -> list[dict[str, float]]:
    """Copy the 0-d tensors of several tables to the host in one transfer."""
    numbers = iter(torch.stack([x.to(dtype) for table in tables for x in table.values()]).tolist())
    return [dict(zip(table, numbers)) for table in tables]


def not_divisible(count: float) -> LossInputError:
    """Return the error for a batch whose count cannot be a denominator."""
    fix = "A mean needs weights with a positive sum; token_sum takes any weights."
    return LossInputError("weights", "a denominator above 0", f"{count:g}", fix)
