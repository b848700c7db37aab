"""Laws of sums: how the losses of chunks, copies and ranks add up to the loss of the batch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lossfns.loss import Loss
from lossfns.testing.batch import Batch
from lossfns.testing.laws.base import (
    LossFn,
    Outcome,
    Probe,
    assume,
    batch_kind,
    numbers,
    on_policy_batch,
    require,
    slots,
    uniform_batch,
    unit_indices,
    unit_size,
    unpoisoned,
    with_constants,
    with_slot,
    without_empty_units,
    wrong,
)
from lossfns.testing.laws.frames import STATISTIC, WHITENS, acts_by_statistic, whitens_advantages
from lossfns.testing.laws.masks import changed_by_padding


@wrong("a mean does not change, and a sum doubles, if the data come twice")
def duplication(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """With the batch twice, a mean stays the same and a sum doubles."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unpoisoned(probe.batch)
    count = len(batch.weights)
    once, twice = probe(batch), probe(batch.take([*range(count), *range(count)]))
    assume(any(g != 0 for row in once.gradients for g in row), "there is no gradient")
    for factor in (1.0, 2.0):  # of a mean and of a sum
        rescaled = [[2 * g / factor for g in row] for row in twice.gradients[:count]]
        if probe.close([twice.value / factor, rescaled], [once.value, once.gradients]):
            return
    assume(not whitens_advantages(probe), WHITENS)
    growth = gradient_growth(once, twice)
    seen = f"The batch twice has the loss {twice.value}, once {once.value}; its gradient is {growth:g} times as large"
    if not probe.close(twice.gradients[:count], twice.gradients[count:]):
        equal = len(set(active_counts(batch))) == 1
        bug, seen = "order-dependent" if equal else "mean-of-means", f"{seen}, and differs between the two copies."
        require(False, bug, seen, twice.batch)
    same_order = not order_difference(probe, batch)
    require(same_order or unit_size(batch) == 1, "pair-layout", f"{seen}; the order of the pairs matters.", twice.batch)
    # A constant in the denominator matters less with large weights.
    heavy = batch.having(weights=[[64 * w for w in row] for row in batch.weights])
    same = probe.close(gradient_growth(probe(heavy), probe(heavy.take([*range(count)] * 2))), growth)
    between = "mean-of-means" if same else "epsilon-in-denominator"
    likely = "divided-twice" if growth < 0.75 else "broadcast" if growth > 2 else between
    require(False, likely, f"{seen}. Of a mean it is 1 time, of a sum 2 times as large.", twice.batch)


def gradient_growth(once: Outcome, twice: Outcome) -> float:
    """Return the gradient of both copies in the doubled batch, relative to the gradient of the batch."""
    own, copy = (
        math.fsum(abs(g) for row in rows for g in row)
        for rows in (once.gradients, twice.gradients[: len(once.gradients)])
    )
    return 2 * copy / own


