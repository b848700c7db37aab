"""Imports point one way: a module may import only from the layers before its own."""

import ast
from pathlib import Path

import pytest

import lossfns

ROOT = Path(lossfns.__file__).parent
LAYERS = [
    {"errors", "terminal"},
    {"tokens", "terms", "checks"},
    {"segments"},
    {"weigh", "pack", "values", "metrics", "logprobs"},
    {"loss"},
    {"combine"},
    {"losses", "advantages", "datum"},
    {"frame"},
    {"export"},
    {"inspect"},
    {"testing"},
    {"backend"},
    {"train"},
    {"cli"},
    {"__main__"},
]
FACADE = {"__init__"}
"""``lossfns/__init__`` re-exports the core; the layers above it import through it, the core never does."""


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def imported(path: Path) -> set[str]:
    """First-level names of ours that a module imports, anywhere in it; ``""`` for the package itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lossfns":
            _, _, rest = node.module.partition(".")
            names = [rest.split(".")[0]] if rest else [alias.name for alias in node.names]
            found |= {name if (ROOT / f"{name}.py").exists() or (ROOT / name).is_dir() else "" for name in names}
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2].split(".")[0] for a in node.names if a.name.split(".")[0] == "lossfns"}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if own in FACADE:
        assert all(layer(name) <= layer("export") for name in imported(path) - {""})
        return
    for name in imported(path):
        target = layer("export") if name == "" else layer(name)
        assert target < layer(own) or name == own, f"{own} imports {name or 'lossfns'}"


def test_every_module_has_its_layer() -> None:
    tops = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in modules()} - FACADE
    assert tops <= set().union(*LAYERS)


def test_the_oracle_imports_nothing_of_ours() -> None:
    assert imported(ROOT / "testing" / "oracle.py") == set()


def test_the_core_imports_torch_numpy_and_the_standard_library_alone() -> None:
    import sys

    for path in modules():
        if path.parent != ROOT or path.stem in ("cli", "__main__", "terminal"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                top = name.split(".")[0]
                assert top in {"lossfns", "torch", "numpy"} or top in sys.stdlib_module_names, (path.name, name)
