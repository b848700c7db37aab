"""The reference client, which has only ``forward``. It is the base class of the training client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lossfns.backend.client.profiles import find_profile, with_reductions
from lossfns.backend.client.requests import check_embedding_config, check_integer, check_output, copy_data
from lossfns.backend.engine.budget import check_budget
from lossfns.backend.engine.differentiate import Differentiated
from lossfns.backend.engine.engine import Engine
from lossfns.backend.engine.pooling import POOLS
from lossfns.backend.engine.ranks import Ranks, SingleProcess
from lossfns.backend.engine.state import adapters_change_nothing
from lossfns.backend.futures import APIFuture, Resolved, Worker, async_submit
from lossfns.backend.model import lora
from lossfns.backend.model.decoder import Decoder
from lossfns.backend.model.tokenizer import ByteTokenizer
from lossfns.backend.types import ForwardBackwardOutput, GetInfoResponse, ModelData
from lossfns.errors import LossInputError
from lossfns.export.builtins import check_config
from lossfns.logprobs.head import head_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def embedded_model(seed: int = 0) -> tuple[nn.Module, Any]:
    """Build the model that is used when none is given, a small byte-level decoder, and its tokenizer."""
    check_integer("seed", seed, 0, 2**63 - 1, "It seeds the weights of the decoder.")
    tokenizer = ByteTokenizer()
    size: dict[str, Any] = {"dim": 128, "layers": 4, "heads": 4, "kv_heads": 2, "hidden": 384}
    return Decoder(vocab_size=tokenizer.vocab_size, seed=seed, **size), tokenizer


def pick_device(device: str | torch.device) -> torch.device:
    """Return a device of this machine; ``"auto"`` is the GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fix = "auto takes the GPU if there is one."
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, ValueError, OverflowError) as error:
        got = f"{device!r} ({str(error).splitlines()[0]})"
        raise LossInputError("device", "a device of this machine", got, fix) from None
    if found.type == "meta":
        raise LossInputError("device", "a device that holds numbers", repr(device), fix)
    return found


def check_dtype(dtype: Any) -> None:
    """Refuse anything but a floating-point dtype of torch, or None."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise LossInputError("dtype", "a floating-point dtype of torch, or None", repr(dtype), "Pass torch.float32.")


def check_name(name: Any) -> None:
    """Refuse anything but a string or None: checkpoints hold the name."""
    if name is not None and not isinstance(name, str):
        raise LossInputError("name", "a string, or None", repr(name), "None takes the model's class.")


def check_model(model: Any) -> None:
    """Refuse anything but a module with loaded weights and a ``head`` [V, D]."""
    expected = "a module with forward(tokens [N], lengths) -> hidden [N, D], head [V, D] and weights"
    got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
    if not isinstance(model, nn.Module):
        fix = "Pass the model itself. LocalServiceClient makes one by its name, and hf.load reads one."
        raise LossInputError("model", expected, got, fix)
    with torch.no_grad():
        head = getattr(model, "head", None)
    if head is None:
        fix = "Wrap a model of transformers: lossfns.backend.model.hf.CausalLM(model)."
        raise LossInputError("model", expected, f"{got} without head", fix)
    if not isinstance(head, Tensor) or head.ndim != 2:
        fix = "Let head return the weight itself, [V, D], such as self.unembed.weight."
        raise LossInputError("model", expected, f"{got} whose head is a {type(head).__name__}", fix)
    if not any(True for _ in model.parameters()):
        raise LossInputError("model", expected, f"{got} without parameters", "Register its weights as parameters.")
    if any(p.is_meta for p in model.parameters()):
        fix = "Load its weights first: model.to_empty(device=...) makes room for them."
        raise LossInputError("model", expected, f"{got} whose weights are not there", fix)


def check_head_bias(model: nn.Module) -> None:
    """Refuse a bias of the unembedding that is not finite. With this check here, no forward pass waits for it."""
    with torch.no_grad():
        head = head_of(model)
    if head.bias is not None and not head.bias.to(head.weight.dtype).isfinite().all():
        fix = "For a token that cannot occur use a large negative number such as -1e30, in float16 -6e4."
        expected = f"finite numbers in the head_bias of {type(model).__name__}, in {head.weight.dtype}"
        raise LossInputError("model", expected, "inf or nan among them", fix)


def response(result: Differentiated, metrics: dict[str, Any]) -> ForwardBackwardOutput:
    """Return a request's outputs, one record for each datum, and its metrics."""
    return ForwardBackwardOutput("TensorData", result.outputs.records(), metrics)


