"""Laws of settings: each has an effect on some batch, and a number does what the field's name for it says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lossfns.testing.batch import Batch, Rows
from lossfns.testing.laws.base import (
    LawBroken,
    LossFn,
    Outcome,
    Probe,
    assume,
    batch_kind,
    columns_read,
    relative_difference,
    require,
    uniform_batch,
    with_constants,
    wrong,
)
from lossfns.testing.laws.settings import NamedNumber, named_numbers, nearer_to_off, role_of, words
from lossfns.testing.settings import knobs, setting_elements, variants


@wrong("a setting that does nothing is not the loss that was asked for")
def no_inert_knob(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Each setting changes the value or the gradient on some batch."""
    probe = Probe.of(loss_fn, data, logprobs)
    # Setting → the indices of the elements that have not changed the loss on any batch so far.
    inert = {
        name: [i for i in setting_elements(value) if next(variants(loss_fn, name, i), None)]
        for name, value in knobs(loss_fn).items()
        if must_matter(name, value)
    }
    inert = {name: indices for name, indices in inert.items() if indices}
    assume(bool(inert), "it has no settings that can be varied")

    def has_effect(batch: Batch, default: Outcome, name: str, index: int | None) -> bool:
        metrics_too = isinstance(knobs(loss_fn)[name], bool)  # a boolean setting may change only the metrics
        others = variants(loss_fn, name, index)
        return any(changes_outcome(probe, batch, default, other, metrics_too) for other in others)

    for batch in generic_batches(probe.batch):
        if not any(inert.values()):
            return
        default = probe(batch)
        for name, indices in inert.items():
            inert[name] = [i for i in indices if not has_effect(batch, default, name, i)]
    for name, indices in inert.items():
        if not indices or acts_with_another(probe, name, indices):
            continue
        value = knobs(loss_fn)[name]
        all_inert = len(indices) == len(list(setting_elements(value)))
        clip = name.startswith(("clip", "eps")) and all_inert
        element = "" if all_inert else f"[{indices[0]}]"
        overflows = {"log", "ratio"} <= set(words(name)) and not finite_far_away(probe)
        bug = "clip-inert" if clip else "tis-uncapped" if role_of(name) == "tis" else "inert-knob"
        bug = "exp-overflow" if overflows else bug
        seen = f"Other values of {name}{element} change neither value nor gradient. The value here is {value!r}."
        require(False, bug, seen)


WITHOUT_EFFECT = {"ignore", "pad", "id", "ids", "seed", "dim", "verbose", "debug", "log", "every", "name", "dtype"}
"""Words in the names of settings that do not change a loss."""


def must_matter(name: str, value: Any) -> bool:
    """Return whether a setting has to change the loss on some batch.

    A tiny number guards against division by 0. A setting that is None may belong to a signature that many losses share,
    unless its name says what it does.
    """
    if isinstance(value, str):
        return False  # its other values may stand in another function
    if isinstance(value, list) and (len(value) > 4 or not all(isinstance(x, (int, float)) for x in value)):
        return False  # a list in which the loss keeps something
    found = set(words(name))
    of_log_ratio = "log" in found and bool(found & {"ratio", "cap", "clip", "max"})
    if found & WITHOUT_EFFECT and not of_log_ratio:
        return False
    guards = isinstance(value, float) and 0 < value <= 1e-4 and bool(found & {"eps", "epsilon", "tiny", "min"})
    return not guards and (value is not None or role_of(name) != "")


def acts_with_another(probe: Probe, name: str, indices: list[int | None]) -> bool:
    """Return whether a setting has an effect once another one has another value, such as a coefficient that is 0."""
    loss_fn = probe.loss_fn
    batches = [ratio_batch(probe.batch, d, by_token=True) for d in (0.15, 1.0, 25.0)]
    for other, value in knobs(loss_fn).items():
        if other == name or isinstance(value, bool):
            continue
        elements = range(len(value)) if isinstance(value, (tuple, list)) else (None,)
        for base in (v for element in elements for v in variants(loss_fn, other, element)):
            try:
                changed = [v for i in indices for v in variants(base, name, i)]
                if any(changes_outcome(probe, b, probe(b, base), v, False) for b in batches for v in changed):
                    return True
            except Exception:  # the loss refuses this combination
                continue
            if not isinstance(value, str):  # of a name, every value is another formula
                break
    return False


def finite_far_away(probe: Probe) -> bool:
    """Return whether the outcome is finite at a log-ratio of 10⁴, where exp overflows without a cap."""
    far = with_constants(uniform_batch(probe.batch, logprobs=-1.0, advantages=-1.0), old_logprobs=-1e4)
    try:
        return probe(far).finite
    except LawBroken:  # the loss refuses a result that is not finite
        return False


