"""The sampling client: continuations and logprobs from a copy of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lossfns.backend.client.requests import check_integer
from lossfns.backend.engine.batch import as_array, in_vocabulary, input_ids
from lossfns.backend.engine.ranks import Ranks, SingleProcess
from lossfns.backend.futures import APIFuture, Resolved, Worker, async_result
from lossfns.backend.model.generate import generate
from lossfns.backend.types import SampledSequence, SampleResponse, SamplingParams
from lossfns.devices import to_device
from lossfns.errors import LossInputError
from lossfns.logprobs.head import head_of
from lossfns.logprobs.linear import model_logprobs


class LocalSamplingClient(Resolved):
    """Samples from a copy of a model's weights. Under a mesh, rank 0 draws and all ranks get what it drew.

    Training clients and service clients create it. Do not train its ``model``.

    Args:
        model: a module with ``forward``, ``head`` [V, D], ``prefill`` and ``step``.
        tokenizer: decodes tokens to find stop strings, and is returned by ``get_tokenizer``.
        ranks: the processes that make the same calls; None means only this process.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, ranks: SingleProcess | Ranks | None = None) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._vocabulary = len(head_of(model).weight)
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

    def target_logprobs(self, prompt: Any, targets: Any) -> APIFuture[Tensor]:
        """Compute the logprobs of given tokens at each position of a prompt after the first.

        Args:
            prompt: a model input of at least two tokens.
            targets: token ids [T - 1, K]; row i is scored at position i + 1.

        The result is [T - 1, K], float32. Errors are those of ``compute_logprobs``.
        """
        return self._submit(self._target_logprobs, prompt, targets)

    def top_logprobs(self, prompt: Any, k: int) -> APIFuture[tuple[Tensor, Tensor]]:
        """Compute the k most probable tokens at each position of a prompt after the first.

        Args:
            prompt: a model input of at least one token.
            k: at least 1, and at most the size of the vocabulary.

        The result is a pair: token ids [T - 1, k], and their logprobs [T - 1, k] in float32. Errors are those of
        ``compute_logprobs``.
        """
        return self._submit(self._top_logprobs, prompt, k)

    def get_tokenizer(self) -> Any:
        """Return the tokenizer of the client that made this one, or None."""
        return self._tokenizer

    sample_async = async_result(sample)
    sample_batch_async = async_result(sample_batch)
    compute_logprobs_async = async_result(compute_logprobs)
    target_logprobs_async = async_result(target_logprobs)
    top_logprobs_async = async_result(top_logprobs)

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
        stop_ids, stop_texts = find_stops(params.stop, self._tokenizer, self._vocabulary)
        samples = generate(
            self.model,  # type: ignore[arg-type]
            ids,
            max_tokens=max_tokens,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            stop=stop_ids if params.stop == [] else [*stop_ids, *end_tokens(self.model, self._tokenizer)],
            ends=text_stops(stop_texts, self._tokenizer, ids) if stop_texts else None,
            seed=params.seed,
        )
        sequences = [SampledSequence(s.stop_reason, s.tokens, s.logprobs) for s in samples]
        starts = range(0, len(sequences), num_samples)
        return [SampleResponse(sequences[i : i + num_samples]) for i in starts]

    def _ids(self, prompt: Any) -> list[int]:
        """Return the prompt's tokens; refuse an empty prompt and tokens outside of the vocabulary."""
        ids: list[int] = input_ids(prompt, "prompt", self._vocabulary, empty="no token").tolist()
        return ids

    @torch.inference_mode()
    def _compute_logprobs(self, prompt: Any) -> list[float | None]:
        ids, hidden = self._hidden_states(prompt)
        predicted = [] if hidden is None else model_logprobs(self.model, hidden, ids[1:]).tolist()
        return [None, *predicted]

    @torch.inference_mode()
    def _target_logprobs(self, prompt: Any, targets: Any) -> Tensor:
        ids, hidden = self._hidden_states(prompt)
        tokens = as_array(targets, "targets", None)
        if tokens.ndim != 2 or len(tokens) != len(ids) - 1 or not tokens.size:
            fix = "Row i is scored at position i + 1."
            raise LossInputError("targets", f"shape [{len(ids) - 1}, K]", f"{tokens.shape}", fix)
        assert hidden is not None  # targets have at least one row, so the prompt has two tokens
        tokens = in_vocabulary(tokens, "targets", self._vocabulary, None)
        return model_logprobs(self.model, hidden, to_device(tokens, hidden.device)).float().cpu()

    @torch.inference_mode()
    def _top_logprobs(self, prompt: Any, k: int) -> tuple[Tensor, Tensor]:
        check_integer("k", k, 1, self._vocabulary, "That is the size of the vocabulary.")
        _, hidden = self._hidden_states(prompt)
        if hidden is None:
            return torch.zeros(0, k, dtype=torch.long), torch.zeros(0, k)
        head = head_of(self.model)
        top = [head.logits(rows).float().log_softmax(1).topk(k) for rows in torch.split(hidden, POSITIONS_AT_ONCE)]
        return torch.cat([t.indices for t in top]).cpu(), torch.cat([t.values for t in top]).cpu()

    def _hidden_states(self, prompt: Any) -> tuple[Tensor, Tensor | None]:
        """Return the ids [T] of a prompt and the hidden states [T - 1, D] that predict all but the first, if any."""
        ids = to_device(torch.tensor(self._ids(prompt)), next(self.model.parameters()).device)
        return ids, self.model(ids[:-1], [len(ids) - 1]) if len(ids) > 1 else None


