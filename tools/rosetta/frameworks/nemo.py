"""NeMo-RL 7ea279abf, of August 2026: one clipped loss with many settings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.formulas import clipped, k3, log_ratio, pair_sums, per_sequence, sequence_mean, token_mean, weighted
from tools.rosetta.row import Framework

nemo = Framework("NeMo-RL 7ea279abf", "nemo_rl/algorithms/loss/loss_functions.py")


def ppo(b: Batch) -> Tensor:
    """PPO's loss of each token."""
    return clipped(log_ratio(b).exp(), b.A, 0.8, 1.2)


def penalty(b: Batch, beta: float = 0.01) -> Tensor:
    """β·exp(lp − sg(lp))·k3, with k3 of a log-ratio within ±20, and at most 10."""
    score = (b.lp - b.lp.detach()).exp()
    return beta * score * k3((b.ref_logprobs - b.lp).clamp(-20, 20)).clamp(-10, 10)


def gspo(b: Batch) -> Tensor:
    """GSPO with the gradient of the mean."""
    return sequence_mean(b, clipped(per_sequence(b, log_ratio(b)).exp().expand_as(b.lp), b.A, 0.8, 1.2))


def weight(b: Batch) -> Tensor:
    """exp(old − sampler) of each token."""
    return (b.old_logprobs - b.sampler_logprobs).exp()


def inside(b: Batch, low: float, high: float) -> Tensor:
    """1 where the geometric mean of the weights of a sequence lies within the bounds."""
    geometric = per_sequence(b, b.old_logprobs - b.sampler_logprobs).exp()
    return ((geometric >= low) & (geometric <= high)).double()


def dpo(b: Batch) -> Tensor:
    """β = 0.05."""
    (chosen, rejected), (ref_c, ref_r) = pair_sums(b, b.lp), pair_sums(b, b.ref_logprobs)
    return -F.logsigmoid(0.05 * (chosen - ref_c - rejected + ref_r)).mean()


def kl(b: Batch, forward: float) -> Tensor:
    """forward·KL(teacher‖student) + (1 − forward)·KL(student‖teacher) on renormalised candidates."""
    student, teacher = b.lp.log_softmax(-1), b.teacher_logprobs.log_softmax(-1)
    both = forward * teacher.exp() * (teacher - student) + (1 - forward) * student.exp() * (student - teacher)
    return (both * b.mask).sum() / b.mask[..., 0].sum()


def leave_one_out(b: Batch, deviation: bool) -> Tensor:
    """r − mean of the others; divided by the group's deviation on request."""
    rewards = b.rewards.view(2, 4)
    others = (rewards.sum(1, keepdim=True) - rewards) / 3
    centred = rewards - others
    return (centred / (rewards.std(1, keepdim=True) + 1e-6) if deviation else centred).flatten()


