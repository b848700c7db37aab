"""Correct losses with replaceable parts: what every mutant is, but for one expression.

A loss here reads its columns from the datums, blanks every slot of weight 0 before any maths, refuses rows of
another length than the logprobs, and takes its metrics to the host in one transfer. The baselines are contract
functions themselves; a mutant's ``like`` is that of the baseline it was made from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

import lossfns
from lossfns import terms as eq
from lossfns.errors import LossInputError
from lossfns.segments import active_mean, chosen, nonempty, rejected, to_tokens, weighted_mean, weighted_sum
from lossfns.tokens import Tokens
from lossfns.weigh import each_pair, weights_in_sequence

Data = Sequence[Any]
Logprobs = Sequence[Tensor]
Result = tuple[Tensor, dict[str, float]]
Clip = tuple[float, float]
Mean = tuple[Tensor, Tensor]  # a loss and the denominator in it
Row = Callable[[Any, str, Tensor], Tensor]
Read = Callable[[Data, Logprobs, Sequence[str]], Tokens]
Reduce = Callable[[Tokens, Tensor], Mean]
Report = Callable[..., Result]
Function = TypeVar("Function", bound=Callable[..., Any])

CLIP = (0.8, 1.2)
PPO = ("advantages", "old_logprobs")
GRPO = (*PPO, "ref_logprobs")
TIS = (*PPO, "sampler_logprobs")


def baseline(*, kind: str, like: Any) -> Callable[[Function], Function]:
    """Mark a correct loss: its kind, and the loss of the library that it equals."""

    def mark(function: Function) -> Function:
        vars(function).update(kind=kind, like=like)
        return function

    return mark


def mutant(bug: str, *, kind: str, like: Any, seen: str = "") -> Callable[[Function], Function]:
    """Mark a wrong loss: its bug's id, its kind, the loss it claims to be, and where such a bug was seen."""

    def mark(function: Function) -> Function:
        vars(function).update(bug=bug, kind=kind, like=like, seen=seen)
        return function

    return mark


# Reading a batch


def column(datum: Any, name: str) -> Tensor:
    """A datum's own values; they share its memory."""
    values: Tensor = datum.loss_fn_inputs[name].to_torch()
    return values


def checked(datum: Any, name: str, logprobs: Tensor) -> Tensor:
    """A datum's values in the logprobs' dtype, refused unless they have their shape."""
    values = column(datum, name)
    if values.shape != logprobs.shape:
        expected, got = f"shape {tuple(logprobs.shape)}, that of logprobs", f"shape {tuple(values.shape)}"
        raise LossInputError(name, expected, got, "Every row has the length of target_tokens.")
    return values.to(logprobs)


def packed(data: Data, logprobs_list: Logprobs, reads: Sequence[str], row: Row = checked) -> Tokens:
    """The batch laid end to end, in float32 at least, with whatever stands in its masked slots."""
    if not data or len(data) != len(logprobs_list):
        expected, got = "one tensor for each of the datums", f"{len(logprobs_list)} for {len(data)}"
        raise LossInputError("logprobs_list", expected, got, "Pass the datums of the same forward call.")
    rows = [lp.to(torch.promote_types(lp.dtype, torch.float32)) for lp in logprobs_list]

    def laid(name: str) -> Tensor:
        return torch.cat([row(datum, name, lp).flatten() for datum, lp in zip(data, rows)])

    lengths = torch.tensor([lp.numel() for lp in rows], device=rows[0].device)
    return Tokens(
        torch.cat([lp.flatten() for lp in rows]), laid("weights"), lengths, {name: laid(name) for name in reads}
    )


def blanked(t: Tokens) -> Tokens:
    """0 in every slot of weight 0."""
    columns = {name: torch.where(t.active, x, 0) for name, x in t.columns.items()}
    return Tokens(torch.where(t.active, t.logprobs, 0), t.weights, t.lengths, columns)


def masked(data: Data, logprobs_list: Logprobs, reads: Sequence[str], row: Row = checked) -> Tokens:
    """The batch laid end to end, its masked slots blanked."""
    return blanked(packed(data, logprobs_list, reads, row))


def lengths_of(logprobs_list: Logprobs) -> list[int]:
    """The number of entries of each datum, known on the host."""
    return [lp.numel() for lp in logprobs_list]


def each_sequence(t: Tokens, values: Tensor) -> Tensor:
    """A number of each sequence at each of its tokens."""
    return to_tokens(t, values.to(t.weights))


# Reducing and reporting


