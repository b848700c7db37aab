"""Numbers with derivatives: reverse-mode differentiation in plain floats.

An oracle written with them contains its equation alone. The gradient follows by the chain rule. ``stop`` is the
stop-gradient. Where a function has a kink, Python's ``if`` selects the branch by the values, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from operator import attrgetter
from typing import Any

Slopes = tuple[tuple["Scalar", float], ...]
ORDER = count()


class Scalar:
    """A value, and its slopes in the numbers that it was computed from.

    >>> x = Scalar(3.0)
    >>> gradient(x * x + stop(x) * x, [x])
    [9.0]
    """

    __slots__ = ("order", "slopes", "value")

    def __init__(self, value: float, slopes: Slopes = ()) -> None:
        self.value, self.slopes, self.order = float(value), slopes, next(ORDER)

    def __add__(self, other: Scalar | float) -> Scalar:
        if not isinstance(other, Scalar):
            return Scalar(self.value + other + 0.0, ((self, 1.0),))
        return Scalar(self.value + other.value + 0.0, ((self, 1.0), (other, 1.0)))

    def __mul__(self, other: Scalar | float) -> Scalar:
        if not isinstance(other, Scalar):
            return Scalar(self.value * other, ((self, other),))
        return Scalar(self.value * other.value, ((self, other.value), (other, self.value)))

    def __truediv__(self, other: Scalar | float) -> Scalar:
        if not isinstance(other, Scalar):
            return Scalar(self.value / other, ((self, 1 / other),))
        value = self.value / other.value
        return Scalar(value, ((self, 1 / other.value), (other, -value / other.value)))

    def __pow__(self, power: float) -> Scalar:
        return Scalar(self.value**power, ((self, power * self.value ** (power - 1)),))

    def __neg__(self) -> Scalar:
        return Scalar(-self.value, ((self, -1.0),))

    def __sub__(self, other: Scalar | float) -> Scalar:
        if not isinstance(other, Scalar):
            return Scalar(self.value - other + 0.0, ((self, 1.0),))
        return Scalar(self.value - other.value + 0.0, ((self, 1.0), (other, -1.0)))

    def __rsub__(self, other: float) -> Scalar:
        return Scalar(other - self.value + 0.0, ((self, -1.0),))

    def __rtruediv__(self, other: float) -> Scalar:
        return Scalar(other) / self

    __radd__ = __add__
    __rmul__ = __mul__

    def __float__(self) -> float:
        return self.value

    def __lt__(self, other: Any) -> bool:
        return self.value < float(other)

    def __gt__(self, other: Any) -> bool:
        return self.value > float(other)

    def __le__(self, other: Any) -> bool:
        return self.value <= float(other)

    def __ge__(self, other: Any) -> bool:
        return self.value >= float(other)


Number = Scalar | float


def gradient(result: Number, inputs: Sequence[Scalar]) -> list[float]:
    """∂result/∂x of each input, by the chain rule, from the result backwards."""
    slope: dict[Scalar, float] = {}
    if isinstance(result, Scalar):
        slope[result] = 1.0
        reached, to_do = {result}, [result]
        while to_do:
            for parent, _ in to_do.pop().slopes:
                if parent not in reached:
                    reached.add(parent)
                    to_do.append(parent)
        for node in sorted(reached, key=attrgetter("order"), reverse=True):
            of_node = slope.get(node, 0.0)
            if of_node != 0:
                for parent, local in node.slopes:
                    slope[parent] = slope.get(parent, 0.0) + of_node * local
    return [slope.get(x, 0.0) for x in inputs]


def total(numbers: Iterable[Number]) -> Scalar:
    """Σ numbers, exactly rounded if all are finite."""
    numbers = list(numbers)
    values = [float(x) for x in numbers]
    try:
        value = math.fsum(values)
    except (OverflowError, ValueError):
        value = sum(values)
    return Scalar(value, tuple((x, 1.0) for x in numbers if isinstance(x, Scalar)))


def stop(x: Number) -> float:
    """The value alone: no gradient passes."""
    return float(x)


def function(f: Callable[[float], float], slope: Callable[[float], float]) -> Callable[[Number], Scalar]:
    """Make a function of a number from its value and its slope."""

    def of(x: Number) -> Scalar:
        value = float(x)
        return Scalar(f(value), ((x, slope(value)),) if isinstance(x, Scalar) else ())

    return of


def plain_exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def plain_sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


exp = function(plain_exp, plain_exp)
expm1 = function(math.expm1, plain_exp)
log = function(math.log, lambda x: 1 / x)
log1p = function(math.log1p, lambda x: 1 / (1 + x))
sigmoid = function(plain_sigmoid, lambda x: plain_sigmoid(x) * plain_sigmoid(-x))
softplus = function(lambda x: max(x, 0.0) + math.log1p(math.exp(-abs(x))), plain_sigmoid)
relu = function(lambda x: max(x, 0.0), lambda x: float(x > 0))
absolute = function(abs, lambda x: math.copysign(1.0, x) if x else 0.0)


def log_sigmoid(x: Number) -> Scalar:
    """log σ(x)."""
    return -softplus(-x)


def clamp(x: Number, low: float, high: float) -> Number:
    """x within the bounds and on them; beyond, the bound without a gradient."""
    return min(max(float(x), low), high) if not low <= float(x) <= high else x


def cap(x: Number, limit: float | None) -> Number:
    """x clamped to ±limit; ``None`` leaves it as it is."""
    return x if limit is None else clamp(x, -limit, limit)


def ratio(lp: Number, old: float, limit: float | None) -> Scalar:
    """r = exp(lp − old), the log-ratio capped. An infinite ratio has gradient 0."""
    r = exp(cap(lp - old, limit))
    return r if math.isfinite(r.value) else Scalar(r.value)


def straight(value: Number, slope_of: Number) -> Number:
    """The value of one number with the gradient of another."""
    return slope_of + (stop(value) - stop(slope_of))
