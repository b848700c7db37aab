"""Columns for a loss whose tokens another policy sampled: logprobs on a support, proximal logprobs, weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lossfns.checks import check_number, is_huge, is_real
from lossfns.errors import LossInputError, did_you_mean, show
from lossfns.pack import as_row, as_tensor, is_plain, pack, tensor_form
from lossfns.rollout import TokenWeight, check_token_weight
from lossfns.values import LOGPROB_TOLERANCE


def top_p_support(candidate_logprobs: Tensor, sampled: Tensor, top_p: float) -> Tensor:
    """Return the support of top-p sampling: the fewest candidates, most likely first, whose mass is at least ``top_p``.

    Args:
        candidate_logprobs: ``[N, K]`` the sampler's logprobs of K candidates for each position, over the whole
            vocabulary, in any order; -inf for a candidate that does not count.
        sampled: ``[N]`` int64, the index of the sampled token among the candidates. It is always in the support.
        top_p: the sampler's setting, in (0, 1].

    Returns:
        ``[N, K]`` bool.

    Raises:
        LossInputError: if the candidates of a position have less mass than ``top_p``.

    >>> top_p_support(torch.tensor([[0.5, 0.25, 0.125]]).log(), torch.tensor([1]), top_p=0.7)
    tensor([[ True,  True, False]])
    """
    x, index = as_candidates(candidate_logprobs, sampled)
    check_number("top_p", top_p, "a number in (0, 1]", lambda x: 0 < x <= 1, "Pass the setting of the sampler.")
    p, top_p = x.detach().exp(), float(top_p)
    mass = p.sum(1)
    if bool((mass < top_p - 1e-4).any()):
        i = int((mass < top_p - 1e-4).nonzero()[0])
        fix = "Ask the sampler for more candidates: its support is not complete."
        expected = f"a mass of at least top_p = {top_p:g}"
        raise LossInputError(f"candidate_logprobs[{i}]", expected, f"{float(mass[i]):g}", fix)
    likely, order = p.sort(dim=1, descending=True)
    in_order = (likely.cumsum(1) - likely < top_p) & (likely > 0)
    support = torch.zeros_like(in_order).scatter(1, order, in_order)
    return support.scatter(1, index[:, None], True)


def support_logprobs(candidate_logprobs: Tensor, sampled: Tensor, support: Tensor) -> Tensor:
    """lp − log Σ p over the support: the logprobs of the distribution that a sampler with a support draws from.

    A sampler with top_p below 1 draws from its most likely tokens alone, its support. A token then has the probability
    p / Σ p, while servers and training passes return p over the whole vocabulary. Ratios of the two are then wrong, by
    a different factor at each position. Call this for both policies, each with its own logprobs and with the support of
    the sampler (``top_p_support``), as slime does.

    Args:
        candidate_logprobs: ``[N, K]`` logprobs of the candidates under one policy. Their graph is kept.
        sampled: ``[N]`` int64, the index of the sampled token among the candidates.
        support: ``[N, K]`` bool, True for the candidates of the support, the sampled one among them.

    Returns:
        ``[N]`` logprobs, at most 0.

    >>> candidates = torch.tensor([[0.5, 0.25, 0.125]]).log()
    >>> support_logprobs(candidates, torch.tensor([1]), torch.tensor([[True, True, False]])).exp()
    tensor([0.3333])
    """
    x, index = as_candidates(candidate_logprobs, sampled)
    kept = as_tensor(as_row(support, "support", None)).to(x.device)
    if kept.dtype is not torch.bool or kept.shape != x.shape:
        fix = "top_p_support returns it."
        raise LossInputError("support", f"bool of shape {tuple(x.shape)}", tensor_form(kept), fix)
    missing = ~kept.gather(1, index[:, None])[:, 0]
    if bool(missing.any()):
        i = int(missing.nonzero()[0])
        fix = "A token that the sampler cannot draw has no logprob: do candidates and support come from one sampler?"
        raise LossInputError(f"support[{i}]", "the sampled token in it", "a support without it", fix)
    inside = x.masked_fill(~kept, -torch.inf)
    return inside.gather(1, index[:, None])[:, 0] - inside.logsumexp(1)


def as_float(name: str, value: Any, rank: int) -> Tensor:
    """Return a row or a matrix of real numbers as a float tensor, with its graph."""
    x = value if isinstance(value, Tensor) and is_plain(value) else as_tensor(as_row(value, name, None))
    if x.ndim != rank or x.dtype is torch.bool:
        got, fix = tensor_form(x), "Give one entry for each position."
        raise LossInputError(name, f"numbers of shape {'[N, K]' if rank == 2 else '[N]'}", got, fix)
    if x.is_floating_point():
        return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    return x.to(torch.float64)


def as_candidates(candidate_logprobs: Any, sampled: Any) -> tuple[Tensor, Tensor]:
    """Return logprobs ``[N, K]`` and one index below K for each position. Refuse anything else."""
    x = as_float("candidate_logprobs", candidate_logprobs, 2)
    if bool((x.isnan() | (x > LOGPROB_TOLERANCE)).any()):
        fix = "Pass logprobs of the whole vocabulary, and -inf for a candidate that does not count."
        raise LossInputError("candidate_logprobs", "logprobs, at most 0", "a nan or a number above 0", fix)
    index = as_float("sampled", sampled, 1)
    valid = index.shape == x.shape[:1] and bool(((index >= 0) & (index < x.shape[1]) & (index == index.floor())).all())
    if not valid:
        expected = f"{len(x)} whole numbers below {x.shape[1]}"
        fix = "They are positions among the candidates, not ids."
        raise LossInputError("sampled", expected, show(index.tolist()), fix)
    return x, index.to(x.device, torch.int64)


def proximal_logprobs(logprobs: Tensor, sampler_logprobs: Tensor, versions: Tensor, version: int) -> Tensor:
    """sampler + α·(lp − sampler), α = (v − 1 − v_s) / (v − v_s): logprobs of the policy one step ago, interpolated.

    AReaL's log-linear approximation of the proximal policy, which saves a forward pass. Decoupled PPO (Hilton et al.
    2021, arXiv:2110.00641; AReaL, arXiv:2505.24298) clips against the proximal policy and corrects for the sampler:
    bind the result as ``old_logprobs`` of ``with_rollout_weight(ppo(), ratio())``.

    Args:
        logprobs: ``[N]`` current logprobs. Their graph is not kept.
        sampler_logprobs: ``[N]`` logprobs of the sampler.
        versions: ``[N]`` the version v_s of the weights that sampled each token, at most v.
        version: v, the version of the current weights. Where v_s = v, the result is the sampler's logprob.

    >>> now, then = torch.tensor([-1.5]), torch.tensor([-1.0])
    >>> proximal_logprobs(now, then, torch.tensor([0]), version=2)
    tensor([-1.2500])
    """
    now, then = as_float("logprobs", logprobs, 1).detach(), as_float("sampler_logprobs", sampler_logprobs, 1).detach()
    check_number("version", version, "a whole number from 0", lambda x: x >= 0 and x == int(x), "Count the updates.")
    age = float(version) - as_float("versions", versions, 1).double()
    for name, x in (("sampler_logprobs", then), ("versions", age)):
        if x.shape != now.shape:
            fix = "Give one value for each token."
            raise LossInputError(name, f"{len(now)} values, one for each of logprobs", str(len(x)), fix)
    if bool((age < 0).any()):
        got = f"{float(version) - float(age.min()):g}"
        raise LossInputError("versions", f"at most version = {version}", got, "No token can come from later weights.")
    alpha = ((age - 1) / age.clamp(min=1)).clamp(min=0).to(then.dtype)
    return then + alpha * (now - then)


def accepted_weights(
    weight: TokenWeight, data: Sequence[Any], logprobs_list: Sequence[Tensor], **columns: Any
) -> list[Tensor]:
    """Return the weights of the batch, with 0 for each token that a token weight rejects.

    ``with_rollout_weight`` leaves rejected tokens in the denominator. Bind the result as ``weights`` to take them out
    of the denominator, of the KL penalty and of every statistic, as in verl.

    Args:
        weight: a token weight, such as ``within(k3, 0.01, geometric_level)``.
        data, logprobs_list: the batch, as for a loss. The values of the logprobs matter only to a weight that reads
            them.
        columns: columns by name, as for ``bind``: ``old_logprobs`` and ``sampler_logprobs``, and ``weights``. Columns
            that are left out are read from the datums.

    Returns:
        One row for each datum.

    >>> from lossfns import datum_from_tokens
    >>> from lossfns.rollout import inside
    >>> data, old = [datum_from_tokens([5, 6, 7], prompt_length=1)], [torch.tensor([-1.0, -2.0])]
    >>> accepted_weights(inside((0.5, 2.0)), data, old, old_logprobs=old, sampler_logprobs=[[-1.0, -4.0]])
    [tensor([1., 0.])]
    """
    check_token_weight("weight", weight)
    unknown = sorted(columns.keys() - {"weights", *weight.reads})
    if unknown:
        fix = did_you_mean(unknown[0], ["weights", *weight.reads])
        raise LossInputError("accepted_weights", "columns that the weight reads", repr(unknown[0]), fix)
    t = pack(data, logprobs_list, weight.reads, columns)
    accepted = torch.where(weight(t) == 0, 0, t.weights)
    return list(torch.split(accepted, [len(lp) for lp in logprobs_list]))


def rollout_summary(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the effective sample size and the share of rejected sequences, from metrics of ``with_rollout_weight``.

    Neither is a mean over tokens, so neither merges over micro-batches. Call this on the metrics of the whole batch,
    after ``merge_metrics``.

    Returns:
        ``effective_sample_size``: (Σρ)² / (N·Σρ²) over the N active tokens, in [0, 1]; 1 where all weights are equal,
        0 where all are 0. ``rejected_sequences``: share of the sequences with an active token whose weights are all 0.

    >>> rollout_summary({"rollout_weight": 1.0, "rollout_weight_square": 2.0, "rollout_rejected_sequences": 0.125,
    ...     "tokens": 8.0, "sequences": 3.0, "sequences_empty": 1.0})
    {'effective_sample_size': 0.5, 'rejected_sequences': 0.5}
    """
    values = [metrics.get(name) for name in SUMMARISED] if isinstance(metrics, Mapping) else []
    if not values or not all(is_real(x) and not is_huge(x) for x in values):
        fix = "Pass what a call of with_rollout_weight(...) or merge_metrics returned."
        raise LossInputError("metrics", f"the metrics {', '.join(SUMMARISED)}", show(metrics), fix)
    mean, square, rejected, tokens, sequences, empty = (float(x) for x in values)  # type: ignore[arg-type]
    return {
        "effective_sample_size": mean * mean / square if square else 0.0,
        "rejected_sequences": rejected * tokens / (sequences - empty) if sequences > empty else 0.0,
    }


SUMMARISED = (
    *("rollout_weight", "rollout_weight_square", "rollout_rejected_sequences"),
    *("tokens", "sequences", "sequences_empty"),
)
"""The metrics that ``rollout_summary`` reads."""
