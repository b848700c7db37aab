"""The one error of the library, for everything a caller can hand in wrong."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from difflib import get_close_matches


class LossInputError(ValueError):
    """An input a loss refuses: where it is, what was expected, what came, how to mend it.

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
    """An input that a loss accepts although it is more often a mistake than a wish."""


def warn(message: str) -> None:
    """A ``LossWarning`` that points at the caller's line, however deep in the library it arose."""
    depth, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, LossWarning, stacklevel=depth)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known: the nearest one that is, else all of them."""
    known = sorted(known)
    near = get_close_matches(name.replace("-", "_"), known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
