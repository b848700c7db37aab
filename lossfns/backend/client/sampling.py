"""The sampling half of a hosted service: continuations and logprobs from a snapshot of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lossfns.backend.engine.batch import input_ids
from lossfns.backend.engine.ranks import Alone, Ranks
from lossfns.backend.futures import APIFuture, Ready, Worker, awaited
from lossfns.backend.model.generate import Sample, generate
from lossfns.backend.types import SampledSequence, SampleResponse, SamplingParams
from lossfns.errors import LossInputError
from lossfns.logprobs.linear import model_logprobs


class LocalSamplingClient(Ready):
    """Samples from a snapshot of a model; under a mesh rank 0 draws them, for all."""

    def __init__(self, model: nn.Module, tokenizer: Any = None, ranks: Alone | Ranks | None = None) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._vocabulary = len(model.head)  # type: ignore[arg-type]
        ranks = ranks or Alone()
        self._worker = Worker(ranks.line, partial(ranks.call, ranks.first))

    def sample(
        self, prompt: Any, num_samples: int, sampling_params: Any, include_prompt_logprobs: bool = False
    ) -> APIFuture[SampleResponse]:
        """``num_samples`` continuations of one prompt, and the prompt's own logprobs if they are asked for."""
        return self._worker.submit(self._sample_one, prompt, num_samples, sampling_params, include_prompt_logprobs)

    def sample_batch(
        self, prompts: Sequence[Any], num_samples: int, sampling_params: Any
    ) -> APIFuture[list[SampleResponse]]:
        """The same for many prompts at once, which is much faster than one by one."""
        return self._worker.submit(self._sample, prompts, num_samples, sampling_params)

    def compute_logprobs(self, prompt: Any) -> APIFuture[list[float | None]]:
        """The logprob of each token of the prompt, ``None`` first: nothing predicts it."""
        return self._worker.submit(self._compute_logprobs, prompt)

    def get_tokenizer(self) -> Any:
        """The training client's."""
        return self._tokenizer

    sample_async = awaited(sample)
    sample_batch_async = awaited(sample_batch)
    compute_logprobs_async = awaited(compute_logprobs)

    def _sample_one(self, prompt: Any, num_samples: int, params: Any, with_prompt: bool) -> SampleResponse:
        (response,) = self._sample([prompt], num_samples, params)
        return replace(response, prompt_logprobs=self._compute_logprobs(prompt)) if with_prompt else response

    def _sample(self, prompts: Sequence[Any], num_samples: int, params: Any) -> list[SampleResponse]:
        if not all(hasattr(params, name) for name in SamplingParams.__dataclass_fields__):
            fix = "Pass SamplingParams(max_tokens=...)."
            raise LossInputError("sampling_params", "SamplingParams", f"a {type(params).__name__}", fix)
        max_tokens = SamplingParams.max_tokens if params.max_tokens is None else params.max_tokens
        check_whole("num_samples", num_samples, 1, MOST, "Nothing would be sampled, or nothing would hold it.")
        check_whole("max_tokens", max_tokens, 1, MOST, "Nothing would be sampled, or nothing would hold it.")
        check_whole("top_k", params.top_k, -1, MOST, "-1 keeps all tokens.")
        if params.seed is not None:
            check_whole("seed", params.seed, -(2**63), 2**63 - 1, "None draws from torch's own random numbers.")
        if not isinstance(prompts, (list, tuple)):
            got, fix = f"a {type(prompts).__name__}", "Pass [prompt] for one."
            raise LossInputError("prompts", "a list of prompts", got, fix)
        ids = [row for prompt in prompts for row in [self._ids(prompt)] * num_samples]
        strings, stop_ids = stops(params.stop, self._tokenizer, self._vocabulary)
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
        sequences = [SampledSequence(s.stop_reason, s.tokens, s.logprobs) for s in (cut(s, strings) for s in samples)]
        starts = range(0, len(sequences), num_samples)
        return [SampleResponse(sequences[i : i + num_samples]) for i in starts]

    def _ids(self, prompt: Any) -> list[int]:
        """The prompt's tokens, at least one, all in the vocabulary."""
        ids: list[int] = input_ids(prompt, "prompt", self._vocabulary, empty="no token").tolist()
        return ids

    @torch.inference_mode()
    def _compute_logprobs(self, prompt: Any) -> list[float | None]:
        ids = torch.tensor(self._ids(prompt), device=next(self.model.parameters()).device)
        hidden = self.model(ids[:-1], [len(ids) - 1]) if len(ids) > 1 else None
        known = [] if hidden is None else model_logprobs(self.model, hidden, ids[1:]).tolist()
        return [None, *known]


MOST = 2**20
"""The most samples of a prompt, or tokens of a sample."""


def check_whole(name: str, value: Any, low: int, high: int, fix: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise LossInputError(name, f"a whole number from {low} to {high}", repr(value), fix)


def stops(stop: Any, tokenizer: Any, vocabulary: int) -> tuple[list[list[int]], list[int]]:
    """Stop sequences of several tokens, and single stop tokens (the tokenizer's end of sequence among them)."""
    given = [] if stop is None else [stop] if isinstance(stop, (str, int)) else stop
    if not isinstance(given, (list, tuple)) or not all(isinstance(s, (str, int)) for s in given):
        got, fix = f"a {type(stop).__name__}", "Pass [id, ...], [text, ...] or one of them."
        raise LossInputError("stop", "token ids or strings", got, fix)
    if any(isinstance(s, str) for s in given) and tokenizer is None:
        raise LossInputError("stop", "token ids, without a tokenizer", "strings", "Pass tokenizer= to the client.")
    for s in given:
        if not isinstance(s, str):
            check_whole("stop", s, 0, vocabulary - 1, "Use the tokenizer of this model.")
    sequences = [tokenizer.encode(s, add_special_tokens=False) if isinstance(s, str) else [s] for s in given]
    end = getattr(tokenizer, "eos_token_id", None)
    singles = [s[0] for s in sequences if len(s) == 1] + [end] * (end is not None)
    return [s for s in sequences if len(s) > 1], singles


def cut(sample: Sample, sequences: Sequence[Sequence[int]]) -> Sample:
    """The sample up to the end of the first stop sequence in it."""
    for end in range(1, len(sample.tokens) + 1):
        if any(sample.tokens[max(0, end - len(s)) : end] == list(s) for s in sequences):
            return Sample(sample.tokens[:end], sample.logprobs[:end], "stop")
    return sample
