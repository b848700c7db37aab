"""The checks of the arguments of ``linear_logprobs``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lossfns.checks import check_number
from lossfns.errors import LossInputError, show


def check_arguments(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    softcap: float | None,
    memory_budget: float | None,
) -> None:
    """Refuse arguments of ``linear_logprobs`` that do not fit together, without a wait for the device."""
    for name, x, ndims in (("hidden", hidden, (2,)), ("weight", weight, (2,)), ("targets", targets, (1, 2))):
        if not isinstance(x, Tensor) or x.ndim not in ndims:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            expected = {"hidden": "[N, D]", "weight": "[V, D]", "targets": "[N] or [N, K]"}[name]
            raise LossInputError(name, f"a tensor {expected}", got, "Flatten batch and time: x.flatten(0, 1).")
        if x.is_meta:
            raise LossInputError(name, "a tensor with values", "one on the meta device", "Load or compute it first.")
    (n, width), vocabulary = hidden.shape, len(weight)
    shapes = {
        "weight": (weight, (vocabulary, width), "One row for each token of the vocabulary."),
        "targets": (targets, (n, *targets.shape[1:]), "One target, or K, for each row of hidden."),
        "bias": (bias, (vocabulary,), "One number for each token of the vocabulary."),
        "rows": (rows, (n,), "One bool for each row of hidden."),
    }
    for name, (value, shape, fix) in shapes.items():
        if value is not None and not isinstance(value, Tensor):
            raise LossInputError(name, "a tensor", f"a {type(value).__name__}", fix)
        if value is not None and tuple(value.shape) != shape:
            raise LossInputError(name, f"shape {shape}", f"{tuple(value.shape)}", fix)
        if value is not None and value.device != hidden.device:
            raise LossInputError(name, f"a tensor on {hidden.device}", f"one on {value.device}", "Move it.")
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if value is not None and not value.is_floating_point():
            raise LossInputError(name, "a floating point tensor", str(value.dtype), "Were token ids passed?")
    if rows is not None and rows.dtype != torch.bool:
        raise LossInputError("rows", "a bool tensor", str(rows.dtype), "Pass mask != 0.")
    if targets.dtype != torch.long:
        raise LossInputError("targets", "ids of dtype torch.long", str(targets.dtype), "Call .long().")
    check_number("temperature", temperature, "a finite number above 0", lambda t: t > 0, "1.0 leaves the logits alone.")
    if softcap is not None:
        check_number(
            "softcap", softcap, "a finite number above 0, or None", lambda c: c > 0, "None leaves the logits alone."
        )
    if memory_budget is not None and memory_budget != math.inf:
        fix = "0 keeps no logits, math.inf all."
        check_number("memory_budget", memory_budget, "a number of bytes", lambda b: b >= 0, fix)


def check_adapter(adapter: Any, weight: Tensor) -> None:
    """Refuse anything but two factors of a matrix like the weight, and a scale."""
    if adapter is None:
        return
    vocabulary, width = weight.shape
    expected, fix = f"(a [r, {width}], b [{vocabulary}, r], scale)", "peft calls them lora_A, lora_B and scaling."
    if not isinstance(adapter, tuple) or len(adapter) != 3 or not all(isinstance(x, Tensor) for x in adapter[:2]):
        raise LossInputError("adapter", expected, show(adapter), fix)
    a, b, scale = adapter
    if a.ndim != 2 or a.shape[1] != width or b.shape != (vocabulary, len(a)):
        raise LossInputError("adapter", expected, f"shapes {tuple(a.shape)} and {tuple(b.shape)}", fix)
    for factor in (a, b):
        if not factor.is_floating_point():
            raise LossInputError("adapter", "floating point factors", str(factor.dtype), fix)
        if factor.device != weight.device:
            raise LossInputError("adapter", f"factors on {weight.device}", f"one on {factor.device}", "Move it.")
    check_number("adapter scale", scale, "a finite number", lambda x: True, "LoRA's is alpha / rank.")


def check_values(targets: Tensor, vocabulary: int, bias: Tensor | None, dtype: torch.dtype) -> None:
    """Refuse ids outside of the vocabulary, and a bias that is not finite in this dtype, in one transfer."""
    ids = targets if targets.numel() else targets.new_zeros(1)
    is_finite = ids.new_ones(()) if bias is None else bias.to(dtype).isfinite().all()
    low, high, finite = torch.stack((*ids.aminmax(), is_finite)).tolist()
    if not finite:
        fix = "For a token that cannot occur use a large negative number such as -1e30, in float16 -6e4."
        raise LossInputError("bias", f"finite numbers in {dtype}", "inf or nan among them", fix)
    if targets.numel() and (low < 0 or high >= vocabulary):
        fix = "A masked slot, such as -100, still needs an id: pass rows= and any id there."
        raise LossInputError("targets", f"ids in [0, {vocabulary})", f"ids from {low} to {high}", fix)
