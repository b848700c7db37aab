"""The operations that an uploaded loss may use: tensor arithmetic by name, and nothing else.

The names are those of ``create_custom_loss``: a function's qualified name, or the name of a tensor method. A name that
is in no table here is refused. No operation changes its arguments, draws random numbers, reads uninitialised memory,
moves a tensor to a device, returns a size that depends on values, or leaves tensors for Python objects.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lossfns.errors import LossInputError

Operation = Callable[..., Any]


def names(text: str) -> list[str]:
    """Split a text of names at its spaces."""
    return text.split()


BY_ELEMENT = names(
    """
    abs neg negative positive exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sign sgn sigmoid tanh
    sin cos tan asin acos atan sinh cosh asinh acosh atanh erf erfc erfinv lgamma digamma floor ceil round trunc frac
    relu logit isnan isinf isfinite nan_to_num softmax log_softmax detach clone add sub subtract mul multiply div
    divide true_divide floor_divide remainder fmod pow maximum minimum fmax fmin atan2 logaddexp logaddexp2 xlogy hypot
    copysign heaviside lerp addcmul addcdiv clamp clamp_min clamp_max clip where masked_fill eq ne lt le gt ge
    not_equal less less_equal greater greater_equal isclose logical_and logical_or logical_xor logical_not bitwise_and
    bitwise_or bitwise_xor bitwise_not
    """
)

REDUCTIONS = names(
    """
    sum mean prod std var amax amin max min argmax argmin all any logsumexp logcumsumexp nansum nanmean norm cumsum
    cumprod cummax cummin count_nonzero topk sort argsort
    """
)

SHAPES = names(
    """
    reshape flatten unflatten squeeze unsqueeze tile broadcast_to transpose permute t movedim swapaxes flip roll narrow
    select index_select gather take_along_dim scatter scatter_add index_add tril triu diagonal numel is_floating_point
    """
)

ONLY_FUNCTIONS = names(
    """
    rsub cat concat stack hstack vstack zeros ones full arange linspace eye zeros_like ones_like full_like
    """
)

ONLY_METHODS = names(
    """
    view view_as reshape_as expand expand_as repeat contiguous float double half bfloat16 int long bool type_as size
    dim ndimension nelement new_zeros new_ones new_full
    """
)

FUNCTIONAL = {
    **dict.fromkeys(names("relu relu6 elu celu selu silu mish leaky_relu hardtanh hardsigmoid softsign"), 1),
    **dict.fromkeys(names("softmax log_softmax normalize"), 1),
    **dict.fromkeys(names("mse_loss l1_loss smooth_l1_loss huber_loss kl_div"), 2),
    **dict.fromkeys(names("binary_cross_entropy binary_cross_entropy_with_logits pad"), 2),
}
"""Functions of ``torch.nn.functional``, and how many arguments of each may come by position."""

BUILT_IN_FUNCTIONAL = {"softplus": F.softplus, "log_sigmoid": F.logsigmoid, "gelu": F.gelu}
"""Functions of ``torch.nn.functional`` that are built into torch, by the names that ``torch.fx`` has for them."""

MATH = names("sqrt exp exp2 expm1 log log2 log10 log1p sin cos tanh fabs floor ceil")
ARITHMETIC = names("add sub mul truediv floordiv mod neg pos abs invert and_ or_ xor eq ne lt le gt ge")

KEYWORDS = names(
    """
    alpha beta condition correction decimals delta descending dim dim0 dim1 dims dtype end end_dim eps exponent
    fill_value index indices input keepdim largest length log_target mask max max_val min min_val nan negative_slope
    neginf offset ord other p posinf reduction repeats rounding_mode shape shifts size sizes sorted src stable start
    start_dim step steps tensor1 tensor2 tensors unbiased value weight
    """
)
"""Keywords that an operation may take. Among those left out are ``out``, ``device``, ``generator`` and ``layout``."""

DEFAULTS = {"inplace": False, "size_average": None, "reduce": None, "_stacklevel": 3, "mode": "constant", "out": None}
"""Keywords that ``torch.nn.functional`` always sends. They are dropped at these values, and refused at any other."""

TEXTS = {"rounding_mode": ("floor", "trunc"), "reduction": ("none", "sum", "mean")}
"""The keywords that take text, and the texts."""

DTYPES = {
    name: getattr(torch, name) for name in names("float16 bfloat16 float32 float64 bool uint8 int8 int16 int32 int64")
}

LARGEST_INTEGER = 2**63 - 1


def is_number(x: object) -> bool:
    return isinstance(x, (bool, int, float))


def attribute(x: Any, name: str) -> Any:
    """Return an attribute of a tensor that ``ATTRIBUTES`` lists, or a part of the result of ``max``, ``sort``, ..."""
    if isinstance(x, Tensor):
        return ATTRIBUTES[name](x)
    if isinstance(x, tuple) and len(x) == 2 and name in PARTS:
        return x[PARTS.index(name)]
    raise TypeError(f"a {type(x).__name__} has no {name}")


PARTS = ("values", "indices")
ATTRIBUTES: dict[str, Operation] = {
    "dtype": lambda x: x.dtype,
    "shape": lambda x: x.shape,
    "ndim": lambda x: x.ndim,
    "T": lambda x: x.t(),
    "mT": lambda x: x.transpose(-2, -1),
    **dict.fromkeys(PARTS, lambda x: raise_type_error("a tensor has no values or indices")),
}


def raise_type_error(message: str) -> None:
    raise TypeError(message)


def item(x: Any, index: Any) -> Any:
    """Return ``x[index]``: of a tensor by numbers, slices and tensors of integers, of a tuple by numbers and slices."""
    if isinstance(x, tuple):
        if isinstance(index, bool) or not isinstance(index, (int, slice)):
            raise TypeError("a tuple takes a whole number or a slice")
        return tuple(x[index]) if isinstance(index, slice) else x[index]
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8):
            raise TypeError("a mask as an index gives a size that depends on values: use torch.where(mask, x, 0)")
        if isinstance(part, bool) or not isinstance(part, (int, slice, list, Tensor, type(None), type(...))):
            raise TypeError(f"a {type(part).__name__} is no index of a tensor")
    return tensor(x)[index]


def to(x: Tensor, dtype: Any = None, *, other: Any = None) -> Tensor:
    """Return x in a dtype, or in the dtype of another tensor."""
    target = dtype if other is None else other
    target = target.dtype if isinstance(target, Tensor) else target
    if not isinstance(target, torch.dtype):
        raise TypeError("to() takes a dtype or a tensor; tensors stay on their device")
    return x.to(target)


def power(x: Any, exponent: Any) -> Any:
    """Return ``x ** exponent``; of two whole numbers only below 2**63."""
    if is_number(x) and is_number(exponent) and abs(exponent) * math.log2(abs(x) + 1) > 1024:
        raise OverflowError("a power beyond all numbers")
    return x**exponent


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x @ y`` for an x or a y of one dimension: the work is then no more than the numbers that are read."""
    if x.ndim != 1 and y.ndim != 1:
        raise TypeError("a product of two matrices takes too long; one of the two must have one dimension")
    return x @ y


