"""slime 624b824a8, of August 2026, and miles with the same functions."""

from __future__ import annotations

from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.formulas import clipped, k3, log_ratio, per_sequence, sequence_mean, token_mean
from tools.rosetta.row import Framework

slime = Framework("slime 624b824a8", "slime/utils/ppo_utils.py")


def ppo(b: Batch, c: float | None = None) -> Tensor:
    """PPO's loss of each token."""
    return clipped(log_ratio(b).exp(), b.A, 0.8, 1.28, c)


def kl(b: Batch, kind: str, ratio: bool = False) -> Tensor:
    """The estimate of a kl_loss_type."""
    d = log_ratio(b, "ref_logprobs")
    estimate = {"k1": d, "k2": d.square() / 2, "k3": k3(-d), "low_var_kl": k3(-d)}[kind]
    estimate = log_ratio(b).exp() * estimate if ratio else estimate
    return estimate.clamp(-10, 10) if kind == "low_var_kl" else estimate


def opsm(b: Batch) -> Tensor:
    """1 − [A < 0 and mean (old − lp) > 1e-4]."""
    drift = per_sequence(b, b.old_logprobs - b.lp).detach()
    return 1 - ((b.A < 0) & (drift > 1e-4)).double()


def tis(b: Batch) -> Tensor:
    """clamp(exp(old − sampler), 0, 2), slime's --use-tis."""
    return (b.old_logprobs - b.sampler_logprobs).exp().clamp(0, 2)


def rows() -> None:
    """Add the rows."""
    call = "dapo(log_ratio_cap=None, weigh=sequence_mean)"
    slime.equal("eps_clip 0.2, eps_clip_high 0.28, per-sample mean (default)", call, lambda b: sequence_mean(b, ppo(b)))
    slime.equal("--calculate-per-token-loss", "dapo(log_ratio_cap=None)", lambda b: token_mean(b, ppo(b)))
    slime.equal(
        "eps_clip_c=3",
        "dapo(log_ratio_cap=None, weigh=sequence_mean, dual_clip=3.0)",
        lambda b: sequence_mean(b, ppo(b, 3.0)),
    )
    slime.equal(
        "--advantage-estimator gspo",
        "gspo(clip=(0.8, 1.28), log_ratio_cap=None)",
        lambda b: sequence_mean(b, clipped(per_sequence(b, log_ratio(b)).exp().expand_as(b.lp), b.A, 0.8, 1.28)),
    )
    slime.equal(
        "--use-opsm, opsm_delta=1e-4",
        "opsm(clip=(0.8, 1.28), log_ratio_cap=None)",
        lambda b: sequence_mean(b, ppo(b) * opsm(b)),
    )
    slime.equal(
        "--use-tis",
        f"with_tis({call})",
        lambda b: sequence_mean(b, ppo(b) * tis(b)),
        source="slime/backends/megatron_utils/loss.py",
    )
    for kind, knobs in (
        ("k1", "kl=k1"),
        ("k2", "kl=k2"),
        ("k3", "kl=k3_uncapped"),
        ("low_var_kl", "kl=k3_uncapped, kl_cap=10.0"),
    ):
        slime.equal(
            f"--use-kl-loss, kl_loss_type={kind}, coef 0.01",
            f"with_kl({call}, 0.01, {knobs})",
            lambda b, kind=kind: sequence_mean(b, ppo(b) + 0.01 * kl(b, kind)),
        )
    slime.equal(
        "--use-unbiased-kl, kl_loss_type=low_var_kl",
        f'with_kl({call}, 0.01, k3_uncapped, rollout.ratio_to("old_logprobs", None), 10.0)',
        lambda b: sequence_mean(b, ppo(b) + 0.01 * kl(b, "low_var_kl", True)),
    )
    slime.equal(
        "--loss-type sft_loss --calculate-per-token-loss",
        "cross_entropy()",
        lambda b: token_mean(b, -b.lp),
        source="slime/backends/megatron_utils/loss.py",
    )


rows()
