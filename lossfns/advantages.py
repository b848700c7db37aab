"""Advantages from rewards."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossfns.errors import LossInputError, did_you_mean, show, warn

EPS = 1e-6


def group_advantages(rewards: Any, groups: Sequence[Hashable], scale: str = "std") -> Tensor:
    """(r − group mean) / (group std + 1e-6): advantages relative to the other samples of the same prompt.

    Args:
        rewards: ``[B]`` finite numbers.
        groups: ``[B]`` hashable labels. Samples with equal labels are one group, in any order.
        scale: ``"std"`` (ddof 1; GRPO, arXiv:2402.03300) or ``"none"`` (Dr. GRPO, arXiv:2503.20783).

    Returns:
        ``[B]`` float64. A group whose rewards are all equal gets exactly 0. So does a group of one, with a warning.
        ``group_metrics`` counts both.

    Raises:
        LossInputError: if a reward is not a finite number, or if there is not one label for each reward.

    >>> group_advantages([1.0, 0.0, 5.0, 5.0], ["a", "a", "b", "b"], scale="none")
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000], dtype=torch.float64)
    """
    if not isinstance(scale, str) or scale not in ("std", "none"):
        raise LossInputError("scale", "'std' or 'none'", show(scale), did_you_mean(scale, ("std", "none")))
    r, index, size = parse_groups(rewards, groups)
    if (size == 1).any():
        warn("group_advantages: a group of one has advantage 0; are the groups right?")
    centred = r - (np.bincount(index, r) / size)[index]
    std = np.sqrt(np.bincount(index, centred**2) / np.maximum(size - 1, 1))
    advantages = centred if scale == "none" else centred / (std[index] + EPS)
    return torch.from_numpy(np.where(constant_groups(r, index, size)[index], 0.0, advantages))


def group_metrics(rewards: Any, groups: Sequence[Hashable]) -> dict[str, float]:
    """Return the mean reward, the number of groups, and the shares of groups without a signal.

    Args:
        rewards, groups: as for ``group_advantages``.

    Returns:
        ``reward``: mean reward. ``groups``: number of groups. ``groups_constant``: share of groups whose rewards are
        all equal, and ``groups_of_one``: share of groups with one sample, both in [0, 1]. The samples of either have
        advantage 0, so they have no policy gradient.

    >>> group_metrics([1.0, 0.0, 5.0, 5.0], ["a", "a", "b", "b"])
    {'reward': 2.75, 'groups': 2.0, 'groups_constant': 0.5, 'groups_of_one': 0.0}
    """
    r, index, size = parse_groups(rewards, groups)
    return {
        "reward": float(r.mean()),
        "groups": float(len(size)),
        "groups_constant": float(constant_groups(r, index, size).mean()),
        "groups_of_one": float((size == 1).mean()),
    }


def parse_groups(rewards: Any, groups: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Check the arguments. Return the rewards ``[B]``, the group index of each ``[B]``, and the group sizes ``[G]``."""
    try:
        r = np.asarray(rewards.detach().cpu().double() if isinstance(rewards, Tensor) else rewards, dtype=np.float64)
    except Exception:  # whatever a tensor without plain numbers, or the value's own methods raise
        fix = "Pass a flat list."
        raise LossInputError("rewards", "one number for each sample", show(rewards), fix) from None
    if r.ndim != 1 or r.size == 0:
        raise LossInputError("rewards", "one number for each sample", f"shape {r.shape}", "Pass a flat list.")
    try:
        items = groups.tolist() if isinstance(groups, (Tensor, np.ndarray)) else groups
        labels = list(items) if isinstance(items, Iterable) else []
    except Exception:
        labels = []
    if len(labels) != len(r) or not all(map(hashable, labels)):
        got = f"{len(labels)} labels" if labels else show(groups)
        fix = "Give each sample the label of its prompt: a string or a number."
        raise LossInputError("groups", f"{len(r)} labels, one per reward", got, fix)
    if not np.isfinite(r).all():
        i = int(np.flatnonzero(~np.isfinite(r))[0])
        raise LossInputError(f"rewards[{i}]", "a finite number", f"{r[i]}", "Drop samples that have no reward.")
    order = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    index = np.array([order[label] for label in labels])
    return r, index, np.bincount(index)


def hashable(label: Any) -> bool:
    """Whether a label can be a key of a dict."""
    try:
        hash(label)
    except TypeError:
        return False
    return True


def constant_groups(r: np.ndarray, index: np.ndarray, size: np.ndarray) -> np.ndarray:
    """``[G]`` bool: True where all rewards of a group are equal.

    It compares the rewards themselves, because the standard deviation of equal rewards may not round to 0.
    """
    high, low = np.full(len(size), -np.inf), np.full(len(size), np.inf)
    np.maximum.at(high, index, r)
    np.minimum.at(low, index, r)
    equal: np.ndarray = high == low
    return equal
