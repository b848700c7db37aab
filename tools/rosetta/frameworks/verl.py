"""verl 0.9.1: loss modes, aggregation, KL types, rollout correction and estimators of advantages."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.installed import Peer
from tools.rosetta.row import Framework

CORE, TENSORS, ROLLOUT = "trainer/ppo/core_algos.py", "utils/torch_functional.py", "trainer/ppo/rollout_corr_helper.py"
verl = Framework("verl 0.9.1", f"verl/{CORE}")


class ActorConfig(SimpleNamespace):
    """The settings of verl's actor that its losses read, at their defaults."""

    def __init__(self, **settings: Any) -> None:
        policy_loss = SimpleNamespace(
            **{
                "clip_cov_ratio": 2e-4,
                "clip_cov_lb": 1.0,
                "clip_cov_ub": 5.0,
                "kl_cov_ratio": 2e-4,
                "ppo_kl_coef": 0.1,
                "dro_beta": 0.1,
                **settings.pop("policy_loss", {}),
            }
        )
        policy_loss.get = lambda key, default=None: getattr(policy_loss, key, default)
        defaults = {
            "clip_ratio": 0.2,
            "clip_ratio_low": 0.2,
            "clip_ratio_high": 0.2,
            "clip_ratio_c": 3.0,
            "tau_pos": 1.0,
            "tau_neg": 1.05,
            "global_batch_info": {},
            "policy_loss": policy_loss,
        }
        super().__init__(**{**defaults, **settings})

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key, default)


REJECTION = (
    "SAFETY_BOUND",
    "TOKEN_LEVEL_ROLLOUT_RS_OPTIONS",
    "SUPPORTED_ROLLOUT_RS_OPTIONS",
    "_parse_rollout_rs_thresholds",
    "compute_rs_metrics",
    "compute_rollout_rejection_mask",
)
WEIGHTS = ("SAFETY_BOUND", "_parse_rollout_is_threshold", "compute_is_metrics", "compute_rollout_correction_weights")


class NoConfig:
    """A class that no setting here is an instance of."""


MASKED = tuple(
    (TENSORS, name) for name in ("masked_sum", "masked_mean", "masked_var", "masked_whiten", "clip_by_value")
)
NAMES = {
    "torch": torch,
    "np": np,
    "math": math,
    "ActorConfig": ActorConfig,
    "AlgoConfig": NoConfig,
    "DictConfig": NoConfig,
    "defaultdict": defaultdict,
}


def functions(names: dict[str, Any]) -> None:
    """Give verl's functions the masked sums under the name of the module that they come from."""
    names["verl_F"] = SimpleNamespace(**{name: names[name] for _, name in MASKED})


def policy(
    mode: str,
    agg: str = "token-mean",
    tis: dict[str, Any] | None = None,
    reject: tuple[str, str] | None = None,
    **settings: Any,
) -> Peer:
    """Return verl's loss of a mode, with its weights of the rollout or its rejection."""
    name = f"compute_policy_loss_{mode}"

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        functions(names)
        weights = (
            None
            if tis is None
            else names["compute_rollout_correction_weights"](b.old_logprobs - b.sampler_logprobs, b.mask, **tis)[0]
        )
        mask = (
            b.mask
            if reject is None
            else names["compute_rollout_rejection_mask"](b.old_logprobs - b.sampler_logprobs, b.mask, *reject)[0]
        )
        loss, _ = names[name](
            b.old_logprobs,
            b.lp,
            b.A,
            mask,
            loss_agg_mode=agg,
            config=ActorConfig(**settings),
            rollout_is_weights=weights,
        )
        return loss

    wanted = (WEIGHTS if tis else ()) + (REJECTION if reject else ())
    needed = tuple((ROLLOUT, x) for x in wanted)
    return Peer("verl", (*MASKED, (CORE, "agg_loss"), *needed, (CORE, name)), run, NAMES)


