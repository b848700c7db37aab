"""The settings of a loss by the names that the field gives them, and what a loss says it is."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

from torch import Tensor

from lossfns.loss import BoundLoss, Loss
from lossfns.testing.laws.base import LawBroken, LossFn, NotApplicable, Probe, is_described_as, uniform_batch, unit_size
from lossfns.testing.settings import knobs, with_settings


@dataclass(frozen=True)
class NamedNumber:
    """A number that sets a loss: a parameter with a default, an element of one, or a constant of its module.

    Attributes:
        name: the name, with the index of an element.
        value: the number.
        role: what the name says that the number does, see ``role_of``.
        change: returns the loss with another number. It raises TypeError or ValueError if the loss refuses it.
    """

    name: str
    value: float
    role: str
    change: Callable[[float], LossFn]


def words(name: str) -> list[str]:
    """Return the words of a name in lower case.

    >>> words("clip_ratioHigh"), words("actor/pg_clipfrac")
    (['clip', 'ratio', 'high'], ['actor', 'pg', 'clipfrac'])
    """
    return re.findall(r"[a-z]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())


LOW = {"low", "lo", "lower", "min", "neg"}
HIGH = {"high", "hi", "higher", "upper", "max", "pos"}
BOUND = {"clip", "cliprange", "eps", "epsilon", "clipping"}
LIMIT = {"cap", "max", "threshold", "clip", "bar", "bound", "limit", "c"}
CORRECTION = {"tis", "imp", "rho", "is", "truncation", "truncate", "rollout", "sampler", "mismatch"}
OTHER_USE = {"vf", "value", "grad", "norm", "adv", "advantage", "advantages", "reward", "log", "std", "ent", "entropy"}


def role_of(name: str) -> str:
    """Return what the name of a number says that the number does.

    ``low``, ``high`` and ``clip`` bound the ratio on one side or on both, ``dual`` is the constant of the dual clip,
    ``tis`` caps the sampler correction, ``kl`` multiplies the KL term. The role of any other number is "".

    >>> [role_of(name) for name in ("eps_low", "clip_ratio_high", "cliprange", "clip_ratio_c", "tis_cap", "kl_coef")]
    ['low', 'high', 'clip', 'dual', 'tis', 'kl']
    """
    found = set(words(name))
    if found & OTHER_USE:
        return ""
    if "dual" in found or {"clip", "ratio", "c"} <= found:
        return "dual"
    if (found & CORRECTION and found & LIMIT) or found in ({"c", "max"}, {"rho"}, {"cap"}):
        return "tis"
    if "kl" in found or found == {"beta"}:
        return "kl" if not found & (LIMIT | {"target", "horizon"}) else ""
    if not found & BOUND:
        return ""
    return "low" if found & LOW else "high" if found & HIGH else "clip"


def named_numbers(loss_fn: LossFn) -> list[NamedNumber]:
    """Return the numbers that set a loss. Elements of a pair of bounds have the roles ``low`` and ``high``."""

    def change(name: str, element: int | None, new: float) -> LossFn:
        current = knobs(loss_fn)[name]
        value = new if element is None else replace_element(current, element, new)
        changed: LossFn = with_settings(loss_fn, **{name: value})
        return changed

    found = []
    for name, value in knobs(loss_fn).items():
        if is_number(value):
            found.append(NamedNumber(name, value, role_of(name), functools.partial(change, name, None)))
        elif isinstance(value, (tuple, list)) and len(value) == 2 and all(map(is_number, value)):
            roles = ("low", "high") if role_of(name) == "clip" else ("", "")
            for i, role in enumerate(roles):
                found.append(NamedNumber(f"{name}[{i}]", value[i], role, functools.partial(change, name, i)))
    fn = underlying_function(loss_fn)
    namespace = getattr(fn, "__globals__", {})
    for name in sorted(constants_used(fn, namespace)):
        replaced = functools.partial(with_constant, loss_fn, namespace, name)
        found.append(NamedNumber(name, namespace[name], role_of(name), replaced))
    return found


def is_number(value: Any) -> bool:
    """Return whether a setting is an int or a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def replace_element(values: Sequence[float], element: int, new: float) -> Sequence[float]:
    """Return the tuple or list with one element replaced."""
    return type(values)([new if i == element else x for i, x in enumerate(values)])  # type: ignore[call-arg]


