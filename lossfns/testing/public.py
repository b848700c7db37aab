"""The public names of the library, looked up by the name that a user writes."""

from __future__ import annotations

from functools import reduce
from importlib import import_module
from typing import Any

from lossfns.describe import makes_loss as makes_loss
from lossfns.describe import presets as presets

LIBRARY: Any = import_module("lossfns")


def public(name: str) -> Any:
    """Return the object that ``lossfns`` exports under this name, or raise AttributeError.

    The name may be that of a module's function, such as ``rollout.truncated``.
    """
    return reduce(getattr, name.split("."), LIBRARY)
