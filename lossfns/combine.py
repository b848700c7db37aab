"""Combinators: functions that add one part to a loss over tokens.

Apply them in this order: ``with_kl(with_tis(with_dual_clip(loss)), kl_beta=0.01)``. Any other order is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from lossfns import terms as eq
from lossfns.errors import LossInputError, warn
from lossfns.loss import BoundLoss, Loss, Statistics, name_or_repr, preset
from lossfns.segments import Level, token_level
from lossfns.statistics import OnDemand
from lossfns.tokens import TOKENS, Tokens

KL = Callable[[Tensor, Tensor], Tensor]
"""A function ``(logprobs, ref_logprobs) -> divergence of each token``: ``k1``, ``k2`` or ``k3``."""


def check_wrappable(loss: Loss, *columns: str) -> None:
    """Refuse anything but a loss over tokens that reads none of the columns.

    A loss that reads one of them already has this combinator, or one that comes later.
    """
    if not isinstance(loss, Loss):
        fix = "Call the preset: ppo(), not ppo."
        if isinstance(loss, BoundLoss):
            fix = "Wrap the loss first, and call bind() or compiled() of the result."
        raise LossInputError("loss", "a Loss such as ppo()", name_or_repr(loss), fix)
    for name in columns:
        if name in loss.reads:
            fix = (
                "Apply with_kl last, with_tis before it, with_dual_clip first: with_kl(with_tis(ppo()), kl_beta=0.01)."
            )
            raise LossInputError("loss", f"a loss that does not read {name}", repr(loss), fix)
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
def with_kl(loss: Loss, kl_beta: float = 1e-3, kl: KL = eq.k3) -> Loss:
    """l + β·KL(lp, ref), under the share and the denominator of the loss. The penalty is not importance-weighted.

    Args:
        loss: a loss over tokens. Apply ``with_tis`` and ``with_dual_clip`` before.
        kl_beta: β, a finite number of at least 0. With 0 the result is the loss itself.
        kl: the estimator ``k1``, ``k2`` or ``k3``. ``k1`` warns: its expected gradient is 0.

    Reads ``ref_logprobs`` besides the columns of the loss. Its statistics are those of the loss, and

        kl_ref: mean of the estimator over active tokens, in nats; for ``k2`` and ``k3`` at least 0.

    >>> from lossfns import ppo
    >>> with_kl(ppo(), kl_beta=0.01).reads
    ('advantages', 'old_logprobs', 'ref_logprobs')
    """
    check_wrappable(loss, "ref_logprobs")
    if kl_beta == 0:
        return loss
    if kl is eq.k1:
        warn("k1 in a loss has an expected gradient of 0: use k2 or k3")

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        term, statistics = loss.terms(t)
        divergence = kl(t.logprobs, t.ref_logprobs)
        penalised = term.add(divergence, alpha=kl_beta)
        return penalised, statistics | OnDemand(kl_ref=divergence.detach)

    return replace(loss, reads=(*loss.reads, "ref_logprobs"), terms=terms)


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
