"""Custom losses that the clients of a session upload, and that the server runs in one forward and backward pass."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lossfns.backend.client.profiles import with_reductions
from lossfns.backend.client.training import LocalTrainingClient
from lossfns.backend.types import ForwardBackwardOutput
from lossfns.datum import Datum, TensorData
from lossfns.errors import LossInputError, show
from lossfns.export.per_datum import per_datum
from lossfns.server.futures import Future
from lossfns.server.graph import read_inputs, rebuild
from lossfns.server.service import Service
from lossfns.server.session import UploadedLoss
from lossfns.server.wire import Pass, field, only, sequence_id

MOST_LOSSES = 256
"""The most uploaded losses of a session."""


def create_loss(service: Service, body: dict[str, Any], digest: int | None) -> Future:
    """Begin to rebuild an uploaded loss. The result has its id, which names it in the passes of the session."""
    only(body, ("session_id", "custom_loss_seq_id", "name", "inputs", "graph"))
    session = service.session(field(body, "session_id", str))
    number = sequence_id(field(body, "custom_loss_seq_id", int), "custom_loss_seq_id", 0)
    loss_id = f"{session.session_id}:loss:{number}"
    if (repeated := service.futures.repeated(loss_id, digest)) is not None:
        return repeated
    service.refuse_if_stopping()
    if loss_id in session.losses:
        raise LossInputError("custom_loss_seq_id", "one that is not taken", str(number), "Take the next one.")

    async def create() -> dict[str, str]:
        if len(session.losses) >= MOST_LOSSES:
            fix = "Use those that there are, or create another ServiceClient."
            raise LossInputError("create_custom_loss", f"at most {MOST_LOSSES} losses in a session", "one more", fix)
        session.losses[loss_id] = await asyncio.to_thread(rebuild_loss, body)
        return {"type": "create_custom_loss", "loss_id": loss_id}

    return service.start(service.futures.begin(loss_id, digest), create)


def rebuild_loss(body: dict[str, Any]) -> UploadedLoss:
    """Rebuild a loss from a request of ``create_custom_loss``."""
    graph, inputs = field(body, "graph", dict), field(body, "inputs", list)
    ranks = read_inputs(inputs)
    return UploadedLoss(per_datum(rebuild(graph, inputs), ranks), ranks, body)


async def run_loss(
    client: LocalTrainingClient, request: Pass, losses: Mapping[str, UploadedLoss]
) -> ForwardBackwardOutput:
    """Run a pass with an uploaded loss, whose metrics already have their reduction in the name."""
    uploaded = losses.get(str(request.config.get("loss_id")))
    if uploaded is None or len(request.config) != 1:
        fix = "create_custom_loss returns it; it belongs to the session. Or use forward_backward_custom."
        raise LossInputError("loss_fn_config", "{'loss_id': the id of an uploaded loss}", show(request.config), fix)
    if request.forward_only:
        fix = "Take forward_backward_custom, or forward with a built-in loss."
        raise LossInputError("forward", "a built-in loss", "an uploaded one", fix)
    if isinstance(request.data, LossInputError):
        raise request.data
    scalars = [name for name, rank in uploaded.ranks.items() if rank == 0]
    data = [with_scalars(datum, scalars) for datum in request.data] if scalars else request.data
    result = await client.forward_backward_custom(data, uploaded.loss)
    reduced = {name: x for name, x in result.metrics.items() if ":" in name}
    others = {name: x for name, x in result.metrics.items() if ":" not in name}
    return replace(result, metrics=reduced | with_reductions(others))


def with_scalars(datum: Datum, names: Sequence[str]) -> Datum:
    """Return a datum whose fields of these names are 0-d: in protobuf, the shape [] looks like no shape."""
    fields = dict(datum.loss_fn_inputs)
    for name in names:
        if name in fields and fields[name].shape == [1]:
            fields[name] = TensorData(fields[name].to_numpy().reshape(()), fields[name].dtype, [])
    return Datum(datum.model_input, fields)
