"""A local stand-in for the hosted services' front door: clients of base models by name."""

from __future__ import annotations

import asyncio
import copy
import functools
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import nn

from lossfns.backend.client.profiles import profile_of
from lossfns.backend.client.requests import check_metadata, check_path
from lossfns.backend.client.sampling import LocalSamplingClient
from lossfns.backend.client.training import EMBEDDED, LocalReferenceClient, LocalTrainingClient, pick_device
from lossfns.backend.engine import state
from lossfns.backend.engine.memory import check_budget
from lossfns.backend.engine.ranks import Alone, Ranks
from lossfns.backend.model import lora
from lossfns.backend.model.decoder import Decoder
from lossfns.backend.model.tokenizer import ByteTokenizer
from lossfns.backend.storage import checkpoint
from lossfns.errors import LossInputError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
P = ParamSpec("P")
C = TypeVar("C", bound=LocalReferenceClient)

Build = Callable[[], nn.Module | tuple[nn.Module, Any]]
"""Builds a base model, alone or with its tokenizer."""


def embedded() -> tuple[nn.Module, Any]:
    """The small byte-level decoder, as ``LocalTrainingClient()`` has it."""
    return Decoder(vocab_size=ByteTokenizer.vocab_size, **EMBEDDED), ByteTokenizer()


MODELS: dict[str, Build] = {"Decoder": embedded}


@dataclass(frozen=True)
class SupportedModel:
    """A base model that clients can be created of; any context length that fits in memory will do."""

    model_name: str
    max_context_length: int | None = None
    trainable: bool = True


@dataclass(frozen=True)
class GetServerCapabilitiesResponse:
    """The base models by name."""

    supported_models: list[SupportedModel]


