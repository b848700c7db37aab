"""Laws of unpaired preference, such as KTO and BCO: label 1 for an answer that is desirable, 0 for one that is not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lossfns.testing.batch import Batch
from lossfns.testing.laws.base import (
    LossFn,
    Probe,
    assume,
    influences,
    near,
    require,
    shifted,
    uniform_batch,
    wrong,
)
from lossfns.testing.laws.preference import BETAS
from lossfns.testing.laws.settings import setting_named, setting_of, with_setting, words


def answers(probe: Probe, *given: tuple[float, float]) -> Batch:
    """Return answers of one token each, by their label and lp − ref."""
    batch = uniform_batch(probe.batch, datums=len(given))
    level = -1.0 - max(0.0, *(gap for _, gap in given))
    columns = {name: [[level] for _ in given] for name in batch.columns}
    columns["labels"] = [[label] for label, _ in given]
    return Batch([[level + gap] for _, gap in given], batch.weights, columns)


@wrong("descent must raise desirable answers and lower the others")
def labels(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Descent makes a desirable answer more likely and an undesirable one less likely, at and below the reference."""
    probe = Probe.of(loss_fn, data, logprobs)
    for gap in (0.0, -0.5, -5.0):
        result = probe(answers(probe, (1.0, gap), (0.0, gap)))
        (desirable,), (undesirable,) = result.gradients
        seen = f"At lp − ref = {gap:g} the gradient is {desirable:g} for a desirable and {undesirable:g} for an"
        seen = f"{seen} undesirable answer, the loss {result.value:g}."
        assume(desirable != 0 or undesirable != 0, "there is no gradient")
        require(desirable * undesirable < 0, "label-ignored", seen, result.batch)
        bug = "sign-flipped" if result.value < 0 else "sides-swapped"
        require(desirable < 0 < undesirable, bug, seen, result.batch)


