"""``OneKernel``: a loss, its metrics and its gradient as one graph of ``torch.compile``, or eager where that fails."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lossfns.deferred import Numbers
from lossfns.errors import LossInputError, warn
from lossfns.tensors import TensorBatch, blank_tensors

Measure = Callable[[Any, Any, Any, Any], tuple[Tensor, Numbers]]
"""A function ``(loss, pack, batch, divisor) -> (0-d loss, numbers)`` of the batch ``pack(batch)``."""


class OneKernel:
    """``measure``, compiled together with its gradient, for batches of any size.

    The graph computes the gradient in the same pass over the batch as the loss. Backward multiplies it by the gradient
    that arrives. The first call compiles. If it cannot, for lack of a C++ compiler or because the loss cannot be
    traced, then this call and all later ones run ``measure`` itself, and the first one warns. So they do if the loss
    has learnable tensors of its own, which the graph has no gradient for.
    """

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self.kernels: dict[tuple[bool, bool, bool], Any] = {}
        self.failed = False

    def __reduce__(self) -> tuple[type[OneKernel], tuple[Measure]]:
        return OneKernel, (self.measure,)  # a copy compiles anew

    def __call__(self, loss: Any, pack: Any, batch: Any, divisor: Any) -> tuple[Tensor, Numbers]:
        # Inside a transformation of torch.func, or of a step that the caller compiles, the loss is a part of that.
        if self.failed or torch.compiler.is_compiling() or is_transformed():
            return self.measure(loss, pack, batch, divisor)
        differentiable = torch.is_grad_enabled() and batch.logprobs.requires_grad
        form = differentiable, batch.equal, divisor is None
        try:
            if form not in self.kernels:
                function = with_own_code(value_and_gradient if differentiable else value)
                self.kernels[form] = torch.compile(function, fullgraph=True)
            number = as_number(divisor, batch.logprobs)
            total, names, values, *gradient = self.kernels[form](self.measure, loss, of_any_size(batch), number)
            problem = "the loss has learnable tensors of its own" if total.requires_grad else ""  # the batch has none
        except Exception as error:  # torch.compile raises errors of many types, which differ by release and backend
            problem = reason(error)
        if problem:
            result = self.measure(loss, pack, batch, divisor)  # raises the loss's own error, if this was one
            self.failed = True
            warn(f"torch.compile failed, so the loss runs without it: {problem}")
            return result
        if differentiable:
            total = WithGradient.apply(batch.logprobs, total, gradient[0].view(-1))  # type: ignore[no-untyped-call]
        return total, Numbers(names, values)


def value(measure: Measure, loss: Any, batch: TensorBatch, divisor: Tensor | None) -> tuple[Tensor, Any, Tensor]:
    """Return the loss, and the names and the values of its numbers."""
    total, numbers = measure(loss, blank_tensors, flat(batch, batch.logprobs), divisor)
    return total, numbers.names, numbers.values


def value_and_gradient(
    measure: Measure, loss: Any, batch: TensorBatch, divisor: Tensor | None
) -> tuple[Tensor, Any, Tensor, Tensor]:
    """Return what ``value`` returns, and the gradient with respect to the logprobs."""
    names: Any = ()

    def of_logprobs(logprobs: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal names  # torch.func returns tensors alone
        total, numbers = measure(loss, blank_tensors, flat(batch, logprobs), divisor)
        names = numbers.names
        return total, numbers.values

    # In float32 at least: it may be multiplied by a scale that is inf in float16.
    wide = batch.logprobs.to(torch.promote_types(batch.logprobs.dtype, torch.float32))
    gradient, (total, values) = torch.func.grad_and_value(of_logprobs, has_aux=True)(wide)
    return total, names, values, gradient


class WithGradient(torch.autograd.Function):
    """A 0-d tensor whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, total: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = logprobs.dtype
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():
            fix = "Take gradients of gradients of the loss itself, without compiled()."
            raise LossInputError("create_graph", "False, for a compiled loss", "True", fix)
        return (grads[0] * ctx.saved_tensors[0]).to(ctx.dtype), None, None


def of_any_size(batch: Any) -> TensorBatch:
    """Return the batch for a graph that takes any N and B. Sequences of equal length become rows ``[B, T]``.

    Of a flat batch the graph would compute T = N / B again for every few tokens.
    """
    rows = (len(batch.lengths), -1) if batch.equal else (-1,)

    def dynamic(x: Any, *shape: int) -> Any:
        if not isinstance(x, Tensor):  # ON_POLICY
            return x
        # The kernel reads bytes and contiguous numbers as vectors, bools and expanded numbers one by one.
        # The view is a new tensor, which may be marked.
        view = (x.view(torch.uint8) if x.dtype is torch.bool else x).contiguous().view(shape)
        for dim in range(len(shape)):
            torch._dynamo.maybe_mark_dynamic(view, dim)
        return view

    columns = {name: dynamic(x, *rows) for name, x in batch.columns.items()}
    logprobs, weights = dynamic(batch.logprobs.detach(), *rows), dynamic(batch.weights, *rows)
    return TensorBatch(logprobs, weights, columns, dynamic(batch.lengths, -1), batch.equal, batch.halves)


def flat(batch: TensorBatch, logprobs: Tensor) -> TensorBatch:
    """Return the batch with these logprobs, and every column as ``[N]``."""
    columns = {name: x.flatten() if isinstance(x, Tensor) else x for name, x in batch.columns.items()}
    return TensorBatch(logprobs.flatten(), batch.weights.flatten(), columns, batch.lengths, batch.equal, batch.halves)


def as_number(divisor: Tensor | float | None, like: Tensor) -> Tensor | None:
    """Return a denominator as a tensor, since each new number in a graph would be compiled anew."""
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
    """Copy a function with its code. torch limits the graphs of one code object: each form of a loss has its own."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
