"""The kinds of losses: the columns and small batches of each kind, and how the kind of a subject is detected."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lossfns.inspect.probe import ALIASES
from lossfns.loss import BoundLoss, Loss
from lossfns.testing.batch import Batch, Rows
from lossfns.testing.factories import FactoryLoss
from lossfns.testing.forms import (
    PROBE,
    Adapted,
    PaddedLoss,
    coupling,
    reads_teacher,
)
from lossfns.testing.laws import LAWS_BY_KIND, NotApplicable
from lossfns.testing.laws.base import (
    ALL_FIELDS,
    LossFn,
    RecordingDatum,
    measure,
    relative_difference,
)
from lossfns.testing.names import column_of
from lossfns.testing.public import LIBRARY
from lossfns.testing.settings import parameters
from lossfns.testing.subject import GROUP_SIZES, GROUPS, LENGTHS, REWARDS
from lossfns.tokens import PAIRS, SEQUENCES, TARGETS, TOKENS

READS = {
    "policy": ("advantages", "old_logprobs", "ref_logprobs", "sampler_logprobs"),
    "likelihood": (),
    "reweighted": (),
    "preference": ("ref_logprobs",),
    "unpaired": ("labels", "ref_logprobs"),
    "distillation": ("old_logprobs", "ref_logprobs", "sampler_logprobs"),
}
READS["any"] = READS["policy"]
"""Kind → the columns, besides the weights, in the batches for a loss of this kind."""

KINDS = (*LAWS_BY_KIND, "advantages")
NUM_TARGETS = 3
"""K, the targets of a position, in the batches for a loss over ``[N, K]``."""

# The small batches, on which every law runs first

SMALL = (
    Batch(
        [[-1.0], [-1.5], [-0.5], [-2.0]],
        [[1.0]] * 4,
        {
            "advantages": [[1.0], [-1.0], [0.5], [2.0]],
            "old_logprobs": [[-1.0], [-1.5], [-0.5], [-2.0]],
            "ref_logprobs": [[-1.0], [-1.5], [-0.5], [-2.0]],
            "sampler_logprobs": [[-1.0], [-1.5], [-0.5], [-2.0]],
            "labels": [[1.0], [0.0], [1.0], [0.0]],
        },
    ),
    Batch(
        [[-1.0, -2.0, -0.5], [-1.0, -0.25, -3.0, -1.5, -0.75], [-0.5, -1.0], [-2.0]],
        [[0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0, 1.0], [1.0, 1.0], [1.0]],
        {
            "advantages": [[1.0] * 3, [-1.0] * 5, [0.5] * 2, [-2.0]],
            "old_logprobs": [[-1.0, -2.5, -0.75], [-1.0, -0.25, -2.75, -1.75, -0.875], [-0.625, -0.875], [-2.0625]],
            "ref_logprobs": [[-1.0, -2.25, -1.0], [-1.5, -0.25, -2.5, -1.25, -0.75], [-1.0, -1.5], [-1.5]],
            "sampler_logprobs": [[-1.0, -2.25, -0.5], [-1.5, -0.5, -2.5, -1.75, -1.0], [-0.75, -1.0], [-2.0]],
            "labels": [[1.0] * 3, [0.0] * 5, [1.0] * 2, [0.0]],
        },
    ),
)


def columns_for_kind(batch: Batch, kind: str, targets: int) -> Batch:
    """Return a small batch with the columns of a kind. If ``targets`` is not 0, each position has that many targets."""
    batch = Batch(batch.logprobs, batch.weights, {name: batch.columns[name] for name in READS[kind]})
    return batch.with_targets(targets)


# Detection of the kind of a subject


def try_call(loss_fn: LossFn, batch: Batch, dtype: torch.dtype) -> Tensor | None:
    """Return the loss on a batch, or None where the call fails or returns no tensor."""
    try:
        loss = loss_fn(batch.data(), batch.tensors(dtype))[0]
    except NotApplicable:
        raise
    except Exception:
        return None
    return loss if isinstance(loss, Tensor) else None


def working_dtype(loss_fn: LossFn, batch: Batch) -> torch.dtype:
    """Return float64 if the loss computes in float64 (a change of 2⁻⁴⁰ changes the value), else float32."""
    nudged = batch.having(logprobs=[[x - 2.0**-40 for x in row] for row in batch.logprobs])
    values = [try_call(loss_fn, b, torch.float64) for b in (batch, nudged)]
    returns_float64 = all(value is not None and value.dtype == torch.float64 for value in values)
    # A loss that computes in float32 and converts the result to float64 does not show the change.
    return torch.float64 if returns_float64 and not torch.equal(*values) else torch.float32  # type: ignore[arg-type]


def takes_datum_advantages(loss_fn: LossFn, batch: Batch) -> bool:
    """Return whether the subject takes one advantage for each datum."""
    return isinstance(loss_fn, (FactoryLoss, PaddedLoss)) and loss_fn.takes_datum_advantages


def takes_rewards(subject: Any) -> bool:
    """Return whether a subject computes group advantages: it takes rewards and no logprobs, and returns no function."""
    if isinstance(subject, (Loss, BoundLoss, Adapted)) or not callable(subject):
        return False
    try:
        if inspect.isclass(subject) and all(p.default is not p.empty for p in parameters(subject)):
            subject = subject()
        required = [p.name for p in parameters(subject) if p.default is p.empty]
    except Exception:  # ``adapt`` says what is wrong
        return False
    known = (*REWARDS, *GROUPS, *GROUP_SIZES, *LENGTHS)
    return any(n in REWARDS for n in required) and all(n in known or column_of(n) == "weights" for n in required)


def detect_kind(loss_fn: LossFn) -> tuple[str, bool]:
    """Return the kind of a loss, and whether it is a guess.

    The kind follows from the declaration of a ``Loss``, else from the columns that the loss reads and from what its
    gradients depend on.
    """
    loss = loss_fn.loss if isinstance(loss_fn, BoundLoss) else loss_fn
    if isinstance(loss, Loss):
        if loss.parts and loss.rows not in (PAIRS, SEQUENCES):
            return "any", False
        kind = declared_kind(loss)
        if kind is not None:
            return kind, False
        reads = set(loss.reads)
    else:
        reads = set(loss.columns) if isinstance(loss, (FactoryLoss, PaddedLoss)) else set()
        if not isinstance(loss, PaddedLoss):
            reads |= detect_fields_read(loss)
    if reads & {"advantages", ALL_FIELDS}:
        return "policy", False
    if "labels" in reads or any(name.startswith("KL ") for name in reads):
        return "unpaired", False
    coupled = coupling(loss_fn)
    if any(name.startswith(("chosen ", "rejected ")) for name in reads):
        return "preference", coupled == "batch"
    if coupled in ("pairs", "halves", "partners") or takes_pairs(loss_fn):
        return "preference", False
    if reads_teacher(loss):
        return "distillation", False
    if coupled == "batch":
        return "any", True
    if "ref_logprobs" in reads:
        return "distillation", not vanishes_at_teacher(loss_fn)
    if reads & {"old_logprobs", "sampler_logprobs"}:
        return "any", True
    if is_linear(loss_fn):
        return "likelihood", False
    return "reweighted", not (isinstance(loss, Loss) or is_tokenwise(loss_fn))


def declared_kind(loss: Loss) -> str | None:
    """Return the kind that follows from the rows and the columns of a ``Loss``, or None."""
    if loss.rows is PAIRS:
        return "preference"
    if loss.rows is SEQUENCES:
        return "unpaired" if {"labels", "ref_logprobs"} <= set(loss.reads) and not loss.couples_groups else "any"
    if "teacher_logprobs" in loss.reads and "advantages" not in loss.reads:
        return "distillation" if loss.rows is TOKENS else "any"
    return "any" if loss.output != "logprobs" or is_own(loss, UNLIKE_THEIR_KIND) else None


UNLIKE_THEIR_KIND = {"unlikelihood": "it lowers the likelihood of its tokens"}
"""Preset → why it does not obey the laws of the kind that its columns show."""

BY_DESIGN = {
    "ce_gppo": (("clip",), "beyond the bounds the value is constant and the gradient is kept, as in the paper"),
    "clip_cov": (("no_inert_knob",), "the tokens of a datum have one advantage, and so the covariance 0"),
    "kl_cov": (("no_inert_knob",), "the tokens of a datum have one advantage, and so the covariance 0"),
    "fipo": (("padding", "metric_scope"), "the discount counts positions, those of masked tokens too"),
    "rec_ring": (("clip",), "its region has a second part, far on the side from which the advantage pulls back"),
    "sppo_token": (("clip", "ratio", "ratio_gradient"), "it has the log-ratio in place of the ratio"),
    "opmd": (("on_policy",), "its temperature scales the advantage"),
    "alpha_dpo": (
        ("reference", "no_inert_knob", "pair_metrics"),
        "the reference acts through a z-score over the pairs of a group, which is 0 for one pair",
    ),
    "beta_dpo": (("monotone", "finite_differences"), "its β depends on the margins, without gradient"),
    "dr_dpo": (("no_inert_knob",), "a group of one pair has no robust mean"),
    "discopop": (("sides", "monotone"), "it blends the logistic and the exponential loss, and is not monotone"),
    "f_dpo": (("margin_metrics",), "its margin is that of the divergence, not of the log-ratios"),
    "gpo": (("target",), "the squared hinge has its target at 1/β"),
    "alphapo": (("misranked", "odds"), "its reward is a power of the probability, which grows without bound"),
    "bpo": (
        ("pair_canary", "reference", "finite_differences"),
        "only the side with the smaller reward has a gradient, and both are equal on-policy",
    ),
    "minor_dpo": (("sides", "reference"), "a rejected side below the reference is left alone"),
    "ld_dpo": (("pair_weights",), "tokens beyond the length of the shorter side count less"),
    "wpo": (
        ("reference", "monotone", "finite_differences"),
        "the probability of a pair under the policy weighs it, without gradient",
    ),
}
"""Preset → the laws that it breaks, and why."""


def is_own(loss: Loss, names: Mapping[str, Any]) -> bool:
    """Return whether a loss is a preset of this library with one of these names."""
    return loss.name in names and loss.name in vars(LIBRARY)


def broken_by_design(loss_fn: Any) -> dict[str, str]:
    """Return law → reason for the laws that a preset of this library, or a loss made from it, breaks by design."""
    loss = loss_fn.loss if isinstance(loss_fn, BoundLoss) else loss_fn
    broken: dict[str, str] = {}
    while isinstance(loss, Loss):
        if is_own(loss, BY_DESIGN):
            broken |= dict.fromkeys(*BY_DESIGN[loss.name])
        if loss.rows is TARGETS and "teacher_logprobs" in loss.reads:
            broken |= dict.fromkeys(("signal", "canary"), "it compares the candidates of a position, here a single one")
        loss = loss.knobs.get("loss")
    return broken


def vanishes_at_teacher(loss_fn: LossFn) -> bool:
    """Return whether the value or every gradient is 0 where policy, sampler and teacher agree.

    This holds for a divergence from a teacher. It does not for a policy gradient whose advantages are in the weights.
    """
    others = ("old_logprobs", "ref_logprobs", "sampler_logprobs")
    batch = SMALL[1].having(**dict.fromkeys(others, SMALL[1].logprobs))
    try:
        result = measure(loss_fn, batch.data(), batch.tensors(torch.float32))
    except NotApplicable:
        raise
    except Exception:
        return False
    return abs(result.value) < 1e-5 or all(abs(g) < 1e-5 for row in result.gradients for g in row)


def is_tokenwise(loss_fn: LossFn) -> bool:
    """Return whether each token's gradient depends on its own logprob alone, and descent raises likely tokens.

    The loss is then a likelihood whose tokens are re-weighted by their own probabilities, as focal loss and DFT are.
    """
    batch = columns_for_kind(PROBE, "likelihood", 0)
    moved = batch.having(logprobs=[[x - 0.5 if j % 2 else x for j, x in enumerate(row)] for row in batch.logprobs])
    likely = batch.having(logprobs=[[-0.125] * len(row) for row in batch.logprobs])
    before, after, at_likely = (gradients_or_none(loss_fn, b) for b in (batch, moved, likely))
    if before is None or after is None or at_likely is None:
        return False
    even = [[row[::2] for row in rows] for rows in (before, after)]
    return relative_difference(*even) < 1e-4 and all(g <= 0 for row in at_likely for g in row)


def is_linear(loss_fn: LossFn) -> bool:
    """Return whether the gradient does not depend on the logprobs, as of −Σ w·lp / D."""
    for targets in (0, NUM_TARGETS):
        batch = columns_for_kind(SMALL[1], "likelihood", targets)
        lower = batch.having(logprobs=[[x - 0.5 for x in row] for row in batch.logprobs])
        gradients = [gradients_or_none(loss_fn, b) for b in (batch, lower)]
        if None not in gradients:
            return relative_difference(*gradients) < 1e-4
    return True


def gradients_or_none(loss_fn: LossFn, batch: Batch) -> Rows | None:
    """Return the gradients on a batch, or None where the call fails or returns no scalar."""
    try:
        return measure(loss_fn, batch.data(), batch.tensors(torch.float32)).gradients
    except NotApplicable:
        raise
    except Exception:
        return None


def takes_pairs(loss_fn: LossFn) -> bool:
    """Return whether a loss refuses an odd number of datums and accepts an even one."""
    odd, even = (try_call(loss_fn, SMALL[1].take(range(n)), torch.float32) for n in (3, 4))
    return odd is None and even is not None


def detect_fields_read(loss_fn: LossFn) -> set[str]:
    """Return the columns that a call reads under any of their names, even if the call fails."""
    read: set[str] = set()
    for batch in (SMALL[1], SMALL[1].with_targets(NUM_TARGETS)):
        try:
            loss_fn([RecordingDatum(datum, read) for datum in batch.data()], batch.tensors(torch.float32))
        except Exception:
            continue
    names = {alias: column for column, alias in ALIASES.items()}
    return {names.get(name, name) for name in read}


def detect_targets(loss_fn: LossFn, kind: str) -> int:
    """Return K for a loss that accepts ``[N, K]`` and refuses ``[N]``, else 0."""
    loss = loss_fn.loss if isinstance(loss_fn, BoundLoss) else loss_fn
    if isinstance(loss, Loss):
        return NUM_TARGETS if loss.rows == TARGETS else 0
    if kind not in ("likelihood", "reweighted", "any"):
        return 0
    flat, wide = (try_call(loss_fn, columns_for_kind(SMALL[1], kind, k), torch.float32) for k in (0, NUM_TARGETS))
    return NUM_TARGETS if flat is None and wide is not None else 0
