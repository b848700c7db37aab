"""A local stand-in for the hosted training service: the same calls and futures, on a model of one's own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lossfns import LossInputError
from lossfns.backend import checkpoint
from lossfns.backend.batch import check_datums
from lossfns.backend.custom import LossFn, Value
from lossfns.backend.engine import POOLS, Engine
from lossfns.backend.futures import APIFuture, Ready, Worker, log, twin
from lossfns.backend.model import Decoder
from lossfns.backend.profiles import profile_of
from lossfns.backend.sampling import LocalSamplingClient
from lossfns.backend.state import check_description, description, load_weights, weights
from lossfns.backend.tokenizer import ByteTokenizer
from lossfns.backend.types import (
    ForwardBackwardOutput,
    GetInfoResponse,
    LoadWeightsResponse,
    ModelData,
    OptimStepResponse,
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
    except (RuntimeError, AssertionError, TypeError) as error:
        got, fix = f"{device!r} ({str(error).splitlines()[0]})", "auto takes the GPU if there is one."
        raise LossInputError("device", "a device of this machine", got, fix) from None


class LocalReferenceClient(Ready):
    """A model behind ``forward`` alone: what a frozen reference policy needs, and nothing that could move it.

    Args:
        model: a module with ``forward(tokens [N], lengths) -> hidden [N, D]`` and ``head`` [V, D] (sampling
            also needs ``prefill`` and ``step``); without one, a small byte-level decoder from ``seed``.
        tokenizer: what ``get_tokenizer`` returns; the embedded model has its own.
        device: ``"auto"`` (the GPU if there is one), or any torch device.
        dtype: of the weights; None keeps the model's own. Logprobs are float32 at least.
        profile: ``"tinker"`` or ``"fireworks"``, the service that is followed where the two differ.
        name: what ``get_info`` calls the model; its class if it is not given.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        tokenizer: Any = None,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        seed: int = 0,
        profile: str = "tinker",
        name: str | None = None,
    ) -> None:
        self._profile = profile_of(profile)
        self._tokenizer = tokenizer or (ByteTokenizer() if model is None else None)
        model = model if model is not None else Decoder(vocab_size=ByteTokenizer.vocab_size, seed=seed, **EMBEDDED)
        self.model = model.to(pick_device(device), dtype).eval()
        self._name = name or type(model).__name__
        self.user_metadata: dict[str, str] = {}  # goes into every checkpoint, below what the save itself is given
        self._engine = Engine(self.model)
        self._worker = Worker()

    def forward(
        self,
        data: list[Any],
        loss_fn: str,
        loss_fn_config: Mapping[str, Any] | None = None,
        *,
        output: str = "logprobs",
        pooling: str = "mean",
    ) -> APIFuture[ForwardBackwardOutput]:
        """Logprobs of every target under the current weights, and the built-in's value; no gradient.

        With ``output="embedding"`` (here or in ``loss_fn_config``, as Fireworks has it) each datum's hidden
        states after the final norm, pooled over the model input by ``"mean"`` or ``"last"``, [D].
        """
        config = dict(loss_fn_config) if isinstance(loss_fn_config, Mapping) else {}
        output, pooling = config.pop("output", output), config.pop("pooling", pooling)
        check_output(output, pooling)
        self._profile.check_call(data)
        if output == "embedding":
            check_no_more(config)
            return self._worker.submit(self._embed, snapshot(data), pooling)
        rest = config if isinstance(loss_fn_config, Mapping) else loss_fn_config
        return self._worker.submit(self._forward, snapshot(data), loss_fn, rest)

    def get_info(self) -> GetInfoResponse:
        """What runs, and where."""
        return self._worker.submit(self._info).result()

    async def get_info_async(self) -> GetInfoResponse:
        """``get_info`` without blocking the event loop."""
        return await self._worker.submit(self._info)

    def get_tokenizer(self) -> Any:
        """The tokenizer that was given; the embedded model's reads bytes."""
        if self._tokenizer is None:
            raise LossInputError("tokenizer", "a tokenizer of the model", "none", "Pass tokenizer= to the client.")
        return self._tokenizer

    forward_async = twin(forward)

    def _forward(self, data: Any, loss_fn: Any, config: Any) -> ForwardBackwardOutput:
        value = self._engine.forward(data, loss_fn, config)
        return output_of(value, self._profile.builtin_metrics("forward", value))

    @torch.no_grad()
    def _embed(self, data: Any, pooling: str) -> ForwardBackwardOutput:
        outputs = self._engine.embeddings(data, POOLS[pooling])
        return ForwardBackwardOutput("TensorData", outputs.records(), {})

    def _info(self) -> GetInfoResponse:
        parameters = list(self.model.parameters())
        lora = [module for module in self.model.modules() if hasattr(module, "lora_A")]
        return GetInfoResponse(
            model_data=ModelData(type(self.model).__name__, self._name, getattr(self._tokenizer, "name_or_path", None)),
            model_id=f"{self._name}-{id(self):x}",
            is_lora=bool(lora),
            lora_rank=max((max(m.r.values()) for m in lora), default=None),  # type: ignore[operator]
            model_name=self._name,
            parameters=sum(p.numel() for p in parameters),
            device=str(parameters[0].device),
            dtype=str(parameters[0].dtype),
            steps=self._engine.steps,
            profile=self._profile.name,
        )


