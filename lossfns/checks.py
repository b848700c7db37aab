"""Checks of the knobs of presets. A knob of one name has the same check in every preset, but for a few wider ones."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from lossfns.errors import LossInputError, did_you_mean, show
from lossfns.spellings import ESTIMATORS


def is_real(value: Any) -> bool:
    """Whether a value is a real number, and not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


LARGEST_FLOAT = 1e30
"""The largest float that a knob may be. Products of larger floats overflow float32."""


def is_finite(value: Any) -> bool:
    """Whether torch can hold the number: a float in float32, an integer in 64 bits, and no fraction."""
    if not isinstance(value, (int, float, np.number)):
        return False
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
    if not 0 <= low <= 1 <= high or not is_finite(low) or not (is_finite(high) or high == math.inf):
        raise LossInputError(name, expected, repr(value), "The bounds must enclose the ratio 1.")


def check_weight_bounds(name: str, value: Any) -> None:
    """Refuse anything but bounds of a ratio, or (0, high) with any high above 0: a weight may be capped below 1."""
    is_pair = isinstance(value, (tuple, list)) and len(value) == 2 and all(map(is_real, value))
    if not (is_pair and value[0] == 0 and 0 < value[1] < 1):
        check_clip(name, value)


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


def check_fraction(name: str, value: Any) -> None:
    check_number(name, value, "a number above 0, at most 1", lambda x: 0 < x <= 1, "It is a share of the tokens.")


def check_positive_or_none(name: str, value: Any) -> None:
    if value is not None:
        check_number(name, value, "a finite number above 0, or None", lambda x: x > 0, "None switches it off.")


def check_cov_bounds(name: str, value: Any) -> None:
    """Refuse anything but two numbers in ascending order."""
    is_pair = isinstance(value, (tuple, list)) and len(value) == 2 and all(map(is_real, value))
    if not is_pair or not value[0] < value[1] or not all(is_finite(x) or abs(x) == math.inf for x in value):
        fix = "They bound the covariance, 1 and 5 in the paper."
        raise LossInputError(name, "bounds (low, high) with low < high", show(value), fix)


def check_flip_rate(name: str, value: Any) -> None:
    fix = "It is the probability that a pair is labelled the wrong way round. At 0.5 a pair says nothing."
    check_number(name, value, "a number of at least 0 and below 0.5", lambda x: 0 <= x < 0.5, fix)


def check_epsilon(name: str, value: Any) -> None:
    fix = "It is the probability of the rejected side under the target, whose logarithm is taken."
    check_number(name, value, "a number above 0, and at most 0.5", lambda x: 0 < x <= 0.5, fix)


def check_discopop_tau(name: str, value: Any) -> None:
    fix = "Above 1 the loss has no bound in float32."
    check_number(name, value, "a number above 0, and at most 1", lambda x: 0 < x <= 1, fix)


def check_reward_alpha(name: str, value: Any) -> None:
    fix = "At 0 the reward is that of simpo."
    check_number(name, value, "a finite number other than 0", lambda x: x != 0, fix)


def check_reward_bound(name: str, value: Any) -> None:
    if value is not None:
        check_number(name, value, "a finite number above 0, or None", lambda x: x > 0, "None leaves out the clip.")


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


def check_coefficients(name: str, value: Any) -> None:
    """Refuse anything but the coefficients of three parts of a sum, finite numbers of at least 0."""
    if not isinstance(value, (tuple, list)) or len(value) != 3 or not all(is_real(x) and is_finite(x) for x in value):
        fix = "Those of MPO's paper are (0.8, 0.2, 1.0)."
        raise LossInputError(name, "three finite numbers, one for each part", show(value), fix)
    if min(value) < 0:
        raise LossInputError(name, "numbers of at least 0", show(value), "Pass 0 to switch a part off.")


def make_function_check(*known: str, elsewhere: Mapping[str, str] = MappingProxyType({})) -> Callable[[str, Any], None]:
    """Make a check that refuses anything but a function, and losses.

    Its hint is what a name means in other frameworks, as ``elsewhere`` has it, or else names the ``known`` functions.
    """

    def check(name: str, value: Any) -> None:
        makes_loss = getattr(value, "__annotations__", {}).get("return") == "Loss"
        if not callable(value) or hasattr(value, "bind") or makes_loss:
            unknown = f"{did_you_mean(str(value), known)} Pass the function, or its name."
            hint = f"Pass {elsewhere[value]}." if isinstance(value, str) and value in elsewhere else unknown
            raise LossInputError(name, f"a function such as {known[-1]}", show(value), hint)

    return check


