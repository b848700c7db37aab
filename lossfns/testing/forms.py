"""Losses of other forms as contract functions: functions of padded tensors or of sums, factories, objects.

The columns are passed in the first form with which the loss runs on a small batch of six datums.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossfns.errors import LossInputError
from lossfns.loading import described, place_of
from lossfns.testing.batch import Batch, Rows
from lossfns.testing.laws.base import NotApplicable
from lossfns.testing.names import column_of, names_teacher
from lossfns.testing.settings import Target, fills, parameters
from lossfns.testing.sources import result_names, stated_shape

PROBE = Batch(
    [[-1.0, -2.0, -0.5, -1.5], [-1.0, -0.25, -3.0, -1.5, -0.75], [-0.5, -1.0], [-2.0, -1.0, -0.25, -1.5, -0.5, -1, -2],
     [-1.5, -0.75], [-0.5, -1.25, -2.5, -1.0]],
    [[0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0, 1.0], [1.0, 1.0], [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0],
     [0.0, 1.0, 1.0, 1.0]],
    {
        "advantages": [[a] * n for a, n in zip((1.0, -1.0, 0.5, -2.0, 1.5, -0.5), (4, 5, 2, 7, 2, 4))],
        "old_logprobs": [[-1.0, -2.0625, -0.5, -1.5], [-1.0, -0.25, -3.0, -1.5625, -0.75], [-0.5625, -1.0],
                         [-2.0, -1.0, -0.25, -1.5, -0.5625, -1.0, -2.0], [-1.5, -0.8125], [-0.5, -1.3125, -2.5, -1.0]],
        "ref_logprobs": [[-1.0, -2.25, -1.0, -1.25], [-1.5, -0.25, -2.5, -1.25, -0.75], [-1.0, -1.5],
                         [-2.0, -1.25, -0.25, -1.0, -0.5, -1.5, -2.0], [-1.0, -0.75], [-0.5, -1.0, -2.0, -1.25]],
        "sampler_logprobs": [[-1.0, -2.0, -0.5625, -1.5], [-1.0, -0.25, -3.0, -1.5, -0.8125], [-0.5, -1.0625],
                             [-2.0, -1.0, -0.25, -1.5, -0.5, -1.0625, -2.0], [-1.5625, -0.75],
                             [-0.5, -1.25, -2.5625, -1.0]],
        "labels": [[y] * n for y, n in zip((1.0, 0.0, 1.0, 1.0, 0.0, 1.0), (4, 5, 2, 7, 2, 4))],
    },
)  # fmt: skip
"""Six datums, three pairs, on which forms are tried. No length is 1, 3 or 6, so that a wrong form does not fit."""


class Adapted:
    """A contract function that calls a callable of another form.

    Attributes:
        target: the callable under test.
        optional: the parameters that name a column and are None by default.
        unused: the optional parameters whose columns do not change the gradients. They stay None.
    """

    def __init__(self, target: Target) -> None:
        self.target, self.__name__ = target, target.name
        self.optional: tuple[str, ...] = ()
        self.unused: frozenset[str] = frozenset()

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that were changed."""
        return self.target.changed

    @property
    def description(self) -> str:
        """How the callable is called, for the report; "" if as a contract function."""
        return ""

    def with_settings(self, **settings: Any) -> Any:
        """Return the loss with some of its settings changed. A column that it did not use may be used then."""
        other = copy.copy(self)
        other.target = self.target.having(settings)
        other.unused = other.find_unused()
        return other

    def find_unused(self) -> frozenset[str]:
        """Return the optional parameters whose columns do not change the gradients. A failing call shows a use."""
        return frozenset(name for name in self.optional if not self.uses(name))

    def uses(self, name: str) -> bool:
        """Return whether the column of an optional parameter changes the gradients, or the loss needs it."""
        found = []
        for unused in (frozenset(), frozenset([name])):
            tried = copy.copy(self)
            tried.unused = unused
            try:
                found.append(gradients_of(tried, PROBE))
            except Exception:
                return True
        return not same_rows(*found)


def gradients_of(loss_fn: Any, batch: Batch) -> Rows:
    """Return the gradients of a contract function on a batch; no rows if it does not depend on the logprobs."""
    logprobs = batch.tensors(torch.float32)
    loss = loss_fn(batch.data(), logprobs)[0]
    if not loss.requires_grad:
        return []
    loss.backward()
    return [([0.0] * lp.numel() if lp.grad is None else lp.grad.tolist()) for lp in logprobs]