@wrong("the number of ranks must not change the gradient")
def replicas(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The average over four ranks with the same batch is the result of one process."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unpoisoned(probe.batch)
    one = probe(batch)
    with simulated_world(4):
        four = [probe(batch) for _ in range(4)]
    mean = [[sum(gs) / 4 for gs in zip(*rows)] for rows in zip(*(rank.gradients for rank in four))]
    seen = probe.difference(replace(one, value=sum(rank.value for rank in four) / 4, gradients=mean), one)
    require(not seen, "world-size-factor", f"Averaged over 4 ranks with this batch, {seen}, of one process.", batch)


@contextmanager
def simulated_world(size: int) -> Iterator[None]:
    """Simulate a process group of this size, in which every rank holds the same values."""
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
    """Simulate ``torch.distributed.all_reduce`` where every rank holds the same tensor: multiply it for a sum."""
    if op in (None, torch.distributed.ReduceOp.SUM):
        tensor.mul_(size)


Count = Callable[[Batch], float]


def active_counts(batch: Batch) -> list[int]:
    """Return the number of active tokens of each datum."""
    return [sum(w != 0 for w in row) for row in batch.weights]


def active_positions(batch: Batch) -> int:
    """Count the positions with at least one active target."""
    k = batch.targets or 1
    return sum(any(row[i : i + k]) for row in batch.weights for i in range(0, len(row), k))


COUNTS: dict[str, Count] = {
    "1": lambda b: 1.0,
    "Σ weights": lambda b: math.fsum(w for row in b.weights for w in row),
    "active tokens": lambda b: sum(active_counts(b)),
    "positions": active_positions,
    "sequences": lambda b: sum(n > 0 for n in active_counts(b)),
    "Σ |weights|": lambda b: math.fsum(abs(w) for row in b.weights for w in row),
    "datums": lambda b: len(b.weights),
    "tokens": lambda b: sum(map(len, b.weights)),
}
"""The possible denominators of a loss: counts that add up over the parts of a batch."""


@wrong("micro-batches and ranks must add up to the batch")
def split(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """For one count D, such as tokens or sequences, L(batch) · D(batch) is Σ L(part) · D(part) over the parts."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unpoisoned(probe.batch)
    batch = without_empty_units(batch)
    assume(len(unit_indices(batch)) > 1, "one datum cannot be split")
    if additive_counts(probe, batch) or adds_up_by_part(probe, batch):
        return
    assume(not whitens_advantages(probe), WHITENS)
    assume(not acts_by_statistic(probe), STATISTIC)
    seen = f"With no count of {', '.join(COUNTS)} do the gradients of the datums add up to those of the batch."
    if batch_kind(batch) == "policy":
        no_kl = batch.having(ref_logprobs=batch.logprobs) if "ref_logprobs" in batch.columns else batch
        of_kl = additive_counts(probe, with_constants(batch, advantages=0.0))
        of_policy = additive_counts(probe, no_kl)
        if of_kl and of_policy and not set(of_kl) & set(of_policy):
            terms = f"With advantages 0 they do with {of_kl}, without KL with {of_policy}."
            require(False, "mixed-denominators", f"{seen} {terms}", batch)
    plain = on_policy_batch(with_constants(batch, **{"advantages": 1.0} if "advantages" in batch.columns else {}))
    # The share of every token if each datum is divided by the weights of each datum, and all B² quotients are averaged.
    broadcast_share = math.fsum(1 / (math.fsum(row) or 1.0) for row in batch.weights) / len(batch.weights) ** 2
    shares = [-g / w for gs, ws in zip(probe(plain).gradients, plain.weights) for g, w in zip(gs, ws) if w]
    is_broadcast = unit_size(batch) == 1 and probe.close(shares, [broadcast_share] * len(shares))
    require(not is_broadcast, "broadcast", f"{seen} Each datum is divided by every datum's weights.", batch)
    heavy = batch.having(weights=[[8 * w for w in row] for row in batch.weights])
    epsilon = bool(additive_counts(probe, heavy))
    require(not epsilon, "epsilon-in-denominator", f"{seen} With 8 times the weights they do.", batch)
    one_token = batch.having(weights=[[1.0 if j == 0 else 0.0 for j in range(len(row))] for row in batch.weights])
    if not additive_counts(probe, one_token):
        padded = changed_by_padding(probe, plain)
        require(not padded, "padding-in-denominator", f"{seen} They change with the number of masked tokens.", batch)
        reordered = order_difference(probe, batch)
        require(not reordered, "order-dependent", f"{seen} With the batch in reverse order, {reordered}.", batch)
    require(False, "mean-of-means", seen, batch)


def additive_counts(probe: Probe, batch: Batch) -> list[str]:
    """Return the counts D with Σ L(part) · D(part) = L(batch) · D(batch), for value and gradient."""
    whole, parts = probe(batch), [batch.take(part) for part in unit_indices(batch)]
    outcomes = [probe(part) for part in parts]
    fitting = []
    for name, count in COUNTS.items():
        divisors = [count(part) for part in parts]
        total = sum(divisors) if name != "1" else 1.0  # a sum is divided by 1, also over the batch
        value = math.fsum(out.value * d for out, d in zip(outcomes, divisors))
        rows = [[g * d for g in row] for out, d in zip(outcomes, divisors) for row in out.gradients]
        if probe.close([value, rows], [whole.value * total, [[g * total for g in row] for row in whole.gradients]]):
            fitting.append(name)
    return fitting


def adds_up_by_part(probe: Probe, batch: Batch) -> bool:
    """Return whether a sum of losses, bound to its denominators for the batch, adds up over the datums or pairs."""
    loss = probe.loss_fn
    if not isinstance(loss, Loss) or not loss.parts or loss.count is None:
        return False
    bound = loss.bind(denominator=loss.denominator(batch.data()))
    whole, outcomes = probe(batch), [probe(batch.take(part), bound) for part in unit_indices(batch)]
    rows = [row for out in outcomes for row in out.gradients]
    return probe.close([math.fsum(out.value for out in outcomes), rows], [whole.value, whole.gradients])


MANY = 301
"""A number of tokens that bfloat16 cannot hold: it counts no further than 256 one by one, and rounds 301 to 300."""


@wrong("a batch holds more tokens than bfloat16 can count")
def many_tokens(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The loss of 301 equal tokens is that of one of them, or 301 times as much."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume(unit_size(probe.batch) == 1, "the tokens of a pair do not add up")
    one, many = (probe(uniform_batch(probe.batch, length=n)).value for n in (1, MANY))
    assume(one != 0 and math.isfinite(one), "the loss of one token is 0")
    growth = many / one
    for expected in (1.0, MANY):
        off = abs(growth / expected - 1)
        seen = f"The loss of {MANY} equal tokens is {growth:g} times that of one, not {expected:g} times."
        require(not 1e-3 < off < 0.2, "low-precision", seen)


@wrong("the order of the datums carries no information")
def permutation(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The order of datums (or pairs) matters neither for the loss nor for its metrics."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unpoisoned(probe.batch)
    assume(len(unit_indices(batch)) > 1, "one datum has one order")
    plain, back = probe(batch), probe(in_reverse(batch))
    seen = order_difference(probe, batch)
    require(not seen, "order-dependent", f"With this batch in reverse order, {seen}.", back.batch)
    for name, value in numbers(plain.metrics).items():
        reverse = numbers(back.metrics).get(name, math.nan)
        words = f"With this batch in reverse order the metric {name!r} is {reverse}, not {value}."
        require(probe.close(reverse, value), "metric-not-mergeable", words, back.batch)


def in_reverse(batch: Batch) -> Batch:
    """Return the batch with its datums, or its pairs, in reverse order."""
    return batch.take([i for part in reversed(unit_indices(batch)) for i in part])


def order_difference(probe: Probe, batch: Batch) -> str:
    """Return in words what differs with the batch in reverse order, or "" if nothing does."""
    plain, back = probe(batch), probe(in_reverse(batch))
    expected = in_reverse(batch.having(logprobs=plain.gradients)).logprobs
    return probe.difference(back, replace(plain, gradients=expected))


@wrong("the gradient is not that of the value")
def finite_differences(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The gradient is the slope of the value, away from kinks."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume(probe.dtype == torch.float64, "the loss computes in float32")
    batch = unpoisoned(probe.batch)
    plain = probe(batch)
    gradients = plain.gradients
    for i, j in slots(batch)[:6]:
        slopes = [central_difference(probe, batch, i, j, step) for step in (1e-4, 2e-4)]
        raised = probe(batch.having(logprobs=with_slot(batch.logprobs, i, j, batch.logprobs[i][j] + 1e-4))).value
        one_sided = (raised - plain.value) / 1e-4
        if abs(slopes[0] - slopes[1]) > 1e-5 * (1 + abs(slopes[0])) or abs(slopes[0] - one_sided) > 0.01 * (
            1 + abs(slopes[0])
        ):
            continue  # close to a kink, or at one
        g = gradients[i][j]
        seen = f"At {probe.slot_name(i, j)} the gradient is {g}; the slope of the loss is {slopes[0]}."
        require(abs(g - slopes[0]) < 1e-4 * (1 + abs(g)), "detached-term", seen, batch)


def central_difference(probe: Probe, batch: Batch, i: int, j: int, step: float) -> float:
    """Return the slope of the value in one logprob."""
    lp = batch.logprobs
    up, down = (probe(batch.having(logprobs=with_slot(lp, i, j, lp[i][j] + by))).value for by in (step, -step))
    return (up - down) / (2 * step)
