"""Policy losses that compare the tokens or the datums of a group, which the column ``groups`` labels.

All datums of one label must be in one call. A split of a batch that keeps groups whole is exact. Frameworks that couple
all tokens of a batch give all datums one label.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lossfns.loss import Loss, Statistics
from lossfns.losses.masks import with_mask
from lossfns.losses.policy import importance_sampling
from lossfns.losses.ratio import Clip, clip_statistics, clipped
from lossfns.losses.selection import largest_share, smallest_with_mean
from lossfns.preset import make_loss, preset
from lossfns.segments import (
    active_counts,
    group_index,
    group_labels,
    group_sum,
    nonempty,
    sequence_sum,
    sequence_value,
    to_tokens,
    token_level,
    weighted_mean,
)
from lossfns.statistics import OnDemand
from lossfns.tokens import SEQUENCES, Tokens, to_dtype
from lossfns.weigh import Weighing, datum_mean, token_mean


def covariance(t: Tokens) -> Tensor:
    """(A − mean A)·(lp − mean lp) with means over the active tokens of the group: ``[N]`` in float64, without gradient.

    The two tokens of a group of two have the same covariance. In float32, rounding would make them differ.
    """
    labels = group_labels(t)
    n = group_sum(labels, active_counts(t)).double().clamp(min=1)

    def centred(x: Tensor) -> Tensor:
        x = x.double()
        return x - to_tokens(t, group_sum(labels, sequence_sum(t, x)) / n)

    return centred(t.advantages) * centred(t.logprobs.detach())


@preset
def clip_cov(
    clip: Clip = (0.8, 1.2),
    fraction: float = 2e-4,
    cov_bounds: tuple[float, float] = (1.0, 5.0),
    weigh: Weighing = token_mean,
    log_ratio_cap: float | None = 20.0,
    dual_clip: float | None = None,
) -> Loss:
    """−min(r·A, clip(r, low, high)·A), or 0 at the tokens of largest covariance C = (A − mean A)·(lp − mean lp).

    Cui et al. 2025, arXiv:2505.22617 (Clip-Cov). Means are over the n active tokens of the group. The candidates are
    the tokens that are not clipped and whose C is between the bounds. Of these, max(1, ⌊fraction·n⌋) tokens get loss 0,
    or all if there are fewer. The paper and verl draw them at random. Here those of the largest C are selected, so that
    the loss is a function of its inputs. If the selection ends between tokens of equal C, none of these is selected.

    Args:
        clip: bounds (low, high) of the ratio itself, 0 <= low <= 1 <= high; an epsilon of 0.2 is (0.8, 1.2).
        fraction: the share of tokens that are selected, above 0 and at most 1.
        cov_bounds: bounds (low, high) of C, low < high; only tokens whose C lies between them are selected.
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − old| before the exponential, above 0; ``None`` is the paper's uncapped form.
        dual_clip: c of ``with_dual_clip``, above 1; ``None``: no dual clip.

    Reads ``advantages``, ``old_logprobs`` and ``groups`` (an integer label for each datum; all datums of one label must
    be in one call). Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − old|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        clip_low: share of tokens with A < 0 and r < low, whose gradient is 0; in [0, 1].
        clip_high: share of tokens with A > 0 and r > high, whose gradient is 0; in [0, 1].
        clip_dual: share of tokens whose loss is reduced by the dual clip, in [0, 1]; only with ``dual_clip``.
        cov_masked: share of tokens that are selected and get loss 0, in [0, 1].

    >>> clip_cov().reads
    ('advantages', 'old_logprobs', 'groups')
    """
    low, high = cov_bounds

    def kept(t: Tokens) -> Tensor:
        c = covariance(t)
        sides = clip_statistics(t, (t.logprobs.detach() - t.old_logprobs).exp(), clip)
        among = t.active & (low < c) & (c < high) & ~sides["clip_low"] & ~sides["clip_high"]
        return ~largest_share(t, c, among, fraction)

    loss = clipped(token_level, clip, weigh, log_ratio_cap, dual_clip)
    return with_mask(loss, kept, "cov_masked", "groups")


@preset
def kl_cov(
    fraction: float = 2e-4,
    kl_coef: float = 1.0,
    weigh: Weighing = token_mean,
    log_ratio_cap: float | None = 20.0,
) -> Loss:
    """−r·A, plus k·|lp − old| at the tokens of largest covariance C = (A − mean A)·(lp − mean lp). Cui et al. 2025.

    arXiv:2505.22617 (KL-Cov). Means are over the n active tokens of the group. The max(1, ⌊fraction·n⌋) tokens of the
    largest C get the penalty. If the selection ends between tokens of equal C, none of these is selected.

    Args:
        fraction: the share of tokens that are selected, above 0 and at most 1. It is 2e-4 in verl and 0.2 in SkyRL.
        kl_coef: k, a finite number of at least 0. It is 1 in the paper's scripts and in SkyRL, 0.1 in verl's settings.
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − old| before the exponential, above 0; ``None`` is the paper's uncapped form.

    Reads ``advantages``, ``old_logprobs`` and ``groups`` (an integer label for each datum; all datums of one label must
    be in one call). Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − old|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        cov_penalised: share of tokens with the penalty, in [0, 1].

    >>> kl_cov(fraction=0.2).knobs["fraction"]
    0.2
    """
    loss = importance_sampling(weigh, log_ratio_cap)

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        term, statistics = loss.terms(t)
        selected = largest_share(t, covariance(t), t.active, fraction)
        distance = (t.logprobs - t.old_logprobs).abs().masked_fill(~selected, 0)
        return term.add(distance, alpha=kl_coef), statistics | OnDemand(cov_penalised=lambda: selected)

    return replace(loss, reads=(*loss.reads, "groups"), terms=terms)


@preset
def m2po(
    threshold: float = 0.04,
    clip: Clip = (0.8, 1.2),
    weigh: Weighing = token_mean,
    log_ratio_cap: float | None = 20.0,
    dual_clip: float | None = None,
) -> Loss:
    """−min(r·A, clip(r, low, high)·A), or 0 at the tokens of largest m = (old − sampler)², until mean m <= threshold.

    Zheng et al. 2025, arXiv:2510.01161 (M2PO), in the form of AReaL: from each group, the tokens of the largest m are
    dropped until the mean m of the rest is at most the threshold. Tokens of equal m are dropped together, and all may
    be dropped. The sampler is the policy that sampled, and the old policy is the one at the start of the step. In the
    paper, m compares the current policy with the sampler.

    Args:
        threshold: the bound of the mean m, a finite number above 0, in nats squared.
        clip: bounds (low, high) of the ratio itself, 0 <= low <= 1 <= high; an epsilon of 0.2 is (0.8, 1.2).
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − old| before the exponential, above 0; ``None`` is the paper's uncapped form.
        dual_clip: c of ``with_dual_clip``, above 1; ``None``: no dual clip.

    Reads ``advantages``, ``old_logprobs``, ``sampler_logprobs`` and ``groups`` (an integer label for each datum; all
    datums of one label must be in one call). Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − old|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        clip_low: share of tokens with A < 0 and r < low, whose gradient is 0; in [0, 1].
        clip_high: share of tokens with A > 0 and r > high, whose gradient is 0; in [0, 1].
        clip_dual: share of tokens whose loss is reduced by the dual clip, in [0, 1]; only with ``dual_clip``.
        m2_masked: share of tokens that are dropped, in [0, 1].

    >>> m2po(threshold=0.1).reads
    ('advantages', 'old_logprobs', 'sampler_logprobs', 'groups')
    """

    def kept(t: Tokens) -> Tensor:
        m = t.old_logprobs.double().sub(t.sampler_logprobs).square()
        return smallest_with_mean(t, m, threshold)

    loss = clipped(token_level, clip, weigh, log_ratio_cap, dual_clip)
    return with_mask(loss, kept, "m2_masked", "sampler_logprobs", "groups")


def log_one_plus_group_sum(labels: Tensor, x: Tensor, among: Tensor) -> Tensor:
    """log(1 + Σ eˣ) for each sequence, over the sequences of its group that are in ``among``: ``[B] -> [B]``."""
    slot = group_index(labels)
    largest = torch.zeros_like(x).scatter_reduce(0, slot, x.detach().masked_fill(~among, 0), "amax")[slot]
    inside = (x - largest).masked_fill(~among, -torch.inf).exp()
    return largest + (group_sum(labels, inside) + (-largest).exp()).log()


@preset
def real(tau: float = 0.5, weigh: Weighing = datum_mean) -> Loss:
    """log(1 + Σ₊ e^(−s/τ)) + log(1 + Σ₋ e^(s/τ)), s = Σ w·(lp − old) / Σ w of each answer. Zhai et al. 2026.

    Rewards as labels (REAL), arXiv:2602.05630: Σ₊ is over the right answers of a group, Σ₋ over its wrong ones. A group
    whose answers are all right or all wrong has loss 0, as in ms-swift. Each datum has the loss of its group, so the
    mean over datums is the mean over groups if all groups have the same size.

    Args:
        tau: τ, a finite number above 0.
        weigh: how datums count: ``datum_mean`` or ``datum_sum``.

    Reads ``old_logprobs``, ``labels`` (1 if right, 0 if wrong, for each datum) and ``groups`` (an integer label for
    each datum; all datums of one label must be in one call). Statistics, means over datums:

        log_ratio: s, in nats.
        accuracy: share of datums with s > 0 if right, s < 0 if not, in [0, 1].
        mixed: share of datums in a group with right and wrong answers, in [0, 1].

    >>> real().reads
    ('old_logprobs', 'labels', 'groups')
    """

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        labels, answered = group_labels(t), nonempty(t)
        s = weighted_mean(t, t.logprobs - t.old_logprobs)
        right = answered & (sequence_value(t, t.labels) > 0.5)
        wrong = answered & ~right
        x = s / tau
        loss = log_one_plus_group_sum(labels, -x, right) + log_one_plus_group_sum(labels, x, wrong)
        has_right, has_wrong = (group_sum(labels, to_dtype(side, s.dtype)) > 0 for side in (right, wrong))
        mixed = has_right & has_wrong
        d = s.detach()
        statistics = {"log_ratio": d, "accuracy": (right & (d > 0)) | (wrong & (d < 0)), "mixed": mixed}
        return loss.masked_fill(~mixed, 0), statistics

    return make_loss(terms, ("old_logprobs", "labels", "groups"), weigh, rows=SEQUENCES)
