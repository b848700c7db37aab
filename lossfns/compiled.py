"""``OneKernel``: a loss, its metrics and its gradient as one graph of ``torch.compile``, or eager where that fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lossfns.deferred import Numbers
from lossfns.errors import LossInputError, warn
from lossfns.segments import given_numbers
from lossfns.tensors import TensorBatch, blank_tensors

Measure = Callable[[Any, Any, Any, Any], tuple[Tensor, Numbers]]
"""A function ``(loss, pack, batch, divisor) -> (0-d loss, numbers)`` of the batch ``pack(batch)``."""


class OneKernel:
    """``measure``, compiled together with its gradient, for batches of any size.

    The graph computes the gradient in the same pass over the batch as the loss. The backward pass multiplies this
    gradient by the one that arrives. The first call compiles. If that fails, because there is no C++ compiler or the
    loss cannot be traced, this call warns, and it and all later calls run ``measure`` itself. So does a loss with
    learnable tensors of its own, for which the graph has no gradient.
    """

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self.kernels: dict[tuple[bool, bool, bool], Any] = {}
        self.failed: set[tuple[bool, bool, bool]] = set()

    def __reduce__(self) -> tuple[type[OneKernel], tuple[Measure]]:
        return OneKernel, (self.measure,)  # a copy compiles anew

    def __call__(self, loss: Any, pack: Any, batch: Any, divisor: Any) -> tuple[Tensor, Numbers]:
        # Inside torch.func, or inside a step that the caller compiles, the loss is traced as a part of that function.
        inputs = batch.logprobs, *(batch.columns[name] for name in loss.gradient_columns)
        differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        variant = differentiable, batch.equal, divisor is None
        if variant in self.failed or torch.compiler.is_compiling() or is_transformed():
            return self.measure(loss, pack, batch, divisor)
        try:
            if variant not in self.kernels:
                function = with_own_code(value_and_gradient if differentiable else value)
                self.kernels[variant] = torch.compile(function, fullgraph=True)
            denominator = divisor_as_tensor(divisor, batch.logprobs)
            arguments = self.measure, loss, with_dynamic_sizes(batch), denominator
            total, names, values, *gradients = self.kernels[variant](*arguments)
            problem = "the loss has learnable tensors of its own" if total.requires_grad else ""  # the batch has none
        except Exception as error:  # torch.compile raises errors of many types, which differ by release and backend
            problem = reason(error)
        if problem:
            result = self.measure(loss, pack, batch, divisor)  # raises the loss's own error, if this was one
            self.failed.add(variant)
            warn(f"the loss runs without torch.compile: {problem}")
            return result
        if differentiable:
            total = WithGradient.apply(total, gradients, *inputs)  # type: ignore[no-untyped-call]
        return total, Numbers(names, values)


def value(measure: Measure, loss: Any, batch: TensorBatch, divisor: Tensor | None) -> tuple[Tensor, Any, Tensor]:
    """Return the loss, and the names and the values of its numbers."""
    total, numbers = measure(loss, blank_tensors, flattened(batch, batch.logprobs), divisor)
    return total, numbers.names, numbers.values


def value_and_gradient(
    measure: Measure, loss: Any, batch: TensorBatch, divisor: Tensor | None
) -> tuple[Tensor, Any, Tensor, *tuple[Tensor, ...]]:
    """Return what ``value`` returns, and the gradients in the logprobs and in each column that carries a gradient."""
    names: Any = ()

    def of_inputs(logprobs: Tensor, *columns: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal names  # torch.func returns tensors alone
        changed = flattened(batch, logprobs, dict(zip(loss.gradient_columns, columns)))
        total, numbers = measure(loss, blank_tensors, changed, divisor)
        names = numbers.names
        return total, numbers.values

    # In float32 at least: they may be multiplied by a scale that is inf in float16.
    inputs = batch.logprobs, *(batch.columns[name] for name in loss.gradient_columns)
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in inputs]
    of_all = torch.func.grad_and_value(of_inputs, argnums=tuple(range(len(wide))), has_aux=True)
    gradients, (total, values) = of_all(*wide)
    return total, names, values, *gradients


class WithGradient(torch.autograd.Function):
    """A 0-d tensor whose gradients in some inputs are known already."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*(gradient.view(x.shape) for gradient, x in zip(gradients, inputs)))
        ctx.dtypes = [x.dtype for x in inputs]
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            fix = "Take gradients of gradients of the loss itself, without compiled()."
            raise LossInputError("create_graph", "False, for a compiled loss", "True", fix)
        return None, None, *((grads[0] * x).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes))


