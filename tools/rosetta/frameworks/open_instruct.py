"""open-instruct e6c3044aa, of August 2026: GRPO and DPO of Tülu and OLMo."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.formulas import clipped, k3, log_ratio, pair_means, pair_sums, per_sequence, token_mean, weighted
from tools.rosetta.row import Framework

open_instruct = Framework("open-instruct e6c3044aa", "open_instruct/grpo_utils.py")


def rho(b: Batch) -> Tensor:
    """clamp(exp(old − sampler), max 2): on unless the cap is 0."""
    return (b.old_logprobs - b.sampler_logprobs).exp().clamp(max=2.0)


def kl(b: Batch, estimator: int) -> Tensor:
    """k1, k2, k3 and r·k1 of a log-ratio within ±40, by the number of kl_estimator."""
    d = log_ratio(b, "ref_logprobs", 40.0)
    return (d, d.square() / 2, k3(-d), log_ratio(b).exp() * d)[estimator]


def dapo(b: Batch, estimator: int = 2) -> Tensor:
    """The default: clip 0.2 and 0.272, rho, 0.05·k3."""
    return token_mean(b, clipped(log_ratio(b).exp(), b.A, 0.8, 1.272) * rho(b) + 0.05 * kl(b, estimator))


def margin(b: Batch, mean: bool) -> Tensor:
    """The difference of log-ratios, of sums or of means over tokens."""
    side = pair_means if mean else pair_sums
    (chosen, rejected), (ref_c, ref_r) = side(b, b.lp), side(b, b.ref_logprobs)
    return chosen - ref_c - rejected + ref_r


def simpo(b: Batch) -> Tensor:
    """−log σ(β·(m − 0.3)) with β = 5, m the difference of mean logprobs."""
    chosen, rejected = pair_means(b, b.lp)
    return -F.logsigmoid(5.0 * (chosen - rejected - 0.3)).mean()


def vaco(b: Batch) -> Tensor:
    """DAPO's loss times rho; 0 where A·(old − sampler) > 0 in a sequence whose mean |rho − 1| is above 0.2."""
    gap = (b.old_logprobs - b.sampler_logprobs).clamp(-10, 10)
    far = per_sequence(b, (gap.exp() - 1).abs()) > 0.2
    weight = torch.where(far & (gap.sign() * b.A > 0), 0.0, gap.exp().clamp(max=2.0))
    return token_mean(b, clipped(log_ratio(b).exp(), b.A, 0.8, 1.272) * weight)


def rows() -> None:
    """Add the rows."""
    ppo = "ppo(clip=(0.8, 1.272), log_ratio_cap=None)"
    open_instruct.equal("loss_fn=dapo (default, kl_estimator 2)", f"with_kl(with_tis({ppo}), 0.05, k3_uncapped)", dapo)
    knobs = {0: "k1", 1: "k2"}
    for estimator, kind in knobs.items():
        open_instruct.equal(
            f"kl_estimator={estimator}", f"with_kl(with_tis({ppo}), 0.05, {kind})", lambda b, e=estimator: dapo(b, e)
        )
    open_instruct.equal(
        "kl_estimator=3",
        f'with_kl(with_tis({ppo}), 0.05, k1, rollout.ratio_to("old_logprobs", None))',
        lambda b: dapo(b, 3),
    )
    open_instruct.different(
        "loss_fn=dapo, for DAPO's paper",
        "dapo(log_ratio_cap=None)",
        dapo,
        why="0.272 for 0.28, a weight min(old / sampler, 2), and 0.05·k3",
    )
    open_instruct.equal(
        "loss_fn=cispo, beta=0",
        "with_tis(cispo(clip=(0.0, 1.272), log_ratio_cap=None))",
        lambda b: token_mean(b, weighted(b, log_ratio(b).exp().clamp(max=1.272)) * rho(b)),
    )
    open_instruct.equal(
        "rho_mask_tv_divergence=True, rho_mask_upper_bound=0.2, beta=0, one update for each batch",
        'with_vaco_mask(with_tis(ppo(clip=(0.8, 1.272), log_ratio_cap=None)), 0.2, "sampler_logprobs")',
        vaco,
        inputs="on_policy",
        why="its ratio is that of the old policy and the sampler: with more updates ours moves with the policy",
    )
    dpo = {"inputs": "pairs", "source": "open_instruct/dpo_utils.py"}
    open_instruct.equal("loss_type=dpo", "dpo()", lambda b: -F.logsigmoid(0.1 * margin(b, False)).mean(), **dpo)
    open_instruct.equal(
        "loss_type=dpo_norm, beta=5", "dpo_norm()", lambda b: -F.logsigmoid(5.0 * margin(b, True)).mean(), **dpo
    )
    open_instruct.equal("loss_type=simpo, beta=5, gamma_beta_ratio=0.3", "simpo(beta=5.0, gamma=1.5)", simpo, **dpo)
    open_instruct.different(
        "loss_type=wpo",
        "wpo()",
        lambda b: (-F.logsigmoid(0.1 * margin(b, False)) * sum(pair_means(b, b.lp.detach())).exp().clamp(max=1)).mean(),
        why="the mean probability alone, without Σp² of the vocabulary",
        **dpo,
    )


rows()
