"""Laws of preference losses. Datum 2i is the chosen side of pair i, datum 2i + 1 the rejected side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lossfns.testing.batch import Batch
from lossfns.testing.laws.base import (
    LossFn,
    Probe,
    assume,
    column_rows,
    columns_read,
    fragile,
    influences,
    on_policy_batch,
    require,
    shifted,
    slots,
    uniform_batch,
    with_slot,
    wrong,
)
from lossfns.testing.laws.sums import central_difference


def pair_batch(probe: Probe, chosen: float = -2.0, rejected: float = -2.0, length: int = 1, pairs: int = 1) -> Batch:
    """Return pairs whose sides differ only in their logprobs. All reference logprobs are −2."""
    batch = uniform_batch(probe.batch, length=length, datums=2 * pairs)
    return batch.having(logprobs=[[chosen] * length, [rejected] * length] * pairs)


@wrong("descent must raise the chosen side and lower the rejected one")
def sides(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Descent makes the chosen side of every pair more likely and the rejected side less likely."""
    probe = Probe.of(loss_fn, data, logprobs)
    result = probe(pair_batch(probe))
    (chosen,), (rejected,) = result.gradients
    seen = f"In one pair of equal sides the gradient is {chosen:g} for the chosen and {rejected:g} for the rejected"
    assume(chosen != 0 or rejected != 0, "there is no gradient")
    if chosen == 0 or rejected == 0:
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
    batch = on_policy_batch(uniform_batch(probe.batch, length=4, datums=4, logprobs=-1.0))
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
        same_pair = {k for k, _ in influential} <= {0, 1}
        bug = "frame-shift" if datum_matters else "reference-misused" if same_pair else "datum-misaligned"
        require(False, bug, f"{seen}; the one of {(i, j)} does not.")
    require(not set(influential) & set(masked), "kl-unmasked", f"{seen}.")


@wrong("a token's weight is its share of the side")
def pair_weights(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Within a side, a token's gradient is in proportion to its weight."""
    probe = Probe.of(loss_fn, data, logprobs)
    weights = [1.0, 0.5, 2.0]
    batch = pair_batch(probe, length=3).having(weights=[weights, weights])
    row = probe(batch).gradients[0]
    seen = f"With weights {weights} the chosen side's gradients are {row}."
    assume(row[0] != 0, "there is no gradient")
    if not probe.close([g / row[0] for g in row], weights):
        squared = probe.close([g / row[0] for g in row], [w * w for w in weights])
        require(False, "weights-squared" if squared else "weights-binarised", seen)


@wrong("a loss with a reference is a function of policy − reference")
def reference(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Only the difference of policy and reference matters: shifting both has no effect."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume("ref_logprobs" in columns_read(probe), "it reads no reference")
    batch = pair_batch(probe, chosen=-1.5)
    inert = not influences(probe, "ref_logprobs", batch, [(0, 0)])
    require(not inert, "ref-inert", "Changing the reference's logprobs of the chosen side changes nothing.")
    plain = probe(batch).value
    for i, side in enumerate(("chosen", "rejected")):
        changes = [probe(shift_both(batch, i, shift)).value - plain for shift in (-4.0, -8.0)]
        # A loss may have a term of the chosen side's likelihood, without the reference. This term is linear.
        nll = i == 0 and probe.close(2 * changes[0], changes[1])
        seen = (
            f"Lowering policy and reference of the {side} side by the same 4 nats changes the loss by {changes[0]:g}."
        )
        require(nll or probe.close(plain + changes[0], plain), "reference-misused", seen)


def shift_both(batch: Batch, i: int, shift: float) -> Batch:
    """Return the batch with policy and reference of one side shifted by the same amount."""
    rows = {name: shifted(column_rows(batch, name), [(i, 0)], shift) for name in ("logprobs", "ref_logprobs")}
    return batch.having(**rows)


@wrong("where policy and reference agree, the loss is ln 2")
def step_zero(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """At the reference a logistic loss is ln 2 for each pair, and its margin is a sum of logprobs."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume("ref_logprobs" in columns_read(probe), "it reads no reference")
    one, two = probe(pair_batch(probe)), probe(pair_batch(probe, pairs=2))
    seen = f"With policy = reference the loss of one pair is {one.value:g}, of two {two.value:g}"
    half = probe.close(one.value, math.log(2) / 2)
    require(not half, "pairs-miscounted", f"{seen}: half of ln 2.")
    # The gradient of −log σ(βm) is −β/2 at m = 0 and −β for a very negative m. The rest holds for such a loss only.
    ranked_wrong = probe(pair_batch(probe, chosen=-2e4)).gradients[0][0]
    logistic = probe.close(ranked_wrong / one.gradients[0][0], 2.0) if one.gradients[0][0] else False
    require(not logistic or probe.close(one.value, math.log(2)), "constant-factor", f"{seen}: not ln 2.")
    alone, of_four = (probe(pair_batch(probe, length=n)).gradients[1][0] for n in (1, 4))
    seen = f"With policy = reference the gradient of a rejected token is {alone:g} alone, {of_four:g} of four."
    require(not logistic or probe.close(of_four, alone), "mean-logprob-margin", seen)


@wrong("the gradient is off by a constant factor")
def pair_scale(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """If a pair is ranked right by a large margin, the gradient of the chosen side's likelihood is not halved."""
    from lossfns.testing.subject import knobs

    probe = Probe.of(loss_fn, data, logprobs)
    assume("ref_logprobs" not in columns_read(probe), "it has a reference")
    assume(0.5 not in knobs(loss_fn).values(), "a setting is 0.5, which may halve the gradient")
    gradient = probe(pair_batch(probe, chosen=-1e-3, rejected=-30.0)).gradients[0][0]
    seen = f"In a pair that is ranked right by a large margin the gradient of the chosen token is {gradient:g}, not −1."
    require(not math.isclose(gradient, -0.5, rel_tol=1e-3), "pairs-miscounted", seen)


@wrong("a pair that is ranked worse must cost more")
def monotone(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A pair ranked wrong by a larger margin has the larger loss."""
    probe = Probe.of(loss_fn, data, logprobs)
    values = [(m, probe(pair_batch(probe, chosen=-12.0 + m / 2, rejected=-12.0 - m / 2))) for m in (-16, -4, -1, 0)]
    for (a, before), (b, after) in pairwise(values):
        seen = f"With a margin of {a} the loss is {before.value}, with {b} {after.value}."
        require(after.value < before.value, "sides-swapped", seen)


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
    require(constant or right, "log-odds-biased", f"{seen}, not {expected[worst]:g}.")


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
