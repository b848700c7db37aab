"""Imports point one way: between rooms by their order, and within a room without a circle."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lossfns

ROOT = Path(lossfns.__file__).parent
LAYERS = [
    {"errors", "version"},
    {"spellings"},
    {"tokens", "terms", "checks", "statistics", "regions", "devices"},
    {"segments", "kl"},
    {"weigh", "pack", "values", "metrics", "margins", "rollout"},
    {"parts"},
    {"tensors", "deferred"},
    {"compiled"},
    {"loss"},
    {"preset"},
    {"combine", "sums"},
    {"entropy"},
    {"losses", "advantages", "datum", "labels", "logprobs", "sampler"},
    {"frame"},
    {"export"},
    {"describe"},
    {"__init__"},
    {"terminal", "loading"},
    {"integrations"},
    {"inspect", "plot"},
    {"testing"},
    {"backend/types", "backend/openmp"},
    {"backend/futures"},
    {"backend/model", "backend/storage"},
    {"backend/engine"},
    {"backend/client"},
    {"backend"},
    {"conformance"},
    {"server"},
    {"train"},
    {"catalogue"},
    {"cli"},
    {"__main__"},
]
"""Rooms (folders or modules) in order. A module may import from rooms above its own, and from its own."""

CORE = set().union(*LAYERS[: LAYERS.index({"terminal", "loading"})])
"""The rooms that a plain install needs: they import torch, numpy and the standard library alone."""


def name_of(path: Path) -> str:
    """A module by its path in the package, without ``.py``; a package by its folder."""
    name = path.relative_to(ROOT).with_suffix("").as_posix()
    return name.removesuffix("/__init__")


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def room(name: str) -> str:
    """The longest room that holds a module."""
    rooms = set().union(*LAYERS)
    parts = name.split("/")
    heads = ("/".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next(head for head in heads if head in rooms)


def layer(name: str) -> int:
    return next(i for i, rooms in enumerate(LAYERS) if room(name) in rooms)


def imported(name: str) -> set[str]:
    """The modules of ours that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import does not say from which room"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lossfns":
            base = "/".join((node.module or "").split(".")[1:])
            inner = [f"{base}/{alias.name}".lstrip("/") for alias in node.names]
            found |= {each if each in MODULES else base or "__init__" for each in inner}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {"/".join(parts[1:]) or "__init__" for parts in names if parts[0] == "lossfns"}
    return found


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_to_rooms_above(name: str) -> None:
    for other in imported(name):
        assert layer(other) < layer(name) or room(other) == room(name), f"{name} imports {other}"


def test_no_module_is_in_a_circle() -> None:
    """Imports inside functions count: ``TopologicalSorter`` raises ``CycleError`` with the circle."""
    TopologicalSorter({name: imported(name) - {name} for name in MODULES}).prepare()


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_from_the_facade(name: str) -> None:
    """A name comes from the room that defines it; ``lossfns/__init__`` is for users."""
    assert "__init__" not in imported(name)


def test_the_oracle_imports_nothing_of_ours() -> None:
    ours = [name for name in MODULES if name.startswith("testing/oracle")]
    assert len(ours) > 3
    for name in ours:
        assert all(other.startswith("testing/oracle") for other in imported(name)), name


TRAINERS = {"transformers": {"transformers", "accelerate"}, "trl": {"trl"}}
"""The packages that an integration imports besides those of the core: the trainer of its name, and what this needs."""


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in CORE | {"integrations"}])
def test_the_core_imports_torch_numpy_and_the_standard_library_alone_and_an_integration_its_trainer(name: str) -> None:
    allowed = {"lossfns", "torch", "numpy"}
    if room(name) == "integrations":
        trainer = name.split("/")[-1]
        allowed |= TRAINERS.get(trainer, {trainer})
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for top in (each.split(".")[0] for each in names):
            assert top in allowed or top in sys.stdlib_module_names, (name, top)
