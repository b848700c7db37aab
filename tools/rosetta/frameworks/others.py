"""Frameworks with few losses of their own: unsloth, torchtitan, LLaMA-Factory, axolotl and xtuner."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.formulas import pair_means, pair_sums, token_mean
from tools.rosetta.installed import Peer
from tools.rosetta.row import Framework

unsloth = Framework("unsloth_zoo 2026.10.9", "unsloth_zoo/rl_replacements.py")
torchtitan = Framework("torchtitan 0.3.0", "torchtitan/experiments/rl/losses/dapo.py")
llamafactory = Framework("LLaMA-Factory 0.9.5", "llamafactory/train/dpo/trainer.py", "pairs")
rllm = Framework("rLLM (main, 2026-11)", "rllm/trainer/algorithms/advantage.py", "samples")
flashinfer = Framework("flashinfer (main, 2026-11)", "flashinfer/chunked_lm_head.py")
xtuner = Framework("xtuner (main, 2026-11)", "xtuner/v1/rl/loss/oreal_loss.py")


def grpo(**settings: Any) -> Peer:
    """Return unsloth's grpo_compute_loss."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        beta = settings.get("beta", 0.0)
        own = {"num_items_in_batch": b.mask.sum(), "max_completion_length": 16, **settings}
        own.pop("beta", None)
        sampler = b.sampler_logprobs if own.get("use_vllm") else None
        ids = torch.zeros_like(b.mask).long()
        result = names["grpo_compute_loss"](
            b.ref_logprobs, b.lp, b.old_logprobs, sampler, ids, b.mask, beta, b.advantages, **own
        )
        return result[0]

    return Peer("unsloth_zoo", (("rl_replacements.py", "grpo_compute_loss"),), run, {"torch": torch, "math": math})


def titan(low: float, high: float) -> Peer:
    """Return torchtitan's DAPOLoss."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        self = SimpleNamespace(ratio_clip_low=low, ratio_clip_high=high)
        names["compute_logprobs"] = lambda *_, **__: (b.lp, torch.zeros_like(b.lp))
        return names["__call__"](
            self,
            None,
            None,
            float(b.mask.sum()),
            generator_logprobs=b.old_logprobs,
            advantages=b.A,
            loss_mask=b.mask.bool(),
        )[0]

    path = "experiments/rl/losses/dapo.py"
    return Peer("torchtitan", ((path, "DAPOLoss.__call__"),), run, {"torch": torch, "_MAX_LOG_RATIO": 20.0})


def preference(method: str, *, mean: bool = True, **settings: Any) -> Peer:
    """Return a loss of LLaMA-Factory's DPO trainer, averaged over pairs."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        self = SimpleNamespace(**{"beta": 0.1, **settings})
        return names[method](self, *(pair_means if mean else pair_sums)(b, b.lp)).mean()

    definitions = (("train/dpo/trainer.py", f"CustomDPOTrainer.{method}"),)
    return Peer("llamafactory", definitions, run, {"torch": torch, "F": F})


