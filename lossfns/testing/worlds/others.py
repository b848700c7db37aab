"""Where the other losses lead: likelihoods, teachers, pairs and labels. Rows are functions as in ``policy``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from lossfns.loss import Loss
from lossfns.testing import oracle
from lossfns.testing.batch import Batch
from lossfns.testing.worlds.lesson import BETA, CLOSE, Lesson, Lessons, Preset, made
from lossfns.testing.worlds.points import balanced, proportional, root, tilted, where_descent_ends
from lossfns.testing.worlds.problems import answers, bandit, candidates, corpus, judged, letters, reward_model, teacher
from lossfns.testing.worlds.steps import Enumerated, Slope, follow
from lossfns.testing.worlds.world import Policy, World, alike, outcomes, returned, sigmoid
from lossfns.tokens import PAIRS
from lossfns.weigh import sequence_mean, token_mean

teacher_only = replace(teacher, columns={})
"""The teacher without its probabilities as weights."""


def likelihood(name: str, preset: Preset) -> Lessons:
    """The likelihood leads to the frequencies of the data; a mean over sequences gives long ones less weight."""
    if name == "cross_entropy":
        first, second = corpus.old or ()
        yield Lesson(corpus, preset(weigh=token_mean), (first, second), 12, None, "reaches the frequencies of the data")
        biased = proportional((first[0], first[1] / 2))
        yield Lesson(corpus, preset(weigh=sequence_mean), (biased, second), 12, None, "counts long sequences less")


def reweighted(name: str, preset: Preset) -> Lessons:
    """A re-weighted likelihood has a biased point of rest, where frequency · slope(π) is one number for all tokens.

    The slope is that of the term in π, with weights that have no gradient as constants: −1 / π for cross-entropy, and
    −1 for DFT. Then d log π = frequency, and the policy collapses on the mode of the data, as exp(n·frequency).
    """
    q = letters.old[0] if letters.old else ()
    if name == "dft":
        point = tilted(letters.start[0], q, 1 / 48)
        yield Lesson(letters, preset(), (point,), 12, 4.0, "collapses on the mode of the data, as exp(n·frequency)")
    if name == "focal":
        for gamma in (0.0, 2.0):
            point = balanced(q, partial(focal_slope, gamma=gamma))
            yield Lesson(letters, preset(gamma=gamma), (point,), 12, None, "flattens the frequencies for γ above 0")
    if name == "sft_phi":
        point = balanced(q, lambda p: p - 1)
        yield Lesson(letters, preset(), (point,), 20, None, "sharpens the frequencies: f·(1 − π) is one number")
    if name == "unlikelihood":
        point = tuple(1 - 2 * x for x in q)
        yield Lesson(letters, preset(), (point,), 20, None, "leaves 1 − 2·frequency of three unwanted tokens")
    if name == "eaft":
        yield Lesson(letters, preset(), letters.old or (), 20, None, "reaches the frequencies: the entropy is common")


def focal_slope(p: float, gamma: float) -> float:
    """d/dp of −(1 − p)^γ·log p."""
    return gamma * math.pow(1 - p, gamma - 1) * math.log(p) - math.pow(1 - p, gamma) / p


def teaching(name: str, preset: Preset) -> Lessons:
    """Cross-entropy to a teacher's probabilities leads to them."""
    if name == "multi_target_cross_entropy":
        yield Lesson(teacher, preset(), teacher.ref, 12, None, "reaches the teacher")


def distilled(name: str, preset: Preset) -> Lessons:
    """Divergences on all tokens, or with a tail, lead to the teacher; raw ones on K tokens may not.

    Let q be the teacher's K probabilities, and Q their sum. The tail has no cost. Then π rests where the slope of the
    divergence in π is one number: 0, the slope of the tail. Forward: −q / π = −Q, so that π = q / Q and the tail is
    forgotten. Reverse: log(π / q) + 1 = 0, so that π = q / e and the tail takes the rest. The mean of both, and JSD,
    rest at q.
    """
    if not name.startswith("top_k"):
        return
    yield Lesson(
        teacher_only, made(preset, support="renormalised_support"), teacher.ref, 12, None, "reaches the teacher"
    )
    yield Lesson(candidates, made(preset, support="tail_support"), candidates.ref, 12, None, "reaches teacher and tail")
    q = candidates.ref[0][:3]
    by = {"top_k_forward_kl": 1 / sum(q), "top_k_reverse_kl": math.exp(-1)}.get(name, 1.0)
    point = (*(by * x for x in q), 1 - by * sum(q))
    says = {"top_k_forward_kl": "raw: forgets the tail", "top_k_reverse_kl": "raw: flees to the tail, π = q / e"}
    yield Lesson(candidates, made(preset, support="raw_support"), (point,), 20, None, says.get(name, "raw: reaches q"))


