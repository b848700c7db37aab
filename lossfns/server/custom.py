"""Custom losses that the clients of a session upload, and that the server runs in one forward and backward pass."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lossfns.backend.client.profiles import with_reductions
from lossfns.backend.client.training import LocalTrainingClient
from lossfns.backend.types import ForwardBackwardOutput
from lossfns.errors import LossInputError, show
from lossfns.export.per_datum import per_datum
from lossfns.loss import LossFn
from lossfns.server.futures import Future
from lossfns.server.graph import read_inputs, rebuild
from lossfns.server.service import Service
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

    async def create() -> dict[str, str]:
        graph, inputs = field(body, "graph", dict), field(body, "inputs", list)
        if len(session.losses) >= MOST_LOSSES:
            fix = "Use those that there are, or create another ServiceClient."
            raise LossInputError("create_custom_loss", f"at most {MOST_LOSSES} losses in a session", "one more", fix)
        fn = await asyncio.to_thread(rebuild, graph, inputs)
        session.losses[loss_id] = per_datum(fn, read_inputs(inputs))
        return {"type": "create_custom_loss", "loss_id": loss_id}

    return service.start(service.futures.begin(loss_id, digest), create)


async def run_loss(client: LocalTrainingClient, request: Pass, losses: Mapping[str, LossFn]) -> ForwardBackwardOutput:
    """Run a pass with an uploaded loss. Its metrics, like all others, have their reduction in the name."""
    loss_fn = losses.get(str(request.config.get("loss_id")))
    if loss_fn is None or len(request.config) != 1:
        fix = "create_custom_loss returns it; it belongs to the session. Or use forward_backward_custom."
        raise LossInputError("loss_fn_config", "{'loss_id': the id of an uploaded loss}", show(request.config), fix)
    if request.forward_only:
        fix = "Take forward_backward_custom, or forward with a built-in loss."
        raise LossInputError("forward", "a built-in loss", "an uploaded one", fix)
    result = await client.forward_backward_custom(request.data, loss_fn)  # type: ignore[arg-type]
    named = {name: x for name, x in result.metrics.items() if ":" in name}
    others = {name: x for name, x in result.metrics.items() if ":" not in name}
    return replace(result, metrics=named | with_reductions(others))
