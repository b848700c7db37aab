"""The frame of a datum: the one place where tokens are shifted by one.

From T tokens, the first T − 1 are the model input and the last T − 1 are the targets. Every per-token field
has the length N = T − 1 of the targets, and position j holds the value of token j + 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossfns.checks import is_real
from lossfns.datum import Datum, ModelInput, cast, tensor_data, token_ids
from lossfns.errors import LossInputError, did_you_mean


def datum_from_tokens(
    tokens: Sequence[int],
    weights: Any = None,
    *,
    prompt_length: int | None = None,
    max_length: int | None = None,
    reduction: str = "none",
    **fields: Any,
) -> Datum:
    """Build a datum from T tokens: input ``tokens[:-1]``, targets ``tokens[1:]``, weights shifted with them.

    Args:
        tokens: T >= 2 token ids.
        weights: ``[T]``, the weight of each token as a target. Give either ``weights`` or ``prompt_length``.
        prompt_length: the number of tokens that get weight 0; the tokens after them get weight 1.
        max_length: the number of tokens to keep at most; later tokens are cut.
        reduction: ``"none"``, or ``"mean"`` to scale the weights to sum to 1.
        fields: further fields, already in the frame of the targets: ``[T − 1]``.

    Raises:
        LossInputError: if an argument is malformed.

    >>> datum = datum_from_tokens([5, 6, 7, 8], prompt_length=2)
    >>> datum.loss_fn_inputs["target_tokens"].data, datum.loss_fn_inputs["weights"].data
    ([6, 7, 8], [0.0, 1.0, 1.0])
    """
    ids = token_ids(tokens, "tokens")
    if (weights is None) == (prompt_length is None):
        fix = "Pass one of them: each determines the weights."
        raise LossInputError("weights", "either weights or prompt_length", "both or neither", fix)
    if prompt_length is not None:
        check_count("prompt_length", prompt_length, 0, len(ids), "It counts the tokens before the response.")
    if max_length is not None:
        check_count("max_length", max_length, 1, None, "It counts the tokens to keep.")
    if prompt_length is not None:
        token_weights = np.arange(len(ids)) >= prompt_length
    else:
        token_weights = to_float32(weights, "weights")
    if token_weights.shape != ids.shape:
        fix = "Weights are given for all tokens, and shifted here, once."
        raise LossInputError("weights", f"{len(ids)} values, one per token", show_size(token_weights), fix)
    kept = len(ids[:max_length])
    if kept < 2:
        raise LossInputError("tokens", "at least 2 tokens", str(kept), "One token has nothing to predict.")
    target_weights = reduce_weights(token_weights[1:kept].astype(np.float32), reduction)
    inputs = {"target_tokens": ids[1:kept], "weights": target_weights}
    for name, value in fields.items():
        # A single number is refused below: its shape is ().
        row = tensor_data(name, value).to_numpy() if np.ndim(value) or hasattr(value, "to_numpy") else np.asarray(value)
        if row.shape[:1] != (len(ids) - 1,):
            fix = "Fields are in the frame of target_tokens; see align_sampler_logprobs."
            raise LossInputError(name, f"{len(ids) - 1} values, one per target", show_size(row), fix)
        inputs[name] = row[: kept - 1]
    return Datum(ModelInput.from_ints(ids[: kept - 1].tolist()), inputs)


def check_count(name: str, value: Any, low: int, high: int | None, fix: str) -> None:
    """Refuse anything but a whole number in [low, high]; ``high`` None is no bound."""
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_whole or value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"{low} to {high}, the number of tokens"
        raise LossInputError(name, expected, repr(value), fix)


def show_size(row: np.ndarray) -> str:
    """Return the number of values of a flat array, or else the shape, for an error message."""
    return str(len(row)) if row.ndim == 1 else f"shape {row.shape}"


def reduce_weights(weights: np.ndarray, reduction: str) -> np.ndarray:
    """Scale the weights to sum to 1 if ``reduction`` is ``"mean"``."""
    if reduction not in ("none", "mean"):
        hint = did_you_mean(reduction, ("none", "mean"))
        raise LossInputError("reduction", "'none' or 'mean'", repr(reduction), hint)
    total = weights.sum()
    return weights / total if reduction == "mean" and total > 0 else weights


def to_float32(values: Any, name: str) -> np.ndarray:
    """Convert numbers of any kind to a float32 NumPy array."""
    values = values.detach().cpu().float().numpy() if isinstance(values, Tensor) else values
    return cast(values.to_numpy() if hasattr(values, "to_numpy") else values, "float32", name)


def datum_from_model_input_weights(
    model_input: Any, weights: Any, max_length: int | None = None, reduction: str = "none"
) -> Datum:
    """Build a datum from a model input of T tokens and ``[T]`` weights, in the form of the Tinker cookbook.

    The other arguments are those of ``datum_from_tokens``.
    """
    return datum_from_tokens(model_input.to_ints(), weights, max_length=max_length, reduction=reduction)


def align_sampler_logprobs(logprobs: Any, targets: int) -> Tensor:
    """Bring a sampler's logprobs into the frame of N targets: float32 ``[N]``, 0 where the sampler gives none.

    Args:
        logprobs: the logprobs of the completion alone (the last C <= N targets), of all N targets, or of all N + 1
            tokens with a leading ``None``. Any further leading ``None``, for tokens of the prompt, becomes 0.
        targets: N, the length of ``target_tokens``.

    Raises:
        LossInputError: if there are too many values, or a ``None`` after the first number.

    >>> align_sampler_logprobs([-0.5, -0.25], targets=4)
    tensor([ 0.0000,  0.0000, -0.5000, -0.2500])
    >>> align_sampler_logprobs([None, -3.0, -2.0, -0.5, -0.25], targets=4)
    tensor([-3.0000, -2.0000, -0.5000, -0.2500])
    """
    if not isinstance(logprobs, (Iterable, Tensor)):
        got, fix = f"a {type(logprobs).__name__}", "Pass the logprobs of one sample."
        raise LossInputError("logprobs", "a list of numbers", got, fix)
    values = list(logprobs.tolist() if isinstance(logprobs, (Tensor, np.ndarray)) else logprobs)
    leading_none = int(len(values) == targets + 1 and values[0] is None)
    if len(values) - leading_none > targets:
        fix = "Pass the number of target_tokens; a row over all tokens starts with None."
        raise LossInputError("logprobs", f"at most {targets} values, or None and {targets}", str(len(values)), fix)
    start = next((i for i, value in enumerate(values) if value is not None), len(values))
    for i, value in enumerate(values[start:], start):
        if not is_real(value):
            expected = "a number after the first number" if value is None else "a number"
            raise LossInputError(f"logprobs[{i}]", expected, repr(value), "Only the prompt may be null.")
    numbers = [float(value) for value in values[start:] if value is not None]
    return torch.tensor([0.0] * (targets - len(numbers)) + numbers, dtype=torch.float32)
