"""The table: for each loss, where exact gradient steps lead, and why. Losses with one fixed point share a row."""

from __future__ import annotations

from lossfns.errors import LossInputError
from lossfns.testing.public import presets
from lossfns.testing.worlds.combined import COMBINED
from lossfns.testing.worlds.lesson import Lesson
from lossfns.testing.worlds.others import OTHER_ROWS
from lossfns.testing.worlds.policy import POLICY_ROWS, is_policy

ROWS = (*POLICY_ROWS, *OTHER_ROWS)


def lessons(name: str) -> list[Lesson]:
    """Return what a preset learns, or a loss made by a combinator.

    Raises:
        LossInputError: if no row of the table is about it, or, for a policy loss, none about fixed samples.
    """
    if name in COMBINED:
        return list(COMBINED[name]())
    preset = presets()[name]
    found = [lesson for row in ROWS for lesson in row(name, preset)]
    fix = "Add a row, or its name to a row, in lossfns/testing/worlds/policy.py or others.py."
    if not found:
        raise LossInputError(name, "a world that says where it leads", "none", fix)
    if is_policy(preset) and all(lesson.world.old is None for lesson in found):
        raise LossInputError(name, "a world of fixed samples that says where it leads", "none", fix)
    return found