def outer(x: Tensor, y: Tensor) -> Tensor:
    return x[:, None] * y


def repeat_each(x: Tensor, repeats: int, dim: int | None = None) -> Tensor:
    """Return x with each element repeated ``repeats`` times; with a tensor, the size would depend on its values."""
    if not isinstance(repeats, int):
        raise TypeError("repeats must be one whole number: sizes depend on no value")
    return torch.repeat_interleave(x, repeats, dim)


def tensor(x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor, got a {type(x).__name__}")
    return x


def of_tensor(method: Operation) -> Operation:
    """Return a method of tensors as a function that refuses any other first argument."""
    return lambda x, *args, **kwargs: method(tensor(x), *args, **kwargs)


def of_operands(function: Operation) -> Operation:
    """Return an operator that takes tensors and numbers alone: ``*`` must repeat no list, ``+`` join no text."""

    def checked(*operands: Any) -> Any:
        for x in operands:
            if not isinstance(x, Tensor) and not is_number(x):
                raise TypeError(f"arithmetic takes tensors and numbers, not a {type(x).__name__}")
        return function(*operands)

    return checked


def of_numbers(function: Operation) -> Operation:
    """Return a function of ``math`` that takes Python numbers alone: a tensor would lose its gradient."""

    def checked(*numbers: Any) -> Any:
        if not all(map(is_number, numbers)):
            raise TypeError("math takes numbers such as x.shape[0]: take the function of torch, which has a gradient")
        return function(*numbers)

    return checked


def with_positions(function: Operation, count: int) -> Operation:
    """Return a function that takes at most ``count`` arguments by position."""

    def limited(*args: Any, **kwargs: Any) -> Any:
        if len(args) > count:
            raise TypeError(f"takes {count} arguments by position, the others by keyword")
        return function(*args, **kwargs)

    return limited


LIMITED: dict[str, Operation] = {
    "matmul": product,
    "mv": product,
    "dot": torch.dot,
    "outer": outer,
    "ger": outer,
    "repeat_interleave": repeat_each,
}
"""Functions and methods that take fewer kinds of arguments than those of torch."""

BOTH = BY_ELEMENT + REDUCTIONS + SHAPES

FUNCTIONS: dict[str, Operation] = {
    "getattr": attribute,
    "operator.getitem": item,
    "operator.pow": of_operands(power),
    "operator.matmul": of_tensor(product),
    **{f"operator.{name}": of_operands(getattr(operator, name)) for name in ARITHMETIC},
    **{f"math.{name}": of_numbers(getattr(math, name)) for name in MATH},
    **{f"torch.{name}": getattr(torch, name) for name in BOTH + ONLY_FUNCTIONS},
    **{f"torch.{name}": of_tensor(function) for name, function in LIMITED.items()},
    **{f"torch.nn.functional.{name}": with_positions(getattr(F, name), n) for name, n in FUNCTIONAL.items()},
    **{f"torch._C._nn.{name}": function for name, function in BUILT_IN_FUNCTIONAL.items()},
}
"""Functions by the qualified name that a graph has for them."""

METHODS: dict[str, Operation] = {
    "to": of_tensor(to),
    **{name: of_tensor(getattr(Tensor, name)) for name in BOTH + ONLY_METHODS},
    **{name: of_tensor(function) for name, function in LIMITED.items()},
}
"""Methods of tensors by name."""


def find_operation(op: str, target: str, where: str) -> Operation:
    """Return the operation of a node; refuse every name that is in no table.

    Raises:
        LossInputError: naming the operation.
    """
    table, kind = (FUNCTIONS, "function") if op == "call_function" else (METHODS, "method of tensors")
    if target in table:
        return table[target]
    fix = "An uploaded loss may use tensor arithmetic alone. Use forward_backward_custom(data, loss) for any other."
    if target.rstrip("_") in table and target.endswith("_") and not target.endswith("__"):
        fix = f"Nothing is changed in place: take {target.rstrip('_')}."
    raise LossInputError(where, f"a {kind} that an uploaded loss may use", repr(target), fix)
