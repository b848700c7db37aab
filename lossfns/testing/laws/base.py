"""Helpers for laws: measure a loss on a batch, edit batches, and report a broken law."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lossfns.inspect.probe import ALIASES
from lossfns.terminal import printable
from lossfns.testing.batch import Batch, Rows
from lossfns.testing.bugs import BUGS

LossFn = Callable[..., tuple[Tensor, dict[str, float]]]
Law = Callable[[LossFn, Sequence[Any], Sequence[Tensor]], None]

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4}
"""dtype of the loss → the largest accepted difference of two numbers that should be equal, relative to the larger one.

Laws compare two results of one loss, with sums and exponentials in them. The tolerance leaves room for a thousand
roundings.
"""


class LawBroken(AssertionError):
    """A loss breaks a law.

    Attributes:
        bug: the most likely bug.
        seen: the observation in words. Characters that a terminal or XML cannot show are escaped.
        batch: the batch on which the first number in ``seen`` was measured; None if it is the batch of the law.
    """

    def __init__(self, bug: str, seen: str, batch: Batch | None = None) -> None:
        seen = printable(seen)
        super().__init__(f"{seen} Likely bug: {bug}: {BUGS[bug].description}.")
        self.bug, self.seen, self.batch = bug, seen, batch


def describe_error(error: BaseException) -> str:
    """Return the type and the message of an error of a subject, whatever its ``__str__`` does."""
    try:
        message = printable(str(error).strip(), 200).rstrip(".")
    except Exception:
        message = "its message cannot be read"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


class NotApplicable(Exception):
    """The law does not apply to this batch or this loss."""


def require(holds: bool, bug: str, seen: str, batch: Batch | None = None) -> None:
    """Raise LawBroken unless the condition holds. ``batch`` is the batch that ``seen`` is about."""
    if not holds:
        raise LawBroken(bug, seen, batch)


def assume(holds: bool, why: str) -> None:
    """Raise NotApplicable unless the condition holds."""
    if not holds:
        raise NotApplicable(why)


LawFn = TypeVar("LawFn", bound=Callable[..., None])


def wrong(why: str) -> Callable[[LawFn], LawFn]:
    """Mark a law that no correct loss of its kind breaks on data that can occur, and say why."""
    return partial(with_severity, "wrong", why)


def fragile(why: str) -> Callable[[LawFn], LawFn]:
    """Mark a law that a loss may break and still be right on clean data, and say why it is only fragile."""
    return partial(with_severity, "fragile", why)


def with_severity(severity: str, why: str, law: LawFn) -> LawFn:
    """Set the attributes ``severity`` and ``why`` of a law."""
    vars(law).update(severity=severity, why=why)
    return law


@dataclass(frozen=True)
class Outcome:
    """The result of a call and its backward pass.

    Attributes:
        value: the loss.
        gradients: ∂L/∂logprobs of each datum, zeros where it is None.
        metrics: the metrics as they were returned.
        missing: the indices of the datums whose gradient is None.
        batch: the batch on which it was measured, if that is known.
    """

    value: float
    gradients: Rows
    metrics: dict[str, Any]
    missing: tuple[int, ...]
    batch: Batch | None = field(default=None, repr=False, compare=False)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.value) and all(math.isfinite(g) for row in self.gradients for g in row)


@dataclass(frozen=True)
class Probe:
    """A loss under test with the batch and the dtype of a law. Calling it measures the loss."""

    loss_fn: LossFn
    batch: Batch
    dtype: torch.dtype

    @classmethod
    def of(cls, loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> Probe:
        """Return the probe for the arguments of a law."""
        return cls(loss_fn, Batch.of(data, logprobs), logprobs[0].dtype)

    def __call__(self, batch: Batch | None = None, loss_fn: LossFn | None = None) -> Outcome:
        """Return the outcome on a batch. A call that fails breaks the contract."""
        batch, loss_fn = batch or self.batch, loss_fn or self.loss_fn
        try:
            return replace(measure(loss_fn, batch.data(), batch.tensors(self.dtype)), batch=batch)
        except LawBroken as error:
            error.batch = batch
            raise

    @cached_property
    def reads(self) -> set[str]:
        """The columns that a call on the batch reads, which are found out once."""
        return columns_read(self)

    def gradients(self, batch: Batch | None = None) -> Rows:
        """Return the gradients on a batch."""
        return self(batch).gradients

    def close(self, a: Any, b: Any, scale: float = 1.0) -> bool:
        """Return whether two nested lists of numbers agree to ``scale`` times the tolerance; nan equals nan."""
        tolerance = TOLERANCE.get(self.dtype, 5e-2)  # the default is for bfloat16 and float16
        return relative_difference(a, b) <= scale * tolerance

    def difference(self, found: Outcome, expected: Outcome, scale: float = 1.0) -> str:
        """Return in words what differs between two outcomes beyond rounding, or "" if nothing does.

        That is the value, or the gradient that differs most. Metrics are left to ``metric_difference``.
        """
        if self.close([found.value, found.gradients], [expected.value, expected.gradients], scale):
            return ""
        slots = [(i, j) for i, row in enumerate(found.gradients) for j in range(len(row))]
        gaps = [gap(found.gradients[i][j], expected.gradients[i][j]) for i, j in slots]
        size = max(
            (
                abs(x)
                for x in flatten([found.value, found.gradients, expected.value, expected.gradients])
                if math.isfinite(x)
            ),
            default=1.0,
        )
        tolerance = scale * TOLERANCE.get(self.dtype, 5e-2) * (size or 1.0)
        if gap(found.value, expected.value) > tolerance or not any(gaps):
            return f"the loss is {contrast(found.value, expected.value)}"
        i, j = slots[gaps.index(max(gaps))]
        words = contrast(found.gradients[i][j], expected.gradients[i][j])
        return f"the loss is the same, but the gradient of {self.slot_name(i, j)} is {words}"

    def slot_name(self, i: int, j: int) -> str:
        """Return the name of a slot: datum and token, and the target if a token has several."""
        k = self.batch.targets
        return f"target {j % k} of token {j // k} of datum {i}" if k else f"token {j} of datum {i}"

    def with_batch(self, batch: Batch) -> Probe:
        """Return the probe with another batch."""
        return replace(self, batch=batch)


def measure(loss_fn: LossFn, data: Sequence[Any], logprobs: list[Tensor]) -> Outcome:
    """Call a loss, run backward, and return the outcome as plain numbers."""
    try:
        with torch.enable_grad():  # whatever a call does to the grad mode ends with it
            value, metrics = loss_fn(data, logprobs)
        if value.requires_grad:
            value.backward()  # type: ignore[no-untyped-call]
    except NotApplicable:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: whatever the loss raises is the loss's fault
        seen = f"On a valid batch the call raises {describe_error(error)}."
        raise LawBroken("not-the-contract", seen) from error
    missing = tuple(i for i, lp in enumerate(logprobs) if lp.grad is None)
    zeros = [torch.zeros_like(lp) if lp.grad is None else lp.grad for lp in logprobs]
    return Outcome(float(value.detach()), [g.flatten().tolist() for g in zeros], metrics, missing)


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are numbers, as floats: also 0-d tensors and numbers of numpy."""
    found = {}
    for name, value in metrics.items():
        try:
            found[name] = float(value)
        except (TypeError, ValueError, RuntimeError):
            continue
    return found