def sampled(name: str, preset: Preset) -> Lessons:
    """The teacher's log-ratio as advantage leads to the teacher.

    On fixed samples, the ratio to the sampler as advantage leads to the token that the teacher raises most over it; the
    ratio to the current policy leads to the teacher.
    """
    student = replace(bandit, name="student", ref=teacher.ref)
    fixed = replace(student, old=student.start)
    if name in ("sampled_reverse_kl", "prime_ref_kl"):
        yield Lesson(student, preset(), teacher.ref, 12, None, "reaches the teacher")
    if name == "sampled_reverse_kl":
        point = tilted(student.start[0], [math.log(q / p) for q, p in zip(student.ref[0], student.start[0])], 1 / 30)
        yield Lesson(fixed, preset(), (point,), 10, 3.0, "on fixed samples collapses on the largest teacher / sampler")
    if name == "prime_ref_kl":
        loss = preset(delta_low=1.0, kl_tau=0.0)
        yield Lesson(fixed, loss, teacher.ref, 12, None, "on fixed samples reaches the teacher, too")


def by_oracle(loss: Loss, world: World) -> Enumerated:
    """Return the expected gradient of the oracle of a loss, in plain floats."""
    settings = {name: getattr(value, "name", getattr(value, "__name__", value)) for name, value in loss.knobs.items()}

    def gradients(batch: Batch, count: Any) -> list[Slope]:
        rows = {"logprobs": batch.logprobs, "weights": batch.weights, **batch.columns}
        _, grads = getattr(oracle, loss.name)(**rows, **settings, denominator=count)
        return [(g, 0.0) for row in grads for g in row]

    return Enumerated(gradients, world, loss.reads, loss)


def point_of_rest(loss: Loss, world: World) -> Policy:
    """Return the policy (p, 1 − p) over two answers at which the oracle's expected gradient is 0, by bisection."""
    expected = by_oracle(loss, world)
    certain = world.start[1:]  # the second token of an answer, if there is one

    def slope(p: float) -> float:
        return expected.natural_gradient(((p, 1 - p), *certain))[0][0]

    return where_descent_ends(slope, world.start[0][0]), *certain


PAIR_KNOBS = {"alpha_dpo": {"alpha": 1.0}, "c2_dpo": {"lam": 0.5}, "dpop": {"lam": 2.0}}
"""Settings that make a small term larger, or a large term smaller, so that its effect shows."""
KINKED = {"hinge": (60, 0.9), "dpop": (60, 0.9), "minor_dpo": (90, 0.93)}
"""Losses that end at a kink, where steps must become small: the number of steps, and their decay."""
PAIR_WORLDS = {
    "alpha_dpo": replace(answers, ref=((0.99, 0.01), (1.0,))),
    "bpo": replace(answers, rewards=(3.0, 0.0)),
}
"""Worlds for losses that show little effect in ``answers``.

α-DPO depends only on which pairs of a group have the larger margin over the reference. BPO leaves the reference only if
most of the judges prefer one answer.
"""


def paired(name: str, preset: Preset) -> Lessons:
    """A preference loss ends where its expected gradient is 0. Some losses give all probability to one answer.

    For these the path is compared too: a few steps lead as far as steps with the oracle's gradient.
    """
    if preset().rows != PAIRS or preset().output == "scores":
        return
    loss = made(preset, **{"beta": 1.0} | PAIR_KNOBS.get(name, {}))
    world = PAIR_WORLDS.get(name, answers)
    point, says = point_of_rest(loss, world), "ends where the oracle's expected gradient is 0"
    if name in KINKED:
        steps, decay = KINKED[name]
        yield Lesson(world, loss, point, steps, 0.5, f"{says}, at a kink", decay)
    else:
        yield Lesson(world, loss, point, 15, None, says)
    if max(point[0]) > 1 - CLOSE:
        on_the_way = follow(by_oracle(loss, world), 3, 1.0)[-1]
        yield Lesson(world, loss, on_the_way, 3, 1.0, "all to one answer, as fast as with the oracle's gradient")


MARGINS: dict[str, tuple[dict[str, float], Callable[[float], float]]] = {
    "dpo": ({"label_smoothing": 0.1}, lambda p: log_odds(0.9 * p + 0.1 * (1 - p)) / BETA),
    "robust_dpo": ({"flip_rate": 0.1}, lambda p: log_odds((p - 0.1) / (1 - 2 * 0.1)) / BETA),
    "ipo": ({}, lambda p: (2 * p - 1) / (2 * BETA)),
}
"""Loss → settings, and the margin that a share p of the judges leads to: the log-odds of p, or a mean target."""


