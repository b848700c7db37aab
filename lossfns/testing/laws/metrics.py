"""Laws of metrics: a metric measures what its name says, and the metrics of chunks can be merged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lossfns.loss import Loss
from lossfns.metrics import merge_metrics
from lossfns.testing.batch import Batch
from lossfns.testing.laws.base import (
    LossFn,
    Outcome,
    Probe,
    assume,
    columns_read,
    fragile,
    numbers,
    require,
    uniform_batch,
    unit_indices,
    unpoisoned,
    with_constants,
    without_empty_units,
    wrong,
)
from lossfns.testing.laws.masks import with_padding
from lossfns.testing.laws.settings import named_numbers, words
from lossfns.testing.laws.sums import COUNTS

LOSS_NAMES = ("loss", "loss:sum", "total_loss", "train/loss", "loss/total", "train/total_loss")


@wrong("the metric is not what its name says")
def metric_loss(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A metric called loss is the loss."""
    probe = Probe.of(loss_fn, data, logprobs)
    result = probe(without_empty_units(unpoisoned(probe.batch)))
    for name, value in numbers(result.metrics).items():
        if name not in LOSS_NAMES:
            continue
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
    of_batch, of_parts = numbers(probe(batch).metrics), [numbers(probe(part).metrics) for part in parts]
    of_sum = merge_metrics(of_parts) if isinstance(loss_fn, Loss) and loss_fn.parts else {}
    for name, value in of_batch.items():
        if any(name not in metrics for metrics in of_parts):
            continue  # such as the reward of desirable answers, of a part that has none
        values = [metrics[name] for metrics in of_parts]
        merged = [weighted_mean(values, [count(part) for part in parts]) for count in COUNTS.values()]
        merged += [math.fsum(values), *([of_sum[name]] if name in of_sum else [])]
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


