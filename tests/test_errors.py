"""The error says where, what was expected, what came and how to mend it, wherever it travels."""

import copy
import pickle

import pytest

from lossfns import LossInputError, LossWarning
from lossfns.errors import did_you_mean

ERROR = ("weights", "12 values", "11", "Shift once.")


@pytest.mark.parametrize(
    "error, message",
    [
        (LossInputError(*ERROR), "weights: expected 12 values, got 11. Shift once."),
        (LossInputError(*ERROR, datum=2), "datum[2].weights: expected 12 values, got 11. Shift once."),
        (LossInputError(*ERROR, datum=0), "datum[0].weights: expected 12 values, got 11. Shift once."),
        (LossInputError(*ERROR, loss="grpo"), "grpo: weights: expected 12 values, got 11. Shift once."),
        (
            LossInputError(*ERROR, datum=2, loss="grpo"),
            "grpo: datum[2].weights: expected 12 values, got 11. Shift once.",
        ),
    ],
)
def test_a_message_has_its_parts_in_order_and_survives_copying(error: LossInputError, message: str) -> None:
    """An error crosses threads and processes on its way to who waits for the result."""
    assert str(error) == str(copy.copy(error)) == str(pickle.loads(pickle.dumps(error))) == message


def test_its_parts_can_be_read() -> None:
    error = LossInputError(*ERROR, datum=2, loss="grpo")
    assert (error.field, error.expected, error.got, error.fix, error.datum, error.loss) == (*ERROR, 2, "grpo")


def test_its_kinds() -> None:
    """Who catches ValueError catches it; warnings can be filtered by their own class."""
    assert issubclass(LossInputError, ValueError)
    assert issubclass(LossWarning, UserWarning)


@pytest.mark.parametrize(
    "name, hint",
    [
        ("token-mean", "Did you mean 'token_mean'?"),
        ("token_men", "Did you mean 'token_mean'?"),
        ("zzz", "Known: pair_mean, token_mean."),
        ("", "Known: pair_mean, token_mean."),
    ],
)
def test_the_nearest_name_or_all_of_them(name: str, hint: str) -> None:
    assert did_you_mean(name, ["token_mean", "pair_mean"]) == hint


def test_a_dash_is_an_underscore() -> None:
    """Without that 'pairsum' would be nearer."""
    assert did_you_mean("pair-sum", ["pair_sum", "pairsum"]) == "Did you mean 'pair_sum'?"