class LocalReferenceClient(Resolved):
    """A model with ``forward`` as its only computation, such as a frozen reference policy.

    The client uses the module that it is given, not a copy. Pass a copy of a model that is trained elsewhere.

    Args:
        model: a module with ``forward(tokens [N], lengths) -> hidden [N, D]`` and ``head`` [V, D]. Sampling also
            needs ``prefill`` and ``step``. None takes a small byte-level decoder, initialised from ``seed``.
        tokenizer: returned by ``get_tokenizer``. The decoder that is used without a model has its own.
        device: any torch device, or ``"auto"``, which is the GPU if there is one.
        dtype: dtype of the weights; None keeps the model's own. Logprobs are float32 at least.
        seed: seed of the weights of the decoder that is used without a model.
        profile: the service to follow where the two differ, ``"tinker"`` or ``"fireworks"``.
        name: the model's name in ``get_info`` and in checkpoints; None takes its class.
        memory_budget: bytes that a request may use beyond the weights and the accumulated gradient. A larger batch is
            split into micro-batches, with the same gradient. None plans with most of the free memory.
        mesh: the processes that share the model, from ``lossfns.backend.engine.ranks.start``. All make the same calls.

    Raises LossInputError for a model without weights or head, an unknown device or profile, or a budget that is no
    positive number.
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
        check_dtype(dtype)
        check_name(name)
        self._profile = find_profile(profile)
        if model is None:
            model, default = embedded_model(seed)
            tokenizer = tokenizer or default
        check_model(model)
        self._starts_unadapted = adapters_change_nothing(model)
        self.ranks = SingleProcess() if mesh is None else Ranks(mesh, device)
        self.model = model.to(pick_device(device) if mesh is None else None, dtype).eval()
        check_head_bias(self.model)
        self._tokenizer, self._name = tokenizer, name or type(model).__name__
        self.user_metadata: dict[str, str] = {}  # in every checkpoint; a key that the save passes takes precedence
        self._worker = Worker(self.ranks.thread, self.ranks.call)
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
        """Compute the logprobs of all targets and the value of a built-in loss, without a gradient.

        Args:
            data: datums with ``target_tokens`` and the fields that the built-in loss reads.
            loss_fn: the name of a built-in loss. Embeddings do not use it.
            loss_fn_config: settings of the built-in loss by name, or ``output`` and ``pooling`` as Fireworks has them.
            output: ``"logprobs"``, or ``"embedding"`` for the hidden states after the final norm, pooled over each
                datum's model input. Embeddings need no targets.
            pooling: how embeddings are pooled: the ``"mean"`` over the tokens, or the ``"last"`` token.

        The result has ``"logprobs"`` [N] or [N, K], in the shape of the targets, or ``"embedding"`` [D] for each
        datum. Raises LossInputError at the call for unknown arguments. The future raises it for bad data.
        """
        check_config(loss_fn_config)
        config = dict(loss_fn_config or {})
        output, pooling = config.pop("output", output), config.pop("pooling", pooling)
        check_output(output, pooling)
        self._profile.check_at_call(data)
        if output == "embedding":
            check_embedding_config(config)
            return self._worker.submit(self._embed, copy_data(data), pooling)
        return self._worker.submit(self._forward, copy_data(data), loss_fn, config)

    def get_info(self) -> GetInfoResponse:
        """Return the model's name, size, device, dtype, adapters and number of steps. A single rank may call this."""
        return self._worker.submit_local(self._info).result()

    async def get_info_async(self) -> GetInfoResponse:
        """``get_info`` without blocking the event loop."""
        return await self._worker.submit_local(self._info)

    def get_tokenizer(self) -> Any:
        """Return the tokenizer that was given, or the one of the embedded model; raises LossInputError without one."""
        if self._tokenizer is None:
            raise LossInputError("tokenizer", "a tokenizer of the model", "none", "Pass tokenizer= to the client.")
        return self._tokenizer

    forward_async = async_submit(forward)

    # Run by the worker

    def _forward(self, data: Any, loss_fn: Any, config: Any) -> ForwardBackwardOutput:
        result = self._engine.forward(data, loss_fn, config)
        return response(result, with_reductions(result.metrics))

    def _embed(self, data: Any, pooling: str) -> ForwardBackwardOutput:
        outputs = self._engine.outputs(self._engine.embeddings(data, POOLS[pooling]))
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


class UnadaptedClient(LocalReferenceClient):
    """The model of another client with its adapters switched off, on that client's thread."""

    def __init__(self, client: LocalReferenceClient) -> None:
        vars(self).update(vars(client))

    def _forward(self, data: Any, loss_fn: Any, config: Any) -> ForwardBackwardOutput:
        with lora.disabled(self.model):
            return super()._forward(data, loss_fn, config)

    def _embed(self, data: Any, pooling: str) -> ForwardBackwardOutput:
        with lora.disabled(self.model):
            return super()._embed(data, pooling)
