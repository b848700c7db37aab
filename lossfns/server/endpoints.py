"""The endpoints that take and return JSON, by name: what each reads of its request, and what it asks of the service."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from lossfns.backend.client.requests import check_metadata
from lossfns.backend.client.training import LocalTrainingClient
from lossfns.backend.model.tokenizer import ByteTokenizer
from lossfns.backend.types import AdamParams
from lossfns.errors import LossInputError, show
from lossfns.server import rest, wire
from lossfns.server.custom import create_loss
from lossfns.server.futures import Future
from lossfns.server.model import ServedModel
from lossfns.server.passes import run_pass
from lossfns.server.sampling import SAMPLE, sample
from lossfns.server.service import Sampler, Service, session_of
from lossfns.server.tokenizer import write_byte_tokenizer
from lossfns.server.wire import field, only, sequence_id

Json = dict[str, Any]
Endpoint = Callable[[Service, Json, int | None], Awaitable[Json]]


def promise(future: Future, **more: Any) -> Json:
    """Return the answer to an accepted request."""
    return {"request_id": future.request_id, **more}


# Sessions


async def client_config(service: Service, body: Json, digest: int | None) -> Json:
    """The flags that the SDK reads at its start; those that are not here have the SDK's defaults."""
    return {
        "pjwt_auth_enabled": False,
        "use_pyqwest_transport": True,
        "proto_compress_fwdbwd": False,
        "parallel_fwdbwd_chunks": True,
        "custom_loss_server_side": True,
        "sample_join_sampling_session": False,
        "sample_use_retrieve_futures": False,
    }


async def client_dynamic_config(service: Service, body: Json, digest: int | None) -> Json:
    return {"sample_cancel_enabled": False}


async def create_session(service: Service, body: Json, digest: int | None) -> Json:
    metadata = field(body, "user_metadata", dict, {})
    return {"type": "create_session", "session_id": service.create_session(metadata)}


async def session_heartbeat(service: Service, body: Json, digest: int | None) -> Json:
    service.session(field(body, "session_id", str))
    service.finish_silent_sessions()
    return {"type": "session_heartbeat"}


async def telemetry(service: Service, body: Json, digest: int | None) -> Json:
    """Accepted, and not kept."""
    return {"status": "accepted"}


# Models


async def create_model(service: Service, body: Json, digest: int | None) -> Json:
    only(body, ("session_id", "model_seq_id", "base_model", "user_metadata", "lora_config", "optimizer_config"))
    check_optimizer(body)
    base_model, metadata = field(body, "base_model", str), field(body, "user_metadata", dict, None)
    lora = field(body, "lora_config", dict, None)
    settings: Json = {"lora_rank": 0}
    if lora is not None:
        only(lora, ("rank", "seed", "train_mlp", "train_attn", "train_unembed"))
        settings = {"lora_rank": field(lora, "rank", int), "seed": field(lora, "seed", int, None)}
        settings |= {name: field(lora, name, bool, True) for name in ("train_mlp", "train_attn", "train_unembed")}

    def make() -> tuple[str, LocalTrainingClient]:
        return base_model, service.local.create_training_client(base_model, user_metadata=metadata, **settings)

    number = sequence_id(field(body, "model_seq_id", int), "model_seq_id", 0)
    return promise(service.create_model(field(body, "session_id", str), number, digest, make, metadata))


def check_optimizer(body: Json) -> None:
    optimizer = field(body, "optimizer_config", dict, {"type": "adamw"})
    if optimizer.get("type") != "adamw":
        raise LossInputError("optimizer_config", "adamw", show(optimizer), "This server has AdamW alone.")


