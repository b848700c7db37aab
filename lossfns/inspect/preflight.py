"""The dry run before a paid call: inspect a batch, and run the loss at step zero on made-up logprobs."""

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
from lossfns.inspect.batch import Array, BatchView, Numbers, target_rows
from lossfns.inspect.findings import Finding, Findings, recorded
from lossfns.inspect.gradients import GradReport, json_safe
from lossfns.inspect.pairs import check_exchanged_lengths, inspect_labels, inspect_pairs
from lossfns.inspect.probe import (
    bound_columns,
    gradient_of,
    loss_name,
    loss_of,
    readable_columns,
    row_kind,
    split_by_datum,
    visible_columns,
    without_warnings,
)
from lossfns.inspect.stepzero import check_step_zero, step_zero
from lossfns.loss import BoundLoss, Loss, LossFn
from lossfns.pack import check_data, check_logprobs, check_shapes
from lossfns.tokens import LOGPROB_COLUMNS, PAIRS, SEQUENCES, TOKENS

LEVELS = ("error", "warning", "note")
NO_BREAK = "\x00"
"""Stands for a space at which textwrap must not break a line."""

MAX_ALIKE = 3
"""The number of findings of one level and field that the table shows."""


@dataclass(frozen=True)
class Preflight:
    """The result of a dry run.

    Attributes:
        loss_fn: name of the loss.
        numbers: numbers about the batch and the loss, by section.
        findings: errors first, then warnings, then notes.
        step_zero: the gradients at step zero; None if errors prevented their measurement.
    """

    loss_fn: str
    numbers: dict[str, Numbers]
    findings: list[Finding]
    step_zero: GradReport | None

    @property
    def ok(self) -> bool:
        """Whether there are no errors. Warnings are for a person to judge."""
        return all(finding.level != "error" for finding in self.findings)

    @property
    def verdict(self) -> str:
        """``"ready"``, ``"DOUBTFUL"`` if there is a warning, or ``"NOT READY"`` if there is an error."""
        levels = {finding.level for finding in self.findings}
        return "NOT READY" if "error" in levels else "DOUBTFUL" if "warning" in levels else "ready"

    def as_dict(self) -> dict[str, Any]:
        """Return the whole result as JSON: verdict, numbers, findings, and the report of the gradients at step zero."""
        report = None if self.step_zero is None else self.step_zero.as_dict()
        findings = [vars(finding) for finding in self.findings]
        verdict = {"ok": self.ok, "verdict": self.verdict}
        result = {"loss_fn": self.loss_fn, **verdict, "numbers": self.numbers, "findings": findings}
        return json_safe(result | {"step_zero": report})  # type: ignore[no-any-return]

    def table(self) -> str:
        """Return the verdict, the numbers and the findings as text."""
        counts = Counter(finding.level for finding in self.findings)
        tally = ", ".join(f"{counts[level]} {level}{'s' * (counts[level] != 1)}" for level in LEVELS)
        lines = [f"{self.verdict} ({tally})   {self.loss_fn}", ""]
        for section, values in self.numbers.items():
            text = "   ".join(f"{name} {value:.6g}".replace(" ", NO_BREAK) for name, value in values.items())
            wrapped = textwrap.wrap(text, 110, initial_indent=f"{section:<14}", subsequent_indent=" " * 14)
            lines += [line.replace(NO_BREAK, " ") for line in wrapped]
        if self.numbers:
            lines.append("")
        for _, group in groupby(self.findings, key=lambda finding: (finding.level, field_name(finding))):
            alike = list(group)
            lines += map(str, alike[:MAX_ALIKE])
            if len(alike) > MAX_ALIKE:
                lines.append(f"  ... and {len(alike) - MAX_ALIKE} more about {field_name(alike[0])}")
        return "\n".join(lines).rstrip()

    __str__ = table


def field_name(finding: Finding) -> str:
    """Return the field of a finding without the index of a token."""
    return finding.field.partition("[")[0]