def changes_outcome(probe: Probe, batch: Batch, default: Outcome, other: LossFn, metrics_too: bool) -> bool:
    """Return whether the loss with another setting has another value or gradient than ``default`` on the batch.

    With ``metrics_too`` other metrics count as well. A call that raises shows no change.
    """
    try:
        result = probe(batch, other)
    except Exception:
        return False
    same = probe.close([result.value, result.gradients], [default.value, default.gradients], scale=0.01)
    return not same or (metrics_too and result.metrics != default.metrics)


def generic_batches(like: Batch) -> list[Batch]:
    """Return batches on which every term of a loss contributes. Log-ratios lie on both sides of all bounds.

    Log-ratios grow from batch to batch, because one large term can hide the others. Then follow batches in which all
    log-ratios of a sequence are equal, and batches of likely tokens.
    """
    by_token = [ratio_batch(like, d, by_token=True) for d in (0.0, 0.01, 0.15, 0.3, 1.0, 2.0, 25.0)]
    by_sequence = [ratio_batch(like, d, by_token=False) for d in (0.3, 2.0, 25.0)]
    likely = [ratio_batch(like, d, by_token=True, logprob=-0.75) for d in (0.25, 0.7)]
    return [*by_token, *by_sequence, *likely]


def ratio_batch(like: Batch, d: float, *, by_token: bool, logprob: float = -30.0) -> Batch:
    """Return four datums of unequal length whose log-ratios are ±d. The sign alternates by token or by sequence.

    Logprobs of −30 allow any log-ratio without a logprob above 0. A loss that reads no old logprobs gets likely tokens
    instead, because it may depend on the probabilities themselves.
    """

    def sign(i: int, j: int) -> float:
        # i // 2, because the sign of the advantage alternates with i, and each sign must meet each sign of the ratio
        flips = i // 2 + j if by_token else i // 2
        return -1.0 if flips % 2 else 1.0

    def fill(value: Callable[[int, int], float]) -> Rows:
        return [[value(i, j) for j in range(n * (like.targets or 1))] for i, n in enumerate((2, 3, 1, 4))]

    level, pairs = logprob if "old_logprobs" in like.columns else -0.75, batch_kind(like) == "preference"
    # Likely tokens differ by datum and by d. Otherwise a loss without ratios would see the same logprobs each time.
    logprobs = fill(lambda i, j: level if level == -30 else level - 0.125 * i - d / 8)
    columns = {
        "advantages": fill(lambda i, j: (1 + 0.25 * i) * (-1 if i % 2 else 1)),
        "old_logprobs": fill(lambda i, j: level + d * sign(i, j)),
        # In the second of two pairs the policy is below the reference on the chosen side.
        "ref_logprobs": fill(
            lambda i, j: min(level - (0.25 + 0.25 * d * (1 + (i + j) % 3)) * (-1 if pairs and i == 2 else 1), 0.0)
        ),
        "sampler_logprobs": fill(lambda i, j: level - 0.375 * d * sign(i, j)),
        "labels": fill(lambda i, j: float(i % 2 == 0)),
    }
    weights = fill(lambda i, j: (1.0, 0.5, 1.0, 2.0)[j % 4])
    return Batch(logprobs, weights, {name: columns[name] for name in like.columns}, like.targets)


# Numbers that do what their names say


def gradient_at(probe: Probe, advantage: float, d: float, loss_fn: LossFn | None = None, **columns: float) -> float:
    """Return the gradient of a single token with log-ratio d to the old policy and to the sampler.

    The logprob of −4.5 is small enough for a log-ratio of 4 and large enough to hold one of 1e-5 in float32.
    """
    batch = uniform_batch(probe.batch, logprobs=-4.5, advantages=advantage)
    constants = {"old_logprobs": -4.5 - d, "sampler_logprobs": -4.5 - d, **columns}
    changed = with_constants(batch, **{name: x for name, x in constants.items() if name in batch.columns})
    return probe(changed, loss_fn).gradients[0][0]


NEAR, FAR = 1e-5, 4.0
"""The smallest and the largest log-ratio at which a bound is searched."""