@wrong("a loss with a reference is a function of policy − reference")
def unpaired_reference(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Only policy − reference matters for an answer: shifting both has no effect."""
    probe = Probe.of(loss_fn, data, logprobs)
    for i, which in enumerate(("a desirable", "an undesirable")):
        batch = answers(probe, (1.0, -0.5), (0.0, -0.5))
        inert = not influences(probe, "ref_logprobs", batch, [(i, 0)], by=-2.0)
        require(not inert, "ref-inert", f"Changing the reference's logprobs of {which} answer changes nothing.")
        both = {"logprobs": batch.logprobs, "ref_logprobs": batch.columns["ref_logprobs"]}
        lower = batch.having(**{name: shifted(rows, [(i, 0)], -4.0) for name, rows in both.items()})
        before, after = probe(batch), probe(lower)
        seen = (
            f"With policy and reference of {which} answer 4 nats lower the loss is {after.value}, not {before.value}."
        )
        same = probe.close([after.value, after.gradients], [before.value, before.gradients])
        require(same, "reference-misused", seen)


@wrong("the reference point of a batch is a constant")
def reference_point(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Answers that are all one nat above the reference still have a gradient: their mean is held constant."""
    probe = Probe.of(loss_fn, data, logprobs)
    above, below = (probe(answers(probe, (1.0, gap), (1.0, gap))).gradients[0][0] for gap in (1.0, -1.0))
    assume(below != 0, "there is no gradient")
    seen = f"Two desirable answers one nat above the reference have the gradient {above:g}, one nat below it {below:g}."
    require(abs(above) > 1e-4 * abs(below), "missing-stop-gradient", seen)


@wrong("an answer that is right already needs no push, one that is wrong does")
def saturation(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The gradient fades where an answer is right by far, not only where it is wrong by far."""
    probe = Probe.of(loss_fn, data, logprobs)
    for label, which in ((1.0, "a desirable"), (0.0, "an undesirable")):
        good = 1000.0 if label else -1000.0
        # A partner keeps the mean log-ratio of the batch at 0.
        right, at, wrong_ = (
            abs(probe(answers(probe, (label, gap), (1 - label, -gap))).gradients[0][0]) for gap in (good, 0.0, -good)
        )
        seen = f"Of {which} answer that is right by 1000 nats the gradient has the size {right:g}, wrong by 1000"
        seen = f"{seen} nats {wrong_:g}, at the reference {at:g}."
        require(not (right > 0.5 * at > 50 * wrong_), "saturation-reversed", seen)


@wrong("the reference point estimates a KL, which is never negative")
def reference_point_clamped(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Answers below the reference do not affect one another: the reference point of KTO is at least 0."""
    probe = Probe.of(loss_fn, data, logprobs)
    far = [probe(answers(probe, (1.0, gap), (0.0, 0.0))).value for gap in (-2000.0, -4000.0)]
    assume(probe.close(*far), "its value has no bound, so that it is not KTO")
    alone, beside = (probe(answers(probe, (1.0, -1.0), (1.0, gap))).gradients[0][0] for gap in (-1.0, -9.0))
    seen = f"Beside an answer 9 nats below the reference the gradient is {beside:g}, beside one at −1 {alone:g}."
    require(probe.close(alone, beside), "reference-point-negative", seen)


DESIRABLE = ("desirable_weight", "lambda_d", "lambda_desirable", "weight_desirable", "lam_d", "w_desirable",
    "chosen_weight", "positive_weight", "lambda_pos", "w_pos")  # fmt: skip
UNDESIRABLE = ("undesirable_weight", "lambda_u", "lambda_undesirable", "weight_undesirable", "lam_u", "w_undesirable",
    "rejected_weight", "negative_weight", "lambda_neg", "w_neg")  # fmt: skip


@wrong("a weight acts on the answers that it is named for")
def class_weights(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The weight of desirable answers scales their gradient, and that of undesirable answers scales theirs."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = answers(probe, (1.0, 0.0), (0.0, 0.0))
    before = [row[0] for row in probe(batch).gradients]
    assume(all(before), "there is no gradient")
    named = [(setting_named(loss_fn, *names), i) for i, names in enumerate((DESIRABLE, UNDESIRABLE))]
    assume(any(found for found, _ in named), "it has no weights of desirable and undesirable answers")
    for found, i in named:
        if found is None or not found[1]:
            continue
        other = with_setting(probe, found[0], 2 * found[1])
        growth = [row[0] / g for row, g in zip(other(batch).gradients, before)]
        kind = ("desirable", "undesirable")[i]
        seen = f"With twice the {found[0]} the gradient of the {kind} answer is {growth[i]:g} times as large, that of"
        swapped = math.isclose(growth[1 - i], 2, rel_tol=1e-3) and math.isclose(growth[i], 1, rel_tol=1e-3)
        require(not swapped, "class-weights-swapped", f"{seen} the other {growth[1 - i]:g} times.")


@wrong("β scales the log-ratio once")
def unpaired_beta(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Twice the β has the effect of twice the log-ratio."""
    probe = Probe.of(loss_fn, data, logprobs)
    name, value = setting_of(loss_fn, "it has no setting for β", *BETAS)
    assume(value > 0, f"{name} is not above 0")
    doubled = with_setting(probe, name, 2 * value)

    def scaled(of: Probe, by: float, divisor: float) -> list[float]:
        batches = (answers(of, (label, by * gap)) for label in (1.0, 0.0) for gap in (0.0, -1.0, -3.0, -9.0))
        return [of(batch).gradients[0][0] / divisor for batch in batches]

    assume(any(scaled(probe, 1, 1)), "there is no gradient")
    if probe.close(scaled(doubled, 1, 2), scaled(probe, 2, 1)):
        return
    for effect, (divisor, by) in {
        "is squared beside the log-ratio": (4.0, 4.0),
        "multiplies the loss once more": (4.0, 2.0),
        "stands outside the sigmoid": (2.0, 1.0),
        "divides the log-ratio": (0.5, 0.5),
    }.items():
        seen = f"With {name} {2 * value:g} in place of {value:g} the gradients are those of a β that {effect}."
        same = probe.close(scaled(doubled, 1, divisor), scaled(probe, by, 1))
        require(not same, "beta-misplaced", seen)
    assume(False, "it is no function of β times the log-ratio")


@wrong("the metric is not what its name says")
def unpaired_metrics(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A reward metric is that of the answers in its name; a KL is not negative."""
    probe = Probe.of(loss_fn, data, logprobs)
    gaps = (-1.0, -3.0)
    metrics = probe(answers(probe, (1.0, gaps[0]), (0.0, gaps[1]))).metrics
    assume(bool(metrics), "it has no metrics")
    found = setting_named(loss_fn, *BETAS)
    scales = [1.0, found[1]] if found else [1.0]
    for name, value in metrics.items():
        named = set(words(name))
        seen = f"With lp − ref = {gaps[0]:g} of a desirable and {gaps[1]:g} of an undesirable answer"
        seen = f"{seen} the metric {name!r} is {value}."
        good, bad = named & {"chosen", "desirable", "good"}, named & {"rejected", "undesirable", "bad"}
        if named & {"reward", "rewards"} and (good or bad):
            own, other = gaps if good else gaps[::-1]
            mistaken = [s * x for s in scales for x in (other, -own, -other)]
            right = near(value, [s * own for s in scales]) or not near(value, mistaken)
            require(right, "metric-wrong", seen)
        elif named & {"margin", "margins"}:
            require(value > 0, "metric-wrong", seen)
        elif "z0" in name.lower() or (named & {"kl"} and not named & {"loss"}):
            require(value >= 0, "metric-wrong", seen)
