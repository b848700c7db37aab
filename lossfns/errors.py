"""The error and the warning of the library, both for a caller's input."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from difflib import get_close_matches


class LossInputError(ValueError):
    """An input that is refused: where it is, what was expected, what came, and the fix.

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
    """Issue a ``LossWarning`` at the caller's line, however deep in the library the call is."""
    depth, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, LossWarning, stacklevel=depth)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the most similar known name, or all known names if none is similar."""
    known = sorted(known)
    near = get_close_matches(name.replace("-", "_"), known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