def relative_difference(a: Any, b: Any) -> float:
    """Return the largest difference of two nested lists of numbers, relative to the largest number in them."""
    x, y = list(flatten(a)), list(flatten(b))
    if len(x) != len(y) or any(math.isnan(p) != math.isnan(q) for p, q in zip(x, y)):
        return math.inf
    gaps = [0.0 if p == q or math.isnan(p) else abs(p - q) for p, q in zip(x, y)]
    size = max((abs(p) for p in (*x, *y) if math.isfinite(p)), default=1.0)
    return max(gaps, default=0.0) / (size or 1.0)


def gap(x: float, y: float) -> float:
    """Return |x − y|. It is 0 for two nans or equal infinities, and infinite if one number alone is nan or infinite."""
    if x == y or (math.isnan(x) and math.isnan(y)):
        return 0.0
    return abs(x - y) if math.isfinite(x - y) else math.inf


def contrast(found: float, expected: float) -> str:
    """Return "found, not expected", with at least six digits and as many as the two numbers need to differ."""
    digits = next((n for n in range(6, 17) if f"{found:.{n}g}" != f"{expected:.{n}g}"), 17)
    return f"{found:.{digits}g}, not {expected:.{digits}g}"


def metric_difference(found: Outcome, expected: Outcome) -> str:
    """Return in words the first metric that differs between two outcomes, bit for bit, or "" if none does."""
    for name in {**found.metrics, **expected.metrics}:
        x, y = (repr(outcome.metrics.get(name, "missing")) for outcome in (found, expected))
        if x != y:
            return f"the metric {name!r} is {x}, not {y}"
    return ""


def near(value: float, expected: Sequence[float]) -> bool:
    """Return whether a number is one of these, up to rounding."""
    return any(math.isclose(value, x, rel_tol=1e-3, abs_tol=1e-6) for x in expected)


