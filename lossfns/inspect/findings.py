"""What an inspection finds: errors, warnings and notes, each with its datum and its field."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import shorten

from torch import Tensor

from lossfns.errors import LossInputError

LONGEST = 200
"""How many characters of what came, or of someone else's error, a finding repeats."""


@dataclass(frozen=True)
class Finding:
    """One thing to know: an ``"error"`` (do not pay for this), a ``"warning"`` (rarely meant) or a ``"note"``."""

    level: str
    field: str
    message: str
    datum: int | None = None

    def __str__(self) -> str:
        return f"{self.level}: {'' if self.datum is None else f'datum[{self.datum}].'}{self.field}: {self.message}"


class Found(list[Finding]):
    """Findings as they are made."""

    def add(self, level: str, field: str, message: str, which: Tensor | int | None = None) -> None:
        """One more, about a datum, or about the first of ``[B]`` bool."""
        datum = int(which.nonzero()[0]) if isinstance(which, Tensor) else which
        self.append(Finding(level, field, message, datum))

    @property
    def fine(self) -> bool:
        return all(finding.level != "error" for finding in self)


@contextmanager
def caught(found: Found, field: str, datum: int | None = None) -> Iterator[None]:
    """What is raised inside becomes a finding."""
    try:
        yield
    except LossInputError as error:
        got = shorten(error.got, LONGEST)
        message = f"expected {error.expected}, got {got}. {error.fix}"
        found.add("error", error.field, message, datum if error.datum is None else error.datum)
    except Exception as error:  # anything at all may be handed in, or go wrong in someone's loss
        found.add("error", field, f"{type(error).__name__}: {shorten(str(error), LONGEST)}", datum)


def listed(which: Tensor) -> str:
    """The first few datums of ``[B]`` bool, in words."""
    indices = which.nonzero().flatten().tolist()
    more = f" and {len(indices) - 5} more" if len(indices) > 5 else ""
    return f"datum{'s' * (len(indices) > 1)} {', '.join(map(str, indices[:5]))}{more}"
