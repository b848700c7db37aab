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
    batch_kind,
    require,
    wrong,
)


@wrong("a setting that does nothing is not the loss that was asked for")
def no_inert_knob(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Each setting changes the value or the gradient on some batch."""
    from lossfns.testing.subject import knobs, setting_elements, variants

    probe = Probe.of(loss_fn, data, logprobs)
    # Setting → the indices of the elements that have not changed the loss on any batch so far.
    inert = {
        name: [i for i in setting_elements(value) if next(variants(loss_fn, name, i), None)]
        for name, value in knobs(loss_fn).items()
    }
    inert = {name: indices for name, indices in inert.items() if indices}
    assume(bool(inert), "it has no settings that can be varied")

    def has_effect(batch: Batch, default: Outcome, name: str, index: int | None) -> bool:
        metrics_too = isinstance(knobs(loss_fn)[name], bool)  # a boolean setting may change only the metrics
        others = variants(loss_fn, name, index)
        return any(changes_outcome(probe, batch, default, other, metrics_too) for other in others)

    for batch in generic_batches(probe.batch):
        default = probe(batch)
        for name, indices in inert.items():
            inert[name] = [i for i in indices if not has_effect(batch, default, name, i)]
    for name, indices in inert.items():
        if not indices:
            continue
        value = knobs(loss_fn)[name]
        all_inert = len(indices) == len(list(setting_elements(value)))
        clip = name.startswith(("clip", "eps")) and all_inert
        element = "" if all_inert else f"[{indices[0]}]"
        seen = f"Other values of {name}{element} change neither value nor gradient. The value here is {value!r}."
        require(False, "clip-inert" if clip else "inert-knob", seen)


def changes_outcome(probe: Probe, batch: Batch, default: Outcome, other: LossFn, metrics_too: bool) -> bool:
    """Return whether the loss with another setting has another value or gradient than ``default`` on the batch.

    With ``metrics_too`` other metrics count as well. A call that raises shows no change.
    """
    try:
        result = probe(batch, other)
    except Exception:
        return False
    same = probe.close([result.value, result.gradients], [default.value, default.gradients], scale=0.01)
    return not same or (metrics_too and result.metrics != default.metrics)


def generic_batches(like: Batch) -> list[Batch]:
    """Return batches on which every term of a loss contributes. Log-ratios lie on both sides of all bounds.

    Log-ratios grow from batch to batch, because one large term can hide the others. Then follow batches in which all
    log-ratios of a sequence are equal, and a batch of likely tokens.
    """
    by_token = [ratio_batch(like, d, by_token=True) for d in (0.0, 0.01, 0.15, 0.3, 1.0, 2.0, 25.0)]
    by_sequence = [ratio_batch(like, d, by_token=False) for d in (0.3, 2.0, 25.0)]
    return [*by_token, *by_sequence, ratio_batch(like, 0.25, by_token=True, logprob=-0.75)]


def ratio_batch(like: Batch, d: float, *, by_token: bool, logprob: float = -30.0) -> Batch:
    """Return four datums of unequal length whose log-ratios are ±d. The sign alternates by token or by sequence.

    Logprobs of −30 allow any log-ratio without a logprob above 0. A loss that reads no old logprobs gets likely tokens
    instead, because it may depend on the probabilities themselves.
    """

    def sign(i: int, j: int) -> float:
        # i // 2, because the sign of the advantage alternates with i, and each sign must meet each sign of the ratio
        flips = i // 2 + j if by_token else i // 2
        return -1.0 if flips % 2 else 1.0

    def fill(value: Callable[[int, int], float]) -> Rows:
        return [[value(i, j) for j in range(n * (like.targets or 1))] for i, n in enumerate((2, 3, 1, 4))]

    level, pairs = logprob if "old_logprobs" in like.columns else -0.75, batch_kind(like) == "preference"
    # Likely tokens differ by datum and by d. Otherwise a loss without ratios would see the same logprobs each time.
    logprobs = fill(lambda i, j: level if level == -30 else level - 0.125 * i - d / 8)
    columns = {
        "advantages": fill(lambda i, j: (1 + 0.25 * i) * (-1 if i % 2 else 1)),
        "old_logprobs": fill(lambda i, j: level + d * sign(i, j)),
        # In the second of two pairs the policy is below the reference on the chosen side.
        "ref_logprobs": fill(
            lambda i, j: min(level - (0.25 + 0.25 * d * (1 + (i + j) % 3)) * (-1 if pairs and i == 2 else 1), 0.0)
        ),
        "sampler_logprobs": fill(lambda i, j: level - 0.375 * d * sign(i, j)),
        "labels": fill(lambda i, j: float(i % 2 == 0)),
    }
    weights = fill(lambda i, j: (1.0, 0.5, 1.0, 2.0)[j % 4])
    return Batch(logprobs, weights, {name: columns[name] for name in like.columns}, like.targets)
