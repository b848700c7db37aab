"""Preference losses that compare the pairs of a group with each other."""

from __future__ import annotations

from torch import Tensor

from lossfns.loss import Loss, Statistics
from lossfns.losses.pairs import pair_loss
from lossfns.margins import (
    group_log_mean_exp,
    group_mean,
    group_size,
    log_ratio_mean,
    log_ratio_sum,
    logistic_link,
    logprob_mean,
    pair_groups,
    pair_number,
    same_rank,
    smoothed,
)
from lossfns.preset import preset
from lossfns.segments import chosen, rejected, weighted_sum
from lossfns.tokens import Tokens
from lossfns.weigh import Weighing, pair_mean

STD_FLOOR = 1e-6
"""The constant that is added to a standard deviation before it divides, as in ``group_advantages``."""


@preset
def aot(beta: float = 0.1, label_smoothing: float = 0.0, weigh: Weighing = pair_mean) -> Loss:
    """−(1−ε)·log σ(β·z) − ε·log σ(−β·z), with z = x − y of the same rank within the group: x = Σ w·lp of the chosen
    minus the rejected side, and y the same of ref.

    Melnyk et al. 2024 (alignment via optimal transport, paired), arXiv:2406.05882. The ranks have no gradient. Equal
    numbers of a group are ranked in the order of the batch.

    Args:
        beta: β, a finite number above 0.
        label_smoothing: ε in [0, 0.5], the probability that a pair is labelled the wrong way round.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs`` and ``groups`` (an integer label for each pair; all pairs of one label must be in one call).
    Statistics, means over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> loss, metrics = aot(beta=0.5).padded(lp, torch.ones(2, 1), ref_logprobs=ref, groups=torch.zeros(2))
    >>> round(float(loss), 4)  # one pair: −log σ(1)
    0.3133
    """
    link = smoothed(logistic_link, label_smoothing)

    def transported(t: Tokens, c: Tensor, r: Tensor) -> Tensor:
        policy = weighted_sum(t, t.logprobs)
        x = chosen(t, policy) - rejected(t, policy)
        y = (x - (c - r)).detach()
        return link(beta * (x - same_rank(pair_groups(t), x, y)))

    return pair_loss(transported, log_ratio_sum, beta, weigh, ("groups",))


@preset
def aot_unpaired(beta: float = 0.1, label_smoothing: float = 0.0, weigh: Weighing = pair_mean) -> Loss:
    """−(1−ε)·log σ(β·z) − ε·log σ(−β·z), with z = c − r of the same rank within the group, and c and r = Σ w·(lp − ref)
    of the chosen and the rejected sides.

    Melnyk et al. 2024 (alignment via optimal transport, unpaired), arXiv:2406.05882. The sides of a pair need not
    answer the same prompt. Equal numbers of a group are ranked in the order of the batch.

    Args:
        beta: β, a finite number above 0.
        label_smoothing: ε in [0, 0.5], the probability that a pair is labelled the wrong way round.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs`` and ``groups`` (an integer label for each pair; all pairs of one label must be in one call).
    Statistics, means over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> loss, metrics = aot_unpaired(beta=0.5).padded(lp, torch.ones(2, 1), ref_logprobs=ref, groups=torch.zeros(2))
    >>> round(float(loss), 4)  # one pair: −log σ(1)
    0.3133
    """
    link = smoothed(logistic_link, label_smoothing)

    def transported(t: Tokens, c: Tensor, r: Tensor) -> Tensor:
        return link(beta * (c - same_rank(pair_groups(t), c, r)))

    return pair_loss(transported, log_ratio_sum, beta, weigh, ("groups",))


@preset
def dr_dpo(beta: float = 0.1, beta_prime: float = 1.0, weigh: Weighing = pair_mean) -> Loss:
    """−β′·log mean exp(log σ(β·m) / β′) over the pairs of a group, with m = Σ w·(lp − ref) of the chosen minus the
    rejected side. Each pair of the group has this number as its term.

    Wu et al. 2024 (distributionally robust DPO), arXiv:2407.07880: pairs that are ranked wrong, perhaps because of a
    flipped label, count less. A group takes the place of the paper's batch. For large β′ the loss approaches ``dpo``.

    Args:
        beta: β, a finite number above 0.
        beta_prime: β′, a finite number above 0.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs`` and ``groups`` (an integer label for each pair; all pairs of one label must be in one call).
    Statistics, means over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> loss, metrics = dr_dpo(beta=0.5).padded(lp, torch.ones(2, 1), ref_logprobs=ref, groups=torch.zeros(2))
    >>> round(float(loss), 4)  # one pair: −log σ(1)
    0.3133
    """

    def robust(t: Tokens, c: Tensor, r: Tensor) -> Tensor:
        log_p = -logistic_link(beta * (c - r))
        return -beta_prime * group_log_mean_exp(pair_groups(t), log_p / beta_prime)

    return pair_loss(robust, log_ratio_sum, beta, weigh, ("groups",))


