"""Low-rank adapters (LoRA) on the linear layers of a model, by ``peft``. Needs the extra ``lora``."""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lossfns.checks import check_number
from lossfns.errors import LossInputError
from lossfns.logprobs.head import Adapter

ALPHA = 32
"""Numerator of the scale alpha / rank. The hosted services take 32 for every rank."""

LARGEST_RANK = 2**16
"""The largest rank of adapters, far above the width of any layer."""

ADAPTER = "default"
"""The name of the adapter within ``peft``."""


def adapt(
    model: nn.Module, *, rank: int, parts: Collection[str], alpha: float = ALPHA, seed: int | None = None
) -> nn.Module:
    """Freeze a model and put adapters on its ``parts``, in place: y = x·(W + alpha/rank·B·A)ᵀ.

    A [rank, in] is uniform in ±1/√in, and B [out, rank] is zero, so that the model's outputs do not change at first.
    Both are float32 or better. Adapters that the model has already are merged into its weights. Frozen layers get no
    adapters, unless the whole model is frozen, as a reference is: then all layers of the parts get them.

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
    merge(model)
    check_settings(model, rank, parts, alpha, seed)
    prefix = getattr(model, "prefix", "")  # adapters are put on the model of transformers within a CausalLM
    targets = [name.removeprefix(prefix) for part in parts for name in trainable_layers(model, part)]
    inject(model.get_submodule(prefix.removesuffix(".")), targets, rank, alpha)
    initialise(adapted_layers(model), seed)
    model.lora = {"rank": rank, "parts": sorted(parts), "alpha": alpha}  # type: ignore[assignment]
    if "unembed" in parts and not model.head.requires_grad:
        fix = "Let it be lora.adapted_weight(layer), as in Decoder.head, or pass train_unembed=False."
        raise LossInputError("base_model", "a head with its adapter", f"{type(model).__name__}.head without", fix)
    return model


def inject(model: nn.Module, targets: list[str], rank: int, alpha: float) -> None:
    """Freeze a model and put new adapters on some of its layers, in place."""
    config = peft().LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # peft draws weights, which the caller replaces
        warnings.filterwarnings(
            "ignore", "Model has `tie_word_embeddings=True`"
        )  # an adapter of the head alone is intended
        peft().inject_adapter_in_model(config, model, ADAPTER)
    declare_adapted(model)


def declare_adapted(model: Any) -> None:
    """Tell a model of transformers that it has adapters, so that its ``save_pretrained`` writes them and no others."""
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = True


@torch.no_grad()
def initialise(adapters: list[Any], seed: int | None) -> None:
    """Convert adapters to float32 or better and draw A. ``peft`` has set B to zero."""
    generator = torch.Generator("cpu")  # on the CPU, so that a seed gives the same adapter on every device
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    for module in adapters:
        module.lora_A.to(torch.promote_types(module.weight.dtype, torch.float32))
        module.lora_B.to(torch.promote_types(module.weight.dtype, torch.float32))
        a = module.lora_A[ADAPTER].weight
        a.copy_((2 * torch.rand(a.shape, generator=generator) - 1) / math.sqrt(a.shape[1]))


def merge(model: nn.Module) -> None:
    """Merge the adapters of a model into its weights, in place; without adapters, change nothing.

    An adapter that is switched off is dropped. A weight that two layers share gets a copy for the adapted layer. All
    parameters are trainable afterwards: ``peft`` has frozen them for the adapters' sake.

    Raises:
        LossInputError: the weights are narrower than float32, so that the sums would be rounded to the old weights; or
            adapters of a kind that weights cannot hold.
    """
    layers = wrapped_layers(model)
    if not layers:
        return
    in_effect = [layer for layer in layers if not layer.disable_adapters]
    narrow = next((p.dtype for layer in in_effect for p in layer.parameters() if p.itemsize < 4), None)
    if narrow is not None:
        fix = "Load it in float32 (--dtype float32), or merge the adapters yourself if the rounding does not matter."
        raise LossInputError("model", "adapters on float32 weights, to be merged", f"weights of {narrow}", fix)
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for parent in reversed(list(model.modules())):  # layers within layers first
        for name, layer in list(parent.named_children()):
            if layer in layers and not hasattr(parent, "original_module"):
                setattr(parent, name, merged(layer, {key for key, count in names.items() if count > 1}))
    model.requires_grad_(True)
    model.lora = None  # type: ignore[assignment]
    for module in model.modules():
        vars(module).pop("peft_config", None)
        if hasattr(module, "_hf_peft_config_loaded"):
            module._hf_peft_config_loaded = False  # type: ignore[assignment]
    declare_untied(model)


def declare_untied(model: nn.Module) -> None:
    """Tell the configurations of models of transformers whose head has a weight of its own now, so that it is saved."""
    for module in model.modules():
        tied = getattr(getattr(module, "config", None), "tie_word_embeddings", False)
        if tied and hasattr(module, "get_output_embeddings"):  # not a layer, which has the configuration, too
            embed, unembed = module.get_input_embeddings(), module.get_output_embeddings()  # type: ignore[operator]
            if embed and unembed and embed.weight is not unembed.weight:
                module.config.tie_word_embeddings = False  # type: ignore[union-attr]


def wrapped_layers(model: nn.Module) -> list[Any]:
    """Return the layers that ``peft`` has wrapped, for adapters of any kind."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def merged(layer: Any, tied: Collection[int]) -> nn.Module:
    """Return a layer without its adapter, with the adapter's effect in its weights. ``tied`` are ids of parameters."""
    if hasattr(layer, "original_module"):  # a trained copy stands beside the original layer
        trained = partial(layer.unload_and_optionally_merge_module, merge=True, safe_merge=True, adapter_names=None)
        module: nn.Module = layer.original_module if layer.disable_adapters else trained()
        return module
    base: nn.Module = layer.get_base_layer()
    if layer.disable_adapters:
        if layer.merged:
            layer.unmerge()
        return base
    for name, p in list(base.named_parameters(recurse=False)):
        if id(p) in tied:
            setattr(base, name, nn.Parameter(p.detach().clone()))
    try:
        layer.merge(safe_merge=True)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        fix = "Wrap it with hf.CausalLM and LocalTrainingClient, which take adapters as they are."
        raise LossInputError("model", "adapters that can be merged into the weights", f"{error}", fix) from error
    return base


