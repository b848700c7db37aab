"""Checks of values that need no device synchronisation of their own.

``extremes`` reduces a packed batch to a few numbers on the device. They travel to the host with the metrics, in
one transfer, and ``check_values`` reads them there before the loss is returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NoReturn

import torch
from torch import Tensor

from lossfns.errors import LossInputError, warn
from lossfns.segments import both_sides, chosen, given_numbers, nonempty, rejected, sequence_value, to_tokens
from lossfns.tokens import DATUM_COLUMNS, LOGPROB_COLUMNS, MODEL_COLUMNS, PAIRS, TOKENS, Rows, Tokens

LOGPROB_TOLERANCE = 1e-4
"""Largest value above 0 that a logprob may have because of rounding."""

LENGTHS_FIT = "lengths fit"
"""Name of a number: 1 if lengths on a device were those of the batch, else 0."""

LARGEST_LABEL = 2**24 - 1
"""Largest label of a group. In float32 the next whole number, 2²⁴, may be a larger one that was rounded."""

AT_MOST_0 = (*LOGPROB_COLUMNS, "teacher_logprobs")
"""The columns of logprobs, which are at most 0."""

LABELS = ("groups", "labels")
"""The columns of whole numbers."""

FAR_LOG_RATIO = 5.0
"""Mean |log-ratio| above which the old logprobs are probably those of other tokens."""


def checked_columns(t: Tokens) -> dict[str, Tensor]:
    """Return every column of a batch by name, without graph."""
    columns = {"logprobs": t.logprobs, "weights": t.weights, **t.columns}
    return {name: x.detach() for name, x in columns.items()}


def extremes(t: Tokens, rows: Rows) -> dict[str, Tensor]:
    """Return 0-d tensors: for each column its least and its greatest value, or nan if it has one.

    They are ``NAME min`` and ``NAME max``. Of labels and groups also ``NAME fractions``, the number of entries that are
    not whole; of columns with one number for each datum ``NAME uneven``, the number of entries that differ from it; of
    pairs ``one-sided pairs``.
    """
    if t.logprobs.numel() == 0:
        return {}
    extrema, given = {}, given_numbers(t)
    columns = checked_columns(t) | given
    for name, x in columns.items():
        extrema[f"{name} min"], extrema[f"{name} max"] = torch.aminmax(x)
    extrema |= {f"{name} fractions": fractional(columns[name]).sum() for name in LABELS if name in columns}
    extrema |= {
        f"{name} uneven": uneven(t, name, rows).sum() for name in DATUM_COLUMNS if name in columns.keys() - given
    }
    if rows is PAIRS and "groups" in given:
        extrema["groups uneven"] = (chosen(t, given["groups"]) != rejected(t, given["groups"])).sum()
    return extrema | ({"one-sided pairs": one_sided_pairs(t).sum()} if rows is PAIRS else {})


def uneven(t: Tokens, name: str, rows: Rows) -> Tensor:
    """``[N]`` bool: True where a column with one number for each datum has another one, or a pair has two groups."""
    number = sequence_value(t, t.columns[name])
    if rows is PAIRS and name == "groups":
        number = both_sides(t, chosen(t, number))
    return t.active & (t.columns[name] != to_tokens(t, number))


def one_sided_pairs(t: Tokens) -> Tensor:
    """``[P]`` bool: True where exactly one side of a pair has active tokens."""
    has_active = nonempty(t)
    return chosen(t, has_active) ^ rejected(t, has_active)


def check_values(
    extrema: Mapping[str, float], get_batch: Callable[[], Tokens], output: str = "logprobs", *, signed: bool
) -> None:
    """Raise for the first value that no loss can use, and warn about old logprobs that were left at 0.

    Args:
        extrema: the numbers of ``extremes(t, rows)``, on the host, and ``LENGTHS_FIT`` if the lengths are unchecked.
        get_batch: a function that returns ``t``. If a number is bad, it is called, and ``t`` is searched for the entry.
        output: the output of the model that the loss takes. Logprobs are at most 0, and scores have any sign.
        signed: whether weights may be negative.
    """
    if not extrema.get(LENGTHS_FIT, True):
        expected = f"whole numbers from 0 that sum to {len(get_batch().weights)}, or their cumulative sums from 0"
        raise LossInputError("lengths", expected, "others", "They count the tokens of logprobs.")
    for name in [key.removesuffix(" min") for key in extrema if key.endswith(" min")]:
        low, high = extrema[f"{name} min"], extrema[f"{name} max"]
        if not (math.isfinite(low) and math.isfinite(high)):
            bad, expected, fix = not_finite, "a finite number at every active token", NOT_FINITE_FIX.get(name, "")
        elif (name == output == "logprobs" or name in AT_MOST_0) and high > LOGPROB_TOLERANCE:
            bad, expected, fix = above_0, "a logprob, at most 0", "Were probabilities or logits passed?"
        elif name in MODEL_COLUMNS and low < 0:
            bad, expected, fix = below_0, "a number of at least 0", "Was its negative passed, or a sum of logprobs?"
        elif name == "sum_square_probs" and high > 1 + LOGPROB_TOLERANCE:
            bad, expected, fix = above_1, "a sum of squared probabilities, at most 1", "Was its inverse passed?"
        elif name == "weights" and low < 0 and not signed:
            fix = "Put the sign into the advantages." if "advantages min" in extrema else NEGATIVE_WEIGHT_FIX
            bad, expected = below_0, "a weight of at least 0"
        elif name == "groups" and (max(-low, high) > LARGEST_LABEL or extrema.get("groups fractions")):
            fix = "Number the groups of the batch from 0."
            bad, expected = no_group, f"a whole number of at most {LARGEST_LABEL}"
        elif name == "labels" and (low < 0 or high > 1 or extrema.get("labels fractions")):
            fix = "1 is a desirable or right answer, 0 an undesirable or wrong one."
            bad, expected = no_label, "1 or 0"
        else:
            continue
        t = get_batch()
        raise_at_first(t, name, bad(checked_columns(t)[name]), expected, fix)
    if extrema.get("one-sided pairs"):
        raise one_sided_pair(get_batch())
    for name in DATUM_COLUMNS:
        if extrema.get(f"{name} uneven"):
            rows = PAIRS if "one-sided pairs" in extrema else TOKENS
            of_pair = rows is PAIRS and name == "groups"
            expected = "one number for both sides of a pair" if of_pair else "one number for all tokens of a datum"
            t = get_batch()
            raise_at_first(t, name, uneven(t, name, rows), expected, f"Bind a flat list: {name}=[...].")
    unset = extrema.get("old_logprobs min") == extrema.get("old_logprobs max") == 0
    if unset and output == "logprobs" and extrema["logprobs min"] < -LOGPROB_TOLERANCE:
        warn("old_logprobs are 0 at every active token: were they left unset?")


def not_finite(x: Tensor) -> Tensor:
    return ~x.isfinite()


def above_0(x: Tensor) -> Tensor:
    return x > LOGPROB_TOLERANCE


def above_1(x: Tensor) -> Tensor:
    return x > 1 + LOGPROB_TOLERANCE


def below_0(x: Tensor) -> Tensor:
    return x < 0


def fractional(x: Tensor) -> Tensor:
    return x != x.round()


def no_group(x: Tensor) -> Tensor:
    return fractional(x) | (x.abs() > LARGEST_LABEL)


def no_label(x: Tensor) -> Tensor:
    return (x != 0) & (x != 1)


def one_sided_pair(t: Tokens) -> LossInputError:
    """Return the error for the first pair with active tokens on one side only."""
    pair = int(one_sided_pairs(t).nonzero()[0])
    side, of_side = ("chosen", chosen) if rejected(t, nonempty(t))[pair] else ("rejected", rejected)
    datum = int(of_side(t, torch.arange(t.sequences))[pair])
    got = f"none on the {side} side of pair {pair}"
    return LossInputError("weights", "active tokens on both sides", got, "Drop the pair, or mask both.", datum=datum)


def warn_if_far_off_policy(metrics: Mapping[str, float]) -> None:
    """Warn if the mean |log-ratio| is too large for old logprobs of the same tokens."""
    distance = metrics.get("log_ratio_abs", 0.0)
    if distance > FAR_LOG_RATIO:
        got = f"the mean |log-ratio| is {distance:.3g}"
        warn(f"{got}: are the old_logprobs those of these tokens?")


NEGATIVE_WEIGHT_FIX = "Give 0 to a token that does not count; only a plain likelihood takes weights below 0."

NOT_FINITE_FIX = {
    "logprobs": "A token that the model cannot produce has no finite logprob: mask it.",
    "advantages": "A group of one has no standard deviation: use group_advantages, or larger groups.",
    "teacher_logprobs": "Where the teacher gives a candidate no probability, give this slot weight 0.",
    **dict.fromkeys(LOGPROB_COLUMNS, "Servers send null for the prompt: give those positions weight 0."),
}


def raise_at_first(t: Tokens, name: str, bad: Tensor, expected: str, fix: str) -> NoReturn:
    """Raise an error that names the first bad entry of a column by datum and position in the datum."""
    found = bad.nonzero()
    if not len(found):
        got, fix = "a tensor that has changed since", "Leave the batch as it is until its metrics are read."
        raise LossInputError(name, expected, got, fix)
    index = int(found[0])
    ends = t.ends
    datum = int(torch.searchsorted(ends, torch.tensor(index, device=ends.device), right=True))
    position = index - (int(ends[datum - 1]) if datum else 0)
    got = f"{float(checked_columns(t)[name][index]):g}"
    raise LossInputError(f"{name}[{position}]", expected, got, fix or "Check the data.", datum=datum)
