"""The oracle with planted bugs: for each bug, the answer of a loss that has it.

A variant replaces an argument, the answer or a function of the oracle. It works on every loss that can have the bug.
If the bug does not show on an input, the variant gives the right answer. Variants have three uses: to compute the flags
of a golden vector, to find the bug behind a wrong reply, and to make mutants (``lossfns.testing.mutants``).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from inspect import signature
from typing import Any

from lossfns.testing import oracle
from lossfns.testing.oracle import Loss, Row, Rows, Term, active, averaged, normalized, total

Arguments = dict[str, Any]
"""The arguments of a function of the oracle: rows by column, and the settings."""
Oracle = Callable[..., Loss]
Variant = Callable[[Oracle, Arguments], Loss]

NAN = math.nan
SEQUENCE_RATIO = (oracle.gspo, oracle.gspo_token)


def wrong_loss(bug: str, loss: str, a: Arguments, targets: int = 0) -> Loss | None:
    """Return the answer of a loss that has the bug, or None if this loss cannot have it.

    Args:
        bug: a key of ``GENERAL_BUGS``, ``LIKELIHOOD_BUGS``, ``MULTI_TARGET_BUGS`` or ``PAIR_BUGS``.
        loss: the name of the oracle's function.
        a: the arguments of this function. ``weigh`` and ``denominator`` must be among them.
        targets: K where a position has K targets, else 0.
    """
    f: Oracle = getattr(oracle, loss)
    try:
        if bug in MULTI_TARGET_BUGS and targets:
            return MULTI_TARGET_BUGS[bug](f, a, targets)
        if bug in PAIR_BUGS and is_pairwise(a):
            return PAIR_BUGS[bug](f, a)
        if bug in LIKELIHOOD_BUGS and a.keys().isdisjoint(("advantages", "ref_logprobs")) and not is_pairwise(a):
            return LIKELIHOOD_BUGS[bug](f, a)
        if bug in GENERAL_BUGS:
            # Only the closed forms call the functions that such a variant replaces.
            inert = f.__module__ != oracle.__name__ and "replaces" in vars(GENERAL_BUGS[bug])
            return None if inert else GENERAL_BUGS[bug](f, a)
    except KeyError:
        return None
    except (ArithmeticError, ValueError):  # Python's math raises where tensors hold inf or nan
        return scale_loss((0.0, a["weights"]), NAN)
    return None


# Building blocks of variants


def is_pairwise(a: Arguments) -> bool:
    """Return whether the loss compares datum 2i with datum 2i + 1."""
    return a["weigh"] in oracle.PAIR_WEIGHINGS


def divisor(a: Arguments) -> float:
    """Return the denominator of the loss with these arguments."""
    nonempty = [bool(active(row)) for row in a["weights"]]
    count = sum(map(all, zip(nonempty[0::2], nonempty[1::2]))) if is_pairwise(a) else sum(nonempty)
    mass = total(w for row in a["weights"] for w in position_weights(row, a.get("targets", 1)))
    return oracle.divisor(a["weigh"], mass, count, a.get("length"), a["denominator"])


def position_weights(row: Row, targets: int) -> Row:
    """Return the mean weight of the active candidates of each position."""
    parts = [[w for w in row[i : i + targets] if w != 0] for i in range(0, len(row), targets)]
    return [total(part) / len(part) for part in parts if part]


@contextmanager
def replaced(**functions: Callable[..., Any]) -> Iterator[None]:
    """Replace functions of the oracle within a block."""
    before = {name: getattr(oracle, name) for name in functions}
    try:
        vars(oracle).update(functions)
        yield
    finally:
        vars(oracle).update(before)


def patched(**functions: Callable[..., Any]) -> Variant:
    """Return the variant that calls the oracle with some of its functions replaced."""

    def variant(f: Oracle, a: Arguments) -> Loss:
        with replaced(**functions):
            return f(**a)

    vars(variant)["replaces"] = True
    return variant


def scale_loss(answer: Loss, by: float, grads_by: float | None = None) -> Loss:
    """Multiply the value by ``by`` and the gradients by ``grads_by``, which defaults to ``by``."""
    value, grads = answer
    k = by if grads_by is None else grads_by
    return by * value, [[k * g for g in row] for row in grads]


def add_losses(one: Loss, other: Loss) -> Loss:
    """Add two losses, value and gradients."""
    return one[0] + other[0], [[g + h for g, h in zip(*rows)] for rows in zip(one[1], other[1])]


def override(a: Arguments, **changes: Any) -> Arguments:
    """Replace arguments. Leave out those that the loss does not have."""
    return a | {name: value for name, value in changes.items() if name in a}


def map_rows(a: Arguments, name: str, change: Callable[[Row], Row]) -> Arguments:
    """Apply a function to each row of one column. Raise KeyError if the loss does not read the column."""
    return a | {name: [change(row) for row in a[name]]}


def changing_rows(column: str, change: Callable[[Row], Row]) -> Variant:
    """Return the variant that changes each row of one column."""
    return lambda f, a: f(**map_rows(a, column, change))


def changing_setting(name: str, change: Callable[[Any], Any]) -> Variant:
    """Return the variant that changes one setting unless it is None."""
    return lambda f, a: f(**a | ({} if a[name] is None else {name: change(a[name])}))


def fix_denominator(a: Arguments) -> Arguments:
    """Set the denominator to the right one, so that a change of the weights does not change it."""
    return a | {"denominator": divisor(a)}


def first_column(a: Arguments, *names: str) -> str:
    """Return the first of these columns that the loss reads, else the weights."""
    return next(name for name in (*names, "weights") if name in a)


def unit_indices(a: Arguments) -> list[list[int]]:
    """Return the indices of the datums of each unit: a datum, or the two sides of a pair."""
    step = 2 if is_pairwise(a) else 1
    return [list(range(i, i + step)) for i in range(0, len(a["weights"]), step)]


def select(a: Arguments, indices: list[int]) -> Arguments:
    """Return the arguments for these datums only."""
    return {name: [x[i] for i in indices] if isinstance(x, list) else x for name, x in a.items()}


def reordered(order: Callable[[int], list[int]]) -> Variant:
    """Return the variant that calls the oracle with reordered datums and restores the order of the gradients."""

    def variant(f: Oracle, a: Arguments) -> Loss:
        places = order(len(a["weights"]))
        value, grads = f(**select(a, places))
        return value, [grads[places.index(i)] for i in range(len(places))]

    return variant


# Masks


def every_slot(weights: Row) -> list[int]:
    """Replace the oracle's ``active``: return every slot of a sequence that has an active token."""
    return list(range(len(weights))) if any(weights) else []


