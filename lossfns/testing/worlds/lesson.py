"""``Lesson``: a world, a loss, and the point that it reaches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lossfns.loss import Loss, LossFn
from lossfns.testing.worlds.steps import Path, distance, learn
from lossfns.testing.worlds.world import Policy, World

Preset = Callable[..., Loss]
CLOSE = 1e-3
"""The largest difference of a probability from a point at which the point is reached."""
BETA = 0.5
"""The weight β of penalties in the worlds."""


class Lesson(NamedTuple):
    """Where a loss leads in a world.

    Attributes:
        world: the world.
        loss: the loss, with its settings.
        point: the policy that it reaches.
        steps: the number of steps after which it reaches the point.
        rate: the size of a step; None: the two-point rule.
        says: where the loss leads, in words.
        decay: the factor of the rate from step to step.
    """

    world: World
    loss: Loss
    point: Policy
    steps: int
    rate: float | None
    says: str
    decay: float = 1.0

    def path(self, loss_fn: LossFn | None = None) -> Path:
        """Return the path of the loss, or of another loss with the same denominators."""
        loss = loss_fn or self.loss
        return learn(loss, self.world, self.steps, rate=self.rate, decay=self.decay, like=self.loss)

    def miss(self, loss_fn: LossFn | None = None) -> float:
        """Return the distance from the point after the steps, of the loss or of another with the same denominators."""
        return distance(self.path(loss_fn)[-1], self.point)

    def holds(self, loss_fn: LossFn | None = None) -> bool:
        """Return whether the loss, or another loss with the same denominators, comes within ``CLOSE`` of the point."""
        return self.miss(loss_fn) < CLOSE


Lessons = Iterator[Lesson]


def knobs_of(preset: Preset) -> set[str]:
    """Return the names of the knobs of a preset."""
    return set(inspect.signature(preset).parameters)


def made(preset: Preset, **knobs: Any) -> Loss:
    """Call a preset with the knobs that it has, and ignore the others."""
    return preset(**{name: value for name, value in knobs.items() if name in knobs_of(preset)})
