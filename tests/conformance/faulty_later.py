"""Defects that were written after the checks had been mended: what the suite finds of these is no result of tuning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lossfns import terms
from lossfns.backend.client import sampling
from lossfns.backend.client.training import LocalTrainingClient
from lossfns.backend.engine import engine, state
from lossfns.errors import LossInputError
from lossfns.losses import sequence
from lossfns.segments import sequence_level
from lossfns.server import passes
from lossfns.server.wire import Pass
from tests.conformance.faulty_losses import datums, formula, values_of
from tests.conformance.faulty_service import sampling_setting
from tests.conformance.faulty_steps import around_step
from tests.conformance.planting import Datum, Defect, logprobs, weights, with_fields


def advantages_squashed(request: Pass, datum: Datum) -> Datum:
    if "advantages" not in datum.loss_fn_inputs:
        return datum
    return with_fields(datum, advantages=np.clip(values_of(datum, "advantages"), -1, 1))


def old_logprobs_late(request: Pass, datum: Datum) -> Datum:
    if "logprobs" not in datum.loss_fn_inputs:
        return datum
    return with_fields(datum, logprobs=np.roll(values_of(datum, "logprobs"), 1))


def maximum(right: Any, ratio: Any, advantages: Any, clip: Any) -> Any:
    return -torch.maximum(ratio * advantages, ratio.clamp(*clip) * advantages)


def product_of_ratios() -> None:
    sequence.geometric_level_by_token = lambda t, d: terms.straight_through(sequence_level(t, d), d)


def penalty_rewards(right: Any, lp: Any, old: Any, advantages: Any, beta: float) -> Any:
    return right(lp, old, advantages, -beta)


def negative_refused(w: np.ndarray) -> np.ndarray:
    if (w < 0).any():
        raise LossInputError("weights", "numbers of at least 0", "a negative one", "Clamp it.")
    return w


def decay_without_rate() -> None:
    take_step = engine.take_step

    def edited(optimizer: Any, parameters: Any, given: Any, factor: float) -> None:
        rate = given["lr"] or 1.0
        take_step(optimizer, parameters, given | {"weight_decay": given["weight_decay"] / rate}, factor)

    engine.take_step = edited


def saved_weights_are_old() -> None:
    """A saved state has the weights from before the last step."""

    def keep(self: Any, adam: Any) -> None:
        self.old = {name: x.clone() for name, x in state.weights(self.model).items()}

    around_step(keep)
    save = LocalTrainingClient._write

    def edited(self: Any, path: Any, tensors: Any, kind: str, *args: Any, **more: Any) -> Any:
        return save(self, path, {**tensors, **getattr(self._engine, "old", {})}, kind, *args, **more)

    LocalTrainingClient._write = edited


def uploaded_metrics_lost() -> None:
    run = passes.run_loss

    async def edited(*args: Any) -> Any:
        result = await run(*args)
        return replace(result, metrics={name: x for name, x in result.metrics.items() if "custom/" not in name})

    passes.run_loss = edited


def sampled_logprobs_zero() -> None:
    sample = sampling.generate
    sampling.generate = lambda *args, **options: [
        s._replace(logprobs=[0.0] * len(s.tokens)) for s in sample(*args, **options)
    ]


LATER: dict[str, Defect] = {
    "advantages-squashed": Defect("advantage-size-lost", datums(advantages_squashed)),
    "old-logprobs-late": Defect("frame-shift", datums(old_logprobs_late)),
    "ratio-squared": Defect("ratio-squared", formula("importance_ratio", lambda f, d, cap: f(2 * d, cap))),
    "max-for-min": Defect("clip-max-for-min", formula("clipped_surrogate", maximum)),
    "gspo-product": Defect("ratio-product", product_of_ratios),
    "dro-rewards": Defect("penalty-sign", formula("direct_reward", penalty_rewards)),
    "mask-is-one": Defect("mask-missing", weights(lambda w: np.where(w == 0, 1, w))),
    "negative-weights-refused": Defect("refused", weights(negative_refused)),
    "float16-logprobs": Defect("low-precision", logprobs(lambda r, i, x: x.astype(np.float16).astype(np.float32))),
    "decay-without-rate": Defect("decay-wrong", decay_without_rate),
    "saved-state-behind": Defect("state-lost", saved_weights_are_old),
    "uploaded-metrics-lost": Defect("custom-loss", uploaded_metrics_lost),
    "samples-without-logprobs": Defect("sampler-logprobs", sampled_logprobs_zero),
    "top-k-ignored": Defect("sampling-settings", sampling_setting(top_k=-1)),
}
"""Name → defect."""
