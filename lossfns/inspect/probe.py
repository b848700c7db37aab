"""A loss seen from outside: one call of the contract, its gradient, and the columns it may read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor

from lossfns.checks import is_real
from lossfns.errors import LossInputError, LossWarning
from lossfns.export.datums import with_fields
from lossfns.loss import BoundLoss, Loss, show
from lossfns.pack import column_or_none, flatten_column
from lossfns.tokens import COLUMNS, TOKENS

LossFn = Callable[[Any, Any], tuple[Tensor, dict[str, float]]]
Shapes = Sequence[Sequence[int]]

ALIASES = {"old_logprobs": "logprobs", "weights": "mask"}
"""Second names under which a datum holds a column too, so that a loss written for another framework finds it."""


def gradient_of(
    loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]
) -> tuple[float, Tensor, dict[str, float]]:
    """One call on leaves of its own: value, ∂L/∂logprob end to end in float64, metrics."""
    with torch.enable_grad():
        leaves = [lp.detach().clone().requires_grad_() for lp in logprobs]
        loss, metrics = check_result(loss_fn(data, leaves))
        found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    for i, gradient in enumerate(found):
        if gradient is None:
            fix = "Every datum's logprobs must enter the loss, if only as 0.0 * logprobs.sum()."
            raise LossInputError(f"logprobs_list[{i}]", "a gradient", "no gradient", fix)
    flat = torch.cat([gradient.flatten().double().cpu() for gradient in found])
    return float(loss.detach()), flat + 0.0, metrics  # + 0.0 makes −0 a plain 0


def check_result(result: Any) -> tuple[Tensor, dict[str, float]]:
    """``(loss, metrics)`` as the contract has it: a scalar with a graph, and a dict of numbers; values may be nan."""
    expected = "loss_fn to return (0-dim tensor, dict)"
    if not isinstance(result, tuple) or len(result) != 2:
        got = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise LossInputError("loss_fn", expected, got, "Return the loss and a dict of floats, {} for none.")
    loss, metrics = result
    if not isinstance(loss, Tensor):
        got, fix = f"({type(loss).__name__}, ...)", "Leave out .item() and float(): the graph ends there."
        raise LossInputError("loss_fn", expected, got, fix)
    if loss.numel() != 1:
        raise LossInputError("loss", "a 0-dim tensor", f"shape {tuple(loss.shape)}", "Reduce it to a scalar.")
    if not loss.requires_grad:
        got = "a loss that does not depend on logprobs (no grad_fn)"
        fix = "Look for .detach(), .item(), no_grad() or torch.tensor() on the way to the loss."
        raise LossInputError("loss", "a loss computed from logprobs", got, fix)
    if not isinstance(metrics, dict):
        raise LossInputError("metrics", "a dict of floats", type(metrics).__name__, "Return {} for none.")
    for name, value in metrics.items():
        if not is_real(value):
            got = f"a {type(value).__name__}"
            raise LossInputError(f"metrics[{name!r}]", "a float", got, "Call float() on the detached value.")
        if name.count(":") > 1:
            raise LossInputError("metrics", "names with one ':' at most", repr(name), "It separates the reduction.")
    return loss, metrics


def loss_of(loss_fn: Any) -> Loss | None:
    """The ``Loss`` inside, if it is one of this library's."""
    return loss_fn.loss if isinstance(loss_fn, BoundLoss) else loss_fn if isinstance(loss_fn, Loss) else None


def bound_of(loss_fn: Any) -> Mapping[str, Any]:
    return loss_fn.columns if isinstance(loss_fn, BoundLoss) else {}


def reads_of(loss_fn: Any) -> list[str]:
    """The columns that a loss may read besides weights: any of ``COLUMNS`` where it does not say."""
    loss = loss_of(loss_fn)
    return [name for name in COLUMNS[1:] if loss is None or name in loss.reads]


def rows_of(loss_fn: Any) -> str:
    loss = loss_of(loss_fn)
    return TOKENS if loss is None else loss.rows


def name_of(loss_fn: Any) -> str:
    return show(loss_of(loss_fn) or loss_fn)


def columns_of(loss_fn: Any, data: Sequence[Any], shapes: Shapes) -> dict[str, Tensor]:
    """The columns that the binding or the datums hold, end to end in float64; weights are 1 where there are none."""
    bound, like = bound_of(loss_fn), torch.empty(0, dtype=torch.float64)
    lengths = torch.tensor([prod(shape) for shape in shapes])
    found = {name: column_or_none(name, data, bound, TOKENS) for name in COLUMNS}
    if found["weights"] is None:
        found["weights"] = column_or_none(ALIASES["weights"], data, {}, TOKENS)
    flat = {name: flatten_column(name, x, shapes, lengths, like) for name, x in found.items() if x is not None}
    return {"weights": torch.ones(int(lengths.sum()), dtype=torch.float64)} | flat


def having(loss_fn: Any, data: Sequence[Any], columns: Mapping[str, Tensor], shapes: Shapes) -> tuple[Any, list[Any]]:
    """The loss and datums with these columns in place of their own, under every name that a datum has them."""
    rows = {name: split(x, shapes) for name, x in columns.items()}
    bound = {name: x for name, x in rows.items() if name in bound_of(loss_fn)}

    def changed(datum: Any, i: int) -> Any:
        names = {key: name for name in rows for key in (name, ALIASES.get(name, name)) if key in datum.loss_fn_inputs}
        return with_fields(datum, {key: rows[name][i].numpy() for key, name in names.items()}) if names else datum

    return (loss_fn.bind(**bound) if bound else loss_fn), [changed(datum, i) for i, datum in enumerate(data)]


def split(x: Tensor, shapes: Shapes) -> list[Tensor]:
    """What lies end to end as the rows of the datums."""
    parts = torch.split(x, [prod(shape) for shape in shapes])
    return [part.reshape(tuple(shape)) for part, shape in zip(parts, shapes)]


@contextmanager
def quietly() -> Iterator[None]:
    """Without a loss's doubts about inputs that are not the caller's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LossWarning)
        yield
