"""Exact gradient steps in a world."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lossfns.errors import LossInputError, LossWarning
from lossfns.inspect.probe import gradient_of
from lossfns.loss import BoundLoss, Loss, LossFn
from lossfns.testing.batch import Batch
from lossfns.testing.worlds.world import COLUMNS, Policy, Unit, World, batch_of, entropy_of, in_twos
from lossfns.tokens import ON_POLICY

Path = list[Policy]
"""The policy before the first step and after each step."""
Slope = tuple[float, float]
"""∂L/∂logprob of a token, and ∂L/∂entropy at its node: 0 unless the loss has a gradient through the entropy."""
Gradients = Callable[[Batch, Any], list[Slope]]
"""A function ``(batch, denominator) -> slopes`` of every token, one datum after the other."""
RARE = 1e-6
"""The floor of a node's probability, by which a gradient is divided."""
TRUST = 1.0
"""The largest change of a logit in a step of the two-point rule."""


def without_entropy(gradient: Tensor) -> list[Slope]:
    """Return the slopes of a loss that has no gradient through the entropy."""
    return [(g, 0.0) for g in gradient.tolist()]


def slopes_with_entropy(loss: BoundLoss, batch: Batch) -> list[Slope]:
    """Return the slopes of a loss that has a gradient through the column of the entropy."""
    logprobs = batch.tensors()
    entropies = [torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in batch.columns["entropy"]]
    total, _ = loss.bind(entropy=entropies)(batch.data(), logprobs)
    by_logprob, by_entropy = (
        torch.cat(torch.autograd.grad(total, xs, retain_graph=True)).tolist() for xs in (logprobs, entropies)
    )
    return list(zip(by_logprob, by_entropy))


class Enumerated:
    """The expected gradient of a loss over all outcomes of a world.

    The denominator of a loss, such as the number of tokens, is replaced by its expectation, as in an infinite batch. A
    loss that compares the datums of a group gets groups of two units.

    Attributes:
        gradients: the gradients of the loss.
        world: the world.
        reads: the columns of the batch, besides the weights.
        like: the loss whose denominators are used; None: they are not known, and ``gradients`` gets None.
    """

    def __init__(self, gradients: Gradients, world: World, reads: Sequence[str], like: Loss | None) -> None:
        self.gradients, self.world, self.reads, self.like = gradients, world, reads, like
        self.counts: list[Any] = []

    @classmethod
    def of(cls, loss_fn: LossFn, world: World, like: Loss | None = None) -> Enumerated:
        """Return the expected gradient of a loss, or of any function of the contract, which gets every column."""
        loss = loss_fn.loss if isinstance(loss_fn, BoundLoss) else loss_fn
        if isinstance(loss, Loss):
            bound = loss_fn.bind()  # type: ignore[attr-defined]
            if set(loss.gradient_columns) - {"entropy"}:
                got, fix = " and ".join(loss.gradient_columns), "Its part of a step would be lost."
                raise LossInputError("loss", "a gradient through the logprobs and the entropy", got, fix)
            if world.old is None and "old_logprobs" in loss.reads:
                bound = bound.bind(old_logprobs=ON_POLICY)  # the columns of datums are float32

            def of_loss(batch: Batch, count: Any) -> list[Slope]:
                divided = bound.bind(denominator=count)
                if loss.gradient_columns:
                    return slopes_with_entropy(divided, batch)
                return without_entropy(gradient_of(divided, batch.data(), batch.tensors())[1])

            return cls(of_loss, world, loss.reads, loss)

        def of_function(batch: Batch, count: Any) -> list[Slope]:
            data = batch.data()
            scale = 1.0 if like is None else like.denominator(data) / count
            return without_entropy(scale * gradient_of(loss_fn, data, batch.tensors())[1])

        every = (*COLUMNS, "groups", *world.units(world, world.old or world.start)[0].columns)
        return cls(of_function, world, [name for name in every if name != "weights"], like)

    def batch(self, policy: Policy) -> tuple[Batch, list[Unit]]:
        """Return the batch and its units. The last unit has probability 0 and no active token."""
        sampling = self.world.old or policy
        units = self.world.units(self.world, sampling)
        if self.like is not None and self.like.couples_groups:
            units = in_twos(units)
        units.append(units[0]._replace(probability=0.0))
        batch = batch_of(self.world, policy, sampling, units, self.reads)
        silent = len(units[-1].members)
        weights = batch.weights[:-silent] + [[0.0] * len(w) for w in batch.weights[-silent:]]
        return batch.having(weights=weights), units

    def natural_gradient(self, policy: Policy) -> list[list[float]]:
        """Return the natural gradient: the gradient in the logits over the probability of the node and over π there."""
        batch, units = self.batch(policy)
        slopes = iter(self.gradients(batch, self.expected_count(batch, units)))
        by_token = [[0.0] * len(row) for row in policy]
        for unit in units:
            for i in unit.members:
                for _ in range(self.world.targets or 1):
                    next(slopes)  # the masked token
                for node, token in self.world.sequences[i]:
                    slope, by_entropy = next(slopes)
                    by_token[node][token] += unit.probability * slope
                    if by_entropy:  # dH / dθ = −π·(log π + H)
                        h = entropy_of(policy[node])
                        for k, p in enumerate(policy[node]):
                            by_token[node][k] -= unit.probability * by_entropy * p * (math.log(p) + h)
        if self.world.scores:
            return by_token
        rows = [(gs, ps, max(self.world.visits(policy, n), RARE)) for n, (gs, ps) in enumerate(zip(by_token, policy))]
        return [[(g / p - sum(gs)) / v if p > 0 else 0.0 for g, p in zip(gs, ps)] for gs, ps, v in rows]

    def expected_count(self, batch: Batch, units: Sequence[Unit]) -> Any:
        """Return Σ probability·count over the units, or None if the counts are not known."""
        if self.like is None:
            return None
        if not self.counts:
            data = batch.data()
            ends = [sum(len(unit.members) for unit in units[:k]) for k in range(len(units))]
            self.counts = [self.like.denominator(data[a:b]) for a, b in itertools.pairwise(ends)]
        return sum(unit.probability * count for unit, count in zip(units, self.counts))


