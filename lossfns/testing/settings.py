"""The settings of a loss under test: what they are, and the loss with other ones."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from lossfns.errors import LossInputError
from lossfns.loss import BoundLoss, Loss
from lossfns.testing.names import column_of
from lossfns.testing.public import LIBRARY, public
from lossfns.weigh import fixed_length

# The callable under test


class Target:
    """A callable whose settings can be changed: a function, an object, or what a class or a factory makes.

    Args:
        subject: the callable, or, with ``makes``, the class or the factory of it.
        makes: whether the subject is called with its settings to get the callable.
        changed: the settings that differ from their defaults.
    """

    def __init__(self, subject: Any, *, makes: bool = False, changed: Mapping[str, Any] | None = None) -> None:
        self.subject, self.makes, self.changed = subject, makes, dict(changed or {})
        self.maker = subject if makes else class_of(subject)
        self.values = {} if self.maker is None else defaults_of(self.maker)
        if not makes:
            self.values = {name: getattr(subject, name) for name in self.values}
        self.name = str(getattr(subject, "__name__", None) or type(subject).__name__)

    @functools.cached_property
    def fn(self) -> Any:
        """The callable with its settings."""
        changed = {name: value for name, value in self.changed.items() if name in self.values}
        if self.maker is None or not (self.makes or changed):
            made = self.subject
        else:
            made = self.maker(**(changed if self.makes else {**self.values, **changed}))
        rest = {name: value for name, value in self.changed.items() if name not in self.values}
        return functools.partial(made, **rest) if rest else made

    @property
    def knobs(self) -> dict[str, Any]:
        """Name → value of the settings."""
        return {**self.values, **defaults_of(self.fn), **self.changed}

    def having(self, settings: Mapping[str, Any]) -> Target:
        """Return the target with some of its settings changed."""
        return Target(self.subject, makes=self.makes, changed={**self.changed, **settings})


def class_of(subject: Any) -> Any:
    """Return the class of an object that keeps every argument of its class as an attribute of that name, or None."""
    made = type(subject)
    if inspect.isroutine(subject) or inspect.isclass(subject) or isinstance(subject, functools.partial):
        return None
    try:
        names = [p.name for p in parameters(made)]
    except LossInputError:
        return None
    return made if names and all(hasattr(subject, name) for name in names) else None


def parameters(fn: Any) -> list[inspect.Parameter]:
    """Return the named parameters of a callable; of a module, those of its ``forward``.

    Raises:
        LossInputError: if it has no signature that can be read.
    """
    return [p for p in signature(fn).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def signature(fn: Any) -> inspect.Signature:
    """Return the signature of a callable; of a module, that of its ``forward``."""
    if isinstance(fn, functools.partial) and isinstance(fn.func, torch.nn.Module):
        fn = functools.partial(fn.func.forward, *fn.args, **fn.keywords)
    fn = getattr(fn, "_orig_mod", fn)  # of a compiled module
    try:
        return inspect.signature(fn.forward if isinstance(fn, torch.nn.Module) else fn)
    except (TypeError, ValueError) as error:
        fix = "Wrap it in a function whose parameters have names."
        raise LossInputError("subject", "a signature that can be read", str(error), fix) from error


def fills(p: inspect.Parameter) -> bool:
    """Return whether a parameter is filled from the datums: it names a column, and has no default but None."""
    return column_of(p.name) is not None and p.default in (p.empty, None)


def defaults_of(fn: Any) -> dict[str, Any]:
    """Return name → default of the parameters that are settings."""
    return {p.name: p.default for p in parameters(fn) if p.default is not p.empty and not fills(p)}


# Settings of a loss


def knobs(loss_fn: Any) -> dict[str, Any]:
    """Return name → value of the settings that ``with_settings`` can change."""
    if isinstance(loss_fn, BoundLoss):
        return knobs(loss_fn.loss)
    if isinstance(loss_fn, Loss):
        return {n: v for n, v in loss_fn.knobs.items() if loss_fn.name in vars(LIBRARY) and not isinstance(v, Loss)}
    target = getattr(loss_fn, "target", None)
    return target.knobs if isinstance(target, Target) else defaults_of(loss_fn)


def setting_elements(value: Any) -> Iterator[int | None]:
    """Yield the index of each element of a pair or list; yield None for any other value, which changes as a whole."""
    yield from range(len(value)) if isinstance(value, (tuple, list)) else (None,)


def variants(loss_fn: Any, name: str, element: int | None = None) -> Iterator[Any]:
    """Yield the loss with other values of one setting, or of one element of it. Values that it refuses are skipped."""
    current = knobs(loss_fn)[name]
    others = strings_in(loss_fn) if isinstance(current, str) else ()
    for new in others or other_values(current if element is None else current[element], name):
        try:
            if element is not None:
                new = type(current)([new if i == element else x for i, x in enumerate(current)])
            yield with_settings(loss_fn, **{name: new})
        except (TypeError, ValueError):
            continue


def strings_in(loss_fn: Any) -> list[str]:
    """Return the short strings in the code of a loss: the values that a setting such as ``loss_type`` may have."""
    fn = getattr(getattr(loss_fn, "target", None), "fn", loss_fn)
    fn = getattr(fn, "forward", fn)
    while isinstance(fn, functools.partial):
        fn = fn.func
    code = getattr(fn, "__code__", None)
    flat = [y for x in getattr(code, "co_consts", ()) for y in (x if isinstance(x, tuple) else (x,))]
    return [x for x in dict.fromkeys(flat) if isinstance(x, str) and re.fullmatch(r"[\w-]{1,32}", x)]


NAMED_VALUES = {
    "kl": ("k2", "k3"),
    "weigh": ("fixed_length", "pair_sum", "pair_mean", "token_sum"),
    "level": ("sequence_level", "token_level"),
    "region": ("one_side", "two_side"),
    "is_weight": ("unit_weight", "ratio_weight"),
    "reward": ("log_ratio_mean", "log_ratio_sum", "logprob_mean"),
    "nll": ("logprob_mean",),
    "link": ("savage_link", "logistic_link"),
    "support": ("renormalised_support", "tail_support", "raw_support"),
}
"""Setting → the public functions that it may be set to."""


def other_values(value: Any, name: str) -> list[Any]:
    """Return other values for a setting, the most plausible first."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value * 2 + 0.125, value / 2, value + 1, 1.5, 0.97, 1.02, 0.05]
    if value is None:
        return [1.01, 0.05, 2.0, 1e-3]
    functions = [public(other) for other in NAMED_VALUES.get(name, ())]
    return [f(3) if f is fixed_length else f for f in functions if f is not value]  # fixed_length(3) is a weighing


def with_settings(loss_fn: Any, **settings: Any) -> Any:
    """Return the loss with some of its settings replaced."""
    if isinstance(loss_fn, BoundLoss):
        return replace(loss_fn, loss=with_settings(loss_fn.loss, **settings))
    if isinstance(loss_fn, Loss):
        return public(loss_fn.name)(**{**loss_fn.knobs, **settings})
    if isinstance(getattr(loss_fn, "target", None), Target):
        return loss_fn.with_settings(**settings)
    return functools.partial(loss_fn, **settings)
