"""An extension of griffe, for the site: doctests of a docstring become blocks of code."""

from __future__ import annotations

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"(?m)^( *)>>> (?:.*\n?)(?:^(?! *$).*\n?)*")
"""Lines from ``>>>`` to the next empty line."""


class DoctestBlocks(griffe.Extension):
    """Put the doctests of each docstring into blocks."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = DOCTEST.sub(in_a_block, obj.docstring.value)


def in_a_block(match: re.Match[str]) -> str:
    indent = match[1]
    return f"\n{indent}```pycon\n{match[0].rstrip()}\n{indent}```\n"
