"""AReaL 1.0.4: functions of packed tensors, means over tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.formulas import pair_means, pair_sums
from tools.rosetta.installed import Peer
from tools.rosetta.row import Framework

FUNCTIONAL, ACTOR, UTILS = "utils/functional/functional.py", "trainer/ppo/actor.py", "utils/data.py"
areal = Framework("AReaL 1.0.4", f"areal/{FUNCTIONAL}")
PARTS = tuple(
    (FUNCTIONAL, name)
    for name in ("_compute_sequence_level_ratio_and_advantages", "_check_bounds", "apply_rejection_sampling")
)
NAMES = {"torch": torch, "RejectionSamplingResult": SimpleNamespace}


def actor(*, m2: float | None = None, reject: dict[str, Any] | None = None, **settings: Any) -> Peer:
    """Return ppo_actor_loss_fn. The proximal policy is our old policy, the behaviour policy our sampler."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        config = {"level": "token", "action": "mask", "metric": "ratio", "agg": "mean", "lower": None, "upper": 5.0}
        rejection = None if reject is None else SimpleNamespace(**{**config, **reject})
        mask = b.mask.bool()
        if m2 is not None:
            mask = names["_apply_m2po_masking"](b.sampler_logprobs, b.old_logprobs, mask.contiguous(), m2)
        loss, _ = names["ppo_actor_loss_fn"](
            b.lp, b.old_logprobs, b.sampler_logprobs, b.A, 0.2, mask, rejection_sampling=rejection, **settings
        )
        return loss

    masking = ((ACTOR, "_get_m2po_loss_mask"), (ACTOR, "_apply_m2po_masking")) if m2 is not None else ()
    return Peer("areal", (*PARTS, *masking, (FUNCTIONAL, "ppo_actor_loss_fn")), run, NAMES)


def sapo() -> Peer:
    """Return sapo_loss_fn."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        return names["sapo_loss_fn"](b.lp, b.old_logprobs, b.A, 1.0, 1.05, b.mask.bool())[0]

    return Peer("areal", (*PARTS, (FUNCTIONAL, "sapo_loss_fn")), run, NAMES)


def dpo(kind: str) -> Peer:
    """Return dpo_preference_loss, averaged over pairs; ipo takes means over tokens."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        chosen, rejected = (pair_means if kind == "ipo" else pair_sums)(b, b.lp - b.ref_logprobs)
        return names["dpo_preference_loss"](chosen - rejected, beta=0.1, loss_type=kind).mean()

    return Peer("areal", ((FUNCTIONAL, "dpo_preference_loss"),), run, NAMES)


def rows() -> None:
    """Add the rows."""
    no_cap = "log_ratio_cap=None"
    areal.equal("eps_clip=0.2 (default)", f"ppo({no_cap})", actor())
    areal.equal(
        "c_clip=3",
        f"ppo({no_cap}, dual_clip=3.0)",
        actor(c_clip=3.0),
        why="sign(A)·c·A is a bound for A > 0 as well, which no ratio reaches",
    )
    areal.equal(
        "importance_sampling_level=sequence",
        f"gspo(clip=(0.8, 1.2), weigh=token_mean, {no_cap})",
        actor(importance_sampling_level="sequence"),
        why="a mean over tokens, not the paper's over sequences",
    )
    areal.equal(
        "decoupled loss, rejection_sampling mask, ratio <= 5",
        f"with_rollout_weight(ppo({no_cap}), rollout.masked((0.0, 5.0)))",
        actor(reject={}),
    )
    areal.equal(
        "decoupled loss, clamp to 2", f"with_tis(ppo({no_cap}))", actor(reject={"action": "clamp", "upper": 2.0})
    )
    areal.equal(
        "sequence level, clamp geometric mean to 1.1",
        f"with_rollout_weight(ppo({no_cap}), rollout.truncated((0.0, 1.1), geometric_level))",
        actor(reject={"level": "sequence", "action": "clamp", "upper": 1.1}),
    )
    areal.equal(
        "sapo", f"sapo(weigh=token_mean, {no_cap})", sapo(), why="a mean over tokens, not the paper's over sequences"
    )
    areal.equal("DPO, loss_type=sigmoid", "dpo()", dpo("sigmoid"), inputs="pairs")
    areal.equal(
        "DPO, loss_type=ipo",
        "ipo(reward=log_ratio_mean)",
        dpo("ipo"),
        inputs="pairs",
        why="means over tokens; the paper's equation has sums",
    )
    areal.different(
        "m2_threshold=0.04",
        "m2po(log_ratio_cap=None)",
        actor(m2=0.04),
        inputs="one_group",
        why="masked tokens leave the denominator; ours keeps every token in it",
    )


rows()
