"""Laws of group advantages, functions ``(rewards, groups) -> advantages`` with one number for each reward."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Iterable, Sequence

from lossfns.testing.laws.base import (
    LawBroken,
    NotApplicable,
    assume,
    fragile,
    relative_difference,
    require,
    wrong,
)

AdvantageFn = Callable[..., Iterable[float]]
AdvantageLaw = Callable[[AdvantageFn, Sequence[float], Sequence[Hashable]], None]


def advantages_of(fn: AdvantageFn, rewards: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
    """Return the advantages as floats.

    Groups are the second argument, or are passed by name if they are keyword-only. A function that refuses strings as
    ids gets integers.
    """
    for ids in (list(groups), as_integers(groups)):
        try:
            result = call(fn, list(rewards), ids)
        except Exception:
            if ids == as_integers(groups):
                raise
            continue
        break
    require(
        len(result) == len(rewards),
        "not-the-contract",
        f"For {len(rewards)} rewards it returns {len(result)} advantages.",
    )
    return result


def as_integers(groups: Sequence[Hashable]) -> list[Hashable]:
    """Return group ids as integers, in order of first appearance."""
    ids: dict[Hashable, int] = {}
    return [ids.setdefault(group, len(ids)) for group in groups]


def call(fn: AdvantageFn, rewards: list[float], groups: list[Hashable]) -> list[float]:
    """Return the advantages as floats."""
    try:
        inspect.signature(fn).bind(rewards, groups)
    except TypeError:
        return [float(a) for a in fn(rewards, groups=groups)]
    return [float(a) for a in fn(rewards, groups)]


def group_members(groups: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """Return the indices of each group, in order of first appearance."""
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    return members


def advantage_of_one(fn: AdvantageFn) -> float:
    """Return the advantage of a group of one with reward 1. Raise NotApplicable if the function refuses the group."""
    try:
        (one,) = advantages_of(fn, [1.0], ["alone"])
    except (ValueError, AssertionError) as refusal:
        raise NotApplicable("it refuses a group of one") from refusal
    return one


@fragile("groups of one are rare, but one nan reaches every weight of the model")
def alone(fn: AdvantageFn, rewards: Sequence[float], groups: Sequence[Hashable]) -> None:
    """The advantages are finite, also that of a group of one."""
    one = advantage_of_one(fn)
    require(math.isfinite(one), "group-of-one-nan", f"A group of one has the advantage {one}.")
    try:
        beside = advantages_of(fn, [1.0, 0.5, 0.0], ["a", "b", "b"])
    except Exception as refusal:
        raise NotApplicable("it takes groups of one size alone") from refusal
    require(all(map(math.isfinite, beside)), "group-of-one-nan", f"Beside a group of two it is {beside}.")


@fragile("a group of one has nothing to compare with; some trainers keep its reward")
def alone_zero(fn: AdvantageFn, rewards: Sequence[float], groups: Sequence[Hashable]) -> None:
    """A group of one has advantage 0."""
    one = advantage_of_one(fn)
    assume(math.isfinite(one), "it is not finite")
    require(one == 0, "group-of-one-rewarded", f"A group of one with reward 1 has the advantage {one}.")


EQUAL = [(x, n) for x in (0.7, 1 / 3, -0.1, 2.6) for n in (3, 5, 6, 7, 8)]
"""A reward and the size of a group in which all have it. Many of their means are rounded."""


PROBES = ((1.0, 0.0, 0.5, 2.0), (3.0, 1.0, 0.25))
"""Rewards of a group, from which the designs below are recognised. None is negative."""


def is_design(fn: AdvantageFn, formula: Callable[[float, float], float]) -> bool:
    """Return whether the advantage of each reward r of a group is ``formula(r, mean)``."""
    for probe in PROBES:
        mean = math.fsum(probe) / len(probe)
        try:
            result = advantages_of(fn, probe, ["a"] * len(probe))
        except Exception:
            return False
        if relative_difference(result, [formula(r, mean) for r in probe]) > 1e-4:
            return False
    return True


def divides_by_mean(fn: AdvantageFn) -> bool:
    """Return whether the mean reward divides: (r − mean) / mean, as in MaxRL. Rewards are then at least 0."""
    return is_design(fn, lambda r, mean: (r - mean) / mean)


def adds_constant(fn: AdvantageFn) -> bool:
    """Return whether one constant is added to each r − mean, as in AsymRE."""
    try:
        own = advantages_of(fn, [1.0, 0.0], ["a", "a"])
    except Exception:
        return False
    shift = math.fsum(own) / 2
    return abs(shift) > 1e-3 and is_design(fn, lambda r, mean: r - mean + shift)


DIVIDES_BY_MEAN = "it divides by the mean reward, as MaxRL does"
ADDS_CONSTANT = "it adds a constant to every advantage, as AsymRE does"


@wrong("equal rewards hold no information")
def constant(fn: AdvantageFn, rewards: Sequence[float], groups: Sequence[Hashable]) -> None:
    """Where all rewards of a group are equal, its advantages are small: no noise is scaled up to a signal."""
    assume(not adds_constant(fn), ADDS_CONSTANT)
    for reward, n in ((0.7, 8), (1.0, 6), (0.0, 4)):
        result = advantages_of(fn, [reward] * n, ["same"] * n)
        largest = max(map(abs, result))
        seen = f"{n} rewards of {reward:g} have the advantages {result}."
        without_baseline = reward != 0 and math.isclose(result[0], reward, rel_tol=1e-3)
        require(not without_baseline, "not-centred", seen)
        require(largest < 0.1, "constant-group-noise", seen)


@fragile("the noise is small beside an advantage of 1")
def constant_exact(fn: AdvantageFn, rewards: Sequence[float], groups: Sequence[Hashable]) -> None:
    """Where all rewards of a group are equal, its advantages are 0 up to rounding."""
    assume(not divides_by_mean(fn), DIVIDES_BY_MEAN)
    assume(not adds_constant(fn), ADDS_CONSTANT)
    for reward, n in EQUAL:
        result = advantages_of(fn, [reward] * n, ["same"] * n)
        seen = f"{n} rewards of {reward:g} have the advantages {result}."
        require(max(map(abs, result)) < 1e-3, "constant-group-noise", seen)


@wrong("a sample has the advantage of its own prompt and reward, in any order")
def groupwise(fn: AdvantageFn, rewards: Sequence[float], groups: Sequence[Hashable]) -> None:
    """Groups are identified by their ids, in any order. A group scales the advantages of another at most by one factor.

    It scales them where advantages are centred in each group and scaled by the deviation of the batch.
    """
    try:
        result = advantages_of(fn, rewards, groups)
    except LawBroken:
        raise
    except Exception:  # it takes groups of one size alone
        rewards, groups = [1.0, 0.0, 0.5, 0.25, 0.0, 1.0], ["b", "a", "b", "a", "a", "b"]
        result = advantages_of(fn, rewards, groups)
    members = group_members(groups)
    alone = {g: advantages_of(fn, [rewards[i] for i in own], [g] * len(own)) for g, own in members.items()}
    if same_up_to_scale(result, alone, members):
        check_reversed(fn, rewards, groups, result)
        return
    order = [i for own in members.values() for i in own]
    sorted_by_group = advantages_of(fn, [rewards[i] for i in order], [groups[i] for i in order])
    of_sorted = dict(zip(order, sorted_by_group))
    right_if_sorted = same_up_to_scale([of_sorted[i] for i in range(len(order))], alone, members)
    seen = f"Rewards {list(rewards)} of groups {list(groups)} have the advantages {result}; each group alone, {alone}."
    returned_sorted = right_if_sorted and relative_difference(sorted(result), sorted(sorted_by_group)) < 1e-5
    require(not returned_sorted, "datum-misaligned", f"{seen} The numbers are right, but not their order.")
    require(False, "groups-by-position" if right_if_sorted else "groups-ignored", seen)


def same_up_to_scale(
    result: Sequence[float], alone: dict[Hashable, list[float]], members: dict[Hashable, list[int]]
) -> bool:
    """Return whether each group's advantages are those that it has alone, times one positive factor."""
    for group, own in members.items():
        mine, by_itself = [result[i] for i in own], alone[group]
        size = math.sqrt(math.fsum(a * a for a in by_itself))
        factor = math.sqrt(math.fsum(a * a for a in mine)) / (size or 1.0) if any(by_itself) else 1.0
        if relative_difference(mine, [factor * a for a in by_itself]) > 1e-4:
            return False
    return True


