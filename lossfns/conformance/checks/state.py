"""State: saved weights and optimizers, and clients that are created from them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lossfns.conformance.base import Check, Finding, Wrong, is_refusal, require, server_words
from lossfns.conformance.bench import Bench, Gradient, calibrate, find_start
from lossfns.conformance.checks.outputs import NATS
from lossfns.conformance.client import Trainer, plain_sgd
from lossfns.conformance.rows import BATCH

HALF = BATCH[:2]
REST = BATCH[2:]


def save_state(bench: Bench) -> None:
    """save_state answers with a path."""
    find_start(bench)
    require(bool(bench.facts.path), "save_state returned no path")


def create_from_state(bench: Bench) -> Finding:
    """A client created from a state has the weights that were saved."""
    facts, reasons = bench.facts, []
    finding = None
    for start in ("state", "load", "seed"):
        facts.start = start
        try:
            trainer = bench.connection.from_state(facts.path) if start == "state" else bench.fresh()
            found = bench.probe(trainer)
        except Exception as error:
            reasons.append(server_words(error))
            continue
        if start == "seed":
            facts.baseline = found.tolist()
        gap = float(np.abs(found - np.asarray(facts.baseline)).max())
        if start == "state":
            finding = Finding(gap, NATS / 5, seen=f"its logprobs differ by {gap:.3g} nats from those at the save")
        if gap <= NATS:
            break
        reasons.append(f"logprobs differ by {gap:.3g} nats from those at the save")
    if facts.start != "state":
        raise Wrong(reasons[0], "refused" if finding is None else "state-lost")
    assert finding is not None
    facts.baseline = found.tolist()
    return finding


def gradient_descent(bench: Bench) -> Finding:
    """A step of AdamW without moments and with a huge eps moves logprobs, equally each time."""
    if not bench.facts.baseline:  # no state could be saved: experiments start from new clients with one seed
        bench.facts.baseline = bench.probe(bench.fresh()).tolist()
    calibrate(bench)
    return Finding(
        bench.facts.noise, 0.02, bench.facts.noise, f"the same step again differs by {bench.facts.noise:.2g}"
    )


ADAM = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-12}


def moved(bench: Bench, trainer: Trainer) -> np.ndarray:
    """Return how far the probe's logprobs are from those of the start."""
    found: np.ndarray = bench.probe(trainer) - np.asarray(bench.facts.baseline)
    return found


def resumed(bench: Bench, *, optimizer: bool) -> np.ndarray:
    """Return the effect of a step, a save, a client created from it, and another step."""
    trainer = bench.fresh()
    trainer.forward_backward(HALF)
    trainer.step(learning_rate=1e-2, **ADAM)
    trainer = bench.connection.from_state(bench.save(trainer), optimizer=optimizer)
    trainer.forward_backward(REST)
    trainer.step(learning_rate=1e-2, **ADAM)
    return moved(bench, trainer)


def in_one_go(
    bench: Bench, second: dict[str, float], between: Callable[[Trainer], object] = lambda trainer: None
) -> np.ndarray:
    """Return the effect of two steps of one client, the second with other settings."""
    trainer = bench.fresh()
    trainer.forward_backward(HALF)
    trainer.step(learning_rate=1e-2, **ADAM)
    between(trainer)
    trainer.forward_backward(REST)
    trainer.step(learning_rate=1e-2, **second)
    return moved(bench, trainer)


def resume_with_optimizer(bench: Bench) -> Finding:
    """Training that is resumed with its optimizer continues as if it had not been interrupted."""
    return bench.same(resumed(bench, optimizer=True), in_one_go(bench, ADAM), "two steps with a save between them")


def resume_without_optimizer(bench: Bench) -> Finding:
    """Training that is resumed without its optimizer starts with new moments."""
    # A first step of AdamW is the sign of the gradient, whatever the betas: so is a step without moments.
    return bench.same(resumed(bench, optimizer=False), in_one_go(bench, {"beta1": 0.0, "beta2": 0.0, "eps": 1e-12}),
        "a step after a load without the optimizer, and a first step")  # fmt: skip


def save_disturbs_nothing(bench: Bench) -> Finding:
    """Saving does not change what training does next."""
    return bench.same(in_one_go(bench, ADAM, bench.save), in_one_go(bench, ADAM), "two steps with a save between them")


def clients_are_apart(bench: Bench) -> Finding:
    """Two clients share neither weights nor gradients."""
    one, other = bench.connection.from_state(bench.facts.path), bench.connection.from_state(bench.facts.path)
    other.forward_backward([row.having(weights=-3 * row.weights) for row in BATCH])
    one.forward_backward(BATCH)
    other.step(learning_rate=1e-2)
    try:
        one.step(**plain_sgd(bench.facts.rate))
    except Exception as error:
        if not is_refusal(error):
            raise
        raise Wrong(f"after a step of another client: {server_words(error)}", "models-shared") from error
    found = moved(bench, one)
    return bench.same(found, bench.effect(Gradient(BATCH)), "a client beside another that trains, and alone")


def load_into_client(bench: Bench) -> Finding:
    """load_state gives a client the saved weights again."""
    trainer = bench.fresh()
    trainer.forward_backward(BATCH)
    trainer.step(learning_rate=1e-2)
    trainer.load(bench.facts.path)
    return bench.none(moved(bench, trainer), "weights after load_state")


def load_resets_optimizer(bench: Bench) -> Finding:
    """load_state starts the optimizer afresh."""
    trainer = bench.fresh()
    trainer.forward_backward(HALF)
    trainer.step(learning_rate=1e-2, **ADAM)
    trainer.load(bench.facts.path)
    trainer.forward_backward(REST)
    trainer.step(learning_rate=1e-2, **ADAM)
    new = bench.effect(Gradient(REST), rate=1e-2, adam=ADAM)
    return bench.same(moved(bench, trainer), new, "a step after load_state, and the first of a new client")


START = (
    Check.of(save_state, "refused", needs=("forward-backward",)),
    Check.of(create_from_state, "state-lost", needs=("save-state",)),
    Check.of(gradient_descent, "adam-settings", needs=("forward-backward",)),
)
"""The checks that find the state and the step size from which all effects are measured."""

EFFECTS = ("gradient-descent",)

CHECKS = (
    Check.of(save_disturbs_nothing, "save-disturbs", needs=EFFECTS),
    Check.of(load_into_client, "state-lost", "full", needs=EFFECTS),
    Check.of(load_resets_optimizer, "optimizer-kept", "full", needs=EFFECTS),
    Check.of(resume_with_optimizer, "optimizer-lost", needs=(*EFFECTS, "create-from-state")),
    Check.of(resume_without_optimizer, "optimizer-kept", needs=(*EFFECTS, "create-from-state")),
    Check.of(clients_are_apart, "models-shared", needs=(*EFFECTS, "create-from-state")),
)
