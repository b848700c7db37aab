"""All rows, in the order of the page."""

from __future__ import annotations

from importlib import import_module

from tools.rosetta.row import Framework, Row

ORDER = (
    *("trl", "trl_advantages", "trl_preference", "trl_supervised", "verl", "verl_rollout", "verl_advantages", "skyrl"),
    *("liger", "tinker", "fireworks", "prime", "nemo", "slime", "areal", "openrlhf", "swift", "trinity", "roll"),
    *("open_instruct", "polgrad", "opake", "oxrl", "others"),
)
"""The modules of ``tools.rosetta.frameworks``. Those of one framework follow each other."""


def frameworks() -> list[Framework]:
    """Return the frameworks with their rows."""
    modules = [import_module(f"tools.rosetta.frameworks.{name}") for name in ORDER]
    found = {id(x): x for module in modules for x in vars(module).values() if isinstance(x, Framework)}
    return list(found.values())


def all_rows() -> list[Row]:
    """Return every row."""
    return [row for framework in frameworks() for row in framework.rows]
