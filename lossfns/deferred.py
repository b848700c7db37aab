"""``DeferredMetrics``: the numbers of a call, on the device until the host asks for them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lossfns.checks import check_denominator
from lossfns.devices import to_device
from lossfns.errors import LossInputError, add_loss_name
from lossfns.metrics import of_part, with_prefix
from lossfns.parts import Part
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
        parts: the parts of a sum of losses, by name. The names in ``numbers`` begin with those of the parts, and
            ``divisor`` is a tensor with a denominator for each.
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
    parts: Mapping[str, Part] = field(default_factory=dict)

    @property
    def sums(self) -> dict[str, Tensor]:
        """Each statistic summed over the active rows, and the number of these rows as ``rows``, as 0-d tensors."""
        return self.numbers.tables(self.numbers.values.unbind())[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Totals, and the mean of each statistic over the active rows, as 0-d tensors. No value is checked."""
        totals, sums, _ = self.numbers.tables(self.numbers.values.unbind())
        means: dict[str, Tensor] = {}
        for own, prefix in [(of_part(name, sums), f"{name}/") for name in self.parts] or [(sums, "")]:
            rows = own.pop("rows").clamp(min=1)
            means |= {f"{prefix}{name}": x / rows for name, x in own.items()}
        extras = {name: x for name, x in self.extras.items() if name != LENGTHS_FIT}
        return {**totals, **extras, **means}

    def finalise(self) -> dict[str, float]:
        """Copy the metrics to the host, in one transfer, and check the values of the batch.

        Raises:
            LossInputError: if the batch has a value that no loss can use, or the loss is not finite.
        """
        return self.read(self.all_values.tolist())

    @property
    def extras_and_divisor(self) -> dict[str, Tensor]:
        """``extras``, and the divisor if it is a tensor; of a sum of losses the divisors that are on a device."""
        if not isinstance(self.divisor, Tensor):
            return dict(self.extras)
        if not self.parts:
            return {**self.extras, "divisor": self.divisor}
        on_host = self.divisor.device.type == "cpu"
        return {**self.extras, **({} if on_host else with_prefix("divisor", dict(zip(self.parts, self.divisor))))}

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
            if self.parts:
                return self.read_parts(totals, sums, extrema, extras)
            divisor = extras.pop("divisor", self.divisor)
            extrema[LENGTHS_FIT] = extras.pop(LENGTHS_FIT, 1.0)
            check_values(extrema, self.get_batch, self.output, signed=self.signed)
            check_totals(totals, sums["rows"], divisor)
            return self.metrics({**totals, **extras}, sums, divisor)

    def metrics(self, totals: dict[str, float], sums: dict[str, float], divisor: Any) -> dict[str, float]:
        """Return the metrics from sums on the host."""
        return metrics_of_rows(self.rows, totals, sums, divisor) | {"sequences": float(self.sequences)}

    def read_parts(
        self,
        totals: dict[str, float],
        sums: dict[str, float],
        extrema: dict[str, float],
        extras: dict[str, float],
    ) -> dict[str, float]:
        """Check the values of each part of a sum, and return the metrics, those of a part under its name."""
        fit = {LENGTHS_FIT: extras.pop(LENGTHS_FIT, 1.0)}
        check_values(fit, self.get_batch, signed=True)
        on_device = of_part("divisor", extras)
        divisors: list[Any] = [None] * len(self.parts)
        if isinstance(self.divisor, Tensor):
            divisors = list(on_device.values()) or self.divisor.tolist()
        metrics = {name: totals[name] for name in totals if "/" not in name}
        metrics |= {name: x for name, x in extras.items() if name not in with_prefix("divisor", on_device)}
        for (name, part), divisor in zip(self.parts.items(), divisors):
            loss, own = part.loss, of_part(name, totals)
            with add_part_name(name, part.weights):
                get_view = partial(part_of_batch, part, self.get_batch)
                check_values(of_part(name, extrema), get_view, loss.output, signed=loss.signed)
                own_sums = of_part(name, sums)
                check_divides(own.get("count", 1.0), own_sums["rows"], divisor)
                numbers = metrics_of_rows(loss.rows, own, own_sums, divisor)
            metrics |= with_prefix(name, {**numbers, "coefficient": part.coefficient})
        if self.divisor is None and not any(of_part(name, sums)["rows"] for name in self.parts):
            raise no_active_token()
        check_finite(totals["loss"])
        return metrics | {"sequences": float(self.sequences)}


def part_of_batch(part: Part, get_batch: Callable[[], Tokens]) -> Tokens:
    """Return the batch as a part of a sum sees it."""
    return part.view(get_batch())


@contextmanager
def add_part_name(name: str, weights: str) -> Iterator[None]:
    """Add the name of a part to an error about one of its columns, and name the column of its weights."""
    try:
        yield
    except LossInputError as error:
        error.field = re.sub("^weights", weights, error.field)
        error.expected += f", in the part {name!r}"
        raise


def metrics_of_rows(rows: Rows, totals: dict[str, float], sums: dict[str, float], divisor: Any) -> dict[str, float]:
    """Return the metrics of a loss from its sums on the host. A statistic becomes its mean over the active rows."""
    count = sums.pop("rows")
    means = {name: total / count if count else 0.0 for name, total in sums.items()}
    row_counts = {} if rows.per_token else {rows.unit: count}
    # A raw sum has no count, and is never divided.
    denominator = totals.get("count", 1.0) if divisor is None or "count" not in totals else divisor
    metrics = {**totals, "denominator": denominator, **row_counts, **means}
    warn_if_far_off_policy(metrics)
    return metrics


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
        raise no_active_token()
    if math.isnan(count) or (divisor is None and count <= 0):
        raise not_divisible(count)
    check_finite(totals["loss"])


def check_divides(count: float, rows: float, divisor: Any) -> None:
    """Refuse the denominator of a part of a sum if it cannot divide. It may be 0 where the part has no row."""
    if math.isnan(count) or (divisor is None and rows and count <= 0):
        raise not_divisible(count)
    if divisor is not None and (divisor != 0 or rows):
        check_denominator(divisor)


def check_finite(loss: float) -> None:
    """Refuse a loss that is not finite."""
    if not math.isfinite(loss):
        fix = "Look for an extreme value. Where a loss has log_ratio_cap, a finite one keeps exp from overflowing."
        raise LossInputError("loss", "a finite value", f"{loss:g}", fix)


def no_active_token() -> LossInputError:
    """Return the error for a batch in which nothing is trained."""
    fix = "Bind denominator= if this is one chunk of a larger batch."
    return LossInputError("weights", "at least one active token in the batch", "only zeros", fix)


def not_divisible(count: float) -> LossInputError:
    """Return the error for a batch whose count cannot be a denominator."""
    fix = "A mean needs weights with a positive sum; token_sum takes any weights."
    return LossInputError("weights", "a denominator above 0", f"{count:g}", fix)
