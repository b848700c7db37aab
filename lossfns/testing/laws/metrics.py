"""Laws of metrics: a metric measures what its name says, and the metrics of chunks can be merged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lossfns.testing.laws.base import (
    LossFn,
    Probe,
    assume,
    require,
    unit_indices,
    unpoisoned,
    without_empty_units,
)
from lossfns.testing.laws.sums import COUNTS


def metric_loss(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A metric called loss is the loss."""
    probe = Probe.of(loss_fn, data, logprobs)
    result = probe(without_empty_units(unpoisoned(probe.batch)))
    for name in ("loss", "loss:sum"):
        value = result.metrics.get(name, result.value)
        seen = f"The metric {name!r} is {value}, the loss {result.value}."
        require(math.isclose(value, result.value, rel_tol=1e-4, abs_tol=1e-6), "metric-scaled-twice", seen)


def metric_merge(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A metric of the batch is a sum, a mean over some count, or an extreme of the metrics of its parts."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = without_empty_units(unpoisoned(probe.batch))
    assume(len(unit_indices(batch)) > 1, "one datum cannot be split")
    parts = [batch.take(part) for part in unit_indices(batch)]
    whole, of_parts = probe(batch).metrics, [probe(part).metrics for part in parts]
    for name, value in whole.items():
        values = [metrics.get(name, math.nan) for metrics in of_parts]
        means = [weighted_mean(values, [count(part) for part in parts]) for count in COUNTS.values()]
        extremes = [max(values)] * ("max" in name) + [min(values)] * ("min" in name)
        fits = [math.fsum(values), *means, *extremes]
        seen = f"The metric {name!r} is {value} over the batch and {values} over its datums."
        require(any(math.isclose(fit, value, rel_tol=1e-5, abs_tol=1e-6) for fit in fits), "metric-not-mergeable", seen)


def weighted_mean(values: list[float], counts: list[float]) -> float:
    return math.fsum(v * c for v, c in zip(values, counts)) / (math.fsum(counts) or 1.0)
