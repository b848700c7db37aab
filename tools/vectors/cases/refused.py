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
"""The losses with a case for every kind of malformed input. The others have cases for the most common kinds."""


def refused() -> Iterator[Case]:
    """Yield all must-reject cases."""
    for loss in DEFAULTS:
        if loss != "group_advantages":
            yield from common_refusals(loss)
        if loss in FULLY_TESTED:
            yield from input_refusals(loss)
        if loss in POLICY:
            yield from policy_refusals(loss)
        if loss in PAIRS:
            yield from pair_refusals(loss)
    yield from setting_refusals()
    yield from supervised_refusals()
    yield from group_refusals()


def valid_data(loss: str) -> Data:
    """Return two valid datums."""
    if loss == "multi_target_cross_entropy":
        return data(
            logprobs=[[[-1.0, -2.0], [-0.5, -1.5]], [[-3.0, -1.0]]], weights=[[[1.0, 0.5], [0.5, 1.0]], [[1.0, 1.0]]]
        )
    return select_columns(loss, policy_data(lp="-1 -0.5 -2 | -3 -1.5", w="0 1 1 | 1 1", adv="1 1 1 | -1 -1"), {})


def reject(loss: str, comment: str, error: Refusal, rows: Data,
        denominator: float | None = None, **settings: Any) -> Case:  # fmt: skip
    """Return a case that must be refused with this error."""
    return Case(loss, "must-reject", comment, DEFAULTS[loss] | settings, rows, denominator=denominator, error=error)


def out_of_range(name: str) -> Refusal:
    """Return the refusal of a setting whose value is out of range."""
    return "out_of_range", name, None


def edit(rows: Data, datum: int, **columns: Any) -> Data:
    """Return the data with some columns of one datum replaced. A column that is None is removed."""
    row = {name: value for name, value in {**rows[datum], **columns}.items() if value is not None}
    return [*rows[:datum], row, *rows[datum + 1 :]]


def with_last(row: list[Any], value: float) -> list[Any]:
    """Return a row with its last entry replaced."""
    return [*row[:-1], with_last(row[-1], value) if isinstance(row[-1], list) else value]


def common_refusals(loss: str) -> Iterator[Case]:
    """Yield cases for every loss."""
    valid = valid_data(loss)
    zeros = [{**row, "weights": zeroed(row["weights"])} for row in valid]
    short, absent = edit(valid, 0, weights=valid[0]["weights"][:-1]), edit(valid, 1, weights=None)
    nans = edit(valid, 1, logprobs=with_last(valid[1]["logprobs"], NAN))
    yield reject(loss, "a weight too few", ("length_mismatch", "weights", 0), short)
    yield reject(loss, "a datum without weights", ("missing_field", "weights", 1), absent)
    yield reject(loss, "a logprob of nan at a token that counts", ("not_finite", "logprobs", 1), nans)
    yield reject(loss, "a batch of which nothing counts", ("no_active_token", "weights", None), zeros)


def zeroed(row: list[Any]) -> list[Any]:
    """Return a row with 0 in place of every number."""
    return [zeroed(x) if isinstance(x, list) else 0.0 for x in row]