def flatten(x: Any) -> Iterator[float]:
    """Yield the numbers of a nested list in order."""
    if isinstance(x, (list, tuple)):
        for item in x:
            yield from flatten(item)
    else:
        yield float(x)


# Batches that are made from another batch


def with_constants(batch: Batch, **columns: float) -> Batch:
    """Return the batch with each of these columns (or the logprobs or weights) set to one number."""
    constant = {name: [[x] * len(row) for row in batch.weights] for name, x in columns.items()}
    return batch.having(**constant)


def on_policy_batch(batch: Batch) -> Batch:
    """Return the batch with the policy's logprobs in the columns of all other policies: ratio 1, KL 0, margin 0.

    A teacher keeps its own logprobs: where it agrees with the policy, distillation has nothing to learn.
    """
    kept = {"ref_logprobs"} if batch_kind(batch) == "distillation" else set()
    columns = {name: batch.logprobs for name in batch.columns if name.endswith("_logprobs") and name not in kept}
    return batch.having(**columns)


def with_slot(rows: Rows, i: int, j: int, value: float) -> Rows:
    """Return the rows with one slot set to a value."""
    return [[value if (k, t) == (i, j) else x for t, x in enumerate(row)] for k, row in enumerate(rows)]


def shifted(rows: Rows, slots: Iterable[tuple[int, int]], by: float) -> Rows:
    """Return the rows with ``by`` added in these slots."""
    chosen = set(slots)
    return [[x + by if (k, t) in chosen else x for t, x in enumerate(row)] for k, row in enumerate(rows)]


def slots(batch: Batch, active: bool = True) -> list[tuple[int, int]]:
    """Return (datum, position) of every active slot, or of every inactive one."""
    return [(i, j) for i, row in enumerate(batch.weights) for j, w in enumerate(row) if (w != 0) == active]


def repeat_rows(batch: Batch, min_positions: int) -> Batch:
    """Repeat each row until it has at least ``min_positions`` positions."""
    size = min_positions * (batch.targets or 1)
    return batch.map(lambda rows: [row * math.ceil(size / len(row)) for row in rows])


def unpoisoned(batch: Batch) -> Batch:
    """Return the batch with −1 in every inactive slot of the logprobs and of every column but the labels."""
    clean = batch.map(lambda rows: [[x if w else -1.0 for x, w in zip(r, ws)] for r, ws in zip(rows, batch.weights)])
    labels = {name: rows for name, rows in batch.columns.items() if name == "labels"}
    return replace(clean, weights=batch.weights).having(**labels)


def uniform_batch(batch: Batch, *, length: int = 1, datums: int = 1, **columns: float) -> Batch:
    """Return datums whose tokens are all equal and active, with the columns of ``batch``.

    Unless given, logprobs are −2, weights, advantages and labels 1, and the other policies have the policy's logprobs.
    A teacher is one nat above the policy, as far as 0 allows.
    """
    width = length * (batch.targets or 1)
    base = {"logprobs": -2.0, "weights": 1.0, "advantages": 1.0, "labels": 1.0} | columns
    if batch_kind(batch) == "distillation":
        base.setdefault("ref_logprobs", min(base["logprobs"] + 1.0, 0.0))

    def rows(x: float) -> Rows:
        return [[x] * width for _ in range(datums)]

    named = {name: rows(base.get(name, base["logprobs"])) for name in batch.columns}
    # The targets of a position differ in weight: equal weights would hide that a loss renormalises them.
    weights = [[w / 2 ** (j % (batch.targets or 1)) for j, w in enumerate(row)] for row in rows(base["weights"])]
    return Batch(rows(base["logprobs"]), weights, named, batch.targets)


def batch_kind(batch: Batch) -> str:
    """Return the kind of loss that a batch is for, which its columns tell."""
    columns = set(batch.columns)
    if "advantages" in columns:
        return "policy"
    if "labels" in columns:
        return "unpaired"
    return "preference" if columns == {"ref_logprobs"} else "distillation" if columns else "likelihood"


def unit_size(batch: Batch) -> int:
    """Return the number of datums in a unit: 2 for the sides of a pair, else 1."""
    return 2 if batch_kind(batch) == "preference" else 1


def unit_indices(batch: Batch) -> list[list[int]]:
    """Return the indices of the datums of each unit: a datum, or the two sides of a pair."""
    step = unit_size(batch)
    return [list(range(i, i + step)) for i in range(0, len(batch.weights), step)]


def with_masked_unit(batch: Batch) -> Batch:
    """Return the batch with one more unit, whose weights are all 0."""
    masked = uniform_batch(batch, length=2, datums=unit_size(batch), weights=0.0)
    columns = {name: [*rows, *masked.columns[name]] for name, rows in batch.columns.items()}
    return replace(
        batch, logprobs=batch.logprobs + masked.logprobs, weights=batch.weights + masked.weights, columns=columns
    )