def with_dynamic_sizes(batch: Any) -> TensorBatch:
    """Return the batch for a graph that takes any N and B.

    ``Tokens`` become a ``TensorBatch``, too: the graph blanks them a second time, which changes nothing. Sequences of
    equal length become rows ``[B, T]``: given ``[N]``, the graph would compute T = N / B again for every few tokens.
    """
    rows = (len(batch.lengths), -1) if batch.equal else (-1,)

    def dynamic(x: Any, *shape: int) -> Any:
        if not isinstance(x, Tensor):  # ON_POLICY
            return x
        # The kernel reads bytes and contiguous numbers as vectors, but bools and expanded numbers one by one.
        # The view is a new tensor, so the caller's tensor is not marked.
        view = (x.view(torch.uint8) if x.dtype is torch.bool else x).contiguous().view(shape)
        for dim in range(len(shape)):
            torch._dynamo.maybe_mark_dynamic(view, dim)
        return view

    given = batch.numbers if isinstance(batch, TensorBatch) else given_numbers(batch)
    numbers = {name: dynamic(x, -1) for name, x in given.items()}
    columns = {name: dynamic(detached(x), *rows) for name, x in batch.columns.items() if name not in given}
    logprobs, weights = dynamic(batch.logprobs.detach(), *rows), dynamic(batch.weights, *rows)
    layout = batch.equal, batch.halves, batch.targets, getattr(batch, "masks", ())
    return TensorBatch(logprobs, weights, columns, numbers, dynamic(batch.lengths, -1), *layout)


def detached(x: Any) -> Any:
    """Return a column without its graph."""
    return x.detach() if isinstance(x, Tensor) else x  # ON_POLICY


def flattened(batch: TensorBatch, logprobs: Tensor, changed: Mapping[str, Tensor] | None = None) -> TensorBatch:
    """Return the batch with these logprobs and these ``changed`` columns, and every column as ``[N]``."""
    table = {**batch.columns, **(changed or {})}
    columns = {name: x.flatten() if isinstance(x, Tensor) else x for name, x in table.items()}
    weights, layout = batch.weights.flatten(), (batch.equal, batch.halves, batch.targets, batch.masks)
    return TensorBatch(logprobs.flatten(), weights, columns, batch.numbers, batch.lengths, *layout)


def divisor_as_tensor(divisor: Tensor | float | None, like: Tensor) -> Tensor | None:
    """Return a denominator as a tensor, since a graph would be compiled again for each new float."""
    if divisor is None or isinstance(divisor, Tensor):
        return divisor
    return like.new_full((), divisor, dtype=torch.promote_types(like.dtype, torch.float32))


def is_transformed() -> bool:
    """Return whether a transformation of ``torch.func`` or forward-mode differentiation is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def reason(error: BaseException) -> str:
    """Return the first line of the error that made torch.compile fail."""
    while error.__cause__ is not None:
        error = error.__cause__
    inner = getattr(error, "inner_exception", error)
    return str(inner).strip().partition("\n")[0] or type(inner).__name__


def with_own_code(function: Any) -> Any:
    """Copy a function and its code object.

    torch limits the number of graphs of a code object. With a copy, each kernel has a limit of its own.
    """
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
