"""Combinators: functions that add one part to a loss over tokens.

Apply them in this order: ``with_kl(with_rollout_weight(with_tis(with_dual_clip(loss))), kl_beta=0.01)``. Any other
order is refused.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from lossfns import terms as eq
from lossfns.errors import LossInputError, warn
from lossfns.kl import KL
from lossfns.loss import BoundLoss, Loss, Statistics, name_or_repr
from lossfns.preset import preset
from lossfns.rollout import TokenWeight, check_token_weight, rejected_sequences
from lossfns.segments import Level, token_level
from lossfns.statistics import OnDemand
from lossfns.tokens import TOKENS, Tokens


def check_wrappable(loss: Loss, *columns: str, penalty: bool = False) -> None:
    """Refuse anything but a loss over tokens that reads none of the columns and, without ``penalty``, has no KL.

    A loss that reads one of them already has this combinator, or one that comes later.
    """
    if not isinstance(loss, Loss):
        fix = "Call the preset: ppo(), not ppo."
        if isinstance(loss, BoundLoss):
            fix = "Wrap the loss first, and call bind() or compiled() of the result."
        raise LossInputError("loss", "a Loss such as ppo()", name_or_repr(loss), fix)
    if loss.parts:
        fix = "Wrap a part: sum_losses(rl=with_kl(ppo()), ce=cross_entropy())."
        raise LossInputError("loss", "a loss of one denominator", repr(loss), fix)
    order = "Apply with_kl last, with_tis before it, with_dual_clip first: with_kl(with_tis(ppo()), kl_beta=0.01)."
    for name in columns:
        if name in loss.reads:
            raise LossInputError("loss", f"a loss that does not read {name}", repr(loss), order)
    if loss.knobs.get("kl_beta") and not penalty:
        raise LossInputError("loss", "a loss without a KL penalty", repr(loss), order)
    if loss.rows is not TOKENS:
        fix = "It works on a term of each token."
        raise LossInputError("loss", "a loss whose rows are tokens", f"{loss!r} over {loss.rows}", fix)


def check_no_bonus(loss: Loss) -> None:
    """Refuse a loss with an entropy bonus, which a weight or a clip of the whole term would change."""
    inner: Any = loss
    while isinstance(inner, Loss):
        if inner.knobs.get("entropy_coef"):
            fix = f"Apply {inner.name} after: with_entropy(with_tis(ppo()))."
            raise LossInputError("loss", "a loss without an entropy bonus", repr(loss), fix)
        inner = inner.knobs.get("loss")


@preset
def with_kl(
    loss: Loss,
    kl_beta: float = 1e-3,
    kl: KL = eq.k3,
    kl_weight: TokenWeight | None = None,
    kl_cap: float | None = None,
    kl_to: str = "ref_logprobs",
) -> Loss:
    """l + β·clamp(weight·KL(lp, ref), ±cap), under the share and the denominator of the loss.

    No factor of ``with_tis`` or ``with_rollout_weight`` multiplies the penalty, and no mask rejects it, as in TRL,
    NeMo-RL and verl's loss. docs/kl.md says which divergence the value and the gradient of each estimator belong to.

    ========================================== =======================================================================
    verl, SkyRL, NeMo-RL's caps                ``kl=k3, kl_cap=10.0``; verl's "k1+", "k3+": ``k1_plus``, ``k3_plus``
    TRL, ``use_bias_correction_kl`` (default)  ``kl=k3_uncapped, kl_weight=ratio_to("old_logprobs", None)``
    slime, ``--use-unbiased-kl``, low_var_kl   the same with ``kl_cap=10.0``
    NeMo-RL                                    ``kl=k3, kl_weight=score_function, kl_cap=10.0``
    open-instruct 2 (default); 3               ``kl=log_ratio_capped(k3_uncapped, 40.0)``; k1 with ``ratio_to(...)``
    prime-rl                                   ``kl=k_squared, kl_to="sampler_logprobs"``
    ========================================== =======================================================================

    Args:
        loss: a loss over tokens. Apply ``with_dual_clip``, ``with_tis`` and ``with_rollout_weight`` before.
        kl_beta: β, a finite number of at least 0. With 0 the result is the loss itself.
        kl: the estimator: ``k1``, ``k2``, ``k3`` or another one of ``lossfns.kl``. ``k1`` without a weight warns: its
            expected gradient is 0.
        kl_weight: a factor of the estimator, with its gradient: ``ratio_to("old_logprobs")``,
            ``detached(ratio_to("old_logprobs"))`` or ``score_function`` of ``lossfns.rollout``. ``None``: 1.
        kl_cap: bound of the weighted estimator of a token, in nats, above 0, with gradient 0 beyond. ``None``:
            no bound.
        kl_to: the column of the policy to stay near: ``"ref_logprobs"``, ``"old_logprobs"`` or ``"sampler_logprobs"``.

    Reads the column ``kl_to``, and those of the weight, besides the columns of the loss. Its statistics are those of
    the loss, and

        kl_ref: mean of the weighted estimator over active tokens, in nats; for ``k2`` and ``k3`` at least 0. With
            another ``kl_to`` its name is ``kl_penalty``.

    >>> from lossfns import ppo
    >>> with_kl(ppo(), kl_beta=0.01).reads
    ('advantages', 'old_logprobs', 'ref_logprobs')
    """
    check_wrappable(loss, "ref_logprobs", penalty=True)
    if kl_weight is not None:
        check_token_weight("kl_weight", kl_weight)
    if kl_beta == 0:
        return loss
    if kl is eq.k1 and kl_weight is None:
        warn("k1 in a loss has an expected gradient of 0: use k2 or k3")
    name = "kl_ref" if kl_to == "ref_logprobs" else "kl_penalty"

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        term, statistics = loss.terms(t)
        divergence = penalty(t, kl, kl_weight, kl_cap, kl_to)
        penalised = term.add(divergence, alpha=kl_beta)
        return penalised, statistics | OnDemand(**{name: divergence.detach})

    weight_reads = () if kl_weight is None else kl_weight.reads
    return replace(loss, reads=tuple(dict.fromkeys((*loss.reads, kl_to, *weight_reads))), terms=terms)


def penalty(t: Tokens, kl: KL, kl_weight: TokenWeight | None, kl_cap: float | None, kl_to: str) -> Tensor:
    """clamp(weight·KL(lp, ref), ±cap) of each token: ``[N]``."""
    divergence = kl(t.logprobs, getattr(t, kl_to))
    return eq.cap(divergence if kl_weight is None else kl_weight(t) * divergence, kl_cap)


def tis_log_weight(t: Tokens, level: Level) -> Tensor:
    """log(old / sampler) of each token or of its sequence, as the level says: ``[N]``. It has no cap."""
    return level(t, t.old_logprobs - t.sampler_logprobs)


@preset
def with_tis(loss: Loss, cap: float = 2.0, level: Level = token_level) -> Loss:
    """min(exp(old − sampler), cap)·l: truncated importance sampling.

    It corrects for a sampler whose logprobs differ from the trainer's (Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training"). The weight is a constant: no gradient passes through it.

    Args:
        loss: a loss over tokens. Apply ``with_dual_clip`` before and ``with_kl`` after.
        cap: the largest weight, a finite number above 0.
        level: what the log-weight is taken over: ``token_level`` (each token), ``sequence_level`` (Σ w·d over the
            sequence) or ``geometric_level`` (Σ w·d / Σ w over the sequence).

    The weight multiplies the whole term, so it also weighs the penalty of ``dro``.

    Reads ``sampler_logprobs`` and ``old_logprobs`` besides the columns of the loss. Its statistics are those of the
    loss, and

        tis_weight: mean weight over active tokens, in (0, cap].
        tis_capped: share of active tokens whose weight is reduced to the cap, in [0, 1].

    >>> from lossfns import ppo
    >>> with_tis(ppo(), cap=2.0).reads
    ('advantages', 'old_logprobs', 'sampler_logprobs')
    """
    check_wrappable(loss, "ref_logprobs", "sampler_logprobs")
    check_no_bonus(loss)

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        term, statistics = loss.terms(t)
        log_weight = tis_log_weight(t, level)
        weight = eq.importance_weight(log_weight, cap)
        more = OnDemand(tis_weight=lambda: weight, tis_capped=lambda: log_weight > math.log(cap))
        return weight * term, statistics | more

    return replace(loss, reads=tuple(dict.fromkeys((*loss.reads, "old_logprobs", "sampler_logprobs"))), terms=terms)


@preset
def with_rollout_weight(loss: Loss, weight: TokenWeight) -> Loss:
    """ρ·l: the loss with a factor for each token that another policy than the old one sampled.

    The factor is a constant: no gradient passes through it. The factor 0 rejects a token: its term is 0, and it stays
    in the denominator, as in SkyRL. For verl's denominator, bind ``weights=accepted_weights(weight, ...)``.

    ======================================= ==========================================================================
    TIS (verl, SkyRL, slime, OpenRLHF)      ``truncated((0.0, 2.0))``
    IcePop                                  ``masked((0.5, 2.0))``
    TRL, ``sequence_mask`` (default)        ``masked((0.0, 3.0), sequence_level)``
    ``seq-mask-tis`` (NeMo-RL, OpenRLHF)    ``ratio() * inside((0.999, 1.002), geometric_level)``
    verl, ``decoupled_geo_rs``              ``inside((0.999, 1.001), geometric_level)``
    verl, ``seq_mean_k3``                   ``within(k3, 0.01, geometric_level)``
    SkyRL, outlier mask                     ``without_outliers((1e-4, 100.0))``
    AReaL, decoupled PPO                    ``ratio() * inside((0.0, 5.0))``; ``old_logprobs`` are the proximal policy's
    ======================================= ==========================================================================

    Args:
        loss: a loss over tokens. Apply ``with_dual_clip`` and ``with_tis`` before and ``with_kl`` after.
        weight: a token weight of ``lossfns.rollout``, or a product of several.

    Reads the columns of the weight besides those of the loss. Its statistics are those of the loss, and

        rollout_weight: mean weight over active tokens, at least 0.
        rollout_weight_square: mean squared weight over active tokens, at least 0.
        rollout_limited: share of active tokens whose weight is truncated at a bound, in [0, 1].
        rollout_rejected: share of active tokens whose weight is 0, in [0, 1].
        rollout_rejected_sequences: sequences whose weights are all 0, per active token. ``rollout_summary`` gives their
            share, and the effective sample size.

    >>> from lossfns import ppo, rollout
    >>> with_rollout_weight(ppo(), rollout.masked((0.5, 2.0))).reads
    ('advantages', 'old_logprobs', 'sampler_logprobs')
    """
    check_wrappable(loss, "ref_logprobs")
    check_no_bonus(loss)
    check_token_weight("weight", weight)
    if loss.name == "with_rollout_weight":
        raise LossInputError("loss", "a loss without a rollout weight", repr(loss), "Pass the product a * b once.")

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        term, statistics = loss.terms(t)
        factor = weight(t).detach()
        more = OnDemand(
            rollout_weight=lambda: factor,
            rollout_weight_square=lambda: factor.square(),
            rollout_limited=lambda: weight.limited(t),
            rollout_rejected=lambda: factor == 0,
            rollout_rejected_sequences=lambda: rejected_sequences(t, factor),
        )
        return factor * term, statistics | more

    return replace(loss, reads=tuple(dict.fromkeys((*loss.reads, *weight.reads))), terms=terms)


@preset
def with_dual_clip(loss: Loss, c: float | None = 3.0) -> Loss:
    """min(l, −c·A) where A < 0: bounds the loss of a token with a negative advantage and a large ratio.

    Ye et al. 2020, arXiv:1912.09729, equation 5.

    Args:
        loss: a loss over tokens that reads ``advantages``. Apply ``with_tis`` and ``with_kl`` after.
        c: the ratio above which a token with A < 0 is clipped, a number above 1. ``None`` returns the loss.

    Its statistics are those of the loss, and

        clip_dual: share of active tokens with A < 0 whose loss is above −c·A, in [0, 1].

    >>> from lossfns import importance_sampling
    >>> with_dual_clip(importance_sampling(), c=3.0)
    with_dual_clip(loss=importance_sampling(weigh=token_mean, log_ratio_cap=20.0), c=3.0)
    """
    check_wrappable(loss, "ref_logprobs", "sampler_logprobs")
    check_no_bonus(loss)
    if "advantages" not in loss.reads:
        raise LossInputError("loss", "a loss that reads advantages", repr(loss), "There is nothing to clip by.")
    if c is None:
        return loss

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        term, statistics = loss.terms(t)
        before = term.detach()
        more = OnDemand(clip_dual=lambda: (t.advantages < 0) & (before > -c * t.advantages))
        return eq.dual_clipped(term, t.advantages, c), statistics | more

    return replace(loss, terms=terms)
