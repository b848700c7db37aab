"""Preference losses on single datums: each has a label, 1 for a desirable answer and 0 for an undesirable one."""

from __future__ import annotations

import torch
from torch import Tensor

from lossfns import terms as eq
from lossfns.loss import Loss, Statistics, make_loss, preset
from lossfns.segments import sequence_value, weighted_sum
from lossfns.tokens import SEQUENCES, Tokens
from lossfns.weigh import Weighing, datum_mean


@preset
def kto(
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weigh: Weighing = datum_mean,
) -> Loss:
    """λ_D·(1 − σ(β·(m − z₀))) if desirable, λ_U·(1 − σ(β·(z₀ − m))) if not, with m = Σ w·(lp − ref).

    Ethayarajh et al. 2024, arXiv:2402.01306, equation 8. The reference point z₀ is an estimate of KL(π‖ref), at least
    0 and without gradient: max(0, mean m) over answers to other prompts.

    Args:
        beta: β, a finite number above 0.
        desirable_weight: λ_D, a finite number of at least 0.
        undesirable_weight: λ_U, a finite number of at least 0.
        weigh: ``datum_mean`` or ``datum_sum``.

    Reads ``ref_logprobs``, ``labels`` (1 or 0 for each datum) and ``reference_point`` (z₀, one number for each datum).
    Statistics, means over datums:

        log_ratio: m, in nats.
        reward: β·m.
        accuracy: share of datums with m > z₀ if desirable, m < z₀ if not, in [0, 1].

    >>> kto().reads
    ('ref_logprobs', 'labels', 'reference_point')
    """

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        m = weighted_sum(t, t.logprobs - t.ref_logprobs)
        desirable = sequence_value(t, t.labels) > 0.5
        sign = eq.select(desirable, 1.0, -1.0, like=m)
        distance = sign * (m - sequence_value(t, t.reference_point))
        weight = eq.select(desirable, desirable_weight, undesirable_weight, like=m)
        statistics = {"log_ratio": m.detach(), "reward": beta * m.detach(), "accuracy": distance.detach() > 0}
        return weight * torch.sigmoid(-beta * distance), statistics

    return make_loss(terms, ("ref_logprobs", "labels", "reference_point"), weigh, rows=SEQUENCES)
