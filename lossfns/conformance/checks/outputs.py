"""Outputs of forward and forward_backward: records, logprobs and metrics."""

from __future__ import annotations

import math

import numpy as np
import torch

from lossfns.conformance.base import Check, Finding, require, worst
from lossfns.conformance.bench import Bench
from lossfns.conformance.client import Answer
from lossfns.conformance.rows import BATCH, other_tokens, row

NATS = 0.05
"""The difference of logprobs that another batch shape may make in half precision, in nats."""

REDUCTIONS = ("mean", "sum", "min", "max", "slack", "hash2", "unique")
"""The reductions of metrics that the SDK knows."""


def forward(bench: Bench) -> None:
    """forward answers with one record of logprobs for each datum."""
    check_records(bench.idle().forward(BATCH))


def forward_backward(bench: Bench) -> None:
    """forward_backward answers with one record of logprobs for each datum."""
    check_records(bench.idle().forward_backward(BATCH))


def check_records(answer: Answer) -> None:
    """Refuse records that are not one for each datum of the batch, with logprobs."""
    n = len(answer.records)
    require(n == len(BATCH), f"{n} records for {len(BATCH)} datums", "datum-count")
    for i, record in enumerate(answer.records):
        require("logprobs" in record, f"the record of datum {i} has {sorted(record)} and no logprobs", "output-shape")


def output_shape(bench: Bench) -> None:
    """Logprobs are float32, and have the shape of target_tokens."""
    targets = [datum.fields["target_tokens"].shape for datum in BATCH]
    for call in ("forward", "forward_backward"):
        tensors = [record["logprobs"] for record in getattr(bench.idle(), call)(BATCH).records]
        shapes = [np.shape(tensor.to_numpy()) for tensor in tensors]
        seen = f"{call}: logprobs are {shapes}, targets {targets}"
        require(shapes == targets, seen, "output-order" if sorted(shapes) == sorted(targets) else "")
        dtypes = {tensor.dtype for tensor in tensors}
        require(dtypes == {"float32"}, f"{call}: logprobs are {', '.join(sorted(dtypes))}", "output-values")


def output_values(bench: Bench) -> None:
    """Logprobs are finite, at most 0, and not rounded to bfloat16."""
    for i, lp in enumerate(bench.idle().forward(BATCH).logprobs):
        require(bool(np.isfinite(lp).all()), f"a logprob of datum {i} is {lp[~np.isfinite(lp)].ravel()[:1]}")
        require(float(lp.max()) <= 1e-4, f"a logprob of datum {i} is {lp.max():.4g}")
        rounded = torch.from_numpy(lp).bfloat16().double().numpy()
        require(not (lp == rounded).all(), f"the logprobs of datum {i} are rounded to bfloat16", "low-precision")


def metric_keys(bench: Bench) -> None:
    """Metrics are finite numbers named name:reduction."""
    for call in ("forward", "forward_backward"):
        for key, value in getattr(bench.idle(), call)(BATCH).metrics.items():
            require(key.rpartition(":")[2].split("_")[0] in REDUCTIONS, f"{call}: a metric is named {key!r}")
            finite = isinstance(value, int | float) and math.isfinite(value)
            require(finite, f"{call}: the metric {key} is {value!r}")


def loss_sum(bench: Bench) -> None:
    """Metrics of forward and of forward_backward have loss:sum."""
    for call in ("forward", "forward_backward"):
        metrics = getattr(bench.idle(), call)(BATCH).metrics
        got = ", ".join(sorted(metrics)) or "none at all"
        require("loss:sum" in metrics, f"{call}: the metrics are {got}")


def output_order(bench: Bench) -> Finding:
    """Records are in the order of the datums, also of datums of one length."""
    rows = [row(seed, 6) for seed in (1, 7, 11)]
    alone = [bench.start_logprobs([datum])[0] for datum in rows]
    found = bench.idle().forward(rows).logprobs
    require(len(found) == len(rows), f"{len(found)} records for {len(rows)} datums", "datum-count")
    return apart(found, alone, "three datums of one length, together and alone")


def targets_honoured(bench: Bench) -> None:
    """Logprobs are those of target_tokens, each at its own position."""
    datum = BATCH[1]
    targets = datum.fields["target_tokens"]
    others = other_tokens(targets)
    before, after = bench.start_logprobs([datum])[0], bench.start_logprobs([datum.having(target_tokens=others)])[0]
    same = int((np.abs(after - before) < 1e-4).sum())  # two tokens may have one probability by chance
    require(same < 2, f"{same} of {len(before)} other target_tokens at the same inputs have the same logprobs")
    one = np.where(np.arange(len(targets)) == 4, others, targets)
    moved = np.abs(bench.start_logprobs([datum.having(target_tokens=one)])[0] - before) > NATS
    elsewhere = np.flatnonzero(moved & (np.arange(len(targets)) != 4))
    require(not len(elsewhere), f"another target at position 4 changes the logprob at position {elsewhere[:1]}")


def batch_independence(bench: Bench) -> Finding:
    """The logprobs of a datum do not depend on the other datums of its batch."""
    alone = [bench.start_logprobs([datum])[0] for datum in BATCH]
    long = [row(5, 40), *BATCH, row(6, 2)]
    together = bench.start_logprobs(long)[1:-1]
    return worst([
        apart(bench.start_logprobs(BATCH), alone, "datums in a batch and alone"),
        apart(together, alone, "datums beside longer and shorter ones, and alone"),
    ])  # fmt: skip


def one_numeric_path(bench: Bench) -> Finding:
    """forward_backward returns the logprobs of forward."""
    return apart(bench.idle().forward_backward(BATCH).logprobs, bench.start_logprobs(BATCH),
        "logprobs of forward_backward and of forward", nats=NATS / 5)  # fmt: skip


def repetition(bench: Bench) -> Finding:
    """The same forward twice gives the same logprobs."""
    trainer = bench.idle()
    first, second = trainer.forward(BATCH).logprobs, trainer.forward(BATCH).logprobs
    return apart(second, first, "forward twice")


def apart(found: list[np.ndarray], expected: list[np.ndarray], seen: str, nats: float = NATS) -> Finding:
    """Compare logprobs, by the largest difference in nats."""
    for a, b in zip(found, expected, strict=True):
        require(a.shape == b.shape, f"{seen}: shapes {list(a.shape)} and {list(b.shape)}", "output-shape")
    gap = max(float(np.abs(a - b).max()) for a, b in zip(found, expected))
    return Finding(gap, nats, seen=f"{seen}: they differ by {gap:.3g} nats")


CHECKS = (
    Check.of(forward, "refused"),
    Check.of(forward_backward, "refused"),
    Check.of(output_shape, "output-shape", needs=("forward",)),
    Check.of(output_values, "output-values", needs=("forward",)),
    Check.of(metric_keys, "metric-keys", needs=("forward",)),
    Check.of(loss_sum, "loss-sum-missing", needs=("forward",)),
    Check.of(repetition, "state-between-calls", needs=("forward",)),
    Check.of(output_order, "output-order", needs=("forward",)),
    Check.of(targets_honoured, "targets-ignored", needs=("output-shape",)),
    Check.of(batch_independence, "batch-leak", needs=("output-shape",)),
    Check.of(one_numeric_path, "two-numeric-paths", needs=("output-shape",)),
)
