"""Laws of policy losses: the importance ratio r = exp(lp − old), the advantages A, clipping, KL and corrections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lossfns.testing.batch import Batch
from lossfns.testing.laws.base import (
    LossFn,
    Probe,
    assume,
    columns_read,
    influences,
    on_policy_batch,
    reads_only_mask,
    require,
    slots,
    uniform_batch,
    unpoisoned,
    with_constants,
    without_empty_units,
    wrong,
)
from lossfns.testing.laws.sums import COUNTS

LOG_RATIOS = [0.001 * 1.35**i for i in range(28)]
"""Log-ratios from 0.001, within GSPO's bounds, to 3.3, past the usual bounds of every loss."""


def value_and_gradient_at(probe: Probe, d: float, advantage: float, **columns: float) -> tuple[float, float]:
    """Return value and gradient of a single token with log-ratio d to the old policy and to the sampler."""
    batch = uniform_batch(probe.batch, logprobs=-30.0, advantages=advantage)
    constants = {"old_logprobs": -30.0 - d, "sampler_logprobs": -30.0 - d, **columns}
    result = probe(with_constants(batch, **{name: x for name, x in constants.items() if name in batch.columns}))
    return result.value, result.gradients[0][0]


def reads_old_logprobs(probe: Probe) -> bool:
    """Return whether the loss reads old logprobs."""
    return "old_logprobs" in columns_read(probe)


