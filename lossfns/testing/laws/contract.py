"""Laws of the contract ``(data, logprobs_list) -> (loss, metrics)``."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lossfns.datum import TensorData
from lossfns.testing.batch import Batch
from lossfns.testing.laws.base import (
    LawBroken,
    LossFn,
    NotApplicable,
    Probe,
    batch_kind,
    column_rows,
    columns_read,
    contrast,
    describe_error,
    fragile,
    measure,
    numbers,
    repeat_rows,
    require,
    shifted,
    slots,
    uniform_batch,
    unpoisoned,
    with_constants,
    with_masked_unit,
    wrong,
)
from lossfns.testing.laws.settings import words
from lossfns.testing.laws.trace import Trace
from lossfns.tokens import LOGPROB_COLUMNS


@wrong("without a scalar that has a gradient there is nothing to train on")
def contract(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A call returns a 0-d tensor that requires grad, and a dict of metrics."""
    probe = Probe.of(loss_fn, data, logprobs)
    probe = probe.with_batch(unpoisoned(repeat_rows(probe.batch, 3)))
    if "advantages" in probe.batch.columns:
        probe = probe.with_batch(with_constants(probe.batch, advantages=1.0))
    expect = partial(require, bug="not-the-contract", batch=probe.batch)
    try:
        with torch.enable_grad():
            result: Any = loss_fn(probe.batch.data(), probe.batch.tensors(probe.dtype))
    except NotApplicable:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        diagnose_misalignment(probe)
        seen = f"On a valid batch the call raises {describe_error(error)}."
        raise LawBroken("not-the-contract", seen, probe.batch) from error
    is_pair = isinstance(result, tuple) and len(result) == 2
    expect(is_pair, seen=f"The call returns {result!r}, not (loss, metrics).")
    loss, metrics = result
    expect(isinstance(loss, Tensor), seen=f"The loss is a {type(loss).__name__}, not a tensor.")
    expect(loss.ndim == 0, seen=f"The loss has shape {tuple(loss.shape)}, not ().")
    expect(loss.requires_grad, seen="The loss does not depend on the logprobs: it has no grad_fn.")
    expect(isinstance(metrics, Mapping), seen=f"The metrics are a {type(metrics).__name__}, not a dict.")
    for name in metrics:
        expect(isinstance(name, str), seen=f"The name {name!r} of a metric is no string.")
    try:
        probe()
    except LawBroken as error:
        kept = "backward through the graph a second time" in error.seen
        require(not kept, "state-between-calls", f"{error.seen} A tensor of another call is part of the graph.")
        raise


