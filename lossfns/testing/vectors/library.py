"""Replies of this library's losses to the golden vectors."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossfns.combine import with_dual_clip, with_kl, with_tis
from lossfns.datum import Datum, ModelInput, TensorData
from lossfns.errors import LossInputError, LossWarning
from lossfns.loss import BoundLoss, Loss
from lossfns.testing.public import LIBRARY, public
from lossfns.testing.vectors.flags import advantages_answer, sample_arguments
from lossfns.testing.vectors.vector import Vector, is_estimator, num_targets
from lossfns.weigh import fixed_length

VECTOR_NAMES = {"cap": "tis_cap", "level": "tis_level"}
"""Name of a knob in this library → its name in the vectors, if the two differ."""


def subject_for(vector: Vector) -> BoundLoss:
    """Return the library's loss with a vector's settings. The loss reads its columns from the datums.

    Raises:
        LossInputError: if the library refuses a setting.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LossWarning)  # some vectors use k1 on purpose
        loss = build_loss(vector.loss, vector.config)
    return loss.bind() if vector.denominator is None else loss.bind(denominator=vector.denominator)


def build_loss(name: str, config: Mapping[str, Any]) -> Loss:
    """Build a loss: call a preset with its knobs, then add dual clip, TIS and KL where the preset has no such knob."""
    cap = config.get("tis_cap")
    # TIS does not apply to the KL, so the KL is added after TIS. The preset grpo contains the KL: start from ppo.
    preset: Any = public("ppo" if name == "grpo" and cap is not None else name)
    settings: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in config.items()}
    settings["weigh"] = resolve_weighing(config)
    if "kl" in settings:
        settings["kl"] = resolve(settings["kl"])
    knobs = inspect.signature(preset).parameters
    loss: Loss = preset(**{key: x for key, x in settings.items() if key in knobs})
    if config.get("dual_clip") is not None and "dual_clip" not in knobs:
        loss = with_dual_clip(loss, settings["dual_clip"])
    if cap is not None:
        loss = with_tis(loss, cap, resolve(f"{settings['tis_level']}_level"))
    if "kl" in settings and "kl" not in knobs:
        loss = with_kl(loss, settings["kl_beta"], settings["kl"])
    return loss


def resolve_weighing(config: Mapping[str, Any]) -> Any:
    """Return the weighing that a config names."""
    return fixed_length(config["length"]) if config["weigh"] == "fixed_length" else resolve(config["weigh"])


def resolve(name: str) -> Any:
    """Return the library's object of this name. Return an unknown name itself: the library then refuses it."""
    return getattr(LIBRARY, name, name)


def datums(vector: Vector) -> list[Datum]:
    """Return the data of a vector as datums with all columns. The data may be malformed."""
    return [datum(row, num_targets(vector.data)) for row in vector.data]


def datum(row: Mapping[str, Any], k: int) -> Datum:
    """Return one datum with its columns."""
    n = len(row["logprobs"])
    ids = np.arange(n * (k or 1)).reshape((n, k) if k else (n,))
    columns = {name: column(x, k) for name, x in row.items() if name != "logprobs"}
    return Datum(ModelInput.from_ints([2] * n), {"target_tokens": TensorData.from_numpy(ids), **columns})


def column(values: list[Any], k: int) -> TensorData | list[Any]:
    """Return the values. If there are K targets, return ``[0, K]`` for an empty list, which does not tell K."""
    empty = TensorData.from_numpy(np.zeros((0, k), np.float32))
    return empty if k and not values else values


def logprob_leaves(vector: Vector, dtype: torch.dtype) -> list[Tensor]:
    """Return the logprobs as leaf tensors that require grad."""
    k = num_targets(vector.data)
    shape = (-1, k) if k else (-1,)
    return [torch.tensor(row["logprobs"], dtype=dtype).reshape(shape).requires_grad_() for row in vector.data]


def reply_to(vector: Vector, dtype: str = "float64") -> dict[str, Any]:
    """Return the library's reply to a vector, as the protocol defines it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LossWarning)  # vectors hold extreme inputs on purpose
        try:
            if is_estimator(vector.loss):
                return advantages_reply(vector)
            return loss_reply(vector, getattr(torch, dtype))
        except LossInputError as error:
            field = error.field.partition("[")[0]  # ``weights[3]`` → ``weights``
            return {"error": {"message": str(error), "field": VECTOR_NAMES.get(field, field), "datum": error.datum}}


def loss_reply(vector: Vector, dtype: torch.dtype) -> dict[str, Any]:
    """Return loss, gradients and metrics for a vector."""
    logprobs = logprob_leaves(vector, dtype)
    loss, metrics = subject_for(vector)(datums(vector), logprobs)
    loss.backward()  # type: ignore[no-untyped-call]
    grads = [None if lp.grad is None else lp.grad.tolist() for lp in logprobs]
    return {"loss": loss.item(), "grad": grads, "metrics": {name: metrics[name] for name in ("tokens", "denominator")}}


def advantages_reply(vector: Vector) -> dict[str, Any]:
    """Return the advantages for a vector."""
    given = {"rewards": [], "groups": []} if not vector.data else sample_arguments(vector.data)
    given |= {"baselines": {}} if vector.loss == "rae_advantages" else {}
    answer = advantages_answer(public(vector.loss)(**given, **vector.config))
    return {"advantages": answer["advantages"].tolist()}
