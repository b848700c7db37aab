"""Advantages of tokens: returns to go, GAE, REINFORCE++, whitening, and KL penalties.

Columns have one number for each token. They come as padded rows, a tensor or array ``[B, T]``, or as a list with one
row for each datum, of any lengths. The active tokens are those whose weight in ``weights`` is not 0. ``weights`` has
the form of the columns, and the result has the same form: a tensor ``[B, T]``, or a list of tensors. All results are
float64, without graph, on the device of the weights, and 0 at tokens that are not active. Values of a column at such
tokens are never read.

A token that is not active, such as one that a tool wrote, is skipped: the next token is the next active one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lossfns.advantages.rows import Columns, TokenRows, parse_token_rows
from lossfns.advantages.samples import as_fraction, as_number, check_choice, check_scaling, parse_rewards
from lossfns.errors import LossInputError, show
from lossfns.terms import k1, k2, k3

ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def token_rewards(rewards: Any, weights: Columns, penalties: Columns | None = None) -> Tensor | list[Tensor]:
    """Put the reward of each sample at its last active token, and add penalties.

    Args:
        rewards: ``[B]`` finite numbers.
        weights: ``[B, T]`` or rows; active tokens have a weight other than 0. A sample without one loses its reward.
        penalties: numbers to add at each active token, such as ``kl_penalties(...)``.

    Returns:
        Rewards of tokens, in the form of the weights.

    Raises:
        LossInputError: if a number is not finite, or if there is not one reward for each row.

    >>> token_rewards([1.0, 2.0], torch.tensor([[1, 1, 0], [1, 1, 1]]))
    tensor([[0., 1., 0.],
            [0., 0., 2.]], dtype=torch.float64)
    """
    t = parse_token_rows(weights)
    r, _ = parse_rewards(rewards)
    if len(r) != len(t.active):
        raise LossInputError("rewards", f"{len(t.active)} numbers, one per row", f"{len(r)}", "Pass one per sample.")
    last = t.active & (t.active.flip(1).cumsum(1).flip(1) == 1)
    placed = torch.where(last, torch.from_numpy(r).to(t.active.device)[:, None], 0.0)
    return t.finish(placed if penalties is None else placed + t.column("penalties", penalties))


def kl_penalties(
    logprobs: Columns,
    ref_logprobs: Columns,
    weights: Columns,
    kl_beta: float,
    *,
    kl: Callable[[Tensor, Tensor], Tensor] | str = k1,
    centred: bool = False,
    discount: float = 0.0,
    steps: str = "active",
) -> Tensor | list[Tensor]:
    """−β·KL(lp, ref) of each token: a penalty in the reward or in the advantage instead of in the loss.

    In the reward, as in PPO for RLHF: ``token_rewards(rewards, weights, penalties)``, then ``gae`` or
    ``reinforce_plus_plus_advantages``. In the advantage, as in tinker-cookbook: add the penalties of a datum to its
    advantages. Without a discount, the advantage of a token then contains its own KL alone.

    Args:
        logprobs: logprobs of the policy that sampled, or old logprobs.
        ref_logprobs: logprobs of the reference.
        weights: active tokens have a weight other than 0.
        kl_beta: β, a finite number of at least 0.
        kl: ``k1`` (verl's ``kl``, tinker-cookbook, TRL), ``k2``, ``k3``, or another function of two tensors.
        centred: whether to subtract the mean KL over all active tokens of the batch, as tinker-cookbook does.
        discount: γ in [0, 1]. The result at t is Σ_{k >= 0} γᵏ·(penalty of the k-th token after t); with 0: its own
            penalty.
        steps: ``"active"``: the sum skips tokens that are not active. ``"slots"``: each slot is discounted, as in
            tinker-cookbook.

    Returns:
        Penalties, in the form of the weights.

    Raises:
        LossInputError: if a logprob of an active token is not finite, or columns do not have one form.

    >>> kl_penalties([[-1.0, -1.0]], [[-2.0, -1.0]], [[1, 1]], kl_beta=0.5)
    [tensor([-0.5000,  0.0000], dtype=torch.float64)]
    >>> kl_penalties([[-1.0, -1.0]], [[-2.0, -1.0]], [[1, 1]], kl_beta=0.5, centred=True, discount=1.0)
    [tensor([0.0000, 0.2500], dtype=torch.float64)]
    """
    kl_beta = as_number("kl_beta", kl_beta, "a finite number of at least 0", lambda x: x >= 0, "0 is no penalty.")
    discount = as_fraction("discount", discount)
    check_choice("steps", steps, ("active", "slots"))
    estimator = ESTIMATORS.get(kl, kl) if isinstance(kl, str) else kl
    t = parse_token_rows(weights)
    divergence = estimate(estimator, t.logprobs("logprobs", logprobs), t.logprobs("ref_logprobs", ref_logprobs))
    if centred:
        divergence = divergence - t.mean(divergence)
    penalties = torch.where(t.active, 0.0 - kl_beta * divergence, 0.0)  # 0.0 − 0.0 is 0.0, where −0.0 would have a sign
    return t.finish(t.discounted_sum(penalties, discount, steps))


def returns_to_go(
    rewards: Columns, weights: Columns, *, gamma: float = 1.0, steps: str = "active"
) -> Tensor | list[Tensor]:
    """Gₜ = rₜ + γ·Gₜ₊₁: the discounted sum of the rewards from each token on.

    Args:
        rewards: rewards of tokens; see ``token_rewards``.
        weights: active tokens have a weight other than 0.
        gamma: γ in [0, 1].
        steps: ``"active"``: t + 1 is the next active token, as in verl. ``"slots"``: it is the next slot, as in
            OpenRLHF, and tokens that are not active discount too.

    Returns:
        Returns, in the form of the weights.

    Raises:
        LossInputError: if a reward is not finite, or columns do not have one form.

    >>> returns_to_go([[0.0, 9.0, 1.0]], [[1, 0, 1]], gamma=0.5)
    [tensor([0.5000, 0.0000, 1.0000], dtype=torch.float64)]
    """
    gamma = as_fraction("gamma", gamma)
    check_choice("steps", steps, ("active", "slots"))
    t = parse_token_rows(weights)
    return t.finish(t.discounted_sum(t.column("rewards", rewards), gamma, steps))


def gae(
    rewards: Columns, values: Columns, weights: Columns, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor | list[Tensor], Tensor | list[Tensor]]:
    """Aₜ = δₜ + γλ·Aₜ₊₁ with δₜ = rₜ + γ·Vₜ₊₁ − Vₜ, and returns A + V. GAE, arXiv:1506.02438, equation 16.

    t + 1 is the next active token, as in verl and NeMo-RL; after the last one A and V are 0. With λ = 1, A is the
    return to go − V; with λ = 0 it is δ. PPO trains the policy on ``whiten(advantages, weights)`` and the values, with
    ``value_loss``, on the returns. VAPO trains the values on the returns of a second call with ``lam=1.0``.

    Args:
        rewards: rewards of tokens; see ``token_rewards``.
        values: V of each token, from the value head before the update.
        weights: active tokens have a weight other than 0.
        gamma: γ in [0, 1].
        lam: λ in [0, 1]; 0.95 in TRL's PPO, 1.0 in verl.

    Returns:
        Advantages and returns, in the form of the weights.

    Raises:
        LossInputError: if a number is not finite, or columns do not have one form.

    >>> advantages, returns = gae([[0.0, 1.0]], [[0.5, 0.75]], [[1, 1]], gamma=1.0, lam=0.5)
    >>> advantages, returns
    ([tensor([0.3750, 0.2500], dtype=torch.float64)], [tensor([0.8750, 1.0000], dtype=torch.float64)])
    """
    gamma = as_fraction("gamma", gamma)
    lam = as_fraction("lam", lam)
    t = parse_token_rows(weights)
    v = t.column("values", values)
    delta = torch.where(t.active, t.column("rewards", rewards) + gamma * t.next_active(v) - v, 0.0)
    advantages = t.discounted_sum(delta, gamma * lam, "active")
    return t.finish(advantages), t.finish(advantages + v)


def reinforce_plus_plus_advantages(
    rewards: Columns, weights: Columns, *, gamma: float = 1.0, eps: float = 1e-8, ddof: int = 1
) -> Tensor | list[Tensor]:
    """Returns to go, whitened over the active tokens of the batch. REINFORCE++, arXiv:2501.03262.

    The KL penalty is in the rewards: ``token_rewards(rewards, weights, kl_penalties(...))``. Compute them on the whole
    batch, before it is split.

    Args:
        rewards: rewards of tokens.
        weights: active tokens have a weight other than 0.
        gamma: γ in [0, 1]; 1 in the paper.
        eps, ddof: as for ``whiten``.

    Returns:
        Advantages, in the form of the weights.

    Raises:
        LossInputError: if a reward is not finite, or columns do not have one form.

    >>> reinforce_plus_plus_advantages([[0.0, 1.0], [0.0, 0.0]], [[1, 1], [1, 1]], ddof=0)
    [tensor([1.0000, 1.0000], dtype=torch.float64), tensor([-1.0000, -1.0000], dtype=torch.float64)]
    """
    eps = check_scaling(eps, ddof)
    gamma = as_fraction("gamma", gamma)
    t = parse_token_rows(weights)
    return t.finish(whitened(t, t.discounted_sum(t.column("rewards", rewards), gamma, "active"), eps, ddof))


def whiten(
    values: Columns, weights: Columns, *, shift_mean: bool = True, eps: float = 1e-8, ddof: int = 1
) -> Tensor | list[Tensor]:
    """(x − mean) / √(variance + eps) over the active tokens of the batch, each counted once.

    TRL's PPO and verl have these defaults. OpenRLHF and NeMo-RL have ``ddof=0`` and max(variance, eps).

    Args:
        values: a number for each token, such as advantages.
        weights: active tokens have a weight other than 0.
        shift_mean: whether the result has mean 0; ``False``: the mean is added again after the division, as for
            rewards.
        eps: added to the variance, above 0.
        ddof: 1, or 0 for a variance that divides by the number of tokens.

    Returns:
        Numbers of mean 0 and variance 1, in the form of the weights; exactly 0 if all numbers are equal. With
        ``shift_mean=False``, these plus the mean of ``values``.

    Raises:
        LossInputError: if a number is not finite, if no token is active, or columns do not have one form.

    >>> whiten([[3.0, 1.0]], [[1, 1]], ddof=0)
    [tensor([ 1.0000, -1.0000], dtype=torch.float64)]
    """
    eps = check_scaling(eps, ddof)
    t = parse_token_rows(weights)
    x = t.column("values", values)
    return t.finish(whitened(t, x, eps, ddof) + (0.0 if shift_mean else t.mean(x)))


def estimate(kl: Any, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return the KL of each token. Refuse anything but a function of two tensors that returns one of their shape."""
    try:
        divergence = kl(logprobs, ref_logprobs)
        fits = divergence.shape == logprobs.shape and divergence.dtype == logprobs.dtype
    except Exception:  # whatever a value that is no such function raises
        fits = False
    if not fits:
        raise LossInputError("kl", "a function such as k1", show(kl), "Pass the function, or its name.")
    return divergence  # type: ignore[no-any-return]


def whitened(t: TokenRows, x: Tensor, eps: float, ddof: int) -> Tensor:
    """(x − mean) / √(variance + eps) over the active tokens, exactly 0 if x is constant there: ``[B, T]``."""
    seen = x[t.active]
    if seen.numel() == 0:
        raise LossInputError("weights", "an active token", "none", "Nothing can be averaged.")
    centred = x - t.mean(x)
    variance = centred[t.active].square().sum() / max(seen.numel() - ddof, 1)
    return torch.where(seen.max() == seen.min(), 0.0, centred / (variance + eps).sqrt())
