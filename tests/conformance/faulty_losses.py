"""Defects of losses: their values, their gradients and the data that they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from lossfns import terms
from lossfns.backend.client.training import LocalTrainingClient
from lossfns.backend.engine import forward
from lossfns.backend.engine.batch import pack_inputs
from lossfns.backend.model.prefixes import unshared
from lossfns.backend.types import ForwardBackwardOutput
from lossfns.datum import Datum
from lossfns.errors import LossInputError
from lossfns.export.builtins import BUILTINS
from lossfns.losses import sequence
from lossfns.losses.policy import ppo
from lossfns.segments import sequence_sum, to_tokens
from lossfns.server.wire import Pass
from tests.conformance.planting import Defect, answers, logprobs, requests, weights, with_fields

# The data


def datums(edit: Callable[[Pass, Datum], Datum]) -> Callable[[], None]:
    """Return a defect that edits the datums of each pass."""
    return lambda: requests(lambda request: request._replace(data=[edit(request, d) for d in request.data]))


def values_of(datum: Datum, name: str) -> np.ndarray:
    """Return a field of a datum; ones where it has none."""
    if name in datum.loss_fn_inputs:
        return datum.loss_fn_inputs[name].to_numpy()
    return np.ones(datum.loss_fn_inputs["target_tokens"].to_numpy().shape, np.float32)


def scaled(loss: str, datum: Datum, factor: Any) -> Datum:
    """Return a datum with its loss times a factor."""
    name = "weights" if loss == "cross_entropy" else "advantages"
    return with_fields(datum, **{name: values_of(datum, name) * factor})


def active(datum: Datum) -> int:
    """Return the number of tokens of a datum that have a weight."""
    return max(1, np.count_nonzero(values_of(datum, "weights")))


def divided_by(count: Callable[[list[Datum]], float]) -> Callable[[], None]:
    """Return a defect that divides loss and gradient by a number that depends on the batch."""

    def edit(request: Pass) -> Pass:
        factor = 1 / count(request.data)
        return request._replace(data=[scaled(request.loss_fn, datum, factor) for datum in request.data])

    return lambda: requests(edit)


def sum_of_weights(data: list[Datum]) -> float:
    return max(1.0, sum(float(values_of(datum, "weights").sum()) for datum in data))


def last_datum_dropped() -> None:
    def edit(request: Pass) -> Pass:
        *kept, last = request.data
        return request._replace(data=[*kept, scaled(request.loss_fn, last, 0.0)]) if kept else request

    requests(edit)


def last_token_dropped(request: Pass, datum: Datum) -> Datum:
    n = len(datum.loss_fn_inputs["target_tokens"].to_numpy())
    keep = np.arange(n) < n - 1
    return scaled(request.loss_fn, datum, keep[:, None] if values_of(datum, "target_tokens").ndim == 2 else keep)


def columns(factor: Callable[[int], Any]) -> Callable[[], None]:
    """Return a defect that multiplies the weights of [N, K] targets by a factor for each column."""

    def edit(request: Pass, datum: Datum) -> Datum:
        shape = values_of(datum, "target_tokens").shape
        return datum if len(shape) == 1 else scaled(request.loss_fn, datum, factor(shape[1]))

    return datums(edit)


def next_tokens(request: Pass, datum: Datum) -> Datum:
    targets = values_of(datum, "target_tokens").copy()
    targets[:-1] = np.asarray(datum.model_input.to_ints())[1:].reshape(-1, *[1] * (targets.ndim - 1))
    return with_fields(datum, target_tokens=targets)


def pooled_advantages(request: Pass, datum: Datum) -> Datum:
    if "advantages" not in datum.loss_fn_inputs:
        return datum
    mask = values_of(datum, "sequence_ratio_mask")
    return with_fields(datum, advantages=mask * (values_of(datum, "advantages") * mask).sum() / max(1, mask.sum()))


def shifted(request: Pass, datum: Datum) -> Datum:
    return with_fields(datum, target_tokens=np.roll(values_of(datum, "target_tokens"), 1, axis=0))


def flipped(request: Pass, datum: Datum) -> Datum:
    return scaled(request.loss_fn, datum, 1.0 if request.loss_fn == "cross_entropy" else -1.0)


def bounds_from_epsilons(request: Pass) -> Pass:
    signs = {"clip_low_threshold": -1, "clip_high_threshold": 1}
    config = {name: 1 + signs[name] * x if name in signs else x for name, x in request.config.items()}
    return request._replace(config=config)


# The formulas


def built_in(name: str, preset: Callable[..., Any]) -> Callable[[], None]:
    """Return a defect that computes another loss under the name of a built-in one."""

    def plant() -> None:
        BUILTINS[name] = BUILTINS[name]._replace(preset=preset)

    return plant


def formula(name: str, other: Callable[..., Any]) -> Callable[[], None]:
    """Return a defect that replaces an equation; ``other`` gets the right one first."""
    return lambda: setattr(terms, name, partial(other, getattr(terms, name)))


def mean_over_all_positions() -> None:
    def level(t: Any, log_ratio: Any) -> Any:
        mean = sequence_sum(t, log_ratio * t.active) / t.lengths
        return terms.straight_through(to_tokens(t, mean), log_ratio)

    sequence.geometric_level_by_token = level


def penalty_where_advantage(right: Any, lp: Any, old: Any, advantages: Any, beta: float) -> Any:
    return terms.policy_gradient(lp, advantages) + beta * (advantages != 0) * terms.k2(lp, old)


def weight_within_bounds(right: Any, lp: Any, ratio: Any, advantages: Any, clip: Any) -> Any:
    r = ratio.detach()
    return terms.policy_gradient(lp, (r >= clip[0]) * (r <= clip[1]) * r * advantages)


# The gradient alone


def gradient_of(edit: Callable[[str, list[Datum]], list[Datum]]) -> Callable[[], None]:
    """Return a defect that reports the right loss and takes the gradient of edited datums."""

    def plant() -> None:
        backward = LocalTrainingClient._forward_backward

        def edited(self: Any, data: Any, loss_fn: Any, config: Any) -> Any:
            result = self._forward(data, loss_fn, config)
            backward(self, edit(loss_fn, data), loss_fn, config)
            return result

        LocalTrainingClient._forward_backward = edited

    return plant


def averaged_micro_batches(loss: str, data: list[Datum]) -> list[Datum]:
    return [scaled(loss, datum, 1 / -(-len(data) // 4)) for datum in data]


def averaged_tokens(loss: str, data: list[Datum]) -> list[Datum]:
    return [scaled(loss, datum, 1 / active(datum)) for datum in data]


# The outputs


def tempered(when: Callable[[], bool]) -> Callable[[], None]:
    """Return a defect that computes logprobs at the temperature 0.8."""

    def plant() -> None:
        states = forward.hidden_states

        def edited(*args: Any) -> Any:
            packed, hidden = states(*args)
            return packed, hidden / 0.8 if when() else hidden

        forward.hidden_states = edited

    return plant


def padding_is_read() -> None:
    """Datums are padded on the left to the longest one, and the padding is not masked."""

    def states(model: Any, inputs: Any, result_device: Any = None) -> Any:
        packed = pack_inputs(inputs, unshared(inputs.tokens), next(model.parameters()).device, result_device)
        longest = max(inputs.lengths)
        rows = [torch.from_numpy(np.pad(np.asarray(ids), (longest - len(ids), 0))) for ids in inputs.tokens]
        keep = torch.cat([torch.arange(longest) >= longest - n for n in inputs.lengths])
        return packed, model(torch.cat(rows), [longest] * len(rows))[keep]

    forward.hidden_states = states


def bfloat16(request: Pass, i: int, x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x.copy()).bfloat16().float().numpy()


def masked_datum_is_nan() -> None:
    def edit(request: Pass, result: ForwardBackwardOutput) -> ForwardBackwardOutput:
        empty = any(not values_of(datum, "weights").any() for datum in request.data)
        return replace(result, metrics={**result.metrics, "loss:sum": float("nan")}) if empty else result

    answers(edit)


def one_record() -> None:
    def edit(request: Pass, result: ForwardBackwardOutput) -> ForwardBackwardOutput:
        arrays = [record["logprobs"].to_numpy() for record in result.loss_fn_outputs]
        if len({x.shape[1:] for x in arrays}) > 1:
            raise LossInputError("data", "one number of targets", "several", "Split the batch.")
        joined = type(result.loss_fn_outputs[0]["logprobs"]).from_numpy(np.concatenate(arrays))
        return replace(result, loss_fn_outputs=[{"logprobs": joined}])

    answers(edit)


LOSSES: dict[str, Defect] = {
    "mean-of-tokens": Defect("loss-not-summed", divided_by(lambda data: sum(map(active, data)))),
    "mean-of-weights": Defect("loss-not-summed", divided_by(sum_of_weights)),
    "mean-of-each-datum": Defect("loss-not-summed", datums(lambda r, d: scaled(r.loss_fn, d, 1 / active(d)))),
    "weights-made-positive": Defect("negative-weights-lost", weights(np.abs)),
    "weights-squared": Defect("weights-squared", weights(lambda w: w * np.abs(w))),
    "last-datum-dropped": Defect("datum-ignored", last_datum_dropped),
    "last-token-dropped": Defect("target-dropped", datums(last_token_dropped)),
    "columns-averaged": Defect("targets-flattened", columns(lambda k: 1 / k)),
    "first-column-only": Defect("targets-flattened", columns(lambda k: np.arange(k) == 0)),
    "targets-shifted": Defect("targets-ignored", datums(shifted)),
    "targets-from-input": Defect("targets-ignored", datums(next_tokens)),
    "advantages-flipped": Defect("sign-flipped", datums(flipped)),
    "advantages-pooled": Defect("advantages-pooled", datums(pooled_advantages)),
    "bounds-from-epsilons": Defect("clip-as-epsilon", lambda: requests(bounds_from_epsilons)),
    "cispo-of-ppo": Defect("other-defaults", built_in("cispo", partial(BUILTINS["cispo"].preset, clip=(0.8, 1.2)))),
    "gspo-by-token": Defect("another-loss", built_in("gspo", partial(ppo, clip=(1 - 3e-4, 1 + 4e-4)))),
    "gspo-over-mask": Defect("padding-in-sequence-ratio", mean_over_all_positions),
    "dual-clip": Defect("other-defaults", built_in("ppo", partial(ppo, dual_clip=3.0))),
    "ratio-clamped": Defect("ratio-clamped", formula("importance_ratio", lambda f, d, cap: f(d, cap).clamp(0.01, 100))),
    "log-ratio-clamped": Defect("ratio-clamped", formula("importance_ratio", lambda f, d, cap: f(d, 20.0))),
    "ratio-is-one": Defect("old-logprobs-inert", formula("importance_ratio", lambda f, d, cap: f(d - d.detach(), cap))),
    "ratio-inverted": Defect("ratio-inverted", formula("importance_ratio", lambda f, d, cap: f(-d, cap))),
    "clip-without-min": Defect(
        "clip-without-min", formula("clipped_surrogate", lambda f, r, a, clip: -(a * r.clamp(*clip)))
    ),
    "cispo-drops-tokens": Defect("clip-drops-tokens", formula("weighted_policy_gradient", weight_within_bounds)),
    "dro-twice": Defect("half-missing", formula("direct_reward", lambda f, lp, old, a, beta: f(lp, old, a, 2 * beta))),
    "dro-gated": Defect("penalty-gated", formula("direct_reward", penalty_where_advantage)),
    "value-without-ratio": Defect(
        "value-not-gradient", formula("surrogate", lambda f, r, a: terms.straight_through(-a, f(r, a)))
    ),
    "micro-batches-averaged": Defect("gradient-averaged", gradient_of(averaged_micro_batches)),
    "gradient-mean-of-tokens": Defect("gradient-averaged", gradient_of(averaged_tokens)),
    "forward-tempered": Defect("two-numeric-paths", tempered(lambda: not torch.is_grad_enabled())),
    "training-tempered": Defect("sampler-logprobs", tempered(lambda: True)),
    "padding-read": Defect("batch-leak", padding_is_read),
    "bfloat16-logprobs": Defect("low-precision", logprobs(bfloat16)),
    "probabilities": Defect("output-values", logprobs(lambda request, i, x: np.exp(x))),
    "masked-datum-nan": Defect("empty-sequence-nan", masked_datum_is_nan),
    "one-record": Defect("datum-count", one_record),
}
"""Name → defect."""
