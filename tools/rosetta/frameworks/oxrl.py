"""oxRL 1.7.2: one file for each algorithm."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.formulas import pair_means, pair_sums
from tools.rosetta.installed import Peer
from tools.rosetta.row import Framework

oxrl = Framework("oxRL 1.7.2", "oxrl/algs", "pairs")
NAMES = {"torch": torch, "F": F}


def pair(
    file: str, name: str, *, mean: bool = False, lengths: bool = False, extra: tuple[str, ...] = (), **settings: Any
) -> Peer:
    """Return compute_loss of an algorithm on sums of logprobs, with β = 0.1 unless set."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        self = SimpleNamespace(**{"beta": 0.1, **settings})
        for method in extra:
            setattr(self, method, lambda *a, f=names[method]: f(self, *a))
        sums = pair_means if mean else pair_sums
        reference = () if mean else sums(b, b.ref_logprobs)
        sizes = (b.lengths[0::2], b.lengths[1::2]) if lengths else ()
        result = names["compute_loss"](self, *sums(b, b.lp), *reference, *sizes)
        return result[0] if isinstance(result, tuple) else result

    path = f"algs/{file}.py"
    return Peer("oxrl", tuple((path, f"{name}.{x}") for x in (*extra, "compute_loss")), run, NAMES)


