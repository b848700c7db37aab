"""The endpoints that take and return JSON, by name: each reads its request and calls the service."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from lossfns.backend.client.requests import check_metadata
from lossfns.backend.client.training import LocalTrainingClient
from lossfns.backend.model.tokenizer import ByteTokenizer, write_byte_tokenizer
from lossfns.backend.types import AdamParams
from lossfns.errors import LossInputError, show
from lossfns.server import rest, wire
from lossfns.server.custom import create_loss
from lossfns.server.futures import Future
from lossfns.server.model import ServedModel
from lossfns.server.passes import run_pass
from lossfns.server.results import to_json
from lossfns.server.samplers import Sampler
from lossfns.server.sampling import SAMPLE_FIELDS, sample
from lossfns.server.service import Service
from lossfns.server.session import session_of
from lossfns.server.wire import field, only, sequence_id

Json = dict[str, Any]

METADATA_BYTES = 2**16
"""The largest metadata of a session, in bytes of JSON. The server keeps them as long as it runs."""

MOST_SAMPLES = 4096
"""The most samples of a request."""

Endpoint = Callable[[Service, Json, int | None], Awaitable[Json]]


def promise(future: Future, **more: Any) -> Json:
    """Return the answer to an accepted request."""
    return {"request_id": future.request_id, **more}


# Sessions


async def client_config(service: Service, body: Json, digest: int | None) -> Json:
    """Return the flags that the SDK reads at its start. Flags that are not here have the SDK's defaults."""
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
    if len(to_json(metadata)) > METADATA_BYTES:
        raise LossInputError("user_metadata", f"at most {METADATA_BYTES} bytes", "more", "Send less.")
    return {"type": "create_session", "session_id": service.create_session(metadata)}


async def session_heartbeat(service: Service, body: Json, digest: int | None) -> Json:
    service.session(field(body, "session_id", str))
    service.finish_silent_sessions()
    return {"type": "session_heartbeat"}


async def telemetry(service: Service, body: Json, digest: int | None) -> Json:
    """Accept events. They are not kept."""
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
        raise LossInputError("optimizer_config", "adamw", show(optimizer), "Leave it out: this server has AdamW alone.")


LOAD_FIELDS = ("path", "optimizer", "optimizer_config", "base_model", "user_metadata", "weights_access_token")


async def load_weights(service: Service, body: Json, digest: int | None) -> Json:
    """Load a checkpoint into a model, or create a model from it if the body names no model."""
    if body.get("model_id") is not None:
        return promise(submit(service, body, digest, "load_weights", LOAD_FIELDS, load))
    metadata, path = field(body, "user_metadata", dict, None), field(body, "path", str)

    def make() -> tuple[str, LocalTrainingClient]:
        only(body, ("session_id", "model_seq_id", *LOAD_FIELDS))
        check_optimizer(body)
        file, base_model = service.state.saved_checkpoint(path), field(body, "base_model", str, None)
        if field(body, "optimizer", bool):
            client = service.local.create_training_client_from_state_with_optimizer(file, base_model, metadata)
        else:
            client = service.local.create_training_client_from_state(file, base_model, metadata)
        return client.get_info().model_name, client

    number = sequence_id(field(body, "model_seq_id", int), "model_seq_id", 0)
    return promise(service.create_model(field(body, "session_id", str), number, digest, make, metadata, path=path))


async def load(service: Service, model: ServedModel, body: Json) -> Json:
    path = field(body, "path", str)
    file, client = service.state.saved_checkpoint(path), model.client
    check_metadata(field(body, "user_metadata", dict, None))
    await (client.load_state_with_optimizer(file) if field(body, "optimizer", bool) else client.load_state(file))
    return {"type": "load_weights", "path": path, "model_id": model.model_id}


def reads_bytes(client: LocalTrainingClient) -> bool:
    """Return whether a client has the byte tokenizer. A model may have no tokenizer."""
    try:
        return isinstance(client.get_tokenizer(), ByteTokenizer)
    except LossInputError:
        return False


async def get_info(service: Service, body: Json, digest: int | None) -> Json:
    model = service.model(field(body, "model_id", str))
    info = await model.client.get_info_async()
    tokenizer_id = info.model_data.tokenizer_id
    if tokenizer_id is None and reads_bytes(model.client):
        tokenizer_id = str(write_byte_tokenizer(service.state.root.resolve() / "byte_tokenizer"))
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


# Training. Once the model and the place of a request are known, an error makes its future fail: the place is taken.

RunBody = Callable[[Service, ServedModel, Json], Awaitable[Any]]


def submit(service: Service, body: Json, digest: int | None, kind: str, names: Iterable[str], run: RunBody) -> Future:
    """Queue a request at the model and the place that its body names. ``names`` are its other fields."""
    model_id, seq_id = field(body, "model_id", str), sequence_id(field(body, "seq_id", int))

    async def checked(model: ServedModel) -> Any:
        only(body, ("model_id", "seq_id", *names))
        return await run(service, model, body)

    return service.submit(model_id, seq_id, digest, kind, checked)


