"""Low-rank adapters (LoRA) on the linear layers of a model, by ``peft``. Needs the extra ``lora``."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lossfns.checks import check_number
from lossfns.errors import LossInputError

ALPHA = 32
"""Numerator of the scale alpha / rank. The hosted services take 32 for every rank."""

ADAPTER = "default"
"""The name of the adapter within ``peft``."""


def adapt(
    model: nn.Module, *, rank: int, parts: Collection[str], alpha: float = ALPHA, seed: int | None = None
) -> nn.Module:
    """Freeze a model and put adapters on its ``parts``, in place: y = x·(W + alpha/rank·B·A)ᵀ.

    A [rank, in] is uniform in ±1/√in, and B [out, rank] is zero, so that the model's outputs do not change at first.
    Both are float32 or better.

    Args:
        model: its ``lora_targets`` names the linear layers of each part, as in ``Decoder``.
        rank: at least 1.
        parts: keys of ``lora_targets``. With ``"unembed"``, ``model.head`` has to include the adapter.
        alpha: numerator of the scale.
        seed: the seed of A; None draws a new one each time.

    Returns:
        The model. Its attribute ``lora`` holds the settings, for checkpoints.

    Raises:
        LossInputError: settings out of range, or a part without linear layers.
    """
    check_settings(model, rank, parts, alpha, seed)
    targets = [name for part in parts for name in layers_by_part(model)[part]]
    config = peft().LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    peft().inject_adapter_in_model(config, model, ADAPTER)
    initialise(adapted_layers(model), seed)
    model.lora = {"rank": rank, "parts": sorted(parts), "alpha": alpha}  # type: ignore[assignment]
    if "unembed" in parts and not model.head.requires_grad:
        fix = "Let it be lora.adapted_weight(layer), as in Decoder.head, or pass train_unembed=False."
        raise LossInputError("base_model", "a head with its adapter", f"{type(model).__name__}.head without", fix)
    return model


@torch.no_grad()
def initialise(adapters: list[Any], seed: int | None) -> None:
    """Convert adapters to float32 or better and draw A. ``peft`` has set B to zero."""
    generator = torch.Generator("cpu")  # on the CPU, so that a seed gives the same adapter on every device
    generator.seed() if seed is None else generator.manual_seed(seed)
    for module in adapters:
        module.lora_A.to(torch.promote_types(module.weight.dtype, torch.float32))
        module.lora_B.to(torch.promote_types(module.weight.dtype, torch.float32))
        a = module.lora_A[ADAPTER].weight
        a.copy_((2 * torch.rand(a.shape, generator=generator) - 1) / math.sqrt(a.shape[1]))


def adapted_layers(model: nn.Module) -> list[Any]:
    """Return the layers that have an adapter."""
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def adapted_weight(layer: Any) -> Tensor:
    """Return a linear layer's weight [out, in], with its adapter added, in the adapter's dtype, if one is enabled."""
    weight: Tensor = layer.weight
    if not getattr(layer, "disable_adapters", True):
        for adapter in layer.active_adapters:
            weight = weight + layer.get_delta_weight(adapter)
    return weight


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Switch all adapters off in a ``with`` block, where the model then is its base model, the reference policy."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    on = [layer for layer in adapted_layers(model) if not layer.disable_adapters]
    for layer in on:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in on:
            layer.enable_adapters(True)
        for p, flag in flags:  # enable_adapters changes them
            p.requires_grad_(flag)


def peft() -> Any:
    """Import the library, or raise an error that names the extra."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters need peft: pip install 'lossfns[lora]'") from error
    return peft


def layers_by_part(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the names of the model's linear layers by part."""
    targets = getattr(model, "lora_targets", None)
    if not isinstance(targets, dict):
        got = f"a {type(model).__name__} without lora_targets"
        fix = 'Its class names them: lora_targets = {"attn": ("q_proj", ...), "mlp": (...), "unembed": (...)}.'
        raise LossInputError("base_model", "a model that names its layers for adapters", got, fix)
    return targets


def check_settings(model: nn.Module, rank: Any, parts: Collection[str], alpha: Any, seed: Any) -> None:
    """Refuse settings out of range, and parts whose layers the model does not have."""
    if not is_integer(rank) or rank < 1:
        fix = "create_training_client trains all parameters."
        raise LossInputError("rank", "a whole number of at least 1", repr(rank), fix)
    check_number("alpha", alpha, "a finite number above 0", lambda x: x > 0, "At 0 adapters change nothing.")
    if seed is not None and (not is_integer(seed) or not 0 <= seed < 2**63):
        raise LossInputError("seed", "a whole number in [0, 2^63), or None", repr(seed), "None draws one.")
    if not parts:
        fix = "At least one of train_mlp, train_attn, or train_unembed must be True."
        raise LossInputError("train_mlp", "a part to train", "none", fix)
    known = {end for name, module in model.named_modules() if is_linear(module) for end in path_suffixes(name)}
    for part in parts:
        unknown = sorted(set(layers_by_part(model).get(part, ())) - known)
        if unknown or not layers_by_part(model).get(part):
            got = f"no linear layer {unknown[0]!r}" if unknown else "none in lora_targets"
            fix = f"Correct the model's lora_targets, or pass train_{part}=False."
            raise LossInputError("base_model", f"linear layers of part {part!r}", got, fix)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer that can be adapted. GPT-2 has a class of its own, ``Conv1D``."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def path_suffixes(name: str) -> list[str]:
    """Return the names by which ``lora_targets`` may call a module: a.b.c, b.c and c."""
    path = name.split(".")
    return [".".join(path[i:]) for i in range(len(path))]


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
