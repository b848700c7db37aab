"""Cases that have to be refused: malformed data and impossible settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tools.vectors.cases.advantages import samples
from tools.vectors.cases.form import (
    DEFAULTS,
    INF,
    NAN,
    PAIRS,
    POLICY,
    Case,
    Data,
    Refusal,
    data,
    policy_data,
    select_columns,
)

FULLY_TESTED = ("cross_entropy", "multi_target_cross_entropy", "grpo", "dpo", "orpo")
"""The losses with a case for every kind of malformed input. The others have cases for the most common ones."""


def refused() -> Iterator[Case]:
    for loss in DEFAULTS:
        if loss != "group_advantages":
            yield from refused_first(loss)
        if loss in FULLY_TESTED:
            yield from refused_by_any(loss)
        if loss in POLICY:
            yield from refused_by_policy(loss)
        if loss in PAIRS:
            yield from refused_by_pairs(loss)
    yield from refused_knobs()
    yield from refused_by_supervised()
    yield from refused_groups()


def valid_data(loss: str) -> Data:
    """Return two valid datums."""
    if loss == "multi_target_cross_entropy":
        return data(
            logprobs=[[[-1.0, -2.0], [-0.5, -1.5]], [[-3.0, -1.0]]], weights=[[[1.0, 0.5], [0.5, 1.0]], [[1.0, 1.0]]]
        )
    return select_columns(loss, policy_data(lp="-1 -0.5 -2 | -3 -1.5", w="0 1 1 | 1 1", adv="1 1 1 | -1 -1"), {})


def reject(loss: str, comment: str, error: Refusal, given: Data,
        denominator: float | None = None, **settings: Any) -> Case:  # fmt: skip
    return Case(loss, "must-reject", comment, DEFAULTS[loss] | settings, given, denominator=denominator, error=error)


def out_of_range(name: str) -> Refusal:
    return "out_of_range", name, None


def edit(given: Data, datum: int, **columns: Any) -> Data:
    """Return the data with columns of one datum replaced, or removed where None."""
    row = {name: value for name, value in {**given[datum], **columns}.items() if value is not None}
    return [*given[:datum], row, *given[datum + 1 :]]


def with_last(row: list[Any], value: float) -> list[Any]:
    """Return a row with its last entry replaced."""
    return [*row[:-1], with_last(row[-1], value) if isinstance(row[-1], list) else value]


def refused_first(loss: str) -> Iterator[Case]:
    fine = valid_data(loss)
    zeros = [{**row, "weights": zeroed(row["weights"])} for row in fine]
    short, absent = edit(fine, 0, weights=fine[0]["weights"][:-1]), edit(fine, 1, weights=None)
    nans = edit(fine, 1, logprobs=with_last(fine[1]["logprobs"], NAN))
    yield reject(loss, "a weight too few", ("length_mismatch", "weights", 0), short)
    yield reject(loss, "a datum without weights", ("missing_field", "weights", 1), absent)
    yield reject(loss, "a logprob of nan at a token that counts", ("not_finite", "logprobs", 1), nans)
    yield reject(loss, "a batch of which nothing counts", ("no_active_token", "weights", None), zeros)


def zeroed(row: list[Any]) -> list[Any]:
    return [zeroed(x) if isinstance(x, list) else 0.0 for x in row]


def refused_by_any(loss: str) -> Iterator[Case]:
    fine = valid_data(loss)
    lp, w = fine[1]["logprobs"], fine[1]["weights"]
    yield reject(loss, "no datum", ("empty_batch", "data", None), [])
    long = edit(fine, 1, weights=[*w, w[0]])
    yield reject(loss, "a weight too many", ("length_mismatch", "weights", 1), long)
    for value in (-INF, INF):
        row = edit(fine, 1, logprobs=with_last(lp, value))
        yield reject(loss, f"a logprob of {value} at a token that counts", ("not_finite", "logprobs", 1), row)
    row = edit(fine, 1, logprobs=with_last(lp, 0.5))
    yield reject(loss, "a logprob above 0: a probability", ("positive_logprob", "logprobs", 1), row)
    yield reject(loss, "a weight of nan", ("not_finite", "weights", 1), edit(fine, 1, weights=with_last(w, NAN)))
    yield reject(loss, "an unknown weighing", ("unknown_name", "weigh", None), fine, weigh="token-mean")
    rows_of = "pair_mean" if loss not in PAIRS else "token_mean"
    yield reject(loss, "a weighing of other rows", ("unknown_name", "weigh", None), fine, weigh=rows_of)
    for value in (0.0, -4.0):
        yield reject(loss, f"a denominator of {value:g}", out_of_range("denominator"), fine, denominator=value)
    if loss not in PAIRS:
        yield reject(loss, "a constant length of 0", out_of_range("length"), fine, weigh="fixed_length", length=0)


def refused_by_policy(loss: str) -> Iterator[Case]:
    fine = valid_data(loss)
    columns = [name for name in fine[0] if name not in ("logprobs", "weights")]
    for name in columns:
        row = fine[0][name]
        yield reject(loss, f"{name} too short", ("length_mismatch", name, 0), edit(fine, 0, **{name: row[:-1]}))
        if loss in FULLY_TESTED:
            yield reject(loss, f"{name} too long", ("length_mismatch", name, 0), edit(fine, 0, **{name: [-1.0, *row]}))
            yield reject(loss, f"{name} of nan", ("not_finite", name, 0), edit(fine, 0, **{name: with_last(row, NAN)}))
            yield reject(loss, f"a datum without {name}", ("missing_field", name, 1), edit(fine, 1, **{name: None}))
        if loss in FULLY_TESTED and name != "advantages":
            high = edit(fine, 0, **{name: with_last(row, 0.5)})
            yield reject(loss, f"{name} above 0", ("positive_logprob", name, 0), high)
    yield reject(loss, "a negative weight", ("negative_weight", "weights", 1), edit(fine, 1, weights=[1.0, -1.0]))
    if "clip" in DEFAULTS[loss]:
        yield reject(loss, "epsilons for bounds", out_of_range("clip"), fine, clip=[0.2, 0.28])


def refused_knobs() -> Iterator[Case]:
    ppo, grpo, dro = valid_data("ppo"), valid_data("grpo"), valid_data("dro")
    sampled = select_columns(
        "ppo", policy_data(lp="-1 -0.5 -2 | -3 -1.5", w="0 1 1 | 1 1", adv="1 1 1 | -1 -1"), {"tis_cap": 2.0}
    )
    no_sampler = ("missing_field", "sampler_logprobs", 0)
    yield reject("ppo", "bounds in the wrong order", out_of_range("clip"), ppo, clip=[1.2, 0.8])
    yield reject("ppo", "a negative bound", out_of_range("clip"), ppo, clip=[-0.2, 1.2])
    yield reject("ppo", "a dual clip below 1", out_of_range("dual_clip"), ppo, dual_clip=0.5)
    yield reject("dapo", "a dual clip below 1", out_of_range("dual_clip"), ppo, dual_clip=0.5)
    yield reject("ppo", "a log-ratio cap of 0", out_of_range("log_ratio_cap"), ppo, log_ratio_cap=0.0)
    yield reject("ppo", "no sampler_logprobs to correct by", no_sampler, ppo, tis_cap=2.0)
    yield reject("ppo", "a sampler cap of 0", out_of_range("tis_cap"), sampled, tis_cap=0.0)
    yield reject(
        "ppo", "an unknown level", ("unknown_name", "tis_level", None), sampled, tis_cap=2.0, tis_level="batch"
    )
    yield reject("grpo", "a negative kl_beta", out_of_range("kl_beta"), grpo, kl_beta=-0.1)
    yield reject("grpo", "an unknown estimator", ("unknown_name", "kl", None), grpo, kl="k4")
    for value in (0.0, -0.5):
        yield reject("dro", f"a beta of {value}", out_of_range("beta"), dro, beta=value)


def refused_by_pairs(loss: str) -> Iterator[Case]:
    fine = valid_data(loss)
    dead = edit(fine, 0, weights=[0.0, 0.0, 0.0])
    yield reject(loss, "three datums, an odd number", ("odd_pairs", "data", None), [*fine, fine[0]])
    yield reject(loss, "a chosen side of which nothing counts", ("lone_side", "weights", 0), dead)
    none = edit(fine, 1, weights=[0.0, 0.0])
    yield reject(loss, "a rejected side of which nothing counts", ("lone_side", "weights", 1), none)
    yield reject(loss, "a negative weight", ("negative_weight", "weights", 1), edit(fine, 1, weights=[1.0, -1.0]))
    if loss == "orpo":
        yield reject(loss, "a negative lambda", out_of_range("lam"), fine, lam=-0.1)
        return
    row = fine[0]["ref_logprobs"]
    yield reject(
        loss, "ref_logprobs too short", ("length_mismatch", "ref_logprobs", 0), edit(fine, 0, ref_logprobs=row[:-1])
    )
    yield reject(
        loss,
        "ref_logprobs too long",
        ("length_mismatch", "ref_logprobs", 0),
        edit(fine, 0, ref_logprobs=[-1.0, *row]),
    )
    yield reject(
        loss, "ref_logprobs of nan", ("not_finite", "ref_logprobs", 0), edit(fine, 0, ref_logprobs=with_last(row, NAN))
    )
    yield reject(
        loss, "a datum without ref_logprobs", ("missing_field", "ref_logprobs", 1), edit(fine, 1, ref_logprobs=None)
    )
    for value in (0.0, -0.1):
        yield reject(loss, f"a beta of {value}", out_of_range("beta"), fine, beta=value)
    for value in (0.75, -0.1):
        yield reject(
            loss, f"a label_smoothing of {value}", out_of_range("label_smoothing"), fine, label_smoothing=value
        )


def refused_by_supervised() -> Iterator[Case]:
    cancel = data(logprobs="-1 -2 | -3", weights="1 -1 | 0")
    one = data(logprobs="-1 -2 | -3", weights="1 -1 | 1")
    words = ("no_mass", "weights", None)
    yield reject("cross_entropy", "weights that sum to 0 under a mean", words, cancel)
    yield reject("cross_entropy", "weights of a sequence that sum to 0", words, one, weigh="sequence_mean")
    multi = "multi_target_cross_entropy"
    fine = valid_data(multi)
    other = edit(fine, 1, weights=[[1.0, 1.0, 1.0]])
    yield reject(multi, "weights of another K", ("length_mismatch", "weights", 1), other)
    ragged = edit(fine, 0, weights=[[1.0, 0.5], [0.5]])
    yield reject(multi, "a ragged row of weights", ("length_mismatch", "weights", None), ragged)


def refused_groups() -> Iterator[Case]:
    name = "group_advantages"
    yield reject(name, "no samples", ("empty_batch", "rewards", None), [])
    yield reject(name, "a reward of nan", ("not_finite", "rewards", None), samples([1, NAN], "aa"))
    yield reject(name, "a reward of inf", ("not_finite", "rewards", None), samples([INF, 1], "aa"))
    yield reject(
        name, "a sample without its group", ("missing_field", "groups", None), [*samples([1], "a"), {"reward": 0.0}]
    )
    yield reject(name, "an unknown scale", ("unknown_name", "scale", None), samples([1, 0], "aa"), scale="stdev")
