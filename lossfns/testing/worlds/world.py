"""Problems small enough to enumerate, and exact gradient steps in them.

The policy is a softmax of logits θ at each node of a tree of tokens. A loss gets one datum for each outcome. The
gradient of a datum is weighed with the exact probability of its outcome, so a step is the step of an infinite batch:
nothing is sampled. A gradient reaches θ as in the hosted APIs, through ∂L/∂logprob of every token.
"""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lossfns.errors import LossInputError, LossWarning
from lossfns.inspect.probe import gradient_of
from lossfns.loss import BoundLoss, Loss, LossFn
from lossfns.testing.batch import Batch
from lossfns.tokens import ON_POLICY

Policy = tuple[tuple[float, ...], ...]
"""The probability of each token at each node."""
Path = list[Policy]
"""The policy before the first step and after each step."""
Column = Callable[["World", int, Policy, Policy], list[float]]
"""A function ``(world, sequence, policy, sampling policy) -> row`` of the sequence."""
Slope = tuple[float, float]
"""∂L/∂logprob of a token, and ∂L/∂entropy at its node: 0 unless the loss has a gradient through the entropy."""
Gradients = Callable[[Batch, Any], list[Slope]]
"""A function ``(batch, denominator) -> slopes`` of every token, datums end to end."""
PROMPT = -1.0
"""The logprob of the masked token that every datum begins with. No loss may depend on it."""
RARE = 1e-6
"""The smallest probability of a node by which a gradient is divided."""
TRUST = 1.0
"""The largest change of a logit in a step of the two-point rule."""


class Unit(NamedTuple):
    """Datums that a loss may compare with each other: an outcome, a pair, or a group.

    Attributes:
        probability: the probability of the unit. Those of all units sum to 1.
        members: the sequence of each datum, by index.
        columns: columns that differ between units of the same members, with one number for each datum.
    """

    probability: float
    members: tuple[int, ...]
    columns: dict[str, tuple[float, ...]] = {}  # noqa: RUF012 (never changed)


@dataclass(frozen=True)
class World:
    """A tree of tokens, what its sequences are worth, and how they are drawn.

    Attributes:
        name: the name.
        sequences: the steps of each sequence, as pairs (node, token). With ``targets``, the K candidates of a position.
        units: ``(world, sampling policy) -> units``: how sequences are drawn and put together.
        start: the policy before the first step.
        ref: the reference policy, or the teacher.
        rewards: one number for each sequence: its reward, its Bradley-Terry score, or the probability that it is
            labelled as desirable.
        old: the policy that samples, if it is fixed; None: the current policy samples, and every step refreshes it.
        targets: K if a position has K targets, else 0.
        scores: whether θ are scores of a value or reward head, which the loss takes in place of logprobs. A policy is
            then the table of the scores, and a step is one of plain gradient descent.
        columns: columns that replace the usual ones.
    """

    name: str
    sequences: tuple[tuple[tuple[int, int], ...], ...]
    units: Callable[[World, Policy], list[Unit]]
    start: Policy
    ref: Policy
    rewards: tuple[float, ...] = ()
    old: Policy | None = None
    targets: int = 0
    scores: bool = False
    columns: dict[str, Column] = field(default_factory=dict)

    def probability(self, policy: Policy, i: int) -> float:
        """Return the probability of sequence ``i``."""
        return math.prod(policy[node][token] for node, token in self.sequences[i])

    def value(self, policy: Policy) -> float:
        """Return the expected reward."""
        return sum(self.probability(policy, i) * r for i, r in enumerate(self.rewards))

    def outputs(self, policy: Policy, i: int) -> list[float]:
        """Return the logprob of each token of sequence ``i``, or its score."""
        return [policy[node][token] for node, token in self.sequences[i]] if self.scores else log_of(policy, self, i)

    def visits(self, policy: Policy, node: int) -> float:
        """Return the probability that a sequence passes a node."""
        if self.targets:
            return 1.0
        passing = [i for i, steps in enumerate(self.sequences) if node in dict(steps)]
        return sum(self.probability(policy, i) for i in passing)


# How sequences are drawn


def outcomes(world: World, sampling: Policy) -> list[Unit]:
    """One sequence, drawn from the sampling policy."""
    return [Unit(world.probability(sampling, i), (i,)) for i in range(len(world.sequences))]


def preferences(world: World, sampling: Policy) -> list[Unit]:
    """Two different sequences, all pairs alike; i is chosen over j with probability σ(score_i − score_j)."""
    n = len(world.sequences)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    return [Unit(2 * sigmoid(world.rewards[i] - world.rewards[j]) / len(pairs), (i, j)) for i, j in pairs]


def labelled(world: World, sampling: Policy) -> list[Unit]:
    """One sequence with a label, which is 1 with the probability that the world gives."""
    drawn = ((world.probability(sampling, i), i, r) for i, r in enumerate(world.rewards))
    return [Unit(p * q, (i,), {"labels": (label,)}) for p, i, r in drawn for label, q in ((1.0, r), (0.0, 1 - r))]


def returned(world: World, sampling: Policy) -> list[Unit]:
    """One sequence with the return 1 or 0, which is 1 with the probability that the world gives."""
    return [unit._replace(columns={"returns": unit.columns["labels"]}) for unit in labelled(world, sampling)]


def position(world: World, sampling: Policy) -> list[Unit]:
    """The one position of a world with K targets."""
    return [Unit(1.0, (0,))]


def in_twos(units: list[Unit]) -> list[Unit]:
    """Two units, drawn independently: a group."""
    return [
        Unit(a.probability * b.probability, a.members + b.members, {n: a.columns[n] + b.columns[n] for n in a.columns})
        for a in units
        for b in units
    ]


# Columns


