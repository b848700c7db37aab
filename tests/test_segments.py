"""Sums and means over sequences, against slices; one sequence without lengths is the same as with them."""

import pytest
import torch

from lossfns import Tokens, segments

LENGTHS = [3, 0, 2, 1]
WEIGHTS = torch.tensor([0.0, 1.0, 2.0, 1.0, 0.5, 0.0], dtype=torch.float64)
X = torch.tensor([0.0, 3.0, 5.0, 7.0, 11.0, 0.0], dtype=torch.float64)
T = Tokens(X, WEIGHTS, torch.tensor(LENGTHS))


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda: segments.sequence_sum(T, X), [8.0, 0.0, 18.0, 0.0]),
        (lambda: segments.active_counts(T), [2.0, 0.0, 2.0, 0.0]),
        (lambda: segments.nonempty(T), [True, False, True, False]),
        (lambda: segments.weighted_sum(T, X), [13.0, 0.0, 12.5, 0.0]),
        (lambda: segments.weighted_mean(T, X), [13 / 3, 0.0, 12.5 / 1.5, 0.0]),
        (lambda: segments.weight_divisor(T), [3.0, 1.0, 1.5, 1.0]),
        (lambda: segments.to_tokens(T, torch.tensor([1.0, 2.0, 3.0, 4.0])), [1.0, 1.0, 1.0, 3.0, 3.0, 4.0]),
        (lambda: segments.token_level(T, X), X.tolist()),
        (lambda: segments.sequence_level(T, X), [13.0] * 3 + [12.5] * 2 + [0.0]),
        (lambda: segments.geometric_level(T, X), [13 / 3] * 3 + [12.5 / 1.5] * 2 + [0.0]),
        (lambda: segments.sequence_value(T, -torch.ones_like(X)), [-1.0, 0.0, -1.0, 0.0]),
    ],
)
def test_by_hand(fn, expected: list[float]) -> None:
    assert fn().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("fn", ["sequence_sum", "sequence_value", "weighted_sum", "weighted_mean"])
def test_one_sequence_needs_no_lengths(fn: str) -> None:
    with_lengths = Tokens(X, WEIGHTS, torch.tensor([6]))
    without = Tokens(X, WEIGHTS)
    assert getattr(segments, fn)(with_lengths, X).tolist() == getattr(segments, fn)(without, X).tolist()
    assert segments.to_tokens(without, torch.tensor([4.0])).tolist() == [4.0] * 6


@pytest.mark.parametrize("fn", ["active_counts", "nonempty", "weight_divisor"])
def test_counts_of_one_sequence_have_the_dtype_they_have_of_many(fn: str) -> None:
    with_lengths = getattr(segments, fn)(Tokens(X, WEIGHTS, torch.tensor([6])))
    without = getattr(segments, fn)(Tokens(X, WEIGHTS))
    assert with_lengths.tolist() == without.tolist() and with_lengths.dtype == without.dtype


def test_pairs_are_even_and_odd_sequences() -> None:
    y = torch.arange(6)
    assert segments.chosen(T, y).tolist() == [0, 2, 4] and segments.rejected(T, y).tolist() == [1, 3, 5]


def test_no_shape_depends_on_a_value() -> None:
    """On meta tensors, which have no values: so nothing here makes a device wait to learn a size."""
    x = torch.zeros(6, device="meta")
    t = Tokens(x, torch.ones(6, device="meta"), torch.tensor([3, 2, 1], device="meta"))
    for fn in (segments.sequence_sum, segments.weighted_sum, segments.weighted_mean):
        assert fn(t, x).shape == (3,)
        assert segments.to_tokens(t, fn(t, x)).shape == (6,)
    assert segments.weight_divisor(t).shape == segments.nonempty(t).shape == (3,)


def test_rows_of_one_label_have_one_index_below_their_number() -> None:
    labels = torch.tensor([7.0, -1.0, 7.0, 3.0, -1.0])
    assert segments.group_index(labels).tolist() == [3, 0, 3, 2, 0]
    assert segments.group_sum(labels, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).tolist() == [4, 7, 4, 4, 7]
