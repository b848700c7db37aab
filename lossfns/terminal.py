"""Output for a person at a terminal, through rich (extra ``cli``). Pipes, files and CI get plain text instead."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console


def printable(text: str, limit: int = 2000) -> str:
    """Escape what a terminal or XML cannot show. Shorten a text of more than ``limit`` characters, and say so.

    >>> printable("a\\x1b[31m")
    'a\\\\x1b[31m'
    """
    if len(text) > limit:
        text = f"{text[:limit]} … ({len(text)} characters)"
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def one_line(text: str, width: int, *, end: bool = False) -> str:
    """Return text on one line of at most ``width`` columns: newlines and what cannot be printed are escaped.

    Of a longer text, the start is kept; with ``end`` the end.

    >>> print(one_line("a" + chr(10) + "b" + chr(27), 20), one_line("abcdef", 4), one_line("abcdef", 4, end=True))
    a\\nb\\x1b abc… …def
    """
    shown = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in text]
    if sum(map(columns, shown)) <= width:
        return "".join(shown)
    kept: list[str] = []
    room = width - 1
    for character in reversed(shown) if end else shown:
        room -= columns(character)
        if room < 0:
            break
        kept.append(character)
    return "".join(["…", *reversed(kept)] if end else [*kept, "…"])


def columns(character: str) -> int:
    """Return the columns that a character, or its escape, takes on a terminal: most of Chinese take two."""
    return 2 if len(character) == 1 and unicodedata.east_asian_width(character) in "WF" else len(character)


def console_on(stream: TextIO | None) -> Console | None:
    """Return a rich console on a terminal; None where the stream is no terminal, or rich is not installed.

    The console prints strings as they are: it reads no markup in them. It obeys ``NO_COLOR``.
    """
    if stream is None or not stream.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(file=stream, markup=False, highlight=False, emoji=False)
    return console if console.is_terminal and not console.is_dumb_terminal else None


class OutputError(Exception):
    """The error for a stream that cannot be written to, such as one to a file on a full disk."""


@contextmanager
def while_read(stream: TextIO | None) -> Iterator[None]:
    """Print to a stream for as long as somebody reads it. If its pipe is closed, the rest of the block is left out.

    A character that the stream's encoding does not have is escaped.

    Raises:
        OutputError: if the stream cannot be written to for another reason.
    """
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
        if stream is not None:
            stream.flush()
    except ConnectionError:  # also a BrokenPipeError
        discard(stream)
    except OSError as error:
        discard(stream)
        name = "standard error" if stream is sys.stderr else "standard output"
        raise OutputError(f"{name} cannot be written: {error.strerror}") from error


def say(text: str, stream: TextIO | None = None) -> None:
    """Print text, by default on standard output. Characters that the stream's encoding does not have are escaped."""
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def width_of(stream: TextIO | None) -> int | None:
    """Return the columns of a terminal; None for any other stream, in which lines stay as long as they are."""
    return shutil.get_terminal_size().columns if stream is not None and stream.isatty() else None


def wrap(text: str, width: int | None) -> str:
    """Break lines that are longer than a width at their spaces. They continue with a deeper indentation.

    A word that is longer, such as a path, stays whole.

    >>> print(wrap("  one two three", 9))
      one two
        three
    """
    lines = []
    for line in text.split("\n"):
        deeper = " " * (len(line) - len(line.lstrip()) + 2)
        fits = width is None or len(line) <= width
        lines += [line] if fits else textwrap.wrap(line, width or 0, subsequent_indent=deeper, **WHOLE_WORDS)
    return "\n".join(lines)


WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
"""The settings of ``textwrap`` with which what is copied from the terminal can be used."""


def print_refusal(error: Exception) -> int:
    """Print an error in one line, and return the exit status for it."""
    with while_read(sys.stderr):
        print(f"lossfns: {printable(str(error), sys.maxsize)}", file=sys.stderr)
    return 2


def discard(stream: TextIO | None) -> None:
    """Discard the buffered and all later output of a stream. Otherwise Python would fail to flush it at exit."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]


def print_report(
    report: Any,
    draw: Callable[[Any, Console], None],
    json_to: str | None,
    text: Callable[[Any], str] = lambda report: report.table(),
) -> None:
    """Print a report: with ``draw`` on a terminal, else as its ``text``. Write its ``as_dict`` as JSON on request.

    If the pipe of standard output is closed, the rest of the text is left out, and the JSON is still written.

    Args:
        report: an object with ``table()`` and ``as_dict()``.
        draw: prints the report on a console.
        json_to: the file for the JSON; "-" prints it in place of the table; None writes none.
        text: the report as plain text, its ``table()`` unless given.
    """
    as_json = json.dumps(report.as_dict(), indent=1, ensure_ascii=False)
    if json_to and json_to != "-":
        Path(json_to).write_text(as_json + "\n", encoding="utf-8", errors="backslashreplace")
    with while_read(sys.stdout):
        console = console_on(sys.stdout)
        if json_to == "-":
            print(json.dumps(report.as_dict(), indent=1))
        elif console is None:
            print(text(report))
        else:
            draw(report, console)


def print_rows(console: Console, rows: Sequence[Sequence[str]], styles: Sequence[str] = ()) -> None:
    """Print rows of cells in columns. Each style colours the first cell of its row. The last column wraps to fit."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2, 0, 0))
    for _ in rows[0][:-1]:
        grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for row, style in zip(rows, styles or [""] * len(rows)):
        grid.add_row(Text(row[0], style), *row[1:])
    console.print(grid)


def print_wrapped(console: Console, lines: Iterable[str]) -> None:
    """Print lines of text on a console, broken by ``wrap``."""
    for line in lines:
        console.print(wrap(line, console.width))


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the current work on one line of standard error; the line goes away at the end."""
    console = console_on(sys.stderr)
    if console is None:
        yield lambda text: None
        return
    from rich.text import Text

    with console.status("") as line:
        yield lambda text: line.update(Text(text))