class LocalTrainingClient(LocalReferenceClient):
    """forward, forward_backward, forward_backward_custom and optim_step on a local model.

    Requests run in submission order on one worker thread and return futures at once. Gradients add up
    over ``forward_backward*`` until ``optim_step``, which clears them. A request that fails leaves
    weights and gradients as they were; an error that nobody reads is raised by the next call. Arguments are
    those of ``LocalReferenceClient``.

    >>> from lossfns import cross_entropy, datum_from_tokens
    >>> client = LocalTrainingClient(seed=1)
    >>> data = [datum_from_tokens([72, 105, 33], prompt_length=1)]
    >>> builtin = client.forward_backward(data, "cross_entropy").result()
    >>> custom = client.forward_backward_custom(data, cross_entropy()).result()
    >>> builtin.loss_fn_outputs[0]["logprobs"].shape, "loss:sum" in custom.metrics
    ([2], True)
    """

    def forward_backward(
        self, data: list[Any], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """A built-in loss by name (a raw sum over tokens), and its gradient."""
        self._profile.check_call(data)
        return self._worker.submit(self._forward_backward, snapshot(data), loss_fn, loss_fn_config)

    def forward_backward_custom(
        self,
        data: list[Any],
        loss_fn: LossFn,
        *,
        loss_type_input: str | None = None,
        output: str = "logprobs",
        pooling: str = "mean",
    ) -> APIFuture[ForwardBackwardOutput]:
        """Any ``(data, logprobs_list) -> (loss, metrics)``, in one forward and one backward.

        The two are one request: nothing runs between them. With ``output="embedding"`` the loss gets each
        datum's pooled hidden state [D] in place of logprobs, and model inputs are whole, unshifted sequences.

        Metrics by profile: tinker's ``loss:sum`` is the loss, ``surrogate_loss:sum`` is Σ lp·∂L/∂lp; fireworks'
        ``loss:sum`` is the latter, beside ``response_tokens``, the entries that have a gradient.
        """
        future = self._submit_custom(data, loss_fn, loss_type_input, output, pooling)
        if self._profile.custom_blocks:
            future.result()
        return future

    async def forward_backward_custom_async(
        self,
        data: list[Any],
        loss_fn: LossFn,
        *,
        loss_type_input: str | None = None,
        output: str = "logprobs",
        pooling: str = "mean",
    ) -> APIFuture[ForwardBackwardOutput]:
        """The same for code that awaits twice; where the call waits, it does not block the event loop."""
        future = self._submit_custom(data, loss_fn, loss_type_input, output, pooling)
        if self._profile.custom_blocks:
            await future
        return future

    def optim_step(
        self, optim_params: Any = None, grad_accumulation_normalization: Any = None, *, adam_params: Any = None
    ) -> APIFuture[OptimStepResponse]:
        """One AdamW step on the accumulated gradient, which is then cleared.

        First the gradient is divided by the positions (``"num_loss_tokens"``) or sequences
        (``"num_sequences"``) that have one since the last step, refused where a loss is a mean already; then it
        is clipped. A step queued behind a request that fails is refused: its gradient would be a part.
        """
        if optim_params is not None and adam_params is not None:
            got = "Specify optim_params or legacy adam_params, not both"
            raise LossInputError("optim_params", "one of the two", got, "They mean the same.")
        params = optim_params if adam_params is None else adam_params
        return self._worker.submit_dependent(self._optim_step, params, grad_accumulation_normalization)

    def save_state(
        self,
        name: str | Path,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: Mapping[str, str] | None = None,
    ) -> APIFuture[SaveResponse]:
        """Weights, optimizer, steps and random state in one file, written whole or not at all.

        ``name`` is the path of the file; one that exists stays, unless ``overwrite`` says otherwise. Refuses
        accumulated gradients, which are not part of a checkpoint.
        """
        check_save(name, ttl_seconds, user_metadata)
        return self._worker.submit(self._save_state, name, overwrite, dict(user_metadata or {}))

    def load_state(self, path: str | Path, weights_access_token: str | None = None) -> APIFuture[LoadWeightsResponse]:
        """The weights of ``save_state`` or ``save_weights_for_sampler``; the optimizer starts afresh."""
        check_path("path", path)
        return self._worker.submit(self._load_state, path)

    def load_state_with_optimizer(
        self, path: str | Path, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Everything of ``save_state``: training continues as if it had not been interrupted."""
        check_path("path", path)
        return self._worker.submit(self._load_state_with_optimizer, path)

    def save_weights_for_sampler(
        self,
        name: str | Path,
        ttl_seconds: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> APIFuture[SaveResponse]:
        """The weights alone, for ``create_sampling_client`` and ``load_state``."""
        check_save(name, ttl_seconds, user_metadata)
        return self._worker.submit(self._save_weights, name, dict(user_metadata or {}))

    def save_weights_and_get_sampling_client(self, name: str | None = None) -> LocalSamplingClient:
        """A sampler of a snapshot of the weights: it does not change when training goes on."""
        return self._worker.submit(self._snapshot).result()

    async def save_weights_and_get_sampling_client_async(self, name: str | None = None) -> LocalSamplingClient:
        """The same without blocking the event loop."""
        return await self._worker.submit(self._snapshot)

    def create_sampling_client(self, model_path: str | Path) -> LocalSamplingClient:
        """A sampler of the weights in a file."""
        check_path("model_path", model_path)
        return self._worker.submit(self._sampling_client, model_path).result()

    async def create_sampling_client_async(self, model_path: str | Path) -> LocalSamplingClient:
        """The same without blocking the event loop."""
        check_path("model_path", model_path)
        return await self._worker.submit(self._sampling_client, model_path)

    forward_backward_async = twin(forward_backward)
    optim_step_async = twin(optim_step)
    save_state_async = twin(save_state)
    load_state_async = twin(load_state)
    load_state_with_optimizer_async = twin(load_state_with_optimizer)
    save_weights_for_sampler_async = twin(save_weights_for_sampler)

    # What the worker runs

    def _forward_backward(self, data: Any, loss_fn: Any, config: Any) -> ForwardBackwardOutput:
        value = self._engine.forward_backward(data, loss_fn, config)
        return output_of(value, self._profile.builtin_metrics(loss_fn, value))

    def _submit_custom(
        self, data: Any, loss_fn: Any, loss_type_input: Any, output: Any, pooling: Any
    ) -> APIFuture[ForwardBackwardOutput]:
        check_output(output, pooling)
        if loss_type_input not in (None, "logprobs"):
            fix = (
                f"Unsupported loss_type_input={loss_type_input!r}. Supported values are: logprobs. "
                "Set output='embedding' instead of loss_type_input for a loss of embeddings."
            )
            raise LossInputError("loss_type_input", "'logprobs'", repr(loss_type_input), fix)
        self._profile.check_call(data)
        # The loss gets the datums themselves, as from the services, in a list that the caller may go on filling.
        run = self._custom_embedding if output == "embedding" else self._custom
        own = list(data) if isinstance(data, list) else data
        return self._worker.submit(run, snapshot(data), own, loss_fn, pooling)

    def _custom(self, now: Any, data: Any, loss_fn: Any, pooling: str) -> ForwardBackwardOutput:
        check_datums(now)
        self._profile.check_custom(now)
        value = self._engine.backward(loss_fn, data, self._engine.logprobs(now))
        return output_of(value, self._profile.custom_metrics(value))

    def _custom_embedding(self, now: Any, data: Any, loss_fn: Any, pooling: str) -> ForwardBackwardOutput:
        value = self._engine.backward(loss_fn, data, self._engine.embeddings(now, POOLS[pooling]))
        return output_of(value, self._profile.custom_metrics(value))

    def _optim_step(self, params: Any, normalization: Any) -> OptimStepResponse:
        return self._engine.optim_step(params, normalization)

    def _save_state(self, path: str | Path, overwrite: bool, metadata: dict[str, str]) -> SaveResponse:
        if any(p.grad is not None for p in self.model.parameters()):
            fix = "Call optim_step first: gradients are not part of a checkpoint."
            raise LossInputError("save_state", "no accumulated gradient", "one", fix)
        if not overwrite:
            refuse_existing(path)
        return self._write(path, self._engine.state(), "state", metadata)

    def _save_weights(self, path: str | Path, metadata: dict[str, str]) -> SaveResponse:
        refuse_existing(path)
        return self._write(path, weights(self.model), "sampler", metadata)

    def _write(self, path: str | Path, tensors: Any, kind: str, metadata: dict[str, str]) -> SaveResponse:
        data = {
            "kind": kind,
            "steps": self._engine.steps,
            "model": self._name,
            **description(self.model),
            "user_metadata": self.user_metadata | metadata,
        }
        return SaveResponse(str(checkpoint.save(path, tensors, data)))

    def _load_state(self, path: str | Path) -> LoadWeightsResponse:
        tensors, data = checkpoint.load(path)
        check_description(self.model, data, str(path))
        self._say_what_is_dropped(path)
        self._engine.load_weights(tensors, str(path))
        return LoadWeightsResponse(str(path))

    def _load_state_with_optimizer(self, path: str | Path) -> LoadWeightsResponse:
        tensors, data = checkpoint.load(path)
        if data.get("kind") == "sampler":
            fix = "Take load_state, or a file of save_state."
            raise LossInputError("path", "a checkpoint with an optimizer", f"{path}, weights for a sampler", fix)
        check_description(self.model, data, str(path))
        self._say_what_is_dropped(path)
        self._engine.load_state(tensors, str(path), data["steps"])
        return LoadWeightsResponse(str(path))

    def _say_what_is_dropped(self, path: str | Path) -> None:
        if self._engine.accumulated.sequences:
            count = self._engine.accumulated.sequences
            log.warning("Loading %s drops the accumulated gradient of %d sequences.", path, count)

    def _snapshot(self) -> LocalSamplingClient:
        model = copy.deepcopy(self.model)
        model.zero_grad(set_to_none=True)
        return LocalSamplingClient(model, self._tokenizer)

    def _sampling_client(self, path: str | Path) -> LocalSamplingClient:
        tensors, data = checkpoint.load(path)
        check_description(self.model, data, str(path))
        sampler = self._snapshot()
        load_weights(sampler.model, tensors, str(path))
        return sampler


def snapshot(data: Any) -> Any:
    """The datums as they are now: what the caller does to them afterwards is not part of the request."""
    return [datum_now(datum) for datum in data] if isinstance(data, (list, tuple)) else data


def datum_now(datum: Any) -> Any:
    if not isinstance(getattr(datum, "loss_fn_inputs", None), dict):
        return datum
    now = copy.copy(datum)
    object.__setattr__(now, "loss_fn_inputs", dict(datum.loss_fn_inputs))
    return now


def output_of(value: Value, metrics: dict[str, Any]) -> ForwardBackwardOutput:
    return ForwardBackwardOutput("TensorData", value.outputs.records(), metrics)


OUTPUTS = ("logprobs", "embedding")


def check_output(output: Any, pooling: Any) -> None:
    """Refuse an output or a pooling that is not known, in the services' words."""
    if output not in OUTPUTS:
        fix = f"Unsupported output={output!r}; here they are 'logprobs' and 'embedding'"
        raise LossInputError("output", "'logprobs' or 'embedding'", repr(output), fix)
    if not isinstance(pooling, str) or pooling not in POOLS:
        fix = f"Unsupported pooling={pooling!r}; expected 'mean' or 'last'"
        raise LossInputError("pooling", "'mean' or 'last'", repr(pooling), fix)


def check_no_more(config: Mapping[str, Any]) -> None:
    """Refuse what an embedding does not read: a ``pooling`` misspelt would be another embedding."""
    if config:
        got = ", ".join(map(repr, config))
        raise LossInputError("loss_fn_config", "output and pooling for an embedding", got, "Drop the others.")


def check_path(field: str, path: Any) -> None:
    if not isinstance(path, (str, Path)) or not str(path) or "\0" in str(path):
        raise LossInputError(field, "the path of a file", repr(path), "Pass a string or a Path.")


def check_save(name: Any, ttl_seconds: Any, user_metadata: Any) -> None:
    """Refuse what a local file cannot keep."""
    check_path("name", name)
    if ttl_seconds is not None:
        raise LossInputError("ttl_seconds", "None", repr(ttl_seconds), "Nothing expires here: delete the file.")
    check_metadata(user_metadata)


def check_metadata(user_metadata: Any) -> None:
    pairs = user_metadata.items() if isinstance(user_metadata, Mapping) else ()
    if user_metadata is not None and (
        not isinstance(user_metadata, Mapping) or not all(isinstance(x, str) for pair in pairs for x in pair)
    ):
        got, fix = f"{user_metadata!r}", "json.dumps makes a string of anything plain."
        raise LossInputError("user_metadata", "a dict of strings", got, fix)


def refuse_existing(path: str | Path) -> None:
    if Path(path).exists():
        fix = "Choose another name; save_state(..., overwrite=True) replaces it."
        raise LossInputError("name", "a file that does not exist yet", f"{path}", fix)
