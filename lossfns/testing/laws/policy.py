"""Laws of policy losses: the importance ratio r = exp(lp − old), the advantages A, clipping, KL and corrections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from lossfns.testing.batch import Batch, Rows
from lossfns.testing.laws.base import (
    LossFn,
    Probe,
    assume,
    columns_read,
    fragile,
    has_sequence_ratio,
    influences,
    numbers,
    on_policy_batch,
    reads_only_mask,
    relative_difference,
    require,
    sequence_batch,
    slots,
    uniform_batch,
    unpoisoned,
    with_constants,
    without_empty_units,
    wrong,
)
from lossfns.testing.laws.masks import changed_by_padding
from lossfns.testing.laws.settings import asks_for_k1, claims_to_be, named_numbers, words
from lossfns.testing.laws.sums import COUNTS, additive_counts
from lossfns.testing.settings import knobs

LOG_RATIOS = [0.001 * 1.35**i for i in range(28)]
"""Log-ratios from 0.001, within GSPO's bounds, to 3.3, past the usual bounds of every loss."""


def value_and_gradient_at(probe: Probe, d: float, advantage: float, **columns: float) -> tuple[float, float]:
    """Return value and gradient of a single token with log-ratio d to the old policy and to the sampler."""
    batch = uniform_batch(probe.batch, logprobs=-30.0, advantages=advantage)
    constants = {"old_logprobs": -30.0 - d, "sampler_logprobs": -30.0 - d, **columns}
    result = probe(with_constants(batch, **{name: x for name, x in constants.items() if name in batch.columns}))
    return result.value, result.gradients[0][0]


def on_policy_gradient(probe: Probe, advantage: float, logprob: float = -30.0) -> float:
    """Return the gradient of a single on-policy token at the reference, less that of a token of advantage 0.

    The difference is the part that depends on the advantage. A term of the logprobs alone, such as an entropy bonus,
    drops out of it.
    """
    batches = (uniform_batch(probe.batch, logprobs=logprob, advantages=a) for a in (advantage, 0.0))
    of_advantage, of_none = (probe(batch).gradients[0][0] for batch in batches)
    return of_advantage - of_none


def weighs_likelihood(probe: Probe) -> bool:
    """Return whether the loss is a likelihood with a positive weight that grows with the advantage, as exp(A/β)."""
    pushes = [-value_and_gradient_at(probe, 0.0, a)[1] for a in (-2.0, -1.0, 0.0, 1.0, 2.0)]
    return pushes[0] > 0 and all(a < b for a, b in pairwise(pushes))


def entropy_pulls(probe: Probe) -> tuple[float, float]:
    """Return the gradients of a likely and of an unlikely token of advantage 0, on-policy and at the reference."""
    batches = (uniform_batch(probe.batch, logprobs=lp, advantages=0.0) for lp in (-0.5, -3.0))
    likely, unlikely = (probe(batch).gradients[0][0] for batch in batches)
    return likely, unlikely


def has_entropy_bonus(probe: Probe) -> bool:
    """Return whether, at advantage 0, unlikely tokens are raised more than likely ones."""
    likely, unlikely = entropy_pulls(probe)
    return unlikely < likely and not probe.close(likely, unlikely)


def reads_old_logprobs(probe: Probe) -> bool:
    """Return whether the loss reads old logprobs."""
    return "old_logprobs" in columns_read(probe)


