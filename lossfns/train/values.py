"""A row of a data file, and how its values are shown in errors."""

from __future__ import annotations

import re
import reprlib
from typing import Any, NamedTuple, NoReturn

from lossfns.errors import LossInputError


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        place: the file and the line, such as ``rows.jsonl:3``.
        fields: the values by name. Numbers are ``Number``: text, as it stands in the file.
    """

    place: str
    fields: dict[str, Any]

    def refuse(self, expected: str, got: str, fix: str) -> NoReturn:
        """Refuse the row."""
        raise LossInputError(self.place, expected, got, fix)


class Number(str):
    """A number as it is written: ``0.50`` stays ``0.50``."""

    def __repr__(self) -> str:
        return str(self)


class Constant(str):
    """NaN, Infinity or -Infinity, which are not JSON."""

    def __repr__(self) -> str:
        return str(self)


def plain(value: Any) -> Any:
    """Return a value with its numbers as numbers.

    >>> plain({"a": [Number("1"), Number("0.50"), "2"]})
    {'a': [1, 0.5, '2']}
    """
    if isinstance(value, Number):
        return int(value) if re.fullmatch(r"-?\d+", value) else float(value)
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    return [plain(x) for x in value] if isinstance(value, list) else value


def shown(value: Any) -> str:
    """Show a value in a few printable characters."""
    text = reprlib.repr(value)
    return text if text.isprintable() else ascii(text)[1:-1]


def counted(n: int, noun: str) -> str:
    """Return a number of things.

    >>> counted(1, "row"), counted(2, "row")
    ('1 row', '2 rows')
    """
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def quoted(name: str) -> str:
    """Return the name of a field in quotes, at most 80 characters of it."""
    return ascii(name if len(name) <= 80 else f"{name[:40]}...{name[-37:]}")
