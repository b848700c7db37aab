"""The parts of preference losses: rewards of sequences, links of margins, and comparisons within a group of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lossfns import terms as eq
from lossfns.checks import check_knobs
from lossfns.errors import LossInputError, did_you_mean, show
from lossfns.segments import (
    active_counts,
    both_sides,
    chosen,
    nonempty,
    positions,
    rejected,
    sequence_value,
    to_tokens,
    weighted_mean,
    weighted_sum,
)
from lossfns.tokens import Tokens

Link = Callable[[Tensor], Tensor]
"""A function ``h -> loss`` of the margin h = β·m of each pair."""

REFERENCE = ("ref_logprobs",)
EXPONENT_CAP = eq.KL_LOG_RATIO_CAP
"""Bound of the exponents in rewards and links, as in k3."""


@dataclass(frozen=True, repr=False)
class Reward:
    """The implicit reward of a sequence, before β: a function with a name.

    Attributes:
        name: the name that ``repr`` shows.
        of: ``t -> reward of each sequence``, ``[B]``.
        reads: the columns that it reads besides logprobs and weights.

    >>> from lossfns.segments import weighted_sum
    >>> half = Reward("half", lambda t: weighted_sum(t, t.logprobs) / 2)
    >>> half, half.reads
    (half, ())
    """

    name: str
    of: Callable[[Tokens], Tensor]
    reads: tuple[str, ...] = ()

    def __call__(self, t: Tokens) -> Tensor:
        return self.of(t)

    def __repr__(self) -> str:
        return self.name

    @property
    def __name__(self) -> str:
        return self.name


def sum_of_log_ratios(t: Tokens) -> Tensor:
    """Σ w·(lp − ref)."""
    return weighted_sum(t, t.logprobs - t.ref_logprobs)


def mean_of_log_ratios(t: Tokens) -> Tensor:
    """Σ w·(lp − ref) / Σ w."""
    return weighted_mean(t, t.logprobs - t.ref_logprobs)


def sum_of_logprobs(t: Tokens) -> Tensor:
    """Σ w·lp."""
    return weighted_sum(t, t.logprobs)


def mean_of_logprobs(t: Tokens) -> Tensor:
    """Σ w·lp / Σ w."""
    return weighted_mean(t, t.logprobs)


def log_odds_of_mean(t: Tokens) -> Tensor:
    """log(p / (1 − p)) with log p = Σ w·lp / Σ w."""
    return eq.log_odds(mean_of_logprobs(t))


def power_of_ratio(t: Tokens, alpha: float) -> Tensor:
    """(1 − u^−α)/α at u = exp(Σ w·(lp − ref)), with the exponent capped at ±20."""
    return -torch.expm1(-eq.cap(alpha * sum_of_log_ratios(t), EXPONENT_CAP)) / alpha


def log_of_mixture(t: Tokens) -> Tensor:
    """log(2u / (1 + u)) at u = exp(Σ w·(lp − ref))."""
    return math.log(2) + F.logsigmoid(sum_of_log_ratios(t))


log_ratio_sum = Reward("log_ratio_sum", sum_of_log_ratios, REFERENCE)
"""Σ w·(lp − ref), the reward of DPO."""

log_ratio_mean = Reward("log_ratio_mean", mean_of_log_ratios, REFERENCE)
"""Σ w·(lp − ref) / Σ w, the length-normalised reward."""

logprob_sum = Reward("logprob_sum", sum_of_logprobs)
"""Σ w·lp, the reward of CPO. It reads no reference."""

logprob_mean = Reward("logprob_mean", mean_of_logprobs)
"""Σ w·lp / Σ w, the reward of SimPO. It reads no reference."""

log_odds_mean = Reward("log_odds_mean", log_odds_of_mean)
"""log(p / (1 − p)) with log p = Σ w·lp / Σ w, the reward of ORPO. It reads no reference."""

forward_kl_reward = Reward("forward_kl_reward", partial(power_of_ratio, alpha=1.0), REFERENCE)
"""f′(u) = 1 − 1/u at u = exp(Σ w·(lp − ref)): the forward KL. The log-ratio is capped at ±20."""

js_reward = Reward("js_reward", log_of_mixture, REFERENCE)
"""f′(u) = log(2u / (1 + u)) at u = exp(Σ w·(lp − ref)): the Jensen-Shannon divergence."""


def alpha_reward(alpha: float) -> Reward:
    """f′(u) = (1 − u^−α)/α at u = exp(Σ w·(lp − ref)): the α-divergence. α times the log-ratio is capped at ±20.

    At α → 0 it is the reverse KL of DPO, at α = 1 the forward KL. TRL's ``f_alpha_divergence_coef`` is 1 − α.

    Args:
        alpha: α, a finite number above 0.

    >>> alpha_reward(0.5)
    alpha_reward(0.5)
    """
    check_knobs({"divergence_alpha": alpha})
    return Reward(f"alpha_reward({alpha!r})", partial(power_of_ratio, alpha=alpha), REFERENCE)


def desensitised(t: Tokens, tail: float) -> Tensor:
    """Σ w·(lp − ref), in which the tokens beyond the length of the pair's shorter side are multiplied by ``tail``."""
    lengths = active_counts(t)
    common = both_sides(t, torch.minimum(chosen(t, lengths), rejected(t, lengths)))
    share = eq.select(positions(t) > to_tokens(t, common), tail, 1.0, like=t.weights)
    return weighted_sum(t, share * (t.logprobs - t.ref_logprobs))


