"""The commands ``lossfns list`` and ``lossfns describe NAME``."""

from __future__ import annotations

import argparse
import inspect
import re
import sys

from lossfns.describe import describe, families, makers
from lossfns.errors import LossInputError
from lossfns.terminal import print_refusal, say, while_read, width_of, wrap


def add_list(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``list`` to a command line."""
    p = commands.add_parser("list", help="list every loss by family, with its equation")
    p.set_defaults(run=lambda args: print_text("\n".join(catalogue_lines())))


def add_describe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``describe`` to a command line."""
    p = commands.add_parser("describe", help="describe a loss: equation, columns, settings, references")
    p.add_argument("loss", metavar="NAME", help="the name of a loss, such as grpo; `lossfns list` has them all")
    p.set_defaults(run=run_describe)


def run_describe(args: argparse.Namespace) -> int:
    """Print the description of a loss. Return 2 if there is no loss of this name."""
    try:
        text = describe(args.loss)
        return print_text(text if width_of(sys.stdout) is None else reflow(text))
    except LossInputError as error:
        return print_refusal(error)


def catalogue_lines() -> list[str]:
    """Return the lines of ``lossfns list``: for each family its losses, each with the first line of its docstring."""
    lines = []
    for family, names in families().items():
        lines += [family, *(f"  {name}: {equation(name)}" for name in names), ""]
    return lines[:-1]


def equation(name: str) -> str:
    """Return the first paragraph of a docstring in one line."""
    return " ".join((inspect.getdoc(makers()[name]) or "").partition("\n\n")[0].split())


def reflow(text: str) -> str:
    """Return a docstring with each paragraph, item and row of a table as one line, for a terminal of another width.

    >>> print(reflow("a\\nb\\n\\nArgs:\\n    x: one\\n        two\\n\\n=== ===\\nc   d\\n=== ==="))
    a b
    <BLANKLINE>
    Args:
        x: one two
    <BLANKLINE>
    c: d
    """
    lines: list[str] = []
    for line in (line for line in text.split("\n") if not line.startswith("===")):
        indent, before = (len(x) - len(x.lstrip()) for x in (line, lines[-1] if lines else ""))
        if re.search(r"\S  +\S", line):  # a row of a table
            lines.append(re.sub(r"(\S)  +", r"\1: ", line, count=1))
        elif line and lines and lines[-1] and (indent == before == 0 or indent > before > 0):
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
    return "\n".join(lines)


def print_text(text: str) -> int:
    """Print text, wrapped on a terminal. Return 0."""
    with while_read(sys.stdout):
        say(wrap(text, width_of(sys.stdout)))
    return 0
