"""The inputs of the vectors, written by hand and small enough to check by hand."""

from __future__ import annotations

from collections.abc import Iterator

from tools.vectors.cases.advantages import estimator_cases, estimator_refusals, group_advantage_cases
from tools.vectors.cases.family import family
from tools.vectors.cases.form import Case
from tools.vectors.cases.kinks import kinks
from tools.vectors.cases.policy import policies
from tools.vectors.cases.preference import preferences
from tools.vectors.cases.refused import refused
from tools.vectors.cases.supervised import supervised


def cases() -> Iterator[Case]:
    """Yield every case. The order does not matter: ``ids.json`` fixes the ids."""
    yield from supervised()
    yield from policies()
    yield from preferences()
    yield from family()
    yield from group_advantage_cases()
    yield from kinks()
    yield from refused()
    yield from estimator_cases()
    yield from estimator_refusals()


__all__ = ["Case", "cases"]