@wrong("descent must raise good tokens and lower bad ones")
def sign(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Descent makes a token of positive advantage more likely and a token of negative advantage less likely."""
    probe = Probe.of(loss_fn, data, logprobs)
    value, _ = value_and_gradient_at(probe, 0.0, 1.0)
    good, better, bad = (on_policy_gradient(probe, a) for a in (1.0, 2.0, -1.0))
    of_none = value_and_gradient_at(probe, 0.0, 0.0)[1]
    seen = f"The advantage 1 adds {good:g} to the on-policy gradient, 2 adds {better:g} and −1 adds {bad:g}"
    if good == better == bad == 0:
        require(of_none == 0, "advantage-inert", f"{seen}.")
        assume(False, "there is no gradient")
    require(not probe.close([good, good], [better, bad]), "advantage-inert", f"{seen}.")
    require(good * bad <= 0, "advantage-sign-lost", f"{seen}: the sign is the same for both.")
    likely = "ratio-inverted" if reads_old_logprobs(probe) and value < 0 else "sign-flipped"
    require(good < 0 < bad, likely, f"{seen}, and the loss is {value:g} for advantage 1.")


@wrong("on-policy the policy gradient is −A, whatever the probability")
def stop_gradient(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """On-policy the gradient does not depend on how likely the token was."""
    probe = Probe.of(loss_fn, data, logprobs)
    likely, unlikely = (on_policy_gradient(probe, 1.0, lp) for lp in (-0.5, -3.0))
    seen = f"On-policy, with advantage 1, the gradient is {likely:g} at logprob −0.5 and {unlikely:g} at −3."
    require(probe.close(likely, unlikely), "missing-stop-gradient", seen)


@wrong("twice the advantage is twice the gradient")
def advantage_size(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """On-policy the gradient is proportional to the size of the advantage, for each of its signs."""
    probe = Probe.of(loss_fn, data, logprobs)
    limits = [s.name for s in named_numbers(loss_fn) if any(word.startswith("adv") for word in words(s.name))]
    assume(not limits, f"its setting {limits[0] if limits else ''} changes the advantages")
    units = {sign: on_policy_gradient(probe, sign) for sign in (1.0, -1.0)}
    assume(any(units.values()), "there is no gradient on tokens of equal advantages")
    assume(not weighs_likelihood(probe), "its weight is positive and grows with the advantage, but not in proportion")
    for sign, unit in units.items():
        if unit:
            sizes = [0.25, 2.0, 3.0]
            factors = [on_policy_gradient(probe, sign * size) / unit for size in sizes]
            seen = f"Advantages of {sign:g} times {sizes} have {factors} times the gradient of the advantage {sign:g}."
            require(probe.close(factors, sizes), "advantage-size-lost", seen)


@wrong("an entropy bonus must raise the entropy")
def entropy(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """An entropy bonus raises unlikely tokens more than likely ones."""
    probe = Probe.of(loss_fn, data, logprobs)
    likely, unlikely = entropy_pulls(probe)
    assume(likely != 0 or unlikely != 0, "at advantage 0 there is no gradient")
    metrics = probe(uniform_batch(probe.batch)).metrics
    names = [*(setting.name for setting in named_numbers(loss_fn)), *metrics]
    assume(any(word.startswith("ent") for name in names for word in words(name)), "nothing is named after an entropy")
    seen = f"At advantage 0 the gradient is {likely:g} at logprob −0.5 and {unlikely:g} at −3"
    if probe.close(likely, unlikely):
        assume("ref_logprobs" not in columns_read(probe), "the gradient at advantage 0 may be that of its KL term")
        require(False, "entropy-constant", f"{seen}: all tokens are pushed alike.")
    require(unlikely < likely, "entropy-sign", f"{seen}: likely tokens are raised.")


@wrong("without advantage and without divergence there is nothing to learn")
def zero_advantage(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Advantage 0 at the reference: loss and gradient are 0."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume(not differentiates_k1(probe), "its KL term is k1, whose gradient is 1 at the reference")
    batch = on_policy_batch(with_constants(without_empty_units(unpoisoned(probe.batch)), advantages=0.0))
    result = probe(batch)
    g = max((g for row in result.gradients for g in row), key=abs)
    seen = f"With advantages 0 and every policy the same, the loss is {result.value} and a gradient is {g}."
    has_kl = "ref_logprobs" in batch.columns and influences(probe, "ref_logprobs", batch, slots(batch), -0.5)
    zero = probe.close([g, 1.0], [0.0, 1.0]) and abs(result.value) < 1e-6
    if not zero:
        assume(not has_entropy_bonus(probe), "it has an entropy bonus")
        assume(not weighs_likelihood(probe), "its weight is positive for every advantage")
    require(zero, "kl-sign" if has_kl else "sign-flipped", seen, result.batch)


@wrong("a penalty must pull back")
def penalty(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """At advantage 0, a penalty on leaving the old policy pulls back to the old policy from either side."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume(reads_old_logprobs(probe), "it reads no old logprobs")
    points = (value_and_gradient_at(probe, d, 0.0) for d in (0.5, 0.0, -0.5))
    (value_above, above), (value_at, at_old), (value_below, below) = points
    pulls = above - at_old, below - at_old
    seen = f"At advantage 0, half a nat above the old policy the gradient is {above:g}, half a nat below it {below:g}"
    if max(map(abs, pulls)) < 1e-7:
        flat = probe.close([1.0, value_above, value_below], [1.0, value_at, value_at])
        assume(flat or "ref_logprobs" not in columns_read(probe), "the reference enters its advantages")
        values = f"the loss is {value_above:g} and {value_below:g}, on-policy {value_at:g}"
        require(flat, "detached-term", f"{seen}; {values}.")
        assume(False, "it has no penalty on leaving the old policy")
    assume(pulls[0] > 0 > pulls[1] or not has_entropy_bonus(probe), "it has an entropy bonus, which the ratio weights")
    require(pulls[0] > 0 > pulls[1], "penalty-sign", f"{seen}, on it {at_old:g}.")


@wrong("a KL term must pull to the reference")
def kl(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The KL term pulls to the reference from either side, whatever the advantage."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume("ref_logprobs" in columns_read(probe), "it reads no reference")
    off = [s.name for s in named_numbers(loss_fn) if s.role == "kl" and s.value == 0]
    assume(not off, f"{off[0] if off else ''} is 0")
    assume(not differentiates_k1(probe), "its KL term is k1, whose pull is the same on both sides")
    # (advantage, lp − ref) → the gradient of the KL term, relative to the gradient at the reference
    pull = {(a, x): kl_pull(probe, x, a) for a in (0.0, 1.0, -2.0) for x in (0.5, -0.5)}
    values = [value_and_gradient_at(probe, 0.0, 0.0, ref_logprobs=-30.0 - x)[0] for x in (0.0, 0.5)]
    above, below = pull[0.0, 0.5], pull[0.0, -0.5]
    seen = f"Half a nat above the reference the KL term's gradient is {above:g}, half a nat below it {below:g}"
    if all(p == 0 for p in pull.values()):
        changes = values[0] != values[1]
        assume(changes or not only_in_metrics(probe), "only its metrics use the reference")
        seen = f"{seen}; its value {'changes' if changes else 'does not change either'}."
        require(False, "kl-detached" if changes else "ref-inert", seen)
    spread = max(abs(pull[a, x] - pull[0.0, x]) for a, x in pull)
    same_for_all = spread <= 1e-3 * max(map(abs, pull.values()))
    by_advantage = f"{seen} at advantage 0, {pull[1.0, 0.5]:g} at 1, {pull[-2.0, 0.5]:g} at −2."
    require(same_for_all, "kl-scaled-by-advantage", by_advantage)
    require(above > 0 > below, "kl-sign", f"{seen}: it pushes away.")
    distances = (-1.0, -0.5, 0.5, 1.0)
    pulls = [kl_pull(probe, x, 0.0) for x in distances]
    inverted = [math.expm1(x) * above / math.expm1(0.5) for x in distances]
    seen = f"At lp − ref = {distances} the KL term's gradients are {pulls}: exp(lp − ref) − 1 times a constant."
    require(not similar(pulls, inverted), "kl-inverted", seen)


@fragile("its value is an unbiased estimate, which hosted APIs document; its expected gradient is 0 and holds nothing")
def kl_estimator(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The gradient of the KL term depends on the reference."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume("ref_logprobs" in columns_read(probe), "it reads no reference")
    assume(not asks_for_k1(loss_fn), "its settings ask for k1")
    push = value_and_gradient_at(probe, 0.0, 0.0, ref_logprobs=-30.0)[1]
    seen = f"At advantage 0 the gradient is {push:g} at the reference and half a nat above and below it"
    require(not differentiates_k1(probe), "k1-in-loss", f"{seen}: every sampled token becomes less likely.")


def differentiates_k1(probe: Probe) -> bool:
    """Return whether the KL term is lp − ref itself: its value depends on the reference, its gradient does not."""
    if "ref_logprobs" not in columns_read(probe):
        return False
    at = [value_and_gradient_at(probe, 0.0, 0.0, ref_logprobs=-30.0 - x) for x in (0.0, 0.5, -0.5)]
    values, gradients = zip(*at)
    return values[0] != values[1] and gradients[0] != 0 and len(set(gradients)) == 1


def kl_pull(probe: Probe, x: float, advantage: float, d: float = 0.0) -> float:
    """Return the gradient of the KL term at lp − ref = x and log-ratio d, relative to that at the reference."""
    at, at_reference = (value_and_gradient_at(probe, d, advantage, ref_logprobs=-30.0 - y)[1] for y in (x, 0.0))
    return at - at_reference


def similar(a: Any, b: Any) -> bool:
    """Return whether two lists agree to a thousandth, which is enough to tell one formula from another."""
    return relative_difference(a, b) < 1e-3


CLIPPED = ((1.0, 1.0), (-1.0, -1.0))
"""(advantage, log-ratio) of a token that is clipped above, and of one that is clipped below."""
NOT_CLIPPED = ((1.0, -1.0), (-1.0, 1.0))
"""(advantage, log-ratio) of tokens outside the bounds, on the sides where clipping does not act."""


@wrong("the reference must hold the tokens that have moved farthest, which are the clipped ones")
def kl_everywhere(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A separate KL term pulls on clipped tokens as on all others."""
    _, base, inside, clipped = kl_off_policy_pulls(loss_fn, data, logprobs)
    assume(similar(inside, [base] * 2), "off-policy the ratio scales the KL term: it is part of the advantage")
    seen = f"At lp − ref = 0.5 the KL term's gradient is {base:g} on-policy and {clipped} at the ratios e and 1/e"
    require(all(p != 0 for p in clipped), "kl-dropped-at-clip", f"{seen}, where the token is clipped.")


@fragile("a KL term that is weighted by the ratio is an unbiased estimate if that is meant; it is then also large")
def kl_unscaled(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Off-policy the ratio does not scale the KL term, unless a setting asks for it."""
    _, base, inside, clipped = kl_off_policy_pulls(loss_fn, data, logprobs)
    meant = {"unbiased", "importance", "correction", "corrected", "bias", "is", "reward"}
    named = [name for name in knobs_of(loss_fn) if meant & set(words(name))]
    assume(not named, f"its setting {named[0] if named else ''} may ask for it")
    assume(all(p != 0 for p in clipped), "the KL term is clipped with the advantage: it is part of the advantage")
    ratios = [math.exp(d) * base for _, d in NOT_CLIPPED]
    seen = f"At lp − ref = 0.5 the KL term's gradient is {base:g} on-policy and {inside} at the ratios 1/e and e."
    require(not similar(inside, ratios), "kl-scaled-by-ratio", seen)


def kl_off_policy_pulls(
    loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]
) -> tuple[Probe, float, list[float], list[float]]:
    """Return the pulls of the KL term half a nat above the reference: on-policy, off-policy, and on clipped tokens."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume({"ref_logprobs", "old_logprobs"} <= columns_read(probe), "it does not read old and reference logprobs")
    base = kl_pull(probe, 0.5, 0.0)
    assume(base != 0, "it has no KL term with a gradient")
    inside, clipped = ([kl_pull(probe, 0.5, a, d) for a, d in places] for places in (NOT_CLIPPED, CLIPPED))
    return probe, base, inside, clipped


def knobs_of(loss_fn: LossFn) -> list[str]:
    """Return the names of all settings."""
    return list(knobs(loss_fn))


def only_in_metrics(probe: Probe) -> bool:
    """Return whether the reference changes a metric and the loss has no setting for a KL term."""
    reported = [
        probe(
            uniform_batch(probe.batch, logprobs=-30.0, old_logprobs=-30.0, sampler_logprobs=-30.0, ref_logprobs=ref)
        ).metrics
        for ref in (-30.0, -30.5)
    ]
    return reported[0] != reported[1] and not any("kl" in name or "beta" in name for name in knobs(probe.loss_fn))


@wrong("the importance ratio is exp(lp − old)")
def ratio(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """On a sequence whose tokens all have log-ratio d, the ratio is exp(d), whatever the length.

    The ratio is measured below 1 with a positive advantage, where clipping does not bind.
    """
    probe = Probe.of(loss_fn, data, logprobs)
    assume(reads_old_logprobs(probe), "it reads no old logprobs")
    assume(value_and_gradient_at(probe, 0.0, 1.0)[1] != 0, "there is no gradient on tokens of equal advantages")
    base, lower = sequence_value(probe, [0.0] * 3), sequence_value(probe, [-0.5] * 3)
    relative = lower / base if base else math.nan  # exp(−0.5) if the loss is right
    seen = f"With 3 tokens of log-ratio −0.5 and advantage 1 the loss is {lower:g}, on-policy {base:g}"
    slopes = sequence_gradient(probe, 3), sequence_gradient(probe, 1)
    require(slopes[0] != 0 or slopes[1] == 0, "ratio-sum", f"{seen}: with 3 tokens on-policy there is no gradient.")
    require(base != 0, "ratio-not-exponentiated", f"{seen}.")
    if relative == 1:
        pinned = [name for name, value in knob_values(loss_fn) if value == (1, 1)]
        assume(not pinned, f"its setting {pinned[0] if pinned else ''} keeps the ratio at 1")
        bounds = [setting for setting in named_numbers(loss_fn) if setting.role in ("low", "high", "clip", "dual")]
        reported = [numbers(probe(sequence_batch(probe, [d] * 3)).metrics) for d in (0.0, -0.5)]
        assume(bool(bounds) or reported[0] == reported[1], "only its metrics use the old logprobs")
        changes = value_and_gradient_at(probe, 0.0, -1.0) != value_and_gradient_at(probe, -0.5, -1.0)
        require(changes, "old-logprobs-inert", f"{seen}: the same.")
        assume(False, "the ratio acts on tokens of negative advantage alone")
    on, near, far = (value_and_gradient_at(probe, d, 1.0)[1] for d in (0.0, -0.05, -0.1))
    inverted = on != 0 and probe.close([near / on, far / on], [math.exp(0.05), math.exp(0.1)])
    require(not inverted, "ratio-inverted", f"At log-ratio −0.1 the gradient is exp(0.1) times that of {on:g} at 0.")
    constant = relative >= 0.9 and math.isclose(relative, 1 + 0.5 / -30, rel_tol=0.2)
    assume(not constant, "the value does not depend on the ratio")
    product = math.isclose(relative, math.exp(-1.5), rel_tol=1e-3)
    geometric = claims_to_be(loss_fn, "gspo")
    require(not (product and geometric), "ratio-product", f"{seen}: exp(3 · −0.5) of it.")
    assume(not product, "the ratio is of the whole sequence, the product of its tokens'")
    near_squared = on != 0 and probe.close([near / on, far / on], [math.exp(-0.1), math.exp(-0.2)])
    squared = near_squared or math.isclose(relative, math.exp(-1), rel_tol=1e-3)
    below, above = (value_and_gradient_at(probe, 0.0, 1.0, sampler_logprobs=-30.0 - x)[1] for x in (-0.5, 0.0))
    by_correction = squared and "sampler_logprobs" in columns_read(probe) and below != above
    require(not by_correction, "missing-stop-gradient", f"{seen}: the ratio enters by the sampler correction too.")
    require(not squared, "ratio-squared", f"{seen}; the gradient at −0.1 is exp(−0.2) times that at 0.")
    require(not math.isclose(relative, math.exp(0.5), rel_tol=1e-3), "ratio-inverted", f"{seen}: exp(0.5) of it.")
    right = math.isclose(relative, math.exp(-0.5), rel_tol=1e-3)
    half = sequence_value(probe, [-0.25] * 3)
    linear = math.isclose(lower - base, 2 * (half - base), rel_tol=1e-6)
    require(right or not linear, "ratio-not-exponentiated", f"{seen}: linear in the log-ratio.")
    assume(right, "the loss is not proportional to the ratio")
    if has_sequence_ratio(probe):
        uneven = sequence_value(probe, [-1.0, -0.25, -0.25])
        seen = f"Log-ratios −1, −0.25, −0.25 have the mean −0.5, but the loss is {uneven:g}, not {lower:g}."
        require(math.isclose(lower, uneven, rel_tol=1e-4), "ratio-sum", seen)


@fragile("for RLOO and TOPR a sequence is one action; the product of many ratios soon overflows or vanishes")
def ratio_length(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The ratio of a sequence is the mean of its tokens', not their product."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume(reads_old_logprobs(probe), "it reads no old logprobs")
    values = [sequence_value(probe, [d] * n) for n in (1, 3) for d in (0.0, -0.5)]
    assume(all(values), "the loss is 0")
    of_one, of_three = math.log(abs(values[1] / values[0])), math.log(abs(values[3] / values[2]))
    seen = f"Log-ratios of −0.5 multiply the loss of one token by exp({of_one:.3g}), of three by exp({of_three:.3g})."
    product = of_one < -1e-3 and math.isclose(of_three, 3 * of_one, rel_tol=1e-3)
    require(not product, "ratio-product", seen)


@wrong("the gradient of r·A is r·A")
def ratio_gradient(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Where the value is proportional to the ratio, the gradient is so as well."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume(reads_old_logprobs(probe), "it reads no old logprobs")
    compared = 0
    for advantage, d in ((1.0, -0.4), (-1.0, 0.4)):  # no usual bound is there
        for length in (1, 3):
            (value, gradient), (value_off, gradient_off) = (
                advantage_part(probe, [x] * length, advantage) for x in (0.0, d)
            )
            if not gradient or not math.isclose(value_off, math.exp(d) * value, rel_tol=1e-3):
                continue
            compared += 1
            seen = (
                f"With {length} tokens of advantage {advantage:g}, the log-ratio {d} multiplies the loss by "
                f"{math.exp(d):.3g} and the gradient by {gradient_off / gradient:.3g}."
            )
            require(math.isclose(gradient_off, math.exp(d) * gradient, rel_tol=1e-3), "ratio-without-gradient", seen)
    assume(compared > 0, "the loss is not proportional to the ratio")


@wrong("the surrogate of a good and of a bad token is the same function")
def ratio_symmetry(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """If the loss of a good token depends on its ratio and not on its probability, so does that of a bad one."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume(reads_old_logprobs(probe), "it reads no old logprobs")
    depends = {}
    for advantage in (1.0, -1.0):
        batches = [uniform_batch(probe.batch, logprobs=lp, advantages=advantage) for lp in (-0.5, -3.0)]
        zeros = [with_constants(batch, advantages=0.0) for batch in batches]
        likely, unlikely = (probe(batch).value - probe(zero).value for batch, zero in zip(batches, zeros))
        depends[advantage] = not probe.close(likely, unlikely, scale=10)
    seen = "On-policy, the loss of a token of advantage 1 {} on its probability, of one of advantage −1 it {}."
    said = ["depends" if depends[a] else "does not depend" for a in (1.0, -1.0)]
    require(depends[1.0] == depends[-1.0], "ratio-not-exponentiated", seen.format(*said).replace("it depends", "does"))


def advantage_part(probe: Probe, log_ratios: Sequence[float], advantage: float) -> tuple[float, float]:
    """Return value and first gradient of a sequence, less those for advantage 0."""
    batch = sequence_batch(probe, log_ratios)
    of_advantage, of_none = (probe(with_constants(batch, advantages=a)) for a in (advantage, 0.0))
    return of_advantage.value - of_none.value, of_advantage.gradients[0][0] - of_none.gradients[0][0]


def knob_values(loss_fn: LossFn) -> list[tuple[str, Any]]:
    """Return the settings; a list as a tuple."""
    return [(name, tuple(x) if isinstance(x, list) else x) for name, x in knobs(loss_fn).items()]


def sequence_value(probe: Probe, log_ratios: Sequence[float]) -> float:
    """Return the loss of one sequence with these log-ratios."""
    return probe(sequence_batch(probe, log_ratios)).value


def sequence_gradient(probe: Probe, length: int) -> float:
    """Return the gradient of the first token of an on-policy sequence."""
    return probe(sequence_batch(probe, [0.0] * length)).gradients[0][0]


@wrong("on-policy the gradient is −A·w / D")
def on_policy(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """On-policy the gradient is the policy gradient −A·w / D, where D counts weights, tokens, sequences, …."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unequal_weights_batch(probe)
    gradients = advantage_gradients(probe, batch)
    assume(any(g != 0 for row in gradients for g in row), "there is no gradient")
    assume(not weighs_likelihood(probe), "its weight is positive and grows with the advantage, but not in proportion")
    factors = [[-g / w for g, w in zip(gs, ws)] for gs, ws in zip(gradients, batch.weights)]
    seen = f"On-policy, with advantages 1 and weights {batch.weights}, the gradients are {gradients}."
    if (
        not has_sequence_ratio(probe)
        and not reads_only_mask(probe)
        and not all(probe.close(row, [row[0]] * len(row)) for row in factors)
    ):
        squared = [[-g / w**2 for g, w in zip(gs, ws)] for gs, ws in zip(gradients, batch.weights)]
        twice = all(probe.close(row, [row[0]] * len(row)) for row in squared)
        require(False, "weights-squared" if twice else "weights-binarised", seen)
    check_scale(probe, batch)


def advantage_gradients(probe: Probe, batch: Batch) -> Rows:
    """Return the gradients on a batch, less those for advantages 0 if it has advantages."""
    gradients = probe(batch).gradients
    if "advantages" not in batch.columns:
        return gradients
    of_none = probe(with_constants(batch, advantages=0.0)).gradients
    return [[g - h for g, h in zip(*rows)] for rows in zip(gradients, of_none)]


def unequal_weights_batch(probe: Probe) -> Batch:
    """Return two on-policy datums of unequal length and weights, with advantages 1."""
    cycle = (1.0, 0.5, 2.0, 0.5, 1.0)
    rows = [[cycle[(i + j) % 5] for j in range(n * (probe.batch.targets or 1))] for i, n in enumerate((3, 5))]
    logprobs = [[-1.0 - 0.25 * j for j in range(len(row))] for row in rows]
    named = {name: [[1.0] * len(row) for row in rows] for name in probe.batch.columns}
    return on_policy_batch(Batch(logprobs, rows, named, probe.batch.targets))


DIVISORS = {"len", "length", "tokens", "denominator", "divisor", "budget", "norm", "normalizer", "items", "size"}
"""Words in the names of numbers by which a loss is divided, such as ``max_tokens``."""


def check_scale(probe: Probe, batch: Batch) -> None:
    """Require that the gradient of a token of weight 1 is 1 / D in size, for one count D of the batch."""
    ones = batch.having(weights=[[1.0] * len(row) for row in batch.weights])
    parts = [ones, ones.take([0]), ones.take([1]), ones.take([1, 1, 0])]
    sizes = [[-row[0] for row in advantage_gradients(probe, part)] for part in parts]
    counts = {name: [[count(part)] * len(part.weights) for part in parts] for name, count in COUNTS.items()}
    counts["sequence means"] = [[len(row) * len(part.weights) for row in part.weights] for part in parts]
    # For the count by which the loss divides, size · count is one factor over all datums of all parts.
    products = {name: [s * c for ss, cs in zip(sizes, row) for s, c in zip(ss, cs)] for name, row in counts.items()}
    factors = {name: ks[0] for name, ks in products.items() if probe.close(ks, [ks[0]] * len(ks))}
    seen = f"The gradients of tokens of weight 1 are {[[-s for s in row] for row in sizes]}"
    # A factor is not detected if the loss divides by a number of sequences: it may be a fixed length.
    if any(name in ("sequences", "datums") or probe.close(k, 1.0) for name, k in factors.items()):
        return
    lengths = [s.value for s in named_numbers(probe.loss_fn) if DIVISORS & set(words(s.name))]
    if any(probe.close(k * x, 1.0) for k in factors.values() for x in lengths):
        return  # a setting is the divisor
    for name, k in factors.items():
        doubled = probe.close(k, 2.0) and (has_sequence_ratio(probe) or "sampler_logprobs" in columns_read(probe))
        require(False, "missing-stop-gradient" if doubled else "constant-factor", f"{seen}: {k:g} / {name}.")
    for name, row in counts.items():
        # 1 / size − count is one number for all datums if that number is added to the denominator.
        extra = [1 / s - c for ss, cs in zip(sizes, row) for s, c in zip(ss, cs) if s]
        added = probe.close(extra, [extra[0]] * len(extra))
        if added and abs(extra[0]) < 1e-4:
            return  # a constant that guards against division by 0
        require(not added, "epsilon-in-denominator", f"{seen}: 1 / ({name} + {extra[0]:g}).")
    padded, adds_up = changed_by_padding(probe, ones), additive_counts(probe, ones)
    bug = "padding-in-denominator" if padded else "constant-factor" if adds_up else "mean-of-means"
    require(False, bug, f"{seen}, which is not 1 / D for any D of {', '.join(counts)}.")


@wrong("clipping must remove the incentive to leave the trust region, and no other gradient")
def clip(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The upper bound removes the gradient where A > 0, the lower bound where A < 0, and nowhere else."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume(reads_old_logprobs(probe), "it reads no old logprobs")
    grid = [*(-d for d in reversed(LOG_RATIOS)), *LOG_RATIOS]
    assume(value_and_gradient_at(probe, 0.0, 1.0)[1] != 0, "there is no gradient on tokens of equal advantages")
    caps = [setting.value for setting in named_numbers(loss_fn) if "log" in words(setting.name)]
    grid = [d for d in grid if abs(d) < min(caps, default=math.inf)]  # no token has a gradient beyond such a cap
    table = {a: [(d, *value_and_gradient_at(probe, d, a)) for d in grid] for a in (1.0, -1.0)}
    # The log-ratios without a gradient, for advantage 1 (good) and −1 (bad), below and above ratio 1.
    good_below, good_above, bad_below, bad_above = (
        [d for d, _, g in table[a] if g == 0 and d * side > 0] for a in (1.0, -1.0) for side in (-1, 1)
    )
    low, high = [f"{math.exp(x[0]):.3g}" if x else "no ratio" for x in (good_below[-1:], bad_above[:1])]
    seen = f"A token of advantage 1 has no gradient below the ratio {low}, one of −1 none above {high}"
    # A dual clip removes the gradient where A < 0 and the ratio is far above 1, a cap removes it for every token.
    # Neither acts on ratios near 1.
    bad_near = [d for d in bad_above if d < 0.5]
    if good_below or bad_near:
        opposite_kept = not good_above and not bad_below
        require(False, "clip-max-for-min" if opposite_kept else "clip-without-min", f"{seen}.")
    for a, d in ((1.0, 2.5), (-1.0, -2.5)):
        value, gradient = value_and_gradient_at(probe, d, a)
        nudged = value_after_nudge(probe, d, a, -0.25)
        flat_value = probe.close(value, nudged) and not probe.close(value, value + 0.25 * gradient, scale=10)
        seen = f"At the ratio {math.exp(d):.3g} and advantage {a:g} the loss does not change with the logprob"
        leaks = flat_value and not is_constant(table[a])
        require(not leaks, "clip-gradient-leaks", f"{seen}, but its gradient is {gradient:g}.")


def value_after_nudge(probe: Probe, d: float, advantage: float, by: float) -> float:
    """Return the value of a single token with log-ratio d after ``by`` is added to the policy's logprob."""
    batch = uniform_batch(
        probe.batch, logprobs=-30.0, advantages=advantage, old_logprobs=-30.0 - d, sampler_logprobs=-30.0 - d
    )
    return probe(batch.having(logprobs=[[x + by for x in row] for row in batch.logprobs])).value


def is_constant(table: list[tuple[float, float, float]]) -> bool:
    """Return whether the value is the same at every ratio."""
    return all(value == table[0][1] for _, value, _ in table)


@wrong("the correction is the ratio of the old policy to the sampler")
def tis(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The sampler correction is exp(old − sampler), at most a cap, and 1 where the two agree."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume("sampler_logprobs" in columns_read(probe), "it reads no sampler logprobs")
    base = value_and_gradient_at(probe, 0.0, 1.0)[1]
    assume(base != 0, "there is no gradient")
    factor = {
        x: value_and_gradient_at(probe, 0.0, 1.0, sampler_logprobs=-30.0 - x)[1] / base for x in (-0.5, 0.2, 8.0, 25.0)
    }
    seen = f"With old − sampler = −0.5 the gradient is {factor[-0.5]:g} times that at 0; with 8, {factor[8.0]:g}"
    require(set(factor.values()) != {1.0}, "tis-inert", f"{seen}.")
    require(not math.isclose(factor[-0.5], math.exp(0.5), rel_tol=1e-3), "tis-inverted", f"{seen}.")


@fragile("a correction without a cap is unbiased, but one token may outweigh all others")
def tis_cap(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The sampler correction has a cap."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume("sampler_logprobs" in columns_read(probe), "it reads no sampler logprobs")
    at, far, farther = (value_and_gradient_at(probe, 0.0, 1.0, sampler_logprobs=-30.0 - x)[1] for x in (0.0, 8.0, 25.0))
    assume(at != 0, "there is no gradient")
    seen = f"With old − sampler = 8 the gradient is {far / at:g} times that at 0; with 25, {farther / at:g} times."
    require(not (far / at > 1000 and farther / at > far / at), "tis-uncapped", seen)
