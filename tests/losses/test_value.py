"""The loss of a value head: numbers worked on paper, and the statistics of its fit."""

import math

import pytest
import torch

from lossfns import LossInputError, explained_variance, merge_metrics, value_loss

near = pytest.approx
VALUES = [[1.0, 0.5, 0.125, -3.0]]
COLUMNS = {"returns": torch.tensor([[2.0, 0.0, 4.0, -3.5]]), "old_values": torch.tensor([[0.0, 0.0, 0.0, -2.0]])}


def test_value_loss_by_hand() -> None:
    """c = 0.25. Values 1, ½, ⅛, −3 of old values 0, 0, 0, −2, and returns 2, 0, 4, −3½.

    1 has moved by more than ¼ towards 2: it counts as ¼, ½·1¾² = 1.53125, no gradient. ½ has moved away from 0: the
    larger square is its own, ½·¼, gradient ½. ⅛ is within the bounds: ½·3.875², gradient −3.875. −3 has moved towards
    −3½: it counts as −2¼, ½·1¼² = 0.78125, no gradient. Gradients are divided by 4.
    """
    values = torch.tensor(VALUES, requires_grad=True)
    loss, metrics = value_loss(value_clip=0.25).padded(values, torch.ones(1, 4), **COLUMNS)
    loss.backward()
    assert loss.item() == near((1.53125 + 0.125 + 3.875**2 / 2 + 0.78125) / 4)
    assert values.grad is not None and values.grad.tolist() == [[0.0, 0.125, -3.875 / 4, 0.0]]
    assert metrics["value_clipped"] == 0.5
    assert metrics["value"] == near(-1.375 / 4)
    assert metrics["value_error"] == near((1 - 0.5 + 3.875 - 0.5) / 4)
    assert metrics["value_error_squared"] == near((1 + 0.25 + 3.875**2 + 0.25) / 4)
    assert (metrics["returns"], metrics["returns_squared"]) == (near(2.5 / 4), near((4 + 16 + 3.5**2) / 4))


def test_without_a_clip_it_is_the_squared_error() -> None:
    """½·(1 + ¼ + 3.875² + ¼)/4, and no old values are read."""
    loss, metrics = value_loss(value_clip=None).padded(
        torch.tensor(VALUES), torch.ones(1, 4), returns=COLUMNS["returns"]
    )
    assert value_loss(value_clip=None).reads == ("returns",)
    assert loss.item() == near((1 + 0.25 + 3.875**2 + 0.25) / 8)
    assert "value_clipped" not in metrics


def test_values_within_the_bounds_are_never_clipped_by_rounding() -> None:
    """old + (v − old) may not be v in float32; such a value keeps its gradient."""
    torch.manual_seed(0)
    old = torch.randn(1, 4096) * 1e3
    values = (old + 0.1 * torch.rand(1, 4096)).requires_grad_()
    loss, metrics = value_loss().padded(values, torch.ones(1, 4096), returns=old * 0.9, old_values=old)
    loss.backward()
    assert metrics["value_clipped"] == 0
    assert values.grad is not None and values.grad.count_nonzero() == 4096


def test_explained_variance_merges_over_micro_batches() -> None:
    """1 − Var(R − v)/Var(R) of all tokens, also where the parts have other means."""
    torch.manual_seed(0)
    returns = torch.randn(4, 8, dtype=torch.float64) + torch.arange(4.0)[:, None]
    values = returns + 0.5 * torch.randn(4, 8, dtype=torch.float64)
    loss, ones = value_loss(value_clip=None), torch.ones(4, 8)
    parts = [loss.padded(values[i : i + 1], ones[:1], returns=returns[i : i + 1])[1] for i in range(4)]
    expected = 1 - ((returns - values).var(correction=0) / returns.var(correction=0)).item()
    assert explained_variance(merge_metrics(parts)) == near(expected, rel=1e-12)
    assert explained_variance(loss.padded(returns, ones, returns=returns)[1]) == 1.0
    constant = loss.padded(values, ones, returns=torch.ones(4, 8))[1]
    assert math.isnan(explained_variance(constant))


def test_explained_variance_needs_the_metrics_of_value_loss() -> None:
    with pytest.raises(LossInputError, match="metrics: expected value_error, value_error_squared, returns, returns_sq"):
        explained_variance({"value": 1.0})