def logits(name: str) -> Peer:
    """Return a supervised loss of LLaMA-Factory on logits."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        labels = torch.where(b.mask.bool(), 0, -100)
        return names[name](b.leaf.flatten(0, 1), labels.flatten())

    return Peer("llamafactory", (("train/trainer_utils.py", name),), run, {"torch": torch, "F": F})


def margin(b: Batch) -> Tensor:
    """The difference of summed log-ratios."""
    chosen, rejected = pair_sums(b, b.lp - b.ref_logprobs)
    return chosen - rejected


def rows() -> None:
    """Add the rows."""
    no_cap = "log_ratio_cap=None"
    unsloth.equal(
        "loss_type=grpo, beta=0.04",
        f"with_kl(ppo(weigh=sequence_mean, {no_cap}), 0.04, kl_cap=10.0)",
        grpo(loss_type="grpo", beta=0.04),
        why="bounds of ±20 and 10 on the KL, unlike TRL",
    )
    unsloth.equal(
        "loss_type=grpo, beta=0.04, k3 above 10",
        f"with_kl(ppo(weigh=sequence_mean, {no_cap}), 0.04, kl_cap=10.0)",
        grpo(loss_type="grpo", beta=0.04),
        inputs="far_reference",
    )
    unsloth.equal("loss_type=dapo", f"bnpo({no_cap})", grpo(loss_type="dapo"))
    unsloth.equal("loss_type=dr_grpo", f"dr_grpo(weigh=fixed_length(16), {no_cap})", grpo(loss_type="dr_grpo"))
    unsloth.equal(
        "importance_sampling_level=sequence, loss_type=grpo",
        f"gspo(clip=(0.8, 1.2), {no_cap})",
        grpo(loss_type="grpo", importance_sampling_level="sequence"),
    )
    for mode, weight in (
        ("geometric_mask", "rollout.masked((0.0, 1.1), geometric_level)"),
        ("geometric_truncate", "rollout.truncated((0.0, 1.1), geometric_level)"),
    ):
        unsloth.equal(
            f"vllm_importance_sampling_mode={mode}, clip_max=1.1, loss_type=dapo",
            f"with_rollout_weight(bnpo({no_cap}), {weight})",
            grpo(
                loss_type="dapo",
                use_vllm=True,
                vllm_importance_sampling_correction=True,
                vllm_importance_sampling_mode=mode,
                vllm_importance_sampling_clip_max=1.1,
            ),
        )
    torchtitan.equal("GRPOLoss (clip_eps 0.2)", "ppo()", titan(0.2, 0.2))
    torchtitan.equal("DAPOLoss(ratio_clip_high=0.28)", "dapo()", titan(0.2, 0.28))
    torchtitan.different(
        "DAPOLoss(), for DAPO's paper",
        "dapo()",
        titan(0.2, 0.2),
        why="ratio_clip_high is 0.2 unless set; the paper has 0.28",
    )
    llamafactory.equal(
        "pref_loss=sigmoid (default), pref_beta=0.1",
        "dpo()",
        lambda b: -F.logsigmoid(0.1 * margin(b)).mean(),
        why="TRL's loss, without an SFT term",
    )
    llamafactory.equal("pref_loss=orpo", "orpo()", preference("odds_ratio_loss"))
    llamafactory.equal("pref_loss=simpo", "simpo(beta=0.1, gamma=0.5)", preference("simpo_loss", simpo_gamma=0.5))
    supervised = {"inputs": "token_of_logits", "source": "llamafactory/train/trainer_utils.py"}
    llamafactory.equal("use_dft_loss", "dft()", logits("_dft_cross_entropy"), **supervised)
    llamafactory.equal(
        "use_eaft_loss",
        "eaft(entropy_scale=3.0)",
        logits("_eaft_cross_entropy"),
        **supervised,
        why="with a vocabulary of 20; of a larger one it takes the entropy of the 20 most likely tokens",
    )
    rllm.equal(
        "prpo",
        "batch_advantages(rewards)",
        lambda b: (b.rewards - b.rewards.mean()) / (b.rewards.std(correction=0) + 1e-6),
    )
    flashinfer.equal(
        "policy",
        "capped_importance_sampling(log_ratio_cap=None)",
        capped,
        why="the gradient is 0 above the cap, whatever the sign of A",
    )
    xtuner.equal(
        "OREAL, negative factor 0.5",
        "oreal(reinforce(), negative_factor=0.5)",
        oreal,
        inputs="two_parts",
        why="a positive and a negative denominator",
    )


def capped(b: Batch) -> Tensor:
    """−min(exp(lp − sampler), 2)·A."""
    return token_mean(b, -(b.lp - b.sampler_logprobs).exp().clamp(max=2.0) * b.A)


def oreal(b: Batch) -> Tensor:
    """0.5·PG(A <= 0) + PG(A > 0) + SFT(A > 0), each over its own tokens."""
    gradient, positive = -b.A * b.lp, b.positive_weights
    good = ((gradient - b.lp) * positive).sum() / positive.sum()
    return 0.5 * (gradient * b.mask).sum() / b.mask.sum() + good


rows()
