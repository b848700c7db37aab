"""A loss in words, read from the object itself: equation, columns, settings, statistics, references, peers' names."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from lossfns.errors import LossInputError, show
from lossfns.loss import BoundLoss, Loss, name_or_repr
from lossfns.spellings import unknown_loss

ROSETTA = Path(__file__).with_name("rosetta.json")
"""The table of other frameworks' settings, each measured against ours. ``python -m tools.rosetta write`` writes it."""


def makers() -> dict[str, Callable[..., Any]]:
    """Return every public function that makes a loss, from settings or from other losses, by its name."""
    library = vars(import_module("lossfns"))
    return {name: x for name, x in library.items() if inspect.isfunction(x) and makes_loss(x)}


@cache
def signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a function. The tests ask for those of the library thousands of times."""
    return inspect.signature(function)


def makes_loss(function: Callable[..., Any], kinds: Sequence[str] = ("Loss", "LossFn")) -> bool:
    """Return whether a function is annotated to return a ``Loss``, or a function of the same contract."""
    return signature(function).return_annotation in kinds


def presets() -> dict[str, Callable[..., Loss]]:
    """Return every public function that makes a ``Loss`` from settings alone, by its name."""
    return {name: make for name, make in makers().items() if makes_loss(make, ("Loss",)) and not required(make)}


def required(function: Callable[..., Any]) -> list[str]:
    """Return the names of a function's arguments without a default."""
    return [name for name, p in signature(function).parameters.items() if p.default is p.empty]


def families() -> dict[str, list[str]]:
    """Return the names of the makers by family. A family is a module."""
    by_family: dict[str, list[str]] = {}
    for name, make in sorted(makers().items()):
        by_family.setdefault(make.__module__.rpartition(".")[2], []).append(name)
    return dict(sorted(by_family.items()))


def describe(loss: Any) -> str:
    """Describe a loss: equation, columns, settings, statistics, references, and what other frameworks call it.

    Args:
        loss: a function that makes losses, its name, or a loss that it made.

    Raises:
        LossInputError: if ``loss`` is not a loss of this library.

    >>> print(describe("reinforce").partition("\\n")[0])
    −A·lp: the on-policy policy gradient. Williams 1992.
    """
    name, made = name_and_loss(loss)
    text = inspect.getdoc(makers()[name]) or ""
    summary, _, rest = text.partition("\n\n")
    body, _, _ = rest.partition(">>>")
    head = [summary, *loss_lines(name, made)]
    links = [f"https://arxiv.org/abs/{paper}" for paper in dict.fromkeys(re.findall(r"arXiv:(\d{4}\.\d{5})", text))]
    references = ["References:", *(f"    {link}" for link in links)] if links else []
    sections = ["\n".join(head), body.rstrip(), "\n".join(references), "\n".join(peer_lines(name))]
    return "\n\n".join(section for section in sections if section)


def loss_lines(name: str, made: Loss | None) -> list[str]:
    """Return what a loss is called with, its rows and its output. A function of other losses has only a signature."""
    make = makers()[name]
    if made is None and name not in presets():
        return [f"    {name}({', '.join(map(argument, inspect.signature(make).parameters.values()))})"]
    made = make() if made is None else made
    return [f"    {made!r}", f"Rows: {made.rows}. Output of the model: {made.output}."]


def argument(p: inspect.Parameter) -> str:
    """Return an argument without its type: ``loss``, ``beta=0.1``, ``**losses``."""
    if p.default is not p.empty:
        return f"{p.name}={name_or_repr(p.default)}"
    return f"**{p.name}" if p.kind is p.VAR_KEYWORD else p.name


def name_and_loss(loss: Any) -> tuple[str, Loss | None]:
    """Return the name of the function that makes a loss, and the ``Loss``; None if only the function is known."""
    loss = loss.loss if isinstance(loss, BoundLoss) else loss
    name = loss if isinstance(loss, str) else loss.name if isinstance(loss, Loss) else getattr(loss, "__name__", "")
    if name not in makers():
        public = isinstance(name, str) and callable(getattr(import_module("lossfns"), name, None))
        hint = f"See help(lossfns.{name})." if public else unknown_loss(name, makers())
        got = show(loss) if isinstance(loss, str) else show(name_or_repr(loss))
        raise LossInputError("loss", "a loss of this library, or its name", got, hint)
    return name, loss if isinstance(loss, Loss) else None


def peer_lines(name: str) -> list[str]:
    """Return what other frameworks call a loss, one line for each of their settings."""
    rows = [row for row in peers() if name in re.findall(r"\w+", row["call"])]
    if not rows:
        return []
    lines = [f"    {row['framework']}: {row['setting']} = {row['call']} ({verdict(row)})" for row in rows]
    return ["Other frameworks (docs/rosetta.md):", *lines]


def verdict(row: Mapping[str, str]) -> str:
    """Return whether another framework's setting is equal to ours and, if not, the factor or the reason."""
    return row["verdict"] if row["verdict"] == "equal" else f"{row['verdict']}: {row['why']}"


@cache
def peers() -> Sequence[Mapping[str, str]]:
    """Return the rows of the table of other frameworks' settings."""
    rows: list[dict[str, str]] = json.loads(ROSETTA.read_text(encoding="utf-8"))["rows"] if ROSETTA.exists() else []
    return rows
