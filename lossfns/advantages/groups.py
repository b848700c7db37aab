"""Advantages of samples relative to the other samples of their group.

Every function takes one reward and one label for each sample. Options that several functions share:

    missing       "refuse": a reward of None or nan is an error. "abstain": its sample is in no statistic and has
                  advantage 0, as in TRL, where a reward function may return None. ``group_metrics`` counts them.
    group_of_one  "zero": a sample without others to compare with has advantage 0. "reward": its baseline is 0. eps,
    ddof     the constant added to the standard deviation, and the number subtracted from n in its divisor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossfns.advantages.samples import Array, Groups, Samples, check_choice, check_scaling, compared, parse_samples


def group_advantages(
    rewards: Any,
    groups: Groups,
    scale: str = "std",
    *,
    eps: float = 1e-6,
    ddof: int = 1,
    group_of_one: str = "zero",
    missing: str = "refuse",
) -> Tensor:
    """(r − group mean) / (group std + 1e-6): advantages relative to the other samples of the same prompt.

    Frameworks disagree on details; the defaults are those of verl and SkyRL but for groups of one. TRL has
    ``eps=1e-4``, Fireworks' cookbook ``eps=1e-8``, OpenRLHF ``eps=1e-9``. verl and SkyRL keep the reward of a group of
    one: ``group_of_one="reward"``. TRL's ``scale_rewards="batch"`` is ``scale="batch"``.

    Args:
        rewards: ``[B]`` finite numbers.
        groups: ``[B]`` hashable labels. Samples with equal labels are one group, in any order.
        scale: ``"std"`` (GRPO, arXiv:2402.03300), ``"none"`` (Dr. GRPO, arXiv:2503.20783), or ``"batch"``: the standard
            deviation is that of all rewards of the batch.
        eps: added to the standard deviation, above 0.
        ddof: 1, or 0 for a standard deviation that divides by n.
        group_of_one: ``"zero"``, or ``"reward"``: the mean of a group of one is taken as 0 and its std as 1.
        missing: ``"refuse"``, or ``"abstain"``: a sample whose reward is None or nan has advantage 0.

    Returns:
        ``[B]`` float64. A group whose rewards are all equal gets exactly 0. So does a group of one, with a warning.
        ``group_metrics`` counts both.

    Raises:
        LossInputError: if a reward is not a finite number, or if there is not one label for each reward.

    >>> group_advantages([1.0, 0.0, 5.0, 5.0], ["a", "a", "b", "b"], scale="none")
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000], dtype=torch.float64)
    >>> group_advantages([1.0, 0.0, None], ["a", "a", "a"], scale="none", missing="abstain")
    tensor([ 0.5000, -0.5000,  0.0000], dtype=torch.float64)
    """
    check_choice("scale", scale, ("std", "none", "batch"))
    eps = check_scaling(eps, ddof)
    s = compared("group_advantages", rewards, groups, missing, group_of_one)
    return s.finish(scaled(s, scale, eps, ddof, group_of_one), group_of_one)


def leave_one_out_advantages(
    rewards: Any, groups: Groups, *, group_of_one: str = "zero", missing: str = "refuse"
) -> Tensor:
    """r − mean of the other rewards of the group, which is n/(n − 1)·(r − group mean). RLOO, arXiv:2402.14740.

    verl's ``rloo`` keeps the reward of a group of one (``group_of_one="reward"``); its ``rloo_vectorized`` and SkyRL
    give 0. TRL's ``normalize_advantages`` is ``batch_advantages`` of the result with ``eps=1e-4, ddof=1``.

    Args:
        rewards, groups, missing: as for ``group_advantages``.
        group_of_one: ``"zero"``, or ``"reward"``: a group of one has no baseline.

    Returns:
        ``[B]`` float64; exactly 0 in a group whose rewards are all equal.

    Raises:
        LossInputError: as ``group_advantages``.

    >>> leave_one_out_advantages([1.0, 0.0, 0.0], ["a", "a", "a"])
    tensor([ 1.0000, -0.5000, -0.5000], dtype=torch.float64)
    """
    s = compared("leave_one_out_advantages", rewards, groups, missing, group_of_one)
    n = s.size[s.index]
    centred = s.rewards - s.baseline(s.mean(s.rewards), group_of_one)
    return s.finish(centred * np.where(n > 1, n / np.maximum(n - 1, 1), 1.0), group_of_one)


def scaled(s: Samples, scale: str, eps: float, ddof: int, group_of_one: str) -> Array:
    """r − group mean, divided by nothing, or by the deviation of the group or of the batch plus eps: ``[B]``."""
    centred: Array = s.rewards - s.baseline(s.mean(s.rewards), group_of_one)
    if scale == "none":
        return centred
    if scale == "batch":
        std = np.std(s.rewards[s.scored], ddof=min(ddof, int(s.scored.sum()) - 1))
    elif group_of_one == "reward":
        std = np.where(s.alone, 1.0, s.std(ddof))
    else:
        std = s.std(ddof)
    return np.asarray(centred / (std + eps))


def groups_with_signal(rewards: Any, groups: Groups, *, missing: str = "refuse") -> Tensor:
    """Return True for each sample whose group has two different rewards: the samples that DAPO's sampling keeps.

    All other samples have advantage 0 relative to their group. A group is kept or dropped as a whole, but a sample that
    abstains is always False. As indices: ``.nonzero().flatten()``. As weights: ``.double()``.

    Args:
        rewards, groups, missing: as for ``group_advantages``.

    Returns:
        ``[B]`` bool.

    Raises:
        LossInputError: as ``group_advantages``.

    >>> kept = groups_with_signal([1.0, 0.0, 5.0, 5.0], ["a", "a", "b", "b"])
    >>> kept.nonzero().flatten().tolist()
    [0, 1]
    """
    s = parse_samples(rewards, groups, missing)
    return torch.from_numpy(s.scored & ~s.constant)


def group_metrics(rewards: Any, groups: Groups, *, missing: str = "refuse") -> dict[str, float]:
    """Return the mean reward, the number of groups, and the shares of groups without a signal.

    Args:
        rewards, groups, missing: as for ``group_advantages``.

    Returns:
        ``reward``: mean reward. ``groups``: number of groups. ``groups_constant``: share of groups without two
        different rewards, and ``groups_of_one``: share of groups with one reward, both in [0, 1]. The samples of either
        have advantage 0, so they have no policy gradient. With ``missing="abstain"`` also ``abstained``: number of
        samples without a reward.

    >>> group_metrics([1.0, 0.0, 5.0, 5.0], ["a", "a", "b", "b"])
    {'reward': 2.75, 'groups': 2.0, 'groups_constant': 0.5, 'groups_of_one': 0.0}
    """
    s = parse_samples(rewards, groups, missing)
    metrics = {
        "reward": float(s.rewards[s.scored].mean()),
        "groups": float(len(s.size)),
        "groups_constant": float(s.constant_groups.mean()),
        "groups_of_one": float((s.size == 1).mean()),
    }
    return metrics | ({"abstained": float((~s.scored).sum())} if missing == "abstain" else {})
