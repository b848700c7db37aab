"""A loss of the model's outputs: its value, its metrics and its gradient with respect to the outputs.

A loss that breaks the contract is refused. Values on a device are read and checked together, after the backward pass is
queued, so that the host waits once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lossfns.datum import TensorData
from lossfns.devices import copy_to_host, to_device
from lossfns.errors import LossInputError, add_loss_name
from lossfns.loss import BoundLoss, Loss, LossFn, as_packed
from lossfns.pack import PackedColumns, pack_side_columns
from lossfns.tokens import MODEL_COLUMNS, Tokens


class Outputs(NamedTuple):
    """The outputs of a model for all datums, end to end.

    Attributes:
        name: ``"logprobs"`` or ``"embedding"``.
        values: [R], [R, K] or [R, D], with the graph of the forward pass. With extras, [R, 1 + E] or [R, K + E]: one
            tensor for all that a loss reads of the model, which is split, gathered and differentiated as a whole.
        lengths: rows of each datum in ``values``: one for each position with targets, or one embedding.
        tensor_class: the class of the datums' own tensors.
        extras: what the last E columns of ``values`` are, names in ``MODEL_COLUMNS``.
        target_shape: with extras, the shape of one row of the logprobs: () or (K,).
    """

    name: str
    values: Tensor
    lengths: list[int]
    tensor_class: Any
    extras: tuple[str, ...] = ()
    target_shape: tuple[int, ...] = ()

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row of the logprobs or embeddings: (), (K,) or (D,)."""
        return self.target_shape if self.extras else tuple(self.values.shape[1:])

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each datum's outputs: [N_i], [N_i, K], or [D] of an embedding."""
        return [self.row_shape if self.name == "embedding" else (n, *self.row_shape) for n in self.lengths]

    def without_extras(self, x: Tensor) -> Tensor:
        """Return the part of a tensor in the shape of ``values`` that belongs to the logprobs or the embeddings."""
        return x[:, : x.shape[1] - len(self.extras)].reshape(len(x), *self.row_shape) if self.extras else x

    def extras_of(self, x: Tensor) -> dict[str, Tensor]:
        """Return the extras in a tensor in the shape of ``values``, each repeated over the targets of its position."""
        parts = [x[:, i - len(self.extras)] for i in range(len(self.extras))]
        repeated = [part.reshape(-1, *[1] * len(self.row_shape)).expand(-1, *self.row_shape) for part in parts]
        return dict(zip(self.extras, repeated))

    def by_datum(self, x: Tensor) -> Sequence[Tensor]:
        """Split a tensor with the rows of ``values`` into one tensor for each datum."""
        return x.unbind() if self.name == "embedding" else torch.split(x, self.lengths)

    def any_by_datum(self, rows: np.ndarray) -> np.ndarray:
        """Return for each datum whether ``rows`` [R] is True in one of its rows."""
        result: np.ndarray = np.logical_or.reduceat(rows, np.cumsum([0, *self.lengths[:-1]]))
        return result

    def records(self) -> list[dict[str, Any]]:
        """Return the outputs as ``loss_fn_outputs``, in the datums' own class of tensors, without the extras."""
        on_host = self.without_extras(self.values.detach()).float().cpu().numpy()
        ends = np.cumsum(self.lengths[:-1])
        rows = on_host if self.name == "embedding" else np.split(on_host, ends) if len(ends) else [on_host]
        return [{self.name: self.tensor_class.from_numpy(x)} for x in rows]


def tensor_class(data: Sequence[Any]) -> Any:
    """Return the class of the datums' tensors: this library's, or an SDK's, whose Datum takes no other."""
    for datum in data:
        for value in datum.loss_fn_inputs.values():
            if type(value).__name__ == "TensorData" and hasattr(value, "from_numpy"):
                return type(value)
    return TensorData


class Differentiated(NamedTuple):
    """A loss and its gradient with respect to the model's outputs, as the host has read them.

    Attributes:
        loss: the value.
        metrics: what the loss itself has returned.
        gradient: ∂loss/∂outputs, in the shape and on the device that the outputs had.
        outputs: the outputs that the loss was computed on, on the host.
        surrogate: Σ output·∂loss/∂output, the loss that a hosted service computes in place of a custom loss. Extras
            are left out of it: the services have none.
        nonzero: the number of entries of ``gradient`` that are not 0, extras left out.
        has_gradient: [R] bool, for each row of the outputs whether it has an entry that is not 0.
        passes: forward passes over the model: 1 or 2.
        micro_batches: how many parts of the batch went through the model one after the other.
        peak_memory: the bytes that the request was planned to take at most.
    """

    loss: float
    metrics: dict[str, Any]
    gradient: Tensor
    outputs: Outputs
    surrogate: float
    nonzero: float
    has_gradient: np.ndarray
    passes: int = 1
    micro_batches: int = 1
    peak_memory: int = 0


