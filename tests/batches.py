"""Random ragged batches, and the table of methods beside their oracles, shared by the tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from rollout_oracle import banded, penalised_ppo, weighted_ppo
from torch import Tensor

import lossfns
from lossfns import Datum, Loss, ModelInput, TensorData
from lossfns.testing import oracle
from lossfns.testing.oracle import PAIR_WEIGHINGS, TOKEN_WEIGHINGS
from lossfns.testing.public import presets

Rows = list[list[float]]
LOGPROBS = ("old_logprobs", "ref_logprobs", "sampler_logprobs")


@dataclass
class Batch:
    """Plain rows of floats: what the oracle reads, and what is packed into datums and tensors for a loss."""

    logprobs: Rows
    weights: Rows
    columns: dict[str, Rows] = field(default_factory=dict)
    targets: int = 0

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        shape = (-1, self.targets) if self.targets else (-1,)
        return [torch.tensor(row, dtype=dtype).reshape(shape).requires_grad_() for row in self.logprobs]

    def data(self, sdk: Any = lossfns) -> list[Any]:
        """Datums that carry nothing but targets, of ours or of another SDK."""
        shapes = [[len(row) // self.targets, self.targets] if self.targets else [len(row)] for row in self.weights]
        fields = [{"target_tokens": sdk.TensorData([0] * math.prod(s), "int64", s)} for s in shapes]
        return [sdk.Datum(sdk.ModelInput.from_ints([0] * s[0]), f) for s, f in zip(shapes, fields)]

    def bound(self, reads: tuple[str, ...] | list[str]) -> dict[str, Any]:
        """The columns for ``bind``: in float64, so that nothing is rounded on the way."""
        return {"weights": self.shaped(self.weights), **{name: self.shaped(self.columns[name]) for name in reads}}

    def shaped(self, rows: Rows) -> list[Any]:
        if not self.targets:
            return rows
        return [torch.tensor(row, dtype=torch.float64).reshape(-1, self.targets) for row in rows]

    def take(self, indices: list[int]) -> Batch:
        pick = lambda rows: [rows[i] for i in indices]  # noqa: E731
        columns = {name: pick(rows) for name, rows in self.columns.items()}
        return Batch(pick(self.logprobs), pick(self.weights), columns, self.targets)


@dataclass(frozen=True)
class Case:
    """A loss, the oracle's function for it, and the arguments that make them the same."""

    loss: Loss
    oracle: Callable[..., tuple[float, Rows]]
    knobs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return repr(self.loss)

    @property
    def pairs(self) -> bool:
        return self.loss.rows == "pairs"

    def batch(self, rng: Random, **options: Any) -> Batch:
        targets = 3 if self.loss.rows == "targets" else 0
        return random_batch(rng, pairs=self.pairs, targets=targets, **options)

    def expected(self, batch: Batch, **more: Any) -> tuple[float, Rows]:
        columns = {name: batch.columns[name] for name in self.loss.reads}
        return self.oracle(logprobs=batch.logprobs, weights=batch.weights, **columns, **self.knobs, **more)


def random_batch(
    rng: Random, *, pairs: bool = False, targets: int = 0, sequences: int | None = None, longest: int = 9
) -> Batch:
    """Ragged sequences with interior zeros, fractional weights, and (not in pairs) one fully masked sequence.

    Log-ratios are mostly small, sometimes past every clip bound, once in a while past the cap of 20.
    """
    count = sequences or (2 * rng.randint(1, 4) if pairs else rng.randint(2, 7))
    lengths = [rng.randint(1, longest) * (targets or 1) for _ in range(count)]
    row = lambda draw: [[draw() for _ in range(n)] for n in lengths]  # noqa: E731
    logprobs = row(lambda: -rng.uniform(1e-3, 6))
    weights = row(lambda: rng.choice((0.0, 1.0, 1.0, 1.0, 0.5, 2.0)))
    for sequence in weights:
        sequence[-1] = 1.0
    if not pairs:
        weights[rng.randrange(count)] = [0.0] * lengths[0]
        weights = [w if any(w) else [0.0] * n for w, n in zip(weights, lengths)]

    def near(lp: float) -> float:
        return min(
            lp - (rng.choice((-25, 25)) if rng.random() < 0.08 else rng.gauss(0, rng.choice((0.02, 0.5)))), -1e-4
        )

    columns = {name: [[near(lp) for lp in sequence] for sequence in logprobs] for name in LOGPROBS}
    columns["advantages"] = row(lambda: rng.choice((rng.gauss(0, 1), rng.gauss(0, 1), 0.0)))
    return Batch(logprobs, weights, columns, targets)


def call(
    loss: Loss, batch: Batch, dtype: torch.dtype = torch.float64, **bind: Any
) -> tuple[float, Rows, dict[str, float]]:
    """Value, gradients and metrics of a loss on a batch."""
    logprobs = batch.tensors(dtype)
    value, metrics = loss.bind(**batch.bound(loss.reads), **bind)(batch.data(), logprobs)
    value.backward()
    return value.item(), [lp.grad.flatten().tolist() for lp in logprobs], metrics


def apart(a: Any, b: Any) -> float:
    """The largest relative difference (absolute below 1) between two nested lists of floats."""
    if isinstance(a, float):
        return abs(a - b) / max(1.0, abs(a), abs(b)) if math.isfinite(a - b) else math.inf
    assert len(a) == len(b)
    return max((apart(x, y) for x, y in zip(a, b)), default=0.0)