def token_mean(t: Tokens, x: Tensor) -> Mean:
    """Σ w·x / Σ w."""
    denominator = t.weights.sum()
    return (t.weights * x).sum() / denominator, denominator


def token_sum(t: Tokens, x: Tensor) -> Mean:
    """Σ w·x."""
    return (t.weights * x).sum(), t.weights.new_ones(())


def sequence_mean(t: Tokens, x: Tensor) -> Mean:
    """The mean over sequences of Σ w·x / Σ w."""
    denominator = nonempty(t).sum()
    return (weights_in_sequence(t) * x).sum() / denominator, denominator


def sequence_sum_mean(t: Tokens, x: Tensor) -> Mean:
    """The mean over sequences of Σ w·x."""
    denominator = nonempty(t).sum()
    return (t.weights * x).sum() / denominator, denominator


def pair_mean(t: Tokens, x: Tensor) -> Mean:
    """The mean over the pairs with two sides."""
    pairs = each_pair(t)
    return (pairs * x).sum() / pairs.sum(), pairs.sum()


def mean_of(active: Tensor, x: Tensor) -> Tensor:
    """The mean over the active rows."""
    return torch.where(active, x, 0).sum() / active.sum().clamp(min=1)


def report(
    active: Tensor,
    loss: Tensor,
    denominator: Tensor,
    rows: dict[str, Tensor],
    *,
    count: str = "tokens",
    mean: Callable[[Tensor, Tensor], Tensor] = mean_of,
) -> Result:
    """The loss and its metrics, in one transfer to the host."""
    means = {name: mean(active, x.detach().to(loss)) for name, x in rows.items()}
    device = {"loss": loss.detach(), "denominator": denominator, count: active.sum(), **means}
    metrics = dict(zip(device, torch.stack([x.to(loss.dtype) for x in device.values()]).tolist()))
    if metrics[count] == 0 or metrics["denominator"] <= 0:
        fix = "Skip a batch in which nothing is trained on."
        raise LossInputError("weights", "a denominator above 0", f"{metrics['denominator']:g}", fix)
    return loss, metrics


# Policy gradient


def capped_exp(d: Tensor) -> Tensor:
    """exp of a log-ratio, which is held within ±20."""
    return eq.cap(d, 20.0).exp()


def log_ratio(t: Tokens) -> Tensor:
    """d = lp − old."""
    return t.logprobs - t.old_logprobs


def mean_log_ratio(t: Tokens) -> Tensor:
    """The mean of d over the sequence's active tokens, at each of them."""
    return to_tokens(t, active_mean(t, log_ratio(t)))


def token_ratio(t: Tokens) -> Tensor:
    """r = exp(lp − old)."""
    return capped_exp(log_ratio(t))


def sequence_ratio(t: Tokens) -> Tensor:
    """s = exp(mean of d)."""
    return capped_exp(mean_log_ratio(t))


def sequence_ratio_by_token(t: Tokens) -> Tensor:
    """The value of s with each token's own gradient: sg(s)·exp(lp − sg(lp))."""
    return capped_exp(eq.straight_through(mean_log_ratio(t), t.logprobs))


def clipped(t: Tokens, r: Tensor, clip: Clip) -> Tensor:
    """−min(r·A, clip(r)·A)."""
    return -torch.minimum(r * t.advantages, r.clamp(*clip) * t.advantages)


def unclipped(t: Tokens, r: Tensor, clip: Clip) -> Tensor:
    """−r·A."""
    return -r * t.advantages


def weighted(t: Tokens, r: Tensor, clip: Clip) -> Tensor:
    """−sg(clip(r))·A·lp."""
    return -r.detach().clamp(*clip) * t.advantages * t.logprobs


def binding(t: Tokens, r: Tensor, clip: Clip) -> Tensor:
    """Where a bound removes the gradient."""
    low, high = clip
    return ((t.advantages < 0) & (r < low)) | ((t.advantages > 0) & (r > high))


def nowhere(t: Tokens, r: Tensor, clip: Clip) -> Tensor:
    """No bound removes a gradient."""
    return torch.zeros_like(t.active)


def k3(t: Tokens) -> Tensor:
    """exp(x) − x − 1 with x = ref − lp."""
    return eq.k3(t.logprobs, t.ref_logprobs)


