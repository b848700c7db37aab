"""Golden vectors over the wire: their weights, advantages and settings as datums, their gradients as what to expect.

Logprobs of a server cannot be set. The losses of these vectors read them as log-ratios to the old logprobs, which can
be set, or not at all, so the gradients of the vectors hold at the server's own logprobs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lossfns.conformance.base import Check, Finding, Inconclusive
from lossfns.conformance.bench import Bench, Gradient
from lossfns.conformance.client import Row
from lossfns.conformance.rows import tokens
from lossfns.datum import Datum, ModelInput, TensorData
from lossfns.errors import LossInputError
from lossfns.export.datums import fold
from lossfns.testing.vectors.library import subject_for
from lossfns.testing.vectors.vector import Vector, load, num_targets

LOSSES = ("importance_sampling", "ppo", "dapo", "grpo", "cispo", "gspo_token")
"""The losses whose vectors may fold into a built-in. Those of cross_entropy would be compared with themselves."""

SENT = {"dapo": "ppo", "grpo": "ppo", "gspo_token": "gspo"}
"""Loss of the vectors → the built-in that computes it, where the names differ."""


RATE = 0.25
"""The step for many vectors at once."""


class Sent(NamedTuple):
    """A vector as a request, and the same gradient as the request of a cross_entropy."""

    vector: Vector
    request: Gradient
    golden: Gradient


def on_wire(name: str, bench: Bench) -> list[Sent]:
    """Return the vectors of a loss that a built-in computes exactly, as requests."""
    vectors = [vector for vector in load(name) if sendable(vector)]
    bare = [[bare_row(i, row, num_targets(v.data)) for i, row in enumerate(v.data)] for v in vectors]
    every = [row for rows in bare for row in rows]
    widths = sorted({row.fields["target_tokens"].shape[1:] for row in every})
    known: dict[int, np.ndarray] = {}
    for width in widths:  # not every server takes different numbers of targets in one request
        rows = [row for row in every if row.fields["target_tokens"].shape[1:] == width]
        known |= {id(row): lp for row, lp in zip(rows, bench.start_logprobs(rows))}
    sent = (as_requests(v, rows, [known[id(row)] for row in rows]) for v, rows in zip(vectors, bare))
    return [each for each in sent if each is not None]


def sendable(vector: Vector) -> bool:
    """Return whether a vector has one right gradient, which is neither zero nor huge, and no empty datum."""
    if vector.kind not in ("valid", "edge") or vector.grad is None or not all(row["logprobs"] for row in vector.data):
        return False
    return 0 < largest_gradient(vector) < 1e6


def largest_gradient(vector: Vector) -> float:
    return max((abs(float(g)) for row in vector.grad or [] for g in np.ravel(row)), default=0.0)


def as_requests(vector: Vector, bare: Sequence[Row], logprobs: Sequence[np.ndarray]) -> Sent | None:
    """Return a vector as requests of equal gradients, of at most 1; None for a setting that no built-in has."""
    try:
        folded = fold(subject_for(uncapped(vector)), datums(vector, bare, logprobs))
    except LossInputError:
        return None
    size = largest_gradient(vector)
    linear = "weights" if folded.loss_fn == "cross_entropy" else "advantages"  # the field that scales the gradient
    rows = []
    for row, datum in zip(bare, folded.data):
        sent = Row(row.tokens, {key: x.to_numpy() for key, x in datum.loss_fn_inputs.items()})
        rows.append(sent.having(**{linear: sent.fields[linear] / size}))
    golden = [
        row.having(weights=-np.reshape(np.asarray(g, float), row.fields["target_tokens"].shape) / size)
        for row, g in zip(bare, vector.grad or [])
    ]
    return Sent(vector, Gradient(rows, folded.loss_fn, folded.loss_fn_config), Gradient(golden))


def merged(gradients: Iterable[Gradient]) -> list[Gradient]:
    """Return the requests with those of one loss, one config and one number of targets joined."""
    joined: dict[str, Gradient] = {}
    for g in gradients:
        key = repr((g.loss, sorted((g.config or {}).items()), g.rows[0].fields["target_tokens"].shape[1:]))
        joined[key] = Gradient([*(joined[key].rows if key in joined else ()), *g.rows], g.loss, g.config)
    return list(joined.values())


def uncapped(vector: Vector) -> Vector:
    """Return the vector without its cap of log-ratios, which no built-in has, if the cap binds nowhere."""
    cap = vector.config.get("log_ratio_cap")
    ratios = [np.subtract(d["logprobs"], d["old_logprobs"]) for d in vector.data if "old_logprobs" in d]
    binds = cap is not None and not all((np.abs(x) < cap).all() for x in ratios)
    return vector if binds else replace(vector, config={**vector.config, "log_ratio_cap": None})


def bare_row(i: int, data: Any, k: int) -> Row:
    """Return a row as long as a vector's datum, with targets from the usual tokens."""
    n = len(data["logprobs"])
    ids = tokens(20 + i, n + 1)
    targets = np.asarray(ids[1:])
    if k:
        targets = np.stack([np.asarray(tokens(20 + i + 7 * j, n)) for j in range(k)], 1)
    return Row(tuple(ids[:-1]), {}).having(target_tokens=targets)


def datums(vector: Vector, bare: Sequence[Row], logprobs: Sequence[np.ndarray]) -> list[Datum]:
    """Return the vector's datums with the server's tokens, and with old logprobs at the vector's log-ratios."""
    made = []
    for data, row, lp in zip(vector.data, bare, logprobs):
        fields: dict[str, Any] = {"target_tokens": row.fields["target_tokens"]}
        for name, values in data.items():
            if name != "logprobs":
                fields[name] = np.reshape(np.asarray(values, np.float32), lp.shape)
        for name in ("old_logprobs", "sampler_logprobs"):
            if name in data:
                log_ratio = np.asarray(data["logprobs"], float) - np.asarray(data[name], float)
                fields[name] = (lp - np.nan_to_num(log_ratio)).astype(np.float32)
        tensors = {name: TensorData.from_numpy(x) for name, x in fields.items()}
        made.append(Datum(ModelInput.from_ints(list(row.tokens)), tensors))
    return made


def vectors(name: str, bench: Bench) -> Finding:
    """Compare the effects of vectors with those of their golden gradients: all at once, then one by one."""
    sent = on_wire(name, bench)
    if not sent:
        raise Inconclusive("no vector of this loss can be sent")
    found = bench.effect(*merged(s.request for s in sent), rate=RATE)
    expected = bench.effect(*merged(s.golden for s in sent), rate=RATE)
    finding = bench.same(found, expected, f"{len(sent)} vectors of {name}")
    if finding.holds:
        return finding
    for s in sent:
        if bench.connection.deadline - time.monotonic() < 5 * bench.facts.seconds:
            break
        one = bench.same(bench.effect(s.request), bench.effect(s.golden), f"{s.vector.id}, {s.vector.comment}")
        if not one.holds:
            return one
    return finding


CHECKS = tuple(
    Check(f"vectors-{name.replace('_', '-')}", f"The golden vectors of {name}, sent as "
        f"{SENT.get(name, name)}, have their golden gradients.", "another-loss", partial(vectors, name), "full",
        ("gradient-descent", f"offers-{SENT.get(name, name).replace('_', '-')}",
))
    for name in LOSSES
)  # fmt: skip
