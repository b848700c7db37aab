"""Preference losses: one term for each pair. Datum 2i is the chosen side, datum 2i + 1 the rejected side."""

from __future__ import annotations

from torch import Tensor

from lossfns import terms as eq
from lossfns.loss import Loss, Statistics, make_loss, preset
from lossfns.segments import chosen, rejected, weighted_mean, weighted_sum
from lossfns.tokens import PAIRS, Tokens
from lossfns.weigh import Weighing, pair_mean


def accuracy(difference: Tensor) -> Tensor:
    """1 where the difference is positive, ½ where it is 0, else 0."""
    return (difference.detach().sign() + 1) / 2


@preset
def dpo(beta: float = 0.1, label_smoothing: float = 0.0, weigh: Weighing = pair_mean) -> Loss:
    """−(1−ε)·log σ(β·m) − ε·log σ(−β·m), with m = Σ w·(lp − ref) of the chosen minus the rejected side.

    Rafailov et al. 2023, arXiv:2305.18290, equation 7. ε: Mitchell 2023, conservative DPO.

    Args:
        beta: β, a finite number above 0.
        label_smoothing: ε in [0, 0.5], the probability that a pair is labelled the wrong way round.
        weigh: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs``. Statistics, means over pairs:

        margin: m, in nats.
        reward_margin: β·m.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> from lossfns import datum_from_tokens
    >>> pair = [datum_from_tokens([5, 6], prompt_length=1), datum_from_tokens([5, 7], prompt_length=1)]
    >>> logprobs = [torch.tensor([-1.0]), torch.tensor([-2.0])]
    >>> loss, metrics = dpo().bind(ref_logprobs=[[-2.0], [-1.0]])(pair, logprobs)
    >>> round(float(loss), 4), metrics["margin"], metrics["accuracy"]  # −log σ(0.1 · 2)
    (0.5981, 2.0, 1.0)
    """

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        log_ratio = weighted_sum(t, t.logprobs - t.ref_logprobs)
        m = chosen(t, log_ratio) - rejected(t, log_ratio)
        statistics = {"margin": m.detach(), "reward_margin": beta * m.detach(), "accuracy": accuracy(m)}
        return eq.preference(m, beta, label_smoothing), statistics

    return make_loss(terms, ("ref_logprobs",), weigh, rows=PAIRS)


@preset
def orpo(lam: float = 0.1, weigh: Weighing = pair_mean) -> Loss:
    """−a_c + λ·(−log σ(log-odds(a_c) − log-odds(a_r))), with a = Σ w·lp / Σ w of the chosen (c) and rejected (r).

    Hong et al. 2024, arXiv:2403.07691, equations 6 and 7. No reference model. Value and gradient are finite for every
    logprob up to and including 0.

    Args:
        lam: λ, a finite number of at least 0.
        weigh: ``pair_mean`` or ``pair_sum``.

    Reads no column besides the weights. Statistics, means over pairs:

        nll: −a of the chosen side, in nats, at least 0.
        log_odds_ratio: log-odds(a_c) − log-odds(a_r), in nats.
        accuracy: share of pairs with a log-odds ratio above 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> from lossfns import datum_from_tokens
    >>> pair = [datum_from_tokens([5, 6], prompt_length=1), datum_from_tokens([5, 7], prompt_length=1)]
    >>> loss, metrics = orpo()(pair, [torch.tensor([-1.0]), torch.tensor([-1.0])])
    >>> round(float(loss), 4), metrics["nll"], metrics["accuracy"]  # 1 + 0.1 · log 2
    (1.0693, 1.0, 0.5)
    """

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        a = weighted_mean(t, t.logprobs)
        log_odds = eq.log_odds(a)
        difference = chosen(t, log_odds) - rejected(t, log_odds)
        nll = eq.nll(chosen(t, a))
        statistics = {
            "nll": nll.detach(),
            "log_odds_ratio": difference.detach(),
            "accuracy": accuracy(difference),
        }
        return nll + lam * eq.odds_ratio(difference), statistics

    return make_loss(terms, (), weigh, rows=PAIRS)
