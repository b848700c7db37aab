"""Laws of the metrics of preference losses, which are known by the field's names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lossfns.testing.laws.base import LossFn, Probe, assume, columns_read, near, require, wrong
from lossfns.testing.laws.preference import BETAS, has_reference, pair_batch
from lossfns.testing.laws.settings import setting_named, words


@wrong("the metric is not what its name says")
def margin_metrics(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A metric named reward margin is the argument of the sigmoid: β times the margin, and not β² times."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume("ref_logprobs" in columns_read(probe), "it reads no reference")
    batch = pair_batch(probe, chosen=-1.5, rejected=-2.5)
    result = probe(batch)
    beta = -2 * probe(pair_batch(probe)).gradients[0][0]  # at margin 0 the gradient is −β/2
    assume(probe.close(probe(pair_batch(probe)).value, math.log(2)), "it is not logistic, or its labels are smoothed")
    # The loss is log(1 + exp(−z)) with z = β · margin, here at margin 1.
    z = -math.log(math.expm1(result.value)) if result.value > 0 else math.nan
    assume(math.isclose(z, beta, rel_tol=1e-3), "its labels are smoothed")
    for name, value in result.metrics.items():
        if "margin" in name:
            right = [z] if "reward" in name else [z, 1.0]
            seen = f"At margin 1 with β = {beta:g} the metric {name!r} is {value}, not {' or '.join(map(str, right))}."
            require(any(math.isclose(value, x, rel_tol=1e-3) for x in right), "metric-scaled-twice", seen)


@wrong("the metric is not what its name says")
def pair_metrics(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Accuracies, rewards, margins and logprobs with the usual names are those of the side that they name.

    In the pair that is measured, policy and reward rank the sides in opposite order.
    """
    probe = Probe.of(loss_fn, data, logprobs)
    batch = pair_batch(probe, chosen=-3.0, rejected=-2.0)
    gaps, own = (-3.0, -2.0), (-3.0, -2.0)
    if has_reference(probe):
        batch, gaps = batch.having(ref_logprobs=[[-6.5], [-1.5]]), (3.5, -0.5)
    ahead, behind = (probe(batch.take(order)) for order in ((0, 1), (1, 0)))
    if gaps[0] < gaps[1]:
        ahead, behind, gaps, own = behind, ahead, (gaps[1], gaps[0]), (own[1], own[0])
    assume(bool(ahead.metrics), "it has no metrics")
    scale = setting_named(loss_fn, *BETAS)
    scales = [1.0, scale[1]] if scale else [1.0]
    pair = f"In a pair with the gaps {gaps[0]:g} (chosen) and {gaps[1]:g} (rejected)"
    for name, value in ahead.metrics.items():
        found, other = words(name), behind.metrics.get(name, math.nan)
        seen = f"{pair} the metric {name!r} is {value}, with the sides exchanged {other}."
        right = True
        if is_accuracy(found):
            right = value == 1 and other == 0
        elif any(word.startswith("margin") for word in found) and not LOGPROB_WORDS & set(found):
            right = value > other
        elif {"chosen", "rejected"} & set(found) and not {"ref", "reference", "old", "loss", "nll"} & set(found):
            i = int("rejected" in found)
            if {"reward", "rewards"} & set(found):
                mistaken = [s * x for s in scales for x in (gaps[1 - i], -gaps[i], -gaps[1 - i])]
                mistaken += [s * x for s in scales for x in own if has_reference(probe)]
                right = near(value, [s * gaps[i] for s in scales]) or not near(value, mistaken)
            elif LOGPROB_WORDS & set(found):
                right = near(value, [own[i]]) or not near(value, [own[1 - i], -own[i], -own[1 - i], *gaps])
        require(right, "metric-wrong", seen, ahead.batch)


LOGPROB_WORDS = {"logp", "logps", "logprob", "logprobs"}


def is_accuracy(found: Sequence[str]) -> bool:
    """Return whether the words name the share of pairs whose chosen side has the higher reward."""
    named = any(word in ("acc", "accs", "accuracy", "accuracies") for word in found)
    return named and not {"policy", "token", "ref", "reference", "lm", *LOGPROB_WORDS} & set(found)