def input_refusals(loss: str) -> Iterator[Case]:
    """Yield cases for a loss of ``FULLY_TESTED``."""
    valid = valid_data(loss)
    lp, w = valid[1]["logprobs"], valid[1]["weights"]
    yield reject(loss, "no datum", ("empty_batch", "data", None), [])
    long = edit(valid, 1, weights=[*w, w[0]])
    yield reject(loss, "a weight too many", ("length_mismatch", "weights", 1), long)
    for value in (-INF, INF):
        row = edit(valid, 1, logprobs=with_last(lp, value))
        yield reject(loss, f"a logprob of {value} at a token that counts", ("not_finite", "logprobs", 1), row)
    row = edit(valid, 1, logprobs=with_last(lp, 0.5))
    yield reject(loss, "a logprob above 0: a probability", ("positive_logprob", "logprobs", 1), row)
    yield reject(loss, "a weight of nan", ("not_finite", "weights", 1), edit(valid, 1, weights=with_last(w, NAN)))
    yield reject(loss, "an unknown weighing", ("unknown_name", "weigh", None), valid, weigh="token-mean")
    other_weighing = "pair_mean" if loss not in PAIRS else "token_mean"
    yield reject(loss, "a weighing of other rows", ("unknown_name", "weigh", None), valid, weigh=other_weighing)
    for value in (0.0, -4.0):
        yield reject(loss, f"a denominator of {value:g}", out_of_range("denominator"), valid, denominator=value)
    if loss not in PAIRS:
        yield reject(loss, "a constant length of 0", out_of_range("length"), valid, weigh="fixed_length", length=0)


def policy_refusals(loss: str) -> Iterator[Case]:
    """Yield cases for a policy loss."""
    valid = valid_data(loss)
    columns = [name for name in valid[0] if name not in ("logprobs", "weights")]
    for name in columns:
        row = valid[0][name]
        yield reject(loss, f"{name} too short", ("length_mismatch", name, 0), edit(valid, 0, **{name: row[:-1]}))
        if loss in FULLY_TESTED:
            yield reject(loss, f"{name} too long", ("length_mismatch", name, 0), edit(valid, 0, **{name: [-1.0, *row]}))
            yield reject(loss, f"{name} of nan", ("not_finite", name, 0), edit(valid, 0, **{name: with_last(row, NAN)}))
            yield reject(loss, f"a datum without {name}", ("missing_field", name, 1), edit(valid, 1, **{name: None}))
        if loss in FULLY_TESTED and name != "advantages":
            high = edit(valid, 0, **{name: with_last(row, 0.5)})
            yield reject(loss, f"{name} above 0", ("positive_logprob", name, 0), high)
    yield reject(loss, "a negative weight", ("negative_weight", "weights", 1), edit(valid, 1, weights=[1.0, -1.0]))
    if "clip" in DEFAULTS[loss]:
        yield reject(loss, "epsilons for bounds", out_of_range("clip"), valid, clip=[0.2, 0.28])


def setting_refusals() -> Iterator[Case]:
    """Yield cases of settings that only some policy losses have."""
    ppo, grpo, dro = valid_data("ppo"), valid_data("grpo"), valid_data("dro")
    with_sampler = select_columns(
        "ppo", policy_data(lp="-1 -0.5 -2 | -3 -1.5", w="0 1 1 | 1 1", adv="1 1 1 | -1 -1"), {"tis_cap": 2.0}
    )
    no_sampler = ("missing_field", "sampler_logprobs", 0)
    yield reject("ppo", "bounds in the wrong order", out_of_range("clip"), ppo, clip=[1.2, 0.8])
    yield reject("ppo", "a negative bound", out_of_range("clip"), ppo, clip=[-0.2, 1.2])
    yield reject("ppo", "a dual clip below 1", out_of_range("dual_clip"), ppo, dual_clip=0.5)
    yield reject("dapo", "a dual clip below 1", out_of_range("dual_clip"), ppo, dual_clip=0.5)
    yield reject("ppo", "a log-ratio cap of 0", out_of_range("log_ratio_cap"), ppo, log_ratio_cap=0.0)
    yield reject("ppo", "no sampler_logprobs to correct by", no_sampler, ppo, tis_cap=2.0)
    yield reject("ppo", "a sampler cap of 0", out_of_range("tis_cap"), with_sampler, tis_cap=0.0)
    yield reject(
        "ppo", "an unknown level", ("unknown_name", "tis_level", None), with_sampler, tis_cap=2.0, tis_level="batch"
    )
    yield reject("grpo", "a negative kl_beta", out_of_range("kl_beta"), grpo, kl_beta=-0.1)
    yield reject("grpo", "an unknown estimator", ("unknown_name", "kl", None), grpo, kl="k4")
    for value in (0.0, -0.5):
        yield reject("dro", f"a beta of {value}", out_of_range("beta"), dro, beta=value)


