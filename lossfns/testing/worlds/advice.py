"""Where any loss leads in the worlds of its kind, in words. This is advice: no loss is wrong because of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from lossfns.loss import LossFn
from lossfns.testing.worlds.points import proportional
from lossfns.testing.worlds.problems import answers, bandit, corpus, judged, teacher, tree, two_arms
from lossfns.testing.worlds.steps import Enumerated, distance, learn
from lossfns.testing.worlds.world import Policy

STEPS = 24
NEAR = 0.02
"""The largest difference of a probability from a point at which a policy gets the name of this point."""


def advice(loss_fn: LossFn, kind: str, targets: int = 0) -> list[str]:
    """Take exact steps with a loss in the worlds of its kind, and return where they lead.

    Args:
        loss_fn: a function of the contract.
        kind: the kind of loss, a name in ``lossfns.testing.kinds.KINDS``.
        targets: K if the loss takes K targets at each position, else 0.

    Returns:
        A sentence for each world; none for a kind without a world.

    >>> from lossfns import dapo
    >>> for sentence in advice(dapo(clip=(0.8, 1.28)), "policy"):
    ...     print(sentence)
    three arms of reward 0, 1 and 0.5, drawn anew: to 0.00 1.00 0.00, the best arm
    two arms, drawn once: to 0.64 0.36, where the ratios are 1.28 and 0.72 and the gradient is 0
    two right answers of 1 and 2 tokens: they gain alike
    """
    return [sentence(loss_fn) for sentence in ((of_targets,) if targets else SENTENCES.get(kind, ()))]


def described(policy: Policy, points: dict[str, Policy]) -> str:
    """Return the probabilities of a policy and the name of the nearest point, if the policy is near it."""
    shown = " / ".join(" ".join(f"{p:.2f}" for p in row) for row in policy if len(row) > 1)
    name, point = min(points.items(), key=lambda item: distance(policy, item[1]))
    return f"to {shown}, {name if distance(policy, point) < NEAR else 'which is none of the usual points'}"


STAYED = "where it started: is there a gradient?"


def drawn_anew(loss_fn: LossFn) -> str:
    points = {
        "the best arm": ((0.0, 1.0, 0.0),),
        "the worst arm: is a sign wrong?": ((1.0, 0.0, 0.0),),
        STAYED: bandit.start,
        "the reference: is the reward in the loss?": bandit.ref,
    }
    return f"three arms of reward 0, 1 and 0.5, drawn anew: {described(learn(loss_fn, bandit, STEPS)[-1], points)}"


def drawn_once(loss_fn: LossFn) -> str:
    """Take a hundred steps of a hundredth of a nat each. Larger steps could jump over a bound."""
    enumerated = Enumerated.of(loss_fn, two_arms)
    largest = max(map(abs, enumerated.natural_gradient(two_arms.start)[0]))
    if largest == 0:
        return f"two arms, drawn once: {STAYED}"
    policy = learn(loss_fn, two_arms, 100, rate=0.01 / largest)[-1]
    at_rest = max(map(abs, enumerated.natural_gradient(policy)[0])) < 1e-3 * largest
    ratios = [p / q for p, q in zip(policy[0], two_arms.start[0])]
    where = (
        f"where the ratios are {ratios[0]:.2f} and {ratios[1]:.2f} and the gradient is 0" if at_rest else "and further"
    )
    return f"two arms, drawn once: to {policy[0][0]:.2f} {policy[0][1]:.2f}, {where}"


def of_two_lengths(loss_fn: LossFn) -> str:
    """Compare the rates at which log π of two answers of reward 1 grows. The rates are equal if tokens count alike."""
    world = replace(tree, ref=tree.start, rewards=(1.0, 1.0, 0.0))
    direction = Enumerated.of(loss_fn, world).natural_gradient(world.start)
    means = [sum(p * d for p, d in zip(*rows)) for rows in zip(world.start, direction)]
    short, long = (sum(means[n] - direction[n][t] for n, t in steps) for steps in world.sequences[:2])
    if abs(short - long) <= 1e-3 * max(abs(short), abs(long)):
        gain = "they gain alike"
    else:
        gain = f"the {'shorter' if short > long else 'longer'} gains more, a bias by length"
    return f"two right answers of 1 and 2 tokens: {gain}"


def of_judges(loss_fn: LossFn) -> str:
    share = 1 / (1 + math.exp(answers.rewards[1] - answers.rewards[0]))
    points = {
        "the share of the judges": ((share, 1 - share), (1.0,)),
        "all to the preferred answer": ((1.0, 0.0), (1.0,)),
        "all to the other answer: are the sides exchanged?": ((0.0, 1.0), (1.0,)),
        "the reference": answers.ref,
        STAYED: answers.start,
    }
    policy = learn(loss_fn, answers, STEPS)[-1]
    log_odds = math.log(max(policy[0][0], 1e-300) / max(policy[0][1], 1e-300) * answers.ref[0][1] / answers.ref[0][0])
    beta = (answers.rewards[0] - answers.rewards[1]) / log_odds if log_odds else math.inf
    margin = f"; the margin over the reference is that of DPO with beta = {beta:.3g}" if 0 < beta < 20 else ""
    return f"an answer that {share:.0%} of the judges prefer: {described(policy, points)}{margin}"


def of_labels(loss_fn: LossFn) -> str:
    points = {
        "all to the desirable answer": ((1.0, 0.0), (1.0,)),
        "all to the undesirable answer: are the labels exchanged?": ((0.0, 1.0), (1.0,)),
        "the reference": judged.ref,
        STAYED: judged.start,
    }
    return f"answers that are desirable in 80% and 30%: {described(learn(loss_fn, judged, STEPS)[-1], points)}"


def of_data(loss_fn: LossFn) -> str:
    first, second = corpus.old or ()
    points = {
        "the frequencies of the data": (first, second),
        "the frequencies, with long sequences counted less": (proportional((first[0], first[1] / 2)), second),
        "the mode of the data": ((0.0, 1.0), (1.0, 0.0)),
        STAYED: corpus.start,
    }
    return f"sequences of a data set: {described(learn(loss_fn, corpus, STEPS)[-1], points)}"


def of_targets(loss_fn: LossFn) -> str:
    points = {"the weights": teacher.ref, "the mode of the weights": ((1.0, 0.0, 0.0),), STAYED: teacher.start}
    return f"three targets of weights 0.5, 0.4 and 0.1: {described(learn(loss_fn, teacher, STEPS)[-1], points)}"


def of_teacher(loss_fn: LossFn) -> str:
    world = replace(bandit, name="student", ref=teacher.ref)
    points = {
        "the teacher": teacher.ref,
        "the mode of the teacher": ((1.0, 0.0, 0.0),),
        STAYED: bandit.start,
    }
    return (
        f"a teacher of 0.50 0.40 0.10, tokens from the student: {described(learn(loss_fn, world, STEPS)[-1], points)}"
    )


SENTENCES: dict[str, tuple[Callable[[LossFn], str], ...]] = {
    "policy": (drawn_anew, drawn_once, of_two_lengths),
    "likelihood": (of_data,),
    "reweighted": (of_data,),
    "preference": (of_judges,),
    "unpaired": (of_labels,),
    "distillation": (of_teacher,),
}
"""Kind → the functions that return a sentence about where a loss leads."""
