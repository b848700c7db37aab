"""``Datum``, ``ModelInput`` and ``TensorData``, in the shapes of the hosted SDKs.

Each class can replace the SDK class of the same name. Objects of the SDKs are accepted wherever these classes are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossfns.checks import is_huge, is_real
from lossfns.errors import LossInputError, did_you_mean, show
from lossfns.pack import is_plain, tensor_form
from lossfns.tokens import DATUM_COLUMNS, TOKEN_COLUMNS

NUMPY_DTYPES = {"float32": np.float32, "int64": np.int64}

FIELD_DTYPES = {
    "target_tokens": "int64",
    **dict.fromkeys(
        [
            "weights",
            "advantages",
            "logprobs",
            "old_logprobs",
            "ref_logprobs",
            "sampler_logprobs",
            "clip_low_threshold",
            "clip_high_threshold",
            "sequence_ratio_mask",
            *TOKEN_COLUMNS,
            *DATUM_COLUMNS,
        ],
        "float32",
    ),
}
"""The dtype to which a plain list is converted, by field."""

NULLABLE = ("logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs")
"""Fields that may contain None, which becomes nan. Servers send null for positions that have no weight."""


class TensorData:
    """Numbers with a dtype (``"float32"`` or ``"int64"``) and a shape; dense, or CSR for a sparse ``[N, K]``.

    As in the SDKs, ``.data`` is a flat row-major list. ``.to_numpy()`` and ``.to_torch()`` return dense arrays of
    this shape. They share memory with the object where possible: do not write to them.

    >>> TensorData([1, 2, 3, 4], "int64", [2, 2]).tolist()
    [[1, 2], [3, 4]]
    """

    __slots__ = ("_values", "dtype", "shape", "sparse_col_indices", "sparse_crow_indices")

    def __init__(
        self,
        data: Any = None,
        dtype: str | None = None,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: Sequence[int] | None = None,
        sparse_col_indices: Sequence[int] | None = None,
    ) -> None:
        if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
            raise LossInputError("dtype", "'float32' or 'int64'", show(dtype), did_you_mean(dtype, NUMPY_DTYPES))
        if shape is not None:
            check_shape(shape)
        self.dtype, self.shape = dtype, None if shape is None else list(shape)
        self.sparse_crow_indices, self.sparse_col_indices = sparse_crow_indices, sparse_col_indices
        values = cast(data if data is not None else [], dtype, "data")
        if sparse_crow_indices is not None or sparse_col_indices is not None:
            check_csr(values.size, sparse_crow_indices, sparse_col_indices, shape)
        elif shape is not None:
            if prod(shape) != values.size:
                got = f"shape {list(shape)} with {values.size} values"
                raise LossInputError(
                    "shape", f"a shape of {values.size} values", got, "[N, K] has N·K values, row-major."
                )
            values = values.reshape(shape)
        self._values = values

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> TensorData:
        if not isinstance(array, np.ndarray):
            raise LossInputError("array", "a NumPy array", show(array), "Use TensorData(data=..., dtype=...).")
        dtype = tensor_dtype(array.dtype.kind, array.dtype)
        dense = cls.__new__(cls)  # without __init__, whose checks of a shape an array always passes
        dense.dtype, dense.shape, dense._values = dtype, list(array.shape), cast(array, dtype, "data")
        dense.sparse_crow_indices = dense.sparse_col_indices = None
        return dense

    @classmethod
    def from_torch(cls, tensor: Tensor) -> TensorData:
        if not isinstance(tensor, Tensor) or not is_plain(tensor):
            got = tensor_form(tensor) if isinstance(tensor, Tensor) else show(tensor)
            raise LossInputError(
                "data", "a dense tensor of numbers", got, "Convert it: .to_dense(), .float() or .long()."
            )
        if tensor.requires_grad:
            got = "a tensor that requires grad"
            raise LossInputError("data", "a constant tensor", got, "Call .detach(): a datum holds no gradient.")
        is_integer = tensor.dtype in (torch.int8, torch.int16, torch.int32, torch.int64)
        dtype = tensor_dtype("f" if tensor.is_floating_point() else "i" if is_integer else "", tensor.dtype)
        return cls(tensor.cpu().to(getattr(torch, dtype)).numpy(), dtype, tensor.shape)

    @classmethod
    def from_torch_sparse(cls, tensor: Tensor) -> TensorData:
        """Store a matrix in CSR form if that is smaller than the dense form."""
        dense = cls.from_torch(tensor)
        array = dense.to_numpy()
        if array.ndim != 2 or array.shape[0] + 1 + 2 * np.count_nonzero(array) >= array.size:
            return dense
        crow = [0, *np.cumsum(np.count_nonzero(array, axis=1)).tolist()]
        return cls(array[array != 0], dense.dtype, array.shape, crow, np.nonzero(array)[1].tolist())

    @property
    def data(self) -> list[Any]:
        """Flat values (the stored ones, if sparse). Rebuilt on each read: use ``to_numpy`` in a loop."""
        return list(self._values.reshape(-1).tolist())

    def to_numpy(self) -> np.ndarray:
        if self.sparse_crow_indices is None:
            return self._values
        assert self.sparse_col_indices is not None and self.shape is not None  # check_csr has refused None
        dense = np.zeros(self.shape, self._values.dtype)
        rows = np.repeat(np.arange(self.shape[0]), np.diff(self.sparse_crow_indices))
        dense[rows, self.sparse_col_indices] = self._values
        return dense

    def to_torch(self) -> Tensor:
        return torch.from_numpy(self.to_numpy())

    def tolist(self) -> list[Any]:
        return list(self.to_numpy().tolist())

    def __repr__(self) -> str:
        return f"TensorData({self.data!r}, {self.dtype!r}, {self.shape!r})"


def tensor_dtype(kind: str, given: Any) -> str:
    """Return the dtype of TensorData for a NumPy kind: ``"f"`` or ``"i"``. Refuse any other; ``given`` is shown."""
    if kind not in ("f", "i"):
        fix = "Convert it: .float() for numbers, .long() for ids."
        raise LossInputError("dtype", "floating point or signed integers", str(given), fix)
    return "float32" if kind == "f" else "int64"


def cast(data: Any, dtype: str, name: str) -> np.ndarray:
    """Convert numbers to an array of the dtype. Refuse a conversion that would lose or invent a value."""
    try:
        array = np.asarray(data.to_numpy() if hasattr(data, "to_numpy") else data)
    except Exception as error:  # whatever the value's own methods raise
        got = "a ragged nested list" if isinstance(error, ValueError) else f"a {type(data).__name__}"
        raise LossInputError(name, "a rectangular numeric array", got, "Pad rows with weight 0.") from None
    if array.dtype == NUMPY_DTYPES[dtype]:
        return array
    if array.dtype == object and name in NULLABLE and all(x is None or is_real(x) for x in array.flat):
        array = np.array([np.nan if x is None or is_huge(x) else float(x) for x in array.flat]).reshape(array.shape)
    if array.size == 0:
        return array.astype(NUMPY_DTYPES[dtype])
    if array.dtype.kind not in "fiub":
        got = f"a {type(data).__name__} of {array.dtype}"
        raise LossInputError(name, "a rectangular numeric array", got, "None and strings are no numbers.")
    if dtype == "int64" and array.dtype.kind == "f":
        array = array.astype(np.float64)
        if not (np.isfinite(array) & (array == np.trunc(array))).all():
            raise LossInputError(name, "whole numbers", "fractions", "Ids are integers; were weights passed?")
        if not (np.abs(array) < 2.0**63).all():
            raise LossInputError(name, "whole numbers of 64 bits", f"{np.abs(array).max():g}", "No id is that large.")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, which the door refuses
        return array.astype(NUMPY_DTYPES[dtype], copy=False)


def token_ids(tokens: Any, name: str) -> np.ndarray:
    """Convert tokens to ``[T]`` int64 ids, and refuse fractions and negative numbers."""
    ids = whole_numbers(tokens, name)
    check_ids(ids, name)
    return ids


def whole_numbers(values: Any, name: str) -> np.ndarray:
    """Convert a flat row of whole numbers of any kind to ``[T]`` int64."""
    if not isinstance(values, Iterable):
        raise LossInputError(name, "a flat list of token ids", show(values), "One datum holds one sequence.")
    array = cast(values if hasattr(values, "__array__") else list(values), "int64", name)
    if array.ndim != 1:
        raise LossInputError(name, "a flat list of token ids", f"shape {array.shape}", "One datum holds one sequence.")
    return array


def check_ids(ids: np.ndarray, name: str) -> None:
    if ids.size and ids.min() < 0:
        fix = "To leave a position out, give it weight 0."
        raise LossInputError(name, "ids of at least 0", str(ids.min()), fix)


def check_shape(shape: Any) -> None:
    """Refuse anything but a list of whole numbers of at least 0."""
    is_list = isinstance(shape, (list, tuple))  # a torch.Size is a tuple
    if not is_list or not all(type(n) in (int, np.int64) and 0 <= n < 2**62 for n in shape):
        raise LossInputError("shape", "a list of whole numbers", show(shape), "[N] or [N, K].")


def check_csr(stored: int, crow: Sequence[int] | None, col: Sequence[int] | None, shape: Sequence[int] | None) -> None:
    """Refuse CSR indices that do not describe ``stored`` values in a matrix of this shape."""
    if crow is None or col is None or shape is None or len(shape) != 2:
        fix = "A sparse tensor needs crow indices, col indices and the dense shape."
        raise LossInputError("sparse", "a CSR layout of shape [N, K]", f"shape {shape}", fix)
    c, k = cast(crow, "int64", "sparse_crow_indices"), cast(col, "int64", "sparse_col_indices")
    rows_fit = (
        c.ndim == k.ndim == 1
        and len(c) == shape[0] + 1
        and c[0] == 0
        and c[-1] == stored == len(k)
        and (np.diff(c) >= 0).all()
    )
    if not rows_fit or ((k < 0) | (k >= shape[1])).any():
        got = f"{c.size} row pointers and {k.size} columns for {stored} values of shape {list(shape)}"
        raise LossInputError(
            "sparse", "consistent CSR indices", got, "Columns lie in [0, K); the last pointer is the count."
        )


@dataclass(frozen=True)
class EncodedTextChunk:
    """A chunk of token ids."""

    tokens: tuple[int, ...]
    type: str = "encoded_text"

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, tuple):
            object.__setattr__(self, "tokens", tuple(whole_numbers(self.tokens, "tokens").tolist()))

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class ModelInput:
    """The input of the model: chunks of token ids. Two inputs with equal chunks are equal."""

    chunks: tuple[EncodedTextChunk, ...] = ()

    @classmethod
    def empty(cls) -> ModelInput:
        return cls()

    @classmethod
    def from_ints(cls, tokens: Iterable[int]) -> ModelInput:
        ids = whole_numbers(tokens, "tokens")
        return cls((EncodedTextChunk(tuple(ids.tolist())),))

    def append(self, chunk: EncodedTextChunk) -> ModelInput:
        if not hasattr(chunk, "tokens"):
            raise LossInputError("chunk", "a chunk of tokens", show(chunk), "Use EncodedTextChunk, or append_int.")
        return ModelInput((*self.chunks, chunk))

    def append_int(self, token: int) -> ModelInput:
        return ModelInput((*self.chunks, *ModelInput.from_ints([token]).chunks))

    def to_ints(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.tokens]

    @property
    def length(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


@dataclass(frozen=True, eq=False)
class Datum:
    """One training example: a model input and the per-token fields that a loss reads.

    ``loss_fn_inputs`` is a plain mutable dict. Lists, arrays and tensors are converted on construction
    (``target_tokens`` to int64, the known float fields to float32); a TensorData stays as it is.
    """

    model_input: Any
    loss_fn_inputs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.loss_fn_inputs, Mapping) or not all(isinstance(x, str) for x in self.loss_fn_inputs):
            fix = "Pass {name: values}."
            raise LossInputError("loss_fn_inputs", "a dict of fields by name", show(self.loss_fn_inputs), fix)
        converted = {name: tensor_data(name, value) for name, value in self.loss_fn_inputs.items()}
        object.__setattr__(self, "loss_fn_inputs", converted)

    def __copy__(self) -> Datum:
        copied = object.__new__(type(self))  # as copy.copy does it, several times faster: clients copy every datum
        vars(copied).update(vars(self))
        return copied


def tensor_data(name: str, value: Any) -> Any:
    """Convert a field's value to TensorData as the SDKs do. Refuse a value that the SDKs would silently change."""
    if hasattr(value, "to_numpy") and hasattr(value, "dtype"):
        return value
    try:
        if isinstance(value, Tensor):
            tensor = TensorData.from_torch(value)
        elif isinstance(value, np.ndarray):
            tensor = TensorData.from_numpy(value)
        elif isinstance(value, list):
            tensor = from_list(name, value)
        else:
            got = f"a {type(value).__name__}"
            raise LossInputError(name, "a list, array, tensor or TensorData", got, "Wrap it in TensorData.")
    except LossInputError as error:
        error.field = name
        raise
    if FIELD_DTYPES.get(name) == "int64":
        tensor = TensorData(cast(tensor.to_numpy(), "int64", name), "int64", tensor.shape)
        check_ids(tensor.to_numpy(), name)
    return tensor


def from_list(name: str, value: list[Any]) -> TensorData:
    if name not in FIELD_DTYPES:
        fix = "Wrap it in TensorData(data=..., dtype=...), which names the dtype."
        raise LossInputError(name, "a known field for a plain list", f"the unknown field {name!r}", fix)
    array = cast(value, FIELD_DTYPES[name], name)
    return TensorData(array, FIELD_DTYPES[name], array.shape)
