"""Datums as the model takes them: token ids laid end to end, checked against the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lossfns import LossInputError, TensorData
from lossfns.pack import as_row, check_data
from lossfns.tokens import TOKENS


class Batch(NamedTuple):
    """``inputs`` [N] and ``targets`` [N] or [N, K], datum after datum, and the rows of each; the model's head [V, D].

    ``wrap`` is the datums' own class of tensors, in which results go back.
    """

    inputs: Tensor
    targets: Tensor
    lengths: list[int]
    head: Tensor
    wrap: Any


def pack_datums(data: Sequence[Any], model: nn.Module) -> Batch:
    """Datums to flat tensors on the model's device; refuses what does not fit together, or the vocabulary."""
    check_datums(data)
    head: Tensor = model.head  # type: ignore[assignment]  # once: with an adapter it is a product of matrices
    tokens = [token_ids(datum, len(head), i) for i, datum in enumerate(data)]
    targets = [target_ids(datum, len(head), i) for i, datum in enumerate(data)]
    for i, (ids, row) in enumerate(zip(tokens, targets)):
        check_frame(ids, row, targets[0], i)
    return Batch(flat(tokens, model), flat(targets, model), [len(ids) for ids in tokens], head, wrapper(data))


def pack_tokens(data: Sequence[Any], model: nn.Module) -> tuple[Tensor, list[int]]:
    """The model inputs alone, for losses that have no targets: ids [N], and how many each datum has."""
    check_datums(data)
    vocabulary = len(model.head)  # type: ignore[arg-type]
    empty = "Cannot pool embedding from an empty text sequence"
    tokens = [token_ids(datum, vocabulary, i, empty) for i, datum in enumerate(data)]
    return flat(tokens, model), [len(ids) for ids in tokens]


def wrapper(data: Sequence[Any]) -> Any:
    """The class of the datums' tensors: ours, or an SDK's, whose Datum takes no other."""
    kinds = (type(value) for datum in data for value in datum.loss_fn_inputs.values())
    return next((kind for kind in kinds if kind.__name__ == "TensorData" and hasattr(kind, "from_numpy")), TensorData)


def flat(rows: Sequence[np.ndarray], model: nn.Module) -> Tensor:
    return torch.from_numpy(np.concatenate(rows)).to(next(model.parameters()).device)


def check_datums(data: Sequence[Any]) -> None:
    check_some(data)
    check_data(data, TOKENS)
    for i, datum in enumerate(data):
        if not isinstance(datum.loss_fn_inputs, Mapping):
            got, fix = f"a {type(datum.loss_fn_inputs).__name__}", "Pass Datum(model_input, {name: values})."
            raise LossInputError("loss_fn_inputs", "a dict", got, fix, datum=i)


def check_some(data: Any) -> None:
    """Refuse a call without a datum, in the services' words."""
    if isinstance(data, (list, tuple)) and not data:
        raise LossInputError("data", "at least one datum", "No data provided", "Skip the call for an empty batch.")


def missing(name: str, required: Sequence[str], fix: str, datum: int) -> LossInputError:
    """A required field that a datum lacks, in the services' words."""
    return LossInputError("loss_fn_inputs", ", ".join(required), f"missing required field '{name}'", fix, datum=datum)


def token_ids(datum: Any, vocabulary: int, i: int, empty: str = "none") -> np.ndarray:
    """The ids [N] of a datum's model input; ``empty`` says what it means that there are none."""
    return input_ids(getattr(datum, "model_input", None), "model_input", vocabulary, i, empty)


def input_ids(given: Any, name: str, vocabulary: int, i: int | None = None, empty: str = "none") -> np.ndarray:
    """The ids [N] of a model input, at least one; an error calls it ``name``."""
    try:
        ints = given.to_ints()
    except Exception as error:
        if isinstance(error, ValueError):
            got, fix = f"{error}", "The local model reads text."
        else:
            got, fix = f"a {type(given).__name__}", "Call ModelInput.from_ints(tokens)."
        raise LossInputError(name, "a ModelInput of token ids", got, fix, datum=i) from error
    ids = host_row(ints, name, i)
    if ids.ndim != 1 or len(ids) == 0:
        got = empty if ids.ndim == 1 else f"shape {tuple(ids.shape)}"
        fix = "Start from the end-of-sequence token." if i is None else "Drop the datum."
        raise LossInputError(name, "at least one token", got, fix, datum=i)
    return in_vocabulary(ids, name, vocabulary, i)


def target_ids(datum: Any, vocabulary: int, i: int) -> np.ndarray:
    """The targets [N] or [N, K] of a datum."""
    if datum.loss_fn_inputs.get("target_tokens") is None:
        raise missing("target_tokens", ["target_tokens"], "Build it with datum_from_tokens.", i)
    ids = host_row(datum.loss_fn_inputs["target_tokens"], "target_tokens", i)
    if ids.ndim not in (1, 2) or ids.size == 0:
        fix = "One id for each input token, or K of them."
        raise LossInputError("target_tokens", "[N], or [N, K] for K targets", f"shape {ids.shape}", fix, datum=i)
    return in_vocabulary(ids, "target_tokens", vocabulary, i)


def host_row(value: Any, name: str, i: int | None) -> np.ndarray:
    """A datum's values as an array."""
    row = as_row(value, name, i)
    if isinstance(row, Tensor):
        row = row.cpu()
        row = (row.double() if row.is_floating_point() else row).numpy()  # numpy has no bfloat16
    return row


def in_vocabulary(ids: np.ndarray, name: str, vocabulary: int, i: int | None) -> np.ndarray:
    if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocabulary:
        got = f"{ids.dtype}" if ids.dtype.kind not in "iu" else f"ids from {ids.min()} to {ids.max()}"
        fix = "Use the tokenizer of this model."
        raise LossInputError(name, f"integers in [0, {vocabulary})", got, fix, datum=i)
    return ids.astype(np.int64, copy=False)


def check_frame(tokens: np.ndarray, targets: np.ndarray, first: np.ndarray, datum: int) -> None:
    """One target row for each input token, one K for the whole batch."""
    if len(targets) != len(tokens):
        fix = "model_input is tokens[:-1] and target_tokens is tokens[1:]."
        expected = f"{len(tokens)} rows (the length of model_input)"
        raise LossInputError("target_tokens", expected, str(len(targets)), fix, datum=datum)
    if targets.shape[1:] != first.shape[1:]:
        got = f"shape {targets.shape}, while datum[0] has {first.shape}"
        raise LossInputError("target_tokens", "one K for the whole call", got, "Pad K with weight 0.", datum=datum)
