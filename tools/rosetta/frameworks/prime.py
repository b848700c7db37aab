"""prime-rl 559b44772, of August 2026: DPPO with a squared penalty towards the sampler is its default."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.formulas import log_ratio, token_mean
from tools.rosetta.row import Framework

prime = Framework("prime-rl 559b44772", "prime-rl/src/prime_rl/trainer/rl/loss.py")


def moved(b: Batch) -> Tensor:
    """p − p_sampler, a constant."""
    return (b.lp.exp() - b.sampler_logprobs.exp()).detach()


def dppo(b: Batch, keep: Tensor) -> Tensor:
    """−keep·A·r + 0.001·(lp − sampler)²."""
    d = log_ratio(b, "sampler_logprobs")
    return token_mean(b, -keep * b.A * d.exp() + 1e-3 * d.square())


def one_sided(b: Batch) -> Tensor:
    """p − p_sampler <= 0.2 where A > 0, >= −0.2 elsewhere."""
    return torch.where(b.A > 0, moved(b) <= 0.2, moved(b) >= -0.2).double()


def ref_kl(b: Batch) -> Tensor:
    """−keep·sg(ref − lp)·r + 0.001·(lp − sampler)²."""
    d = log_ratio(b, "sampler_logprobs")
    signal = (b.ref_logprobs - b.lp).detach()
    return token_mean(b, -(moved(b) >= -0.2).double() * signal * d.exp() + 1e-3 * d.square())


def max_rl(b: Batch) -> Tensor:
    """(r − μ) / μ."""
    mean = b.rewards.view(2, 4).mean(1).repeat_interleave(4)
    return (b.rewards - mean) / mean


def rows() -> None:
    """Add the rows."""
    prime.equal("loss.type=default (DPPO + KL)", "prime_dppo()", lambda b: dppo(b, one_sided(b)))
    prime.different(
        "loss.type=default, for DPPO's paper",
        "dppo_tv()",
        lambda b: dppo(b, one_sided(b)),
        why="the ratio is to the sampler, and kl_tau·(lp − sampler)² is added on every token",
    )
    prime.equal(
        "loss.type=ipo",
        "prime_symmetric()",
        lambda b: dppo(b, (moved(b).abs() <= 0.1).double()),
        why="a symmetric mask of the probability; not the preference loss IPO",
    )
    prime.equal("ref_kl component", "prime_ref_kl()", ref_kl)
    prime.equal(
        "rl and ce components, ce weight 0.1 (ECHO)",
        "echo(prime_dppo())",
        lambda b: dppo(b, one_sided(b)) - 0.1 * (b.lp * b.ce_weights).sum() / b.ce_weights.sum(),
        inputs="two_parts",
        why="each component has its own count",
    )
    prime.equal(
        "algo=max_rl, advantages",
        "maxrl_advantages(rewards, groups)",
        max_rl,
        inputs="samples",
        source="prime-rl/src/prime_rl/orchestrator/algo/max_rl.py",
    )
    prime.equal(
        "advantages without a deviation",
        'group_advantages(rewards, groups, scale="none")',
        lambda b: b.rewards - b.rewards.view(2, 4).mean(1).repeat_interleave(4),
        inputs="samples",
    )


rows()
