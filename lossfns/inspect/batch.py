"""Inspect a batch without a loss: frames, ids, weights, ends of responses, columns.

A check that raises ``LossInputError`` runs inside ``recorded``, which turns the error into a finding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossfns.datum import FIELD_DTYPES
from lossfns.errors import LossInputError
from lossfns.inspect.findings import Findings, name_datums, recorded
from lossfns.inspect.probe import ALIASES, active_tokens, sum_by_datum
from lossfns.pack import Shapes, as_row, pack_side_columns
from lossfns.tokens import COLUMNS, LOGPROB_COLUMNS, ON_POLICY, TARGETS, TOKENS
from lossfns.values import LOGPROB_TOLERANCE

Array = np.ndarray[Any, Any]
Numbers = dict[str, Any]
PER_TOKEN = {*COLUMNS, *FIELD_DTYPES, *ALIASES.values()}
"""The fields of a datum that have an entry for each target."""

MAX_MEAN_GAP = 5.0
"""The mean |log-ratio|, in nats, above which two columns probably belong to different tokens."""

MIN_SHIFT_TOKENS = 8
"""The number of tokens below which a shifted column is not looked for."""


# Frames


def target_rows(
    data: Sequence[Any], bound: Mapping[str, Any], vocab_size: int | None, findings: Findings
) -> list[Array]:
    """Return each datum's targets, and record every field and bound column that does not fit them."""
    entries = {}
    for name, column in bound.items():
        if column is not ON_POLICY:
            with recorded(findings, name):
                entries[name] = entries_of(name, column, len(data))
    rows: list[Array] = []
    for i, datum in enumerate(data):
        with recorded(findings, "loss_fn_inputs", i):
            fields = dict(datum.loss_fn_inputs)
            rows.append(targets_of(fields, vocab_size, i))
            for name, value in (fields | {name: column[i] for name, column in entries.items()}).items():
                with recorded(findings, name, i):
                    check_length(name, as_row(value, name, i), datum, rows[-1].shape, i, findings)
            with recorded(findings, "model_input", i):
                check_model_input(datum.model_input, rows[-1], i, findings)
    if extra := {name for datum in data for name in datum.loss_fn_inputs} - {"target_tokens", "weights"}:
        message = f"{', '.join(sorted(extra))} are for Tinker. Fireworks refuses them in a custom call: bind them."
        findings.add("note", "loss_fn_inputs", message)
    return rows


def entries_of(name: str, column: Any, count: int) -> list[Any]:
    """Split a bound column into the entries of the datums."""
    sized = hasattr(column, "__len__") and getattr(column, "ndim", 1) > 0 and not isinstance(column, (Mapping, Set))
    if not sized or len(column) != count:
        got = str(len(column)) if sized else f"a {type(column).__name__}"
        raise LossInputError(name, f"{count} entries, one per datum", got, "Bind a list with one entry for each datum.")
    return list(column)


def targets_of(inputs: Mapping[str, Any], vocab_size: int | None, datum: int) -> Array:
    """Return a datum's targets if they are ids ``[N]`` or ``[N, K]``."""
    if inputs.get("target_tokens") is None:
        fix = "Build the datum with datum_from_tokens."
        raise LossInputError("target_tokens", "the ids of the targets", "nothing", fix, datum=datum)
    ids = np.asarray(as_row(inputs["target_tokens"], "target_tokens", datum))
    if ids.ndim not in (1, 2) or not ids.size:
        fix = "Drop a datum that has nothing to predict."
        raise LossInputError("target_tokens", "ids [N] or [N, K]", f"shape {ids.shape}", fix, datum=datum)
    integral, top = ids.dtype.kind in "iu", math.inf if vocab_size is None else vocab_size
    if not integral or ids.min() < 0 or ids.max() >= top:
        got = f"ids from {ids.min()} to {ids.max()}" if integral else str(ids.dtype)
        fix = "Use the tokenizer of this model."
        raise LossInputError("target_tokens", f"integers in [0, {top})", got, fix, datum=datum)
    return ids


def check_length(
    name: str, row: Array | Tensor, datum: Any, shape: Sequence[int], index: int, findings: Findings
) -> None:
    """Refuse a per-token field that does not have one entry for each target; note the length of any other field."""
    if name in PER_TOKEN and row.ndim and tuple(row.shape) != tuple(shape):
        # Pack this one column, for the error that a call of the loss would raise.
        columns = {"weights": [torch.ones(tuple(shape))], name: [row]}
        like, rows = torch.empty(0, dtype=torch.float64), TARGETS if len(shape) == 2 else TOKENS
        try:
            pack_side_columns([datum], [shape], like, (name,), columns, rows=rows)
        except LossInputError as error:
            error.expected = error.expected.replace("logprobs", "target_tokens")  # there are no logprobs yet
            raise
    elif name not in PER_TOKEN and row.ndim and len(row) != shape[0]:
        findings.add("note", name, f"{len(row)} values beside {shape[0]} targets: is it per token?", index)


