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

from lossfns.errors import LossInputError, did_you_mean, show
from lossfns.loss import BoundLoss, Loss, name_or_repr

ROSETTA = Path(__file__).with_name("rosetta.json")
"""The table of other frameworks' settings, each measured against ours. ``python -m tools.rosetta write`` writes it."""


def presets() -> dict[str, Callable[..., Loss]]:
    """Return every public function that makes a ``Loss`` from settings alone, by its name."""
    library = vars(import_module("lossfns"))
    return {name: x for name, x in library.items() if inspect.isfunction(x) and makes_loss(x)}


@cache
def makes_loss(function: Callable[..., Any]) -> bool:
    """Return whether a function is annotated to return a ``Loss`` and has no required argument."""
    signature = inspect.signature(function)
    needed = [p for p in signature.parameters.values() if p.default is p.empty]
    return signature.return_annotation in (Loss, "Loss") and not needed


def families() -> dict[str, list[str]]:
    """Return the names of the presets by family. A family is a module of ``lossfns.losses``."""
    by_family: dict[str, list[str]] = {}
    for name, preset in sorted(presets().items()):
        by_family.setdefault(preset.__module__.rpartition(".")[2], []).append(name)
    return dict(sorted(by_family.items()))


def describe(loss: Any) -> str:
    """Describe a loss: equation, columns, settings, statistics, references, and what other frameworks call it.

    Args:
        loss: a preset, its name, or a loss that it made.

    Raises:
        LossInputError: if ``loss`` is not a loss of this library.

    >>> print(describe("reinforce").partition("\\n")[0])
    −A·lp: the on-policy policy gradient. Williams 1992.
    """
    name, knobs = name_and_knobs(loss)
    text = inspect.getdoc(presets()[name]) or ""
    summary, _, rest = text.partition("\n\n")
    body, _, _ = rest.partition(">>>")
    made = presets()[name]() if knobs is None else knobs
    head = [summary, f"    {made!r}", f"Rows: {made.rows}. Output of the model: {made.output}."]
    links = [f"https://arxiv.org/abs/{paper}" for paper in dict.fromkeys(re.findall(r"arXiv:(\d{4}\.\d{5})", text))]
    references = ["References:", *(f"    {link}" for link in links)] if links else []
    sections = ["\n".join(head), body.rstrip(), "\n".join(references), "\n".join(peer_lines(name))]
    return "\n\n".join(section for section in sections if section)


def name_and_knobs(loss: Any) -> tuple[str, Loss | None]:
    """Return the name of a loss's preset, and the ``Loss``; None if a preset or its name was passed."""
    loss = loss.loss if isinstance(loss, BoundLoss) else loss
    name = loss if isinstance(loss, str) else loss.name if isinstance(loss, Loss) else getattr(loss, "__name__", "")
    if name not in presets():
        public = isinstance(name, str) and callable(getattr(import_module("lossfns"), name, None))
        hint = f"See help(lossfns.{name})." if public else did_you_mean(name, presets())
        got = show(loss) if isinstance(loss, str) else show(name_or_repr(loss))
        raise LossInputError("loss", "a loss of this library that takes settings alone, or its name", got, hint)
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
