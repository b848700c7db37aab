"""A check, and the ways in which it ends."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from lossfns.terminal import printable

TOLERANCE = 3e-3
"""The relative error up to which two effects are the same on a server without noise."""

TOO_NOISY = 0.1
"""The relative noise above which a comparison says nothing."""


@dataclass(frozen=True)
class Finding:
    """A measurement that should be 0.

    Attributes:
        error: the measured difference.
        tolerance: the largest difference that counts as equal.
        noise: the difference between two runs of one experiment.
        seen: the comparison in words.
        bug: the bug that a difference means here, if it is not the one that the check usually means.
    """

    error: float
    tolerance: float
    noise: float = 0.0
    seen: str = ""
    bug: str = ""

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # not for nan


def worst(findings: Iterable[Finding]) -> Finding:
    """Return the first finding that does not hold, or else the one nearest to its tolerance."""
    found = list(findings)
    broken = next((f for f in found if not f.holds), None)
    return broken or max(found, key=lambda f: f.error / f.tolerance if f.tolerance else 0.0)


class Wrong(Exception):
    """The server breaks the check in a way that is no number."""

    def __init__(self, seen: str, bug: str = "") -> None:
        super().__init__(seen)
        self.bug = bug


class Unsupported(Exception):
    """The server says that it does not have what the check needs."""


class Inconclusive(Exception):
    """Nothing can be said: the noise is too high, or what the check needs does not work on this server."""


def require(holds: bool, seen: str, bug: str = "") -> None:
    """Raise Wrong unless the condition holds."""
    if not holds:
        raise Wrong(seen, bug)


RunCheck = Callable[[Any], Finding | None]
"""A function of a ``Bench``. It returns a measurement, or raises, or returns None if all is as it should be."""


@dataclass(frozen=True)
class Check:
    """A check: its name, its statement in one sentence, the bug that it usually finds, and its function.

    Attributes:
        level: ``core``, which any server claims, or ``full``.
        needs: the names of checks without which this one says nothing: their failure is reported once, there.
    """

    name: str
    says: str
    bug: str
    run: RunCheck
    level: str = "core"
    needs: tuple[str, ...] = ()

    @classmethod
    def of(cls, run: RunCheck, bug: str, level: str = "core", needs: tuple[str, ...] = ()) -> Check:
        """Make a check of a function. Its name and the first sentence of its docstring are those of the check."""
        says = " ".join((run.__doc__ or "").strip().split("\n\n")[0].split())
        return cls(run.__name__.replace("_", "-"), says, bug, run, level, needs)


@dataclass(frozen=True)
class Result:
    """The verdict on one check.

    Attributes:
        verdict: ``pass``, ``fail``, ``inconclusive``, ``unsupported``, ``error`` (no answer, or the server or the
            client died), ``xfail`` or ``xpass``.
        error, noise, tolerance: the numbers of the finding; nan where there are none.
        seen: what was seen, or the server's own words.
        bug: for a check that does not hold, the bug that it usually means.
        seconds: the time that the check took.
    """

    check: str
    says: str
    verdict: str
    level: str = "core"
    error: float = math.nan
    noise: float = math.nan
    tolerance: float = math.nan
    seen: str = ""
    bug: str = ""
    seconds: float = 0.0

    def having(self, **changes: object) -> Result:
        return replace(self, **changes)  # type: ignore[arg-type]


def refuse(error: BaseException) -> NoReturn:
    """Raise Unsupported if an error says that the server, in its own words, or the SDK refuses; else the error."""
    if refused_by_sdk(error):
        raise Unsupported(f"this version of the SDK does not send it: {server_words(error)}") from error
    if is_refusal(error):
        raise Unsupported(server_words(error)) from error
    raise error


def refused_by_sdk(error: BaseException) -> bool:
    """Return whether the SDK has refused to send a request."""
    return type(error).__name__ == "ValidationError" or "not JSON compliant" in str(error)


def is_refusal(error: BaseException) -> bool:
    """Return whether an error of the SDK is a refusal for which the sender is told to change the request.

    That is a failed future of the category user, or a status 4xx that the SDK does not repeat.
    """
    category = getattr(error, "category", None)
    if category is not None:
        return bool(getattr(category, "value", category) == "user")
    status = getattr(error, "status_code", None)
    if status is not None:
        return 400 <= int(status) < 500 and status not in (408, 409, 410, 429)
    cause = error.__cause__
    if cause is not None and getattr(cause, "status_code", None) is not None:
        return is_refusal(cause)
    # Our own backend, which is called without a wire in between.
    return type(error).__name__ == "LossInputError"


def server_words(error: BaseException, limit: int = 300) -> str:
    """Return the message of an error on one line, without the SDK's words around it."""
    text = " ".join(str(error).split())
    text = re.sub(r"^Request failed: | for self\.request_id=.*$", "", text)
    return printable(f"{type(error).__name__}: {text}", limit)
