"""TRL 1.16.0: trainers on preferences and labels, and supervised ones."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.frameworks.trl import ACCELERATOR
from tools.rosetta.installed import Peer
from tools.rosetta.row import Framework

DPO, KTO, SFT = "trainer/dpo_trainer.py", "trainer/kto_trainer.py", "trainer/sft_trainer.py"
CPO, ORPO = "experimental/cpo/cpo_trainer.py", "experimental/orpo/orpo_trainer.py"
preference = Framework("TRL 1.16.0, offline", f"trl/{DPO}", "pairs")
NAMES = {
    "nn": torch.nn,
    "torch": torch,
    "F": F,
    "math": math,
    "warnings": warnings,
    "is_peft_model": lambda model: False,
    "disable_gradient_checkpointing": lambda *_: contextlib.nullcontext(),
}


def halves(x: Tensor) -> Tensor:
    """Reorder interleaved pairs: all chosen rows, then all rejected rows."""
    return torch.cat([x[0::2], x[1::2]])


def model(logprobs: Tensor, mask: Tensor, log_square: Tensor | None = None) -> Any:
    """Return a model with these logprobs, in the form of TRL's fused head."""
    zeros = torch.zeros_like(mask)
    outputs = SimpleNamespace(
        log_probs=logprobs * mask,
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
        log_sum_sq_probs=log_square,
        label_mask=mask,
    )
    return lambda **_: outputs


def trained(mask: Tensor, arrange: Any) -> dict[str, Tensor]:
    """Return the inputs of a trainer: one prompt token, then the completion."""
    shifted = F.pad(arrange(mask), (1, 0))
    ids = torch.zeros_like(shifted).long()
    return {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": shifted.long()}


def self_of(**settings: Any) -> SimpleNamespace:
    """Return the attributes that the losses of TRL's offline trainers read, at their defaults."""
    defaults = {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "aux_loss_enabled": False,
        "f_alpha_divergence_coef": 0.5,
        "use_weighting": False,
        "loss_weights": [1.0],
        "loss_types": ["sigmoid"],
        "precompute_ref_logps": False,
        "accelerator": ACCELERATOR,
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "_metrics": {"train": defaultdict(list)},
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=settings.pop("discopop_tau", 0.05)),
    }
    return SimpleNamespace(**{**defaults, **settings}, model=SimpleNamespace(training=True))


def dpo(loss_type: str | list[str], **settings: Any) -> Peer:
    """Return the loss of DPOTrainer."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        loss_types = [loss_type] if isinstance(loss_type, str) else loss_type
        self, mask = self_of(loss_types=loss_types, **settings), halves(b.mask)
        self.ref_model = model(halves(b.ref_logprobs), mask)
        current = model(halves(b.lp), mask, halves(b.sum_square_probs).log())
        return names["_compute_loss"](self, current, trained(b.mask, halves), False)

    return Peer("trl", ((DPO, "DPOTrainer._compute_loss"),), run, NAMES)


def kto(loss_type: str) -> Peer:
    """Return the loss of KTOTrainer, whose mismatched completions have one mean log-ratio: the reference point."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        self = self_of(loss_type=loss_type, calculate_KL=loss_type == "kto")
        self.ref_model = model(b.ref_logprobs, b.mask)
        current = model(b.lp, b.mask)
        self._compute_kl_logps = lambda m, batch: b.reference_point if m is current else torch.zeros_like(b.labels)
        batch = {**trained(b.mask, lambda x: x), "label": b.labels.bool()}
        return names["_compute_loss"](self, current, batch, False)

    return Peer("trl", ((KTO, "KTOTrainer._compute_loss"),), run, NAMES)


def sums(b: Batch, mean: bool = False) -> tuple[Tensor, Tensor]:
    """Logprobs of chosen and rejected sides: sums, or means over tokens."""
    total = (b.lp * b.mask).sum(1)
    total = total / b.lengths if mean else total
    return total[0::2], total[1::2]


def chosen_nll(b: Batch) -> Tensor:
    """Mean −lp over the chosen tokens of the batch."""
    return -(b.lp * b.mask)[0::2].sum() / b.mask[0::2].sum()


