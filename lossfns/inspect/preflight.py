"""The dry run before a paid call: a batch inspected, a loss at step zero on fake logprobs, no model."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lossfns.inspect import batch as inspection
from lossfns.inspect.batch import Array, Numbers, View, target_rows
from lossfns.inspect.findings import Finding, Found, caught
from lossfns.inspect.gradients import GradReport, plain
from lossfns.inspect.probe import (
    LossFn,
    bound_of,
    columns_of,
    gradient_of,
    loss_of,
    name_of,
    quietly,
    reads_of,
    rows_of,
    split,
)
from lossfns.inspect.stepzero import judged, step_zero
from lossfns.loss import BoundLoss, Loss
from lossfns.pack import check_data, check_logprobs, check_shapes
from lossfns.tokens import LOGPROB_COLUMNS, PAIRS, TOKENS

LEVELS = ("error", "warning", "note")
GLUE = "\x00"  # what textwrap does not break at
SHOWN = 3
"""How many findings of one kind a terminal shows."""


@dataclass(frozen=True)
class Preflight:
    """What a dry run found: numbers by section, findings with errors first, the gradients at step zero."""

    loss_fn: str
    numbers: dict[str, Numbers]
    findings: list[Finding]
    step_zero: GradReport | None

    @property
    def ok(self) -> bool:
        """No errors; warnings are for a person to judge."""
        return all(finding.level != "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON: verdict, numbers, findings, and the report of the gradients at step zero."""
        report = None if self.step_zero is None else self.step_zero.as_dict()
        findings = [vars(finding) for finding in self.findings]
        found = {"loss_fn": self.loss_fn, "ok": self.ok, "numbers": self.numbers, "findings": findings}
        return plain(found | {"step_zero": report})  # type: ignore[no-any-return]

    def table(self) -> str:
        """The verdict, the numbers, the findings, for a terminal."""
        counts = Counter(finding.level for finding in self.findings)
        tally = ", ".join(f"{counts[level]} {level}{'s' * (counts[level] != 1)}" for level in LEVELS)
        lines = [f"{'ready' if self.ok else 'NOT READY'} ({tally})   {self.loss_fn}", ""]
        for section, values in self.numbers.items():
            text = "   ".join(f"{name} {value:.6g}".replace(" ", GLUE) for name, value in values.items())
            wrapped = textwrap.wrap(text, 110, initial_indent=f"{section:<14}", subsequent_indent=" " * 14)
            lines += [line.replace(GLUE, " ") for line in wrapped]
        lines += [""] * bool(self.numbers)
        for _, group in groupby(self.findings, key=lambda finding: (finding.level, finding.field)):
            alike = list(group)
            lines += map(str, alike[:SHOWN])
            lines += [f"  ... and {len(alike) - SHOWN} more about {alike[0].field}"] * (len(alike) > SHOWN)
        return "\n".join(lines).rstrip()

    __str__ = table


