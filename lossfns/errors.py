"""The error and the warning that the library gives for a caller's input."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class LossInputError(ValueError):
    """The error for a refused input: its place, what was expected, what came, and the fix.

    Attributes:
        field: the name of the argument, column or field.
        expected, got, fix: the parts of the message.
        datum: index of the datum in the batch, or None.
        loss: name of the loss, or None.

    >>> print(LossInputError("weights", "12 values (the length of logprobs)", "11", "Shift once.", datum=2))
    datum[2].weights: expected 12 values (the length of logprobs), got 11. Shift once.
    """

    def __init__(
        self,
        field: str,
        expected: str,
        got: str,
        fix: str,
        *,
        datum: int | None = None,
        loss: str | None = None,
    ) -> None:
        super().__init__(field, expected, got, fix)
        self.field, self.expected, self.got, self.fix = field, expected, got, fix
        self.datum, self.loss = datum, loss

    def __str__(self) -> str:
        loss = "" if self.loss is None else f"{self.loss}: "
        datum = "" if self.datum is None else f"datum[{self.datum}]."
        return f"{loss}{datum}{self.field}: expected {self.expected}, got {self.got}. {self.fix}"


class LossWarning(UserWarning):
    """A warning about an input that is accepted, but is usually a mistake."""


def warn(message: str) -> None:
    """Issue a ``LossWarning`` at the line that called the library, however deep the warning arises."""
    depth, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, LossWarning, stacklevel=depth)


def show(value: object) -> str:
    """Return the ``repr`` of a value that came in, shortened, and whatever its own ``repr`` raises."""
    try:
        text = repr(value)
    except Exception:  # such as that of an int with too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return a hint for a value that names nothing: the most similar known name, or all known names."""
    known = sorted(known)
    similar = get_close_matches(name.replace("-", "_"), known, n=1) if isinstance(name, str) else []
    if similar:
        return f"Did you mean {similar[0]!r}?"
    return f"Known: {', '.join(known)}." if known else "There is none."


@contextmanager
def add_loss_name(name: str) -> Iterator[None]:
    """Add the name of a loss to any ``LossInputError`` that is raised inside the block."""
    try:
        yield
    except LossInputError as error:
        error.loss = name
        raise
