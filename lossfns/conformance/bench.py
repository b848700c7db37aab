"""The experiments of the suite: a client from one saved state, gradients, one step, and the change of logprobs.

AdamW with beta1 = beta2 = 0 and a huge eps is plain gradient descent. From one state, equal gradients give equal
changes of logprobs, exactly: no step size has to go to 0, and nothing about the weights has to be known.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lossfns.conformance.base import TOLERANCE, TOO_NOISY, Finding, Inconclusive, Wrong, require
from lossfns.conformance.client import Answer, Connection, Row, Rows, Trainer, key_of, plain_sgd
from lossfns.conformance.rows import BATCH, PROBE

Vector = np.ndarray
Adam = Mapping[str, float]

MOST_CLIENTS = 20
"""The number of training clients of a session."""

ROUNDING = 0.02
"""The largest difference between two runs of one calculation that can be rounding; more is a defect."""


class Gradient(NamedTuple):
    """A forward_backward with a built-in loss."""

    rows: Rows
    loss: str = "cross_entropy"
    config: Mapping[str, Any] | None = None

    def apply(self, trainer: Trainer) -> Answer:
        return trainer.forward_backward(self.rows, self.loss, self.config)

    @property
    def key(self) -> str:
        return key_of(self.rows, self.loss, sorted((self.config or {}).items()))


class Act(NamedTuple):
    """Any other use of a client, under a name that tells what it does."""

    key: str
    apply: Callable[[Trainer], Any]


@dataclass
class Facts:
    """Facts about a server that the setup finds. They are plain values, and pass from one process to the next.

    Attributes:
        base_model: the model that is trained.
        path: the path of the state from which experiments start.
        start: how a client gets to this state: ``state``, ``load`` (into a client that exists) or ``seed``.
        rate: a rate of plain gradient descent at which the probe's logprobs move by about one nat.
        noise: the relative difference between the effects of two identical experiments.
        rounding: that between two experiments that are the same calculation in another order.
        seconds: the time of one experiment.
        closes: whether a session can be ended.
        effects: key of an experiment → its effect, so that no experiment is run twice.
        failed: the checks that do not hold, with their reasons: checks that need them are not run.
    """

    base_model: str
    rank: int = 8
    path: str = ""
    start: str = "state"
    rate: float = 0.0
    noise: float = 0.0
    rounding: float = 0.0
    seconds: float = 0.0
    closes: bool = True
    baseline: list[float] = field(default_factory=list)
    effects: dict[str, list[float]] = field(default_factory=dict)
    logprobs: dict[str, list[Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Bench:
    """A connection with the facts about its server, and the experiments that checks are made of."""

    def __init__(self, connection: Connection, facts: Facts) -> None:
        self.connection, self.facts = connection, facts
        self.made = 0
        self.kept: Trainer | None = None
        self.reused: Trainer | None = None
        self.sampler: Any = None

    # Clients

    def fresh(self) -> Trainer:
        """Return a client in the state from which every experiment starts.

        Servers limit the number of models. The session is renewed after some clients, so that the server can free
        them. Where that is not possible, one client is loaded again and again instead.
        """
        facts = self.facts
        facts.closes = facts.closes and hasattr(self.connection.service, "close")
        if self.made >= MOST_CLIENTS and facts.closes:
            facts.closes = self.connection.close()
            self.connection.service = self.connection.open_session()
            self.made = 0
            self.forget()
        if facts.path and self.made > 0 and not facts.closes:
            self.reused = self.reused or self.another()
            self.reused.load(facts.path)
            return self.reused
        return self.another()

    def another(self) -> Trainer:
        """Return a client of its own in that state."""
        facts = self.facts
        self.made += 1
        if facts.path and facts.start == "state":
            return self.connection.from_state(facts.path)
        trainer = self.new()
        if facts.path and facts.start == "load":
            trainer.load(facts.path)
        return trainer

    def forget(self) -> None:
        """Drop the clients that are kept: their session has ended, their requests failed, or the start has moved."""
        self.kept = self.reused = self.sampler = None

    def idle(self) -> Trainer:
        """Return a client in that state on which no steps are taken. It is kept for all requests without one."""
        if self.kept is None:
            self.kept = self.another()
        return self.kept

    def new(self) -> Trainer:
        """Return a client with new adapters, the same each time if the server heeds the seed."""
        return self.connection.create(self.facts.base_model, rank=self.facts.rank, seed=1)

    def save(self, trainer: Trainer) -> str:
        return trainer.save(f"lossfns-{uuid.uuid4().hex[:12]}")

    # Measurements

    def probe(self, trainer: Trainer) -> Vector:
        """Return the logprobs of the probe's datums, end to end."""
        return np.concatenate([lp.ravel() for lp in trainer.forward(PROBE).logprobs])

    def start_logprobs(self, rows: Rows) -> list[np.ndarray]:
        """Return the logprobs of datums in the state from which experiments start. They are measured once."""
        bare = [Row(row.tokens, {"target_tokens": row.fields["target_tokens"]}).having(
            weights=np.ones_like(row.fields["target_tokens"])) for row in rows]  # fmt: skip
        key = key_of(bare)
        if key not in self.facts.logprobs:
            self.facts.logprobs[key] = [lp.tolist() for lp in self.idle().forward(bare).logprobs]
        return [np.asarray(lp) for lp in self.facts.logprobs[key]]

    def effect(self, *acts: Gradient | Act, rate: float = 1.0, adam: Adam | None = None, again: str = "") -> Vector:
        """Return the change of the probe's logprobs by some requests on a fresh client and one step.

        Args:
            acts: the requests before the step.
            rate: the step's rate, as a multiple of the usual one.
            adam: settings of AdamW; without any the step is plain gradient descent.
            again: a word that makes this a repetition, which is measured anew.
        """
        settings = {"learning_rate": rate, **adam} if adam is not None else plain_sgd(rate * self.facts.rate)
        key = "|".join([*(act.key for act in acts), repr(sorted(settings.items())), again])
        if key not in self.facts.effects:
            trainer = self.fresh()
            for act in acts:
                act.apply(trainer)
            trainer.step(**settings)
            self.facts.effects[key] = (self.probe(trainer) - np.asarray(self.facts.baseline)).tolist()
        return np.asarray(self.facts.effects[key])

    # Comparisons

    @property
    def noise(self) -> float:
        """The relative noise of an effect: of repetition, and of rounding as far as it can be rounding."""
        return max(self.facts.noise, self.facts.rounding if self.facts.rounding < ROUNDING else 0.0)

    @property
    def tolerance(self) -> float:
        return max(TOLERANCE, 5 * self.noise)

    def same(self, found: Vector, expected: Vector, seen: str, bug: str = "") -> Finding:
        """Compare two effects."""
        self.check_noise()
        error = difference(found, expected)
        words = "" if error <= self.tolerance else f": {how_different(found, expected)}"
        return Finding(error, self.tolerance, self.noise, seen + words, bug)

    def none(self, found: Vector, seen: str, bug: str = "") -> Finding:
        """Compare an effect with no effect at all, relative to that of the batch."""
        self.check_noise()
        size = float(np.linalg.norm(self.effect(Gradient(BATCH))))
        error = float(np.linalg.norm(found)) / size if size else np.nan
        words = "" if error <= self.tolerance else f": the effect is {error:.3g} times that of the batch"
        return Finding(error, self.tolerance, self.noise, seen + words, bug)

    def check_noise(self) -> None:
        """Raise Inconclusive if the noise is too high for any comparison."""
        if not self.noise <= TOO_NOISY:
            raise Inconclusive(f"two identical experiments differ by {self.noise:.0%}")


