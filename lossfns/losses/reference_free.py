"""Preference losses without a reference model."""

from __future__ import annotations

from torch import Tensor

from lossfns import terms as eq
from lossfns.loss import Loss, Statistics
from lossfns.losses.pairs import accuracy, of_margin, pair_loss
from lossfns.margins import Link, Reward, check_reward, logistic_link, logprob_mean, logprob_sum, smoothed
from lossfns.preset import make_loss, preset
from lossfns.segments import chosen, rejected, weighted_mean
from lossfns.statistics import OnDemand
from lossfns.tokens import PAIRS, Tokens
from lossfns.weigh import Weighing, pair_mean


@preset
def orpo(lam: float = 0.1, weigh: Weighing = pair_mean) -> Loss:
    """−a_c + λ·(−log σ(log-odds(a_c) − log-odds(a_r))), with a = Σ w·lp / Σ w of the chosen (c) and rejected (r).

    Hong et al. 2024, arXiv:2403.07691, equations 6 and 7. Value and gradient are finite for every logprob up to and
    including 0. The likelihood is that of the tokens with a weight. TRL takes the likelihood over prompt and answer:
    for this, add a ``cross_entropy`` of both to the odds ratio alone, ``cpo(beta=1, nll_weight=0,
    reward=log_odds_mean)``.

    Args:
        lam: λ, a finite number of at least 0.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads no column besides the weights. Statistics, means over pairs:

        nll: −a_c, in nats, at least 0.
        log_odds_ratio: log-odds(a_c) − log-odds(a_r), in nats.
        chosen_reward: λ·a_c.
        rejected_reward: λ·a_r.
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
        statistics = OnDemand(
            nll=nll.detach,
            log_odds_ratio=difference.detach,
            chosen_reward=lambda: lam * chosen(t, a).detach(),
            rejected_reward=lambda: lam * rejected(t, a).detach(),
            accuracy=lambda: accuracy(difference),
        )
        return nll + lam * eq.odds_ratio(difference), statistics

    return make_loss(terms, (), weigh, rows=PAIRS)


@preset
def simpo(beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0, weigh: Weighing = pair_mean) -> Loss:
    """−(1−ε)·log σ(h) − ε·log σ(−h), with h = β·m − γ and m = Σ w·lp / Σ w of the chosen minus the rejected side.

    Meng et al. 2024 (SimPO), arXiv:2405.14734, equation 6. TRL's and Liger's defaults are β = 0.1 and γ = 0.5.

    Args:
        beta: β, a finite number above 0.
        gamma: γ, the target margin, a finite number of at least 0, in the unit of β·m.
        label_smoothing: ε in [0, 0.5], the probability that a pair is labelled the wrong way round.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads no column besides the weights. Statistics, means over pairs, with c and r the rewards of the two sides and m =
    c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp = torch.tensor([[-1.0], [-2.0]])
    >>> loss, metrics = simpo(beta=2.0, gamma=1.0).padded(lp, torch.ones(2, 1))
    >>> round(float(loss), 4)  # −log σ(2 · 1 − 1)
    0.3133
    """
    link = smoothed(logistic_link, label_smoothing)
    return pair_loss(of_margin(lambda m: link(beta * m - gamma)), logprob_mean, beta, weigh)


@preset
def alphapo(
    beta: float = 2.0,
    gamma: float = 1.0,
    reward_alpha: float = 0.25,
    label_smoothing: float = 0.0,
    weigh: Weighing = pair_mean,
    log_ratio_cap: float | None = 20.0,
) -> Loss:
    """−(1−ε)·log σ(h) − ε·log σ(−h), with h = β·(ρ_c − ρ_r) − γ and ρ = (1 − exp(−α·a))/α of the chosen (c) and
    rejected (r) side, a = Σ w·lp / Σ w.

    Gupta et al. 2025 (AlphaPO), arXiv:2501.03884. At α → 0 it is ``simpo``, whose defaults β and γ have here. In the
    statistics c and r are ρ of the two sides.

    Args:
        beta: β, a finite number above 0.
        gamma: γ, the target margin, a finite number of at least 0, in the unit of β·ρ.
        reward_alpha: α, a finite number other than 0.
        label_smoothing: ε in [0, 0.5], the probability that a pair is labelled the wrong way round.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.
        log_ratio_cap: bound of |α·a| before the exponential, above 0; ``None`` is the paper's uncapped form.

    Reads no column besides the weights. Statistics, means over pairs, with c and r the rewards of the two sides and m =
    c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp = torch.tensor([[-1.0], [-2.0]])
    >>> loss, metrics = alphapo(beta=1.0, gamma=0.0, reward_alpha=1.0).padded(lp, torch.ones(2, 1))
    >>> round(float(loss), 4)  # −log σ(e² − e)
    0.0093
    """
    link = smoothed(logistic_link, label_smoothing)

    def shaped(t: Tokens) -> Tensor:
        return (1 - eq.importance_ratio(-reward_alpha * logprob_mean(t), log_ratio_cap)) / reward_alpha

    return pair_loss(of_margin(lambda m: link(beta * m - gamma)), Reward("shaped", shaped), beta, weigh)


@preset
def cpo(
    beta: float = 0.1,
    nll_weight: float = 1.0,
    label_smoothing: float = 0.0,
    link: Link = logistic_link,
    reward: Reward = logprob_sum,
    nll: Reward = logprob_sum,
    weigh: Weighing = pair_mean,
) -> Loss:
    """(1−ε)·f(β·m) + ε·f(−β·m) − λ·a_c, with f(h) = −log σ(h) or another ``link``, and m the reward of the chosen minus
    the rejected side: Σ w·lp, or ``reward``. a_c is Σ w·lp of the chosen side, or ``nll`` of it.

    Xu et al. 2024 (CPO), arXiv:2401.08417. With λ = 0 it is the part of TPO (arXiv:2405.16681) that compares two
    answers; add a ``cross_entropy`` for TPO's third answer. With ``reward=log_odds_mean``, β = 1 and λ = 0 it is the
    odds ratio of ``orpo``, to which a likelihood over other tokens can be added, such as prompt and answer.

    Args:
        beta: β, a finite number above 0.
        nll_weight: λ, a finite number of at least 0.
        label_smoothing: ε in [0, 0.5], the probability that a pair is labelled the wrong way round.
        link: f: ``logistic_link``, ``hinge_link``, ``squared_link`` or another of ``gpo``.
        reward: ``logprob_sum``, ``logprob_mean``, ``log_odds_mean``, or one with a reference: with ``log_ratio_sum``
            the loss is that of ``dpo`` plus a likelihood (RPO).
        nll: ``logprob_sum``, or ``logprob_mean`` for the mean over each chosen side.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads the columns of its rewards, by default none. Statistics, means over pairs, with c and r the rewards of the two
    sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.
        nll: −a_c, in nats.

    >>> import torch
    >>> lp = torch.tensor([[-1.0], [-2.0]])
    >>> loss, metrics = cpo(beta=0.5).padded(lp, torch.ones(2, 1))
    >>> round(float(loss), 4)  # −log σ(0.5) + 1
    1.4741
    """
    compare = smoothed(link, label_smoothing)

    def contrastive(t: Tokens, c: Tensor, r: Tensor) -> tuple[Tensor, Statistics]:
        a = chosen(t, nll(t))
        return compare(beta * (c - r)) - nll_weight * a, {"nll": -a.detach()}

    check_reward("nll", nll)
    return pair_loss(contrastive, reward, beta, weigh, nll.reads)
