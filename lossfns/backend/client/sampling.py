"""The sampling client: continuations and logprobs from a copy of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lossfns.backend.engine.batch import input_ids
from lossfns.backend.engine.ranks import Ranks, SingleProcess
from lossfns.backend.futures import APIFuture, Resolved, Worker, async_result
from lossfns.backend.model.generate import Sample, generate
from lossfns.backend.types import SampledSequence, SampleResponse, SamplingParams
from lossfns.errors import LossInputError
from lossfns.logprobs.linear import model_logprobs


class LocalSamplingClient(Resolved):
    """Samples from a copy of a model's weights. Under a mesh, rank 0 draws and all ranks get what it drew.

    Training clients and service clients create it. Do not train its ``model``.

    Args:
        model: a module with ``forward``, ``head`` [V, D], ``prefill`` and ``step``.
        tokenizer: encodes stop strings, and is returned by ``get_tokenizer``.
        ranks: the processes that make the same calls; None means only this process.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, ranks: SingleProcess | Ranks | None = None) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._vocabulary = len(model.head)  # type: ignore[arg-type]
        ranks = ranks or SingleProcess()
        self._on_rank_zero = ranks.on_rank_zero  # not the ranks: a SingleProcess holds the model in training
        self._worker = Worker(ranks.thread, ranks.call)

    def sample(
        self, prompt: Any, num_samples: int, sampling_params: Any, include_prompt_logprobs: bool = False
    ) -> APIFuture[SampleResponse]:
        """Sample continuations of one prompt.

        Args:
            prompt: a model input of at least one token.
            num_samples: how many continuations.
            sampling_params: ``SamplingParams``, or any object with the same attributes.
            include_prompt_logprobs: whether to return the logprobs of the prompt's own tokens as well.

        The future raises LossInputError for tokens outside of the vocabulary and for settings out of range.
        """
        return self._submit(self._sample_one, prompt, num_samples, sampling_params, include_prompt_logprobs)

    def sample_batch(
        self, prompts: Sequence[Any], num_samples: int, sampling_params: Any
    ) -> APIFuture[list[SampleResponse]]:
        """Sample continuations of many prompts at once, which is much faster than one by one.

        Args:
            prompts: a list of model inputs.
            num_samples, sampling_params: as in ``sample``, for each prompt.

        The result has one response for each prompt, in order. Errors are those of ``sample``.
        """
        return self._submit(self._sample, prompts, num_samples, sampling_params)

    def compute_logprobs(self, prompt: Any) -> APIFuture[list[float | None]]:
        """Compute the logprob of each token of a prompt, given those before it. The first is None.

        Args:
            prompt: a model input of at least one token.

        The future raises LossInputError for tokens outside of the vocabulary.
        """
        return self._submit(self._compute_logprobs, prompt)

    def get_tokenizer(self) -> Any:
        """Return the tokenizer of the client that made this one, or None."""
        return self._tokenizer

    sample_async = async_result(sample)
    sample_batch_async = async_result(sample_batch)
    compute_logprobs_async = async_result(compute_logprobs)

    # Run by the worker

    def _submit(self, request: Any, *args: Any) -> APIFuture[Any]:
        return self._worker.submit(self._on_rank_zero, request, *args)

    def _sample_one(self, prompt: Any, num_samples: int, params: Any, with_prompt: bool) -> SampleResponse:
        (response,) = self._sample([prompt], num_samples, params)
        return replace(response, prompt_logprobs=self._compute_logprobs(prompt)) if with_prompt else response

    def _sample(self, prompts: Sequence[Any], num_samples: int, params: Any) -> list[SampleResponse]:
        if not all(hasattr(params, name) for name in SamplingParams.__dataclass_fields__):
            fix = "Pass SamplingParams(max_tokens=...)."
            raise LossInputError("sampling_params", "SamplingParams", f"a {type(params).__name__}", fix)
        max_tokens = SamplingParams.max_tokens if params.max_tokens is None else params.max_tokens
        check_integer(
            "num_samples", num_samples, 1, LARGEST, "At least one is needed, and more would not fit in memory."
        )
        check_integer("max_tokens", max_tokens, 1, LARGEST, "At least one is needed, and more would not fit in memory.")
        check_integer("top_k", params.top_k, -1, LARGEST, "-1 keeps all tokens.")
        if params.seed is not None:
            check_integer("seed", params.seed, -(2**63), 2**63 - 1, "None draws from torch's own random numbers.")
        if not isinstance(prompts, (list, tuple)):
            got, fix = f"a {type(prompts).__name__}", "Pass [prompt] for one."
            raise LossInputError("prompts", "a list of prompts", got, fix)
        ids = [row for prompt in prompts for row in [self._ids(prompt)] * num_samples]
        stop_sequences, stop_ids = find_stops(params.stop, self._tokenizer, self._vocabulary)
        samples = generate(
            self.model,  # type: ignore[arg-type]
            ids,
            max_tokens=max_tokens,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            stop=stop_ids,
            seed=params.seed,
        )
        ended = (end_at_stop(sample, stop_sequences) for sample in samples)
        sequences = [SampledSequence(s.stop_reason, s.tokens, s.logprobs) for s in ended]
        starts = range(0, len(sequences), num_samples)
        return [SampleResponse(sequences[i : i + num_samples]) for i in starts]

    def _ids(self, prompt: Any) -> list[int]:
        """Return the prompt's tokens; refuse an empty prompt and tokens outside of the vocabulary."""
        ids: list[int] = input_ids(prompt, "prompt", self._vocabulary, empty="no token").tolist()
        return ids

    @torch.inference_mode()
    def _compute_logprobs(self, prompt: Any) -> list[float | None]:
        ids = torch.tensor(self._ids(prompt), device=next(self.model.parameters()).device)
        hidden = self.model(ids[:-1], [len(ids) - 1]) if len(ids) > 1 else None
        predicted = [] if hidden is None else model_logprobs(self.model, hidden, ids[1:]).tolist()
        return [None, *predicted]