async def forward_backward(service: Service, request: wire.Pass, digest: int | None, nbytes: int) -> Json:
    """Queue a pass, from a body of ``nbytes``."""

    async def run(model: ServedModel) -> Any:
        return await run_pass(model.client, request, service.sessions[session_of(model.model_id)].losses)

    kind = "forward" if request.forward_only else "forward_backward"
    return promise(service.submit(request.model_id, request.seq_id, digest, kind, run, nbytes))


ADAM_FIELDS = tuple(AdamParams.__dataclass_fields__)
PARAMS_FIELDS = ("adam_params", "optim_params", "optimizer_params")


async def optim_step(service: Service, body: Json, digest: int | None) -> Json:
    return promise(submit(service, body, digest, "optim_step", PARAMS_FIELDS, step))


async def step(service: Service, model: ServedModel, body: Json) -> Json:
    sent = [body[name] for name in PARAMS_FIELDS if name in body]
    if len(sent) != 1 or not isinstance(sent[0], dict) or sent[0].get("type", "adamw") != "adamw":
        raise LossInputError("adam_params", "the settings of AdamW", show(sent), "Send one object of type adamw.")
    (params,) = sent
    only(params, ADAM_FIELDS)
    settings = AdamParams(**{k: field(params, k, (int, float)) for k in ADAM_FIELDS if params.get(k) is not None})
    return {"metrics": (await model.client.optim_step(settings)).metrics}


async def save_weights(service: Service, body: Json, digest: int | None) -> Json:
    names = ("path", "ttl_seconds", "overwrite", "user_metadata")
    return promise(submit(service, body, digest, "save_weights", names, save))


async def save(service: Service, model: ServedModel, body: Json) -> Json:
    path, file = service.state.new_checkpoint(model.model_id, "weights", field(body, "path", str))
    overwrite, metadata = field(body, "overwrite", bool, False), field(body, "user_metadata", dict, None)
    await model.client.save_state(file, body.get("ttl_seconds"), overwrite, metadata)
    return {"type": "save_weights", "path": path}


async def save_weights_for_sampler(service: Service, body: Json, digest: int | None) -> Json:
    names = ("path", "ttl_seconds", "user_metadata", "sampling_session_seq_id", "kind")
    return promise(submit(service, body, digest, "save_weights_for_sampler", names, save_for_sampler))


async def save_for_sampler(service: Service, model: ServedModel, body: Json) -> Json:
    """Save weights under a name; without one, keep a copy in memory and return a sampling session of it.

    An ``inflight`` session may sample from newer weights. Here it is a snapshot as well.
    """
    name, kind = field(body, "path", str, None), field(body, "kind", str, "snapshot")
    if name is not None:
        path, file = service.state.new_checkpoint(model.model_id, "sampler_weights", name)
        metadata = field(body, "user_metadata", dict, None)
        await model.client.save_weights_for_sampler(file, body.get("ttl_seconds"), metadata)
        return {"type": "save_weights_for_sampler", "path": path}
    if kind not in ("snapshot", "inflight"):
        raise LossInputError("kind", "'snapshot' or 'inflight'", show(kind), "Leave it out for a snapshot.")
    number = sequence_id(field(body, "sampling_session_seq_id", int), "sampling_session_seq_id", 0)
    client = await model.client.save_weights_and_get_sampling_client_async()
    sampler = service.add_sampler(session_of(model.model_id), number, Sampler(model.base_model, None, client))
    return {"type": "save_weights_for_sampler", "sampling_session_id": sampler}


async def save_weights_external(service: Service, body: Json, digest: int | None) -> Json:
    return promise(submit(service, body, digest, "save_weights_external", body, refuse_external))


async def refuse_external(service: Service, model: ServedModel, body: Json) -> Json:
    fix = "Take save_state, whose file is on this machine."
    raise LossInputError("save_weights_external", "a save in the server's own format", "an external one", fix)


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
    """Queue a sampling request. The answer has an id for each sample, which the SDK asserts."""
    only(body, SAMPLE_FIELDS)
    service.refuse_if_stopping()
    session, seq_id = field(body, "sampling_session_id", str), sequence_id(field(body, "seq_id", int), start=0)
    count = field(body, "num_samples", int, 1)
    if not 1 <= count <= MOST_SAMPLES:
        expected = f"a whole number from 1 to {MOST_SAMPLES}"
        raise LossInputError("num_samples", expected, str(count), "Send several requests.")
    request_id = f"{session}:{seq_id}"
    future = service.futures.repeated(request_id, digest)
    if future is None:
        service.find_sampler(session)
        service.session(session_of(session))

        async def run() -> Any:
            return await sample(*await service.sampler(session), count, body)

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
    "save_weights_external": save_weights_external,
    "create_custom_loss": create_custom_loss,
    "create_sampling_session": create_sampling_session,
    "asample": asample,
    "weights_info": weights_info,
}
