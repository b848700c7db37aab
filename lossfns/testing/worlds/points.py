"""Where exact gradient steps lead: closed forms, and roots of one unknown, in plain floats.

Notation: π policy, μ sampling policy, ref reference, r reward, V = Σ π·r, A = r − V, β weight of a KL.
A policy is at rest where the expected coefficient of each token, divided by π, is one number for all tokens of a node.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

Row = Sequence[float]


def root(f: Callable[[float], float], low: float, high: float, halvings: int = 40) -> float:
    """Return where f changes its sign, by bisection; if it does not, the end that a rising f would reach 0 at."""
    falling = f(low) > 0 > f(high)
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (low, middle) if (f(middle) > 0) != falling else (middle, high)
    return (low + high) / 2


def proportional(row: Row) -> tuple[float, ...]:
    """x / Σ x."""
    return tuple(x / sum(row) for x in row)


def tilted(prior: Row, scores: Row, beta: float) -> tuple[float, ...]:
    """prior·exp(scores / β) / Z: the maximum of Σ π·score − β·KL(π‖prior).

    Also the policy after n natural steps of rate 1 / (n·β) up the score, from the prior: each step adds the score to
    the logits, and a baseline adds one number to all of them.
    """
    top = max(scores)
    return proportional([p * math.exp((x - top) / beta) for p, x in zip(prior, scores)])


def towards_reference(ref: Row, rewards: Row, beta: float) -> tuple[float, ...]:
    """β·ref / (λ − r), with λ such that the sum is 1: the maximum of Σ π·r − β·KL(ref‖π).

    At rest π·(r − V) + β·(ref − π) = 0, so π = β·ref / (β + V − r).
    """
    top = max(rewards)
    excess = root(lambda x: sum(beta * q / (x + top - r) for q, r in zip(ref, rewards)) - 1, 1e-12, beta + 10)
    return proportional([beta * q / (excess + top - r) for q, r in zip(ref, rewards)])


def two_token_tree(
    ref: tuple[Row, Row], rewards: Row, beta: float, reward_factor: Row, penalty_factor: Row
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The point of rest in a tree with sequences (a), (b, c) and (b, d), under a penalty ½β·(lp − ref)² of each token.

    The factors are of lengths 1 and 2: the reward's f and the penalty's g, by which a loss multiplies every token of a
    sequence. With f = g = 1, tokens count alike. With 1 / length, a long answer counts less at each of its tokens: that
    is the length bias of a mean over sequences of means over tokens (arXiv:2503.20783).

    At the second node f·r − g·β·log(π/ref) is the same for both tokens, so π ∝ ref·exp(f·r / (g·β)). At the first node,
    with Q = Σ π·r of the second, f₁·(r − V) − g₁·β·log(π/ref) of token a equals f₂·(Q − V) − g₂·β·log(π/ref) of token
    b. The penalty of a token is local: it ignores the penalties of the tokens that follow.
    """
    (f1, f2), (g1, g2) = reward_factor, penalty_factor
    second = tilted(ref[1], rewards[1:], beta * g2 / f2)
    q = sum(p * r for p, r in zip(second, rewards[1:]))

    def imbalance(x: float) -> float:
        a, b = 1 / (1 + math.exp(-x)), 1 / (1 + math.exp(x))
        v = a * rewards[0] + b * q
        of_a = f1 * (rewards[0] - v) - g1 * beta * math.log(a / ref[0][0])
        of_b = f2 * (q - v) - g2 * beta * math.log(b / ref[0][1])
        return of_a - of_b

    a = 1 / (1 + math.exp(-root(imbalance, -30, 30)))
    return (a, 1 - a), second


def balanced(frequencies: Row, slope: Callable[[float], float]) -> tuple[float, ...]:
    """π for which f·slope(π) is one number for all tokens of frequencies f; ``slope`` is below 0 and rises."""

    def at(level: float) -> list[float]:
        return [root(partial(excess, level / f), 1e-9, 1 - 1e-9) for f in frequencies]

    def excess(level: float, p: float) -> float:
        return slope(p) - level

    return tuple(at(-math.exp(root(lambda x: 1 - sum(at(-math.exp(x))), -12, 12))))


def where_descent_ends(slope: Callable[[float], float], start: float) -> tuple[float, ...]:
    """(p, 1 − p) where the slope of a loss in p first changes its sign, downhill from the start, else an end.

    The search takes steps of 1 in log(p / (1 − p)), up to ±12.
    """

    def at(x: float) -> float:
        return slope(1 / (1 + math.exp(-x)))

    low = math.log(start / (1 - start))
    direction = -1.0 if at(low) > 0 else 1.0
    while abs(low) < 12 and (at(low + direction) > 0) == (direction < 0):
        low += direction
    end = low + direction
    x = root(at, min(low, end), max(low, end), 20) if abs(low) < 12 else direction * 12
    return 1 / (1 + math.exp(-x)), 1 / (1 + math.exp(x))
