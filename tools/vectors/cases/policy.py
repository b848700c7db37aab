"""Cases of the policy-gradient losses: episodes, ratios beyond the bounds, samplers, references."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tools.vectors.cases.form import (
    CLIPPED,
    GSPO_BOUNDS,
    HUGE,
    PENALISED,
    POLICY,
    SEQUENCE_RATIO,
    SURROGATES,
    WEIGHT_LIMITED,
    WITH_KL,
    Case,
    Situation,
    policy_data,
    with_every_weighing,
)

PLAIN = Situation(
    "valid",
    "two sequences of different lengths behind masked prompts",
    policy_data(
        lp="-1 -0.5 -2 -0.75 | -3 -1.5 -0.75",
        w="0 1 1 1 | 0 1 1",
        adv="1 1 1 1 | -0.5 -0.5 -0.5",
        d="0.5 0.125 -0.125 0.0625 | -0.75 -0.0625 0.125",
        x="-0.5 0.25 -0.5 0.125 | 1 0.5 -0.25",
    ),
)

BY_TOKEN = Situation(
    "valid",
    "advantages that differ by token, zeros between trained tokens",
    policy_data(
        lp="-1 -4 -0.5 -2 | -0.75 -3 -1.25",
        w="1 0 1 1 | 1 0 1",
        adv="1 5 -2 0.5 | -1 -3 2",
        d="0.0625 1 -0.125 0.125 | 0.125 -2 -0.0625",
    ),
)

RAGGED = Situation(
    "edge",
    "fractional weights, a fully masked sequence and an empty one",
    policy_data(
        lp="-1 -0.5 -2 | -3 -1.5 | | -0.75 -1.25",
        w="0.5 1.5 0.25 | 0 0 | | 2 0",
        adv="1 1 1 | 2 2 | | -1 -1",
        d="0.125 -0.0625 0.0625 | 0.5 -0.5 | | 0.125 1",
    ),
)

CHUNK = Situation(
    "valid",
    "one chunk of a larger batch: divided by what it is told, not by its own count",
    policy_data(lp="-1 -0.5 -2 | -3 -1.5", w="0 1 1 | 1 1", adv="1 1 1 | -2 -2", d="1 0.125 -0.0625 | 0.0625 0.125"),
    denominator=16.0,
)

COMMON = [
    PLAIN,
    Situation("valid", "the same in the other order: the value stays, the gradients change places", PLAIN.data[::-1]),
    BY_TOKEN,
    RAGGED,
    CHUNK,
    Situation(
        "edge",
        "a chunk of which nothing counts",
        policy_data(lp="-1 -0.5 | -3", w="0 0 | 0", adv="1 1 | -2", d="0.5 0.25 | 0.5"),
        denominator=16.0,
    ),
    Situation(
        "valid",
        "two datums of one length: a column of the other one would fit",
        policy_data(
            lp="-1 -0.5 -2 | -3 -1.5 -0.75",
            w="1 1 1 | 1 1 1",
            adv="1 1 1 | -2 -2 -2",
            d="0.125 0 0.0625 | 0 -0.125 0.0625",
        ),
    ),
    Situation(
        "valid",
        "on-policy: every ratio is 1",
        policy_data(lp="-1 -0.5 | -3 -1.5 -0.25", w="1 1 | 1 1 1", adv="1 1 | -0.5 -0.5 -0.5", d="0 0 | 0 0 0"),
    ),
    Situation(
        "valid",
        "centred advantages on-policy: the value says nothing, the gradient does",
        policy_data(lp="-1 -0.5 | -2 -1.5", w="1 1 | 1 1", adv="1 1 | -1 -1", d="0 0 | 0 0", x="0 0 | 0 0"),
    ),
    Situation(
        "edge",
        "a datum of advantage 0 still counts in the denominator",
        policy_data(lp="-1 -0.5 -2 | -3 -1.5", w="1 1 1 | 1 1", adv="1 1 1 | 0 0", d="0.125 -0.0625 0 | 0.125 -0.125"),
    ),
    Situation(
        "edge",
        "every advantage 0: no policy gradient at all",
        policy_data(lp="-1 -0.5 | -3 -1.5", w="1 1 | 1 1", adv="0 0 | 0 0", d="0.125 -0.125 | 0.5 0"),
    ),
    Situation(
        "edge",
        "sequences of one token",
        policy_data(lp="-1 | -0.5 | -4", w="1 | 1 | 1", adv="1 | -2 | 0.5", d="0.125 | 0.0625 | -0.125"),
    ),
    Situation(
        "edge",
        "nan in every column of masked slots",
        policy_data(
            lp="nan -1 nan -2 | -0.5 nan",
            w="0 1 0 1 | 1 0",
            adv="nan 1 nan 1 | -1 nan",
            d="0 0.125 0 -0.0625 | 0.0625 0",
        ),
    ),
    Situation(
        "edge",
        "inf, -inf and huge numbers in masked slots",
        policy_data(
            lp=f"-inf -1 {HUGE} | -0.5 inf",
            w="0 1 0 | 1 0",
            adv=f"inf 1 -{HUGE} | -1 -inf",
            old=f"-inf -1.125 -{HUGE} | -0.4375 -inf",
            x="0 0.25 0 | 0.25 0",
        ),
    ),
    Situation(
        "edge",
        "logprobs of 0 and of -10000",
        policy_data(
            lp="0 -10000 -1 | -2 0",
            w="1 1 1 | 1 1",
            adv="1 1 1 | -2 -2",
            old="-0.125 -10000.0625 -1 | -2.125 0",
            x="-0.25 -0.25 0 | 0.5 0",
        ),
    ),
]

BEYOND_CAP = [
    Situation(
        "edge",
        "log-ratios past 20: the ratio and its gradient stop at the cap",
        policy_data(lp="-1 -2 | -0.5 -1.5", w="1 1 | 1 1", adv="1 1 | -1 -1", old="-26 -2 | -0.5 -40"),
    ),
    Situation(
        "edge",
        "log-ratios below -20",
        policy_data(lp="-26 -2 | -0.5 -40", w="1 1 | 1 1", adv="1 1 | -1 -1", old="-1 -2 | -0.5 -1.5"),
    ),
    Situation(
        "edge",
        "a log-ratio of 9999, which exp cannot hold",
        policy_data(lp="-1 -2 | -0.5", w="1 1 | 1", adv="-1 1 | 1", old="-10000 -2 | -0.5", x="-0.25 -0.25 | 0"),
    ),
]

OUT_OF_BOUNDS = [
    Situation(
        "valid",
        "above the upper bound: no gradient where A > 0, all of it where A < 0",
        policy_data(lp="-1 -1 | -1 -1", w="1 1 | 1 1", adv="1 1 | -1 -1", d="0.5 0.75 | 0.5 0.75", x="0 0.25 | 0.25 0"),
    ),
    Situation(
        "valid",
        "below the lower bound: no gradient where A < 0, all of it where A > 0",
        policy_data(
            lp="-1 -1 | -1 -1", w="1 1 | 1 1", adv="1 1 | -1 -1", d="-0.5 -0.75 | -0.5 -0.75", x="0 0.25 | 0.25 0"
        ),
    ),
    Situation(
        "valid",
        "ratios of both sides in one sequence: in the sequence's ratio they cancel, in the tokens' they do not",
        policy_data(
            lp="-1 -1 -2 | -1 -1 -2",
            w="1 1 1 | 1 1 1",
            adv="1 1 1 | -1 -1 -1",
            d="0.75 -0.75 0.125 | 0.75 -0.75 -0.0625",
            x="0 0.25 0.25 | 0.25 0 -0.5",
        ),
    ),
]

SEQUENCE_MEANS = [
    Situation(
        "valid",
        "a small drift at every token: the ratio is the geometric mean, not the product and not the sum",
        policy_data(
            lp="-1 -0.5 -2 -1 -3 -1.5 | -1 -2",
            w="1 1 1 1 1 1 | 1 1",
            adv="1 1 1 1 1 1 | -1 -1",
            d="0.0625 0.0625 0.0625 0.125 0.0625 0 | -0.125 0.0625",
        ),
    ),
    Situation(
        "valid",
        "masked tokens inside a sequence: its ratio is the mean over those that count",
        policy_data(
            lp="-1 -0.5 -2 -1 | -1 -2 -3",
            w="0 1 0 1 | 1 0 1",
            adv="1 1 1 1 | -1 -1 -1",
            d="0.5 0.0625 -0.75 0.125 | -0.125 0.75 0.0625",
        ),
    ),
    Situation(
        "edge",
        "fractional weights weigh the terms and the mean of the log-ratios alike",
        policy_data(
            lp="-1 -0.5 -2 | -1 -2", w="0.25 1 2 | 0.5 1", adv="1 1 1 | -1 -1", d="0.25 0.0625 -0.125 | -0.25 0.125"
        ),
    ),
    Situation(
        "valid",
        "advantages by token: gspo_token gives each token its own, gspo spreads them over the sequence",
        policy_data(
            lp="-1 -0.5 -2 | -1 -2", w="1 1 1 | 1 1", adv="1 -2 4 | -1 3", d="0.125 0.0625 -0.0625 | 0.0625 0.125"
        ),
    ),
]

UNEQUAL_WEIGHTS = Situation(
    "valid",
    "weights of 1 and 0.25: the mean of the log-ratios is (0.5 - 0.25) / 1.25 = 0.2, not -0.25",
    policy_data(lp="-1 -2", w="1 0.25", adv="1 1", old="-1.5 -1"),
)

NEAR_GSPO_BOUNDS = [
    Situation(
        "valid",
        "in GSPO's own window of 3e-4 and 4e-4",
        policy_data(
            lp="-1 -0.5 -2 -1 | -1 -2",
            w="1 1 1 1 | 1 1",
            adv="1 1 1 1 | -1 -1",
            d=f"{2**-12} 0 {2**-12} {2**-13} | -{2**-12} {2**-13}",
        ),
    ),
    Situation(
        "valid",
        "just outside GSPO's own window: a whole sequence is cut",
        policy_data(
            lp="-1 -0.5 -2 -1 | -1 -2 | -1 -1",
            w="1 1 1 1 | 1 1 | 1 1",
            adv="1 1 1 1 | -1 -1 | 1 1",
            d=f"{2**-10} {2**-11} {2**-11} {2**-10} | -{2**-10} -{2**-11} | -{2**-10} -{2**-10}",
        ),
    ),
]

LARGE_RATIOS = Situation(
    "valid",
    "ratios of 7 and of 2 with advantages of both signs",
    policy_data(
        lp="-1 -1 -1 | -1 -1 -1",
        w="1 1 1 | 1 1 1",
        adv="0.5 0.5 0.5 | -1 -1 -1",
        d="2 0.75 0.0625 | 2 0.75 0.0625",
        x="0 0.25 0.25 | 0.25 0 -0.5",
    ),
)
"""For the dual clip, which acts on the ratio 7 and not on the ratio 2."""

NEAR_SAMPLER = Situation(
    "valid",
    "a sampler whose logprobs are off by up to 2 nats",
    policy_data(
        lp="-1 -0.5 -2 | -3 -1.5",
        w="1 1 1 | 1 1",
        adv="1 1 1 | -1 -1",
        d="0.125 -0.0625 0.0625 | 0.0625 -0.125",
        old="-1.125 -0.4375 -2.0625 | -3.0625 -1.375",
        gap="2 -0.25 0.25 | -2 0.5",
    ),
)

UNEQUALLY_WEIGHTED_SAMPLER = Situation(
    "valid",
    "a sampler that is off, and weights that differ: each weight multiplies the log-ratio of its token",
    policy_data(
        lp="-1 -0.5 -2 | -3 -1.5",
        w="0.5 2 0 | 0.25 1",
        adv="1 1 1 | -1 -1",
        d="0.125 -0.0625 0.0625 | 0.0625 -0.125",
        old="-1.125 -0.4375 -2.0625 | -3.0625 -1.375",
        gap="0.5 -0.25 8 | 1 0.25",
    ),
)

FAR_SAMPLER = Situation(
    "edge",
    "a sampler 30 nats away, with masked slots that are further",
    policy_data(
        lp="-1 -0.5 -2 | -40 -1.5",
        w="0 1 1 | 1 1",
        adv="1 1 1 | -1 -1",
        old="-1.125 -0.4375 -2.0625 | -40.0625 -1.375",
        d="0.125 -0.0625 0.0625 | 0.0625 -0.125",
        gap="90 30 0.25 | -30 0.5",
    ),
)

OFF_REFERENCE = Situation(
    "valid",
    "a policy that has left its reference by up to 1.5 nats both ways",
    policy_data(
        lp="-2 -0.5 -3 -1 | -1.5 -2",
        w="1 1 0 1 | 1 1",
        adv="1 1 1 1 | -0.5 -0.5",
        d="0.125 0 1 0.0625 | -0.0625 0.0625",
        x="1.5 -0.5 2 0.25 | -1.5 0.5",
    ),
)

KL_ALONE = Situation(
    "edge",
    "advantages of 0: nothing but the KL, which neither A nor clipping touches",
    policy_data(lp="-2 -0.5 | -1.5 -2", w="1 1 | 1 1", adv="0 0 | 0 0", d="0.75 0 | -0.75 0", x="1.5 -0.5 | -1.5 0.5"),
)

AT_REFERENCE = Situation(
    "edge",
    "at the reference: k2 and k3 and their gradients are 0",
    policy_data(lp="-2 -0.5 | -1.5 -2", w="1 1 | 1 1", adv="1 1 | -1 -1", d="0 0 | 0 0", x="0 0 | 0 0"),
)

FAR_REFERENCE = Situation(
    "edge",
    "a reference more than 20 nats away: k3 and its gradient stop at the cap",
    policy_data(lp="-30 -0.5 | -1 -2", w="1 1 | 1 1", adv="0 0 | 0 0", d="0 0 | 0 0", x="24 0.25 | -26 0.5"),
)

VERY_FAR_REFERENCE = Situation(
    "edge",
    "a reference 9999 nats away, which exp cannot hold",
    policy_data(lp="-10000 -0.5 | -1 -2", w="1 1 | 1 1", adv="1 1 | -1 -1", d="0 0 | 0 0", x="9999 0.25 | -9999 0.5"),
)


LIMITED_WEIGHTS = [
    Situation(
        "valid",
        "above the upper bound: the weight is the bound for either sign of A, and every token has a gradient",
        OUT_OF_BOUNDS[0].data,
    ),
    Situation(
        "valid",
        "below the lower bound: the weight is the bound for either sign of A, and every token has a gradient",
        OUT_OF_BOUNDS[1].data,
    ),
    Situation("valid", "weights at both bounds and between them", OUT_OF_BOUNDS[2].data),
]

OFF_POLICY = Situation(
    "valid",
    "up to 2 nats from the old policy, on both sides of it, with advantages of both signs",
    policy_data(
        lp="-3 -0.5 -2 -1 | -1 -2.5 -0.25",
        w="1 1 0 1 | 1 0.5 1",
        adv="1 1 1 1 | -0.5 -0.5 -0.5",
        d="-2 0.5 3 1 | 2 -1.5 -0.125",
    ),
)

PENALTY_ALONE = Situation(
    "edge",
    "advantages of 0: nothing but the pull back to the old policy",
    policy_data(lp="-2 -0.5 | -1.5 -2", w="1 1 | 1 1", adv="0 0 | 0 0", d="0.75 -0.5 | -1 0"),
)

SOME_ZERO_ADVANTAGES = Situation(
    "edge",
    "some advantages of 0: those tokens are held to the old policy too",
    policy_data(lp="-2 -0.5 -1 | -1.5 -2", w="1 1 1 | 1 1", adv="0 1 0 | -2 0", d="1 0.25 -0.5 | -0.5 1.5"),
)


def policies() -> Iterator[Case]:
    """Yield the cases of all policy losses."""
    for loss in POLICY:
        yield from (situation.case_for(loss) for situation in COMMON)
        yield from with_every_weighing(
            loss, [PLAIN, RAGGED, *([BY_TOKEN] if loss in ("ppo", *SEQUENCE_RATIO) else [CHUNK])]
        )
    for loss in SURROGATES:
        yield from (situation.case_for(loss) for situation in BEYOND_CAP)
        yield from ratio_setting_cases(loss)
    for loss in CLIPPED:
        yield from (situation.case_for(loss) for situation in OUT_OF_BOUNDS)
        asymmetric = "bounds of 0.5 and 2.5"
        yield from (s.case_for(loss, asymmetric, clip=[0.5, 2.5]) for s in OUT_OF_BOUNDS[:2])
    for loss in SEQUENCE_RATIO:
        yield from (situation.case_for(loss) for situation in SEQUENCE_MEANS)
        yield from (
            situation.case_for(loss, "the paper's own bounds", clip=GSPO_BOUNDS)
            for situation in (*NEAR_GSPO_BOUNDS, *OUT_OF_BOUNDS)
        )
        yield SEQUENCE_MEANS[0].case_for(loss, "every token of the batch counts alike", weigh="token_mean")
        yield UNEQUAL_WEIGHTS.case_for(loss, clip=[0.1, 9.0])
        yield UNEQUAL_WEIGHTS.case_for(loss, "the paper's own bounds", clip=GSPO_BOUNDS, weigh="token_mean")
    for loss in WITH_KL:
        yield from kl_cases(loss)
    for loss in WEIGHT_LIMITED:
        yield from limited_weight_cases(loss)
    for loss in PENALISED:
        yield from penalty_cases(loss)


def ratio_setting_cases(loss: str) -> Iterator[Case]:
    """Yield cases of the settings of every loss with a ratio."""
    wide: dict[str, Any] = {"clip": [0.5, 8.0]} if loss in CLIPPED else {}
    yield LARGE_RATIOS.case_for(loss, "a dual clip at 3", dual_clip=3.0, **wide)
    yield LARGE_RATIOS.case_for(loss, "a cap of 0.5 on the log-ratio", log_ratio_cap=0.5, **wide)
    yield BEYOND_CAP[0].case_for(loss, "no cap: the paper's uncapped form", log_ratio_cap=None)
    yield from sampler_cases(loss)
    if loss in ("ppo", "gspo"):
        yield LARGE_RATIOS.case_for(loss, "no cap on the log-ratio, which none reaches", log_ratio_cap=None, **wide)
        yield LARGE_RATIOS.case_for(loss, "a dual clip at 1.5, summed by sequence", dual_clip=1.5,
            **wide | {"weigh": "sequence_sum_mean"})  # fmt: skip
        yield NEAR_SAMPLER.case_for(loss, "sequence weights, summed by sequence", tis_cap=2.0, tis_level="sequence",
            weigh="sequence_sum_mean")  # fmt: skip


def sampler_cases(loss: str) -> Iterator[Case]:
    """Yield cases of the sampler correction, which every loss with old logprobs can have."""
    for cap in (2.0, 1.25):
        yield NEAR_SAMPLER.case_for(loss, f"token weights of at most {cap}", tis_cap=cap)
        yield NEAR_SAMPLER.case_for(loss, f"sequence weights of at most {cap}", tis_cap=cap, tis_level="sequence")
    yield FAR_SAMPLER.case_for(loss, "token weights of at most 2", tis_cap=2.0)
    yield RAGGED.case_for(loss, "with sequence weights", tis_cap=4.0, tis_level="sequence")
    for level in ("sequence", "geometric"):
        yield UNEQUALLY_WEIGHTED_SAMPLER.case_for(loss, f"{level} level", tis_cap=4.0, tis_level=level)
    yield NEAR_SAMPLER.case_for(loss, "geometric level", tis_cap=2.0, tis_level="geometric")


def limited_weight_cases(loss: str) -> Iterator[Case]:
    """Yield cases of the bounds and the cap of a limited weight. Beyond them, a token keeps its gradient."""
    yield from (situation.case_for(loss) for situation in LIMITED_WEIGHTS)
    yield from (s.case_for(loss, "bounds of 0.5 and 2.5", clip=[0.5, 2.5]) for s in LIMITED_WEIGHTS[:2])
    for clip, name in (([0.0, 4.0], "0 and 4"), ([0.0, 2.0], "0 and 2: none from below"), ([1.0, 1.0], "1 and 1")):
        yield LARGE_RATIOS.case_for(loss, f"bounds of {name}", clip=clip)
        yield LIMITED_WEIGHTS[2].case_for(loss, f"bounds of {name}", clip=clip)
    far_away: list[tuple[Situation, str, dict[str, Any]]] = [
        (BEYOND_CAP[0], "log-ratios past 20: the weight is the upper bound", {}),
        (BEYOND_CAP[1], "log-ratios below -20: the weight is the lower bound", {}),
        (BEYOND_CAP[2], "a log-ratio of 9999: the weight is the upper bound", {}),
        (BEYOND_CAP[0], "log-ratios past 20 without a cap: the weight is the upper bound", {"log_ratio_cap": None}),
    ]
    for far, comment, settings in far_away:
        yield far._replace(comment=comment).case_for(loss, **settings)
    yield LARGE_RATIOS.case_for(loss, "a cap of 0.5 on the log-ratio", log_ratio_cap=0.5, clip=[0.5, 8.0])
    yield from sampler_cases(loss)


def penalty_cases(loss: str) -> Iterator[Case]:
    """Yield cases of the penalty on leaving the old policy, which has no cap."""
    for situation in (OFF_POLICY, PENALTY_ALONE, SOME_ZERO_ADVANTAGES):
        yield situation.case_for(loss)
        yield situation.case_for(loss, "the hosted services' default of 0.05", beta=0.05)
        yield situation.case_for(loss, "a beta of 4, each sequence counts alike", beta=4.0, weigh="sequence_mean")
    words = ("log-ratios past 20", "log-ratios below -20", "a log-ratio of 9999")
    for far, word in zip(BEYOND_CAP, words):
        yield far._replace(comment=f"{word}: no cap").case_for(loss)
    yield from sampler_cases(loss)
    yield OFF_POLICY.case_for(loss, "the sampler's weight is the penalty's too", tis_cap=1.5)


def kl_cases(loss: str) -> Iterator[Case]:
    """Yield cases of the KL term."""
    for kl in ("k1", "k2", "k3"):
        yield OFF_REFERENCE.case_for(loss, f"{kl} at 0.5", kl=kl, kl_beta=0.5)
        yield OFF_REFERENCE.case_for(
            loss, f"{kl}, each sequence counts alike", kl=kl, kl_beta=0.5, weigh="sequence_mean"
        )
        yield KL_ALONE.case_for(loss, f"{kl} at 0.125", kl=kl, kl_beta=0.125)
        yield AT_REFERENCE.case_for(loss, kl, kl=kl)
        yield RAGGED.case_for(loss, f"{kl} at 0.5", kl=kl, kl_beta=0.5)
    yield FAR_REFERENCE.case_for(loss)
    yield FAR_REFERENCE.case_for(loss, "k2, which has no cap", kl="k2")
    yield VERY_FAR_REFERENCE.case_for(loss)
    yield OFF_REFERENCE.case_for(loss, "a KL of 0, its reference not read", kl_beta=0.0)
    yield OFF_REFERENCE.case_for(loss, "the default of 0.001", kl_beta=0.001)
    yield OFF_REFERENCE.case_for(loss, "a KL of 4", kl_beta=4.0)
    yield NEAR_SAMPLER.case_for(loss, "the sampler's weight is not the KL's", tis_cap=1.25, kl_beta=2.0)
    yield LARGE_RATIOS.case_for(loss, "the dual clip is not the KL's", dual_clip=1.5, clip=[0.5, 8.0], kl_beta=2.0)
    yield OUT_OF_BOUNDS[0].case_for(loss, "clipping is not the KL's", kl_beta=2.0)