def kl(kind: str, agg: str = "token-mean") -> Peer:
    """Return verl's KL loss alone."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        functions(names)
        return names["agg_loss"](names["kl_penalty"](b.lp, b.ref_logprobs, kind), b.mask, agg)

    definitions = (*MASKED, (CORE, "agg_loss"), (CORE, "kl_penalty_forward"), (CORE, "kl_penalty"))
    return Peer("verl", definitions, run, NAMES)


def rows() -> None:
    """Add the rows."""
    verl.equal("loss_mode=vanilla (default)", "ppo(dual_clip=3.0)", policy("vanilla"), why="the dual clip is always on")
    verl.equal("vanilla, clip_ratio_high=0.28", "dapo(dual_clip=3.0)", policy("vanilla", clip_ratio_high=0.28))
    verl.different(
        "vanilla, clip_ratio=0.1",
        "ppo(clip=(0.9, 1.1), dual_clip=3.0)",
        policy("vanilla", clip_ratio=0.1),
        why="clip_ratio has no effect beside the defaults 0.2 of clip_ratio_low and clip_ratio_high",
    )
    verl.different(
        "vanilla, for PPO's equation", "ppo()", policy("vanilla"), why="the dual clip with c = 3 is always on"
    )
    verl.equal("vanilla, log-ratios beyond ±20", "ppo(dual_clip=3.0)", policy("vanilla"), inputs="far")
    for agg, weigh in (
        ("seq-mean-token-sum", "sequence_sum_mean"),
        ("seq-mean-token-mean", "sequence_mean"),
        ("token-sum", "token_sum"),
    ):
        verl.equal(f"loss_agg_mode={agg}", f"ppo(dual_clip=3.0, weigh={weigh})", policy("vanilla", agg))
    verl.equal(
        "seq-mean-token-sum-norm",
        "dr_grpo(dual_clip=3.0, weigh=fixed_length(7))",
        policy("vanilla", "seq-mean-token-sum-norm"),
        why="loss_scale_factor=None is the width of the batch",
    )
    verl.equal(
        "seq-mean-token-mean, a row masked whole",
        "ppo(dual_clip=3.0, weigh=sequence_mean)",
        policy("vanilla", "seq-mean-token-mean"),
        inputs="masked_row",
    )
    verl.equal(
        "loss_mode=gspo",
        "gspo_token(clip=(0.8, 1.2), weigh=token_mean)",
        policy("gspo"),
        why="token-mean, and not the paper's mean over sequences",
    )
    verl.equal(
        "gspo, seq-mean-token-mean, the paper's clip",
        "gspo_token()",
        policy("gspo", "seq-mean-token-mean", clip_ratio_low=3e-4, clip_ratio_high=4e-4),
    )
    verl.different(
        "gspo, as the paper's equation 5",
        "gspo(clip=(0.8, 1.2), weigh=token_mean)",
        policy("gspo"),
        inputs="token_advantages",
        why="GSPO-token: each token has the gradient of its own log-ratio; equal if a sequence has one A",
    )
    verl.equal("loss_mode=sapo", "sapo()", policy("sapo"))
    verl.different(
        "sapo, loss_agg_mode=token-mean",
        "sapo(weigh=token_mean)",
        policy("sapo", "token-mean"),
        why="the mode is ignored: always seq-mean-token-mean",
    )
    verl.equal("loss_mode=gpg", "gpg()", policy("gpg"))
    verl.equal("loss_mode=cispo", "cispo(clip=(0.8, 1.2))", policy("cispo"))
    verl.different("cispo, with MiniMax's bounds", "cispo()", policy("cispo"), why="bounds 0.8 and 1.2 by default")
    verl.equal(
        "loss_mode=geo_mean",
        "gmpo(clip=(0.8187307530779818, 1.2214027581601699), log_ratio_cap=None)",
        policy("geo_mean"),
        why="takes a mean over sequences in every aggregation mode",
    )
    verl.equal("loss_mode=dro, dro_beta=0.1", "dro(beta=0.1)", policy("dro"))
    verl.different(
        "loss_mode=dppo_tv",
        "dppo_tv()",
        policy("dppo_tv"),
        why="−A·sg(min(r, c))·lp under the mask, where the paper and SkyRL have −A·r: other value",
    )
    verl.different(
        "loss_mode=dppo_kl",
        "dppo_kl(delta_low=0.2, delta_high=0.2)",
        policy("dppo_kl"),
        why="−A·sg(min(r, c))·lp under the mask, where the paper and SkyRL have −A·r: other value",
    )
    verl.equal(
        "loss_mode=dppo_tv, clip_ratio_c=20",
        "with_tv_mask(cispo(clip=(0.0, 20.0)))",
        policy("dppo_tv", clip_ratio_c=20.0),
    )
    verl.equal(
        "loss_mode=dppo_kl, clip_ratio_c=20",
        "with_binary_kl_mask(cispo(clip=(0.0, 20.0)), delta_low=0.2, delta_high=0.2)",
        policy("dppo_kl", clip_ratio_c=20.0),
    )
    verl.equal(
        "loss_mode=clip_cov, every candidate drawn",
        "clip_cov(fraction=1.0, cov_bounds=(0.05, 5.0), log_ratio_cap=None)",
        policy("clip_cov", policy_loss={"clip_cov_ratio": 1.0, "clip_cov_lb": 0.05}),
        inputs="one_group",
        why="with a smaller fraction verl draws tokens at random; ours takes those of the largest covariance",
    )
    verl.equal("loss_mode=kl_cov", "kl_cov(kl_coef=0.1, log_ratio_cap=None)", policy("kl_cov"), inputs="one_group")
    kl_types = {
        "kl": "kl=k1",
        "abs": "kl=k_abs",
        "mse": "kl=k2",
        "low_var_kl": "kl_cap=10.0",
        "k1+": "kl=k1_plus",
        "k3+": "kl=k3_plus",
    }
    for kind, knobs in kl_types.items():
        why = {"kl": "without a gradient in expectation", "low_var_kl": "the default"}.get(kind, "")
        verl.equal(f"kl_loss_type={kind}", f"with_kl(gpg(), 1.0, {knobs})", kl_with_gpg(kind), why=why)
    verl.equal(
        "kl_loss_type=low_var_kl, k3 above 10",
        "with_kl(gpg(), 1.0, kl_cap=10.0)",
        kl_with_gpg("low_var_kl"),
        inputs="far_reference",
    )
    verl.different(
        "kl_loss_type=low_var_kl, k3 above 10, our default",
        "with_kl(gpg(), 1.0)",
        kl_with_gpg("low_var_kl"),
        inputs="far_reference",
        why="k3 is at most 10, without a gradient beyond; ours has a bound of the log-ratio alone",
    )


def kl_with_gpg(kind: str) -> Peer:
    """Return verl's KL loss added to gpg."""
    inner = kl(kind)

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        functions(names)
        loss, _ = names["compute_policy_loss_gpg"](b.old_logprobs, b.lp, b.A, b.mask, "token-mean", ActorConfig())
        return loss + inner.run(names, b)

    return Peer("verl", (*inner.definitions, (CORE, "compute_policy_loss_gpg")), run, NAMES)


rows()
