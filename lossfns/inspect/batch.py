"""What can be seen of a batch without a loss: frames, ids, weights, ends of responses, columns. Nothing raises."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossfns.datum import FIELD_DTYPES
from lossfns.errors import LossInputError
from lossfns.inspect.findings import Found, caught, listed
from lossfns.inspect.probe import ALIASES, Shapes
from lossfns.pack import FIXES, align_row, as_row, find_column
from lossfns.tokens import COLUMNS, LOGPROB_COLUMNS, ON_POLICY
from lossfns.values import LOGPROB_TOLERANCE

Array = np.ndarray[Any, Any]
Numbers = dict[str, Any]
PER_TOKEN = {*COLUMNS, *FIELD_DTYPES, *ALIASES.values()}
FAR = 5.0
"""A mean |log-ratio| that no two policies over the same tokens have."""

ENOUGH = 8
"""How many tokens it takes to see that a column is shifted."""


# Frames


def target_rows(data: Sequence[Any], bound: Mapping[str, Any], vocab_size: int | None, found: Found) -> list[Array]:
    """Each datum's targets, with every field that does not fit them among the findings."""
    table = {}
    for name, value in bound.items():
        if value is not ON_POLICY:
            with caught(found, name):
                table[name] = find_column(name, data, bound)
    rows: list[Array] = []
    for i, datum in enumerate(data):
        with caught(found, "loss_fn_inputs", i):
            fields = dict(datum.loss_fn_inputs)
            rows.append(targets_of(fields, vocab_size, i))
            for name, value in (fields | {name: given[i] for name, given in table.items()}).items():
                with caught(found, name, i):
                    check_length(name, np.asarray(as_row(value, name, i)), rows[-1].shape, i, found)
            with caught(found, "model_input", i):
                check_model_input(datum.model_input, rows[-1], i, found)
    if extra := {name for datum in data for name in datum.loss_fn_inputs} - {"target_tokens", "weights"}:
        message = (
            f"{', '.join(sorted(extra))} are for Tinker; Fireworks refuses them in a custom call: bind them there."
        )
        found.add("note", "loss_fn_inputs", message)
    return rows


def targets_of(inputs: Mapping[str, Any], vocab_size: int | None, datum: int) -> Array:
    if inputs.get("target_tokens") is None:
        raise LossInputError("target_tokens", "the ids of the targets", "nothing", FIXES["target_tokens"], datum=datum)
    ids = np.asarray(as_row(inputs["target_tokens"], "target_tokens", datum))
    if ids.ndim not in (1, 2) or not ids.size:
        fix = "Drop a datum that has nothing to predict."
        raise LossInputError("target_tokens", "ids [N] or [N, K]", f"shape {ids.shape}", fix, datum=datum)
    whole, top = ids.dtype.kind in "iu", math.inf if vocab_size is None else vocab_size
    if not whole or ids.min() < 0 or ids.max() >= top:
        got = f"ids from {ids.min()} to {ids.max()}" if whole else str(ids.dtype)
        fix = "Use the tokenizer of this model."
        raise LossInputError("target_tokens", f"integers in [0, {top})", got, fix, datum=datum)
    return ids


def check_length(name: str, row: Array, shape: Sequence[int], datum: int, found: Found) -> None:
    """A per-token field has one number for each target; of other fields one can only say that they differ."""
    if name in PER_TOKEN and row.ndim:
        try:
            align_row(row, shape, name, datum)
        except LossInputError as error:
            error.expected = error.expected.replace("logprobs", "target_tokens")
            raise
    elif row.ndim and len(row) != shape[0]:
        found.add("note", name, f"{len(row)} values beside {shape[0]} targets: is it per token?", datum)