def adapted_layers(model: nn.Module) -> list[Any]:
    """Return the layers that have an adapter."""
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def enabled_adapters(layer: Any) -> list[str]:
    """Return the names of the adapters that a layer adds to its weight."""
    if getattr(layer, "disable_adapters", True):
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A and name not in layer.merged_adapters]


def adapted_weight(layer: Any) -> Tensor:
    """Return a linear layer's weight [out, in], with its adapter added, in the adapter's dtype, if one is enabled."""
    weight: Tensor = layer.weight
    for name in enabled_adapters(layer):
        weight = weight + layer.get_delta_weight(name)
    return weight


def factored_weight(layer: Any) -> tuple[Tensor, Adapter | None]:
    """Return a linear layer's weight, and what its enabled adapters add to it as (a, b, scale), None for nothing.

    The sum is not computed. Only an adapter that is more than a product of two factors is added to the weight.
    """
    names = enabled_adapters(layer)
    if not names:
        return layer.weight, None
    if not all(is_product(layer, name) for name in names):
        return adapted_weight(layer), None
    factors = [(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]) for name in names]
    if len(factors) == 1:
        return layer.weight, factors[0]
    return layer.weight, (torch.cat([a for a, _, _ in factors]), torch.cat([s * b for _, b, s in factors], 1), 1.0)


def is_product(layer: Any, name: str) -> bool:
    """Return whether an adapter adds b·a to the weight and nothing else: no magnitude, bias or transposition."""
    plain = all(type(x) is nn.Linear and x.bias is None for x in (layer.lora_A[name], layer.lora_B[name]))
    return plain and name not in layer.lora_variant and not layer.fan_in_fan_out


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Switch all adapters off in a ``with`` block: there the model is its base model, the reference policy."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    enabled = [layer for layer in adapted_layers(model) if not layer.disable_adapters]
    for layer in enabled:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in enabled:
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


def trainable_layers(model: nn.Module, part: str) -> list[str]:
    """Return the paths of a part's linear layers that are not frozen; all of them if the whole model is frozen."""
    ends = set(layers_by_part(model)[part])
    layers = {name: module for name, module in model.named_modules() if ends & set(path_suffixes(name))}
    if not any(p.requires_grad for p in model.parameters()):
        return list(layers)
    names = [name for name, layer in layers.items() if any(p.requires_grad for p in layer.parameters())]
    if not names:
        fix = f"Pass train_{part}=False, or unfreeze it with requires_grad_(True)."
        raise LossInputError("base_model", f"a layer of part {part!r} that is not frozen", "none", fix)
    return names


def check_settings(model: nn.Module, rank: Any, parts: Collection[str], alpha: Any, seed: Any) -> None:
    """Refuse settings out of range, and parts whose layers the model does not have."""
    if not is_integer(rank) or not 1 <= rank <= LARGEST_RANK:
        expected = f"at most {LARGEST_RANK}" if is_integer(rank) and rank > 0 else "a whole number of at least 1"
        raise LossInputError("rank", expected, repr(rank), "create_training_client trains all parameters.")
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
            fix = f"Correct the model's lora_targets, or leave this part out (train_{part}=False, --lora-parts)."
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
