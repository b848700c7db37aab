"""``DeferredMetrics``: the numbers of a call, on the device until the host asks for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lossfns.checks import check_denominator
from lossfns.devices import to_device
from lossfns.errors import LossInputError, add_loss_name
from lossfns.tokens import Rows, Tokens
from lossfns.values import LENGTHS_FIT, check_values, warn_if_far_off_policy

T = TypeVar("T")


@dataclass(frozen=True)
class Numbers:
    """The 0-d results of a call as one tensor, which travels to the host at once.

    Attributes:
        names: the names of the totals, of the sums of statistics, and of the extrema that ``check_values`` reads.
        values: ``[k]`` all values, in the order of the names.
    """

    names: Sequence[Sequence[str]]
    values: Tensor

    def tables(self, values: Iterable[T]) -> list[dict[str, T]]:
        """Return totals, sums and extrema by name, from the values as tensors or as floats."""
        numbers = iter(values)
        return [dict(zip(names, numbers)) for names in self.names]


def join_numbers(dtype: torch.dtype, *tables: Mapping[str, Tensor]) -> Numbers:
    """Join tables of 0-d tensors by name into ``Numbers`` of one dtype."""
    names = tuple(tuple(table) for table in tables)
    return Numbers(names, torch.stack([x.to(dtype) for table in tables for x in table.values()]))


@dataclass(frozen=True)
class DeferredMetrics:
    """The metrics of a call as tensors. Their values are checked when the host reads them.

    Attributes:
        loss, rows, output: name of the loss, its kind of row, and the output of the model that it takes.
        signed: whether its weights may be negative.
        divisor: the denominator of the whole batch, if one was given; 0-d if it is a tensor.
        sequences: B, the number of sequences.
        get_batch: a function that returns the packed batch, in which an error names the place of a bad value.
        numbers: three tables: metrics of every loss; each statistic summed over the active rows, and the number of
            these rows as ``rows``; and the extrema that ``check_values`` reads.
        extras: 0-d tensors by name, where a call has them: ``grad_l1`` and ``LENGTHS_FIT``.
    """

    loss: str
    rows: Rows
    output: str
    signed: bool
    divisor: Tensor | float | None
    sequences: int
    get_batch: Callable[[], Tokens]
    numbers: Numbers
    extras: Mapping[str, Tensor]

    @property
    def sums(self) -> dict[str, Tensor]:
        """Each statistic summed over the active rows, and the number of these rows as ``rows``, as 0-d tensors."""
        return self.numbers.tables(self.numbers.values.unbind())[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Totals, and the mean of each statistic over the active rows, as 0-d tensors. No value is checked."""
        totals, sums, _ = self.numbers.tables(self.numbers.values.unbind())
        rows = sums.pop("rows").clamp(min=1)
        extras = {name: x for name, x in self.extras.items() if name != LENGTHS_FIT}
        return {**totals, **extras, **{name: x / rows for name, x in sums.items()}}

    def finalise(self) -> dict[str, float]:
        """Copy the metrics to the host, in one transfer, and check the values of the batch.

        Raises:
            LossInputError: if the batch has a value that no loss can use, or the loss is not finite.
        """
        return self.read(self.all_values.tolist())

    @property
    def extras_and_divisor(self) -> dict[str, Tensor]:
        """``extras``, and the divisor if it is a tensor."""
        return {**self.extras, **({"divisor": self.divisor} if isinstance(self.divisor, Tensor) else {})}

    @property
    def all_values(self) -> Tensor:
        """The values of ``numbers``, then of ``extras_and_divisor``, as one tensor for one transfer to the host."""
        values = self.numbers.values
        others = [to_device(x, values.device, values.dtype) for x in self.extras_and_divisor.values()]
        return torch.cat([values, torch.stack(others)]) if others else values

    def read(self, values: Sequence[float]) -> dict[str, float]:
        """Check the values of the batch, and return the metrics. ``values`` are ``all_values`` on the host."""
        with add_loss_name(self.loss):
            totals, sums, extrema = self.numbers.tables(values)
            extras = dict(zip(self.extras_and_divisor, values[len(self.numbers.values) :]))
            divisor = extras.pop("divisor", self.divisor)
            extrema[LENGTHS_FIT] = extras.pop(LENGTHS_FIT, 1.0)
            check_values(extrema, self.get_batch, self.output, signed=self.signed)
            check_totals(totals, sums["rows"], divisor)
            return self.metrics({**totals, **extras}, sums, divisor)

    def metrics(self, totals: dict[str, float], sums: dict[str, float], divisor: Any) -> dict[str, float]:
        """Return the metrics from sums on the host. A statistic becomes its mean over the active rows."""
        rows = sums.pop("rows")
        means = {name: total / rows if rows else 0.0 for name, total in sums.items()}
        row_counts = {} if self.rows.per_token else {self.rows.unit: rows}
        # A raw sum has no count, and is never divided.
        denominator = totals.get("count", 1.0) if divisor is None or "count" not in totals else divisor
        metrics = {**totals, "denominator": denominator, **row_counts, **means}
        warn_if_far_off_policy(metrics)
        return metrics | {"sequences": float(self.sequences)}


def finalised(deferred: tuple[Tensor, DeferredMetrics]) -> tuple[Tensor, dict[str, float]]:
    """Return the loss with its metrics on the host."""
    total, metrics = deferred
    return total, metrics.finalise()


def check_totals(totals: Mapping[str, float], rows: float, divisor: Any) -> None:
    """Refuse a batch without active rows, a denominator that cannot divide, and a loss that is not finite."""
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


def not_divisible(count: float) -> LossInputError:
    """Return the error for a batch whose count cannot be a denominator."""
    fix = "A mean needs weights with a positive sum; token_sum takes any weights."
    return LossInputError("weights", "a denominator above 0", f"{count:g}", fix)
