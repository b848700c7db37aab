"""The service client: it creates clients of base models by name, as the hosted services' own does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from lossfns.backend.client.profiles import find_profile
from lossfns.backend.client.reference import LocalReferenceClient, check_dtype, embedded_model, pick_device
from lossfns.backend.client.requests import check_flag, check_metadata, check_path
from lossfns.backend.client.sampling import LocalSamplingClient
from lossfns.backend.client.training import LocalTrainingClient
from lossfns.backend.engine import state
from lossfns.backend.engine.budget import check_budget
from lossfns.backend.engine.names import renamed
from lossfns.backend.engine.ranks import Ranks, SingleProcess
from lossfns.backend.futures import async_in_thread
from lossfns.backend.model import lora
from lossfns.backend.storage import checkpoint
from lossfns.errors import LossInputError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

C = TypeVar("C", bound=LocalReferenceClient)

ModelBuilder = Callable[[], nn.Module | tuple[nn.Module, Any]]
"""Builds a base model, or a base model and its tokenizer."""

MODELS: dict[str, ModelBuilder] = {"Decoder": embedded_model}
"""The base models of a service that is created without ``models``."""


@dataclass(frozen=True)
class SupportedModel:
    """A base model that clients can use. Only memory limits the context length, so it is None."""

    model_name: str
    max_context_length: int | None = None
    trainable: bool = True


@dataclass(frozen=True)
class GetServerCapabilitiesResponse:
    """The base models of a service."""

    supported_models: list[SupportedModel]


class LocalServiceClient:
    """Creates training, reference and sampling clients of base models by name.

    Args:
        models: for each name a function without arguments that builds the model, or ``(model, tokenizer)``. It is
            called once, at the first use. Every client gets a copy: all start from the same weights, and none changes
            another's. Adapters that a model comes with are merged into its weights. None provides ``"Decoder"``, a
            small byte-level decoder.
        device, dtype, profile, memory_budget, mesh: arguments of every client, as in ``LocalReferenceClient``. Under a
            mesh, each process creates the same clients in the same order.
        user_metadata: strings by name that every checkpoint of every training client carries.
        base_url, api_key, project_id: not used; nothing is sent.

    ``base_model`` may be omitted if the service has one model only. A client is returned at once; code that expects a
    future may call ``.result()`` on it or await it.

    Raises LossInputError for models that are no functions by name, an unknown device or profile, or a budget that is no
    positive number.

    >>> service = LocalServiceClient(device="cpu")
    >>> policy, reference = service.create_training_client(), service.create_reference_client()
    >>> [model.model_name for model in service.get_server_capabilities().supported_models]
    ['Decoder']
    """

    def __init__(
        self,
        models: Mapping[str, ModelBuilder] | None = None,
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
        check_dtype(dtype)
        self._budget = memory_budget
        self._models = dict(check_models(MODELS if models is None else models))
        self._ranks = SingleProcess() if mesh is None else Ranks(mesh, device)
        self._device = pick_device(device if mesh is None else mesh.device_type)
        self._dtype, self._profile = dtype, find_profile(profile).name
        self._metadata = dict(user_metadata or {})
        self._bases: dict[str, tuple[nn.Module, Any]] = {}
        self._lock = Lock()

    def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        """Return the base models that clients can use."""
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
        """Create a client that trains all parameters, or adapters if ``lora_rank`` is above 0.

        Args:
            base_model: the model's name.
            lora_rank: 0, or the rank of the adapters.
            seed, train_mlp, train_attn, train_unembed, lora_alpha: of the adapters, as in
                ``create_lora_training_client``.
            user_metadata: strings by name for every checkpoint of the client, in addition to those of the service.

        Raises LossInputError for an unknown model, and for a ``train_*`` that is False without adapters.
        """
        parts = {"train_mlp": train_mlp, "train_attn": train_attn, "train_unembed": train_unembed}
        for flag, value in parts.items():
            check_flag(flag, value)
        if lora_rank != 0:
            return self.create_lora_training_client(
                base_model, lora_rank, seed, **parts, user_metadata=user_metadata, alpha=lora_alpha
            )
        left_out = next((name for name, trained in parts.items() if not trained), None)
        if left_out:
            fix = "Pass a lora_rank: without adapters all parameters are trained."
            raise LossInputError(left_out, "True", repr(parts[left_out]), fix)
        name = self._resolve_name(base_model)
        return self._make_client(LocalTrainingClient, name, self._copied_base(name), user_metadata)

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
        """Create a client that trains low-rank adapters. Until its first step it computes what the base model does.

        Args:
            base_model: the model's name.
            rank: rank of the adapters.
            seed: seed of the adapters' weights; None draws another one each time.
            train_mlp, train_attn, train_unembed: which linear layers get adapters: those outside of attention, those of
                attention, and the head.
            user_metadata: strings by name for every checkpoint of the client, in addition to those of the service.
            optimizer: None or AdamW.
            alpha: adapters are scaled by ``alpha / rank``.

        It needs the extra ``lora``. Raises LossInputError for an unknown model, a rank below 1, another optimizer, or a
        model that has no layers in a part.
        """
        check_optimizer(optimizer)
        flags = {"mlp": train_mlp, "attn": train_attn, "unembed": train_unembed}
        for part, value in flags.items():
            check_flag(f"train_{part}", value)
        parts = [part for part, on in flags.items() if on]
        name = self._resolve_name(base_model)
        model = lora.adapt(self._copied_base(name), rank=rank, parts=parts, alpha=alpha, seed=seed)
        return self._make_client(LocalTrainingClient, name, model, user_metadata)

    def create_training_client_from_state(
        self,
        path: str | Path,
        base_model: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: Any = None,
    ) -> LocalTrainingClient:
        """Create a training client with the weights of a checkpoint, adapters included, and a new optimizer.

        Args:
            path: a path that ``save_state`` or ``save_weights_for_sampler`` has written.
            base_model: overrides the model's name in the checkpoint; the model must have the same shape.
            user_metadata: strings by name for every checkpoint of the client, in addition to those of the service.
            weights_access_token: not used.
            optimizer: None or AdamW.

        Raises LossInputError for a file that is missing, damaged or of another model.
        """
        check_optimizer(optimizer)
        name, model = self._model_of_checkpoint(path, base_model)
        client = self._make_client(LocalTrainingClient, name, model, user_metadata)
        client.load_state(path).result()
        return client

    def create_training_client_from_state_with_optimizer(
        self,
        path: str | Path,
        base_model: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> LocalTrainingClient:
        """Create a training client that continues a ``save_state`` as if training had not been interrupted.

        It takes the optimizer's state, the number of steps and torch's random state as well. Arguments and errors are
        those of ``create_training_client_from_state``; weights for a sampler are refused as well.
        """
        name, model = self._model_of_checkpoint(path, base_model)
        client = self._make_client(LocalTrainingClient, name, model, user_metadata)
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
        """Create a client of the frozen base model, which has only ``forward``.

        Args:
            base_model: the model's name.
            lora_rank, policy_client: not used. They tell Fireworks where to run the model; here it is a copy.
            user_metadata: accepted as for other clients; a reference client saves nothing.

        Raises LossInputError for an unknown model.
        """
        name = self._resolve_name(base_model)
        return self._make_client(
            LocalReferenceClient, name, self._copied_base(name).requires_grad_(False), user_metadata
        )

    def create_sampling_client(
        self,
        model_path: str | Path | None = None,
        base_model: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
    ) -> LocalSamplingClient:
        """Create a client that samples from the weights of a checkpoint, or from a base model.

        Args:
            model_path: the path of a checkpoint; None samples from the base model.
            base_model: the model's name. With a checkpoint it overrides the name in the file.
            retry_config: not used, as nothing is sent.
            record_stability_info: False; the local sampler records only tokens and logprobs.

        Raises LossInputError if neither is given, for an unknown model, and for a file that is missing, damaged or of
        another model.
        """
        if record_stability_info:
            fix = "The local sampler records nothing but tokens and logprobs."
            raise LossInputError("record_stability_info", "False", repr(record_stability_info), fix)
        if model_path is not None:
            name, model = self._model_of_checkpoint(model_path, base_model)
            tensors, _ = renamed(model, *checkpoint.load(model_path))
            state.load_weights(model, tensors, str(model_path))
        elif base_model is not None:
            name, model = base_model, self._copied_base(base_model)
        else:
            fix = "Either model_path or base_model must be provided."
            raise LossInputError("model_path", "a path, or the name of a base model", "neither", fix)
        return LocalSamplingClient(model, self._base_model(name)[1], self._ranks)

    get_server_capabilities_async = async_in_thread(get_server_capabilities)
    create_training_client_async = async_in_thread(create_training_client)
    create_lora_training_client_async = async_in_thread(create_lora_training_client)
    create_training_client_from_state_async = async_in_thread(create_training_client_from_state)
    create_training_client_from_state_with_optimizer_async = async_in_thread(
        create_training_client_from_state_with_optimizer
    )
    create_reference_client_async = async_in_thread(create_reference_client)
    create_sampling_client_async = async_in_thread(create_sampling_client)

    # Models

    def _resolve_name(self, base_model: str | None) -> Any:
        """Return the name that was given; without one, the name of the only model."""
        return next(iter(self._models)) if base_model is None and len(self._models) == 1 else base_model

    def _base_model(self, name: Any) -> tuple[nn.Module, Any]:
        """Return a base model and its tokenizer, built at the first use. Clients get copies, never the model itself."""
        if not isinstance(name, str) or name not in self._models:
            expected = f"one of {', '.join(map(repr, self._models))}"
            fix = "LocalServiceClient(models={name: build}) adds others, as does lossfns serve --model NAME=MODEL."
            raise LossInputError("base_model", expected, repr(name), fix)
        with self._lock:
            if name not in self._bases:
                self._bases[name] = copied_model(name, self._models[name]())
            return self._bases[name]

    def _copied_base(self, name: Any) -> nn.Module:
        """Return a copy of a base model, with the service's device and dtype."""
        return copy.deepcopy(self._base_model(name)[0]).to(self._device, self._dtype).eval()

    def _model_of_checkpoint(self, path: Any, base_model: str | None) -> tuple[str, nn.Module]:
        """Return the name of a checkpoint's model and a copy of the base model, with the checkpoint's adapters.

        The weights are still those of the base model.
        """
        check_path("path", path)
        data = checkpoint.metadata(path)
        name: Any = data.get("model") if base_model is None else base_model
        model = self._copied_base(name)
        state.check_description(model, data, str(path))
        return name, model if data.get("lora") is None else adapted_as_saved(model, data["lora"], str(path))

    def _make_client(self, kind: type[C], name: str, model: nn.Module, user_metadata: Any) -> C:
        """Create a client of a model with the service's settings and metadata."""
        check_metadata(user_metadata)
        tokenizer = self._base_model(name)[1]
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


