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
    fragile,
    require,
    unit_indices,
    unpoisoned,
    without_empty_units,
    wrong,
)
from lossfns.testing.laws.sums import COUNTS


@wrong("the metric is not what its name says")
def metric_loss(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A metric called loss is the loss."""
    probe = Probe.of(loss_fn, data, logprobs)
    result = probe(without_empty_units(unpoisoned(probe.batch)))
    for name in ("loss", "loss:sum"):
        value = result.metrics.get(name, result.value)
        seen = f"The metric {name!r} is {value}, the loss {result.value}."
        same = math.isclose(value, result.value, rel_tol=1e-4, abs_tol=1e-6)
        require(same, "metric-scaled-twice", seen, result.batch)


@fragile("the metric of a whole batch is right; the metrics of its parts cannot be merged")
def metric_merge(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A metric of the batch is the sum, a mean weighted by a count, or an extreme of the metrics of its parts."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = without_empty_units(unpoisoned(probe.batch))
    assume(len(unit_indices(batch)) > 1, "one datum cannot be split")
    parts = [batch.take(part) for part in unit_indices(batch)]
    of_batch, of_parts = probe(batch).metrics, [probe(part).metrics for part in parts]
    for name, value in of_batch.items():
        if any(name not in metrics for metrics in of_parts):
            continue  # such as the reward of desirable answers, of a part that has none
        values = [metrics[name] for metrics in of_parts]
        merged = [weighted_mean(values, [count(part) for part in parts]) for count in COUNTS.values()]
        merged.append(math.fsum(values))
        if "max" in name:
            merged.append(max(values))
        if "min" in name:
            merged.append(min(values))
        seen = f"The metric {name!r} is {value} over the batch and {values} over its datums."
        right = any(math.isclose(x, value, rel_tol=1e-5, abs_tol=1e-6) for x in merged)
        require(right, "metric-not-mergeable", seen, batch)


def weighted_mean(values: list[float], counts: list[float]) -> float:
    """Return Σ v·c / Σ c."""
    return math.fsum(v * c for v, c in zip(values, counts)) / (math.fsum(counts) or 1.0)
