"""The other two lanes of a loss: the traced per-datum form, and the fold into a service's built-ins.

Both put share / denominator into the datums, so that a service which only sums over tokens computes
exactly the weighed loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lossfns.datum import TensorData
from lossfns.errors import LossInputError
from lossfns.loss import BoundLoss, Loss, named, not_divisible
from lossfns.pack import blank, check_data, pack, weight_rows
from lossfns.tokens import ON_POLICY, PAIRS, TARGETS, Tokens
from lossfns.values import judge, readings

DatumFn = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def as_datum_fn(loss: Loss | BoundLoss) -> DatumFn:
    """The loss of one datum: ``fn(logprobs, weights, *reads) -> (0-d tensor, {"custom/<name>:sum": tensor})``.

    torch.fx-traceable, in the form of Tinker's ``create_custom_loss``. ``weights`` must already be
    share / denominator, as ``datums`` writes them; losses then add over datums. Metrics are sums over the
    active tokens: divide by ``custom/rows:sum``.

    Raises:
        LossInputError: for a loss that couples datums (pairs).

    >>> from lossfns import ppo
    >>> as_datum_fn(ppo()).__code__.co_varnames
    ('logprobs', 'weights', 'advantages', 'old_logprobs')
    """
    loss = as_bound(loss).loss
    if loss.rows == PAIRS:
        fix = "Use it as a custom loss over the batch: forward_backward_custom(data, loss)."
        raise LossInputError("as_datum_fn", "a loss of single datums", f"{loss!r}, which couples two", fix)

    def body(logprobs: Tensor, weights: Tensor, *columns: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        w = weights.flatten()
        active = w != 0
        blanked = {name: blank(x.flatten(), active) for name, x in zip(loss.reads, columns)}
        t = Tokens(blank(logprobs.flatten(), active), w, None, blanked)
        term, statistics = loss.terms(t)
        counted = t.active.to(torch.float32)
        sums = {name: (counted * x.detach()).sum() for name, x in statistics.items()}
        metrics = {f"custom/{name}:sum": total for name, total in ({"rows": counted.sum()} | sums).items()}
        return (t.weights * term).sum(), metrics

    # The service reads the parameters' names, and fx their number, from the code itself.
    names = ", ".join(("logprobs", "weights", *loss.reads))
    fn: DatumFn = eval(f"lambda {names}: body({names})", {"body": body})
    fn.__name__ = fn.__qualname__ = loss.name
    return fn


def as_bound(loss: Loss | BoundLoss) -> BoundLoss:
    if isinstance(loss, Loss):
        return loss.bind()
    if not isinstance(loss, BoundLoss):
        raise LossInputError("loss", "a Loss such as ppo()", f"{loss!r}", "Call the preset: ppo(), not ppo.")
    return loss


def datums(loss: Loss | BoundLoss, data: Sequence[Any]) -> list[Any]:
    """The datums with ``weights`` = share / denominator and every column the loss reads in place.

    They come through the same door as the batch contract, so they are refused for the same reasons.
    """
    bound = as_bound(loss)
    loss = bound.loss
    with named(loss):
        t, shapes = constants(bound, data)
        share = loss.share(t)
        if loss.count is not None:
            count = float(loss.count(t)) if bound.divisor is None else bound.divisor
            if not count > 0:
                raise not_divisible(count)
            share = share / count
    columns = {"weights": share, **t.columns}
    rows = {name: torch.split(x.cpu(), [prod(shape) for shape in shapes]) for name, x in columns.items()}
    return [
        rebuilt(datum, {name: parts[i].reshape(shape).numpy() for name, parts in rows.items()})
        for i, (datum, shape) in enumerate(zip(data, shapes))
    ]


def constants(bound: BoundLoss, data: Sequence[Any]) -> tuple[Tokens, list[Sequence[int]]]:
    """The packed batch without its logprobs, checked in value too, and the shape of each datum's rows."""
    loss = bound.loss
    if bound.align != "strict" or any(x is ON_POLICY for x in bound.columns.values()):
        got = "align='truncate'" if bound.align != "strict" else "old_logprobs=ON_POLICY"
        fix = "A datum holds what the service will read: rows of its own length, and numbers."
        raise LossInputError("bind", "rows as the datums have them", got, fix)
    check_data(data, loss.rows)
    shapes = [row.shape for row in weight_rows(data, loss.reads, bound.columns)]
    targets = [d.loss_fn_inputs.get("target_tokens") for d in data]
    if loss.rows == TARGETS:
        shapes = [shape if len(shape) == 2 or y is None else y.to_numpy().shape for shape, y in zip(shapes, targets)]
    zeros = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    t = pack(data, zeros, loss.reads, bound.columns, rows=loss.rows)
    values = [float(x) for x in readings(t, loss.rows)]
    judge(values, t, signed=loss.signed)
    return t, shapes


