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

CONTRACT: tuple[Law, ...] = (
    contract.contract,
    contract.inputs_unchanged,
    contract.repeatable,
    contract.every_gradient,
    contract.lengths,
    contract.token_ids,
    contract.precision,
    contract.host_sync,
)
BATCHES: tuple[Law, ...] = (batches.independence, batches.canary, batches.poison, batches.padding, batches.empty)
SUMS: tuple[Law, ...] = (
    batches.duplication,
    batches.replicas,
    batches.split,
    batches.permutation,
)
LAST: tuple[Law, ...] = (contract.no_inert_knob, contract.tracing, batches.metric_loss, batches.metric_merge)

ALL = (*CONTRACT, batches.signal, contract.finite, *BATCHES, *SUMS, *LAST)
POLICY = (
    *CONTRACT,
    batches.signal,
    policy.sign,
    *BATCHES,
    policy.zero_advantage,
    policy.ratio,
    policy.kl,
    policy.tis,
    policy.clip,
    contract.finite,
    *SUMS,
    policy.on_policy,
    *LAST,
    policy.clip_metrics,
)
SUPERVISED = (
    *CONTRACT,
    batches.signal,
    *BATCHES,
    contract.finite,
    *SUMS,
    supervised.likelihood,
    supervised.negative_weights,
    batches.finite_differences,
    *LAST,
)
PREFERENCE = (
    *CONTRACT,
    preference.odd,
    batches.signal,
    preference.sides,
    preference.pair_canary,
    preference.reference,
    *BATCHES,
    contract.finite,
    preference.step_zero,
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
        contract.precision,
        contract.host_sync,
        contract.finite,
        contract.no_inert_knob,
        batches.signal,
        batches.independence,
        batches.canary,
        policy.sign,
        policy.ratio,
        policy.kl,
        policy.tis,
        policy.clip,
        policy.on_policy,
        policy.clip_metrics,
        supervised.likelihood,
        supervised.negative_weights,
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
