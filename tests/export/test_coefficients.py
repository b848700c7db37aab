"""``token_coefficients``: share / denominator at each token, exact or by averages of micro-batches."""

from random import Random

import pytest
from batches import CASES, Case, apart, call

import lossfns
from lossfns import LossInputError, cross_entropy, datum_from_tokens, dpo, token_coefficients
from lossfns.inspect import coefficient_picture

LENGTHS = (2, 4, 3)
DATA = [datum_from_tokens(range(2, n + 3), prompt_length=1) for n in LENGTHS]
SPLIT = [[0, 2], [1]]


def each(loss: lossfns.Loss, micro_batches: list[list[int]] | None = None) -> list[float]:
    return [float(row[0]) for row in token_coefficients(loss, DATA, micro_batches)]


@pytest.mark.parametrize(
    ("weigh", "whole", "averaged"),
    [
        ("token_mean", (1 / 9, 1 / 9, 1 / 9), (1 / 10, 1 / 8, 1 / 10)),
        ("sequence_mean", (1 / 6, 1 / 12, 1 / 9), (1 / 8, 1 / 8, 1 / 12)),
        ("token_sum", (1, 1, 1), (1 / 2, 1 / 2, 1 / 2)),
        ("sequence_sum_mean", (1 / 3, 1 / 3, 1 / 3), (1 / 4, 1 / 2, 1 / 4)),
    ],
)
def test_coefficients_of_each_weighing(weigh: str, whole: tuple[float, ...], averaged: tuple[float, ...]) -> None:
    """Lengths 2, 4, 3: 1/9 a token, or 1/(3·length). In parts of 5 and 4 tokens: 1/(2·5) and 1/(2·4)."""
    loss = cross_entropy(weigh=weigh)
    assert each(loss) == pytest.approx(whole) and each(loss, SPLIT) == pytest.approx(averaged)


@pytest.mark.parametrize("case", [case for case in CASES if case.loss.name in ("reinforce", "cross_entropy")], ids=str)
def test_the_loss_is_the_sum_of_coefficients_times_terms(case: Case) -> None:
    """Of losses whose gradient is −A or −1: −coefficient·A at each token."""
    batch = case.batch(Random(3))
    _, gradients, _ = call(case.loss, batch)
    loss = case.loss.bind(**batch.bound(case.loss.reads))
    signals = batch.columns["advantages"] if "advantages" in case.loss.reads else [[1.0] * len(r) for r in gradients]
    rows = [row.flatten().tolist() for row in token_coefficients(loss, batch.data())]
    assert apart([[-c * s for c, s in zip(*pair)] for pair in zip(rows, signals)], gradients) < 1e-12


def test_a_pair_has_one_coefficient() -> None:
    data = [datum_from_tokens(range(2, n + 3), prompt_length=1) for n in (1, 3, 2, 2)]
    loss = dpo().bind(ref_logprobs=[[-1.0] * n for n in (1, 3, 2, 2)])
    assert [row.tolist() for row in token_coefficients(loss, data)] == [[0.5], [0.5] * 3, [0.5] * 2, [0.5] * 2]
    with pytest.raises(LossInputError, match="whole pairs"):
        token_coefficients(loss, data, [[0, 2], [1, 3]])


@pytest.mark.parametrize("split", [[[0], [1]], [[0, 1], [1, 2]], [[0, 1, 2], []], 3, [[0, 1, 3]]])
def test_what_is_no_partition_is_refused(split: object) -> None:
    with pytest.raises(LossInputError, match="partition"):
        token_coefficients(cross_entropy(), DATA, split)  # type: ignore[arg-type]


def test_the_picture_has_a_point_for_each_sequence() -> None:
    figure = coefficient_picture({"token_mean": token_coefficients(cross_entropy(), DATA)}, title="cross_entropy")
    x, y = figure.axes[0].lines[0].get_data()
    assert sorted(x) == [2, 3, 4] and list(y) == pytest.approx([1 / 9] * 3)
