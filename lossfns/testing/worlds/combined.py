"""Where combinators and sums of losses lead: rows for public functions that take a loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

from lossfns.combine import with_kl, with_tis
from lossfns.errors import LossWarning
from lossfns.losses.policy import ppo
from lossfns.terms import k1, k2, k3
from lossfns.testing.worlds.lesson import BETA, Lesson, Lessons
from lossfns.testing.worlds.points import proportional, tilted, towards_reference
from lossfns.testing.worlds.problems import bandit, reward_of
from lossfns.testing.worlds.world import Policy, World, log_of


def current_logprobs(world: World, i: int, policy: Policy, sampling: Policy) -> list[float]:
    """Return the logprobs of the current policy, as a trainer recomputes them before a single step."""
    return log_of(policy, world, i)


def kl() -> Lessons:
    """k1 has no effect on-policy, k2 leads to ref·exp(r / β), and k3 to β·ref / (λ − r)."""
    start, ref, rewards = bandit.start[0], bandit.ref[0], bandit.rewards
    collapsed = tilted(start, rewards, 1 / 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LossWarning)  # with_kl warns of k1, for the reason that this lesson shows
        yield Lesson(bandit, with_kl(ppo(), BETA, k1), (collapsed,), 10, 1.0, "k1 has no effect")
    yield Lesson(bandit, with_kl(ppo(), BETA, k2), (tilted(ref, rewards, BETA),), 12, None, "k2 leads to ref·exp(r/β)")
    point = towards_reference(ref, rewards, BETA)
    yield Lesson(bandit, with_kl(ppo(), BETA, k3), (point,), 12, None, "k3 leads to β·ref / (λ − r)")


def tis() -> Lessons:
    """Samples of a policy that the old logprobs do not show: the weight π / sampler makes the gradient unbiased.

    Without it, positive rewards as advantages lead to π ∝ sampler·r.
    """
    stale = replace(bandit, name="stale", old=((0.2, 0.2, 0.6),), columns={"old_logprobs": current_logprobs})
    point = tilted(bandit.start[0], bandit.rewards, 1 / 10)
    yield Lesson(stale, with_tis(ppo(), cap=1e6), (point,), 10, 1.0, "an uncapped weight corrects for the sampler")
    positive = replace(stale, rewards=(0.2, 1.0, 0.5), columns=stale.columns | {"advantages": reward_of})
    point = proportional([p * r for p, r in zip((0.2, 0.2, 0.6), positive.rewards)])
    yield Lesson(positive, ppo(), (point,), 12, None, "without the weight, imitates the sampler")


COMBINED: dict[str, Callable[[], Lessons]] = {"with_kl": kl, "with_tis": tis}
"""Public function → its lessons."""
