"""Laws of the batch: frames, masks, padding, splits and order, for every loss over datums (or pairs)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lossfns.testing.batch import Batch, Rows
from lossfns.testing.laws.base import (
    LawBroken,
    LossFn,
    NotApplicable,
    Outcome,
    Probe,
    demand,
    filled,
    influences,
    inhabited,
    kind_of,
    neutral,
    put,
    rows_of,
    single,
    slots,
    stretched,
    suppose,
    unit,
    units,
    unpoisoned,
    with_empty,
)

POISON = (math.nan, math.inf, -math.inf, 1e30)


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
    probe, step = Probe.of(loss_fn, data, logprobs), unit(Probe.of(loss_fn, data, logprobs).batch)
    batch = neutral(single(probe.batch, length=2, datums=3 * step))
    usual = probe(batch).gradients[:step]
    suppose(any(g != 0 for row in usual for g in row), "there is no gradient")

    def felt(name: str, by: Callable[[float], float], unit_: int | None) -> bool:
        """Whether the first unit's gradient changes with a column of one unit, or of all others (its first sides)."""
        rows = rows_of(batch, name)
        hit = [i % step == 0 and (i // step == unit_ if unit_ is not None else i >= step) for i in range(len(rows))]
        changed = [[by(x) if h else x for x in row] for row, h in zip(rows, hit)]
        return not probe.same(probe(batch.having(**{name: changed})).gradients[:step], usual)

    for name in ("logprobs", *(name for name in batch.columns if name != "advantages")):
        if felt(name, lambda x: x - 0.125, None):
            seen = f"Changing the {name} of other datums changes the gradient of datum 0"
            own = felt(name, lambda x: x - 0.125, 0)
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


def poison(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """nan, ±inf or 1e30 in a masked slot changes nothing, bit for bit."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = with_holes(unpoisoned(probe.batch))
    clean = probe(batch)
    suppose(clean.finite, "it is not finite without poison either")
    for name in ("logprobs", *batch.columns):
        for value in POISON:
            rows = batch.logprobs if name == "logprobs" else batch.columns[name]
            bad = [[x if w else value for x, w in zip(r, ws)] for r, ws in zip(rows, batch.weights)]
            result = probe(batch.having(**{name: bad}))
            same = repr((result.value, result.gradients, result.metrics)) == repr(
                (clean.value, clean.gradients, clean.metrics)
            )
            if not same:
                demand(False, *leak(name, value, clean, result))


def with_holes(batch: Batch) -> Batch:
    """The batch with an inactive token before and after each sequence."""
    width = batch.targets or 1

    def pad(rows: Rows, x: float) -> Rows:
        return [[x] * width + row + [x] * width for row in rows]

    wide = batch.map(lambda rows: pad(rows, -1.0))
    return wide.having(weights=pad(batch.weights, 0.0))


def leak(name: str, value: float, clean: Outcome, result: Outcome) -> tuple[str, str]:
    """Which bug lets a masked slot through."""
    what = f"{value} in the masked slots of {name}"
    seen = f"{what}: the loss is {result.value}, not {clean.value}"
    if math.isfinite(result.value) and result.value == clean.value:
        if result.gradients == clean.gradients:
            return "mask-after-exp", f"{what} changes the metrics."
        return "where-after-exp", f"{what} leaves the loss as it is, but the gradients are {result.gradients}."
    if math.isnan(result.value) or not math.isfinite(result.value):
        return "mask-after-exp", f"{seen}."
    return "kl-unmasked" if name == "ref_logprobs" else "mask-missing", f"{seen}."


def padding(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Masked tokens before and after a sequence change nothing, and get a gradient of exactly 0."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch, width = unpoisoned(probe.batch), probe.batch.targets or 1
    for on_policy in (True, False):
        plain = neutral(batch) if on_policy else batch
        before, after = probe(plain), probe(with_holes(plain))
        kept = probe.same(after.value, before.value)
        inner = [row[width:-width] for row in after.gradients]
        outer = [g for row in after.gradients for g in (*row[:width], *row[-width:])]
        demand(not any(outer), "mask-missing", f"Masked tokens have the gradients {outer}.")
        seen = f"With a masked token at both ends of each sequence the loss is {after.value}, not {before.value}"
        same = probe.same([after.value, inner], [before.value, before.gradients])
        bug = "padding-in-denominator" if on_policy and not kept else "padding-in-sequence-ratio"
        demand(same, bug, f"{seen} ({'on-policy' if on_policy else 'off-policy only'}).")


def empty(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A fully masked datum (or pair) changes nothing."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unpoisoned(probe.batch)
    before, after = probe(batch), probe(with_empty(batch))
    seen = f"With a fully masked datum the loss is {after.value}, not {before.value}, or the others' gradients differ"
    demand(after.finite, "empty-sequence-nan", f"{seen}; its gradients are {after.gradients[-1]}.")
    suppose(before.finite, "it is not finite without it either")
    rest = after.gradients[: len(before.gradients)]
    same = probe.same([after.value, rest], [before.value, before.gradients])
    demand(same, "empty-sequence-counted", f"{seen}.")


def duplication(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The batch twice: a mean stays, a sum doubles."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unpoisoned(probe.batch)
    count = len(batch.weights)
    once, twice = probe(batch), probe(batch.take([*range(count), *range(count)]))
    suppose(any(g != 0 for row in once.gradients for g in row), "there is no gradient")
    for factor in (1.0, 2.0):
        half = [[2 * g / factor for g in row] for row in twice.gradients[:count]]
        if probe.same([twice.value / factor, half], [once.value, once.gradients]):
            return
    sizes = [math.fsum(abs(g) for row in rows for g in row) for rows in (once.gradients, twice.gradients[:count])]
    share = 2 * sizes[1] / sizes[0]
    seen = f"The batch twice has {share:g} times the gradient and the loss {twice.value}, once {once.value}"
    if not probe.same(twice.gradients[:count], twice.gradients[count:]):
        equal = len(set(active(batch))) == 1
        demand(False, "order-dependent" if equal else "mean-of-means", f"{seen}; the two copies differ.")
    likely = "divided-twice" if share < 0.75 else "broadcast" if share > 2 else "epsilon-in-denominator"
    demand(False, likely, f"{seen}: a mean gives 1 and a sum 2.")


def replicas(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Four ranks with the same batch, averaged, give what one process gives."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unpoisoned(probe.batch)
    one = probe(batch)
    with world(4):
        four = [probe(batch) for _ in range(4)]
    mean = [[sum(gs) / 4 for gs in zip(*rows)] for rows in zip(*(rank.gradients for rank in four))]
    seen = f"Averaged over 4 ranks the loss is {sum(r.value for r in four) / 4}; in one process {one.value}."
    same = probe.same([sum(r.value for r in four) / 4, mean], [one.value, one.gradients])
    demand(same, "world-size-factor", seen)


@contextmanager
def world(size: int) -> Iterator[None]:
    """What a loss sees of a process group of this size."""
    names = {"is_available": True, "is_initialized": True, "get_world_size": size, "get_rank": 0}
    with mock.patch.dict(os.environ, {"WORLD_SIZE": str(size), "RANK": "0"}):
        patches = [mock.patch.object(torch.distributed, n, lambda *_, r=r: r, create=True) for n, r in names.items()]
        patches.append(mock.patch.object(torch.distributed, "all_reduce", partial(all_reduce, size), create=True))
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def all_reduce(size: int, tensor: Tensor, op: Any = None, *_: Any, **__: Any) -> None:
    """What ``torch.distributed.all_reduce`` does where every rank holds the same: a sum is so many times as much."""
    if op in (None, torch.distributed.ReduceOp.SUM):
        tensor.mul_(size)


Count = Callable[[Batch], float]


def active(batch: Batch) -> list[int]:
    return [sum(w != 0 for w in row) for row in batch.weights]


def positions(batch: Batch) -> int:
    """Positions with an active target: of K candidates one is enough."""
    k = batch.targets or 1
    return sum(any(row[i : i + k]) for row in batch.weights for i in range(0, len(row), k))


COUNTS: dict[str, Count] = {
    "1": lambda b: 1.0,
    "Σ weights": lambda b: math.fsum(w for row in b.weights for w in row),
    "active tokens": lambda b: sum(active(b)),
    "positions": positions,
    "sequences": lambda b: sum(n > 0 for n in active(b)),
    "Σ |weights|": lambda b: math.fsum(abs(w) for row in b.weights for w in row),
    "datums": lambda b: len(b.weights),
    "tokens": lambda b: sum(map(len, b.weights)),
}
"""What a loss may be divided by: numbers that add over the parts of a batch."""


def split(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """There is a count that adds, by which the parts of a batch make up the whole."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unpoisoned(probe.batch)
    batch = inhabited(batch)
    suppose(len(units(batch)) > 1, "one datum cannot be split")
    if dividers(probe, batch):
        return
    seen = f"No count of {', '.join(COUNTS)} makes the gradients of the datums by themselves add up to the batch's."
    if kind_of(batch) == "policy":
        no_kl = batch.having(ref_logprobs=batch.logprobs) if "ref_logprobs" in batch.columns else batch
        alone = [dividers(probe, filled(batch, advantages=0.0)), dividers(probe, no_kl)]
        mixed = all(alone) and not set(alone[0]) & set(alone[1])
        if mixed:
            demand(False, "mixed-denominators", f"{seen} With advantages 0 it is {alone[0]}, without KL {alone[1]}.")
    plain = neutral(filled(batch, **{"advantages": 1.0} if "advantages" in batch.columns else {}))
    crossed_ = math.fsum(1 / (math.fsum(row) or 1.0) for row in batch.weights) / len(batch.weights) ** 2
    shares = [-g / w for gs, ws in zip(probe(plain).gradients, plain.weights) for g, w in zip(gs, ws) if w]
    every = unit(batch) == 1 and probe.same(shares, [crossed_] * len(shares))
    demand(not every, "broadcast", f"{seen} Each datum is divided by every datum's weights.")
    heavy = batch.having(weights=[[8 * w for w in row] for row in batch.weights])
    demand(not dividers(probe, heavy), "epsilon-in-denominator", f"{seen} With 8 times the weights one does.")
    one = batch.having(weights=[[1.0 if j == 0 else 0.0 for j in range(len(row))] for row in batch.weights])
    demand(bool(dividers(probe, one)), "order-dependent", f"{seen} Not even with one token of each.")
    demand(False, "mean-of-means", seen)


def dividers(probe: Probe, batch: Batch) -> list[str]:
    """The counts by which the parts of a batch add up to it."""
    whole, parts = probe(batch), [batch.take(part) for part in units(batch)]
    outcomes = [probe(part) for part in parts]
    fits = []
    for name, count in COUNTS.items():
        divisors = [count(part) for part in parts]
        total = sum(divisors) if name != "1" else 1.0
        value = math.fsum(out.value * d for out, d in zip(outcomes, divisors))
        rows = [[g * d for g in row] for out, d in zip(outcomes, divisors) for row in out.gradients]
        if probe.same([value, rows], [whole.value * total, [[g * total for g in row] for row in whole.gradients]]):
            fits.append(name)
    return fits


def permutation(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The order of datums (or pairs) does not matter."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unpoisoned(probe.batch)
    suppose(len(units(batch)) > 1, "one datum has one order")
    order = [i for part in reversed(units(batch)) for i in part]
    plain, turned = probe(batch), probe(batch.take(order))
    seen = f"In reverse order the loss is {turned.value}, not {plain.value}, or its gradients differ."
    same = probe.same([turned.value, turned.gradients], [plain.value, [plain.gradients[i] for i in order]])
    demand(same, "order-dependent", seen)


def finite_differences(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The gradient is the slope of the value, away from kinks."""
    probe = Probe.of(loss_fn, data, logprobs)
    suppose(probe.dtype == torch.float64, "the loss computes in float32")
    batch = unpoisoned(probe.batch)
    gradients = probe(batch).gradients
    for i, j in slots(batch)[:6]:
        slopes = [slope(probe, batch, i, j, step) for step in (1e-4, 2e-4)]
        if abs(slopes[0] - slopes[1]) > 1e-5 * (1 + abs(slopes[0])):
            continue  # a kink is near
        g = gradients[i][j]
        seen = f"At token {j} of datum {i} the gradient is {g}; the loss moves by {slopes[0]} a nat."
        demand(abs(g - slopes[0]) < 1e-4 * (1 + abs(g)), "detached-term", seen)


def slope(probe: Probe, batch: Batch, i: int, j: int, step: float) -> float:
    lp = batch.logprobs
    up, down = (probe(batch.having(logprobs=put(lp, i, j, lp[i][j] + by))).value for by in (step, -step))
    return (up - down) / (2 * step)


def metric_loss(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A metric called loss is the loss."""
    probe = Probe.of(loss_fn, data, logprobs)
    result = probe(inhabited(unpoisoned(probe.batch)))
    for name in ("loss", "loss:sum"):
        value = result.metrics.get(name, result.value)
        seen = f"The metric {name!r} is {value}, the loss {result.value}."
        demand(math.isclose(value, result.value, rel_tol=1e-4, abs_tol=1e-6), "metric-scaled-twice", seen)


def metric_merge(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A metric of the whole is a sum, a mean over some count, or an extreme of its parts'."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unpoisoned(probe.batch)
    batch = inhabited(batch)
    suppose(len(units(batch)) > 1, "one datum cannot be split")
    parts = [batch.take(part) for part in units(batch)]
    whole, of_parts = probe(batch).metrics, [probe(part).metrics for part in parts]
    for name, value in whole.items():
        values = [metrics.get(name, math.nan) for metrics in of_parts]
        means = [mean(values, [count(part) for part in parts]) for count in COUNTS.values()]
        extremes = [max(values)] * ("max" in name) + [min(values)] * ("min" in name)
        fits = [math.fsum(values), *means, *extremes]
        seen = f"The metric {name!r} is {value} over the batch and {values} over its datums."
        demand(any(math.isclose(fit, value, rel_tol=1e-5, abs_tol=1e-6) for fit in fits), "metric-not-mergeable", seen)


def mean(values: list[float], counts: list[float]) -> float:
    return math.fsum(v * c for v, c in zip(values, counts)) / (math.fsum(counts) or 1.0)