def difference(a: Vector, b: Vector) -> float:
    """‖a − b‖ / max(‖a‖, ‖b‖); 0 if both are zero, nan if a number is not finite."""
    size = max(np.linalg.norm(a), np.linalg.norm(b))
    return float(np.linalg.norm(a - b) / size) if size > 0 else 0.0 if size == 0 else np.nan


def how_different(found: Vector, expected: Vector) -> str:
    """Return in words how an effect differs: by a factor, or in direction."""
    if not np.isfinite(found).all():
        return "it is not finite"
    if not np.linalg.norm(expected) or not np.linalg.norm(found):
        return "it has no effect at all" if not np.linalg.norm(found) else "it should have none"
    factor = float(found @ expected / (expected @ expected))
    if difference(found, factor * expected) < 0.1:
        return f"it is {factor:.3g} times what it should be"
    cosine = float(found @ expected / np.linalg.norm(found) / np.linalg.norm(expected))
    return f"it differs by {difference(found, expected):.2g} of its size (cosine {cosine:.2f})"


# The setup


def connect_facts(connection: Connection, base_model: str | None) -> Facts:
    """Return facts with the model to train: the given one, or the first that the server offers."""
    try:
        offered = connection.service.get_server_capabilities().supported_models
    except Exception:
        if base_model is None:
            raise
        return Facts(base_model)  # a server need not list its models to one who knows them
    names = [name for name in (getattr(model, "model_name", None) for model in offered) if name]
    if base_model is None:
        require(bool(names), "the server offers no model: pass --base-model", "refused")
        return Facts(str(names[0]))
    if names and base_model not in names:
        raise Inconclusive(f"the server has no model {base_model!r}; it offers {', '.join(map(repr, names))}")
    return Facts(base_model)


def find_start(bench: Bench) -> None:
    """Save a state that differs from the new model, and find a way back to it.

    In new adapters one of the two factors is zero, and hides gradients of the other: one ordinary step moves it.
    """
    trainer = bench.fresh()
    trainer.forward_backward(BATCH)
    trainer.step(learning_rate=1e-3)
    bench.facts.path = bench.save(trainer)
    bench.facts.logprobs.clear()  # they were those of a new model
    bench.forget()
    bench.facts.baseline = bench.probe(trainer).tolist()


def calibrate(bench: Bench) -> None:
    """Find a rate of gradient descent at which the probe's logprobs move by about one nat, and measure the noise."""
    rate = bench.facts.rate = 1e-2
    moved = 0.0
    for _ in range(8):
        bench.facts.rate = rate
        began = time.monotonic()
        moved = float(np.abs(bench.effect(Gradient(BATCH))).max())
        bench.facts.seconds = time.monotonic() - began
        if 0.3 <= moved <= 3:
            break
        rate *= 0.01 if not np.isfinite(moved) else float(np.clip(1 / max(moved, 1e-9), 0.01, 100))
    if not moved > 1e-4:
        ordinary = float(np.abs(bench.effect(Gradient(BATCH), rate=1e-2, adam={})).max())
        bug = "adam-settings" if ordinary > 1e-3 else "step-inert"
        raise Wrong(f"gradient descent moves logprobs by {moved:.2g}, an ordinary step by {ordinary:.2g}", bug)
    require(np.isfinite(moved) and moved < 30, f"a small step moves logprobs by {moved:.3g}: AdamW does not take its "
        "eps or its learning rate from AdamParams", "adam-settings")  # fmt: skip
    first = bench.effect(Gradient(BATCH))
    again = [bench.effect(Gradient(BATCH), again=word) for word in ("second", "third")]
    bench.facts.noise = max(difference(x, first) for x in again)
    nearly = 1 + 2**-6
    scaled = [row.having(weights=row.weights * nearly) for row in BATCH]
    bench.facts.rounding = difference(bench.effect(Gradient(scaled), rate=1 / nearly), first)