@preset
def beta_dpo(beta: float = 0.1, alpha: float = 0.6, min_beta: float = 1e-3, weigh: Weighing = pair_mean) -> Loss:
    """−log σ(sg(b)·m), with b = max(b_min, β·(1 + α·(mean m − M₀))), m = Σ w·(lp − ref) of the chosen minus the
    rejected side, and mean m over the pairs of the group.

    Wu et al. 2024 (β-DPO), arXiv:2407.08639, with one β for each batch, which is here the group. M₀ is the moving
    average of mean m over earlier batches, which the caller keeps. To leave out a pair, as the paper's filter does,
    give both sides weights of 0.

    Args:
        beta: β, a finite number above 0.
        alpha: α, a finite number of at least 0.
        min_beta: b_min, a finite number above 0.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs``, ``groups`` (an integer label for each pair; all pairs of one label must be in one call) and
    ``reference_point`` (M₀, one number for each pair). Statistics, means over pairs, with c and r the rewards of the
    two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.
        beta_used: b, above 0.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> columns = {"groups": torch.zeros(2), "reference_point": torch.zeros(2)}
    >>> loss, metrics = beta_dpo(0.5, 1.0).padded(lp, torch.ones(2, 1), ref_logprobs=ref, **columns)
    >>> round(float(loss), 4)  # −log σ(0.5·(1 + 2)·2)
    0.0486
    """

    def calibrated(t: Tokens, c: Tensor, r: Tensor) -> tuple[Tensor, Statistics]:
        gap = group_mean(pair_groups(t), (c - r).detach()) - pair_number(t, t.reference_point)
        dynamic = (beta * (1 + alpha * gap)).clamp(min=min_beta)
        return logistic_link(dynamic * (c - r)), {"beta_used": dynamic}

    return pair_loss(calibrated, log_ratio_sum, beta, weigh, ("groups", "reference_point"))


@preset
def alpha_dpo(beta: float = 2.0, gamma: float = 1.0, alpha: float = 0.1, weigh: Weighing = pair_mean) -> Loss:
    """−log σ(β·u − γ − α·sg(z)), with u = Σ w·lp / Σ w of the chosen minus the rejected side, z = (x − mean x) / (std x
    + 10⁻⁶) over the pairs of the group, and x the same as u, but of lp − ref.

    Wu et al. 2024 (α-DPO), arXiv:2410.10148: ``simpo`` with a margin of its own for each pair. The standard deviation
    divides by n − 1, and z is 0 in a group of one pair. The authors' code takes moving averages, and has β·α in place
    of α. In the statistics c and r are Σ w·lp / Σ w of the two sides.

    Args:
        beta: β, a finite number above 0.
        gamma: γ, a finite number of at least 0.
        alpha: α, a finite number of at least 0.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``ref_logprobs`` and ``groups`` (an integer label for each pair; all pairs of one label must be in one call).
    Statistics, means over pairs, with c and r the rewards of the two sides and m = c − r:

        margin: m, in nats.
        reward_margin: β·m.
        chosen_reward: β·c.
        rejected_reward: β·r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> lp, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-1.0]])
    >>> loss, metrics = alpha_dpo(beta=1.0).padded(lp, torch.ones(2, 1), ref_logprobs=ref, groups=torch.zeros(2))
    >>> round(float(loss), 4)  # one pair: −log σ(1 − 1)
    0.6931
    """

    def standard(t: Tokens) -> Tensor:
        labels, rewards = pair_groups(t), log_ratio_mean(t).detach()
        distance = chosen(t, rewards) - rejected(t, rewards)
        distance = distance - group_mean(labels, distance)
        size = group_size(labels, like=distance)
        variance = group_mean(labels, distance.square()) * size / (size - 1).clamp(min=1)
        return distance / (variance.sqrt() + STD_FLOOR)

    def adaptive(t: Tokens, c: Tensor, r: Tensor) -> Tensor:
        return logistic_link(beta * (c - r) - gamma - alpha * standard(t))

    return pair_loss(adaptive, logprob_mean, beta, weigh, ("ref_logprobs", "groups"))
