"""Policy losses that fit log-ratios to advantages: squared errors, or penalties on the log-ratio."""

from __future__ import annotations

from torch import Tensor

from lossfns import terms as eq
from lossfns.loss import Loss, preset
from lossfns.losses.ratio import ratio_loss
from lossfns.segments import token_level
from lossfns.tokens import Tokens
from lossfns.weigh import Weighing, token_mean


@preset
def dro(beta: float = 0.05, weigh: Weighing = token_mean) -> Loss:
    """−(A·lp − ½β(lp − old)²): a policy gradient with a quadratic penalty towards the sampling policy.

    Richemond et al. 2024, arXiv:2405.19107. The penalty applies to the log-ratio of each token, as in the
    hosted services. The paper applies it to the log-ratio of the sequence. The loss itself has no ratio; the statistics
    of the ratio use a cap of 20.

    ``with_tis`` weighs the penalty, too. The paper's objective is the expectation, over the sampling policy, of a
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
