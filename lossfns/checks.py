"""Checks of the knobs of presets. A knob of one name has the same check in every preset."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np

from lossfns.errors import LossInputError, did_you_mean, show


def is_real(value: Any) -> bool:
    """Whether a value is a real number, and not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


LARGEST_FLOAT = 1e30
"""The largest float that a knob may be. Products of larger floats overflow float32."""


def is_finite(value: Any) -> bool:
    """Whether torch can hold the number: a float in float32, an integer in 64 bits."""
    return abs(value) <= 2**62 if isinstance(value, int) else abs(float(value)) <= LARGEST_FLOAT


def is_huge(value: Any) -> bool:
    """Whether a number is an integer that no float holds exactly enough to be meant."""
    return isinstance(value, int) and not is_finite(value)


def check_number(name: str, value: Any, expected: str, accept: Callable[[float], bool], fix: str) -> None:
    """Refuse a value that is not a finite number, or for which ``accept`` returns False."""
    if not (is_real(value) and is_finite(value) and accept(value)):
        raise LossInputError(name, expected, show(value), fix)


def check_denominator(value: Any) -> None:
    """Refuse anything but a finite number above 0."""
    fix = "Take it from loss.denominator(whole_batch)."
    check_number("denominator", value, "a finite number above 0", lambda x: x > 0, fix)


def check_positive(name: str, value: Any) -> None:
    check_number(name, value, "a finite number above 0", lambda x: x > 0, "At 0 the loss has no signal.")


def check_non_negative(name: str, value: Any) -> None:
    check_number(name, value, "a finite number of at least 0", lambda x: x >= 0, "Pass 0 to switch the term off.")


def check_beta(name: str, value: Any) -> None:
    fix = "At 0 a dpo has no signal, and a dro is reinforce."
    check_number(name, value, "a finite number above 0", lambda x: x > 0, fix)


def check_clip(name: str, value: Any) -> None:
    """Refuse anything but absolute bounds of the ratio, ``0 <= low <= 1 <= high``."""
    expected = "ratio bounds (low, high) with 0 <= low <= 1 <= high"
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(map(is_real, value)):
        raise LossInputError(name, expected, show(value), "An epsilon of 0.2 is clip=(0.8, 1.2).")
    low, high = value
    if 0 <= low < 1 and 0 <= high < 1:
        fix = f"These look like epsilons: pass clip=({1 - float(low):g}, {1 + float(high):g})."
        raise LossInputError(name, expected, repr(value), fix)
    if not 0 <= low <= 1 <= high or not (is_finite(high) or high == math.inf):
        raise LossInputError(name, expected, repr(value), "The bounds must enclose the ratio 1.")


def check_log_ratio_cap(name: str, value: Any) -> None:
    if value is not None:
        check_number(name, value, "a number above 0, or None", lambda x: x > 0, "None is the paper's uncapped form.")


def check_dual_clip(name: str, value: Any) -> None:
    if value is not None:
        fix = "c is the ratio beyond which a negative advantage is clipped, 3.0 in the paper."
        check_number(name, value, "a number above 1, or None", lambda x: x > 1, fix)


def check_label_smoothing(name: str, value: Any) -> None:
    fix = "It is the probability that a pair is labelled the wrong way round."
    check_number(name, value, "a number in [0, 0.5]", lambda x: 0 <= x <= 0.5, fix)


def check_kl_weight(name: str, value: Any) -> None:
    if value is not None:
        make_function_check("score_function", "ratio_to")(name, value)


def make_column_check(*known: str) -> Callable[[str, Any], None]:
    """Make a check that refuses anything but one of these names of a column of logprobs."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, str) or value not in known:
            raise LossInputError(name, "a column of logprobs", show(value), f"Use one of: {', '.join(known)}.")

    return check


def check_share(name: str, value: Any) -> None:
    check_number(name, value, "a number in [0, 1]", lambda x: 0 <= x <= 1, "It is a share.")


def make_function_check(*known: str) -> Callable[[str, Any], None]:
    """Make a check that refuses anything but a function; its hint names the ``known`` functions."""

    def check(name: str, value: Any) -> None:
        if not callable(value):
            hint = f"{did_you_mean(str(value), known)} Pass the function, or its name."
            raise LossInputError(name, f"a function such as {known[-1]}", show(value), hint)

    return check


KNOBS: dict[str, Callable[[str, Any], None]] = {
    "clip": check_clip,
    "kl_beta": check_non_negative,
    "beta": check_beta,
    "lam": check_non_negative,
    "cap": check_positive,
    "length": check_positive,
    "c": check_dual_clip,
    "forward_share": check_share,
    "gamma": check_non_negative,
    "support": make_function_check("raw_support", "tail_support", "renormalised_support"),
    "temperature": check_positive,
    "tau_pos": check_positive,
    "tau_neg": check_positive,
    "desirable_weight": check_non_negative,
    "undesirable_weight": check_non_negative,
    "dual_clip": check_dual_clip,
    "log_ratio_cap": check_log_ratio_cap,
    "label_smoothing": check_label_smoothing,
    "kl": make_function_check("k1", "k2", "k3"),
    "kl_cap": check_log_ratio_cap,
    "kl_weight": check_kl_weight,
    "weight": make_function_check("ratio", "truncated"),
    "kl_to": make_column_check("old_logprobs", "ref_logprobs", "sampler_logprobs"),
    "numerator": make_column_check("logprobs", "old_logprobs"),
    "column": make_column_check("old_logprobs", "sampler_logprobs"),
    "bounds": check_clip,
    "level": make_function_check("sequence_level", "geometric_level", "token_level"),
}


def check_knobs(knobs: dict[str, Any]) -> None:
    """Refuse the first knob that is out of its range."""
    for name, value in knobs.items():
        if name in KNOBS:
            KNOBS[name](name, value)
