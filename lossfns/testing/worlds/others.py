"""Where the other losses lead: likelihoods, teachers, pairs and labels; rows as in ``policy``."""

from __future__ import annotations

import math
from typing import Any

from lossfns.loss import Loss
from lossfns.testing import oracle
from lossfns.testing.batch import Batch
from lossfns.testing.worlds.lesson import BETA, Lesson, Lessons, Preset, made
from lossfns.testing.worlds.points import proportional, where_descent_ends
from lossfns.testing.worlds.problems import answers, corpus, judged, teacher
from lossfns.testing.worlds.world import Enumerated, Policy, World, sigmoid
from lossfns.tokens import PAIRS
from lossfns.weigh import sequence_mean, token_mean


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


def rest(loss: Loss, world: World) -> Policy:
    """Return the policy (p, 1 − p) over two answers at which the oracle's expected gradient is 0, by bisection."""
    settings = {name: getattr(value, "name", getattr(value, "__name__", value)) for name, value in loss.knobs.items()}

    def gradients(batch: Batch, count: Any) -> list[float]:
        rows = {"logprobs": batch.logprobs, "weights": batch.weights, **batch.columns}
        _, grads = getattr(oracle, loss.name)(**rows, **settings, denominator=count)
        return [g for row in grads for g in row]

    expected = Enumerated(gradients, world, loss.reads, loss)
    certain = world.start[1:]  # the second token of an answer, if there is one
    return where_descent_ends(lambda p: expected.natural_gradient(((p, 1 - p), *certain))[0][0]), *certain


def paired(name: str, preset: Preset) -> Lessons:
    """A preference loss ends where its expected gradient is 0."""
    loss = made(preset, beta=1.0)
    if loss.rows == PAIRS:
        says = "ends where the oracle's expected gradient is 0"
        yield Lesson(answers, loss, rest(loss, answers), 12, None, says)


def margin(name: str, preset: Preset) -> Lessons:
    """DPO: β·(log π/ref of one answer − that of the other) is the log-odds of the preference, score − score."""
    if name == "dpo":
        one, other = answers.ref[0]
        for smoothing in (0.0, 0.1):
            p = sigmoid(answers.rewards[0] - answers.rewards[1])
            p = (1 - smoothing) * p + smoothing * (1 - p)
            x = math.log(p / (1 - p)) / BETA + math.log(one / other)
            loss = preset(beta=BETA, label_smoothing=smoothing)
            says = "its margin is the log-odds of the preference, over β"
            yield Lesson(answers, loss, ((sigmoid(x), sigmoid(-x)), (1.0,)), 12, None, says)


def sorted_by_label(name: str, preset: Preset) -> Lessons:
    """KTO's value is the highest where all goes to answers that are desirable more often than not: it seeks a mode."""
    if name == "kto":
        point = ((1.0, 0.0), (1.0,))
        yield Lesson(judged, made(preset, beta=1.0), point, 20, None, "all to the answer that is mostly desirable")


OTHER_ROWS = (likelihood, teaching, paired, margin, sorted_by_label)