def rows() -> None:
    """Add the rows."""
    no_cap = "log_ratio_cap=None"
    nemo.equal(
        "ClippedPGLossFn, reference_policy_kl_penalty 0.01",
        f"with_kl(ppo({no_cap}), 0.01, kl_weight=rollout.score_function, kl_cap=10.0)",
        lambda b: token_mean(b, ppo(b) + penalty(b)),
        why="the factor exp(lp − sg(lp)) makes the gradient that of KL(π‖ref)",
    )
    nemo.different(
        "ClippedPGLossFn, KL as in GRPO's paper",
        f"grpo(kl_beta=0.01, {no_cap})",
        lambda b: token_mean(b, ppo(b) + penalty(b)),
        why="the factor exp(lp − sg(lp)) on k3 changes the gradient, not the value",
    )
    nemo.equal("reference_policy_kl_penalty=0", f"ppo({no_cap})", lambda b: token_mean(b, ppo(b)))
    nemo.equal(
        "ratio_clip_c=3",
        f"ppo({no_cap}, dual_clip=3.0)",
        lambda b: token_mean(b, clipped(log_ratio(b).exp(), b.A, 0.8, 1.2, 3.0)),
    )
    nemo.equal("token_level_loss=False", f"ppo({no_cap}, weigh=sequence_mean)", lambda b: sequence_mean(b, ppo(b)))
    nemo.equal("sequence_level_importance_ratios=True", f"gspo(clip=(0.8, 1.2), {no_cap})", gspo)
    nemo.equal("disable_ppo_ratio=True", "reinforce()", lambda b: token_mean(b, -b.A * b.lp))
    nemo.equal(
        "use_cispo=True",
        f"cispo(clip=(0.8, 1.2), {no_cap})",
        lambda b: token_mean(b, weighted(b, log_ratio(b).exp().clamp(0.8, 1.2))),
    )
    nemo.equal(
        "truncated_importance_sampling_type=tis, ratio 2",
        f"with_tis(ppo({no_cap}))",
        lambda b: token_mean(b, ppo(b) * weight(b).clamp(max=2.0)),
    )
    nemo.equal(
        "truncated_importance_sampling_type=icepop, 0.5 to 2",
        f"with_rollout_weight(ppo({no_cap}), rollout.masked((0.5, 2.0)))",
        lambda b: token_mean(b, ppo(b) * weight(b) * ((weight(b) >= 0.5) & (weight(b) <= 2.0))),
    )
    nemo.equal(
        "truncated_importance_sampling_type=seq-mask-tis, 0.9 to 1.1",
        f"with_rollout_weight(ppo({no_cap}), rollout.ratio() * rollout.inside((0.9, 1.1), geometric_level))",
        lambda b: token_mean(b, ppo(b) * weight(b) * inside(b, 0.9, 1.1)),
    )
    nemo.equal(
        "positive_example_nll_weight=0.1 (VAPO), reference_policy_kl_penalty=0",
        f"vapo_nll(ppo({no_cap}))",
        lambda b: token_mean(b, ppo(b)) - 0.1 * (b.lp * b.nll_weights).sum() / b.nll_weights.sum(),
        inputs="two_parts",
        why="NeMo-RL divides the second part by the tokens of the rank",
    )
    for kind, estimate in (("k1", lambda d: d), ("k2", lambda d: d.square() / 2)):
        nemo.equal(
            f"reference_policy_kl_type={kind}, penalty 0.01",
            f"with_kl(ppo({no_cap}), 0.01, {kind}, rollout.score_function, 10.0)",
            lambda b, f=estimate: token_mean(
                b, ppo(b) + 0.01 * (b.lp - b.lp.detach()).exp() * f(log_ratio(b, "ref_logprobs"))
            ),
        )
    nemo.equal("DPOLossFn", "dpo(beta=0.05)", dpo, inputs="pairs")
    for kind, forward, call in (
        ("forward", 1.0, "top_k_forward_kl()"),
        ("reverse", 0.0, "top_k_reverse_kl()"),
        ("mixed", 0.5, "top_k_mixed_kl()"),
    ):
        nemo.equal(
            f"DistillationLossFn, kl_type={kind}, renormalised top k",
            call,
            lambda b, forward=forward: kl(b, forward),
            inputs="candidates",
        )
    source = "nemo_rl/algorithms/advantage_estimator.py"
    nemo.equal(
        "use_leave_one_out_baseline=True, normalize_rewards=False",
        "leave_one_out_advantages(rewards, groups)",
        lambda b: leave_one_out(b, False),
        inputs="samples",
        source=source,
    )
    nemo.different(
        "normalize_rewards=True with the leave-one-out baseline (default)",
        "group_advantages(rewards, groups)",
        lambda b: leave_one_out(b, True),
        inputs="samples",
        source=source,
        why="r − mean of the others over the deviation of all: n / (n − 1) times the advantage of GRPO",
    )
    nemo.factor(
        "normalize_rewards=True with the leave-one-out baseline, by its factor",
        "group_advantages(rewards, groups)",
        lambda b: leave_one_out(b, True),
        inputs="samples",
        source=source,
        factor="4 / 3",
        why="n / (n − 1) for groups of n = 4",
    )


rows()
