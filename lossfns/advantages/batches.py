"""Advantages that are normalised over the whole batch: every sample then depends on all others.

Compute them on the whole batch, before it is split. The options ``missing``, ``eps`` and ``ddof`` are those of
``lossfns.advantages.groups``. Where ``lengths`` are given, a sample counts once for each of its active tokens, as if
its advantage stood at each token, and the deviation divides by the number of tokens − ddof.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossfns.advantages.groups import scaled
from lossfns.advantages.samples import (
    Array,
    Groups,
    Samples,
    check_scaling,
    compared,
    grouped,
    parse_labels,
    parse_lengths,
    parse_rewards,
    standardized,
)
from lossfns.errors import LossInputError, warn


def batch_advantages(
    rewards: Any, *, lengths: Any = None, eps: float = 1e-6, ddof: int = 0, missing: str = "refuse"
) -> Tensor:
    """(r − batch mean) / (batch std + eps), without groups: PRPO of rLLM.

    Args:
        rewards: ``[B]`` finite numbers: rewards, or advantages that are to be normalised.
        lengths: ``[B]`` active tokens of each sample, if the statistics are to be taken over tokens.
        eps: added to the standard deviation, above 0; 1e-6 in rLLM, 1e-4 in TRL's RLOO.
        ddof: 0 for a standard deviation that divides by n (rLLM), or 1 (TRL's RLOO).
        missing: as for ``group_advantages``.

    Returns:
        ``[B]`` float64; exactly 0 if all rewards are equal.

    Raises:
        LossInputError: if a reward is not a finite number, or if there is not one length for each reward.

    >>> batch_advantages([3.0, 1.0], eps=1e-12)
    tensor([ 1.0000, -1.0000], dtype=torch.float64)
    """
    eps = check_scaling(eps, ddof)
    r, scored = parse_rewards(rewards, missing)
    advantages = standardized(r, token_mass(scored, lengths), eps, ddof)
    return torch.from_numpy(np.where(scored, advantages, 0.0))


def reinforce_plus_plus_baseline_advantages(
    rewards: Any,
    groups: Groups,
    *,
    lengths: Any = None,
    eps: float = 1e-8,
    ddof: int = 1,
    group_of_one: str = "zero",
    missing: str = "refuse",
) -> Tensor:
    """(A − batch mean) / √(batch variance + eps) of A = r − group mean. REINFORCE++-baseline, arXiv:2501.03262.

    verl, OpenRLHF and NeMo-RL take the batch statistics over tokens: pass ``lengths``. verl has ``ddof=1``; OpenRLHF
    and NeMo-RL have ``ddof=0`` and max(variance, eps) in place of variance + eps. rLLM takes the statistics over
    samples.

    Args:
        rewards, groups, missing: as for ``group_advantages``.
        lengths: ``[B]`` active tokens of each sample, if the statistics are to be taken over tokens.
        eps: added to the variance, above 0.
        ddof: 1, or 0 for a variance that divides by n.
        group_of_one: ``"zero"``, or ``"reward"``: a group of one has no baseline, as in verl.

    Returns:
        ``[B]`` float64. Over samples, a group whose rewards are all equal has exactly 0. Over tokens it does not, if
        long samples are better or worse than short ones: the batch mean of A is then not 0.

    Raises:
        LossInputError: as ``group_advantages``.

    >>> reinforce_plus_plus_baseline_advantages([1.0, 0.0, 5.0, 5.0], ["a", "a", "b", "b"], ddof=0)
    tensor([ 1.4142, -1.4142,  0.0000,  0.0000], dtype=torch.float64)
    """
    eps = check_scaling(eps, ddof)
    s = compared("reinforce_plus_plus_baseline_advantages", rewards, groups, missing, group_of_one)
    centred = s.finish(scaled(s, "none", eps, ddof, group_of_one), group_of_one).numpy()
    advantages = standardized(centred, token_mass(s.scored, lengths), eps, ddof, root=True)
    moved = lengths is not None or group_of_one == "reward"
    return torch.from_numpy(np.where(s.scored & (~s.constant | moved), advantages, 0.0))


def gdpo_advantages(
    rewards: Any,
    groups: Groups,
    reward_weights: Sequence[float] | None = None,
    *,
    lengths: Any = None,
    eps: float = 1e-6,
    ddof: int = 1,
    missing: str = "refuse",
) -> Tensor:
    """(S − batch mean) / (batch std + eps) of S = Σₖ wₖ·zₖ, zₖ = (rₖ − group mean) / (group std + eps). GDPO.

    Each of R rewards is normalised within the group before they are summed, so that no reward drowns another; the sum
    is then normalised over the batch. arXiv:2601.05242. TRL's ``normalize_then_sum`` has ``eps=1e-4``. verl normalises
    the sum over tokens (pass ``lengths``) by √(variance + 1e-8). NeMo-RL has leave-one-out baselines.

    Args:
        rewards: ``[B, R]`` numbers, one row for each sample.
        groups: as for ``group_advantages``.
        reward_weights: R weights w; ``None``: all are 1.
        lengths: ``[B]`` active tokens of each sample, if the batch statistics are to be taken over tokens.
        eps, ddof: as for ``group_advantages``, of both normalisations.
        missing: ``"refuse"``, or ``"abstain"``: a reward of None or nan adds nothing to its sample and is not in the
            statistics of this reward; a sample without any reward has advantage 0.

    Returns:
        ``[B]`` float64. Over samples, a group whose rewards are all equal has exactly 0.

    Raises:
        LossInputError: if a reward is not a finite number, or if there is not one label for each row and one weight
            for each reward.

    >>> gdpo_advantages([[1.0, 0.0], [0.0, 9.0]], ["a", "a"], [2.0, 1.0], ddof=0)
    tensor([ 1.0000, -1.0000], dtype=torch.float64)
    """
    eps = check_scaling(eps, ddof)
    r, present = parse_rewards(rewards, missing, ndim=2)
    labels = parse_labels(groups, len(r))
    w = parse_rewards([1.0] * r.shape[1] if reward_weights is None else reward_weights, name="reward_weights")[0]
    if len(w) != r.shape[1]:
        got = f"{len(w)} numbers"
        raise LossInputError("reward_weights", f"{r.shape[1]} numbers, one per reward", got, "Pass one per column.")
    total, constant, alone = np.zeros(len(r)), np.ones(len(r), bool), np.ones(len(r), bool)
    for k, weight in enumerate(w):
        s = Samples(r[:, k], present[:, k], *grouped(labels, present[:, k]))
        total += weight * s.finish(scaled(s, "std", eps, ddof, "zero")).numpy()
        constant &= s.constant
        alone &= s.alone
    if alone.any():
        warn("gdpo_advantages: a group of one has advantage 0; are the groups right?")
    scored = present.any(1)
    advantages = standardized(total, token_mass(scored, lengths), eps, ddof)
    return torch.from_numpy(np.where(scored & (~constant | (lengths is not None)), advantages, 0.0))


def token_mass(scored: Any, lengths: Any) -> Array:
    """Return how much each sample counts: once, or once for each of its active tokens; 0 if it abstains."""
    return np.asarray(scored * (1.0 if lengths is None else parse_lengths(lengths, len(scored))))