def margin(name: str, preset: Preset) -> Lessons:
    """The margin m, which is log(π/ref) of one answer minus that of the other, in closed form.

    A logistic loss rests where σ(β·m) is the expected label. This is p, which label smoothing moves towards ½, and
    robust DPO away from ½. A squared loss with the target ±1 / (2β) rests at the mean target. For one answer of two, π
    is σ(m + log-odds of ref).
    """
    if name in MARGINS:
        knobs, of_share = MARGINS[name]
        p, prior = sigmoid(answers.rewards[0] - answers.rewards[1]), log_odds(answers.ref[0][0])
        settings = [(knobs, of_share(p))] + ([({}, log_odds(p) / BETA)] if name == "dpo" else [])
        for setting, m in settings:
            point = (sigmoid(m + prior), sigmoid(-m - prior))
            yield Lesson(answers, made(preset, beta=BETA, **setting), (point, (1.0,)), 12, None, "the margin of theory")


def log_odds(p: float) -> float:
    """log(p / (1 − p))."""
    return math.log(p / (1 - p))


def labelled(name: str, preset: Preset) -> Lessons:
    """KTO seeks a mode, BCO is a classifier, and SPPO and A*-PO are regressions.

    KTO leads to the answer that is desirable more often than not. If two answers are, it rests between them, since the
    gain of each is bounded. BCO rests where β·(log π/ref − z) is the log-odds log(d / (1 − d)) of the label, so that π
    ∝ ref·odds^(1/β); the world has the z for which the sum is 1. SPPO rests at π = ref·exp((P − ½) / β), if these sum
    to 1. A*-PO rests at ref·exp((R − V*) / β), whose sum is 1 by the definition of V*.
    """
    if name == "kto":
        point = ((1.0, 0.0), (1.0,))
        yield Lesson(judged, made(preset, beta=1.0), point, 20, None, "all to the answer that is mostly desirable")
        liked = replace(judged, name="liked", rewards=(0.8, 0.6))
        loss = made(preset, beta=1.0, undesirable_weight=0.5)
        says = "between two answers that are both mostly desirable, where the oracle's expected gradient is 0"
        yield Lesson(liked, loss, point_of_rest(loss, liked), 20, None, says)
    if name == "bco":
        odds = [ref * d / (1 - d) for ref, d in zip(judged.ref[0], judged.rewards)]
        z = -math.log(sum(odds))
        shifted = replace(judged, columns={"reference_point": lambda world, i, policy, old: alike(world, i, z)})
        says = "reaches ref·odds of the label"
        yield Lesson(shifted, made(preset, beta=1.0), (proportional(odds), (1.0,)), 20, None, says)
    if name == "real":
        says = "ends where the oracle's expected gradient is 0"
        yield Lesson(judged, preset(), point_of_rest(preset(), judged), 20, None, says)
    if name == "a2po":
        optimum = tilted(judged.ref[0], judged.rewards, BETA)
        v = BETA * math.log(sum(q * math.exp(r / BETA) for q, r in zip(judged.ref[0], judged.rewards)))
        rated = replace(judged, units=outcomes, columns={"reference_point": lambda w, i, policy, old: alike(w, i, v)})
        yield Lesson(rated, made(preset, beta=BETA), (optimum, (1.0,)), 12, None, "reaches ref·exp((R − V*)/β)")
    if name == "sppo":
        target = (0.75, 0.25)
        wins = tuple(0.5 + math.log(p / ref) for p, ref in zip(target, judged.ref[0]))
        rated = replace(judged, name="rated", units=outcomes, rewards=wins)
        yield Lesson(rated, made(preset, beta=1.0), (target, (1.0,)), 12, None, "reaches ref·exp((P − ½)/β)")


def scored(name: str, preset: Preset) -> Lessons:
    """Scores: the log-odds of the preference between two answers, or of a label; values: the mean of the returns."""
    one, other = answers.rewards
    half = (one - other) / 2
    if name == "bradley_terry":
        says = "the difference of scores is the log-odds of the preference"
        yield Lesson(reward_model, preset(), ((half, -half),), 12, None, says)
    if name == "bradley_terry_margin":
        p = sigmoid(one - other)
        m = root(lambda m: (1 - p) * sigmoid(m + 0.25) - p * sigmoid(0.25 - m), -9, 9)
        yield Lesson(reward_model, preset(), ((m / 2, -m / 2),), 12, None, "a target margin widens the difference")
    if name == "value_loss":
        values = replace(reward_model, name="values", units=returned, rewards=(0.8, 0.3), old=((0.5, 0.5),))
        yield Lesson(values, preset(value_clip=None), (values.rewards,), 12, None, "the value is the mean return")
        says = "stops at its bound from the old value"
        yield Lesson(values, preset(value_clip=0.2), ((0.2, 0.2),), 90, 0.3, says, 0.93)
    if name == "process_reward":
        steps = replace(reward_model, name="steps", units=outcomes, rewards=(0.8, 0.3), old=((0.5, 0.5),))
        point = tuple(log_odds(y) for y in steps.rewards)
        yield Lesson(steps, preset(), (point,), 12, None, "the score is the log-odds of a right step")


OTHER_ROWS = (likelihood, reweighted, teaching, distilled, sampled, paired, margin, labelled, scored)
