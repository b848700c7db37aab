"""verl 0.9.1: rollout correction, bypass mode and the critic."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.frameworks.verl import CORE, MASKED, NAMES, ROLLOUT, WEIGHTS, ActorConfig, functions, policy, verl
from tools.rosetta.installed import Peer

RS = {
    "token_k1": "rollout.inside((0.5, 2.0))",
    "token_k2": "rollout.within(k2, 0.2)",
    "token_k3": "rollout.within(k3, 0.2)",
    "seq_sum_k1": "rollout.inside((0.5, 2.0), sequence_level)",
    "seq_mean_k3": "rollout.within(k3, 0.2, geometric_level)",
    "seq_max_k2": "rollout.within(k2, 0.2, maximum_level)",
}
"""The token weight of each ``rollout_rs``."""


def bypass() -> Peer:
    """Return the REINFORCE of bypass_mode with the truncated ratio of each token."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        functions(names)
        weights = names["compute_rollout_correction_weights"]((b.lp - b.old_logprobs).detach(), b.mask, "token", 2.0)[0]
        loss, _ = names["compute_policy_loss_reinforce"](
            b.old_logprobs, b.lp, b.A, b.mask, config=ActorConfig(), rollout_is_weights=weights
        )
        return loss

    needed = (*((ROLLOUT, x) for x in WEIGHTS), (CORE, "agg_loss"), (CORE, "compute_policy_loss_reinforce"))
    return Peer("verl", (*MASKED, *needed), run, NAMES)


def value() -> Peer:
    """Return the loss of the critic."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        functions(names)
        return names["compute_value_loss"](b.leaf, b.returns, b.old_values, b.mask, 0.2)[0]

    return Peer("verl", (*MASKED, (CORE, "agg_loss"), (CORE, "compute_value_loss")), run, NAMES)


def distillation() -> Peer:
    """Return the k3 estimate towards a teacher, in the place of the reference, added to gpg."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        functions(names)
        estimate = names["kl_penalty"](b.lp, b.ref_logprobs, "low_var_kl")
        return names["agg_loss"](estimate - b.A * b.lp, b.mask, "token-mean")

    needed = ((CORE, "agg_loss"), (CORE, "kl_penalty_forward"), (CORE, "kl_penalty"))
    return Peer("verl", (*MASKED, *needed), run, NAMES)


def bonus() -> Peer:
    """Return the policy loss less the entropy, both aggregated in one mode."""
    vanilla = policy("vanilla")

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        return vanilla.run(names, b) - 0.01 * names["agg_loss"](b.entropy, b.mask, "token-mean")

    return Peer("verl", vanilla.definitions, run, NAMES)


def rows() -> None:
    """Add the rows."""
    for level, function in (("token", "token_level"), ("sequence", "sequence_level")):
        for threshold, text, weight in (
            (2.0, "2.0", f"rollout.truncated((0.0, 2.0), {function})"),
            ("0.5_2.0", '"0.5_2.0"', f"rollout.masked((0.5, 2.0), {function})"),
        ):
            verl.equal(
                f"rollout_is={level}, threshold {text}",
                f"with_rollout_weight(ppo(dual_clip=3.0), {weight})",
                policy("vanilla", tis={"rollout_is": level, "rollout_is_threshold": threshold}),
            )
    for option, weight in RS.items():
        threshold = "0.5_2.0" if option.endswith("k1") else "0.2"
        verl.equal(
            f"rollout_rs={option}, threshold {threshold}, token-sum",
            f"with_rollout_weight(ppo(dual_clip=3.0, weigh=token_sum), {weight})",
            policy("vanilla", "token-sum", reject=(option, threshold)),
        )
    verl.different(
        "rollout_rs=token_k1, threshold 0.5_2.0, token-mean",
        "with_rollout_weight(ppo(dual_clip=3.0), rollout.inside((0.5, 2.0)))",
        policy("vanilla", reject=("token_k1", "0.5_2.0")),
        why="rejected tokens leave the denominator; ours keeps every token in it",
    )
    verl.equal(
        "bypass_mode, loss_type=ppo_clip",
        "ppo(dual_clip=3.0)",
        policy("vanilla"),
        inputs="sampler_is_old",
        why="old_logprobs is the column of the sampler",
    )
    verl.equal(
        "bypass_mode, loss_type=reinforce, rollout_is=token",
        "cispo(clip=(0.0, 2.0), weigh=sequence_sum_mean)",
        bypass(),
        inputs="sampler_is_old",
    )
    verl.equal(
        "distillation loss_mode=k3 (default), beside gpg",
        "with_kl(gpg(), 1.0, kl_cap=10.0)",
        distillation(),
        source="verl/trainer/distillation/losses.py",
        why="ref_logprobs are the teacher's",
    )
    verl.equal(
        "entropy_coeff=0.01",
        "with_entropy(ppo(dual_clip=3.0), 0.01)",
        bonus(),
        inputs="token_of_logits",
        source="verl/workers/utils/losses.py",
    )
    verl.equal("critic, cliprange_value=0.2", "value_loss()", value(), inputs="values")


rows()