def end_of_gradient(
    probe: Probe, advantage: float, side: int, loss_fn: LossFn | None = None, likely: Sequence[float] = ()
) -> float | None:
    """Return the log-ratio above (side 1) or below (−1) 0 from which the gradient no longer changes, or None.

    Log-ratios at which it is likely to end are tried first. Others are searched for.
    """

    def gradient(size: float) -> float:
        return gradient_at(probe, advantage, side * size, loss_fn)

    far = gradient(FAR)

    def level(size: float) -> bool:
        return math.isclose(gradient(size), far, rel_tol=1e-9)

    low, high = NEAR, 0.98 * FAR
    if level(low) or not level(high):
        return None
    for place in likely:
        size = side * place
        if low < 0.999 * size and 1.001 * size < high and level(1.001 * size) and not level(0.999 * size):
            return place
    for _ in range(18):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if level(middle) else (middle, high)
    return side * high


def ends(probe: Probe, likely: Mapping[str, Sequence[float]], loss_fn: LossFn | None = None) -> dict[str, float | None]:
    """Return the log-ratios at which the gradient ends below, for a bad token, and above, for a good one."""
    return {
        "low": end_of_gradient(probe, -1.0, -1, loss_fn, likely["low"]),
        "high": end_of_gradient(probe, 1.0, 1, loss_fn, likely["high"]),
    }


def same_place(a: float | None, b: float | None) -> bool:
    """Return whether two log-ratios are one place, to a hundredth."""
    return a == b if a is None or b is None else math.isclose(a, b, rel_tol=0.01)


def log_ratios_meant(side: str, value: float, absolute: bool) -> list[float]:
    """Return the log-ratios that a bound may mean: the ratio itself, 1 ± ε, 1 / (1 ± ε), or exp(±ε)."""
    sign = 1 if side == "high" else -1
    ratios = [value] if absolute else [value, 1 + sign * value, 1 / (1 - sign * value) if value != sign else 0.0]
    logs = [math.log(r) for r in ratios if r > 0]
    return [d for d in logs if d * sign > 0] + ([] if absolute else [sign * value])


