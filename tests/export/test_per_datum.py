"""A function of one datum as a loss of a batch."""

from typing import Any

import pytest
import torch
from torch import Tensor

import lossfns
from lossfns import LossInputError, export


def test_a_batch_of_datums_is_the_sum_and_metrics_are_reduced_by_their_suffix() -> None:
    """Sums 1 and 2 of −lp·w: 3 in all; the means of lp −1 and −2 are averaged."""

    def fn(logprobs: Tensor, weights: Tensor) -> Any:
        return -(logprobs * weights).sum(), {"custom/n:sum": weights.sum(), "custom/lp:mean": logprobs.mean()}

    data = [lossfns.datum_from_tokens([1] * n, prompt_length=0) for n in (2, 3)]
    logprobs = [torch.tensor([-1.0], requires_grad=True), torch.tensor([-1.0, -3.0], requires_grad=True)]
    loss, metrics = export.per_datum(fn, {"logprobs": 1, "weights": 1})(data, logprobs)
    loss.backward()
    assert loss.item() == 5.0 and metrics == {"custom/n:sum": 3.0, "custom/lp:mean": -1.5}
    assert [lp.grad.tolist() for lp in logprobs if lp.grad is not None] == [[-1.0], [-1.0, -1.0]]


def test_a_batch_with_a_datum_that_does_not_fit_is_refused_with_its_number() -> None:
    data = [lossfns.datum_from_tokens([1] * n, prompt_length=0) for n in (2, 3)]
    rows = [torch.tensor([-1.0], requires_grad=True), torch.tensor([-1.0, 0.0], requires_grad=True)]
    ranks = {"logprobs": 1, "weights": 1}
    total = lambda lp, w: ((lp * w).sum(), {})  # noqa: E731
    for fn, given, expected in (
        (total, {"logprobs": 1, "share": 1}, r"datum\[0\].share: expected a field that the loss reads, got only"),
        (total, {"logprobs": 1, "weights": 2}, r"datum\[0\].weights: expected 2 dimensions"),
        (total, {"logprobs": 2, "weights": 1}, r"datum\[0\].logprobs: expected 2 dimensions"),
        (total, {"weights": 1}, "input_ranks: expected logprobs"),
        (lambda lp, w: (lp * w, {}), ranks, r"datum\[0\].loss: expected a 0-d tensor, got shape"),
        (lambda lp, w: (w.sum(), {}), ranks, r"datum\[0\].loss: expected a loss that depends on logprobs"),
        (lambda lp, w: (lp.detach().sum(), {}), ranks, r"datum\[0\].loss: expected a loss that depends"),
        (lambda lp, w: ((-lp).sqrt().sum(), {}), ranks, r"datum\[1\].logprobs: expected a finite gradient"),
        (
            lambda lp, w: (lp.sum(), {"custom/a:sum": lp}),
            ranks,
            r"datum\[0\].metrics\['custom/a:sum'\]: expected a 0-d",
        ),
        (lambda lp, w: (lp.sum(), {"custom/a:sum": 1.0}), ranks, "got a float"),
        (lambda lp, w: (lp.sum(), {"custom/a:max": lp.sum()}), ranks, "names that end in :sum or :mean"),
        (lambda lp, w: (lp.sum(), {f"custom/{len(w)}:sum": w.sum()}), ranks, r"datum\[1\].metrics: expected custom/1"),
    ):
        with pytest.raises(LossInputError, match=expected):
            export.per_datum(fn, given)(data, rows)
