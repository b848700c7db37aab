"""Cases of the preference losses."""

from __future__ import annotations

from collections.abc import Iterator

from tools.vectors.cases.form import HUGE, INF, PAIRS, Case, Situation, data

COMMON = [
    Situation(
        "valid",
        "one pair of unequal lengths behind masked prompts",
        data(
            logprobs="-1 -0.5 -2 -0.25 | -1 -1.5 -0.75",
            weights="0 1 1 1 | 0 1 1",
            ref_logprobs="-1.5 -0.75 -2.5 -0.5 | -1.25 -1.25 -0.5",
        ),
    ),
    Situation(
        "valid",
        "the same pair with its sides exchanged",
        data(
            logprobs="-1 -1.5 -0.75 | -1 -0.5 -2 -0.25",
            weights="0 1 1 | 0 1 1 1",
            ref_logprobs="-1.25 -1.25 -0.5 | -1.5 -0.75 -2.5 -0.5",
        ),
    ),
    Situation(
        "valid",
        "two pairs: neighbours, not halves",
        data(
            logprobs="-1 -0.5 | -2 -1.5 | -0.25 -3 | -4 -0.75",
            weights="1 1 | 1 1 | 1 1 | 1 1",
            ref_logprobs="-1.5 -0.75 | -1 -1.25 | -0.5 -2 | -3 -1",
        ),
    ),
    Situation(
        "valid",
        "three pairs, one ranked wrong",
        data(
            logprobs="-1 | -2 | -4 -1 | -0.5 -0.25 | -0.125 | -3",
            weights="1 | 1 | 1 1 | 1 1 | 1 | 1",
            ref_logprobs="-1.5 | -1 | -2 -1 | -1 -2 | -0.25 | -2",
        ),
    ),
    Situation(
        "valid",
        "each side has its own mask",
        data(
            logprobs="-1 -0.5 -2 -0.25 | -1 -1.5 -0.75 -3",
            weights="0 0 1 1 | 0 1 1 0",
            ref_logprobs="-1.5 -0.75 -2.5 -0.5 | -1.25 -1.25 -0.5 -1",
        ),
    ),
    Situation(
        "valid",
        "a common prefix with the same logprobs, trained on both sides",
        data(
            logprobs="-1 -0.5 -2 | -1 -0.5 -3",
            weights="1 1 1 | 1 1 1",
            ref_logprobs="-1.25 -0.75 -2.5 | -1.25 -0.75 -2",
        ),
    ),
    Situation(
        "valid",
        "the policy is the reference: log 2",
        data(logprobs="-1 -0.5 | -2 -1.5", weights="1 1 | 1 1", ref_logprobs="-1 -0.5 | -2 -1.5"),
    ),
    Situation(
        "valid",
        "both sides alike",
        data(logprobs="-1 -0.5 | -1 -0.5", weights="1 1 | 1 1", ref_logprobs="-1 -0.75 | -1 -0.75"),
    ),
    Situation(
        "edge",
        "zeros between trained tokens",
        data(
            logprobs="-1 -4 -0.5 -2 | -1 -8 -3", weights="1 0 1 1 | 1 0 1", ref_logprobs="-1.5 -1 -0.75 -1 | -2 -0.5 -2"
        ),
    ),
    Situation(
        "edge",
        "fractional weights",
        data(
            logprobs="-1 -0.5 -2 | -1.5 -0.75",
            weights="0.5 2 0.25 | 1.5 1",
            ref_logprobs="-1.5 -0.75 -2.5 | -1.25 -0.5",
        ),
    ),
    Situation(
        "edge",
        "a fully masked pair: out of the mean, its gradients present and 0",
        data(
            logprobs="-1 -0.5 | -2 -1.5 | -0.25 | -4 -1",
            weights="1 1 | 1 1 | 0 | 0 0",
            ref_logprobs="-1.5 -0.75 | -1 -1.25 | -0.5 | -3 -2",
        ),
    ),
    Situation(
        "edge",
        "a pair of two empty responses",
        data(logprobs="-1 -0.5 | -2 | |", weights="1 1 | 1 | |", ref_logprobs="-1.5 -0.75 | -1 | |"),
    ),
    Situation("edge", "sides of one token", data(logprobs="-1 | -0.5", weights="1 | 1", ref_logprobs="-0.5 | -1.5")),
    Situation(
        "edge",
        "nan in masked slots of both sides",
        data(
            logprobs="nan -0.5 -2 | -1.5 nan nan",
            weights="0 1 1 | 1 0 0",
            ref_logprobs="nan -0.75 -2.5 | -1.25 nan nan",
        ),
    ),
    Situation(
        "edge",
        "inf, -inf and huge numbers in masked slots",
        data(
            logprobs=[[INF, -0.5, -INF], [-1.5, HUGE]],
            weights="0 1 0 | 1 0",
            ref_logprobs=[[-INF, -0.75, -INF], [-1.25, -HUGE]],
        ),
    ),
    Situation(
        "valid",
        "one chunk of a larger batch: divided by what it is told",
        data(logprobs="-1 -0.5 | -2 -1.5", weights="1 1 | 1 1", ref_logprobs="-1.5 -0.75 | -1 -1.25"),
        denominator=8.0,
    ),
    Situation(
        "edge",
        "a chunk of which nothing counts",
        data(logprobs="-1 -0.5 | -2 -1.5", weights="0 0 | 0 0", ref_logprobs="-1.5 -0.75 | -1 -1.25"),
        denominator=8.0,
    ),
    Situation(
        "edge",
        "logprobs of 0 and of -10000",
        data(logprobs="0 -0.5 | -10000 -1", weights="1 1 | 1 1", ref_logprobs="-0.25 -0.75 | -10000.5 -1.5"),
    ),
]

