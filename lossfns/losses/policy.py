"""Policy-gradient losses: one row for each token, importance ratio r = exp(lp − old), advantages A.

All read ``advantages`` and (but for ``reinforce``) ``old_logprobs``. Clip bounds are absolute ratios.
``log_ratio_cap`` bounds |lp − old| before the exponential (``None``: the paper's uncapped form). Statistics: ``ratio``,
``ratio_capped``, ``log_ratio_abs``, ``kl_old``, and where the loss clips ``clip_low`` and ``clip_high``, the shares of
tokens whose gradient a bound removes. Where a bound limits the weight and the gradient stays (``cispo``), those shares
are ``bound_low`` and ``bound_high``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor

from lossfns import terms as eq
from lossfns.loss import KL, Loss, Statistics, geometric_level, method, token_level, weighed, with_kl
from lossfns.loss import dual_clip as with_dual_clip
from lossfns.terms import k3
from lossfns.tokens import Tokens
from lossfns.weigh import Weighing, sequence_mean, token_mean

Clip = tuple[float, float]
Level = Callable[[Tokens, Tensor], Tensor]
Surrogate = Callable[[Tokens, Tensor], Tensor]
Shares = Callable[[Tokens, Tensor], Statistics]


def geometric_level_by_token(t: Tokens, log_ratio: Tensor) -> Tensor:
    """The sequence's mean in value, but each token's gradient goes to its own logprob alone."""
    return eq.straight_through(geometric_level(t, log_ratio), log_ratio)


def ratio_loss(
    level: Level,
    surrogate: Surrogate,
    weigh: Weighing,
    log_ratio_cap: float | None,
    shares: Shares = lambda t, ratio: {},
) -> Loss:
    """surrogate(t, r) of each token, r = exp(capped d), d = lp − old of the token or its sequence."""

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        log_ratio = t.logprobs - t.old_logprobs
        d = level(t, log_ratio)
        r = eq.cap(d, log_ratio_cap).exp()
        distance = d.detach().abs()
        statistics = {
            "ratio": r.detach(),
            "ratio_capped": distance > (math.inf if log_ratio_cap is None else log_ratio_cap),
            "log_ratio_abs": distance,
            "kl_old": eq.k3_of(log_ratio.detach()),
        }
        return surrogate(t, r), statistics | shares(t, r.detach())

    return weighed(terms, ("advantages", "old_logprobs"), weigh)


def clip_shares(t: Tokens, ratio: Tensor, clip: Clip) -> Statistics:
    """Where a bound removes the gradient: below low with A < 0, above high with A > 0."""
    low, high = clip
    return {"clip_low": (t.advantages < 0) & (ratio < low), "clip_high": (t.advantages > 0) & (ratio > high)}


def bound_shares(t: Tokens, ratio: Tensor, clip: Clip) -> Statistics:
    """Where a bound limits a weight, whatever the advantage."""
    low, high = clip
    return {"bound_low": ratio < low, "bound_high": ratio > high}


def clipped(level: Level, clip: Clip, weigh: Weighing, log_ratio_cap: float | None, dual_clip: float | None) -> Loss:
    """−min(r·A, clip(r)·A), dual-clipped if asked."""

    def surrogate(t: Tokens, ratio: Tensor) -> Tensor:
        return eq.clipped_surrogate(ratio, t.advantages, clip)

    shares = partial(clip_shares, clip=clip)
    return with_dual_clip(ratio_loss(level, surrogate, weigh, log_ratio_cap, shares), dual_clip)


@method
def reinforce(weigh: Weighing = token_mean) -> Loss:
    """−A·lp: the policy gradient on-policy; reads no ``old_logprobs``. Statistic: ``nll``.

    The hosted APIs' example GRPO is ``with_kl(reinforce(weigh=sequence_sum_mean), kl_beta=0.001, kl=k1)``.
    """

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        return eq.policy_gradient(t.logprobs, t.advantages), {"nll": -t.logprobs.detach()}

    return weighed(terms, ("advantages",), weigh)


@method
def importance_sampling(weigh: Weighing = token_mean, log_ratio_cap: float | None = 20.0) -> Loss:
    """−r·A: the policy gradient corrected for the policy that sampled."""
    return ratio_loss(token_level, lambda t, ratio: eq.surrogate(ratio, t.advantages), weigh, log_ratio_cap)


@method
def ppo(
    clip: Clip = (0.8, 1.2),
    weigh: Weighing = token_mean,
    log_ratio_cap: float | None = 20.0,
    dual_clip: float | None = None,
) -> Loss:
    """−min(r·A, clip(r)·A). Schulman et al. 2017, arXiv:1707.06347, equation 7."""
    return clipped(token_level, clip, weigh, log_ratio_cap, dual_clip)


@method
def grpo(
    clip: Clip = (0.8, 1.2),
    kl_beta: float = 1e-3,
    kl: KL = k3,
    weigh: Weighing = token_mean,
    log_ratio_cap: float | None = 20.0,
    dual_clip: float | None = None,
) -> Loss:
    """PPO's clip plus β·KL to a reference, advantages from groups. Shao et al. 2024, arXiv:2402.03300, eq. 3.

    Reads ``ref_logprobs`` too, unless ``kl_beta=0``. The paper's own average is ``weigh=sequence_mean``.

    >>> grpo(kl_beta=0.01)
    grpo(clip=(0.8, 1.2), kl_beta=0.01, kl=k3, weigh=token_mean, log_ratio_cap=20.0, dual_clip=None)
    """
    return with_kl(clipped(token_level, clip, weigh, log_ratio_cap, dual_clip), kl_beta, kl)


@method
def dapo(
    clip: Clip = (0.8, 1.28),
    weigh: Weighing = token_mean,
    log_ratio_cap: float | None = 20.0,
    dual_clip: float | None = None,
) -> Loss:
    """PPO with the upper bound raised, no KL, token mean. Yu et al. 2025, arXiv:2503.14476, equation 8."""
    return clipped(token_level, clip, weigh, log_ratio_cap, dual_clip)


@method
def gspo(
    clip: Clip = (1 - 3e-4, 1 + 4e-4),
    weigh: Weighing = sequence_mean,
    log_ratio_cap: float | None = 20.0,
    dual_clip: float | None = None,
) -> Loss:
    """One ratio for the sequence, (π/π_old)^(1/|y|), and its gradient. Zheng et al. 2025, arXiv:2507.18071, eq. 5."""
    return clipped(geometric_level, clip, weigh, log_ratio_cap, dual_clip)


@method
def gspo_token(
    clip: Clip = (1 - 3e-4, 1 + 4e-4),
    weigh: Weighing = sequence_mean,
    log_ratio_cap: float | None = 20.0,
    dual_clip: float | None = None,
) -> Loss:
    """GSPO's ratio in value, each token's own gradient: advantages may differ by token. arXiv:2507.18071, eq. 13."""
    return clipped(geometric_level_by_token, clip, weigh, log_ratio_cap, dual_clip)


@method
def cispo(clip: Clip = (0.0, 4.0), weigh: Weighing = token_mean, log_ratio_cap: float | None = 20.0) -> Loss:
    """−sg(clip(r))·A·lp: a bound limits a token's weight, not its gradient. MiniMax 2025, arXiv:2506.13585.

    The paper bounds from above alone, as here. Statistics: ``bound_low``, ``bound_high``; nothing is clipped away.
    """

    def weighted(t: Tokens, ratio: Tensor) -> Tensor:
        return eq.weighted_policy_gradient(t.logprobs, ratio, t.advantages, clip)

    return ratio_loss(token_level, weighted, weigh, log_ratio_cap, partial(bound_shares, clip=clip))


@method
def dro(beta: float = 0.05, weigh: Weighing = token_mean) -> Loss:
    """−(A·lp − ½β(lp − old)²): a pull back to the policy that sampled. Richemond et al. 2024, arXiv:2405.19107.

    By token, as the hosted services have it; the paper's log-ratio is that of the sequence. No ratio is in the loss:
    the statistics ``ratio`` and ``ratio_capped`` are those of a cap of 20.
    """

    def penalised(t: Tokens, ratio: Tensor) -> Tensor:
        return eq.direct_reward(t.logprobs, t.old_logprobs, t.advantages, beta)

    return ratio_loss(token_level, penalised, weigh, eq.KL_LOG_RATIO_CAP)