def log_of(policy: Policy, world: World, i: int) -> list[float]:
    """Return the logprob of each token of sequence ``i``. A probability that rounds to 0 is the smallest float."""
    return [math.log(max(policy[node][token], sys.float_info.min)) for node, token in world.sequences[i]]


def at_nodes(world: World, i: int, of: Callable[[Sequence[float]], float], policy: Policy) -> list[float]:
    """Return a number of the distribution at each node of sequence ``i``."""
    return [of(policy[node]) for node, _ in world.sequences[i]]


def alike(world: World, i: int, x: float) -> list[float]:
    """Return one number at each token of sequence ``i``."""
    return [x] * len(world.sequences[i])


COLUMNS: dict[str, Column] = {
    "weights": lambda world, i, policy, old: alike(world, i, 1.0),
    "advantages": lambda world, i, policy, old: alike(world, i, world.rewards[i] - world.value(old)),
    "rewards": lambda world, i, policy, old: alike(world, i, world.rewards[i]),
    "old_logprobs": lambda world, i, policy, old: log_of(old, world, i),
    "sampler_logprobs": lambda world, i, policy, old: log_of(old, world, i),
    "ref_logprobs": lambda world, i, policy, old: log_of(world.ref, world, i),
    "teacher_logprobs": lambda world, i, policy, old: log_of(world.ref, world, i),
    "entropy": lambda world, i, policy, old: at_nodes(world, i, entropy_of, policy),
    "sum_square_probs": lambda world, i, policy, old: at_nodes(world, i, lambda p: sum(x * x for x in p), policy),
    "returns": lambda world, i, policy, old: alike(world, i, world.rewards[i]),
    "reference_point": lambda world, i, policy, old: alike(world, i, 0.0),
    "old_values": lambda world, i, policy, old: alike(world, i, 0.0),
    "target_margin": lambda world, i, policy, old: alike(world, i, 0.25),
}
"""Column → the row of a sequence. ``groups`` and ``labels`` belong to the units."""


def batch_of(world: World, policy: Policy, sampling: Policy, units: Sequence[Unit], reads: Sequence[str]) -> Batch:
    """Return one datum for each member of each unit. Each datum begins with a masked token."""
    members = [(u, i, k) for u, unit in enumerate(units) for k, i in enumerate(unit.members)]
    made = world.columns | {"groups": None, "labels": None}

    def row(name: str, u: int, i: int, k: int) -> list[float]:
        if name == "groups":
            return alike(world, i, float(u))
        if name in units[u].columns:
            return alike(world, i, units[u].columns[name][k])
        find = made.get(name) or COLUMNS.get(name)
        if find is None:
            fix = "Add it to COLUMNS of lossfns/testing/worlds/world.py."
            raise LossInputError("reads", f"columns of the world {world.name}", name, fix)
        return find(world, i, policy, sampling)

    masked = [0.0] * (world.targets or 1)
    columns = {name: [masked + row(name, *member) for member in members] for name in ("weights", *reads)}
    logprobs = [[PROMPT for _ in masked] + world.outputs(policy, i) for _, i, _ in members]
    return Batch(logprobs, columns.pop("weights"), columns, world.targets)


# Steps


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

    A loss over a count of the batch, such as its tokens, is divided by the expectation of this count, as in an infinite
    batch. A loss that compares the datums of a group gets groups of two units.

    Attributes:
        gradients: the gradients of the loss.
        world: the world.
        reads: the columns of the batch, besides the weights.
        like: the loss whose counts are taken; None: the expected count is not known, and ``gradients`` gets None.
    """

    def __init__(self, gradients: Gradients, world: World, reads: Sequence[str], like: Loss | None) -> None:
        self.gradients, self.world, self.reads, self.like = gradients, world, reads, like
        self.counts: list[Any] = []

    @classmethod
    def of(cls, loss_fn: LossFn, world: World, like: Loss | None = None) -> Enumerated:
        """Return the expected gradient of a loss, or of any function of the contract: this gets every column."""
        own = loss_fn.loss if isinstance(loss_fn, BoundLoss) else loss_fn
        if isinstance(own, Loss):
            bound = loss_fn.bind()  # type: ignore[attr-defined]
            if world.old is None and "old_logprobs" in own.reads:
                bound = bound.bind(old_logprobs=ON_POLICY)  # the columns of datums are float32

            def of_loss(batch: Batch, count: Any) -> list[Slope]:
                divided = bound.bind(denominator=count)
                if "entropy" in getattr(own, "gradient_columns", ()):
                    return slopes_with_entropy(divided, batch)
                return without_entropy(gradient_of(divided, batch.data(), batch.tensors())[1])

            return cls(of_loss, world, own.reads, own)

        def of_function(batch: Batch, count: Any) -> list[Slope]:
            data = batch.data()
            by = 1.0 if like is None else like.denominator(data) / count
            return without_entropy(by * gradient_of(loss_fn, data, batch.tensors())[1])

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
        """Return the natural gradient: the one in the logits, over the probability of the node, and over π there."""
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
    enumerated = Enumerated.of(loss_fn, world, like)
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


def entropy_of(p: Sequence[float]) -> float:
    """−Σ p·log p."""
    return -sum(x * math.log(x) for x in p if x > 0)


def sigmoid(x: float) -> float:
    """1 / (1 + exp(−x))."""
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def softmax(row: Sequence[float]) -> tuple[float, ...]:
    """exp(x) / Σ exp(x)."""
    top = max(row)
    powers = [math.exp(x - top) for x in row]
    return tuple(x / sum(powers) for x in powers)


def distance(one: Policy, other: Policy) -> float:
    """Return the largest difference of two policies in the probability of a token."""
    return max(abs(p - q) for rows in zip(one, other) for p, q in zip(*rows))
