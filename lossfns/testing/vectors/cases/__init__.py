"""What the vectors ask: inputs written by hand, small enough to check, and the bugs that each hunts."""

from __future__ import annotations

from collections.abc import Iterator

from lossfns.testing.vectors.cases.advantages import groups
from lossfns.testing.vectors.cases.form import Case
from lossfns.testing.vectors.cases.kinks import kinks
from lossfns.testing.vectors.cases.policy import policies
from lossfns.testing.vectors.cases.preference import preferences
from lossfns.testing.vectors.cases.refused import refused
from lossfns.testing.vectors.cases.supervised import supervised


def cases() -> Iterator[Case]:
    """All of them. Ids do not depend on their order, see ``ids.json``."""
    yield from supervised()
    yield from policies()
    yield from preferences()
    yield from groups()
    yield from kinks()
    yield from refused()


__all__ = ["Case", "cases"]
