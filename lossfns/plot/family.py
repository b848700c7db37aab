"""The parts that each loss is made of, read from the functions themselves, as a matrix (extra ``viz``)."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lossfns.describe import families, makers
from lossfns.errors import LossInputError, did_you_mean
from lossfns.margins import Reward
from lossfns.plot.figures import COLOURS, GREY, panels, style
from lossfns.weigh import Weighing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = {
    "weigh": r"(token|sequence|pair|datum)_(sum_)?(mean|sum)|fixed_length",
    "segments": r"\w+_level",
    "regions": r"\w+",
    "margins": r"(?!check|group)\w+_(sum|mean|reward|link)|smoothed",
    "terms": r"(?!cap$|select$|k3_of$|log_one_minus$)\w+",
    "kl": r"k\w+",
    "combine": r"with_\w+",
}
"""The modules that hold the parts, and their names there: weighings, levels, regions, rewards and links of pairs,
equations, estimators, combinators."""


@cache
def parts() -> dict[int, str]:
    """Return the names of all parts by id, in the order of ``PARTS``."""
    names = {}
    for module, pattern in PARTS.items():
        for name, x in vars(import_module(f"lossfns.{module}")).items():
            defined_here = inspect.isfunction(x) and x.__module__ == f"lossfns.{module}"
            if (defined_here or isinstance(x, (Reward, Weighing))) and re.fullmatch(pattern, name):
                names[id(inspect.unwrap(x) if defined_here else x)] = name
    return names


@cache
def parts_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the parts that a function names, itself or in the functions of ``lossfns.losses`` it calls.

    >>> from lossfns import ppo
    >>> parts_of(ppo)
    ('token_mean', 'token_level', 'importance_ratio', 'clipped_surrogate', 'with_dual_clip')
    """
    names: set[str] = set()
    pending, seen = [inspect.unwrap(function)], set[Any]()
    while pending:
        f = pending.pop(0)
        if f in seen:
            continue
        seen.add(f)
        for x in named_in(f):
            if id(x) in parts():
                names.add(parts()[id(x)])
            elif inspect.isfunction(x) and x.__module__.startswith("lossfns.losses"):
                pending.append(x)
    return tuple(name for name in parts().values() if name in names)


def named_in(function: Callable[..., Any]) -> list[Any]:
    """Return the values of the global names in the source of a function."""
    module, values = vars(import_module(function.__module__)), []
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            values.append(getattr(module.get(node.value.id), node.attr, None))
        elif isinstance(node, ast.Name):
            values.append(module.get(node.id))
    return [inspect.unwrap(x) if inspect.isfunction(x) else x for x in values]


def plot_family(family: str) -> Figure:
    """Draw the losses of a family as rows and their parts as columns; a mark where a loss has a part.

    Raises:
        LossInputError: if there is no such family.
    """
    if family not in families():
        raise LossInputError("family", "a family of losses", repr(family), did_you_mean(family, families()))
    rows = {name: parts_of(makers()[name]) for name in families()[family]}
    columns = [part for part in parts().values() if any(part in made_of for made_of in rows.values())]
    return matrix(list(rows), columns, [[part in rows[name] for part in columns] for name in rows])


def matrix(rows: Sequence[str], columns: Sequence[str], marks: Sequence[Sequence[bool]]) -> Figure:
    with style():
        figure, axes = panels(1, width=1.6 + 0.28 * len(columns), height=1.5 + 0.24 * len(rows))
        panel = axes[0][0]
        for y, row in enumerate(marks):
            xs = [x for x, mark in enumerate(row) if mark]
            panel.plot(xs, [y] * len(xs), "o-", color=COLOURS[0], linewidth=0.8, markersize=6)
        panel.set_xticks(range(len(columns)), columns, rotation=60, ha="left", rotation_mode="anchor")
        panel.set_yticks(range(len(rows)), rows)
        panel.xaxis.tick_top()
        panel.set_xlim(-0.5, len(columns) - 0.5)
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.tick_params(length=0, labelcolor=GREY)
        for spine in panel.spines.values():
            spine.set_visible(False)
        return figure