def difference_everywhere(weights: Rows, left: Rows, right: Rows) -> Rows:
    """left − right in masked slots too."""
    return [[x - y for x, y in zip(*rows)] for rows in zip(left, right)]


def averaged_by_product(weights: Rows, values: Rows) -> Rows:
    """Σ w·x / Σ w with the weights as a factor: 0·nan is nan."""
    rows = []
    for w, xs in zip(weights, values):
        mean = sum(u * x for u, x in zip(w, xs)) / (sum(w) or 1.0)
        rows.append([(u != 0) * mean for u in w])
    return rows


mask_after_exp = patched(active=every_slot, difference=difference_everywhere, averaged=averaged_by_product)


def where_after_exp(f: Oracle, a: Arguments) -> Loss:
    return f(**a)[0], mask_after_exp(f, a)[1]


def unmasked(a: Arguments) -> Arguments:
    """Give every masked slot the weight 1. Keep the denominator."""
    return map_rows(fix_denominator(a), "weights", lambda row: [w or 1.0 for w in row])


def padding_in_denominator(f: Oracle, a: Arguments) -> Loss:
    counted = a["weigh"] == "token_mean" and a["denominator"] is None
    by = float(sum(map(len, a["weights"]))) if counted else a["denominator"]
    with replaced(normalized=lambda weights: [[w / len(row) for w in row] for row in weights]):
        return f(**a | {"denominator": by})


def padding_in_sequence_ratio(f: Oracle, a: Arguments) -> Loss:
    def mean_of_all(weights: Rows, values: Rows) -> Rows:
        return [[sum(row) / len(row) if w != 0 else 0.0 for w in ws] for ws, row in zip(weights, values)]

    return patched(averaged=mean_of_all, through_mean=mean_of_all, difference=difference_everywhere)(f, a)


def empty_sequence_nan(f: Oracle, a: Arguments) -> Loss:
    divides = a["weigh"] == "sequence_mean" or f in (*SEQUENCE_RATIO, oracle.orpo)
    return (NAN, f(**a)[1]) if divides and not all(map(any, a["weights"])) else f(**a)


def empty_sequence_counted(f: Oracle, a: Arguments) -> Loss:
    if a["weigh"] == "token_mean" or a["denominator"] is not None:
        return f(**a)
    return f(**a | {"denominator": float(len(unit_indices(a)) * (a.get("length") or 1))})


def gradient_missing(f: Oracle, a: Arguments) -> Loss:
    """nan stands for a gradient that is None."""
    value, grads = f(**a)
    return value, [row if any(w) else [NAN] * len(row) for row, w in zip(grads, a["weights"])]


# Normalisation


def mean_of_means(f: Oracle, a: Arguments) -> Loss:
    """Divide each unit by its own denominator and take the plain mean; a chunk is divided by its own denominator."""
    if a["denominator"] is not None:
        return f(**a | {"denominator": None})
    chunks = [select(a, unit) for unit in unit_indices(a)]
    parts = [f(**chunk) for chunk in chunks]
    count = sum(any(map(any, chunk["weights"])) for chunk in chunks) or 1
    by = 1.0 if a["weigh"].endswith("_sum") else float(count)
    return sum(value for value, _ in parts) / by, [[g / by for g in row] for _, grads in parts for row in grads]


