"""Liger-Kernel 0.8.5: the chunked losses."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.formulas import pair_means, pair_sums
from tools.rosetta.installed import Peer
from tools.rosetta.row import Framework

FOLDER = "chunked_loss"
GRPO = f"{FOLDER}/grpo_loss.py"
liger = Framework("Liger-Kernel 0.8.5", f"liger_kernel/{GRPO}")
NAMES = {"torch": torch, "F": F, "math": math}
PARTS = tuple((GRPO, name) for name in ("k3_loss_fn", "get_gamma_weights", "sapo_loss_fn", "clip_coef_fn"))


def grpo(**settings: Any) -> Peer:
    """Return the loss of LigerFusedLinearGRPOLoss."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        weights = names["get_gamma_weights"]
        names["get_gamma_weights"] = torch.no_grad()(weights)  # as its decorator says
        count = SimpleNamespace(_compute_dapo_normalizer=names["_compute_dapo_normalizer"])
        names["LigerFusedLinearPPOBase"] = count
        ratio = None if not settings.get("tis") else (b.old_logprobs - b.sampler_logprobs).exp().clamp(max=2.0)
        own = {key: value for key, value in settings.items() if key != "tis"}
        loss, _ = names["ppo_loss_fn"](
            b.lp,
            b.mask,
            b.advantages,
            b.mask,
            b.ref_logprobs,
            b.old_logprobs,
            max_completion_length=16,
            vllm_is_ratio=ratio,
            **own,
        )
        return loss

    base = (f"{FOLDER}/fused_linear_ppo.py", "LigerFusedLinearPPOBase._compute_dapo_normalizer")
    return Peer("liger_kernel", (*PARTS, base, (GRPO, "LigerFusedLinearGRPOFunction.ppo_loss_fn")), run, NAMES)


def nll(b: Batch, count: Tensor | int) -> Tensor:
    """Σ −lp over chosen tokens, divided by a count."""
    return -(b.lp * b.mask)[0::2].sum() / count


def pair(method: str, *, mean: bool = False, reference: bool = False, nll_weight: float = 0.0, **settings: Any) -> Peer:
    """Return a preference loss on pairs."""
    path = f"{FOLDER}/{method.lower()}_loss.py"

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        sides = pair_means(b, b.lp) if mean else pair_sums(b, b.lp)
        ref = dict(zip(("ref_chosen_logps", "ref_rejected_logps"), pair_sums(b, b.ref_logprobs))) if reference else {}
        loss = names["preference_loss_fn"](*sides, b.mask, **ref, **settings)[0]
        return loss + (nll_weight * nll(b, b.mask[0::2].sum()) if nll_weight else 0)

    return Peer("liger_kernel", ((path, f"LigerFusedLinear{method}Function.preference_loss_fn"),), run, NAMES)


def kto() -> Peer:
    """Return the unpaired loss."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        current, ref = ((x * b.mask).sum(1) for x in (b.lp, b.ref_logprobs))
        kl = b.reference_point[0]
        return names["preference_loss_fn"](current, b.labels.bool(), b.mask, ref, kl=kl)[0]

    path = f"{FOLDER}/kto_loss.py"
    return Peer("liger_kernel", ((path, "LigerFusedLinearKTOFunction.preference_loss_fn"),), run, NAMES)


def jsd(beta: float) -> Peer:
    """Return the distillation loss alone, a mean over tokens."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        active = b.mask[..., 0] > 0
        loss = names["distillation_loss_fn"](b.leaf[active], b.teacher_logprobs[active], beta=beta)
        return loss / active.sum()

    path = f"{FOLDER}/jsd_loss.py"
    return Peer("liger_kernel", ((path, "LigerFusedLinearJSDFunction.distillation_loss_fn"),), run, NAMES)


