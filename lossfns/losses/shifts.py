"""Preference losses whose margin is shifted, limited or weighted."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lossfns.loss import Loss, Statistics
from lossfns.losses.pairs import of_margin, pair_loss
from lossfns.margins import REFERENCE, Reward, desensitised, log_ratio_sum, logistic_link, pair_number
from lossfns.preset import preset
from lossfns.segments import active_counts, chosen, rejected, sequence_sum, weight_divisor, weighted_sum
from lossfns.tokens import Tokens
from lossfns.weigh import Weighing, pair_mean


@preset
def dpop(beta: float = 0.3, lam: float = 50.0, weigh: Weighing = pair_mean) -> Loss:
    """−log σ(β·(c − r − λ·max(0, −c))), with c and r = Σ w·(lp − ref) of the chosen and the rejected side.

    Pal et al. 2024 (DPO-positive), arXiv:2402.13228, equation 3: a penalty if the chosen side falls below the
    reference.

    Args:
        beta: β, a finite number above 0.
        lam: λ, a finite number of at least 0.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs``. Statistics, means over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> loss, metrics = dpop(beta=0.5).padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # −log σ(1), as c is above 0
    0.3133
    """

    def positive(t: Tokens, c: Tensor, r: Tensor) -> Tensor:
        return logistic_link(beta * (c - r - lam * F.relu(-c)))

    return pair_loss(positive, log_ratio_sum, beta, weigh)


@preset
def odpo(beta: float = 0.1, weigh: Weighing = pair_mean) -> Loss:
    """−log σ(β·m − Δ), with m = Σ w·(lp − ref) of the chosen minus the rejected side and Δ the pair's target margin.

    Amini et al. 2024 (DPO with an offset), arXiv:2402.10571, equation 8: Δ = α·f(score_c − score_r), which the caller
    computes.

    Args:
        beta: β, a finite number above 0.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs`` and ``target_margin`` (Δ, one number for each pair, on its chosen side). Statistics, means
    over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> offset = torch.tensor([1.0, 1.0])
    >>> loss, metrics = odpo(beta=0.5).padded(lp, torch.ones(2, 1), ref_logprobs=ref, target_margin=offset)
    >>> round(float(loss), 4)  # −log σ(1 − 1)
    0.6931
    """

    def offset(t: Tokens, c: Tensor, r: Tensor) -> Tensor:
        return logistic_link(beta * (c - r) - pair_number(t, t.target_margin))

    return pair_loss(offset, log_ratio_sum, beta, weigh, ("target_margin",))


@preset
def r_dpo(beta: float = 0.1, alpha: float = 0.01, weigh: Weighing = pair_mean) -> Loss:
    """−log σ(β·m + α·(n_c − n_r)), with m = Σ w·(lp − ref) of the chosen minus the rejected side and n the number of
    active tokens of each side.

    Park et al. 2024, arXiv:2403.19159: a longer chosen side counts less. Some implementations subtract α·(n_c − n_r),
    which has the opposite effect.

    Args:
        beta: β, a finite number above 0.
        alpha: α, a finite number of at least 0.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs``. Statistics, means over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> loss, metrics = r_dpo(beta=0.5).padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # −log σ(1), at equal lengths
    0.3133
    """

    def regularised(t: Tokens, c: Tensor, r: Tensor) -> Tensor:
        n = active_counts(t)
        return logistic_link(beta * (c - r) + alpha * (chosen(t, n) - rejected(t, n)))

    return pair_loss(regularised, log_ratio_sum, beta, weigh)


@preset
def ld_dpo(beta: float = 0.1, ld_alpha: float = 0.5, weigh: Weighing = pair_mean) -> Loss:
    """−log σ(β·m), with m = Σ w·(lp − ref) of the chosen minus the rejected side, in which the tokens beyond the length
    of the shorter side are multiplied by α.

    Liu et al. 2024 (length-desensitised DPO), arXiv:2409.06411. Lengths count the active tokens.

    Args:
        beta: β, a finite number above 0.
        ld_alpha: α in [0, 1]; at 1 the loss is ``dpo``.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs``. Statistics, means over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> loss, metrics = ld_dpo(beta=0.5).padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # −log σ(1), at equal lengths
    0.3133
    """
    reward = Reward("desensitised", partial(desensitised, tail=ld_alpha), REFERENCE)
    return pair_loss(of_margin(logistic_link, beta), reward, beta, weigh)


@preset
def minor_dpo(beta: float = 0.1, weigh: Weighing = pair_mean) -> Loss:
    """−log σ(β·(c − max(0, r))), with c and r = Σ w·(lp − ref) of the chosen and the rejected side.

    Xie et al. 2024 (Minor DPO), arXiv:2408.09834: a rejected side below the reference is not pushed further.

    Args:
        beta: β, a finite number above 0.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs``. Statistics, means over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> loss, metrics = minor_dpo(beta=0.5).padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # −log σ(0.5 · 1), as r is below 0
    0.4741
    """

    def minor(t: Tokens, c: Tensor, r: Tensor) -> Tensor:
        return logistic_link(beta * (c - F.relu(r)))

    return pair_loss(minor, log_ratio_sum, beta, weigh)


@preset
def dpo_shift(beta: float = 0.1, lam: float = 0.95, weigh: Weighing = pair_mean) -> Loss:
    """−log σ(β·(c − λ·r)), with c and r = Σ w·(lp − ref) of the chosen and the rejected side.

    Yang et al. 2025 (DPO-Shift), arXiv:2502.07599, with a fixed λ.

    Args:
        beta: β, a finite number above 0.
        lam: λ, a finite number of at least 0; at 1 the loss is ``dpo``.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs``. Statistics, means over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> loss, metrics = dpo_shift(beta=0.5, lam=0.5).padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # −log σ(0.5 · 1.5)
    0.3869
    """

    def shifted(t: Tokens, c: Tensor, r: Tensor) -> Tensor:
        return logistic_link(beta * (c - lam * r))

    return pair_loss(shifted, log_ratio_sum, beta, weigh)


@preset
def bpo(beta: float = 0.1, balance: float = 0.3, weigh: Weighing = pair_mean) -> Loss:
    """−log σ(β·min(c, −α·r)), with c and r = Σ w·(lp − ref) of the chosen and the rejected side.

    Sun et al. 2025 (balanced preference optimisation), arXiv:2506.03557: only the side that attains the minimum has a
    gradient, the chosen one in a tie.

    Args:
        beta: β, a finite number above 0.
        balance: α, a finite number above 0, in the paper at most 1.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs``. Statistics, means over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> loss, metrics = bpo(beta=0.5, balance=0.5).padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # −log σ(0.5 · 0.5)
    0.5759
    """

    def balanced(t: Tokens, c: Tensor, r: Tensor) -> Tensor:
        return logistic_link(beta * torch.where(c <= -balance * r, c, -balance * r))

    return pair_loss(balanced, log_ratio_sum, beta, weigh)


@preset
def wpo(beta: float = 0.1, weigh: Weighing = pair_mean) -> Loss:
    """−sg(v_c·v_r)·log σ(β·m), with m = Σ w·(lp − ref) of the chosen minus the rejected side and v = exp(Σ w·(lp − log
    Σp²) / Σ w) of each side.

    Zhou et al. 2024 (weighted preference optimisation), arXiv:2406.11827, equation 2, with its sampled alignment: pairs
    that the policy itself is likely to produce count more. With 1 in place of Σp², v is the plain likelihood by token.

    Args:
        beta: β, a finite number above 0.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs`` and ``sum_square_probs`` (Σp² over the vocabulary, by token, above 0). Statistics, means over
    pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.
        pair_weight: v_c·v_r, above 0.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> ones = torch.ones(2, 1)
    >>> loss, metrics = wpo(beta=0.5).padded(lp, torch.ones(2, 1), ref_logprobs=ref, sum_square_probs=ones)
    >>> round(float(loss), 4)  # −e^(−3)·log σ(1)
    0.0156
    """

    def weighted(t: Tokens, c: Tensor, r: Tensor) -> tuple[Tensor, Statistics]:
        log_squares = torch.xlogy(t.weights, t.sum_square_probs.detach())  # 0 where the weight is 0
        log_v = (weighted_sum(t, t.logprobs.detach()) - sequence_sum(t, log_squares)) / weight_divisor(t)
        weight = (chosen(t, log_v) + rejected(t, log_v)).exp()
        return weight * logistic_link(beta * (c - r)), {"pair_weight": weight}

    loss = pair_loss(weighted, log_ratio_sum, beta, weigh, ("sum_square_probs",))
    return replace(loss, differentiates=())