def preflight(
    loss_fn: LossFn,
    data: Sequence[Any],
    *,
    logprobs: Sequence[Tensor] | None = None,
    eos_id: int | None = None,
    vocab_size: int | None = None,
    pairs: bool | None = None,
) -> Preflight:
    """Inspect a batch and a loss before the first forward pass. Bad data is reported, not raised.

    Args:
        loss_fn: any function that follows the contract. The columns of a bound loss are read from its binding.
        data: B datums, of ours or of an SDK.
        logprobs: the policy's logprobs. By default they are the old ones, else the reference's, else uniform.
        eos_id: the token that ends a response; the result tells whether it is trained.
        vocab_size: bounds the ids. Uniform logprobs are −ln(vocab_size), or −1 without it.
        pairs: whether datums 2i and 2i + 1 are chosen and rejected; None takes it from the loss, or from its attribute
            ``kind``. The two sides of a pair are compared: their common tokens, masks, prompts and references.

    >>> from lossfns import cross_entropy, datum_from_tokens
    >>> data = [datum_from_tokens([5, 6, 7, 2], prompt_length=2), datum_from_tokens([5, 6], [0.0, 0.0])]
    >>> flight = preflight(cross_entropy(), data, vocab_size=8)
    >>> flight.ok, flight.numbers["weights"]["active"], round(flight.step_zero.loss, 4)    # ln 8
    (True, 2, 2.0794)
    >>> print(flight.findings[0])
    warning: datum[1].weights: no active token in datum 1: it costs a forward pass and trains nothing.
    """
    kind = getattr(loss_fn, "kind", None)
    paired = (row_kind(loss_fn) == PAIRS or kind == "preference") if pairs is None else pairs
    labelled = row_kind(loss_fn) == SEQUENCES or kind == "unpaired"
    findings, numbers, report = Findings(), {}, None
    with recorded(findings, "data"):
        check_data(data, PAIRS if paired else TOKENS)
        targets = target_rows(data, bound_columns(loss_fn), vocab_size, findings)
        numbers["data"] = count_targets(data, targets)
        if findings.ok:
            view = BatchView(targets, visible_columns(loss_fn, data, [row.shape for row in targets]))
            numbers |= inspect_columns(loss_fn, view, eos_id, paired, findings)
            if paired:
                numbers["pairs"] = inspect_pairs(data, view, readable_columns(loss_fn), logprobs, findings)
            elif labelled:
                numbers["labels"] = inspect_labels(data, view, bound_columns(loss_fn), findings)
            numbers = {name: section for name, section in numbers.items() if section}
        elif paired and len(targets) == len(data):
            check_exchanged_lengths(data, bound_columns(loss_fn), targets, findings)
    if findings.ok:
        with recorded(findings, "loss_fn"), without_warnings():
            base = policy_logprobs(view, logprobs, data, vocab_size)
            numbers["denominators"] = denominators(loss_fn, data, view, paired)
            # Called for its errors alone: step_zero replaces columns that the loss may refuse.
            gradient_of(loss_fn, data, split_by_datum(base, view.shapes))
            zero = step_zero(loss_fn, data, view, base, paired)
            report = zero.report
            numbers["step zero"] = check_step_zero(zero, view, numbers["denominators"], findings)
    if report is None:
        findings.add("note", "step zero", "not measured: mend the errors first.")
    ordered = sorted(findings, key=lambda finding: LEVELS.index(finding.level))
    return Preflight(loss_name(loss_fn), numbers, ordered, report)


def count_targets(data: Sequence[Any], targets: Sequence[Array]) -> Numbers:
    lengths = [len(row) for row in targets] or [0]
    return {"datums": len(data), "targets": sum(lengths), "shortest": min(lengths), "longest": max(lengths)}


def inspect_columns(
    loss_fn: LossFn, view: BatchView, eos_id: int | None, paired: bool, findings: Findings
) -> dict[str, Numbers]:
    """Inspect the weights, the ends of responses, and the columns that the loss may read."""
    loss, reads = loss_of(loss_fn), readable_columns(loss_fn)
    sections = {"weights": inspection.inspect_weights(view, loss.signed if loss else None, paired, findings)}
    if view.active.any():
        sections["responses"] = inspection.inspect_ends(view, eos_id, findings)
        if "advantages" in reads and "advantages" in view.columns:
            sections["advantages"] = inspection.inspect_advantages(view, findings)
        sections["mean gaps"] = inspection.inspect_logprobs(view, reads, findings)
    return {name: numbers for name, numbers in sections.items() if numbers}


def policy_logprobs(
    view: BatchView, logprobs: Sequence[Tensor] | None, data: Sequence[Any], vocab_size: int | None
) -> Tensor:
    """Return the policy's logprobs before its first step, as ``[N]`` float32."""
    if logprobs is not None:
        check_logprobs(data, logprobs)
        check_shapes(data, [lp.shape for lp in logprobs], len(view.shapes[0]))
        return torch.cat([lp.detach().flatten().cpu() for lp in logprobs]).float()
    uniform = torch.full_like(view.columns["weights"], -math.log(vocab_size) if vocab_size else -1.0)
    visible = [view.columns[name] for name in LOGPROB_COLUMNS if name in view.columns]
    return torch.where(view.active, visible[0] if visible else uniform, uniform).float()


def denominators(loss_fn: LossFn, data: Sequence[Any], view: BatchView, paired: bool) -> Numbers:
    """Return the numbers by which a loss may divide. The loss's own denominator, if known, is the first."""
    trained = int((view.sum_by_datum(view.active) > 0).sum())
    counts = {"tokens": int(view.active.sum()), "Σw": float(view.columns["weights"].sum()), "sequences": trained}
    unbound = {"its own": loss_fn.denominator(data)} if isinstance(loss_fn, (Loss, BoundLoss)) else {}
    divisor: Any = loss_fn.divisor if isinstance(loss_fn, BoundLoss) else None
    bound = {} if divisor is None else {"bound": divisor}
    loss = loss_of(loss_fn)
    if loss and loss.parts:
        unbound, bound = (
            {f"{key} {name}": float(x) for key, each in table.items() for name, x in zip(loss.parts, each)}
            for table in (unbound, bound)
        )
    return unbound | bound | counts | ({"pairs": trained // 2} if paired else {})
