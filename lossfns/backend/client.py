"""A local stand-in for the hosted training service: the same calls and futures, on a model of one's own."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lossfns import LossInputError
from lossfns.backend import checkpoint
from lossfns.backend.engine import Engine, LossFn
from lossfns.backend.futures import APIFuture, Worker
from lossfns.backend.logprobs import linear_logprobs
from lossfns.backend.model import Decoder
from lossfns.backend.sampler import Sample, generate
from lossfns.backend.tokenizer import ByteTokenizer
from lossfns.backend.types import (
    ForwardBackwardOutput,
    OptimStepResponse,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    SaveResponse,
)

EMBEDDED: dict[str, Any] = {"dim": 128, "layers": 4, "heads": 4, "kv_heads": 2, "hidden": 384}
"""The shape of the model that is used when none is given."""


def pick_device(device: str | torch.device) -> torch.device:
    """``"auto"`` is the GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        got, fix = f"{device!r} ({str(error).splitlines()[0]})", "auto takes the GPU if there is one."
        raise LossInputError("device", "a device of this machine", got, fix) from None


class LocalTrainingClient:
    """forward, forward_backward, forward_backward_custom and optim_step on a local model.

    Requests run in submission order on one worker thread and return futures at once. Gradients add up
    over ``forward_backward*`` until ``optim_step``, which clears them. A request that fails leaves
    weights and gradients as they were; an error that nobody reads is raised by the next call.

    Args:
        model: a module with ``forward(tokens [N], lengths) -> hidden [N, D]`` and ``head`` [V, D] (sampling
            also needs ``prefill`` and ``step``); without one, a small byte-level decoder from ``seed``.
        device: ``"auto"`` (the GPU if there is one), or any torch device.
        dtype: of the weights; None keeps the model's own. Logprobs are float32 at least.

    >>> from lossfns import cross_entropy, datum_from_tokens
    >>> client = LocalTrainingClient(seed=1)
    >>> data = [datum_from_tokens([72, 105, 33], prompt_length=1)]
    >>> builtin = client.forward_backward(data, "cross_entropy").result()
    >>> custom = client.forward_backward_custom(data, cross_entropy()).result()
    >>> builtin.loss_fn_outputs[0]["logprobs"].shape, "loss:sum" in custom.metrics
    ([2], True)
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        tokenizer: Any = None,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        self._tokenizer = tokenizer or (ByteTokenizer() if model is None else None)
        model = model if model is not None else Decoder(vocab_size=ByteTokenizer.vocab_size, seed=seed, **EMBEDDED)
        self.model = model.to(pick_device(device), dtype).eval()
        self._engine = Engine(self.model)
        self._worker = Worker()

    def forward(
        self, data: list[Any], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Logprobs of every target under the current weights, and the built-in's value."""
        return self._worker.submit(self._engine.forward, data, loss_fn, loss_fn_config)

    def forward_backward(
        self, data: list[Any], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """A built-in loss by name (a raw sum over tokens), and its gradient."""
        return self._worker.submit(self._engine.forward_backward, data, loss_fn, loss_fn_config)

    def forward_backward_custom(self, data: list[Any], loss_fn: LossFn) -> APIFuture[ForwardBackwardOutput]:
        """Any ``(data, logprobs_list) -> (loss, metrics)``, in one forward and one backward.

        ``metrics["loss:sum"]`` is the loss; ``surrogate_loss:sum`` is Σ lp·∂L/∂lp, what a hosted service
        sees of it.
        """
        return self._worker.submit(self._engine.custom, data, loss_fn)

    def optim_step(self, adam_params: Any) -> APIFuture[OptimStepResponse]:
        """One AdamW step on the accumulated gradient, which is then cleared."""
        return self._worker.submit(self._engine.optim_step, adam_params)

    def save_weights_and_get_sampling_client(self, name: str | None = None) -> LocalSamplingClient:
        """A sampler of a snapshot of the weights: it does not change when training goes on."""
        snapshot = self._worker.submit(copy.deepcopy, self.model).result()
        return LocalSamplingClient(snapshot, self._tokenizer)

    def save_state(self, name: str | Path) -> APIFuture[SaveResponse]:
        """Weights, optimizer state and steps in one file, at the path ``name``; refuses accumulated gradients."""
        return self._worker.submit(self._save, name)

    def load_state(self, path: str | Path) -> APIFuture[None]:
        """The weights of ``save_state``; the optimizer starts afresh."""
        return self._worker.submit(self._load, path, False)

    def load_state_with_optimizer(self, path: str | Path) -> APIFuture[None]:
        """Everything of ``save_state``: training continues as if it had not been interrupted."""
        return self._worker.submit(self._load, path, True)

    def get_info(self) -> dict[str, Any]:
        """What runs, and where."""
        weight = next(self.model.parameters())
        count = sum(p.numel() for p in self.model.parameters())
        return {
            "model": type(self.model).__name__,
            "parameters": count,
            "device": str(weight.device),
            "dtype": str(weight.dtype),
            "steps": self._engine.steps,
        }

    def get_tokenizer(self) -> Any:
        if self._tokenizer is None:
            raise LossInputError("tokenizer", "a tokenizer of the model", "none", "Pass tokenizer= to the client.")
        return self._tokenizer

    def _save(self, path: str | Path) -> SaveResponse:
        if any(p.grad is not None for p in self.model.parameters()):
            fix = "Call optim_step first: gradients are not part of a checkpoint."
            raise LossInputError("save_state", "no accumulated gradient", "one", fix)
        names = [name for name, _ in self.model.named_parameters()]
        moments = self._engine.optimizer.state_dict()["state"]
        tensors = {f"model.{name}": x for name, x in self.model.state_dict().items()}
        tensors |= {f"optim.{key}.{names[i]}": x for i, state in moments.items() for key, x in state.items()}
        shape = getattr(self.model, "shape", None)
        saved = checkpoint.save(path, tensors, {"steps": self._engine.steps, "shape": shape})
        return SaveResponse(str(saved))

    def _load(self, path: str | Path, with_optimizer: bool) -> None:
        tensors, data = checkpoint.load(path)
        weights = {name.removeprefix("model."): x for name, x in tensors.items() if name.startswith("model.")}
        shapes = [{name: x.shape for name, x in state.items()} for state in (weights, self.model.state_dict())]
        if shapes[0] != shapes[1]:
            got = f"{path}, of a model of shape {data['shape']}"
            raise LossInputError("path", "a checkpoint of this model", got, "Build the same model first.")
        self.model.load_state_dict(weights)
        self.model.zero_grad(set_to_none=True)
        self._engine = Engine(self.model)
        if with_optimizer:
            names = [name for name, _ in self.model.named_parameters()]
            groups = self._engine.optimizer.state_dict()["param_groups"]
            keys = sorted({name.split(".")[1] for name in tensors if name.startswith("optim.")})
            saved = [
                {k: tensors[f"optim.{k}.{name}"] for k in keys if f"optim.{k}.{name}" in tensors} for name in names
            ]
            state = {i: moments for i, moments in enumerate(saved) if moments}
            self._engine.optimizer.load_state_dict({"state": state, "param_groups": groups})
            self._engine.steps = data["steps"]


class LocalSamplingClient:
    """Samples from a snapshot of a model."""

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._worker = Worker()

    def sample(self, prompt: Any, num_samples: int, sampling_params: Any) -> APIFuture[SampleResponse]:
        """``num_samples`` continuations of one prompt."""
        return self._worker.submit(lambda: self._sample([prompt], num_samples, sampling_params)[0])

    def sample_batch(
        self, prompts: Sequence[Any], num_samples: int, sampling_params: Any
    ) -> APIFuture[list[SampleResponse]]:
        """The same for many prompts at once, which is much faster than one by one."""
        return self._worker.submit(self._sample, prompts, num_samples, sampling_params)

    def compute_logprobs(self, prompt: Any) -> APIFuture[list[float | None]]:
        """The logprob of each token of the prompt, ``None`` first: nothing predicts it."""
        return self._worker.submit(self._compute_logprobs, prompt)

    def _sample(self, prompts: Sequence[Any], num_samples: int, params: Any) -> list[SampleResponse]:
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
        vocabulary = len(self.model.head)  # type: ignore[arg-type]
        if not ids or not 0 <= min(ids) <= max(ids) < vocabulary:
            got = f"ids from {min(ids)} to {max(ids)}" if ids else "no token"
            raise LossInputError("prompt", f"tokens in [0, {vocabulary})", got, "Use the tokenizer of this model.")
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
