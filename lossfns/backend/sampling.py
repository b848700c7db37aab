"""The sampling half of a hosted service: continuations and logprobs from a snapshot of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lossfns import LossInputError
from lossfns.backend.futures import APIFuture, Ready, Worker, awaited
from lossfns.backend.logprobs import linear_logprobs
from lossfns.backend.sampler import Sample, generate
from lossfns.backend.types import SampledSequence, SampleResponse, SamplingParams


class LocalSamplingClient(Ready):
    """Samples from a snapshot of a model."""

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._vocabulary = len(model.head)  # type: ignore[arg-type]
        self._worker = Worker()

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
        check_count("num_samples", num_samples)
        check_count("max_tokens", max_tokens)
        ids = [self._ids(prompt) for prompt in prompts for _ in range(num_samples)]
        strings, stop_ids = stops(params.stop, self._tokenizer)
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
        if not hasattr(prompt, "to_ints"):
            fix = "Call ModelInput.from_ints(tokens)."
            raise LossInputError("prompt", "a ModelInput", f"a {type(prompt).__name__}", fix)
        ids: list[int] = prompt.to_ints()
        if not ids or not 0 <= min(ids) <= max(ids) < self._vocabulary:
            got = f"ids from {min(ids)} to {max(ids)}" if ids else "no token"
            expected, fix = f"tokens in [0, {self._vocabulary})", "Use the tokenizer of this model."
            raise LossInputError("prompt", expected, got, fix)
        return ids

    @torch.inference_mode()
    def _compute_logprobs(self, prompt: Any) -> list[float | None]:
        ids = torch.tensor(self._ids(prompt), device=next(self.model.parameters()).device)
        hidden = self.model(ids[:-1], [len(ids) - 1]) if len(ids) > 1 else None
        known = [] if hidden is None else linear_logprobs(hidden, self.model.head, ids[1:]).tolist()  # type: ignore[arg-type]
        return [None, *known]


def check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise LossInputError(name, "a whole number of at least 1", repr(value), "Nothing would be sampled.")


def stops(stop: Any, tokenizer: Any) -> tuple[list[list[int]], list[int]]:
    """Stop sequences of several tokens, and single stop tokens (the tokenizer's end of sequence among them)."""
    given = [stop] if isinstance(stop, (str, int)) else list(stop or [])
    sequences = [tokenizer.encode(s) if isinstance(s, str) else [s] for s in given]
    end = getattr(tokenizer, "eos_token_id", None)
    singles = [s[0] for s in sequences if len(s) == 1] + [end] * (end is not None)
    return [s for s in sequences if len(s) > 1], singles


def cut(sample: Sample, sequences: Sequence[Sequence[int]]) -> Sample:
    """The sample up to the end of the first stop sequence in it."""
    for end in range(1, len(sample.tokens) + 1):
        if any(sample.tokens[max(0, end - len(s)) : end] == list(s) for s in sequences):
            return Sample(sample.tokens[:end], sample.logprobs[:end], "stop")
    return sample