def same_rows(a: Rows, b: Rows) -> bool:
    """Return whether two lists of gradients agree up to rounding."""
    return len(a) == len(b) and all(np.allclose(x, y, rtol=1e-4, atol=1e-7, equal_nan=True) for x, y in zip(a, b))


# The contract's own form


class ContractLoss(Adapted):
    """A contract function that an object, a class or a factory makes, or one that reads fields of other names.

    Attributes:
        renames: whether it reads fields by other names than the datums'.
        read: the names by which it reads fields.
        missing: the names that it reads and that no datum has.
    """

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.renames = True
        self.read: set[str] = set()
        self.missing: set[str] = set()

    def __call__(self, data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Any:
        if self.renames:
            data = [SpelledDatum(datum, self.read, self.missing) for datum in data]
        return self.target.fn(data, logprobs_list)


class SpelledFields(dict[str, Any]):
    """A datum's fields, which can also be read by the names in ``PARAMETER_NAMES``. Record the names that are read."""

    def __init__(self, fields: Any, read: set[str], missing: set[str]) -> None:
        super().__init__(fields)
        self.fields, self.read, self.missing = fields, read, missing

    def resolve(self, name: Any) -> Any:
        """Return the name of the field that another name stands for."""
        column = column_of(name) if isinstance(name, str) and name not in self.fields else None
        return column if column in self.fields else name

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        if self.resolve(name) not in self.fields:
            self.missing.add(name)
        return self.fields[self.resolve(name)]

    def __contains__(self, name: Any) -> bool:
        return self.resolve(name) in self.fields

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return self.fields.get(self.resolve(name), default)

    def __setitem__(self, name: str, value: Any) -> None:
        self.fields[name] = value

    def items(self) -> Any:
        return self.fields.items()

    def values(self) -> Any:
        return self.fields.values()


class SpelledDatum:
    """A datum with ``SpelledFields``."""

    def __init__(self, datum: Any, read: set[str], missing: set[str]) -> None:
        self.model_input = datum.model_input
        self.loss_fn_inputs = SpelledFields(datum.loss_fn_inputs, read, missing)


# Columns as arguments


def parameter_rows(data: Sequence[Any], parameter: str, column: str | None = None) -> list[Tensor]:
    """Return the values of a parameter: float32 rows of all datums, or of one side of each pair.

    A parameter for the weights whose name contains "mask" reads the field ``mask`` instead of ``weights``.
    """
    side, _, column = (column or column_of(parameter) or "").rpartition(" ")
    selected = {"chosen": data[0::2], "rejected": data[1::2]}.get(side, data)
    field = "mask" if column == "weights" and "mask" in parameter.lower() else column
    return [torch.from_numpy(datum.loss_fn_inputs[field].to_numpy().copy()) for datum in selected]


def datum_advantage(row: Tensor, weights: Tensor, what: str = "advantage") -> float:
    """Return the advantage of a datum. Raise NotApplicable if its active tokens have different advantages."""
    active = {x for x, w in zip(row.tolist(), weights.tolist()) if w}
    if len(active) > 1:
        raise NotApplicable(f"it takes one {what} for each datum")
    return active.pop() if active else 0.0


def columns_of(names: Sequence[str]) -> dict[str, str]:
    """Return parameter → column.

    Without a parameter for weights or reference logprobs, labels are token ids, as in Hugging Face. Without one for old
    logprobs, the sampler's logprobs get the old ones. Beside proximal logprobs, the old ones are those of the sampler.
    """
    columns = {name: column_of(name) or "" for name in names}
    if not any(c.endswith(("weights", "ref_logprobs")) for c in columns.values()):
        columns = {n: "ids" if c == "labels" else c for n, c in columns.items()}  # token ids, -100 where masked
    if any("prox" in name for name in names):
        return {n: "sampler_logprobs" if c == "old_logprobs" and "prox" not in n else c for n, c in columns.items()}
    if "old_logprobs" in columns.values():
        return columns
    return {n: "old_logprobs" if c == "sampler_logprobs" else c for n, c in columns.items()}


@dataclass(frozen=True)
class Form:
    """How columns are passed to a function.

    Attributes:
        level: logprobs and masks as "tokens" ``[B, T]``, as "sums" over trained tokens ``[B]``, or as "rows", a list.
        advantages: "tokens" ``[B, T]``, "datum" ``[B]`` or "column" ``[B, 1]``.
        mask: the dtype of masks.
        labels: "float", "bool", "long" or "sign" (±1) ``[B]``, or "tokens" ``[B, T]``.
        halves: whether the chosen sides come first, then the rejected ones; else the sides alternate.
    """

    level: str = "tokens"
    advantages: str = "tokens"
    mask: str = "float"
    labels: str = "float"
    halves: bool = False


DTYPES = {"float": None, "bool": torch.bool, "long": torch.long}


class PaddedLoss(Adapted):
    """A contract function that calls a function of padded ``[B, T]`` tensors, or of sums over each sequence.

    Parameters are filled by their names. The function may return the loss, one loss for each sequence or pair, of which
    the mean is taken, a tuple that starts with one of these, a dict with the key ``loss``, or an object with the
    attribute ``loss``.
    """

    def __init__(self, fn: Any, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__(fn if isinstance(fn, Target) else Target(fn, changed=settings))
        self.parameters = [p for p in parameters(self.target.fn) if p.name not in self.settings and fills(p)]
        self.required = tuple(p.name for p in self.parameters)
        self.optional = tuple(p.name for p in self.parameters if p.default is None)
        self.column_by_name = columns_of(self.required)
        self.columns = set(self.column_by_name.values())
        self.form: Form | None = None
        self.returns_vector = False

    def __call__(self, data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        if self.form is None:
            self.find_form()
        assert self.form is not None
        return self.call(self.form, data, logprobs_list)

    @property
    def description(self) -> str:
        """The form in which it is called, and what is done with its result."""
        if self.form is None:
            return ""
        levels = {"tokens": "[B, T] tensors", "sums": "sums over trained tokens", "rows": "lists of tensors"}
        parts = [f"called with {levels[self.form.level]}"]
        if self.takes_datum_advantages:
            parts.append(f"advantages {'[B, 1]' if self.form.advantages == 'column' else '[B]'}")
        if self.form.mask != "float":
            parts.append(f"{self.form.mask} masks")
        if self.form.halves:
            parts.append("chosen sides before rejected ones")
        if self.unused:
            parts.append(f"without {', '.join(sorted(self.unused))}")
        if self.returns_vector:
            parts.append("the mean of its losses is taken")
        return ", ".join(parts)

    @property
    def takes_datum_advantages(self) -> bool:
        """Whether it takes one advantage for each datum."""
        if self.form is None:
            self.find_form()
        return "advantages" in self.columns and self.form is not None and self.form.advantages != "tokens"

    def call(self, form: Form, data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Call the function with the columns in this form."""
        weights = parameter_rows(data, "weights" if self.reads_weights else "mask", "weights")
        given = [name for name in self.required if name not in self.unused and self.is_given(name, data)]
        rows = {name: self.rows(name, data, logprobs_list) for name in given}
        for name, column_rows in {**rows, "weights": weights}.items():
            for i, (row, lp) in enumerate(zip(column_rows, logprobs_list)):
                if row.shape != lp.shape:
                    fix = "Every row has the length of target_tokens."
                    raise LossInputError(name, f"shape {tuple(lp.shape)}", str(tuple(row.shape)), fix, datum=i)
        dtype = logprobs_list[0].dtype
        arguments = {}
        for name, column_rows in rows.items():
            chosen = self.selection(name, form, data, weights)
            taken = [[source[i].to(dtype) for i in chosen] for source in (column_rows, weights)]
            arguments[name] = self.argument(self.column_by_name[name], form, *taken)
        positional = [arguments.pop(p.name, None) for p in self.parameters if p.kind is p.POSITIONAL_ONLY]
        result = self.target.fn(*positional, **arguments)
        loss, metrics = self.contract_result(form, result, weights)
        # The gradient of a datum that was left out is 0, not None.
        return sum((lp[:0].sum() for lp in logprobs_list), loss) if form.level == "sums" else loss, metrics

    @property
    def reads_weights(self) -> bool:
        """Whether fractional weights reach the function: it has a parameter for them, or gets weighted sums."""
        masks = [name for name, column in self.column_by_name.items() if column.endswith(("weights", "ids"))]
        return not masks or any("mask" not in name.lower() and column_of(name) != "labels" for name in masks)

    def is_given(self, name: str, data: Sequence[Any]) -> bool:
        """Return whether a parameter is required, or the datums hold its column."""
        if name not in self.optional:
            return True
        column = self.column_by_name[name].rpartition(" ")[2]
        return column in ("logprobs", "lengths", "ids") or all(column in datum.loss_fn_inputs for datum in data)

    def rows(self, name: str, data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> list[Tensor]:
        """Return the rows of a parameter's column, of all datums."""
        side, _, column = self.column_by_name[name].rpartition(" ")
        if column == "logprobs":
            return [lp.detach() for lp in logprobs_list] if side == "KL" else list(logprobs_list)
        if column in ("lengths", "ids"):
            column, name = "weights", "mask" if column == "ids" else "weights"
        return parameter_rows(data, name, column)

    def selection(self, name: str, form: Form, data: Sequence[Any], weights: Sequence[Tensor]) -> list[int]:
        """Return the indices of the datums whose rows a parameter gets, in order.

        A function of sums cannot see which sequences are empty. It gets those with trained tokens, or else all.
        """
        side = self.column_by_name[name].rpartition(" ")[0]
        used = range(len(data))
        if form.level == "sums":
            trained = [bool((w != 0).any()) for w in weights]
            if self.pairs:
                trained = [trained[i] and trained[i ^ 1] if i ^ 1 < len(trained) else trained[i] for i in used]
            used = [i for i in used if trained[i]] or used  # type: ignore[assignment]
        if self.unpaired and side in ("chosen", "rejected"):
            labels = map(functools.partial(datum_advantage, what="label"), parameter_rows(data, "labels"), weights)
            return [i for i, label in enumerate(labels) if i in used and (label > 0.5) == (side == "chosen")]
        if side in ("chosen", "rejected"):
            if len(data) % 2:
                raise LossInputError("data", "pairs: an even number of datums", str(len(data)), "Add the other side.")
            return [i for i in used if i % 2 == (side == "rejected")]
        return sorted(used, key=lambda i: i % 2) if form.halves else list(used)

    @property
    def pairs(self) -> bool:
        """Whether it has parameters for the sides of pairs."""
        return any(c.startswith(("chosen ", "rejected ")) for c in self.columns) and not self.unpaired

    @property
    def unpaired(self) -> bool:
        """Whether it compares no pairs, but desirable datums with undesirable ones, as KTO does."""
        return any(c.startswith("KL ") or c == "labels" for c in self.columns)

    def argument(self, column: str, form: Form, rows: list[Tensor], weights: list[Tensor]) -> Any:
        """Return rows of a column in a form, with the weights of the same datums."""
        column = column.rpartition(" ")[2]
        if column == "ids":
            ids = [torch.where(w != 0, torch.arange(3, 3 + len(w)), -100) for w in weights]
            return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
        if column == "lengths":
            return self.vector([w.sum() for w in weights], rows)
        if column == "advantages" and form.advantages != "tokens":
            numbers = self.vector(list(map(datum_advantage, rows, weights)), rows)
            return numbers[:, None] if form.advantages == "column" else numbers
        if column == "labels" and form.labels != "tokens":
            label = functools.partial(datum_advantage, what="label")
            numbers = self.vector(list(map(label, rows, weights)), rows)
            numbers = 2 * numbers - 1 if form.labels == "sign" else numbers
            return numbers.to(DTYPES.get(form.labels) or numbers.dtype)
        if column == "weights":
            dtype = DTYPES[form.mask]
            rows = rows if dtype is None else [(row != 0).to(dtype) for row in rows]
        elif form.level == "sums" and column.endswith("logprobs"):
            return self.vector([(w * torch.where(w != 0, row, 0)).sum() for row, w in zip(rows, weights)], rows)
        if form.level == "rows" or not rows:
            return rows if rows or form.level == "rows" else torch.zeros(0, 0)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def vector(self, numbers: list[Any], rows: list[Tensor]) -> Tensor:
        """Return one number for each row as a tensor of the rows' dtype."""
        dtype = rows[0].dtype if rows else None
        if numbers and isinstance(numbers[0], Tensor):
            return torch.stack(numbers)
        return torch.tensor(numbers, dtype=dtype)

    def contract_result(self, form: Form, result: Any, weights: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Return ``(loss, metrics)`` from what the function returned."""
        loss, metrics = split_result(result, self.target.fn)
        refuse_foreign(loss)
        if loss.ndim == 0:
            return loss, metrics
        self.returns_vector = True
        trained = [bool((w != 0).any()) for w in weights]
        if loss.ndim > 1:
            shape = f"a tensor of shape {tuple(loss.shape)}"
            fix = "Reduce it over its tokens by the mask: (losses * mask).sum() / mask.sum()."
            raise LossInputError("subject", "a scalar loss, or one loss for each sequence", shape, fix)
        kept = [loss[i] for i, used in enumerate(trained) if used] if len(loss) == len(trained) and any(trained) else []
        if (self.form is not None and self.form.level == "sums") or not kept:
            return loss.mean(), metrics
        return torch.stack(kept).mean(), metrics

    def candidate_forms(self) -> Iterator[Form]:
        """Yield the forms to try, the most likely first."""
        columns = self.columns
        per_token = any("token" in name for name in self.required)
        masked = any(column.endswith(("weights", "ids")) for column in columns)
        levels = ("tokens", "rows") if masked or per_token else ("sums", "tokens", "rows")
        trl = any("per_token" in name for name in self.required)
        forms = ("datum", "column", "tokens") if trl else ("tokens", "datum", "column")
        labels = ("float", "bool", "long", "sign", "tokens")
        if any(name.startswith("is_") for name in self.required):
            labels = ("bool", "float", "long", "sign", "tokens")
        for level in levels:
            for mask in DTYPES if masked else ("float",):
                for advantages in forms if "advantages" in columns else ("tokens",):
                    if level != "sums" or advantages != "tokens" or "advantages" not in columns:
                        for label in labels if "labels" in columns else ("float",):
                            yield Form(level, advantages, mask, label)

    def find_form(self) -> None:
        """Choose the form in which the gradients are most like those of a loss; the first one if several are.

        If the source states the shape of the advantages, other shapes are tried only if the function does not run with
        that shape.
        """
        running, best, errors = None, -1, {}
        stated = stated_shape(self.target.fn)
        for form in sorted(self.candidate_forms(), key=lambda form: form.advantages != stated and stated != ""):
            if running is not None and stated == running.advantages != form.advantages:
                break
            try:
                likeness = self.likeness(form)
            except NotApplicable:
                raise
            except Exception as error:
                errors[described(error)] = error
                continue
            if likeness > best:
                running, best = form, likeness
            if best == MOST_LIKE:
                break
        if running is None:
            text, first = next(iter(errors.items()))
            if isinstance(first, LossInputError) and first.field == "subject":
                raise first
            way = "give its settings values that run: functools.partial(fn, name=value)."
            fix = f"Correct it there, or {way}" if place_of(first) else f"{way.capitalize()} {FORMS}"
            raise LossInputError("subject", "a loss that runs on its columns", text, fix) from first
        self.form = running
        self.unused = self.find_unused()
        self.columns = {column for name, column in self.column_by_name.items() if name not in self.unused}
        if not self.columns & {"advantages", "labels"} and not self.pairs and coupling(self) == "halves":
            self.form = replace(running, halves=True)

    def gradients(self, form: Form, batch: Batch) -> Rows:
        """Return the gradients on a batch in a form."""
        return gradients_of(functools.partial(self.call, form), batch)

    def likeness(self, form: Form) -> int:
        """Return how much the gradients in a form are like those of a loss, from 0 to ``MOST_LIKE``.

        The gradients of a loss are finite. Desirable and undesirable datums both have gradients that are not 0. The
        gradient of each datum depends on its own advantage, and on no other: tensors that broadcast to ``[B, B]`` break
        this.
        """
        gradients = self.gradients(form, PROBE)
        if not gradients or not np.isfinite(np.concatenate(gradients)).all():
            return 0
        if "labels" in self.columns:
            kinds = {row[0] for row, g in zip(PROBE.columns["labels"], gradients) if any(g)}
            return MOST_LIKE if len(kinds) == 2 else 1
        if "advantages" not in self.columns:
            return MOST_LIKE

        def changed(advantages: Rows) -> list[bool]:
            after = self.gradients(form, PROBE.having(advantages=advantages))
            return [not same_rows([a], [b]) for a, b in zip(after, gradients)]

        first, *between, last = PROBE.columns["advantages"]
        own, *others = changed([[a + 0.5 for a in first], *between, last])
        if own and not any(others):
            return MOST_LIKE
        return 2 if any(changed([last, *between, first])) else 1


MOST_LIKE = 3
"""The likeness of gradients that are those of a loss in every respect; see ``PaddedLoss.likeness``."""


def coupling(loss_fn: Any) -> str:
    """Return how the gradients of the datums depend on one another's logprobs.

    Returns:
        "none"; "pairs" if each datum depends at most on its partner 2i or 2i + 1; "halves" if each depends at most on
        the datum B/2 away; "partners" if each depends on exactly one other; else "batch". "" if the calls fail.
    """
    size = len(PROBE.weights)
    lower = replace(PROBE.map(lambda rows: [[x - 20 for x in row] for row in rows]), weights=PROBE.weights)
    lower = lower.having(advantages=PROBE.columns["advantages"], labels=PROBE.columns["labels"])

    def gradients(batch: Batch, changed: int, by: float) -> list[np.ndarray]:
        rows = [[x + by if i == changed else x for x in row] for i, row in enumerate(batch.logprobs)]
        other = batch.having(logprobs=rows)
        logprobs = other.tensors(torch.float32)
        loss_fn(other.data(), logprobs)[0].backward()
        return [np.zeros(lp.numel()) if lp.grad is None else lp.grad.numpy() for lp in logprobs]

    affected: list[set[int]] = [set() for _ in range(size)]
    try:
        for batch, by in ((PROBE, -20.0), (lower, 19.0)):
            before = gradients(batch, 0, 0.0)
            for j in range(size):
                for i, (row, was) in enumerate(zip(gradients(batch, j, by), before)):
                    if i != j and not np.allclose(row, was, rtol=1e-3, atol=1e-9):
                        affected[i].add(j)
    except NotApplicable:
        raise
    except Exception:
        return ""
    if not any(affected):
        return "none"
    if all(others <= {i ^ 1} for i, others in enumerate(affected)):
        return "pairs"
    if all(others <= {(i + size // 2) % size} for i, others in enumerate(affected)):
        return "halves"
    return "partners" if all(len(others) == 1 for others in affected) else "batch"


# Results


def split_result(result: Any, fn: Any) -> tuple[Any, dict[str, float]]:
    """Return the loss and the metrics of a result of any form. Metrics that are no numbers are left out."""
    if isinstance(result, Mapping):
        if "loss" not in result:
            got = f"a dict with the keys {', '.join(map(str, result))}"
            raise LossInputError("subject", "a loss", got, "Return the loss under the key 'loss'.")
        return result["loss"], numbers({name: value for name, value in result.items() if name != "loss"})
    if hasattr(result, "_asdict"):
        names, values = list(result._asdict()), list(result)
        return values[0], numbers(dict(zip(names[1:], values[1:])))
    if isinstance(result, (tuple, list)) and result:
        metrics: dict[str, Any] = {}
        for name, value in zip(result_names(fn, len(result))[1:], result[1:]):
            if isinstance(value, Mapping):
                metrics |= value
            elif name:
                metrics[name] = value
        return result[0], numbers(metrics)
    if hasattr(result, "loss") and not isinstance(result, Tensor):
        return result.loss, numbers({name: value for name, value in vars(result).items() if name != "loss"})
    return result, {}


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are numbers as floats. One number for each sequence becomes the mean; matrices do not."""
    result = {}
    for name, value in metrics.items():
        if isinstance(value, (bool, int, float, np.number, np.bool_)):
            result[str(name)] = float(value)
        elif isinstance(value, (Tensor, np.ndarray)) and value.ndim < 2 and np.prod(value.shape) > 0:
            tensor = torch.as_tensor(value).detach()
            result[str(name)] = float(tensor.double().mean() if tensor.ndim else tensor)
    return result


def refuse_foreign(loss: Any) -> None:
    """Refuse a loss that is no tensor."""
    if not isinstance(loss, Tensor):
        kind = f"{type(loss).__module__}.{type(loss).__name__}".removeprefix("builtins.")
        fix = "Compute what depends on the logprobs in torch: other numbers have no gradient."
        raise LossInputError("subject", "a loss that is a torch tensor", kind, fix)


FORMS = (
    "Known forms: a contract function (data, logprobs_list); a function of padded tensors such as (logprobs, "
    "old_logprobs, advantages, mask); one of sums such as (policy_chosen_logps, policy_rejected_logps, "
    "reference_chosen_logps, reference_rejected_logps); a factory of a contract function; a module or class of these."
)


def reads_teacher(loss_fn: Any) -> bool:
    """Return whether a loss reads logprobs under the name of a teacher."""
    if isinstance(loss_fn, ContractLoss):
        return any(map(names_teacher, loss_fn.read))
    unused = getattr(loss_fn, "unused", ())
    return any(names_teacher(name) for name in getattr(loss_fn, "required", ()) if name not in unused)
