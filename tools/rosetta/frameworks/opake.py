"""opake-alignment 0.16.1: heads of one pair each."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.formulas import pair_means, pair_sums
from tools.rosetta.installed import Peer
from tools.rosetta.row import Framework

FOLDER = "api/alignment/dpo/loss"
opake = Framework("opake-alignment 0.16.1", f"opake/{FOLDER}", "pairs")
NAMES = {"torch": torch, "F": F, "math": math, "_ALPHA_DIVERGENCE_LIMIT_TOLERANCE": 1e-6}


def ratios(b: Batch, mean: bool = False, reference: bool = True) -> tuple[Tensor, Tensor]:
    """Log-ratios of the chosen and rejected sides."""
    gap = b.lp - b.ref_logprobs if reference else b.lp
    return (pair_means if mean else pair_sums)(b, gap)


def head(file: str, name: str, *, mean: bool = False, reference: bool = True, **settings: Any) -> Peer:
    """Return a head, averaged over pairs."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        return names[name](*ratios(b, mean, reference), **settings).mean()

    helpers = {"_discopop": ("_exp_clamp_for_dtype",), "_orpo": ("_log1mexp",)}.get(file, ())
    return Peer("opake", tuple((f"{FOLDER}/{file}.py", x) for x in (*helpers, name)), run, NAMES)


def divergence(kind: str, alpha: float = 1.0) -> Peer:
    """Return the sigmoid head on the rewards of an f-divergence."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        h = names["f_divergence_logits"](*ratios(b), f_divergence_type=kind, alpha=alpha)
        return -F.logsigmoid(0.1 * h).mean()

    parts = ("_cap_exp", "f_divergence_remap", "f_divergence_logits")
    return Peer("opake", tuple((f"{FOLDER}/_f_divergence.py", x) for x in parts), run, NAMES)


def ld() -> Peer:
    """Return the sigmoid head on LD-DPO's sums."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        shared = torch.minimum(b.lengths[0::2], b.lengths[1::2]).repeat_interleave(2)
        total = names["ld_dpo_split"](b.lp - b.ref_logprobs, b.mask, shared, 0.5)
        return -F.logsigmoid(0.1 * (total[0::2] - total[1::2])).mean()

    return Peer("opake", ((f"{FOLDER}/_ld_dpo.py", "ld_dpo_split"),), run, NAMES)


def orpo() -> Peer:
    """Return the NLL of the chosen side plus 0.1 times the odds ratio."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        sides = ratios(b, mean=True, reference=False)
        return (-sides[0] + 0.1 * names["odds_ratio_loss"](*sides)).mean()

    return Peer("opake", tuple((f"{FOLDER}/_orpo.py", x) for x in ("_log1mexp", "odds_ratio_loss")), run, NAMES)


def rows() -> None:
    """Add the rows."""
    heads = {
        "sigmoid_loss": ("_sigmoid", "dpo()"),
        "hinge_loss": ("_hinge", "hinge()"),
        "ipo_loss": ("_ipo", "ipo()"),
        "exo_loss": ("_exo", "exo()"),
        "nca_loss": ("_nca", "nca()"),
        "bco_loss": ("_bco", "bco_pair()"),
        "sppo_loss": ("_sppo", "sppo_hard()"),
        "apo_zero_loss": ("_apo", "apo_zero()"),
        "apo_down_loss": ("_apo", "apo_down()"),
        "discopop_loss": ("_discopop", "discopop(beta=0.1)"),
    }
    for name, (file, call) in heads.items():
        opake.equal(f"{name}, beta=0.1", call, head(file, name, beta=0.1))
    opake.equal(
        "sigmoid_loss, label_smoothing=0.1",
        "dpo(label_smoothing=0.1)",
        head("_sigmoid", "sigmoid_loss", beta=0.1, label_smoothing=0.1),
    )
    opake.equal(
        "robust_loss, label_smoothing=0.1",
        "robust_dpo()",
        head("_robust", "robust_loss", beta=0.1, label_smoothing=0.1),
    )
    opake.equal(
        "ipo_loss on length-normalised ratios",
        "ipo(reward=log_ratio_mean)",
        head("_ipo", "ipo_loss", mean=True, beta=0.1),
    )
    opake.equal(
        "simpo_loss, beta=2, gamma=1",
        "simpo()",
        head("_simpo", "simpo_loss", mean=True, reference=False, beta=2.0, gamma=1.0),
    )
    opake.equal("ld_dpo_split, alpha=0.5", "ld_dpo()", ld())
    opake.equal("chosen NLL + 0.1·odds_ratio_loss", "orpo()", orpo())
    opake.equal("f_divergence_logits, js_divergence", "f_dpo()", divergence("js_divergence"))
    opake.equal("f_divergence_logits, forward_kl", "f_dpo(reward=forward_kl_reward)", divergence("forward_kl"))
    opake.equal(
        "f_divergence_logits, alpha_divergence, alpha=0.5",
        "f_dpo(reward=alpha_reward(0.5))",
        divergence("alpha_divergence", 0.5),
    )


rows()
