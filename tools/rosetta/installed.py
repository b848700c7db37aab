"""The frameworks' own code: definitions cut by name from the files of an installed package, and executed.

A definition is a function, class, method or constant. Cutting it out needs no import of the package, whose other
dependencies (engines, servers, GPU kernels) may be absent. Its text is what ``tools.drift`` watches.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from tools.rosetta.batch import Batch

DISTRIBUTIONS = {
    "liger_kernel": "liger-kernel",
    "opake": "opake-alignment",
    "openrlhf": "openrlhf",
    "polgrad": "polgrad",
    "skyrl": "skyrl",
    "swift": "ms-swift",
    "tinker_cookbook": "tinker-cookbook",
    "trinity": "trinity-rft",
}
"""The name on the package index, where it is not that of the package."""


@dataclass(frozen=True)
class Definition:
    """A definition in a file of a package: ``"Class.method"``, or the name of a class, function or constant."""

    package: str
    path: str
    name: str

    def __str__(self) -> str:
        return f"{self.package}/{self.path}:{self.name}"

    def text(self) -> str:
        """Return its lines in the installed file, with decorators."""
        lines, definitions = parsed(self.package, self.path)
        first, last = definitions[self.name]
        return "\n".join(lines[first - 1 : last])

    def digest(self) -> str:
        """Return the SHA-256 of its text, in which white space of any length counts as one blank."""
        return hashlib.sha256(" ".join(self.text().split()).encode()).hexdigest()


@dataclass(frozen=True)
class Peer:
    """A loss of an installed package.

    Attributes:
        package: the package's import name.
        definitions: path and name of each definition that ``run`` needs, in the order of execution.
        run: a function of the names that the definitions bind, and of a batch.
        names: further names that the definitions use.
    """

    package: str
    definitions: tuple[tuple[str, str], ...]
    run: Callable[[dict[str, Any], Batch], Tensor]
    names: dict[str, Any] = field(default_factory=dict)

    def __call__(self, batch: Batch) -> Tensor:
        """Return the package's number of a batch."""
        return self.run(self.namespace(), batch)

    def namespace(self) -> dict[str, Any]:
        """Execute the definitions."""
        names = dict(self.names)
        for definition in self.rests_on():
            execute(definition, names)
        return names

    def rests_on(self) -> tuple[Definition, ...]:
        """Return the definitions whose text the number rests on."""
        return tuple(Definition(self.package, path, name) for path, name in self.definitions)


def execute(definition: Definition, names: dict[str, Any]) -> None:
    """Bind a definition in a namespace, without its decorators and without evaluating its annotations."""
    (node,) = ast.parse(dedented(definition)).body
    if hasattr(node, "decorator_list"):
        node.decorator_list = []
    future = ast.parse("from __future__ import annotations").body
    code = ast.Module([*future, node], type_ignores=[])
    exec(compile(ast.fix_missing_locations(code), str(definition), "exec"), names)


def dedented(definition: Definition) -> str:
    """Return the text of a definition, without the indentation of a method."""
    text = definition.text().split("\n")
    indent = len(text[0]) - len(text[0].lstrip())
    return "\n".join(line[indent:] if not line[:indent].strip() else line for line in text)


@cache
def parsed(package: str, path: str) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """Return the lines of a file, and the first and last line of each definition in it."""
    file = folder(package)
    assert file is not None, f"{package} is not installed"
    source = (file / path).read_text(encoding="utf-8")
    found: dict[str, tuple[int, int]] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                first = min([node.lineno, *(x.lineno for x in node.decorator_list)])
                found[prefix + node.name] = first, node.end_lineno or first
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in (x for x in targets if isinstance(x, ast.Name)):
                    found[prefix + target.id] = node.lineno, node.end_lineno or node.lineno

    visit(ast.parse(source).body, "")
    return source.split("\n"), found


@cache
def folder(package: str) -> Path | None:
    """Return the folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(DISTRIBUTIONS.get(package, package)) if folder(package) else None
    except PackageNotFoundError:
        return None
