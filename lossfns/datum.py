"""Datums: drop-in shapes of the hosted SDKs' ``Datum``, ``ModelInput`` and ``TensorData``, and their builders.

One frame only. Of tokens ``[0..T-1]`` the model input is the first T − 1 and the targets the last T − 1;
every per-token field has the length N = T − 1 of the targets, and position j holds token j + 1. The
shift by one happens in this file and nowhere else. The SDKs' own objects are accepted wherever these are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossfns.checks import is_real
from lossfns.errors import LossInputError, did_you_mean

NUMPY = {"float32": np.float32, "int64": np.int64}

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
        ],
        "float32",
    ),
}
"""What a plain list under each key becomes."""

NULLABLE = ("logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs")
"""Fields in which a server's null may stand, as nan, where nothing is trained on."""


class TensorData:
    """Numbers with a dtype (``"float32"`` or ``"int64"``) and a shape; dense, or CSR for a sparse ``[N, K]``.

    Like the SDKs' class of that name: ``.data`` is a flat row-major list, ``.to_numpy()`` and
    ``.to_torch()`` are dense, have the shape, and share memory where they can. Treat them as read-only.

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
        if dtype not in NUMPY:
            raise LossInputError("dtype", "'float32' or 'int64'", repr(dtype), f"{did_you_mean(str(dtype), NUMPY)}")
        self.dtype, self.shape = dtype, None if shape is None else list(shape)
        self.sparse_crow_indices, self.sparse_col_indices = sparse_crow_indices, sparse_col_indices
        values = cast(data if data is not None else [], dtype, "data")
        if sparse_crow_indices is not None or sparse_col_indices is not None:
            check_csr(len(values), sparse_crow_indices, sparse_col_indices, shape)
        elif shape is not None:
            if prod(shape) != values.size:
                got = f"shape {list(shape)} with {values.size} values"
                raise LossInputError("shape", f"a shape of {values.size} values", got, "Row-major: [N, K] has N·K.")
            values = values.reshape(shape)
        self._values = values

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> TensorData:
        return cls(array, tensor_dtype(array.dtype.kind, str(array.dtype)), array.shape)

    @classmethod
    def from_torch(cls, tensor: Tensor) -> TensorData:
        if tensor.requires_grad:
            got = "a tensor that requires grad"
            raise LossInputError(
                "data", "a constant tensor", got, "Call .detach(): what a datum holds has no gradient."
            )
        whole = tensor.dtype in (torch.int8, torch.int16, torch.int32, torch.int64)
        dtype = tensor_dtype("f" if tensor.is_floating_point() else "i" if whole else "", str(tensor.dtype))
        return cls(tensor.cpu().to(getattr(torch, dtype)).numpy(), dtype, tensor.shape)

    @classmethod
    def from_torch_sparse(cls, tensor: Tensor) -> TensorData:
        """CSR where that is smaller: a matrix with many zeros."""
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
        assert self.sparse_col_indices is not None and self.shape is not None  # check_csr made sure
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


def tensor_dtype(kind: str, name: str) -> str:
    if kind not in ("f", "i"):
        fix = "Convert it: .float() for numbers, .long() for ids."
        raise LossInputError("dtype", "floating point or signed integers", name, fix)
    return "float32" if kind == "f" else "int64"


def cast(data: Any, dtype: str, name: str) -> np.ndarray:
    """Numbers as an array of the dtype; what would be cut off or invented on the way is refused."""
    try:
        array = np.asarray(data)
    except ValueError:
        raise LossInputError(
            name, "a rectangular numeric array", "a ragged nested list", "Pad rows with weight 0."
        ) from None
    if array.dtype == object and name in NULLABLE:
        array = np.asarray(data, dtype=np.float64)
    if array.size == 0:
        return array.astype(NUMPY[dtype])
    if array.dtype.kind not in "fiub":
        got = f"a {type(data).__name__} of {array.dtype}"
        raise LossInputError(name, "a rectangular numeric array", got, "None and strings are no numbers.")
    if dtype == "int64" and array.dtype.kind == "f":
        if not (np.isfinite(array) & (array == np.trunc(array))).all():
            raise LossInputError(name, "whole numbers", "fractions", "Ids are integers; were weights passed?")
        if not (np.abs(array) < 2.0**63).all():
            raise LossInputError(name, "whole numbers of 64 bits", f"{np.abs(array).max():g}", "No id is that large.")
    return array.astype(NUMPY[dtype], copy=False)


def token_ids(tokens: Any, name: str) -> np.ndarray:
    """``[T]`` ids, whole and not negative."""
    ids = cast(tokens if hasattr(tokens, "__array__") else list(tokens), "int64", name)
    if ids.ndim != 1:
        raise LossInputError(name, "a flat list of token ids", f"shape {ids.shape}", "One datum holds one sequence.")
    check_ids(ids, name)
    return ids


def check_ids(ids: np.ndarray, name: str) -> None:
    if ids.size and ids.min() < 0:
        fix = "To leave a position out, give it weight 0."
        raise LossInputError(name, "ids of at least 0", str(ids.min()), fix)


def check_csr(stored: int, crow: Sequence[int] | None, col: Sequence[int] | None, shape: Sequence[int] | None) -> None:
    """Refuse a CSR layout that does not describe a matrix of its shape."""
    if crow is None or col is None or shape is None or len(shape) != 2:
        fix = "A sparse tensor needs crow indices, col indices and the dense shape."
        raise LossInputError("sparse", "a CSR layout of shape [N, K]", f"shape {shape}", fix)
    c, k = np.asarray(crow), np.asarray(col)
    rows_fit = len(c) == shape[0] + 1 and c[0] == 0 and c[-1] == stored == len(k) and (np.diff(c) >= 0).all()
    if not rows_fit or ((k < 0) | (k >= shape[1])).any():
        got = f"{len(c)} row pointers and {len(k)} columns for {stored} values of shape {list(shape)}"
        raise LossInputError(
            "sparse", "consistent CSR indices", got, "Columns lie in [0, K); pointers end at the count."
        )


@dataclass(frozen=True)
class EncodedTextChunk:
    """A run of token ids."""

    tokens: tuple[int, ...]
    type: str = "encoded_text"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class ModelInput:
    """What the model reads: chunks of token ids. Equal by value."""

    chunks: tuple[EncodedTextChunk, ...] = ()

    @classmethod
    def empty(cls) -> ModelInput:
        return cls()

    @classmethod
    def from_ints(cls, tokens: Iterable[int]) -> ModelInput:
        ids = cast(list(tokens), "int64", "tokens")
        if ids.ndim != 1:
            raise LossInputError("tokens", "a flat list of token ids", f"shape {ids.shape}", "Flatten it.")
        return cls((EncodedTextChunk(tuple(ids.tolist())),))

    def append(self, chunk: EncodedTextChunk) -> ModelInput:
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
    """One training example: a model input and the per-token fields a loss reads.

    ``loss_fn_inputs`` is a plain mutable dict. Lists, arrays and tensors are converted on construction
    (``target_tokens`` to int64, the known float fields to float32); a TensorData stays as it is.
    """

    model_input: Any
    loss_fn_inputs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        converted = {name: tensor_data(name, value) for name, value in self.loss_fn_inputs.items()}
        object.__setattr__(self, "loss_fn_inputs", converted)


def tensor_data(name: str, value: Any) -> Any:
    """A field's value as TensorData, by the SDKs' rules but without their silent losses."""
    if hasattr(value, "to_numpy") and hasattr(value, "dtype"):
        return value
    try:
        if isinstance(value, Tensor):
            made = TensorData.from_torch(value)
        elif isinstance(value, np.ndarray):
            made = TensorData.from_numpy(value)
        elif isinstance(value, list):
            made = from_list(name, value)
        else:
            got = f"a {type(value).__name__}"
            raise LossInputError(name, "a list, array, tensor or TensorData", got, "Wrap it in TensorData.")
    except LossInputError as error:
        error.field = name
        raise
    if FIELD_DTYPES.get(name) == "int64":
        made = TensorData(cast(made.to_numpy(), "int64", name), "int64", made.shape)
        check_ids(made.to_numpy(), name)
    return made


def from_list(name: str, value: list[Any]) -> TensorData:
    if name not in FIELD_DTYPES:
        fix = "Wrap it in TensorData(data=..., dtype=...), which says what it is."
        raise LossInputError(name, "a known field for a plain list", f"the unknown field {name!r}", fix)
    array = cast(value, FIELD_DTYPES[name], name)
    return TensorData(array, FIELD_DTYPES[name], array.shape)


def datum_from_tokens(
    tokens: Sequence[int],
    weights: Any = None,
    *,
    prompt_length: int | None = None,
    max_length: int | None = None,
    reduction: str = "none",
    **fields: Any,
) -> Datum:
    """A datum from T tokens: input ``tokens[:-1]``, targets ``tokens[1:]``, weights shifted with them.

    Args:
        tokens: T >= 2 token ids.
        weights: ``[T]``, one for each token: how much predicting it counts. Or:
        prompt_length: weights 0 for the first ``prompt_length`` tokens and 1 for the rest.
        max_length: keep at most this many tokens, cutting on the right.
        reduction: ``"none"``, or ``"mean"`` to scale the weights to sum to 1.
        fields: further fields that already are in the frame of the targets, ``[T − 1]``.

    >>> datum = datum_from_tokens([5, 6, 7, 8], prompt_length=2)
    >>> datum.loss_fn_inputs["target_tokens"].data, datum.loss_fn_inputs["weights"].data
    ([6, 7, 8], [0.0, 1.0, 1.0])
    """
    ids = token_ids(tokens, "tokens")
    if (weights is None) == (prompt_length is None):
        fix = "They say the same thing."
        raise LossInputError("weights", "either weights or prompt_length", "both or neither", fix)
    if prompt_length is not None:
        check_count("prompt_length", prompt_length, 0, len(ids), "It counts the tokens before the response.")
    if max_length is not None:
        check_count("max_length", max_length, 1, None, "It counts the tokens to keep.")
    full = np.arange(len(ids)) >= prompt_length if prompt_length is not None else host(weights, "weights")
    if full.shape != ids.shape:
        fix = "Weights are given for tokens and shifted here, once."
        raise LossInputError("weights", f"{len(ids)} values, one per token", sizes(full), fix)
    kept = len(ids[:max_length])
    if kept < 2:
        raise LossInputError("tokens", "at least 2 tokens", str(kept), "One token has nothing to predict.")
    inputs = {"target_tokens": ids[1:kept], "weights": reduced(full[1:kept].astype(np.float32), reduction)}
    for name, value in fields.items():
        row = tensor_data(name, value).to_numpy() if np.ndim(value) or hasattr(value, "to_numpy") else np.asarray(value)
        if row.shape[:1] != (len(ids) - 1,):
            fix = "Fields are in the frame of target_tokens; see align_sampler_logprobs."
            raise LossInputError(name, f"{len(ids) - 1} values, one per target", sizes(row), fix)
        inputs[name] = row[: kept - 1]
    return Datum(ModelInput.from_ints(ids[: kept - 1].tolist()), inputs)


def check_count(name: str, value: Any, least: int, most: int | None, fix: str) -> None:
    """Refuse what is no whole number in [least, most]."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        expected = f"at least {least}" if most is None else f"{least} to {most}, the number of tokens"
        raise LossInputError(name, expected, repr(value), fix)


