"""The frame of a datum: the one place where tokens are shifted by one.

From T tokens, the first T − 1 are the model input and the last T − 1 are the targets. Every per-token field
has the length N = T − 1 of the targets, and position j holds the value of token j + 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossfns.checks import is_huge, is_real
from lossfns.datum import Datum, ModelInput, cast, tensor_data, token_ids
from lossfns.errors import LossInputError, did_you_mean, show
from lossfns.pack import is_plain, tensor_form


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
        row = np.asarray(value) if is_real(value) else tensor_data(name, value).to_numpy()
        if row.shape[:1] != (len(ids) - 1,):
            fix = "Fields are in the frame of target_tokens; see align_sampler_logprobs."
            raise LossInputError(name, f"{len(ids) - 1} values, one per target", show_size(row), fix)
        inputs[name] = row[: kept - 1]
    return Datum(ModelInput.from_ints(ids[: kept - 1].tolist()), inputs)


def pair_from_tokens(
    prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], *, max_length: int | None = None
) -> list[Datum]:
    """Build the two datums of a preference pair, the chosen side first. The tokens of the answers have weight 1.

    Args:
        prompt: the token ids of the prompt.
        chosen: the token ids of the better answer.
        rejected: the token ids of the worse answer.
        max_length: the number of tokens of prompt and answer to keep at most; later tokens are cut.

    Raises:
        LossInputError: if an argument is malformed.

    >>> pair = pair_from_tokens([5, 6], chosen=[7, 8], rejected=[9])
    >>> [datum.loss_fn_inputs["weights"].data for datum in pair]
    [[0.0, 1.0, 1.0], [0.0, 1.0]]
    """
    head = token_ids(prompt, "prompt").tolist()
    return [
        datum_from_tokens(head + token_ids(answer, name).tolist(), prompt_length=len(head), max_length=max_length)
        for name, answer in (("chosen", chosen), ("rejected", rejected))
    ]


def check_count(name: str, value: Any, low: int, high: int | None, fix: str) -> None:
    """Refuse anything but a whole number in [low, high]; ``high`` None is no bound."""
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_whole or value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"{low} to {high}, the number of tokens"
        raise LossInputError(name, expected, show(value), fix)


def show_size(row: np.ndarray) -> str:
    """Return the number of values of a flat array, or else the shape, for an error message."""
    return str(len(row)) if row.ndim == 1 else f"shape {row.shape}"


def reduce_weights(weights: np.ndarray, reduction: str) -> np.ndarray:
    """Scale the weights to sum to 1 if ``reduction`` is ``"mean"``."""
    if not isinstance(reduction, str) or reduction not in ("none", "mean"):
        hint = did_you_mean(reduction, ("none", "mean"))
        raise LossInputError("reduction", "'none' or 'mean'", show(reduction), hint)
    total = weights.sum()
    return weights / total if reduction == "mean" and total > 0 else weights


def to_float32(values: Any, name: str) -> np.ndarray:
    """Convert numbers of any kind to a float32 NumPy array."""
    if isinstance(values, Tensor):
        if not is_plain(values):
            raise LossInputError(name, "a row of numbers", tensor_form(values), "Pass a dense tensor or a list.")
        values = values.detach().cpu().float().numpy()
    return cast(values, "float32", name)


def datum_from_model_input_weights(
    model_input: Any, weights: Any, max_length: int | None = None, reduction: str = "none"
) -> Datum:
    """Build a datum from a model input of T tokens and ``[T]`` weights, in the form of the Tinker cookbook.

    The other arguments are those of ``datum_from_tokens``.
    """
    if not callable(getattr(model_input, "to_ints", None)):
        fix = "Build it with ModelInput.from_ints."
        raise LossInputError("model_input", "a ModelInput", show(model_input), fix)
    return datum_from_tokens(model_input.to_ints(), weights, max_length=max_length, reduction=reduction)


def datum_from_candidates(
    tokens: Any, candidates: Any, teacher_logprobs: Any, weights: Any = None, *, prompt_length: int | None = None
) -> Datum:
    """Build a datum of K candidates for each position, for ``top_k_forward_kl`` and its family.

    Args:
        tokens: the T tokens of prompt and completion, as the student reads them.
        candidates: ``[T − 1, K]`` token ids: those that the teacher finds most probable at each position, in the frame
            of the targets, so row j is about token j + 1.
        teacher_logprobs: ``[T − 1, K]`` the teacher's logprobs of the candidates. −inf marks an unused slot.
        weights, prompt_length: one of them, as for ``datum_from_tokens``.

    Returns:
        A datum with ``target_tokens``, ``weights`` (0 at unused slots, else those of the positions) and
        ``teacher_logprobs``.

    Raises:
        LossInputError: if the shapes do not fit together.

    >>> datum = datum_from_candidates([5, 6, 7], [[6, 8], [7, 9]], [[-0.5, -1.0], [-0.25, -2.0]], prompt_length=2)
    >>> datum.loss_fn_inputs["weights"].to_numpy().tolist()
    [[0.0, 0.0], [1.0, 1.0]]
    """
    plain = datum_from_tokens(tokens, weights, prompt_length=prompt_length)
    ids, teacher = np.asarray(candidates), np.asarray(to_float32(teacher_logprobs, "teacher_logprobs"))
    length = plain.model_input.length
    if ids.ndim != 2 or len(ids) != length or teacher.shape != ids.shape:
        got = f"shapes {ids.shape} and {teacher.shape}"
        fix = "Row j holds the candidates for token j + 1."
        raise LossInputError("candidates", f"[{length}, K] candidates and teacher_logprobs", got, fix)
    used = ~np.isneginf(teacher)
    of_slots = plain.loss_fn_inputs["weights"].to_numpy()[:, None] * used
    columns = {"weights": of_slots.astype(np.float32), "teacher_logprobs": np.where(used, teacher, 0)}
    fields = {name: tensor_data(name, x) for name, x in {"target_tokens": ids, **columns}.items()}
    return Datum(plain.model_input, fields)


def align_sampler_logprobs(logprobs: Any, targets: int, prompt_length: int | None = None) -> Tensor:
    """Bring a sampler's logprobs into the frame of N targets: float32 ``[N]``, 0 for tokens of the prompt without one.

    The number of values says whether the sampler echoed the prompt. No token of the completion is ever filled in.

    Args:
        logprobs: C = N + 1 − ``prompt_length`` values, those of the completion alone; or, with an echoed prompt, the
            values of all N targets, or of all N + 1 tokens with a leading ``None``. An echoed token of the prompt may
            have a ``None``, too, which becomes 0.
        targets: N, the length of ``target_tokens``.
        prompt_length: the number of tokens of the prompt, 1 to N + 1. It may be left out if all N targets have a
            number, so that there is nothing to fill in.

    Raises:
        LossInputError: if the number of values is none of these, or if a token of the completion has no number.

    >>> align_sampler_logprobs([-0.5, -0.25], targets=4, prompt_length=3)
    tensor([ 0.0000,  0.0000, -0.5000, -0.2500])
    >>> align_sampler_logprobs([None, -3.0, -2.0, -0.5, -0.25], targets=4)
    tensor([-3.0000, -2.0000, -0.5000, -0.2500])
    """
    check_count("targets", targets, 0, None, "It is the length of target_tokens.")
    if prompt_length is not None:
        check_count(
            "prompt_length", prompt_length, 1, targets + 1, "A sampler continues a prompt of at least one token."
        )
    if not isinstance(logprobs, (Iterable, Tensor)) or isinstance(logprobs, (Mapping, Set, str)):
        got, fix = f"a {type(logprobs).__name__}", "Pass the logprobs of one sample."
        raise LossInputError("logprobs", "a list of numbers", got, fix)
    if isinstance(logprobs, Tensor):
        if not is_plain(logprobs):
            raise LossInputError("logprobs", "a flat row of numbers", tensor_form(logprobs), "Pass a dense tensor.")
        logprobs = logprobs.detach().cpu().float().numpy()
    if isinstance(logprobs, np.ndarray):
        if logprobs.ndim != 1:
            got = f"shape {logprobs.shape}"
            raise LossInputError("logprobs", "a flat row of numbers", got, "Pass the logprobs of one sample.")
        logprobs = logprobs.tolist()
    values = list(logprobs)
    completion = None if prompt_length is None else targets + 1 - prompt_length
    # The targets before the first value, and the values before the first target.
    skipped, ahead = (0, 1) if len(values) == targets + 1 and values[0] is None else (targets - len(values), 0)
    if skipped < 0 or (skipped and len(values) != completion):
        known = [f"{targets} values (all targets)", f"None and {targets} (all tokens)"]
        fix = "Values of the completion alone need prompt_length=, which says where it begins."
        if completion is not None:
            known = [f"{completion} values (the completion)", *known]
            fix = "Pass a value for each token of the completion, and the datum's own prompt_length."
        raise LossInputError("logprobs", " or ".join(known), str(len(values)), fix)
    in_prompt = (prompt_length or 1) - 1
    for i, value in enumerate(values[ahead:], ahead):
        is_null = value is None and skipped + i - ahead < in_prompt
        if not is_null and (not is_real(value) or is_huge(value)):
            fix = "Only tokens of the prompt may have None; prompt_length= says which they are."
            raise LossInputError(f"logprobs[{i}]", "a number", show(value), fix)
    row = [0.0] * skipped + [0.0 if value is None else float(value) for value in values[ahead:]]
    return torch.tensor(row, dtype=torch.float32)
