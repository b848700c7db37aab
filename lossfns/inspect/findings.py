"""The findings of an inspection: errors, warnings and notes, each with its datum and its field."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import shorten

from torch import Tensor

from lossfns.errors import LossInputError

MAX_QUOTED = 200
"""The number of characters that a finding quotes of a value or of another error."""

MAX_NAMED = 5
"""The number of datums that a finding names."""


@dataclass(frozen=True)
class Finding:
    """One finding of an inspection.

    Attributes:
        level: ``"error"`` (the call would fail or be useless), ``"warning"`` (rarely intended) or ``"note"``.
        field: the field, column, metric or part of the result that it is about.
        message: what is wrong, and how to mend it.
        datum: the index of the first datum that it is about; None if it is about none in particular.
    """

    level: str
    field: str
    message: str
    datum: int | None = None

    def __str__(self) -> str:
        return f"{self.level}: {'' if self.datum is None else f'datum[{self.datum}].'}{self.field}: {self.message}"


class Findings(list[Finding]):
    """A list of findings that grows during an inspection."""

    def add(self, level: str, field: str, message: str, which: Tensor | int | None = None) -> None:
        """Append a finding about a datum: its index, or a mask ``[B]`` whose first datum is taken."""
        datum = int(which.nonzero()[0]) if isinstance(which, Tensor) else which
        self.append(Finding(level, field, message, datum))

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return all(finding.level != "error" for finding in self)


@contextmanager
def recorded(findings: Findings, field: str, datum: int | None = None) -> Iterator[None]:
    """Turn an exception into a finding of level error. An error of ours names its own field."""
    try:
        yield
    except LossInputError as error:
        message = f"expected {error.expected}, got {shorten(error.got, MAX_QUOTED)}. {error.fix}"
        findings.add("error", error.field, message, error.datum if datum is None else datum)
    except Exception as error:  # a datum or a loss of the user's can raise anything
        findings.add("error", field, f"{type(error).__name__}: {shorten(str(error), MAX_QUOTED)}", datum)


def name_datums(which: Tensor) -> str:
    """Name the first few datums of a mask ``[B]``."""
    indices = which.nonzero().flatten().tolist()
    more = f" and {len(indices) - MAX_NAMED} more" if len(indices) > MAX_NAMED else ""
    return f"datum{'s' * (len(indices) > 1)} {', '.join(map(str, indices[:MAX_NAMED]))}{more}"
