"""Sampling requests, on the sampling client of their session."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from lossfns.backend.client.sampling import LocalSamplingClient
from lossfns.backend.types import SamplingParams
from lossfns.datum import TensorData
from lossfns.errors import LossInputError, show
from lossfns.server.results import NO_LOGPROB, Samples, Top
from lossfns.server.samplers import Sampler
from lossfns.server.wire import TokenInput, field, numbers, only, sparse_tensor, tokens_of_json

SAMPLE_FIELDS = (
    "num_samples",
    "prompt",
    "sampling_params",
    "base_model",
    "model_path",
    "sampling_session_id",
    "seq_id",
    "prompt_logprobs",
    "topk_prompt_logprobs",
    "topk_sample_logprobs",
    "target_prompt_logprobs",
    "prompt_alt_tokens_k",
    "prompt_logprobs_last_n",
    "record_stability_info",
)
"""The fields of a request. ``endpoints.asample`` reads the session and the number of samples."""


async def sample(sampler: Sampler, client: LocalSamplingClient, count: int, body: dict[str, Any]) -> Samples:
    """Run a request.

    Raises:
        LossInputError: for settings out of range, and for results that this server does not compute.
    """
    for name in ("prompt_alt_tokens_k", "record_stability_info", "base_model", "model_path"):
        if body.get(name):
            raise LossInputError(name, "nothing", show(body[name]), "Leave it out: this server does not read it.")
    prompt = TokenInput(tokens_of_json(field(body, "prompt", dict), "prompt"))
    params = sampling_params(field(body, "sampling_params", dict))
    scored = last_scored(body, len(prompt.ids))
    top_prompt, top_sample = (field(body, f"topk_{name}_logprobs", int, 0) for name in ("prompt", "sample"))
    targets = target_tokens(field(body, "target_prompt_logprobs", dict, None))
    response = await sampler.sample(client, prompt, count, params)
    if field(body, "prompt_logprobs", bool, False):
        unscored: list[float | None] = [None] * (len(prompt.ids) - scored)
        response = replace(response, prompt_logprobs=unscored + (await client.compute_logprobs(prompt))[-scored:])
    sampled = [sequence.tokens for sequence in response.sequences]
    return Samples(
        response,
        await top_of_prompt(client, prompt, top_prompt, scored) if top_prompt else None,
        [await top_of_sample(client, prompt, tokens, top_sample) for tokens in sampled] if top_sample else None,
        None if targets is None else await target_logprobs(client, prompt, *targets),
    )


def sampling_params(body: dict[str, Any]) -> SamplingParams:
    kinds: dict[str, Any] = {"max_tokens": int, "seed": int, "stop": (str, list), "temperature": (int, float),
                             "top_k": int, "top_p": (int, float)}  # fmt: skip
    only(body, kinds)
    return SamplingParams(**{k: field(body, k, kind) for k, kind in kinds.items() if body.get(k) is not None})


def last_scored(body: dict[str, Any], length: int) -> int:
    """Return how many tokens of the prompt are scored: all, or the last ``prompt_logprobs_last_n``."""
    last = field(body, "prompt_logprobs_last_n", int, None)
    if last is None:
        return length
    if not body.get("prompt_logprobs") or not 1 <= last < length:
        expected = f"from 1 to {length - 1}, with prompt_logprobs"
        raise LossInputError("prompt_logprobs_last_n", expected, str(last), "Leave it out to score the whole prompt.")
    return int(last)


async def top_of_prompt(client: LocalSamplingClient, prompt: TokenInput, k: int, scored: int) -> Top:
    ids, logprobs = (x.numpy() for x in await client.top_logprobs(prompt, k))
    skipped = max(1, len(prompt.ids) - scored)  # the first token has no context
    filled = Top(np.zeros((len(prompt.ids), k), np.int64), np.full((len(prompt.ids), k), NO_LOGPROB, np.float32))
    filled.ids[skipped:], filled.logprobs[skipped:] = ids[skipped - 1 :], logprobs[skipped - 1 :]
    return filled


async def top_of_sample(client: LocalSamplingClient, prompt: TokenInput, tokens: list[int], k: int) -> Top:
    sequence = TokenInput(np.concatenate([prompt.ids, np.array(tokens, prompt.ids.dtype)]))
    ids, logprobs = (x.numpy()[len(prompt.ids) - 1 :] for x in await client.top_logprobs(sequence, k))
    return Top(ids, logprobs)


NO_TARGET = "Send -1 where no token is named."


def target_tokens(tensor: dict[str, Any] | None) -> tuple[np.ndarray, dict[str, Any]] | None:
    """Return the ids [T - 1, K] that a request names, -1 where it names none, and the tensor that named them."""
    if tensor is None:
        return None
    place = "target_prompt_logprobs"
    shape = numbers(tensor.get("shape"), "int64", f"{place}.shape").tolist()
    values = numbers(tensor.get("data"), "int64", f"{place}.data")
    if tensor.get("sparse_crow_indices") is not None:
        crow, col = (numbers(tensor.get(f"sparse_{x}_indices"), "int64", f"{place}.{x}") for x in ("crow", "col"))
        # The dense tensor has 0 in its empty places: moved by 1, these become -1.
        return sparse_tensor("int64", values + 1, crow, col, shape, place).to_numpy() - 1, tensor
    if len(shape) != 2 or min(shape) < 1 or shape[0] * shape[1] != len(values):
        raise LossInputError(place, "[len(prompt) - 1, K] token ids", f"shape {shape}", NO_TARGET)
    return values.reshape(shape), tensor


async def target_logprobs(
    client: LocalSamplingClient, prompt: TokenInput, tokens: np.ndarray, tensor: dict[str, Any]
) -> TensorData:
    """Return the logprobs of the named tokens in their layout, 0 where none is named."""
    requested = tokens >= 0
    if not requested.any() or tokens.min() < -1:
        raise LossInputError("target_prompt_logprobs", "token ids, at least one", show(tokens.tolist()), NO_TARGET)
    logprobs = (await client.target_logprobs(prompt, np.maximum(tokens, 0))).numpy() * requested
    crow, col = tensor.get("sparse_crow_indices"), tensor.get("sparse_col_indices")
    if crow is None:
        return TensorData.from_numpy(logprobs)
    rows = np.repeat(np.arange(len(tokens)), np.diff(crow))
    return TensorData(logprobs[rows, col], "float32", list(tokens.shape), crow, col)