def check_reversed(
    fn: AdvantageFn, rewards: Sequence[float], groups: Sequence[Hashable], result: Sequence[float]
) -> None:
    """Require that the samples in reverse order have the advantages in reverse order."""
    back = advantages_of(fn, rewards[::-1], groups[::-1])
    seen = f"Rewards {list(rewards)} of groups {list(groups)} have the advantages {list(result)}, in reverse {back}."
    require(relative_difference(back[::-1], list(result)) < 1e-4, "order-dependent", seen)


THIRDS = (1 / 3, 0.0, 2 / 3, 1 / 3, 1.0, 1 / 7, 0.1)


@wrong("only differences from the other samples of a prompt matter")
def baseline(fn: AdvantageFn, rewards: Sequence[float], groups: Sequence[Hashable]) -> None:
    """A constant added to all rewards of a group, up to 1000, changes no advantage."""
    assume(not divides_by_mean(fn), DIVIDES_BY_MEAN)
    plain = advantages_of(fn, THIRDS, ["a"] * len(THIRDS))
    assume(len({round(a, 6) for a in plain}) > 2, "its advantages take no more than two values")
    for shift in (1.0, 30.0, 1000.0):
        moved = advantages_of(fn, [r + shift for r in THIRDS], ["a"] * len(THIRDS))
        if relative_difference(moved, plain) < 1e-2:
            continue
        of_nonzero = [a * (len(THIRDS) - 1) / len(THIRDS) for a in plain]  # one of THIRDS is 0
        assume(relative_difference(moved, of_nonzero) > 1e-6, "it divides by the share of rewards other than 0, as GPG")
        drift = [b - a for a, b in zip(plain, moved)]
        seen = f"Rewards {[round(r, 3) for r in THIRDS]} have the advantages {plain}; with {shift:g} more, {moved}."
        rounded = shift > 1 and max(map(abs, drift)) < shift / 100
        require(False, "low-precision" if rounded else "not-centred", seen)


