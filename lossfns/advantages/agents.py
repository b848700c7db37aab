"""Advantages of agents: of roles in self-play, of proposers and solvers, and of the steps of an episode."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossfns.advantages.groups import group_advantages, scaled
from lossfns.advantages.samples import (
    Array,
    Groups,
    Samples,
    as_fraction,
    as_number,
    check_choice,
    check_scaling,
    compared,
    grouped,
    hashable,
    parse_labels,
    parse_rewards,
)
from lossfns.checks import check_number
from lossfns.errors import LossInputError, show


def rae_advantages(
    rewards: Any,
    roles: Groups,
    baselines: Mapping[Hashable, float],
    *,
    decay: float = 0.95,
    baseline: str = "updated",
    missing: str = "refuse",
) -> tuple[Tensor, dict[Hashable, float]]:
    """r − b with a running mean b of the rewards of each role: b ← decay·b + (1 − decay)·r. RAE of SPIRAL.

    In self-play the mean of a group is no baseline: in a zero-sum game it is 0. arXiv:2506.24119 compares a reward with
    the running mean of its own role. Samples are processed in order.

    Args:
        rewards: ``[B]`` finite numbers.
        roles: ``[B]`` hashable labels: the role, or the game and the role, of each sample.
        baselines: b of each role before this batch, as the last call returned them; ``{}`` at first. A role that is
            missing starts at 0.
        decay: in [0, 1]; 0.95 in the paper and in prime-rl.
        baseline: ``"updated"``: b is updated with a reward before it is subtracted from this reward, as in the paper.
            ``"previous"``: b is updated afterwards, as in prime-rl, so that it does not depend on the sample.
        missing: as for ``group_advantages``. A sample that abstains leaves b as it is.

    Returns:
        ``[B]`` float64, and the baselines after this batch. ``baselines`` itself is not changed.

    Raises:
        LossInputError: if a reward or baseline is not a finite number, or if there is not one role for each reward.

    >>> rae_advantages([1.0, -1.0], ["first", "second"], {"first": 0.5}, decay=0.5, baseline="previous")
    (tensor([ 0.5000, -1.0000], dtype=torch.float64), {'first': 0.75, 'second': -0.5})
    """
    decay = as_fraction("decay", decay)
    check_choice("baseline", baseline, ("updated", "previous"))
    r, scored = parse_rewards(rewards, missing)
    labels = parse_labels(roles, len(r), name="roles")
    b = defaultdict(float, parse_baselines(baselines))
    advantages = np.zeros(len(r))
    for i in np.flatnonzero(scored):
        previous, role = b[labels[i]], labels[i]
        b[role] = decay * previous + (1 - decay) * float(r[i])
        advantages[i] = r[i] - (b[role] if baseline == "updated" else previous)
    return torch.from_numpy(advantages), dict(b)


def hierarchical_advantages(
    rewards: Any,
    groups: Groups,
    episodes: Groups,
    roles: Groups,
    *,
    episode_roles: Collection[Hashable] = ("solver",),
    missing: str = "refuse",
) -> Tensor:
    """r − mean of the samples of the same role: within the episode for some roles, within the group for others.

    A proposer writes a problem, and solvers try it. Solvers are compared on the same problem, an episode; proposers are
    compared with each other within the group, the task that the problems were written for. This is prime-rl's
    ``hierarchical_grpo``.

    Args:
        rewards: ``[B]`` finite numbers.
        groups, episodes, roles: ``[B]`` hashable labels each. Episodes of different groups are different, even if their
            labels are equal.
        episode_roles: the roles that are compared within an episode.
        missing: as for ``group_advantages``.

    Returns:
        ``[B]`` float64; exactly 0 where all rewards that are compared are equal. Where there is only one, it is 0 with
        a warning.

    Raises:
        LossInputError: as ``group_advantages``.

    >>> roles = ["proposer", "solver", "solver", "proposer", "solver", "solver"]
    >>> hierarchical_advantages([0.5, 1, 0, 0, 1, 1], ["q"] * 6, [1, 1, 1, 2, 2, 2], roles).tolist()
    [0.25, 0.5, -0.5, -0.25, 0.0, 0.0]
    """
    count = len(parse_rewards(rewards, missing)[0])
    if not isinstance(episode_roles, (tuple, list, set, frozenset)) or not all(map(hashable, episode_roles)):
        raise LossInputError("episode_roles", "a tuple of roles", show(episode_roles), 'Pass ("solver",), or ().')
    within_episode = frozenset(episode_roles)
    g, e, a = (parse_labels(x, count, n) for x, n in ((groups, "groups"), (episodes, "episodes"), (roles, "roles")))
    peers = [(role, group, episode if role in within_episode else None) for group, episode, role in zip(g, e, a)]
    in_episode = [role in within_episode for role in a]
    s = compared("hierarchical_advantages", rewards, list(zip(peers, in_episode)), missing)
    return s.finish(scaled(s, "none", 1.0, 0, "zero"))


def gigpo_advantages(
    rewards: Any,
    groups: Groups,
    episodes: Groups,
    states: Groups,
    *,
    omega: float = 1.0,
    gamma: float = 0.95,
    scale: str = "std",
    eps: float = 1e-6,
    ddof: int = 1,
) -> Tensor:
    """A_E + ω·A_S of each step of an episode. GiGPO, arXiv:2505.10978.

    A_E compares the sum of an episode's rewards with the other episodes of its group. A_S compares the discounted
    return Rₜ = Σ_{k >= t} γ^{k−t}·rₖ of a step with the other steps of the group that were taken in the same state. A
    state that occurs once has A_S = 0. Trinity-RFT has ``scale="none"`` and ``gamma=1.0``, and compares states across
    groups.

    Args:
        rewards: ``[B]`` the reward of each step, in the order of the steps within each episode.
        groups, episodes, states: ``[B]`` hashable labels of each step: its task, its episode, and the state in which it
            was taken. Episodes and states of different groups are different, even if their labels are equal.
        omega: ω, a finite number of at least 0.
        gamma: γ in [0, 1].
        scale: ``"std"``, or ``"none"``; the paper reports both.
        eps, ddof: as for ``group_advantages``.

    Returns:
        ``[B]`` float64, one for each step.

    Raises:
        LossInputError: if a reward is not a finite number, or if there are not three labels for each reward.

    >>> gigpo_advantages([0, 1, 0], ["q"] * 3, [1, 1, 2], ["start", "door", "start"], gamma=0.5, scale="none")
    tensor([ 0.7500,  0.5000, -0.7500], dtype=torch.float64)
    """
    omega = as_number("omega", omega, "a finite number of at least 0", lambda x: x >= 0, "It weighs A_S.")
    gamma = as_fraction("gamma", gamma)
    check_choice("scale", scale, ("std", "none"))
    eps = check_scaling(eps, ddof)
    r, _ = parse_rewards(rewards)
    g, e, s = (parse_labels(x, len(r), n) for x, n in ((groups, "groups"), (episodes, "episodes"), (states, "states")))
    everyone = np.ones(len(r), bool)
    episode, _ = grouped(list(zip(g, e)), everyone)
    totals = np.bincount(episode, r)
    group_of_episode = dict(zip(episode.tolist(), g))
    of_episode = group_advantages(
        totals, [group_of_episode[i] for i in range(len(totals))], scale, eps=eps, ddof=ddof
    ).numpy()
    steps = Samples(discounted_returns(r, episode, gamma), everyone, *grouped(list(zip(g, s)), everyone))
    of_state = steps.finish(scaled(steps, scale, eps, ddof, "zero")).numpy()
    return torch.from_numpy(of_episode[episode] + omega * of_state)


def discounted_returns(r: Array, episode: Array, gamma: float) -> Array:
    """Rₜ = rₜ + γ·Rₜ₊₁ along each episode: ``[B] -> [B]``."""
    later = np.zeros(episode.max() + 1)
    returns = np.empty_like(r)
    for i in range(len(r) - 1, -1, -1):
        returns[i] = later[episode[i]] = r[i] + gamma * later[episode[i]]
    return returns


def parse_baselines(baselines: Any) -> dict[Hashable, float]:
    """Return the baseline of each role as a float."""
    fix = "Pass {} at first, then what the last call returned."
    if not isinstance(baselines, Mapping):
        raise LossInputError("baselines", "a mapping from role to number", show(baselines), fix)
    for role, value in baselines.items():
        check_number(f"baselines[{show(role)}]", value, "a finite number", lambda x: True, fix)
    return {role: float(value) for role, value in baselines.items()}
