"""Preference losses of the margin alone, with a reference. Datum 2i is the chosen side, datum 2i + 1 the rejected."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lossfns import terms as eq
from lossfns.loss import Loss
from lossfns.losses.pairs import of_margin, pair_loss
from lossfns.margins import Reward, hinge_link, log_ratio_mean, log_ratio_sum
from lossfns.preset import preset
from lossfns.weigh import Weighing, pair_mean


@preset
def dpo(beta: float = 0.1, label_smoothing: float = 0.0, weigh: Weighing = pair_mean) -> Loss:
    """−(1−ε)·log σ(β·m) − ε·log σ(−β·m), with m = Σ w·(lp − ref) of the chosen minus the rejected side.

    Rafailov et al. 2023, arXiv:2305.18290, equation 7. ε: Mitchell 2023, conservative DPO (cDPO). Online DPO, iterative
    DPO and self-rewarding are DPO on pairs of the policy's own samples. In SPIN the chosen side is a demonstration, and
    the rejected side a sample of the policy. In SamPO (arXiv:2406.10957) equally many random tokens of each side have
    weight 1. For another reward or link, see ``gpo``.

    Args:
        beta: β, a finite number above 0.
        label_smoothing: ε in [0, 0.5], the probability that a pair is labelled the wrong way round.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs``. Statistics, means over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> from lossfns import datum_from_tokens
    >>> pair = [datum_from_tokens([5, 6], prompt_length=1), datum_from_tokens([5, 7], prompt_length=1)]
    >>> logprobs = [torch.tensor([-1.0]), torch.tensor([-2.0])]
    >>> loss, metrics = dpo().bind(ref_logprobs=[[-2.0], [-1.0]])(pair, logprobs)
    >>> round(float(loss), 4), metrics["margin"], metrics["accuracy"]  # −log σ(0.1 · 2)
    (0.5981, 2.0, 1.0)
    """
    link = partial(eq.preference, beta=beta, label_smoothing=label_smoothing)
    return pair_loss(of_margin(link), log_ratio_sum, beta, weigh)


@preset
def dpo_norm(beta: float = 5.0, label_smoothing: float = 0.0, weigh: Weighing = pair_mean) -> Loss:
    """−(1−ε)·log σ(β·m) − ε·log σ(−β·m), with m = Σ w·(lp − ref) / Σ w of the chosen minus the rejected side.

    Length-normalised DPO: Lambert et al. 2024 (Tülu 3), arXiv:2411.15124. TRL calls it ``sigmoid_norm``.

    Args:
        beta: β, a finite number above 0. A mean over tokens needs a larger β than a sum.
        label_smoothing: ε in [0, 0.5], the probability that a pair is labelled the wrong way round.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs``. Statistics, means over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> loss, metrics = dpo_norm(beta=1.0).padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # −log σ(2)
    0.1269
    """
    link = partial(eq.preference, beta=beta, label_smoothing=label_smoothing)
    return pair_loss(of_margin(link), log_ratio_mean, beta, weigh)


@preset
def ipo(beta: float = 0.1, reward: Reward = log_ratio_sum, weigh: Weighing = pair_mean) -> Loss:
    """(m − 1/(2β))², with m the reward of the chosen minus the rejected side: Σ w·(lp − ref), or ``reward``.

    Azar et al. 2023, arXiv:2310.12036, equation 17, where β is called τ. The paper takes the sum over tokens. TRL's
    ``DPOTrainer`` divides it by the number of tokens: ``reward=log_ratio_mean``. TRL's ``CPOTrainer`` takes means
    without a reference: ``reward=logprob_mean``.

    Args:
        beta: β, a finite number above 0.
        reward: the reward of a side: ``log_ratio_sum``, ``log_ratio_mean``, ``forward_kl_reward``, ``js_reward``,
            ``alpha_reward(α)``, one without a reference such as ``logprob_mean``, or a ``Reward`` of your own.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs``. Statistics, means over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> loss, metrics = ipo(beta=0.5).padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # (2 − 1)²
    1.0
    """
    return pair_loss(of_margin(lambda m: (m - 1 / (2 * beta)).square()), reward, beta, weigh)


@preset
def hinge(beta: float = 0.1, reward: Reward = log_ratio_sum, weigh: Weighing = pair_mean) -> Loss:
    """max(0, 1 − β·m), with m the reward of the chosen minus the rejected side: Σ w·(lp − ref), or ``reward``.

    The hinge loss of SLiC-HF (Zhao et al. 2023, arXiv:2305.10425) on the margin of DPO: "hinge-norm" of Liu et al. 2023
    (RSO), arXiv:2309.06657. It is ``gpo(link=hinge_link)``. SLiC-HF itself has no reference, but a margin δ and a
    likelihood term: δ·``cpo(link=hinge_link, beta=1/δ, nll_weight=λ/δ)``.

    Args:
        beta: β, a finite number above 0. 1/β is the margin that a pair must reach.
        reward: the reward of a side: ``log_ratio_sum``, ``log_ratio_mean``, ``forward_kl_reward``, ``js_reward``,
            ``alpha_reward(α)``, one without a reference such as ``logprob_mean``, or a ``Reward`` of your own.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs``. Statistics, means over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> loss, metrics = hinge(beta=0.25).padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # 1 − 0.25 · 2
    0.5
    """
    return pair_loss(of_margin(hinge_link, beta), reward, beta, weigh)


@preset
def robust_dpo(
    beta: float = 0.1,
    flip_rate: float = 0.1,
    reward: Reward = log_ratio_sum,
    weigh: Weighing = pair_mean,
) -> Loss:
    """(−(1−ε)·log σ(β·m) + ε·log σ(−β·m)) / (1 − 2ε), with m the reward of the chosen minus the rejected side:
    Σ w·(lp − ref), or ``reward``.

    Chowdhury et al. 2024, arXiv:2403.00409. If labels are flipped with probability ε, the expected loss is that of DPO
    on clean labels. TRL calls it ``robust`` and ε ``label_smoothing``.

    Args:
        beta: β, a finite number above 0.
        flip_rate: ε, the probability that a label is flipped, at least 0 and below 0.5.
        reward: the reward of a side: ``log_ratio_sum``, ``log_ratio_mean``, ``forward_kl_reward``, ``js_reward``,
            ``alpha_reward(α)``, one without a reference such as ``logprob_mean``, or a ``Reward`` of your own.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs``. Statistics, means over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> loss, metrics = robust_dpo(beta=0.5, flip_rate=0.25).padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # (−¾·log σ(1) + ¼·log σ(−1)) / ½
    -0.1867
    """

    def unbiased(m: Tensor) -> Tensor:
        clean, flipped = F.logsigmoid(beta * m), F.logsigmoid(-beta * m)
        return (flip_rate * flipped - (1 - flip_rate) * clean) / (1 - 2 * flip_rate)

    return pair_loss(of_margin(unbiased), reward, beta, weigh)


@preset
def exo(beta: float = 0.1, epsilon: float = 1e-3, reward: Reward = log_ratio_sum, weigh: Weighing = pair_mean) -> Loss:
    """q·(log q − log(1−ε)) + (1−q)·(log(1−q) − log ε), with q = σ(β·m) and m the reward of the chosen minus the
    rejected side: Σ w·(lp − ref), or ``reward``.

    Ji et al. 2024 (EXO), arXiv:2402.00856, equation 16: the reverse KL from the model's preference q to a label that is
    wrong with probability ε. TRL calls it ``exo_pair`` and ε ``label_smoothing``.

    Args:
        beta: β, a finite number above 0.
        epsilon: ε, above 0 and at most 0.5.
        reward: the reward of a side: ``log_ratio_sum``, ``log_ratio_mean``, ``forward_kl_reward``, ``js_reward``,
            ``alpha_reward(α)``, one without a reference such as ``logprob_mean``, or a ``Reward`` of your own.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs``. Statistics, means over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> loss, metrics = exo(beta=0.5, epsilon=0.25).padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # σ(1)·log(σ(1)/¾) + σ(−1)·log(σ(−1)/¼)
    0.0009
    """

    def reverse_kl(m: Tensor) -> Tensor:
        h = beta * m
        won = torch.sigmoid(h) * (F.logsigmoid(h) - math.log1p(-epsilon))
        return won + torch.sigmoid(-h) * (F.logsigmoid(-h) - math.log(epsilon))

    return pair_loss(of_margin(reverse_kl), reward, beta, weigh)
