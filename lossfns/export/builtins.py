"""The hosted services' built-in losses: the one table that connects their names with our losses.

``builtin_loss`` looks up the loss that a service computes under a name. ``builtin_name`` looks up the built-in into
which a loss can be folded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lossfns.checks import check_knobs
from lossfns.errors import LossInputError, did_you_mean
from lossfns.loss import Loss
from lossfns.losses.policy import dapo, grpo, importance_sampling, ppo
from lossfns.losses.regression import dro
from lossfns.losses.sequence import gspo_token
from lossfns.losses.supervised import cross_entropy, multi_target_cross_entropy
from lossfns.losses.weighted import cispo
from lossfns.weigh import token_sum

Preset = Callable[..., Loss]


class Builtin(NamedTuple):
    """A built-in of the services, which sums over tokens and divides by nothing.

    Attributes:
        preset: the loss that the built-in computes, with ``weigh=token_sum``.
        config: the knob of the preset that each key of the ``loss_fn_config`` sets.
        required, optional: the fields of the datums besides ``target_tokens``. ``logprobs`` are the old policy's.
            ``weights`` multiply the term of each token; without them all weights are 1.
        folds: the presets whose losses this built-in computes exactly, once advantages or weights are
            multiplied by the share of each token.
    """

    preset: Preset
    config: dict[str, str]
    required: tuple[str, ...] = ("logprobs", "advantages")
    optional: tuple[str, ...] = ("weights",)
    folds: tuple[Preset, ...] = ()


CLIP = {"clip_low_threshold": "clip", "clip_high_threshold": "clip"}
"""Clip thresholds are absolute bounds of the ratio."""

CAP = {"ratio_log_cap": "log_ratio_cap"}
"""Unless the config sets it, a built-in has no log-ratio cap."""

BUILTINS = {
    "cross_entropy": Builtin(cross_entropy, {}, required=(), folds=(cross_entropy, multi_target_cross_entropy)),
    "importance_sampling": Builtin(importance_sampling, CAP, folds=(importance_sampling,)),
    "ppo": Builtin(ppo, CLIP | CAP, folds=(ppo, dapo, grpo)),
    "cispo": Builtin(cispo, CLIP | CAP, folds=(cispo,)),
    "dro": Builtin(dro, {"beta": "beta"}),  # advantages do not scale its penalty, so they cannot hold a share
    "gspo": Builtin(
        gspo_token, CLIP | CAP, ("logprobs", "advantages", "sequence_ratio_mask"), optional=(), folds=(gspo_token,)
    ),
    "gspo-token": Builtin(gspo_token, CLIP | CAP),
    "grpo": Builtin(grpo, CLIP | CAP | {"kl_beta": "kl_beta"}, optional=("weights", "ref_logprobs")),
    "dapo": Builtin(dapo, CLIP | CAP | {"eps_clip_c": "dual_clip"}),
}

FOLDS = {preset.__name__: name for name, builtin in BUILTINS.items() for preset in builtin.folds}
"""The name of the built-in into which a loss can be folded, by name of the loss."""


def builtin_name(loss: Loss) -> str:
    """Return the name of the built-in that computes this loss once share / denominator is folded into the datums.

    Raises:
        LossInputError: if no built-in computes this loss.
    """
    if loss.name == "dro":
        fix = "Advantages do not scale the penalty of dro: it has no place for a share, nor for a mask."
        raise LossInputError("fold", "a loss whose weights can be folded into advantages", f"{loss!r}", fix)
    inexact = [knob for knob in ("kl_beta", "dual_clip", "log_ratio_cap") if loss.knobs.get(knob)]
    if loss.name in FOLDS and not inexact:
        return FOLDS[loss.name]
    fix = "No built-in has its name."
    if loss.parts:
        fix = "A sum of losses is a custom loss over the batch: forward_backward_custom(data, loss)."
    if inexact:
        fix = f"No built-in has its {inexact[0]}: pass {inexact[0]}={0 if inexact[0] == 'kl_beta' else None}."
    raise LossInputError("fold", f"one of {', '.join(FOLDS)}", f"{loss!r}", fix)


def builtin_loss(name: Any, config: Mapping[str, Any] | None = None, *, multi_target: bool = False) -> Loss:
    """Return the loss that a service computes for ``forward_backward(data, name, config)``.

    Args:
        name: one of ``BUILTINS``.
        config: the ``loss_fn_config``. A key that is not given has the preset's default, except that no cap is
            the default of the log-ratio cap.
        multi_target: whether targets are ``[N, K]``. Only cross-entropy accepts them.

    Raises:
        LossInputError: for a name, a key or a value that the services refuse.

    >>> builtin_loss("ppo", {"clip_high_threshold": 1.3})
    ppo(clip=(0.8, 1.3), weigh=token_sum, log_ratio_cap=None, dual_clip=None)
    """
    if not isinstance(name, str) or name not in BUILTINS:
        raise LossInputError("loss_fn", "the name of a built-in loss", repr(name), did_you_mean(str(name), BUILTINS))
    preset = multi_target_cross_entropy if multi_target and name == "cross_entropy" else BUILTINS[name].preset
    return preset(weigh=token_sum, **knobs_from_config(name, config))


def knobs_from_config(name: str, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the preset's knobs that a ``loss_fn_config`` sets. The log-ratio cap is off unless a key sets it."""
    check_config(config)
    builtin, settings = BUILTINS[name], dict(config or {})
    unknown = [key for key in settings if key not in builtin.config]
    if unknown:
        expected = f"{', '.join(builtin.config) or 'nothing'} for {name}"
        raise LossInputError("loss_fn_config", expected, ", ".join(map(repr, unknown)), "Drop these keys.")
    knobs = dict.fromkeys(CAP.values()) if "ratio_log_cap" in builtin.config else {}
    knobs |= {builtin.config[key]: value for key, value in settings.items() if key not in CLIP}
    if set(CLIP) & set(settings):
        low, high = builtin.preset().knobs["clip"]
        knobs["clip"] = (settings.get("clip_low_threshold", low), settings.get("clip_high_threshold", high))
    try:
        check_knobs(knobs)
    except LossInputError as error:
        keys = [key for key, knob in builtin.config.items() if knob == error.field and key in settings]
        error.field = f"loss_fn_config {', '.join(keys)}"
        raise
    return knobs


def check_config(config: Any) -> None:
    """Refuse a ``loss_fn_config`` that is not a dict."""
    if config is not None and not isinstance(config, Mapping):
        fix = "Pass {name: value}."
        raise LossInputError("loss_fn_config", "a dict or None", f"a {type(config).__name__}", fix)