def sizes(row: np.ndarray) -> str:
    """How many values there are, for an error."""
    return str(len(row)) if row.ndim == 1 else f"shape {row.shape}"


def reduced(weights: np.ndarray, reduction: str) -> np.ndarray:
    if reduction not in ("none", "mean"):
        hint = did_you_mean(reduction, ("none", "mean"))
        raise LossInputError("reduction", "'none' or 'mean'", repr(reduction), hint)
    total = weights.sum()
    return weights / total if reduction == "mean" and total > 0 else weights


def host(values: Any, name: str) -> np.ndarray:
    """Numbers as a float array, wherever they came from."""
    values = values.detach().cpu().float().numpy() if isinstance(values, Tensor) else values
    return cast(values.to_numpy() if hasattr(values, "to_numpy") else values, "float32", name)


def datum_from_model_input_weights(
    model_input: Any, weights: Any, max_length: int | None = None, reduction: str = "none"
) -> Datum:
    """A datum from a model input of T tokens and ``[T]`` weights: ``datum_from_tokens`` in the cookbook's form."""
    return datum_from_tokens(model_input.to_ints(), weights, max_length=max_length, reduction=reduction)


def align_sampler_logprobs(logprobs: Any, targets: int) -> Tensor:
    """What a sampler returned, in the frame of N targets, as float32 ``[N]`` (0 where it says nothing).

    Accepts the completion alone (its last C <= N targets), all N targets, or all N + 1 tokens with the
    leading ``None`` that no token predicts; further leading ``None`` (the prompt's) become 0 as well.

    >>> align_sampler_logprobs([-0.5, -0.25], targets=4)
    tensor([ 0.0000,  0.0000, -0.5000, -0.2500])
    >>> align_sampler_logprobs([None, -3.0, -2.0, -0.5, -0.25], targets=4)
    tensor([-3.0000, -2.0000, -0.5000, -0.2500])
    """
    if not isinstance(logprobs, (Iterable, Tensor)):
        got, fix = f"a {type(logprobs).__name__}", "Pass the logprobs of one sample."
        raise LossInputError("logprobs", "a list of numbers", got, fix)
    values = list(logprobs.tolist() if isinstance(logprobs, (Tensor, np.ndarray)) else logprobs)
    skipped = int(len(values) == targets + 1 and values[0] is None)
    if len(values) - skipped > targets:
        fix = "Pass the number of target_tokens; a row over all tokens starts with None."
        raise LossInputError("logprobs", f"at most {targets} values, or None and {targets}", str(len(values)), fix)
    known = next((i for i, value in enumerate(values) if value is not None), len(values))
    for i, value in enumerate(values[known:], known):
        if not is_real(value):
            expected = "a number after the first number" if value is None else "a number"
            raise LossInputError(f"logprobs[{i}]", expected, repr(value), "Only the prompt may be null.")
    numbers = [float(value) for value in values[known:] if value is not None]
    return torch.tensor([0.0] * (targets - len(numbers)) + numbers, dtype=torch.float32)
