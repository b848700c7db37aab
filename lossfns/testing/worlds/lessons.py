"""The table: for each loss, where exact gradient steps lead, and why.

A row is a function ``(name, preset) -> lessons``. It applies to every preset that its first lines accept, so losses
with one fixed point share a row.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from lossfns.combine import with_kl
from lossfns.errors import LossInputError
from lossfns.loss import Loss, LossFn
from lossfns.terms import k2
from lossfns.testing import oracle
from lossfns.testing.public import presets
from lossfns.testing.worlds.points import proportional, tilted, towards_reference, two_sequences, two_token_tree
from lossfns.testing.worlds.world import (
    Policy,
    World,
    distance,
    labelled,
    learn,
    outcomes,
    position,
    preferences,
    sigmoid,
)
from lossfns.tokens import PAIRS
from lossfns.weigh import sequence_mean, token_mean

Preset = Callable[..., Loss]
CLOSE = 1e-3
"""The largest distance from a point, of a probability, at which the point is reached."""
BETA = 0.5
"""The weight β of penalties in these worlds."""


class Lesson(NamedTuple):
    """Where a loss leads in a world.

    Attributes:
        world: the world.
        loss: the loss, with its settings.
        point: the policy that it reaches.
        steps: the number of steps after which it is there.
        rate: the size of a step; None: the two-point rule.
        says: the lesson in words.
    """

    world: World
    loss: Loss
    point: Policy
    steps: int
    rate: float | None
    says: str

    def miss(self, loss_fn: LossFn | None = None) -> float:
        """Return the distance from the point after the steps, of the loss or of another one with its denominators."""
        return distance(
            learn(loss_fn or self.loss, self.world, self.steps, rate=self.rate, like=self.loss)[-1], self.point
        )

    def holds(self, loss_fn: LossFn | None = None) -> bool:
        """Return whether the loss, or another one with its denominators, comes within ``CLOSE`` of the point."""
        return self.miss(loss_fn) < CLOSE


# Rows

Lessons = Iterator[Lesson]


def made(preset: Preset, **knobs: Any) -> Loss:
    """Call a preset with those of these knobs that it has."""
    has = inspect.signature(preset).parameters
    return preset(**{name: value for name, value in knobs.items() if name in has})


def is_policy(preset: Preset) -> bool:
    """Return whether a loss has advantages."""
    return "advantages" in preset().reads


def collapse(name: str, preset: Preset) -> Lessons:
    """Without a KL, the policy collapses on the best arm, at a stated rate.

    On-policy every ratio is 1, where all these losses have the gradient of −A·lp. A natural step of rate η then adds
    η·r to the logits, so that after n steps π ∝ start·exp(η·n·r).
    """
    if is_policy(preset):
        point = tilted(bandit.start[0], bandit.rewards, 1 / 10)
        yield Lesson(bandit, made(preset, kl_beta=0.0), (point,), 10, 1.0, "collapses on the best arm, as exp(n·r)")


def penalised(name: str, preset: Preset) -> Lessons:
    """With a penalty ½β(lp − ref)² of every token, π ∝ ref·exp(r / β); a mean over sequences has a length bias."""
    if not is_policy(preset):
        return
    for weigh, factor in ((token_mean, (1.0, 1.0)), (sequence_mean, (1.0, 0.5))):
        own = "kl" in inspect.signature(preset).parameters
        loss = made(preset, weigh=weigh, **({"kl": k2, "kl_beta": BETA} if own else {}))
        loss = loss if own else with_kl(loss, BETA, k2)
        point = two_token_tree(tree.ref, tree.rewards, BETA, factor, factor)  # type: ignore[arg-type]
        bias = "" if weigh is token_mean else ", biased by the lengths"
        yield Lesson(tree, loss, point, 12, None, f"reaches ref·exp(r/β) at every token{bias}")


def own_kl(name: str, preset: Preset) -> Lessons:
    """k3 in the loss has the gradient of KL(ref‖π): the policy reaches β·ref / (λ − r), not ref·exp(r / β)."""
    if "kl_beta" in inspect.signature(preset).parameters:
        point = towards_reference(bandit.ref[0], bandit.rewards, BETA)
        yield Lesson(bandit, made(preset, kl_beta=BETA), (point,), 12, None, "k3 leads to β·ref / (λ − r)")


STOPS = {"ppo", "grpo", "dapo", "gspo", "gspo_token"}
"""Losses that stop at their bounds while the samples are not drawn anew: the gradient ends for r > high where A > 0,
and for r < low where A < 0."""
CONTINUES = {"importance_sampling", "cispo"}
"""Losses that keep the gradient −r·A·∇lp of every sample: on fixed samples they follow the policy gradient."""


def bounded(name: str, preset: Preset) -> Lessons:
    """On fixed samples, clipping ends the learning at the bounds: π = μ·high for the good arm, μ·low for the bad one.

    Before that the gradient is unbiased. Its natural step of rate η adds η·(r₁ − r₀) to the log-odds, so that eight
    steps of an eighth of the bound's log-odds reach it. Four more have no effect.
    """
    if name in STOPS:
        loss = made(preset, clip=(0.8, 1.2), kl_beta=0.0)
        rate = math.log(0.6 / 0.4) / 8 * (1 + 1e-5)
        yield Lesson(two_arms, loss, ((0.6, 0.4),), 12, rate, "stops at its bounds on fixed samples")
        loss = made(preset, clip=(0.0, 1e6), kl_beta=0.0)
        yield Lesson(two_arms, loss, (tilted((0.5, 0.5), two_arms.rewards, 1 / 10),), 10, 1.0,
            "without its bounds, continues on fixed samples")  # fmt: skip


def continuing(name: str, preset: Preset) -> Lessons:
    """On fixed samples, an importance weight without a bound gives the policy gradient, and the policy collapses."""
    if name in CONTINUES:
        point = tilted((0.5, 0.5), two_arms.rewards, 1 / 10)
        yield Lesson(two_arms, preset(), (point,), 10, 1.0, "continues to the best arm on fixed samples")


def cloned(name: str, preset: Preset) -> Lessons:
    """Without a ratio, fixed samples are imitated: with positive rewards as advantages, π ∝ μ·r."""
    if is_policy(preset) and "old_logprobs" not in preset().reads:
        arms = replace(bandit, old=bandit.start, rewards=(0.2, 1.0, 0.5), columns={"advantages": reward_of})
        point = proportional([p * r for p, r in zip(bandit.start[0], arms.rewards)])
        yield Lesson(arms, preset(), (point,), 12, None, "imitates fixed samples in proportion to their reward")


def reward_of(world: World, i: int, policy: Policy, old: Policy) -> list[float]:
    """Return the reward of a sequence as its advantage."""
    return [world.rewards[i]] * len(world.sequences[i])


def soft_advantage(world: World, i: int, policy: Policy, old: Policy) -> list[float]:
    """Return r − V for the soft value V = β·log Σ μ·exp(r / β)."""
    soft = BETA * math.log(sum(p * math.exp(r / BETA) for p, r in zip(old[0], world.rewards)))
    return [world.rewards[i] - soft] * len(world.sequences[i])


def direct(name: str, preset: Preset) -> Lessons:
    """On fixed samples with the soft value as baseline, a squared error of A − β·log(π/μ) leads to π ∝ μ·exp(r / β)."""
    if name == "dro":
        arms = replace(bandit, old=bandit.start, columns={"advantages": soft_advantage})
        point = tilted(bandit.start[0], bandit.rewards, BETA)
        yield Lesson(arms, preset(beta=BETA), (point,), 12, None, "reaches μ·exp(r/β) on fixed samples")


def likelihood(name: str, preset: Preset) -> Lessons:
    """The likelihood leads to the frequencies of the data; a mean over sequences counts long ones less by token."""
    if name == "cross_entropy":
        first, second = corpus.old or ()
        yield Lesson(corpus, preset(weigh=token_mean), (first, second), 12, None, "reaches the frequencies of the data")
        biased = proportional((first[0], first[1] / 2))
        yield Lesson(corpus, preset(weigh=sequence_mean), (biased, second), 12, None, "counts long sequences less")


def teaching(name: str, preset: Preset) -> Lessons:
    """Cross-entropy to a teacher's probabilities leads to them."""
    if name == "multi_target_cross_entropy":
        yield Lesson(teacher, preset(), teacher.ref, 12, None, "reaches the teacher")


