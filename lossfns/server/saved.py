"""The state that a server saves when it stops, and that the next server in the same folder restores.

Each model is a checkpoint with its optimizer, beside a file of the gradient that it has accumulated. ``stopped.json``
has the rest: sessions, places in the sequences of requests, samplers, uploaded losses, and results that were not read.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
from pathlib import Path
from typing import Any

from lossfns.backend.client.training import LocalTrainingClient
from lossfns.backend.storage import checkpoint
from lossfns.errors import LossInputError
from lossfns.server.custom import rebuild_loss
from lossfns.server.futures import Future
from lossfns.server.model import ServedModel, log
from lossfns.server.results import Encoded, encode
from lossfns.server.samplers import Sampler
from lossfns.server.service import Service
from lossfns.server.session import Session, session_of
from lossfns.server.wire import PROTOBUF

INDEX_FILE, FAILED_FILE = "stopped.json", "not_restored.json"


async def save(service: Service) -> None:
    """Save the models of a service that has stopped, and what their clients need to go on."""
    models = []
    for model in service.models.values():
        try:
            models.append(await asyncio.to_thread(save_model, service, model))
        except LossInputError as error:  # save the other models all the same
            log.error("The model %s is not saved: %s", model.model_id, error)
    index = {
        "sessions": [[s.session_id, s.user_metadata] for s in service.sessions.values() if not s.finished],
        "models": models,
        "samplers": [[name, s.base_model, s.path] for name, s in service.samplers.items() if s.reloadable],
        "losses": [[name, loss.request] for s in service.sessions.values() for name, loss in s.losses.items()],
        "futures": [saved_future(future) for future in service.futures.by_id.values() if future.finished],
    }
    root = service.state.root
    root.mkdir(parents=True, exist_ok=True)
    part = root / f"{INDEX_FILE}.part"
    part.write_text(json.dumps(index))
    os.replace(part, root / INDEX_FILE)
    log.warning("%d of %d models saved in %s.", len(models), len(service.models), root)


def save_model(service: Service, model: ServedModel) -> dict[str, Any]:
    folder = service.state.of_model(model.model_id)
    parameters = dict(model.client.model.named_parameters())
    gradient = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    checkpoint.save(folder / "stopped.gradient", gradient, {})
    for p in parameters.values():
        p.grad = None  # a checkpoint of a state has none
    model.client.save_state(folder / "stopped.state", overwrite=True).result()
    failed = model.failed_gradient
    return {
        "model_id": model.model_id,
        "base_model": model.base_model,
        "next_seq": model.next_seq,
        "user_metadata": model.user_metadata,
        "failed_gradient": None if failed is None else [failed.request_id, failed.error],
    }


def saved_future(future: Future) -> dict[str, Any]:
    """Return a future as plain data, its result in both forms that a client may ask for."""
    saved = {"request_id": future.request_id, "error": future.error, "category": future.category}
    for name, accept in (("protobuf", PROTOBUF), ("json", "")):
        saved[name] = None if future.error else base64.b64encode(encode(future.result, accept)[1]).decode()
    return saved


async def restore(service: Service) -> None:
    """Restore the state of the last server in this folder, and remove its index, which will be out of date."""
    path = service.state.root / INDEX_FILE
    if not path.exists():
        return
    index = json.loads(path.read_text())
    for session_id, metadata in index["sessions"]:
        service.sessions[session_id] = Session(session_id, metadata)
    for saved in index["futures"]:
        future = service.futures.by_id[saved["request_id"]] = Future(saved["request_id"], None)
        if saved["error"] is None:
            future.set_result(Encoded(base64.b64decode(saved["protobuf"]), base64.b64decode(saved["json"])))
        else:
            future.set_error(saved["error"], saved["category"])
        service.futures.finish(future)
    for name, request in index["losses"]:
        loss = await asyncio.to_thread(rebuild_loss, request)
        service.sessions[session_of(name)].losses[name] = loss
    for name, base_model, weights in index["samplers"]:
        service.samplers[name] = Sampler(base_model, weights)
    failed = []
    for saved in index["models"]:
        try:
            client = await asyncio.to_thread(load_model, service, service.state.of_model(saved["model_id"]), saved)
        except Exception:  # restore the other models all the same
            log.exception("The model %s is not restored. Its entry is kept in %s.", saved["model_id"], FAILED_FILE)
            failed.append(saved)
            continue
        model = service.add_model(saved["model_id"], client, saved["base_model"], saved["user_metadata"])
        model.next_seq = saved["next_seq"]
        if saved["failed_gradient"] is not None:
            request_id, error = saved["failed_gradient"]
            model.failed_gradient = service.futures.by_id.get(request_id) or Future(request_id, None)
            model.failed_gradient.set_error(error)
    if failed:
        (service.state.root / FAILED_FILE).write_text(json.dumps({"models": failed}))
    path.unlink()


def load_model(service: Service, folder: Path, saved: dict[str, Any]) -> LocalTrainingClient:
    client = service.local.create_training_client_from_state_with_optimizer(
        folder / "stopped.state", saved["base_model"], saved["user_metadata"]
    )
    gradient, _ = checkpoint.load(folder / "stopped.gradient")
    for name, p in client.model.named_parameters():
        if name in gradient:
            p.grad = gradient[name].to(p)
    return client
