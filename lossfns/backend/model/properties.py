"""Properties of a model of ``transformers``: what it is, and what in it is refused or left out."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

from lossfns.backend.model import lora
from lossfns.errors import LossInputError, warn


def context_length(config: Any) -> float:
    """Return the most tokens that a sequence may have, infinity where the configuration has no limit."""
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in [rope, *(x for x in rope.values() if isinstance(x, dict))]:
        if kind.get("rope_type") in ("dynamic", "longrope"):
            # Beyond this length the rotary frequencies depend on the longest sequence of a batch.
            limits.append(kind.get("original_max_position_embeddings"))
    return min((n for n in limits if n), default=math.inf)


UNRELATED_SETTINGS = ("token_id", "dtype", "version", "use_cache", "quantization_config")
"""Endings of settings that do not change what a model computes from given weights."""


def architecture(model: Any) -> dict[str, Any]:
    """Return the architecture and its settings, as a checkpoint records them."""
    config = model.config.to_diff_dict()
    kept = {key: value for key, value in config.items() if key[0] != "_" and not key.endswith(UNRELATED_SETTINGS)}
    return {"architecture": type(model).__name__, **kept}


def without_peft(model: Any) -> Any:
    """Return the model of transformers that a ``PeftModel`` wraps, with its adapters; any other model as it is."""
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        got, fix = f"a {type(model).__name__} with learned prompts", "Train low-rank adapters instead."
        raise LossInputError("model", "adapters that are layers of the model", got, fix)
    return model.get_base_model()


def check_text_alone(model: Any) -> None:
    """Refuse a model with inputs other than text: they would be left out."""
    inputs = inspect.signature(model.forward).parameters
    others = [name for name in inputs if re.search("pixel|image|video|audio|speech|input_features", name)]
    others += [name for name in ("vision_config", "audio_config") if getattr(model.config, name, None) is not None]
    if others:
        got = f"a {type(model).__name__} with {', '.join(others)}"
        raise LossInputError("model", "a model of text alone", got, "Take the text model of the same family.")


def check_router_loss(model: Any) -> None:
    """Refuse a model whose configuration adds the auxiliary loss of a router to the loss: it is not computed here."""
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        got = f"a {type(model).__name__} with output_router_logits=True, which asks for the router's auxiliary loss"
        fix = "Set model.config.output_router_logits = False to train without that loss."
        raise LossInputError("model", "a model without losses of its own", got, fix)


def warn_of_noise(model: Any) -> None:
    """Warn of dropout and of noise in a router, which the configuration asks for and eval mode leaves out."""
    noise = noise_settings(model.config.get_text_config().to_dict())
    for layer in lora.adapted_layers(model):
        noise |= noise_settings({"lora_dropout": getattr(x, "p", 0.0) for x in layer.lora_dropout.values()})  # noqa: B035
    if noise:
        settings = ", ".join(f"{name}={value}" for name, value in noise.items())
        warn(f"{type(model).__name__} is trained without {settings}: models run in eval mode. Set them to 0.")


def noise_settings(config: dict[str, Any]) -> dict[str, float]:
    """Return the settings above 0 of dropout and of noise in a router; those of other heads do not matter."""
    found: dict[str, float] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found |= noise_settings(value)
        elif isinstance(value, float) and value > 0 and re.search("drop|jitter", name):
            found |= {} if name.startswith(("classifier", "summary")) else {name: value}
    return found
