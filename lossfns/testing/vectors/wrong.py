"""Wrong answers: for each bug the oracle with its input, its output or one of its functions replaced.

They prove the flags (a vector carries a flag only if the bug gives another answer there) and name a bug from a
reply (a reply that equals a wrong answer has that bug). A variant gives the right answer where its bug does not show.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from lossfns.testing import oracle
from lossfns.testing.batch import Row, Rows
from lossfns.testing.oracle import Loss, Term, active, averaged, normalized, total
from lossfns.testing.vectors.right import Arguments, Oracle, arguments, divisor, grouping, shaped
from lossfns.testing.vectors.vector import Answer, Vector, mistake, targets

Wrong = Callable[[Oracle, Arguments], Loss]
NAN = math.nan


def wrong(bug: str, vector: Vector) -> Answer:
    """What a loss with this bug would answer; the right answer if the loss lacks the column or setting it is about."""
    if vector.loss == "group_advantages":
        return {"advantages": ADVANTAGES[bug](**grouping(vector.config, vector.data))}
    f, a = getattr(oracle, vector.loss), arguments(vector.config, vector.data, vector.denominator)
    try:
        answer = TARGETS[bug](f, a, targets(vector.data) or 1) if bug in TARGETS else WRONG[bug](f, a)
    except KeyError:
        return vector.answer
    except (ArithmeticError, ValueError):  # where math raises, arrays hold inf and nan
        answer = scaled((0.0, a["weights"]), NAN)
    return shaped(answer, vector.data)


def shows(bug: str, vector: Vector) -> bool:
    """Whether the bug fails the vector, by more than ten times the tolerance of float32."""
    coarse = {dtype: [10 * x for x in vector.tol["float32"]] for dtype in vector.tol}
    return mistake(replace(vector, tol=coarse), wrong(bug, vector), "float32") != ""


def explains(bug: str, vector: Vector, reply: Mapping[str, Any], dtype: str) -> bool:
    """Whether a reply is the answer of a loss with this bug."""
    return vector.error is None and not mistake(vector.having(wrong(bug, vector)), reply, dtype)


# Tools


@contextmanager
def replaced(**functions: Callable[..., Any]) -> Iterator[None]:
    """The oracle with some of its functions replaced."""
    before = {name: getattr(oracle, name) for name in functions}
    try:
        vars(oracle).update(functions)
        yield
    finally:
        vars(oracle).update(before)


def patched(**functions: Callable[..., Any]) -> Wrong:
    def variant(f: Oracle, a: Arguments) -> Loss:
        with replaced(**functions):
            return f(**a)

    return variant


def scaled(answer: Loss, by: float, grads_by: float | None = None) -> Loss:
    value, grads = answer
    k = by if grads_by is None else grads_by
    return by * value, [[k * g for g in row] for row in grads]


def plus(one: Loss, other: Loss) -> Loss:
    return one[0] + other[0], [[g + h for g, h in zip(*rows)] for rows in zip(one[1], other[1])]


def given(a: Arguments, **changes: Any) -> Arguments:
    """The arguments with changed ones, as far as the loss has them."""
    return a | {name: value for name, value in changes.items() if name in a}


def each(a: Arguments, name: str, change: Callable[[Row], Row]) -> Arguments:
    """A change to each row of one column, where there is one."""
    return a | {name: [change(row) for row in a[name]]} if name in a else a


def kept(a: Arguments) -> Arguments:
    """The right denominator, said outright, before weights change."""
    return a | {"denominator": divisor(a)}


def first(a: Arguments, *names: str) -> str:
    """The first of these columns that the loss reads."""
    return next(name for name in (*names, "weights") if name in a)


def whole(rows: Rows) -> Rows:
    """Weights with every masked slot let in."""
    return [[w or 1.0 for w in row] for row in rows]


# Masks


def every_slot(weights: Row) -> list[int]:
    return list(range(len(weights))) if any(weights) else []


def difference_everywhere(weights: Rows, left: Rows, right: Rows) -> Rows:
    return [[x - y for x, y in zip(*rows)] for rows in zip(left, right)]


def averaged_by_product(weights: Rows, values: Rows) -> Rows:
    """Σ m·x / Σ m with the mask as a factor: 0·nan is nan."""
    rows = []
    for w, xs in zip(weights, values):
        mean = sum((u != 0) * x for u, x in zip(w, xs)) / max(len(active(w)), 1)
        rows.append([mean] * len(w))
    return rows


mask_after_exp = patched(active=every_slot, difference=difference_everywhere, averaged=averaged_by_product)


def where_after_exp(f: Oracle, a: Arguments) -> Loss:
    return f(**a)[0], mask_after_exp(f, a)[1]


def mask_missing(f: Oracle, a: Arguments) -> Loss:
    return f(**kept(a) | {"weights": whole(a["weights"])})


def kl_unmasked(f: Oracle, a: Arguments) -> Loss:
    return plus(policy_part(f, a), kl_part(kept(a) | {"weights": whole(a["weights"])}))


def padding_in_denominator(f: Oracle, a: Arguments) -> Loss:
    slots = float(sum(map(len, a["weights"])))
    with replaced(normalized=lambda weights: [[w / len(row) for w in row] for row in weights]):
        return f(**a | ({"denominator": slots} if a["weigh"] == "token_mean" else {}))


def padding_in_sequence_ratio(f: Oracle, a: Arguments) -> Loss:
    def mean_of_all(weights: Rows, values: Rows) -> Rows:
        return [[sum(row) / max(len(row), 1)] * len(row) for row in values]

    with replaced(averaged=mean_of_all, difference=difference_everywhere):
        return f(**a)


def empty_sequence_nan(f: Oracle, a: Arguments) -> Loss:
    divides = a["weigh"] == "sequence_mean" or f in (oracle.gspo, oracle.gspo_token, oracle.orpo)
    return scaled(f(**a), NAN) if divides and not all(map(any, a["weights"])) else f(**a)


def empty_sequence_counted(f: Oracle, a: Arguments) -> Loss:
    count = len(a["weights"]) / (2 if a["weigh"] in oracle.PAIR_WEIGHINGS else 1)
    by = {"fixed_length": count * (a.get("length") or 1), "token_mean": divisor(a)}.get(a["weigh"], count)
    return f(**a | {"denominator": by})


def gradient_missing(f: Oracle, a: Arguments) -> Loss:
    """A gradient that is None is no number."""
    value, grads = f(**a)
    return value, [row if any(w) else [NAN] * len(row) for row, w in zip(grads, a["weights"])]


def weights_squared(f: Oracle, a: Arguments) -> Loss:
    return f(**each(kept(a), "weights", lambda row: [w * w for w in row]))


# Normalisation


def mean_of_means(f: Oracle, a: Arguments) -> Loss:
    """Each datum (or pair) by its own denominator, then the plain mean; of a chunk, its own denominator."""
    if a["denominator"] is not None:
        return f(**a | {"denominator": None})
    step = 2 if a["weigh"] in oracle.PAIR_WEIGHINGS else 1
    chunks = [
        {name: x[i : i + step] if isinstance(x, list) else x for name, x in a.items()}
        for i in range(0, len(a["weights"]), step)
    ]
    parts = [f(**chunk) for chunk in chunks]
    count = sum(1 for chunk in chunks if any(map(any, chunk["weights"]))) or 1
    by = 1.0 if a["weigh"].endswith("_sum") else float(count)
    return sum(value for value, _ in parts) / by, [[g / by for g in row] for _, grads in parts for row in grads]


def mixed_denominators(f: Oracle, a: Arguments) -> Loss:
    other = "sequence_mean" if a["weigh"] == "token_mean" else "token_mean"
    return plus(policy_part(f, a), kl_part(a | {"weigh": other}))


def zero_advantage_denominator(f: Oracle, a: Arguments) -> Loss:
    felt = [[w if x != 0 else 0.0 for w, x in zip(*rows)] for rows in zip(a["weights"], a["advantages"])]
    return f(**a | {"denominator": divisor(a | {"weights": felt})})


def broadcast(f: Oracle, a: Arguments) -> Loss:
    """The mean over all pairs of datums: each token meets every datum's advantage."""
    heads = [row[active(w)[0]] for row, w in zip(a["advantages"], a["weights"]) if any(w)]
    mean = sum(heads) / max(len(heads), 1)
    return f(**each(a, "advantages", lambda row: [mean] * len(row)))