def mixed_denominators(f: Oracle, a: Arguments) -> Loss:
    other = "sequence_mean" if a["weigh"] == "token_mean" else "token_mean"
    return add_losses(policy_part(f, a), kl_part(a | {"weigh": other}))


def zero_advantage_denominator(f: Oracle, a: Arguments) -> Loss:
    counted_weights = [[w if x != 0 else 0.0 for w, x in zip(*rows)] for rows in zip(a["weights"], a["advantages"])]
    return f(**a | {"denominator": divisor(a | {"weights": counted_weights})})


def broadcast(f: Oracle, a: Arguments) -> Loss:
    """Average over all pairs of datums: each token with every advantage, each chosen side with every rejected one."""
    if is_pairwise(a):
        offsets = range(len(unit_indices(a)))
        parts = [reordered(partial(rejected_sides_rotated, by))(f, a) for by in offsets]
        return scale_loss(reduce(add_losses, parts), 1 / len(parts)) if parts else f(**a)
    first_advantages = [row[active(w)[0]] for row, w in zip(a["advantages"], a["weights"]) if any(w)]
    mean = sum(first_advantages) / max(len(first_advantages), 1)
    return f(**map_rows(a, "advantages", lambda row: [mean] * len(row)))


def rejected_sides_rotated(by: int, count: int) -> list[int]:
    """Return the order of datums that puts each chosen side before the rejected side of the pair ``by`` pairs later."""
    return [i if i % 2 == 0 else (i + 2 * by) % count for i in range(count)]


def cross_talk(f: Oracle, a: Arguments) -> Loss:
    """Whiten the advantages over the batch, or subtract the mean margin of the batch from every margin."""
    if is_pairwise(a):
        return centred_margins(f, a)
    pool = [x for row, w in zip(a["advantages"], a["weights"]) for t, x in enumerate(row) if w[t] != 0]
    mean = sum(pool) / max(len(pool), 1)
    std = math.sqrt(sum((x - mean) ** 2 for x in pool) / max(len(pool) - 1, 1)) or 1.0
    return f(**map_rows(a, "advantages", lambda row: [(x - mean) / std for x in row]))


def centred_margins(f: Oracle, a: Arguments) -> Loss:
    original = oracle.reduce_pairs

    def reduce_pairs(term: Any, *others: Any) -> Loss:
        margins: Row = []

        def record(chosen: float, rejected: float) -> tuple[float, float, float]:
            margins.append(chosen - rejected)
            return 0.0, 0.0, 0.0

        original(record, *others)
        mean = sum(margins) / max(len(margins), 1)
        return original(lambda chosen, rejected: term(chosen - mean, rejected), *others)

    return patched(reduce_pairs=reduce_pairs)(f, a)


# Frame


def frame_shift(f: Oracle, a: Arguments) -> Loss:
    return f(
        **map_rows(a, first_column(a, "old_logprobs", "ref_logprobs", "advantages"), lambda row: row[-1:] + row[:-1])
    )


def datum_misaligned(f: Oracle, a: Arguments) -> Loss:
    """Reverse the order of a column's rows if their lengths fit."""
    name = first_column(a, "advantages", "ref_logprobs")
    back = a[name][::-1]
    return f(**a | ({name: back} if list(map(len, back)) == list(map(len, a[name])) else {}))


def datum_ignored(f: Oracle, a: Arguments) -> Loss:
    last = -2 if is_pairwise(a) else -1
    rest = [[0.0] * len(row) for row in a["weights"][:last]]
    return f(**fix_denominator(a) | {"weights": rest + a["weights"][last:]})


def order_dependent(f: Oracle, a: Arguments) -> Loss:
    """Give unit i the factor 1 / (i + 1)."""
    parts = [scale_loss(f(**select(fix_denominator(a), unit)), 1 / (i + 1)) for i, unit in enumerate(unit_indices(a))]
    return sum(value for value, _ in parts), [row for _, grads in parts for row in grads]