POSITIONS_AT_ONCE = 1024
"""The positions whose logits are in memory at the same time."""

LARGEST = 2**20
"""The largest number of samples of a prompt, of tokens of a sample, and the largest ``top_k``."""


def find_stops(stop: Any, tokenizer: Any, vocabulary: int) -> tuple[list[int], list[str]]:
    """Return the stops that are token ids, and those that are strings."""
    stops = [] if stop is None else [stop] if isinstance(stop, (str, int)) else stop
    if not isinstance(stops, (list, tuple)) or not all(isinstance(s, (str, int)) for s in stops):
        got, fix = f"a {type(stop).__name__}", "Pass [id, ...], [text, ...] or one of them."
        raise LossInputError("stop", "token ids or strings", got, fix)
    texts = [s for s in stops if isinstance(s, str)]
    ids = [s for s in stops if not isinstance(s, str)]
    if texts and tokenizer is None:
        raise LossInputError("stop", "token ids, without a tokenizer", "strings", "Pass tokenizer= to the client.")
    if "" in texts:
        raise LossInputError("stop", "strings with a character", "''", "Every text contains it: leave it out.")
    for i in ids:
        check_integer("stop", i, 0, vocabulary - 1, "Use the tokenizer of this model.")
    return ids, texts


def text_stops(
    texts: Sequence[str], tokenizer: Any, prompts: Sequence[Sequence[int]]
) -> Callable[[int, list[int]], bool]:
    """Return the function ``ends`` of ``generate`` that ends a sample whose text contains one of ``texts``.

    The text is decoded, since a tokenizer may spell a stop by other tokens than those of the stop alone, for example
    with characters around it in the same token.
    """

    def ends(i: int, tokens: list[int]) -> bool:
        continuation = decode_after(tokenizer, prompts[i][-1], tokens)
        return any(text in continuation for text in texts)

    return ends


def decode_after(tokenizer: Any, previous: int, tokens: Sequence[int]) -> str:
    """Return the text of tokens that follow the token ``previous``.

    Some tokenizers drop the space before the first token of a text, and none of these tokens is the first.
    """
    before, both = tokenizer.decode([previous]), tokenizer.decode([previous, *tokens])
    text: str = both.removeprefix(before) if both.startswith(before) else tokenizer.decode(list(tokens))
    return text


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return all ids that the tokenizer or the settings of a model of ``transformers`` declare as the end of a turn."""
    model = getattr(model, "model", model)  # of hf.CausalLM
    owners = [tokenizer, *(getattr(model, name, None) for name in ("generation_config", "config"))]
    declared = [getattr(owner, "eos_token_id", None) for owner in owners]
    ids = [i for each in declared for i in (each if isinstance(each, (list, tuple)) else [each])]
    return sorted({i for i in ids if i is not None})
