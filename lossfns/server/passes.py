"""Forward and backward passes of a request, on the training client of its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lossfns.backend.client.profiles import with_reductions
from lossfns.backend.client.training import LocalTrainingClient
from lossfns.backend.types import ForwardBackwardOutput
from lossfns.datum import Datum, TensorData
from lossfns.errors import LossInputError, show
from lossfns.loss import LossFn
from lossfns.server.wire import Pass


class Uploaded(NamedTuple):
    """A loss that a client has uploaded, as a loss of a batch.

    Attributes:
        session_id: the session that may use it.
        loss: the loss.
        ranks: the dimensions of ``logprobs`` and of each field that it reads, by name.
        request: what was uploaded.
    """

    session_id: str
    loss: LossFn
    ranks: dict[str, int]
    request: dict[str, Any]


async def run_pass(client: LocalTrainingClient, request: Pass, uploaded: dict[str, Uploaded]) -> ForwardBackwardOutput:
    """Run a request; raises LossInputError for data, names and settings that are refused.

    Args:
        client: the client of the model.
        request: what to compute.
        uploaded: the losses that clients have uploaded, by id.
    """
    if request.loss_fn == "stable_reinforce":
        got, fix = "'stable_reinforce'", "Its formula is not published. Pass a loss to forward_backward_custom."
        raise LossInputError("loss_fn", "a built-in loss of this server", got, fix)
    if isinstance(request.data, LossInputError):
        raise request.data
    if request.loss_fn == "custom":
        return await run_uploaded(client, request.data, find_uploaded(request, uploaded))
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


# Uploaded losses


def find_uploaded(request: Pass, uploaded: dict[str, Uploaded]) -> Uploaded:
    loss_id = request.config.get("loss_id")
    found = uploaded.get(loss_id) if isinstance(loss_id, str) else None
    if found is None or found.session_id != request.model_id.partition(":")[0]:
        fix = "create_custom_loss returns it."
        raise LossInputError("loss_fn_config loss_id", "the id of a loss of this session", show(loss_id), fix)
    if request.forward_only:
        raise LossInputError("loss_fn", "a built-in loss for forward", "'custom'", "Call forward_backward_custom.")
    return found


async def run_uploaded(client: LocalTrainingClient, data: list[Datum], uploaded: Uploaded) -> ForwardBackwardOutput:
    """Run a loss of a client in one forward and backward pass."""
    scalars = [name for name, rank in uploaded.ranks.items() if rank == 0]
    output = await client.forward_backward_custom([with_scalars(datum, scalars) for datum in data], uploaded.loss)
    plain = {name: x for name, x in output.metrics.items() if ":" not in name}
    named = {name: x for name, x in output.metrics.items() if ":" in name}
    return replace(output, metrics=with_reductions(plain) | named)


def with_scalars(datum: Datum, names: Sequence[str]) -> Datum:
    """Return a datum whose fields of these names are 0-d: protobuf does not tell shape [] from none."""
    fields = dict(datum.loss_fn_inputs)
    for name in names:
        if name in fields and fields[name].shape == [1]:
            fields[name] = TensorData(fields[name].to_numpy().reshape(()), fields[name].dtype, [])
    return Datum(datum.model_input, fields)


# Cross-entropy in the forms that clients send


def any_weight(data: Sequence[Datum]) -> bool:
    weights = [datum.loss_fn_inputs.get("weights") for datum in data]
    return any(w is None or w.to_numpy().any() for w in weights)


async def run_without_weights(client: LocalTrainingClient, request: Pass, data: list[Datum]) -> ForwardBackwardOutput:
    """Add a gradient of zeros. The backend refuses a batch without a weight, but it may be a part of a client's batch.

    The gradient of a custom loss that the SDK sends as weights is zero where all of its tokens are clipped.
    """
    values = await client.forward(data, "cross_entropy", request.config)
    output = await client.forward_backward_custom(data, zero_loss)
    cost = {name: x for name, x in output.metrics.items() if ":" not in name}
    return replace(output, metrics=values.metrics | with_reductions(cost))


def zero_loss(data: list[Any], logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
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
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
    weights = datum.loss_fn_inputs.get("weights")
    weights = np.ones(targets.shape, np.float32) if weights is None else weights.to_numpy()
    if weights.shape != targets.shape:
        expected, fix = f"shape {targets.shape}, that of target_tokens", "One weight for each target."
        raise LossInputError("weights", expected, f"{weights.shape}", fix)
    wide = {}
    for name, x in (("target_tokens", targets), ("weights", weights)):
        flat = x.reshape(len(x), -1)
        wide[name] = TensorData.from_numpy(np.pad(flat, ((0, 0), (0, columns - flat.shape[1]))))
    return Datum(datum.model_input, {**datum.loss_fn_inputs, **wide})


def without_padding(output: ForwardBackwardOutput, widths: Sequence[tuple[int, ...]]) -> ForwardBackwardOutput:
    """Return the outputs in the shapes that the targets had."""
    records = []
    for record, width in zip(output.loss_fn_outputs, widths, strict=True):
        x = record["logprobs"].to_numpy()
        records.append({"logprobs": TensorData.from_numpy(x[:, : width[0]] if width else x[:, 0])})
    return replace(output, loss_fn_outputs=records)
