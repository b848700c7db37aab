"""Laws of the contract: what any ``(data, logprobs_list) -> (loss, metrics)`` owes its caller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._guards import TracingContext
from torch._guards import tracing as trace_context
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from lossfns.datum import TensorData
from lossfns.testing.batch import Batch
from lossfns.testing.laws.base import (
    LawBroken,
    LossFn,
    NotApplicable,
    Probe,
    columns_read,
    demand,
    filled,
    kind_of,
    measured,
    moved,
    rows_of,
    single,
    slots,
    stretched,
    unpoisoned,
    with_empty,
)
from lossfns.tokens import LOGPROB_COLUMNS


def contract(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A call returns a 0-d tensor that requires grad, and a dict of plain floats."""
    probe, bug = Probe.of(loss_fn, data, logprobs), "not-the-contract"
    probe = probe.on(unpoisoned(stretched(probe.batch, 3)))
    if "advantages" in probe.batch.columns:
        probe = probe.on(filled(probe.batch, advantages=1.0))
    try:
        result: Any = loss_fn(probe.batch.data(), probe.batch.tensors(probe.dtype))
    except NotApplicable:
        raise
    except (Exception, SystemExit) as error:
        misaligned(probe)
        raise LawBroken(bug, f"On a valid batch the call raises {type(error).__name__}: {error}.") from error
    demand(isinstance(result, tuple) and len(result) == 2, bug, f"The call returns {result!r}, not (loss, metrics).")
    loss, metrics = result
    demand(isinstance(loss, Tensor), bug, f"The loss is a {type(loss).__name__}, not a tensor.")
    demand(loss.ndim == 0, bug, f"The loss has shape {tuple(loss.shape)}, not ().")
    demand(loss.requires_grad, bug, "The loss does not depend on the logprobs: it has no grad_fn.")
    demand(isinstance(metrics, Mapping), bug, f"The metrics are a {type(metrics).__name__}, not a dict.")
    for name, value in metrics.items():
        plain = isinstance(value, (float, int)) and not isinstance(value, bool)
        demand(plain, bug, f"The metric {name!r} is a {type(value).__name__}, not a float.")
    probe()


def misaligned(probe: Probe) -> None:
    """Whether a call that fails on datums of unequal length mixes datums up on equal ones."""
    from lossfns.testing.laws.frames import independence

    try:
        independence(probe.loss_fn, probe.batch.data(), probe.batch.tensors(probe.dtype))
    except LawBroken as error:
        if error.bug != "not-the-contract":
            raise
    except NotApplicable:
        return


