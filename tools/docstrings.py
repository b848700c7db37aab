"""The parts of a docstring of a loss: its equation, settings, columns, statistics and example."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple


class Doc(NamedTuple):
    """The parts of a docstring.

    Attributes:
        summary: the first paragraph.
        body: the paragraphs before the arguments.
        settings: the text of each argument.
        reads: what the loss reads, in words.
        statistics: the text of each statistic.
        example: the doctest.
    """

    summary: str
    body: str
    settings: dict[str, str]
    reads: str
    statistics: dict[str, str]
    example: str


def read_doc(function: Callable[..., Any]) -> Doc:
    """Return the parts of a function's docstring. The paragraph after the arguments says what the loss reads."""
    text = inspect.getdoc(function) or ""
    text, mark, example = text.partition("\n>>>")
    head, _, rest = text.partition("\nArgs:\n")
    summary, _, body = head.partition("\n\n")
    block = re.match(r"(?:(?:    .*)?\n)*(?:    .*)?", rest)
    settings = entries(block[0] if block else "")
    tail = rest[block.end() if block else 0 :].strip() if "\nArgs:\n" in text else body
    body = body if "\nArgs:\n" in text else ""
    reads, _, statistics = tail.partition("\n\n    ")
    return Doc(
        " ".join(summary.split()), body.strip(), settings, " ".join(reads.split()), entries("    " + statistics),
        f">>>{example}" if mark else "",
    )  # fmt: skip


def entries(block: str) -> dict[str, str]:
    """Return the entries ``name: text`` of an indented block; ``a, b: text`` is one entry."""
    texts: dict[str, str] = {}
    name = ""
    for line in textwrap.dedent(block).splitlines():
        match = re.match(r"(\w[\w, ]*): (.*)", line)
        if match:
            name = match[1]
            texts[name] = match[2]
        elif name and line.startswith(" "):
            texts[name] += " " + line.strip()
        elif line.strip():
            name = ""
    return texts
