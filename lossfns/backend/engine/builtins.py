"""The built-in losses by name: strings become functions here and nowhere else.

Each is the public loss as a raw sum over tokens (``token_sum``), without a log-ratio cap unless asked, as the
hosted services have it. Clip thresholds are absolute bounds of the ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lossfns.backend.engine.batch import host_row, missing
from lossfns.checks import check_knobs
from lossfns.errors import LossInputError, did_you_mean
from lossfns.loss import BoundLoss, Loss
from lossfns.losses.policy import (
    cispo,
    dapo,
    dro,
    grpo,
    gspo_token,
    importance_sampling,
    ppo,
)
from lossfns.losses.supervised import cross_entropy, multi_target_cross_entropy
from lossfns.weigh import token_sum


class Builtin(NamedTuple):
    """A public loss, the keys of its ``loss_fn_config`` with their knobs, and the fields of its datums."""

    preset: Callable[..., Loss]
    config: dict[str, str]
    required: tuple[str, ...] = ("logprobs", "advantages")
    optional: tuple[str, ...] = ("weights",)


CLIP = {"clip_low_threshold": "clip", "clip_high_threshold": "clip"}
CAP = {"ratio_log_cap": "log_ratio_cap"}

BUILTINS = {
    "cross_entropy": Builtin(cross_entropy, {}, required=()),
    "importance_sampling": Builtin(importance_sampling, CAP),
    "ppo": Builtin(ppo, CLIP | CAP),
    "cispo": Builtin(cispo, CLIP | CAP),
    "dro": Builtin(dro, {"beta": "beta"}),
    "gspo": Builtin(gspo_token, CLIP | CAP, ("logprobs", "advantages", "sequence_ratio_mask"), ()),
    "gspo-token": Builtin(gspo_token, CLIP | CAP),
    "grpo": Builtin(grpo, CLIP | CAP | {"kl_beta": "kl_beta"}, optional=("weights", "ref_logprobs")),
    "dapo": Builtin(dapo, CLIP | CAP | {"eps_clip_c": "dual_clip"}),
}
"""``logprobs`` are the old policy's; ``weights`` multiply each token's term and are 1 where there are none."""


def builtin(name: Any, config: Mapping[str, Any] | None, data: Sequence[Any], targets: int) -> BoundLoss:
    """The loss of that name, bound to the weights of the data; ``targets`` is 1 for targets [N, K], 0 for [N]."""
    if not isinstance(name, str) or name not in BUILTINS:
        raise LossInputError("loss_fn", "the name of a built-in loss", repr(name), did_you_mean(str(name), BUILTINS))
    own = BUILTINS[name]
    # [N, K] targets of cross-entropy are another loss; for all others the door refuses them.
    preset = multi_target_cross_entropy if targets and name == "cross_entropy" else own.preset
    loss = preset(weigh=token_sum, **knobs(name, own, config))
    required = own.required + tuple({"ref_logprobs"} & set(loss.reads))
    for i, datum in enumerate(data):
        check_fields(datum, name, ("target_tokens", *required), own.optional, i)
    weights = [(ratio_mask if "sequence_ratio_mask" in required else given_or_ones)(d, i) for i, d in enumerate(data)]
    # A raw sum ignores the denominator; binding one says that a batch without any weight is a valid part.
    return loss.bind(weights=weights, denominator=1.0)


def knobs(name: str, own: Builtin, config: Any) -> dict[str, Any]:
    """The preset's knobs from a ``loss_fn_config``: its own defaults, but for the cap, where a key is not given."""
    check_config(config)
    given = dict(config or {})
    unknown = [key for key in given if key not in own.config]
    if unknown:
        expected = f"{', '.join(own.config) or 'nothing'} for {name}"
        raise LossInputError("loss_fn_config", expected, ", ".join(map(repr, unknown)), "Drop the others.")
    chosen = dict.fromkeys(CAP.values()) if "ratio_log_cap" in own.config else {}
    chosen |= {own.config[key]: value for key, value in given.items() if key not in CLIP}
    if set(CLIP) & set(given):
        low, high = own.preset().knobs["clip"]
        chosen["clip"] = (given.get("clip_low_threshold", low), given.get("clip_high_threshold", high))
    try:
        check_knobs(chosen)
    except LossInputError as error:
        keys = [key for key, knob in own.config.items() if knob == error.field and key in given]
        error.field = f"loss_fn_config {', '.join(keys)}"
        raise
    return chosen


def check_config(config: Any) -> None:
    if config is not None and not isinstance(config, Mapping):
        fix = "Pass {name: value}."
        raise LossInputError("loss_fn_config", "a dict or None", f"a {type(config).__name__}", fix)


def check_fields(datum: Any, name: str, required: Sequence[str], optional: Sequence[str], i: int) -> None:
    """Every field that the loss reads, and no other: the services would ignore or refuse it."""
    for key in datum.loss_fn_inputs:
        if key not in required and key not in optional:
            fix = "Take it out; a mask goes into weights, or into advantages as zeros."
            expected = f"only {', '.join((*required, *optional))} for {name}"
            raise LossInputError("loss_fn_inputs", expected, f"{key!r}", fix, datum=i)
    for key in required:
        if datum.loss_fn_inputs.get(key) is None:
            raise missing(key, required, FIXES.get(key, f"{name} reads one value for each target."), i)


FIXES = {"ref_logprobs": "Put the reference's logprobs into the datum, or pass loss_fn_config={'kl_beta': 0.0}."}


def given_or_ones(datum: Any, i: int) -> Any:
    """A datum's weights."""
    inputs = datum.loss_fn_inputs
    if "weights" in inputs:
        return inputs["weights"]
    return np.ones(host_row(inputs["target_tokens"], "target_tokens", i).shape, np.float32)


def ratio_mask(datum: Any, i: int) -> Any:
    """The tokens that gspo's sequence ratio is over; outside of them nothing may be trained on."""
    keys = ("sequence_ratio_mask", "advantages", "target_tokens")
    mask, advantages, targets = (host_row(datum.loss_fn_inputs[key], key, i) for key in keys)
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
