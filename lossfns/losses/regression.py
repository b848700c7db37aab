"""Policy losses that fit log-ratios to advantages: squared errors, or penalties on the log-ratio."""

from __future__ import annotations

from torch import Tensor

from lossfns import terms as eq
from lossfns.loss import Loss, Statistics
from lossfns.losses.ratio import Clip, ratio_loss
from lossfns.preset import make_loss, preset
from lossfns.regions import two_side
from lossfns.segments import sequence_value, token_level, weighted_sum
from lossfns.statistics import OnDemand
from lossfns.tokens import SEQUENCES, Tokens
from lossfns.weigh import Weighing, datum_mean, token_mean


@preset
def dro(beta: float = 0.05, weigh: Weighing = token_mean) -> Loss:
    """−(A·lp − ½β(lp − old)²): a policy gradient with a quadratic penalty towards the sampling policy.

    Richemond et al. 2024, arXiv:2405.19107. The penalty applies to the log-ratio of each token, as in the hosted
    services. The paper applies it to the log-ratio of the sequence. The statistics of the ratio use a cap of 20.

    ``with_tis`` weighs the penalty too. The paper's objective is the expectation, over the sampling policy, of a
    squared error that contains the penalty; an importance weight corrects this expectation as a whole.

    Args:
        beta: β, a finite number above 0.
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − old|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.

    >>> dro(beta=0.1)
    dro(beta=0.1, weigh=token_mean)
    """

    def penalised(t: Tokens, ratio: Tensor) -> Tensor:
        return eq.direct_reward(t.logprobs, t.old_logprobs, t.advantages, beta)

    return ratio_loss(token_level, penalised, weigh, eq.KL_LOG_RATIO_CAP)


@preset
def kimi15(tau: float = 0.1, weigh: Weighing = token_mean) -> Loss:
    """−A·lp + ½τ(lp − old)². Kimi k1.5, arXiv:2501.12599, equation 3.

    ``kimi15()`` is ``dro(beta=0.1)`` under the name of ROLL, whose form this is: the penalty applies to the log-ratio
    of each token. The paper applies it to the log-ratio of the sequence. The statistics of the ratio use a cap of 20.

    Args:
        tau: τ, a finite number above 0.
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.

    Reads ``advantages`` and ``old_logprobs``. Statistics, means over active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − old|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.

    >>> kimi15(tau=0.2)
    kimi15(tau=0.2, weigh=token_mean)
    """
    return dro(tau, weigh)


@preset
def sppo_token(clip: Clip = (1 / 1.3, 1.3), weigh: Weighing = token_mean, log_ratio_cap: float | None = 20.0) -> Loss:
    """−A·(lp − old) where low <= r <= high, else 0: the log-ratio in place of the ratio.

    Trinity's "sppo", after Vaswani et al. 2021, arXiv:2108.05828. Inside the bounds the gradient is −A. Tokens outside
    have no gradient, for either sign of A. An ε of Trinity is ``clip=(1 / (1 + ε), 1 + ε)``.

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
        masked: share of tokens with r outside the bounds, whose loss and gradient are 0; in [0, 1].

    >>> sppo_token(clip=(0.8, 1.25)).reads
    ('advantages', 'old_logprobs')
    """

    def linear(t: Tokens, ratio: Tensor) -> Tensor:
        keep = two_side(ratio.detach(), t.advantages, clip)
        return eq.policy_gradient(t.logprobs - t.old_logprobs, keep * t.advantages)

    def statistics(t: Tokens, ratio: Tensor) -> Statistics:
        return OnDemand(masked=lambda: ~two_side(ratio, t.advantages, clip))

    return ratio_loss(token_level, linear, weigh, log_ratio_cap, statistics)


@preset
def a2po(beta: float = 1e-3, weigh: Weighing = datum_mean) -> Loss:
    """(β₂·Σ w·(lp − ref) − (R − V*))² of each answer, with its reward R. Brantley et al. 2025, arXiv:2505.20686.

    A*-PO: the log-ratio to the reference is fitted to the optimal advantage. V* is the optimal value of the prompt,
    β₁·(logsumexp(R/β₁) − log N) over the rewards of N answers of the reference, with β₁ = 0.5 in TRL.

    Args:
        beta: β₂, a finite number above 0.
        weigh: how datums count: ``datum_mean`` or ``datum_sum``.

    Reads ``ref_logprobs``, ``rewards`` (R) and ``reference_point`` (V*), one number for each datum. Statistics, means
    over datums:

        log_ratio: Σ w·(lp − ref), in nats.
        advantage: R − V*.

    >>> a2po().reads
    ('ref_logprobs', 'rewards', 'reference_point')
    """

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        log_ratio = weighted_sum(t, t.logprobs - t.ref_logprobs)
        advantage = sequence_value(t, t.rewards) - sequence_value(t, t.reference_point)
        statistics = {"log_ratio": log_ratio.detach(), "advantage": advantage}
        return (beta * log_ratio - advantage).square(), statistics

    return make_loss(terms, ("ref_logprobs", "rewards", "reference_point"), weigh, rows=SEQUENCES)