async def load_weights(service: Service, body: Json, digest: int | None) -> Json:
    """Load a checkpoint into a model, or create a model from it, where a session is given in place of a model."""
    place = ("model_id", "seq_id") if body.get("model_id") is not None else ("session_id", "model_seq_id")
    only(body, (*place, "path", "optimizer", "optimizer_config", "base_model", "user_metadata", "weights_access_token"))
    path, optimizer = field(body, "path", str), field(body, "optimizer", bool)
    metadata, base_model = field(body, "user_metadata", dict, None), field(body, "base_model", str, None)
    check_optimizer(body)
    check_metadata(metadata)
    file = service.checkpoint(path)

    async def load(model: ServedModel) -> Json:
        client = model.client
        await (client.load_state_with_optimizer(file) if optimizer else client.load_state(file))
        return {"type": "load_weights", "path": path, "model_id": model.model_id}

    def make() -> tuple[str, LocalTrainingClient]:
        if optimizer:
            client = service.local.create_training_client_from_state_with_optimizer(file, base_model, metadata)
        else:
            client = service.local.create_training_client_from_state(file, base_model, metadata)
        return client.get_info().model_name, client

    if "model_id" in place:
        seq_id = sequence_id(field(body, "seq_id", int))
        return promise(service.submit(field(body, "model_id", str), seq_id, digest, "load_weights", load))
    number = sequence_id(field(body, "model_seq_id", int), "model_seq_id", 0)
    session_id = field(body, "session_id", str)
    return promise(service.create_model(session_id, number, digest, make, metadata, path=path))


async def get_info(service: Service, body: Json, digest: int | None) -> Json:
    model = service.model(field(body, "model_id", str))
    info = await model.client.get_info_async()
    tokenizer_id = info.model_data.tokenizer_id
    if tokenizer_id is None and isinstance(model.client.get_tokenizer(), ByteTokenizer):
        tokenizer_id = str(await asyncio.to_thread(write_byte_tokenizer, service.root.resolve() / "byte_tokenizer"))
    return {
        "type": "get_info",
        "model_id": model.model_id,
        "model_name": model.base_model,
        "model_data": {
            "arch": info.model_data.arch,
            "model_name": model.base_model,
            "tokenizer_id": tokenizer_id,
        },
        "is_lora": info.is_lora,
        "lora_rank": info.lora_rank,
    }


# Training


async def forward_backward(service: Service, request: wire.Pass, digest: int | None) -> Json:
    async def run(model: ServedModel) -> Any:
        return await run_pass(model.client, request, service.sessions[session_of(model.model_id)].losses)

    kind = "forward" if request.forward_only else "forward_backward"
    return promise(service.submit(request.model_id, request.seq_id, digest, kind, run))


ADAM = tuple(AdamParams.__dataclass_fields__)


async def optim_step(service: Service, body: Json, digest: int | None) -> Json:
    only(body, ("model_id", "seq_id", "adam_params", "optim_params", "optimizer_params"))
    others = {"adam_params", "optim_params", "optimizer_params"} & set(body)
    params = body.get(next(iter(others))) if len(others) == 1 else None

    async def run(model: ServedModel) -> Json:
        if not isinstance(params, dict) or params.get("type", "adamw") != "adamw":
            raise LossInputError("adam_params", "the settings of AdamW", show(params), "This server has AdamW alone.")
        only(params, ADAM)
        settings = AdamParams(**{k: field(params, k, (int, float)) for k in ADAM if params.get(k) is not None})
        return {"metrics": (await model.client.optim_step(settings)).metrics}

    return promise(submit(service, body, digest, "optim_step", run))


def submit(service: Service, body: Json, digest: int | None, kind: str, run: Any) -> Future:
    """Queue a request of the model and the place that its body names."""
    model_id, seq_id = field(body, "model_id", str), sequence_id(field(body, "seq_id", int))
    return service.submit(model_id, seq_id, digest, kind, run)


async def save_weights(service: Service, body: Json, digest: int | None) -> Json:
    only(body, ("model_id", "seq_id", "path", "ttl_seconds", "overwrite", "user_metadata"))

    async def run(model: ServedModel) -> Json:
        path, file = service.checkpoint_of(model.model_id, "weights", field(body, "path", str))
        overwrite, metadata = field(body, "overwrite", bool, False), field(body, "user_metadata", dict, None)
        await model.client.save_state(file, body.get("ttl_seconds"), overwrite, metadata)
        return {"type": "save_weights", "path": path}

    return promise(submit(service, body, digest, "save_weights", run))


