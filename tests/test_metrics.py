"""Metrics of chunks by hand: counts add, statistics average over rows, and the loss over the denominator."""

import pytest

from lossfns import LossInputError, merge_metrics


def chunk(loss: float, denominator: float, tokens: float, **more: float) -> dict[str, float]:
    counts = {"tokens": tokens, "sequences": 2.0, "sequences_empty": 1.0}
    return {"loss": loss, **counts, "count": denominator, "denominator": denominator, **more}


def test_a_loss_of_tokens() -> None:
    """(2·1 + 1·3) / 4, and the statistic over 2 and 6 tokens: (8·2 + 4·6) / 8."""
    merged = merge_metrics([chunk(2.0, 1.0, 2.0, grad_l1=4.0, nll=8.0), chunk(1.0, 3.0, 6.0, grad_l1=2.0, nll=4.0)])
    assert merged == {
        "loss": 1.25,
        "grad_l1": 2.5,
        "tokens": 8.0,
        "sequences": 4.0,
        "sequences_empty": 2.0,
        "count": 4.0,
        "denominator": 4.0,
        "nll": 5.0,
    }


@pytest.mark.parametrize("unit", ["pairs", "datums"])
def test_a_statistic_is_averaged_over_the_rows_of_the_loss(unit: str) -> None:
    """Over 1 and 3 rows, whatever the number of tokens: (2·1 + 6·3) / 4."""
    merged = merge_metrics(
        [chunk(2.0, 1.0, 9.0, **{unit: 1.0, "x": 2.0}), chunk(1.0, 3.0, 1.0, **{unit: 3.0, "x": 6.0})]
    )
    assert (merged["x"], merged[unit], merged["tokens"], merged["loss"]) == (5.0, 4.0, 10.0, 1.25)


def test_raw_sums_and_chunks_of_one_denominator_add() -> None:
    """A raw sum has no count and is divided by 1; a chunk of a batch has the batch's denominator, here 4."""
    raw = {name: x for name, x in chunk(2.0, 1.0, 2.0).items() if name != "count"}
    merged = merge_metrics([raw, raw])
    assert merged["loss"] == 4.0 and merged["denominator"] == 1.0 and "count" not in merged
    merged = merge_metrics([chunk(2.0, 4.0, 1.0) | {"count": 1.0}, chunk(3.0, 4.0, 1.0) | {"count": 3.0}])
    assert (merged["loss"], merged["count"], merged["denominator"]) == (5.0, 4.0, 4.0)


def test_chunks_without_a_row_have_means_of_0() -> None:
    merged = merge_metrics([chunk(0.0, 0.0, 0.0, nll=0.0)] * 2)
    assert (merged["loss"], merged["nll"], merged["tokens"], merged["denominator"]) == (0.0, 0.0, 0.0, 0.0)


def test_names_of_sums_add() -> None:
    assert merge_metrics([chunk(1.0, 1.0, 1.0, **{"x:sum": 2.0, "x": 3.0})] * 2)["x:sum"] == 4.0


def test_one_chunk_is_the_whole_and_none_is_refused() -> None:
    one = chunk(2.0, 4.0, 3.0, nll=0.5)
    assert merge_metrics([one]) == one
    with pytest.raises(LossInputError) as caught:
        merge_metrics([])
    error = caught.value
    assert (error.field, error.expected, error.got) == ("parts", "the metrics of at least one chunk", "none")
