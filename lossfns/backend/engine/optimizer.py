"""AdamW: its settings, the division of the accumulated gradient, and a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import nn

from lossfns.backend.engine.gradients import Accumulated
from lossfns.backend.engine.ranks import full_tensor
from lossfns.checks import check_number
from lossfns.errors import LossInputError

# Settings


def not_negative(x: float) -> bool:
    return x >= 0


def fraction(x: float) -> bool:
    return 0 <= x < 1


ADAM: dict[str, tuple[str, Callable[[float], bool]]] = {
    "learning_rate": ("a finite number of at least 0", not_negative),
    "beta1": ("a number in [0, 1)", fraction),
    "beta2": ("a number in [0, 1)", fraction),
    "eps": ("a finite number above 0", not_negative),  # adam_settings refuses 0, in the dtype of the weights
    "weight_decay": ("a finite number of at least 0", not_negative),
    "grad_clip_norm": ("a finite number of at least 0", not_negative),
}
"""The valid values of each attribute of ``AdamParams``, in words and as a test."""


def adam_settings(adam: Any, dtypes: set[torch.dtype]) -> dict[str, Any]:
    """Return the arguments of ``torch.optim.AdamW``.

    Args:
        adam: ``AdamParams``, or any object with the same attributes.
        dtypes: the dtypes of the parameters that have a gradient.

    Raises:
        LossInputError: for another kind of object, or a number out of range.
    """
    if not all(hasattr(adam, name) for name in ADAM):
        got, fix = f"a {type(adam).__name__}", "Expected AdamParams or OptimParamsBase; here only AdamW steps."
        raise LossInputError("adam_params", "AdamParams(learning_rate=...)", got, fix)
    for name, (expected, accept) in ADAM.items():
        check_number(name, getattr(adam, name), expected, accept, "AdamW has no use for it.")
    rate, beta1, beta2, eps, decay, _ = (float(getattr(adam, name)) for name in ADAM)
    for dtype in dtypes:
        if torch.tensor(eps, dtype=dtype) == 0:
            got, fix = f"{eps}, which is 0 in {dtype}", "A weight without gradient would become nan: pass a larger one."
            raise LossInputError("eps", "a number above 0 in the dtype of the weights", got, fix)
    return {"lr": rate, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay}


# Division

NORMALIZATIONS = ("num_loss_tokens", "num_sequences", "none")


def normalization_mode(normalization: Any) -> str:
    """Return the name of a mode, given as a name, as a member of a service's enumeration, or as None."""
    value = normalization.value if isinstance(normalization, Enum) else normalization
    name = "none" if normalization is None else value
    if not isinstance(name, str) or name.lower() not in NORMALIZATIONS:
        fix = f"Unknown grad_accumulation_normalization {normalization!r}; expected one of: {', '.join(NORMALIZATIONS)}"
        raise LossInputError("grad_accumulation_normalization", "the name of a mode, or None", repr(normalization), fix)
    return name.lower()


def gradient_divisor(normalization: Any, accumulated: Accumulated) -> int:
    """Return what the accumulated gradient is divided by; 1 where nothing has a gradient.

    Raises:
        LossInputError: for an unknown mode, for a loss that is a mean already, and for ``num_loss_tokens`` with a loss
            over embeddings.
    """
    mode = normalization_mode(normalization)
    if mode == "none":
        return 1
    if accumulated.mean is not None:
        got = f"{mode!r} for the gradient of {accumulated.mean!r}, which divides by a count of its own"
        fix = "Pass None, or weigh the loss with token_sum: normalised twice, a gradient is too small."
        raise LossInputError("grad_accumulation_normalization", "None for a mean", got, fix)
    if mode == "num_loss_tokens" and accumulated.pooled:
        got, fix = "'num_loss_tokens' for a loss over embeddings", "Pass 'num_sequences' or None."
        raise LossInputError("grad_accumulation_normalization", "a count of sequences", got, fix)
    return max(1, int(accumulated.positions if mode == "num_loss_tokens" else accumulated.sequences))


# A step


def gradient_norm(parameters: Sequence[nn.Parameter]) -> float:
    """Return the norm of the gradient over all parameters."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return float(full_tensor(torch.nn.utils.get_total_norm(gradients)))


def clip_factor(norm: float, clip: float) -> float:
    """Return the factor that brings a gradient's norm down to ``clip``; 0 does not clip."""
    return min(1.0, clip / (norm + 1e-6) if clip else 1.0)


def take_step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], settings: dict[str, Any], factor: float
) -> None:
    """Step with these settings, on the gradients times a factor."""
    for group in optimizer.param_groups:
        group.update(settings)
    with scaled_gradients(parameters, factor):
        optimizer.step()


@contextmanager
def scaled_gradients(parameters: Sequence[nn.Parameter], factor: float) -> Iterator[None]:
    """Multiply the gradients by a factor in a ``with`` block; restore them at its end, also after an error."""
    before = [p.grad for p in parameters]
    if factor != 1:
        for p, gradient in zip(parameters, before):
            p.grad = None if gradient is None else gradient * factor
    try:
        yield
    finally:
        for p, gradient in zip(parameters, before):
            p.grad = gradient
