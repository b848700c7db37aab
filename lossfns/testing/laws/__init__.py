"""Laws that correct losses obey: plain functions ``law(loss_fn, data, logprobs)`` that assume only the contract.

A law raises ``LawBroken``, which names the most likely bug, or ``NotApplicable``. The first line of its docstring
states the law, and its decorator says whether a loss that breaks it is wrong or fragile, and why. The tuple of a kind
lists its laws in the order of diagnosis: a bug that breaks an early law often breaks later laws as well, so the first
broken law names the bug.
"""

from __future__ import annotations

from lossfns.testing.laws import (
    advantages,
    contract,
    distillation,
    frames,
    knobs,
    likelihood,
    masks,
    metrics,
    policy,
    preference,
    reweighted,
    sums,
    unpaired,
)
from lossfns.testing.laws.advantages import AdvantageLaw as AdvantageLaw
from lossfns.testing.laws.base import Law as Law
from lossfns.testing.laws.base import LawBroken as LawBroken
from lossfns.testing.laws.base import NotApplicable as NotApplicable

BASICS: tuple[Law, ...] = (contract.contract, contract.repeatable, contract.token_ids)
GRADIENTS_AND_PRECISION: tuple[Law, ...] = (
    contract.inputs_unchanged,
    contract.every_gradient,
    contract.precision,
)
MASKS: tuple[Law, ...] = (masks.masked_values, masks.padding, masks.poison)
SUMS: tuple[Law, ...] = (
    sums.many_tokens,
    sums.duplication,
    sums.replicas,
    sums.split,
    sums.permutation,
    masks.empty,
)
CALLS_AND_METRICS: tuple[Law, ...] = (
    contract.lengths,
    contract.tracing,
    contract.host_sync,
    knobs.no_inert_knob,
    metrics.metric_loss,
    metrics.metric_merge,
)

ANY_KIND = (
    *BASICS,
    frames.signal,
    frames.independence,
    frames.canary,
    *GRADIENTS_AND_PRECISION,
    *MASKS,
    contract.finite,
    *SUMS,
    *CALLS_AND_METRICS,
)
POLICY = (
    *BASICS,
    frames.signal,
    policy.stop_gradient,
    policy.sign,
    frames.independence,
    frames.canary,
    *GRADIENTS_AND_PRECISION,
    *MASKS,
    policy.kl,
    policy.zero_advantage,
    policy.penalty,
    policy.clip,
    policy.clip_bounds,
    policy.ratio,
    policy.tis,
    contract.finite,
    *SUMS,
    policy.on_policy,
    *CALLS_AND_METRICS,
    policy.clip_metrics,
    policy.kl_metrics,
)
LIKELIHOOD = (
    *BASICS,
    frames.signal,
    likelihood.linear,
    frames.independence,
    frames.canary,
    *GRADIENTS_AND_PRECISION,
    *MASKS,
    contract.finite,
    *SUMS,
    likelihood.likelihood,
    likelihood.negative_weights,
    sums.finite_differences,
    *CALLS_AND_METRICS,
)
REWEIGHTED = (
    *BASICS,
    frames.signal,
    reweighted.raises,
    frames.independence,
    frames.canary,
    *GRADIENTS_AND_PRECISION,
    *MASKS,
    reweighted.focal,
    reweighted.consistent,
    reweighted.proportional,
    contract.finite,
    reweighted.bounded,
    *SUMS,
    *CALLS_AND_METRICS,
)
UNPAIRED = (
    *BASICS,
    unpaired.reference_point,
    frames.signal,
    unpaired.labels,
    frames.independence,
    frames.canary,
    *GRADIENTS_AND_PRECISION,
    *MASKS,
    unpaired.unpaired_reference,
    unpaired.saturation,
    unpaired.class_weights,
    unpaired.unpaired_beta,
    unpaired.reference_point_clamped,
    contract.finite,
    *SUMS,
    *CALLS_AND_METRICS,
    unpaired.unpaired_metrics,
)
DISTILLATION = (
    *BASICS,
    frames.signal,
    distillation.teacher,
    distillation.towards_teacher,
    frames.independence,
    frames.canary,
    *GRADIENTS_AND_PRECISION,
    *MASKS,
    reweighted.proportional,
    contract.finite,
    *SUMS,
    *CALLS_AND_METRICS,
    distillation.teacher_metrics,
)
PREFERENCE = (
    *BASICS,
    frames.signal,
    preference.smoothing,
    preference.rejected_side,
    preference.sides,
    frames.independence,
    preference.pair_canary,
    preference.reference,
    preference.pair_weights,
    *GRADIENTS_AND_PRECISION,
    contract.finite,
    *MASKS,
    preference.beta,
    preference.step_zero,
    preference.summed,
    preference.pair_scale,
    preference.monotone,
    preference.misranked,
    preference.odds,
    preference.lengths_alike,
    preference.target,
    *SUMS,
    preference.odd,
    sums.finite_differences,
    *CALLS_AND_METRICS,
    preference.pair_metrics,
    preference.margin_metrics,
)
ADVANTAGES: tuple[AdvantageLaw, ...] = (
    advantages.constant,
    advantages.alone,
    advantages.ordered,
    advantages.groupwise,
    advantages.baseline,
    advantages.exact,
    advantages.centred,
    advantages.alone_zero,
    advantages.constant_exact,
    advantages.deviation,
)

SELF_CONTAINED = frozenset(
    (
        contract.token_ids,
        contract.precision,
        contract.host_sync,
        contract.finite,
        knobs.no_inert_knob,
        sums.many_tokens,
        frames.signal,
        frames.independence,
        frames.canary,
        policy.stop_gradient,
        policy.sign,
        policy.ratio,
        policy.kl,
        policy.penalty,
        policy.tis,
        policy.clip,
        policy.clip_bounds,
        policy.on_policy,
        policy.clip_metrics,
        policy.kl_metrics,
        likelihood.linear,
        likelihood.likelihood,
        likelihood.negative_weights,
        preference.pair_weights,
        preference.pair_scale,
        preference.odd,
        preference.sides,
        preference.pair_canary,
        preference.reference,
        preference.step_zero,
        preference.monotone,
        preference.odds,
        preference.margin_metrics,
        preference.summed,
        preference.rejected_side,
        preference.misranked,
        preference.lengths_alike,
        preference.smoothing,
        preference.beta,
        preference.target,
        preference.pair_metrics,
        reweighted.raises,
        reweighted.focal,
        reweighted.consistent,
        reweighted.proportional,
        reweighted.bounded,
        unpaired.labels,
        unpaired.unpaired_reference,
        unpaired.reference_point,
        unpaired.saturation,
        unpaired.class_weights,
        unpaired.unpaired_beta,
        unpaired.reference_point_clamped,
        unpaired.unpaired_metrics,
        distillation.teacher,
        distillation.towards_teacher,
        distillation.teacher_metrics,
    )
)
"""Laws that make their own batches and use only the column names of the given one. They run once."""

LAWS_BY_KIND = {
    "policy": POLICY,
    "likelihood": LIKELIHOOD,
    "reweighted": REWEIGHTED,
    "preference": PREFERENCE,
    "unpaired": UNPAIRED,
    "distillation": DISTILLATION,
    "any": ANY_KIND,
}
"""Kind → laws; ``any`` is the kind of a loss that fits no other kind."""

COUPLED: tuple[Law, ...] = (frames.independence, sums.split, metrics.metric_merge)
"""The laws that a loss breaks by design if it computes a statistic over the batch, such as the KL of KTO."""