@wrong("a bound does not act at the ratio, or on the side, that its name says")
def clip_bounds(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The gradient ends, or stops growing, at the bounds in the settings, each on its own side."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume("old_logprobs" in columns_read(probe), "it reads no old logprobs")
    bounds = [s for s in named_numbers(loss_fn) if s.role in ("low", "high", "clip") and 1e-4 < s.value < math.inf]
    assume(bool(bounds), "no setting names a bound of the ratio")
    lows, highs = ([s.value for s in bounds if s.role == role] for role in ("low", "high"))
    # (1, 1) may be two bounds or two epsilons.
    absolute = bool(lows and highs) and 0.5 < lows[0] <= 1 <= highs[0] and lows[0] < highs[0]
    found = ends(probe, {side: places_meant(bounds, side, absolute) for side in ("low", "high")})
    assume(any(end is not None for end in found.values()), "the gradient ends at no ratio")
    for bound in bounds:
        moved = moved_ends(probe, bound, found, absolute)
        other = {"low": "high", "high": "low"}.get(bound.role, "")
        own = [side for side in ("low", "high") if side != other]
        seen = f"The setting {bound.name} = {bound.value:g} moves the {other} bound of the ratio"
        require(moved is None or other not in moved or bound.role in moved, "bounds-exchanged", f"{seen} alone.")
        for side in own:
            end = found[side]
            if end is None or (moved is not None and side not in moved):
                continue  # no bound on this side, or another one acts before this one
            seen = f"The setting {bound.name} is {bound.value:g}; the gradient ends or levels at {math.exp(end):.5g}"
            if any(same_place(end, place) for place in log_ratios_meant(side, bound.value, absolute)):
                continue
            epsilon = bound.value if side == "high" else -bound.value
            mistaken = absolute and 1 + epsilon > 0 and same_place(end, math.log(1 + epsilon))
            require(not mistaken, "clip-as-epsilon", f"{seen}.")
            crossed = [s for s in bounds if s.role == other and other]
            places = [place for s in crossed for place in log_ratios_meant(side, s.value, absolute)]
            exchanged = any(same_place(end, place) for place in places)
            require(not exchanged, "bounds-exchanged", f"{seen}, as {crossed[0].name if crossed else ''} says.")
            require(moved is None, "bound-elsewhere", f"{seen}.")


def places_meant(bounds: Sequence[NamedNumber], side: str, absolute: bool) -> list[float]:
    """Return the log-ratios that the bounds of a side may mean."""
    own = [bound.value for bound in bounds if bound.role in (side, "clip")]
    return [place for value in own for place in log_ratios_meant(side, value, absolute)]


def moved_ends(probe: Probe, bound: NamedNumber, before: Mapping[str, float | None], absolute: bool) -> set[str] | None:
    """Return the sides whose bound moves with a setting, or None if the setting has no other value."""
    other = nearer_to_off(bound.value)
    if other is None:
        return None
    try:
        changed = replace(bound, value=other)
        likely = {
            side: [*places_meant([changed], side, absolute), *([] if end is None else [end])]
            for side, end in before.items()
        }
        after = ends(probe, likely, bound.change(other))
    except Exception:  # the loss refuses the value
        return None
    return {side for side, end in before.items() if not same_place(end, after[side])}


@wrong("a cap does not act where its name says")
def caps(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The cap of a correction and the constant of a dual clip are ratios, and act at these ratios."""
    probe = Probe.of(loss_fn, data, logprobs)
    read = columns_read(probe)
    checked = [check_dual_clip(probe, s) for s in named_numbers(loss_fn) if s.role == "dual" and s.value > 1]
    if "sampler_logprobs" in read:
        checked += [check_correction(probe, s) for s in named_numbers(loss_fn) if s.role == "tis" and s.value > 0]
    assume(any(checked), "no setting names a cap that acts")


def check_dual_clip(probe: Probe, constant: NamedNumber) -> bool:
    """Require that the gradient of a bad token ends at the ratio c. Return whether c moves the end."""
    at, moved = (end_of_gradient(probe, -1.0, 1, f) for f in (None, changed_loss(constant)))
    if at is None or same_place(at, moved):
        return False
    seen = (
        f"The setting {constant.name} is {constant.value:g}; at advantage −1 the gradient ends at {math.exp(at):.5g}."
    )
    require(same_place(at, math.log(constant.value)), "bound-elsewhere", seen)
    return True


def check_correction(probe: Probe, cap: NamedNumber) -> bool:
    """Require that a large correction is limited to the cap, or its token left out. Return whether the cap acts."""
    other = changed_loss(cap)
    at, far, farther = (gradient_at(probe, 1.0, 0.0, sampler_logprobs=-4.5 - x) for x in (0.0, 8.0, 9.0))
    changed = gradient_at(probe, 1.0, 0.0, other, sampler_logprobs=-4.5 - 8.0)
    if not at or not probe.close(far, farther) or far == 0 or probe.close(far, changed):
        return False
    seen = f"The setting {cap.name} is {cap.value:g}; old − sampler = 8 multiplies the gradient by {far / at:.5g}"
    require(probe.close(far / at, cap.value, scale=10), "bound-elsewhere", f"{seen}.")
    return True


def changed_loss(setting: NamedNumber) -> LossFn:
    """Return the loss with a bound half as far from its neutral value, or NotApplicable if it refuses that."""
    other = nearer_to_off(setting.value)
    assume(other is not None, f"{setting.name} has no other value to compare with")
    try:
        return setting.change(other or 0.0)
    except (TypeError, ValueError):
        assume(False, f"it refuses {setting.name} = {other}")
        raise AssertionError from None


@wrong("the coefficient is not the weight of the KL term")
def kl_strength(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """Twice the KL coefficient is twice the pull to the reference, and changes nothing else."""
    probe = Probe.of(loss_fn, data, logprobs)
    assume("ref_logprobs" in columns_read(probe), "it reads no reference")
    base = pulls_of_kl(probe)
    assume(any(base), "it has no KL term with a gradient")
    compared = 0
    for setting in named_numbers(loss_fn):
        if setting.role != "kl" or setting.value == 0:
            continue
        try:
            twice = setting.change(2 * setting.value)
            of_policy = [gradient_at(probe, 1.0, 0.0, f) - gradient_at(probe, 0.0, 0.0, f) for f in (None, twice)]
            pulls = pulls_of_kl(probe, twice)
        except Exception:  # the loss refuses the value
            continue
        compared += 1
        seen = f"With {setting.name} = {2 * setting.value:g} for {setting.value:g}"
        at_reference = f"{seen} the gradient of advantage 1 at the reference is {of_policy[1]:g} for {of_policy[0]:g}."
        require(relative_difference(*of_policy) < 1e-3, "setting-misplaced", at_reference)
        factors = [p / q for p, q in zip(pulls, base) if q]
        at_distance = f"{seen} the pull to the reference is {factors[0]:.4g} times as strong."
        require(relative_difference(factors, [4.0] * len(factors)) > 1e-3, "kl-beta-twice", at_distance)
    assume(compared > 0, "no setting names the coefficient of the KL term")


def pulls_of_kl(probe: Probe, loss_fn: LossFn | None = None) -> list[float]:
    """Return the gradients of the KL term half a nat above and below the reference, less that at the reference."""
    at, above, below = (gradient_at(probe, 0.0, 0.0, loss_fn, ref_logprobs=-4.5 - x) for x in (0.0, 0.5, -0.5))
    return [above - at, below - at]