def cases() -> Iterator[Case]:
    """Every preset with every weighing of its rows and with its knobs away from their defaults, and combinations."""
    for name, preset in presets().items():
        for weigh in PAIR_WEIGHINGS if preset().rows == "pairs" else TOKEN_WEIGHINGS:
            yield case(name, weigh)
    for name, preset in presets().items():
        own, pairs = preset().knobs, preset().rows == "pairs"
        weighings = PAIR_WEIGHINGS if pairs else (repr(own["weigh"]),)
        for knobs in PAIR_KNOBS if pairs else TOKEN_KNOBS:
            if knobs.keys() <= own.keys():
                yield from (case(name, weigh, **knobs) for weigh in weighings)
    t = {"weigh": "token_mean"}
    for level in ("token", "sequence"):
        ppo = lossfns.with_tis(lossfns.ppo(), cap=1.3, level=getattr(lossfns, f"{level}_level"))
        knobs = {"tis_cap": 1.3, "tis_level": level}
        yield Case(ppo, oracle.ppo, t | knobs)
        yield Case(lossfns.with_kl(ppo, kl_beta=0.2), oracle.grpo, t | knobs | {"kl_beta": 0.2})
    yield from corrections()
    tis = {"tis_cap": 1.3, "tis_level": "sequence"}
    for name, preset in presets().items():  # presets with a term of their own, so not those of PPO's surrogate
        for knobs in ({"clip": (0.5, 2.0)}, {"beta": 0.7}):
            own = preset().knobs.keys()
            if preset().reads == ("advantages", "old_logprobs") and knobs.keys() <= own and "dual_clip" not in own:
                plain = case(name, repr(preset().knobs["weigh"]), **knobs)
                corrected = lossfns.with_tis(plain.loss, cap=1.3, level=lossfns.sequence_level)
                yield Case(corrected, plain.oracle, plain.knobs | tis)
                both = penalised(plain.oracle), plain.knobs | tis | {"kl_beta": 0.2}
                yield Case(lossfns.with_kl(corrected, kl_beta=0.2), *both)


def corrections() -> Iterator[Case]:
    """A penalty with weight, cap and another column; a product of token weights; and both."""
    ratio, weigh = lossfns.rollout.ratio_to("old_logprobs"), {"weigh": "token_mean"}
    knobs = {"kl_beta": 0.2, "kl_cap": 1.5, "kl_to": "sampler_logprobs"}
    loss = lossfns.with_kl(lossfns.ppo(), kl=lossfns.k3, kl_weight=ratio, **knobs)  # type: ignore[arg-type]
    yield Case(loss, penalised_ppo, weigh | knobs | {"kl": "k3", "kl_weight": "ratio"})
    weight = lossfns.rollout.truncated((0.5, 1.3)) * lossfns.rollout.inside((0.5, 2.0), lossfns.sequence_level)
    yield Case(lossfns.with_rollout_weight(lossfns.ppo(), weight), weighted_ppo, weigh | {"factor": banded})


TOKEN_KNOBS: tuple[dict[str, Any], ...] = (
    {"clip": (0.5, 3.0), "dual_clip": 4.0},
    {"clip": (0.8, 1.28)},
    {"clip": (0.5, 2.0)},
    {"log_ratio_cap": 0.3},
    {"beta": 2.0},
    {"kl": "k2", "kl_beta": 0.5},
    {"kl": "k3", "kl_beta": 0.5},
)
"""Knobs away from their defaults, for every preset over tokens that has them."""
PAIR_KNOBS: tuple[dict[str, Any], ...] = ({"beta": 0.7, "label_smoothing": 0.2}, {"lam": 1.5})
"""Knobs away from their defaults, for every preset over pairs that has them."""


def case(name: str, weigh: str, **knobs: Any) -> Case:
    """A preset and the oracle's function of the same name, with the same knobs."""
    weighing = lossfns.fixed_length(7) if weigh == "fixed_length" else getattr(lossfns, weigh)
    settings = knobs | ({"kl": getattr(lossfns, knobs["kl"])} if "kl" in knobs else {})
    length = {"length": 7} if weigh == "fixed_length" else {}
    loss = presets()[name](weigh=weighing, **settings)
    return Case(loss, getattr(oracle, name), {"weigh": weigh, **length, **knobs})


def penalised(policy: Callable[..., tuple[float, Rows]]) -> Callable[..., tuple[float, Rows]]:
    """A policy loss of the oracle and β·KL, which is its grpo where every advantage is 0."""

    def oracle_of_both(*, ref_logprobs: Rows, kl_beta: float, **given: Any) -> tuple[float, Rows]:
        value, gradients = policy(**given)
        columns = {name: given[name] for name in ("logprobs", "weights", "old_logprobs", "weigh")}
        denominator = {name: x for name, x in given.items() if name == "denominator"}
        silent = [[0.0] * len(row) for row in given["weights"]]
        kl, pulls = oracle.grpo(**columns, **denominator, advantages=silent, ref_logprobs=ref_logprobs, kl_beta=kl_beta)
        return value + kl, [[g + p for g, p in zip(*rows)] for rows in zip(gradients, pulls)]

    return oracle_of_both


CASES = list(cases())


def sdks() -> list[Any]:
    """Ours, and the real ``tinker`` where it is installed."""
    try:
        import tinker
    except ImportError:
        return [lossfns]
    return [lossfns, tinker]


__all__ = ["CASES", "Batch", "Case", "Datum", "ModelInput", "TensorData", "apart", "call", "random_batch", "sdks"]
