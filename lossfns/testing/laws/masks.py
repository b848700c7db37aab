"""Laws of masks: tokens of weight 0 have no effect, whatever their values and number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lossfns.testing.batch import Batch, Rows
from lossfns.testing.laws.base import (
    LossFn,
    Outcome,
    Probe,
    assume,
    column_rows,
    fragile,
    metric_difference,
    on_policy_batch,
    require,
    slots,
    unpoisoned,
    with_masked_unit,
    wrong,
)

POISON = (math.nan, math.inf, -math.inf, 1e30)
OTHER_VALUES = {"advantages": 5.0}
"""Column → an ordinary number for its masked slots; −7 for logprobs."""


@wrong("masked slots hold the prompt's logprobs and advantages, which are arbitrary finite numbers")
def masked_values(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Another ordinary number in a masked slot changes neither value nor gradient."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = with_padding(unpoisoned(probe.batch))
    clean = probe(batch)
    assume(clean.finite, "it is not finite on clean data")
    for name in columns_by_token(batch):
        value = OTHER_VALUES.get(name, -7.0)
        result = probe(with_masked_slots(batch, name, value))
        seen = f"With {value:g} instead of −1 in the masked slots of {name},"
        difference = probe.difference(result, clean)
        bug = "kl-unmasked" if name == "ref_logprobs" and "advantages" in batch.columns else "mask-missing"
        require(not difference, bug, f"{seen} {difference}.", result.batch)


@fragile("slots that are masked usually hold finite numbers")
def poison(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """nan, ±inf or 1e30 in a masked slot changes nothing, bit for bit."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = with_padding(unpoisoned(probe.batch))
    clean = probe(batch)
    assume(clean.finite, "it is not finite without poison either")
    for name in columns_by_token(batch):
        for value in POISON:
            result = probe(with_masked_slots(batch, name, value))
            if repr(result) != repr(clean):
                difference = probe.difference(result, clean, scale=0) or metric_difference(result, clean)
                seen = f"{value} in the masked slots of {name}: {difference or 'a zero has the other sign'}."
                require(False, diagnose_leak(name, clean, result), seen, result.batch)


def changed_by_padding(probe: Probe, batch: Batch) -> bool:
    """Return whether masked tokens around a sequence and inside it change the value or a gradient."""
    before, after = probe(batch), probe(with_padding(batch))
    expected = pad_rows(before.gradients, 0.0, batch.targets or 1)
    return not probe.close([after.value, after.gradients], [before.value, expected])


def with_masked_slots(batch: Batch, name: str, value: float) -> Batch:
    """Return the batch with this value in every masked slot of a column."""
    rows = [[x if w else value for x, w in zip(r, ws)] for r, ws in zip(column_rows(batch, name), batch.weights)]
    return batch.having(**{name: rows})


def columns_by_token(batch: Batch) -> list[str]:
    """Return the logprobs and the columns that differ by token; all tokens of a datum have one label."""
    return ["logprobs", *(name for name in batch.columns if name != "labels")]


def with_padding(batch: Batch) -> Batch:
    """Return the batch with masked tokens before and after each sequence and inside it, another number for each."""
    width = batch.targets or 1
    labels = {"labels": [row[:1] for row in batch.columns["labels"]]} if "labels" in batch.columns else {}
    wide = batch.map(lambda rows: pad_rows(rows, -1.0, width)).having(weights=pad_rows(batch.weights, 0.0, width))
    return wide.having(**{name: [row * len(w) for row, w in zip(rows, wide.weights)] for name, rows in labels.items()})


def pad_rows(rows: Rows, x: float, width: int) -> Rows:
    """Return the rows with ``x`` before, behind the first token, and after; ``width`` times for each masked token."""
    wide = []
    for i, row in enumerate(rows):
        before, inside, after = ([x] * (width * n) for n in (1 + i % 3, i % 2, 1 + (i + 1) % 2))
        wide.append(before + row[:width] + inside + row[width:] + after)
    return wide


def diagnose_leak(name: str, clean: Outcome, result: Outcome) -> str:
    """Return the bug that lets masked slots of a column change the result."""
    if result.value == clean.value:
        return "mask-after-exp" if result.gradients == clean.gradients else "where-after-exp"
    if not math.isfinite(result.value):
        return "mask-after-exp"
    return "kl-unmasked" if name == "ref_logprobs" else "mask-missing"


@wrong("the amount of padding depends on the batch and must not change the loss")
def padding(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Masked tokens around a sequence and inside it change nothing, and get a gradient of exactly 0."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unpoisoned(probe.batch)
    for on_policy in (True, False):
        plain = on_policy_batch(batch) if on_policy else batch
        before, after = probe(plain), probe(with_padding(plain))
        for i, j in slots(with_padding(plain), active=False):
            if g := after.gradients[i][j]:
                seen = f"The masked {probe.slot_name(i, j)} has the gradient {g}."
                require(False, "mask-missing", seen, after.batch)
        expected = replace(before, gradients=pad_rows(before.gradients, 0.0, batch.targets or 1))
        difference = probe.difference(after, expected)
        same_value = probe.close(after.value, before.value)
        bug = "padding-in-denominator" if on_policy and not same_value else "padding-in-sequence-ratio"
        seen = f"With masked tokens around and inside each sequence, {difference}, without them"
        require(not difference, bug, f"{seen} ({'on-policy' if on_policy else 'off-policy only'}).", after.batch)


@fragile("a sequence without trained tokens is rare, and which sequences a mean counts is a rule of the house")
def empty(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A fully masked datum (or pair) changes nothing."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unpoisoned(probe.batch)
    before, after = probe(batch), probe(with_masked_unit(batch))
    others = replace(after, gradients=after.gradients[: len(before.gradients)])
    difference = probe.difference(others, before)
    seen = f"With a fully masked datum at the end, {difference or 'its own gradients are not finite'}, without it."
    require(after.finite, "empty-sequence-nan", seen, after.batch)
    assume(before.finite, "it is not finite without this datum either")
    require(not difference, "empty-sequence-counted", seen, after.batch)
