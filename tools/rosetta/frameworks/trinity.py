"""Trinity-RFT 0.6.0: policy losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.formulas import clipped, log_ratio, token_mean
from tools.rosetta.installed import Peer
from tools.rosetta.row import Framework

FOLDER = "algorithm/policy_loss_fn"
trinity = Framework("Trinity-RFT 0.6.0", f"trinity/{FOLDER}")
SHARED = tuple(("algorithm/utils.py", name) for name in ("masked_sum", "masked_mean", "aggregate_loss"))


class PolicyLossFn:
    """The base of Trinity's losses, which maps names between frameworks."""

    def __init__(self, backend: str = "verl") -> None:
        self.backend = backend


def policy(file: str, name: str, also: tuple[str, ...] = (), **settings: Any) -> Peer:
    """Return a policy loss."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        loss = names[name](**settings)
        return loss(logprob=b.lp, old_logprob=b.old_logprobs, action_mask=b.mask, advantages=b.A)[0]

    names = {"torch": torch, "PolicyLossFn": PolicyLossFn}
    path = f"{FOLDER}/{file}.py"
    return Peer("trinity", (*SHARED, *((path, x) for x in also), (path, name)), run, names)


def dpo() -> Peer:
    """Return the preference loss."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        return names["DPOLossFn"]()(logprob=b.lp, ref_logprob=b.ref_logprobs, action_mask=b.mask)[0]

    names = {"torch": torch, "F": F, "PolicyLossFn": PolicyLossFn}
    return Peer("trinity", (*SHARED, (f"{FOLDER}/dpo_loss.py", "DPOLossFn")), run, names)


def rec(**settings: Any) -> Peer:
    """Return REC at its default arguments."""
    defaults = {"epsilon_low_prime": 0.6, "epsilon_high_prime": 2.0}
    return policy("rec_policy_loss", "RECPolicyLossFn", **{**defaults, **settings})


def clip_b(b: Batch) -> Tensor:
    """−A·lp, or 0 where A < 0 and S = p·(H + lp) is more than half a deviation below its mean over the batch."""
    s = (b.lp.exp() * (b.entropy + b.lp)).detach()
    n = b.mask.sum()
    centred = s - (s * b.mask).sum() / n
    deviation = ((centred.square() * b.mask).sum() / n).sqrt()
    keep = (b.A >= 0) | (centred >= -0.5 * deviation)
    return -(b.A * b.lp * keep * b.mask).sum()


def mix(b: Batch) -> Tensor:
    """0.9 times the PPO loss of the policy's tokens, plus 0.1 times the NLL of the expert's."""
    rl = token_mean(b, clipped(log_ratio(b, cap=20.0).exp(), b.A, 0.8, 1.2, 3.0))
    return 0.9 * rl - 0.1 * (b.lp * b.sft_weights).sum() / b.sft_weights.sum()


def rows() -> None:
    """Add the rows."""
    no_cap = "log_ratio_cap=None"
    ppo = ("ppo_policy_loss", "PPOPolicyLossFn")
    trinity.equal("ppo (default)", "ppo(dual_clip=3.0)", policy(*ppo, clip_range=0.2), why="the dual clip is always on")
    trinity.equal(
        "ppo, enable_sequence_masking, delta 0.1",
        "with_opsm(ppo(dual_clip=3.0), 0.1)",
        policy(*ppo, clip_range=0.2, enable_sequence_masking=True),
    )
    trinity.equal(
        "gspo",
        f"gspo_token({no_cap})",
        policy("gspo_policy_loss", "GSPOLossFn", clip_range_low=3e-4, clip_range_high=4e-4),
    )
    trinity.equal("cispo", f"cispo(clip=(0.0, 1.28), {no_cap})", policy("cispo_policy_loss", "CISPOPolicyLossFn"))
    trinity.different(
        "cispo, with MiniMax's bounds",
        f"cispo({no_cap})",
        policy("cispo_policy_loss", "CISPOPolicyLossFn"),
        why="the upper bound is 1.28 by default",
    )
    trinity.different(
        "sapo",
        f"sapo(weigh=token_mean, {no_cap})",
        policy("sapo_policy_loss", "SAPOPolicyLossFn"),
        why="−A·sg(gate)·lp: the gradient of the gate is lost, where the paper differentiates it",
    )
    trinity.equal(
        "importance_sampling",
        "importance_sampling()",
        policy("importance_sampling_policy_loss", "ImportanceSamplingLossFn"),
    )
    trinity.equal(
        "topr", f"topr(level=token_level, weigh=token_mean, {no_cap})", policy("topr_policy_loss", "TOPRPolicyLossFn")
    )
    trinity.different(
        "topr, for the paper's equation 8",
        f"topr({no_cap})",
        policy("topr_policy_loss", "TOPRPolicyLossFn"),
        why="the ratio of each token, where the paper has that of the answer",
    )
    trinity.equal("opmd", "opmd()", policy("opmd_policy_loss", "OPMDPolicyLossFn"))
    trinity.equal("sppo", f"sppo_token({no_cap})", policy("sppo_loss_fn", "sPPOPolicyLossFn"))
    trinity.equal(
        "mix, mu=0.1, one expert part",
        "chord(ppo(dual_clip=3.0))",
        mix,
        inputs="two_parts",
        source=f"trinity/{FOLDER}/mix_policy_loss.py",
    )
    trinity.equal(
        "clipb, mu=0.5, beside REINFORCE as a sum",
        "with_clip_b(reinforce(weigh=token_sum), 0.5)",
        clip_b,
        inputs="token_of_logits",
        source="trinity/algorithm/advantage_fn/clipb_advantage.py",
        why="as a mean it differs: its dropped tokens leave the denominator",
    )
    trinity.equal(
        "asymre, baseline_shift -0.1",
        "asymre_advantages(rewards, groups)",
        lambda b: b.rewards - (b.rewards.view(2, 4).mean(1).repeat_interleave(4) - 0.1),
        inputs="samples",
        source="trinity/algorithm/advantage_fn/asymre_advantage.py",
    )
    for name, call in (("SFTISLossFn", "dft()"), ("SFTPhiLossFn", "sft_phi()")):
        trinity.equal(f"chord's {name}", call, policy("chord_policy_loss", name, also=("phi_function",)))
    trinity.equal("sft", "cross_entropy()", policy("sft_loss", "SFTLossFn"))
    trinity.different(
        "dpo",
        "dpo()",
        dpo(),
        inputs="pairs",
        why="sums over all pairs of the batch before the sigmoid: one margin for the whole batch",
    )
    trinity.equal("rec, clip_mode=none (default)", "reinforce()", rec())
    trinity.equal("rec, one-side", f"rec({no_cap})", rec(clip_mode="one-side"))
    trinity.equal(
        "rec, one-side, weight=importance_sampling",
        f'rec(is_weight="ratio_weight", {no_cap})',
        rec(clip_mode="one-side", weight="importance_sampling"),
    )
    trinity.equal("rec, two-side", f'rec(region="two_side", {no_cap})', rec(clip_mode="two-side"))
    trinity.equal("rec, ring", f"rec_ring({no_cap})", rec(clip_mode="ring"))
    trinity.equal(
        "rec, gspo-one-side",
        f"rec(level=geometric_level, weigh=sequence_mean, {no_cap})",
        rec(clip_mode="gspo-one-side"),
    )
    trinity.equal(
        "rec, regularizer=k2, coefficient 0.1",
        "kimi15(tau=0.2)",
        rec(regularizer="k2", regularizer_coef=0.1),
        why="the ½ of Kimi k1.5 is inside τ: τ = 2·coefficient",
    )


rows()