def cpo(loss_type: str, **settings: Any) -> Peer:
    """Return the loss of CPOTrainer: its method of the pairs, and its mean over chosen tokens."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        defaults = {"loss_type": loss_type, "alpha": 0.0, "simpo_gamma": 0.5, "cpo_alpha": 1.0}
        self = self_of(**{**defaults, **settings})
        losses, *_ = names["cpo_loss"](self, *sums(b, mean=loss_type in ("ipo", "simpo")))
        return losses.mean() + (self.cpo_alpha * chosen_nll(b) if self.cpo_alpha else 0)

    return Peer("trl", ((CPO, "CPOTrainer.cpo_loss"),), run, NAMES)


def orpo() -> Peer:
    """Return the loss of ORPOTrainer: its method of the pairs, and its mean over chosen tokens."""

    def run(names: dict[str, Any], b: Batch) -> Tensor:
        losses, *_ = names["odds_ratio_loss"](self_of(), *sums(b, mean=True))
        return chosen_nll(b) - losses.mean()

    return Peer("trl", ((ORPO, "log1mexp"), (ORPO, "ORPOTrainer.odds_ratio_loss")), run, NAMES)


def rows() -> None:
    """Add the rows."""
    add = preference.equal
    length = "normalised by the number of tokens, as the authors told TRL; the paper's equation has sums"
    add("loss_type=sigmoid (default), beta=0.1", "dpo()", dpo("sigmoid"))
    preference.different(
        "sigmoid, label_smoothing=0.1",
        "dpo(label_smoothing=0.1)",
        dpo("sigmoid", label_smoothing=0.1),
        why="sigmoid ignores label_smoothing: no cDPO",
    )
    add("loss_type=hinge", "hinge()", dpo("hinge"))
    add("loss_type=ipo", "ipo(reward=log_ratio_mean)", dpo("ipo"), why=length)
    preference.different("loss_type=ipo, for the paper's equation 17", "ipo()", dpo("ipo"), why=length)
    add("loss_type=exo_pair, label_smoothing=1e-3", "exo()", dpo("exo_pair", label_smoothing=1e-3))
    add("loss_type=nca_pair", "nca()", dpo("nca_pair"))
    add("loss_type=robust, label_smoothing=0.1", "robust_dpo()", dpo("robust", label_smoothing=0.1))
    add("loss_type=bco_pair", "bco_pair()", dpo("bco_pair"), why="without BCO's reference point")
    add("loss_type=sppo_hard", "sppo_hard()", dpo("sppo_hard"))
    add("loss_type=aot", "aot()", dpo("aot"))
    add("loss_type=aot_unpaired", "aot_unpaired()", dpo("aot_unpaired"))
    add("loss_type=apo_zero", "apo_zero()", dpo("apo_zero"))
    add("loss_type=apo_down", "apo_down()", dpo("apo_down"))
    add("loss_type=discopop", "discopop(beta=0.1)", dpo("discopop"))
    preference.different(
        "loss_type=discopop, for the paper's β",
        "discopop()",
        dpo("discopop"),
        why="beta is 0.1 unless set; the paper has 0.05",
    )
    add("loss_type=sigmoid_norm", "dpo_norm(beta=0.1)", dpo("sigmoid_norm"))
    add("ld_alpha=0.5", "ld_dpo()", dpo("sigmoid", ld_alpha=0.5))
    add("use_weighting=True", "wpo()", dpo("sigmoid", use_weighting=True))
    add("f_divergence_type=js_divergence", "f_dpo()", dpo("sigmoid", f_divergence_type="js_divergence"))
    add(
        "f_divergence_type=forward_kl",
        "f_dpo(reward=forward_kl_reward)",
        dpo("sigmoid", f_divergence_type="forward_kl"),
    )
    add("loss_type=sft", "cross_entropy()", dpo("sft"), inputs="chosen", why="on the chosen sides")
    add(
        'loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0] (MPO)',
        "sum_losses(dpo=dpo(), bco=bco_pair(), sft=cross_entropy(), coefficients={'dpo': 0.8, 'bco': 0.2}, "
        "weights={'bco': 'weights'})",
        dpo(["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    )
    preference.different(
        'loss_type=["sigmoid", "bco_pair", "sft"], for the equation of MPO',
        "mpo(dpo(), bco_pair())",
        dpo(["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
        why="the NLL is a mean over the chosen tokens of the batch; ours a mean over pairs",
    )
    add("KTOConfig()", "kto()", kto("kto"), source=f"trl/{KTO}", inputs="policy")
    add(
        "KTOConfig(loss_type=apo_zero_unpaired)",
        "kto()",
        kto("apo_zero_unpaired"),
        source=f"trl/{KTO}",
        inputs="no_reference_point",
        why="KTO with reference_point 0",
    )
    nll = "adds the mean NLL over the chosen tokens of the batch; ours is a mean over pairs of their sums"
    preference.different("CPOConfig()", "cpo()", cpo("sigmoid"), why=nll, source=f"trl/{CPO}")
    add("CPOConfig(cpo_alpha=0)", "cpo(nll_weight=0.0)", cpo("sigmoid", cpo_alpha=0.0), source=f"trl/{CPO}")
    add(
        "CPOConfig(loss_type=hinge, cpo_alpha=0)",
        "cpo(nll_weight=0.0, link=hinge_link)",
        cpo("hinge", cpo_alpha=0.0),
        source=f"trl/{CPO}",
    )
    add(
        "CPOConfig(loss_type=simpo, cpo_alpha=0)",
        "simpo(beta=0.1, gamma=0.5)",
        cpo("simpo", cpo_alpha=0.0),
        source=f"trl/{CPO}",
    )
    add(
        "CPOConfig(loss_type=simpo, cpo_alpha=0), label_smoothing=0.1",
        "simpo(beta=0.1, gamma=0.5, label_smoothing=0.1)",
        cpo("simpo", cpo_alpha=0.0, label_smoothing=0.1),
        source=f"trl/{CPO}",
    )
    preference.different(
        "CPOConfig(loss_type=simpo), for SimPO's paper",
        "simpo()",
        cpo("simpo"),
        source=f"trl/{CPO}",
        why="adds NLL of weight 1 unless cpo_alpha=0; β = 0.1 and γ = 0.5 unless set",
    )
    add(
        "CPOConfig(loss_type=simpo, alpha=0.25, cpo_alpha=0)",
        "alphapo(beta=0.1, gamma=0.5, log_ratio_cap=None)",
        cpo("simpo", alpha=0.25, cpo_alpha=0.0),
        source=f"trl/{CPO}",
    )
    preference.different(
        "ORPOConfig()",
        "orpo()",
        orpo(),
        source=f"trl/{ORPO}",
        why="the NLL is a mean over the tokens of prompts and chosen answers; ours a mean over pairs",
    )


rows()