def preflight(
    loss_fn: LossFn,
    data: Sequence[Any],
    *,
    logprobs: Sequence[Tensor] | None = None,
    eos_id: int | None = None,
    vocab_size: int | None = None,
    pairs: bool | None = None,
) -> Preflight:
    """What can be known of a batch and a loss before the first forward pass. Bad data is found, not raised.

    Args:
        loss_fn: anything that follows the contract; a bound loss's columns are read from its binding.
        data: B datums, of ours or of an SDK.
        logprobs: what to take for the policy's; by default the old logprobs, else the reference's, else uniform.
        eos_id: the token that ends a response, to see whether it is trained.
        vocab_size: bounds the ids; uniform logprobs are −ln(vocab_size), without it −1.
        pairs: whether datums 2i and 2i + 1 are chosen and rejected; by default what the loss says.

    >>> from lossfns import cross_entropy, datum_from_tokens
    >>> data = [datum_from_tokens([5, 6, 7, 2], prompt_length=2), datum_from_tokens([5, 6], [0.0, 0.0])]
    >>> flight = preflight(cross_entropy(), data, vocab_size=8)
    >>> flight.ok, flight.numbers["weights"]["active"], round(flight.step_zero.loss, 4)    # ln 8
    (True, 2, 2.0794)
    >>> print(flight.findings[0])
    warning: datum[1].weights: no active token in datum 1: it costs a forward pass and trains nothing.
    """
    paired = rows_of(loss_fn) == PAIRS if pairs is None else pairs
    found, numbers, report = Found(), {}, None
    with caught(found, "data"):
        check_data(data, PAIRS if paired else TOKENS)
        targets = target_rows(data, bound_of(loss_fn), vocab_size, found)
        numbers["data"] = shape_of(data, targets)
        if found.fine:
            view = View(targets, columns_of(loss_fn, data, [row.shape for row in targets]))
            numbers |= inspected(loss_fn, view, eos_id, paired, found)
    if found.fine:
        with caught(found, "loss_fn"), quietly():
            base = unmoved(view, logprobs, data, vocab_size)
            numbers["denominators"] = denominators(loss_fn, data, view, paired)
            gradient_of(loss_fn, data, split(base, view.shapes))  # its columns as they are: it may refuse them
            zero = step_zero(loss_fn, data, view, base, paired)
            report = zero.report
            numbers["step zero"] = judged(zero, view, numbers["denominators"], found)
    if report is None:
        found.add("note", "step zero", "not measured: mend the errors first.")
    return Preflight(name_of(loss_fn), numbers, sorted(found, key=lambda f: LEVELS.index(f.level)), report)


def shape_of(data: Sequence[Any], targets: Sequence[Array]) -> Numbers:
    lengths = [len(row) for row in targets] or [0]
    return {"datums": len(data), "targets": sum(lengths), "shortest": min(lengths), "longest": max(lengths)}


def inspected(loss_fn: LossFn, view: View, eos_id: int | None, paired: bool, found: Found) -> dict[str, Numbers]:
    """What the datums and the binding say by themselves, of the columns that the loss may read."""
    loss, reads = loss_of(loss_fn), reads_of(loss_fn)
    sections = {"weights": inspection.weights(view, loss.signed if loss else None, paired, found)}
    if view.active.any():
        sections["responses"] = inspection.last_targets(view, eos_id, found)
        if "advantages" in reads and "advantages" in view.columns:
            sections["advantages"] = inspection.advantages(view, found)
        sections["mean gaps"] = inspection.logprob_columns(view, reads, found)
    return {name: numbers for name, numbers in sections.items() if numbers}


def unmoved(view: View, logprobs: Sequence[Tensor] | None, data: Sequence[Any], vocab_size: int | None) -> Tensor:
    """``[N]`` float32 logprobs of a policy before its first step."""
    if logprobs is not None:
        check_logprobs(data, logprobs)
        check_shapes(data, [lp.shape for lp in logprobs], len(view.shapes[0]))
        return torch.cat([lp.detach().flatten().cpu() for lp in logprobs]).float()
    uniform = torch.full_like(view.columns["weights"], -math.log(vocab_size) if vocab_size else -1.0)
    known = [view.columns[name] for name in LOGPROB_COLUMNS if name in view.columns]
    return torch.where(view.active, known[0] if known else uniform, uniform).float()


def denominators(loss_fn: LossFn, data: Sequence[Any], view: View, paired: bool) -> Numbers:
    """What a loss may divide by, its own first where it says."""
    trained = int((view.by_datum(view.active) > 0).sum())
    rows = {"tokens": int(view.active.sum()), "Σw": float(view.columns["weights"].sum()), "sequences": trained}
    own = {"its own": loss_fn.denominator(data)} if isinstance(loss_fn, (Loss, BoundLoss)) else {}
    bound = {"bound": loss_fn.divisor} if isinstance(loss_fn, BoundLoss) and loss_fn.divisor else {}
    return own | bound | rows | ({"pairs": trained // 2} if paired else {})
