"""docs/rosetta.md: one table for each framework, an index by our losses, and the table of what does not fit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lossfns.describe import presets
from tools.rosetta.row import DIFFERENT, EQUAL

PAGE = Path(__file__).parents[2] / "docs" / "rosetta.md"

HEAD = Path(__file__).with_name("head.md")
"""What stands above the tables; the counts are filled in."""

TAIL = Path(__file__).with_name("tail.md")
"""What does not fit, and how the table is made."""


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Return the page."""
    counts = {
        name: sum(row["verdict"] == verdict for row in rows)
        for name, verdict in (("equal", EQUAL), ("different", DIFFERENT))
    }
    factor = len(rows) - sum(counts.values())
    own = sum(row["from"] != "formula" for row in rows)
    head = HEAD.read_text(encoding="utf-8").format(count=len(rows), factor=factor, installed=own, **counts)
    names = list(dict.fromkeys(row["framework"] for row in rows))
    contents = "Frameworks: " + ", ".join(f"[{name}](#{anchor(name)})" for name in names) + "."
    tables = [framework_table(name, [row for row in rows if row["framework"] == name]) for name in names]
    return "\n".join([head, contents, "", *tables, index(rows), TAIL.read_text(encoding="utf-8")])


def framework_table(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of one framework."""
    kind = "its own functions" if any(row["from"] != "formula" for row in rows) else "formulas"
    if len({row["from"] for row in rows}) > 1:
        kind = "its own functions, and formulas for the rows marked (f)"
    lines = [
        f"## {name}",
        "",
        f"Computed with {kind}.",
        "",
        "| setting | ours | verdict | numbers | source |",
        "|---|---|---|---|---|",
    ]
    mixed = len({row["from"] for row in rows}) > 1
    for row in rows:
        mark = " (f)" if mixed and row["from"] == "formula" else ""
        verdict = row["verdict"] + (f": {row['why']}" if row["why"] else "")
        cells = (
            cell(row["setting"]) + mark,
            f"`{cell(row['call'])}`",
            cell(verdict),
            f"{row['ours']:.6g}, {row['peer']:.6g}",
            f"`{row['source']}`",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def cell(text: str) -> str:
    """Escape what would end a cell."""
    return text.replace("|", "\\|")


def anchor(name: str) -> str:
    """Return the anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-")


def index(rows: Sequence[dict[str, Any]]) -> str:
    """Return the frameworks that have each of our losses, with the number of their rows."""
    lines = ["## Index by our losses", "", "The number of rows of each framework, of any verdict.", ""]
    for name in sorted(presets()):
        calls = [row["framework"] for row in rows if re.search(rf"\b{name}\b", row["call"])]
        if calls:
            counts = (f"[{who}](#{anchor(who)}) {calls.count(who)}" for who in dict.fromkeys(calls))
            lines.append(f"- `{name}`: " + ", ".join(counts))
    return "\n".join([*lines, ""])
