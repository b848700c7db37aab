"""polgrad 0.2.1: its named algorithms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.installed import Peer
from tools.rosetta.row import Framework

polgrad = Framework("polgrad 0.2.1", "polgrad/registry.py")
WATCHED = tuple(("losses.py", name) for name in ("_ratio", "_pg_clip", "_cispo", "_is_weights", "policy_loss"))


def algorithm(name: str) -> Peer:
    """Return the loss of a named algorithm, from the imported package: it needs torch alone."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        from polgrad import get_algorithm, policy_loss

        config = get_algorithm(name).loss
        if name == "dr_grpo":
            config = replace(config, norm_len=16)
        columns = {"old_logprobs": b.old_logprobs, "advantages": b.advantages, "response_mask": b.mask.bool()}
        if config.kl is not None:
            columns["ref_logprobs"] = b.ref_logprobs
        if config.is_correction is not None:
            columns["rollout_logprobs"] = b.sampler_logprobs
        return policy_loss(config, logprobs=b.lp, **columns).loss

    return Peer("polgrad", WATCHED, run, {"math": None})


def rows() -> None:
    """Add the rows."""
    no_cap = "log_ratio_cap=None"
    polgrad.equal("ppo", f"ppo({no_cap})", algorithm("ppo"))
    polgrad.equal("grpo", f"grpo(kl_beta=0.04, kl=k3_uncapped, weigh=sequence_mean, {no_cap})", algorithm("grpo"))
    polgrad.equal("dapo", f"dapo({no_cap})", algorithm("dapo"))
    polgrad.equal("dr_grpo, norm_len=16", f"dr_grpo(weigh=fixed_length(16), {no_cap})", algorithm("dr_grpo"))
    polgrad.equal("gspo", f"gspo({no_cap})", algorithm("gspo"))
    polgrad.equal("gspo_token", f"gspo_token({no_cap})", algorithm("gspo_token"))
    polgrad.equal("cispo", f"cispo(clip=(0.0, 1.2), {no_cap})", algorithm("cispo"))
    polgrad.equal("rloo", "reinforce(weigh=sequence_sum_mean)", algorithm("rloo"), why="old_logprobs are ignored")
    polgrad.different(
        "rloo, as TRL's", f"rloo({no_cap})", algorithm("rloo"), why="no ratio: REINFORCE on sums of logprobs"
    )
    polgrad.equal("reinforce_pp", f"ppo(weigh=sequence_mean, {no_cap})", algorithm("reinforce_pp"))
    polgrad.equal(
        "grpo_tis",
        f"with_kl(with_tis(ppo(weigh=sequence_mean, {no_cap}), cap=10.0), 0.04, k3_uncapped)",
        algorithm("grpo_tis"),
    )


rows()
