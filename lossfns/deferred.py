"""``DeferredMetrics``: the numbers of a call, on the device until the host asks for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lossfns.checks import check_denominator
from lossfns.errors import LossInputError, add_loss_name
from lossfns.tokens import Rows, Tokens
from lossfns.values import LENGTHS_FIT, check_values, warn_if_far_off_policy

T = TypeVar("T")


@dataclass(frozen=True)
class Numbers:
    """The 0-d results of a call as one tensor, which travels to the host at once.

    Attributes:
        names: of the totals, of the sums of statistics, and of the extrema that ``check_values`` reads.
        values: ``[k]``, in the order of the names.
    """

    names: Sequence[Sequence[str]]
    values: Tensor

    def tables(self, values: Iterable[T]) -> list[dict[str, T]]:
        """Return totals, sums and extrema by name, from the values as tensors or as floats."""
        numbers = iter(values)
        return [dict(zip(names, numbers)) for names in self.names]


def as_numbers(dtype: torch.dtype, *tables: Mapping[str, Tensor]) -> Numbers:
    """Join tables of 0-d tensors."""
    names = tuple(tuple(table) for table in tables)
    return Numbers(names, torch.stack([x.to(dtype) for table in tables for x in table.values()]))


@dataclass(frozen=True)
class DeferredMetrics:
    """The metrics of a call as tensors, with the checks of values that are still to be made.

    Attributes:
        loss, rows, signed: name of the loss, its kind of row, and whether its weights may be negative.
        divisor: the denominator of the whole batch, if one was given; 0-d if it is a tensor.
        sequences: B, the number of sequences.
        batch: a function that returns the packed batch.
        numbers: metrics of every loss; each statistic summed over the active rows, and their number as ``rows``; and
            the extrema that ``check_values`` reads.
        more: further metrics and numbers for ``check_values``, 0-d.
    """

    loss: str
    rows: Rows
    signed: bool
    divisor: Tensor | float | None
    sequences: int
    batch: Callable[[], Tokens]
    numbers: Numbers
    more: Mapping[str, Tensor]

    @property
    def sums(self) -> dict[str, Tensor]:
        """Each statistic summed over the active rows, and their number as ``rows``, as 0-d tensors."""
        return self.numbers.tables(self.numbers.values.unbind())[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Totals, and the mean of each statistic over the active rows, as 0-d tensors. No value is checked."""
        totals, sums, _ = self.numbers.tables(self.numbers.values.unbind())
        rows = sums.pop("rows").clamp(min=1)
        more = {name: x for name, x in self.more.items() if name != LENGTHS_FIT}
        return {**totals, **more, **{name: x / rows for name, x in sums.items()}}

    def finalise(self) -> dict[str, float]:
        """Copy the metrics to the host, in one transfer, and check the values of the batch.

        Raises:
            LossInputError: if a value of the batch, or the loss, is not one that a loss can have.
        """
        with add_loss_name(self.loss):
            given = {"divisor": self.divisor} if isinstance(self.divisor, Tensor) else {}
            numbers, further = to_host(self.numbers.values, {**self.more, **given})
            totals, sums, extrema = self.numbers.tables(numbers)
            divisor = further.pop("divisor", self.divisor)
            check_values({**extrema, LENGTHS_FIT: further.pop(LENGTHS_FIT, 1.0)}, self.batch, signed=self.signed)
            return self.metrics({**totals, **further}, sums, divisor)

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
        return metrics | {"sequences": float(self.sequences)}


def finalised(deferred: tuple[Tensor, DeferredMetrics]) -> tuple[Tensor, dict[str, float]]:
    """Return the loss with its metrics on the host."""
    total, metrics = deferred
    return total, metrics.finalise()


def to_host(values: Tensor, more: Mapping[str, Tensor]) -> tuple[list[float], dict[str, float]]:
    """Copy the values ``[k]`` and further 0-d tensors to the host in one transfer."""
    if more:
        values = torch.cat([values, torch.stack([x.to(values.dtype) for x in more.values()])])
    numbers = values.tolist()
    further = numbers[len(numbers) - len(more) :]
    return numbers, dict(zip(more, further))


def not_divisible(count: float) -> LossInputError:
    """Return the error for a batch whose count cannot be a denominator."""
    fix = "A mean needs weights with a positive sum; token_sum takes any weights."
    return LossInputError("weights", "a denominator above 0", f"{count:g}", fix)