class DeferredResult(NamedTuple):
    """A loss and its gradient with respect to the model's outputs, before the host has read any of them.

    Attributes:
        loss: the value, 0-d.
        gradient: ∂loss/∂outputs, in the shape of ``outputs.values``.
        outputs: the outputs that the loss was computed on.
        numbers: the numbers that ``metrics`` takes, on their device.
        metrics: a function that checks ``numbers`` on the host and returns the metrics of the loss.
        passes: forward passes over the model: 1 or 2.
    """

    loss: Tensor
    gradient: Tensor
    outputs: Outputs
    numbers: Tensor
    metrics: Callable[[list[float]], dict[str, Any]]
    passes: int = 1

    def finalise(self, parameters_finite: Tensor | bool = True) -> Differentiated:
        """Read everything on the host, in one transfer.

        Args:
            parameters_finite: whether the gradient of every parameter is finite, 0-d.

        Raises:
            LossInputError: for the first value, in the order of computation, that is refused.
        """
        values, gradient = self.outputs.values.detach(), self.gradient
        nonzero = gradient.reshape(len(gradient), -1) != 0
        of_outputs = self.outputs.without_extras(gradient)
        surrogate = (self.outputs.without_extras(values) * of_outputs).sum()
        count = (of_outputs != 0).sum() if self.outputs.extras else nonzero.sum()
        gradient_finite, parameters_finite = gradient.isfinite().all(), torch.as_tensor(parameters_finite)
        results = values, self.loss, self.numbers, surrogate, count, nonzero.any(1)
        values, loss, numbers, surrogate, count, has_gradient, gradient_finite, parameters_finite = copy_to_host(
            [*results, gradient_finite, parameters_finite]
        )
        metrics = self.metrics(numbers.tolist())
        if not gradient_finite:
            raise infinite_gradient(gradient, self.outputs)
        if not parameters_finite:
            got, fix = "nan or inf in the gradient of a parameter", "Are weights or advantages too large?"
            raise LossInputError("gradient", "finite gradients of the parameters", got, fix)
        outputs = self.outputs._replace(values=values)
        return Differentiated(
            float(loss), metrics, gradient, outputs, float(surrogate), float(count), has_gradient.numpy(), self.passes
        )


# The objective of a request


class Objective(NamedTuple):
    """What the engine needs to know of a loss, which may be a loss of this library or any other callable.

    Attributes:
        bind: ``bind(data, empty_outputs)`` checks what the loss reads of the datums, before any forward pass. It
            returns the function that differentiates the loss on outputs. ``empty_outputs`` has the final shapes.
        bound: a loss of this library, which is a sum over datums once its denominator is known; None for any other
            callable, which may couple all datums.
        group: how many consecutive datums one term of the loss couples: 2 for pairs.
        mean: the loss, if it divides by a count of its own; else None.
    """

    bind: Callable[[list[Any], Outputs], Callable[[Outputs], DeferredResult]]
    bound: BoundLoss | None = None
    group: int = 1
    mean: Loss | None = None


def objective_of(loss_fn: LossFn | Loss | BoundLoss, agreeing: Callable[[LossFn], LossFn]) -> Objective:
    """Describe a loss for the engine. ``agreeing`` makes a callable fail on all ranks if it fails on one."""
    bound = BoundLoss(loss_fn) if isinstance(loss_fn, Loss) else loss_fn
    if isinstance(bound, BoundLoss):
        loss = bound.loss
        if loss.output != "logprobs":
            fix = "The model has no head for them: call the loss in a loop of your own, on the numbers of your head."
            raise LossInputError("loss_fn", "a loss of logprobs", f"{loss!r}, a loss of {loss.output}", fix)
        return Objective(partial(bind_loss, bound), bound, loss.rows.datums, None if loss.count is None else loss)
    if isinstance(loss_fn, str) or not callable(loss_fn):
        fix = "A built-in's name goes to forward_backward, a loss such as grpo() comes here."
        raise LossInputError("loss_fn", "a function (data, logprobs_list) -> (loss, metrics)", repr(loss_fn), fix)
    return Objective(partial(bind_callable, agreeing(loss_fn)))


