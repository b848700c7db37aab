"""Losses from papers and trainers for which this library has no preset: correct ones, and copies with one bug each.

They test the laws of the kinds without a preset. ``CORRECT`` holds the correct losses by kind and name, ``WRONG`` the
wrong ones by name and bug. ``lossfns.testing.mutants`` makes mutants of the wrong ones.

>>> from lossfns.testing import check
>>> check(CORRECT["unpaired"]["kto"], kind="unpaired", examples=0).ok
True
>>> check(WRONG["kto", "label-ignored"], kind="unpaired", examples=0).bug
'label-ignored'
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Data = Sequence[Any]
Logprobs = Sequence[Tensor]
Result = tuple[Tensor, dict[str, float]]
LossFn = Callable[..., Result]


def column(datum: Any, name: str) -> Tensor:
    values: Tensor = datum.loss_fn_inputs[name].to_torch()
    return values


def rows(data: Data, logprobs: Logprobs, *names: str) -> list[list[Tensor]]:
    """Return the weights, then the logprobs and the columns with 0 in masked slots, as one list of tensors each."""
    weights = [column(d, "weights") for d in data]
    for w, lp in zip(weights, logprobs, strict=True):
        if w.shape != lp.shape:
            raise ValueError(f"{tuple(w.shape)} weights for {tuple(lp.shape)} logprobs")
    others = [list(logprobs), *([column(d, name) for d in data] for name in names)]
    return [weights, *([torch.where(w != 0, x, 0) for w, x in zip(weights, xs)] for xs in others)]


def flat(data: Data, logprobs: Logprobs, *names: str) -> list[Tensor]:
    return [torch.cat(xs) for xs in rows(data, logprobs, *names)]


# Preference


Term = Callable[..., Tensor]


def of_pairs(term: Term, *, mean: bool = False, nll: float = 0.0) -> LossFn:
    """Make a loss with a reference from its term, a function of the log-ratios of the chosen and the rejected side."""

    def loss_fn(data: Data, logprobs: Logprobs, **knobs: Any) -> Result:
        if len(data) % 2:
            raise ValueError("pairs")
        w, lp, ref = rows(data, logprobs, "ref_logprobs")
        sizes = [max(float(x.sum()), 1e-8) if mean else 1.0 for x in w]
        gaps = torch.stack([(x * (a - b)).sum() / n for x, a, b, n in zip(w, lp, ref, sizes)])
        both = torch.stack([(x != 0).any() for x in w]).view(-1, 2).all(1)
        c, r = gaps.view(-1, 2).unbind(1)
        per_pair = term(c, r, **knobs)
        if nll:
            means = [(x * a).sum() / max(float(x.sum()), 1e-8) for x, a in zip(w, lp)]
            per_pair = per_pair - nll * torch.stack(means)[0::2]
        n = both.sum().clamp(min=1)
        metrics = {
            "rewards/chosen": float((0.1 * c.detach()).sum() / n),
            "rewards/accuracies": float((c > r).double().sum() / n),
        }
        return torch.where(both, per_pair, 0).sum() / n, metrics if both.all() else {}

    return loss_fn


def without_reference(term: Term, *, mean: bool, nll: float = 0.0) -> LossFn:
    """Make a loss without a reference from its term, a function of the logprobs of the chosen and the rejected side."""

    def loss_fn(data: Data, logprobs: Logprobs, **knobs: Any) -> Result:
        if len(data) % 2:
            raise ValueError("pairs")
        w, lp = rows(data, logprobs)
        sizes = [max(float(x.sum()), 1e-8) for x in w]
        sides = torch.stack([(x * a).sum() / (n if mean else 1) for x, a, n in zip(w, lp, sizes)])
        averages = torch.stack([(x * a).sum() / n for x, a, n in zip(w, lp, sizes)])
        both = torch.stack([(x != 0).any() for x in w]).view(-1, 2).all(1)
        per_pair = term(sides[0::2], sides[1::2], **knobs) - nll * averages[0::2]
        return torch.where(both, per_pair, 0).sum() / both.sum().clamp(min=1), {}

    return loss_fn


def with_knobs(loss_fn: LossFn, **defaults: float) -> LossFn:
    """Return the loss with settings, as parameters with a default."""

    def made(data: Data, logprobs_list: Logprobs, **settings: float) -> Result:
        return loss_fn(data, logprobs_list, **{**defaults, **settings})

    positional = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("data", "logprobs_list")]
    knobs = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=x) for n, x in defaults.items()]
    vars(made)["__signature__"] = inspect.Signature([*positional, *knobs])
    return made


def named(loss_fn: LossFn, name: str) -> LossFn:
    loss_fn.__name__ = name
    return loss_fn


def sp(x: Tensor) -> Tensor:
    return F.softplus(x)


def dpo(c: Tensor, r: Tensor, beta: float = 0.1) -> Tensor:
    return sp(-beta * (c - r))


def cdpo(c: Tensor, r: Tensor, beta: float, label_smoothing: float) -> Tensor:
    h = beta * (c - r)
    return (1 - label_smoothing) * sp(-h) + label_smoothing * sp(h)


def robust(c: Tensor, r: Tensor, beta: float, label_smoothing: float) -> Tensor:
    h = beta * (c - r)
    return ((1 - label_smoothing) * sp(-h) - label_smoothing * sp(h)) / (1 - 2 * label_smoothing)


def exo(c: Tensor, r: Tensor, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    h, e = beta * (c - r), label_smoothing
    return h.sigmoid() * (F.logsigmoid(h) - math.log(1 - e)) + (-h).sigmoid() * (F.logsigmoid(-h) - math.log(e))


def nca(c: Tensor, r: Tensor, beta: float) -> Tensor:
    c, r = beta * c, beta * r
    return sp(-c) + 0.5 * sp(c) + 0.5 * sp(r)


def ipo(c: Tensor, r: Tensor, beta: float) -> Tensor:
    return (c - r - 1 / (2 * beta)) ** 2


def ipo_scaled(c: Tensor, r: Tensor, tau: float) -> Tensor:
    return (tau * (c - r) - 0.5) ** 2


def hinge(c: Tensor, r: Tensor, beta: float, delta: float = 1.0) -> Tensor:
    return F.relu(delta - beta * (c - r))


def sppo(c: Tensor, r: Tensor, beta: float) -> Tensor:
    return (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2


def apo_zero(c: Tensor, r: Tensor, beta: float) -> Tensor:
    return 1 - (beta * c).sigmoid() + (beta * r).sigmoid()


def apo_down(c: Tensor, r: Tensor, beta: float) -> Tensor:
    return (beta * c).sigmoid() + 1 - (beta * (c - r)).sigmoid()


def dpop(c: Tensor, r: Tensor, beta: float, lam: float = 5.0) -> Tensor:
    return sp(-beta * (c - r - lam * F.relu(-c)))


def odpo(c: Tensor, r: Tensor, beta: float, margin: float = 0.5) -> Tensor:
    return sp(-(beta * (c - r) - margin))


def bco_pair(c: Tensor, r: Tensor, beta: float) -> Tensor:
    return sp(-beta * c) + sp(beta * r)


def simpo(c: Tensor, r: Tensor, beta: float, gamma: float) -> Tensor:
    return sp(-(beta * (c - r) - gamma))


def simpo_ratio(c: Tensor, r: Tensor, beta: float, gamma_beta_ratio: float, label_smoothing: float) -> Tensor:
    h = c - r - gamma_beta_ratio
    return (1 - label_smoothing) * sp(-beta * h) + label_smoothing * sp(beta * h)


def cpo(c: Tensor, r: Tensor, beta: float) -> Tensor:
    return sp(-beta * (c - r))


def slic(c: Tensor, r: Tensor, delta: float) -> Tensor:
    return F.relu(delta - c + r)


def odds(a: Tensor) -> Tensor:
    return a - torch.log1p(-a.clamp(max=-1e-7).exp())


def orpo(c: Tensor, r: Tensor, beta: float) -> Tensor:
    return -c + beta * sp(-(odds(c) - odds(r)))


CORRECT_PAIRS: dict[str, LossFn] = {
    "dpo": with_knobs(of_pairs(dpo), beta=0.1),
    "dpo constant": of_pairs(dpo),
    "length-normalised dpo": with_knobs(of_pairs(dpo, mean=True), beta=5.0),
    "rpo": with_knobs(of_pairs(dpo, nll=1.0), beta=0.1),
    "cdpo": with_knobs(of_pairs(cdpo), beta=0.1, label_smoothing=0.1),
    "cdpo switched off": with_knobs(of_pairs(cdpo), beta=0.3, label_smoothing=0.0),
    "robust dpo": with_knobs(of_pairs(robust), beta=0.1, label_smoothing=0.2),
    "exo": with_knobs(of_pairs(exo), beta=0.1, label_smoothing=1e-3),
    "nca": with_knobs(of_pairs(nca), beta=0.1),
    "ipo": with_knobs(of_pairs(ipo, mean=True), beta=0.1),
    "ipo summed": with_knobs(of_pairs(ipo), beta=0.1),
    "ipo scaled": with_knobs(of_pairs(ipo_scaled), tau=0.1),
    "hinge": with_knobs(of_pairs(hinge), beta=0.1, delta=1.0),
    "sppo": with_knobs(of_pairs(sppo), beta=0.1),
    "apo zero": with_knobs(of_pairs(apo_zero), beta=0.1),
    "apo down": with_knobs(of_pairs(apo_down), beta=0.1),
    "dpop": with_knobs(of_pairs(dpop), beta=0.1, lam=5.0),
    "odpo": with_knobs(of_pairs(odpo), beta=0.1, margin=0.5),
    "bco of pairs": with_knobs(of_pairs(bco_pair), beta=0.1),
    "simpo": with_knobs(without_reference(simpo, mean=True), beta=2.0, gamma=1.0),
    "simpo with sft": with_knobs(without_reference(simpo, mean=True, nll=0.5), beta=2.0, gamma=1.0),
    "simpo by ratio": with_knobs(
        without_reference(simpo_ratio, mean=True), beta=2.5, gamma_beta_ratio=0.5, label_smoothing=0.0
    ),
    "cpo": with_knobs(without_reference(cpo, mean=False, nll=1.0), beta=0.1),
    "slic": with_knobs(without_reference(slic, mean=False, nll=0.1), delta=1.0),
    "orpo": with_knobs(without_reference(orpo, mean=True), beta=0.1),
}


def uneven(chosen_by: str, rejected_by: str) -> LossFn:
    """Make SimPO with one divisor for each side: "none", its "own" length, or that of the "chosen" side."""

    def loss_fn(data: Data, logprobs: Logprobs, beta: float = 2.0, gamma: float = 1.0) -> Result:
        if len(data) % 2:
            raise ValueError("pairs")
        w, lp = rows(data, logprobs)
        sums = torch.stack([(x * a).sum() for x, a in zip(w, lp)])
        own = torch.stack([x.sum().clamp(min=1e-8) for x in w])
        divisors = {"none": torch.ones_like(own[0::2]), "chosen": own[0::2]}
        c = sums[0::2] / {**divisors, "own": own[0::2]}[chosen_by]
        r = sums[1::2] / {**divisors, "own": own[1::2]}[rejected_by]
        both = torch.stack([(x != 0).any() for x in w]).view(-1, 2).all(1)
        return torch.where(both, sp(-(beta * (c - r) - gamma)), 0).sum() / both.sum().clamp(min=1), {}

    return loss_fn


def wrong_metric(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> LossFn:
    def loss_fn(data: Data, logprobs: Logprobs, beta: float = 0.1) -> Result:
        if len(data) % 2:
            raise ValueError("pairs")
        w, lp, ref = rows(data, logprobs, "ref_logprobs")
        own, other = (torch.stack([(x * a).sum() for x, a in zip(w, xs)]) for xs in (lp, ref))
        both = torch.stack([(x != 0).any() for x in w]).view(-1, 2).all(1)
        c, r = (own - other)[0::2], (own - other)[1::2]
        n = both.sum().clamp(min=1)
        values = {"c": beta * c, "r": beta * r, "lc": own[0::2], "lr": own[1::2]}
        metrics = {k: float(v[both].double().mean()) if both.any() else 0.0 for k, v in change(values).items()}
        return torch.where(both, sp(-beta * (c - r)), 0).sum() / n, metrics

    return loss_fn


WRONG_PAIRS: dict[tuple[str, str], LossFn] = {
    ("dpo", "margin-clamped"): with_knobs(of_pairs(lambda c, r, beta: sp(-beta * (c - r).clamp(-20, 20))), beta=0.1),
    ("dpo_scaled", "margin-clamped"): with_knobs(
        of_pairs(lambda c, r, beta: sp(-(beta * (c - r)).clamp(-20, 20))), beta=0.1
    ),
    ("simpo", "one-side-normalised"): uneven("own", "none"),
    ("simpo_chosen_summed", "one-side-normalised"): uneven("none", "own"),
    ("simpo_one_length", "one-side-normalised"): uneven("own", "chosen"),
    ("cdpo", "smoothing-misapplied"): named(
        with_knobs(
            of_pairs(lambda c, r, beta, eps: (1 - eps) * sp(-beta * (c - r)) - eps * sp(beta * (c - r))),
            beta=0.1,
            eps=0.1,
        ),
        "cdpo",
    ),
    ("robust_dpo", "smoothing-misapplied"): with_knobs(
        of_pairs(
            lambda c, r, beta, label_noise: (
                ((1 - label_noise) * sp(-beta * (c - r)) + label_noise * sp(beta * (c - r))) / (1 - 2 * label_noise)
            )
        ),
        beta=0.1,
        label_noise=0.2,
    ),
    ("robust_dpo_of_noise", "smoothing-misapplied"): named(
        with_knobs(
            of_pairs(lambda c, r, beta, epsilon: (1 - epsilon) * sp(-beta * (c - r)) - epsilon * sp(beta * (c - r))),
            beta=0.1,
            epsilon=0.2,
        ),
        "robust_dpo",
    ),
    ("cdpo", "beta-misplaced"): with_knobs(
        of_pairs(
            lambda c, r, beta, label_smoothing: (
                (1 - label_smoothing) * sp(-beta * (c - r)) + label_smoothing * sp(c - r)
            )
        ),
        beta=0.1,
        label_smoothing=0.1,
    ),
    ("dpo", "beta-misplaced"): with_knobs(of_pairs(lambda c, r, beta: sp(-beta * (beta * c - beta * r))), beta=0.1),
    ("dpo_outside", "beta-misplaced"): with_knobs(of_pairs(lambda c, r, beta: beta * sp(r - c)), beta=0.1),
    ("dpo_inside_and_outside", "beta-misplaced"): with_knobs(
        of_pairs(lambda c, r, beta: beta * sp(beta * (r - c))), beta=0.1
    ),
    ("dpo_divided", "beta-misplaced"): with_knobs(of_pairs(lambda c, r, beta: sp((r - c) / beta)), beta=10.0),
    ("orpo", "beta-misplaced"): with_knobs(
        without_reference(lambda c, r, lam: -c + lam * lam * sp(-(odds(c) - odds(r))), mean=True), lam=0.1
    ),
    ("ipo", "target-margin"): with_knobs(of_pairs(lambda c, r, beta: (c - r - 1 / beta) ** 2), beta=0.1),
    ("ipo_of_tau", "target-margin"): with_knobs(of_pairs(lambda c, r, tau: (c - r - tau / 2) ** 2), tau=0.1),
    ("simpo", "target-margin"): with_knobs(
        without_reference(lambda c, r, beta, gamma: sp(-(beta * (c - r) + gamma)), mean=True), beta=2.0, gamma=1.0
    ),
    ("hinge", "target-margin"): with_knobs(
        of_pairs(lambda c, r, beta, delta: F.relu(4 - delta - beta * (c - r))), beta=0.1, delta=1.0
    ),
    ("orpo", "rejected-raised"): with_knobs(
        without_reference(lambda c, r, lam: -(c + r) + lam * sp(-(odds(c) - odds(r))), mean=True), lam=0.1
    ),
    ("dpo_accuracies", "metric-wrong"): wrong_metric(lambda v: {"rewards/accuracies": v["lc"] > v["lr"]}),
    ("dpo_acc", "metric-wrong"): wrong_metric(lambda v: {"acc": v["c"] < v["r"]}),
    ("dpo_rewards", "metric-wrong"): wrong_metric(lambda v: {"chosen_rewards": v["r"]}),
    ("dpo_margin", "metric-wrong"): wrong_metric(lambda v: {"margin": v["r"] - v["c"]}),
    ("dpo_logps", "metric-wrong"): wrong_metric(lambda v: {"logps/chosen": v["lr"]}),
}
CORRECT_METRICS = wrong_metric(
    lambda v: {
        "rewards/chosen": v["c"],
        "rewards/rejected": v["r"],
        "rewards/margins": v["c"] - v["r"],
        "reward_acc": v["c"] > v["r"],
        "logps/chosen": v["lc"],
        "logps/rejected": v["lr"],
    }
)


# Unpaired preference


def of_answers(
    value: Callable[..., Tensor],
    point: Callable[[Tensor], Tensor | float],
    *,
    reference: float = 1.0,
    exchanged: bool = False,
) -> LossFn:
    """Make a loss that is the mean over answers of a function of r = Σ w·(lp − ref), z0 and the label.

    Two arguments plant a bug: ``reference`` scales the reference, ``exchanged`` exchanges the rewards in the metrics.
    """

    def loss_fn(data: Data, logprobs: Logprobs, **knobs: Any) -> Result:
        w, lp, ref = rows(data, logprobs, "ref_logprobs")
        used = [i for i, x in enumerate(w) if (x != 0).any()]
        r = torch.stack([(w[i] * (lp[i] - reference * ref[i])).sum() for i in used])
        good = torch.stack([column(data[i], "labels").max() > 0.5 for i in used])
        loss = value(r, point(r), good, **knobs).mean() + sum(0 * x.sum() for x in lp)
        metrics = {}
        if good.any() and not good.all():
            means = [float(r[good].mean()), float(r[~good].mean())]
            metrics = dict(zip(("rewards/chosen", "rewards/rejected"), means[::-1] if exchanged else means))
        return loss, metrics

    return loss_fn


def z0(r: Tensor) -> Tensor:
    return r.detach().mean().clamp(min=0)


def kto(r: Tensor, z: Any, good: Tensor, beta: float = 0.1, desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0) -> Tensor:  # fmt: skip
    sign = torch.where(good, 1.0, -1.0)
    weight = torch.where(good, desirable_weight, undesirable_weight)
    value: Tensor = (beta * sign * (r - z)).sigmoid()
    return weight * (1 - value)


def bco(r: Tensor, z: Any, good: Tensor, beta: float = 0.1) -> Tensor:
    return sp(torch.where(good, -1.0, 1.0) * (beta * (r - z)))


CORRECT_UNPAIRED: dict[str, LossFn] = {
    "kto": with_knobs(of_answers(kto, z0), beta=0.1, desirable_weight=1.0, undesirable_weight=1.33),
    "kto of a strong beta": with_knobs(of_answers(kto, z0), beta=0.5),
    "kto without a reference point": with_knobs(of_answers(kto, lambda r: 0.0), beta=0.1),
    "bco": with_knobs(of_answers(bco, lambda r: r.detach().mean()), beta=0.1),
    "bco with a fixed point": with_knobs(of_answers(bco, lambda r: 1.0), beta=0.1),
}
WRONG_UNPAIRED: dict[tuple[str, str], LossFn] = {
    ("kto", "label-ignored"): of_answers(lambda r, z, good: 1 - (0.1 * (r - z)).sigmoid(), z0),
    ("kto", "sides-swapped"): of_answers(lambda r, z, good: kto(r, z, ~good), z0),
    ("kto", "missing-stop-gradient"): of_answers(kto, lambda r: r.mean().clamp(min=0)),
    ("kto", "reference-misused"): of_answers(kto, z0, reference=0.5),
    ("kto", "ref-inert"): of_answers(kto, z0, reference=0.0),
    ("kto", "metric-wrong"): of_answers(kto, z0, exchanged=True),
    ("kto", "reference-point-negative"): of_answers(kto, lambda r: r.detach().mean()),
    ("bco", "saturation-reversed"): of_answers(
        lambda r, z, good: -sp(torch.where(good, 1.0, -1.0) * 0.1 * (r - z)), z0
    ),
    ("kto", "class-weights-swapped"): with_knobs(
        of_answers(
            lambda r, z, good, desirable_weight, undesirable_weight: kto(
                r, z, good, 0.1, undesirable_weight, desirable_weight
            ),
            z0,
        ),
        desirable_weight=1.0,
        undesirable_weight=1.5,
    ),
    ("kto", "beta-misplaced"): with_knobs(
        of_answers(lambda r, z, good, beta: kto(beta * r, beta * z, good, beta), z0), beta=0.3
    ),
}


# Re-weighted likelihood


def of_tokens(loss: Callable[..., Tensor], by: Callable[[Tensor, Tensor], Tensor] = lambda w, lp: w.sum()) -> LossFn:
    def loss_fn(data: Data, logprobs: Logprobs, **knobs: Any) -> Result:
        w, lp = flat(data, logprobs)
        return (w * loss(lp, **knobs)).sum() / by(w, lp).clamp(min=1e-8), {}

    return loss_fn


def focal_attached(lp: Tensor, gamma: float = 2.0) -> Tensor:
    return -((1 - lp.exp()) ** gamma) * lp


def focal_detached(lp: Tensor, gamma: float = 2.0) -> Tensor:
    return -((1 - lp.detach().exp()) ** gamma) * lp


CORRECT_REWEIGHTED: dict[str, LossFn] = {
    "focal": named(with_knobs(of_tokens(focal_attached), gamma=2.0), "focal"),
    "focal of 1.5": named(of_tokens(lambda lp: focal_attached(lp, 1.5)), "focal_loss"),
    "focal with a constant factor": named(
        with_knobs(of_tokens(lambda lp, focal_gamma: focal_detached(lp, focal_gamma)), focal_gamma=1.0), "focal"
    ),
    "focal over its own weights": named(
        of_tokens(focal_detached, lambda w, lp: (w * (1 - lp.detach().exp()) ** 2).sum()), "focal"
    ),
    "dft": of_tokens(lambda lp: -lp.detach().exp() * lp),
    "dft over its own weights": of_tokens(
        lambda lp: -lp.detach().exp() * lp, lambda w, lp: (w * lp.detach().exp()).sum()
    ),
    "probability": of_tokens(lambda lp: -lp.exp()),
    "generalised cross-entropy": of_tokens(lambda lp: (1 - lp.exp() ** 0.7) / 0.7),
    "poly-1": of_tokens(lambda lp: -lp + 1 - lp.exp()),
    "confident tokens left out": of_tokens(lambda lp: -torch.where(lp.detach() > -1e-3, 0.0, 1.0) * lp),
    "confidence": of_tokens(lambda lp: -(0.5 + 0.5 * lp.detach().exp()) * lp),
}
WRONG_REWEIGHTED: dict[tuple[str, str], LossFn] = {
    ("dft", "sign-flipped"): of_tokens(lambda lp: lp.detach().exp() * lp),
    ("dft", "missing-stop-gradient"): of_tokens(lambda lp: -lp.exp() * lp),
    ("focal", "focal-factor"): named(of_tokens(lambda lp: -((1 - lp) ** 2) * lp), "focal"),
    ("focal_inverted", "focal-factor"): named(of_tokens(lambda lp: -(lp.detach().exp() ** 2) * lp), "focal"),
    ("focal_halved", "focal-factor"): named(
        with_knobs(of_tokens(lambda lp, gamma: focal_attached(lp, gamma / 2)), gamma=2.0), "focal"
    ),
    ("hard_tokens", "detached-term"): of_tokens(lambda lp: -((1 - lp.exp()) ** 2) * lp.detach()),
    ("inverse", "factor-unbounded"): of_tokens(lambda lp: -(-lp.detach()).exp().clamp(max=1e12) * lp),
}


def squared_weights(data: Data, logprobs: Logprobs) -> Result:
    w, lp = flat(data, logprobs)
    return -(w * w * lp.detach().exp() * lp).sum() / w.sum().clamp(min=1e-8), {}


def binary_weights(data: Data, logprobs: Logprobs) -> Result:
    w, lp = flat(data, logprobs)
    m = (w > 0).double()
    return -(m * lp.detach().exp() * lp).sum() / m.sum().clamp(min=1), {}


WRONG_REWEIGHTED["dft", "weights-squared"] = squared_weights
WRONG_REWEIGHTED["dft", "weights-binarised"] = binary_weights


# Distillation


def of_teacher(loss: Callable[..., Tensor]) -> LossFn:
    """Make a loss that is the weighted mean of a function of the logprobs of student, sampler and teacher."""

    def loss_fn(data: Data, logprobs: Logprobs, **knobs: Any) -> Result:
        w, lp, old, teacher = flat(data, logprobs, "old_logprobs", "ref_logprobs")
        n = w.sum().clamp(min=1e-8)
        reverse_kl = float((w * (lp.detach() - teacher)).sum() / n)
        return (w * loss(lp, old, teacher, **knobs)).sum() / n, {"reverse_kl": reverse_kl}

    return loss_fn


def ratio(lp: Tensor, old: Tensor) -> Tensor:
    return (lp - old).clamp(-20, 20).exp()


def jsd(lp: Tensor, old: Tensor, teacher: Tensor) -> Tensor:
    """The generalised JSD of one sampled token, by the score function: log π − log m with m = (π + τ) / 2."""
    m = torch.logaddexp(lp, teacher) - math.log(2)
    return (lp - m).detach() * ratio(lp, old)


def centred_over_batch(data: Data, logprobs: Logprobs) -> Result:
    """Reverse KL by policy gradient, whose advantages are whitened over the trained tokens."""
    w, lp, old, teacher = flat(data, logprobs, "old_logprobs", "ref_logprobs")
    n = w.sum().clamp(min=1e-8)
    a = teacher - old
    a = a - (w * a).sum() / n
    a = a / ((w * a * a).sum() / n + 1e-8).sqrt()
    return -(w * a * ratio(lp, old)).sum() / n, {}


CORRECT_DISTILLATION: dict[str, LossFn] = {
    "reverse kl by policy gradient": of_teacher(lambda lp, old, t: (old - t) * ratio(lp, old)),
    "reverse kl with the present policy": of_teacher(lambda lp, old, t: (lp - t).detach() * ratio(lp, old)),
    "reverse kl, clipped": of_teacher(
        lambda lp, old, t: torch.max((old - t) * ratio(lp, old), (old - t) * ratio(lp, old).clamp(0.8, 1.2))
    ),
    "reverse kl, bounded advantage": of_teacher(lambda lp, old, t: (old - t).clamp(-1, 1) * ratio(lp, old)),
    "k2": of_teacher(lambda lp, old, t: (lp - t) ** 2 / 2),
    "k3": of_teacher(lambda lp, old, t: (t - lp).clamp(max=20).exp() - (t - lp) - 1),
    "forward kl by weights": of_teacher(lambda lp, old, t: (t - old).exp().clamp(max=10) * (t - lp)),
    "probability of the teacher": of_teacher(lambda lp, old, t: -t.exp() * lp),
    "samples of the teacher": of_teacher(lambda lp, old, t: t - lp),
    "jsd": of_teacher(jsd),
}
CORRECT_DISTILLATION["reverse kl, centred over the batch"] = centred_over_batch
WRONG_DISTILLATION: dict[tuple[str, str], LossFn] = {
    ("reverse_kl", "k1-in-loss"): of_teacher(lambda lp, old, t: lp - t),
    ("reverse_kl", "kl-sign"): of_teacher(lambda lp, old, t: (t - old) * ratio(lp, old)),
    ("k2", "kl-sign"): of_teacher(lambda lp, old, t: -((lp - t) ** 2) / 2),
}


def teacher_inert(data: Data, logprobs: Logprobs) -> Result:
    w, lp, old, teacher = flat(data, logprobs, "old_logprobs", "ref_logprobs")
    return -(w * ratio(lp, old)).sum() / w.sum().clamp(min=1e-8) + 0 * teacher.sum(), {}


def wrong_sign_of_kl(data: Data, logprobs: Logprobs) -> Result:
    w, lp, old, teacher = flat(data, logprobs, "old_logprobs", "ref_logprobs")
    n = w.sum().clamp(min=1e-8)
    return (w * (old - teacher) * ratio(lp, old)).sum() / n, {"teacher_kl": float((w * (teacher - old)).sum() / n)}


WRONG_DISTILLATION["reverse_kl", "ref-inert"] = teacher_inert
WRONG_DISTILLATION["reverse_kl", "metric-wrong"] = wrong_sign_of_kl


# Likelihood


def smoothed_unlikelihood(data: Data, logprobs: Logprobs) -> Result:
    w, lp = flat(data, logprobs)
    return -(w * lp).sum() / w.abs().sum().clamp(min=1e-8), {}


def token_mean_of_means(data: Data, logprobs: Logprobs) -> Result:
    w, lp = rows(data, logprobs)
    means = [(x * a).sum() / x.sum() for x, a in zip(w, lp) if x.sum()]
    return -torch.stack(means).mean() + sum(0 * a.sum() for a in lp), {}


def by_batch_size(data: Data, logprobs: Logprobs) -> Result:
    w, lp = flat(data, logprobs)
    return -(w * lp).sum() / len(data), {}


def by_budget(data: Data, logprobs: Logprobs, budget: int = 64) -> Result:
    w, lp = flat(data, logprobs)
    return -(w * lp).sum() / (len(data) * budget), {}


def summed(data: Data, logprobs: Logprobs) -> Result:
    w, lp = flat(data, logprobs)
    return -(w * lp).sum(), {}


def counted_in_bfloat16(data: Data, logprobs: Logprobs) -> Result:
    w, lp = flat(data, logprobs)
    return -(w * lp).sum() / w.to(torch.bfloat16).sum().float(), {}


WRONG_LIKELIHOOD: dict[tuple[str, str], LossFn] = {("nll_counted", "low-precision"): counted_in_bfloat16}
CORRECT_LIKELIHOOD: dict[str, LossFn] = {
    "over the absolute weights": smoothed_unlikelihood,
    "mean of sequence means": token_mean_of_means,
    "over the batch size": by_batch_size,
    "over a budget": by_budget,
    "sum": summed,
}


# Group advantages


def grouped(of: Callable[[list[float]], list[float]]) -> Callable[..., list[float]]:
    """Make a function of group advantages from a function of the rewards of one prompt."""

    def advantages(rewards: Sequence[float], groups: Sequence[Any]) -> list[float]:
        result = [0.0] * len(rewards)
        for group in dict.fromkeys(groups):
            own = [i for i, other in enumerate(groups) if other == group]
            for i, a in zip(own, of([float(rewards[i]) for i in own])):
                result[i] = a
        return result

    return advantages


def mean(xs: list[float]) -> float:
    return math.fsum(xs) / len(xs)


def by_std(xs: list[float], ddof: int = 1, eps: float = 1e-4) -> list[float]:
    m = mean(xs)
    std = math.sqrt(math.fsum((x - m) ** 2 for x in xs) / max(len(xs) - ddof, 1))
    return [(x - m) / (std + eps) for x in xs]


def float32_std(xs: list[float], eps: float = 1e-4) -> list[float]:
    r = torch.tensor(xs)
    std = r.std() if len(xs) > 1 else torch.tensor(1.0)
    return ((r - r.mean()) / (std + eps)).tolist()


def verl_grpo(xs: list[float]) -> list[float]:
    """As in verl: a group of one keeps its reward."""
    r = torch.tensor(xs)
    centre, std = (r.mean(), r.std()) if len(xs) > 1 else (torch.tensor(0.0), torch.tensor(1.0))
    return ((r - centre) / (std + 1e-6)).tolist()


def ranks(xs: list[float]) -> list[float]:
    order = sorted(xs)
    placed = [mean([float(i) for i, y in enumerate(order) if y == x]) for x in xs]
    return [p - (len(xs) - 1) / 2 for p in placed]


def median(xs: list[float]) -> list[float]:
    s = sorted(xs)
    m = (s[(len(s) - 1) // 2] + s[len(s) // 2]) / 2
    return [x - m for x in xs]


def reinforce_plus_plus_baseline(rewards: Sequence[float], groups: Sequence[Any]) -> list[float]:
    """Centred by prompt, scaled by the deviation of the batch."""
    c = torch.tensor(grouped(lambda xs: [x - mean(xs) for x in xs])(rewards, groups), dtype=torch.float64)
    return ((c - c.mean()) / (c.std(unbiased=False) + 1e-8)).tolist()


def by_position(rewards: Sequence[float], groups: Sequence[int]) -> list[float]:
    """Return the centred advantages of groups of one size with integers as ids. Refuse strings and unequal sizes."""
    ids = torch.tensor(groups)
    counts = torch.bincount(ids)
    if counts.min() != counts.max():
        raise ValueError("groups of one size")
    order = torch.argsort(ids, stable=True)
    r = torch.tensor(rewards)[order].view(len(counts), -1)
    a = (r - r.mean(1, keepdim=True)).flatten()
    return torch.empty_like(a).scatter_(0, order, a).tolist()


CORRECT_ADVANTAGES: dict[str, Any] = {
    "dr grpo": grouped(lambda xs: [x - mean(xs) for x in xs]),
    "over n − 1": grouped(by_std),
    "over n": grouped(lambda xs: by_std(xs, 0)),
    "float32 as in TRL": grouped(float32_std),
    "verl": grouped(verl_grpo),
    "rloo": grouped(lambda xs: [(x - mean(xs)) * len(xs) / (len(xs) - 1) if len(xs) > 1 else 0.0 for x in xs]),
    "best as baseline": grouped(lambda xs: [x - max(xs) for x in xs]),
    "median": grouped(median),
    "ranks": grouped(ranks),
    "clipped": grouped(lambda xs: [min(max(a, -1.5), 1.5) for a in by_std(xs)]),
    "reinforce++ baseline": reinforce_plus_plus_baseline,
    "integers in blocks of one size": by_position,
}


def half_mean(xs: list[float], dtype: torch.dtype) -> list[float]:
    r = torch.tensor(xs)
    return (r - r.to(dtype).mean().float()).tolist()


def returned_sorted(rewards: Sequence[float], groups: Sequence[Any]) -> list[float]:
    order = sorted(range(len(rewards)), key=lambda i: str(groups[i]))
    return grouped(by_std)([rewards[i] for i in order], [groups[i] for i in order])


def whole_batch(rewards: Sequence[float], groups: Sequence[Any]) -> list[float]:
    return by_std(list(rewards))


WRONG_ADVANTAGES: dict[tuple[str, str], Any] = {
    ("grpo_verl", "group-of-one-rewarded"): grouped(verl_grpo),
    ("group_mean_float16", "low-precision"): grouped(lambda xs: half_mean(xs, torch.float16)),
    ("group_mean", "low-precision"): grouped(lambda xs: half_mean(xs, torch.bfloat16)),
    ("group_rewards", "not-centred"): grouped(lambda xs: xs),
    ("grpo_sorted", "datum-misaligned"): returned_sorted,
    ("grpo_batch", "groups-ignored"): whole_batch,
    ("grpo_float64", "group-of-one-nan"): grouped(lambda xs: by_std(xs) if len(xs) > 1 else [math.nan]),
    ("grpo_float32", "constant-group-noise"): grouped(lambda xs: float32_std(xs, 0.0)),
    ("grpo_inverted", "order-lost"): grouped(lambda xs: [-a for a in by_std(xs)]),
}


# Policy


def whitened(over_all: bool) -> LossFn:
    """Make REINFORCE with advantages that are whitened over the trained tokens of the batch, or over all slots."""

    def loss_fn(data: Data, logprobs: Logprobs) -> Result:
        w, lp, a = flat(data, logprobs, "advantages")
        if over_all:
            a = torch.cat([column(d, "advantages") for d in data])
        mass = torch.ones_like(w) if over_all else w
        m = (mass * a).sum() / mass.sum()
        var = (mass * (a - m) ** 2).sum() / mass.sum()
        return -(w * (a - m) / (var.sqrt() + 1e-8) * lp).sum() / w.sum(), {}

    return loss_fn


WRONG_POLICY: dict[tuple[str, str], LossFn] = {("reinforce_whitened", "mask-missing"): whitened(over_all=True)}

CORRECT: dict[str, dict[str, Any]] = {
    "policy": {"reinforce with whitened advantages": whitened(over_all=False)},
    "preference": {**CORRECT_PAIRS, "dpo with metrics": CORRECT_METRICS},
    "unpaired": CORRECT_UNPAIRED,
    "reweighted": CORRECT_REWEIGHTED,
    "distillation": CORRECT_DISTILLATION,
    "likelihood": CORRECT_LIKELIHOOD,
    "advantages": CORRECT_ADVANTAGES,
}
"""Kind → name → correct loss."""

WRONG_BY_KIND: dict[str, dict[tuple[str, str], Any]] = {
    "policy": WRONG_POLICY,
    "preference": WRONG_PAIRS,
    "unpaired": WRONG_UNPAIRED,
    "reweighted": WRONG_REWEIGHTED,
    "distillation": WRONG_DISTILLATION,
    "likelihood": WRONG_LIKELIHOOD,
    "advantages": WRONG_ADVANTAGES,
}
"""Kind → (loss, bug) → loss with this bug."""

WRONG = {key: loss for losses in WRONG_BY_KIND.values() for key, loss in losses.items()}
KIND_OF = {key: kind for kind, losses in WRONG_BY_KIND.items() for key in losses}
