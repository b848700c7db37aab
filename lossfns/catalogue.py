"""The commands ``lossfns list`` and ``lossfns describe NAME``."""

from __future__ import annotations

import argparse
import inspect
import sys

from lossfns.describe import describe, families, makers
from lossfns.errors import LossInputError
from lossfns.terminal import console_on, print_wrapped, say, while_read


def add_list(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``list`` to a command line."""
    p = commands.add_parser("list", help="list every loss by family, with its equation")
    p.set_defaults(run=lambda args: print_lines(catalogue_lines()))


def add_describe(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``describe`` to a command line."""
    p = commands.add_parser(
        "describe", help="describe a loss: equation, columns, settings, statistics, references, other names"
    )
    p.add_argument("loss", metavar="NAME", help="the name of a loss, such as grpo; `lossfns list` has them all")
    p.set_defaults(run=run_describe)


def run_describe(args: argparse.Namespace) -> int:
    """Print the description of a loss. Return 2 if there is no loss of this name."""
    try:
        return print_lines(describe(args.loss).split("\n"))
    except LossInputError as error:
        say(str(error))
        return 2


def catalogue_lines() -> list[str]:
    """Return the lines of ``lossfns list``: for each family its losses, each with the first line of its docstring."""
    lines = []
    for family, names in families().items():
        lines += [family, *(f"  {name}: {equation(name)}" for name in names), ""]
    return lines[:-1]


def equation(name: str) -> str:
    """Return the first paragraph of a docstring in one line."""
    return " ".join((inspect.getdoc(makers()[name]) or "").partition("\n\n")[0].split())


def print_lines(lines: list[str]) -> int:
    """Print lines, wrapped on a terminal. Return 0."""
    with while_read(sys.stdout):
        console = console_on(sys.stdout)
        if console is None:
            say("\n".join(lines))
        else:
            print_wrapped(console, lines)
    return 0
