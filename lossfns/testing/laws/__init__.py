"""Laws that correct losses obey: plain functions ``law(loss_fn, data, logprobs)`` that assume only the contract.

A law raises ``LawBroken``, which names the most likely bug, or ``NotApplicable``. The first line of its docstring
states the law. The tuple of a kind lists its laws in the order of diagnosis: a bug that breaks an early law often
breaks later laws as well, so the first broken law names the bug.
"""

from __future__ import annotations

from lossfns.testing.laws import (
    advantages,
    contract,
    frames,
    knobs,
    masks,
    metrics,
    policy,
    preference,
    sums,
    supervised,
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
MASKS: tuple[Law, ...] = (masks.poison, masks.padding)
SUMS: tuple[Law, ...] = (
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
SUPERVISED = (
    *BASICS,
    frames.signal,
    supervised.linear,
    frames.independence,
    frames.canary,
    *GRADIENTS_AND_PRECISION,
    *MASKS,
    contract.finite,
    *SUMS,
    supervised.likelihood,
    supervised.negative_weights,
    sums.finite_differences,
    *CALLS_AND_METRICS,
)
PREFERENCE = (
    *BASICS,
    preference.odd,
    frames.signal,
    preference.sides,
    frames.independence,
    preference.pair_canary,
    preference.reference,
    preference.pair_weights,
    *GRADIENTS_AND_PRECISION,
    contract.finite,
    *MASKS,
    preference.step_zero,
    preference.pair_scale,
    preference.monotone,
    preference.odds,
    *SUMS,
    sums.finite_differences,
    *CALLS_AND_METRICS,
    preference.margin_metrics,
)
ADVANTAGES: tuple[AdvantageLaw, ...] = (
    advantages.alone,
    advantages.constant,
    advantages.ordered,
    advantages.groupwise,
    advantages.centred,
    advantages.deviation,
)

SELF_CONTAINED = frozenset(
    (
        contract.token_ids,
        contract.precision,
        contract.host_sync,
        contract.finite,
        knobs.no_inert_knob,
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
        supervised.linear,
        supervised.likelihood,
        supervised.negative_weights,
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
    )
)
"""Laws that make their own batches and use only the column names of the given one. They run once."""

LAWS_BY_KIND = {"any": ANY_KIND, "policy": POLICY, "supervised": SUPERVISED, "preference": PREFERENCE}
"""Kind → laws; ``any`` is the kind of a loss that fits no other kind."""