def policy(
    data: Data,
    logprobs_list: Logprobs,
    *,
    clip: Clip = CLIP,
    reads: Sequence[str] = PPO,
    read: Read = masked,
    ratio: Callable[[Tokens], Tensor] = token_ratio,
    term: Callable[[Tokens, Tensor, Clip], Tensor] = clipped,
    penalty: Callable[[Tokens], Tensor] = lambda t: t.weights.new_zeros(()),
    reduce: Reduce = token_mean,
    binds: Callable[[Tokens, Tensor, Clip], Tensor] = binding,
    report: Report = report,
) -> Result:
    """The mean of term(r) over the tokens, and a penalty: PPO, if no part is replaced."""
    t = read(data, logprobs_list, reads)
    r = ratio(t)
    loss, denominator = reduce(t, term(t, r, clip))
    rows = {"ratio": r, "clip_frac": binds(t, r.detach(), clip)}
    if "ref_logprobs" in reads:
        rows["kl_ref"] = k3(t)
    return report(t.active, loss + penalty(t), denominator, rows)


def penalised(
    data: Data,
    logprobs_list: Logprobs,
    *,
    kl_beta: float,
    kl: Callable[[Tokens], Tensor] = k3,
    reduce_kl: Reduce = token_mean,
    **parts: Any,
) -> Result:
    """The policy loss and β·KL, in the same mean: GRPO, if no part is replaced."""
    return policy(data, logprobs_list, reads=GRPO, penalty=lambda t: kl_beta * reduce_kl(t, kl(t))[0], **parts)


