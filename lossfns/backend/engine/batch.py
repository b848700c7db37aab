"""Datums as the model takes them: token ids laid end to end, checked against the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lossfns.backend.model.prefixes import SharedPrefixes, head_rows
from lossfns.datum import TensorData
from lossfns.errors import LossInputError
from lossfns.pack import as_row, check_data
from lossfns.tokens import TOKENS


class Rows(NamedTuple):
    """What datums give the model, checked: ids [N_i] of each, and its ``targets`` [N_i] or [N_i, K], if there are any.

    ``wrap`` is the datums' own class of tensors, in which results go back.
    """

    tokens: list[np.ndarray]
    targets: list[np.ndarray]
    wrap: Any

    def part(self, which: slice) -> Rows:
        return Rows(self.tokens[which], self.targets[which], self.wrap)

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.tokens]

    @property
    def counts(self) -> list[int]:
        """How many values each datum has: one for each target, or an embedding."""
        return self.lengths if self.targets else [1] * len(self.tokens)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each datum's logprobs."""
        return [row.shape for row in self.targets]

    @property
    def longest(self) -> int:
        """The most tokens of a datum."""
        return max(self.lengths)

    @property
    def choices(self) -> int:
        """Targets of each token, K; 1 where there are none."""
        return self.targets[0].size // len(self.targets[0]) if self.targets else 1


def with_targets(data: Sequence[Any], vocabulary: int) -> Rows:
    """Model inputs and targets; refuses what does not fit together, or the vocabulary."""
    check_datums(data)
    tokens = [token_ids(datum, vocabulary, i) for i, datum in enumerate(data)]
    targets = [target_ids(datum, vocabulary, i) for i, datum in enumerate(data)]
    for i, (ids, row) in enumerate(zip(tokens, targets)):
        check_frame(ids, row, targets[0], i)
    return Rows(tokens, targets, wrapper(data))


def without_targets(data: Sequence[Any], vocabulary: int) -> Rows:
    """The model inputs alone, for losses that have no targets."""
    check_datums(data)
    empty = "Cannot pool embedding from an empty text sequence"
    return Rows([token_ids(datum, vocabulary, i, empty) for i, datum in enumerate(data)], [], wrapper(data))


class Batch(NamedTuple):
    """Tokens as the model takes them, segment after segment, and where the values of the datums come from.

    A prefix that datums have in common is a segment of its own (``share_prefixes``). Head row r reads the hidden
    state of token ``read[r]`` and scores ``targets[r]``; position n of the datums takes head row ``spread[n]``.
    None stands for all of them, in order.
    """

    inputs: Tensor
    lengths: list[int]
    parents: list[int | None]
    read: Tensor | None
    targets: Tensor | None
    spread: Tensor | None


def batch_of(
    rows: Rows, share_prefixes: Callable[[Sequence[np.ndarray]], SharedPrefixes], device: torch.device
) -> Batch:
    """The datums' tokens laid end to end, as ``share_prefixes`` finds what they have in common."""

    def moved(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(device)

    def unless_all(index: np.ndarray) -> Tensor | None:
        return None if np.array_equal(index, np.arange(len(index))) else moved(index)

    shared = share_prefixes(rows.tokens)
    inputs = moved(np.concatenate(rows.tokens)[shared.order])
    if not rows.targets:
        return Batch(inputs, shared.lengths, shared.parents, unless_all(shared.inverse), None, None)
    targets = np.concatenate(rows.targets)
    read, spread = head_rows(shared.inverse, targets)
    if len(read) < len(spread):
        targets = targets[np.unique(spread, return_index=True)[1]]
    return Batch(inputs, shared.lengths, shared.parents, unless_all(read), moved(targets), unless_all(spread))


def apart(tokens: Sequence[np.ndarray]) -> SharedPrefixes:
    """Every sequence by itself, for a model that cannot continue a segment."""
    every = np.arange(sum(map(len, tokens)))
    return SharedPrefixes(every, [len(ids) for ids in tokens], [None] * len(tokens), every)


def wrapper(data: Sequence[Any]) -> Any:
    """The class of the datums' tensors: ours, or an SDK's, whose Datum takes no other."""
    kinds = (type(value) for datum in data for value in datum.loss_fn_inputs.values())
    return next((kind for kind in kinds if kind.__name__ == "TensorData" and hasattr(kind, "from_numpy")), TensorData)


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