LARGEST = 2**20
"""The largest number of samples of a prompt, of tokens of a sample, and the largest ``top_k``."""


def check_integer(name: str, value: Any, low: int, high: int, fix: str) -> None:
    """Refuse anything but an integer in [low, high]."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise LossInputError(name, f"a whole number from {low} to {high}", repr(value), fix)


def find_stops(stop: Any, tokenizer: Any, vocabulary: int) -> tuple[list[list[int]], list[int]]:
    """Return the stop sequences of several tokens, and the stop tokens: stops of one token, and the tokenizer's EOS."""
    stops = [] if stop is None else [stop] if isinstance(stop, (str, int)) else stop
    if not isinstance(stops, (list, tuple)) or not all(isinstance(s, (str, int)) for s in stops):
        got, fix = f"a {type(stop).__name__}", "Pass [id, ...], [text, ...] or one of them."
        raise LossInputError("stop", "token ids or strings", got, fix)
    if any(isinstance(s, str) for s in stops) and tokenizer is None:
        raise LossInputError("stop", "token ids, without a tokenizer", "strings", "Pass tokenizer= to the client.")
    for s in stops:
        if not isinstance(s, str):
            check_integer("stop", s, 0, vocabulary - 1, "Use the tokenizer of this model.")
    sequences = [tokenizer.encode(s, add_special_tokens=False) if isinstance(s, str) else [s] for s in stops]
    end = getattr(tokenizer, "eos_token_id", None)
    stop_tokens = [s[0] for s in sequences if len(s) == 1]
    if end is not None:
        stop_tokens.append(end)
    return [s for s in sequences if len(s) > 1], stop_tokens


def end_at_stop(sample: Sample, stop_sequences: Sequence[Sequence[int]]) -> Sample:
    """Cut a sample after its first stop sequence; return a sample without one as it is."""
    for end in range(1, len(sample.tokens) + 1):
        if any(sample.tokens[max(0, end - len(s)) : end] == list(s) for s in stop_sequences):
            return Sample(sample.tokens[:end], sample.logprobs[:end], "stop")
    return sample
