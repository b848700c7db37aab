"""Every method against its oracle in plain floats: value and gradient."""

from random import Random

import pytest
import torch
from batches import CASES, Case, apart, call

from lossfns.testing.mutants import CLOSED_FORMS
from lossfns.testing.public import presets

SEEDS = range(12)
CLOSED = [case for case in CASES if case.loss.name in CLOSED_FORMS or case.loss.name not in presets()]
"""Losses whose oracle is a closed form, and combinations. ``test_family.py`` has every other loss."""
pytestmark = pytest.mark.filterwarnings("ignore:.*log-ratio.*")  # tails of ±25 are in the batches on purpose


@pytest.mark.parametrize("case", CLOSED, ids=str)
def test_value_and_gradient_equal_the_oracle_in_float64(case: Case) -> None:
    for seed in SEEDS:
        batch = case.batch(Random(seed))
        value, gradients, _ = call(case.loss, batch)
        expected, expected_gradients = case.expected(batch)
        assert apart(value, expected) < 1e-12
        assert apart(gradients, expected_gradients) < 1e-12


@pytest.mark.parametrize("case", CLOSED, ids=str)
def test_value_and_gradient_equal_the_oracle_in_float32(case: Case) -> None:
    """The oracle reads the very numbers float32 holds; a ratio within 1e-6 of a bound may fall on either side."""
    for seed in SEEDS:
        batch = case.batch(Random(seed))
        as32 = lambda rows: [torch.tensor(row, dtype=torch.float32).tolist() for row in rows]  # noqa: E731
        batch.logprobs, batch.weights = as32(batch.logprobs), as32(batch.weights)
        batch.columns = {name: as32(rows) for name, rows in batch.columns.items()}
        value, gradients, _ = call(case.loss, batch, torch.float32)
        expected, expected_gradients = case.expected(batch)
        assert apart(value, expected) < 1e-5
        assert apart(gradients, expected_gradients) < 1e-5


@pytest.mark.parametrize("case", CLOSED, ids=str)
def test_a_bound_denominator_replaces_the_count_except_in_a_raw_sum(case: Case) -> None:
    batch = case.batch(Random(99))
    value, gradients, _ = call(case.loss, batch, denominator=17.0)
    assert (
        apart(
            (value, *gradients),
            [*case.expected(batch, denominator=17.0)][:1] + case.expected(batch, denominator=17.0)[1],
        )
        < 1e-12
    )
