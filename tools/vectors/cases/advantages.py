"""Cases of the estimators of advantages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from lossfns.testing.vectors.vector import SAMPLE_FIELDS
from tools.vectors.cases.form import Case, Data


def samples(rewards: Sequence[float], groups: Sequence[Any]) -> Data:
    """Return samples with a reward and a group."""
    return [{"reward": float(reward), "group": group} for reward, group in zip(rewards, groups, strict=True)]


GROUPS: list[tuple[str, str, Data]] = [
    ("valid", "one group of two", samples([1, 0], "aa")),
    ("valid", "one group of four", samples([1, 0, 0.5, 2], "aaaa")),
    ("valid", "two groups in a row", samples([1, 0, 3, 5], "aabb")),
    ("valid", "two groups, interleaved", samples([1, 10, 0, 14], "abab")),
    ("valid", "groups of different sizes", samples([1, 0, 2, 5, 9], "aaabb")),
    ("valid", "three groups out of order", samples([1, 7, 4, 3, 9, 5], "cabbac")),
    ("valid", "labels that are numbers", samples([1, 7, 4, 3], [7, 3, 3, 7])),
    ("valid", "negative rewards", samples([-1, -3, 2, -0.5], "aaaa")),
    ("valid", "the same rewards with 100 more", samples([101, 100, 103, 105], "aabb")),
    ("valid", "rewards of 0 and 1", samples([1, 0, 0, 0, 1, 1, 1, 0], "aaaabbbb")),
    ("edge", "a group whose rewards agree", samples([2, 2, 2], "aaa")),
    ("edge", "a group whose rewards of 0.1 agree", samples([0.1, 0.1, 0.1], "aaa")),
    (
        "edge",
        "groups that agree on 0.1 and on 0.7, beside one that does not",
        samples([0.1, 0.1, 0.1, 0.7, 0.7, 0.7, 1, 0], "aaabbbcc"),
    ),
    ("edge", "a group of one", samples([3], "a")),
    ("edge", "a group of one beside one of two", samples([3, 1, 0], "abb")),
    ("edge", "every group has one sample", samples([3, 1, 0], "abc")),
    ("edge", "rewards that differ by 2^-20", samples([1, 1 + 2**-20, 1], "aaa")),
    ("edge", "large rewards", samples([1e6, -1e6, 2e6], "aaa")),
]


def group_advantage_cases() -> Iterator[Case]:
    """Yield the cases of ``group_advantages``, with and without division by the deviation."""
    for scale in ("std", "none"):
        for kind, comment, rewards in GROUPS:
            words = f"{comment}; centred only" if scale == "none" else comment
            yield Case("group_advantages", kind, words, {"scale": scale}, rewards)


SCALING: dict[str, Any] = {"eps": 1e-6, "ddof": 1}
ALONE: dict[str, Any] = {"group_of_one": "zero"}
SCALED: dict[str, list[Any]] = {"scale": ["none"], "eps": [0.125], "ddof": [0]}
ESTIMATORS: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "leave_one_out_advantages": (ALONE, {"group_of_one": ["reward"]}),
    "opo_advantages": (ALONE, {"group_of_one": ["reward"]}),
    "pass_at_k_advantages": ({"scale": "std", **SCALING}, SCALED),
    "maxrl_advantages": ({"eps": 0.0, **ALONE}, {"eps": [0.125], "group_of_one": ["reward"]}),
    "gpg_advantages": (
        {"alpha": "signal", "scale": "std", **SCALING, **ALONE},
        {"alpha": ["nonzero"], **SCALED, "group_of_one": ["reward"]},
    ),
    "asymre_advantages": ({"shift": -0.125, **ALONE}, {"shift": [0.0, 0.25], "group_of_one": ["reward"]}),
    "batch_advantages": ({"eps": 1e-6, "ddof": 0}, {"eps": [0.125], "ddof": [1]}),
    "reinforce_plus_plus_baseline_advantages": (
        {"eps": 1e-8, "ddof": 1, **ALONE},
        {"eps": [0.125], "ddof": [0], "group_of_one": ["reward"]},
    ),
    "remax_advantages": ({}, {}),
    "gdpo_advantages": (
        {"reward_weights": [1.0, -0.5], **SCALING},
        {"reward_weights": [[0.25, 2.0]], "eps": [0.125], "ddof": [0]},
    ),
    "rae_advantages": ({"decay": 0.75, "baseline": "updated"}, {"decay": [0.0, 0.5], "baseline": ["previous"]}),
    "hierarchical_advantages": ({}, {}),
    "gigpo_advantages": (
        {"omega": 1.0, "gamma": 0.5, "scale": "std", **SCALING},
        {"omega": [0.25], "gamma": [1.0], **SCALED},
    ),
}
"""The settings of each estimator, and other values of some of them."""

FIELDS: dict[str, tuple[str, ...]] = {
    "opo_advantages": ("reward", "group", "length"),
    "batch_advantages": ("reward",),
    "remax_advantages": ("reward", "greedy_reward"),
    "gdpo_advantages": ("rewards", "group"),
    "rae_advantages": ("reward", "role"),
    "hierarchical_advantages": ("reward", "group", "role", "episode"),
    "gigpo_advantages": ("reward", "group", "episode", "state"),
}
"""The fields of the samples of an estimator, if it has others than a reward and a group."""

TURNS: dict[str, tuple[Any, ...]] = {
    "length": (3.0, 1.0, 4.0, 2.0, 5.0),
    "greedy_reward": (0.5, 1.0, 0.0),
    "role": ("solver", "proposer", "solver"),
    "episode": (1, 1, 2, 2),
    "state": ("x", "y"),
}


def fill(loss: str, given: Data) -> Data:
    """Return samples with the fields that an estimator reads."""
    filled = []
    for i, sample in enumerate(given):
        fields = {name: turns[i % len(turns)] for name, turns in TURNS.items()}
        fields |= {"rewards": [sample["reward"], (0.5, 2.0, 2.0, -1.0)[i % 4]], **sample}
        filled.append({name: fields[name] for name in FIELDS.get(loss, ("reward", "group"))})
    return filled


def estimator_cases() -> Iterator[Case]:
    """Yield the cases of the other estimators of samples: every situation, each setting changed, and abstentions."""
    for loss, (config, others) in ESTIMATORS.items():
        drawn = []  # without their groups, two situations may be the same
        changed = [(f"; {name} {value}", {name: value}) for name, values in others.items() for value in values]
        for suffix, settings in [("", {}), *changed]:
            for kind, comment, given in GROUPS if not settings else (GROUPS[5], GROUPS[12], GROUPS[14], MIXED):
                if loss == "maxrl_advantages" and any(sample["reward"] < 0 for sample in given):
                    continue
                case = Case(loss, kind, f"{comment}{suffix}", config | settings, fill(loss, given))
                if (case.config, case.data) not in drawn:
                    drawn.append((case.config, case.data))
                    yield case
        if loss != "gigpo_advantages":
            for comment, rewards, groups in ABSTAINING:
                data = missing(loss, rewards, groups)
                yield Case(loss, "edge", comment, config | {"missing": "abstain"}, data)


MIXED = (
    "valid",
    "groups of four, three, two and one, out of order",
    samples([1, 0, 2, 0, 5, 3, 0, 1, 4, 2], "abacdbabac"),
)
ABSTAINING = [
    ("a sample abstains", [1, None, 0, 0.5], "aaaa"),
    ("a group of two of which one abstains", [1, None, 3, 0], "aabb"),
    ("a group that abstains beside one that does not", [None, None, 3, 0], "aabb"),
    ("a group that agrees but for one that abstains", [2, 2, None, 3, 0], "aaabb"),
]


def missing(loss: str, rewards: Sequence[float | None], groups: str) -> Data:
    """Return samples of which some have the reward nan."""
    given = samples([math.nan if r is None else r for r in rewards], groups)
    filled = fill(loss, given)
    for row in filled:
        if "rewards" in row and math.isnan(row["rewards"][0]):
            row["rewards"] = [math.nan] * 2
    return filled


def estimator_refusals() -> Iterator[Case]:
    """Yield data that an estimator must refuse."""

    def reject(loss: str, comment: str, error: tuple[str, str, int | None], given: Data, **settings: Any) -> Case:
        config = ESTIMATORS[loss][0] | settings
        return Case(loss, "must-reject", comment, config, given, error=error)

    for loss, (config, _) in ESTIMATORS.items():
        field = "rewards" if loss == "gdpo_advantages" else "reward"
        good = fill(loss, samples([1, 0], "aa"))
        bad = [{**good[0], field: [math.inf, 0.0] if field == "rewards" else math.inf}, good[1]]
        yield reject(loss, "a reward of inf", ("not_finite", "rewards", None), bad)
        for name in FIELDS.get(loss, ("reward", "group"))[1:]:
            lacking = [good[0], {key: value for key, value in good[1].items() if key != name}]
            code = ("missing_field", SAMPLE_FIELDS[name], None)
            yield reject(loss, f"a sample without its {name.replace('_', ' ')}", code, lacking)
        for name in ("alpha", "scale", "baseline", "group_of_one"):
            if name in config:
                yield reject(loss, f"an unknown {name}", ("unknown_name", name, None), good, **{name: "other"})
        for name in ("gamma", "decay", "omega", "eps"):
            if name in config:
                yield reject(loss, f"a {name} of −1", ("out_of_range", name, None), good, **{name: -1.0})
    negative = samples([1, -0.5], "aa")
    yield reject("maxrl_advantages", "a reward below 0", ("out_of_range", "rewards", None), negative)
