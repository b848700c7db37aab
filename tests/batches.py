"""Random ragged batches, and the table of methods beside their oracles, shared by the tests."""

from __future__ import annotations

import inspect
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
from lossfns.testing.mutants import CLOSED_FORMS
from lossfns.testing.oracle import DATUM_WEIGHINGS, PAIR_WEIGHINGS, TOKEN_WEIGHINGS
from lossfns.testing.public import presets
from lossfns.testing.settings import knobs, setting_elements, variants
from lossfns.tokens import PAIRS, SEQUENCES

Rows = list[list[float]]
WEIGHINGS = {PAIRS: PAIR_WEIGHINGS, SEQUENCES: DATUM_WEIGHINGS}
"""The weighings of each kind of row; of tokens and targets, those of tokens."""
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

    @property
    def default(self) -> bool:
        """Whether the loss has the defaults of its preset."""
        return repr(self.loss) == repr(presets()[self.loss.name]())

    def __str__(self) -> str:
        return repr(self.loss)

    @property
    def pairs(self) -> bool:
        return self.loss.rows == "pairs"

    def batch(self, rng: Random, **options: Any) -> Batch:
        targets = 3 if self.loss.rows == "targets" else 0
        batch = random_batch(rng, pairs=self.pairs, targets=targets, **options)
        return batch if self.loss.output == "logprobs" else with_scores(batch, rng)

    def units(self, batch: Batch) -> list[list[int]]:
        """The datums that no split may separate: the sides of a pair, or all datums of a group."""
        size = self.loss.rows.datums
        units = [list(range(i, i + size)) for i in range(0, len(batch.weights), size)]
        if not self.loss.couples_groups:
            return units
        groups: dict[float, list[int]] = {}
        for unit in units:
            groups.setdefault(batch.columns["groups"][unit[0]][0], []).extend(unit)
        return list(groups.values())

    def expected(self, batch: Batch, **more: Any) -> tuple[float, Rows]:
        columns = {name: batch.columns[name] for name in self.loss.reads}
        if "targets" in inspect.signature(self.oracle).parameters:
            more |= {"targets": batch.targets}
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
    return Batch(logprobs, weights, columns | other_columns(rng, logprobs, pairs, near), targets)


RANGES = {
    "entropy": (0.0, 3.0),
    "sum_square_probs": (0.05, 1.0),
    **dict.fromkeys(("values", "old_values", "returns"), (-2.0, 2.0)),
}
"""The ranges of columns by token that few losses read."""


def other_columns(rng: Random, logprobs: Rows, pairs: bool, near: Callable[[float], float]) -> dict[str, Rows]:
    """The columns that few losses read. Numbers of a datum or pair stand at each token."""
    columns = {name: [[rng.uniform(*ends) for _ in row] for row in logprobs] for name, ends in RANGES.items()}
    columns["teacher_logprobs"] = [[near(lp) for lp in row] for row in logprobs]
    draws: dict[str, Callable[[], float]] = {
        "groups": lambda: rng.randrange(3),
        "labels": lambda: rng.randrange(2),
        "rewards": lambda: rng.gauss(0, 1),
        "reference_point": lambda: rng.uniform(0, 1),
        "target_margin": lambda: rng.uniform(0, 2),
    }
    for name, draw in draws.items():
        numbers = [float(draw()) for _ in logprobs]
        columns[name] = [[numbers[i - i % 2 if pairs else i]] * len(row) for i, row in enumerate(logprobs)]
    return columns


def with_scores(batch: Batch, rng: Random) -> Batch:
    """The batch with numbers of both signs in place of logprobs."""
    scores = [[rng.gauss(0, 1) for _ in row] for row in batch.logprobs]
    return Batch(scores, batch.weights, batch.columns, batch.targets)


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


