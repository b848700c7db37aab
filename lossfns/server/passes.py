"""Forward and backward passes of a request, on the training client of its model."""

from __future__ import annotations

from collections.abc import Mapping

from lossfns.backend.client.training import LocalTrainingClient
from lossfns.backend.types import ForwardBackwardOutput
from lossfns.errors import LossInputError
from lossfns.loss import LossFn
from lossfns.server.custom import run_loss
from lossfns.server.wire import Pass

UNSUPPORTED = {"stable_reinforce": "its formula is not published"}


async def run_pass(client: LocalTrainingClient, request: Pass, losses: Mapping[str, LossFn]) -> ForwardBackwardOutput:
    """Run a request; raises LossInputError for data, names and settings that are refused.

    ``losses`` are those that the session has uploaded, by id.
    """
    if request.loss_fn in UNSUPPORTED:
        got, fix = f"{request.loss_fn!r}: {UNSUPPORTED[request.loss_fn]}", "Or use forward_backward_custom."
        raise LossInputError("loss_fn", "a built-in loss of this server", got, fix)
    if isinstance(request.data, LossInputError):
        raise request.data
    if request.loss_fn == "custom":
        return await run_loss(client, request, losses)
    if request.forward_only:
        return await client.forward(request.data, request.loss_fn, request.config)
    return await client.forward_backward(request.data, request.loss_fn, request.config)
