"""The training loop, which is the same for every method, and its learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from random import Random
from typing import Any

from lossfns.backend.types import AdamParams
from lossfns.datum import Datum
from lossfns.errors import LossInputError, show
from lossfns.metrics import merge_metrics
from lossfns.train.columns import Batch, columns_of
from lossfns.train.losses import AnyLoss, naming_own
from lossfns.train.remote import Client
from lossfns.train.run import Run

# Learning rates


Schedule = Callable[[int], float]
"""The learning rate of a step, counted from 0."""


def constant(rate: float, warmup_steps: int = 20) -> Schedule:
    """Return a schedule that rises linearly over the first ``warmup_steps``, then stays at ``rate``."""
    return lambda step: rate * min(1, (step + 1) / warmup_steps)


def cosine(rate: float, steps: int, warmup_steps: int = 20) -> Schedule:
    """Return a schedule that rises linearly over ``warmup_steps``, then falls as a cosine to a tenth of ``rate``."""

    def at(step: int) -> float:
        done = max(0, step - warmup_steps) / max(1, steps - warmup_steps)
        return rate * min(1, (step + 1) / warmup_steps) * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    return at


def linear_decay(rate: float, steps: int, warmup_steps: int = 5) -> Schedule:
    """Return a schedule that falls linearly to a tenth of ``rate``, times a linear rise over ``warmup_steps``."""
    return lambda step: rate * min(1, (step + 1) / warmup_steps) * (1 - 0.9 * step / steps)


# The loop


MakeBatch = Callable[[Random], Batch]
"""Makes the batch of a step."""


def train(
    run: Run,
    client: Client,
    loss: AnyLoss,
    make_batch: MakeBatch,
    *,
    phase: str,
    steps: int,
    learning_rate: Schedule,
    seed: int,
    updates: int = 1,
    after: Callable[[int, Batch], None] = lambda step, batch: None,
) -> None:
    """Make a batch, take optimizer steps with the loss, and log, step by step.

    Args:
        run: counts and saves the steps.
        client: the client to train.
        loss: the loss. Its columns are made once for each batch, before the first update.
        make_batch: makes the batch of a step, with a random generator that a resumed run continues.
        phase: name of the phase.
        steps: steps of the phase.
        learning_rate: the schedule.
        seed: seed of the random generator.
        updates: optimizer steps for each batch, each with a different part of the groups.
        after: called with the number of steps that are done, and the last batch.
    """
    rng = Random(seed)
    for step in run.steps(phase, steps, rng):
        batch = make_batch(rng)
        columns = columns_of(loss, batch)
        metrics = []
        for members in parts_of(batch, updates):
            bound = loss.bind(**{name: [column[i] for i in members] for name, column in columns.items()})
            data = [batch.data[i] for i in members]
            with naming_own(loss):
                metrics.append(train_step(client, data, bound, learning_rate(step)))
        points = {name: columns[name][0] for name in columns if name == "reference_point"}  # one for the whole batch
        run.log(step, {**merged(metrics), **batch.metrics, **points}, data, bound)
        after(step + 1, batch)


def parts_of(batch: Batch, updates: int) -> list[Sequence[int]]:
    """Return the indices of the datums of each update. The updates get whole groups in turns."""
    if updates == 1:
        return [range(len(batch.data))]
    count = min(updates, len(set(batch.groups)))
    return [[i for i, label in enumerate(batch.groups) if label % updates == update] for update in range(count)]


def train_step(client: Client, data: list[Datum], loss: Any, learning_rate: float) -> dict[str, float]:
    """Take one optimizer step. Queue both requests before waiting for either."""
    adam = AdamParams(learning_rate=learning_rate, eps=1e-8, grad_clip_norm=1.0)
    pending, step = client.forward_backward_custom(data, loss), client.optim_step(adam)
    metrics = pending.result().metrics | step.result().metrics
    # Names with a colon are the service's: they repeat the loss, or have its surrogate.
    return {name: number(name, value) for name, value in metrics.items() if ":" not in name}


def number(name: str, value: Any) -> float:
    """Return a metric as a number. One of a loss of one's own may be a tensor.

    Raises:
        LossInputError: if it is no number.
    """
    with suppress(TypeError, ValueError, OverflowError, RuntimeError):
        if not isinstance(value, (str, bytes)):
            return float(value)
    raise LossInputError(f"metrics[{name!r}]", "a number", show(value), "Return a dict of floats.")


def merged(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Merge the metrics of the updates of a step. A loss of the user may lack the counts that weight a mean."""
    if len(metrics) == 1:
        return dict(metrics[0])
    values = {name: [m[name] for m in metrics if name in m] for name in {name: 0 for m in metrics for name in m}}
    mean = {name: sum(xs) / len(xs) for name, xs in values.items()}
    # A plain mean of the norms: merge_metrics would weight each by the number of tokens.
    return {**merge_metrics(metrics), "grad_norm": mean["grad_norm"]} if "tokens" in mean else mean