def bind_loss(bound: BoundLoss, data: list[Any], empty_outputs: Outputs) -> Callable[[Outputs], DeferredResult]:
    """Bind a loss of this library to the batch, before the forward pass: its columns are checked and packed now."""
    return partial(differentiate_loss, bound, packed_columns(bound, data, empty_outputs))


def computed_columns(loss_fn: Any, data: Sequence[Any]) -> tuple[str, ...]:
    """Return what the model has to compute for a loss of this library besides the logprobs, names in ``MODEL_COLUMNS``.

    A column that is bound, or that a datum has, is taken from there.
    """
    bound = BoundLoss(loss_fn) if isinstance(loss_fn, Loss) else loss_fn
    if not isinstance(bound, BoundLoss):
        return ()
    needed = [name for name in MODEL_COLUMNS if name in bound.loss.reads and name not in bound.columns]
    return tuple(name for name in needed if all(datum.loss_fn_inputs.get(name) is None for datum in data))


def packed_columns(bound: BoundLoss, data: list[Any], empty_outputs: Outputs) -> PackedColumns:
    """Pack what a loss of this library reads of the batch besides the outputs."""
    loss = bound.loss
    with add_loss_name(loss.name):
        packed = pack_side_columns(
            data,
            empty_outputs.shapes,
            empty_outputs.values,
            [name for name in loss.reads if name not in empty_outputs.extras],
            bound.columns,
            rows=loss.rows,
            align=bound.align,
            masks=loss.masks,
        )
        for name in loss.gradient_columns:
            if name not in empty_outputs.extras:
                got, fix = "numbers that are bound or in the datums", "Leave them out: the client computes it."
                raise LossInputError(name, "the model's own, through which the gradient goes", got, fix)
        return packed


def tokens_of(bound: BoundLoss, columns: PackedColumns, outputs: Outputs, values: Tensor) -> Tokens:
    """Return the packed batch of a loss, with ``values`` in the shape of the outputs' own."""
    graph = bound.loss.gradient_columns
    extras = {n: (x if n in graph else x.detach()).flatten() for n, x in outputs.extras_of(values).items()}
    return columns.with_logprobs(outputs.without_extras(values).flatten(), extras)


def bind_callable(loss_fn: LossFn, data: list[Any], empty_outputs: Outputs) -> Callable[[Outputs], DeferredResult]:
    """Bind any other callable to the batch. It is called when the outputs have been computed."""
    return partial(differentiate_callable, loss_fn, data)


# Value and gradient


def differentiate_loss(bound: BoundLoss, columns: PackedColumns, outputs: Outputs) -> DeferredResult:
    """Differentiate a loss of this library: on the device of the outputs, on all of them end to end."""
    leaf = outputs.values.detach().requires_grad_()
    with add_loss_name(bound.loss.name):
        loss, metrics = bound.defer(as_packed, tokens_of(bound, columns, outputs, leaf))
    if not loss.requires_grad:
        metrics.finalise()  # an error of a value explains more than that the loss is a constant
        raise constant_loss()
    backward_to(leaf, loss)
    return DeferredResult(loss, gradient_of(leaf, outputs), outputs, metrics.all_values, metrics.read)


def evaluate_loss(bound: BoundLoss, columns: PackedColumns, outputs: Outputs) -> DeferredResult:
    """Evaluate a loss of this library without its gradient, which is 0 in the result."""
    with add_loss_name(bound.loss.name):
        loss, metrics = bound.defer(as_packed, columns.with_logprobs(outputs.values.flatten()))
    return DeferredResult(loss, torch.zeros_like(outputs.values), outputs, metrics.all_values, metrics.read)


def differentiate_callable(loss_fn: LossFn, data: list[Any], outputs: Outputs) -> DeferredResult:
    """Differentiate any other callable on tensors on the CPU, one for each datum, as services do.

    These tensors are parts of one leaf, so that autograd fills one gradient and not thousands. A loss of this library
    that the callable calls takes the leaf itself.
    """
    leaf = outputs.values.detach().cpu().clone().requires_grad_()
    parts = outputs.by_datum(leaf)
    loss, metrics = check_contract(loss_fn(data, list(parts)))
    backward_to(leaf, loss)
    check_used(loss, leaf, parts, outputs)
    return DeferredResult(loss, gradient_of(leaf, outputs), outputs, torch.empty(0), lambda _: metrics)