def logistic_link(h: Tensor) -> Tensor:
    """−log σ(h), the link of DPO."""
    return -F.logsigmoid(h)


def hinge_link(h: Tensor) -> Tensor:
    """max(0, 1 − h), the link of SLiC."""
    return F.relu(1 - h)


def squared_link(h: Tensor) -> Tensor:
    """(1 − h)², the link of IPO."""
    return (1 - h).square()


def exponential_link(h: Tensor) -> Tensor:
    """exp(−h), with h capped at ±20."""
    return (-eq.cap(h, EXPONENT_CAP)).exp()


def truncated_quadratic_link(h: Tensor) -> Tensor:
    """max(0, 1 − h)²."""
    return F.relu(1 - h).square()


def savage_link(h: Tensor) -> Tensor:
    """1 / (1 + exp(h))²."""
    return torch.sigmoid(-h).square()


def smoothed(link: Link, label_smoothing: float) -> Link:
    """(1 − ε)·f(h) + ε·f(−h): the expected loss if a label is the wrong way round with probability ε."""
    return lambda h: (1 - label_smoothing) * link(h) + label_smoothing * link(-h)


REWARDS: dict[str, Reward] = {
    reward.name: reward
    for reward in (
        log_ratio_sum,
        log_ratio_mean,
        logprob_sum,
        logprob_mean,
        log_odds_mean,
        forward_kl_reward,
        js_reward,
    )
}
LINKS: dict[str, Link] = {
    link.__name__: link
    for link in (
        logistic_link,
        hinge_link,
        squared_link,
        exponential_link,
        truncated_quadratic_link,
        savage_link,
    )
}


def check_reward(knob: str, reward: object) -> None:
    """Refuse anything but a reward."""
    if not isinstance(reward, Reward):
        fix = f"{did_you_mean(str(reward), REWARDS)} Wrap a function of your own: Reward(name, function, reads)."
        raise LossInputError(knob, "a reward such as log_ratio_mean", show(reward), fix)


def pair_number(t: Tokens, x: Tensor) -> Tensor:
    """The value for each pair of a column with one number for each datum, read on the chosen side: ``[N] -> [P]``."""
    return chosen(t, sequence_value(t, x))


def pair_groups(t: Tokens) -> Tensor:
    """The label of each pair's group: ``[P]``. Pairs without an active token form one group, whose label is ∞."""
    return torch.where(chosen(t, nonempty(t)), pair_number(t, t.groups), torch.inf)


def group_numbers(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number the groups of pairs.

    Returns:
        The indices of the pairs, sorted by group; the number of each pair's group; and the size of each group, 0 for
        numbers that no group has. Each is ``[P]``.
    """
    order = labels.argsort(stable=True)
    sorted_labels = labels[order]
    starts = torch.cat([torch.zeros_like(labels[:1], dtype=torch.bool), sorted_labels[1:] != sorted_labels[:-1]])
    numbers = torch.zeros_like(order).scatter(0, order, starts.cumsum(0))
    return order, numbers, torch.zeros_like(order).scatter_add(0, numbers, torch.ones_like(order))


def over_pairs(labels: Tensor, y: Tensor, reduce: str) -> Tensor:
    """The sum or the maximum of y, as ``reduce`` says, over the group of each pair: ``[P] -> [P]``."""
    order, numbers, sizes = group_numbers(labels)
    return torch.segment_reduce(y[order], reduce, lengths=sizes, unsafe=True)[numbers]


def group_size(labels: Tensor, like: Tensor) -> Tensor:
    """The number of pairs in the group of each pair, in the dtype of ``like``: ``[P]``."""
    _, numbers, sizes = group_numbers(labels)
    return sizes[numbers].to(like.dtype)


def group_mean(labels: Tensor, y: Tensor) -> Tensor:
    """The mean of y over the group of each pair: ``[P] -> [P]``."""
    return over_pairs(labels, y, "sum") / group_size(labels, like=y)


def group_log_mean_exp(labels: Tensor, y: Tensor) -> Tensor:
    """log of the mean of exp(y) over the group of each pair: ``[P] -> [P]``."""
    largest = over_pairs(labels, y.detach(), "max")
    return group_mean(labels, (y - largest).exp()).log() + largest


def in_order(labels: Tensor, y: Tensor) -> Tensor:
    """The indices of the pairs, sorted by group and, within a group, by y. Equal values keep their order: ``[P]``."""
    by_value = y.detach().argsort(stable=True)
    return by_value[labels[by_value].argsort(stable=True)]


def same_rank(labels: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """For each pair the y of its group whose rank equals the rank of the pair's x: ``[P] -> [P]``."""
    return torch.zeros_like(y).scatter(0, in_order(labels, x), y[in_order(labels, y)])