TWINS: dict[str, Loss] = {
    "gpg": lossfns.reinforce(),
    "bnpo": lossfns.ppo(),
    "dapo": lossfns.ppo(clip=(0.8, 1.28)),
    "dr_grpo": lossfns.ppo(weigh=lossfns.fixed_length(3000)),
    "luspo": lossfns.gspo(weigh=lossfns.sequence_sum_mean),
    "kimi15": lossfns.dro(beta=0.1),
}
"""Presets that are others under a name that people look up, and which. Their docstrings say so.

``test_family.py`` shows that they are equal in every setting, so the other tests take only those with a closed form.
"""


def cases() -> Iterator[Case]:
    """Every preset that is no twin of another in some settings, and combinations with combinators.

    A loss whose oracle is a closed form comes with every weighing and many knobs. Any other comes with its defaults,
    and once with every setting away from its default.
    """
    for name in CLOSED_FORMS:
        if name in presets():
            yield from closed_form_cases(name)
    for name, preset in presets().items():
        if name not in CLOSED_FORMS and name not in TWINS:
            yield derived_case(preset())
            yield derived_case(changed(preset()))
    t = {"weigh": "token_mean"}
    for level in ("token", "sequence"):
        ppo = lossfns.with_tis(lossfns.ppo(), cap=1.3, level=getattr(lossfns, f"{level}_level"))
        tis = {"tis_cap": 1.3, "tis_level": level}
        yield Case(ppo, oracle.ppo, t | tis)
        yield Case(lossfns.with_kl(ppo, kl_beta=0.2), oracle.grpo, t | tis | {"kl_beta": 0.2})
    yield from corrections()
    tis = {"tis_cap": 1.3, "tis_level": "sequence"}
    for name, setting in (("cispo", {"clip": (0.5, 2.0)}), ("dro", {"beta": 0.7})):
        plain = case(name, "token_mean", **setting)
        corrected = lossfns.with_tis(plain.loss, cap=1.3, level=lossfns.sequence_level)
        yield Case(corrected, plain.oracle, plain.knobs | tis)
        both = penalised(plain.oracle), plain.knobs | tis | {"kl_beta": 0.2}
        yield Case(lossfns.with_kl(corrected, kl_beta=0.2), *both)


def closed_form_cases(name: str) -> Iterator[Case]:
    """A preset with every weighing of its rows, and with its knobs away from their defaults."""
    loss = presets()[name]()
    weighings = WEIGHINGS.get(loss.rows, TOKEN_WEIGHINGS)
    for weigh in weighings:
        yield case(name, weigh)
    for settings in PAIR_KNOBS if loss.rows is PAIRS else TOKEN_KNOBS:
        if settings.keys() <= loss.knobs.keys():
            for weigh in weighings if loss.rows is PAIRS else (repr(loss.knobs["weigh"]),):
                yield case(name, weigh, **settings)


def changed(loss: Loss) -> Loss:
    """The loss with each setting at another value than its default."""
    for name, value in knobs(loss).items():
        for element in setting_elements(value):
            loss = next(variants(loss, name, element), loss)
    return loss


def derived_case(loss: Loss) -> Case:
    """A loss and the oracle's function of its name, with the loss's own settings."""
    return Case(loss, getattr(oracle, loss.name), oracle_settings(loss))


def oracle_settings(loss: Loss) -> dict[str, Any]:
    """The settings of a loss as the oracle takes them: functions and weighings by their names."""
    settings = {name: getattr(x, "__name__", x) for name, x in loss.knobs.items()}
    weigh = repr(settings["weigh"])
    length = {"length": float(weigh[13:-1])} if weigh.startswith("fixed_length") else {}
    return settings | {"weigh": weigh.partition("(")[0]} | length


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
LAW_CASES = [
    case for case in CASES if case.loss.name not in presets() or case.loss.name in CLOSED_FORMS or case.default
]
"""The cases without the settings of a derived loss that differ from its defaults: no law depends on them."""


def sdks() -> list[Any]:
    """Ours, and the real ``tinker`` where it is installed."""
    try:
        import tinker
    except ImportError:
        return [lossfns]
    return [lossfns, tinker]


__all__ = [
    "CASES",
    "LAW_CASES",
    "Batch",
    "Case",
    "Datum",
    "ModelInput",
    "TensorData",
    "apart",
    "call",
    "random_batch",
    "sdks",
]
