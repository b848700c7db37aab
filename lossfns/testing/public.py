"""The public names of the library, looked up by the name that a user writes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from lossfns.loss import Loss

LIBRARY: Any = import_module("lossfns")


def public(name: str) -> Any:
    """Return the object that ``lossfns`` exports under this name, or raise AttributeError."""
    return getattr(LIBRARY, name)


def presets() -> dict[str, Callable[..., Loss]]:
    """Return every public function that makes a ``Loss`` from settings alone, by its name."""
    return {name: x for name, x in vars(LIBRARY).items() if inspect.isfunction(x) and makes_loss(x)}


def makes_loss(function: Callable[..., Any]) -> bool:
    """Return whether a function is annotated to return a ``Loss`` and has no required argument."""
    signature = inspect.signature(function)
    needed = [p for p in signature.parameters.values() if p.default is p.empty]
    return signature.return_annotation in (Loss, "Loss") and not needed
