"""SkyRL 0.3.0: its policy losses are sums; the reduction is in the advantages."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.installed import Peer
from tools.rosetta.row import Framework

UTILS = "backends/skyrl_train/utils"
PPO, CORRECTION, TENSORS = (f"{UTILS}/{x}.py" for x in ("ppo_utils", "off_policy_correction_utils", "torch_utils"))
skyrl = Framework("SkyRL 0.3.0", f"skyrl/{PPO}")

SHARED = (
    (TENSORS, "masked_mean"),
    (TENSORS, "safe_exp_delta"),
    (CORRECTION, "apply_off_policy_correction"),
    (PPO, "reduce_loss"),
    (PPO, "apply_loss_reduction_to_advantages_minibatch"),
)
NAMES = {"torch": torch, "TensorDict": dict}


def config(**settings: Any) -> SimpleNamespace:
    """Return the settings of AlgorithmConfig that the losses read, at their defaults."""
    parts = {
        "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
        "cispo": {"cispo_eps_clip_low": 1.0, "cispo_eps_clip_high": 4.0},
        "dppo": {"dppo_type": "binary_tv", "delta_low": 0.2, "delta_high": 0.2},
        "kl_cov": {"kl_cov_frac": 0.2, "ppo_kl_coef": 1.0},
    }
    made = {name: SimpleNamespace(**{**part, **settings.pop(name, {})}) for name, part in parts.items()}
    flat = {
        "eps_clip_low": 0.2,
        "eps_clip_high": 0.2,
        "clip_ratio_c": 3.0,
        "policy_loss_type": "regular",
        "loss_reduction": "token_mean",
        "off_policy_correction": None,
    }
    return SimpleNamespace(**made, **{**flat, **settings})


def policy(name: str, *, sampler: bool = False, **settings: Any) -> Peer:
    """Return a loss with the reduction that its config asks for. ``sampler`` hands over the sampler's logprobs."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        made = config(**settings)
        scale = names["apply_loss_reduction_to_advantages_minibatch"]
        a = scale(b.A, b.mask, made.loss_reduction, 2, 16, [(0, 3), (3, 6)]) if made.loss_reduction else b.A
        rollout = b.sampler_logprobs if sampler else None
        names["apply_off_policy_correction"] = lambda loss, old, rollout, mask, _: (loss, mask, {})
        loss, _ = names[name](b.lp, b.old_logprobs, a, made, b.mask, rollout)
        return loss

    return Peer("skyrl", (*SHARED, (PPO, name)), run, NAMES)


def kl(kind: str) -> Peer:
    """Return SkyRL's KL estimate, averaged over tokens, beside an importance-sampling loss of A = 0."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        estimate = names["compute_approx_kl"](b.lp, b.ref_logprobs, b.mask, kind)
        return (estimate * b.mask).sum() / b.mask.sum() - (b.A * b.lp * b.mask).sum() / b.mask.sum()

    return Peer("skyrl", ((PPO, "compute_approx_kl"),), run, NAMES)


def default() -> Peer:
    """Return the loss of the default settings, with the KL loss that the worker adds."""
    ppo = policy("ppo_policy_loss")

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        estimate = names["compute_approx_kl"](b.lp, b.ref_logprobs, b.mask, "k3")
        return ppo.run(names, b) + 1e-3 * names["masked_mean"](estimate, b.mask, dim=-1).mean()

    return Peer("skyrl", (*ppo.definitions, (PPO, "compute_approx_kl")), run, NAMES)


def bonus(reduction: str) -> Peer:
    """Return the loss with the entropy bonus that the worker adds."""
    ppo = policy("ppo_policy_loss", loss_reduction=reduction)

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        loss = ppo.run(names, b)
        return loss - 0.01 * names["masked_mean"](b.entropy, b.mask, dim=-1).mean()

    return Peer("skyrl", ppo.definitions, run, NAMES)


def critic() -> Peer:
    """Return the loss of the critic."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        made = SimpleNamespace(value_clip=0.2)
        return names["ppo_critic_loss"](b.leaf, b.old_values, b.returns, made, b.mask)[0]

    return Peer("skyrl", ((TENSORS, "masked_mean"), (PPO, "ppo_critic_loss")), run, NAMES)


def advantage(name: str) -> Peer:
    """Return the advantage of each answer, that of its first token."""
    function = {"maxrl": "compute_maxrl_advantage"}.get(name, f"compute_{name}_outcome_advantage")

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        tokens = torch.zeros_like(b.mask)
        tokens[:, 0] = b.rewards
        return names[function](tokens, b.mask, np.array(b.groups.tolist()))[0][:, 0]

    return Peer("skyrl", ((PPO, function),), run, {**NAMES, "np": np, "defaultdict": defaultdict})


