"""Fireworks cookbook (fw-ai/cookbook 76821fa1, of August 2026): sums over tokens.

A weight of the rollout is on every loss but one.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.formulas import (
    by_token,
    clipped,
    k3,
    log_odds,
    log_ratio,
    pair_means,
    pair_sums,
    token_mean,
    weighted,
)
from tools.rosetta.formulas import token_sum as total
from tools.rosetta.row import Framework

RL = "training/utils/rl"
fireworks = Framework("Fireworks cookbook 76821fa1", f"{RL}/grpo.py")


def tis(b: Batch, cap: float = 5.0) -> Tensor:
    """min(exp(old − sampler), 5), with the exponent bounded by ±20."""
    return (b.old_logprobs - b.sampler_logprobs).clamp(-20, 20).exp().clamp(0, cap)


def ratio(b: Batch) -> Tensor:
    """exp(lp − old), with the exponent bounded by ±20."""
    return log_ratio(b, cap=20.0).exp()


def grpo(b: Batch) -> Tensor:
    """PPO's loss times the weight of the rollout, plus 0.001·k3."""
    return total(b, clipped(ratio(b), b.A, 0.8, 1.2) * tis(b) + 1e-3 * k3(b.ref_logprobs - b.lp))


def reinforce(b: Batch) -> Tensor:
    """(−r·A + β·(sg(lp) − ref)) with r = exp(lp − sampler), β = 0.1."""
    r = log_ratio(b, "sampler_logprobs", 20.0).exp()
    return total(b, -r * b.A + 0.1 * (b.lp.detach() - b.ref_logprobs))


def orpo(b: Batch) -> Tensor:
    """Σ over pairs of −a_c − log σ(log-odds): λ = 1."""
    chosen, rejected = pair_means(b, b.lp)
    odds = log_odds(chosen) - log_odds(rejected)
    return (-chosen - F.logsigmoid(odds)).sum()


def dpo(b: Batch) -> Tensor:
    """Mean over pairs of −log σ(β·margin) with sums over the response."""
    (chosen, rejected), (ref_c, ref_r) = pair_sums(b, b.lp), pair_sums(b, b.ref_logprobs)
    return -F.logsigmoid(0.1 * (chosen - ref_c - rejected + ref_r)).mean()


def standardised(b: Batch) -> Tensor:
    """(r − group mean) / (standard deviation + 1e-8)."""
    rewards = b.rewards.view(2, 4)
    return ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-8)).flatten()


def unmasked_gspo(b: Batch) -> Tensor:
    """GSPO-token whose mean runs over every response token, masked or not."""
    d = log_ratio(b)
    d = d.mean(1, keepdim=True).detach() + b.lp - b.lp.detach()
    return total(b, clipped(d.clamp(max=10).exp(), b.A, 0.8, 1.2) * tis(b))


def rows() -> None:
    """Add the rows."""
    add, capped = fireworks.equal, "with_tis({}, cap=5.0)"
    add("grpo (kl_beta 0.001)", "with_kl(with_tis(ppo(weigh=token_sum), cap=5.0), 0.001, k3_uncapped)", grpo)
    add(
        "dapo",
        capped.format("dapo(weigh=token_sum)"),
        lambda b: total(b, clipped(ratio(b), b.A, 0.8, 1.28) * tis(b)),
        source=f"{RL}/dapo.py",
    )
    add(
        "cispo",
        capped.format("cispo(clip=(0.8, 1.28), weigh=token_sum)"),
        lambda b: total(b, weighted(b, ratio(b).clamp(0.8, 1.28)) * tis(b)),
        source=f"{RL}/cispo.py",
    )
    fireworks.different(
        "cispo, with MiniMax's bounds",
        capped.format("cispo(weigh=token_sum)"),
        lambda b: total(b, weighted(b, ratio(b).clamp(0.8, 1.28)) * tis(b)),
        source=f"{RL}/cispo.py",
        why="bounds 0.8 and 1.28 by default",
    )
    add(
        "gspo, no token masked inside",
        capped.format("gspo_token(clip=(0.8, 1.2), weigh=token_sum)"),
        lambda b: total(b, clipped(by_token(b).clamp(max=10).exp(), b.A, 0.8, 1.2) * tis(b)),
        source=f"{RL}/gspo.py",
    )
    fireworks.different(
        "gspo, tokens masked inside",
        capped.format("gspo_token(clip=(0.8, 1.2), weigh=token_sum)"),
        unmasked_gspo,
        source=f"{RL}/gspo.py",
        why="the mean of a sequence runs over every response token, masked or not",
    )
    add(
        "is_loss",
        capped.format("importance_sampling(weigh=token_sum)"),
        lambda b: total(b, -ratio(b) * b.A * tis(b)),
        source=f"{RL}/is_loss.py",
    )
    fireworks.different(
        "dro",
        capped.format("dro(weigh=token_sum)"),
        lambda b: total(b, -(b.A * b.lp * tis(b) - 0.025 * log_ratio(b).square())),
        source=f"{RL}/dro.py",
        why="the weight of the rollout is on A·lp alone, not on the quadratic term",
    )
    fireworks.different(
        "reinforce",
        "reinforce(weigh=token_sum)",
        reinforce,
        source=f"{RL}/reinforce.py",
        why="it is importance sampling from the sampler, and its KL term is detached: no gradient",
    )
    fireworks.different(
        "reinforce, kl_beta=0.1, with its KL",
        'with_kl(ppo(clip=(0.0, math_inf), weigh=token_sum), 0.1, k1, kl_to="ref_logprobs")'.replace(
            "ppo(clip=(0.0, math_inf), weigh=token_sum)", "importance_sampling(weigh=token_sum)"
        ),
        reinforce,
        source=f"{RL}/reinforce.py",
        why="its KL term is detached: it has a value and no gradient",
    )
    losses = "training/utils/losses.py"
    add("make_batch_dpo_loss_fn, beta=0.1", "dpo()", dpo, inputs="pairs", source=losses)
    add(
        "make_batch_orpo_loss_fn",
        "orpo(lam=1.0, weigh=pair_sum)",
        orpo,
        inputs="pairs",
        source=losses,
        why="a sum over pairs; logprobs between −50 and −1e-6",
    )
    fireworks.different(
        "make_batch_orpo_loss_fn, as the paper's λ",
        "orpo(weigh=pair_sum)",
        orpo,
        inputs="pairs",
        source=losses,
        why="orpo_lambda is 1.0 unless set; the paper has 0.1",
    )
    add("make_batch_weighted_sft_loss_fn", "cross_entropy()", lambda b: token_mean(b, -b.lp), source=losses)
    add(
        "distillation, TOPK_FORWARD_KL as [N, K] cross-entropy",
        "multi_target_cross_entropy(weigh=token_sum)",
        lambda b: -(b.mask * b.lp).sum(),
        inputs="candidates",
        source="training/recipes/distillation_loop.py",
    )
    add(
        "distillation, SAMPLED_REVERSE_KL",
        "sampled_reverse_kl(weigh=token_sum)",
        lambda b: total(b, -ratio(b) * (b.teacher_logprobs - b.old_logprobs)),
        source="training/recipes/distillation_loop.py",
    )
    add(
        "compute_advantages",
        "group_advantages(rewards, groups, eps=1e-8)",
        standardised,
        inputs="samples",
        source="training/utils/data.py",
        why="a group of one gets nan there, and 0 with a warning here",
    )


rows()
