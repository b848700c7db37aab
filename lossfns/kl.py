"""Estimators of a KL divergence from one sampled token: functions ``(logprobs, ref_logprobs) -> [N]``, in nats.

Symbols: d = lp − ref, x = −d. The value of an estimator and its gradient may belong to different divergences. Both may
change if the tokens come from another policy than π. The docstrings name the divergences, and docs/kl.md has a table,
which ``lossfns.testing.enumeration`` computes exactly. It takes an estimator of your own too.

k1, k2 and k3 are in ``lossfns.terms``: Schulman 2020, "Approximating KL divergence".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lossfns import terms as eq
from lossfns.checks import check_knobs
from lossfns.terms import k1, k2, k3

KL = Callable[[Tensor, Tensor], Tensor]
"""A function ``(logprobs, ref_logprobs) -> divergence of each token``."""


def k_abs(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """|lp − ref|. On-policy its gradient is that of Σ|π − ref|, twice the total variation; its value is no KL.

    The name in verl and SkyRL is "abs".
    """
    return (logprobs - ref_logprobs).abs()


def k_squared(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(lp − ref)², twice k2: on-policy its gradient is that of 2·KL(π‖ref); its value is no KL.

    prime-rl's default loss adds it relative to the sampler, with the weight ``kl_tau``: ``with_kl(loss, kl_beta=1e-3,
    kl=k_squared, kl_to="sampler_logprobs")``.
    """
    return (logprobs - ref_logprobs).square()


def k3_uncapped(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(x) − x − 1 with x = ref − lp: k3 without the cap of ±20, as in TRL and slime.

    Value and gradient are those of k3: on-policy KL(π‖ref), and the gradient of KL(ref‖π). Where exp overflows, the
    value is inf, and the loss refuses it.
    """
    x = ref_logprobs - logprobs
    overflows = x.detach().exp().isinf()
    return torch.where(overflows, torch.inf, torch.expm1(torch.where(overflows, 0, x)) - x)


def straight_through(value: KL, gradient: KL) -> KL:
    """Make the estimator with the value of one estimator and the gradient of another.

    verl's "k3+" caps the value of k3 at 10 and keeps the gradient of k2 everywhere:
    ``straight_through(value_capped(k3, 10.0), k2)``.

    >>> straight_through(k3, k2).__name__
    'kl.straight_through(k3, k2)'
    """
    check_knobs({"kl": value})
    check_knobs({"kl": gradient})

    def estimator(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return eq.straight_through(value(logprobs, ref_logprobs), gradient(logprobs, ref_logprobs))

    return with_name(estimator, f"kl.straight_through({name_of(value)}, {name_of(gradient)})")


def value_capped(kl: KL, cap: float) -> KL:
    """Make an estimator clamped to ±cap, whose gradient is 0 beyond. ``with_kl(kl_cap=)`` clamps after the weight.

    Args:
        kl: an estimator.
        cap: in nats, a finite number above 0. It is 10 in verl and SkyRL.

    >>> value_capped(k2, 10.0)(torch.tensor([-5.0, -1.0]), torch.tensor([0.0, -3.0]))
    tensor([10.,  2.])
    """
    check_knobs({"kl": kl, "cap": cap})

    def capped(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return eq.cap(kl(logprobs, ref_logprobs), cap)

    return with_name(capped, f"kl.value_capped({name_of(kl)}, {cap!r})")


def k1_plus(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The value of k1 with the gradient of k2: on-policy, value and gradient of KL(π‖ref).

    The name in verl is "k1+". Tang & Munos 2025 (arXiv:2506.09477) show why the gradient of k1 itself is no penalty.
    """
    return eq.straight_through(k1(logprobs, ref_logprobs), k2(logprobs, ref_logprobs))


def k3_plus(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The value of k3 with the gradient of k2: on-policy, value and gradient of KL(π‖ref).

    The name in verl is "k3+". verl also caps the value at 10: see ``straight_through``.
    """
    return eq.straight_through(k3(logprobs, ref_logprobs), k2(logprobs, ref_logprobs))


def log_ratio_capped(kl: KL, cap: float = 20.0) -> KL:
    """Make an estimator of d clamped to ±cap, whose gradient is 0 beyond.

    NeMo-RL clamps d to ±20 for every estimator, and open-instruct to ±40. k3 has a cap of 20 of its own.

    Args:
        kl: an estimator that depends on d alone, such as k2.
        cap: in nats, a finite number above 0.

    >>> log_ratio_capped(k2, 40.0)(torch.tensor([-50.0, -1.0]), torch.tensor([0.0, -3.0]))
    tensor([800.,   2.])
    """
    check_knobs({"kl": kl, "cap": cap})

    def capped(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        d = eq.cap(logprobs - ref_logprobs, cap)
        return kl(d, torch.zeros_like(d))

    return with_name(capped, f"kl.log_ratio_capped({name_of(kl)}, {cap!r})")


def swapped(kl: KL) -> KL:
    """Make the estimator with its two arguments exchanged: kl(ref, lp).

    If the tokens come from the reference itself, as with ``kl_to="sampler_logprobs"``, ``swapped(k3)`` has the value
    and the gradient of KL(sampler‖π).

    >>> swapped(k1)(torch.tensor(-1.0), torch.tensor(-3.0))
    tensor(-2.)
    """
    check_knobs({"kl": kl})

    def exchanged(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return kl(ref_logprobs, logprobs)

    return with_name(exchanged, f"kl.swapped({name_of(kl)})")


def larger_way(kl: KL) -> KL:
    """Make max(kl(lp, ref), kl(ref, lp)): the larger of the two directions.

    AReaL's "binary_kl" (KPop) is ``larger_way(binary_kl)``.

    >>> larger_way(k1)(torch.tensor(-3.0), torch.tensor(-1.0))
    tensor(2.)
    """
    check_knobs({"kl": kl})

    def larger(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return torch.maximum(kl(logprobs, ref_logprobs), kl(ref_logprobs, logprobs))

    return with_name(larger, f"kl.larger_way({name_of(kl)})")


def name_of(function: object) -> str:
    """Return the name of a function, or the ``repr`` of another callable."""
    return getattr(function, "__name__", repr(function))


def with_name(kl: KL, name: str) -> KL:
    """Give a function the name that ``repr`` of a loss shows for it."""
    kl.__name__ = kl.__qualname__ = name
    return kl


# Divergences between "this token" and "another token", which masks compare with a threshold


def binary_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """p·log(p/q) + (1−p)·log((1−p)/(1−q)), p = exp(lp), q = exp(ref): KL between "this token" and "another token".

    It is at most the KL over the vocabulary. DPPO (arXiv:2602.04879, equation 14). 1 − p has a floor of 1e-15.
    """
    p = logprobs.exp()
    rest, ref_rest = (torch.expm1(lp).neg().clamp(min=eq.ONE_MINUS_P_FLOOR) for lp in (logprobs, ref_logprobs))
    return p * (logprobs - ref_logprobs) + (1 - p) * (rest.log() - ref_rest.log())


def binary_tv(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """|exp(lp) − exp(ref)|: total variation between "this token" and "another token".

    It is at most the total variation over the vocabulary. DPPO (arXiv:2602.04879, equation 13).
    """
    return (logprobs.exp() - ref_logprobs.exp()).abs()


ESTIMATORS: dict[str, KL] = {f.__name__: f for f in (k1, k2, k3, k_abs, k_squared, k1_plus, k3_plus, k3_uncapped)}
"""The estimators of a penalty by name, as ``kl="k2"`` takes them."""
