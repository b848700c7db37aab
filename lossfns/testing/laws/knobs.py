"""The law of settings: each setting has an effect on some batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lossfns.testing.batch import Batch, Rows
from lossfns.testing.laws.base import (
    LossFn,
    Outcome,
    Probe,
    assume,
    require,
)


def no_inert_knob(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Each setting changes the value or the gradient on some batch."""
    from lossfns.testing.subject import knobs, setting_elements, variants

    probe = Probe.of(loss_fn, data, logprobs)
    inert = {
        name: [e for e in setting_elements(value) if next(variants(loss_fn, name, e), None)]
        for name, value in knobs(loss_fn).items()
    }
    inert = {name: left for name, left in inert.items() if left}
    assume(bool(inert), "it has no settings that can be seen")
    for batch in generic_batches(probe.batch):
        usual = probe(batch)
        for name, left in inert.items():
            metrics_too = isinstance(knobs(loss_fn)[name], bool)  # a switch may act on the metrics alone
            moves = [
                any(changes_outcome(probe, batch, usual, v, metrics_too) for v in variants(loss_fn, name, e))
                for e in left
            ]
            inert[name] = [e for e, works in zip(left, moves) if not works]
    for name, left in inert.items():
        whole = len(left) == len(list(setting_elements(knobs(loss_fn)[name])))
        clip = name.startswith(("clip", "eps")) and whole
        part = "" if whole else f"[{left[0]}]" if left else ""
        seen = f"Whatever {name}{part} is, value and gradient are those of {knobs(loss_fn)[name]!r}."
        require(not left, "clip-inert" if clip else "inert-knob", seen)


def changes_outcome(probe: Probe, batch: Batch, usual: Outcome, other: LossFn, metrics_too: bool) -> bool:
    """Return whether another setting changes the value or the gradient, or with ``metrics_too`` the metrics."""
    try:
        result = probe(batch, other)
    except Exception:
        return False
    same = probe.close([result.value, result.gradients], [usual.value, usual.gradients], scale=0.01)
    return not same or (metrics_too and result.metrics != usual.metrics)


def generic_batches(like: Batch) -> list[Batch]:
    """Return batches on which every term of a loss acts: log-ratios past all bounds, in both directions.

    Log-ratios grow from batch to batch, because one large term can hide the others. In the later batches all
    log-ratios of a sequence are equal.
    """
    steady = [ratio_batch(like, d, alternate=False) for d in (0.3, 2.0, 25.0)]
    calm = [ratio_batch(like, d, alternate=True) for d in (0.0, 0.01, 0.15, 0.3, 1.0, 2.0, 25.0)]
    return [*calm, *steady, ratio_batch(like, 0.25, alternate=True, level=-0.75)]


def ratio_batch(like: Batch, d: float, *, alternate: bool, level: float = -30.0) -> Batch:
    """Return four datums of unequal length whose log-ratios are ±d, alternating by token or by sequence.

    Logprobs of −30 leave room for any ratio. A loss that reads no old logprobs gets likely tokens instead, because
    it may depend on the probabilities themselves.
    """

    def flip(i: int, j: int) -> float:
        return -1.0 if (i // 2 + j * alternate) % 2 else 1.0

    def fill(value: Callable[[int, int], float]) -> Rows:
        return [[value(i, j) for j in range(n * (like.targets or 1))] for i, n in enumerate((2, 3, 1, 4))]

    level = level if "old_logprobs" in like.columns else -0.75
    logprobs = fill(lambda i, j: level if level == -30 else level - 0.125 * i - d / 8)
    columns = {
        "advantages": fill(lambda i, j: (1 + 0.25 * i) * (-1 if i % 2 else 1)),
        "old_logprobs": fill(lambda i, j: level + d * flip(i, j)),
        "ref_logprobs": fill(lambda i, j: level - 0.25 - 0.25 * d * (1 + (i + j) % 3)),
        "sampler_logprobs": fill(lambda i, j: level - 0.375 * d * flip(i, j)),
    }
    weights = fill(lambda i, j: (1.0, 0.5, 1.0, 2.0)[j % 4])
    return Batch(logprobs, weights, {name: columns[name] for name in like.columns}, like.targets)