def cross_talk(f: Oracle, a: Arguments) -> Loss:
    """Advantages whitened over the batch."""
    pool = [x for row, w in zip(a["advantages"], a["weights"]) for t, x in enumerate(row) if w[t] != 0]
    mean = sum(pool) / max(len(pool), 1)
    std = math.sqrt(sum((x - mean) ** 2 for x in pool) / max(len(pool) - 1, 1)) or 1.0
    return f(**each(a, "advantages", lambda row: [(x - mean) / std for x in row]))


# Frame


def frame_shift(f: Oracle, a: Arguments) -> Loss:
    return f(**each(a, first(a, "old_logprobs", "ref_logprobs", "advantages"), lambda row: row[-1:] + row[:-1]))


def datum_misaligned(f: Oracle, a: Arguments) -> Loss:
    """A column in the reverse order, where the lengths let that pass."""
    name = first(a, "advantages", "ref_logprobs")
    back = a[name][::-1]
    return f(**a | ({name: back} if list(map(len, back)) == list(map(len, a[name])) else {}))


def datum_ignored(f: Oracle, a: Arguments) -> Loss:
    last = -2 if a["weigh"] in oracle.PAIR_WEIGHINGS else -1
    rest = [[0.0] * len(row) for row in a["weights"][:last]]
    return f(**kept(a) | {"weights": rest + a["weights"][last:]})