def without_empty_units(batch: Batch) -> Batch:
    """Return the batch without the units that have a datum without active tokens."""
    kept = [unit for unit in unit_indices(batch) if all(any(batch.weights[i]) for i in unit)]
    return batch.take([i for unit in kept for i in unit])


def influences(probe: Probe, column: str, batch: Batch, changed: list[tuple[int, int]], by: float = 0.25) -> bool:
    """Return whether adding ``by`` in these slots of a column changes the value or a gradient beyond rounding."""
    if not changed:
        return False
    before = probe(batch)
    after = probe(batch.having(**{column: shifted(column_rows(batch, column), changed, by)}))
    return not probe.close([before.value, before.gradients], [after.value, after.gradients], scale=0.01)


def column_rows(batch: Batch, column: str) -> Rows:
    """Return the rows of a column, of the logprobs or of the weights."""
    if column == "weights":
        return batch.weights
    return batch.logprobs if column == "logprobs" else batch.columns[column]


ALL_FIELDS = "*"
"""The name that is recorded if a call reads all fields of a datum at once: it is then unknown which of them matter."""


class RecordingFields(dict[str, Any]):
    """A datum's fields, which add the name of each field that is read to a set."""

    def __init__(self, fields: dict[str, Any], read: set[str]) -> None:
        super().__init__(fields)
        self.read = read

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def items(self) -> Any:
        self.read.add(ALL_FIELDS)
        return super().items()

    def values(self) -> Any:
        self.read.add(ALL_FIELDS)
        return super().values()


class RecordingDatum:
    """A datum with ``RecordingFields``."""

    def __init__(self, datum: Any, read: set[str]) -> None:
        self.model_input, self.loss_fn_inputs = datum.model_input, RecordingFields(datum.loss_fn_inputs, read)


def fields_read(probe: Probe) -> set[str]:
    """Return the names of the datum's fields that a call reads."""
    read: set[str] = set()
    measure(
        probe.loss_fn, [RecordingDatum(datum, read) for datum in probe.batch.data()], probe.batch.tensors(probe.dtype)
    )
    return read


def columns_read(probe: Probe) -> set[str]:
    """Return the columns that a call reads under any of their names."""
    names = {alias: column for column, alias in ALIASES.items()}
    read = fields_read(probe)
    if ALL_FIELDS in read:
        read |= {name for name in probe.batch.columns if matters(probe, name)}
    return {names.get(name, name) for name in read} - {"target_tokens", ALL_FIELDS}


def matters(probe: Probe, column: str) -> bool:
    """Return whether the values of a column matter to the value, the gradient or a metric."""
    batch = uniform_batch(probe.batch, length=2, datums=2 * unit_size(probe.batch), logprobs=-3.0)
    lower = with_constants(batch, **{column: batch.columns[column][0][0] - 0.25})
    before, after = probe(batch), probe(lower)
    return repr((before.value, before.gradients, before.metrics)) != repr((after.value, after.gradients, after.metrics))


def reads_only_mask(probe: Probe) -> bool:
    """Return whether the loss reads ``mask`` and not ``weights``. Such a loss need not apply fractional weights."""
    read = fields_read(probe)
    return "mask" in read and "weights" not in read


def has_sequence_ratio(probe: Probe) -> bool:
    """Return whether a token's gradient depends on the ratio of another token of its sequence."""
    if "old_logprobs" not in probe.batch.columns:
        return False
    below, above, on = (probe(sequence_batch(probe, [0.0, d])).gradients[0][0] for d in (-0.5, 3.0, 0.0))
    return not probe.close([below, above], [on, on])


def sequence_batch(probe: Probe, log_ratios: Sequence[float]) -> Batch:
    """Return one sequence with these log-ratios."""
    batch = uniform_batch(probe.batch, length=len(log_ratios), logprobs=-30.0)
    old = [[-30.0 - d for d in log_ratios]]
    return batch.having(**{n: old for n in ("old_logprobs", "sampler_logprobs") if n in batch.columns})


# What a loss says of itself


def is_described_as(loss_fn: LossFn, word: str) -> bool:
    """Return whether the name or the docstring of a loss holds a word."""
    inner = getattr(loss_fn, "fn", None) or getattr(loss_fn, "factory", None) or getattr(loss_fn, "func", loss_fn)
    kind = type(inner)
    texts = [getattr(x, "__name__", "") for x in (loss_fn, inner, kind)]
    texts += [getattr(x, "__doc__", "") for x in (inner, kind) if x is not type]
    return any(word in str(text).lower() for text in texts)
