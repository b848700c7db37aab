"""The optimal token baseline: a baseline for each token that minimises the variance of the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossfns.advantages.rows import Columns, parse_token_rows
from lossfns.advantages.samples import check_choice, grouped, parse_labels
from lossfns.errors import LossInputError
from lossfns.values import LOGPROB_TOLERANCE


def optimal_token_advantages(
    rewards: Columns,
    logprobs: Columns,
    sum_square_probs: Columns,
    weights: Columns,
    groups: Any,
    *,
    importance: Columns | None = None,
    group_of_one: str = "zero",
) -> Tensor | list[Tensor]:
    """Gₜ − Σ W·G / Σ W over the t-th tokens of the group, Wₜ = Σ_{s <= t} (1 − 2pₛ + Σᵥ pᵥ²). OTB, arXiv:2602.07078.

    The squared norm of the gradient of one token's logprob in its logits is 1 − 2p + Σᵥ pᵥ²: that of the vector 1[v] −
    pᵥ. Its sum W up to token t approximates how much the tokens so far contribute to the variance. The baseline that
    minimises the variance at t is the mean of the returns to go, weighted by W.

    Args:
        rewards: rewards of tokens; see ``token_rewards``.
        logprobs: old logprobs, log p of each token.
        sum_square_probs: Σᵥ pᵥ² over the vocabulary at each token, in (0, 1].
        weights: active tokens have a weight other than 0. The t-th token is the t-th active one, as in verl's
            ``tir_optimal_token_baseline``.
        groups: ``[B]`` hashable labels. Rows with equal labels are one group, in any order.
        importance: importance weights of tokens; their squares multiply 1 − 2p + Σᵥ pᵥ².
        group_of_one: ``"zero"``: where only one row of the group has a t-th token, its advantage is 0. ``"reward"``: it
            has no baseline, as in verl for groups of one and (``handle_zero_tail``) beyond the second longest row.

    Returns:
        Advantages, in the form of the weights; exactly 0 at a t where all returns of the group are equal.

    Raises:
        LossInputError: if a number is not finite, or columns do not have one form.

    >>> half, row = [[-0.6931471805599453] * 2] * 2, [[0.5, 0.5]] * 2
    >>> optimal_token_advantages([[0.0, 1.0], [0.0, 0.0]], half, row, [[1, 1], [1, 1]], ["q", "q"])
    [tensor([0.5000, 0.5000], dtype=torch.float64), tensor([-0.5000, -0.5000], dtype=torch.float64)]
    """
    check_choice("group_of_one", group_of_one, ("zero", "reward"))
    t = parse_token_rows(weights)
    labels = parse_labels(groups, len(t.active))
    group = torch.from_numpy(grouped(labels, t.active.any(1).cpu().numpy())[0]).to(t.active.device)
    p, squares = t.logprobs("logprobs", logprobs).exp(), t.column("sum_square_probs", sum_square_probs, (0.0, 1.0))
    if bool((t.active & (squares < p.square() - LOGPROB_TOLERANCE)).any()):
        fix = "It is the sum over the vocabulary, at the temperature of the logprobs."
        raise LossInputError("sum_square_probs", "at least the square of the token's own probability", "less", fix)
    energy = 1 - 2 * p + squares
    if importance is not None:
        energy = energy * t.column("importance", importance).square()
    order = t.active_first()
    active = t.active.gather(1, order)
    returns = t.discounted_sum(t.column("rewards", rewards), 1.0, "active").gather(1, order)
    w = torch.where(t.active, energy, 0.0).gather(1, order).cumsum(1) * active
    advantages = weighted_deviation(returns, w, active, group, group_of_one)
    return t.finish(torch.zeros_like(advantages).scatter(1, order, advantages))


def weighted_deviation(g: Tensor, w: Tensor, active: Tensor, group: Tensor, group_of_one: str) -> Tensor:
    """G − Σ W·G / Σ W over the rows of each group, column by column: ``[B, T]``. Where Σ W is 0, rows count alike."""

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(int(group.max()) + 1, x.shape[1]).index_add(0, group, x)[group]

    one = active.to(g.dtype)
    count = total(one)
    w = torch.where(total(w) > 0, w, one)
    # Deviations from the group's maximum are exactly 0 where all returns are equal, and so is their mean.
    highest = g.new_full((int(group.max()) + 1, g.shape[1]), -torch.inf)
    index = group[:, None].expand_as(g)
    highest = highest.scatter_reduce(0, index, g.masked_fill(~active, -torch.inf), "amax")[group]
    deviation = torch.where(active, g - highest, 0.0)
    advantages = deviation - total(w * deviation) / total(w).clamp(min=torch.finfo(w.dtype).tiny)
    return torch.where(active, torch.where((count == 1) & (group_of_one == "reward"), g, advantages), 0.0)
