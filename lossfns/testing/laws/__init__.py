"""Laws every loss obeys: plain functions ``law(loss_fn, data, logprobs)`` that assume only the contract.

A law raises ``LawBroken`` with the bug that it most likely is, or ``NotApplicable``. The first line of its
docstring says what holds. Laws stand in the order of diagnosis: what breaks an early one often breaks
later ones too, so the first that fails names the bug.
"""

from __future__ import annotations

from lossfns.testing.laws import advantages, batches, contract, policy, preference, supervised
from lossfns.testing.laws.advantages import AdvantageLaw as AdvantageLaw
from lossfns.testing.laws.base import Law as Law
from lossfns.testing.laws.base import LawBroken as LawBroken
from lossfns.testing.laws.base import NotApplicable as NotApplicable

FIRST: tuple[Law, ...] = (contract.contract, contract.repeatable, contract.token_ids)
CONTRACT: tuple[Law, ...] = (
    contract.inputs_unchanged,
    contract.every_gradient,
    contract.precision,
)
MASKS: tuple[Law, ...] = (batches.poison, batches.padding)
SUMS: tuple[Law, ...] = (
    batches.duplication,
    batches.replicas,
    batches.split,
    batches.permutation,
    batches.empty,
)
LAST: tuple[Law, ...] = (
    contract.lengths,
    contract.tracing,
    contract.host_sync,
    contract.no_inert_knob,
    batches.metric_loss,
    batches.metric_merge,
)

ALL = (
    *FIRST,
    batches.signal,
    batches.independence,
    batches.canary,
    *CONTRACT,
    *MASKS,
    contract.finite,
    *SUMS,
    *LAST,
)
POLICY = (
    *FIRST,
    batches.signal,
    policy.stop_gradient,
    policy.sign,
    batches.independence,
    batches.canary,
    *CONTRACT,
    *MASKS,
    policy.kl,
    policy.zero_advantage,
    policy.clip,
    policy.clip_bounds,
    policy.ratio,
    policy.tis,
    contract.finite,
    *SUMS,
    policy.on_policy,
    *LAST,
    policy.clip_metrics,
    policy.kl_metrics,
)
SUPERVISED = (
    *FIRST,
    batches.signal,
    supervised.linear,
    batches.independence,
    batches.canary,
    *CONTRACT,
    *MASKS,
    contract.finite,
    *SUMS,
    supervised.likelihood,
    supervised.negative_weights,
    batches.finite_differences,
    *LAST,
)
PREFERENCE = (
    *FIRST,
    preference.odd,
    batches.signal,
    preference.sides,
    batches.independence,
    preference.pair_canary,
    preference.reference,
    preference.pair_weights,
    *CONTRACT,
    contract.finite,
    *MASKS,
    preference.step_zero,
    preference.pair_scale,
    preference.monotone,
    preference.odds,
    *SUMS,
    batches.finite_differences,
    *LAST,
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

CRAFTED = frozenset(
    (
        contract.token_ids,
        contract.precision,
        contract.host_sync,
        contract.finite,
        contract.no_inert_knob,
        batches.signal,
        batches.independence,
        batches.canary,
        policy.stop_gradient,
        policy.sign,
        policy.ratio,
        policy.kl,
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
"""Laws that make their own batches, and take from the one they are given no more than its columns: once is enough."""

GROUPS = {"any": ALL, "policy": POLICY, "supervised": SUPERVISED, "preference": PREFERENCE}
"""The laws of each kind of loss; ``any`` is for a loss that is none of the others."""
