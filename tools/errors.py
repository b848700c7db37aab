"""A page of every error that names an input: docs/errors.md, from the calls of ``LossInputError`` in the sources.

python -m tools.errors write    write the page
python -m tools.errors check    say whether it is up to date
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import lossfns

PACKAGE = Path(lossfns.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
HEAD = """# Errors

<!-- Written by `python -m tools.errors write`. Do not edit. -->

An input that cannot be used raises a `LossInputError`, which is a `ValueError`. Its message has four parts:

    datum[2].weights: expected 12 values (the length of logprobs), got 11. Shift once.

the place, what was expected, what was given, and the fix. Programs read them from the attributes `field`, `expected`,
`got`, `fix`, `datum` and `loss`. The tables have every error of each module, with `…` for what depends on the input.
"""


class Message(NamedTuple):
    field: str
    expected: str
    fix: str


def text_of(node: ast.AST, names: dict[str, ast.AST]) -> str:
    """Return the text of an expression: of a string, an f-string, a choice of two; "…" for anything else."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, {}) for part in node.values)
    if isinstance(node, ast.IfExp):
        return f"{text_of(node.body, names)} / {text_of(node.orelse, names)}"
    if isinstance(node, ast.Name) and node.id in names:
        return text_of(names[node.id], {name: x for name, x in names.items() if name != node.id})
    return "…"


def messages(source: str) -> Iterator[Message]:
    """Yield the errors of a module, each once."""
    found: dict[Message, None] = {}
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        assigned = sorted(assignments(function), key=lambda pair: pair[1].lineno)
        for call in ast.walk(function):
            is_call = isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
            if is_call and call.func.id == "LossInputError" and len(call.args) >= 4:
                names = {name: x for name, x in assigned if x.lineno <= call.lineno}  # the last one above the call
                field, expected, _, fix = (text_of(x, names) for x in call.args[:4])
                found[Message(field, expected, fix)] = None
    yield from found


def assignments(function: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield the names and the values that a function assigns, also as ``a, b = x, y``."""
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign) or len(node.targets) != 1:
            continue
        target, value = node.targets[0], node.value
        if isinstance(target, ast.Name):
            yield target.id, value
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for name, x in zip(target.elts, value.elts):
                if isinstance(name, ast.Name):
                    yield name.id, x


def render() -> str:
    sections = [HEAD]
    for path in sorted(PACKAGE.rglob("*.py")):
        rows = list(messages(path.read_text(encoding="utf-8")))
        if rows:
            lines = [
                f"## `{path.relative_to(PACKAGE.parent).as_posix()}`",
                "",
                "| place | expected | fix |",
                "| --- | --- | --- |",
            ]
            lines += [f"| {' | '.join(cell(x) for x in row)} |" for row in rows]
            sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def cell(text: str) -> str:
    """Return a text as a cell of a table; a reader must see its marks as they are."""
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return text.replace("[", "\\[").replace("*", "\\*").replace("`", "\\`") if text.strip("… ") else "…"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m tools.errors``. Return 1 if ``check`` finds that the page is out of date."""
    p = argparse.ArgumentParser(prog="python -m tools.errors", description="The page of every error message.")
    p.add_argument("action", choices=("write", "check"))
    if p.parse_args(argv).action == "write":
        PAGE.write_text(render(), encoding="utf-8")
        return 0
    return 0 if PAGE.exists() and PAGE.read_text(encoding="utf-8") == render() else 1


if __name__ == "__main__":
    sys.exit(main())