def in_thread(method: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """``method_async``: the method in a thread, since building a model would block the event loop."""

    @functools.wraps(method)
    async def result(*args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.to_thread(method, *args, **kwargs)

    result.__name__ = f"{method.__name__}_async"
    result.__qualname__ = f"{method.__qualname__}_async"
    result.__doc__ = f"``{method.__name__}`` without blocking the event loop; awaited once, it gives the same."
    return result


class LocalServiceClient:
    """Training, reference and sampling clients of base models by name.

    Args:
        models: for each name a function that builds the model, or ``(model, tokenizer)``. It is called once, and
            every client gets a copy: all start from the same weights, and none moves another's. Without it,
            ``"Decoder"``, the small byte-level decoder.
        device, dtype, profile, memory_budget: of every client, as in ``LocalTrainingClient``.
        user_metadata: strings by name, which every checkpoint of every training client carries.
        mesh: of every client, as in ``LocalTrainingClient``; each process makes the same clients in the same order.
        base_url, api_key, project_id: taken and left alone; nothing is called.

    ``base_model`` may be left out where there is but one. A client is there at once, and code that expects a
    future of it may call ``.result()`` or await it.

    >>> service = LocalServiceClient(device="cpu")
    >>> policy, reference = service.create_training_client(), service.create_reference_client()
    >>> [model.model_name for model in service.get_server_capabilities().supported_models]
    ['Decoder']
    """

    def __init__(
        self,
        models: Mapping[str, Build] | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        profile: str = "tinker",
        user_metadata: Mapping[str, str] | None = None,
        memory_budget: float | None = None,
        mesh: DeviceMesh | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        project_id: str | None = None,
    ) -> None:
        check_metadata(user_metadata)
        check_budget(memory_budget)
        self._budget = memory_budget
        self._models = dict(check_models(MODELS if models is None else models))
        self._ranks = Alone() if mesh is None else Ranks(mesh, device)
        self._device = pick_device(device if mesh is None else mesh.device_type)
        self._dtype, self._profile = dtype, profile_of(profile).name
        self._metadata = dict(user_metadata or {})
        self._bases: dict[str, tuple[nn.Module, Any]] = {}
        self._lock = Lock()

    def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        """The base models that this service knows."""
        return GetServerCapabilitiesResponse([SupportedModel(name) for name in self._models])

    def create_training_client(
        self,
        base_model: str | None = None,
        lora_rank: int = 0,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        lora_alpha: float = lora.ALPHA,
        user_metadata: Mapping[str, str] | None = None,
    ) -> LocalTrainingClient:
        """Training of all parameters, or with a ``lora_rank`` above 0 of adapters, to which alone the rest applies."""
        parts = {"train_mlp": train_mlp, "train_attn": train_attn, "train_unembed": train_unembed}
        if lora_rank != 0:
            return self.create_lora_training_client(
                base_model, lora_rank, seed, **parts, user_metadata=user_metadata, alpha=lora_alpha
            )
        left_out = next((name for name, trained in parts.items() if not trained), None)
        if left_out:
            fix = "Pass a lora_rank: without adapters all parameters are trained."
            raise LossInputError(left_out, "True", repr(parts[left_out]), fix)
        name = self._name(base_model)
        return self._client(LocalTrainingClient, name, self._model(name), user_metadata)

    def create_lora_training_client(
        self,
        base_model: str | None = None,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: Mapping[str, str] | None = None,
        optimizer: Any = None,
        *,
        alpha: float = lora.ALPHA,
    ) -> LocalTrainingClient:
        """Training of adapters of a rank on the parts named, scaled by ``alpha / rank``; needs the extra ``lora``.

        ``seed`` draws the adapters (None takes another one each time). Until the first step the client computes
        exactly what the base model does.
        """
        check_optimizer(optimizer)
        parts = [part for part, on in (("mlp", train_mlp), ("attn", train_attn), ("unembed", train_unembed)) if on]
        name = self._name(base_model)
        model = lora.adapt(self._model(name), rank=rank, parts=parts, alpha=alpha, seed=seed)
        return self._client(LocalTrainingClient, name, model, user_metadata)

    def create_training_client_from_state(
        self,
        path: str | Path,
        base_model: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: Any = None,
    ) -> LocalTrainingClient:
        """The model of a checkpoint, adapters included, with its weights; the optimizer starts afresh.

        ``base_model`` overrides the name in the checkpoint; the model has to be of the same shape.
        """
        check_optimizer(optimizer)
        name, model = self._saved(path, base_model)
        client = self._client(LocalTrainingClient, name, model, user_metadata)
        client.load_state(path).result()
        return client

    def create_training_client_from_state_with_optimizer(
        self,
        path: str | Path,
        base_model: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> LocalTrainingClient:
        """The same with optimizer, steps and random state: training continues as if it had not been interrupted."""
        name, model = self._saved(path, base_model)
        client = self._client(LocalTrainingClient, name, model, user_metadata)
        client.load_state_with_optimizer(path).result()
        return client

    def create_reference_client(
        self,
        base_model: str | None = None,
        *,
        lora_rank: int | None = None,
        policy_client: LocalTrainingClient | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> LocalReferenceClient:
        """The base model behind ``forward`` alone, frozen.

        ``lora_rank`` and ``policy_client`` tell Fireworks where to run it; here it is a copy of its own.
        """
        name = self._name(base_model)
        return self._client(LocalReferenceClient, name, self._model(name).requires_grad_(False), user_metadata)

    def create_sampling_client(
        self,
        model_path: str | Path | None = None,
        base_model: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
    ) -> LocalSamplingClient:
        """A sampler of the weights in a file, or of a base model. There is nothing to retry here."""
        if record_stability_info:
            fix = "The local sampler records nothing but tokens and logprobs."
            raise LossInputError("record_stability_info", "False", repr(record_stability_info), fix)
        if model_path is not None:
            name, model = self._saved(model_path, base_model)
            state.load_weights(model, checkpoint.load(model_path)[0], str(model_path))
        elif base_model is not None:
            name, model = base_model, self._model(base_model)
        else:
            fix = "Either model_path or base_model must be provided."
            raise LossInputError("model_path", "a path, or the name of a base model", "neither", fix)
        return LocalSamplingClient(model, self._base(name)[1], self._ranks)

    get_server_capabilities_async = in_thread(get_server_capabilities)
    create_training_client_async = in_thread(create_training_client)
    create_lora_training_client_async = in_thread(create_lora_training_client)
    create_training_client_from_state_async = in_thread(create_training_client_from_state)
    create_training_client_from_state_with_optimizer_async = in_thread(create_training_client_from_state_with_optimizer)
    create_reference_client_async = in_thread(create_reference_client)
    create_sampling_client_async = in_thread(create_sampling_client)

    # Models

    def _name(self, base_model: str | None) -> Any:
        """The name that was given; without one, the only one there is."""
        return next(iter(self._models)) if base_model is None and len(self._models) == 1 else base_model

    def _base(self, name: Any) -> tuple[nn.Module, Any]:
        """The base model of that name and its tokenizer, built at its first use and never handed out."""
        if not isinstance(name, str) or name not in self._models:
            expected = f"one of {', '.join(map(repr, self._models))}"
            fix = "LocalServiceClient(models={name: build}) adds others."
            raise LossInputError("base_model", expected, repr(name), fix)
        with self._lock:
            if name not in self._bases:
                self._bases[name] = built(name, self._models[name]())
            return self._bases[name]

    def _model(self, name: Any) -> nn.Module:
        """A copy of the base model."""
        return copy.deepcopy(self._base(name)[0]).to(self._device, self._dtype).eval()

    def _saved(self, path: Any, base_model: str | None) -> tuple[str, nn.Module]:
        """Name and model of a checkpoint, still with the base model's weights."""
        check_path("path", path)
        data = checkpoint.metadata(path)
        name: Any = data.get("model") if base_model is None else base_model
        model = self._model(name)
        state.check_description(model, data, str(path))
        return name, lora.adapt(model, **data["lora"]) if data.get("lora") else model

    def _client(self, kind: type[C], name: str, model: nn.Module, user_metadata: Any) -> C:
        check_metadata(user_metadata)
        tokenizer = self._base(name)[1]
        client = kind(
            model,
            tokenizer=tokenizer,
            device=self._device,
            profile=self._profile,
            name=name,
            memory_budget=self._budget,
            mesh=self._ranks.mesh,
        )
        client.user_metadata = self._metadata | dict(user_metadata or {})
        return client


def check_models(models: Any) -> Mapping[str, Build]:
    """Names, and for each a function without arguments."""
    if not isinstance(models, Mapping) or not models or not all(isinstance(name, str) for name in models):
        raise LossInputError("models", "functions by name", repr(models), 'Pass {"name": lambda: (model, tokenizer)}.')
    for name, build in models.items():
        if not callable(build) or isinstance(build, nn.Module):
            expected, fix = f"a function that builds {name!r}", f'Pass {{"{name}": lambda: (model, tokenizer)}}.'
            raise LossInputError("models", expected, f"a {type(build).__name__}", fix)
    return models


def built(name: str, result: Any) -> tuple[nn.Module, Any]:
    """What a function in ``models`` has built, cut loose from what the caller still holds of it."""
    model, tokenizer = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module):
        expected, got = f"a torch module from the function of {name!r}", f"a {type(model).__name__}"
        raise LossInputError("models", expected, got, "Return the model, or (model, tokenizer).")
    return copy.deepcopy(model), tokenizer


def check_optimizer(optimizer: Any) -> None:
    """Refuse another optimizer than AdamW."""
    if optimizer is not None and getattr(optimizer, "type", None) != "adamw":
        raise LossInputError("optimizer", "None or AdamW", repr(optimizer), "The local client steps with AdamW alone.")
