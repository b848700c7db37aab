"""Tinker: the built-in losses of the service, and tinker_cookbook."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.formulas import by_token, clipped, log_ratio, pair_sums, token_sum, weighted
from tools.rosetta.installed import Peer
from tools.rosetta.row import Framework

DOCS = "tinker-docs.thinkingmachines.ai/losses"
tinker = Framework("Tinker (built-ins of the service)", DOCS)
cookbook = Framework("tinker_cookbook 0.6.1", "tinker_cookbook/rl/data_processing.py", "samples")

CAP = "log_ratio_cap=None"


def importance(b: Batch) -> Tensor:
    """−r·A."""
    return token_sum(b, -log_ratio(b).exp() * b.A)


def builtins() -> None:
    """Add the built-in losses: sums over tokens, with the logprobs of the sampler in the column ``logprobs``."""
    tinker.equal("cross_entropy", "cross_entropy(weigh=token_sum)", lambda b: token_sum(b, -b.lp))
    tinker.equal(
        "importance_sampling",
        f"importance_sampling(weigh=token_sum, {CAP})",
        importance,
        why="old_logprobs is the service's column logprobs, those of the sampler",
    )
    tinker.equal(
        "ppo", f"ppo(weigh=token_sum, {CAP})", lambda b: token_sum(b, clipped(log_ratio(b).exp(), b.A, 0.8, 1.2))
    )
    tinker.equal(
        "cispo",
        f"cispo(weigh=token_sum, {CAP})",
        lambda b: token_sum(b, weighted(b, log_ratio(b).exp().clamp(0.0, 4.0))),
    )
    tinker.equal(
        "dro, beta=0.05", "dro(weigh=token_sum)", lambda b: token_sum(b, -(b.A * b.lp - 0.025 * log_ratio(b).square()))
    )
    tinker.equal(
        "gspo, clip thresholds 0.8 and 1.2",
        f"gspo_token(clip=(0.8, 1.2), weigh=token_sum, {CAP})",
        lambda b: token_sum(b, clipped(by_token(b).exp(), b.A, 0.8, 1.2)),
    )
    tinker.equal(
        "[N, K] target_tokens: top-k forward KL",
        "multi_target_cross_entropy(weigh=token_sum)",
        lambda b: -(b.mask * b.lp).sum(),
        inputs="candidates",
    )
    tinker.factor(
        "any sum, beside our means",
        "ppo(log_ratio_cap=None)",
        lambda b: token_sum(b, clipped(log_ratio(b).exp(), b.A, 0.8, 1.2)),
        factor="n",
        why="the number of tokens: the service never divides",
    )
    tinker.different(
        "importance_sampling, log-ratios beyond ±20, our cap",
        "importance_sampling(weigh=token_sum)",
        importance,
        inputs="far",
        why="no bound of the log-ratio is documented; ours is ±20",
    )


def dpo() -> Peer:
    """Return the loss of preference/train_dpo.py."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        chosen, rejected = pair_sums(b, b.lp)
        ref_chosen, ref_rejected = pair_sums(b, b.ref_logprobs)
        lists = [list(x) for x in (chosen, rejected, ref_chosen, ref_rejected)]
        return names["compute_dpo_loss"](*lists, 0.1)[0]

    definitions = (("preference/train_dpo.py", "compute_dpo_loss"),)
    return Peer("tinker_cookbook", definitions, run, {"torch": torch, "F": F})


def advantages() -> Peer:
    """Return the advantages of rl/data_processing.py."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        groups = [SimpleNamespace(get_total_rewards=lambda x=x: x.tolist()) for x in b.rewards.view(2, 4)]
        return torch.cat(names["compute_advantages"](groups)).double()

    return Peer("tinker_cookbook", (("rl/data_processing.py", "compute_advantages"),), run, {"torch": torch})


def nll() -> Peer:
    """Return the metric of supervised/common.py, whose gradient is that of the loss it measures."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        wrapped = [[SimpleNamespace(to_torch=lambda r=r: r) for r in x] for x in (b.lp, b.mask)]
        names["float"] = lambda x: x
        return torch.as_tensor(names["compute_mean_nll"](*wrapped))

    names = {"torch": torch, "logger": SimpleNamespace(warning=lambda *_: None)}
    return Peer("tinker_cookbook", (("supervised/common.py", "compute_mean_nll"),), run, names)


def sdft() -> Peer:
    """Return the reverse KL of distillation/sdft.py over the teacher's renormalised candidates."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        weights = b.teacher_logprobs.softmax(-1) * b.mask
        data = [SimpleNamespace(loss_fn_inputs={"weights": SimpleNamespace(to_torch=lambda w=w: w)}) for w in weights]
        return names["reverse_kl_custom_loss"](data, list(b.lp))[0]

    return Peer("tinker_cookbook", (("distillation/sdft.py", "reverse_kl_custom_loss"),), run, {"torch": torch})


def distillation(b: Batch) -> Tensor:
    """−r·(teacher − old): the teacher's log-ratio as the advantage of importance sampling."""
    return token_sum(b, -log_ratio(b).exp() * (b.teacher_logprobs - b.old_logprobs))


def centred_kl(b: Batch) -> Tensor:
    """0.1·(mean difference − difference) of each token, the mean over all tokens of the batch."""
    gap = (b.logprobs - b.ref_logprobs) * b.mask
    return 0.1 * b.mask * (gap.sum() / b.mask.sum() - gap)


def recipes() -> None:
    """Add the functions of the cookbook."""
    cookbook.equal(
        "preference/train_dpo.py, dpo_beta=0.1",
        "dpo()",
        dpo(),
        inputs="pairs",
        source="tinker_cookbook/preference/train_dpo.py",
    )
    cookbook.equal(
        "rl/train.py, advantages",
        'group_advantages(rewards, groups, scale="none")',
        advantages(),
        why="r − group mean, never divided",
    )
    cookbook.equal(
        "rl/metrics.py, kl_penalty_coef=0.1",
        "kl_penalties(logprobs, ref_logprobs, mask, 0.1, centred=True)",
        centred_kl,
        source="tinker_cookbook/rl/metrics.py",
        why="added to the advantages",
    )
    cookbook.different(
        "rl/train.py, advantages as GRPO's paper",
        "group_advantages(rewards, groups)",
        advantages(),
        why="no standard deviation",
    )
    cookbook.equal(
        "rl/train.py, loss_fn=importance_sampling (default)",
        f"importance_sampling(weigh=token_sum, {CAP})",
        importance,
        inputs="policy",
        source="tinker_cookbook/rl/train.py",
    )
    cookbook.equal(
        "supervised/common.py, compute_mean_nll",
        "cross_entropy()",
        nll(),
        inputs="policy",
        source="tinker_cookbook/supervised/common.py",
    )
    cookbook.equal(
        "distillation/sdft.py, reverse_kl_custom_loss",
        "top_k_reverse_kl(weigh=token_sum)",
        sdft(),
        inputs="candidates",
        source="tinker_cookbook/distillation/sdft.py",
    )
    cookbook.equal(
        "distillation/train_on_policy.py, coefficient 1",
        "sampled_reverse_kl(weigh=token_sum, log_ratio_cap=None)",
        distillation,
        inputs="policy",
        source="tinker_cookbook/distillation/train_on_policy.py",
    )


builtins()
recipes()