def targets_transposed(f: Oracle, a: Arguments, k: int) -> Loss:
    """Read the weights [N, K] as [K, N]."""
    transposed = lambda row: [row[j * (len(row) // k) + i] for i in range(len(row) // k) for j in range(k)]  # noqa: E731
    return f(**map_rows(a, "weights", transposed))


def renormalised_targets(f: Oracle, a: Arguments, k: int) -> Loss:
    """Replace lp by lp − log Σ exp(lp) over the K targets of a position; the gradient stays."""

    def renormalised(row: Row) -> Row:
        p = [oracle.exp(lp) for lp in row]
        return [lp - math.log(sum(p[i // k * k : i // k * k + k]) or 1.0) for i, lp in enumerate(row)]

    return f(**map_rows(a, "logprobs", renormalised))


# Policy


def with_surrogate(value_and_slope: Callable[[float, float, tuple[float, float]], Term]) -> Callable[..., Term]:
    """Return a replacement of the oracle's ``surrogate``, made of (r, A, clip) → (value, slope in log r)."""

    def surrogate(d: float, advantage: float, clip: Any, dual: float | None, cap: float | None) -> Term:
        c, inside = oracle.capped(d, cap)
        value, slope = value_and_slope(oracle.exp(c), advantage, clip)
        if dual is not None and advantage < 0 and -dual * advantage < value:
            return -dual * advantage, 0.0
        return value, slope * inside

    return surrogate


def clamped(r: float, clip: tuple[float, float]) -> float:
    return min(max(r, clip[0]), clip[1])


def max_for_min(r: float, advantage: float, clip: tuple[float, float]) -> Term:
    gain, cut = r * advantage, clamped(r, clip) * advantage
    return (-cut, 0.0) if cut > gain else (-gain, -gain)


def clipped_alone(r: float, advantage: float, clip: tuple[float, float]) -> Term:
    return -clamped(r, clip) * advantage, -r * advantage if clip[0] <= r <= clip[1] else 0.0


def leaking_gradient(r: float, advantage: float, clip: tuple[float, float]) -> Term:
    return -min(r * advantage, clamped(r, clip) * advantage), -r * advantage


def of_log_ratio(r: float, advantage: float, clip: tuple[float, float]) -> Term:
    return -math.log(r) * advantage if r else 0.0, -advantage


def with_limited_weight(weight_and_slope: Callable[[float, float, tuple[float, float]], Term]) -> Callable[..., Term]:
    """Return a replacement of the oracle's ``limited``, made of (r, A, clip) → (w, dw / d log r)."""

    def limited(d: float, lp: float, advantage: float, clip: Any, cap: float | None) -> Term:
        c, inside = oracle.capped(d, cap)
        weight, slope = weight_and_slope(oracle.exp(c), advantage, clip)
        return -weight * advantage * lp, -weight * advantage - slope * inside * advantage * lp

    return limited


def undetached_weight(r: float, advantage: float, clip: tuple[float, float]) -> Term:
    """The clamped weight, with gradient."""
    return clamped(r, clip), r if clip[0] < r < clip[1] else 0.0


def dropped_outside(r: float, advantage: float, clip: tuple[float, float]) -> Term:
    return (r if clip[0] <= r <= clip[1] else 0.0), 0.0


def dropped_where_cut(r: float, advantage: float, clip: tuple[float, float]) -> Term:
    """The clamped weight, 0 where PPO's min removes the gradient."""
    cut = (r > clip[1] and advantage > 0) or (r < clip[0] and advantage < 0)
    return (0.0 if cut else clamped(r, clip)), 0.0


def squared_limit(d: float, advantage: float, clip: Any, cap: float | None) -> Term:
    """−sg(clamp(r))·r·A in place of −sg(clamp(r))·A·lp."""
    r = oracle.exp(oracle.capped(d, cap)[0])
    return squared_ratio(r, advantage, clip)


def dual_clip_on_positive(f: Oracle, a: Arguments) -> Loss:
    original = oracle.surrogate

    def surrogate(d: float, advantage: float, clip: Any, dual: float | None, cap: float | None) -> Term:
        value, slope = original(d, advantage, clip, dual, cap)
        return (-dual * advantage, 0.0) if dual is not None and -dual * advantage < value else (value, slope)

    return patched(surrogate=surrogate)(f, a)


def ratio_inverted(f: Oracle, a: Arguments) -> Loss:
    surrogate_, limited_ = oracle.surrogate, oracle.limited

    def surrogate(d: float, *others: Any) -> Term:
        value, slope = surrogate_(-d, *others)
        return value, -slope

    return patched(surrogate=surrogate, limited=lambda d, *others: limited_(-d, *others))(f, a)


def ratio_product(f: Oracle, a: Arguments) -> Loss:
    def scaled(rows: Rows) -> Rows:
        return [[sum(w) * x for x in row] for w, row in zip(a["weights"], rows)]

    def summed(weights: Rows, values: Rows) -> Rows:
        return scaled(averaged(weights, values))

    def through_sum(weights: Rows, slopes: Rows) -> Rows:
        return scaled(through_mean_(weights, slopes))

    through_mean_ = oracle.through_mean
    return patched(averaged=summed, through_mean=through_sum)(f, a) if f in SEQUENCE_RATIO else f(**a)


def ratio_sum(f: Oracle, a: Arguments) -> Loss:
    """log s is the log of the mean ratio. Its slope in one log-ratio is that ratio divided by the sum of the ratios."""
    if f not in SEQUENCE_RATIO:
        return f(**a)
    d = oracle.difference(a["weights"], a["logprobs"], a["old_logprobs"])
    r = [[oracle.exp(x) for x in row] for row in d]
    means = [[math.log(x) if x else 0.0 for x in row] for row in averaged(a["weights"], r)]
    value, slopes = patched(averaged=lambda weights, values: means)(oracle.gspo_token, a)
    if f is oracle.gspo:
        parts = [[w * x if w != 0 else 0.0 for w, x in zip(*rows)] for rows in zip(a["weights"], r)]
        slopes = [[total(row) * x for x in part] for row, part in zip(slopes, normalized(parts))]
    return value, slopes


def missing_stop_gradient(f: Oracle, a: Arguments) -> Loss:
    """Leave the factor in the graph that should be constant.

    This is the limited weight of cispo, or s in sₜ = s · exp(lp − sg lp) of gspo_token: it adds the gradient of gspo.
    """
    value, grads = patched(limited=with_limited_weight(undetached_weight))(f, a)
    return (value, add_losses((0.0, grads), oracle.gspo(**a))[1]) if f is oracle.gspo_token else (value, grads)


def squared_bounds(a: Arguments) -> tuple[float, float]:
    """Return the squares of the bounds of the ratio."""
    low, high = a["clip"]
    return low * low, high * high


def exponential_cap(a: Arguments) -> float | None:
    """Return the cap of the correction as it acts if it limits the logarithm."""
    return None if a["tis_cap"] is None else math.exp(a["tis_cap"])


def tis_inverted(f: Oracle, a: Arguments) -> Loss:
    original = oracle.truncation
    swapped = lambda weights, old, sampler, cap, level: original(weights, sampler, old, cap, level)  # noqa: E731
    return patched(truncation=swapped)(f, a) if a["tis_cap"] is not None else f(**a)


def exp_overflow(f: Oracle, a: Arguments) -> Loss:
    """Use no cap on the log-ratio, and the exp of float32."""
    exp32 = lambda x: math.inf if x > 88.7 else math.exp(x)  # noqa: E731 (in float32 exp overflows above 88.7)
    return patched(exp=exp32, capped=lambda x, cap: (x, 1.0))(f, a)


# Penalty


def without_ratio_in_slope(r: float, advantage: float, clip: tuple[float, float]) -> Term:
    """The value of PPO; the slope leaves out the ratio."""
    gain, cut = r * advantage, clamped(r, clip) * advantage
    return (-cut, 0.0) if cut < gain else (-gain, -advantage)


def squared_ratio(r: float, advantage: float, clip: tuple[float, float]) -> Term:
    """−sg(clip(r))·r·A: the detached weight times the ratio."""
    weight = clamped(r, clip)
    return -weight * r * advantage, -weight * r * advantage


def changing_dro(change: Callable[[Arguments], Arguments]) -> Variant:
    """Return the variant that changes the arguments of dro. It leaves every other loss as it is."""
    return lambda f, a: f(**change(a)) if f is oracle.dro else f(**a)


def without_zero_advantages(a: Arguments) -> Arguments:
    """Set the old logprobs to the policy's where A = 0, so that the penalty is 0 there."""
    rows = zip(a["advantages"], a["logprobs"], a["old_logprobs"])
    return a | {"old_logprobs": [[y if x != 0 else lp for x, lp, y in zip(*row)] for row in rows]}


def detached_term(f: Oracle, a: Arguments) -> Loss:
    return f(**a)[0], changing_dro(lambda a: a | {"beta": 0.0})(f, override(a, lam=0.0))[1]


# KL


def policy_part(f: Oracle, a: Arguments) -> Loss:
    """The loss without its KL term."""
    return f(**override(a, kl_beta=0.0))


def kl_part(a: Arguments, factor: Callable[[int, int], float] = lambda i, t: 1.0) -> Loss:
    """The KL term alone, with a factor for each token. Raise KeyError if the loss has no KL term."""
    beta, x = a["kl_beta"], oracle.difference(a["weights"], a["ref_logprobs"], a["logprobs"])

    def term(i: int, t: int) -> Term:
        value, slope = oracle.divergence(x[i][t], a["kl"])
        return factor(i, t) * value, factor(i, t) * slope

    return scale_loss(oracle.reduce(term, a["weights"], a["weigh"], a.get("length"), a["denominator"]), beta)


def is_clipped(r: float, advantage: float, clip: tuple[float, float]) -> bool:
    """Return whether clipping removes the gradient of a token."""
    return r > clip[1] if advantage > 0 else r < clip[0]


def kl_dropped_at_clip(f: Oracle, a: Arguments) -> Loss:
    d = oracle.difference(a["weights"], a["logprobs"], a["old_logprobs"])

    def kept(i: int, t: int) -> float:
        return float(not is_clipped(oracle.exp(d[i][t]), a["advantages"][i][t], a["clip"]))

    return add_losses(policy_part(f, a), kl_part(a, kept))


def kl_scaled_by_ratio(f: Oracle, a: Arguments) -> Loss:
    d = oracle.difference(a["weights"], a["logprobs"], a["old_logprobs"])
    return add_losses(policy_part(f, a), kl_part(a, lambda i, t: oracle.exp(oracle.capped(d[i][t], 20.0)[0])))


def kl_inverted(f: Oracle, a: Arguments) -> Loss:
    """Take the estimator of −x; its slope is that of its value."""
    original = oracle.divergence

    def divergence(x: float, kl: str) -> Term:
        value, slope = original(-x, kl)
        return value, -slope

    return patched(divergence=divergence)(f, a)


# Preference


def chosen_masks(f: Oracle, a: Arguments) -> Loss:
    """Use the mask of the chosen side for both sides if their lengths are equal."""
    w = a["weights"]
    return f(**a | {"weights": [w[i - i % 2] if len(w[i - i % 2]) == len(w[i]) else w[i] for i in range(len(w))]})


def halves_order(count: int) -> list[int]:
    """Return the order that pairs datum i of the first half with datum i of the second half."""
    return [i for pair in zip(range(count // 2), range(count // 2, count)) for i in pair]


def side_detached(f: Oracle, a: Arguments) -> Loss:
    value, grads = f(**a)
    return value, [[g * (i % 2 == 0) for g in row] for i, row in enumerate(grads)]


def log_of_sigmoid(f: Oracle, a: Arguments) -> Loss:
    """Compute softplus(x) as −log σ(−x). Where σ underflows to 0 the gradient is 0/0."""

    def naive(x: float) -> float:
        s = 1 / (1 + oracle.exp(x))
        return -math.log(s) if s else math.inf

    value, grads = patched(softplus=naive)(f, a)
    return (value, grads) if math.isfinite(value) else (value, scale_loss((0.0, grads), NAN)[1])


def log_odds_nan(mean: float) -> Term:
    """The log-odds with log(1 − exp(a)) in float32."""
    p = oracle.exp(mean)
    q = struct.unpack("f", struct.pack("f", 1.0 - struct.unpack("f", struct.pack("f", p))[0]))[0]
    return (mean - math.log(q), 1 + p / q) if q > 0 else (NAN, NAN)


def log_odds_biased(mean: float) -> Term:
    p = oracle.exp(mean)
    q = 1.0001 - p
    return mean - math.log(q), 1 + p / q


# Output


def bfloat16(x: float) -> float:
    """Round to eight binary digits; keep infinities and nan."""
    fraction, exponent = math.frexp(x)
    return math.ldexp(round(fraction * 256), exponent - 8) if math.isfinite(x) else x


def low_precision(f: Oracle, a: Arguments) -> Loss:
    """Round each term and its slopes to bfloat16."""
    reduce_, reduce_pairs_ = oracle.reduce, oracle.reduce_pairs

    def rounded(term: Callable[..., tuple[float, ...]]) -> Callable[..., Any]:
        return lambda *at: tuple(map(bfloat16, term(*at)))

    return patched(
        reduce=lambda term, *others: reduce_(rounded(term), *others),
        reduce_pairs=lambda term, *others: reduce_pairs_(rounded(term), *others),
    )(f, a)


AT_THE_DOOR = ("weigh", "length", "denominator", "targets")
"""The arguments of the oracle that are no settings of a loss's terms."""


def at_defaults(f: Oracle, a: Arguments) -> Loss:
    """Use the oracle's default for every setting except the weighing and the lower bound."""
    bare = {name: x for name, x in a.items() if isinstance(x, list) or name in AT_THE_DOOR}
    high = {"clip": (a["clip"][0], signature(f).parameters["clip"].default[1])} if "clip" in a else {}
    return f(**bare | high)


def probabilities(f: Oracle, a: Arguments) -> Loss:
    """Use the term −p instead of −lp."""
    term = lambda i, t: (-oracle.exp(a["logprobs"][i][t]), -oracle.exp(a["logprobs"][i][t]))  # noqa: E731
    return oracle.reduce(term, a["weights"], a["weigh"], a.get("length"), a["denominator"])


GENERAL_BUGS: dict[str, Variant] = {
    "low-precision": low_precision,
    "detached-term": detached_term,
    "mask-after-exp": mask_after_exp,
    "where-after-exp": where_after_exp,
    "mask-missing": lambda f, a: f(**unmasked(a)),
    "kl-unmasked": lambda f, a: add_losses(policy_part(f, a), kl_part(unmasked(a))),
    "padding-in-denominator": padding_in_denominator,
    "padding-in-sequence-ratio": padding_in_sequence_ratio,
    "empty-sequence-nan": empty_sequence_nan,
    "empty-sequence-counted": empty_sequence_counted,
    "gradient-missing": gradient_missing,
    "weights-squared": lambda f, a: f(**map_rows(fix_denominator(a), "weights", lambda row: [w * w for w in row])),
    "weights-binarised": changing_rows("weights", lambda row: [float(w != 0) for w in row]),
    "mean-of-means": mean_of_means,
    "mixed-denominators": mixed_denominators,
    "divided-twice": lambda f, a: scale_loss(f(**a), 1 / max(len(unit_indices(a)), 1)),
    "constant-factor": lambda f, a: scale_loss(f(**a), 1 / 4),
    "epsilon-in-denominator": lambda f, a: f(**a | {"denominator": divisor(a) + 1}),
    "broadcast": broadcast,
    "cross-talk": cross_talk,
    "zero-advantage-denominator": zero_advantage_denominator,
    "frame-shift": frame_shift,
    "target-dropped": changing_rows("weights", lambda row: [*row[:-1], 0.0][: len(row)]),
    "datum-misaligned": datum_misaligned,
    "datum-ignored": datum_ignored,
    "order-dependent": order_dependent,
    "sign-flipped": lambda f, a: scale_loss(f(**a), -1),
    "advantage-sign-lost": changing_rows("advantages", lambda row: list(map(abs, row))),
    "advantage-size-lost": changing_rows("advantages", lambda row: [math.copysign(min(abs(x), 1.0), x) for x in row]),
    "advantage-inert": changing_rows("advantages", lambda row: [1.0] * len(row)),
    "advantages-pooled": lambda f, a: f(**a | {"advantages": averaged(a["weights"], a["advantages"])}),
    "missing-stop-gradient": missing_stop_gradient,
    "no-gradient": lambda f, a: scale_loss(f(**a), 1, 0),
    "old-logprobs-inert": lambda f, a: f(**override(a, old_logprobs=a["logprobs"])),
    "ratio-inverted": ratio_inverted,
    "ratio-not-exponentiated": patched(surrogate=with_surrogate(of_log_ratio)),
    "ratio-squared": patched(
        surrogate=with_surrogate(squared_ratio), limited=lambda d, lp, *others: squared_limit(d, *others)
    ),
    "ratio-without-gradient": patched(surrogate=with_surrogate(without_ratio_in_slope)),
    "ratio-product": ratio_product,
    "ratio-sum": ratio_sum,
    "clip-max-for-min": patched(surrogate=with_surrogate(max_for_min)),
    "clip-without-min": patched(surrogate=with_surrogate(clipped_alone), limited=with_limited_weight(dropped_outside)),
    "clip-drops-tokens": patched(limited=with_limited_weight(dropped_where_cut)),
    "clip-as-epsilon": changing_setting("clip", lambda clip: (1 - clip[0], 1 + clip[1])),
    "bounds-exchanged": changing_setting("clip", lambda clip: (max(2 - clip[1], 0.0), 2 - clip[0])),
    "bound-elsewhere": lambda f, a: f(**a | {"clip": squared_bounds(a), "tis_cap": exponential_cap(a)}),
    "clip-inert": changing_setting("clip", lambda clip: (0.0, math.inf)),
    "clip-gradient-leaks": patched(surrogate=with_surrogate(leaking_gradient)),
    "dual-clip-on-positive": dual_clip_on_positive,
    "dual-clip-below-one": changing_setting("dual_clip", lambda c: 0.5),
    "tis-inverted": tis_inverted,
    "tis-uncapped": changing_setting("tis_cap", lambda cap: math.inf),
    "tis-inert": changing_setting("tis_cap", lambda cap: None),
    "exp-overflow": exp_overflow,
    "penalty-sign": changing_dro(lambda a: a | {"beta": -a["beta"]}),
    "half-missing": changing_dro(lambda a: a | {"beta": 2 * a["beta"]}),
    "penalty-gated": changing_dro(without_zero_advantages),
    "k1-in-loss": changing_setting("kl", lambda kl: "k1"),
    "kl-sign": lambda f, a: add_losses(policy_part(f, a), scale_loss(kl_part(a), -1)),
    "kl-inverted": kl_inverted,
    "kl-dropped-at-clip": kl_dropped_at_clip,
    "kl-scaled-by-ratio": kl_scaled_by_ratio,
    "kl-beta-twice": changing_setting("kl_beta", lambda beta: beta * beta),
    "kl-detached": lambda f, a: add_losses(policy_part(f, a), scale_loss(kl_part(a), 1, 0)),
    "kl-scaled-by-advantage": lambda f, a: add_losses(
        policy_part(f, a), kl_part(a, lambda i, t: a["advantages"][i][t])
    ),
    "ref-inert": lambda f, a: f(**override(a, ref_logprobs=a["logprobs"])),
    "setting-misplaced": lambda f, a: add_losses(scale_loss(policy_part(f, a), 1 - a["kl_beta"]), kl_part(a)),
    "inert-knob": at_defaults,
}
"""Bugs that losses of several kinds can have."""

LIKELIHOOD_BUGS: dict[str, Variant] = {
    "negative-weights-lost": lambda f, a: f(
        **map_rows(fix_denominator(a), "weights", lambda row: [max(w, 0.0) for w in row])
    ),
    "not-likelihood": probabilities,
}
"""Bugs of losses that read no columns but the weights."""

MULTI_TARGET_BUGS: dict[str, Callable[[Oracle, Arguments, int], Loss]] = {
    "frame-shift": lambda f, a, k: f(**map_rows(a, "weights", lambda row: row[-k:] + row[:-k])),
    "target-dropped": lambda f, a, k: f(**map_rows(a, "weights", lambda row: [*row[:-k], *[0.0] * k][: len(row)])),
    "targets-transposed": targets_transposed,
    "renormalised-targets": renormalised_targets,
}
"""Bugs of losses with K targets. A position is K entries of a row."""

PAIR_BUGS: dict[str, Variant] = {
    "pair-masks-swapped": chosen_masks,
    "sides-swapped": reordered(lambda count: [i ^ 1 for i in range(count)]),
    "pair-layout": reordered(halves_order),
    "reference-misused": changing_rows("ref_logprobs", lambda row: [-x for x in row]),
    "side-detached": side_detached,
    "mean-logprob-margin": lambda f, a: f(**a | {"weights": normalized(a["weights"])}),
    "pairs-miscounted": lambda f, a: scale_loss(f(**a), 0.5) if a["weigh"] == "pair_mean" else f(**a),
    "log-of-sigmoid": log_of_sigmoid,
    "log-odds-nan": patched(log_odds=log_odds_nan),
    "log-odds-biased": patched(log_odds=log_odds_biased),
}
"""Bugs of losses over pairs."""


# Advantages


def standardised(
    rewards: Row,
    groups: list[Any],
    scale: str,
    *,
    centre: bool = True,
    variance_divisor: Callable[[int], int] = lambda n: n - 1,
    eps: float = 1e-6,
    zero_if_constant: bool = True,
) -> Row:
    """Compute group advantages. The defaults give the right ones; a bug changes one of the keyword arguments."""
    peers = {group: [r for r, other in zip(rewards, groups) if other == group] for group in groups}

    def advantage(reward: float, others: Row) -> float:
        if zero_if_constant and min(others) == max(others):
            return 0.0
        mean = sum(others) / len(others)
        numerator = reward - mean if centre else reward
        if scale == "none":
            return numerator
        n = variance_divisor(len(others))
        if n == 0:
            return NAN
        return numerator / (math.sqrt(sum((r - mean) ** 2 for r in others) / n) + eps or NAN)

    return [advantage(reward, peers[group]) for reward, group in zip(rewards, groups)]


def by_position(groups: list[Any]) -> list[Any]:
    """Return group ids that split the samples, in order, into runs of equal length."""
    size = -(-len(groups) // len(set(groups)))
    return [i // size for i in range(len(groups))]


ADVANTAGE_BUGS: dict[str, Callable[..., Row]] = {
    "std-over-n": lambda rewards, groups, scale: standardised(rewards, groups, scale, variance_divisor=lambda n: n),
    "constant-group-noise": lambda rewards, groups, scale: standardised(
        rewards, groups, scale, eps=0.0, zero_if_constant=len(rewards) == 1
    ),
    "group-of-one-nan": lambda rewards, groups, scale: [
        NAN if scale == "std" and groups.count(group) == 1 else x
        for x, group in zip(standardised(rewards, groups, scale), groups)
    ],
    "groups-by-position": lambda rewards, groups, scale: standardised(rewards, by_position(groups), scale),
    "groups-ignored": lambda rewards, groups, scale: standardised(rewards, [0] * len(groups), scale),
    "not-centred": lambda rewards, groups, scale: standardised(
        rewards, groups, scale, centre=False, zero_if_constant=scale == "std"
    ),
    "order-lost": lambda rewards, groups, scale: list(map(abs, standardised(rewards, groups, scale))),
    "inert-knob": lambda rewards, groups, scale: standardised(rewards, groups, "std"),
}
"""Bugs of group advantages, ``(rewards, groups, scale) -> advantages``."""

ESTIMATOR_BUGS: dict[str, Callable[[Arguments], Arguments]] = {
    "std-over-n": lambda a: a | {"ddof": 0},
    "group-of-one-rewarded": lambda a: a | {"group_of_one": "reward"},
    "groups-by-position": lambda a: a | {"groups": by_position(a.get("groups", [0]))},
    "groups-ignored": lambda a: a | {"groups": [0] * len(a["rewards"])},
}
"""Bugs of the other estimators that replace an argument."""


def wrong_advantages(bug: str, loss: str, a: Arguments) -> Any:
    """Return what an estimator with the bug returns, or None if it cannot have the bug."""
    if loss == "group_advantages":
        return ADVANTAGE_BUGS[bug](**a) if bug in ADVANTAGE_BUGS else None
    estimator = getattr(oracle, loss)
    if bug == "not-centred":
        return [total(r) if isinstance(r, list) else r for r in known(a["rewards"])]
    if bug == "order-lost":
        result = estimator(**a)
        return list(map(abs, result[0] if isinstance(result, tuple) else result))
    changed = ESTIMATOR_BUGS[bug](a) if bug in ESTIMATOR_BUGS else {}
    try:
        return estimator(**changed) if changed.keys() == a.keys() else None
    except (ArithmeticError, ValueError):
        return None


def known(rewards: list[Any]) -> list[Any]:
    """Return rewards with 0 in place of those that are missing."""
    return [[x or 0.0 for x in r] if isinstance(r, list) else r or 0.0 for r in rewards]
