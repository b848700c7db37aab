"""The endpoints that describe the server: its models, sessions, training runs and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lossfns.backend.storage import checkpoint
from lossfns.errors import LossInputError
from lossfns.server.futures import Refused
from lossfns.server.service import Service
from lossfns.server.wire import field

Json = dict[str, Any]
KINDS = {"weights": "training", "sampler_weights": "sampler"}


def capabilities(service: Service, query: Mapping[str, str]) -> Json:
    models = service.local.get_server_capabilities().supported_models
    return {"supported_models": [{"model_name": m.model_name, "trainable": True, "sampleable": True} for m in models]}


def health(service: Service, query: Mapping[str, str]) -> Json:
    return {"status": "ok"}


def get_sampler(service: Service, query: Mapping[str, str], sampler_id: str) -> Json:
    sampler = service.find_sampler(sampler_id)
    return {"sampler_id": sampler_id, "base_model": sampler.base_model, "model_path": sampler.path}


def list_sessions(service: Service, query: Mapping[str, str]) -> Json:
    return {"sessions": paginate(list(service.sessions), query)[0]}


def get_session(service: Service, query: Mapping[str, str], session_id: str) -> Json:
    session = service.sessions.get(session_id)
    if session is None:
        raise Refused(404, f"The session {session_id!r} is unknown.")
    runs = [run["training_run_id"] for run in training_runs(service)]
    return {
        "training_run_ids": [name for name in runs if name.startswith(f"{session_id}:")],
        "sampler_ids": [name for name in service.samplers if name.startswith(f"{session_id}:")],
        "user_metadata": session.user_metadata,
    }


def list_training_runs(service: Service, query: Mapping[str, str]) -> Json:
    runs, cursor = paginate(training_runs(service), query)
    return {"training_runs": runs, "cursor": cursor}


def get_training_run(service: Service, query: Mapping[str, str], model_id: str) -> Json:
    for run in training_runs(service):
        if run["training_run_id"] == model_id:
            return run
    raise Refused(404, f"The training run {model_id!r} is unknown.")


def list_checkpoints(service: Service, query: Mapping[str, str], model_id: str) -> Json:
    get_training_run(service, query, model_id)
    return {"checkpoints": checkpoints(service, model_id)}


def list_all_checkpoints(service: Service, query: Mapping[str, str]) -> Json:
    runs = training_runs(service)
    found = [c for run in runs for c in checkpoints(service, run["training_run_id"])]
    listed, cursor = paginate(sorted(found, key=lambda c: str(c["time"]), reverse=True), query)
    return {"checkpoints": listed, "cursor": cursor}


def weights_info(service: Service, body: Json) -> Json:
    """Describe a checkpoint. SDKs before 0.38 create a model from this description."""
    data = checkpoint.metadata(service.state.saved_checkpoint(field(body, "tinker_path", str)))
    lora = data.get("lora")
    parts = {} if lora is None else {f"train_{part}": part in lora["parts"] for part in ("mlp", "attn", "unembed")}
    rank = None if lora is None else lora["rank"]
    return {"base_model": data["model"], "is_lora": lora is not None, "lora_rank": rank, **parts}


def delete_checkpoint(service: Service, model_id: str, kind: str, name: str) -> None:
    path = service.state.checkpoint(f"tinker://{model_id}/{kind}/{name}")
    if not path.is_file():
        raise Refused(404, f"tinker://{model_id}/{kind}/{name}: no such checkpoint.")
    path.unlink()


def training_runs(service: Service) -> list[Json]:
    """Return all models that were ever created in the folder of the service, the last used one first."""
    runs = [describe_run(service, path) for path in service.state.root.glob("*/*/run.json")]
    return sorted(runs, key=lambda run: str(run["last_request_time"]), reverse=True)


def describe_run(service: Service, path: Path) -> Json:
    run: Json = json.loads(path.read_text())
    saved = checkpoints(service, run["training_run_id"])
    last = {kind: next((c for c in saved if c["checkpoint_type"] == kind), None) for kind in KINDS.values()}
    model = service.models.get(run["training_run_id"])
    return {
        **run,
        "model_owner": "local",
        "last_request_time": iso_time(path.stat().st_mtime if model is None else model.last_request),
        "last_checkpoint": last["training"],
        "last_sampler_checkpoint": last["sampler"],
    }


def checkpoints(service: Service, model_id: str) -> list[Json]:
    """Return the checkpoints of a model, the last one first."""
    found = []
    for kind, name in KINDS.items():
        for path in (service.state.of_model(model_id) / kind).glob("*"):
            try:
                metadata = checkpoint.metadata(path).get("user_metadata")
            except LossInputError:  # one that is being written
                continue
            found.append(
                {
                    "checkpoint_id": f"{kind}/{path.name}",
                    "checkpoint_type": name,
                    "time": iso_time(path.stat().st_mtime),
                    "tinker_path": f"tinker://{model_id}/{kind}/{path.name}",
                    "size_bytes": path.stat().st_size,
                    "user_metadata": metadata,
                }
            )
    return sorted(found, key=lambda c: str(c["time"]), reverse=True)


def iso_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def paginate(items: Sequence[Any], query: Mapping[str, str]) -> tuple[list[Any], Json]:
    """Return at most ``limit`` items from ``offset`` on, and the cursor that describes them."""
    texts = query.get("limit", "100"), query.get("offset", "0")
    limit, offset = (int(x) if len(x) < 19 and x.isdecimal() else -1 for x in texts)
    if not (0 <= limit < 2**31 and 0 <= offset < 2**31):
        raise LossInputError("limit, offset", "whole numbers from 0", f"{dict(query)}"[:200], "Leave them out.")
    cursor = {"offset": offset, "limit": limit, "total_count": len(items)}
    return list(items[offset : offset + limit]), cursor


GET: dict[str, Callable[..., Json]] = {
    "get_server_capabilities": capabilities,
    "healthz": health,
    "samplers/{sampler_id}": get_sampler,
    "sessions": list_sessions,
    "sessions/{session_id}": get_session,
    "training_runs": list_training_runs,
    "training_runs/{model_id}": get_training_run,
    "training_runs/{model_id}/checkpoints": list_checkpoints,
    "checkpoints": list_all_checkpoints,
}
