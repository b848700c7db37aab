"""Policy losses with another kind of trust region than PPO's clip."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lossfns import terms as eq
from lossfns.loss import Loss, Statistics
from lossfns.losses.ratio import Clip, clip_statistics, clipped, ratio_loss
from lossfns.preset import preset
from lossfns.segments import token_level, tokens_after
from lossfns.statistics import OnDemand
from lossfns.tokens import Tokens
from lossfns.weigh import Weighing, sequence_mean, token_mean


def soft_gate(ratio: Tensor, advantages: Tensor, tau_pos: float, tau_neg: float) -> Tensor:
    """−(4/τ)·σ(τ·(r − 1))·A, with τ = τ_pos where A > 0, else τ_neg."""
    tau = eq.select(advantages > 0, tau_pos, tau_neg, like=advantages)
    return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages


@preset
def sapo(
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    weigh: Weighing = sequence_mean,
    log_ratio_cap: float | None = 20.0,
) -> Loss:
    """−(4/τ)·σ(τ·(r − 1))·A: a soft gate in place of the clip. Gao et al. 2025, arXiv:2511.20347.

    On-policy the slope in r is A, as in PPO. It falls smoothly on both sides of 1, and falls faster with a higher
    temperature τ.

    Args:
        tau_pos: τ where A > 0, a finite number above 0.
        tau_neg: τ where A <= 0, a finite number above 0.
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − old| before the exponential, above 0; ``None`` is the paper's uncapped form.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − old|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.

    >>> sapo().knobs["tau_neg"]
    1.05
    """

    def gated(t: Tokens, ratio: Tensor) -> Tensor:
        return soft_gate(ratio, t.advantages, tau_pos, tau_neg)

    return ratio_loss(token_level, gated, weigh, log_ratio_cap)


@preset
def ce_gppo(
    clip: Clip = (0.8, 1.2),
    beta_low: float = 0.75,
    beta_high: float = 1.0,
    weigh: Weighing = token_mean,
    log_ratio_cap: float | None = 20.0,
) -> Loss:
    """−β·b·A·r/sg(r) beyond a bound b (r < low and A < 0, or r > high and A > 0), else −r·A. Su et al. 2025.

    Gradient-preserving clipping, arXiv:2509.20712. A token that PPO would clip keeps the gradient of its logprob, times
    b and times β_low below or β_high above. With β = 1 on both sides it is the GPPO of arXiv:2508.07629.

    Args:
        clip: bounds (low, high) of the ratio itself, 0 <= low <= 1 <= high; an epsilon of 0.2 is (0.8, 1.2).
        beta_low: β_low, the paper's β₁, a finite number of at least 0.
        beta_high: β_high, the paper's β₂, a finite number of at least 0.
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − old| before the exponential, above 0; ``None`` is the paper's uncapped form.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − old|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        beyond_low: share of tokens with A < 0 and r < low, in [0, 1].
        beyond_high: share of tokens with A > 0 and r > high, in [0, 1].

    >>> ce_gppo(beta_low=0.5).knobs["beta_low"]
    0.5
    """
    low, high = clip

    def preserved(t: Tokens, ratio: Tensor) -> Tensor:
        a, r = t.advantages, ratio.detach()
        below, above = (r < low) & (a < 0), (r > high) & (a > 0)
        bound = eq.select(above, beta_high * high, beta_low * low, like=a)
        beyond = eq.straight_through(-bound * a, eq.policy_gradient(t.logprobs, bound * a))
        return torch.where(below | above, beyond, eq.surrogate(ratio, a))

    def statistics(t: Tokens, ratio: Tensor) -> Statistics:
        sides = clip_statistics(t, ratio, clip)
        return OnDemand(beyond_low=lambda: sides["clip_low"], beyond_high=lambda: sides["clip_high"])

    return ratio_loss(token_level, preserved, weigh, log_ratio_cap, statistics)


def discounted_future(t: Tokens, x: Tensor, half_life: float) -> Tensor:
    """Σ_{s >= t} 2^(−(s − t) / half_life)·x_s over the rest of each token's sequence: ``[N] -> [N]``.

    A step adds to each sum the sum that starts ``span`` tokens later, and so doubles the tokens that a sum spans. The
    steps end where the discount is below 2⁻⁶⁴, which is too small to change a sum in float64.
    """
    following = tokens_after(t)
    span = 1
    while span < min(64 * half_life, 2**31):
        in_sequence = (following - (span - 1)).clamp(0, 1).to(x.dtype)  # 1 or 0, which is faster than a bool
        x = x.addcmul(x.roll(-span), in_sequence, value=2 ** (-span / half_life))
        span *= 2
    return x


@preset
def fipo(
    clip: Clip = (0.8, 1.28),
    half_life: float = 32.0,
    weight_clip: Clip = (1.0, 1.2),
    safety_ratio: float | None = 4.0,
    weigh: Weighing = token_mean,
    log_ratio_cap: float | None = 20.0,
    dual_clip: float | None = 10.0,
) -> Loss:
    """−f·min(r·A, clip(r, low, high)·A), f = sg(clip(exp(Σ_{s >= t} γ^(s−t)·d_s), a, b)), γ = 2^(−1/half-life).

    Ma et al. 2026, arXiv:2603.19835 (FIPO). d = lp − old, and the sum runs over the rest of the sequence: a token
    counts more if the policy now makes its continuation more likely. Tokens with r above ``dual_clip`` are left out of
    the sum. Where A < 0 and r > ``safety_ratio``, f is limited to [0.8, 1]. The defaults are those of ms-swift and of
    the authors' run on 32B, whose upper bound is that of DAPO.

    Args:
        clip: bounds (low, high) of the ratio itself, 0 <= low <= 1 <= high; an epsilon of 0.2 is (0.8, 1.2).
        half_life: the distance in tokens at which d counts half, a finite number above 0.
        weight_clip: bounds (a, b) of f, 0 <= a <= 1 <= b.
        safety_ratio: the ratio above which f is limited where A < 0, a number above 0; ``None``: no such limit.
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − old| before the exponential, above 0; ``None`` is the paper's uncapped form.
        dual_clip: c of ``with_dual_clip``, above 1; ``None``: no dual clip, and no token is left out of the sum.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − old|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        clip_low: share of tokens with A < 0 and r < low, whose gradient is 0; in [0, 1].
        clip_high: share of tokens with A > 0 and r > high, whose gradient is 0; in [0, 1].
        clip_dual: share of tokens whose loss is reduced by the dual clip, in [0, 1]; only with ``dual_clip``.
        influence: mean f, at least 0.

    >>> fipo(half_life=64.0).knobs["half_life"]
    64.0
    """
    loss = clipped(token_level, clip, weigh, log_ratio_cap, dual_clip)

    def influence(t: Tokens) -> Tensor:
        d = t.logprobs.detach() - t.old_logprobs
        ratio = eq.importance_ratio(d, log_ratio_cap)
        if dual_clip is not None:
            d = d.masked_fill(ratio > dual_clip, 0)
        f = discounted_future(t, d, half_life).exp().clamp(*weight_clip)
        if safety_ratio is not None:
            f = torch.where((t.advantages < 0) & (ratio > safety_ratio), f.clamp(0.8, 1.0), f)
        return f

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        term, statistics = loss.terms(t)
        f = influence(t)
        return f * term, statistics | OnDemand(influence=lambda: f)

    return replace(loss, terms=terms)
