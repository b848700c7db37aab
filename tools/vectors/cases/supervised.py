"""Cases of cross-entropy, with one target and with K targets."""

from __future__ import annotations

from collections.abc import Iterator

from tools.vectors.cases.form import HUGE, INF, NAN, Case, Situation, data, with_every_weighing

ONE_TARGET = [
    Situation(
        "valid",
        "two sequences of different lengths behind masked prompts",
        data(logprobs="-1 -0.5 -2 -0.25 | -3 -1.5", weights="0 1 1 1 | 0 1"),
    ),
    Situation(
        "valid",
        "the same in the other order: the value stays, the gradients change places",
        data(logprobs="-3 -1.5 | -1 -0.5 -2 -0.25", weights="0 1 | 0 1 1 1"),
    ),
    Situation("valid", "one sequence of which every token counts", data(logprobs="-0.5 -1.5 -2.5", weights="1 1 1")),
    Situation(
        "valid",
        "zeros between trained tokens",
        data(logprobs="-1 -4 -0.5 -4 -2 | -1 -8 -3", weights="1 0 1 0 1 | 1 0 1"),
    ),
    Situation("valid", "only the last token is trained", data(logprobs="-1 -2 -4 | -1 -0.5", weights="0 0 1 | 0 1")),
    Situation(
        "edge", "fractional weights are true weights", data(logprobs="-1 -2 -3 | -0.5 -4", weights="0.5 1.5 0.25 | 2 0")
    ),
    Situation(
        "edge",
        "negative weights push their token down",
        data(logprobs="-1 -2 -3 | -0.5 -4", weights="2 -0.5 1 | 1.5 -1"),
    ),
    Situation(
        "edge",
        "a fully masked sequence: out of every denominator, its gradient present and 0",
        data(logprobs="-1 -0.5 -2 | -3 -1.5 | -0.25 -0.75", weights="0 1 1 | 0 0 | 1 1"),
    ),
    Situation("edge", "an empty response: a row of no tokens", data(logprobs="-1 -0.5 | | -2", weights="1 1 | | 1")),
    Situation("edge", "sequences of one token", data(logprobs="-1 | -0.5 | -4", weights="1 | 1 | 1")),
    Situation("edge", "nan in masked slots", data(logprobs="nan -1 nan -2 | nan -0.5", weights="0 1 0 1 | 0 1")),
    Situation(
        "edge",
        "inf, -inf and a huge number in masked slots",
        data(logprobs=[[INF, -1.0, -INF], [HUGE, -0.5, -HUGE]], weights="0 1 0 | 0 1 0"),
    ),
    Situation("edge", "logprobs of 0 and of -10000", data(logprobs="0 -10000 -1 | -2 0", weights="1 1 1 | 1 1")),
    Situation(
        "valid",
        "one chunk of a larger batch: divided by what it is told, not by its own count",
        data(logprobs="-1 -0.5 -2 | -3 -1.5", weights="0 1 1 | 1 1"),
        denominator=16.0,
    ),
    Situation(
        "edge", "a chunk of which nothing counts", data(logprobs="-1 -0.5 | -3", weights="0 0 | 0"), denominator=16.0
    ),
]

TWO_PASS = Situation(
    "edge",
    "weights that are a gradient: the second pass of a custom loss, whose gradient is their negative",
    data(logprobs="-1 -0.5 -2 | -3 -1.5 -0.75", weights="-0.375 0.25 0 | -0.125 -0.5 0.0625"),
)

K_TARGETS = [
    Situation(
        "valid",
        "two candidates with a teacher's probabilities",
        data(
            logprobs=[[[-0.5, -1.5], [-1.0, -2.0], [-0.25, -3.0]], [[-2.0, -0.75]]],
            weights=[[[0.75, 0.25], [0.5, 0.5], [0.875, 0.125]], [[0.25, 0.75]]],
        ),
    ),
    Situation(
        "valid",
        "three candidates, the last of a row unused",
        data(
            logprobs=[[[-0.5, -1.5, -4.0], [-1.0, -2.0, -3.0]], [[-2.0, -0.75, -1.25]]],
            weights=[[[0.5, 0.25, 0.25], [0.75, 0.25, 0.0]], [[0.5, 0.5, 0.0]]],
        ),
    ),
    Situation(
        "edge",
        "one candidate each: plain cross-entropy",
        data(logprobs=[[[-0.5], [-1.5]], [[-2.0]]], weights=[[[1.0], [0.5]], [[1.0]]]),
    ),
    Situation(
        "edge",
        "a column of zeros drops out, -inf and nan in it",
        data(logprobs=[[[-0.5, -INF], [-1.5, NAN]], [[-2.0, INF]]], weights=[[[1.0, 0.0], [0.5, 0.0]], [[1.0, 0.0]]]),
    ),
    Situation(
        "edge",
        "a masked position and a fully masked datum",
        data(logprobs=[[[-0.5, -1.0], [-1.5, -2.5]], [[-2.0, -3.0]]], weights=[[[0.0, 0.0], [0.5, 0.5]], [[0.0, 0.0]]]),
    ),
    Situation("edge", "a datum of no positions", data(logprobs=[[[-0.5, -1.0]], []], weights=[[[0.5, 0.25]], []])),
    Situation(
        "edge",
        "weights of both signs",
        data(
            logprobs=[[[-0.5, -1.0], [-1.5, -2.5]], [[-2.0, -3.0]]], weights=[[[1.0, -0.5], [2.0, 0.5]], [[1.0, -0.25]]]
        ),
    ),
    Situation(
        "valid",
        "as many positions as candidates: rows and columns cannot be told apart by their number",
        data(logprobs=[[[-0.5, -1.0], [-1.5, -2.5]]], weights=[[[1.0, 0.5], [0.25, 0.125]]]),
    ),
    Situation(
        "valid",
        "one chunk of a larger batch: divided by what it is told",
        data(logprobs=[[[-0.5, -1.0], [-1.5, -2.5]]], weights=[[[1.0, 0.5], [0.25, 0.25]]]),
        denominator=8.0,
    ),
]


WITH_EVERY_WEIGHING = {"cross_entropy": (0, 5, 7, 8), "multi_target_cross_entropy": (0, 5)}
"""Loss → the indices of the situations that have a case for every weighing."""


def supervised() -> Iterator[Case]:
    """Yield the cases of both cross-entropies."""
    for loss, situations in (("cross_entropy", ONE_TARGET), ("multi_target_cross_entropy", K_TARGETS)):
        yield from (situation.case_for(loss) for situation in situations)
        chunks = [situation for situation in situations if situation.denominator]
        yield from with_every_weighing(loss, [*(situations[i] for i in WITH_EVERY_WEIGHING[loss]), *chunks])
        yield situations[0].case_for(loss, "a constant length of 3", weigh="fixed_length", length=3)
    yield from (TWO_PASS.case_for("cross_entropy", name, weigh=name) for name in ("token_sum", "sequence_sum_mean"))
