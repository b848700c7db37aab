"""What each knob accepts: the edges of its range, and the numbers just outside."""

import inspect
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import lossfns
from lossfns import LossInputError, k3, rollout
from lossfns.checks import (
    KNOBS,
    check_clip,
    check_coefficients,
    check_cov_bounds,
    check_fraction,
    check_knobs,
    check_non_negative,
    check_positive,
    check_positive_or_none,
    check_share,
)
from lossfns.describe import presets

TINY = math.ulp(0.0)
BELOW, ABOVE = math.nextafter(1.0, 0.0), math.nextafter(1.0, 2.0)
NO_NUMBER = ["1", True, None, [1.0], math.nan, math.inf, -math.inf, 1j]

ACCEPTED: dict[str, list[Any]] = {
    "clip": [(0, 1), (1, 1), (0.0, math.inf), (0.8, 1.2), [0.8, 1.28], (1 - 3e-4, 1 + 4e-4)],
    "kl_beta": [0, 0.0, TINY, 1e9],
    "lam": [0, 0.1, 10],
    "beta": [TINY, 0.1, 5],
    "cap": [TINY, 2, 2.0],
    "length": [1, 0.5, 4096],
    "c": [None, ABOVE, 3],
    "dual_clip": [None, ABOVE, 3.0],
    "log_ratio_cap": [None, TINY, 20, 1e9],
    "value_clip": [None, TINY, 0.2, 1e9],
    "label_smoothing": [0, 0.25, 0.5],
    "level": [lambda t, log_weight: log_weight],
    "behaviour": ["old_logprobs", "sampler_logprobs"],
    "outer_clip": [(0.4, 3.0), (0.0, math.inf)],
    "region": [lossfns.two_side, lambda ratio, advantages, clip: ratio > 0],
    "is_weight": [lossfns.ratio_weight, lambda ratio: ratio.sqrt()],
    "kl": [k3, lambda logprobs, ref: logprobs - ref],
    "flip_rate": [0, 0.1, math.nextafter(0.5, 0)],
    "epsilon": [TINY, 1e-3, 0.5],
    "ld_alpha": [0, 0.5, 1],
    "discopop_tau": [TINY, 0.05, 1],
    "reward_alpha": [TINY, -0.5, 0.25],
    "reward_bound": [None, TINY, 10],
    "link": [lossfns.hinge_link, lambda h: -h],
    "kl_cap": [None, TINY, 10, 1e9],
    "kl_weight": [None, rollout.score_function],
    "kl_to": ["old_logprobs", "ref_logprobs", "sampler_logprobs"],
    "weight": [rollout.ratio()],
    "bounds": [(0, 1), (1, 1), (0.0, math.inf), (0.5, 2.0), [1e-4, 100]],
    "numerator": ["logprobs", "old_logprobs"],
    "column": ["old_logprobs", "sampler_logprobs"],
    "support": [lossfns.tail_support, lambda logprobs, active: (logprobs, active)],
}
REFUSED: dict[str, list[Any]] = {
    "clip": [
        *[(0.2, 0.28), (0.0, BELOW), (1.2, 0.8), (-TINY, 1.2), (ABOVE, 2.0), (-math.inf, math.inf)],
        *[(math.nan, 1.2), (0.8, math.nan), ("0.8", 1.2), (0.8, None), (True, 1.2)],
        *[(0.8,), (0.8, 1.0, 1.2), 0.2, None, "ab"],
    ],
    "kl_beta": [-TINY, -1, *NO_NUMBER],
    "lam": [-0.1, *NO_NUMBER],
    "beta": [0, 0.0, -0.1, *NO_NUMBER],
    "cap": [0, -1, *NO_NUMBER],
    "length": [0, -8, *NO_NUMBER],
    "c": [1, BELOW, 0, -3, True, "3", math.nan, math.inf],
    "dual_clip": [1.0, BELOW, -3.0, True, "3", math.nan, math.inf],
    "log_ratio_cap": [0, -20, True, "20", math.nan, math.inf],
    "value_clip": [0, -0.2, True, "0.2", math.nan, math.inf],
    "label_smoothing": [-TINY, math.nextafter(0.5, 1), 1, *NO_NUMBER],
    "level": ["sequence_level", "token", None],
    "behaviour": ["ref_logprobs", "old", None, 1, True],
    "outer_clip": [(0.6, 2.0, 1.0), (0.4, 0.9), (1.5, 3.0), 0.6, None],
    "region": ["one-side", None, (0.8, 1.2)],
    "is_weight": ["none", None, 1.0],
    "kl": ["k3", None, 3, 0.001],
    "flip_rate": [-TINY, 0.5, 1, *NO_NUMBER],
    "epsilon": [0, math.nextafter(0.5, 1), -1e-3, *NO_NUMBER],
    "ld_alpha": [-TINY, ABOVE, *NO_NUMBER],
    "discopop_tau": [0, ABOVE, *NO_NUMBER],
    "reward_alpha": [0, 0.0, *NO_NUMBER],
    "reward_bound": [0, -1, True, "3", math.nan, math.inf],
    "link": ["hinge_link", None, 1.0],
    "kl_cap": [0, -10, True, "10", math.nan, math.inf],
    "kl_weight": ["score_function", 1.0],
    "kl_to": ["logprobs", "advantages", None, ["ref_logprobs"]],
    "weight": ["truncated", None, 2.0],
    "bounds": [(0.2, 0.28), (2.0, 0.5), (-TINY, 2.0), (ABOVE, 2.0), (0.5, math.nan), (0.5,), 2.0, None],
    "numerator": ["ref_logprobs", "old", None],
    "column": ["logprobs", "ref_logprobs", None],
    "support": ["tail", None, 0],
}