def check_model_input(model_input: Any, targets: Array, datum: int, found: Found) -> None:
    """As many inputs as targets, and target j is input j + 1."""
    length, n = int(model_input.length), len(targets)
    if length != n:
        fix = "model_input is tokens[:-1] and target_tokens is tokens[1:]."
        hints = {1: "Its last token predicts nothing: leave it out.", -1: "A token short: were targets not shifted?"}
        fix = f"{hints.get(length - n, '')} {fix}".strip()
        raise LossInputError("model_input", f"{n} tokens (the length of target_tokens)", str(length), fix, datum=datum)
    text = all(hasattr(chunk, "tokens") for chunk in getattr(model_input, "chunks", ()))
    if not text or targets.ndim == 2 or n < 3:
        return
    ids = np.asarray(model_input.to_ints())
    if (ids[1:] == targets[:-1]).all():
        return
    fix = "Target j is token j + 1."
    if (ids == targets).all():
        raise LossInputError("target_tokens", "the next tokens", "the model_input itself, not shifted", fix)
    if (ids[2:] == targets[:-2]).all():
        raise LossInputError("target_tokens", "the next tokens", "the tokens after the next: shifted twice", fix)
    found.add(
        "note",
        "target_tokens",
        "are not the model_input's next tokens. For distillation that is as it should be.",
        datum,
    )


# Columns


@dataclass(frozen=True)
class View:
    """A batch whose frames fit: targets by datum, columns end to end."""

    targets: list[Array]
    columns: dict[str, Tensor]

    @property
    def shapes(self) -> Shapes:
        return [row.shape for row in self.targets]

    @property
    def active(self) -> Tensor:
        return self.columns["weights"] != 0

    def by_datum(self, x: Tensor) -> Tensor:
        """Σ of x over each datum: ``[N] -> [B]``."""
        lengths = torch.tensor([row.size for row in self.targets])
        datums = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        return torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, datums, x.double())

    def any(self, x: Tensor) -> Tensor:
        """Which datums have one: ``[B]`` bool."""
        return self.by_datum(x) > 0


def weights(view: View, signed: bool | None, paired: bool, found: Found) -> Numbers:
    """How many tokens are trained, and what is odd about their weights; ``signed=None``: the loss does not say."""
    w, active = view.columns["weights"], view.active
    counts = view.by_datum(active)
    empty, bad, negative = counts == 0, view.any(~w.isfinite()), view.any(w < 0)
    lone = empty & ~empty.reshape(-1, 2).all(1).repeat_interleave(2) if paired else torch.zeros_like(empty)
    if bad.any():
        found.add("error", "weights", f"not finite in {listed(bad)}. Give 0 to what is not trained.", bad)
    if empty.all():
        found.add("error", "weights", "0 everywhere: there is nothing to train. Is the mask inverted?", empty)
    elif lone.any():
        found.add("error", "weights", f"one side of a pair has no active token: {listed(lone)}. Drop the pair.", lone)
    elif empty.any():
        cost = "it costs a forward pass and trains nothing."
        found.add("warning", "weights", f"no active token in {listed(empty)}: {cost}", empty)
    if negative.any() and signed is not True:
        fix = "Only likelihood takes that: put the sign into the advantages."
        found.add(
            "warning" if signed is None else "error", "weights", f"negative in {listed(negative)}. {fix}", negative
        )
    if active.all():
        found.add("note", "weights", "no target is masked in any datum: is the prompt trained on too?")
    return {
        "active": int(active.sum()),
        "share": float(active.double().mean()),
        "fewest": int(counts.min()),
        "most": int(counts.max()),
        "fractional": int((w != w.round()).sum()),
        "negative": int((w < 0).sum()),
        "empty datums": int(empty.sum()),
    }


