"""Losses from their parts: ``make_loss`` makes one, ``preset`` names it and its settings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ParamSpec

from lossfns import spellings
from lossfns.checks import check_knobs
from lossfns.errors import LossInputError
from lossfns.kl import ESTIMATORS
from lossfns.loss import Loss, Terms, name_or_repr
from lossfns.margins import LINKS, REWARDS
from lossfns.regions import one_side, ratio_weight, two_side, unit_weight
from lossfns.segments import geometric_level, maximum_level, sequence_level, token_level
from lossfns.tokens import TOKENS, Rows
from lossfns.weigh import WEIGHINGS, Weighing, check_weigh

P = ParamSpec("P")

FUNCTIONS_BY_NAME: dict[str, dict[str, Any]] = {
    "weigh": {weighing.name: weighing for weighing in WEIGHINGS},
    "region": {"one_side": one_side, "two_side": two_side},
    "is_weight": {"unit_weight": unit_weight, "ratio_weight": ratio_weight},
    "kl": dict(ESTIMATORS),
    "level": {f.__name__: f for f in (token_level, sequence_level, geometric_level, maximum_level)},
    "reward": {**REWARDS},
    "nll": {**REWARDS},
    "link": {**LINKS},
}
"""The functions that a knob accepts by name."""


def make_loss(
    terms: Terms,
    reads: Sequence[str],
    weigh: Weighing,
    rows: Rows = TOKENS,
    output: str = "logprobs",
    differentiates: tuple[str, ...] | None = None,
) -> Loss:
    """Make a loss from its terms and the weighing of its rows. ``preset`` then names it."""
    rows, weigh = Rows.of(rows), resolve_name("weigh", weigh)
    check_weigh(weigh, rows)
    return Loss("loss", {}, tuple(reads), terms, weigh.share, weigh.count, rows, output, differentiates=differentiates)


def resolve_name(knob: str, value: Any) -> Any:
    """Return the function that a string names, for a knob that takes a function; return any other value itself.

    A string that names none is left to the check of the knob, which suggests the nearest name.

    >>> resolve_name("weigh", "sequence_mean"), resolve_name("weigh", "sequence-mean")
    (sequence_mean, 'sequence-mean')
    """
    return FUNCTIONS_BY_NAME.get(knob, {}).get(value, value) if isinstance(value, str) else value


def refuse_function_of_another_knob(knob: str, value: Any) -> None:
    """Refuse a function that only other knobs accept. A function that none of them names is the caller's own."""
    others = [name for name, known in FUNCTIONS_BY_NAME.items() if any(value is each for each in known.values())]
    if knob in FUNCTIONS_BY_NAME and others and knob not in others:
        fix = f"Use one of: {', '.join(FUNCTIONS_BY_NAME[knob])}."
        raise LossInputError(knob, f"a function for {knob}", f"{name_or_repr(value)}, one for {others[0]}", fix)


def preset(build: Callable[P, Loss]) -> Callable[P, Loss]:
    """Decorate a function that builds a loss.

    The decorated function checks its arguments, after it has replaced the names of functions, as in
    ``weigh="sequence_mean"``, by the functions. The loss gets the preset's name, and the arguments as its knobs.
    """
    signature = inspect.signature(build)

    @functools.wraps(build)
    def named(*args: P.args, **kwargs: P.kwargs) -> Loss:
        for name, value in kwargs.items():
            if name not in signature.parameters:
                hint = spellings.hint(name, value, signature.parameters)
                raise TypeError(f"{build.__name__}() has no knob {name!r}. {hint}")
        knobs = signature.bind(*args, **kwargs)
        knobs.apply_defaults()
        for name, value in knobs.arguments.items():
            knobs.arguments[name] = resolve_name(name, value)
        try:
            check_knobs(knobs.arguments, build.__name__)
            loss = build(*knobs.args, **knobs.kwargs)
            for name, value in knobs.arguments.items():
                refuse_function_of_another_knob(name, value)
            return replace(loss, name=build.__name__, knobs=dict(knobs.arguments))
        except LossInputError as error:
            error.loss = build.__name__
            raise

    return named