def rows() -> None:
    """Add the rows."""
    no_cap = "log_ratio_cap=None"
    liger.equal("LigerFusedLinearGRPOLoss() (dapo, beta 0.04)", f"grpo(kl_beta=0.04, kl=k3_uncapped, {no_cap})", grpo())
    liger.different(
        "LigerFusedLinearGRPOLoss(), as TRL's defaults",
        f"bnpo({no_cap})",
        grpo(),
        why="beta is 0.04 in Liger and 0 in TRL",
    )
    for kind, call in (
        ("grpo", f"grpo(kl_beta=0.0, weigh=sequence_mean, {no_cap})"),
        ("bnpo", f"bnpo({no_cap})"),
        ("dr_grpo", f"dr_grpo(weigh=fixed_length(16), {no_cap})"),
        ("dapo", f"bnpo({no_cap})"),
        ("sapo", f"sapo({no_cap})"),
        ("vespo", "vespo()"),
    ):
        liger.equal(f"loss_type={kind}, beta=0", call, grpo(loss_type=kind, beta=0.0))
    liger.equal(
        "loss_type=cispo, epsilon_high=5, beta=0",
        f"cispo(clip=(0.0, 5.0), {no_cap})",
        grpo(loss_type="cispo", epsilon_high=5.0, beta=0.0),
    )
    liger.equal(
        "loss_type=luspo, sequence level, beta=0",
        f"luspo(clip=(0.8, 1.2), {no_cap})",
        grpo(loss_type="luspo", importance_sampling_level="sequence", beta=0.0),
    )
    liger.different(
        "loss_type=luspo, token level, beta=0",
        f"ppo(weigh=sequence_sum_mean, {no_cap})",
        grpo(loss_type="luspo", beta=0.0),
        why="multiplied by the length and averaged over padding as well; TRL masks since 1.16",
    )
    liger.equal(
        "importance_sampling_level=sequence, loss_type=grpo, beta=0",
        f"gspo(clip=(0.8, 1.2), {no_cap})",
        grpo(loss_type="grpo", importance_sampling_level="sequence", beta=0.0),
    )
    liger.equal("delta=3, beta=0", f"bnpo(dual_clip=3.0, {no_cap})", grpo(delta=3.0, beta=0.0))
    liger.equal(
        "use_bias_correction_kl=True",
        f'with_kl(bnpo({no_cap}), 0.04, k3_uncapped, rollout.ratio_to("old_logprobs", None))',
        grpo(use_bias_correction_kl=True),
    )
    liger.equal("vllm_is_ratio = min(old / sampler, 2), beta=0", f"with_tis(bnpo({no_cap}))", grpo(tis=True, beta=0.0))
    liger.factor(
        "loss_type=grpo, beta=0, a row masked whole",
        f"grpo(kl_beta=0.0, weigh=sequence_mean, {no_cap})",
        grpo(loss_type="grpo", beta=0.0),
        inputs="masked_row",
        factor="(lengths > 0).sum() / B",
        why="sequences with a token / sequences",
    )
    kinds = {
        "sigmoid": "dpo()",
        "hinge": "hinge()",
        "nca_pair": "nca()",
        "bco_pair": "bco_pair()",
        "sppo_hard": "sppo_hard()",
        "apo_zero": "apo_zero()",
        "apo_down": "apo_down()",
        "discopop": "discopop(beta=0.1)",
    }
    source = f"liger_kernel/{FOLDER}"
    on_pairs: dict[str, Any] = {"inputs": "pairs"}
    for kind, call in kinds.items():
        liger.equal(
            f"LigerFusedLinearDPOLoss(loss_type={kind})",
            call,
            pair("DPO", reference=True, loss_type=kind),
            source=f"{source}/dpo_loss.py",
            **on_pairs,
        )
    liger.equal(
        "loss_type=robust, label_smoothing=0.1",
        "robust_dpo()",
        pair("DPO", reference=True, loss_type="robust", label_smoothing=0.1),
        source=f"{source}/dpo_loss.py",
        **on_pairs,
    )
    liger.equal(
        "loss_type=exo_pair, label_smoothing=1e-3",
        "exo()",
        pair("DPO", reference=True, loss_type="exo_pair", label_smoothing=1e-3),
        source=f"{source}/dpo_loss.py",
        **on_pairs,
    )
    liger.equal(
        "LigerFusedLinearSimPOLoss(alpha=0)",
        "simpo(beta=0.1, gamma=0.5)",
        pair("SimPO", mean=True),
        source=f"{source}/simpo_loss.py",
        **on_pairs,
    )
    liger.equal(
        "LigerFusedLinearCPOLoss(alpha=0)",
        "cpo(nll_weight=0.0)",
        pair("CPO"),
        source=f"{source}/cpo_loss.py",
        **on_pairs,
    )
    liger.different(
        "LigerFusedLinearORPOLoss()",
        "orpo()",
        pair("ORPO", mean=True, nll_weight=1.0),
        source=f"{source}/orpo_loss.py",
        why="the NLL is a mean over chosen tokens; ours a mean over pairs",
        **on_pairs,
    )
    liger.equal("LigerFusedLinearKTOLoss()", "kto()", kto(), source=f"{source}/kto_loss.py")
    for beta, call in ((0.5, "top_k_jsd"), (0.0, "top_k_forward_kl"), (1.0, "top_k_reverse_kl")):
        liger.equal(
            f"LigerFusedLinearJSDLoss(beta={beta}), soft part",
            f"{call}(support=raw_support)",
            jsd(beta),
            inputs="vocabulary",
            source=f"{source}/jsd_loss.py",
            why="candidates are the whole vocabulary",
        )


rows()