def check_model_input(model_input: Any, targets: Array, datum: int, findings: Findings) -> None:
    """Refuse inputs whose number is not that of the targets, and targets that are not the next tokens."""
    length, n = int(model_input.length), len(targets)
    if length != n:
        fix = "model_input is tokens[:-1] and target_tokens is tokens[1:]."
        hints = {1: "Its last token predicts nothing: leave it out.", -1: "A token short: were targets not shifted?"}
        fix = f"{hints.get(length - n, '')} {fix}".strip()
        raise LossInputError("model_input", f"{n} tokens (the length of target_tokens)", str(length), fix, datum=datum)
    text_only = all(hasattr(chunk, "tokens") for chunk in getattr(model_input, "chunks", ()))
    if not text_only or targets.ndim == 2 or n < 3:
        return
    ids = np.asarray(model_input.to_ints())
    if (ids[1:] == targets[:-1]).all():
        return
    fix = "Target j is token j + 1."
    if (ids == targets).all():
        raise LossInputError("target_tokens", "the next tokens", "the model_input itself, not shifted", fix)
    if (ids[2:] == targets[:-2]).all():
        raise LossInputError("target_tokens", "the next tokens", "the tokens after the next: shifted twice", fix)
    message = "are not the model_input's next tokens. For distillation that is as it should be."
    findings.add("note", "target_tokens", message, datum)


# Columns


@dataclass(frozen=True)
class BatchView:
    """A batch in which every column has the shape of its datum's targets.

    Attributes:
        targets: the targets of each datum, ``[N_i]`` or ``[N_i, K]``.
        columns: the visible columns as ``[N]``, datums end to end.
    """

    targets: list[Array]
    columns: dict[str, Tensor]

    @property
    def shapes(self) -> Shapes:
        return [row.shape for row in self.targets]

    @property
    def active(self) -> Tensor:
        return active_tokens(self.columns)

    def sum_by_datum(self, x: Tensor) -> Tensor:
        """Sum over each datum: ``[N] -> [B]``."""
        return sum_by_datum(x, self.shapes)

    def datums_with(self, x: Tensor) -> Tensor:
        """Whether each datum has a True entry in a mask: ``[N] -> [B]`` bool."""
        return self.sum_by_datum(x) > 0


def inspect_weights(view: BatchView, signed: bool | None, paired: bool, findings: Findings) -> Numbers:
    """Count the trained tokens, and record unusual weights.

    ``signed`` is whether the loss takes negative weights; None if that is not known.
    """
    w, active = view.columns["weights"], view.active
    counts = view.sum_by_datum(active)
    empty, bad, negative = counts == 0, view.datums_with(~w.isfinite()), view.datums_with(w < 0)
    # lone: the empty side of a pair whose other side is not empty
    lone = empty & ~empty.reshape(-1, 2).all(1).repeat_interleave(2) if paired else torch.zeros_like(empty)
    if bad.any():
        message = f"not finite in {name_datums(bad)}. Give 0 to what is not trained."
        findings.add("error", "weights", message, bad)
    if empty.all():
        findings.add("error", "weights", "0 everywhere: there is nothing to train. Is the mask inverted?", empty)
    elif lone.any():
        message = f"one side of a pair has no active token: {name_datums(lone)}. Drop the pair."
        findings.add("error", "weights", message, lone)
    elif empty.any():
        cost = "it costs a forward pass and trains nothing."
        findings.add("warning", "weights", f"no active token in {name_datums(empty)}: {cost}", empty)
    if negative.any() and signed is not True:
        message = f"negative in {name_datums(negative)}. Only likelihoods take that: put the sign into the advantages."
        findings.add("warning" if signed is None else "error", "weights", message, negative)
    if active.all():
        findings.add("note", "weights", "no target is masked in any datum: is the prompt trained on too?")
    return {
        "active": int(active.sum()),
        "share": float(active.double().mean()),
        "fewest": int(counts.min()),
        "most": int(counts.max()),
        "fractional": int((w != w.round()).sum()),
        "negative": int((w < 0).sum()),
        "empty datums": int(empty.sum()),
    }