def targets_transposed(f: Oracle, a: Arguments, k: int) -> Loss:
    """Weights [N, K] read as [K, N]."""
    transposed = lambda row: [row[j * (len(row) // k) + i] for i in range(len(row) // k) for j in range(k)]  # noqa: E731
    return f(**each(a, "weights", transposed))


def renormalised_targets(f: Oracle, a: Arguments, k: int) -> Loss:
    """lp − log Σ exp(lp) over the K of a position; the gradient is left as it is."""

    def renormalised(row: Row) -> Row:
        p = [oracle.exp(lp) for lp in row]
        return [lp - math.log(sum(p[i // k * k : i // k * k + k]) or 1.0) for i, lp in enumerate(row)]

    return f(**each(a, "logprobs", renormalised))


# Policy


def surrogate_of(value_and_slope: Callable[[float, float, tuple[float, float]], Term]) -> Callable[..., Term]:
    """Another clipped surrogate in the place of the oracle's: (r, A, clip) → (value, slope in log r)."""

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


def without_min(r: float, advantage: float, clip: tuple[float, float]) -> Term:
    return -clamped(r, clip) * advantage, -r * advantage if clip[0] <= r <= clip[1] else 0.0


def leaking(r: float, advantage: float, clip: tuple[float, float]) -> Term:
    return -min(r * advantage, clamped(r, clip) * advantage), -r * advantage


def limited_of(weight_and_slope: Callable[[float, float, tuple[float, float]], Term]) -> Callable[..., Term]:
    """Another weight in the place of cispo's: (r, A, clip) → (w, dw / d log r)."""

    def limited(d: float, lp: float, advantage: float, clip: Any, cap: float | None) -> Term:
        c, inside = oracle.capped(d, cap)
        weight, slope = weight_and_slope(oracle.exp(c), advantage, clip)
        return -weight * advantage * lp, -weight * advantage - slope * inside * advantage * lp

    return limited


def moving(r: float, advantage: float, clip: tuple[float, float]) -> Term:
    """A weight that carries gradient."""
    return clamped(r, clip), r if clip[0] < r < clip[1] else 0.0


def dropped_outside(r: float, advantage: float, clip: tuple[float, float]) -> Term:
    return (r if clip[0] <= r <= clip[1] else 0.0), 0.0


def dropped_where_cut(r: float, advantage: float, clip: tuple[float, float]) -> Term:
    """0 where PPO's min cuts."""
    cut = (r > clip[1] and advantage > 0) or (r < clip[0] and advantage < 0)
    return (0.0 if cut else clamped(r, clip)), 0.0


def of_log_ratio(r: float, advantage: float, clip: tuple[float, float]) -> Term:
    return -math.log(r) * advantage if r else 0.0, -advantage


def dual_clip_on_positive(f: Oracle, a: Arguments) -> Loss:
    right_one = oracle.surrogate

    def surrogate(d: float, advantage: float, clip: Any, dual: float | None, cap: float | None) -> Term:
        value, slope = right_one(d, advantage, clip, dual, cap)
        return (-dual * advantage, 0.0) if dual is not None and -dual * advantage < value else (value, slope)

    return patched(surrogate=surrogate)(f, a)


def ratio_inverted(f: Oracle, a: Arguments) -> Loss:
    surrogate_, limited_ = oracle.surrogate, oracle.limited

    def surrogate(d: float, *others: Any) -> Term:
        value, slope = surrogate_(-d, *others)
        return value, -slope

    return patched(surrogate=surrogate, limited=lambda d, *others: limited_(-d, *others))(f, a)


def ratio_product(f: Oracle, a: Arguments) -> Loss:
    def summed(weights: Rows, values: Rows) -> Rows:
        return [[n * x for x in row] for n, row in zip(map(len, map(active, weights)), averaged(weights, values))]

    return patched(averaged=summed)(f, a) if f in (oracle.gspo, oracle.gspo_token) else f(**a)


def ratio_sum(f: Oracle, a: Arguments) -> Loss:
    """log s = log of the mean ratio; its slope in one log-ratio is that ratio's part of their sum."""
    if f not in (oracle.gspo, oracle.gspo_token):
        return f(**a)
    d = oracle.difference(a["weights"], a["logprobs"], a["old_logprobs"])
    r = [[oracle.exp(x) for x in row] for row in d]
    means = [[math.log(x) if x else 0.0 for x in row] for row in averaged(a["weights"], r)]
    value, slopes = patched(averaged=lambda weights, values: means)(oracle.gspo_token, a)
    if f is oracle.gspo:
        sums = [total(row) for row in slopes]
        slopes = [[s * x for x in row] for s, row in zip(sums, normalized(masked(a["weights"], r)))]
    return value, slopes


def masked(weights: Rows, rows: Rows) -> Rows:
    return [[x if w != 0 else 0.0 for w, x in zip(*pair)] for pair in zip(weights, rows)]


def missing_stop_gradient(f: Oracle, a: Arguments) -> Loss:
    """sₜ = s · exp(lp − sg lp) with s left in the graph: both gradients. A weight of cispo that is left in it."""
    value, grads = patched(limited=limited_of(moving))(f, a)
    return (value, plus((0.0, grads), oracle.gspo(**a))[1]) if f is oracle.gspo_token else (value, grads)


def tis_inverted(f: Oracle, a: Arguments) -> Loss:
    right_one = oracle.truncation
    swapped = lambda weights, old, sampler, cap, level: right_one(weights, sampler, old, cap, level)  # noqa: E731
    return patched(truncation=swapped)(f, a) if a.get("tis_cap") is not None else f(**a)


def exp_overflow(f: Oracle, a: Arguments) -> Loss:
    """No cap on the log-ratio, and float32's exp."""
    exp32 = lambda x: math.inf if x > 88.7 else math.exp(x)  # noqa: E731
    return patched(exp=exp32, capped=lambda x, cap: (x, 1.0))(f, a)


# Penalty


def of_dro(change: Callable[[Arguments], Arguments]) -> Wrong:
    """A change to what dro is given; every other loss is right."""
    return lambda f, a: f(**change(a)) if f is oracle.dro else f(**a)


def without_penalty(a: Arguments) -> Arguments:
    return a | {"beta": 0.0}


def gated(a: Arguments) -> Arguments:
    """No way from the old policy where A = 0."""
    rows = zip(a["advantages"], a["logprobs"], a["old_logprobs"])
    return a | {"old_logprobs": [[y if x != 0 else lp for x, lp, y in zip(*row)] for row in rows]}


def detached_term(f: Oracle, a: Arguments) -> Loss:
    return f(**a)[0], of_dro(without_penalty)(f, given(a, lam=0.0))[1]


# KL


def policy_part(f: Oracle, a: Arguments) -> Loss:
    return f(**given(a, kl_beta=0.0))


def kl_part(a: Arguments, factor: Callable[[int, int], float] = lambda i, t: 1.0) -> Loss:
    """β·KL alone, each token's times a factor; nothing where the loss has no KL."""
    if "kl_beta" not in a:
        return 0.0, [[0.0] * len(row) for row in a["weights"]]
    x = oracle.difference(a["weights"], a["ref_logprobs"], a["logprobs"])

    def term(i: int, t: int) -> Term:
        value, slope = oracle.divergence(x[i][t], a["kl"])
        return factor(i, t) * value, factor(i, t) * slope

    return scaled(oracle.reduce(term, a["weights"], a["weigh"], a.get("length"), a["denominator"]), a["kl_beta"])


# Preference


def rejected_as_chosen(rows: Rows) -> Rows:
    return [row for i in range(0, len(rows), 2) for row in (rows[i], rows[i] if fits(rows, i) else rows[i + 1])]


def fits(rows: Rows, i: int) -> bool:
    return len(rows[i]) == len(rows[i + 1])


def reordered(order: Callable[[int], list[int]]) -> Wrong:
    """Datums in another order, the gradients back in their own."""

    def variant(f: Oracle, a: Arguments) -> Loss:
        places = order(len(a["weights"]))
        value, grads = f(**{k: [x[i] for i in places] if isinstance(x, list) else x for k, x in a.items()})
        return value, [grads[places.index(i)] for i in range(len(places))]

    return variant


def halves(count: int) -> list[int]:
    return [i for pair in zip(range(count // 2), range(count // 2, count)) for i in pair]


def swapped(count: int) -> list[int]:
    return [i ^ 1 for i in range(count)]


def side_detached(f: Oracle, a: Arguments) -> Loss:
    value, grads = f(**a)
    return value, [[g * (i % 2 == 0) for g in row] for i, row in enumerate(grads)]


def pairs_miscounted(f: Oracle, a: Arguments) -> Loss:
    return scaled(f(**a), 0.5) if a["weigh"] == "pair_mean" else f(**a)


def log_of_sigmoid(f: Oracle, a: Arguments) -> Loss:
    """softplus(x) = −log σ(−x) with a σ that reaches 0; its gradient is then 0/0."""

    def naive(x: float) -> float:
        s = 1 / (1 + oracle.exp(x))
        return -math.log(s) if s else math.inf

    value, grads = patched(softplus=naive)(f, a)
    return (value, grads) if math.isfinite(value) else (value, scaled((0.0, grads), NAN)[1])


def log_odds_nan(mean: float) -> Term:
    """log(1 − exp(a)) as float32 sees it."""
    p = oracle.exp(mean)
    q = struct.unpack("f", struct.pack("f", 1.0 - struct.unpack("f", struct.pack("f", p))[0]))[0]
    return (mean - math.log(q), 1 + p / q) if q > 0 else (NAN, NAN)


def log_odds_biased(mean: float) -> Term:
    p = oracle.exp(mean)
    q = 1.0001 - p
    return mean - math.log(q), 1 + p / q


# Output


def bfloat16(x: float) -> float:
    """The upper half of a float32."""
    rounded: float = struct.unpack("<f", b"\0\0" + struct.pack("<f", x)[2:])[0]
    return rounded


def low_precision(f: Oracle, a: Arguments) -> Loss:
    value, grads = f(**a)
    return bfloat16(value), [[bfloat16(g) for g in row] for row in grads]


def at_defaults(f: Oracle, a: Arguments) -> Loss:
    """Every setting but the weighing at the oracle's default."""
    bare = {name: x for name, x in a.items() if isinstance(x, list) or name in ("weigh", "length", "denominator")}
    return f(**bare)


def probabilities(f: Oracle, a: Arguments) -> Loss:
    """−p in the place of −lp."""
    term = lambda i, t: (-oracle.exp(a["logprobs"][i][t]), -oracle.exp(a["logprobs"][i][t]))  # noqa: E731
    return oracle.reduce(term, a["weights"], a["weigh"], a.get("length"), a["denominator"])


WRONG: dict[str, Wrong] = {
    "low-precision": low_precision,
    "detached-term": detached_term,
    "mask-after-exp": mask_after_exp,
    "where-after-exp": where_after_exp,
    "mask-missing": mask_missing,
    "kl-unmasked": kl_unmasked,
    "padding-in-denominator": padding_in_denominator,
    "padding-in-sequence-ratio": padding_in_sequence_ratio,
    "empty-sequence-nan": empty_sequence_nan,
    "empty-sequence-counted": empty_sequence_counted,
    "gradient-missing": gradient_missing,
    "weights-squared": weights_squared,
    "weights-binarised": lambda f, a: f(**each(a, "weights", lambda row: [float(w != 0) for w in row])),
    "negative-weights-lost": lambda f, a: f(**each(kept(a), "weights", lambda row: [max(w, 0.0) for w in row])),
    "mean-of-means": mean_of_means,
    "mixed-denominators": mixed_denominators,
    "divided-twice": lambda f, a: scaled(f(**a), 1 / len(a["weights"])),
    "constant-factor": lambda f, a: scaled(f(**a), 1, 2),
    "epsilon-in-denominator": lambda f, a: f(**a | {"denominator": divisor(a) + 1}),
    "broadcast": broadcast,
    "cross-talk": cross_talk,
    "zero-advantage-denominator": zero_advantage_denominator,
    "frame-shift": frame_shift,
    "target-dropped": lambda f, a: f(**each(a, "weights", lambda row: [*row[:-1], 0.0][: len(row)])),
    "datum-misaligned": datum_misaligned,
    "datum-ignored": datum_ignored,
    "sign-flipped": lambda f, a: scaled(f(**a), -1),
    "advantage-sign-lost": lambda f, a: f(**each(a, "advantages", lambda row: list(map(abs, row)))),
    "advantage-inert": lambda f, a: f(**each(a, "advantages", lambda row: [1.0] * len(row))),
    "advantages-pooled": lambda f, a: f(**given(a, advantages=averaged(a["weights"], a["advantages"]))),
    "missing-stop-gradient": missing_stop_gradient,
    "no-gradient": lambda f, a: scaled(f(**a), 1, 0),
    "old-logprobs-inert": lambda f, a: f(**given(a, old_logprobs=a["logprobs"])),
    "ratio-inverted": ratio_inverted,
    "ratio-not-exponentiated": patched(surrogate=surrogate_of(of_log_ratio)),
    "ratio-product": ratio_product,
    "ratio-sum": ratio_sum,
    "clip-max-for-min": patched(surrogate=surrogate_of(max_for_min)),
    "clip-without-min": patched(surrogate=surrogate_of(without_min), limited=limited_of(dropped_outside)),
    "clip-drops-tokens": patched(limited=limited_of(dropped_where_cut)),
    "clip-as-epsilon": lambda f, a: f(**given(a, clip=(1 - a["clip"][0], 1 + a["clip"][1]))),
    "clip-inert": lambda f, a: f(**given(a, clip=(0.0, math.inf))),
    "clip-gradient-leaks": patched(surrogate=surrogate_of(leaking)),
    "penalty-sign": of_dro(lambda a: a | {"beta": -a["beta"]}),
    "half-missing": of_dro(lambda a: a | {"beta": 2 * a["beta"]}),
    "penalty-gated": of_dro(gated),
    "dual-clip-on-positive": dual_clip_on_positive,
    "tis-inverted": tis_inverted,
    "tis-uncapped": lambda f, a: f(**a | ({} if a["tis_cap"] is None else {"tis_cap": math.inf})),
    "tis-inert": lambda f, a: f(**a | {"tis_cap": None}),
    "exp-overflow": exp_overflow,
    "k1-in-loss": lambda f, a: f(**given(a, kl="k1")),
    "kl-sign": lambda f, a: plus(policy_part(f, a), scaled(kl_part(a), -1)),
    "kl-detached": lambda f, a: plus(policy_part(f, a), scaled(kl_part(a), 1, 0)),
    "kl-scaled-by-advantage": lambda f, a: plus(policy_part(f, a), kl_part(a, lambda i, t: a["advantages"][i][t])),
    "ref-inert": lambda f, a: f(**given(a, ref_logprobs=a["logprobs"])),
    "inert-knob": at_defaults,
    "not-likelihood": probabilities,
    "pair-masks-swapped": lambda f, a: f(**a | {"weights": rejected_as_chosen(a["weights"])}),
    "sides-swapped": reordered(swapped),
    "pair-layout": reordered(halves),
    "reference-misused": lambda f, a: f(**each(a, "ref_logprobs", lambda row: [-x for x in row])),
    "side-detached": side_detached,
    "mean-logprob-margin": lambda f, a: f(**a | {"weights": normalized(a["weights"])}),
    "pairs-miscounted": pairs_miscounted,
    "log-of-sigmoid": log_of_sigmoid,
    "log-odds-nan": patched(log_odds=log_odds_nan),
    "log-odds-biased": patched(log_odds=log_odds_biased),
}
"""Bug → the answer of a loss that has it."""

TARGETS: dict[str, Callable[[Oracle, Arguments, int], Loss]] = {
    "targets-transposed": targets_transposed,
    "renormalised-targets": renormalised_targets,
}
"""The same where the number of targets matters."""


# Advantages


def standardised(
    rewards: Row,
    groups: list[Any],
    scale: str,
    *,
    centre: bool = True,
    below: Callable[[int], int] = lambda n: n - 1,
    eps: float = 1e-6,
    constant: bool = True,
) -> Row:
    """Group advantages with the parts that go wrong as arguments."""
    peers = {group: [r for r, other in zip(rewards, groups) if other == group] for group in groups}

    def advantage(reward: float, others: Row) -> float:
        if constant and min(others) == max(others):
            return 0.0
        mean = sum(others) / len(others)
        top = reward - mean if centre else reward
        if scale == "none":
            return top
        if below(len(others)) == 0:
            return NAN
        return top / (math.sqrt(sum((r - mean) ** 2 for r in others) / below(len(others))) + eps or NAN)

    return [advantage(reward, peers[group]) for reward, group in zip(rewards, groups)]


def by_position(groups: list[Any]) -> list[Any]:
    """Groups of equal size in the order of the samples."""
    size = max(len(groups) // len(set(groups)), 1)
    return [i // size for i in range(len(groups))]


ADVANTAGES: dict[str, Callable[..., Row]] = {
    "std-over-n": lambda rewards, groups, scale: standardised(rewards, groups, scale, below=lambda n: n),
    "constant-group-noise": lambda rewards, groups, scale: standardised(
        rewards, groups, scale, eps=0.0, constant=len(rewards) == 1
    ),
    "group-of-one-nan": lambda rewards, groups, scale: [
        NAN if scale == "std" and groups.count(group) == 1 else x
        for x, group in zip(standardised(rewards, groups, scale), groups)
    ],
    "groups-by-position": lambda rewards, groups, scale: standardised(rewards, by_position(groups), scale),
    "groups-ignored": lambda rewards, groups, scale: standardised(rewards, [0] * len(groups), scale),
    "not-centred": lambda rewards, groups, scale: standardised(rewards, groups, scale, centre=False, constant=False),
    "order-lost": lambda rewards, groups, scale: list(map(abs, standardised(rewards, groups, scale))),
    "inert-knob": lambda rewards, groups, scale: standardised(rewards, groups, "std"),
}
"""The same for ``group_advantages``."""