def check_models(models: Any) -> Mapping[str, ModelBuilder]:
    """Refuse anything but functions by name."""
    if not isinstance(models, Mapping) or not models or not all(isinstance(name, str) for name in models):
        raise LossInputError("models", "functions by name", repr(models), 'Pass {"name": lambda: (model, tokenizer)}.')
    for name, build in models.items():
        if not callable(build) or isinstance(build, nn.Module):
            expected, fix = f"a function that builds {name!r}", f'Pass {{"{name}": lambda: (model, tokenizer)}}.'
            raise LossInputError("models", expected, f"a {type(build).__name__}", fix)
    return models


def copied_model(name: str, built: Any) -> tuple[nn.Module, Any]:
    """Copy the model that the function of ``name`` has built, since its owner may change it; add its tokenizer.

    Adapters are merged into the weights of the copy.
    """
    model, tokenizer = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module):
        expected, got = f"a torch module from the function of {name!r}", f"a {type(model).__name__}"
        raise LossInputError("models", expected, got, "Return the model, or (model, tokenizer).")
    copied = copy.deepcopy(model)
    lora.merge(copied)
    return copied, tokenizer


def adapted_as_saved(model: nn.Module, settings: Any, path: str) -> nn.Module:
    """Put the adapters of a checkpoint on a model, from the settings in the file."""
    expected, fix = "adapters that this model can have", "Build the same model first."
    if not isinstance(settings, dict) or set(settings) != {"rank", "parts", "alpha"}:
        raise LossInputError("path", expected, f"{path}, with {settings!r}", fix)
    parts = settings["parts"]
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise LossInputError("path", expected, f"{path}, with parts {parts!r}", fix)
    try:
        return lora.adapt(model, **settings)
    except LossInputError as error:
        raise LossInputError("path", expected, f"{path} ({error})", fix) from error


def check_optimizer(optimizer: Any) -> None:
    """Refuse any optimizer but AdamW."""
    if optimizer is not None and getattr(optimizer, "type", None) != "adamw":
        raise LossInputError("optimizer", "None or AdamW", repr(optimizer), "The local client has AdamW alone.")
