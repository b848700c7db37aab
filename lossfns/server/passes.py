"""Forward and backward passes of a request, on the training client of its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossfns.backend.client.profiles import with_reductions
from lossfns.backend.client.training import LocalTrainingClient
from lossfns.backend.types import ForwardBackwardOutput
from lossfns.datum import Datum, TensorData
from lossfns.errors import LossInputError
from lossfns.server.custom import run_loss
from lossfns.server.session import UploadedLoss
from lossfns.server.wire import Pass


async def run_pass(
    client: LocalTrainingClient, request: Pass, losses: Mapping[str, UploadedLoss]
) -> ForwardBackwardOutput:
    """Run a request.

    Args:
        client: the client of the model.
        request: what to compute.
        losses: the losses that the session has uploaded, by id.

    Raises:
        LossInputError: for data, names and settings that are refused.
    """
    if request.loss_fn == "stable_reinforce":
        got, fix = "'stable_reinforce'", "Its formula is not published. Pass a loss to forward_backward_custom."
        raise LossInputError("loss_fn", "a built-in loss of this server", got, fix)
    if isinstance(request.data, LossInputError):
        raise request.data
    if request.loss_fn == "custom":
        return await run_loss(client, request, losses)
    if request.loss_fn != "cross_entropy":
        return await run_builtin(client, request, request.data)
    data, widths = padded_targets(request.data)
    if request.forward_only or any_weight(data):
        output = await run_builtin(client, request, data)
    else:
        output = await run_without_weights(client, request, data)
    return output if widths is None else without_padding(output, widths)


async def run_builtin(client: LocalTrainingClient, request: Pass, data: list[Datum]) -> ForwardBackwardOutput:
    run = client.forward if request.forward_only else client.forward_backward
    return await run(data, request.loss_fn, request.config)


# Cross-entropy in the forms that clients send


def any_weight(data: Sequence[Datum]) -> bool:
    """Return whether a weight is not 0. Without the field, all weights are 1."""
    weights = [datum.loss_fn_inputs.get("weights") for datum in data]
    return any(w is None or w.to_numpy().any() for w in weights)


async def run_without_weights(client: LocalTrainingClient, request: Pass, data: list[Datum]) -> ForwardBackwardOutput:
    """Add a gradient of zeros for a batch whose weights are all 0. The backend refuses one; a client may send one.

    The SDK sends the gradient of a custom loss as weights, in chunks. They are 0 if all tokens of a chunk are clipped.
    """
    values = await client.forward(data, "cross_entropy", request.config)
    output = await client.forward_backward_custom(data, zero_loss)
    cost = {name: x for name, x in output.metrics.items() if ":" not in name}
    return replace(output, metrics=values.metrics | with_reductions(cost))


def zero_loss(data: list[Any], logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Return 0 with a gradient of zeros, also where a logprob is infinite."""
    return torch.stack([0 * lp.nan_to_num(0, 0, 0).sum() for lp in logprobs_list]).sum(), {}


def padded_targets(data: list[Datum]) -> tuple[list[Datum], list[tuple[int, ...]] | None]:
    """Give targets [N] and [N, K] of several K in one batch the same K, by targets of weight 0.

    Returns:
        the datums and the trailing shapes that the targets had; None if nothing had to be done.
    """
    targets = [datum.loss_fn_inputs.get("target_tokens") for datum in data]
    if any(x is None for x in targets):
        return data, None  # the backend names what is missing
    widths = [x.to_numpy().shape[1:] for x in targets if x is not None]
    if len(set(widths)) <= 1 or any(width == (0,) for width in widths):
        return data, None
    columns = max(width[0] for width in widths if width)
    return [with_columns(datum, columns) for datum in data], widths


def with_columns(datum: Datum, columns: int) -> Datum:
    """Return a datum with targets [N, columns]: the added ones are token 0 with weight 0."""
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
    weights = datum.loss_fn_inputs.get("weights")
    weights = np.ones(targets.shape, np.float32) if weights is None else weights.to_numpy()
    if weights.shape != targets.shape:
        expected, fix = f"shape {targets.shape}, that of target_tokens", "One weight for each target."
        raise LossInputError("weights", expected, f"{weights.shape}", fix)
    padded = {}
    for name, x in (("target_tokens", targets), ("weights", weights)):
        flat = x.reshape(len(x), -1)
        padded[name] = TensorData.from_numpy(np.pad(flat, ((0, 0), (0, columns - flat.shape[1]))))
    return Datum(datum.model_input, {**datum.loss_fn_inputs, **padded})


def without_padding(output: ForwardBackwardOutput, widths: Sequence[tuple[int, ...]]) -> ForwardBackwardOutput:
    """Return the outputs in the shapes that the targets had."""
    records = []
    for record, width in zip(output.loss_fn_outputs, widths, strict=True):
        x = record["logprobs"].to_numpy()
        records.append({"logprobs": TensorData.from_numpy(x[:, : width[0]] if width else x[:, 0])})
    return replace(output, loss_fn_outputs=records)
