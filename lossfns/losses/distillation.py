"""Distillation: losses towards a teacher's distribution, on K candidates of each position or on the sampled token.

Over candidates, logprobs, weights and ``teacher_logprobs`` are ``[N, K]``: the teacher's K most probable tokens, or the
student's. Weights are those of the positions, repeated for each candidate; an unused slot has weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lossfns import terms as eq
from lossfns.errors import LossInputError
from lossfns.loss import Loss, Statistics
from lossfns.losses.ratio import ratio_loss
from lossfns.preset import FUNCTIONS_BY_NAME, make_loss, preset
from lossfns.segments import token_level
from lossfns.statistics import OnDemand
from lossfns.tokens import TARGETS, Tokens, to_dtype
from lossfns.weigh import Weighing, by_position, check_targets, token_mean

Support = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""A function ``(logprobs [n, K], active [n, K]) -> (log-distribution [n, M], mask [n, M])``."""
Divergence = Callable[[Tensor, Tensor], Tensor]
"""A function ``(log p [n, M], log q [n, M]) -> part of each entry [n, M]``: p is the student's, q the teacher's."""

IMPOSSIBLE = -1e30
"""The logprob of an unused slot. It is finite because logsumexp has no gradient if all its inputs are −inf."""

TAIL_FLOOR = 1e-7
"""Smallest probability of the tail. The rounding of K float32 logprobs is about as large."""


