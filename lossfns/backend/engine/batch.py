"""Datums as the model takes them: token ids laid end to end, checked against the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lossfns.backend.model.prefixes import SharedPrefixes, logit_rows, share_prefixes
from lossfns.devices import to_device
from lossfns.errors import LossInputError
from lossfns.pack import as_row, check_data
from lossfns.tokens import TOKENS


@dataclass(frozen=True)
class ModelInputs:
    """The ids that a model reads of each datum, checked.

    Attributes:
        tokens: for each datum the ids of its model input, [N_i].
        targets: for each datum the ids of its targets, [N_i] or [N_i, K]; empty where the model's output is an
            embedding.
    """

    tokens: list[np.ndarray]
    targets: list[np.ndarray]

    def part(self, which: slice) -> ModelInputs:
        """Return the inputs of some of the datums."""
        tokens = self.tokens[which]
        return self if len(tokens) == len(self.tokens) else ModelInputs(tokens, self.targets[which])

    @cached_property
    def shared(self) -> SharedPrefixes:
        """The tokens to compute if common prefixes are computed once."""
        return share_prefixes(self.tokens)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each datum."""
        return [len(ids) for ids in self.tokens]

    @property
    def output_lengths(self) -> list[int]:
        """Output rows of each datum: one for each position with targets, or one embedding."""
        return self.lengths if self.targets else [1] * len(self.tokens)

    @property
    def targets_per_token(self) -> int:
        """K; 1 for targets [N] and for none."""
        return self.targets[0].size // len(self.targets[0]) if self.targets else 1


def inputs_with_targets(data: Sequence[Any], vocabulary: int) -> ModelInputs:
    """Read model inputs and targets; refuse any that do not fit together, or the vocabulary."""
    check_datums(data)
    tokens = token_ids(data, vocabulary)
    targets = [target_ids(datum, vocabulary, i) for i, datum in enumerate(data)]
    for i, (ids, datum_targets) in enumerate(zip(tokens, targets)):
        check_target_shape(ids, datum_targets, targets[0], i)
    return ModelInputs(tokens, targets)


def inputs_without_targets(data: Sequence[Any], vocabulary: int) -> ModelInputs:
    """Read the model inputs alone, for embeddings."""
    check_datums(data)
    return ModelInputs(token_ids(data, vocabulary, empty="Cannot pool embedding from an empty text sequence"), [])


class PackedInputs(NamedTuple):
    """The tokens that a model computes, segment after segment, and the index of each position's output.

    Attributes:
        tokens: ids of all segments, end to end. A segment is a datum without the prefix that it shares with another.
        lengths: tokens of each segment.
        previous: for each segment the token that comes before its first one, or None.
        hidden_rows: [R], for each row of logits the token whose hidden state it reads; for embeddings, the token of
            each position.
        targets: [R] or [R, K], for each row of logits the targets that it scores; None for embeddings.
        inverse: for each position of the datums, end to end, the row of logits that has its output.

        tokens_in_memory: how many tokens of sequences that share nothing take as much memory.

    The indices ``hidden_rows`` and ``inverse`` are None where they would take every row in order.
    """

    tokens: Tensor
    lengths: list[int]
    previous: list[int | None]
    hidden_rows: Tensor | None
    targets: Tensor | None
    inverse: Tensor | None
    tokens_in_memory: int


def pack_inputs(
    inputs: ModelInputs,
    shared: SharedPrefixes,
    device: torch.device,
    result_device: torch.device | None = None,
) -> PackedInputs:
    """Lay the tokens of the datums end to end, on the device of the model.

    Args:
        inputs: the tokens and the targets of the datums.
        shared: the tokens to compute.
        device: the device of the model.
        result_device: the device of ``inverse``, which indexes the logprobs; None is that of the model.
    """

    def index_or_none(index: np.ndarray, index_device: torch.device = device) -> Tensor | None:
        return None if np.array_equal(index, np.arange(len(index))) else to_device(index, index_device)

    ids = np.concatenate(inputs.tokens)
    targets = np.concatenate(inputs.targets) if inputs.targets else None
    rows = inverse = None
    if len(shared.order) < len(ids):
        ids = ids[shared.order]
        if targets is None:
            rows = to_device(shared.inverse, device)
        else:
            scored, inverse_index = logit_rows(shared, targets)
            rows, targets = index_or_none(shared.inverse[scored]), targets[scored]
            inverse = index_or_none(inverse_index, result_device or device)
    on_device = None if targets is None else to_device(targets, device)
    packed = to_device(ids, device), shared.lengths, shared.previous, rows, on_device, inverse
    return PackedInputs(*packed, shared.tokens_in_memory)


def index_or_all(x: Tensor, index: Tensor | None) -> Tensor:
    """Return x[index]; None takes all rows."""
    return x if index is None else x.index_select(0, index)


# Checks