@baseline(kind="policy", like=lossfns.ppo())
def ppo_loss(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """−min(r·A, clip(r)·A), token mean."""
    return policy(data, logprobs_list, clip=clip)


@baseline(kind="policy", like=lossfns.ppo(weigh=lossfns.sequence_mean))
def ppo_sequence_mean_loss(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """PPO, averaged within each sequence first."""
    return policy(data, logprobs_list, clip=clip, reduce=sequence_mean)


@baseline(kind="policy", like=lossfns.dapo())
def dapo_loss(data: Data, logprobs_list: Logprobs, *, clip: Clip = (0.8, 1.28)) -> Result:
    """PPO with a higher upper bound."""
    return policy(data, logprobs_list, clip=clip)


@baseline(kind="policy", like=lossfns.grpo(kl_beta=0.1))
def policy_loss(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, kl_beta: float = 0.1) -> Result:
    """PPO with β·k3 to a reference, token mean: GRPO."""
    return penalised(data, logprobs_list, clip=clip, kl_beta=kl_beta)


@baseline(kind="policy", like=lossfns.gspo(clip=CLIP))
def gspo_loss(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """One ratio for the sequence, the geometric mean of its tokens'."""
    return policy(data, logprobs_list, clip=clip, ratio=sequence_ratio, reduce=sequence_mean)


@baseline(kind="policy", like=lossfns.gspo_token(clip=CLIP))
def gspo_token_loss(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """GSPO's ratio in value, each token's own gradient."""
    return policy(data, logprobs_list, clip=clip, ratio=sequence_ratio_by_token, reduce=sequence_mean)


@baseline(kind="policy", like=lossfns.importance_sampling())
def importance_sampling_loss(data: Data, logprobs_list: Logprobs) -> Result:
    """−r·A, token mean."""
    return policy(data, logprobs_list, term=unclipped)


@baseline(kind="policy", like=lossfns.cispo(clip=CLIP))
def cispo_loss(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """−sg(clip(r))·A·lp, token mean."""
    return policy(data, logprobs_list, clip=clip, term=weighted, binds=nowhere)


def half_square(t: Tokens) -> Tensor:
    """½(lp − old)²."""
    return log_ratio(t).square() / 2


def reward(t: Tokens) -> Tensor:
    """A·lp."""
    return t.advantages * t.logprobs


def dro(
    data: Data,
    logprobs_list: Logprobs,
    *,
    beta: float,
    reward: Callable[[Tokens], Tensor] = reward,
    penalty: Callable[[Tokens], Tensor] = half_square,
) -> Result:
    """The mean of β·penalty − reward over the tokens: DRO, if no part is replaced."""
    t = masked(data, logprobs_list, PPO)
    return report(t.active, *token_mean(t, beta * penalty(t) - reward(t)), {"log_ratio_abs": log_ratio(t).abs()})


@baseline(kind="policy", like=lossfns.dro(beta=0.5))
def dro_loss(data: Data, logprobs_list: Logprobs, *, beta: float = 0.5) -> Result:
    """−(A·lp − ½β(lp − old)²), token mean."""
    return dro(data, logprobs_list, beta=beta)


@baseline(kind="policy", like=lossfns.reinforce())
def reinforce_loss(data: Data, logprobs_list: Logprobs) -> Result:
    """−A·lp, token mean."""
    return reinforce(data, logprobs_list)


def reinforce(
    data: Data, logprobs_list: Logprobs, term: Callable[[Tokens], Tensor] = lambda t: -t.advantages * t.logprobs
) -> Result:
    """The mean of a term that knows no old policy."""
    t = masked(data, logprobs_list, ("advantages",))
    return report(t.active, *token_mean(t, term(t)), {"nll": -t.logprobs})


@baseline(kind="policy", like=lossfns.ppo(dual_clip=3.0))
def dual_clip_loss(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, dual_clip: float = 3.0) -> Result:
    """PPO, at most −c·A where A < 0."""
    return policy(
        data,
        logprobs_list,
        clip=clip,
        term=lambda t, r, clip: eq.dual_clipped(clipped(t, r, clip), t.advantages, dual_clip),
    )


@baseline(kind="policy", like=lossfns.with_tis(lossfns.ppo(), cap=2.0))
def tis_loss(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, cap: float = 2.0) -> Result:
    """PPO with min(exp(old − sampler), cap) at each token."""
    return corrected(
        data, logprobs_list, clip, lambda t: eq.importance_weight(t.old_logprobs - t.sampler_logprobs, cap)
    )


def corrected(data: Data, logprobs_list: Logprobs, clip: Clip, weight: Callable[[Tokens], Tensor]) -> Result:
    """PPO with a constant weight at each token."""
    return policy(data, logprobs_list, clip=clip, reads=TIS, term=lambda t, r, clip: weight(t) * clipped(t, r, clip))


# Likelihood


def supervised(
    data: Data,
    logprobs_list: Logprobs,
    *,
    rank: int = 1,
    read: Read = masked,
    term: Callable[[Tokens], Tensor] = lambda t: -t.logprobs,
    reduce: Reduce = token_mean,
    report: Report = report,
) -> Result:
    """The mean of −lp over the targets, of which a position has one (``[N]``) or, at rank 2, K (``[N, K]``)."""
    if any(lp.ndim != rank for lp in logprobs_list):
        got = f"shapes {[tuple(lp.shape) for lp in logprobs_list]}"
        raise LossInputError("logprobs_list", f"{rank} dimensions", got, "A position has one target, or K.")
    t = read(data, logprobs_list, ())
    loss, denominator = reduce(t, term(t))
    return report(t.active, loss, denominator, {"nll": -t.logprobs})


multi_target = partial(supervised, rank=2)


@baseline(kind="supervised", like=lossfns.cross_entropy())
def cross_entropy_loss(data: Data, logprobs_list: Logprobs) -> Result:
    """−Σ w·lp / Σ w."""
    return supervised(data, logprobs_list)


@baseline(kind="supervised", like=lossfns.cross_entropy(weigh=lossfns.token_sum))
def cross_entropy_sum_loss(data: Data, logprobs_list: Logprobs) -> Result:
    """−Σ w·lp, for weights of either sign."""
    return supervised(data, logprobs_list, reduce=token_sum)


@baseline(kind="supervised", like=lossfns.cross_entropy(weigh=lossfns.sequence_mean))
def cross_entropy_sequence_mean_loss(data: Data, logprobs_list: Logprobs) -> Result:
    """The mean over sequences of −Σ w·lp / Σ w."""
    return supervised(data, logprobs_list, reduce=sequence_mean)


@baseline(kind="supervised", like=lossfns.cross_entropy(weigh=lossfns.sequence_sum_mean))
def cross_entropy_sequence_sum_loss(data: Data, logprobs_list: Logprobs) -> Result:
    """The mean over sequences of −Σ w·lp."""
    return supervised(data, logprobs_list, reduce=sequence_sum_mean)


@baseline(kind="supervised", like=lossfns.multi_target_cross_entropy())
def multi_target_loss(data: Data, logprobs_list: Logprobs) -> Result:
    """−Σ w·lp / Σ w over the K targets of every position."""
    return multi_target(data, logprobs_list)


# Preference


def check_pairs(data: Data) -> None:
    """Refuse a batch whose datums do not make pairs."""
    if len(data) % 2:
        fix = "Interleave them: 2i chosen, 2i + 1 rejected."
        raise LossInputError("data", "chosen/rejected pairs", f"{len(data)} datums, an odd number", fix)


Sides = Callable[[Tensor], tuple[Tensor, Tensor]]


def neighbours(h: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen 2i and rejected 2i + 1."""
    return chosen(h), rejected(h)


def log_policy_ratio(t: Tokens) -> Tensor:
    """Σ w·(lp − ref) of each sequence."""
    return weighted_sum(t, t.logprobs - t.ref_logprobs)


def dpo(
    data: Data,
    logprobs_list: Logprobs,
    *,
    beta: float,
    label_smoothing: float,
    read: Read = masked,
    score: Callable[[Tokens], Tensor] = log_policy_ratio,
    sides: Sides = neighbours,
    margin: Callable[[Tensor, Tensor], Tensor] = torch.sub,
    term: Callable[[Tensor, float, float], Tensor] = eq.preference,
    reduce: Reduce = pair_mean,
    report: Report = report,
) -> Result:
    """−log σ(β·m), m the chosen's score less the rejected's, mean over pairs."""
    check_pairs(data)
    t = read(data, logprobs_list, ("ref_logprobs",))
    m = margin(*sides(score(t)))
    loss, denominator = reduce(t, term(m, beta, label_smoothing))
    rows = {"margin": m, "reward_margin": beta * m, "accuracy": (m.sign() + 1) / 2}
    return report(each_pair(t) > 0, loss, denominator, rows, count="pairs")


@baseline(kind="preference", like=lossfns.dpo())
def dpo_loss(data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Result:
    """−log σ(β·m), m of weighted sums against the reference."""
    return dpo(data, logprobs_list, beta=beta, label_smoothing=label_smoothing)


def mean_logprob(t: Tokens) -> Tensor:
    """Σ w·lp / Σ w of each sequence; an empty one, which no pair counts, stays away from p = 1."""
    return torch.where(nonempty(t), weighted_mean(t, t.logprobs), -1.0)


def orpo(
    data: Data,
    logprobs_list: Logprobs,
    *,
    lam: float,
    read: Read = masked,
    score: Callable[[Tokens], Tensor] = mean_logprob,
    sides: Sides = neighbours,
    log_odds: Callable[[Tensor], Tensor] = eq.log_odds,
    odds_ratio: Callable[[Tensor], Tensor] = eq.odds_ratio,
    reduce: Reduce = pair_mean,
    report: Report = report,
) -> Result:
    """−a_w − λ·log σ(log-odds(a_w) − log-odds(a_l)), a the sequence's mean logprob, mean over pairs."""
    check_pairs(data)
    t = read(data, logprobs_list, ())
    a_w, a_l = sides(score(t))
    difference = log_odds(a_w) - log_odds(a_l)
    loss, denominator = reduce(t, -a_w + lam * odds_ratio(difference))
    rows = {"nll": -a_w, "log_odds_ratio": difference, "accuracy": (difference.sign() + 1) / 2}
    return report(each_pair(t) > 0, loss, denominator, rows, count="pairs")


@baseline(kind="preference", like=lossfns.orpo())
def orpo_loss(data: Data, logprobs_list: Logprobs, *, lam: float = 0.1) -> Result:
    """The chosen's mean negative log-likelihood and λ times the odds-ratio term."""
    return orpo(data, logprobs_list, lam=lam)


# Advantages


def peers_of(rewards: list[float], groups: list[Hashable]) -> list[list[float]]:
    """For each sample the rewards of its group."""
    return [[r for r, group in zip(rewards, groups, strict=True) if group == own] for own in groups]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """The standard deviation with n − 1 below."""
    centre = mean(values)
    return math.sqrt(math.fsum((x - centre) ** 2 for x in values) / (len(values) - 1))


def standardised(reward: float, peers: list[float]) -> float:
    """(r − mean) / (std + 1e-6), and exactly 0 where all rewards are equal."""
    return 0.0 if max(peers) == min(peers) else (reward - mean(peers)) / (deviation(peers) + 1e-6)


def advantages(
    rewards: list[float],
    groups: list[Hashable],
    *,
    peers: Callable[[list[float], list[Hashable]], list[list[float]]] = peers_of,
    advantage: Callable[[float, list[float]], float] = standardised,
) -> list[float]:
    """Each reward against those of its group."""
    return [advantage(reward, own) for reward, own in zip(rewards, peers(rewards, groups), strict=True)]


@baseline(kind="advantages", like=lossfns.group_advantages)
def group_advantages(rewards: list[float], groups: list[Hashable]) -> list[float]:
    """(r − group mean) / (group std + 1e-6)."""
    return advantages(rewards, groups)
