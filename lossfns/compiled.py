"""``compile_or_warn``: a function fused by ``torch.compile``, or the function itself where that fails."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, ParamSpec, TypeVar

import torch

from lossfns.errors import warn

P = ParamSpec("P")
R = TypeVar("R")


def compile_or_warn(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function as one graph of ``torch.compile``, for any sizes of its tensors.

    The first call compiles. If it cannot, for lack of a C++ compiler or because the function cannot be traced, then
    this call and all later ones run the function itself, and the first one warns.
    """
    kernel: Callable[P, R] | None = None

    @functools.wraps(function)
    def compiled(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal kernel
        if torch.compiler.is_compiling():  # a caller compiles the step around it
            return function(*args, **kwargs)
        from torch._dynamo.exc import TorchDynamoException  # slow to import

        try:
            if kernel is None:
                kernel = torch.compile(with_own_code(function), dynamic=True, fullgraph=True)
            return kernel(*args, **kwargs)
        except (TorchDynamoException, NotImplementedError) as error:
            result = function(*args, **kwargs)  # raises the function's own error, if this was one
            reason = str(error).strip().partition("\n")[0]
            warn(f"torch.compile failed, so the loss runs without it: {reason or type(error).__name__}")
            kernel = function
            return result

    return compiled


def with_own_code(function: Callable[P, R]) -> Callable[P, R]:
    """Copy a function with its code. torch limits the graphs of one code object: each loss gets a limit of its own."""
    source: Any = function
    copied: Any = FunctionType(source.__code__.replace(), source.__globals__, source.__name__, source.__defaults__)
    return copied  # type: ignore[no-any-return]