@wrong("a metric of the batch must be of all its trained tokens, and of no others")
def metric_scope(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A metric does not depend on masked tokens or on padding."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = without_empty_units(unpoisoned(probe.batch))
    padded = with_padding(batch)
    plain, wide, masked = (numbers(probe(b).metrics) for b in (batch, padded, with_other_masked_values(padded)))
    for name, value in plain.items():
        if not set(words(name)) & OF_TOKENS or set(words(name)) & ABOUT_PADDING:
            continue
        seen = f"The metric {name!r} is {wide.get(name)} with padding"
        other = f"{seen}, and {masked.get(name)} with other values in the masked slots."
        require(alike(wide.get(name), masked.get(name)), "metric-unmasked", other)
        whole = float(value).is_integer() and float(wide.get(name, 0.5)).is_integer()  # a count of slots, or an extreme
        extreme = set(words(name)) & {"max", "min"}
        same = whole or extreme or alike(value, wide.get(name))
        require(bool(same), "metric-unmasked", f"{seen}, {value} without.")


OF_TOKENS = {"loss", "nll", "ppl", "perplexity", "kl", "approxkl", "clip", "clipfrac", "clipped", "ratio", "logratio",
    "logp", "logps", "logprob", "logprobs", "lp", "prob", "entropy", "adv", "advantage", "advantages", "reward",
    "rewards", "margin", "margins", "acc", "accuracy", "accuracies", "tis", "weight", "weights", "chosen",
    "rejected"}  # fmt: skip
"""Words in the names of metrics that are about trained tokens. What another metric counts is its writer's choice."""
ABOUT_PADDING = {"pad", "padding", "padded", "width", "slots", "shape", "util", "utilization", "masked", "mask",
    "coverage", "density", "valid", "trained", "active", "fill", "occupancy"}  # fmt: skip


def with_other_masked_values(batch: Batch) -> Batch:
    """Return the batch with other logprobs and columns in the masked slots, within the range of real ones."""
    changed = batch.map(
        lambda rows: [[x if w else x - 1.75 for x, w in zip(row, ws)] for row, ws in zip(rows, batch.weights)]
    )
    labels = {name: rows for name, rows in batch.columns.items() if name == "labels"}  # one for all tokens of a datum
    return changed.having(weights=batch.weights, **labels)


def alike(a: float | None, b: float | None) -> bool:
    """Return whether two metrics agree; nan equals nan."""
    if a is None or b is None:
        return a == b
    return (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6)


# Metrics of policies, by the names that the field gives them

TOKENS = 3
"""Tokens of the sequence on which these metrics are measured. A metric may be a mean over tokens or a sum."""


def uniform_outcome(probe: Probe, advantage: float = 1.0, **log_ratios: float) -> Outcome:
    """Return the outcome for one sequence whose tokens all have these log-ratios to the other policies."""
    others = {name: -4.0 - d for name, d in log_ratios.items()}
    batch = uniform_batch(probe.batch, length=TOKENS, logprobs=-4.0, advantages=advantage)
    return probe(with_constants(batch, **{name: x for name, x in others.items() if name in batch.columns}))


def fits(value: float, estimates: Sequence[float]) -> bool:
    """Return whether a metric is one of these numbers, as a mean or as a sum over the tokens."""
    sizes = [x * n for x in estimates for n in (1, TOKENS)]
    return any(math.isclose(value, x, rel_tol=1e-3, abs_tol=1e-6) for x in sizes)


def kl_estimates(gap: float) -> list[float]:
    """Return k1, k2, k3 and the absolute log-ratio, for logprobs that are ``gap`` above those of the other policy.

    k3 is given in both directions, since the names of the field do not tell the direction of a KL.
    """
    return [gap, gap * gap / 2, math.expm1(-gap) + gap, math.expm1(gap) - gap, abs(gap)]


NOT_A_KL = {"coef", "beta", "target", "max", "min", "sampler", "rollout", "std", "forward", "frac", "fraction", "clip",
    "clipped", "ratio", "weight", "mismatch"}  # fmt: skip
KL_NAMES = {"kl", "approxkl", "ppokl", "kld", "klref", "refkl"}


@wrong("the metric is not what its name says")
def kl_metrics(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A metric named after a KL is one of the estimators k1, k2, k3, with its sign and its size.

    k1 of KL(old‖new) is old − new, k1 of KL(new‖ref) is new − ref.
    """
    probe = Probe.of(loss_fn, data, logprobs)
    read = columns_read(probe)
    assume(bool(read & {"ref_logprobs", "old_logprobs"}), "it reads no other policy's logprobs")
    # (log-ratio to old, log-ratio to the reference); the sampler is at the old policy
    for d, x in ((-0.5, 0.0), (0.25, 0.0), (0.0, 0.5), (0.0, -0.25)):
        result = uniform_outcome(probe, old_logprobs=d, sampler_logprobs=d, ref_logprobs=x)
        for name, value in numbers(result.metrics).items():
            found = set(words(name))
            if not found & KL_NAMES or found & NOT_A_KL:
                continue
            of_old = bool(found & {"approx", "ppo", "old", "approxkl", "ppokl", "behavior"})
            of_ref = bool(found & {"ref", "reference", "klref", "refkl", "teacher"})
            scaled = bool(found & {"loss", "penalty", "term", "reward"})
            check_kl_metric(name, value, d, x, of_old, of_ref, scaled)


def check_kl_metric(name: str, value: float, d: float, x: float, of_old: bool, of_ref: bool, scaled: bool) -> None:
    """Require that a metric is an estimate of the KL to the old policy or to the reference."""
    if scaled or (of_old and x) or (of_ref and d):
        return  # a multiple of the KL, or nothing to see at these log-ratios
    r = math.exp(d)
    weighted = [r * d, r * d - (r - 1)]  # k1 and k3 of KL(new‖old), weighted by the ratio
    estimates = kl_estimates(x) if x else [*kl_estimates(-d), *kl_estimates(d)[1:], *weighted]
    where = f"With lp − old = {d:g}" if d else f"With lp − ref = {x:g}"
    seen = f"{where} the metric {name!r} is {value:g}"
    negative = fits(value, [-x if x else d]) and not fits(value, estimates)
    require(not negative, "metric-sign", f"{seen}: k1 with the wrong sign.")
    may_be_zero = not (of_old or of_ref)  # which of the two policies the name means is not known
    right = fits(value, estimates) or (may_be_zero and value == 0) or (value == 0 and of_ref)
    require(right, "metric-scaled-twice", f"{seen}, not one of {[float(f'{e:.4g}') for e in estimates]}.")


@wrong("the metric is not what its name says")
def ratio_metrics(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A metric named after the ratio is exp(lp − old), and a metric named entropy is not negative."""
    probe = Probe.of(loss_fn, data, logprobs)
    for d in (-0.5, 0.25):
        result = uniform_outcome(probe, old_logprobs=d, sampler_logprobs=d, ref_logprobs=0.0)
        for name, value in numbers(result.metrics).items():
            found = set(words(name))
            if found & {"ratio", "ratios"} and not found & NOT_THE_RATIO:
                inverted = math.isclose(value, math.exp(-d), rel_tol=1e-4)
                seen = f"With lp − old = {d:g} the metric {name!r} is {value:g}, not {math.exp(d):.4g}"
                require(not inverted, "metric-sign", f"{seen}: the ratio upside down.")
            if found & {"entropy", "ent"} and not found & {"loss", "bonus", "coef", "term", "penalty"}:
                seen = f"With logprobs of −4 the metric {name!r} is {value:g}: an entropy is the mean of −lp."
                require(not fits(value, [-4.0]), "metric-sign", seen)


NOT_THE_RATIO = {"clip", "clipped", "cap", "capped", "tis", "log", "frac", "fraction", "odds", "sampler", "rollout",
    "loss", "is", "low", "high", "bound", "std", "eps", "accept", "inverse", "inv"}  # fmt: skip


CLIP_WORDS = {"clip", "clipfrac", "clipfraction", "clipped", "clipfracs", "clips"}
NOT_A_FRACTION = {"bound", "threshold", "eps", "epsilon", "range", "value", "vf", "grad", "norm", "loss", "adv", "tis",
    "min", "max", "count", "num", "tokens", "coef", "cov", "is", "imp", "importance", "rollout", "mismatch", "rho",
    "sampler", "log", "kl", "advantage", "advantages", "reward", "rewards", "delta"}  # fmt: skip


def clip_fractions(probe: Probe, d: float, advantage: float) -> tuple[dict[str, float], float]:
    """Return the metrics that are clip fractions and the gradient, for tokens of log-ratio d."""
    result = uniform_outcome(probe, advantage, old_logprobs=d, sampler_logprobs=d, ref_logprobs=0.0)
    found = {
        name: value
        for name, value in numbers(result.metrics).items()
        if set(words(name)) & CLIP_WORDS and not set(words(name)) & NOT_A_FRACTION
    }
    return found, result.gradients[0][0]


@wrong("the metric is not what its name says")
def clip_metrics(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A clip fraction is 0 within the bounds and counts every token whose gradient a bound removes, on its side."""
    probe = Probe.of(loss_fn, data, logprobs)
    on, gradient = clip_fractions(probe, 0.0, 1.0)
    assume(bool(on), "no metric is a clip fraction")
    assume(gradient != 0, "there is no gradient on tokens of equal advantages")
    caps = [setting.value for setting in named_numbers(loss_fn) if "log" in words(setting.name)]
    assume(min(caps, default=math.inf) > 1, "a cap of the log-ratio removes the gradient before a bound does")
    for name, value in on.items():
        require(value == 0, "metric-miscounts", f"On-policy the metric {name!r} is {value:g}.")
    for d, advantage, side, opposite in ((1.0, 1.0, HIGH_SIDE, LOW_SIDE), (-1.0, -1.0, LOW_SIDE, HIGH_SIDE)):
        fractions, gradient = clip_fractions(probe, d, advantage)
        for name, value in fractions.items():
            found = set(words(name))
            seen = f"At ratio {math.exp(d):.3g} and advantage {advantage:g} the gradient is {gradient:g}"
            if gradient == 0 and not found & (opposite | {"dual", "lower"}):
                require(value != 0, "metric-miscounts", f"{seen}, but {name!r} is {value:g}.")
            if found & opposite and not found & (side | {"dual", "lower"}):
                require(value == 0, "metric-miscounts", f"{seen}, and {name!r} is {value:g}.")


HIGH_SIDE, LOW_SIDE = {"high", "upper", "hi", "pos", "positive"}, {"low", "lo", "neg", "negative"}
"""The words for the side of a bound. ``lower`` is that of the dual clip in some frameworks."""


@fragile(
    "the share of ratios out of bounds is called a clip fraction too; it does not tell how many tokens are clipped"
)
def clip_binding(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A clip fraction counts the tokens whose gradient a bound removes, and no others."""
    probe = Probe.of(loss_fn, data, logprobs)
    cut = [clip_fractions(probe, d, advantage)[1] == 0 for d, advantage in ((1.0, 1.0), (-1.0, -1.0))]
    assume(any(cut), "no bound removes a gradient")
    for d, advantage in ((-1.0, 1.0), (1.0, -1.0)):
        fractions, gradient = clip_fractions(probe, d, advantage)
        for name, value in fractions.items():
            if gradient != 0:
                seen = f"At ratio {math.exp(d):.3g} and advantage {advantage:g} there is a gradient"
                require(value == 0, "metric-counts-nonbinding", f"{seen}, but {name!r} is {value:g}.")
