"""Losses of reward models. They take the scores of a head in place of logprobs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lossfns.loss import Loss, Statistics
from lossfns.losses.pairs import pair_loss
from lossfns.margins import Reward, pair_number, sum_of_logprobs
from lossfns.preset import make_loss, preset
from lossfns.tokens import Tokens
from lossfns.weigh import Weighing, pair_mean, token_mean

SCORE = Reward("score", sum_of_logprobs)
"""Σ w·score of each answer: scores stand in place of logprobs."""


@preset
def bradley_terry(center_weight: float = 0.0, weigh: Weighing = pair_mean) -> Loss:
    """−log σ(m) + λ·(s_c + s_r)², with s = Σ w·score of the chosen (c) and rejected (r) side and m = s_c − s_r.

    The reward model of Ouyang et al. 2022, arXiv:2203.02155, equation 1. λ keeps rewards around 0 (Eisenstein et al.
    2023, arXiv:2312.09244). The score of an answer is that of its last token: give it weight 1 and all others 0.

    Args:
        center_weight: λ, a finite number of at least 0. TRL calls it ``center_rewards_coefficient``.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads no column besides the weights. It takes scores of any sign. Statistics, means over pairs:

        margin: m, of any sign.
        reward_margin: m, as a reward has no β.
        chosen_reward: s_c.
        rejected_reward: s_r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> scores = torch.tensor([[0.5, 1.0], [2.0, -1.0]])
    >>> last = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    >>> loss, metrics = bradley_terry().padded(scores, last)
    >>> round(float(loss), 4), metrics["chosen_reward"]  # −log σ(1 + 1)
    (0.1269, 1.0)
    """

    def centred(t: Tokens, c: Tensor, r: Tensor) -> Tensor:
        return center_weight * (c + r).square() - F.logsigmoid(c - r)

    return pair_loss(centred, SCORE, 1.0, weigh, output="scores")


@preset
def bradley_terry_margin(center_weight: float = 0.0, weigh: Weighing = pair_mean) -> Loss:
    """−log σ(m − Δ) + λ·(s_c + s_r)², with s = Σ w·score of the chosen (c) and rejected (r) side, m = s_c − s_r, and Δ
    the pair's target margin.

    ``bradley_terry`` with the margin of Touvron et al. 2023 (Llama 2), arXiv:2307.09288, equation 2: pairs that differ
    clearly have a large margin.

    Args:
        center_weight: λ, a finite number of at least 0. TRL calls it ``center_rewards_coefficient``.
        weigh: how pairs count: ``pair_mean`` or ``pair_sum``.

    Reads ``target_margin`` (Δ, one number for each pair, on its chosen side). It takes scores of any sign. Statistics,
    means over pairs:

        margin: m, of any sign.
        reward_margin: m, as a reward has no β.
        chosen_reward: s_c.
        rejected_reward: s_r.
        accuracy: share of pairs with m > 0, in [0, 1]; a tie counts ½.

    >>> import torch
    >>> scores = torch.tensor([[0.5, 1.0], [2.0, -1.0]])
    >>> last = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    >>> loss, metrics = bradley_terry_margin().padded(scores, last, target_margin=torch.ones(2))
    >>> round(float(loss), 4)  # −log σ(1 + 1 − 1)
    0.3133
    """

    def beyond_margin(t: Tokens, c: Tensor, r: Tensor) -> Tensor:
        return center_weight * (c + r).square() - F.logsigmoid(c - pair_number(t, t.target_margin) - r)

    return pair_loss(beyond_margin, SCORE, 1.0, weigh, ("target_margin",), output="scores")


@preset
def process_reward(weigh: Weighing = token_mean) -> Loss:
    """−y·log σ(s) − (1−y)·log σ(−s) of each step, with s the score at its last token and y in [0, 1] whether it is
    right.

    Process supervision: Uesato et al. 2022, arXiv:2211.14275; Lightman et al. 2023, arXiv:2305.20050. Give the last
    token of each step weight 1 and all others 0. A fractional y is a soft label, such as a share of successful
    continuations.

    Args:
        weigh: how steps count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.

    Reads ``returns`` (y, by token). It takes scores of any sign. Statistics, means over active tokens:

        probability: mean σ(s), in [0, 1].
        accuracy: share of steps with s > 0 if y > ½, s <= 0 if not, in [0, 1].

    >>> import torch
    >>> scores = torch.tensor([[0.5, 1.0], [2.0, -1.0]])
    >>> last = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    >>> loss, metrics = process_reward().padded(scores, last, returns=torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    >>> round(float(loss), 4), metrics["accuracy"]  # (−log σ(1) − log σ(−1)) / 2
    (0.8133, 0.5)
    """

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        s, y = t.scores, t.returns
        wrong = (s.detach() > 0) != (y > 0.5)
        return (1 - y) * F.softplus(s) + y * F.softplus(-s), {"probability": s.detach().sigmoid(), "accuracy": ~wrong}

    return make_loss(terms, ("returns",), weigh, output="scores")