@fragile("the loss is right; a metric of another type fails where metrics are merged, sent or written as JSON")
def metric_types(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Metrics are plain floats."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unpoisoned(probe.batch)
    for name, value in probe(batch).metrics.items():
        plain = isinstance(value, (float, int)) and not isinstance(value, bool)
        seen = f"The metric {name!r} is a {type(value).__name__}, not a float."
        require(plain and isinstance(name, str), "metric-not-a-float", seen, batch)


def diagnose_misalignment(probe: Probe) -> None:
    """Raise LawBroken if a loss that fails on datums of unequal length mixes up datums of equal length."""
    from lossfns.testing.laws.frames import independence

    try:
        independence(probe.loss_fn, probe.batch.data(), probe.batch.tensors(probe.dtype))
    except LawBroken as error:
        if error.bug != "not-the-contract":
            raise
    except NotApplicable:
        return


@wrong("the caller computes with the changed values afterwards")
def inputs_unchanged(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A call leaves datums and logprobs as they were."""
    probe = Probe.of(loss_fn, data, logprobs)
    data, logprobs = probe.batch.data(), probe.batch.tensors(probe.dtype)
    order, before = list(map(id, data)), snapshot(data, logprobs)
    watched, changes = watch_tensors(loss_fn)
    watched(data, logprobs)
    same_order = list(map(id, data)) == order
    require(same_order, "inputs-mutated", "After the call the list holds other datums.", probe.batch)
    require(not changes, "inputs-mutated", f"The call changed the tensor {', '.join(changes)}.", probe.batch)
    for name, was in before.items():
        now = snapshot(data, logprobs).get(name)
        require(now == was, "inputs-mutated", f"The call changed {name} from {was} to {now}.", probe.batch)


def watch_tensors(loss_fn: LossFn) -> tuple[LossFn, list[str]]:
    """Return the loss, and a list that gets the names of the tensors that a function of tensors changes in a call."""
    changed: list[str] = []
    target = getattr(loss_fn, "target", None)
    fn = getattr(target, "fn", None)
    if not callable(fn):
        return loss_fn, changed

    @functools.wraps(fn)
    def watched(*args: Any, **kwargs: Any) -> Any:
        named = [*((f"of argument {i}", x) for i, x in enumerate(args)), *kwargs.items()]
        given = {name: x for name, x in named if isinstance(x, Tensor)}
        before = {name: x.detach().clone() for name, x in given.items()}
        result = fn(*args, **kwargs)
        changed.extend(name for name, x in given.items() if not same_bits(x.detach(), before[name]))
        return result

    copied = copy.copy(loss_fn)
    vars(copied)["target"] = copy.copy(target)
    vars(vars(copied)["target"])["fn"] = watched
    return copied, changed


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have one shape and equal values; nan equals nan."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def snapshot(data: Sequence[Any], logprobs: Sequence[Tensor]) -> dict[str, str]:
    """Return the ``repr`` of every field and logprob tensor, by its path."""
    fields = {
        f"datum[{i}].{name}": repr(values.to_numpy().tolist())
        for i, datum in enumerate(data)
        for name, values in datum.loss_fn_inputs.items()
    }
    return fields | {f"datum[{i}].logprobs (tensor)": repr(lp.tolist()) for i, lp in enumerate(logprobs)}


@wrong("equal batches must give equal steps")
def repeatable(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The same call gives the same bits, whatever was called in between."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = repeat_rows(unpoisoned(probe.batch), 3)
    first = probe(batch)
    probe(batch.having(logprobs=shifted(batch.logprobs, slots(batch), -0.5)))
    probe(uniform_batch(batch, length=5, datums=2, logprobs=-0.5))
    again = probe(batch)
    same = repr((first.value, first.gradients)) == repr((again.value, again.gradients))
    difference = probe.difference(again, first, scale=0) or "a zero has the other sign"
    seen = f"On the same batch, after calls on others, {difference}, as before."
    require(same, "state-between-calls", seen, batch)
    before, after = numbers(first.metrics), numbers(again.metrics)
    for name, value in before.items():
        timed = {"time", "seconds", "elapsed", "duration", "step", "calls", "sec", "ms"} & set(words(name))
        seen = f"On the same batch, after calls on others, the metric {name!r} is {after.get(name)}, not {value}."
        require(bool(timed) or repr(value) == repr(after.get(name)), "state-between-calls", seen, batch)
    made = made_by_factory(loss_fn, batch)
    if made is not None:
        one, two = probe(batch, made), probe(batch, made)
        same = repr((one.value, one.gradients)) == repr((two.value, two.gradients))
        difference = probe.difference(two, one, scale=0) or "a zero has the other sign"
        seen = f"At the second call of the loss that the factory made, {difference}, as at the first."
        require(same, "state-between-calls", seen, batch)


def made_by_factory(loss_fn: LossFn, batch: Batch) -> LossFn | None:
    """Return the loss that a factory makes for a batch, or None if the subject is no factory."""
    build, forms = getattr(loss_fn, "build", None), getattr(loss_fn, "forms", None)
    return build(batch.data(), forms) if build is not None and forms else None


@fragile("a gradient of None is a gradient of 0 for a local loop, and an error of the hosted SDKs")
def every_gradient(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Each datum's logprobs get a gradient, which may be 0; the hosted SDKs raise where it is None."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = with_masked_unit(probe.batch)
    zero = with_constants(batch, advantages=0.0) if "advantages" in batch.columns else batch
    for tried in (probe.batch, batch, zero):
        for i in missing_gradients(probe, tried):
            seen = f"logprobs_list[{i}].grad is None, because its weights or advantages are 0."
            active = tried is not zero and any(tried.weights[i])
            require(active, "gradient-missing", seen, tried)


@wrong("a datum that is left out is not trained on")
def active_gradient(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Each datum with active tokens is part of the graph."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = with_masked_unit(unpoisoned(probe.batch))
    advantages = batch.columns.get("advantages", batch.weights)
    for i in missing_gradients(probe, batch):
        active = any(w and a for w, a in zip(batch.weights[i], advantages[i]))
        seen = f"logprobs_list[{i}].grad is None, although it has active tokens."
        require(not active, "datum-ignored", seen, batch)


def missing_gradients(probe: Probe, batch: Batch) -> Sequence[int]:
    """Return the indices of the datums whose gradient is None: all indices if the loss does not require grad."""
    loss, _ = probe.loss_fn(batch.data(), batch.tensors(probe.dtype))
    return probe(batch).missing if loss.requires_grad else range(len(batch.weights))


@fragile("on rows of the right length the result is right")
def lengths(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A row of weights of the wrong length is refused, not cut or broadcast."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = repeat_rows(unpoisoned(probe.batch), 3)
    width = batch.targets or 1
    cuts: dict[str, Callable[[list[float]], list[float]]] = {
        "one token longer than the logprobs": lambda row: row + [1.0] * width,
        "one token shorter than the logprobs": lambda row: row[:-width],
        "for one token, with logprobs of many,": lambda row: row[:width],
    }
    for which, cut in cuts.items():
        rows = [cut(row) for row in batch.weights]
        wrong = replace(batch, logprobs=rows, weights=rows, columns={}).data()
        fields = [{name: datum.loss_fn_inputs[name] for name in ("weights", "mask")} for datum in wrong]
        try:
            loss_fn(list(map(with_fields, batch.data(), fields)), batch.tensors(probe.dtype))
        except Exception:
            continue
        require(False, "silent-truncation", f"Weights {which} are accepted silently.", batch)


def with_fields(datum: Any, fields: dict[str, Any]) -> Any:
    """Return the datum with some of its fields replaced."""
    return type(datum)(datum.model_input, {**datum.loss_fn_inputs, **fields})


SPECIAL_TOKEN_IDS = (*range(62), 128, 255, 50256, 100257, 128001, 128009, 151643, 151645)
"""Ids of end-of-text and end-of-turn tokens in common vocabularies, and all small ids."""


@wrong("an end-of-sequence token that is trained on has the id of the padding in many tokenizers")
def token_ids(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The ids of the target tokens do not matter: masks are by position."""
    probe = Probe.of(loss_fn, data, logprobs)
    # ref_logprobs differ from the logprobs: if they were equal, the margin of a pair would be 0 for any mask.
    batch = uniform_batch(probe.batch, length=len(SPECIAL_TOKEN_IDS), datums=2, ref_logprobs=-2.5)
    plain, special = (value_with_targets(probe, batch, ids) for ids in ([1000], SPECIAL_TOKEN_IDS))
    if probe.close(special, plain, scale=0.01):
        return
    values = ((i, value_with_targets(probe, batch, [i, 1000])) for i in SPECIAL_TOKEN_IDS)
    first, value = next((i, value) for i, value in values if not probe.close(value, plain, scale=0.01))
    seen = f"With {first} as every other target token of datum 0, in place of 1000, the loss is"
    require(False, "mask-by-token-id", f"{seen} {contrast(value, plain)}.", batch)


def value_with_targets(probe: Probe, batch: Batch, ids: Sequence[int]) -> float:
    """Return the value if the targets of the first datum have these ids, in turns.

    The other datums keep the id 1000: a mask on both sides of a pair could cancel.
    """
    data = []
    for i, datum in enumerate(batch.data()):
        shape = datum.loss_fn_inputs["target_tokens"].to_numpy().shape
        targets = TensorData.from_numpy(np.resize(np.array([1000] if i else ids), shape))
        data.append(with_fields(datum, {"target_tokens": targets}))
    return measure(probe.loss_fn, data, batch.tensors(probe.dtype)).value


@wrong("a step changes logprobs by less than the low precision can show")
def precision(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The loss computes in float32 or float64: a change of a logprob by 1e-4 changes the loss."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = uniform_batch(probe.batch, datums=2, logprobs=-1.0)
    tried = [batch]
    if batch_kind(batch) == "policy" and "ref_logprobs" in columns_read(probe):
        tried.append(with_constants(batch, advantages=0.0, ref_logprobs=-1.5))  # the KL term alone
    for base in tried:
        lowered = [base.having(logprobs=shifted(base.logprobs, [(0, 0)], by)) for by in (0.0, -(2.0**-13), -0.5)]
        before, near, far = map(probe, lowered)
        if before.value != far.value:
            seen = f"Lowering a logprob from −1 by 2⁻¹³ leaves the loss at exactly {before.value}."
            require(before.value != near.value, "low-precision", seen, base)


@fragile("the result is right, but each datum waits for the device")
def host_sync(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The number of device-to-host transfers does not grow with the batch."""
    probe = Probe.of(loss_fn, data, logprobs)
    few, many = (count_transfers(probe, uniform_batch(probe.batch, datums=n)) for n in (2, 8))
    seen = f"A call moves results to the host {few} times for 2 datums and {many} times for 8."
    require(many <= few, "host-sync-per-datum", seen, uniform_batch(probe.batch, datums=8))


class TransferRecorder(TorchFunctionMode):
    """Record every value that a call moves to the host."""

    NAMES = frozenset({"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__"})

    def __init__(self) -> None:
        super().__init__()
        self.values: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in self.NAMES:
            self.values.append(repr(result))
        return result


def count_transfers(probe: Probe, batch: Batch) -> int:
    """Count the values that depend on the logprobs and that a call moves to the host, where the datums already are."""
    recorded = []
    # Each logprob changes by a different amount: equal changes could cancel within a position or over the batch.
    perturbed = [[x - 0.25 / (2 + i + j) for j, x in enumerate(row)] for i, row in enumerate(batch.logprobs)]
    for tried in (batch, batch.having(logprobs=perturbed)):
        data, logprobs = tried.data(), tried.tensors(probe.dtype)
        recorder = TransferRecorder()
        with recorder:
            probe.loss_fn(data, logprobs)
        recorded.append(recorder.values)
    return sum(a != b for a, b in zip_longest(*recorded))


@fragile("eager calls are right; the SDKs' custom losses and torch.compile run a trace")
def tracing(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A trace of the loss, run on other logprobs, gives the value and gradient of those logprobs."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unpoisoned(probe.batch)
    check_trace(probe, batch, (-0.75, -0.01, 0.4))
    if batch_kind(batch) == "policy":
        low = {
            name: [[x - 30 for x in row] for row in column_rows(batch, name)]
            for name in ("logprobs", *logprob_columns(batch))
        }
        check_trace(probe, batch.having(**low), (25.0,))  # past every cap


def check_trace(probe: Probe, batch: Batch, shifts: Sequence[float]) -> None:
    """Trace the loss on a batch, run the trace on shifted logprobs, and compare with an eager call."""
    loss_fn, data, logprobs = probe.loss_fn, batch.data(), batch.tensors(probe.dtype)
    try:
        traced = Trace(lambda lps: loss_fn(data, lps)[0], logprobs)
    except Exception as error:
        raise NotApplicable(f"it cannot be traced: {type(error).__name__}") from error
    for shift in shifts:
        other = batch.having(logprobs=[[min(x + shift, -1e-3) for x in row] for row in batch.logprobs])
        leaves = other.tensors(probe.dtype)
        value = traced(leaves)
        eager = probe(other)
        traced_value = float(value.detach())
        seen = f"In a trace made {-shift:+} from these logprobs, the loss is {contrast(traced_value, eager.value)}."
        require(probe.close(traced_value, eager.value), "branch-on-values", seen, other)
        if value.requires_grad:
            value.backward()  # type: ignore[no-untyped-call]
        grads = [torch.zeros_like(lp) if lp.grad is None else lp.grad for lp in leaves]
        traced_gradients = [g.flatten().tolist() for g in grads]
        difference = probe.difference(replace(eager, gradients=traced_gradients), eager)
        same = probe.close(traced_gradients, eager.gradients)
        require(same, "no-grad-for-detach", f"In a trace, {difference or traced_gradients}.", other)


FAR_LOGPROBS = ((-1.0, -1e4), (-1e4, -1.0), (-1e4, -1e4), (-50.0, -1.0), (-1.0, -50.0))
NEAR_ZERO_LOGPROBS = (
    (0.0, -1.0),
    (-1.0, 0.0),
    (0.0, 0.0),
    (-1e-10, -1e-6),
    (-1e-6, -1e-10),
    (-1e-8, -1e4),
    (-1e4, 0.0),
)


@fragile("logprobs as extreme as these are rare")
def finite(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Finite logprobs give a finite value and finite gradients, however extreme they are.

    An entry of the constants holds two logprobs: of the two sides of a pair, or of the policy and all other policies.
    """
    probe = Probe.of(loss_fn, data, logprobs)
    pairs = batch_kind(probe.batch) == "preference"
    for extremes, bug_of_pairs in ((FAR_LOGPROBS, "log-of-sigmoid"), (NEAR_ZERO_LOGPROBS, "log-odds-nan")):
        for x, y in extremes:
            for advantage in (1.0, -1.0):
                batch = uniform_batch(probe.batch, datums=2, logprobs=x, advantages=advantage)
                width = len(batch.weights[0])
                sides = [[x] * width, [y if pairs else x] * width]
                others = {name: [[-1.0 if pairs else y] * width] * 2 for name in logprob_columns(batch)}
                at, bug = f"At logprobs {x:g} and {y:g}", bug_of_pairs if pairs else "exp-overflow"
                try:
                    result = probe(batch.having(logprobs=sides, **others))
                except LawBroken as error:  # the loss may refuse a result that is not finite
                    raise LawBroken(bug, f"{at}: {error.seen}", error.batch) from error
                seen = f"{at} the value is {result.value} and the gradients {result.gradients}."
                require(result.finite, bug, seen, result.batch)


def logprob_columns(batch: Batch) -> list[str]:
    """Return the columns that hold another policy's logprobs."""
    return [name for name in batch.columns if name in LOGPROB_COLUMNS]