@wrong("a mean over a few rewards needs more than half precision")
def exact(fn: AdvantageFn, rewards: Sequence[float], groups: Sequence[Hashable]) -> None:
    """Centred advantages sum to 0 to single precision, also for rewards that half precision cannot hold."""
    result = advantages_of(fn, THIRDS, ["a"] * len(THIRDS))
    size, rest = max(map(abs, result)), abs(math.fsum(result))
    assume(rest < 2e-2 * size, "its advantages are not centred")
    seen = f"Rewards {[round(r, 3) for r in THIRDS]} have the advantages {result}, whose sum is {rest:g}."
    require(rest < 2e-5 * size, "low-precision", seen)


@fragile("other baselines than the mean exist: the best, the median, the greedy answer")
def centred(fn: AdvantageFn, rewards: Sequence[float], groups: Sequence[Hashable]) -> None:
    """The advantages of a group sum to 0."""
    assume(not adds_constant(fn), ADDS_CONSTANT)
    result = advantages_of(fn, [1.0, 0.0, 0.5, 0.0], ["a"] * 4)
    require(abs(math.fsum(result)) < 1e-2, "not-centred", f"Rewards 1, 0, 0.5, 0 have the advantages {result}.")


@wrong("a better sample must get the better advantage")
def ordered(fn: AdvantageFn, rewards: Sequence[float], groups: Sequence[Hashable]) -> None:
    """Within a group, a higher reward has no lower advantage, and the highest a higher one than the lowest."""
    for given in ([0.0, 3.0, 1.0], [-2.0, -1.0, -1.5])[: 1 if divides_by_mean(fn) else 2]:
        low, high, middle = advantages_of(fn, given, ["a"] * 3)
        seen = f"Rewards {given} have the advantages {[low, high, middle]}."
        require(low <= middle <= high and low < high, "order-lost", seen)


@fragile("both divisors are in use; the smaller one gives larger advantages, most in small groups")
def deviation(fn: AdvantageFn, rewards: Sequence[float], groups: Sequence[Hashable]) -> None:
    """Scaled advantages of a group of n have Σ A² = n − 1, as the deviation of ``torch.std`` gives, and not n."""
    assume(not divides_by_mean(fn), DIVIDES_BY_MEAN)
    one, ten = (advantages_of(fn, [x, -x, 0.0], ["a"] * 3) for x in (1.0, 10.0))
    assume(relative_difference(one, ten) < 1e-3, "it does not scale")
    squares = math.fsum(a * a for a in one)
    seen = f"Rewards 1, −1, 0 have advantages with Σ A² = {squares:g}, not 2."
    require(not math.isclose(squares, 3, rel_tol=1e-3), "std-over-n", seen)