def backward_to(leaf: Tensor, loss: Tensor) -> None:
    """Set the gradient of the leaf; refuse a leaf that has one, since a loss's own backward() would count twice."""
    if leaf.grad is not None:
        got = "one whose loss_fn has called backward()"
        raise LossInputError("loss", "a loss without a gradient yet", got, "Return it, and leave backward() out.")
    try:
        torch.autograd.backward(loss)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        fix = "Change no tensor in place, and leave backward() out."
        raise LossInputError("loss", "a loss that autograd can differentiate", f"{error}", fix) from error


def gradient_of(leaf: Tensor, outputs: Outputs) -> Tensor:
    """Return the gradient of a leaf, in the dtype and on the device of the outputs."""
    assert leaf.grad is not None
    return to_device(leaf.grad, outputs.values.device, outputs.values.dtype)


# Checks


def check_contract(result: Any) -> tuple[Tensor, dict[str, Any]]:
    """Return the loss and its metrics; refuse all but a finite scalar with a graph, and a dict."""
    if not isinstance(result, tuple) or len(result) != 2:
        got = f"a {type(result).__name__}" + (f" of {len(result)}" if isinstance(result, tuple) else "")
        raise LossInputError("loss_fn", "(loss, metrics)", got, "Return the loss and a dict of floats.")
    loss, metrics = result
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise LossInputError("loss", "a 0-d tensor", got, "Reduce it, and do not call .item().")
    if loss.is_complex():
        raise LossInputError("loss", "a real number", str(loss.dtype), "Take its real part or its absolute value.")
    if not loss.requires_grad:
        raise constant_loss()
    value = value_of(loss)
    if not math.isfinite(value):
        raise LossInputError("loss", "a finite value", f"{value}", "Mask before the maths, not after.")
    if not isinstance(metrics, dict) or not all(isinstance(name, str) for name in metrics):
        got = f"a {type(metrics).__name__}" + (" with other keys" if isinstance(metrics, dict) else "")
        raise LossInputError("metrics", "a dict of floats by name", got, "Return {} for none.")
    return loss, metrics


def constant_loss() -> LossInputError:
    """Return the error for a loss without a graph."""
    got = "a constant without grad_fn"
    return LossInputError("loss", "a loss that depends on logprobs", got, "Was something detached?")


def value_of(loss: Tensor) -> float:
    """Return the number in a loss; a loss on the meta device has none."""
    try:
        return float(loss.detach())
    except RuntimeError as error:
        got, fix = f"{error}", "Compute it from the logprobs, on their device."
        raise LossInputError("loss", "a number", got, fix) from error


def check_used(loss: Tensor, leaf: Tensor, parts: Sequence[Tensor], outputs: Outputs) -> None:
    """Refuse a loss that leaves out a datum, as the services do."""
    if leaf.grad is None:
        raise not_used(outputs.name, 0)
    rows = (leaf.grad != 0).reshape(len(leaf.grad), -1).any(1).numpy()
    has_gradient = outputs.any_by_datum(rows)
    if not has_gradient.all():  # the gradient of a datum that is used may be 0 too
        reached = reached_parts(loss, parts)
        left_out = [int(i) for i in np.flatnonzero(~has_gradient) if i not in reached]
        if left_out:
            raise not_used(outputs.name, left_out[0])


def reached_parts(loss: Tensor, parts: Sequence[Tensor]) -> set[int]:
    """Return the indices of the parts that the graph of a loss leads to: all if it leads to the leaf itself."""
    split: Any = parts[0].grad_fn
    leaf = split.next_functions[0][0]
    reached, seen, to_do = set(), set(), [(loss.grad_fn, loss.output_nr)]
    while to_do:
        node, output = to_do.pop()
        if node is leaf:
            return set(range(len(parts)))
        if node is split:
            reached.add(output)
        elif node is not None and node not in seen:
            seen.add(node)
            to_do.extend(node.next_functions)
    return reached


def not_used(name: str, datum: int) -> LossInputError:
    """Return the error for a datum that a loss leaves out."""
    singular = "logprob" if name == "logprobs" else name
    fix = f"Every datum's {name} must enter the loss, if only as 0.0 * {name}.sum()."
    return LossInputError(name, "a gradient", f"No gradient computed for {singular} tensor", fix, datum=datum)


def infinite_gradient(gradient: Tensor, outputs: Outputs) -> LossInputError:
    """Return the error for a gradient that is not finite. A finite loss can have one: sqrt at 0, or inf times 0."""
    datum = next(i for i, part in enumerate(outputs.by_datum(gradient)) if not part.isfinite().all())
    got, fix = "nan or inf", "Mask before the maths, not after; sqrt and log have no slope at 0."
    return LossInputError(outputs.name, "a finite gradient", got, fix, datum=datum)
