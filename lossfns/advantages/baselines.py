"""Advantages whose baseline is not the group mean, or whose scale is not the group's standard deviation.

The options ``missing``, ``group_of_one``, ``eps`` and ``ddof`` are those of ``lossfns.advantages.groups``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossfns.advantages.groups import scaled
from lossfns.advantages.samples import (
    Groups,
    as_number,
    check_choice,
    check_scaling,
    compared,
    parse_lengths,
    parse_rewards,
)
from lossfns.errors import LossInputError


def opo_advantages(
    rewards: Any, groups: Groups, lengths: Any, *, group_of_one: str = "zero", missing: str = "refuse"
) -> Tensor:
    """r − Σ l·r / Σ l over the group, with l the lengths: the baseline of OPO, arXiv:2505.23585.

    It minimises the variance of the gradient if the squared norm of a sample's gradient is proportional to its length.
    With equal lengths it is the group mean.

    Args:
        rewards, groups, missing: as for ``group_advantages``.
        lengths: ``[B]`` active tokens of each sample, at least 0; above 0 for at least one sample of each group.
        group_of_one: ``"zero"``, or ``"reward"``: a group of one has no baseline, as in verl.

    Returns:
        ``[B]`` float64; exactly 0 in a group whose rewards are all equal.

    Raises:
        LossInputError: as ``group_advantages``, or if the lengths of a group are all 0.

    >>> opo_advantages([1.0, 0.0], ["a", "a"], lengths=[3, 1])
    tensor([ 0.2500, -0.7500], dtype=torch.float64)
    """
    s = compared("opo_advantages", rewards, groups, missing, group_of_one)
    n = parse_lengths(lengths, len(s.rewards))
    mass = s.total(n)
    if (mass[s.size > 0] == 0).any():
        raise LossInputError("lengths", "an active token in each group", "a group without", "Drop such a group.")
    b = (s.total(n * s.rewards) / np.where(mass > 0, mass, 1.0))[s.index]
    return s.finish(s.rewards - s.baseline(b, group_of_one), group_of_one)


def pass_at_k_advantages(
    rewards: Any,
    groups: Groups,
    *,
    scale: str = "none",
    eps: float = 1e-6,
    ddof: int = 1,
    missing: str = "refuse",
) -> Tensor:
    """r₁ − r₂ for the best sample of the group, 0 for all others; r₁ and r₂ are the two largest rewards.
    arXiv:2503.19595.

    The objective is the expected maximum of k samples, which is pass@k for rewards 0 and 1; k is the size of the group.
    The baseline of a sample is the maximum of the other samples. If two samples share the maximum, no sample has an
    advantage.

    Args:
        rewards, groups, missing: as for ``group_advantages``.
        scale: ``"none"`` (the paper), or ``"std"``, verl's default: divided by the group's standard deviation + eps.
        eps, ddof: as for ``group_advantages``.

    Returns:
        ``[B]`` float64, at least 0. A group of one has 0, with a warning; verl refuses it.

    Raises:
        LossInputError: as ``group_advantages``.

    >>> pass_at_k_advantages([0.0, 3.0, 1.0], ["a", "a", "a"])
    tensor([0., 2., 0.], dtype=torch.float64)
    """
    check_choice("scale", scale, ("none", "std"))
    eps = check_scaling(eps, ddof)
    s = compared("pass_at_k_advantages", rewards, groups, missing)
    first, second = np.full(len(s.size), -np.inf), np.full(len(s.size), -np.inf)
    np.maximum.at(first, s.index[s.scored], s.rewards[s.scored])
    below = s.scored & (s.rewards < first[s.index])
    np.maximum.at(second, s.index[below], s.rewards[below])
    ties = s.total((s.rewards == first[s.index]).astype(float)) > 1
    best = s.scored & (s.rewards == first[s.index]) & ~ties[s.index] & ~s.constant
    gain = np.where(best, s.rewards - np.where(best, second[s.index], 0.0), 0.0)
    return s.finish(gain if scale == "none" else gain / (s.std(ddof) + eps))


def maxrl_advantages(
    rewards: Any, groups: Groups, *, eps: float = 0.0, group_of_one: str = "zero", missing: str = "refuse"
) -> Tensor:
    """(r − group mean) / group mean, 0 where the mean is 0. MaxRL, arXiv:2602.02710.

    Division by the success rate gives hard prompts more weight: for rewards 0 and 1 and groups of n, the gradient is
    that of the maximum-likelihood objective up to the order n. prime-rl has no eps; SkyRL has ``eps=1e-6`` and
    ``group_of_one="reward"``.

    Args:
        rewards: ``[B]`` finite numbers of at least 0.
        groups, missing: as for ``group_advantages``.
        eps: added to the mean, at least 0.
        group_of_one: ``"zero"``, or ``"reward"``: the advantage of a group of one is its reward.

    Returns:
        ``[B]`` float64; exactly 0 in a group whose rewards are all equal.

    Raises:
        LossInputError: as ``group_advantages``, or if a reward is negative.

    >>> maxrl_advantages([1.0, 0.0, 0.0, 0.0], ["a", "a", "a", "a"])
    tensor([ 3., -1., -1., -1.], dtype=torch.float64)
    """
    eps = as_number("eps", eps, "a finite number of at least 0", lambda x: x >= 0, "It is added to the mean.")
    s = compared("maxrl_advantages", rewards, groups, missing, group_of_one)
    if (s.rewards < 0).any():
        i = int(np.flatnonzero(s.rewards < 0)[0])
        fix = "The mean divides: add a constant, or use group_advantages."
        raise LossInputError(f"rewards[{i}]", "a number of at least 0", f"{s.rewards[i]}", fix)
    mean = s.mean(s.rewards)
    relative = (s.rewards - mean) / np.where(mean + eps > 0, mean + eps, 1.0)
    return s.finish(np.where(s.alone, s.rewards, relative), group_of_one)


def gpg_advantages(
    rewards: Any,
    groups: Groups,
    *,
    alpha: str = "signal",
    scale: str = "none",
    eps: float = 1e-6,
    ddof: int = 1,
    group_of_one: str = "zero",
    missing: str = "refuse",
) -> Tensor:
    """α·(r − group mean) / F with α = B / (B − M). GPG, arXiv:2504.02546.

    M of the B samples are in groups whose rewards are all equal, so they have no gradient. α restores the scale of the
    mean over all B samples.

    Args:
        rewards, groups, missing: as for ``group_advantages``.
        alpha: ``"signal"`` (the paper), or ``"nonzero"``, verl's: B / the number of rewards other than 0.
        scale: F = 1 with ``"none"`` (verl), or the group's standard deviation + eps with ``"std"``.
        eps, ddof: as for ``group_advantages``.
        group_of_one: ``"zero"``, or ``"reward"``: a group of one has no baseline, as in verl.

    Returns:
        ``[B]`` float64; exactly 0 in a group whose rewards are all equal.

    Raises:
        LossInputError: as ``group_advantages``.

    >>> gpg_advantages([1.0, 0.0, 5.0, 5.0], ["a", "a", "b", "b"])
    tensor([ 1., -1.,  0.,  0.], dtype=torch.float64)
    """
    check_choice("alpha", alpha, ("signal", "nonzero"))
    check_choice("scale", scale, ("none", "std"))
    eps = check_scaling(eps, ddof)
    s = compared("gpg_advantages", rewards, groups, missing, group_of_one)
    kept = ~s.constant if alpha == "signal" else s.rewards != 0
    factor = s.scored.sum() / max((s.scored & kept).sum(), 1)
    return s.finish(factor * scaled(s, scale, eps, ddof, group_of_one), group_of_one)


def asymre_advantages(
    rewards: Any, groups: Groups, *, shift: float = -0.1, group_of_one: str = "zero", missing: str = "refuse"
) -> Tensor:
    """r − (group mean + shift). AsymRE, arXiv:2506.20520.

    A shift below 0 raises good samples more than it lowers bad ones, which is stable off-policy. The shift applies to
    every group: where all rewards are equal, the advantage is −shift, not 0.

    Args:
        rewards, groups, missing: as for ``group_advantages``.
        shift: δV of the paper, a finite number; −0.1 in the paper and in Trinity-RFT.
        group_of_one: ``"zero"``, or ``"reward"``: a group of one has no baseline, as in Trinity-RFT.

    Returns:
        ``[B]`` float64.

    Raises:
        LossInputError: as ``group_advantages``.

    >>> asymre_advantages([1.0, 0.0], ["a", "a"])
    tensor([ 0.6000, -0.4000], dtype=torch.float64)
    """
    shift = as_number("shift", shift, "a finite number", lambda x: True, "It is added to the group's mean.")
    s = compared("asymre_advantages", rewards, groups, missing, group_of_one)
    constant = np.where(s.constant, s.rewards, s.mean(s.rewards))  # the mean of equal rewards may round
    advantages = s.rewards - s.baseline(constant + shift, group_of_one)
    silent = ~s.scored | (s.alone if group_of_one == "zero" else False)
    return torch.from_numpy(np.where(silent, 0.0, advantages))


def remax_advantages(rewards: Any, greedy_rewards: Any, *, missing: str = "refuse") -> Tensor:
    """r − the reward of the greedy answer to the same prompt. ReMax, arXiv:2310.10505.

    Args:
        rewards: ``[B]`` finite numbers.
        greedy_rewards: ``[B]`` for each sample, the reward of the greedy answer to its prompt.
        missing: ``"refuse"``, or ``"abstain"``: a sample for which either reward is missing has advantage 0.

    Returns:
        ``[B]`` float64.

    Raises:
        LossInputError: if a reward is not a finite number, or if the two are not of one length.

    >>> remax_advantages([1.0, 0.0], greedy_rewards=[0.5, 0.5])
    tensor([ 0.5000, -0.5000], dtype=torch.float64)
    """
    r, scored = parse_rewards(rewards, missing)
    greedy, known = parse_rewards(greedy_rewards, missing, name="greedy_rewards")
    if len(greedy) != len(r):
        fix = "Repeat the reward of the greedy answer for each sample of its prompt."
        raise LossInputError("greedy_rewards", f"{len(r)} numbers, one per reward", f"{len(greedy)} numbers", fix)
    return torch.from_numpy(np.where(scored & known, r - greedy, 0.0))