def check_value_clip(name: str, value: Any) -> None:
    if value is not None:
        check_number(
            name, value, "a finite number above 0, or None", lambda x: x > 0, "None is the squared error alone."
        )


KNOBS: dict[str, Callable[[str, Any], None]] = {
    "clip": check_clip,
    "kl_beta": check_non_negative,
    "entropy_coef": check_non_negative,
    "entropy_scale": check_positive,
    "top_quantile": check_share,
    "power": check_non_negative,
    "beta": check_beta,
    "lam": check_non_negative,
    "cap": check_positive,
    "length": check_positive,
    "c": check_dual_clip,
    "weight_clip": check_clip,
    "cov_bounds": check_cov_bounds,
    "fraction": check_fraction,
    "behaviour": make_column_check("old_logprobs", "sampler_logprobs"),
    "safety_ratio": check_positive_or_none,
    "beta_low": check_non_negative,
    "beta_high": check_non_negative,
    "kl_coef": check_non_negative,
    "kl_tau": check_non_negative,
    "adv_tau": check_positive,
    "delta": check_positive,
    "delta_low": check_positive,
    "delta_high": check_positive,
    "half_life": check_positive,
    "tau": check_positive,
    "threshold": check_positive,
    "alpha": check_non_negative,
    "mu": check_non_negative,
    "positive_factor": check_non_negative,
    "negative_factor": check_non_negative,
    "sft_factor": check_non_negative,
    "coefficients": check_coefficients,
    "forward_share": check_share,
    "gamma": check_non_negative,
    "support": make_function_check("raw_support", "tail_support", "renormalised_support"),
    "temperature": check_positive,
    "tau_pos": check_positive,
    "tau_neg": check_positive,
    "k_pos": check_non_negative,
    "k_neg": check_non_negative,
    "lambda_pos": check_positive,
    "lambda_neg": check_positive,
    "outer_clip": check_clip,
    "region": make_function_check("one_side", "two_side"),
    "is_weight": make_function_check("unit_weight", "ratio_weight"),
    "desirable_weight": check_non_negative,
    "undesirable_weight": check_non_negative,
    "dual_clip": check_dual_clip,
    "value_clip": check_value_clip,
    "log_ratio_cap": check_log_ratio_cap,
    "label_smoothing": check_label_smoothing,
    "flip_rate": check_flip_rate,
    "epsilon": check_epsilon,
    "ld_alpha": check_share,
    "discopop_tau": check_discopop_tau,
    "reward_alpha": check_reward_alpha,
    "divergence_alpha": check_positive,
    "reward_bound": check_reward_bound,
    "balance": check_positive,
    "beta_prime": check_positive,
    "min_beta": check_positive,
    "nll_weight": check_non_negative,
    "center_weight": check_non_negative,
    "link": make_function_check("hinge_link", "savage_link", "exponential_link", "squared_link", "logistic_link"),
    "kl": make_function_check("k1", "k2", "k3", elsewhere=ESTIMATORS),
    "kl_cap": check_log_ratio_cap,
    "kl_weight": check_kl_weight,
    "weight": make_function_check("ratio", "truncated"),
    "kl_to": make_column_check("old_logprobs", "ref_logprobs", "sampler_logprobs"),
    "numerator": make_column_check("logprobs", "old_logprobs"),
    "column": make_column_check("old_logprobs", "sampler_logprobs"),
    "bounds": check_clip,
    "level": make_function_check("sequence_level", "geometric_level", "token_level"),
}

KNOBS_OF_PRESETS: dict[str, dict[str, Callable[[str, Any], None]]] = {
    "cispo": {"clip": check_weight_bounds},
    "cispo_sequence": {"clip": check_weight_bounds},
}
"""Checks of presets whose knob has a wider range than that of others: their bounds hold no ratio in a trust region."""


def check_knobs(knobs: dict[str, Any], preset: str = "") -> None:
    """Refuse the first knob that is out of its range."""
    checks = KNOBS | KNOBS_OF_PRESETS.get(preset, {})
    for name, value in knobs.items():
        if name in checks:
            checks[name](name, value)