def check_datums(data: Sequence[Any]) -> None:
    """Refuse a batch that is empty or holds anything but datums."""
    check_not_empty(data)
    check_data(data, TOKENS)
    for i, datum in enumerate(data):
        if not isinstance(datum.loss_fn_inputs, Mapping):
            got, fix = f"a {type(datum.loss_fn_inputs).__name__}", "Pass Datum(model_input, {name: values})."
            raise LossInputError("loss_fn_inputs", "a dict", got, fix, datum=i)


def check_not_empty(data: Any) -> None:
    """Refuse a call without a datum, in the services' words."""
    if isinstance(data, (list, tuple)) and not data:
        raise LossInputError("data", "at least one datum", "No data provided", "Skip the call for an empty batch.")


def missing_field(name: str, required: Sequence[str], fix: str, datum: int) -> LossInputError:
    """Return the error for a datum that lacks a required field, in the services' words."""
    return LossInputError("loss_fn_inputs", ", ".join(required), f"missing required field '{name}'", fix, datum=datum)


def token_ids(data: Sequence[Any], vocabulary: int, empty: str = "none") -> list[np.ndarray]:
    """Return the ids [N_i] of each datum's model input; an error reports an input without tokens as ``empty``."""
    return [
        input_ids(getattr(datum, "model_input", None), "model_input", vocabulary, i, empty)
        for i, datum in enumerate(data)
    ]


def input_ids(model_input: Any, name: str, vocabulary: int, i: int | None = None, empty: str = "none") -> np.ndarray:
    """Return the ids [N] of a model input, at least one.

    Args:
        model_input: a ``ModelInput``, of this library or of an SDK.
        name, i: the argument and the index of the datum, for errors.
        vocabulary: the number of ids.
        empty: what an error reports for an input without tokens.
    """
    try:
        ints = model_input.to_ints()
    except Exception as error:
        if isinstance(error, ValueError):
            got, fix = f"{error}", "The local model reads text."
        else:
            got, fix = f"a {type(model_input).__name__}", "Call ModelInput.from_ints(tokens)."
        raise LossInputError(name, "a ModelInput of token ids", got, fix, datum=i) from error
    ids = as_array(ints, name, i)
    if ids.ndim != 1 or len(ids) == 0:
        got = empty if ids.ndim == 1 else f"shape {tuple(ids.shape)}"
        fix = "Start from the end-of-sequence token." if i is None else "Drop the datum."
        raise LossInputError(name, "at least one token", got, fix, datum=i)
    return in_vocabulary(ids, name, vocabulary, i)


def target_ids(datum: Any, vocabulary: int, i: int) -> np.ndarray:
    """Return the ids [N] or [N, K] of a datum's targets."""
    if datum.loss_fn_inputs.get("target_tokens") is None:
        raise missing_field("target_tokens", ["target_tokens"], "Build it with datum_from_tokens.", i)
    ids = as_array(datum.loss_fn_inputs["target_tokens"], "target_tokens", i)
    if ids.ndim not in (1, 2) or ids.size == 0:
        fix = "One id for each input token, or K of them."
        raise LossInputError("target_tokens", "[N], or [N, K] for K targets", f"shape {ids.shape}", fix, datum=i)
    return in_vocabulary(ids, "target_tokens", vocabulary, i)


def as_array(value: Any, name: str, i: int | None) -> np.ndarray:
    """Return a datum's values as an array."""
    row = as_row(value, name, i)
    if isinstance(row, Tensor):
        row = row.cpu()
        row = (row.double() if row.is_floating_point() else row).numpy()  # numpy has no bfloat16
    return row


def in_vocabulary(ids: np.ndarray, name: str, vocabulary: int, i: int | None) -> np.ndarray:
    """Return ids as int64; refuse any that are not ids of the vocabulary."""
    if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocabulary:
        got = f"{ids.dtype}" if ids.dtype.kind not in "iu" else f"ids from {ids.min()} to {ids.max()}"
        fix = "Use the tokenizer of this model."
        raise LossInputError(name, f"integers in [0, {vocabulary})", got, fix, datum=i)
    return ids.astype(np.int64, copy=False)


def check_target_shape(tokens: np.ndarray, targets: np.ndarray, first_targets: np.ndarray, datum: int) -> None:
    """Require one row of targets for each input token, and one K for the whole batch."""
    if len(targets) != len(tokens):
        fix = "model_input is tokens[:-1] and target_tokens is tokens[1:]."
        expected = f"{len(tokens)} rows (the length of model_input)"
        raise LossInputError("target_tokens", expected, str(len(targets)), fix, datum=datum)
    if targets.shape[1:] != first_targets.shape[1:]:
        got = f"shape {targets.shape}, while datum[0] has {first_targets.shape}"
        raise LossInputError("target_tokens", "one K for the whole call", got, "Pad K with weight 0.", datum=datum)