def inputs_unchanged(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A call leaves datums and logprobs as they were."""
    probe = Probe.of(loss_fn, data, logprobs)
    data, logprobs = probe.batch.data(), probe.batch.tensors(probe.dtype)
    order, before = list(map(id, data)), snapshot(data, logprobs)
    loss_fn(data, logprobs)
    demand(list(map(id, data)) == order, "inputs-mutated", "After the call the list of datums is another.")
    for name, was in before.items():
        now = snapshot(data, logprobs).get(name)
        demand(now == was, "inputs-mutated", f"The call changed {name} from {was} to {now}.")


def snapshot(data: Sequence[Any], logprobs: Sequence[Tensor]) -> dict[str, str]:
    fields = {
        f"datum[{i}].{name}": repr(values.to_numpy().tolist())
        for i, datum in enumerate(data)
        for name, values in datum.loss_fn_inputs.items()
    }
    return fields | {f"datum[{i}].logprobs (tensor)": repr(lp.tolist()) for i, lp in enumerate(logprobs)}


def repeatable(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The same call gives the same bits, whatever was called in between."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = stretched(unpoisoned(probe.batch), 3)
    first = probe(batch)
    probe(batch.having(logprobs=moved(batch.logprobs, slots(batch), -0.5)))
    probe(single(batch, length=5, datums=2, logprobs=-0.5))
    again = probe(batch)
    same = repr((first.value, first.gradients)) == repr((again.value, again.gradients))
    seen = f"The same batch gave {first.value} and, after calls on other batches, {again.value}."
    demand(same, "state-between-calls", seen)


def every_gradient(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Each datum's logprobs get a gradient, be it 0: the hosted SDKs raise where it is None."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = with_empty(probe.batch)
    zero = filled(batch, advantages=0.0) if "advantages" in batch.columns else batch
    for tried in (probe.batch, batch, zero):
        for i in missing_gradients(probe, tried):
            used = tried is not zero and any(tried.weights[i])
            why = "though it has active tokens" if used else "for its weights or advantages are 0"
            seen = f"logprobs_list[{i}].grad is None, {why}."
            demand(False, "datum-ignored" if used else "gradient-missing", seen)


def missing_gradients(probe: Probe, batch: Batch) -> Sequence[int]:
    """The datums without a gradient: all, where the loss has none itself."""
    loss, _ = probe.loss_fn(batch.data(), batch.tensors(probe.dtype))
    return probe(batch).missing if loss.requires_grad else range(len(batch.weights))


def lengths(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A row of weights of the wrong length is refused, not cut or broadcast."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = stretched(unpoisoned(probe.batch), 3)
    width = batch.targets or 1
    cuts: dict[str, Callable[[list[float]], list[float]]] = {
        "one token longer than the logprobs": lambda row: row + [1.0] * width,
        "one token shorter than the logprobs": lambda row: row[:-width],
        "for one token, with logprobs of many,": lambda row: row[:width],
    }
    for words, cut in cuts.items():
        rows = [cut(row) for row in batch.weights]
        wrong = replace(batch, logprobs=rows, weights=rows, columns={}).data()
        fields = [{name: datum.loss_fn_inputs[name] for name in ("weights", "mask")} for datum in wrong]
        try:
            loss_fn(list(map(with_fields, batch.data(), fields)), batch.tensors(probe.dtype))
        except Exception:
            continue
        demand(False, "silent-truncation", f"Weights {words} are taken in silence.")


def with_fields(datum: Any, fields: dict[str, Any]) -> Any:
    return type(datum)(datum.model_input, {**datum.loss_fn_inputs, **fields})


SPECIAL = (*range(62), 128, 255, 50256, 100257, 128001, 128009, 151643, 151645)
"""Ids that vocabularies have for the end of a text or a turn, and the small ones."""


def token_ids(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Which tokens were the targets does not matter: masks are by position."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = single(probe.batch, length=len(SPECIAL), datums=2, ref_logprobs=-2.5)  # at the reference a pair is silent
    plain, special = (with_targets(probe, batch, ids) for ids in ([1000], SPECIAL))
    if probe.same(special, plain, scale=0.01):
        return
    first = next(i for i in SPECIAL if not probe.same(with_targets(probe, batch, [i, 1000]), plain, scale=0.01))
    demand(False, "mask-by-token-id", f"With {first} as every other target token the loss is not {plain}.")


def with_targets(probe: Probe, batch: Batch, ids: Sequence[int]) -> float:
    """The value where the first datum's targets are these ids, over and over: in both sides of a pair they cancel."""
    data = []
    for i, datum in enumerate(batch.data()):
        shape = datum.loss_fn_inputs["target_tokens"].to_numpy().shape
        targets = TensorData.from_numpy(np.resize(np.array([1000] if i else ids), shape))
        data.append(with_fields(datum, {"target_tokens": targets}))
    return measured(probe.loss_fn, data, batch.tensors(probe.dtype)).value


def precision(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The maths is in float32 at least: a logprob's change of 1e-4 is seen."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = single(probe.batch, datums=2, logprobs=-1.0)
    tried = [batch]
    if kind_of(batch) == "policy" and "ref_logprobs" in columns_read(probe):
        tried.append(filled(batch, advantages=0.0, ref_logprobs=-1.5))  # the KL term alone
    for base in tried:
        lowered = [base.having(logprobs=moved(base.logprobs, [(0, 0)], by)) for by in (0.0, -(2.0**-13), -0.5)]
        before, near, far = map(probe, lowered)
        if before.value != far.value:
            seen = f"Lowering a logprob from −1 by 2⁻¹³ leaves the loss at exactly {before.value}."
            demand(before.value != near.value, "low-precision", seen)


def host_sync(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The number of device-to-host transfers does not grow with the batch."""
    probe = Probe.of(loss_fn, data, logprobs)
    few, many = (transfers(probe, single(probe.batch, datums=n)) for n in (2, 8))
    seen = f"A call moves results to the host {few} times for 2 datums and {many} times for 8."
    demand(many <= few, "host-sync-per-datum", seen)


class Transfers(TorchFunctionMode):
    """Notes every value that is brought to the host."""

    NAMES = frozenset({"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__"})

    def __init__(self) -> None:
        super().__init__()
        self.values: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in self.NAMES:
            self.values.append(repr(result))
        return result


def transfers(probe: Probe, batch: Batch) -> int:
    """How many of the values that a call brings to the host depend on the logprobs: a datum's own are there already."""
    noted = []
    # Each by another amount: alike, they would cancel, within a position or over the batch.
    apart = [[x - 0.25 / (2 + i + j) for j, x in enumerate(row)] for i, row in enumerate(batch.logprobs)]
    for shifted in (batch, batch.having(logprobs=apart)):
        data, logprobs = shifted.data(), shifted.tensors(probe.dtype)
        noting = Transfers()
        with noting:
            probe.loss_fn(data, logprobs)
        noted.append(noting.values)
    return sum(a != b for a, b in zip_longest(*noted))


def tracing(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A trace of the maths, run on other logprobs, gives their value and gradient."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unpoisoned(probe.batch)
    traced_like(probe, batch, (-0.75, -0.01, 0.4))
    if kind_of(batch) == "policy":
        low = {
            name: [[x - 30 for x in row] for row in rows_of(batch, name)] for name in ("logprobs", *others_of(batch))
        }
        traced_like(probe, batch.having(**low), (25.0,))  # past every cap


def traced_like(probe: Probe, batch: Batch, shifts: Sequence[float]) -> None:
    """Trace on a batch, run on its logprobs shifted, and compare with the function itself."""
    loss_fn, data, shown = probe.loss_fn, batch.data(), batch.tensors(probe.dtype)
    try:
        with trace_context(TracingContext(FakeTensorMode())):  # or make_fx makes such a mode for each operation
            traced = make_fx(lambda *lps: loss_fn(data, list(lps))[0], _error_on_data_dependent_ops=False)(*shown)
    except Exception as error:
        raise NotApplicable(f"it cannot be traced: {type(error).__name__}") from error
    for shift in shifts:
        other = batch.having(logprobs=[[min(x + shift, -1e-3) for x in row] for row in batch.logprobs])
        leaves = other.tensors(probe.dtype)
        value = traced(*leaves)
        eager = probe(other)
        run = float(value.detach())
        seen = f"Traced at these logprobs and run {shift:+} from them, the loss is {run}, not {eager.value}."
        demand(probe.same(run, eager.value), "branch-on-values", seen)
        if value.requires_grad:
            value.backward()
        grads = [torch.zeros_like(lp) if lp.grad is None else lp.grad for lp in leaves]
        traced_gradients = [g.flatten().tolist() for g in grads]
        seen = f"Traced, the loss has the gradients {traced_gradients}; eager, {eager.gradients}."
        demand(probe.same(traced_gradients, eager.gradients), "no-grad-for-detach", seen)


FAR = ((-1.0, -1e4), (-1e4, -1.0), (-1e4, -1e4), (-50.0, -1.0), (-1.0, -50.0))
NEAR = ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e-10, -1e-6), (-1e-6, -1e-10), (-1e-8, -1e4), (-1e4, 0.0))


def finite(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Finite logprobs give a finite value and finite gradients, however extreme.

    The two numbers are the two sides of a pair, or the policy's logprob and everyone else's.
    """
    probe = Probe.of(loss_fn, data, logprobs)
    pairs = kind_of(probe.batch) == "preference"
    for ends, bug in ((FAR, "log-of-sigmoid"), (NEAR, "log-odds-nan")):
        for x, y in ends:
            for advantage in (1.0, -1.0):
                batch = single(probe.batch, datums=2, logprobs=x, advantages=advantage)
                width = len(batch.weights[0])
                sides = [[x] * width, [y if pairs else x] * width]
                others = {name: [[-1.0 if pairs else y] * width] * 2 for name in others_of(batch)}
                at, named = f"At logprobs {x:g} and {y:g}", bug if pairs else "exp-overflow"
                try:
                    result = probe(batch.having(logprobs=sides, **others))
                except LawBroken as error:  # it may refuse what is not finite
                    raise LawBroken(named, f"{at}: {error.seen}") from error
                seen = f"{at} the value is {result.value} and the gradients {result.gradients}."
                demand(result.finite, named, seen)


def others_of(batch: Batch) -> list[str]:
    """The columns that hold another policy's logprobs."""
    return [name for name in batch.columns if name in LOGPROB_COLUMNS]
