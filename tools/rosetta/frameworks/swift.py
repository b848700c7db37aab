"""ms-swift 4.6.0: GRPOTrainer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.formulas import by_token, clipped, k3, log_ratio, per_sequence, sequence_mean, token_mean, weighted
from tools.rosetta.installed import Peer
from tools.rosetta.row import Framework

GRPO = "rlhf_trainers/grpo_trainer.py"
swift = Framework("ms-swift 4.6.0", f"swift/{GRPO}")


def fipo(**settings: Any) -> Peer:
    """Return loss_type=fipo: its own weight of the future, on the clipped loss that it has in common with dapo."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        args = SimpleNamespace(delta=settings.get("delta"))
        self = SimpleNamespace(
            args=args,
            fipo_gamma=2 ** (-1 / 32),
            fipo_clip_range=0.2,
            fipo_clip_high_only=True,
            fipo_safety_threshold=4.0,
        )
        ratio = log_ratio(b).exp()
        mask = b.mask.bool()
        weight, _ = names["_compute_fipo_influence"](self, log_ratio(b).detach(), ratio.detach(), b.A, mask)
        bounded = ratio if args.delta is None else ratio.clamp(max=args.delta)
        loss = -torch.min(bounded * b.A, ratio.clamp(0.8, settings.get("high", 1.2)) * b.A)
        return token_mean(b, loss * weight)

    definitions = ((GRPO, "GRPOTrainer._compute_fipo_influence"),)
    return Peer("swift", definitions, run, {"torch": torch})


def real(b: Batch) -> Tensor:
    """log(1 + Σ₋ e^(s/τ)) + log(1 + Σ₊ e^(−s/τ)) of each group, a mean over groups; τ = 0.5."""
    s = per_sequence(b, log_ratio(b)).view(2, 3) / 0.5
    positive = b.advantages.view(2, 3) > 0
    wrong = torch.log1p((s.exp() * ~positive).sum(1))
    right = torch.log1p(((-s).exp() * positive).sum(1))
    return (wrong + right).mean()


def kl(b: Batch) -> Tensor:
    """k3 of a log-ratio within ±20, at most 10."""
    return k3((b.ref_logprobs - b.lp).clamp(-20, 20)).clamp(-10, 10)


def ppo(b: Batch) -> Tensor:
    """PPO's loss of each token."""
    return clipped(log_ratio(b).exp(), b.A, 0.8, 1.2)


def rows() -> None:
    """Add the rows."""
    no_cap = "log_ratio_cap=None"
    swift.equal(
        "loss_type=grpo, beta=0.04 (default), k3 above 10",
        f"with_kl(ppo(weigh=sequence_mean, {no_cap}), 0.04, kl_cap=10.0)",
        lambda b: sequence_mean(b, ppo(b) + 0.04 * kl(b)),
        inputs="far_reference",
        why="bounds of ±20 and 10 on the KL, unlike TRL",
    )
    swift.equal("loss_type=dapo, beta=0", f"bnpo({no_cap})", lambda b: token_mean(b, ppo(b)))
    swift.equal("loss_type=bnpo, beta=0", f"bnpo({no_cap})", lambda b: token_mean(b, ppo(b)))
    swift.equal(
        "loss_type=cispo, epsilon_high=5, beta=0",
        f"cispo(clip=(0.0, 5.0), {no_cap})",
        lambda b: token_mean(b, weighted(b, log_ratio(b).exp().clamp(max=5.0))),
    )
    swift.equal(
        "importance_sampling_level=sequence, loss_type=grpo, beta=0",
        f"gspo(clip=(0.8, 1.2), {no_cap})",
        lambda b: sequence_mean(b, clipped(per_sequence(b, log_ratio(b)).exp().expand_as(b.lp), b.A, 0.8, 1.2)),
    )
    swift.equal(
        "importance_sampling_level=sequence_token, loss_type=grpo, beta=0",
        f"gspo_token(clip=(0.8, 1.2), {no_cap})",
        lambda b: sequence_mean(b, clipped(by_token(b).exp(), b.A, 0.8, 1.2)),
    )
    swift.equal("loss_type=fipo, beta=0", f"fipo(clip=(0.8, 1.2), dual_clip=None, {no_cap})", fipo())
    swift.equal("loss_type=real, beta=0", "real()", real)


rows()
