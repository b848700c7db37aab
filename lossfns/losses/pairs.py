"""Losses of pairs, the part that the preference presets share: a reward of each side, and a term of the two rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from lossfns.loss import Loss, Statistics
from lossfns.margins import Link, Reward, check_reward
from lossfns.preset import make_loss
from lossfns.segments import chosen, rejected
from lossfns.statistics import OnDemand
from lossfns.tokens import PAIRS, Tokens
from lossfns.weigh import Weighing

PairTerm = Callable[[Tokens, Tensor, Tensor], Tensor | tuple[Tensor, Statistics]]
"""A function ``(t, c [P], r [P]) -> loss of each pair [P]``, where c and r are the rewards of the two sides.

It may also return ``(loss, statistics)``.
"""


def accuracy(difference: Tensor) -> Tensor:
    """1 where the difference is positive, ½ where it is 0, else 0."""
    return (difference.detach().sign() + 1) / 2


def of_margin(link: Link, beta: float = 1.0) -> PairTerm:
    """link(β·(c − r)): a term that depends on the margin alone."""
    return lambda t, c, r: link(beta * (c - r))


def pair_loss(
    term: PairTerm,
    reward: Reward,
    beta: float,
    weigh: Weighing,
    reads: Sequence[str] = (),
    output: str = "logprobs",
) -> Loss:
    """term(t, c, r) of each pair, with c and r the rewards of its chosen and of its rejected side, before β.

    The loss reads the columns of the reward, and ``reads``. ``beta`` scales the statistics alone: the term applies its
    own.
    """
    check_reward("reward", reward)

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        rewards = reward(t)
        c, r = chosen(t, rewards), rejected(t, rewards)
        plain_c, plain_r = c.detach(), r.detach()
        statistics = OnDemand(
            margin=lambda: plain_c - plain_r,
            reward_margin=lambda: beta * (plain_c - plain_r),
            chosen_reward=lambda: beta * plain_c,
            rejected_reward=lambda: beta * plain_r,
            accuracy=lambda: accuracy(plain_c - plain_r),
        )
        result = term(t, c, r)
        loss, more = result if isinstance(result, tuple) else (result, {})
        return loss, statistics | more

    return make_loss(terms, tuple(dict.fromkeys((*reward.reads, *reads))), weigh, rows=PAIRS, output=output)