def underlying_function(loss_fn: Any) -> Any:
    """Return the Python function that computes a loss, without the wrappers of the kit and of ``functools``."""
    fn = getattr(getattr(loss_fn, "target", None), "fn", loss_fn)
    while isinstance(fn, functools.partial):
        fn = fn.func
    if hasattr(fn, "forward"):
        return fn.forward
    return fn if hasattr(fn, "__code__") else getattr(fn, "__call__", fn)  # noqa: B004


def constants_used(fn: Any, namespace: Mapping[str, Any]) -> set[str]:
    """Return the names of the module's numbers in capitals that a function uses."""
    code = getattr(fn, "__code__", None)
    names = set(names_in(code)) if code is not None and not isinstance(fn, (Loss, BoundLoss)) else set()
    return {name for name in names if name.isupper() and is_number(namespace.get(name))}


def names_in(code: CodeType) -> Iterator[str]:
    """Yield the names that a function and the functions within it read or write."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def with_constant(loss_fn: LossFn, namespace: dict[str, Any], name: str, value: float) -> LossFn:
    """Return the loss that is called with another value of a constant of its module."""

    def changed(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Any:
        before = namespace[name]
        namespace[name] = value
        try:
            return loss_fn(data, logprobs_list)
        finally:
            namespace[name] = before

    return changed


def asks_for_k1(loss_fn: LossFn) -> bool:
    """Return whether a setting of the KL term asks for the estimator k1."""
    named = {name: getattr(value, "__name__", value) for name, value in knobs(loss_fn).items()}
    return any("kl" in words(name) and value in ("k1", "kl") for name, value in named.items())


def claims_to_be(loss_fn: LossFn, method: str) -> bool:
    """Return whether the name or the documentation of a loss names a method."""
    named = isinstance(loss_fn, (Loss, BoundLoss)) and method in repr(loss_fn)
    fn = getattr(getattr(loss_fn, "target", None), "fn", loss_fn)
    return named or is_described_as(loss_fn, method) or is_described_as(fn, method)


def nearer_to_off(value: float) -> float | None:
    """Return another value of a bound, half as far from its neutral value: 0 of an epsilon, 1 of a ratio."""
    if not math.isfinite(value) or value in (0.0, 1.0):
        return None
    return value / 2 if value < 0.5 else 1 + (value - 1) / 2


def setting_named(loss_fn: LossFn, *names: str) -> tuple[str, float] | None:
    """Return name and value of the first numeric setting that has one of these names, or None."""
    from lossfns.testing.settings import knobs

    for name, value in knobs(loss_fn).items():
        if name.lower() in names and isinstance(value, (int, float)) and not isinstance(value, bool):
            return name, float(value)
    return None


def setting_of(loss_fn: LossFn, why: str, *names: str) -> tuple[str, float]:
    """Return name and value of the first numeric setting with one of these names. Raise NotApplicable without one."""
    found = setting_named(loss_fn, *names)
    if found is None:
        raise NotApplicable(why)
    return found


def with_setting(probe: Probe, name: str, value: float) -> Probe:
    """Return the probe of the loss with another setting. Raise NotApplicable where the loss refuses it."""
    from lossfns.testing.settings import with_settings

    try:
        other = replace(probe, loss_fn=with_settings(probe.loss_fn, **{name: value}))
        other(uniform_batch(probe.batch, length=2, datums=unit_size(probe.batch)))
    except (LawBroken, TypeError, ValueError) as refusal:
        raise NotApplicable(f"it refuses {name} = {value:g}") from refusal
    return other
