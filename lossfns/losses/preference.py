"""Preference losses: one row for each pair, datums interleaved 2i chosen, 2i + 1 rejected.

Statistics: ``margin`` (dpo, in nats, not scaled by β) and ``reward_margin`` (β·margin), or
``log_odds_ratio`` and ``nll`` (orpo); ``accuracy``, the share of pairs ranked right, a tie counting half.
"""

from __future__ import annotations

from torch import Tensor

from lossfns import terms as eq
from lossfns.loss import Loss, Statistics, method, weighed
from lossfns.segments import chosen, rejected, weighted_mean, weighted_sum
from lossfns.tokens import PAIRS, Tokens
from lossfns.weigh import Weighing, pair_mean


def accuracy(difference: Tensor) -> Tensor:
    """1 where the chosen side leads, ½ at a tie, 0 where it trails."""
    return (difference.detach().sign() + 1) / 2


@method
def dpo(beta: float = 0.1, label_smoothing: float = 0.0, weigh: Weighing = pair_mean) -> Loss:
    """−log σ(β·m), m = Σ w·(lp − ref) of the chosen less that of the rejected. arXiv:2305.18290, equation 7.

    Reads ``ref_logprobs``. ``label_smoothing`` ε gives the conservative form (1−ε, ε).
    """

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        log_ratio = weighted_sum(t, t.logprobs - t.ref_logprobs)
        m = chosen(log_ratio) - rejected(log_ratio)
        statistics = {"margin": m.detach(), "reward_margin": beta * m.detach(), "accuracy": accuracy(m)}
        return eq.preference(m, beta, label_smoothing), statistics

    return weighed(terms, ("ref_logprobs",), weigh, rows=PAIRS)


@method
def orpo(lam: float = 0.1, weigh: Weighing = pair_mean) -> Loss:
    """−a_w + λ·(−log σ(log-odds(a_w) − log-odds(a_l))), a = Σ w·lp / Σ w. arXiv:2403.07691, equations 6 and 7.

    No reference model. Finite in value and gradient for every logprob down to and including 0.
    """

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        a = weighted_mean(t, t.logprobs)
        log_odds = eq.log_odds(a)
        difference = chosen(log_odds) - rejected(log_odds)
        nll = eq.nll(chosen(a))
        statistics = {
            "nll": nll.detach(),
            "log_odds_ratio": difference.detach(),
            "accuracy": accuracy(difference),
        }
        return nll + lam * eq.odds_ratio(difference), statistics

    return weighed(terms, (), weigh, rows=PAIRS)
