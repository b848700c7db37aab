"""Laws of frames: datums are independent, and each token is read at its own position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
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
    influences,
    on_policy_batch,
    repeat_rows,
    require,
    slots,
    uniform_batch,
    unit_size,
    with_constants,
    with_slot,
)


def signal(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """On-policy, a token of positive and a token of negative advantage both have a gradient."""
    probe = Probe.of(loss_fn, data, logprobs)
    there = {
        sign: probe(uniform_batch(probe.batch, datums=unit_size(probe.batch), advantages=sign)) for sign in (1.0, -1.0)
    }
    good, bad = (any(g != 0 for row in there[sign].gradients for g in row) for sign in (1.0, -1.0))
    if not good and not bad:
        diagnose_no_gradient(probe)
    if not good:
        value = abs(there[1.0].value / there[-1.0].gradients[0][0])
        bug = "dual-clip-on-positive" if value > 1 else "clip-as-epsilon"
        require(False, bug, f"On-policy a token of advantage 1 has no gradient, and its loss is −{value:g}.")
    bug = "dual-clip-below-one" if there[1.0].value else "ratio-not-exponentiated"
    seen = f"On-policy a token of advantage −1 has no gradient; the loss for advantage 1 is {there[1.0].value:g}."
    require(bad, bug, seen)


def diagnose_no_gradient(probe: Probe) -> None:
    """Find out why a single token has no gradient, and raise LawBroken with that bug."""
    seen = "On-policy, on a single token of weight 1, the gradient is 0"
    three = probe(uniform_batch(probe.batch, length=3, datums=unit_size(probe.batch)))
    require(not any(g for row in three.gradients for g in row), "target-dropped", f"{seen}; on three tokens it is not.")
    if "advantages" in probe.batch.columns:
        two = uniform_batch(probe.batch, datums=2)
        opposed = probe(two.having(advantages=[[1.0], [-1.0]] if not two.targets else two.columns["advantages"]))
        alone = not any(g for row in opposed.gradients for g in row)
        require(alone, "cross-talk", f"{seen}; beside a token of the opposite advantage it is not.")
    if "ref_logprobs" in probe.batch.columns:
        pulled = probe(with_constants(uniform_batch(probe.batch, datums=unit_size(probe.batch)), ref_logprobs=-3.0))
        there = any(g for row in pulled.gradients for g in row)
        if there and batch_kind(probe.batch) == "policy":
            small, large = (probe(uniform_batch(probe.batch, advantages=a)).value for a in (1.0, 2.0))
            require(small != large, "advantage-inert", f"{seen}; away from the reference it is not.")
    require(False, "no-gradient", f"{seen}.")


def independence(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A datum's (or pair's) gradient does not depend on the values of another."""
    probe = Probe.of(loss_fn, data, logprobs)
    step = unit_size(probe.batch)
    batch = on_policy_batch(uniform_batch(probe.batch, length=2, datums=3 * step))
    usual = probe(batch).gradients[:step]
    assume(any(g != 0 for row in usual for g in row), "there is no gradient")

    def changes_first(name: str, moves: Callable[[int], bool]) -> bool:
        """Return whether the first unit's gradient changes with a column of these units' first datums."""
        rows = column_rows(batch, name)
        hit = [i % step == 0 and moves(i // step) for i in range(len(rows))]
        lowered = [[x - 0.125 if h else x for x in row] for row, h in zip(rows, hit)]
        return not probe.close(probe(batch.having(**{name: lowered})).gradients[:step], usual)

    for name in ("logprobs", *(name for name in batch.columns if name != "advantages")):
        if changes_first(name, lambda i: i > 0):
            seen = f"Changing the {name} of other datums changes the gradient of datum 0"
            own = changes_first(name, lambda i: i == 0)
            require(own or name == "logprobs", "datum-misaligned", f"{seen}; changing its own does not.")
            require(False, diagnose_coupling(probe, batch.take(range(step))), f"{seen}.")
    masked = [[0.0] * len(row) if i < step else row for i, row in enumerate(batch.weights)]
    gone = probe(batch.having(weights=masked)).gradients
    here, elsewhere = (any(g for row in rows for g in row) for rows in (gone[:step], gone[step:]))
    lost = here and not all(any(row) for row in gone[step:]) and elsewhere
    require(not lost, "datum-misaligned", f"With the weights of datum 0 all 0 the gradients are {gone}.")
    if "advantages" in batch.columns:
        check_advantage_coupling(probe, batch, lambda b: probe(b).gradients[:step], usual)


def diagnose_coupling(probe: Probe, alone: Batch) -> str:
    """Return the bug that couples units. With batch statistics a single pair does not change the value."""
    lowered = alone.having(logprobs=[[x - 0.5 * (i == 0) for x in row] for i, row in enumerate(alone.logprobs)])
    return "broadcast" if unit_size(alone) == 2 and probe(lowered).value != probe(alone).value else "cross-talk"


def check_advantage_coupling(
    probe: Probe, batch: Batch, gradients_of_first: Callable[[Batch], Rows], usual: Rows
) -> None:
    """Require that the gradient of datum 0 does not depend on the advantages of datums 1 and 2."""

    def with_advantages(*advantages: float) -> Batch:
        return batch.having(advantages=[[a] * len(row) for a, row in zip(advantages, batch.weights)])

    if not probe.close(gradients_of_first(with_advantages(1, 2, 1)), usual) or not probe.close(
        gradients_of_first(with_advantages(1, 1, 2)), usual
    ):
        alone, ghost = gradients_of_first(with_advantages(2, 1, 1)), gradients_of_first(with_advantages(0, 1, 0))
        seen = "The gradient of datum 0 depends on the advantage of another datum"
        require(not probe.close(alone, usual), "datum-misaligned", f"{seen}, and not on its own.")
        pulled = sum(map(sum, ghost)) < 0
        require(not pulled, "broadcast", f"{seen}: with advantage 0 it is trained like the other datum.")
        require(False, "cross-talk", f"{seen}.")
    seen = "If another datum's advantage is 0, the gradient of datum 0 changes."
    require(probe.close(gradients_of_first(with_advantages(1, 0, 1)), usual), "zero-advantage-denominator", seen)


def canary(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """With one token active, the gradient is at that token, and only its own columns matter."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = repeat_rows(uniform_batch(probe.batch, length=1, datums=3 * unit_size(probe.batch)), 3)
    batch = on_policy_batch(
        batch.map(lambda rows: [row + row[: i * (batch.targets or 1)] for i, row in enumerate(rows)])
    )
    lost = {}
    for i, j in slots(batch):
        masked = batch.having(weights=[[0.0] * len(row) for row in batch.weights])
        alone = masked.having(weights=with_slot(masked.weights, i, j, 1.0))
        hit = gradient_positions(probe, alone)
        if hit != [(i, j)]:
            lost[i, j] = hit
    if lost:
        diagnose_misplaced_gradient(batch, lost)
    if "advantages" in batch.columns:
        with suppress(NotApplicable):  # it takes one advantage for each datum
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
    """Require that one token's advantage acts at that token, or over its sequence if the ratio is the sequence's."""
    from lossfns.testing.laws.policy import has_sequence_ratio

    silent_batch = with_constants(batch, advantages=0.0)
    background = probe(silent_batch).gradients
    hits = {}
    for i, j in ((1, 2), (1, 0)):
        alone = silent_batch.having(advantages=with_slot(silent_batch.columns["advantages"], i, j, 1.0))
        there = probe(alone).gradients
        hits[i, j] = nonzero_positions([[g - r for g, r in zip(gs, rs)] for gs, rs in zip(there, background)])
    if not any(hits.values()):
        return  # clipped or inert: other laws report it
    for (i, j), hit in hits.items():
        seen = f"The advantage of token {j} of datum {i} acts at {hit}."
        if hit == [(i, j)] or (has_sequence_ratio(probe) and {k for k, _ in hit} == {i}):
            continue
        require(not any(k != i for k, _ in hit), "datum-misaligned", seen)
        require(len(hit) == 1, "advantages-pooled", seen)
        require(False, "frame-shift", seen)


def nonzero_positions(gradients: Rows) -> list[tuple[int, int]]:
    """Return (datum, position) of every gradient that is not 0."""
    return [(i, j) for i, row in enumerate(gradients) for j, g in enumerate(row) if g != 0]


def diagnose_misplaced_gradient(batch: Batch, lost: dict[tuple[int, int], list[tuple[int, int]]]) -> None:
    """Raise LawBroken with the bug that moves the gradient of each single active token to ``lost``."""
    (i, j), hit = next(((at, hit) for at, hit in lost.items() if hit), next(iter(lost.items())))
    seen = f"With only token {j} of datum {i} active, the gradient is at {hit or 'no token'}."
    everywhere = {(k, t) for k, row in enumerate(batch.weights) for t in range(len(row))}
    if any(len(h) > 1 for h in lost.values()):
        require(False, "mask-missing", seen)
    if not any(lost.values()):
        require(not batch.targets or len(lost) < len(everywhere), "renormalised-targets", seen)
        ignored = {k for k, _ in lost if all((k, t) in lost for t in range(len(batch.weights[k])))}
        require(False, "datum-ignored" if ignored and len(lost) < len(everywhere) else "target-dropped", seen)
    if batch.targets:
        require(False, "targets-transposed", seen)
    require(False, "datum-misaligned" if hit and hit[0][0] != i else "frame-shift", seen)


def check_columns_at(probe: Probe, batch: Batch, where: tuple[int, int]) -> None:
    """Require that no column matters outside the active slot ``where``."""
    others = slots(batch, active=False)
    for name in batch.columns:
        if not influences(probe, name, batch, others, -0.25):
            continue
        culprits = [slot for slot in others if influences(probe, name, batch, [slot], -0.25)]
        own = influences(probe, name, batch, [where], -0.25)
        seen = f"With only token {where[1]} of datum {where[0]} active, the {name} of {culprits[:3]} matter"
        if not own and len(culprits) == 1 and culprits[0][0] != where[0]:
            require(False, "datum-misaligned", f"{seen}, and its own do not.")
        if not own and len(culprits) == 1:
            require(False, "frame-shift", f"{seen}, and its own do not.")
        if name == "advantages":
            require(False, "advantages-pooled" if not own else "mask-missing", f"{seen}.")
        ratio = not influences(probe, "advantages", batch, others)
        bug = "kl-unmasked" if name == "ref_logprobs" else "padding-in-sequence-ratio" if ratio else "mask-missing"
        require(False, bug, f"{seen}.")
