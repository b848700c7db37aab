"""Where combinators and sums of losses lead: lessons for public functions that take a loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from lossfns.combine import with_kl, with_tis
from lossfns.entropy import with_entropy, with_sampled_entropy
from lossfns.errors import LossWarning
from lossfns.loss import Loss
from lossfns.losses.policy import ppo, reinforce
from lossfns.losses.preference import dpo
from lossfns.losses.summed import chord, rpo
from lossfns.terms import k1, k2, k3
from lossfns.testing.worlds.lesson import BETA, Lesson, Lessons
from lossfns.testing.worlds.points import proportional, tilted, towards_reference, where_descent_ends
from lossfns.testing.worlds.problems import answers, bandit, reward_of
from lossfns.testing.worlds.world import Policy, Unit, World, log_of, outcomes, sigmoid


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
    """With samples of another policy than the old one, the weight old / sampler makes the gradient unbiased.

    Without it, positive rewards as advantages lead to π ∝ sampler·r.
    """
    stale = replace(bandit, name="stale", old=((0.2, 0.2, 0.6),), columns={"old_logprobs": current_logprobs})
    point = tilted(bandit.start[0], bandit.rewards, 1 / 10)
    yield Lesson(stale, with_tis(ppo(), cap=1e6), (point,), 10, 1.0, "an uncapped weight corrects for the sampler")
    positive = replace(stale, rewards=(0.2, 1.0, 0.5), columns=stale.columns | {"advantages": reward_of})
    point = proportional([p * r for p, r in zip((0.2, 0.2, 0.6), positive.rewards)])
    yield Lesson(positive, ppo(), (point,), 12, None, "without the weight, imitates the sampler")


def entropy(combinator: Callable[[Loss, float], Loss]) -> Lessons:
    """V + α·H has its maximum at π ∝ exp(r / α), whether H is exact or estimated from the samples."""
    point = tilted((1.0, 1.0, 1.0), bandit.rewards, BETA)
    yield Lesson(bandit, combinator(ppo(), BETA), (point,), 12, None, "an entropy bonus leads to exp(r/α)")


EXPERT = (0.5, 0.2, 0.3)
"""The answers of an expert, beside the rollouts."""


def with_expert(world: World, sampling: Policy) -> list[Unit]:
    """Rollouts with the weights of the policy loss, and as many datums of an expert with the weights of SFT."""
    rollouts, expert = {"weights": (1.0,), "sft_weights": (0.0,)}, {"weights": (0.0,), "sft_weights": (1.0,)}
    return [
        *(unit._replace(probability=unit.probability / 2, columns=rollouts) for unit in outcomes(world, sampling)),
        *(Unit(q / 2, (i,), expert) for i, q in enumerate(EXPERT)),
    ]


def expert_sum() -> Lessons:
    """(1 − μ)·policy + μ·SFT has the gradient of V − β·KL(expert‖π) with β = μ / (1 − μ): π = β·expert / (λ − r)."""
    point = towards_reference(EXPERT, bandit.rewards, 0.25 / 0.75)
    world = replace(bandit, name="expert", units=with_expert)
    yield Lesson(world, chord(reinforce(), mu=0.25), (point,), 12, None, "reaches β·expert / (λ − r)")


def preference_sum() -> Lessons:
    """DPO plus α·NLL, the mean over tokens of the chosen side: the slope in the one unknown p has two parts."""
    share, prior, alpha = sigmoid(answers.rewards[0] - answers.rewards[1]), math.log(0.6 / 0.4), 0.5

    def slope(p: float) -> float:
        margin = math.log(p / (1 - p)) - prior
        return sigmoid(margin) - share - alpha * (share * (1 - p) - (1 - share) * p / 2)

    point = where_descent_ends(slope, 0.5), (1.0,)
    yield Lesson(answers, rpo(dpo(beta=1.0), alpha), point, 12, None, "less certain of the margin, surer of the answer")


COMBINED: dict[str, Callable[[], Lessons]] = {
    "with_kl": kl,
    "with_tis": tis,
    "with_entropy": partial(entropy, with_entropy),
    "with_sampled_entropy": partial(entropy, with_sampled_entropy),
    "chord": expert_sum,
    "rpo": preference_sum,
}
"""Public function → its lessons."""