RANGES: dict[Any, tuple[list[Any], list[Any]]] = {
    check_positive: ([TINY, 2, 2.0], [0, -1, *NO_NUMBER]),
    check_clip: (ACCEPTED["clip"], REFUSED["clip"]),
    check_positive_or_none: ([None, TINY, 4.0], [0, -1, True, "4", math.nan, math.inf]),
    check_fraction: ([TINY, 0.2, 1], [0, -0.1, ABOVE, *NO_NUMBER]),
    check_cov_bounds: (
        [(1, 5), (-1.0, 1.0), [0.5, 2.0], (-math.inf, math.inf)],
        [(5, 1), (1.0, 1.0), (1.0,), (1, 2, 3), 1.0, None, ("1", 5), (True, 5), (math.nan, 1.0)],
    ),
    check_non_negative: ([0, 0.0, TINY, 1e9], [-TINY, -1, *NO_NUMBER]),
    check_share: ([0, 0.5, 1], [-TINY, ABOVE, *NO_NUMBER]),
    check_coefficients: (
        [(0.8, 0.2, 1), [0, 0.0, TINY]],
        [(1, 1), (1, 1, -TINY), (1, 1, math.inf), 1, "abc", *NO_NUMBER],
    ),
}
"""What a check accepts and refuses, for each of its knobs that is not listed above."""
for knob in sorted(KNOBS.keys() - ACCEPTED.keys()):
    ACCEPTED[knob], REFUSED[knob] = RANGES.get(KNOBS[knob], ([], []))


def test_every_check_is_tested() -> None:
    assert [name for name in KNOBS if not (ACCEPTED[name] and REFUSED[name])] == []


@pytest.mark.parametrize("name, value", [(name, value) for name, values in ACCEPTED.items() for value in values])
def test_a_value_in_its_range_is_accepted(name: str, value: Any) -> None:
    check_knobs({name: value})


@pytest.mark.parametrize("name, value", [(name, value) for name, values in REFUSED.items() for value in values])
def test_a_value_out_of_its_range_is_refused_by_name_with_a_fix(name: str, value: Any) -> None:
    with pytest.raises(LossInputError) as caught:
        check_knobs({name: value})
    assert (caught.value.field, caught.value.got) == (name, repr(value))
    assert caught.value.expected
    assert caught.value.fix.endswith(".")


@pytest.mark.parametrize("name", ["beta", "length", "kl_beta", "dual_clip"])
def test_numpy_numbers_are_numbers(name: str) -> None:
    """As a sweep over np.linspace or np.arange hands them in."""
    for value in (np.float64(2.0), np.float32(2.0), np.int64(2)):
        check_knobs({name: value})


def test_a_number_that_torch_cannot_compute_with_is_refused() -> None:
    """``Fraction`` is a real number, and torch has no product with it."""
    for name, preset in presets().items():
        for knob, value in preset().knobs.items():
            pair = isinstance(value, tuple)
            if pair or isinstance(value, float):
                given = (Fraction(value[0]), value[1]) if pair else Fraction(value)
                with pytest.raises(LossInputError):
                    preset(**{knob: given})
                    pytest.fail(f"{name}({knob}={given!r})")
    with pytest.raises(LossInputError):
        lossfns.with_kl(lossfns.ppo(), kl_beta=Fraction(1, 10))


@pytest.mark.parametrize(
    "clip, epsilons",
    [((0.2, 0.2), "(0.8, 1.2)"), ((0.2, 0.28), "(0.8, 1.28)"), ((Fraction(1, 5), Fraction(1, 4)), "(0.8, 1.25)")],
)
def test_epsilons_are_answered_with_the_bounds_they_mean(clip: tuple[float, float], epsilons: str) -> None:
    with pytest.raises(LossInputError, match="look like epsilons") as caught:
        check_knobs({"clip": clip})
    assert f"pass clip={epsilons}" in str(caught.value)


@pytest.mark.parametrize("preset", ["cispo", "cispo_sequence"])
def test_the_bound_of_a_weight_may_be_below_1_where_there_is_no_lower_one(preset: str) -> None:
    for clip in ((0.0, 0.2), (0, 0.9), (0.0, 5.0), (0.8, 1.2)):
        check_knobs({"clip": clip}, preset)
    for clip in ((0.2, 0.28), (0.0, 0.0), (0.0, -1.0), (1.5, 2.0), (0.0,), 0.2, (0.0, True)):
        with pytest.raises(LossInputError, match="clip"):
            check_knobs({"clip": clip}, preset)


def test_the_first_bad_knob_is_named_and_unknown_ones_pass() -> None:
    check_knobs({"weigh": "anything"})
    with pytest.raises(LossInputError, match="beta"):
        check_knobs({"weigh": "anything", "lam": 0.1, "beta": 0, "kl_beta": -1})


def test_every_number_a_preset_takes_has_a_check() -> None:
    """A knob whose default is a number, a pair of them or None has an entry in the table."""
    presets = [f for f in vars(lossfns).values() if hasattr(f, "__wrapped__")]
    assert len(presets) > 10
    for preset in presets:
        for name, parameter in inspect.signature(preset).parameters.items():
            if isinstance(parameter.default, (int, float, tuple, type(None))):
                assert name in KNOBS, f"{preset.__name__}({name}=)"