def last_targets(view: View, eos_id: int | None, found: Found) -> Numbers:
    """With which token the trained part of each datum ends, and whether the datum ends there too."""
    parts = torch.split(view.columns["weights"], [row.size for row in view.targets])
    rows = [(t.reshape(len(t), -1), w.reshape(len(t), -1).abs().numpy()) for t, w in zip(view.targets, parts)]
    lasts = [(t, w, np.flatnonzero(w.any(1))[-1]) for t, w in rows if w.any()]
    ids = [int(t[last, w[last].argmax()]) for t, w, last in lasts]  # of K targets the heaviest
    complete = sum(int(last == len(t) - 1) for t, _, last in lasts)
    numbers: Numbers = {"responses": len(ids), "trained to the last target": complete}
    if not complete:
        message = "the last target is masked in every datum: is it padding, or is no response trained to its end?"
        found.add("warning", "target_tokens", message)
    if eos_id is None:
        [(most, times)] = Counter(ids).most_common(1)
        return numbers | {"most often end with": most, "times": times}
    stops = ids.count(eos_id)
    there = any((t == eos_id).any() for t in view.targets)
    if not stops:
        why = (
            "it is in the targets, but not the last that is trained: is pad = eos masked?" if there else "no target is."
        )
        found.add("warning", "target_tokens", f"no response is trained to end with EOS ({eos_id}): {why}")
    elif stops < len(ids):
        others = f"{len(ids) - stops} of {len(ids)} responses"
        found.add("note", "target_tokens", f"{others} are not trained to end with EOS ({eos_id}): cut off?")
    return numbers | {"end with EOS": stops}


def advantages(view: View, found: Found) -> Numbers:
    """Whether the advantages have something to say."""
    a = torch.where(view.active, view.columns["advantages"], 0)
    values, bad = a[view.active], view.any(~a.isfinite())
    silent = view.any(view.active) & ~view.any(a != 0)
    if bad.any():
        found.add("error", "advantages", f"not finite in {listed(bad)}. A group of one has no standard deviation.", bad)
    elif silent.any() and not values.any():
        why = "Were all rewards of each group equal?"
        found.add("error", "advantages", f"0 at every active token: there is no policy gradient. {why}")
    elif (values == values[0]).all():
        found.add("warning", "advantages", "one number for all tokens: nothing is told apart. Is the baseline missing?")
    elif values.min() >= 0:
        found.add("warning", "advantages", "none is negative: are these rewards? See group_advantages.")
    if silent.any() and values.any():
        found.add("note", "advantages", f"0 throughout {listed(silent)}: no policy gradient there.", silent)
    shares = {"zero": values == 0, "positive": values > 0, "negative": values < 0}
    spread = {"mean": float(values.mean()), "std": float(values.std(correction=0))}
    return spread | {name: float(share.double().mean()) for name, share in shares.items()}


def logprob_columns(view: View, reads: Sequence[str], found: Found) -> Numbers:
    """Whether old, reference and sampler logprobs are logprobs, and of these tokens: mean |difference| of each two."""
    columns = {name: x for name, x in view.columns.items() if name in LOGPROB_COLUMNS and name in reads}
    for name, x in columns.items():
        bad = view.any(view.active & ~((x <= LOGPROB_TOLERANCE) & x.isfinite()))
        if bad.any():
            message = f"nan, infinite or above 0 at an active token of {listed(bad)}. Mask it, or mend it."
            found.add("error", name, message, bad)
        elif not x[view.active].any():
            found.add("warning", name, "0 at every active token: was it left unset?")
    numbers: Numbers = {}
    for (one, x), (other, y) in combinations(columns.items(), 2):
        distance = numbers[f"|{one.split('_')[0]} - {other.split('_')[0]}|"] = apart(x, y, view.active)
        both = view.active[1:] & view.active[:-1]
        shifted = min(apart(x[1:], y[:-1], both), apart(x[:-1], y[1:], both)) if both.sum() >= ENOUGH else distance
        if shifted < distance / 2:
            found.add("warning", other, f"fits {one} better by one token on: position j holds that of token j + 1.")
        elif distance > FAR:
            found.add("warning", other, f"{distance:.3g} nats from {one} on average: are both of these tokens?")
    return numbers


def apart(x: Tensor, y: Tensor, active: Tensor) -> float:
    return float((x - y)[active].abs().mean())
