"""Failures: a bad request is refused, says whose fault it is, and changes nothing; repeated and reordered requests."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from lossfns.conformance.base import (
    Check,
    Finding,
    Inconclusive,
    Unsupported,
    Wrong,
    is_refusal,
    refuse,
    refused_by_sdk,
    server_words,
)
from lossfns.conformance.bench import Act, Bench, Gradient
from lossfns.conformance.client import NoAnswer, Row, Trainer, plain_sgd
from lossfns.conformance.rows import BATCH


def short(row: Row) -> Row:
    return row.having(weights=row.weights[:-1])


def shifted_targets(row: Row) -> Row:
    return row.having(target_tokens=row.fields["target_tokens"][:-1], weights=row.weights[:-1])


def without_targets(row: Row) -> Row:
    return row.having(target_tokens=None)


def outside_vocabulary(row: Row) -> Row:
    ids = row.fields["target_tokens"].copy()
    ids[2] = 2**31 - 2
    return row.having(target_tokens=ids)


def not_finite(row: Row) -> Row:
    return row.having(weights=np.where(np.arange(len(row.weights)) == 2, np.nan, row.weights))


BAD: dict[str, tuple[str, Callable[[Row], Row], str]] = {
    "weights-too-short": ("weights are one shorter than target_tokens", short, "core"),
    "targets-too-short": ("target_tokens are one shorter than the input", shifted_targets, "full"),
    "targets-missing": ("a datum has no target_tokens", without_targets, "core"),
    "token-unknown": ("a target is outside of the vocabulary", outside_vocabulary, "core"),
    "weight-nan": ("a weight is not a number", not_finite, "full"),
}
"""Name → a malformed request: its fault in words, the edit that makes it, and the level of the check."""


def bad_request(edit: Callable[[Row], Row], bench: Bench) -> Finding:
    """Send a batch with one malformed datum, expect a refusal, and train on with the same client."""

    def bad(trainer: Trainer) -> None:
        must_fail(lambda: trainer.forward_backward([BATCH[0], edit(BATCH[1]), BATCH[2]]))

    return usable_after(bench, Act(f"bad-{getattr(edit, '__name__', edit)}", bad))


def unknown_loss(bench: Bench) -> Finding:
    """An unknown loss is refused at once, and the client stays usable."""

    def bad(trainer: Trainer) -> None:
        must_fail(lambda: trainer.forward_backward(BATCH, "no_such_loss"))

    return usable_after(bench, Act("unknown-loss", bad))


def must_fail(request: Callable[[], Any]) -> None:
    """Refuse a server that answers a bad request, or that takes the blame for it."""
    try:
        answer = request()
    except NoAnswer:
        raise
    except Exception as error:
        if refused_by_sdk(error):
            refuse(error)
        if not is_refusal(error):
            words = f"it fails, but not as the sender's fault: {server_words(error)}"
            raise Wrong(words, "failure-miscategorised") from error
        return
    metrics = getattr(answer, "metrics", answer)
    raise Wrong(f"it is accepted; its metrics are {metrics}", "bad-request-accepted")


def usable_after(bench: Bench, bad: Act) -> Finding:
    """Compare a step after a bad request with one without it."""
    refused: list[bool] = []

    def failing(trainer: Trainer) -> None:
        bad.apply(trainer)
        refused.append(True)

    try:
        found = bench.effect(Act(bad.key, failing), Gradient(BATCH))
    except (Wrong, NoAnswer, Unsupported):
        raise
    except Exception as error:
        if refused:
            raise Wrong(f"the next request fails: {server_words(error)}", "failure-poisons") from error
        raise
    finding = bench.same(found, bench.effect(Gradient(BATCH)), "a step after the refusal, and without it")
    return finding if finding.holds else Finding(finding.error, finding.tolerance, finding.noise, finding.seen,
        "failure-leaves-gradient")  # fmt: skip


def unpublished_loss(bench: Bench) -> None:
    """A loss without a public formula, stable_reinforce, works or is refused at once."""
    rows = [row.having(weights=None, logprobs=np.full(len(row.tokens), -1.0), advantages=np.ones(len(row.tokens)))
            for row in BATCH]  # fmt: skip
    trainer = bench.idle()
    try:
        trainer.forward(rows, "stable_reinforce")
    except Exception as error:
        refuse(error)


# Sequence ids. The SDK does not repeat or reorder requests on demand.
# The checks set its counters, which are not public.


def counters(trainer: Trainer) -> Any:
    """Return the SDK's training client, if it counts requests as the versions from 0.18 to 0.38 do."""
    client = trainer.client
    if not all(isinstance(getattr(client, name, None), int) for name in ("_request_id_counter", "_turn_counter")):
        raise Inconclusive("this client does not count requests as the SDK from 0.18 to 0.38 does")
    return client


def set_counters(client: Any, n: int) -> None:
    client._request_id_counter = client._turn_counter = n


def replayed_request(bench: Bench) -> Finding:
    """A request that is repeated under the same sequence id, as after a lost answer, counts once."""

    def twice(trainer: Trainer) -> None:
        client = counters(trainer)
        at = client._request_id_counter
        trainer.forward_backward(BATCH)
        after = client._request_id_counter
        set_counters(client, at)
        try:
            trainer.forward_backward(BATCH)
        except NoAnswer:
            raise
        except Exception as error:
            if not is_refusal(error):
                raise
        set_counters(client, after)

    once, found = bench.effect(Gradient(BATCH)), bench.effect(Act("replay", twice))
    return bench.same(found, once, "a request sent twice under one sequence id, and once")


def order_of_requests(bench: Bench) -> Finding:
    """Requests run in the order of their sequence ids, not of arrival."""
    trainer = bench.fresh()
    client, step = counters(trainer), bench.connection.types.AdamParams(**plain_sgd(bench.facts.rate))
    at = client._request_id_counter
    set_counters(client, at + 1)
    late = client.optim_step(step)  # the step of the gradient that follows
    until_sent(client, at + 2)
    set_counters(client, at)
    trainer.forward_backward(BATCH)
    bench.connection.wait(late, "optim_step, sent before the gradient that it is for")
    set_counters(client, at + 2)
    found = bench.probe(trainer) - np.asarray(bench.facts.baseline)
    return bench.same(found, bench.effect(Gradient(BATCH)), "a step that arrives before its gradient, and after it")


def until_sent(client: Any, turn: int) -> None:
    """Wait until the SDK has sent a request and the server has taken it."""
    began = time.monotonic()
    while client._turn_counter < turn and time.monotonic() - began < 2:
        time.sleep(0.002)


EFFECTS = ("gradient-descent",)

CHECKS = (
    *(
        Check(name, f"A request in which {words} is refused, and changes nothing.", "bad-request-accepted",
            partial(bad_request, edit), level, EFFECTS)
        for name, (words, edit, level) in BAD.items()
    ),
    Check.of(unknown_loss, "bad-request-accepted", needs=EFFECTS),
    Check.of(unpublished_loss, "no-answer", "full", needs=("forward",)),
    Check.of(replayed_request, "replayed", "full", needs=EFFECTS),
    Check.of(order_of_requests, "sequence-order", "full", needs=EFFECTS),
)  # fmt: skip
