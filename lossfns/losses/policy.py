"""Policy-gradient losses: one term for each token, advantages A, importance ratio r = exp(lp − old).

Advantages are one number for each datum or one for each token. Clip bounds are bounds of the ratio itself. IGPO is
``ppo`` with the advantage of each turn at the tokens of this turn.
"""

from __future__ import annotations

from torch import Tensor

from lossfns import terms as eq
from lossfns.combine import with_kl
from lossfns.kl import KL
from lossfns.loss import Loss, Statistics
from lossfns.losses.ratio import Clip, clipped, ratio_loss
from lossfns.preset import make_loss, preset
from lossfns.segments import token_level
from lossfns.statistics import OnDemand
from lossfns.terms import k3
from lossfns.tokens import Tokens
from lossfns.weigh import Weighing, fixed_length, token_mean


@preset
def reinforce(weigh: Weighing = token_mean) -> Loss:
    """−A·lp: the on-policy policy gradient. Williams 1992.

    The hosted APIs' example GRPO is ``with_kl(reinforce(weigh=sequence_sum_mean), kl_beta=0.001, kl=k1)``.

    Args:
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.

    Reads ``advantages``. Statistics, means over active tokens:

        nll: mean −lp, in nats, at least 0.

    >>> reinforce().reads
    ('advantages',)
    """

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        return eq.policy_gradient(t.logprobs, t.advantages), OnDemand(nll=lambda: -t.logprobs.detach())

    return make_loss(terms, ("advantages",), weigh)


@preset
def importance_sampling(weigh: Weighing = token_mean, log_ratio_cap: float | None = 20.0) -> Loss:
    """−r·A: the policy gradient, corrected for the difference from the sampling policy.

    Args:
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − old| before the exponential, above 0; ``None`` is the paper's uncapped form.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − old|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.

    >>> importance_sampling()
    importance_sampling(weigh=token_mean, log_ratio_cap=20.0)
    """
    return ratio_loss(token_level, lambda t, ratio: eq.surrogate(ratio, t.advantages), weigh, log_ratio_cap)


@preset
def ppo(
    clip: Clip = (0.8, 1.2),
    weigh: Weighing = token_mean,
    log_ratio_cap: float | None = 20.0,
    dual_clip: float | None = None,
) -> Loss:
    """−min(r·A, clip(r, low, high)·A). Schulman et al. 2017, arXiv:1707.06347, equation 7.

    Args:
        clip: bounds (low, high) of the ratio itself, 0 <= low <= 1 <= high; an epsilon of 0.2 is (0.8, 1.2).
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − old| before the exponential, above 0; ``None`` is the paper's uncapped form.
        dual_clip: c of ``with_dual_clip``, above 1; ``None``: no dual clip.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − old|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        clip_low: share of tokens with A < 0 and r < low, whose gradient is 0; in [0, 1].
        clip_high: share of tokens with A > 0 and r > high, whose gradient is 0; in [0, 1].
        clip_dual: share of tokens whose loss is reduced by the dual clip, in [0, 1]; only with ``dual_clip``.

    >>> import torch
    >>> from lossfns import datum_from_tokens
    >>> data = [datum_from_tokens([5, 6], prompt_length=1)]
    >>> loss, metrics = ppo().bind(advantages=[1.0], old_logprobs=[[-2.0]])(data, [torch.tensor([-1.0])])
    >>> round(float(loss), 3), round(metrics["ratio"], 3), metrics["clip_high"]
    (-1.2, 2.718, 1.0)
    """
    return clipped(token_level, clip, weigh, log_ratio_cap, dual_clip)


@preset
def grpo(
    clip: Clip = (0.8, 1.2),
    kl_beta: float = 1e-3,
    kl: KL = k3,
    weigh: Weighing = token_mean,
    log_ratio_cap: float | None = 20.0,
    dual_clip: float | None = None,
) -> Loss:
    """−min(r·A, clip(r, low, high)·A) + β·KL(lp, ref). Shao et al. 2024, arXiv:2402.03300, equation 3.

    PPO's clip with a penalty towards a reference model. Advantages come from ``group_advantages``. The paper's own
    average is ``weigh=sequence_mean``.

    Args:
        clip: bounds (low, high) of the ratio itself, 0 <= low <= 1 <= high; an epsilon of 0.2 is (0.8, 1.2).
        kl_beta: β, at least 0. At 0 there is no penalty, and ``ref_logprobs`` are not read.
        kl: the estimator of the penalty: ``k1``, ``k2`` or ``k3`` (see ``help(lossfns.k3)`` for its gradient).
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − old| before the exponential, above 0; ``None`` is the paper's uncapped form.
        dual_clip: c of ``with_dual_clip``, above 1; ``None``: no dual clip.

    Reads ``advantages``, ``old_logprobs`` and, unless ``kl_beta=0``, ``ref_logprobs``. Statistics, means over active
    tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − old|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        clip_low: share of tokens with A < 0 and r < low, whose gradient is 0; in [0, 1].
        clip_high: share of tokens with A > 0 and r > high, whose gradient is 0; in [0, 1].
        clip_dual: share of tokens whose loss is reduced by the dual clip, in [0, 1]; only with ``dual_clip``.
        kl_ref: mean of the estimator, in nats; only with ``kl_beta`` above 0.

    >>> grpo(kl_beta=0.01)
    grpo(clip=(0.8, 1.2), kl_beta=0.01, kl=k3, weigh=token_mean, log_ratio_cap=20.0, dual_clip=None)
    >>> import torch
    >>> from lossfns import datum_from_tokens
    >>> data = [datum_from_tokens([5, 6], prompt_length=1)]
    >>> loss_fn = grpo().bind(advantages=[1.0], old_logprobs=[[-1.0]], ref_logprobs=[[-1.0]])
    >>> loss, metrics = loss_fn(data, [torch.tensor([-1.0])])
    >>> float(loss), metrics["ratio"], metrics["kl_ref"]
    (-1.0, 1.0, 0.0)
    """
    return with_kl(clipped(token_level, clip, weigh, log_ratio_cap, dual_clip), kl_beta, kl)


