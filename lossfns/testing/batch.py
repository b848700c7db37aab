"""A batch as plain rows of floats, which laws edit, strategies draw and the oracle reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossfns import datum as ours
from lossfns.inspect.probe import ALIASES
from lossfns.tokens import COLUMNS

Row = list[float]
Rows = list[Row]


@dataclass(frozen=True)
class Batch:
    """Rows of floats, one row for each datum. ``eval(repr(batch))`` gives the batch again.

    The columns of a datum are stored in float32. Where exactness matters, use numbers that float32 holds. Logprobs
    may have any dtype.

    Attributes:
        logprobs: the policy's logprobs.
        weights: the weights; 0 masks a token.
        columns: the rows of each side column, by its name.
        targets: K where a position has K targets; a row then holds the N·K entries of N positions, row-major. Else 0.

    >>> batch = Batch([[-1.0, -2.0]], [[0.0, 1.0]], {"advantages": [[1.0, 1.0]]})
    >>> data, logprobs = batch.data(), batch.tensors()
    >>> Batch.of(data, logprobs) == batch
    True
    """

    logprobs: Rows
    weights: Rows
    columns: Mapping[str, Rows] = field(default_factory=dict)
    targets: int = 0

    @classmethod
    def of(cls, data: Sequence[Any], logprobs: Sequence[Tensor]) -> Batch:
        """Read the rows of datums that carry their columns, together with their logprobs."""
        inputs = [datum.loss_fn_inputs for datum in data]

        def flat(name: str) -> Rows:
            return [own[name].to_numpy().reshape(-1).tolist() for own in inputs]

        columns = {name: flat(name) for name in COLUMNS if name != "weights" and all(name in own for own in inputs)}
        targets = logprobs[0].shape[1] if logprobs and logprobs[0].ndim == 2 else 0
        return cls([lp.detach().flatten().tolist() for lp in logprobs], flat("weights"), columns, targets)

    def shape(self, row: Sequence[float]) -> list[int]:
        """Return the shape of a row's tensor: ``[N]``, or ``[N, K]`` with K targets."""
        return [len(row) // self.targets, self.targets] if self.targets else [len(row)]

    def __str__(self) -> str:
        """Return the ``repr`` with one column on each line. Fields at their defaults are left out."""
        columns = [f"        {name!r}: {rows}," for name, rows in self.columns.items()]
        lines = [f"    logprobs={self.logprobs},", f"    weights={self.weights},"]
        lines += ["    columns={", *columns, "    },"] * bool(columns) + [f"    targets={self.targets},"] * bool(
            self.targets
        )
        return "\n".join(["Batch(", *lines, ")"])

    def data(self, sdk: Any = ours) -> list[Any]:
        """Return datums that carry every column under each of its names; ``sdk`` gives the classes."""
        return [self.datum(i, sdk) for i in range(len(self.weights))]

    def datum(self, i: int, sdk: Any = ours) -> Any:
        """Return datum ``i``."""
        shape = self.shape(self.weights[i])
        columns = {"weights": self.weights[i], **{name: rows[i] for name, rows in self.columns.items()}}
        named = columns | {ALIASES[name]: row for name, row in columns.items() if name in ALIASES}
        fields = {name: np.array(row, np.float32).reshape(shape) for name, row in named.items()}
        ids = (np.arange(prod(shape)) % 50 + 3).reshape(shape)
        tensors = {name: sdk.TensorData.from_numpy(x) for name, x in (fields | {"target_tokens": ids}).items()}
        first = ids.reshape(shape[0], -1)[:, 0] if shape[0] else ids
        return sdk.Datum(sdk.ModelInput.from_ints([2, *first[:-1].tolist()][: shape[0]]), tensors)

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Return the logprobs as leaf tensors that require grad."""
        return [torch.tensor(row, dtype=dtype).reshape(self.shape(row)).requires_grad_() for row in self.logprobs]

    def take(self, indices: Sequence[int]) -> Batch:
        """Return the batch of the datums with these indices, in this order."""
        return self.map(lambda rows: [rows[i] for i in indices])

    def map(self, change: Any) -> Batch:
        """Apply one function to the rows of logprobs, of weights and of every column."""
        columns = {name: change(rows) for name, rows in self.columns.items()}
        return replace(self, logprobs=change(self.logprobs), weights=change(self.weights), columns=columns)

    def having(self, *, logprobs: Rows | None = None, weights: Rows | None = None, **columns: Rows) -> Batch:
        """Return the batch with some of its rows replaced."""
        return replace(
            self,
            logprobs=self.logprobs if logprobs is None else logprobs,
            weights=self.weights if weights is None else weights,
            columns={**self.columns, **columns},
        )