async def save_weights_for_sampler(service: Service, body: Json, digest: int | None) -> Json:
    """Save weights under a name; without one, keep a copy in memory and return a sampling session of it.

    An ``inflight`` session may sample from newer weights. Here it does not: it is a snapshot as well.
    """
    names = ("model_id", "seq_id", "path", "ttl_seconds", "user_metadata", "sampling_session_seq_id", "kind")
    only(body, names)

    async def run(model: ServedModel) -> Json:
        name, kind = field(body, "path", str, None), field(body, "kind", str, "snapshot")
        if name is not None:
            path, file = service.checkpoint_of(model.model_id, "sampler_weights", name)
            metadata = field(body, "user_metadata", dict, None)
            await model.client.save_weights_for_sampler(file, body.get("ttl_seconds"), metadata)
            return {"type": "save_weights_for_sampler", "path": path}
        if kind not in ("snapshot", "inflight"):
            raise LossInputError("kind", "'snapshot' or 'inflight'", show(kind), "Leave it out for a snapshot.")
        number = sequence_id(field(body, "sampling_session_seq_id", int), "sampling_session_seq_id", 0)
        client = await model.client.save_weights_and_get_sampling_client_async()
        session_id = model.model_id.partition(":")[0]
        sampler = service.add_sampler(session_id, number, Sampler(model.base_model, None, client))
        return {"type": "save_weights_for_sampler", "sampling_session_id": sampler}

    return promise(submit(service, body, digest, "save_weights_for_sampler", run))


async def create_custom_loss(service: Service, body: Json, digest: int | None) -> Json:
    return promise(create_loss(service, body, digest))


# Sampling


async def create_sampling_session(service: Service, body: Json, digest: int | None) -> Json:
    only(body, ("session_id", "sampling_session_seq_id", "base_model", "model_path"))
    session_id, base_model = field(body, "session_id", str), field(body, "base_model", str, None)
    path = field(body, "model_path", str, None)
    number = sequence_id(field(body, "sampling_session_seq_id", int), "sampling_session_seq_id", 0)
    service.session(session_id)
    sampler = Sampler(service.base_model_of(path, base_model), path)
    return {"type": "create_sampling_session", "sampling_session_id": service.add_sampler(session_id, number, sampler)}


async def asample(service: Service, body: Json, digest: int | None) -> Json:
    """Sample. The answer has an id for each sample, as the SDK asserts."""
    only(body, SAMPLE)
    service.refuse_if_stopping()
    session, seq_id = field(body, "sampling_session_id", str), sequence_id(field(body, "seq_id", int), start=0)
    count = field(body, "num_samples", int, 1)
    if not 1 <= count <= 4096:
        raise LossInputError("num_samples", "a whole number from 1 to 4096", str(count), "Send several requests.")
    request_id = f"{session}:{seq_id}"
    future = service.futures.repeated(request_id, digest)
    if future is None:
        service.find_sampler(session)
        service.session(session_of(session))

        async def run() -> Any:
            return await sample(await service.sampler(session), count, body)

        future = service.start(service.futures.begin(request_id, digest), run)
    return promise(future, sample_sequence_ids=[f"{request_id}:{i}" for i in range(count)])


async def weights_info(service: Service, body: Json, digest: int | None) -> Json:
    only(body, ("tinker_path",))
    return await asyncio.to_thread(rest.weights_info, service, body)


POST: dict[str, Endpoint] = {
    "client/config": client_config,
    "client/dynamic_config": client_dynamic_config,
    "create_session": create_session,
    "session_heartbeat": session_heartbeat,
    "telemetry": telemetry,
    "create_model": create_model,
    "load_weights": load_weights,
    "get_info": get_info,
    "optim_step": optim_step,
    "save_weights": save_weights,
    "save_weights_for_sampler": save_weights_for_sampler,
    "create_custom_loss": create_custom_loss,
    "create_sampling_session": create_sampling_session,
    "asample": asample,
    "weights_info": weights_info,
}