def raw_support(logprobs: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the K probabilities, whose sum is at most 1."""
    return logprobs, active


def renormalised_support(logprobs: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Divide the K probabilities by their sum, for the teacher and for the student."""
    log_mass = torch.where(active, logprobs, IMPOSSIBLE).logsumexp(1, keepdim=True)
    # The exponential of an unused slot, which holds 0, must not overflow where all others are almost impossible.
    return torch.where(active, logprobs - log_mass, 0), active


def tail_support(logprobs: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Add one entry for all other tokens, with the probability 1 − Σ p, at least 1e-7."""
    mass = (logprobs.exp() * to_dtype(active, logprobs.dtype)).sum(1, keepdim=True)
    tail = (1 - mass).clamp(min=TAIL_FLOOR).log()
    return torch.cat([logprobs, tail], 1), torch.cat([active, active.any(1, keepdim=True)], 1)


FUNCTIONS_BY_NAME["support"] = {f.__name__: f for f in (raw_support, renormalised_support, tail_support)}


def forward(log_p: Tensor, log_q: Tensor) -> Tensor:
    """q·(log q − log p)."""
    return log_q.exp() * (log_q - log_p)


def reverse(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p·(log p − log q)."""
    return log_p.exp() * (log_p - log_q)


def mixed(log_p: Tensor, log_q: Tensor, forward_share: float) -> Tensor:
    """α·q·(log q − log p) + (1 − α)·p·(log p − log q)."""
    return forward_share * forward(log_p, log_q) + (1 - forward_share) * reverse(log_p, log_q)


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """β·q·(log q − log m) + (1 − β)·p·(log p − log m), with m = β·q + (1 − β)·p."""
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    return beta * forward(log_m, log_q) + (1 - beta) * forward(log_m, log_p)


def candidate_loss(divergence: Divergence, support: Support, weigh: Weighing) -> Loss:
    """Make the loss that sums a divergence over the candidates of each position."""

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        check_targets(t)
        active = t.active.view(-1, t.targets)
        log_p, mask = support(t.logprobs.view(-1, t.targets), active)
        log_q, _ = support(t.teacher_logprobs.view(-1, t.targets), active)
        total = torch.where(mask, divergence(log_p, log_q), 0).sum(1)

        def at_entries(y: Tensor) -> Tensor:
            return y[:, None].expand(-1, t.targets).flatten()

        def mass(logprobs: Tensor) -> Tensor:
            p = logprobs.detach().exp() * to_dtype(t.active, logprobs.dtype)
            return at_entries(p.view(-1, t.targets).sum(1))

        statistics = OnDemand(
            divergence=lambda: at_entries(total.detach()),
            student_mass=lambda: mass(t.logprobs),
            teacher_mass=lambda: mass(t.teacher_logprobs),
        )
        return at_entries(total), statistics

    return make_loss(terms, ("teacher_logprobs",), by_position(weigh), rows=TARGETS)


@preset
def top_k_forward_kl(support: Support = renormalised_support, weigh: Weighing = token_mean) -> Loss:
    """Σ_k q_k·(log q_k − log p_k) over K candidates: KL(teacher‖student), which covers every mode of the teacher.

    Hinton et al. 2015 (arXiv:1503.02531), restricted to K tokens. With ``raw_support`` its gradient is that of
    ``multi_target_cross_entropy`` with the teacher's probabilities as weights.

    Args:
        support: what to do with the tokens beyond the candidates: ``renormalised_support``, ``raw_support`` or
            ``tail_support``.
        weigh: how positions count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.

    Reads ``teacher_logprobs`` ``[N, K]``; ``datum_from_candidates`` makes such datums. Statistics, means over active
    entries:

        divergence: the divergence of the entry's position, in nats.
        student_mass: Σ p over the active candidates of the position, in [0, 1].
        teacher_mass: Σ q over the active candidates of the position, in [0, 1].

    >>> import torch
    >>> logprobs = torch.tensor([[[0.5, 0.25]]]).log()
    >>> teacher = torch.tensor([[[0.25, 0.5]]]).log()
    >>> loss, _ = top_k_forward_kl().padded(logprobs, torch.ones(1, 1, 2), teacher_logprobs=teacher)
    >>> round(float(loss), 4)  # (1/3)·log ½ + (2/3)·log 2
    0.231
    """
    return candidate_loss(forward, support, weigh)


@preset
def top_k_reverse_kl(support: Support = renormalised_support, weigh: Weighing = token_mean) -> Loss:
    """Σ_k p_k·(log p_k − log q_k) over K candidates: KL(student‖teacher), which seeks one mode of the teacher.

    Gu et al. 2024, "MiniLLM" (arXiv:2306.08543), for single steps and restricted to K tokens.

    Args:
        support: what to do with the tokens beyond the candidates: ``renormalised_support``, ``raw_support`` or
            ``tail_support``.
        weigh: how positions count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.

    Reads ``teacher_logprobs`` ``[N, K]``; ``datum_from_candidates`` makes such datums. Statistics, means over active
    entries:

        divergence: the divergence of the entry's position, in nats.
        student_mass: Σ p over the active candidates of the position, in [0, 1].
        teacher_mass: Σ q over the active candidates of the position, in [0, 1].

    >>> top_k_reverse_kl(support="tail_support")
    top_k_reverse_kl(support=tail_support, weigh=token_mean)
    """
    return candidate_loss(reverse, support, weigh)


@preset
def top_k_mixed_kl(
    forward_share: float = 0.5, support: Support = renormalised_support, weigh: Weighing = token_mean
) -> Loss:
    """α·KL(teacher‖student) + (1 − α)·KL(student‖teacher) over K candidates, as NeMo-RL's mixed KL.

    Args:
        forward_share: α, in [0, 1].
        support: what to do with the tokens beyond the candidates: ``renormalised_support``, ``raw_support`` or
            ``tail_support``.
        weigh: how positions count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.

    Reads ``teacher_logprobs`` ``[N, K]``; ``datum_from_candidates`` makes such datums. Statistics, means over active
    entries:

        divergence: the divergence of the entry's position, in nats.
        student_mass: Σ p over the active candidates of the position, in [0, 1].
        teacher_mass: Σ q over the active candidates of the position, in [0, 1].

    >>> top_k_mixed_kl().reads
    ('teacher_logprobs',)
    """
    return candidate_loss(partial(mixed, forward_share=forward_share), support, weigh)


@preset
def top_k_jsd(beta: float = 0.5, support: Support = renormalised_support, weigh: Weighing = token_mean) -> Loss:
    """β·KL(teacher‖M) + (1 − β)·KL(student‖M) over K candidates, with M = β·teacher + (1 − β)·student.

    Agarwal et al. 2024, GKD (arXiv:2306.13649), equation 1. As β → 0, the gradient divided by β approaches that of the
    forward KL; as β → 1, the gradient divided by 1 − β approaches that of the reverse KL. At β = 0 and β = 1, TRL and
    Liger have the forward and the reverse KL themselves.

    Args:
        beta: β, above 0 and below 1.
        support: what to do with the tokens beyond the candidates: ``renormalised_support``, ``raw_support`` or
            ``tail_support``.
        weigh: how positions count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.

    Reads ``teacher_logprobs`` ``[N, K]``; ``datum_from_candidates`` makes such datums. Statistics, means over active
    entries:

        divergence: the divergence of the entry's position, in nats.
        student_mass: Σ p over the active candidates of the position, in [0, 1].
        teacher_mass: Σ q over the active candidates of the position, in [0, 1].

    >>> top_k_jsd(beta=0.9).knobs["beta"]
    0.9
    """
    if not beta < 1:
        fix = "At 0 use top_k_forward_kl, at 1 top_k_reverse_kl."
        raise LossInputError("beta", "a number between 0 and 1", f"{beta!r}", fix)
    return candidate_loss(partial(jensen_shannon, beta=beta), support, weigh)


@preset
def sampled_reverse_kl(weigh: Weighing = token_mean, log_ratio_cap: float | None = 20.0) -> Loss:
    """−r·(teacher − old): on-policy distillation, with the teacher's log-ratio as the advantage of each sampled token.

    Lu et al. 2025, "On-Policy Distillation" (Thinking Machines), as in tinker_cookbook with a coefficient of 1. On
    samples of the student its expected gradient is that of KL(student‖teacher) of the next token.

    Args:
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.
        log_ratio_cap: bound of |lp − old| before the exponential, above 0; ``None`` is the paper's uncapped form.

    Reads ``teacher_logprobs`` ``[N]`` and ``old_logprobs``, those of the student that sampled. Statistics, means over
    active tokens:

        ratio: mean r, above 0; 1 on-policy.
        ratio_capped: share of tokens with |log-ratio| above the cap, in [0, 1].
        log_ratio_abs: mean |lp − old|, in nats.
        kl_old: k3 estimate of KL(old‖π) by token, in nats, at least 0.
        kl_teacher: mean old − teacher, the k1 estimate of KL(old‖teacher) by token, in nats.

    >>> sampled_reverse_kl().reads
    ('teacher_logprobs', 'old_logprobs')
    """

    def surrogate(t: Tokens, ratio: Tensor) -> Tensor:
        return eq.surrogate(ratio, t.teacher_logprobs - t.old_logprobs)

    def statistics(t: Tokens, ratio: Tensor) -> Statistics:
        return OnDemand(kl_teacher=lambda: t.old_logprobs - t.teacher_logprobs)

    return ratio_loss(token_level, surrogate, weigh, log_ratio_cap, statistics, signal="teacher_logprobs")