MARGINS = [
    Situation(
        "edge", f"a margin of {margin}: the loss is {seen}", data(logprobs=left, weights="1 | 1", ref_logprobs=right)
    )
    for margin, seen, left, right in (
        ("-10000", "linear, its gradient beta", "-10000 | -1", "-1 | -2"),
        ("10000", "0, and its gradient", "-1 | -10000", "-2 | -1"),
        ("-16", "well on its way to linear", "-17 | -1", "-1 | -1"),
        ("16", "small", "-1 | -17", "-1 | -1"),
    )
]

EXTREME_LOGPROBS = [
    Situation("edge", comment, data(logprobs=text, weights="1 | 1"))
    for comment, text in (
        ("a chosen side of probability 1", "0 | -1"),
        ("a chosen side of probability 1 - 2^-20", f"-{2**-20} | -1"),
        ("a chosen side of probability 1 - 2^-30", f"-{2**-30} | -1"),
        ("a chosen side of probability 1 - 2^-40", f"-{2**-40} | -1"),
        ("a rejected side of probability 1 - 2^-20", f"-1 | -{2**-20}"),
        ("a rejected side of probability 1 - 2^-30", f"-1 | -{2**-30}"),
        ("both sides nearly certain", f"-{2**-12} | -{2**-16}"),
        ("a chosen side of -10000", "-10000 | -1"),
        ("a rejected side of -10000", "-1 | -10000"),
        ("both sides of about -50", "-50 | -48"),
        ("both sides near one half", "-0.6875 | -0.75"),
    )
]

UNEQUAL_LENGTHS = Situation(
    "valid",
    "the longer side has the lower sum and the higher mean",
    data(logprobs="-1 -1 -1 -1 | -2 -1.5", weights="1 1 1 1 | 1 1", ref_logprobs="-1.25 -1 -1 -1 | -2 -1.75"),
)


def preferences() -> Iterator[Case]:
    """Yield the cases of the losses over pairs."""
    for loss in PAIRS:
        yield from (situation.case_for(loss) for situation in (*COMMON, UNEQUAL_LENGTHS))
        yield from (COMMON[i].case_for(loss, "summed over pairs", weigh="pair_sum") for i in (0, 2, 3, 10, 15))
    for beta in (0.01, 0.5, 2.0):
        yield from (COMMON[i].case_for("dpo", f"beta {beta}", beta=beta) for i in (0, 2))
    for eps in (0.125, 0.5):
        smoothed = f"label smoothing of {eps}"
        yield from (COMMON[i].case_for("dpo", smoothed, label_smoothing=eps) for i in (0, 2))
    yield COMMON[3].case_for("dpo", "beta 0.5, smoothed", beta=0.5, label_smoothing=0.25, weigh="pair_sum")
    for margin in MARGINS:
        yield from (margin.case_for("dpo", f"beta {beta}", beta=beta) for beta in (0.1, 1.0))
        yield margin.case_for("dpo", "smoothed", label_smoothing=0.25)
    for lam in (0.0, 0.5, 2.0):
        yield from (COMMON[i].case_for("orpo", f"lambda {lam}", lam=lam) for i in (0, 2))
    for situation in EXTREME_LOGPROBS:
        yield situation.case_for("orpo")
        yield situation.case_for("orpo", "lambda 1", lam=1.0)
