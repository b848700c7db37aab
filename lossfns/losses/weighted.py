"""Policy-gradient losses −sg(c)·A·lp, whose coefficient c is a function of the importance ratio."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from lossfns import terms as eq
from lossfns.loss import Loss, preset
from lossfns.losses.ratio import Clip, bound_statistics, ratio_loss
from lossfns.segments import token_level
from lossfns.tokens import Tokens
from lossfns.weigh import Weighing, token_mean


@preset
def cispo(clip: Clip = (0.0, 4.0), weigh: Weighing = token_mean, log_ratio_cap: float | None = 20.0) -> Loss:
    """−sg(clip(r, low, high))·A·lp: the bounds limit the coefficient of lp, and no token loses its gradient.

    MiniMax 2025, arXiv:2506.13585. The paper has only an upper bound, and so has the default.

    Args:
        clip: bounds (low, high) of the ratio itself, 0 <= low <= 1 <= high; an epsilon of 0.2 is (0.8, 1.2).
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − old| before the exponential, above 0; ``None`` is the paper's uncapped form.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − old|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        bound_low: share of tokens with r < low, whose coefficient is set to ``low``; in [0, 1].
        bound_high: share of tokens with r > high, whose coefficient is set to ``high``; in [0, 1].

    >>> cispo(clip=(0.0, 5.0))
    cispo(clip=(0.0, 5.0), weigh=token_mean, log_ratio_cap=20.0)
    """

    def weighted(t: Tokens, ratio: Tensor) -> Tensor:
        return eq.weighted_policy_gradient(t.logprobs, ratio, t.advantages, clip)

    return ratio_loss(token_level, weighted, weigh, log_ratio_cap, partial(bound_statistics, clip=clip))
