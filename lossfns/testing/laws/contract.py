"""Laws of the contract: what any ``(data, logprobs_list) -> (loss, metrics)`` owes its caller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from lossfns.datum import TensorData
from lossfns.testing.batch import Batch
from lossfns.testing.laws.base import (
    LawBroken,
    LossFn,
    NotApplicable,
    Probe,
    demand,
    filled,
    kind_of,
    measured,
    moved,
    single,
    slots,
    stretched,
    suppose,
    unpoisoned,
    with_empty,
)
from lossfns.tokens import LOGPROB_COLUMNS as OTHERS


def contract(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A call returns a 0-d tensor that requires grad, and a dict of plain floats."""
    probe, bug = Probe.of(loss_fn, data, logprobs), "not-the-contract"
    try:
        result: Any = loss_fn(probe.batch.data(), probe.batch.tensors(probe.dtype))
    except NotApplicable:
        raise
    except Exception as error:
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
        f"datum[{i}].{name}": repr(x.to_numpy().tolist()) for i, d in enumerate(data) for name, x in d.loss_fn_inputs.items()
    }  # fmt: skip
    return fields | {f"datum[{i}].logprobs (tensor)": repr(lp.tolist()) for i, lp in enumerate(logprobs)}


def repeatable(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The same call gives the same bits, whatever was called in between."""
    probe = Probe.of(loss_fn, data, logprobs)
    first = probe()
    other = unpoisoned(probe.batch)
    probe(replace(stretched(other, 5), logprobs=moved(stretched(other, 5).logprobs, slots(stretched(other, 5)), -0.5)))
    again = probe()
    same = repr((first.value, first.gradients)) == repr((again.value, again.gradients))
    seen = f"The same batch gave {first.value} and, after a call on another batch, {again.value}."
    demand(same, "state-between-calls", seen)


def every_gradient(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Each datum's logprobs get a gradient, be it 0: the hosted SDKs raise where it is None."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = with_empty(probe.batch)
    zero = filled(batch, advantages=0.0) if "advantages" in batch.columns else batch
    for tried in (probe.batch, batch, zero):
        for i in probe(tried).missing:
            used = tried is not zero and any(tried.weights[i])
            why = "though it has active tokens" if used else "for its weights or advantages are 0"
            seen = f"logprobs_list[{i}].grad is None, {why}."
            demand(False, "datum-ignored" if used else "gradient-missing", seen)


def lengths(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A row of weights of the wrong length is refused, not cut or broadcast."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = stretched(unpoisoned(probe.batch), 3)
    width = batch.targets or 1
    for extra in (1, -1):
        rows = [row + [1.0] * width if extra == 1 else row[:-width] for row in batch.weights]
        wrong = replace(batch, logprobs=rows, weights=rows, columns={}).data()
        mixed = [with_fields(d, {n: w.loss_fn_inputs[n] for n in ("weights", "mask")}) for d, w in zip(batch.data(), wrong)]
        try:
            loss_fn(mixed, batch.tensors(probe.dtype))
        except Exception:
            continue
        seen = f"Weights one token {'longer' if extra == 1 else 'shorter'} than the logprobs are taken in silence."
        demand(False, "silent-truncation", seen)


def with_fields(datum: Any, fields: dict[str, Any]) -> Any:
    return type(datum)(datum.model_input, {**datum.loss_fn_inputs, **fields})


def token_ids(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Which tokens were the targets does not matter: masks are by position."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = stretched(unpoisoned(probe.batch), 4)
    plain = probe(batch).value
    for token in range(64):
        ids = [TensorData.from_numpy(d.loss_fn_inputs["target_tokens"].to_numpy() * 0 + token) for d in batch.data()]
        same = [with_fields(datum, {"target_tokens": row}) for datum, row in zip(batch.data(), ids)]
        value = measured(loss_fn, same, batch.tensors(probe.dtype)).value
        seen = f"With {token} as every target token the loss is {value}, not {plain}."
        demand(probe.same(value, plain, scale=0.01), "mask-by-token-id", seen)


def precision(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The maths is in float32 at least: a logprob's change of 1e-4 is seen."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = single(probe.batch, datums=2, logprobs=-1.0)
    before = probe(batch)
    after = probe(batch.having(logprobs=moved(batch.logprobs, [(0, 0)], -(2.0**-13))))
    suppose(any(map(any, before.gradients)), "there is no gradient")
    seen = f"Lowering a logprob from −1 by 2⁻¹³ leaves the loss at exactly {before.value}."
    demand(before.value != after.value, "low-precision", seen)
    half = batch.tensors(torch.bfloat16)
    try:
        loss, _ = loss_fn(batch.data(), half)
    except Exception as error:
        raise NotApplicable("it takes no bfloat16") from error
    demand(loss.dtype in (torch.float32, torch.float64), "low-precision", f"For bfloat16 logprobs the loss is {loss.dtype}.")  # fmt: skip


def host_sync(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The number of device-to-host transfers does not grow with the batch."""
    probe = Probe.of(loss_fn, data, logprobs)
    few, many = (transfers(probe, single(probe.batch, datums=n)) for n in (2, 8))
    seen = f"A call moves values to the host {few} times for 2 datums and {many} times for 8."
    demand(many <= few, "host-sync-per-datum", seen)


class Transfers(TorchFunctionMode):
    """Counts what waits for the device."""

    NAMES = frozenset({"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__"})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in self.NAMES
        return func(*args, **(kwargs or {}))


def transfers(probe: Probe, batch: Batch) -> int:
    data, logprobs = batch.data(), batch.tensors(probe.dtype)
    with Transfers() as mode:
        probe.loss_fn(data, logprobs)
    return mode.count


def tracing(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A trace of the maths, run on other logprobs, gives their value and gradient."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unpoisoned(probe.batch)
    data, shown = batch.data(), batch.tensors(probe.dtype)
    try:
        traced = make_fx(lambda *lps: loss_fn(data, list(lps))[0], _error_on_data_dependent_ops=False)(*shown)
    except Exception as error:
        raise NotApplicable(f"it cannot be traced: {type(error).__name__}") from error
    for shift in (-0.75, -0.01, 0.4):
        other = batch.having(logprobs=[[min(x + shift, -1e-3) for x in row] for row in batch.logprobs])
        leaves = other.tensors(probe.dtype)
        value = traced(*leaves)
        eager = probe(other)
        seen = f"Traced at these logprobs and run {shift:+} from them, the loss is {float(value.detach())}, not {eager.value}."
        demand(probe.same(float(value.detach()), eager.value), "branch-on-values", seen)
        if value.requires_grad:
            value.backward()
        grads = [torch.zeros_like(lp) if lp.grad is None else lp.grad for lp in leaves]
        traced_gradients = [g.flatten().tolist() for g in grads]
        seen = f"Traced, the loss has the gradients {traced_gradients}; eager, {eager.gradients}."
        demand(probe.same(traced_gradients, eager.gradients), "no-grad-for-detach", seen)


def no_inert_knob(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Each setting changes value or gradient on some batch."""
    from lossfns.testing.subject import knobs, variants

    probe = Probe.of(loss_fn, data, logprobs)
    settings = knobs(loss_fn)
    suppose(bool(settings), "it has no settings that can be seen")
    for batch in generic(probe.batch):
        usual = probe(batch)
        for name in list(settings):
            if any(changed(probe, batch, usual, other) for other in variants(loss_fn, name)):
                del settings[name]
    for name, value in settings.items():
        clip = name.startswith(("clip", "eps")) and "dual" not in name
        demand(False, "clip-inert" if clip else "inert-knob", f"Whatever {name} is, value and gradient are those of {value!r}.")  # fmt: skip


def changed(probe: Probe, batch: Batch, usual: Any, other: LossFn) -> bool:
    try:
        result = probe(batch, other)
    except Exception:
        return False
    return not probe.same([result.value, result.gradients], [usual.value, usual.gradients], scale=0.01)


def generic(like: Batch) -> list[Batch]:
    """Batches on which every term of a loss is at work: log-ratios across all bounds, both signs, both sides.

    They come from calm to wild, because one large term can drown the others; the last ones have one log-ratio
    throughout a sequence, past every cap.
    """
    steady = [made(like, d, alternate=False) for d in (0.3, 2.0, 25.0)]
    return [made(like, d, alternate=True) for d in (0.0, 0.01, 0.15, 0.3, 1.0, 2.0, 25.0)] + steady


def made(like: Batch, d: float, *, alternate: bool) -> Batch:
    """Four datums of unequal length whose log-ratios are ±d, alternating by token or by sequence."""
    flip = lambda i, j: (-1.0) ** (i // 2 + j * alternate)  # noqa: E731
    fill = lambda value: [  # noqa: E731
        [float(value(i, j)) for j in range(n * (like.targets or 1))] for i, n in enumerate((2, 3, 1, 4))
    ]
    level = -30.0 if "old_logprobs" in like.columns else -0.75
    logprobs = fill(lambda i, j: level if level == -30 else level - 0.125 * i - d / 8)
    columns = {
        "advantages": fill(lambda i, j: (-1) ** i * (1 + 0.25 * j)),
        "old_logprobs": fill(lambda i, j: level + d * flip(i, j)),
        "ref_logprobs": fill(lambda i, j: level - 0.25 - 0.25 * d * (1 + (i + j) % 3)),
        "sampler_logprobs": fill(lambda i, j: level - 0.375 * d * flip(i, j)),
    }
    weights = fill(lambda i, j: (1.0, 0.5, 1.0, 2.0)[j % 4])
    return Batch(logprobs, weights, {name: columns[name] for name in like.columns}, like.targets)


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
                other = {name: [[y] * len(row) for row in batch.weights] for name in batch.columns if name in OTHERS}
                if pairs:
                    both = [[x] * len(batch.weights[0]), [y] * len(batch.weights[1])]
                    batch = batch.having(logprobs=both, **{name: [[-1.0] * len(r) for r in both] for name in other})
                else:
                    batch = batch.having(**other)
                result = probe(batch)
                seen = f"At logprobs {x:g} and {y:g} the value is {result.value} and the gradients {result.gradients}."
                demand(result.finite, bug if pairs else "exp-overflow", seen)
