"""Laws of preference losses. Datum 2i is the chosen side of pair i, datum 2i + 1 the rejected side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lossfns.testing.batch import Batch
from lossfns.testing.laws.base import (
    LossFn,
    NotApplicable,
    Outcome,
    Probe,
    assume,
    column_rows,
    columns_read,
    fragile,
    influences,
    is_described_as,
    reads_only_mask,
    require,
    shifted,
    slots,
    uniform_batch,
    with_slot,
    wrong,
)
from lossfns.testing.laws.settings import setting_named, setting_of, with_setting
from lossfns.testing.laws.sums import central_difference
from lossfns.testing.settings import knobs


def pair_batch(probe: Probe, chosen: float = -2.0, rejected: float = -2.0, length: int = 1, pairs: int = 1) -> Batch:
    """Return pairs whose sides differ only in their logprobs. All reference logprobs are −2."""
    batch = uniform_batch(probe.batch, length=length, datums=2 * pairs)
    return batch.having(logprobs=[[chosen] * length, [rejected] * length] * pairs)


BETAS = ("beta", "dpo_beta", "beta_dpo", "simpo_beta", "kl_beta")
SMOOTHINGS = ("label_smoothing", "smoothing", "label_noise", "noise", "noise_rate", "flip_rate", "flip_prob",
    "flip_probability", "label_flip_prob")  # fmt: skip
SMALL_NUMBERS = ("eps", "epsilon")
"""Settings that are a label smoothing in one loss, and in another a constant that guards a division."""
LAMBDAS = ("lam", "lambda_or", "lambda_", "lambda_odds", "or_weight", "odds_weight")
"""Settings for the weight of ORPO's odds ratio, which some trainers call beta."""
MARGINS = ("gamma", "margin", "target_margin", "target_reward_margin", "simpo_gamma", "gamma_beta_ratio", "delta")


def has_reference(probe: Probe) -> bool:
    """Return whether the loss reads the logprobs of a reference."""
    return "ref_logprobs" in probe.reads


def pair_of_gaps(
    probe: Probe, chosen: Sequence[float], rejected: Sequence[float], level_without_reference: float = -1.0
) -> Batch:
    """Return one pair, given by lp − ref of every token. Without a reference, the gaps are added to one level."""
    sides = [list(chosen), list(rejected)]
    level = -1.0 - max(0.0, *sides[0], *sides[1]) if has_reference(probe) else level_without_reference
    batch = uniform_batch(probe.batch, datums=2)
    columns = {name: [[level] * len(side) for side in sides] for name in batch.columns}
    logprobs = [[level + gap for gap in side] for side in sides]
    return Batch(logprobs, [[1.0] * len(side) for side in sides], columns)


def at_margin(probe: Probe, margin: float) -> Outcome:
    """Return the outcome of a pair of two tokens with this margin."""
    if has_reference(probe):
        return probe(pair_of_gaps(probe, [margin / 2], [-margin / 2]))
    return probe(pair_of_gaps(probe, [min(margin, 0.0)], [-max(margin, 0.0)]))


def slopes(probe: Probe, margins: Sequence[float], side: int = 1) -> list[float]:
    """Return the gradient of one side at these margins. That of the rejected side holds no likelihood of the chosen."""
    return [at_margin(probe, m).gradients[side][0] for m in margins]


def is_of_odds(probe: Probe) -> bool:
    """Return whether the loss compares log-odds: the rejected side's gradient then grows as 1 / (1 − p)."""
    if has_reference(probe):
        return False
    at_01, at_1 = (probe(pair_batch(probe, chosen=a, rejected=a)).gradients[1][0] for a in (-0.1, -1.0))
    return not probe.close(at_01, at_1)


def is_logistic(probe: Probe, gradients: Sequence[float], ends: tuple[float, float]) -> bool:
    """Return whether gradients at margins −2, 0 and 2 are those of −log σ(k·m + c), given those at −∞ and +∞."""
    low, high = ends
    shares = [(g - high) / (low - high) for g in gradients] if low != high else [0.0]
    if not all(1e-6 < share < 1 - 1e-6 for share in shares):
        return False
    a, b, c = (math.log(share / (1 - share)) for share in shares)
    return math.isclose(a - b, b - c, rel_tol=1e-2) and a - b > 1e-4


