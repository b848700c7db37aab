"""Laws of masks: tokens of weight 0 have no effect, whatever their values and number."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    on_policy_batch,
    require,
    unpoisoned,
    with_masked_unit,
    wrong,
)

POISON = (math.nan, math.inf, -math.inf, 1e30)


@fragile("slots that are masked usually hold finite numbers")
def poison(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """nan, ±inf or 1e30 in a masked slot changes nothing, bit for bit."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = with_padding(unpoisoned(probe.batch))
    clean = probe(batch)
    assume(clean.finite, "it is not finite without poison either")
    for name in ("logprobs", *batch.columns):
        for value in POISON:
            rows = column_rows(batch, name)
            poisoned = [[x if w else value for x, w in zip(r, ws)] for r, ws in zip(rows, batch.weights)]
            result = probe(batch.having(**{name: poisoned}))
            if repr(result) != repr(clean):
                require(False, *diagnose_leak(name, value, clean, result))


def with_padding(batch: Batch) -> Batch:
    """Return the batch with a masked token before and after each sequence."""
    width = batch.targets or 1

    def pad(rows: Rows, x: float) -> Rows:
        return [[x] * width + row + [x] * width for row in rows]

    wide = batch.map(lambda rows: pad(rows, -1.0))
    return wide.having(weights=pad(batch.weights, 0.0))


def diagnose_leak(name: str, value: float, clean: Outcome, result: Outcome) -> tuple[str, str]:
    """Return the bug that lets masked slots change the result, and the observation in words."""
    what = f"{value} in the masked slots of {name}"
    seen = f"{what}: the loss is {result.value}, not {clean.value}"
    if math.isfinite(result.value) and result.value == clean.value:
        if result.gradients == clean.gradients:
            return "mask-after-exp", f"{what} changes the metrics."
        return "where-after-exp", f"{what} does not change the loss, but the gradients are {result.gradients}."
    if math.isnan(result.value) or not math.isfinite(result.value):
        return "mask-after-exp", f"{seen}."
    return "kl-unmasked" if name == "ref_logprobs" else "mask-missing", f"{seen}."


@wrong("the amount of padding depends on the batch and must not change the loss")
def padding(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Masked tokens before and after a sequence change nothing, and get a gradient of exactly 0."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch, width = unpoisoned(probe.batch), probe.batch.targets or 1
    for on_policy in (True, False):
        plain = on_policy_batch(batch) if on_policy else batch
        before, after = probe(plain), probe(with_padding(plain))
        same_value = probe.close(after.value, before.value)
        inner = [row[width:-width] for row in after.gradients]
        outer = [g for row in after.gradients for g in (*row[:width], *row[-width:])]
        require(not any(outer), "mask-missing", f"Masked tokens have the gradients {outer}.")
        seen = f"With a masked token at both ends of each sequence the loss is {after.value}, not {before.value}"
        same = probe.close([after.value, inner], [before.value, before.gradients])
        bug = "padding-in-denominator" if on_policy and not same_value else "padding-in-sequence-ratio"
        require(same, bug, f"{seen} ({'on-policy' if on_policy else 'off-policy only'}).")


@fragile("a sequence without trained tokens is rare, and which sequences a mean counts is a rule of the house")
def empty(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A fully masked datum (or pair) changes nothing."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unpoisoned(probe.batch)
    before, after = probe(batch), probe(with_masked_unit(batch))
    seen = f"With a fully masked datum the loss is {after.value}, not {before.value}, or the others' gradients differ"
    require(after.finite, "empty-sequence-nan", f"{seen}; its gradients are {after.gradients[-1]}.")
    assume(before.finite, "it is not finite without this datum either")
    others = after.gradients[: len(before.gradients)]
    same = probe.close([after.value, others], [before.value, before.gradients])
    require(same, "empty-sequence-counted", f"{seen}.")
