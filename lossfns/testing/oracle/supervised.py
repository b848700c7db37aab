"""Likelihoods and distillation in plain floats."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lossfns.testing.oracle.rows import Row, Sequence, over_positions, over_tokens
from lossfns.testing.oracle.scalar import Number, Scalar, clamp, exp, expm1, log, ratio, stop, straight, total

Distribution = list[Number]
DEFAULT = "renormalised_support"
DEFAULT = "renormalised_support"


@over_tokens
def dft(s: Sequence) -> Iterator[Number]:
    """−sg(p)·lp (Wu et al. 2025)."""
    for lp in s.lp:
        yield -lp * stop(exp(lp))


@over_tokens
def sft_phi(s: Sequence) -> Iterator[Number]:
    """−sg(p·(1 − p))·lp (Zhang et al. 2025)."""
    for lp in s.lp:
        p = stop(exp(lp))
        yield -lp * (p * (1 - p))


def log_one_minus(lp: Scalar) -> Number:
    """log(1 − p), where 1 − p is at least 1e-15 and keeps its slope."""
    one_minus = -expm1(lp)
    return log(straight(max(one_minus.value, 1e-15), one_minus))


@over_tokens
def focal(s: Sequence, gamma: float = 2.0) -> Iterator[Number]:
    """−(1 − p)^γ·lp (Lin et al. 2017)."""
    for lp in s.lp:
        yield -lp * exp(log_one_minus(lp) * gamma)


@over_tokens
def unlikelihood(s: Sequence) -> Iterator[Number]:
    """−log(1 − p) (Welleck et al. 2020)."""
    for lp in s.lp:
        yield -log_one_minus(lp)


@over_tokens
def sampled_reverse_kl(s: Sequence, log_ratio_cap: float | None = 20.0) -> Iterator[Number]:
    """−r·(teacher − old) (Lu et al. 2025)."""
    for lp, old, teacher in zip(s.lp, s.old_logprobs, s.teacher_logprobs, strict=True):
        yield ratio(lp, old, log_ratio_cap) * (old - teacher)


def on_support(logprobs: Distribution, support: str) -> Distribution:
    """The logprobs as they are, divided by their sum, or with a last entry for all other tokens."""
    mass = total(exp(lp) for lp in logprobs)
    if support == "renormalised_support":
        return [lp - log(mass) for lp in logprobs]
    return [*logprobs, log(clamp(1 - mass, 1e-7, 1.0))] if support == "tail_support" else logprobs


def divergence(p: Distribution, q: Distribution) -> Scalar:
    """Σ exp(q)·(q − p)."""
    return total(exp(b) * (b - a) for a, b in zip(p, q, strict=True))


def mixture(p: Distribution, q: Distribution, beta: float) -> Distribution:
    """log(β·e^q + (1 − β)·e^p)."""
    return [log(exp(b) * beta + exp(a) * (1 - beta)) for a, b in zip(p, q, strict=True)]


def mixed(p: Distribution, q: Distribution, forward_share: float = 0.5) -> Number:
    """α·KL(q‖p) + (1 − α)·KL(p‖q)."""
    return divergence(p, q) * forward_share + divergence(q, p) * (1 - forward_share)


def jensen_shannon(p: Distribution, q: Distribution, beta: float = 0.5) -> Number:
    """β·KL(q‖m) + (1 − β)·KL(p‖m) (Agarwal et al. 2024)."""
    m = mixture(p, q, beta)
    return divergence(m, q) * beta + divergence(m, p) * (1 - beta)


def candidates(of: Callable[..., Number]) -> Callable[..., Number]:
    """Make the term of a position from a function of student and teacher on the support."""

    def term(lp: Distribution, columns: dict[str, Row], support: str = DEFAULT, **knobs: float) -> Number:
        return of(on_support(lp, support), on_support([*columns["teacher_logprobs"]], support), **knobs)

    return term


top_k_forward_kl = over_positions("top_k_forward_kl", candidates(divergence))
top_k_reverse_kl = over_positions("top_k_reverse_kl", candidates(lambda p, q: divergence(q, p)))
top_k_mixed_kl = over_positions("top_k_mixed_kl", candidates(mixed))
top_k_jsd = over_positions("top_k_jsd", candidates(jensen_shannon))