def paired(name: str, preset: Preset) -> Lessons:
    """A preference loss ends where its expected slope is 0, found by bisection with the oracle's slopes."""
    loss = made(preset, beta=1.0)
    if loss.rows == PAIRS:
        yield Lesson(answers, loss, (two_sequences(lambda *lp: expected_slope(loss, *lp)), (1.0,)), 12, None,
            "ends where the oracle's expected slope is 0")  # fmt: skip


def expected_slope(loss: Loss, *logprobs: float) -> float:
    """Return the slope in log(p / (1 − p)) of the expected loss over both orders of the two answers, by the oracle."""
    lengths = [len(steps) for steps in answers.sequences]
    rows = [[lp] + [0.0] * (n - 1) for lp, n in zip(logprobs, lengths)]
    refs = [[math.log(p)] + [0.0] * (n - 1) for p, n in zip(answers.ref[0], lengths)]
    by_log_odds = (1 - math.exp(logprobs[0]), -math.exp(logprobs[0]))
    knobs = {name: getattr(value, "name", value) for name, value in loss.knobs.items()}
    slope = 0.0
    for chosen, rejected in ((0, 1), (1, 0)):
        both = (chosen, rejected)
        columns = {"logprobs": [rows[i] for i in both], "weights": [[1.0] * lengths[i] for i in both]}
        columns |= {"ref_logprobs": [refs[i] for i in both]} if "ref_logprobs" in loss.reads else {}
        _, grads = getattr(oracle, loss.name)(**columns, **knobs)
        probability = sigmoid(answers.rewards[chosen] - answers.rewards[rejected])
        slope += probability * sum(grad[0] * by_log_odds[i] for grad, i in zip(grads, both))
    return slope


def margin(name: str, preset: Preset) -> Lessons:
    """DPO: β·(log π/ref of one answer − that of the other) is the log-odds of the preference, score − score."""
    if name == "dpo":
        one, other = answers.ref[0]
        for smoothing in (0.0, 0.1):
            p = sigmoid(answers.rewards[0] - answers.rewards[1])
            p = (1 - smoothing) * p + smoothing * (1 - p)
            x = math.log(p / (1 - p)) / BETA + math.log(one / other)
            says = "its margin is the log-odds of the preference, over β"
            yield Lesson(answers, preset(beta=BETA, label_smoothing=smoothing), ((sigmoid(x), sigmoid(-x)), (1.0,)), 12,
                None, says)  # fmt: skip


ROWS = (collapse, penalised, own_kl, bounded, continuing, cloned, direct, likelihood, teaching, paired, margin)


def lessons(name: str) -> list[Lesson]:
    """Return what a preset learns.

    Raises:
        LossInputError: if no row of the table is about it.
    """
    preset = presets()[name]
    found = [lesson for row in ROWS for lesson in row(name, preset)]
    if not found:
        fix = "Add a row, or its name to a row, in lossfns/testing/worlds/lessons.py."
        raise LossInputError(name, "a world that says where it leads", "none", fix)
    return found