@preset
def dapo(
    clip: Clip = (0.8, 1.28),
    weigh: Weighing = token_mean,
    log_ratio_cap: float | None = 20.0,
    dual_clip: float | None = None,
) -> Loss:
    """−min(r·A, clip(r, low, high)·A), with a higher upper bound. Yu et al. 2025, arXiv:2503.14476, equation 8.

    PPO's clip without a KL penalty, averaged over the tokens of the batch: ``dapo()`` is ``ppo(clip=(0.8, 1.28))``.

    Args:
        clip: bounds (low, high) of the ratio itself, 0 <= low <= 1 <= high; an epsilon of 0.2 is (0.8, 1.2).
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − old| before the exponential, above 0; ``None`` is the paper's uncapped form.
        dual_clip: c of ``with_dual_clip``, above 1; ``None``: no dual clip.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − old|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        clip_low: share of tokens with A < 0 and r < low, whose gradient is 0; in [0, 1].
        clip_high: share of tokens with A > 0 and r > high, whose gradient is 0; in [0, 1].
        clip_dual: share of tokens whose loss is reduced by the dual clip, in [0, 1]; only with ``dual_clip``.

    >>> dapo().reads
    ('advantages', 'old_logprobs')
    """
    return clipped(token_level, clip, weigh, log_ratio_cap, dual_clip)


@preset
def gpg(weigh: Weighing = token_mean) -> Loss:
    """−A·lp. Chu et al. 2025, arXiv:2504.02546: group policy gradient, without a ratio, a clip or a reference.

    ``gpg()`` is ``reinforce()`` under the name of the paper and of verl. The paper's factor α, which makes up for
    groups without a signal, belongs in the advantages.

    Args:
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.

    Reads ``advantages``. Statistics, means over active tokens:

        nll: mean −lp, in nats, at least 0.

    >>> gpg().reads
    ('advantages',)
    """
    return reinforce(weigh)


@preset
def bnpo(
    clip: Clip = (0.8, 1.2),
    weigh: Weighing = token_mean,
    log_ratio_cap: float | None = 20.0,
    dual_clip: float | None = None,
) -> Loss:
    """−min(r·A, clip(r, low, high)·A), averaged over tokens: TRL's ``loss_type="bnpo"``, with its β of 0.

    ``bnpo()`` is ``ppo()`` under TRL's name. In TRL the denominator is local: each micro-batch and each rank divides by
    its own tokens, so that the gradient depends on the split. To reproduce this, call the loss on each micro-batch
    without ``denominator=``, and average. Bound to the denominator of the whole batch, it is TRL's "dapo" with other
    bounds.

    Args:
        clip: bounds (low, high) of the ratio itself, 0 <= low <= 1 <= high; an epsilon of 0.2 is (0.8, 1.2).
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − old| before the exponential, above 0; ``None`` is the paper's uncapped form.
        dual_clip: c of ``with_dual_clip``, above 1; ``None``: no dual clip.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − old|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        clip_low: share of tokens with A < 0 and r < low, whose gradient is 0; in [0, 1].
        clip_high: share of tokens with A > 0 and r > high, whose gradient is 0; in [0, 1].
        clip_dual: share of tokens whose loss is reduced by the dual clip, in [0, 1]; only with ``dual_clip``.

    >>> bnpo().knobs["weigh"]
    token_mean
    """
    return clipped(token_level, clip, weigh, log_ratio_cap, dual_clip)


LENGTH_OF_DR_GRPO = fixed_length(3000)
"""The constant of the paper's code, its ``generate_max_length``."""


@preset
def dr_grpo(
    clip: Clip = (0.8, 1.2),
    weigh: Weighing = LENGTH_OF_DR_GRPO,
    log_ratio_cap: float | None = 20.0,
    dual_clip: float | None = None,
) -> Loss:
    """−min(r·A, clip(r, low, high)·A), divided by one constant length for each sequence. Liu et al. 2025.

    Dr. GRPO, arXiv:2503.20783: without the division by each sequence's own length, long answers keep their weight. The
    advantages come from ``group_advantages(..., scale="none")``. ``dr_grpo()`` is ``ppo(weigh=fixed_length(3000))``:
    the paper's code generates at most 3000 tokens. Pass your own limit, since the gradient is proportional to 1 /
    length.

    Args:
        clip: bounds (low, high) of the ratio itself, 0 <= low <= 1 <= high; an epsilon of 0.2 is (0.8, 1.2).
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − old| before the exponential, above 0; ``None`` is the paper's uncapped form.
        dual_clip: c of ``with_dual_clip``, above 1; ``None``: no dual clip.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − old|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        clip_low: share of tokens with A < 0 and r < low, whose gradient is 0; in [0, 1].
        clip_high: share of tokens with A > 0 and r > high, whose gradient is 0; in [0, 1].
        clip_dual: share of tokens whose loss is reduced by the dual clip, in [0, 1]; only with ``dual_clip``.

    >>> from lossfns import fixed_length
    >>> dr_grpo(weigh=fixed_length(4096)).knobs["weigh"]
    fixed_length(4096)
    """
    return clipped(token_level, clip, weigh, log_ratio_cap, dual_clip)
