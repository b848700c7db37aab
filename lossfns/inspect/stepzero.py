"""Step zero: what a loss does where policy, old, reference and sampler are one, and what it has to do there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lossfns.inspect.batch import Numbers, View
from lossfns.inspect.findings import Found, listed
from lossfns.inspect.gradients import GradReport, grad_report
from lossfns.inspect.probe import LossFn, gradient_of, having, loss_of, reads_of, split
from lossfns.tokens import LOGPROB_COLUMNS

TOLERANCE = 1e-4
"""How far float32 may carry a value."""

AT_STEP_ZERO: dict[str, dict[str, tuple[float, ...]]] = {
    "old_logprobs": {
        **dict.fromkeys(("ratio", "ratio_mean", "mean_ratio"), (1.0,)),
        **dict.fromkeys(("kl_old", "approx_kl", "ppo_kl", "log_ratio_abs", "ratio_capped"), (0.0,)),
        **dict.fromkeys(("clip_low", "clip_high", "clip_dual", "clip_frac", "clipfrac"), (0.0,)),
        **dict.fromkeys(("bound_low", "bound_high"), (0.0,)),
    },
    "ref_logprobs": dict.fromkeys(("kl_ref", "margin", "reward_margin"), (0.0,)) | {"accuracy": (0.5, 0.0, 1.0)},
    "sampler_logprobs": {"tis_weight": (1.0,), "tis_capped": (0.0,)},
}
"""What a metric of such a name may be where all policies are one; it needs its column. (A tie ranks as one likes.)"""


class StepZero(NamedTuple):
    """The gradients where all policies are one, and which of the columns in sight change anything there.

    ``sure`` says that what the loss wants of each token is in sight: a function may bring advantages of its own.
    """

    report: GradReport
    used: list[str]
    idle: list[str]
    sure: bool


def step_zero(loss_fn: LossFn, data: Sequence[Any], view: View, base: Tensor, paired: bool) -> StepZero:
    """Measure where policy, old, reference and sampler agree; then move one column at a time, by 0.1 to 0.3 nats."""
    on, logprobs = view.active, split(base, view.shapes)
    one = {name: torch.where(on, base, x) if name in LOGPROB_COLUMNS else x for name, x in view.columns.items()}
    same, agreeing = having(loss_fn, data, one, view.shapes)
    report = grad_report(same, agreeing, logprobs, pairs=paired)
    move = torch.where(on, 0.1 * (1 + torch.arange(len(base)) % 3), 0)

    def changes(name: str) -> bool:
        loss, gradient, _ = gradient_of(*having(same, agreeing, {name: one[name] - move}, view.shapes), logprobs)
        return loss != report.loss or not torch.equal(gradient, report.gradient)

    moves = {name: changes(name) for name in reads_of(loss_fn) if name in one}
    used = [name for name in moves if moves[name]]
    sure = loss_of(loss_fn) is not None or paired or "advantages" in used
    return StepZero(report, used, [name for name in moves if not moves[name]], sure)


def judged(zero: StepZero, view: View, divisors: Numbers, found: Found) -> Numbers:
    """Step zero against what it has to be: finite, silent at masked tokens, known in value, of the right sign."""
    report = zero.report
    for name, value in {"loss": report.loss, **{f"metrics[{k!r}]": x for k, x in report.metrics.items()}}.items():
        if not math.isfinite(value):
            found.add("error", name, f"is {value}. Mask before the maths, not after.")
    for what, bad in (("not finite", ~report.gradient.isfinite()), ("not 0 at masked tokens", report.kinds["leaking"])):
        if bad.any():
            found.add("error", "gradient", f"{what}, in {listed(view.any(bad))}.", view.any(bad))
    for name in zero.idle:
        found.add("warning", name, "is there, but changes nothing: the loss does not read it.")
    judge_signs(zero, view, found)
    preference = report.pairs and "ref_logprobs" in zero.used
    expected = judge_preference(report.loss, divisors, found) if preference else {}
    return {"loss": report.loss, **expected, "Σ|g|": report.l1, **judge_metrics(zero, found)}


def judge_signs(zero: StepZero, view: View, found: Found) -> None:
    """Descent makes a token more likely where g < 0, so g has the opposite sign of what the token deserves."""
    g, slope = zero.report.gradient, slopes(zero, view)
    signal = view.active & (slope != 0)
    wrong, still = signal & (g * slope > 0), signal & (g == 0)
    silent, where = view.any(signal) & ~view.any(signal & ~still), view.any(wrong)
    error, warning = ("error", "warning") if zero.sure else ("warning", "note")
    unless = "" if zero.sure else " Unless it has advantages of its own."
    if wrong.any() and torch.equal(wrong, signal):
        found.add(error, "gradient", f"pushes every token the wrong way: is the loss maximised?{unless}", where)
    elif wrong.any():
        odd = not zero.sure and torch.equal(where, torch.arange(len(where)) % 2 == 1)
        why = " Are these pairs? Say pairs=True." if odd else unless
        message = f"pushes {int(wrong.sum())} tokens the wrong way, in {listed(where)}.{why}"
        found.add(warning, "gradient", message, where)
    if silent.any():
        why = f"Left out of the loss, or clipped at ratio 1?{unless}"
        found.add(error, "gradient", f"0 at every token of {listed(silent)}, which should learn. {why}", silent)
    elif still.any():
        why = f"Are the clip bounds epsilons?{unless}"
        found.add(warning, "gradient", f"0 at {int(still.sum())} tokens that should learn. {why}", view.any(still))


def slopes(zero: StepZero, view: View) -> Tensor:
    """How much likelier a token ought to become, up to a factor: w·A, ±w of the sides of a pair, or w."""
    w = view.columns["weights"]
    if zero.report.pairs:
        sides = torch.tensor([1.0, -1.0]).repeat(len(view.targets) // 2)
        return w * sides.repeat_interleave(torch.tensor([row.size for row in view.targets]))
    return w * view.columns["advantages"] if "advantages" in zero.used else w


def judge_preference(loss: float, divisors: Numbers, found: Found) -> Numbers:
    """ln 2 for each pair, as mean, sum, or over a denominator that was bound."""
    pairs = divisors["pairs"]
    possible = [math.log(2) * x for x in (1, pairs, pairs / divisors.get("bound", pairs))]
    expected = min(possible, key=lambda x: abs(x - loss))
    if abs(expected - loss) > TOLERANCE * expected:
        message = f"{loss:.4g} where policy and reference are one; DPO has ln 2 a pair (IPO and hinge have not)."
        found.add("warning", "loss", message)
    return {"expected": expected}


def judge_metrics(zero: StepZero, found: Found) -> Numbers:
    """The metrics whose value at step zero is known."""
    known = {name: value for column in zero.used for name, value in AT_STEP_ZERO.get(column, {}).items()}
    named = {key: key.rpartition("/")[2].partition(":")[0] for key in zero.report.metrics}
    values = {key: zero.report.metrics[key] for key, name in named.items() if name in known}
    for key, value in values.items():
        expected = known[named[key]]
        if min(abs(value - x) for x in expected) > TOLERANCE:
            message = f"{value:.4g} where all policies are one: expected {expected[0]:g}."
            found.add("warning", f"metrics[{key!r}]", message)
    return dict(values)
