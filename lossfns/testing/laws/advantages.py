"""Laws of group advantages, functions ``(rewards, groups) -> advantages`` with one number for each reward."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Iterable, Sequence

from lossfns.testing.laws.base import (
    assume,
    relative_difference,
    require,
    wrong,
)

AdvantageFn = Callable[..., Iterable[float]]
AdvantageLaw = Callable[[AdvantageFn, Sequence[float], Sequence[Hashable]], None]


def advantages_of(fn: AdvantageFn, rewards: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
    """Return the advantages as floats. Groups are passed second, or by name where they are keyword-only."""
    try:
        inspect.signature(fn).bind(rewards, groups)
    except TypeError:
        return [float(a) for a in fn(list(rewards), groups=list(groups))]
    return [float(a) for a in fn(list(rewards), list(groups))]


def group_members(groups: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """Return the indices of each group, in order of first appearance."""
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    return members


@wrong("a group of one has nothing to compare with")
def alone(fn: AdvantageFn, rewards: Sequence[float], groups: Sequence[Hashable]) -> None:
    """A group of one has advantage 0."""
    (one,) = advantages_of(fn, [1.0], ["alone"])
    require(one == 0, "group-of-one-nan", f"A group of one has the advantage {one}.")


@wrong("equal rewards hold no information")
def constant(fn: AdvantageFn, rewards: Sequence[float], groups: Sequence[Hashable]) -> None:
    """Where all rewards of a group are equal, its advantages are 0 up to rounding."""
    result = advantages_of(fn, [0.7] * 8, ["same"] * 8)
    require(
        all(abs(a) < 1e-6 for a in result),
        "constant-group-noise",
        f"Eight rewards of 0.7 have the advantages {result}.",
    )


@wrong("a prompt's advantages depend on its own samples alone")
def groupwise(fn: AdvantageFn, rewards: Sequence[float], groups: Sequence[Hashable]) -> None:
    """Groups are identified by their ids, in any order, and do not affect one another."""
    result = advantages_of(fn, rewards, groups)
    members = group_members(groups)
    alone = {g: advantages_of(fn, [rewards[i] for i in own], [g] * len(own)) for g, own in members.items()}
    if all(relative_difference([result[i] for i in own], alone[g]) < 1e-5 for g, own in members.items()):
        return
    order = [i for own in members.values() for i in own]
    sorted_by_group = advantages_of(fn, [rewards[i] for i in order], [groups[i] for i in order])
    right_if_sorted = relative_difference(sorted_by_group, [a for g in members for a in alone[g]]) < 1e-5
    seen = f"Rewards {list(rewards)} of groups {list(groups)} have the advantages {result}; each group alone, {alone}."
    require(False, "groups-by-position" if right_if_sorted else "groups-ignored", seen)


@wrong("advantages are relative to the group's mean")
def centred(fn: AdvantageFn, rewards: Sequence[float], groups: Sequence[Hashable]) -> None:
    """The advantages of a group sum to 0."""
    result = advantages_of(fn, [1.0, 0.0, 0.5, 0.0], ["a"] * 4)
    require(abs(math.fsum(result)) < 1e-4, "not-centred", f"Rewards 1, 0, 0.5, 0 have the advantages {result}.")


@wrong("a better sample must get the better advantage")
def ordered(fn: AdvantageFn, rewards: Sequence[float], groups: Sequence[Hashable]) -> None:
    """Within a group, a higher reward has the higher advantage."""
    result = advantages_of(fn, [0.0, 3.0, 1.0], ["a"] * 3)
    require(result[0] < result[2] < result[1], "order-lost", f"Rewards 0, 3, 1 have the advantages {result}.")


@wrong("scaled advantages have the standard deviation 1")
def deviation(fn: AdvantageFn, rewards: Sequence[float], groups: Sequence[Hashable]) -> None:
    """Scaled advantages of a group of n have Σ A² = n − 1: the standard deviation divides by n − 1."""
    one, ten = (advantages_of(fn, [x, -x, 0.0], ["a"] * 3) for x in (1.0, 10.0))
    assume(relative_difference(one, ten) < 1e-3, "it does not scale")
    squares = math.fsum(a * a for a in one)
    seen = f"Rewards 1, −1, 0 have advantages with Σ A² = {squares:g}, not 2."
    require(not math.isclose(squares, 3, rel_tol=1e-3), "std-over-n", seen)
    require(math.isclose(squares, 2, rel_tol=1e-2), "constant-factor", seen)