def rows() -> None:
    """Add the rows."""
    ppo = "ppo_policy_loss"
    skyrl.different(
        "AlgorithmConfig(): regular, token_mean, 0.001·k3",
        "grpo()",
        default(),
        why="the KL is a mean over sequences, whatever the reduction of the loss",
    )
    skyrl.equal("policy_loss_type=regular (default)", "ppo()", policy(ppo))
    skyrl.equal("policy_loss_type=dual_clip", "ppo(dual_clip=3.0)", policy(ppo, policy_loss_type="dual_clip"))
    skyrl.equal("loss_reduction=sequence_mean", "ppo(weigh=sequence_mean)", policy(ppo, loss_reduction="sequence_mean"))
    skyrl.equal(
        "loss_reduction=seq_mean_token_sum_norm, max_seq_len=16",
        "dr_grpo(weigh=fixed_length(16))",
        policy(ppo, loss_reduction="seq_mean_token_sum_norm"),
    )
    skyrl.factor(
        "loss_reduction=sequence_mean, a row masked whole",
        "ppo(weigh=sequence_mean)",
        policy(ppo, loss_reduction="sequence_mean"),
        inputs="masked_row",
        factor="(lengths > 0).sum() / B",
        why="sequences with a token / sequences",
    )
    skyrl.different(
        "loss_reduction=token_mean_legacy",
        "ppo()",
        policy(ppo, loss_reduction="token_mean_legacy"),
        why="the denominator of each micro-batch, then a mean over micro-batches",
    )
    skyrl.different(
        "loss_reduction=prompt_mean",
        "ppo()",
        policy(ppo, loss_reduction="prompt_mean"),
        why="a mean over the tokens of each prompt, then over prompts; divide the weights yourself",
    )
    skyrl.equal(
        "policy_loss_type=sapo, sequence_mean", "sapo()", policy("sapo_policy_loss", loss_reduction="sequence_mean")
    )
    skyrl.equal(
        "policy_loss_type=gspo, sequence_mean",
        "gspo_token(clip=(0.8, 1.2))",
        policy("gspo_policy_loss", loss_reduction="sequence_mean"),
    )
    skyrl.different(
        "policy_loss_type=gspo, defaults",
        "gspo_token()",
        policy("gspo_policy_loss"),
        why="clip 0.8 to 1.2 and token_mean by default, where the paper has 3e-4 and a mean over sequences",
    )
    skyrl.equal(
        "policy_loss_type=cispo",
        "cispo(clip=(0.0, 5.0))",
        policy("compute_policy_loss_cispo"),
        why="the bounds are 1 − 1 and 1 + 4",
    )
    skyrl.equal("policy_loss_type=rollout_is", "rollout_is()", policy("rollout_is_policy_loss", sampler=True))
    skyrl.equal("policy_loss_type=dppo", "dppo_tv()", policy("dppo_policy_loss"))
    skyrl.equal(
        "policy_loss_type=dppo, binary_kl, δ = 0.05",
        "dppo_kl()",
        policy("dppo_policy_loss", dppo={"dppo_type": "binary_kl", "delta_low": 0.05, "delta_high": 0.05}),
    )
    skyrl.equal(
        "policy_loss_type=kl_cov, as sums",
        "kl_cov(fraction=0.2, weigh=token_sum, log_ratio_cap=None)",
        policy("compute_policy_loss_kl_cov", loss_reduction=None),
        inputs="one_group",
    )
    skyrl.different(
        "policy_loss_type=kl_cov, token_mean",
        "kl_cov(fraction=0.2, log_ratio_cap=None)",
        policy("compute_policy_loss_kl_cov"),
        inputs="one_group",
        why="A is divided by the tokens before, |lp − old| is not: the penalty counts n times as much",
    )
    skyrl.different(
        "use_entropy_loss, coefficient 0.01, token_mean",
        "with_entropy(ppo(), 0.01)",
        bonus("token_mean"),
        inputs="token_of_logits",
        source="skyrl/backends/skyrl_train/workers/worker.py",
        why="the bonus is a mean over sequences, whatever the reduction of the loss",
    )
    skyrl.equal(
        "use_entropy_loss, coefficient 0.01, sequence_mean",
        "with_entropy(ppo(weigh=sequence_mean), 0.01)",
        bonus("sequence_mean"),
        inputs="token_of_logits",
        source="skyrl/backends/skyrl_train/workers/worker.py",
    )
    skyrl.equal(
        "critic, value_clip=0.2",
        "value_loss(weigh=sequence_mean)",
        critic(),
        inputs="values",
        why="a mean over sequences, where verl has one over tokens",
    )
    for name, call in (
        ("grpo", "group_advantages(rewards, groups)"),
        ("rloo", "leave_one_out_advantages(rewards, groups)"),
        ("maxrl", "maxrl_advantages(rewards, groups, eps=1e-6)"),
    ):
        skyrl.equal(f"advantage_estimator={name}", call, advantage(name), inputs="samples")
    skyrl.equal("cross_entropy", "cross_entropy(weigh=token_sum)", policy("cross_entropy_loss"))
    skyrl.equal(
        "importance_sampling",
        "importance_sampling(weigh=token_sum, log_ratio_cap=None)",
        policy("importance_sampling_loss", loss_reduction=None),
    )
    for kind, knobs in (("k1", "kl=k1"), ("abs", "kl=k_abs"), ("k2", "kl=k2"), ("k3", "kl_cap=10.0")):
        why = "the default" if kind == "k3" else ""
        skyrl.equal(f"kl_estimator_type={kind}", f"with_kl(reinforce(), 1.0, {knobs})", kl(kind), why=why)
    skyrl.equal(
        "kl_estimator_type=k3, k3 above 10", "with_kl(reinforce(), 1.0, kl_cap=10.0)", kl("k3"), inputs="far_reference"
    )


rows()
