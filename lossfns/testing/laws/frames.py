"""Laws of frames: datums are independent, and the values of a token are read at its own position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor

from lossfns.testing.batch import Batch, Rows
from lossfns.testing.laws.base import (
    LawBroken,
    LossFn,
    NotApplicable,
    Probe,
    assume,
    batch_kind,
    column_rows,
    has_sequence_ratio,
    influences,
    on_policy_batch,
    repeat_rows,
    require,
    shifted,
    slots,
    uniform_batch,
    unit_size,
    with_constants,
    with_slot,
    wrong,
)


@wrong("a token that must be trained has no gradient")
def signal(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """On-policy, a token of positive and a token of negative advantage both have a gradient."""
    probe = Probe.of(loss_fn, data, logprobs)
    datums = unit_size(probe.batch)
    positive, negative = (probe(uniform_batch(probe.batch, datums=datums, advantages=a)) for a in (1.0, -1.0))
    good, bad = (any(g != 0 for row in outcome.gradients for g in row) for outcome in (positive, negative))
    if not good and not bad:
        assume(not whitens_advantages(probe), WHITENS)
        diagnose_no_gradient(probe)
    if not good:
        # Divided by the gradient, the value is that of one token: c > 1 of a dual clip, or an upper bound below 1.
        value = abs(positive.value / negative.gradients[0][0])
        bug = "dual-clip-on-positive" if value > 1 else "clip-as-epsilon"
        seen = f"On-policy a token of advantage 1 has no gradient, and its loss is −{value:g}."
        require(False, bug, seen, positive.batch)
    bug = "dual-clip-below-one" if positive.value else "ratio-not-exponentiated"
    seen = f"On-policy a token of advantage −1 has no gradient; the loss for advantage 1 is {positive.value:g}."
    require(bad, bug, seen, negative.batch)


def diagnose_no_gradient(probe: Probe) -> None:
    """Raise LawBroken with the bug because of which a single token has no gradient."""
    seen = "On-policy, on a single token of weight 1, the gradient is 0"
    single = uniform_batch(probe.batch, datums=unit_size(probe.batch))

    def has_gradient(batch: Batch) -> bool:
        return any(g for row in probe.gradients(batch) for g in row)

    three = uniform_batch(probe.batch, length=3, datums=unit_size(probe.batch))
    require(not has_gradient(three), "target-dropped", f"{seen}; on three tokens it is not.", single)
    if "advantages" in probe.batch.columns:
        two = uniform_batch(probe.batch, datums=2)
        opposed = two.having(advantages=[[1.0], [-1.0]] if not two.targets else two.columns["advantages"])
        seen_beside = f"{seen}; beside a token of the opposite advantage it is not."
        require(not has_gradient(opposed), "cross-talk", seen_beside, single)
    if "ref_logprobs" in probe.batch.columns:
        far = with_constants(uniform_batch(probe.batch, datums=unit_size(probe.batch)), ref_logprobs=-3.0)
        if has_gradient(far) and batch_kind(probe.batch) == "policy":
            small, large = (probe(uniform_batch(probe.batch, advantages=a)).value for a in (1.0, 2.0))
            require(small != large, "advantage-inert", f"{seen}; away from the reference it is not.", single)
    require(False, "no-gradient", f"{seen}.", single)


WHITENS = "it centres or scales the advantages by statistics of the batch"
STATISTIC = "the datums act on one another through one number of the batch; declare it with couples="


def whitens_advantages(probe: Probe) -> bool:
    """Return whether advantages are whitened over the batch, as in REINFORCE++, which is no bug of a loss.

    The gradient is then an affine function of the datum's advantage, whose slope and offset depend on the batch. In
    distillation the advantage is teacher − student. A loss that claims to be one of this library does not whiten.
    """
    column = "ref_logprobs" if batch_kind(probe.batch) == "distillation" else "advantages"
    if column not in probe.batch.columns or getattr(probe.loss_fn, "like", None) is not None:
        return False
    batch = on_policy_batch(uniform_batch(probe.batch, datums=4, logprobs=-12.0))
    level = -12.0 if column == "ref_logprobs" else 0.0

    def gradients(*advantages: float) -> list[float]:
        rows = [[level + a] * len(row) for a, row in zip(advantages, batch.weights)]
        return [row[0] for row in probe(batch.having(**{column: rows})).gradients]

    def slope(advantages: Sequence[float], gs: Sequence[float]) -> float | None:
        slopes = [(g - gs[0]) / (a - advantages[0]) for a, g in zip(advantages[1:], gs[1:])]
        return slopes[0] if probe.close(slopes, [slopes[0]] * 3) and slopes[0] < 0 else None

    near, far = (1.0, 2.0, -1.0, 4.0), (1.0, 2.0, -1.0, 10.0)
    try:
        narrow, wide = gradients(*near), gradients(*far)
    except LawBroken:
        return False
    affine = slope(near, narrow) is not None and slope(far, wide) is not None
    return affine and not probe.close(narrow[:3], wide[:3], scale=0.01)


def acts_by_statistic(probe: Probe) -> bool:
    """Return whether other datums act on a datum, but only by scaling all its gradients by one positive factor.

    A statistic of the batch acts like this, such as the KL of KTO or the sum of a loss's own weights. It is no bug in a
    loss without pairs and advantages.
    """
    if batch_kind(probe.batch) in ("policy", "preference"):
        return False
    batch = uniform_batch(probe.batch, length=2, datums=3)
    width = batch.targets or 1
    batch = batch.having(logprobs=[[x / 2 if t < width else x for t, x in enumerate(row)] for row in batch.logprobs])
    expected = probe(batch).gradients[0]
    coupled = False
    for name in ("logprobs", *(name for name in batch.columns if name.endswith("logprobs"))):
        for by in (-0.5, 0.75):
            others = [slot for slot in slots(batch) if slot[0] > 0]
            gradient = probe(batch.having(**{name: shifted(column_rows(batch, name), others, by)})).gradients[0]
            if probe.close(gradient, expected, scale=0.01):
                continue
            factors = [g / e if e else -1.0 for g, e in zip(gradient, expected)]
            if not probe.close(factors, [factors[0]] * len(factors)) or factors[0] <= 0:
                return False
            coupled = True
    return coupled


@wrong("a datum's gradient must not depend on the data that happen to share its batch")
def independence(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A datum's (or pair's) gradient does not depend on the values of another."""
    probe = Probe.of(loss_fn, data, logprobs)
    step = unit_size(probe.batch)
    # As many tokens as datums: [B] then meets [B, T] without an error.
    batch = on_policy_batch(uniform_batch(probe.batch, length=3 * step, datums=3 * step))
    expected = probe(batch).gradients[:step]
    assume(any(g != 0 for row in expected for g in row), "there is no gradient")
    assume(not whitens_advantages(probe), WHITENS)
    assume(not acts_by_statistic(probe), STATISTIC)

    def changes_unit_0(name: str, in_unit: Callable[[int], bool]) -> bool:
        """Lower a column in the first datum of some units. Return whether the gradient of unit 0 changes."""
        rows = column_rows(batch, name)
        is_lowered = [i % step == 0 and in_unit(i // step) for i in range(len(rows))]
        lowered = [[x - 0.125 if low else x for x in row] for row, low in zip(rows, is_lowered)]
        return not probe.close(probe(batch.having(**{name: lowered})).gradients[:step], expected)

    for name in ("logprobs", *(name for name in batch.columns if name not in ("advantages", "labels"))):
        if changes_unit_0(name, lambda unit: unit > 0):
            seen = f"Changing the {name} of other datums changes the gradient of datum 0"
            own_values_matter = changes_unit_0(name, lambda unit: unit == 0)
            aligned = own_values_matter or name == "logprobs"
            require(aligned, "datum-misaligned", f"{seen}; changing its own does not.", batch)
            require(False, diagnose_coupling(probe, batch.take(range(step))), f"{seen}.")
    masked = [[0.0] * len(row) if i < step else row for i, row in enumerate(batch.weights)]
    gradients = probe(batch.having(weights=masked)).gradients
    in_masked, in_others = (any(g for row in rows for g in row) for rows in (gradients[:step], gradients[step:]))
    missing_in_others = not all(any(row) for row in gradients[step:])
    misaligned = in_masked and missing_in_others and in_others
    seen = f"With the weights of datum 0 all 0 the gradients are {gradients}."
    require(not misaligned, "datum-misaligned", seen, batch.having(weights=masked))
    if "advantages" in batch.columns:
        check_advantage_coupling(probe, batch, lambda b: probe(b).gradients[:step], expected)


def diagnose_coupling(probe: Probe, unit: Batch) -> str:
    """Return the bug that couples units.

    Statistics of the batch, such as a mean margin, make the value of a single pair constant. A broadcast does not.
    """
    lowered = unit.having(logprobs=[[x - 0.5 for x in unit.logprobs[0]], *unit.logprobs[1:]])
    return "broadcast" if unit_size(unit) == 2 and probe(lowered).value != probe(unit).value else "cross-talk"


def check_advantage_coupling(
    probe: Probe, batch: Batch, gradient_of_first: Callable[[Batch], Rows], expected: Rows
) -> None:
    """Require that the gradient of datum 0 does not depend on the advantages of datums 1 and 2."""

    def with_advantages(*advantages: float) -> Batch:
        return batch.having(advantages=[[a] * len(row) for a, row in zip(advantages, batch.weights)])

    def same_with(*advantages: float) -> bool:
        return probe.close(gradient_of_first(with_advantages(*advantages)), expected)

    if not same_with(1, 2, 1) or not same_with(1, 1, 2):
        without_own, unchanged_by_own = gradient_of_first(with_advantages(0, 1, 0)), same_with(2, 1, 1)
        seen = "The gradient of datum 0 depends on the advantage of another datum"
        require(not unchanged_by_own, "datum-misaligned", f"{seen}, and not on its own.")
        trained = sum(map(sum, without_own)) < 0
        require(not trained, "broadcast", f"{seen}: with advantage 0 it is trained like the other datum.")
        require(False, "cross-talk", f"{seen}.")
    seen = "If another datum's advantage is 0, the gradient of datum 0 changes."
    require(same_with(1, 0, 1), "zero-advantage-denominator", seen)


@wrong("another token than the one that is trained has a gradient or an effect")
def canary(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """With one token active, the gradient is at that token, and only its own columns matter."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = repeat_rows(uniform_batch(probe.batch, length=1, datums=3 * unit_size(probe.batch)), 3)
    batch = on_policy_batch(
        batch.map(lambda rows: [row + row[: i * (batch.targets or 1)] for i, row in enumerate(rows)])
    )
    misplaced = {}
    for i, j in slots(batch):
        masked = batch.having(weights=[[0.0] * len(row) for row in batch.weights])
        alone = masked.having(weights=with_slot(masked.weights, i, j, 1.0))
        hit = gradient_positions(probe, alone)
        if hit != [(i, j)]:
            misplaced[i, j] = hit
    if misplaced:
        assume(any(misplaced.values()) or not whitens_advantages(probe), WHITENS)
        diagnose_misplaced_gradient(batch, misplaced)
    assume(not whitens_advantages(probe), WHITENS)
    if "advantages" in batch.columns:
        with suppress(NotApplicable):  # the loss takes one advantage for each datum
            check_advantage_position(probe, batch)
    for i, j in ((0, 1), (2, 2)):
        weights = with_slot([[0.0] * len(row) for row in batch.weights], i, j, 1.0)
        check_columns_at(probe, batch.having(weights=weights), (i, j))


def gradient_positions(probe: Probe, batch: Batch) -> list[tuple[int, int]]:
    """Return the positions with a gradient; none if the loss refuses the batch."""
    try:
        return nonzero_positions(probe.gradients(batch))
    except LawBroken:
        return []


def check_advantage_position(probe: Probe, batch: Batch) -> None:
    """Require that a token's advantage changes the gradient of that token alone, or of its sequence with one ratio."""
    zero_advantages = with_constants(batch, advantages=0.0)
    background = probe(zero_advantages).gradients
    hits = {}
    for i, j in ((1, 2), (1, 0)):
        advantages = with_slot(zero_advantages.columns["advantages"], i, j, 1.0)
        gradients = probe(zero_advantages.having(advantages=advantages)).gradients
        hits[i, j] = nonzero_positions([[g - b for g, b in zip(gs, bs)] for gs, bs in zip(gradients, background)])
    if not any(hits.values()):
        return  # clipped or inert: other laws report it
    for (i, j), hit in hits.items():
        seen = f"The advantage of token {j} of datum {i} acts at {hit}."
        if hit == [(i, j)] or (has_sequence_ratio(probe) and {k for k, _ in hit} == {i}):
            continue
        require(not any(k != i for k, _ in hit), "datum-misaligned", seen, zero_advantages)
        require(len(hit) == 1, "advantages-pooled", seen, zero_advantages)
        require(False, "frame-shift", seen, zero_advantages)


def nonzero_positions(gradients: Rows) -> list[tuple[int, int]]:
    """Return (datum, position) of every gradient that is not 0."""
    return [(i, j) for i, row in enumerate(gradients) for j, g in enumerate(row) if g != 0]


def diagnose_misplaced_gradient(batch: Batch, misplaced: dict[tuple[int, int], list[tuple[int, int]]]) -> None:
    """Raise LawBroken with the bug that misplaces gradients.

    ``misplaced`` maps (datum, position) of a single active token to the positions at which the gradient is instead.
    """
    (i, j), hit = next(((at, hit) for at, hit in misplaced.items() if hit), next(iter(misplaced.items())))
    seen = f"With only token {j} of datum {i} active, the gradient is at {hit or 'no token'}."
    count = sum(map(len, batch.weights))
    alone = with_slot([[0.0] * len(row) for row in batch.weights], i, j, 1.0)
    must = partial(require, seen=seen, batch=batch.having(weights=alone))
    if any(len(hits) > 1 for hits in misplaced.values()):
        must(False, "mask-missing")
    if not any(misplaced.values()):
        must(not batch.targets or len(misplaced) < count, "renormalised-targets")
        ignored = {k for k, _ in misplaced if all((k, t) in misplaced for t in range(len(batch.weights[k])))}
        must(False, "datum-ignored" if ignored and len(misplaced) < count else "target-dropped")
    if batch.targets:
        must(False, "targets-transposed")
    must(False, "datum-misaligned" if hit and hit[0][0] != i else "frame-shift")


def check_columns_at(probe: Probe, batch: Batch, active: tuple[int, int]) -> None:
    """Require that no column matters outside the only active slot."""
    others = slots(batch, active=False)
    for name in batch.columns:
        if name == "labels" or not influences(probe, name, batch, others, -0.25):
            continue  # all tokens of a datum have one label
        culprits = [slot for slot in others if influences(probe, name, batch, [slot], -0.25)]
        own_matters = influences(probe, name, batch, [active], -0.25)
        seen = f"With only token {active[1]} of datum {active[0]} active, the {name} of {culprits[:3]} matter"
        if not own_matters and len(culprits) == 1:
            same_datum = culprits[0][0] == active[0]
            require(False, "frame-shift" if same_datum else "datum-misaligned", f"{seen}, and its own do not.", batch)
        if name == "advantages":
            require(False, "mask-missing" if own_matters else "advantages-pooled", f"{seen}.", batch)
        # If the advantages of masked tokens do not matter, their terms are masked, but their ratios are not.
        in_ratio = not influences(probe, "advantages", batch, others)
        bug = "kl-unmasked" if name == "ref_logprobs" else "padding-in-sequence-ratio" if in_ratio else "mask-missing"
        require(False, bug, f"{seen}.", batch)
