"""Errors that only values can show, found without a device synchronisation of their own.

``readings`` measures a packed batch on the device; the numbers travel with the metrics in one transfer,
and ``judge`` reads them on the host before the loss is returned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lossfns.errors import LossInputError, warn
from lossfns.segments import chosen, nonempty, rejected
from lossfns.tokens import LOGPROB_COLUMNS, PAIRS, Tokens

LOGPROB_TOLERANCE = 1e-4
"""How far above 0 rounding may carry a logprob."""


def measured(t: Tokens) -> dict[str, Tensor]:
    return {"logprobs": t.logprobs.detach(), "weights": t.weights, **t.columns}


def readings(t: Tokens, rows: str) -> list[Tensor]:
    """The least and greatest value of every column (nan if it has one), and how many pairs lack a side."""
    if t.logprobs.numel() == 0:
        return []
    lone = lone_sides(t).sum() if rows == PAIRS else torch.zeros_like(t.weights[0])
    return [bound for x in measured(t).values() for bound in torch.aminmax(x)] + [lone]


def lone_sides(t: Tokens) -> Tensor:
    """``[P]`` bool: pairs of which exactly one side has active tokens."""
    has = nonempty(t)
    return chosen(has) ^ rejected(has)


def judge(values: Sequence[float], t: Tokens, *, signed: bool) -> None:
    """Raise for the first value that no loss can use; warn for what is more often a mistake."""
    if not values:
        return
    bounds = dict(zip(measured(t), zip(values[0::2], values[1::2])))
    for name, (low, high) in bounds.items():
        is_logprob = name == "logprobs" or name in LOGPROB_COLUMNS
        if not (math.isfinite(low) and math.isfinite(high)):
            refuse(
                t,
                name,
                ~torch.isfinite(measured(t)[name]),
                "a finite number at every active token",
                HINT.get(name, ""),
            )
        if is_logprob and high > LOGPROB_TOLERANCE:
            refuse(
                t,
                name,
                measured(t)[name] > LOGPROB_TOLERANCE,
                "a logprob, at most 0",
                "Were probabilities or logits passed?",
            )
        if name == "weights" and low < 0 and not signed:
            refuse(t, name, t.weights < 0, "a weight of at least 0", "Put the sign into the advantages.")
    if values[-1]:
        pair = int(lone_sides(t).nonzero()[0])
        side, datum = ("chosen", 2 * pair) if nonempty(t)[2 * pair + 1] else ("rejected", 2 * pair + 1)
        got = f"none on the {side} side of pair {pair}"
        raise LossInputError("weights", "active tokens on both sides", got, "Drop the pair, or mask both.", datum=datum)
    if bounds.get("old_logprobs") == (0, 0) and bounds["logprobs"][0] < -LOGPROB_TOLERANCE:
        warn("old_logprobs are 0 at every active token: were they left unset?")


def doubt(metrics: Mapping[str, float]) -> None:
    """Warn where the old policy is too far away to be one."""
    distance = metrics.get("log_ratio_abs", 0.0)
    if distance > 5:
        got = f"the mean |log-ratio| is {distance:.3g}"
        warn(f"{got}: are the old_logprobs those of these tokens?")


HINT = {
    "logprobs": "A token that the model cannot produce has no finite logprob: mask it.",
    "advantages": "A group of one has no standard deviation: use group_advantages, or larger groups.",
    **dict.fromkeys(LOGPROB_COLUMNS, "Servers send null for the prompt: give those positions weight 0."),
}


def refuse(t: Tokens, name: str, bad: Tensor, expected: str, fix: str) -> None:
    """Raise for the first bad entry, by its datum and its position there."""
    index = int(bad.nonzero()[0])
    ends = t.lengths.cumsum(0) if t.lengths is not None else torch.tensor([len(bad)])
    datum = int(torch.searchsorted(ends, torch.tensor(index, device=ends.device), right=True))
    position = index - (int(ends[datum - 1]) if datum else 0)
    got = f"{float(measured(t)[name][index]):g}"
    raise LossInputError(f"{name}[{position}]", expected, got, fix or "Check the data.", datum=datum)
