"""Step zero: value, gradient and metrics of a loss when policy, old, reference and sampler are the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lossfns.inspect.batch import BatchView, Numbers
from lossfns.inspect.findings import Findings, name_datums
from lossfns.inspect.gradients import GradReport, grad_report
from lossfns.inspect.probe import gradient_of, loss_of, readable_columns, split_by_datum, with_columns
from lossfns.loss import LossFn
from lossfns.tokens import COLUMNS, LOGPROB_COLUMNS

TOLERANCE = 1e-4
"""The error of a value in float32."""

AT_STEP_ZERO: dict[str, dict[str, tuple[float, ...]]] = {
    "old_logprobs": {
        **dict.fromkeys(("ratio", "ratio_mean", "mean_ratio"), (1.0,)),
        **dict.fromkeys(("kl_old", "approx_kl", "ppo_kl", "log_ratio_abs", "ratio_capped"), (0.0,)),
        **dict.fromkeys(("clip_low", "clip_high", "clip_dual", "clip_frac", "clipfrac"), (0.0,)),
        **dict.fromkeys(("bound_low", "bound_high"), (0.0,)),
    },
    "ref_logprobs": dict.fromkeys(("kl_ref", "margin", "reward_margin"), (0.0,)) | {"accuracy": (0.5, 0.0, 1.0)},
    "sampler_logprobs": {
        **dict.fromkeys(("tis_weight", "rollout_weight", "rollout_weight_square"), (1.0,)),
        **dict.fromkeys(("tis_capped", "rollout_limited", "rollout_rejected", "rollout_rejected_sequences"), (0.0,)),
    },
}
"""For each column, the values at step zero of the metrics that need it. A tie counts as 0.5, 0 or 1."""


class StepZero(NamedTuple):
    """A loss at step zero.

    Attributes:
        report: the gradients.
        used: the visible columns that change the loss at step zero.
        idle: the visible columns that do not change it.
        sure: whether the signal of each token is visible. A function that is not ours may hold its own advantages.
    """

    report: GradReport
    used: list[str]
    idle: list[str]
    sure: bool


def step_zero(loss_fn: LossFn, data: Sequence[Any], view: BatchView, base: Tensor, paired: bool) -> StepZero:
    """Measure the loss with all logprobs equal to ``base`` [N]. Then move one column at a time, by 0.1 to 0.3."""
    on, logprobs = view.active, split_by_datum(base, view.shapes)
    equal = {name: torch.where(on, base, x) if name in LOGPROB_COLUMNS else x for name, x in view.columns.items()}
    loss_at_zero, data_at_zero = with_columns(loss_fn, data, equal, view.shapes)
    report = grad_report(loss_at_zero, data_at_zero, logprobs, pairs=paired)
    # Irregular numbers: their sums over the two sides of a pair must not cancel.
    move = torch.where(on, 0.1 + 0.2 * (torch.arange(len(base)) * 0.618034 % 1), 0)

    def has_effect(name: str) -> bool:
        moved = with_columns(loss_at_zero, data_at_zero, {name: equal[name] - move}, view.shapes)
        loss, gradient, _ = gradient_of(*moved, logprobs)
        return loss != report.loss or not torch.equal(gradient, report.gradient)

    effects = {name: has_effect(name) for name in readable_columns(loss_fn) if name in equal}
    used = [name for name in effects if effects[name]]
    loss = loss_of(loss_fn)
    sure = (loss is not None and not set(loss.reads) - set(COLUMNS)) or paired or "advantages" in used
    sure = sure and not (loss and loss.parts)  # one part may push where another pulls
    return StepZero(report, used, [name for name in effects if not effects[name]], sure)


def check_step_zero(zero: StepZero, view: BatchView, divisors: Numbers, findings: Findings) -> Numbers:
    """Check that the loss is finite, ignores masked tokens, has its known values and gradients of the right sign."""
    report = zero.report
    for name, value in {"loss": report.loss, **{f"metrics[{k!r}]": x for k, x in report.metrics.items()}}.items():
        if not math.isfinite(value):
            findings.add("error", name, f"is {value}. Mask before the maths, not after.")
    for what, bad in (("not finite", ~report.gradient.isfinite()), ("not 0 at masked tokens", report.kinds["leaking"])):
        if bad.any():
            datums = view.datums_with(bad)
            findings.add("error", "gradient", f"{what}, in {name_datums(datums)}.", datums)
    for name in zero.idle:
        findings.add("warning", name, "is there, but changes nothing: the loss does not read it.")
    check_signs(zero, view, findings)
    preference = report.pairs and "ref_logprobs" in zero.used
    expected = check_preference_value(report.loss, divisors, findings) if preference else {}
    return {"loss": report.loss, **expected, "Σ|g|": report.l1, **check_metrics(zero, findings)}


def check_signs(zero: StepZero, view: BatchView, findings: Findings) -> None:
    """Check that g and the signal of a token have opposite signs: descent makes a token likelier where g < 0."""
    g, signal = zero.report.gradient, token_signal(zero, view)
    should_learn = view.active & (signal != 0)
    wrong, untrained = should_learn & (g * signal > 0), should_learn & (g == 0)
    silent = view.datums_with(should_learn) & ~view.datums_with(should_learn & ~untrained)
    datums = view.datums_with(wrong)
    error, warning = ("error", "warning") if zero.sure else ("warning", "note")
    unless = "" if zero.sure else " Unless it has advantages of its own."
    if wrong.any() and torch.equal(wrong, should_learn):
        message = f"pushes every token the wrong way: is the loss maximised?{unless}"
        findings.add(error, "gradient", message, datums)
    elif wrong.any():
        odd = not zero.sure and torch.equal(datums, torch.arange(len(datums)) % 2 == 1)
        why = " Are these pairs? Say pairs=True." if odd else unless
        message = f"pushes {int(wrong.sum())} tokens the wrong way, in {name_datums(datums)}.{why}"
        findings.add(warning, "gradient", message, datums)
    if silent.any():
        why = f"Left out of the loss, or clipped at ratio 1?{unless}"
        message = f"0 at every token of {name_datums(silent)}, which should learn. {why}"
        findings.add(error, "gradient", message, silent)
    elif untrained.any():
        message = f"0 at {int(untrained.sum())} tokens that should learn. Are the clip bounds epsilons?{unless}"
        findings.add(warning, "gradient", message, view.datums_with(untrained))


def token_signal(zero: StepZero, view: BatchView) -> Tensor:
    """Return how much likelier each token should become, up to a factor: w·A, ±w on the sides of a pair, or w."""
    w = view.columns["weights"]
    if zero.report.pairs:
        sides = torch.tensor([1.0, -1.0]).repeat(len(view.targets) // 2)
        return w * sides.repeat_interleave(torch.tensor([row.size for row in view.targets]))
    return w * view.columns["advantages"] if "advantages" in zero.used else w


def check_preference_value(loss: float, divisors: Numbers, findings: Findings) -> Numbers:
    """Check that the loss is ln 2 for each pair, as their mean, their sum, or their sum over a bound denominator."""
    pairs = divisors["pairs"]
    possible = [math.log(2) * x for x in (1, pairs, pairs / divisors.get("bound", pairs))]
    expected = min(possible, key=lambda x: abs(x - loss))
    if abs(expected - loss) > TOLERANCE * expected:
        message = f"{loss:.4g} where policy and reference are equal; DPO has ln 2 a pair (IPO and hinge have not)."
        findings.add("warning", "loss", message)
    return {"expected": expected}


def check_metrics(zero: StepZero, findings: Findings) -> Numbers:
    """Return the metrics whose value at step zero is known, and record those that have another value."""
    expected = {name: values for column in zero.used for name, values in AT_STEP_ZERO.get(column, {}).items()}
    names = {key: key.rpartition("/")[2].partition(":")[0] for key in zero.report.metrics}
    known = {key: zero.report.metrics[key] for key, name in names.items() if name in expected}
    for key, value in known.items():
        possible = expected[names[key]]
        if min(abs(value - x) for x in possible) > TOLERANCE:
            message = f"{value:.4g} where all policies are equal: expected {possible[0]:g}."
            findings.add("warning", f"metrics[{key!r}]", message)
    return dict(known)
