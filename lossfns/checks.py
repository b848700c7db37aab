"""Checks of the knobs of presets: one check for each knob name, the same in every preset."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np

from lossfns.errors import LossInputError, did_you_mean


def is_real(value: Any) -> bool:
    """Whether a value is a real number, and not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


LARGEST = 1e30
"""The largest float that a knob may be. Products of larger ones overflow float32."""


def is_finite(value: Any) -> bool:
    """Whether torch can hold the number: a float in float32, an integer in 64 bits."""
    return bool(abs(value) <= (2**62 if isinstance(value, int) else LARGEST))


def number(name: str, value: Any, expected: str, accept: Callable[[float], bool], fix: str) -> None:
    """Refuse a value that is not a finite number, or that ``accept`` returns False for."""
    if not (is_real(value) and is_finite(value) and accept(value)):
        raise LossInputError(name, expected, repr(value), fix)


def positive(name: str, value: Any) -> None:
    number(name, value, "a finite number above 0", lambda x: x > 0, "Without it the loss has no signal.")


def non_negative(name: str, value: Any) -> None:
    number(name, value, "a finite number of at least 0", lambda x: x >= 0, "Pass 0 to switch the term off.")


def beta(name: str, value: Any) -> None:
    fix = "At 0 a dpo has no signal, and a dro is reinforce."
    number(name, value, "a finite number above 0", lambda x: x > 0, fix)


def clip(name: str, value: Any) -> None:
    """Refuse clip bounds other than absolute bounds of the ratio, ``0 <= low <= 1 <= high``."""
    expected = "ratio bounds (low, high) with 0 <= low <= 1 <= high"
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(map(is_real, value)):
        raise LossInputError(name, expected, repr(value), "An epsilon of 0.2 is clip=(0.8, 1.2).")
    low, high = value
    if 0 <= low < 1 and 0 <= high < 1:
        fix = f"These look like epsilons: pass clip=({1 - low:g}, {1 + high:g})."
        raise LossInputError(name, expected, repr(value), fix)
    if not 0 <= low <= 1 <= high or not (is_finite(high) or high == math.inf):
        raise LossInputError(name, expected, repr(value), "The bounds must enclose the ratio 1.")


def log_ratio_cap(name: str, value: Any) -> None:
    if value is not None:
        number(name, value, "a number above 0, or None", lambda x: x > 0, "None is the paper's uncapped form.")


def dual_clip(name: str, value: Any) -> None:
    if value is not None:
        fix = "c is the ratio beyond which a negative advantage is clipped, 3.0 in the paper."
        number(name, value, "a number above 1, or None", lambda x: x > 1, fix)


def label_smoothing(name: str, value: Any) -> None:
    fix = "It is the probability that a pair is labelled the wrong way round."
    number(name, value, "a number in [0, 0.5]", lambda x: 0 <= x <= 0.5, fix)


def function(*known: str) -> Callable[[str, Any], None]:
    """Make a check that refuses anything but a function; its hint names the ``known`` functions."""

    def check(name: str, value: Any) -> None:
        if not callable(value):
            suggested = value if value in known else known[-1]
            hint = f"{did_you_mean(str(value), known)} Write `from lossfns import {suggested}`."
            raise LossInputError(name, f"a function such as {known[-1]}", repr(value), hint)

    return check


KNOBS: dict[str, Callable[[str, Any], None]] = {
    "clip": clip,
    "kl_beta": non_negative,
    "beta": beta,
    "lam": non_negative,
    "cap": positive,
    "length": positive,
    "c": dual_clip,
    "dual_clip": dual_clip,
    "log_ratio_cap": log_ratio_cap,
    "label_smoothing": label_smoothing,
    "kl": function("k1", "k2", "k3"),
    "level": function("sequence_level", "geometric_level", "token_level"),
}


def check_knobs(knobs: dict[str, Any]) -> None:
    """Refuse the first knob that is out of its range."""
    for name, value in knobs.items():
        if name in KNOBS:
            KNOBS[name](name, value)
