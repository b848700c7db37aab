"""Built-in losses on datums: checks of the datums' fields, and the weights of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lossfns.backend.engine.batch import as_array, missing_field
from lossfns.errors import LossInputError
from lossfns.export.builtins import BUILTINS, builtin_loss
from lossfns.loss import BoundLoss


def bind_builtin(name: Any, config: Mapping[str, Any] | None, data: Sequence[Any], *, multi_target: bool) -> BoundLoss:
    """Return the built-in loss called ``name``, bound to the weights of the data.

    ``multi_target`` says that targets are ``[N, K]``. Losses that cannot read these refuse them when they pack columns.
    """
    loss = builtin_loss(name, config, multi_target=multi_target)
    builtin = BUILTINS[name]
    required = (*builtin.required, "ref_logprobs") if "ref_logprobs" in loss.reads else builtin.required
    for i, datum in enumerate(data):
        check_fields(datum, name, ("target_tokens", *required), builtin.optional, i)
    weights_of = ratio_mask if "sequence_ratio_mask" in required else weights_or_ones
    # A raw sum ignores the denominator. Binding one allows forward passes over a batch in which no token has a weight.
    return loss.bind(weights=[weights_of(datum, i) for i, datum in enumerate(data)], denominator=1.0)


def check_fields(datum: Any, name: str, required: Sequence[str], optional: Sequence[str], i: int) -> None:
    """Require every field that the loss reads, and refuse any other: the services would ignore or refuse it."""
    for key in datum.loss_fn_inputs:
        if key not in required and key not in optional:
            fix = "Take it out; a mask goes into weights, or into advantages as zeros."
            expected = f"only {', '.join((*required, *optional))} for {name}"
            raise LossInputError("loss_fn_inputs", expected, f"{key!r}", fix, datum=i)
    for key in required:
        if datum.loss_fn_inputs.get(key) is None:
            raise missing_field(key, required, FIXES.get(key, f"{name} reads one value for each target."), i)


FIXES = {"ref_logprobs": "Put the reference's logprobs into the datum, or pass loss_fn_config={'kl_beta': 0.0}."}


def weights_or_ones(datum: Any, i: int) -> Any:
    """Return the datum's weights; ones where it has none."""
    inputs = datum.loss_fn_inputs
    if "weights" in inputs:
        return inputs["weights"]
    return np.ones(as_array(inputs["target_tokens"], "target_tokens", i).shape, np.float32)


def ratio_mask(datum: Any, i: int) -> Any:
    """Return the mask of the tokens in gspo's sequence ratio; every other token must have advantage 0."""
    keys = ("sequence_ratio_mask", "advantages", "target_tokens")
    mask, advantages, targets = (as_array(datum.loss_fn_inputs[key], key, i) for key in keys)
    if mask.shape != targets.shape:
        expected, fix = f"shape {targets.shape}, that of target_tokens", "One number for each target."
        raise LossInputError("sequence_ratio_mask", expected, f"shape {mask.shape}", fix, datum=i)
    if not np.isin(mask, (0, 1)).all():
        fix = "1 for the tokens of the response, 0 for the prompt."
        raise LossInputError("sequence_ratio_mask", "0 or 1", "other numbers", fix, datum=i)
    if mask.shape == advantages.shape and (advantages[mask == 0] != 0).any():
        got, fix = "another advantage there", "Give the prompt advantage 0."
        raise LossInputError("advantages", "0 where sequence_ratio_mask is 0", got, fix, datum=i)
    return mask
