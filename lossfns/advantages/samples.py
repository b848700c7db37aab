"""The checked rewards of a batch of samples, and sums over their groups."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossfns.checks import check_number
from lossfns.errors import LossInputError, did_you_mean, show, warn

Array = np.ndarray
Groups = Sequence[Hashable]


@dataclass(frozen=True)
class Samples:
    """The rewards of B samples in G groups. A sample that abstains has no reward, and is in no sum.

    Attributes:
        rewards: ``[B]`` float64, 0 where the sample abstains.
        scored: ``[B]`` bool, False where the sample abstains.
        index: ``[B]`` the group of each sample, from 0.
        size: ``[G]`` the number of samples of each group that have a reward.
    """

    rewards: Array
    scored: Array
    index: Array
    size: Array

    def total(self, x: Array) -> Array:
        """Σ x over the samples of each group that have a reward: ``[B] -> [G]``."""
        total: Array = np.bincount(self.index[self.scored], x[self.scored], len(self.size))
        return total

    def mean(self, x: Array) -> Array:
        """Mean of x over the group of each sample: ``[B] -> [B]``."""
        mean: Array = self.total(x) / np.maximum(self.size, 1)
        return np.asarray(mean[self.index])

    def std(self, ddof: int) -> Array:
        """Standard deviation of the rewards over the group of each sample: ``[B]``."""
        centred = self.rewards - self.mean(self.rewards)
        largest = np.abs(centred).max() or 1.0  # the square of a large number would overflow
        squares = self.total((centred / largest) ** 2)
        return np.asarray(largest * np.sqrt(squares / np.maximum(self.size - ddof, 1))[self.index])

    @property
    def alone(self) -> Array:
        """``[B]`` bool: True where a group has at most one reward."""
        return np.asarray((self.size <= 1)[self.index])

    @property
    def constant_groups(self) -> Array:
        """``[G]`` bool: True where a group has no two different rewards.

        It compares the rewards themselves, because the standard deviation of equal rewards may not round to 0.
        """
        high, low = np.full(len(self.size), -np.inf), np.full(len(self.size), np.inf)
        np.maximum.at(high, self.index[self.scored], self.rewards[self.scored])
        np.minimum.at(low, self.index[self.scored], self.rewards[self.scored])
        equal: Array = high <= low
        return equal

    @property
    def constant(self) -> Array:
        """``[B]`` bool: True where the group of a sample has no two different rewards."""
        return np.asarray(self.constant_groups[self.index])

    def baseline(self, b: Array, group_of_one: str) -> Array:
        """Return a baseline ``[B]``. With ``group_of_one="reward"`` it is 0 in a group of one."""
        return np.where(self.alone, 0.0, b) if group_of_one == "reward" else b

    def finish(self, advantages: Array, group_of_one: str = "zero") -> Tensor:
        """Return advantages as a tensor, exactly 0 where a sample abstains or its group is constant.

        With ``group_of_one="reward"`` a group of one keeps its advantage.
        """
        silent = self.constant & ~self.alone if group_of_one == "reward" else self.constant
        return torch.from_numpy(np.where(silent | ~self.scored, 0.0, advantages))


def parse_samples(rewards: Any, groups: Groups, missing: str) -> Samples:
    """Check rewards and labels, and return the samples."""
    r, scored = parse_rewards(rewards, missing)
    return Samples(r, scored, *grouped(parse_labels(groups, len(r)), scored))


def compared(name: str, rewards: Any, groups: Groups, missing: str, group_of_one: str = "zero") -> Samples:
    """Return the samples of an estimator. Warn where a group of one gets advantage 0."""
    check_choice("group_of_one", group_of_one, ("zero", "reward"))
    samples = parse_samples(rewards, groups, missing)
    if (samples.size == 1).any() and group_of_one == "zero":
        warn(f"{name}: a group of one has advantage 0; are the groups right?")
    return samples


def parse_rewards(rewards: Any, missing: str = "refuse", name: str = "rewards", ndim: int = 1) -> tuple[Array, Array]:
    """Return rewards as floats, 0 where missing, and where they are present, both ``[B]`` or ``[B, R]``."""
    check_choice("missing", missing, ("refuse", "abstain"))
    expected, fix = ("one number for each sample", "Pass a flat list.")
    if ndim == 2:
        expected, fix = "[B, R] numbers: one row of R rewards for each sample", "Pass a list of rows."
    try:
        r = np.asarray(rewards.detach().cpu().double() if isinstance(rewards, Tensor) else rewards, dtype=np.float64)
    except Exception:  # whatever a tensor without plain numbers, or the value's own methods raise
        raise LossInputError(name, expected, show(rewards), fix) from None
    if r.ndim != ndim or r.size == 0:
        raise LossInputError(name, expected, f"shape {r.shape}", fix)
    bad = ~np.isfinite(r) if missing == "refuse" else np.isinf(r)
    if bad.any():
        i = [int(x) for x in np.argwhere(bad)[0]]
        fix = 'Drop samples that have no reward, or pass missing="abstain".'
        raise LossInputError(f"{name}[{', '.join(map(str, i))}]", "a finite number", f"{r[tuple(i)]}", fix)
    present = ~np.isnan(r)
    if not present.any():
        raise LossInputError(name, "a reward for at least one sample", "none", "Nothing can be compared.")
    return np.where(present, r, 0.0), present


def parse_labels(labels: Any, count: int, name: str = "groups") -> list[Hashable]:
    """Return one hashable label for each sample."""
    try:
        items = labels.tolist() if isinstance(labels, (Tensor, np.ndarray)) else labels
        parsed = list(items) if isinstance(items, Iterable) else []
    except Exception:
        parsed = []
    if len(parsed) != count or not all(map(hashable, parsed)):
        got = f"{len(parsed)} labels" if parsed else show(labels)
        fix = "Give each sample the label of its prompt: a string or a number."
        if name != "groups":
            fix = f"Give each sample the label of its {name.removesuffix('s')}: a string or a number."
        raise LossInputError(name, f"{count} labels, one per reward", got, fix)
    return parsed


def grouped(labels: Sequence[Hashable], scored: Array) -> tuple[Array, Array]:
    """Return the index of each sample's group ``[B]``, and the number of rewards in each group ``[G]``."""
    order = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    index = np.array([order[label] for label in labels])
    return index, np.bincount(index[scored], minlength=len(order))


