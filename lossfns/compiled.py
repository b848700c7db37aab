"""``one_kernel``: a loss, its metrics and its gradient as one graph of ``torch.compile``, or eager where that fails."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lossfns.deferred import Numbers
from lossfns.errors import warn
from lossfns.tensors import TensorBatch, blank_tensors

Kernel = Callable[..., Any]


def one_kernel(measure: Kernel) -> Kernel:
    """Compile ``measure(loss, pack, batch, divisor)`` and its gradient into one graph, for batches of any size.

    The gradient is computed in the same pass over the batch as the loss, and backward multiplies it by the gradient
    that arrives. The first call compiles. If it cannot, for lack of a C++ compiler or because the loss cannot be
    traced, then this call and all later ones run ``measure`` itself, and the first one warns.
    """

    def alone(loss: Any, batch: TensorBatch, divisor: Tensor | None) -> Any:
        total, numbers = measure(loss, blank_tensors, flat(batch, batch.logprobs), divisor)
        return total, numbers.names, numbers.values

    def with_gradient(loss: Any, batch: TensorBatch, divisor: Tensor | None) -> Any:
        names: Any = ()

        def value(logprobs: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal names
            total, numbers = measure(loss, blank_tensors, flat(batch, logprobs), divisor)
            names = numbers.names
            return total, numbers.values

        gradient, (total, values) = torch.func.grad_and_value(value, has_aux=True)(batch.logprobs)
        return total, names, values, gradient

    kernels: dict[bool, Kernel] = {}
    failed = False

    def compiled(loss: Any, pack: Any, batch: Any, divisor: Any) -> Any:
        nonlocal failed
        if failed or torch.compiler.is_compiling():  # in the second case the caller compiles the step around it
            return measure(loss, pack, batch, divisor)
        differentiable = torch.is_grad_enabled() and batch.logprobs.requires_grad
        try:
            if differentiable not in kernels:
                kernels[differentiable] = torch.compile(
                    with_own_code(with_gradient if differentiable else alone), fullgraph=True
                )
            with torch.no_grad():
                result = kernels[differentiable](loss, of_any_size(batch), as_number(divisor, batch.logprobs))
        except Exception as error:  # whatever torch.compile raises, which differs by release and by backend
            result = measure(loss, pack, batch, divisor)  # raises the loss's own error, if this was one
            failed = True
            warn(f"torch.compile failed, so the loss runs without it: {reason(error)}")
            return result
        total, names, values, *gradient = result
        if differentiable:
            total = WithGradient.apply(batch.logprobs, total, gradient[0].view(-1))  # type: ignore[no-untyped-call]
        return total, Numbers(names, values)

    return compiled


class WithGradient(torch.autograd.Function):
    """A 0-d tensor whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, total: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None


def of_any_size(batch: Any) -> TensorBatch:
    """Return the batch for a graph that takes any N and B. Sequences of equal length become rows ``[B, T]``.

    Of a flat batch the graph would compute T = N / B for each few tokens.
    """
    shape = (len(batch.lengths), -1) if batch.equal else (-1,)

    def dynamic(x: Any, *shape: int) -> Any:
        if not isinstance(x, Tensor):  # ON_POLICY
            return x
        # Bytes are read as vectors, bools one by one.
        view = x.detach().view(torch.uint8 if x.dtype is torch.bool else x.dtype).view(*shape)
        for dim in range(view.ndim):
            torch._dynamo.maybe_mark_dynamic(view, dim)
        return view

    columns = {name: dynamic(x, *shape) for name, x in batch.columns.items()}
    logprobs, weights, lengths = (
        dynamic(batch.logprobs, *shape),
        dynamic(batch.weights, *shape),
        dynamic(batch.lengths, -1),
    )
    return TensorBatch(logprobs, weights, columns, lengths, batch.equal, batch.halves)


def flat(batch: TensorBatch, logprobs: Tensor) -> TensorBatch:
    """Return the batch with these logprobs, and every column as ``[N]``."""
    columns = {name: x.flatten() if isinstance(x, Tensor) else x for name, x in batch.columns.items()}
    return TensorBatch(logprobs.flatten(), batch.weights.flatten(), columns, batch.lengths, batch.equal, batch.halves)


def as_number(divisor: Tensor | float | None, like: Tensor) -> Tensor | None:
    """Return a denominator as a tensor, since each new number in a graph would be compiled anew."""
    if divisor is None or isinstance(divisor, Tensor):
        return divisor
    return like.new_full((), divisor, dtype=torch.promote_types(like.dtype, torch.float32))


def reason(error: BaseException) -> str:
    """Return the first line of the error that made torch.compile fail."""
    while error.__cause__ is not None:
        error = error.__cause__
    inner = getattr(error, "inner_exception", error)
    return str(inner).strip().partition("\n")[0] or type(inner).__name__


def with_own_code(function: Any) -> Any:
    """Copy a function with its code. torch limits the graphs of one code object: each loss gets a limit of its own."""
    return FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
    )
