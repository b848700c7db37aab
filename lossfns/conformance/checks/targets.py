"""Several targets at a position: [N, K] target_tokens and weights, dense and in CSR form."""

from __future__ import annotations

import numpy as np

from lossfns.conformance.base import Check, Finding, refuse, require, worst
from lossfns.conformance.bench import Bench, Gradient
from lossfns.conformance.checks.outputs import apart
from lossfns.conformance.client import Row
from lossfns.conformance.rows import BATCH, tokens


def columns(row: Row, k: int) -> list[Row]:
    """Return k rows that share the inputs of one: other targets, and other weights of both signs."""
    n = len(row.tokens)
    rows = [row]
    for i in range(1, k):
        weights = np.roll(row.weights, i) * (0.5 if i % 2 else -0.25)
        rows.append(row.having(target_tokens=tokens(10 + i, n), weights=weights))
    return rows


def stacked(rows: list[Row]) -> Row:
    """Return rows with the same inputs as one row of [N, K] targets."""
    fields = {name: np.stack([row.fields[name] for row in rows], 1) for name in ("target_tokens", "weights")}
    return rows[0].having(**fields)


def multi(k: int) -> list[Row]:
    return [stacked(columns(row, k)) for row in BATCH]


def several_targets(bench: Bench) -> None:
    """The server takes [N, K] targets, and returns logprobs of this shape."""
    trainer = bench.idle()
    try:
        answer = trainer.forward_backward(multi(2))
    except Exception as error:
        refuse(error)
    for row, lp in zip(BATCH, answer.logprobs):
        shape = [len(row.tokens), 2]
        require(list(lp.shape) == shape, f"logprobs are {list(lp.shape)}, targets {shape}", "targets-flattened")


def logprobs_of_several(bench: Bench) -> Finding:
    """The logprobs of [N, K] targets are those of each column of targets."""
    found = bench.start_logprobs(multi(3))
    each = [bench.start_logprobs([columns(row, 3)[k] for row in BATCH]) for k in range(3)]
    return apart(found, [np.stack(lps, 1) for lps in zip(*each)], "[N, 3] targets, and each column alone")


def one_column(bench: Bench) -> Finding:
    """[N, 1] targets are [N] targets."""
    return bench.same(bench.effect(Gradient(multi(1))), bench.effect(Gradient(BATCH)), "[N, 1] and [N] targets")


def columns_add_up(bench: Bench) -> Finding:
    """The gradient of [N, K] targets is the sum of those of its columns."""
    each = [Gradient([columns(row, 3)[k] for row in BATCH]) for k in range(3)]
    return bench.same(bench.effect(Gradient(multi(3))), bench.effect(*each), "[N, 3] targets, and three requests")


def equal_columns(bench: Bench) -> Finding:
    """A target in two columns counts twice."""
    twice = [stacked([row, row]) for row in BATCH]
    return bench.same(bench.effect(Gradient(twice), rate=0.5), bench.effect(Gradient(BATCH)), "equal columns")


def mixed_targets(bench: Bench) -> Finding:
    """Datums of one request may have different numbers of targets."""
    rows = [stacked(columns(row, k)) for k, row in zip((1, 2, 3), BATCH)]
    separate = [Gradient([row]) for row in rows]
    try:
        found = bench.effect(Gradient(rows))
    except Exception as error:
        refuse(error)
    return bench.same(found, bench.effect(*separate), "1, 2 and 3 targets in one request")


def wide(k: int) -> list[Row]:
    """Return datums of k targets at each position of which two or three have a weight; the third is token 0."""
    rows = []
    for row in BATCH:
        n = len(row.tokens)
        ids, weights = np.zeros((n, k), np.int64), np.zeros((n, k))
        for j, column in enumerate(columns(row, 2)):
            at = (np.arange(n) + 3 * j) % k
            ids[np.arange(n), at], weights[np.arange(n), at] = column.fields["target_tokens"], column.weights + 0.125
        weights[::2, k // 2] += 0.5 * (weights[::2, k // 2] == 0)  # at a token 0, which is not stored
        rows.append(row.having(target_tokens=ids, weights=weights))
    return rows


def sparse_targets(bench: Bench) -> Finding:
    """Targets and weights in CSR form are the dense ones."""
    dense = wide(12)
    sparse = [Row(row.tokens, row.fields, ("target_tokens", "weights")) for row in dense]
    weights_only = [Row(row.tokens, row.fields, ("weights",)) for row in dense]
    try:
        found = bench.effect(Gradient(sparse))
    except Exception as error:
        refuse(error)
    return worst([
        bench.same(found, bench.effect(Gradient(dense)), "CSR and dense"),
        bench.same(bench.effect(Gradient(weights_only)), bench.effect(Gradient(dense)), "weights in CSR, and dense"),
    ])  # fmt: skip


CHECKS = (
    Check.of(several_targets, "refused", "full", needs=("forward-backward",)),
    Check.of(logprobs_of_several, "targets-flattened", "full", needs=("several-targets",)),
    *(
        Check.of(run, "targets-flattened", "full", needs=("several-targets", "gradient-descent"))
        for run in (one_column, columns_add_up, equal_columns, mixed_targets)
    ),
    Check.of(sparse_targets, "sparse-misread", "full", needs=("several-targets", "gradient-descent")),
)