def parse_lengths(lengths: Any, count: int) -> Array:
    """Return the number of active tokens of each sample, ``[B]``."""
    n, _ = parse_rewards(lengths, name="lengths")
    if len(n) != count or (n < 0).any():
        got = f"{len(n)} numbers" if len(n) != count else f"{n.min():g}"
        raise LossInputError(
            "lengths", f"{count} numbers of at least 0", got, "Count the active tokens of each sample."
        )
    return n


def standardized(x: Array, mass: Array, eps: float, ddof: int, root: bool = False) -> Array:
    """(x − mean) / (std + eps) under a mass, or with ``root`` (x − mean) / √(var + eps); 0 where x is constant."""
    seen = x[mass > 0]
    if len(seen) == 0:
        raise LossInputError("lengths", "a sample with an active token", "none", "Nothing can be averaged.")
    if seen.max() == seen.min():
        return np.zeros_like(x)
    total = mass.sum()
    centred = x - (mass * x).sum() / total
    largest = np.abs(centred).max()  # the square of a large number would overflow
    std = largest * np.sqrt((mass * (centred / largest) ** 2).sum() / max(total - ddof, 1))
    return np.asarray(centred / (np.hypot(std, np.sqrt(eps)) if root else std + eps))


def hashable(label: Any) -> bool:
    """Return whether a label can be a key of a dict."""
    try:
        hash(label)
    except TypeError:
        return False
    return True


def check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Refuse a setting that is not one of the known words."""
    if not isinstance(value, str) or value not in known:
        raise LossInputError(name, " or ".join(map(repr, known)), show(value), did_you_mean(value, known))


def check_scaling(eps: Any, ddof: Any) -> float:
    """Return eps. Refuse an eps that is no number above 0, and a ddof other than 0 and 1."""
    if isinstance(ddof, bool) or not isinstance(ddof, int) or ddof not in (0, 1):
        raise LossInputError("ddof", "0 or 1", show(ddof), "The deviation divides by n − ddof.")
    fix = "It prevents a division by a tiny deviation."
    return as_number("eps", eps, "a finite number above 0", lambda x: x > 0, fix)


def as_number(name: str, value: Any, expected: str, accept: Callable[[float], bool], fix: str) -> float:
    """Return a real number of any type as a float. Refuse a number that is not finite or not accepted."""
    check_number(name, value, expected, accept, fix)
    return float(value)


def as_fraction(name: str, value: Any) -> float:
    """Return a number in [0, 1] as a float."""
    return as_number(name, value, "a number in [0, 1]", lambda x: 0 <= x <= 1, "1 does not discount.")
