"""A loss as a black box: one call of the contract, its gradient, and the columns that it may read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor

from lossfns.checks import is_real
from lossfns.errors import LossInputError, LossWarning
from lossfns.export.datums import with_fields
from lossfns.loss import BoundLoss, Loss, LossFn
from lossfns.pack import Shapes, any_active, pack_side_columns
from lossfns.tokens import COLUMNS, DATUM_FIELDS, ON_POLICY, TARGETS, TOKENS, Rows

ALIASES = {"old_logprobs": "logprobs", "weights": "mask"}
"""Other names under which datums hold a column, for losses that were written for another framework."""


# One call


def gradient_of(
    loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]
) -> tuple[float, Tensor, dict[str, float]]:
    """Call a loss on copies of the logprobs, and differentiate it.

    Returns:
        The value; ∂L/∂logprob as ``[N]`` float64, datums end to end; and the metrics.

    Raises:
        LossInputError: if the result breaks the contract, or a datum has no gradient.
    """
    with torch.enable_grad():
        leaves = [lp.detach().clone().requires_grad_() for lp in logprobs]
        loss, metrics = check_result(loss_fn(list(data), leaves))
        gradients = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    for i, gradient in enumerate(gradients):
        if gradient is None:
            fix = "Every datum's logprobs must enter the loss, if only as 0.0 * logprobs.sum()."
            raise LossInputError(f"logprobs_list[{i}]", "a gradient", "no gradient", fix)
    flat = torch.cat([gradient.flatten().double().cpu() for gradient in gradients])
    return float(loss.detach()), flat + 0.0, metrics  # + 0.0 turns −0 into 0


def check_result(result: Any) -> tuple[Tensor, dict[str, float]]:
    """Return the result of a loss if it is the ``(loss, metrics)`` of the contract. Values may be nan.

    Raises:
        LossInputError: if it is not a scalar tensor with a graph, and a dict of numbers.
    """
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


@contextmanager
def without_warnings() -> Iterator[None]:
    """Suppress the warnings of a loss about inputs that an inspection made up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LossWarning)
        yield


# The loss


def loss_of(loss_fn: Any) -> Loss | None:
    """Return the ``Loss`` inside; None for a function that is not ours."""
    return loss_fn.loss if isinstance(loss_fn, BoundLoss) else loss_fn if isinstance(loss_fn, Loss) else None


def loss_name(loss_fn: Any) -> str:
    loss = loss_of(loss_fn)
    return getattr(loss_fn, "__name__", repr(loss_fn)) if loss is None else repr(loss)


def row_kind(loss_fn: Any) -> Rows:
    loss = loss_of(loss_fn)
    return TOKENS if loss is None else loss.rows


def bound_columns(loss_fn: Any) -> Mapping[str, Any]:
    return loss_fn.columns if isinstance(loss_fn, BoundLoss) else {}


def readable_columns(loss_fn: Any) -> list[str]:
    """Return the columns besides weights that a loss may read. A function that is not ours may read any."""
    loss = loss_of(loss_fn)
    return [name for name in COLUMNS[1:] if loss is None or name in loss.reads]


# The columns of a batch


def visible_columns(loss_fn: Any, data: Sequence[Any], shapes: Shapes) -> dict[str, Tensor]:
    """Return the columns that the binding or all datums hold, as ``[N]`` float64, datums end to end.

    Masked slots keep their values. In a sum of losses, what is not finite where no part reads it becomes 0. Weights are
    ones where there are none.

    Raises:
        LossInputError: if a column does not fit the shapes.
    """
    bound, like = bound_columns(loss_fn), torch.empty(0, dtype=torch.float64)
    rows = TARGETS if len(shapes[0]) == 2 else TOKENS
    ones = [torch.ones(tuple(shape)) for shape in shapes]
    loss = loss_of(loss_fn)
    names = [name for name in (*COLUMNS[1:], *(loss.masks if loss else ())) if is_visible(name, data, bound)]
    # The other columns get weights of one: the door then masks no slot, and every slot keeps its value.
    unmasked = pack_side_columns(data, shapes, like, names, {**bound, "weights": ones}, rows=rows)
    visible = visible_weights(data, bound)
    weights = pack_side_columns(
        data, shapes, like, (), {"weights": ones if visible is None else visible}, rows=rows
    ).weights
    columns = {"weights": weights, **unmasked.columns}
    for name in [name for name in names if loss and loss.parts]:
        read = [part.weights for part in loss.parts.values() if name in part.loss.reads]  # type: ignore[union-attr]
        unread = ~any_active(0 * weights, [columns[each] for each in read if each in columns])
        columns[name] = torch.where(unread & ~columns[name].isfinite(), 0, columns[name])
    return columns


def active_tokens(columns: Mapping[str, Tensor]) -> Tensor:
    """``[N]`` bool: whether a weight of the token is not 0, that of any part in a sum of losses."""
    return any_active(columns["weights"], [x for name, x in columns.items() if name.endswith("_weights")])


def visible_weights(data: Sequence[Any], bound: Mapping[str, Any]) -> Any:
    """Return the weights that are bound, or that all datums hold under one of their names; else None."""
    if "weights" in bound:
        return bound["weights"]
    fields = ([datum.loss_fn_inputs.get(name) for datum in data] for name in ("weights", ALIASES["weights"]))
    return next((values for values in fields if all(value is not None for value in values)), None)


def is_visible(name: str, data: Sequence[Any], bound: Mapping[str, Any]) -> bool:
    """Whether a column is bound to numbers, or all datums hold it."""
    if name in bound:
        return bound[name] is not ON_POLICY
    fields = DATUM_FIELDS.get(name, (name,))
    return all(any(datum.loss_fn_inputs.get(field) is not None for field in fields) for datum in data)


def with_columns(
    loss_fn: Any, data: Sequence[Any], columns: Mapping[str, Tensor], shapes: Shapes
) -> tuple[Any, list[Any]]:
    """Replace columns in the binding and in the datums. In a datum, replace all fields that hold the column."""
    rows = {name: split_by_datum(x, shapes) for name, x in columns.items()}
    bound = {name: x for name, x in rows.items() if name in bound_columns(loss_fn)}

    def changed(datum: Any, i: int) -> Any:
        names = {key: name for name in rows for key in (name, ALIASES.get(name, name)) if key in datum.loss_fn_inputs}
        return with_fields(datum, {key: rows[name][i].numpy() for key, name in names.items()}) if names else datum

    return (loss_fn.bind(**bound) if bound else loss_fn), [changed(datum, i) for i, datum in enumerate(data)]


def split_by_datum(x: Tensor, shapes: Shapes) -> list[Tensor]:
    """Split ``[N]``, datums end to end, into the rows of the datums."""
    parts = torch.split(x, [prod(shape) for shape in shapes])
    return [part.reshape(tuple(shape)) for part, shape in zip(parts, shapes)]


def sum_by_datum(x: Tensor, shapes: Shapes) -> Tensor:
    """Sum over each datum: ``[N] -> [B]`` float64."""
    lengths = torch.tensor([prod(shape) for shape in shapes])
    datums = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, datums, x.double())
