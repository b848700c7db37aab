"""Preference losses of the rewards of both sides, not of their margin alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lossfns.loss import Loss
from lossfns.losses.pairs import pair_loss
from lossfns.margins import log_ratio_sum
from lossfns.preset import preset
from lossfns.tokens import Tokens
from lossfns.weigh import Weighing, pair_mean


@preset
def nca(beta: float = 0.1, weigh: Weighing = pair_mean) -> Loss:
    """−log σ(β·c) − ½·log σ(−β·c) − ½·log σ(−β·r), with c and r = Σ w·(lp − ref) of the chosen and the rejected side.

    Chen et al. 2024 (noise contrastive alignment), arXiv:2402.05369, for two answers. TRL calls it ``nca_pair``.

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
    >>> loss, metrics = nca(beta=1.0).padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # −log σ(1) − ½·log σ(−1) − ½·log σ(1)
    1.1265
    """

    def absolute(t: Tokens, c: Tensor, r: Tensor) -> Tensor:
        return -F.logsigmoid(beta * c) - F.logsigmoid(-beta * c) / 2 - F.logsigmoid(-beta * r) / 2

    return pair_loss(absolute, log_ratio_sum, beta, weigh)


@preset
def bco_pair(beta: float = 0.1, weigh: Weighing = pair_mean) -> Loss:
    """−log σ(β·c) − log σ(−β·r), with c and r = Σ w·(lp − ref) of the chosen and the rejected side.

    Jung et al. 2024 (binary classifier optimisation), arXiv:2404.04656, without its shift: twice ``bco`` at a reference
    point of 0. It is a part of MPO (arXiv:2411.10442), which adds 0.8·``dpo``, 0.2·``bco_pair`` and the likelihood.

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
    >>> loss, metrics = bco_pair(beta=1.0).padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # −2·log σ(1)
    0.6265
    """

    def classified(t: Tokens, c: Tensor, r: Tensor) -> Tensor:
        return -F.logsigmoid(beta * c) - F.logsigmoid(-beta * r)

    return pair_loss(classified, log_ratio_sum, beta, weigh)


@preset
def sppo_hard(beta: float = 0.1, weigh: Weighing = pair_mean) -> Loss:
    """(c − 1/(2β))² + (r + 1/(2β))², with c and r = Σ w·(lp − ref) of the chosen and the rejected side.

    Wu et al. 2024 (self-play preference optimisation), arXiv:2405.00675, equation 4.7 with η = 1/β and the winning
    probabilities 1 and 0: twice ``sppo`` with these as rewards.

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
    >>> loss, metrics = sppo_hard(beta=0.25).padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # (1 − 2)² + (−1 + 2)²
    2.0
    """

    def placed(t: Tokens, c: Tensor, r: Tensor) -> Tensor:
        return (c - 1 / (2 * beta)).square() + (r + 1 / (2 * beta)).square()

    return pair_loss(placed, log_ratio_sum, beta, weigh)


@preset
def apo_zero(beta: float = 0.1, weigh: Weighing = pair_mean) -> Loss:
    """1 − σ(β·c) + σ(β·r), with c and r = Σ w·(lp − ref) of the chosen and the rejected side.

    D'Oosterlinck et al. 2024 (anchored preference optimisation), arXiv:2408.06266, equation 7, which leaves out the 1.
    It is for chosen answers that are better than the model's.

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
    >>> loss, metrics = apo_zero(beta=1.0).padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # 1 − σ(1) + σ(−1)
    0.5379
    """

    def anchored(t: Tokens, c: Tensor, r: Tensor) -> Tensor:
        return torch.sigmoid(-beta * c) + torch.sigmoid(beta * r)

    return pair_loss(anchored, log_ratio_sum, beta, weigh)


@preset
def apo_down(beta: float = 0.1, weigh: Weighing = pair_mean) -> Loss:
    """σ(β·c) + 1 − σ(β·(c − r)), with c and r = Σ w·(lp − ref) of the chosen and the rejected side.

    D'Oosterlinck et al. 2024 (anchored preference optimisation), arXiv:2408.06266, equation 8, which leaves out the 1.
    It is for chosen answers that are worse than the model's.

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
    >>> loss, metrics = apo_down(beta=1.0).padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # σ(1) + 1 − σ(2)
    0.8503
    """

    def anchored(t: Tokens, c: Tensor, r: Tensor) -> Tensor:
        return torch.sigmoid(beta * c) + torch.sigmoid(-beta * (c - r))

    return pair_loss(anchored, log_ratio_sum, beta, weigh)


@preset
def cal_dpo(beta: float = 0.1, lam: float = 1.0, weigh: Weighing = pair_mean) -> Loss:
    """−log σ(c − r) + λ·((c − 1/(2β))² + (r + 1/(2β))²), with c and r = Σ w·(lp − ref) of the chosen and the rejected
    side.

    Xiao et al. 2024 (Cal-DPO), arXiv:2412.14516. β does not scale the margin. It sets the targets of c and r, ±1/(2β).
    The authors' code has λ = ½.

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
    >>> loss, metrics = cal_dpo(beta=0.25).padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # −log σ(2) + (1 − 2)² + (−1 + 2)²
    2.1269
    """

    def calibrated(t: Tokens, c: Tensor, r: Tensor) -> Tensor:
        distances = (c - 1 / (2 * beta)).square() + (r + 1 / (2 * beta)).square()
        return lam * distances - F.logsigmoid(c - r)

    return pair_loss(calibrated, log_ratio_sum, beta, weigh)


@preset
def c2_dpo(beta: float = 0.1, lam: float = 2e-4, weigh: Weighing = pair_mean) -> Loss:
    """−log σ(β·(c − r)) + λ·(c + r)², with c and r = Σ w·(lp − ref) of the chosen and the rejected side.

    "Constrained controlled" DPO, arXiv:2502.17507, with its constraint on the logarithms: c + r stays near 0, so that
    one side gains what the other loses.

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
    >>> loss, metrics = c2_dpo(beta=0.5, lam=1.0).padded(lp, torch.ones(2, 1), ref_logprobs=ref)
    >>> round(float(loss), 4)  # −log σ(1) + (1 − 1)²
    0.3133
    """

    def constrained(t: Tokens, c: Tensor, r: Tensor) -> Tensor:
        return lam * (c + r).square() - F.logsigmoid(beta * (c - r))

    return pair_loss(constrained, log_ratio_sum, beta, weigh)