def learn(
    loss_fn: LossFn,
    world: World,
    steps: int,
    *,
    rate: float | None = None,
    decay: float = 1.0,
    like: Loss | None = None,
) -> Path:
    """Take exact natural gradient steps, θ ← θ − rate·g / (v·π), and return the policy before the first and after each.

    g is the expected gradient in the logits of a node, v the probability that a sequence passes the node, and π the
    policy there. The division makes it the steepest descent in KL, which moves rare and frequent tokens alike.

    Args:
        loss_fn: a loss, or any function of the contract.
        world: the world.
        steps: the number of steps.
        rate: the size of a step; None: the two-point rule of Barzilai and Borwein 1988, which takes the curvature from
            the last two gradients, and moves no logit by more than 1.
        decay: the factor of the rate from step to step. Below 1, steps around a kink of the loss come to rest.
        like: the loss whose denominators ``loss_fn`` has, if it is no ``Loss``. Without it, the scale of the gradient,
            and so ``rate``, depends on the number of outcomes.

    Raises:
        LossInputError: if the loss breaks the contract, or reads a column that the world does not have.

    >>> from lossfns import reinforce
    >>> from lossfns.testing.worlds import bandit
    >>> [[round(p, 3) for p in policy[0]] for policy in learn(reinforce(), bandit, steps=2, rate=1.0)]
    [[0.5, 0.3, 0.2], [0.304, 0.496, 0.2], [0.153, 0.68, 0.167]]
    """
    return follow(Enumerated.of(loss_fn, world, like), steps, rate, decay)


def follow(enumerated: Enumerated, steps: int, rate: float | None = None, decay: float = 1.0) -> Path:
    """Take steps along an expected gradient; see ``learn``."""
    world = enumerated.world
    theta = [[x if world.scores else math.log(x) for x in row] for row in world.start]
    path: Path = [world.start]
    before = None
    for step in range(steps):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LossWarning)  # some worlds lead far away from the sampling policy
            direction = enumerated.natural_gradient(path[-1])
        size = step_size(direction, before) if rate is None else rate * decay**step
        move = [[-size * d for d in row] for row in direction]
        theta = [[x + m for x, m in zip(*rows)] for rows in zip(theta, move)]
        before = direction, move, size
        path.append(tuple(map(tuple, theta)) if world.scores else tuple(map(softmax, theta)))
    return path


def step_size(direction: list[list[float]], before: Any) -> float:
    """Return the size of a step by the two-point rule: ⟨s, y⟩ / ⟨y, y⟩ for the last move s and change of gradient y.

    Where the curvature along the last move is not positive, twice the last size. No logit moves by more than ``TRUST``.
    """
    largest = max(abs(d) for row in direction for d in row)
    size = 1.0
    if before is not None:
        last, moves, size = before
        pairs = [(m, d - e) for rows in zip(moves, direction, last) for m, d, e in zip(*rows)]
        along, squared = sum(s * y for s, y in pairs), sum(y * y for _, y in pairs)
        size = along / squared if along > 0 else 2 * size
    return min(size, TRUST / largest) if largest > 0 else size


def softmax(row: Sequence[float]) -> tuple[float, ...]:
    """exp(x) / Σ exp(x)."""
    top = max(row)
    powers = [math.exp(x - top) for x in row]
    return tuple(x / sum(powers) for x in powers)


def distance(one: Policy, other: Policy) -> float:
    """Return the largest difference of two policies in the probability of a token."""
    return max(abs(p - q) for rows in zip(one, other) for p, q in zip(*rows))