@wrong("descent must raise good tokens and lower bad ones")
def sign(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Descent makes a token of positive advantage more likely and a token of negative advantage less likely."""
    probe = Probe.of(loss_fn, data, logprobs)
    value, good = value_and_gradient_at(probe, 0.0, 1.0)
    _, better = value_and_gradient_at(probe, 0.0, 2.0)
    _, bad = value_and_gradient_at(probe, 0.0, -1.0)
    seen = f"On-policy the gradient is {good:g} for advantage 1, {better:g} for 2 and {bad:g} for −1"
    assume(good != 0 or bad != 0, "there is no gradient")
    require(not probe.close([good, good], [better, bad]), "advantage-inert", f"{seen}.")
    require(good * bad <= 0, "advantage-sign-lost", f"{seen}: the sign is the same for both.")
    likely = "ratio-inverted" if reads_old_logprobs(probe) and value < 0 else "sign-flipped"
    require(good < 0 < bad, likely, f"{seen}, and the loss is {value:g} for advantage 1.")


@wrong("on-policy the policy gradient is −A, whatever the probability")
def stop_gradient(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """On-policy the gradient does not depend on how likely the token was."""
    probe = Probe.of(loss_fn, data, logprobs)
    likely, unlikely = (probe(uniform_batch(probe.batch, logprobs=lp)).gradients[0][0] for lp in (-0.5, -3.0))
    seen = f"On-policy, with advantage 1, the gradient is {likely:g} at logprob −0.5 and {unlikely:g} at −3."
    require(probe.close(likely, unlikely), "missing-stop-gradient", seen)


@wrong("without advantage and without divergence there is nothing to learn")
def zero_advantage(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Advantage 0 at the reference: loss and gradient are 0."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = on_policy_batch(with_constants(without_empty_units(unpoisoned(probe.batch)), advantages=0.0))
    result = probe(batch)
    g = max((g for row in result.gradients for g in row), key=abs)
    seen = f"With advantages 0 and every policy the same, the loss is {result.value} and a gradient is {g}."
    has_kl = "ref_logprobs" in batch.columns and influences(probe, "ref_logprobs", batch, slots(batch), -0.5)
    zero = probe.close([g, 1.0], [0.0, 1.0]) and abs(result.value) < 1e-6
    require(zero, "k1-in-loss" if has_kl else "sign-flipped", seen, result.batch)


@wrong("a penalty must pull back")
def penalty(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """At advantage 0, a penalty on leaving the old policy pulls back to the old policy from either side."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume(reads_old_logprobs(probe), "it reads no old logprobs")
    points = (value_and_gradient_at(probe, d, 0.0) for d in (0.5, 0.0, -0.5))
    (value_above, above), (value_at, at_old), (value_below, below) = points
    pulls = above - at_old, below - at_old
    seen = f"At advantage 0, half a nat above the old policy the gradient is {above:g}, half a nat below it {below:g}"
    if max(map(abs, pulls)) < 1e-7:
        flat = probe.close([1.0, value_above, value_below], [1.0, value_at, value_at])
        values = f"the loss is {value_above:g} and {value_below:g}, on-policy {value_at:g}"
        require(flat, "detached-term", f"{seen}; {values}.")
        assume(False, "it has no penalty on leaving the old policy")
    require(pulls[0] > 0 > pulls[1], "penalty-sign", f"{seen}, on it {at_old:g}.")


@wrong("a KL term must pull to the reference")
def kl(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The KL term pulls to the reference from either side, whatever the advantage."""
    from lossfns.testing.subject import knobs

    probe = Probe.of(loss_fn, data, logprobs)
    assume("ref_logprobs" in columns_read(probe), "it reads no reference")
    off = [name for name, value in knobs(loss_fn).items() if "kl" in name and value == 0]
    assume(not off, f"{off[0] if off else ''} is 0")
    lp = -30.0
    # (advantage, lp − ref) → the gradient of the KL term, relative to the gradient at the reference
    pull = {
        (a, x): value_and_gradient_at(probe, 0.0, a, ref_logprobs=lp - x)[1]
        - value_and_gradient_at(probe, 0.0, a, ref_logprobs=lp)[1]
        for a in (0.0, 1.0, -2.0)
        for x in (0.5, -0.5)
    }
    values = [value_and_gradient_at(probe, 0.0, 0.0, ref_logprobs=lp - x)[0] for x in (0.0, 0.5)]
    at_reference = value_and_gradient_at(probe, 0.0, 0.0, ref_logprobs=lp)[1]
    above, below = pull[0.0, 0.5], pull[0.0, -0.5]
    seen = f"Half a nat above the reference the KL term's gradient is {above:g}, half a nat below it {below:g}"
    if all(p == 0 for p in pull.values()):
        require(at_reference == 0, "k1-in-loss", f"{seen}: {at_reference:g} everywhere.")
        changes = values[0] != values[1]
        assume(changes or not only_in_metrics(probe), "only its metrics use the reference")
        seen = f"{seen}; its value {'changes' if changes else 'does not change either'}."
        require(False, "kl-detached" if changes else "ref-inert", seen)
    spread = max(abs(pull[a, x] - pull[0.0, x]) for a, x in pull)
    same_for_all = spread <= 1e-3 * max(map(abs, pull.values()))
    by_advantage = f"{seen} at advantage 0, {pull[1.0, 0.5]:g} at 1, {pull[-2.0, 0.5]:g} at −2."
    require(same_for_all, "kl-scaled-by-advantage", by_advantage)
    require(above > 0 > below, "kl-sign", f"{seen}: it pushes away.")


def only_in_metrics(probe: Probe) -> bool:
    """Return whether the reference changes a metric and the loss has no setting for a KL term."""
    from lossfns.testing.subject import knobs

    reported = [
        probe(
            uniform_batch(probe.batch, logprobs=-30.0, old_logprobs=-30.0, sampler_logprobs=-30.0, ref_logprobs=ref)
        ).metrics
        for ref in (-30.0, -30.5)
    ]
    return reported[0] != reported[1] and not any("kl" in name or "beta" in name for name in knobs(probe.loss_fn))


@wrong("the importance ratio is exp(lp − old)")
def ratio(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """On a sequence whose tokens all have log-ratio d, the ratio is exp(d), whatever the length.

    The ratio is measured below 1 with a positive advantage, where clipping does not bind.
    """
    probe = Probe.of(loss_fn, data, logprobs)
    assume(reads_old_logprobs(probe), "it reads no old logprobs")
    base, lower = sequence_value(probe, [0.0] * 3), sequence_value(probe, [-0.5] * 3)
    relative = lower / base if base else math.nan  # exp(−0.5) if the loss is right
    seen = f"With 3 tokens of log-ratio −0.5 and advantage 1 the loss is {lower:g}, on-policy {base:g}"
    slopes = sequence_gradient(probe, 3), sequence_gradient(probe, 1)
    require(slopes[0] != 0 or slopes[1] == 0, "ratio-sum", f"{seen}: with 3 tokens on-policy there is no gradient.")
    require(base != 0, "ratio-not-exponentiated", f"{seen}.")
    if relative == 1:
        changes = value_and_gradient_at(probe, 0.0, -1.0) != value_and_gradient_at(probe, -0.5, -1.0)
        require(changes, "old-logprobs-inert", f"{seen}: the same.")
        assume(False, "the ratio acts on tokens of negative advantage alone")
    on, near, far = (value_and_gradient_at(probe, d, 1.0)[1] for d in (0.0, -0.05, -0.1))
    inverted = on != 0 and probe.close([near / on, far / on], [math.exp(0.05), math.exp(0.1)])
    require(not inverted, "ratio-inverted", f"At log-ratio −0.1 the gradient is exp(0.1) times that of {on:g} at 0.")
    constant = relative >= 0.9 and math.isclose(relative, 1 + 0.5 / -30, rel_tol=0.2)
    assume(not constant, "the value does not depend on the ratio")
    require(not math.isclose(relative, math.exp(-1.5), rel_tol=1e-3), "ratio-product", f"{seen}: exp(3 · −0.5) of it.")
    squared = "sampler_logprobs" in columns_read(probe) and math.isclose(relative, math.exp(-1), rel_tol=1e-3)
    require(not squared, "missing-stop-gradient", f"{seen}: the ratio enters twice, by the sampler correction too.")
    require(not math.isclose(relative, math.exp(0.5), rel_tol=1e-3), "ratio-inverted", f"{seen}: exp(0.5) of it.")
    right = math.isclose(relative, math.exp(-0.5), rel_tol=1e-3)
    half = sequence_value(probe, [-0.25] * 3)
    linear = math.isclose(lower - base, 2 * (half - base), rel_tol=1e-6)
    require(right or not linear, "ratio-not-exponentiated", f"{seen}: linear in the log-ratio.")
    assume(right, "the loss is not proportional to the ratio")
    if has_sequence_ratio(probe):
        uneven = sequence_value(probe, [-1.0, -0.25, -0.25])
        seen = f"Log-ratios −1, −0.25, −0.25 have the mean −0.5, but the loss is {uneven:g}, not {lower:g}."
        require(math.isclose(lower, uneven, rel_tol=1e-4), "ratio-sum", seen)


def sequence_batch(probe: Probe, log_ratios: Sequence[float]) -> Batch:
    """Return one sequence with these log-ratios."""
    batch = uniform_batch(probe.batch, length=len(log_ratios), logprobs=-30.0)
    old = [[-30.0 - d for d in log_ratios]]
    return batch.having(**{n: old for n in ("old_logprobs", "sampler_logprobs") if n in batch.columns})


def sequence_value(probe: Probe, log_ratios: Sequence[float]) -> float:
    """Return the loss of one sequence with these log-ratios."""
    return probe(sequence_batch(probe, log_ratios)).value


def sequence_gradient(probe: Probe, length: int) -> float:
    """Return the gradient of the first token of an on-policy sequence."""
    return probe(sequence_batch(probe, [0.0] * length)).gradients[0][0]


def has_sequence_ratio(probe: Probe) -> bool:
    """Return whether a token's gradient depends on the ratio of another token of its sequence."""
    if "old_logprobs" not in probe.batch.columns:
        return False
    below, above, on = (probe(sequence_batch(probe, [0.0, d])).gradients[0][0] for d in (-0.5, 3.0, 0.0))
    return not probe.close([below, above], [on, on])


@wrong("on-policy the gradient is −A·w / D")
def on_policy(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """On-policy the gradient is the policy gradient −A·w / D, where D counts weights, tokens, sequences, …."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unequal_weights_batch(probe)
    gradients = probe(batch).gradients
    assume(any(g != 0 for row in gradients for g in row), "there is no gradient")
    factors = [[-g / w for g, w in zip(gs, ws)] for gs, ws in zip(gradients, batch.weights)]
    seen = f"On-policy, with advantages 1 and weights {batch.weights}, the gradients are {gradients}."
    if (
        not has_sequence_ratio(probe)
        and not reads_only_mask(probe)
        and not all(probe.close(row, [row[0]] * len(row)) for row in factors)
    ):
        squared = [[-g / w**2 for g, w in zip(gs, ws)] for gs, ws in zip(gradients, batch.weights)]
        twice = all(probe.close(row, [row[0]] * len(row)) for row in squared)
        require(False, "weights-squared" if twice else "weights-binarised", seen)
    check_scale(probe, batch)


def unequal_weights_batch(probe: Probe) -> Batch:
    """Return two on-policy datums of unequal length and weights, with advantages 1."""
    cycle = (1.0, 0.5, 2.0, 0.5, 1.0)
    rows = [[cycle[(i + j) % 5] for j in range(n * (probe.batch.targets or 1))] for i, n in enumerate((3, 5))]
    logprobs = [[-1.0 - 0.25 * j for j in range(len(row))] for row in rows]
    named = {name: [[1.0] * len(row) for row in rows] for name in probe.batch.columns}
    return on_policy_batch(Batch(logprobs, rows, named, probe.batch.targets))


def check_scale(probe: Probe, batch: Batch) -> None:
    """Require that the gradient of a token of weight 1 is 1 / D in size, for one count D of the batch."""
    ones = batch.having(weights=[[1.0] * len(row) for row in batch.weights])
    parts = [ones, ones.take([0]), ones.take([1]), ones.take([1, 1, 0])]
    sizes = [[-row[0] for row in probe(part).gradients] for part in parts]
    counts = {name: [[count(part)] * len(part.weights) for part in parts] for name, count in COUNTS.items()}
    counts["sequence means"] = [[len(row) * len(part.weights) for row in part.weights] for part in parts]
    # For the count by which the loss divides, size · count is one factor over all datums of all parts.
    products = {name: [s * c for ss, cs in zip(sizes, row) for s, c in zip(ss, cs)] for name, row in counts.items()}
    factors = {name: ks[0] for name, ks in products.items() if probe.close(ks, [ks[0]] * len(ks))}
    seen = f"The gradients of tokens of weight 1 are {[[-s for s in row] for row in sizes]}"
    # A factor is not detected if the loss divides by a number of sequences: it may be a fixed length.
    if any(name in ("sequences", "datums") or probe.close(k, 1.0) for name, k in factors.items()):
        return
    for name, k in factors.items():
        doubled = probe.close(k, 2.0) and (has_sequence_ratio(probe) or "sampler_logprobs" in columns_read(probe))
        require(False, "missing-stop-gradient" if doubled else "constant-factor", f"{seen}: {k:g} / {name}.")
    for name, row in counts.items():
        # 1 / size − count is one number for all datums if that number is added to the denominator.
        extra = [1 / s - c for ss, cs in zip(sizes, row) for s, c in zip(ss, cs) if s]
        added = probe.close(extra, [extra[0]] * len(extra))
        require(not added, "epsilon-in-denominator", f"{seen}: 1 / ({name} + {extra[0]:g}).")
    require(False, "constant-factor", f"{seen}, which is not 1 / D for any D of {', '.join(counts)}.")


@wrong("clipping must remove the incentive to leave the trust region, and no other gradient")
def clip(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The upper bound removes the gradient where A > 0, the lower bound where A < 0, and nowhere else."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume(reads_old_logprobs(probe), "it reads no old logprobs")
    grid = [*(-d for d in reversed(LOG_RATIOS)), *LOG_RATIOS]
    table = {a: [(d, *value_and_gradient_at(probe, d, a)) for d in grid] for a in (1.0, -1.0)}
    # The log-ratios without a gradient, for advantage 1 (good) and −1 (bad), below and above ratio 1.
    good_below, good_above, bad_below, bad_above = (
        [d for d, _, g in table[a] if g == 0 and d * side > 0] for a in (1.0, -1.0) for side in (-1, 1)
    )
    low, high = [f"{math.exp(x[0]):.3g}" if x else "no ratio" for x in (good_below[-1:], bad_above[:1])]
    seen = f"A token of advantage 1 has no gradient below the ratio {low}, one of −1 none above {high}"
    # A dual clip removes the gradient where A < 0 and the ratio is far above 1, a cap removes it for every token.
    # Neither acts on ratios near 1.
    bad_near = [d for d in bad_above if d < 0.5]
    if good_below or bad_near:
        opposite_kept = not good_above and not bad_below
        require(False, "clip-max-for-min" if opposite_kept else "clip-without-min", f"{seen}.")
    for a, d in ((1.0, 2.5), (-1.0, -2.5)):
        value, gradient = value_and_gradient_at(probe, d, a)
        nudged = value_after_nudge(probe, d, a, -0.25)
        flat_value = probe.close(value, nudged) and not probe.close(value, value + 0.25 * gradient, scale=10)
        seen = f"At the ratio {math.exp(d):.3g} and advantage {a:g} the loss does not change with the logprob"
        leaks = flat_value and not is_constant(table[a])
        require(not leaks, "clip-gradient-leaks", f"{seen}, but its gradient is {gradient:g}.")


def value_after_nudge(probe: Probe, d: float, advantage: float, by: float) -> float:
    """Return the value of a single token with log-ratio d after ``by`` is added to the policy's logprob."""
    batch = uniform_batch(
        probe.batch, logprobs=-30.0, advantages=advantage, old_logprobs=-30.0 - d, sampler_logprobs=-30.0 - d
    )
    return probe(batch.having(logprobs=[[x + by for x in row] for row in batch.logprobs])).value


def is_constant(table: list[tuple[float, float, float]]) -> bool:
    """Return whether the value is the same at every ratio."""
    return all(value == table[0][1] for _, value, _ in table)


@wrong("the bound acts at another ratio than the one that is set")
def clip_bounds(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The gradient ends, or stops growing, at the bounds in the settings."""
    from lossfns.testing.subject import knobs

    probe = Probe.of(loss_fn, data, logprobs)
    clips = [value for name, value in knobs(loss_fn).items() if name.startswith("clip")]
    bounds = [value for value in clips if isinstance(value, (tuple, list)) and len(value) == 2]
    assume(len(bounds) == 1 and bounds[0][0] <= 1 <= bounds[0][1], "its settings hold no absolute bounds")
    low, high = bounds[0]
    for bound, mistaken, advantage in ((high, 1 + high, 1.0), (low, 1 - low, -1.0)):
        if not 0 < bound < math.inf or mistaken <= 0 or gradient_ends_at(probe, bound, advantage):
            continue  # no ratio can lie at one of the two, or the bound acts where it is set
        seen = f"The bound is set to {bound:g}; at advantage {advantage:g} the gradient ends or levels at {mistaken:g}."
        require(not gradient_ends_at(probe, mistaken, advantage), "clip-as-epsilon", seen)


def gradient_ends_at(probe: Probe, ratio: float, advantage: float) -> bool:
    """Return whether the gradient changes with the ratio between 1 and this ratio, and not beyond it."""
    d = math.log(ratio)
    inner, inside, outside, outer = (
        value_and_gradient_at(probe, d * by, advantage)[1] for by in (0.98, 0.99, 1.01, 1.02)
    )
    return outside == outer and inside != outside and (outside == 0 or inner != inside)


@wrong("the correction is the ratio of the old policy to the sampler")
def tis(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The sampler correction is exp(old − sampler), at most a cap, and 1 where the two agree."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume("sampler_logprobs" in columns_read(probe), "it reads no sampler logprobs")
    base = value_and_gradient_at(probe, 0.0, 1.0)[1]
    assume(base != 0, "there is no gradient")
    factor = {
        x: value_and_gradient_at(probe, 0.0, 1.0, sampler_logprobs=-30.0 - x)[1] / base for x in (-0.5, 0.2, 8.0, 25.0)
    }
    seen = f"With old − sampler = −0.5 the gradient is {factor[-0.5]:g} times that at 0; with 8, {factor[8.0]:g}"
    require(set(factor.values()) != {1.0}, "tis-inert", f"{seen}.")
    require(not math.isclose(factor[-0.5], math.exp(0.5), rel_tol=1e-3), "tis-inverted", f"{seen}.")
    require(not (factor[8.0] > 1000 and factor[25.0] > factor[8.0]), "tis-uncapped", f"{seen}.")


@wrong("the metric is not what its name says")
def clip_metrics(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A clip fraction counts the tokens whose gradient a bound removes, and no others."""
    probe = Probe.of(loss_fn, data, logprobs)
    for d, advantage in ((-1.0, 1.0), (1.0, -1.0), (0.0, 1.0)):
        old = -30.0 - d
        batch = uniform_batch(probe.batch, logprobs=-30.0, advantages=advantage, old_logprobs=old, sampler_logprobs=old)
        result = probe(batch)
        for name, value in result.metrics.items():
            fraction = "clip" in name and not any(word in name for word in ("low_", "high_", "bound", "threshold"))
            if fraction and result.gradients[0][0] != 0:
                seen = f"At ratio {math.exp(d):.3g} and advantage {advantage:g} there is a gradient"
                require(value == 0, "metric-counts-nonbinding", f"{seen}, but {name!r} is {value}.")


@wrong("the metric is not what its name says")
def kl_metrics(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A metric named kl_ref is one of the estimators k1, k2, k3 of the KL to the reference."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume("ref_logprobs" in columns_read(probe), "it reads no reference")
    x = -0.5
    batch = uniform_batch(probe.batch, length=2, logprobs=-3.0, ref_logprobs=-3.0 + x, old_logprobs=-3.0)
    estimates = [0.0, x, -x, x * x / 2, math.exp(x) - x - 1, math.exp(-x) + x - 1]
    for name, value in probe(batch).metrics.items():
        if "kl" in name and "ref" in name:
            seen = f"Half a nat above the reference {name!r} is {value}, not one of {estimates}."
            right = any(math.isclose(value, e, rel_tol=1e-4, abs_tol=1e-7) for e in estimates)
            require(right, "metric-scaled-twice", seen)
