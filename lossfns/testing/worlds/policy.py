"""Where policy losses lead: rows ``(name, preset) -> lessons``. The condition of a row selects its presets.

"Drawn anew" means on-policy: the current policy samples for each step. "Fixed samples" are those of the first policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lossfns.combine import with_kl
from lossfns.loss import Loss
from lossfns.terms import k2
from lossfns.testing.worlds.lesson import BETA, Lesson, Lessons, Preset, knobs_of, made
from lossfns.testing.worlds.points import proportional, root, tilted, towards_reference, two_token_tree
from lossfns.testing.worlds.problems import bandit, reward_of, tree, two_arms
from lossfns.testing.worlds.world import Policy, World
from lossfns.tokens import Tokens
from lossfns.weigh import sequence_mean, token_mean


def is_policy(preset: Preset) -> bool:
    """Return whether a preset makes a loss that reads advantages."""
    return "advantages" in preset().reads


SLOPES: dict[str, Callable[[Loss], float]] = {"opmd": lambda loss: 1 / (1 + loss.knobs["tau"])}
"""Loss → the factor of its gradient on-policy, where it is not that of −A·lp."""


def slope(name: str, loss: Loss) -> float:
    """Return the factor of a loss's gradient on-policy."""
    return SLOPES[name](loss) if name in SLOPES else 1.0


def collapse(name: str, preset: Preset) -> Lessons:
    """Without a KL, the policy collapses on the best arm, at a known rate.

    On-policy every ratio is 1, where all these losses have the gradient of −A·lp, up to a factor. A natural step of
    rate η then adds η·r to the logits, so that after n steps π ∝ start·exp(η·n·r).
    """
    if is_policy(preset):
        loss = made(preset, weigh=token_mean, kl_beta=0.0)
        point = tilted(bandit.start[0], bandit.rewards, 1 / 5)
        yield Lesson(bandit, loss, (point,), 5, 1 / slope(name, loss), "collapses on the best arm, as exp(n·r)")


def penalised(name: str, preset: Preset) -> Lessons:
    """With a penalty ½β(lp − ref)² of every token, π ∝ ref·exp(r / β); a mean over sequences has a length bias."""
    if not is_policy(preset):
        return
    for weigh in (token_mean, sequence_mean) if "weigh" in knobs_of(preset) else (None,):
        has_kl = "kl" in knobs_of(preset)
        loss = made(preset, weigh=weigh, **({"kl": k2, "kl_beta": BETA} if has_kl else {}))
        short, long = (x * slope(name, loss) for x in REWARD_BY_LENGTH.get(name, (1.0, 1.0)))
        loss = loss if has_kl else with_kl(loss, BETA, k2)
        share = share_by_length(loss)
        factor = share[0] * short, share[1] * long
        point = two_token_tree((tree.ref[0], tree.ref[1]), tree.rewards, BETA, factor, share)
        bias = "" if factor[0] == factor[1] and share[0] == share[1] else ", biased by the lengths"
        yield Lesson(tree, loss, point, 8, None, f"reaches ref·exp(r/β) at every token{bias}")


REWARD_BY_LENGTH = {"rloo": (1.0, 2.0)}
"""Loss → the factors of A·lp of each token in sequences of 1 and 2 tokens, where they are not 1. The ratio of a whole
sequence is the ratio of each of its tokens, and has a gradient in all of them."""


def share_by_length(loss: Loss) -> tuple[float, float]:
    """Return the coefficient of a token in a sequence of one token, and in one of two."""
    one, two = (float(loss.share(Tokens(torch.zeros(n), torch.ones(n)))[0]) for n in (1, 2))
    return one, two


def own_kl(name: str, preset: Preset) -> Lessons:
    """k3 in the loss has the gradient of KL(ref‖π): the policy reaches β·ref / (λ − r), not ref·exp(r / β)."""
    if "kl_beta" in knobs_of(preset):
        point = towards_reference(bandit.ref[0], bandit.rewards, BETA)
        yield Lesson(bandit, made(preset, kl_beta=BETA), (point,), 12, None, "k3 leads to β·ref / (λ − r)")


CLIP = {"clip": (0.8, 1.2)}
CLIPPED = ("ppo", "grpo", "dapo", "bnpo", "dr_grpo", "gspo", "gspo_token", "luspo", "rloo", "gmpo", "rollout_is")
STOPS: dict[str, tuple[dict[str, Any], float]] = {
    **dict.fromkeys((*CLIPPED, "clip_cov", "m2po"), (CLIP, 0.6)),
    "opsm": (CLIP | {"delta": 100.0}, 0.6),
    "fipo": (CLIP | {"weight_clip": (1.0, 1.0)}, 0.6),
    "dppo_tv": ({"delta_low": 0.2, "delta_high": 0.2}, 0.7),
    "dppo_kl": ({"delta_low": 0.05, "delta_high": 0.05}, (1 + math.sqrt(1 - math.exp(-0.1))) / 2),
    "prime_dppo": ({"delta_low": 0.2, "delta_high": 0.2, "kl_tau": 0.0}, 0.7),
    "prime_symmetric": ({"delta": 0.1, "kl_tau": 0.0}, 0.6),
}
"""Losses that stop at their bounds on fixed samples: settings, and π of the good arm at the bound.

The gradient ends for r > high where A > 0, and for r < low where A < 0. With the total variation as bound it ends at a
distance of δ, and with KL(μ‖π) = −½·log(4·π·(1 − π)) where this is δ.
"""
WITHOUT_BOUNDS = {"clip": (0.0, 1e6), "delta": 100.0, "delta_low": 100.0, "delta_high": 100.0}
STOPS_UNWEIGHTED = {"sppo_token", "rec", "rec_ring"}
"""Losses that stop at their bounds, and until then have the gradient of −A·lp, without the ratio."""
CONTINUES = {"importance_sampling", "cispo", "cispo_sequence", "capped_importance_sampling", "kl_cov"}
"""Losses that keep the gradient −r·A·∇lp of every sample: on fixed samples they follow the policy gradient."""
SLOWS_DOWN = {"sapo", "topr", "vespo", "ce_gppo"}
"""Losses whose gradient fades on fixed samples, and is 0 nowhere."""


