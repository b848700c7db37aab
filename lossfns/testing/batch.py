"""A batch as plain rows of floats, which laws edit, strategies draw and the oracle reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossfns import datum as lossfns_sdk
from lossfns.inspect.probe import ALIASES
from lossfns.tokens import COLUMNS, DATUM_COLUMNS, TOKEN_COLUMNS

Row = list[float]
Rows = list[Row]


@dataclass(frozen=True)
class Batch:
    """Rows of floats, one row for each datum. ``eval(repr(batch))`` gives the batch again.

    Datums store their columns in float32. If results must be exact, use numbers that float32 represents exactly.
    Logprobs may have any dtype.

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
        """Build a batch from logprobs, and from datums that hold their columns."""
        inputs = [datum.loss_fn_inputs for datum in data]

        def flat(name: str) -> Rows:
            return [fields[name].to_numpy().reshape(-1).tolist() for fields in inputs]

        side = (name for name in (*COLUMNS, *TOKEN_COLUMNS, *DATUM_COLUMNS) if name != "weights")
        names = [name for name in side if all(name in fields for fields in inputs)]
        columns = {name: flat(name) for name in names}
        targets = logprobs[0].shape[1] if logprobs and logprobs[0].ndim == 2 else 0
        return cls([lp.detach().flatten().tolist() for lp in logprobs], flat("weights"), columns, targets)

    def shape(self, row: Sequence[float]) -> list[int]:
        """Return the shape of a row's tensor: ``[N]``, or ``[N, K]`` with K targets."""
        return [len(row) // self.targets, self.targets] if self.targets else [len(row)]

    def __str__(self) -> str:
        """Return the ``repr`` with one column on each line. Leave out fields that have their default value."""
        columns = [f"        {name!r}: {rows}," for name, rows in self.columns.items()]
        lines = [f"    logprobs={self.logprobs},", f"    weights={self.weights},"]
        if columns:
            lines += ["    columns={", *columns, "    },"]
        if self.targets:
            lines.append(f"    targets={self.targets},")
        return "\n".join(["Batch(", *lines, ")"])

    def data(self, sdk: Any = lossfns_sdk) -> list[Any]:
        """Return datums of the classes of ``sdk``. They hold every column, also under its other name in ``ALIASES``."""
        return [self.datum(i, sdk) for i in range(len(self.weights))]

    def datum(self, i: int, sdk: Any = lossfns_sdk) -> Any:
        """Return datum ``i``."""
        shape = self.shape(self.weights[i])
        columns = {"weights": self.weights[i], **{name: rows[i] for name, rows in self.columns.items()}}
        fields = {name: np.array(row, np.float32).reshape(shape) for name, row in columns.items()}
        fields |= {ALIASES[name]: x.copy() for name, x in fields.items() if name in ALIASES}
        ids = (np.arange(prod(shape)) % 50 + 3).reshape(shape)  # arbitrary token ids: 3 to 52, in turns
        tensors = {name: sdk.TensorData.from_numpy(x) for name, x in (fields | {"target_tokens": ids}).items()}
        first_targets = ids.reshape(shape[0], -1)[:, 0] if shape[0] else ids
        # The input is the targets shifted by one, after a start token 2. It is empty for an empty datum.
        tokens = [2, *first_targets[:-1].tolist()][: shape[0]]
        return sdk.Datum(sdk.ModelInput.from_ints(tokens), tensors)

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Return the logprobs as leaf tensors that require grad."""
        return [torch.tensor(row, dtype=dtype).reshape(self.shape(row)).requires_grad_() for row in self.logprobs]

    def take(self, indices: Sequence[int]) -> Batch:
        """Return the batch of the datums with these indices, in this order."""
        return self.map(lambda rows: [rows[i] for i in indices])

    def with_targets(self, targets: int) -> Batch:
        """Return the batch with this many unequal targets at each position; with 0, the batch itself."""
        if not targets:
            return self
        wide = self.map(lambda rows: [[x * (1 + k / 4) for x in row for k in range(targets)] for row in rows])
        weights = [[x for x in row for _ in range(targets)] for row in self.weights]
        return replace(wide, weights=weights, targets=targets)

    def map(self, change: Callable[[Rows], Rows]) -> Batch:
        """Apply a function to the rows of the logprobs, of the weights and of each column."""
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