def inspect_ends(view: BatchView, eos_id: int | None, findings: Findings) -> Numbers:
    """Look at the last trained token of each datum: is it EOS, and is it the datum's last target?"""
    parts = torch.split(view.columns["weights"], [row.size for row in view.targets])
    rows = [(t.reshape(len(t), -1), w.reshape(len(t), -1).abs().numpy()) for t, w in zip(view.targets, parts)]
    lasts = [(t, w, np.flatnonzero(w.any(1))[-1]) for t, w in rows if w.any()]
    ids = [int(t[last, w[last].argmax()]) for t, w, last in lasts]  # the heaviest of K targets
    complete = sum(int(last == len(t) - 1) for t, _, last in lasts)
    numbers: Numbers = {"responses": len(ids), "trained to the last target": complete}
    if not complete:
        message = "the last target is masked in every datum: is it padding, or is no response trained to its end?"
        findings.add("warning", "target_tokens", message)
    if eos_id is None:
        [(last_id, count)] = Counter(ids).most_common(1)
        return numbers | {"most often end with": last_id, "times": count}
    stops = ids.count(eos_id)
    present = any((t == eos_id).any() for t in view.targets)
    if not stops:
        why = (
            "it is in the targets, but is never the last trained one: is pad = eos masked?"
            if present
            else "no target is EOS."
        )
        findings.add("warning", "target_tokens", f"no response is trained to end with EOS ({eos_id}): {why}")
    elif stops < len(ids):
        others = f"{len(ids) - stops} of {len(ids)} responses"
        findings.add("note", "target_tokens", f"{others} are not trained to end with EOS ({eos_id}): cut off?")
    return numbers | {"end with EOS": stops}


def inspect_advantages(view: BatchView, findings: Findings) -> Numbers:
    """Describe the advantages of active tokens, and record if they carry no signal."""
    a = torch.where(view.active, view.columns["advantages"], 0)
    values, bad = a[view.active], view.datums_with(~a.isfinite())
    silent = view.datums_with(view.active) & ~view.datums_with(a != 0)
    if bad.any():
        message = f"not finite in {name_datums(bad)}. A group of one has no standard deviation."
        findings.add("error", "advantages", message, bad)
    elif silent.any() and not values.any():
        message = "0 at every active token: there is no policy gradient. Were all rewards of each group equal?"
        findings.add("error", "advantages", message)
    elif (values == values[0]).all():
        message = "one number for all tokens: nothing is told apart. Is the baseline missing?"
        findings.add("warning", "advantages", message)
    elif values.min() >= 0:
        findings.add("warning", "advantages", "none is negative: are these rewards? See group_advantages.")
    if silent.any() and values.any():
        findings.add("note", "advantages", f"0 throughout {name_datums(silent)}: no policy gradient there.", silent)
    moments = {"mean": float(values.mean()), "std": float(values.std(correction=0))}
    signs = {"zero": values == 0, "positive": values > 0, "negative": values < 0}
    return moments | {name: float(mask.double().mean()) for name, mask in signs.items()}


def inspect_logprobs(view: BatchView, reads: Sequence[str], findings: Findings) -> Numbers:
    """Return the mean gap between each two of the old, reference and sampler logprobs.

    Record columns that are not logprobs, or not of these tokens.
    """
    columns = {name: x for name, x in view.columns.items() if name in LOGPROB_COLUMNS and name in reads}
    for name, x in columns.items():
        bad = view.datums_with(view.active & ~((x <= LOGPROB_TOLERANCE) & x.isfinite()))
        if bad.any():
            message = f"nan, infinite or above 0 at an active token of {name_datums(bad)}. Mask it, or mend it."
            findings.add("error", name, message, bad)
        elif not x[view.active].any():
            findings.add("warning", name, "0 at every active token: was it left unset?")
    numbers: Numbers = {}
    for (first, x), (second, y) in combinations(columns.items(), 2):
        gap = numbers[f"|{first.split('_')[0]} - {second.split('_')[0]}|"] = mean_gap(x, y, view.active)
        both = view.active[1:] & view.active[:-1]
        enough = both.sum() >= MIN_SHIFT_TOKENS
        shifted = min(mean_gap(x[1:], y[:-1], both), mean_gap(x[:-1], y[1:], both)) if enough else gap
        if shifted < gap / 2:
            message = f"fits {first} better by one token of shift: does position j hold the logprob of token j + 1?"
            findings.add("warning", second, message)
        elif gap > MAX_MEAN_GAP:
            findings.add("warning", second, f"{gap:.3g} nats from {first} on average: are both those of these tokens?")
    return numbers


def mean_gap(x: Tensor, y: Tensor, active: Tensor) -> float:
    """Return the mean |x − y| over active tokens, in nats."""
    return float((x - y)[active].abs().mean())
