"""The answers that a service's built-in losses should give, by the losses of this library."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from lossfns.backend.engine.builtins import bind_builtin
from lossfns.conformance.client import Row, Rows
from lossfns.datum import Datum, ModelInput, TensorData
from lossfns.errors import LossWarning
from lossfns.loss import BoundLoss

Config = Mapping[str, Any] | None


class Expected(NamedTuple):
    """The value of a loss, and its gradient with respect to the logprobs of each datum."""

    value: float
    gradients: list[np.ndarray]
    scale: float
    """A bound of the size of the value: Σ |∂L/∂lp · lp| and Σ |terms|, for relative errors."""

    def as_cross_entropy(self, rows: Rows) -> list[Row]:
        """Return datums whose cross_entropy has this gradient: its weights are −∂L/∂lp."""
        return [with_weights(row, -g) for row, g in zip(rows, self.gradients)]


def with_weights(row: Row, weights: np.ndarray) -> Row:
    """Return the datum of a cross-entropy: targets and weights alone."""
    return Row(row.tokens, {"target_tokens": row.fields["target_tokens"]}).having(weights=weights)


def as_datum(row: Row) -> Datum:
    """Return a row as a datum of this library."""
    fields = {name: TensorData.from_numpy(x) for name, x in row.fields.items()}
    return Datum(ModelInput.from_ints(list(row.tokens)), fields)


def differentiate(loss: BoundLoss, rows: Rows, logprobs: list[np.ndarray]) -> Expected:
    """Return value and gradient of a loss at these logprobs, in float64."""
    leaves = [torch.tensor(lp, dtype=torch.float64, requires_grad=True) for lp in logprobs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LossWarning)
        value, _ = loss([as_datum(row) for row in rows], leaves)
    value.backward()  # type: ignore[no-untyped-call]
    gradients = [np.zeros(lp.shape) if lp.grad is None else lp.grad.numpy() for lp in leaves]
    scale = sum(float(np.abs(g * lp).sum()) + float(np.abs(g).sum()) for g, lp in zip(gradients, logprobs))
    return Expected(float(value.detach()), gradients, scale)


def expected(loss: str, config: Config, rows: Rows, logprobs: list[np.ndarray]) -> Expected:
    """Return value and gradient of a service's built-in loss at these logprobs."""
    multi = any(row.fields["target_tokens"].ndim == 2 for row in rows)
    bound = bind_builtin(loss, config, [as_datum(row) for row in rows], multi_target=multi)
    return differentiate(bound, rows, logprobs)