def bounded(name: str, preset: Preset) -> Lessons:
    """On fixed samples, clipping ends the learning at the bounds: π = μ·high for the good arm, μ·low for the bad one.

    Before that the gradient is unbiased. Its natural step of rate η adds η·(r₁ − r₀) to the log-odds, so that four
    steps of a quarter of the bound's log-odds reach it. Two more have no effect. Without the ratio in the gradient, a
    step adds ¼η·(1/π₁ + 1/π₀), so the steps have to become smaller towards the bound.
    """
    says = "stops at its bounds on fixed samples"
    if name in STOPS:
        knobs, p = STOPS[name]
        loss = made(preset, **knobs, kl_beta=0.0, weigh=token_mean)
        rate = math.log(p / (1 - p)) / 4 * (1 + 1e-5)
        yield Lesson(two_arms, loss, ((p, 1 - p),), 6, rate, says)
    if name in STOPS_UNWEIGHTED:
        yield Lesson(two_arms, made(preset, **CLIP), ((0.6, 0.4),), 40, 0.042, says, 0.9)


def unbounded(name: str, preset: Preset) -> Lessons:
    """On fixed samples, an importance weight without a bound gives the policy gradient, and the policy collapses.

    A soft gate slows this down without an end: its slope is nowhere 0.
    """
    point = (tilted((0.5, 0.5), two_arms.rewards, 1 / 10),)
    if name in STOPS:
        loss = made(preset, **STOPS[name][0] | WITHOUT_BOUNDS, kl_beta=0.0, weigh=token_mean)
        yield Lesson(two_arms, loss, point, 5, 2.0, "without its bounds, continues on fixed samples")
    if name in CONTINUES:
        yield Lesson(two_arms, preset(), point, 5, 2.0, "continues to the best arm on fixed samples")
    if name in SLOWS_DOWN:
        yield Lesson(two_arms, preset(), ((1.0, 0.0),), 20, None, "slows down on fixed samples, and does not stop")


def squared_penalty(name: str, preset: Preset) -> Lessons:
    """On fixed samples, r·A and a penalty τ·(lp − μ)² rest where a step no longer changes the log-odds.

    A natural step adds (r₁ − r₀) − τ·(d₁/π₁ − d₀/π₀) to the log-odds, with d = log(π/μ) and μ = ½.
    """
    if name.startswith("prime_") and is_policy(preset):
        p = root(lambda p: math.log(2 * p) / p - math.log(2 - 2 * p) / (1 - p) - 1, 0.5, 0.9)
        loss = made(preset, kl_tau=1.0, delta=1.0, delta_low=1.0, delta_high=1.0)
        yield Lesson(two_arms, loss, ((p, 1 - p),), 12, None, "rests where the penalty balances the reward")


def cloned(name: str, preset: Preset) -> Lessons:
    """Without a ratio, fixed samples are imitated: with positive rewards as advantages, π ∝ μ·r."""
    if is_policy(preset) and {"old_logprobs", "sampler_logprobs"}.isdisjoint(preset().reads):
        arms = replace(bandit, old=bandit.start, rewards=(0.2, 1.0, 0.5), columns={"advantages": reward_of})
        point = proportional([p * r for p, r in zip(bandit.start[0], arms.rewards)])
        yield Lesson(arms, preset(), (point,), 12, None, "imitates fixed samples in proportion to their reward")


def soft_advantage(world: World, i: int, policy: Policy, old: Policy) -> list[float]:
    """Return r − V for the soft value V = β·log Σ μ·exp(r / β)."""
    soft = BETA * math.log(sum(p * math.exp(r / BETA) for p, r in zip(old[0], world.rewards)))
    return [world.rewards[i] - soft] * len(world.sequences[i])


def direct(name: str, preset: Preset) -> Lessons:
    """On fixed samples with the soft value as baseline, a squared error of A − β·log(π/μ) leads to π ∝ μ·exp(r / β)."""
    if name in ("dro", "kimi15"):
        arms = replace(bandit, old=bandit.start, columns={"advantages": soft_advantage})
        point = tilted(bandit.start[0], bandit.rewards, BETA)
        yield Lesson(arms, made(preset, beta=BETA, tau=BETA), (point,), 12, None, "reaches μ·exp(r/β) on fixed samples")


POLICY_ROWS = (collapse, penalised, own_kl, bounded, unbounded, squared_penalty, cloned, direct)
