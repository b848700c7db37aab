"""A local stand-in for the hosted training service: the same calls and futures, on a model of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lossfns.backend.client.profiles import cost, named, profile_of
from lossfns.backend.client.requests import (
    check_loss_type,
    check_no_more,
    check_output,
    check_path,
    check_save,
    check_targets,
    refuse_existing,
    snapshot,
)
from lossfns.backend.client.sampling import LocalSamplingClient
from lossfns.backend.engine.builtins import check_config
from lossfns.backend.engine.differentiate import LossFn, Value
from lossfns.backend.engine.engine import POOLS, Engine
from lossfns.backend.engine.memory import check_budget
from lossfns.backend.engine.passes import Work
from lossfns.backend.engine.ranks import Alone, Ranks
from lossfns.backend.engine.state import check_description, description, load_weights, stepped, weights
from lossfns.backend.futures import APIFuture, Ready, Worker, log, twin
from lossfns.backend.model import lora
from lossfns.backend.model.decoder import Decoder
from lossfns.backend.model.tokenizer import ByteTokenizer
from lossfns.backend.storage import checkpoint
from lossfns.backend.types import (
    ForwardBackwardOutput,
    GetInfoResponse,
    LoadWeightsResponse,
    ModelData,
    OptimStepResponse,
    SaveResponse,
)
from lossfns.errors import LossInputError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

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


def check_model(model: Any) -> None:
    """Refuse what is no model with weights and a head."""
    expected = "a module with forward(tokens [N], lengths) -> hidden [N, D], head [V, D] and weights"
    got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
    if not isinstance(model, nn.Module):
        fix = "Pass the model itself; one by its name is made by LocalServiceClient, or by hf.load."
        raise LossInputError("model", expected, got, fix)
    with torch.no_grad():
        head = getattr(model, "head", None)
    if head is None:
        fix = "Wrap a model of transformers: lossfns.backend.model.hf.CausalLM(model)."
        raise LossInputError("model", expected, f"{got} without head", fix)
    if not isinstance(head, Tensor) or head.ndim != 2:
        fix = "It is the weight itself, [V, D]: as a property, self.unembed.weight."
        raise LossInputError("model", expected, f"{got} whose head is a {type(head).__name__}", fix)
    if not any(True for _ in model.parameters()):
        raise LossInputError("model", expected, f"{got} without parameters", "Register what it computes with.")
    if any(p.is_meta for p in model.parameters()):
        fix = "Load its weights first: model.to_empty(device=...) makes room for them."
        raise LossInputError("model", expected, f"{got} whose weights are not there", fix)


def output_of(value: Value, metrics: dict[str, Any]) -> ForwardBackwardOutput:
    return ForwardBackwardOutput("TensorData", value.outputs.records(), metrics)


class LocalReferenceClient(Ready):
    """A model behind ``forward`` alone, which is what a frozen reference policy needs.

    The module is the one that is given, and no copy of it: where that one is trained, pass a copy.

    Args:
        model: a module with ``forward(tokens [N], lengths) -> hidden [N, D]`` and ``head`` [V, D] (sampling
            also needs ``prefill`` and ``step``); without one, a small byte-level decoder from ``seed``.
        tokenizer: what ``get_tokenizer`` returns; the embedded model has its own.
        device: ``"auto"`` (the GPU if there is one), or any torch device.
        dtype: of the weights; None keeps the model's own. Logprobs are float32 at least.
        profile: ``"tinker"`` or ``"fireworks"``, the service that is followed where the two differ.
        name: what ``get_info`` calls the model; its class if it is not given.
        memory_budget: bytes that a request may take beyond the weights and what is accumulated already; a batch
            that needs more goes in micro-batches, with the same gradient. None: most of what is free.
        mesh: of ``distributed.start``, to share the model with other processes, which make the same calls.
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
        memory_budget: float | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        check_budget(memory_budget)
        self._profile = profile_of(profile)
        self._tokenizer = tokenizer or (ByteTokenizer() if model is None else None)
        model = model if model is not None else Decoder(vocab_size=ByteTokenizer.vocab_size, seed=seed, **EMBEDDED)
        check_model(model)
        self.ranks = Alone() if mesh is None else Ranks(mesh, device)
        self.model = model.to(pick_device(device) if mesh is None else None, dtype).eval()
        self._name = name or type(model).__name__
        self.user_metadata: dict[str, str] = {}  # goes into every checkpoint, below what the save itself is given
        self._worker = Worker(self.ranks.line, self.ranks.call)
        self._engine = self._worker.submit(Engine, self.model, self.ranks, memory_budget).result()

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
        check_config(loss_fn_config)
        config = dict(loss_fn_config or {})
        output, pooling = config.pop("output", output), config.pop("pooling", pooling)
        check_output(output, pooling)
        self._profile.check_call(data)
        if output == "embedding":
            check_no_more(config)
            return self._worker.submit(self._embed, snapshot(data), pooling)
        return self._worker.submit(self._forward, snapshot(data), loss_fn, config)

    def get_info(self) -> GetInfoResponse:
        """What runs, and where; of many ranks, any may ask."""
        return self._worker.submit_here(self._info).result()

    async def get_info_async(self) -> GetInfoResponse:
        """``get_info`` without blocking the event loop."""
        return await self._worker.submit_here(self._info)

    def get_tokenizer(self) -> Any:
        """The tokenizer that was given; the embedded model's reads bytes."""
        if self._tokenizer is None:
            raise LossInputError("tokenizer", "a tokenizer of the model", "none", "Pass tokenizer= to the client.")
        return self._tokenizer

    forward_async = twin(forward)

    def _forward(self, data: Any, loss_fn: Any, config: Any) -> ForwardBackwardOutput:
        value = self._engine.forward(data, loss_fn, config)
        return output_of(value, named(value.metrics))

    def _embed(self, data: Any, pooling: str) -> ForwardBackwardOutput:
        outputs = self._engine.values(self._engine.embeddings(data, POOLS[pooling]))
        return ForwardBackwardOutput("TensorData", outputs.records(), {})

    def _info(self) -> GetInfoResponse:
        parameters = list(self.model.parameters())
        adapters, shape = (getattr(self.model, name, None) or {} for name in ("lora", "shape"))
        arch = shape.get("architecture", type(self.model).__name__)
        return GetInfoResponse(
            model_data=ModelData(arch, self._name, getattr(self._tokenizer, "name_or_path", None)),
            model_id=f"{self._name}-{id(self):x}",
            is_lora=bool(adapters),
            lora_rank=adapters.get("rank"),
            model_name=self._name,
            parameters=sum(p.numel() for p in parameters),
            device=str(parameters[0].device),
            dtype=str(parameters[0].dtype),
            steps=self._engine.steps,
            profile=self._profile.name,
            attention=getattr(self.model, "attention", None),
        )