def pair_refusals(loss: str) -> Iterator[Case]:
    """Yield cases for a loss over pairs."""
    valid = valid_data(loss)
    chosen_masked = edit(valid, 0, weights=[0.0, 0.0, 0.0])
    yield reject(loss, "three datums, an odd number", ("odd_pairs", "data", None), [*valid, valid[0]])
    yield reject(loss, "a chosen side of which nothing counts", ("lone_side", "weights", 0), chosen_masked)
    rejected_masked = edit(valid, 1, weights=[0.0, 0.0])
    yield reject(loss, "a rejected side of which nothing counts", ("lone_side", "weights", 1), rejected_masked)
    yield reject(loss, "a negative weight", ("negative_weight", "weights", 1), edit(valid, 1, weights=[1.0, -1.0]))
    if loss == "orpo":
        yield reject(loss, "a negative lambda", out_of_range("lam"), valid, lam=-0.1)
        return
    row = valid[0]["ref_logprobs"]
    yield reject(
        loss, "ref_logprobs too short", ("length_mismatch", "ref_logprobs", 0), edit(valid, 0, ref_logprobs=row[:-1])
    )
    yield reject(
        loss,
        "ref_logprobs too long",
        ("length_mismatch", "ref_logprobs", 0),
        edit(valid, 0, ref_logprobs=[-1.0, *row]),
    )
    yield reject(
        loss, "ref_logprobs of nan", ("not_finite", "ref_logprobs", 0), edit(valid, 0, ref_logprobs=with_last(row, NAN))
    )
    yield reject(
        loss, "a datum without ref_logprobs", ("missing_field", "ref_logprobs", 1), edit(valid, 1, ref_logprobs=None)
    )
    for value in (0.0, -0.1):
        yield reject(loss, f"a beta of {value}", out_of_range("beta"), valid, beta=value)
    for value in (0.75, -0.1):
        yield reject(
            loss, f"a label_smoothing of {value}", out_of_range("label_smoothing"), valid, label_smoothing=value
        )


def supervised_refusals() -> Iterator[Case]:
    """Yield cases for the cross-entropies."""
    cancel = data(logprobs="-1 -2 | -3", weights="1 -1 | 0")
    one = data(logprobs="-1 -2 | -3", weights="1 -1 | 1")
    zero_sum = ("no_mass", "weights", None)
    yield reject("cross_entropy", "weights that sum to 0 under a mean", zero_sum, cancel)
    yield reject("cross_entropy", "weights of a sequence that sum to 0", zero_sum, one, weigh="sequence_mean")
    multi = "multi_target_cross_entropy"
    valid = valid_data(multi)
    other = edit(valid, 1, weights=[[1.0, 1.0, 1.0]])
    yield reject(multi, "weights of another K", ("length_mismatch", "weights", 1), other)
    ragged = edit(valid, 0, weights=[[1.0, 0.5], [0.5]])
    yield reject(multi, "a ragged row of weights", ("length_mismatch", "weights", None), ragged)


def group_refusals() -> Iterator[Case]:
    """Yield cases for ``group_advantages``."""
    name = "group_advantages"
    yield reject(name, "no samples", ("empty_batch", "rewards", None), [])
    yield reject(name, "a reward of nan", ("not_finite", "rewards", None), samples([1, NAN], "aa"))
    yield reject(name, "a reward of inf", ("not_finite", "rewards", None), samples([INF, 1], "aa"))
    yield reject(
        name, "a sample without its group", ("missing_field", "groups", None), [*samples([1], "a"), {"reward": 0.0}]
    )
    yield reject(name, "an unknown scale", ("unknown_name", "scale", None), samples([1, 0], "aa"), scale="stdev")
