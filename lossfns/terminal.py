"""Output for a person at a terminal, through rich (extra ``cli``). Pipes, files and CI get plain text instead."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console


def console_on(stream: TextIO) -> Console | None:
    """Return a rich console on a terminal; None where the stream is no terminal, or rich is not installed.

    The console prints strings as they are: it reads no markup in them. It obeys ``NO_COLOR``.
    """
    if not stream.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(file=stream, markup=False, highlight=False, emoji=False)
    return console if console.is_terminal and not console.is_dumb_terminal else None


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the work in hand in one line of standard error, which goes away at the end."""
    console = console_on(sys.stderr)
    if console is None:
        yield lambda text: None
        return
    from rich.text import Text

    with console.status("") as line:
        yield lambda text: line.update(Text(text))