class LocalTrainingClient(LocalReferenceClient):
    """forward, forward_backward, forward_backward_custom and optim_step on a local model.

    Requests run in submission order on one worker thread and return futures at once. Gradients add up
    over ``forward_backward*`` until ``optim_step``, which clears them. A request that fails leaves
    weights and gradients as they were; an error that nobody reads is raised by the next request. Arguments are
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
        return self._worker.submit_gradient(self._forward_backward, snapshot(data), loss_fn, loss_fn_config)

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
        return self._worker.submit_step(self._engine.optim_step, params, grad_accumulation_normalization)

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
        if not isinstance(overwrite, bool):
            raise LossInputError("overwrite", "True or False", repr(overwrite), "A string is neither.")
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

    def save_weights_and_get_sampling_client(
        self, name: str | None = None, retry_config: Any = None
    ) -> LocalSamplingClient:
        """A sampler of a snapshot of the weights: it does not change when training goes on.

        No file is written, so a name has no use; nor has ``retry_config``, as nothing is sent.
        """
        return self._worker.submit(self._snapshot).result()

    async def save_weights_and_get_sampling_client_async(
        self, name: str | None = None, retry_config: Any = None
    ) -> LocalSamplingClient:
        """The same without blocking the event loop."""
        return await self._worker.submit(self._snapshot)

    def create_sampling_client(self, model_path: str | Path, retry_config: Any = None) -> LocalSamplingClient:
        """A sampler of the weights in a file. Nothing is sent, so nothing is retried."""
        check_path("model_path", model_path)
        return self._worker.submit(self._sampling_client, model_path).result()

    async def create_sampling_client_async(
        self, model_path: str | Path, retry_config: Any = None
    ) -> LocalSamplingClient:
        """The same without blocking the event loop."""
        check_path("model_path", model_path)
        return await self._worker.submit(self._sampling_client, model_path)

    def reference(self) -> LocalReferenceClient:
        """This model as it was before it got adapters, behind ``forward`` alone: the reference policy on one copy.

        Its requests and this client's run in one order, on one thread and on the same weights.
        """
        if not lora.adapted_layers(self.model):
            fix = "Pass a copy of the model to LocalReferenceClient, before the first step."
            raise LossInputError("reference", "a model with adapters, which can be switched off", "none", fix)
        return Unadapted(self)

    forward_backward_async = twin(forward_backward)
    optim_step_async = twin(optim_step)
    save_state_async = twin(save_state)
    load_state_async = twin(load_state)
    load_state_with_optimizer_async = twin(load_state_with_optimizer)
    save_weights_for_sampler_async = twin(save_weights_for_sampler)

    def _submit_custom(
        self, data: Any, loss_fn: Any, loss_type_input: Any, output: Any, pooling: Any
    ) -> APIFuture[ForwardBackwardOutput]:
        check_output(output, pooling)
        check_loss_type(loss_type_input)
        self._profile.check_call(data)
        if output == "logprobs":
            check_targets(data)
        work = self._logprobs if output == "logprobs" else partial(self._embeddings, pooling=pooling)
        # The loss gets the datums themselves, as from the services, in a list that the caller may go on filling.
        own = list(data) if isinstance(data, list) else data
        return self._worker.submit_gradient(self._custom, snapshot(data), own, loss_fn, work)

    # What the worker runs

    def _forward_backward(self, data: Any, loss_fn: Any, config: Any) -> ForwardBackwardOutput:
        def report(value: Value) -> ForwardBackwardOutput:
            return output_of(value, self._profile.builtin_metrics(loss_fn, value) | named(cost(value)))

        return self._engine.forward_backward(data, loss_fn, config, report)

    def _custom(self, fields: Any, data: Any, loss_fn: Any, work: Callable[[Any], Work]) -> ForwardBackwardOutput:
        def report(value: Value) -> ForwardBackwardOutput:
            return output_of(value, cost(value) | self._profile.custom_metrics(value))

        return self._engine.backward(loss_fn, data, work(fields), report)

    def _logprobs(self, data: Any) -> Work:
        work = self._engine.logprobs(data)
        self._profile.check_custom(data)
        return work

    def _embeddings(self, data: Any, pooling: str) -> Work:
        return self._engine.embeddings(data, POOLS[pooling])

    def _save_state(self, path: str | Path, overwrite: bool, metadata: dict[str, str]) -> SaveResponse:
        if any(p.grad is not None for p in self.model.parameters()):
            fix = "Call optim_step first: gradients are not part of a checkpoint."
            raise LossInputError("save_state", "no accumulated gradient", "one", fix)
        if not overwrite:
            self.ranks.first(refuse_existing, path)
        tensors = self._engine.state()
        return self._write(path, tensors, "state", metadata, stepped=stepped(tensors))

    def _save_weights(self, path: str | Path, metadata: dict[str, str]) -> SaveResponse:
        self.ranks.first(refuse_existing, path)
        return self._write(path, weights(self.model), "sampler", metadata)

    def _write(self, path: str | Path, tensors: Any, kind: str, metadata: dict[str, str], **more: Any) -> SaveResponse:
        data = more | {
            "kind": kind,
            "steps": self._engine.steps,
            "model": self._name,
            **description(self.model),
            "user_metadata": self.user_metadata | metadata,
        }
        try:
            return SaveResponse(str(self.ranks.save(path, tensors, data)))
        except LossInputError as error:
            error.field = "name" if error.field == "path" else error.field
            raise

    def _load_state(self, path: str | Path) -> LoadWeightsResponse:
        tensors, data = self.ranks.load(path)
        check_description(self.model, data, str(path))
        with self._saying_what_is_dropped(path):
            self._engine.load_weights(tensors, str(path))
        return LoadWeightsResponse(str(path))

    def _load_state_with_optimizer(self, path: str | Path) -> LoadWeightsResponse:
        tensors, data = self.ranks.load(path)
        if data.get("kind") == "sampler":
            fix = "Take load_state, or a file of save_state."
            raise LossInputError("path", "a checkpoint with an optimizer", f"{path}, weights for a sampler", fix)
        check_description(self.model, data, str(path))
        with self._saying_what_is_dropped(path):
            self._engine.load_state(tensors, str(path), data)
        return LoadWeightsResponse(str(path))

    @contextmanager
    def _saying_what_is_dropped(self, path: str | Path) -> Iterator[None]:
        count = int(self._engine.accumulated.sequences)
        yield
        if count:
            log.warning("Loading %s has dropped the accumulated gradient of %d sequences.", path, count)

    def _snapshot(self) -> LocalSamplingClient:
        return LocalSamplingClient(self.ranks.copy(), self._tokenizer, self.ranks)

    def _sampling_client(self, path: str | Path) -> LocalSamplingClient:
        tensors, data = checkpoint.load(path)
        check_description(self.model, data, str(path))
        sampler = self._snapshot()
        load_weights(sampler.model, tensors, str(path))
        return sampler


class Unadapted(LocalReferenceClient):
    """The model of a client with its adapters off, on the client's own thread."""

    def __init__(self, policy: LocalTrainingClient) -> None:
        vars(self).update(vars(policy))

    def _forward(self, data: Any, loss_fn: Any, config: Any) -> ForwardBackwardOutput:
        with lora.disabled(self.model):
            return super()._forward(data, loss_fn, config)

    def _embed(self, data: Any, pooling: str) -> ForwardBackwardOutput:
        with lora.disabled(self.model):
            return super()._embed(data, pooling)