FAR = 2000.0
"""A margin at which −log σ(βm) has reached its slope at infinity, for every usual β."""


@wrong("descent must raise the chosen side and lower the rejected one")
def sides(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Descent makes the chosen side of every pair more likely and the rejected side less likely."""
    probe = Probe.of(loss_fn, data, logprobs)
    result = probe(pair_batch(probe))
    (chosen,), (rejected,) = result.gradients
    seen = f"In one pair of equal sides the gradient is {chosen:g} for the chosen and {rejected:g} for the rejected"
    assume(chosen != 0 or rejected != 0, "there is no gradient")
    if chosen == 0 or rejected == 0:
        (chosen_above,), (rejected_above,) = probe(pair_batch(probe, chosen=-1.5, rejected=-3.0)).gradients
        balanced = (chosen_above != 0 or chosen != 0) and (rejected_above != 0 or rejected != 0)
        assume(not balanced, "at equal sides its gradient is 0 for one side")
        slope = central_difference(probe, pair_batch(probe), 0, 0, 1e-4)
        matches_slope = math.isclose(chosen, slope, rel_tol=1e-3, abs_tol=1e-6)
        require(False, "side-detached" if matches_slope else "detached-term", f"{seen}.")
    likely = "sign-flipped" if result.value < 0 else "sides-swapped"
    require(chosen < 0 < rejected, likely, f"{seen}, the loss {result.value:g}.")
    rows = probe(pair_batch(probe, pairs=3)).gradients
    require(all(map(any, rows)), "datum-ignored", f"In three equal pairs the gradients are {[row[0] for row in rows]}.")
    signs_alternate = all((row[0] < 0) == (i % 2 == 0) for i, row in enumerate(rows))
    require(signs_alternate, "pair-layout", f"In three equal pairs the gradients are {[row[0] for row in rows]}.")


@wrong("another token than the one that is trained has a gradient or an effect")
def pair_canary(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """With one token of each side active, the gradients are at these two, and only their columns matter."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = uniform_batch(probe.batch, length=4, datums=4, logprobs=-1.0)
    if "ref_logprobs" in batch.columns:  # off the reference, where one side of some losses has no gradient
        batch = batch.having(ref_logprobs=[[-0.5 if i % 2 == 0 else -1.25] * 4 for i in range(4)])
    blank = batch.having(weights=[[0.0] * 4 for _ in range(4)])
    for j, k in ((1, 2), (2, 1), (0, 3), (3, 0)):
        weights = with_slot(with_slot(with_slot(with_slot(blank.weights, 0, j, 1.0), 1, k, 1.0), 2, j, 1.0), 3, k, 1.0)
        alone = blank.having(weights=weights)
        rows = probe(alone).gradients
        hit = [[t for t, g in enumerate(row) if g != 0] for row in rows]
        seen = f"With tokens {j} (chosen) and {k} (rejected) active, the gradients are at {hit}."
        if not hit[2] and not hit[3] and hit[0]:
            require(False, "datum-ignored", seen)
        swapped = hit[0] == hit[1] and hit[0] in ([j], [k])
        require(not swapped and hit[:2] != [[k], [j]], "pair-masks-swapped", seen)
        require(all(len(h) < 2 for h in hit), "mask-missing", seen)
        if hit[0] != [j] or hit[1] != [k]:
            lost = not hit[0] or not hit[1]
            at_ends = {j, k} == {0, 3}
            require(False, "target-dropped" if lost and at_ends else "frame-shift", seen)
    if "ref_logprobs" in columns_read(probe):
        check_reference_positions(probe, alone)


def check_reference_positions(probe: Probe, batch: Batch) -> None:
    """Require that only the reference logprobs of active tokens matter, each for its own datum."""
    ((i, j), *_), masked = slots(batch), slots(batch, active=False)
    tried = [(i, j), *masked, *slots(batch)[1:]]
    influential = [slot for slot in tried if influences(probe, "ref_logprobs", batch, [slot])]
    if not influential:
        return  # the reference is inert: another law reports it
    seen = f"With only tokens {slots(batch)} active, the reference's logprobs of {influential} matter"
    if (i, j) not in influential:
        datum_slots = [(i, t) for t in range(len(batch.weights[i]))]
        raised = batch.having(ref_logprobs=shifted(batch.columns["ref_logprobs"], datum_slots, 0.25))
        datum_matters = not probe.close(probe(raised).value, probe(batch).value, scale=0.01)
        same_pair = {k for k, _ in influential} <= {0, 1} or set(influential) <= set(slots(batch))
        bug = "frame-shift" if datum_matters else "reference-misused" if same_pair else "datum-misaligned"
        require(False, bug, f"{seen}; the one of {(i, j)} does not.")
    require(not set(influential) & set(masked), "kl-unmasked", f"{seen}.")


@wrong("a token's weight is its share of the side")
def pair_weights(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Within a side, a token's gradient is in proportion to its weight."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume(not reads_only_mask(probe), "it reads a mask, which holds no fractions")
    sides = [1.0, 0.5, 2.0], [0.5, 2.0, 1.0, 0.25]
    batch = pair_of_gaps(probe, [0.0] * 3, [0.0] * 4).having(weights=list(map(list, sides)))
    for side, weights, row in zip(("chosen", "rejected"), sides, probe(batch).gradients):
        seen = f"With weights {weights} the {side} side's gradients are {row}."
        assume(row[0] != 0, "there is no gradient")
        shares = [g / row[0] * weights[0] for g in row]
        if not probe.close(shares, weights):
            squared = probe.close([s / weights[0] for s in shares], [(w / weights[0]) ** 2 for w in weights])
            require(False, "weights-squared" if squared else "weights-binarised", seen)


@wrong("a loss with a reference is a function of policy − reference")
def reference(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Only the difference of policy and reference matters: shifting both has no effect."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume("ref_logprobs" in columns_read(probe), "it reads no reference")
    batch = pair_batch(probe, chosen=-1.5)
    matters = [influences(probe, "ref_logprobs", batch, [(i, 0)]) for i in range(2)]
    require(any(matters), "ref-inert", "Changing the reference's logprobs changes nothing.")
    forgotten = "chosen" if not matters[0] else "rejected"
    seen = f"Changing the reference's logprobs of the {forgotten} side changes nothing, of the other side it does."
    require(all(matters), "reference-misused", seen)
    plain = probe(batch).value
    beta = setting_named(loss_fn, *BETAS)
    for i, side in enumerate(("chosen", "rejected")):
        changes = [probe(shift_both(batch, i, shift)).value - plain for shift in (-4.0, -8.0)]
        # A loss may have a term of the chosen side's likelihood, without the reference. This term is linear.
        nll = i == 0 and probe.close(2 * changes[0], changes[1])
        seen = (
            f"Lowering policy and reference of the {side} side by the same 4 nats changes the loss by {changes[0]:g}."
        )
        if nll or probe.close(plain + changes[0], plain):
            continue
        for by in (beta[1], 1 / beta[1]) if beta and beta[1] > 0 else ():
            scaled = probe(shift_both(batch, i, -4.0, -4.0 * by)).value
            require(
                not probe.close(scaled, plain), "beta-misplaced", f"{seen} With {by:g} times for the reference, not."
            )
        require(False, "reference-misused", seen)


def shift_both(batch: Batch, i: int, shift: float, shift_of_reference: float | None = None) -> Batch:
    """Return the batch with policy and reference of one side shifted, unless given by the same amount."""
    shifts = {"logprobs": shift, "ref_logprobs": shift if shift_of_reference is None else shift_of_reference}
    return batch.having(**{name: shifted(column_rows(batch, name), [(i, 0)], by) for name, by in shifts.items()})


def is_log_sigmoid(probe: Probe, at_reference: Outcome) -> bool:
    """Return whether the loss is −log σ(βm): both gradients double from m = 0 to a margin far below 0."""
    if not all(map(any, at_reference.gradients)):
        return False
    ranked_wrong = probe(pair_batch(probe, chosen=-2e4)).gradients
    return probe.close([a[0] / b[0] for a, b in zip(ranked_wrong, at_reference.gradients)], [2.0, 2.0])


@wrong("where policy and reference agree, the loss is ln 2")
def step_zero(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """At the reference a logistic loss is ln 2 for each pair."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume("ref_logprobs" in columns_read(probe), "it reads no reference")
    one, two = probe(pair_batch(probe)), probe(pair_batch(probe, pairs=2))
    seen = f"With policy = reference the loss of one pair is {one.value:g}, of two {two.value:g}"
    half = probe.close(one.value, math.log(2) / 2)
    require(not half, "pairs-miscounted", f"{seen}: half of ln 2.")
    require(
        not is_log_sigmoid(probe, one) or probe.close(one.value, math.log(2)), "constant-factor", f"{seen}: not ln 2."
    )


@fragile("DPO sums; its length-normalised form is a method of its own")
def summed(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """At the reference, the gradient of a token of a logistic loss does not depend on the length of its side."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume(has_reference(probe), "it reads no reference")
    one = probe(pair_batch(probe))
    assume(is_log_sigmoid(probe, one), "it is not logistic, or its labels are smoothed")
    alone, of_four = (probe(pair_batch(probe, length=n)).gradients[1][0] for n in (1, 4))
    seen = f"With policy = reference the gradient of a rejected token is {alone:g} alone, {of_four:g} of four."
    require(probe.close(of_four, alone), "mean-logprob-margin", seen)


@wrong("the gradient is off by a constant factor")
def pair_scale(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """If a pair is ranked right by a large margin, the gradient of the chosen side's likelihood is not halved."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume("ref_logprobs" not in columns_read(probe), "it has a reference")
    assume(is_of_odds(probe), "its likelihood may have a factor, since it compares no odds")
    assume(0.5 not in knobs(loss_fn).values(), "a setting is 0.5, which may halve the gradient")
    gradient = probe(pair_batch(probe, chosen=-1e-3, rejected=-30.0)).gradients[0][0]
    seen = f"In a pair that is ranked right by a large margin the gradient of the chosen token is {gradient:g}, not −1."
    require(not math.isclose(gradient, -0.5, rel_tol=1e-3), "pairs-miscounted", seen)


@wrong("a pair that is ranked worse must cost more")
def monotone(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A pair ranked wrong by a larger margin has the larger loss."""
    probe = Probe.of(loss_fn, data, logprobs)
    values = [(m, at_margin(probe, m).value) for m in (-16.0, -4.0, -1.0, 0.0)]
    for (a, before), (b, after) in pairwise(values):
        seen = f"With a margin of {a:g} the loss is {before}, with {b:g} {after}."
        require(after < before, "sides-swapped", seen)


@wrong("a pair that is ranked wrong must be pulled apart, most of all if the margin is large")
def misranked(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The gradient of a pair that is ranked wrong does not end at some margin, down to −1000.

    It may fade, as that of a sigmoid does. So a gradient of 0 counts only where it was large at the margin before.
    """
    probe = Probe.of(loss_fn, data, logprobs)
    margins = (-1.0, -4.0, -16.0, -64.0, -256.0, -1000.0)
    for side, words in enumerate(("chosen", "rejected")):
        gradients = slopes(probe, margins, side)
        size = max(map(abs, gradients))
        assume(size > 0, "there is no gradient")
        for (before, g), (margin, now) in pairwise(zip(margins, gradients)):
            seen = f"The {words} side's gradient is {g:g} at a margin of {before:g} and {now:g} at {margin:g}."
            require(now != 0 or abs(g) < 0.05 * size, "margin-clamped", seen)


@wrong("the answer that is not preferred must not become more likely beside the other")
def rejected_side(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """However well a pair is ranked, no constant pull raises both of its sides."""
    probe = Probe.of(loss_fn, data, logprobs)
    near, far = (at_margin(probe, m).gradients for m in (FAR / 2, FAR))
    (chosen,), (rejected,) = far
    assume(probe.close(near, far), "its gradient changes with the margin")
    seen = f"In a pair ranked right by {FAR:g} nats the gradients are {chosen:g} (chosen) and {rejected:g} (rejected)."
    require(not (chosen < -1e-9 and rejected < -1e-9), "rejected-raised", seen)


@wrong("the two sides of a pair are compared by one measure")
def lengths_alike(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Both sides sum their logprobs, or both average them, each over its own tokens.

    The law measures how both gradients change with the rejected side. A term of the chosen side alone drops out.
    """
    probe = Probe.of(loss_fn, data, logprobs)
    alone = response(probe, 1, 1, 1, 1)
    if alone is None:
        raise NotApplicable("the sides have no term in common")
    sums, means = (alike_at_equal_lengths(probe, alone, power) for power in (0, 1))
    if sums == means:  # neither of the two: is it one for each side?
        mixed = [(p, q) for p, q in ((0, 1), (1, 0)) if fits(alone, response(probe, 3, 3, 3**p, 3**q), 3**-p, 3**-q)]
        assume(bool(mixed), "it neither sums nor averages")
        sides = "the chosen side is averaged and the rejected summed"
        sides = sides if mixed[0][0] else "the chosen side is summed and the rejected averaged"
        require(False, "one-side-normalised", f"With three tokens on each side the gradients fit only if {sides}.")
    power = 0 if sums else 1
    for n, k in ((1, 3), (3, 1)):
        changed = response(probe, n, k, n**power, k**power)
        if changed is None:
            raise NotApplicable("its gradient does not change with the rejected side")
        ratio, own = (c / r for c, r in (changed, alone))
        expected = own * (k / n) ** power
        seen = f"With {n} chosen and {k} rejected tokens a chosen token's gradient changes {ratio:g} times as much as"
        right = math.isclose(ratio, expected, rel_tol=1e-2)
        require(right, "one-side-normalised", f"{seen} a rejected one's, not {expected:g} times.")


Response = tuple[float, float]


def response(probe: Probe, chosen: int, rejected: int, by_chosen: int, by_rejected: int) -> Response | None:
    """Return how a chosen and a rejected token's gradients change if the rejected side falls by 40 (or 4000) nats.

    The sides have these numbers of tokens. Sums of gaps are ``by_…`` / number of those of a side of one token.
    None if a gradient does not change.
    """

    def gradients(fall: float) -> Sequence[Sequence[float]]:
        gap = -fall * by_rejected / rejected
        start = [-1.0 * by_chosen / chosen] * chosen
        return probe(pair_of_gaps(probe, start, [gap - 1.0 * by_rejected / rejected] * rejected, 0.0)).gradients

    before = gradients(0.0)
    for fall in (40.0, 4000.0):
        after = gradients(fall)
        change = after[0][0] - before[0][0], after[1][0] - before[1][0]
        if all(abs(x) > 1e-6 for x in change):
            return change
    return None


def fits(alone: Response | None, other: Response | None, chosen: float, rejected: float) -> bool:
    """Return whether a response is that of single tokens, times these factors."""
    if alone is None or other is None:
        return False
    return math.isclose(other[0], alone[0] * chosen, rel_tol=1e-2) and math.isclose(
        other[1], alone[1] * rejected, rel_tol=1e-2
    )


def alike_at_equal_lengths(probe: Probe, alone: Response, power: int) -> bool:
    """Return whether three tokens a side, summed (power 0) or averaged (1), respond as one token a side does."""
    return fits(alone, response(probe, 3, 3, 3**power, 3**power), 3.0**-power, 3.0**-power)


@wrong("β scales the margin once, inside the sigmoid")
def beta(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Twice the β has the effect of twice the margin: β stands once, beside the margin."""
    probe = Probe.of(loss_fn, data, logprobs)
    name, value = setting_of(loss_fn, "it has no setting for β", *BETAS, *LAMBDAS)
    assume(value > 0, f"{name} is not above 0")
    doubled = with_setting(probe, name, 2 * value)
    margins = (-8.0, -2.0, 0.0, 2.0, 8.0)

    def scaled(of: Probe, by: float, divisor: float) -> list[float]:
        return [g / divisor for g in slopes(of, [by * m for m in margins])]

    seen = f"With {name} {2 * value:g} in place of {value:g}"
    if is_of_odds(probe):  # λ stands beside the odds ratio
        once, twice = (p(pair_batch(p, chosen=-1.0, rejected=-1.0)).gradients[1][0] for p in (probe, doubled))
        right = once == 0 or not any(probe.close(twice / once, factor) for factor in (4.0, 0.5))
        require(right, "beta-misplaced", f"{seen} the odds ratio weighs {twice / (once or 1):g} times as much.")
        return
    assume(name in BETAS, "it has no setting for β")
    assume(any(scaled(probe, 1, 1)), "there is no gradient")
    if probe.close(scaled(doubled, 1, 2), scaled(probe, 2, 1)):
        return
    readings = {
        "is squared in the margin": (4.0, 4.0),
        "multiplies the loss once more": (4.0, 2.0),
        "stands outside the sigmoid": (2.0, 1.0),
        "divides the margin": (0.5, 0.5),
    }
    for words, (divisor, by) in readings.items():
        same = probe.close(scaled(doubled, 1, divisor), scaled(probe, by, 1))
        require(not same, "beta-misplaced", f"{seen} the gradients are those of a β that {words}.")
    assume(False, "it is no function of β times the margin")


@wrong("label smoothing ε is (1 − ε)·ℓ(h) + ε·ℓ(−h), or its unbiased form for labels that are flipped")
def smoothing(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Label smoothing adds a constant to the slope: β·ε (cDPO), β·ε/2, or −β·ε / (1 − 2ε) (robust DPO)."""
    probe = Probe.of(loss_fn, data, logprobs)
    name, value = setting_of(loss_fn, "it has no setting for label smoothing", *SMOOTHINGS, *SMALL_NUMBERS)
    described = any(
        is_described_as(loss_fn, word) for word in ("smooth", "noise", "flip", "cdpo", "conservative", "robust")
    )
    assume(name.lower() in SMOOTHINGS or (value > 1e-3 and described), f"its {name} is not said to smooth labels")
    plain, smooth = with_setting(probe, name, 0.0), with_setting(probe, name, 0.2)
    margins = (-30.0, -2.0, 0.0, 2.0, 30.0)
    low, *mine, high = slopes(plain, (-FAR, *margins, FAR), side=0)
    smoothed = slopes(smooth, margins, side=0)
    assume(all(map(math.isfinite, (low, high, *mine, *smoothed))), f"it is not finite with {name} 0")
    assume(is_logistic(probe, mine[1:4], (low, high)), "it is not logistic")
    assume(mine[2] < 0 < high - low, "it does not raise the chosen side")
    steepest = high - low
    added = [(s - g) / steepest for s, g in zip(smoothed, mine)]
    assume(max(map(abs, added)) > 1e-4, f"{name} has no effect")
    if any(all(math.isclose(a, x, rel_tol=1e-3, abs_tol=1e-5) for a in added) for x in (0.2, 0.1, -0.2 / 0.6)):
        return
    seen = f"With {name} 0.2 the slope at margins {margins} differs by {[round(a, 4) for a in added]} times β"
    shares = [(g - high) / -steepest for g in mine]
    flipped = [[scale / (1 + math.exp(-m)) for m in margins] for scale in (1.0, 1 / steepest)]
    without_beta = [[0.2 * f + 0.2 * share for f, share in zip(row, shares)] for row in flipped]
    for row in without_beta:
        same = all(math.isclose(a, x, rel_tol=1e-2, abs_tol=1e-4) for a, x in zip(added, row))
        require(not same, "beta-misplaced", f"{seen}: the term of the flipped label lacks β.")
    require(False, "smoothing-misapplied", f"{seen}, not by 0.2, 0.1 or −1/3 throughout.")


@wrong("a target margin is what the policy must reach")
def target(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A larger target margin costs more, and a squared loss with β has its target at 1 / (2β)."""
    probe = Probe.of(loss_fn, data, logprobs)
    minimum, of_beta = squared_target(probe), setting_named(loss_fn, "beta", "tau", "ipo_beta", "ipo_tau")
    if minimum is not None and of_beta is not None and of_beta[1] > 0:
        check_squared_target(probe, minimum, *of_beta)
        return
    name, value = setting_of(loss_fn, "it has no setting for a target margin", *MARGINS)
    wider = with_setting(probe, name, value + 0.5)
    assume(has_known_form(probe) and has_known_form(wider), "it is neither logistic nor a hinge")
    before, after = (at_margin(p, -1.0).value for p in (probe, wider))
    seen = f"With {name} {value + 0.5:g} in place of {value:g} the loss at a margin of −1 is {after}, not {before}"
    require(after >= before, "target-margin", f"{seen}: a larger target costs less.")


MISTAKEN_TARGETS: tuple[Callable[[float], float], ...] = (
    lambda beta: 1 / beta,
    lambda beta: beta / 2,
    lambda beta: beta,
    lambda beta: 2 * beta,
    lambda beta: -1 / (2 * beta),
    lambda beta: 2 / beta,
    lambda beta: 1 / (2 * beta * beta),
)


def check_squared_target(probe: Probe, minimum: float, name: str, beta: float) -> None:
    """Require that the minimum of a squared loss is not a mistaken one: it should be at 1 / (2β)."""
    again = squared_target(with_setting(probe, name, 2 * beta))
    if again is None or all(math.isclose(t, 1 / (2 * b)) for t, b in ((minimum, beta), (again, 2 * beta))):
        return
    seen = f"With {name} {beta:g} the squared loss has its target at {minimum:g}, with {2 * beta:g} at {again:g}"
    for of in MISTAKEN_TARGETS:
        matches = math.isclose(minimum, of(beta), rel_tol=1e-3) and math.isclose(again, of(2 * beta), rel_tol=1e-3)
        right = math.isclose(of(beta), 1 / (2 * beta)) and math.isclose(of(2 * beta), 1 / (4 * beta))
        require(not matches or right, "target-margin", f"{seen}, not at 1 / (2 {name}).")


def squared_target(probe: Probe) -> float | None:
    """Return the margin at which a loss has its minimum, if its gradient is linear in the margin; else None."""
    chosen = (-4.0, 0.0, 4.0) if has_reference(probe) else (-8.0, -4.0, 0.0)
    far = chosen[1] - 400.0  # near its target a logistic loss with a small β is nearly squared
    gaps = (*chosen, far)
    below, at, above, far_below = (probe(pair_of_gaps(probe, [gap], [0.0])).gradients[0][0] for gap in gaps)
    if probe.close(below, above) or not probe.close(below - at, at - above) or at == 0:
        return None
    if not math.isclose(far_below - at, 100 * (below - at), rel_tol=1e-2):
        return None
    return chosen[1] + 4 * at / (at - above)


def has_known_form(probe: Probe) -> bool:
    """Return whether the loss is −log σ of the margin, or linear in it below its target."""
    low, *middle, high = slopes(probe, (-FAR, -2.0, 0.0, 2.0, FAR))
    return is_logistic(probe, middle, (low, high)) or (probe.close(low, middle[0]) and low != 0 and high == 0)


@wrong("the log-odds are lp − log(1 − p)")
def odds(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Without a reference, the rejected side's gradient at equal sides is constant or grows as 1 / (1 − p)."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume("ref_logprobs" not in columns_read(probe), "it has a reference")
    probed = (-1.0, -0.1, -1e-3, -1e-5) if probe.dtype == torch.float64 else (-1.0, -0.1, -1e-2)
    gradients = {a: probe(pair_batch(probe, chosen=a, rejected=a)).gradients[1][0] for a in probed}
    first = gradients[-1.0]
    assume(first != 0, "the rejected side has no gradient")
    expected = {a: (1 - math.exp(-1.0)) / -math.expm1(a) for a in gradients}
    ratios = {a: g / first for a, g in gradients.items()}
    constant = all(probe.close(x, 1.0) for x in ratios.values())
    right = all(math.isclose(ratios[a], expected[a], rel_tol=1e-4) for a in gradients)
    worst = max(gradients, key=lambda a: abs(math.log(abs(ratios[a] / expected[a]) + 1e-30)))
    seen = f"At logprob {worst:g} on both sides the rejected side's gradient is {ratios[worst]:g} times that at −1"
    if constant or right:
        return
    at_zero = [g for row in probe(pair_batch(probe, chosen=-1e-10, rejected=-1e-10)).gradients for g in row]
    bug = "log-odds-biased" if all(map(math.isfinite, at_zero)) else "log-odds-nan"
    require(False, bug, f"{seen}, not {expected[worst]:g}.")


@fragile("an even number of datums is right")
def odd(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """An odd number of datums is refused."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = pair_batch(probe, pairs=2).take([0, 1, 2])
    try:
        loss_fn(batch.data(), batch.tensors(probe.dtype))
    except Exception:
        return
    require(False, "odd-datum-dropped", "Three datums are accepted, which is one pair and a half.")
