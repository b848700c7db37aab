"""The table: for each loss, where exact gradient steps lead, and why. Losses with one fixed point share a row."""

from __future__ import annotations

from lossfns.errors import LossInputError
from lossfns.testing.public import presets
from lossfns.testing.worlds.combined import COMBINED
from lossfns.testing.worlds.lesson import Lesson, Lessons, Preset
from lossfns.testing.worlds.others import OTHER_ROWS, by_oracle
from lossfns.testing.worlds.policy import POLICY_ROWS, is_policy
from lossfns.testing.worlds.problems import judged, letters, two_arms
from lossfns.testing.worlds.steps import follow

ROWS = (*POLICY_ROWS, *OTHER_ROWS)


def on_fixed_samples(preset: Preset) -> Lessons:
    """For losses that no row names: a few steps on fixed samples lead as far as steps with the oracle's gradient."""
    loss = preset()
    if is_policy(preset):
        world = two_arms
    elif "labels" in loss.reads:
        world = judged
    elif loss.rows.per_token and not loss.reads:
        world = letters
    else:
        return
    point = follow(by_oracle(loss, world), 4, 0.5)[-1]
    yield Lesson(world, loss, point, 4, 0.5, "as far as with the oracle's gradient")


def lessons(name: str) -> list[Lesson]:
    """Return the lessons of a preset, or of a combinator or sum of losses, by its name.

    Raises:
        LossInputError: if no row of the table names it.
    """
    if name in COMBINED:
        return list(COMBINED[name]())
    preset = presets()[name]
    learned = [lesson for row in ROWS for lesson in row(name, preset)]
    if not learned or (is_policy(preset) and all(lesson.world.old is None for lesson in learned)):
        learned += on_fixed_samples(preset)
    if not learned:
        fix = "Add a row, or its name to a row, in lossfns/testing/worlds/policy.py or others.py."
        raise LossInputError(name, "a world that says where it leads", "none", fix)
    return learned
