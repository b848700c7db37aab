"""Problems small enough to enumerate, and exact gradient steps in them.

The policy is a softmax of logits θ at each node of a tree of tokens. A loss gets one datum for each outcome. The
gradient of a datum is weighed with the exact probability of its outcome, so a step is the step of an infinite batch:
nothing is sampled. A gradient reaches θ as in the hosted APIs, through ∂L/∂logprob of every token.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lossfns.errors import LossInputError
from lossfns.testing.batch import Batch

Policy = tuple[tuple[float, ...], ...]
"""The probability of each token at each node."""
Column = Callable[["World", int, Policy, Policy], list[float]]
"""A function ``(world, sequence, policy, sampling policy) -> row`` of the sequence."""
PROMPT = -1.0
"""The logprob of the masked token that every datum begins with. No loss may depend on it."""


class Unit(NamedTuple):
    """Datums that a loss may compare with each other: an outcome, a pair, or a group.

    Attributes:
        probability: the probability of the unit. The probabilities of all units sum to 1.
        members: the sequence of each datum, by index.
        columns: columns that belong to the unit, such as labels, with one number for each datum.
    """

    probability: float
    members: tuple[int, ...]
    columns: Mapping[str, tuple[float, ...]] = {}


@dataclass(frozen=True)
class World:
    """A tree of tokens, the rewards of its sequences, and how sequences are drawn.

    Attributes:
        name: the name.
        sequences: the steps of each sequence, as pairs (node, token). With ``targets``, the K candidates of a position.
        units: ``(world, sampling policy) -> units``: how sequences are drawn and put together.
        start: the policy before the first step.
        ref: the reference policy, or the teacher.
        rewards: one number for each sequence: its reward, its Bradley-Terry score, or the probability that it is
            labelled as desirable.
        old: the policy that samples, if it is fixed; None: the current policy samples anew for each step.
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
    """Two different sequences, all pairs equally likely; i is chosen over j with probability σ(score_i − score_j)."""
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
    """Return a function of the distribution at each node of sequence ``i``, such as its entropy."""
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
        column = made.get(name) or COLUMNS.get(name)
        if column is None:
            fix = "Add it to COLUMNS of lossfns/testing/worlds/world.py."
            raise LossInputError("reads", f"columns of the world {world.name}", name, fix)
        return column(world, i, policy, sampling)

    masked = [0.0] * (world.targets or 1)
    columns = {name: [masked + row(name, *member) for member in members] for name in ("weights", *reads)}
    logprobs = [[PROMPT for _ in masked] + world.outputs(policy, i) for _, i, _ in members]
    return Batch(logprobs, columns.pop("weights"), columns, world.targets)


def entropy_of(p: Sequence[float]) -> float:
    """−Σ p·log p."""
    return -sum(x * math.log(x) for x in p if x > 0)


def sigmoid(x: float) -> float:
    """1 / (1 + exp(−x))."""
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))
