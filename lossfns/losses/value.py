"""The loss of a value head. It takes values, of any sign, in place of logprobs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lossfns.checks import check_number
from lossfns.errors import LossInputError, show
from lossfns.loss import Loss, Statistics
from lossfns.preset import make_loss, preset
from lossfns.statistics import OnDemand
from lossfns.tokens import Tokens
from lossfns.weigh import Weighing, token_mean


def clipped_square(values: Tensor, returns: Tensor, old_values: Tensor, value_clip: float) -> tuple[Tensor, Tensor]:
    """½·max((v − R)², (clip(v, v_old − c, v_old + c) − R)²), and where the clip takes effect.

    The clip takes effect where v is beyond its bounds and the clipped square is larger. There the term has no gradient.
    """
    moved = values.detach() - old_values
    error, bounded = values - returns, old_values + moved.clamp(-value_clip, value_clip) - returns
    clipped = (moved.abs() > value_clip) & (bounded.abs() > error.detach().abs())
    return torch.where(clipped, bounded, error).square() / 2, clipped


@preset
def value_loss(value_clip: float | None = 0.2, weigh: Weighing = token_mean) -> Loss:
    """½·max((v − R)², (clip(v, v_old − c, v_old + c) − R)²): squared error of values, clipped as PPO clips ratios.

    Where a value has moved from its old value towards its return by more than c, it has no gradient. The clip is that
    of OpenAI's ppo2 (baselines, 2017), and of TRL's PPO, verl, SkyRL, OpenRLHF and NeMo-RL. The PPO paper,
    arXiv:1707.06347, has the squared error alone: ``value_clip=None``. Advantages and returns come from ``gae``. The
    coefficient of the loss beside a policy loss is 0.1 in TRL: multiply the loss by it, or the learning rate.

    Args:
        value_clip: c, in units of the value, above 0: 0.2 in TRL and SkyRL, 0.5 in verl; ``None``: no clip.
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.

    Reads ``returns`` (R, by token) and, unless ``value_clip=None``, ``old_values`` (v_old, by token). It takes values v
    of any sign. Statistics, means over active tokens:

        value: mean v.
        value_error: mean R − v.
        value_error_squared: mean (R − v)², at least 0.
        returns: mean R.
        returns_squared: mean R², at least 0. ``explained_variance`` combines the last four.
        value_clipped: share of tokens whose gradient the clip makes 0, in [0, 1]; only with ``value_clip``.

    >>> import torch
    >>> columns = {"returns": torch.tensor([[2.0, 0.0]]), "old_values": torch.zeros(1, 2)}
    >>> loss, metrics = value_loss().padded(torch.tensor([[1.0, 0.5]]), torch.ones(1, 2), **columns)
    >>> round(float(loss), 4), metrics["value_clipped"]  # ½·(½·(0.2 − 2)² + ½·0.5²)
    (0.8725, 0.5)
    """

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        error = (t.returns - t.logprobs).detach()
        statistics = OnDemand(
            value=t.logprobs.detach,
            value_error=lambda: error,
            value_error_squared=error.square,
            returns=lambda: t.returns,
            returns_squared=t.returns.square,
        )
        if value_clip is None:
            return (t.logprobs - t.returns).square() / 2, statistics
        term, clipped = clipped_square(t.logprobs, t.returns, t.old_values, value_clip)
        return term, statistics | {"value_clipped": clipped}

    return make_loss(terms, ("returns",) if value_clip is None else ("returns", "old_values"), weigh, output="scores")


def explained_variance(metrics: Mapping[str, float]) -> float:
    """1 − Var(R − v) / Var(R), from the metrics of ``value_loss``, merged or not.

    It is 1 if the values equal the returns, 0 if they predict them as well as a constant does, negative if worse.

    >>> explained_variance({"value_error": 0.0, "value_error_squared": 1.0, "returns": 1.0, "returns_squared": 5.0})
    0.75

    Returns:
        At most 1; nan if all returns are equal.

    Raises:
        LossInputError: if a metric of ``value_loss`` is missing or not a finite number.
    """
    names = ("value_error", "value_error_squared", "returns", "returns_squared")
    if not isinstance(metrics, Mapping) or not all(name in metrics for name in names):
        raise LossInputError("metrics", f"{', '.join(names)}", show(metrics), "Pass the metrics of value_loss.")
    for name in names:
        check_number(f"metrics[{name!r}]", metrics[name], "a finite number", lambda x: True, "It is a mean.")
    error, error_squared, returns, returns_squared = (float(metrics[name]) for name in names)
    variance = returns_squared - returns**2
    return 1 - (error_squared - error**2) / variance if variance > 0 else math.nan