def kto() -> Peer:
    """Return KTO's loss, whose running mean of log-ratios is the reference point."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        self = SimpleNamespace(beta=0.1, kl_alpha=0.0, kl_ema=b.reference_point[0], lambda_p=1.0, lambda_n=1.0)
        current, reference = ((x * b.mask).sum(1) for x in (b.lp, b.ref_logprobs))
        return names["compute_loss"](self, current, reference, b.labels * 2 - 1, 3)

    return Peer("oxrl", (("algs/kto.py", "KTO.compute_loss"),), run, NAMES)


def policy(file: str) -> Peer:
    """Return a policy loss without its KL."""
    shared = ("prepare_loss_inputs", "compute_kl_distance", "compute_entropy_and_kl", "token_level_metrics")

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        loss = names[f"compute_{file}_loss"]
        return loss(b.lp, b.old_logprobs, b.A, b.mask, None, None, 0.2, 0.2, 0.0, 0.0)[0]

    definitions = (*(("algs/losses/common.py", x) for x in shared), (f"algs/losses/{file}.py", f"compute_{file}_loss"))
    return Peer("oxrl", definitions, run, NAMES)


def rows() -> None:
    """Add the rows."""
    same = {
        "spo": ("SPO", "spo()", {}),
        "minor_dpo": ("MinorDPO", "minor_dpo()", {}),
        "dposhift": ("DPOShift", "dpo_shift(lam=0.5)", {"shift_lambda": 0.5}),
        "dpop": ("DPOP", "dpop(beta=0.1, lam=5.0)", {"dpop_lambda": 5.0}),
        "bpo": ("BPO", "bpo()", {"balance_factor": 0.3}),
        "caldpo": ("CalDPO", "cal_dpo()", {"caldpo_lambda": 1.0}),
        "c2dpo": ("C2DPO", "c2_dpo()", {"c2_lambda": 2e-4}),
        "hinge": ("Hinge", "hinge()", {}),
        "ipo": ("IPO", "ipo()", {}),
        "nca": ("NCA", "nca()", {}),
        "exo": ("EXO", "exo()", {"exo_epsilon": 1e-3}),
        "bco": ("BCO", "bco_pair()", {}),
        "cdpo": ("CDPO", "dpo(label_smoothing=0.1)", {"label_smoothing": 0.1}),
        "aot": ("AOT", "aot_unpaired()", {}),
        "discopop": ("DiscoPOP", "discopop(beta=0.1)", {"discopop_tau": 0.05}),
        "drdpo": ("DrDPO", "dr_dpo()", {"beta_prime": 1.0}),
    }
    for file, (name, call, settings) in same.items():
        oxrl.equal(f"algs/{file}.py", call, pair(file, name, **settings), source=f"oxrl/algs/{file}.py")
    oxrl.equal("algs/chipo.py", "chi_po()", pair("chipo", "ChiPO", extra=("chi_link",)), source="oxrl/algs/chipo.py")
    oxrl.equal(
        "algs/simpo.py",
        "simpo(beta=0.1, gamma=0.5)",
        pair("simpo", "SimPO", mean=True, gamma=0.5),
        source="oxrl/algs/simpo.py",
    )
    for kind, link in (
        ("logistic", "logistic_link"),
        ("exponential", "exponential_link"),
        ("truncated_quadratic", "truncated_quadratic_link"),
        ("savage", "savage_link"),
    ):
        oxrl.equal(
            f"algs/gpo.py, {kind}",
            f"gpo(link={link})",
            pair("gpo", "GPO", gpo_loss_type=kind),
            source="oxrl/algs/gpo.py",
        )
    different = {
        "apo": ("APO", "apo_zero()", {"apo_mode": "zero"}, "without the constant 1: another value, the same gradient"),
        "robust_dpo": (
            "RobustDPO",
            "robust_dpo()",
            {"label_smoothing": 0.1},
            "the sign of the flipped term is that of cDPO: +ε, where the paper has −ε",
        ),
        "focalpo": (
            "FocalPO",
            "focal_po(gamma=1.0)",
            {"focalpo_gamma": 1.0},
            "the weight σ^γ is a constant, where the paper differentiates it",
        ),
        "fdpo": (
            "FDPO",
            "f_dpo()",
            {"fdpo_divergence": "js_divergence"},
            "β is not on the softplus terms: not the rewards of the paper",
        ),
        "betadpo": (
            "BetaDPO",
            "beta_dpo(alpha=0.5)",
            {"alpha": 0.5, "_gap_mean": 0.0},
            "the gradient flows through the dynamic β",
        ),
    }
    for file, (name, call, settings, why) in different.items():
        settings = {**settings, "_update_gap_stats": lambda gap: None}
        extra = ("_cap_exp",) if file == "fdpo" else ()
        oxrl.different(
            f"algs/{file}.py", call, pair(file, name, extra=extra, **settings), why=why, source=f"oxrl/algs/{file}.py"
        )
    oxrl.equal("algs/sppo.py", "sppo_hard()", pair("sppo", "SPPO"), source="oxrl/algs/sppo.py")
    oxrl.equal(
        "algs/odpo.py, odpo_delta=0.5",
        "odpo()",
        pair("odpo", "ODPO", odpo_delta=0.5),
        inputs="equal_margins",
        source="oxrl/algs/odpo.py",
        why="one margin for all pairs; ours reads one for each",
    )
    oxrl.different(
        "algs/alpha_dpo.py, first batch",
        "alpha_dpo(beta=0.1, gamma=0.03)",
        pair("alpha_dpo", "AlphaDPO", extra=("_update_ema",), _ema_initialized=False, alpha=0.1, gamma_beta_ratio=0.3),
        source="oxrl/algs/alpha_dpo.py",
        why="sums in place of means over tokens, β·α in place of α, and a running mean and variance",
    )
    for file, call in (
        ("sgrpo", "ppo(log_ratio_cap=None)"),
        ("gspo", "gspo(clip=(0.8, 1.2), log_ratio_cap=None)"),
        ("cispo", "cispo(clip=(0.8, 1.2), log_ratio_cap=None)"),
    ):
        oxrl.equal(f"algs/losses/{file}.py", call, policy(file), inputs="policy", source=f"oxrl/algs/losses/{file}.py")
    oxrl.equal(
        "algs/rdpo.py, alpha=−0.01",
        "r_dpo()",
        pair("rdpo", "RDPO", lengths=True, alpha=-0.01),
        source="oxrl/algs/rdpo.py",
        why="the sign of its length penalty is that of −α",
    )
    oxrl.different(
        "algs/kto.py", "kto()", kto(), inputs="policy", source="oxrl/algs/kto.py", why="−log σ in place of KTO's 1 − σ"
    )


rows()
