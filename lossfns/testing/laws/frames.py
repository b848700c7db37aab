"""Laws of frames: each datum by itself, each token at its own place."""

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
    demand,
    filled,
    influences,
    kind_of,
    neutral,
    put,
    rows_of,
    single,
    slots,
    stretched,
    suppose,
    unit,
)


def signal(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """On-policy there is a gradient: for a good token and for a bad one."""
    probe = Probe.of(loss_fn, data, logprobs)
    there = {sign: probe(single(probe.batch, datums=unit(probe.batch), advantages=sign)) for sign in (1.0, -1.0)}
    good, bad = (any(g != 0 for row in there[sign].gradients for g in row) for sign in (1.0, -1.0))
    if not good and not bad:
        silent(probe)
    if not good:
        value = abs(there[1.0].value / there[-1.0].gradients[0][0])
        bug = "dual-clip-on-positive" if value > 1 else "clip-as-epsilon"
        demand(False, bug, f"On-policy a token of advantage 1 has no gradient, and a loss of −{value:g}.")
    bug = "dual-clip-below-one" if there[1.0].value else "ratio-not-exponentiated"
    seen = f"On-policy a token of advantage −1 has no gradient; the loss for advantage 1 is {there[1.0].value:g}."
    demand(bad, bug, seen)


def silent(probe: Probe) -> None:
    """Why there is no gradient on a single token: batch statistics, no advantages, or none at all."""
    seen = "On-policy, on a single token of weight 1, the gradient is 0"
    three = probe(single(probe.batch, length=3, datums=unit(probe.batch)))
    demand(not any(g for row in three.gradients for g in row), "target-dropped", f"{seen}; of three it is not.")
    if "advantages" in probe.batch.columns:
        two = single(probe.batch, datums=2)
        apart = probe(two.having(advantages=[[1.0], [-1.0]] if not two.targets else two.columns["advantages"]))
        alone = not any(g for row in apart.gradients for g in row)
        demand(alone, "cross-talk", f"{seen}; beside a token of the opposite advantage it is not.")
    if "ref_logprobs" in probe.batch.columns:
        pulled = probe(filled(single(probe.batch, datums=unit(probe.batch)), ref_logprobs=-3.0))
        there = any(g for row in pulled.gradients for g in row)
        if there and kind_of(probe.batch) == "policy":
            small, large = (probe(single(probe.batch, advantages=a)).value for a in (1.0, 2.0))
            demand(small != large, "advantage-inert", f"{seen}; away from the reference it is not.")
    demand(False, "no-gradient", f"{seen}.")


def independence(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A datum's (or pair's) gradient does not depend on the values of another."""
    probe = Probe.of(loss_fn, data, logprobs)
    step = unit(probe.batch)
    batch = neutral(single(probe.batch, length=2, datums=3 * step))
    usual = probe(batch).gradients[:step]
    suppose(any(g != 0 for row in usual for g in row), "there is no gradient")

    def felt(name: str, moves: Callable[[int], bool]) -> bool:
        """Whether the first unit's gradient changes when a column does in these units, on their first sides."""
        rows = rows_of(batch, name)
        hit = [i % step == 0 and moves(i // step) for i in range(len(rows))]
        shifted = [[x - 0.125 if h else x for x in row] for row, h in zip(rows, hit)]
        return not probe.same(probe(batch.having(**{name: shifted})).gradients[:step], usual)

    for name in ("logprobs", *(name for name in batch.columns if name != "advantages")):
        if felt(name, lambda i: i > 0):
            seen = f"Changing the {name} of other datums changes the gradient of datum 0"
            own = felt(name, lambda i: i == 0)
            demand(own or name == "logprobs", "datum-misaligned", f"{seen}; changing its own does not.")
            demand(False, crossed(probe, batch.take(range(step))), f"{seen}.")
    masked = [[0.0] * len(row) if i < step else row for i, row in enumerate(batch.weights)]
    gone = probe(batch.having(weights=masked)).gradients
    here, elsewhere = (any(g for row in rows for g in row) for rows in (gone[:step], gone[step:]))
    lost = here and not all(any(row) for row in gone[step:]) and elsewhere
    demand(not lost, "datum-misaligned", f"With the weights of datum 0 all 0 the gradients are {gone}.")
    if "advantages" in batch.columns:
        of_advantages(probe, batch, lambda b: probe(b).gradients[:step], usual)


def crossed(probe: Probe, alone: Batch) -> str:
    """What couples units: batch statistics leave a lone pair without a say in the value; a broadcast does not."""
    moved_ = alone.having(logprobs=[[x - 0.5 * (i == 0) for x in row] for i, row in enumerate(alone.logprobs)])
    return "broadcast" if unit(alone) == 2 and probe(moved_).value != probe(alone).value else "cross-talk"


def of_advantages(probe: Probe, batch: Batch, mine: Callable[[Batch], Rows], usual: Rows) -> None:
    """How datum 0 feels the advantages of datums 1 and 2, in words and as a bug."""

    def given(*advantages: float) -> Batch:
        return batch.having(advantages=[[a] * len(row) for a, row in zip(advantages, batch.weights)])

    if not probe.same(mine(given(1, 2, 1)), usual) or not probe.same(mine(given(1, 1, 2)), usual):
        alone, ghost = mine(given(2, 1, 1)), mine(given(0, 1, 0))
        seen = "The gradient of datum 0 depends on the advantage of another datum"
        demand(not probe.same(alone, usual), "datum-misaligned", f"{seen}, and not on its own.")
        pulled = sum(map(sum, ghost)) < 0
        demand(not pulled, "broadcast", f"{seen}: with advantage 0 it is trained as the other is.")
        demand(False, "cross-talk", f"{seen}.")
    seen = "Once another datum's advantage is 0, the gradient of datum 0 is another."
    demand(probe.same(mine(given(1, 0, 1)), usual), "zero-advantage-denominator", seen)


def canary(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """With one token active, the gradient is at that token, and only its own columns matter."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = stretched(single(probe.batch, length=1, datums=3 * unit(probe.batch)), 3)
    batch = neutral(batch.map(lambda rows: [row + row[: i * (batch.targets or 1)] for i, row in enumerate(rows)]))
    lost = {}
    for i, j in slots(batch):
        masked = batch.having(weights=[[0.0] * len(row) for row in batch.weights])
        alone = masked.having(weights=put(masked.weights, i, j, 1.0))
        hit = located(probe, alone)
        if hit != [(i, j)]:
            lost[i, j] = hit
    if lost:
        misplaced(batch, lost)
    if "advantages" in batch.columns:
        with suppress(NotApplicable):  # it takes one advantage for each datum
            of_one_advantage(probe, batch)
    for i, j in ((0, 1), (2, 2)):
        weights = put([[0.0] * len(row) for row in batch.weights], i, j, 1.0)
        columns_at(probe, batch.having(weights=weights), (i, j))


def located(probe: Probe, batch: Batch) -> list[tuple[int, int]]:
    """Where the gradient is; nowhere, if the loss finds nothing to train on and says so."""
    try:
        return support(probe.gradients(batch))
    except LawBroken:
        return []


def of_one_advantage(probe: Probe, batch: Batch) -> None:
    """Where one token's advantage is not 0, the gradient is at it; with a sequence ratio, all over its sequence."""
    from lossfns.testing.laws.policy import coupled

    still = filled(batch, advantages=0.0)
    rest = probe(still).gradients
    hits = {}
    for i, j in ((1, 2), (1, 0)):
        alone = still.having(advantages=put(still.columns["advantages"], i, j, 1.0))
        there = probe(alone).gradients
        hits[i, j] = support([[g - r for g, r in zip(gs, rs)] for gs, rs in zip(there, rest)])
    if not any(hits.values()):
        return  # clipped, or inert: other laws say which
    for (i, j), hit in hits.items():
        seen = f"The advantage of token {j} of datum {i} has its effect at {hit}."
        if hit == [(i, j)] or (coupled(probe) and {k for k, _ in hit} == {i}):
            continue
        demand(not any(k != i for k, _ in hit), "datum-misaligned", seen)
        demand(len(hit) == 1, "advantages-pooled", seen)
        demand(False, "frame-shift", seen)


def support(gradients: Rows) -> list[tuple[int, int]]:
    return [(i, j) for i, row in enumerate(gradients) for j, g in enumerate(row) if g != 0]


def misplaced(batch: Batch, lost: dict[tuple[int, int], list[tuple[int, int]]]) -> None:
    """Name the bug from where the gradient of each lone active token went instead."""
    (i, j), hit = next(((at, hit) for at, hit in lost.items() if hit), next(iter(lost.items())))
    seen = f"With only token {j} of datum {i} active, the gradient is at {hit or 'no token'}."
    everywhere = {(k, t) for k, row in enumerate(batch.weights) for t in range(len(row))}
    if any(len(h) > 1 for h in lost.values()):
        demand(False, "mask-missing", seen)
    if not any(lost.values()):
        demand(not batch.targets or len(lost) < len(everywhere), "renormalised-targets", seen)
        whole = {k for k, _ in lost if all((k, t) in lost for t in range(len(batch.weights[k])))}
        demand(False, "datum-ignored" if whole and len(lost) < len(everywhere) else "target-dropped", seen)
    if batch.targets:
        demand(False, "targets-transposed", seen)
    demand(False, "datum-misaligned" if hit and hit[0][0] != i else "frame-shift", seen)


def columns_at(probe: Probe, batch: Batch, where: tuple[int, int]) -> None:
    """Only the active slot's values matter; where another's does, say which and why."""
    others = slots(batch, active=False)
    for name in batch.columns:
        if not influences(probe, name, batch, others, -0.25):
            continue
        culprits = [slot for slot in others if influences(probe, name, batch, [slot], -0.25)]
        own = influences(probe, name, batch, [where], -0.25)
        seen = f"With only token {where[1]} of datum {where[0]} active, the {name} of {culprits[:3]} matter"
        if not own and len(culprits) == 1 and culprits[0][0] != where[0]:
            demand(False, "datum-misaligned", f"{seen}, and its own do not.")
        if not own and len(culprits) == 1:
            demand(False, "frame-shift", f"{seen}, and its own do not.")
        if name == "advantages":
            demand(False, "advantages-pooled" if not own else "mask-missing", f"{seen}.")
        ratio = not influences(probe, "advantages", batch, others)
        bug = "kl-unmasked" if name == "ref_logprobs" else "padding-in-sequence-ratio" if ratio else "mask-missing"
        demand(False, bug, f"{seen}.")