def rebuilt(datum: Any, fields: Mapping[str, np.ndarray]) -> Any:
    """The datum with fields replaced, of its own classes."""
    wrap = type(datum.loss_fn_inputs.get("target_tokens", TensorData([], "int64")))
    new = {name: wrap.from_numpy(np.array(row, dtype=np.float32)) for name, row in fields.items()}
    return type(datum)(datum.model_input, {**datum.loss_fn_inputs, **new})


class Folded(NamedTuple):
    """Arguments of ``forward_backward(data, loss_fn, loss_fn_config)``."""

    data: list[Any]
    loss_fn: str
    loss_fn_config: dict[str, float] | None


def fold(loss: Loss | BoundLoss, data: Sequence[Any]) -> Folded:
    """The loss as a hosted service's one-pass built-in, exactly: advantages (or weights) times share / denominator.

    Raises:
        LossInputError: where no built-in is the same function: a KL or dual clip, a log-ratio cap
            (built-ins are uncapped), coupled datums, a penalty (``dro``: advantages cannot scale it), or a
            loss the services do not have.
    """
    bound = as_bound(loss)
    loss = bound.loss
    name = builtin(loss)
    ready = datums(bound, data)
    for i, datum in enumerate(ready):
        if "target_tokens" not in datum.loss_fn_inputs:
            fix = "Build it with datum_from_tokens."
            raise LossInputError("target_tokens", "the ids of the targets", "nothing", fix, datum=i, loss=loss.name)
    if name == "cross_entropy":
        return Folded([keep(d, ("target_tokens", "weights")) for d in ready], name, None)
    folded = [advantages_times_weights(d, with_mask=name == "gspo") for d in ready]
    if name == "importance_sampling":
        return Folded(folded, name, None)
    low, high = loss.knobs["clip"]
    return Folded(folded, name, {"clip_low_threshold": low, "clip_high_threshold": high})


BUILTINS = {
    "cross_entropy": "cross_entropy",
    "multi_target_cross_entropy": "cross_entropy",
    "importance_sampling": "importance_sampling",
    "ppo": "ppo",
    "dapo": "ppo",
    "grpo": "ppo",
    "gspo_token": "gspo",
    "cispo": "cispo",
}


def builtin(loss: Loss) -> str:
    """The name of the built-in that is this loss once its weights are folded in."""
    if loss.name == "dro":
        fix = "The built-in dro holds every token to the old policy alike: it has no place for a share, nor for a mask."
        raise LossInputError("fold", "a loss whose weights its advantages can carry", f"{loss!r}", fix)
    inexact = [name for name in ("kl_beta", "dual_clip", "log_ratio_cap") if loss.knobs.get(name)]
    if loss.name in BUILTINS and not inexact:
        return BUILTINS[loss.name]
    because = f"its {inexact[0]}: pass {inexact[0]}={0 if inexact[0] == 'kl_beta' else None}" if inexact else "its name"
    raise LossInputError("fold", f"one of {', '.join(BUILTINS)}", f"{loss!r}", f"No built-in has {because}.")


def advantages_times_weights(datum: Any, *, with_mask: bool) -> Any:
    """A policy datum of the services: ``target_tokens``, ``logprobs`` (old) and folded ``advantages``."""
    weights, advantages, old = (datum.loss_fn_inputs[n].to_numpy() for n in ("weights", "advantages", "old_logprobs"))
    active = weights != 0
    fields = {"logprobs": np.where(active, old, 0), "advantages": np.where(active, advantages, 0) * weights}
    mask = {"sequence_ratio_mask": active} if with_mask else {}
    return keep(rebuilt(datum, fields | mask), ("target_tokens", *fields, *mask))


def keep(datum: Any, names: Sequence[str]) -> Any:
    return type(datum)(datum.model_input, {name: datum.loss_fn_inputs[name] for name in names})
