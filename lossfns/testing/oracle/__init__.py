"""Every loss in plain floats: its value and its closed-form gradient, straight from the papers.

A row holds one sequence. A token counts if and only if its weight is not 0. The values of a token that does not count
are never read. Sums are exactly rounded, so an implementation differs from this file only by its own rounding.

The losses of this file have their gradient in closed form. Those of the other files of the folder differentiate
themselves (``scalar.py``): each is its equation alone.
"""

import math
import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypedDict, Unpack

from lossfns.testing.oracle.advantages import (
    asymre_advantages,
    batch_advantages,
    gae,
    gdpo_advantages,
    gigpo_advantages,
    gpg_advantages,
    group_advantages,
    hierarchical_advantages,
    kl_penalties,
    leave_one_out_advantages,
    maxrl_advantages,
    opo_advantages,
    optimal_token_advantages,
    pass_at_k_advantages,
    rae_advantages,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    remax_advantages,
    returns_to_go,
    token_rewards,
    whiten,
)
from lossfns.testing.oracle.clipped import bnpo, dr_grpo, gmpo, luspo, rloo
from lossfns.testing.oracle.coupled import clip_cov, kl_cov, m2po, real
from lossfns.testing.oracle.entropy import eaft, entropy_bonus, sampled_entropy_bonus, with_clip_b, with_top_entropy
from lossfns.testing.oracle.grouped import alpha_dpo, aot, aot_unpaired, beta_dpo, dr_dpo
from lossfns.testing.oracle.policy import sapo
from lossfns.testing.oracle.preference import (
    apo_down,
    apo_zero,
    bco_pair,
    bpo,
    c2_dpo,
    cal_dpo,
    chi_po,
    discopop,
    dpo_norm,
    dpo_shift,
    dpop,
    exo,
    f_dpo,
    focal_po,
    gpo,
    hinge,
    ipo,
    ld_dpo,
    minor_dpo,
    nca,
    odpo,
    r_dpo,
    robust_dpo,
    spo,
    sppo_hard,
    wpo,
)
from lossfns.testing.oracle.reference_free import (
    alphapo,
    bradley_terry,
    bradley_terry_margin,
    cpo,
    process_reward,
    simpo,
)
from lossfns.testing.oracle.summed import Part, chosen_nll, sum_losses
from lossfns.testing.oracle.supervised import (
    dft,
    focal,
    sampled_reverse_kl,
    sft_phi,
    top_k_forward_kl,
    top_k_jsd,
    top_k_mixed_kl,
    top_k_reverse_kl,
    unlikelihood,
)
from lossfns.testing.oracle.trust import (
    a2po,
    ce_gppo,
    dppo_kl,
    dppo_tv,
    fipo,
    opsm,
    prime_dppo,
    prime_ref_kl,
    prime_symmetric,
)
from lossfns.testing.oracle.unpaired import bco, kto, sppo
from lossfns.testing.oracle.value import value_loss
from lossfns.testing.oracle.weighted import (
    capped_importance_sampling,
    cispo_sequence,
    gpg,
    kimi15,
    opmd,
    rec,
    rec_ring,
    rollout_is,
    sppo_token,
    topr,
    vespo,
)

Row = list[float]
Rows = list[Row]
Loss = tuple[float, Rows]  # L and ∂L/∂lp
Term = tuple[float, float]  # a value and its slope
Clip = tuple[float, float]

TOKEN_WEIGHINGS = ("token_mean", "sequence_mean", "sequence_sum_mean", "fixed_length", "token_sum")
PAIR_WEIGHINGS = ("pair_mean", "pair_sum")
DATUM_WEIGHINGS = ("datum_mean", "datum_sum")
TIS_LEVELS = ("token", "sequence", "geometric")


class Correction(TypedDict, total=False):
    """Keyword arguments of every off-policy loss. Their defaults are those of `corrected`."""

    sampler_logprobs: Rows | None
    tis_cap: float | None
    tis_level: str
    length: int | None
    denominator: float | None


class Knobs(Correction, total=False):
    """Keyword arguments of every loss that uses `surrogate`. Their defaults are those of `policy`."""

    dual_clip: float | None
    log_ratio_cap: float | None


# Arithmetic


def total(values: Iterable[float]) -> float:
    """Σ values, exactly rounded while finite."""
    values = list(values)
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # past the largest float, or ∞ − ∞
        return sum(values)


def exp(x: float) -> float:
    """eˣ, with ∞ past the largest float."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def sigmoid(x: float) -> float:
    """σ(x) = 1 / (1 + e⁻ˣ)."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    """log(1 + eˣ) = −log σ(−x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def capped(x: float, cap: float | None) -> Term:
    """c = clamp(x, ±cap) and dc/dx = 1[|x| ≤ cap]."""
    if cap is not None and abs(x) > cap:
        return math.copysign(cap, x), 0.0
    return x, 1.0


# Rows


def active(weights: Row) -> list[int]:
    """The slots t with wₜ ≠ 0."""
    return [t for t, w in enumerate(weights) if w != 0]


def difference(weights: Rows, left: Rows, right: Rows) -> Rows:
    """left − right where a token counts, 0 elsewhere."""
    return [
        [x - y if w != 0 else 0.0 for w, x, y in zip(*rows, strict=True)]
        for rows in zip(weights, left, right, strict=True)
    ]


def averaged(weights: Rows, values: Rows) -> Rows:
    """Σ w·x / Σ w over each sequence, at each of its tokens that count; 0 elsewhere."""
    rows = []
    for row, xs in zip(weights, values, strict=True):
        slots = active(row)
        mean = total(row[t] * xs[t] for t in slots) / total(row) if slots else 0.0
        rows.append([mean if w != 0 else 0.0 for w in row])
    return rows


def through_mean(weights: Rows, slopes: Rows) -> Rows:
    """∂L/∂xⱼ = wⱼ/Σw · Σₜ (∂L/∂m)ₜ, where every token t of a sequence reads the mean m = Σ w·x / Σ w."""
    rows = zip(weights, map(total, slopes), strict=True)
    return [[w / (total(row) or 1.0) * slope for w in row] for row, slope in rows]


def normalized(weights: Rows) -> Rows:
    """w / Σw within each sequence."""
    masses = [total(row) for row in weights]
    return [[w / mass if w != 0 else 0.0 for w in row] for row, mass in zip(weights, masses, strict=True)]


# From terms to a loss


def divisor(weigh: str, mass: float, count: int, length: int | None, denominator: float | None) -> float:
    """D: 1 for a sum, `denominator` if given, else Σw, the count, or length · count."""
    if weigh in ("token_sum", "pair_sum", "datum_sum"):
        return 1.0
    if denominator is not None:
        return denominator
    if weigh == "fixed_length":
        if length is None:
            raise ValueError("fixed_length needs length")
        count *= length
    if count == 0:
        return 1.0
    return mass if weigh == "token_mean" else float(count)


def reduce(
    term: Callable[[int, int], Term], weights: Rows, weigh: str, length: int | None, denominator: float | None
) -> Loss:
    """L = Σ share·term / D over the counting tokens, where share = w, or w / Σw for sequence_mean."""
    if weigh not in TOKEN_WEIGHINGS:
        raise ValueError(f"weigh is one of {TOKEN_WEIGHINGS}, not {weigh!r}")
    shares = normalized(weights) if weigh == "sequence_mean" else weights
    mass = total(w for row in weights for w in row)
    by = divisor(weigh, mass, sum(1 for row in weights if active(row)), length, denominator)
    values: Row = []
    grads = [[0.0] * len(row) for row in weights]
    for i, row in enumerate(weights):
        for t in active(row):
            value, slope = term(i, t)
            values.append(shares[i][t] * value)
            grads[i][t] = shares[i][t] * slope / by
    return total(values) / by, grads


def reduce_pairs(
    term: Callable[[float, float], tuple[float, float, float]],
    logprobs: Rows,
    weights: Rows,
    weigh: str,
    length: int | None,
    denominator: float | None,
) -> Loss:
    """L = Σ term(h₂ᵢ, h₂ᵢ₊₁) / D with h = Σ w·lp, over the pairs with two non-empty sides."""
    if weigh not in PAIR_WEIGHINGS:
        raise ValueError(f"weigh is one of {PAIR_WEIGHINGS}, not {weigh!r}")
    if len(weights) % 2:
        raise ValueError("pairs need an even number of sequences")
    pairs = [i for i in range(0, len(weights), 2) if active(weights[i]) and active(weights[i + 1])]
    by = divisor(weigh, 0.0, len(pairs), length, denominator)
    scores = [total(w[t] * lp[t] for t in active(w)) for w, lp in zip(weights, logprobs, strict=True)]
    values, slopes = [], [0.0] * len(weights)
    for i in pairs:
        value, slopes[i], slopes[i + 1] = term(scores[i], scores[i + 1])
        values.append(value)
    grads = [[slope * w / by if w != 0 else 0.0 for w in row] for slope, row in zip(slopes, weights, strict=True)]
    return total(values) / by, grads


# Supervised


def cross_entropy(
    *,
    logprobs: Rows,
    weights: Rows,
    weigh: str = "token_mean",
    length: int | None = None,
    denominator: float | None = None,
) -> Loss:
    """Term −lp, slope −1; a negative weight pushes the token down."""
    return reduce(lambda i, t: (-logprobs[i][t], -1.0), weights, weigh, length, denominator)


def multi_target_cross_entropy(
    *,
    logprobs: Rows,
    weights: Rows,
    weigh: str = "token_mean",
    length: int | None = None,
    denominator: float | None = None,
) -> Loss:
    """Cross-entropy with K targets at a position. A row holds the N·K entries of N positions."""
    return cross_entropy(logprobs=logprobs, weights=weights, weigh=weigh, length=length, denominator=denominator)


# Policy gradient


def surrogate(d: float, advantage: float, clip: Clip, dual_clip: float | None, cap: float | None) -> Term:
    """−min(rA, clamp(r)A) with r = e^clamp(d, ±cap), at most −cA where A < 0; slope −rA where unclipped.

    At a bound, and at the tie rA = cA of the dual clip, the slope is that of the unclipped side.
    """
    capped_d, inside = capped(d, cap)
    r = exp(capped_d)
    gain, clipped = r * advantage, min(max(r, clip[0]), clip[1]) * advantage
    value, slope = (-clipped, 0.0) if clipped < gain else (-gain, -gain * inside)
    if dual_clip is not None and advantage < 0 and -dual_clip * advantage < value:
        return -dual_clip * advantage, 0.0
    return value, slope


def truncation(weights: Rows, old: Rows, sampler: Rows | None, cap: float | None, level: str) -> Rows:
    """ρ = min(e^clamp(x, ±20), cap), x = old − sampler of a token (Yao et al. 2025).

    At level "sequence" x is Σ w·x of its sequence, at level "geometric" Σ w·x / Σ w.
    """
    if level not in TIS_LEVELS:
        raise ValueError(f"tis_level is one of {TIS_LEVELS}, not {level!r}")
    if cap is None:
        return [[1.0] * len(row) for row in weights]
    if sampler is None:
        raise ValueError("tis_cap needs sampler_logprobs")
    gaps = difference(weights, old, sampler)
    if level == "sequence":
        gaps = [[total(map(operator.mul, w, row))] * len(row) for w, row in zip(weights, gaps, strict=True)]
    if level == "geometric":
        gaps = averaged(weights, gaps)
    return [[min(exp(capped(gap, 20.0)[0]), cap) for gap in row] for row in gaps]


def corrected(
    term: Callable[[int, int], Term],
    weights: Rows,
    old_logprobs: Rows,
    weigh: str,
    *,
    sampler_logprobs: Rows | None = None,
    tis_cap: float | None = None,
    tis_level: str = "token",
    length: int | None = None,
    denominator: float | None = None,
) -> Loss:
    """Term ρ·term."""
    rho = truncation(weights, old_logprobs, sampler_logprobs, tis_cap, tis_level)

    def product(i: int, t: int) -> Term:
        value, slope = term(i, t)
        return rho[i][t] * value, rho[i][t] * slope

    return reduce(product, weights, weigh, length, denominator)


def policy(
    log_ratios: Rows,
    weights: Rows,
    advantages: Rows,
    old_logprobs: Rows,
    clip: Clip,
    weigh: str,
    *,
    dual_clip: float | None = None,
    log_ratio_cap: float | None = 20.0,
    **correction: Unpack[Correction],
) -> Loss:
    """Term ρ·surrogate(d, A), with its slope taken in each token's own log ratio d."""

    def term(i: int, t: int) -> Term:
        return surrogate(log_ratios[i][t], advantages[i][t], clip, dual_clip, log_ratio_cap)

    return corrected(term, weights, old_logprobs, weigh, **correction)


def ppo(
    *,
    logprobs: Rows,
    weights: Rows,
    advantages: Rows,
    old_logprobs: Rows,
    clip: Clip = (0.8, 1.2),
    weigh: str = "token_mean",
    **knobs: Unpack[Knobs],
) -> Loss:
    """Term −min(rA, clamp(r)A) with r = e^(lp − old) (Schulman et al. 2017; dual clip Ye et al. 2020)."""
    d = difference(weights, logprobs, old_logprobs)
    return policy(d, weights, advantages, old_logprobs, clip, weigh, **knobs)


def reinforce(
    *,
    logprobs: Rows,
    weights: Rows,
    advantages: Rows,
    weigh: str = "token_mean",
    length: int | None = None,
    denominator: float | None = None,
) -> Loss:
    """Term −A·lp: the on-policy policy gradient (Williams 1992)."""

    def term(i: int, t: int) -> Term:
        return -advantages[i][t] * logprobs[i][t], -advantages[i][t]

    return reduce(term, weights, weigh, length, denominator)


def importance_sampling(
    *,
    logprobs: Rows,
    weights: Rows,
    advantages: Rows,
    old_logprobs: Rows,
    weigh: str = "token_mean",
    **knobs: Unpack[Knobs],
) -> Loss:
    """Term −rA with r = e^(lp − old): the off-policy policy gradient."""
    d = difference(weights, logprobs, old_logprobs)
    return policy(d, weights, advantages, old_logprobs, (-math.inf, math.inf), weigh, **knobs)


def dapo(
    *,
    logprobs: Rows,
    weights: Rows,
    advantages: Rows,
    old_logprobs: Rows,
    clip: Clip = (0.8, 1.28),
    weigh: str = "token_mean",
    **knobs: Unpack[Knobs],
) -> Loss:
    """PPO's term with a higher upper bound, over all tokens alike (Yu et al. 2025)."""
    d = difference(weights, logprobs, old_logprobs)
    return policy(d, weights, advantages, old_logprobs, clip, weigh, **knobs)


def divergence(x: float, kl: str) -> Term:
    """k1 = −x, k2 = x²/2, k3 = eᶜ − c − 1 with c = clamp(x, ±20), at x = ref − lp (Schulman 2020).

    The slope is in lp, so −dk/dx.
    """
    if kl == "k1":
        return -x, 1.0
    if kl == "k2":
        return x * x / 2, -x
    if kl != "k3":
        raise ValueError(f"kl is 'k1', 'k2' or 'k3', not {kl!r}")
    c, inside = capped(x, 20.0)
    return math.expm1(c) - c, -math.expm1(c) * inside


def grpo(
    *,
    logprobs: Rows,
    weights: Rows,
    advantages: Rows,
    old_logprobs: Rows,
    ref_logprobs: Rows,
    clip: Clip = (0.8, 1.2),
    kl_beta: float = 0.001,
    kl: str = "k3",
    weigh: str = "token_mean",
    **knobs: Unpack[Knobs],
) -> Loss:
    """L = PPO + β·KL(π ‖ ref) (Shao et al. 2024, whose own average is sequence_mean)."""
    d = difference(weights, logprobs, old_logprobs)
    loss, grads = policy(d, weights, advantages, old_logprobs, clip, weigh, **knobs)
    x = difference(weights, ref_logprobs, logprobs)
    length, denominator = knobs.get("length"), knobs.get("denominator")
    penalty, pulls = reduce(lambda i, t: divergence(x[i][t], kl), weights, weigh, length, denominator)
    for row, pull in zip(grads, pulls, strict=True):
        row[:] = [g + kl_beta * p for g, p in zip(row, pull, strict=True)]
    return loss + kl_beta * penalty, grads


def gspo_token(
    *,
    logprobs: Rows,
    weights: Rows,
    advantages: Rows,
    old_logprobs: Rows,
    clip: Clip = (1 - 3e-4, 1 + 4e-4),
    weigh: str = "sequence_mean",
    **knobs: Unpack[Knobs],
) -> Loss:
    """PPO's term at log sₜ = sg(Σ w·d / Σ w) + lpₜ − sg(lpₜ): GSPO with a slope by token (Zheng et al. 2025)."""
    mean_d = averaged(weights, difference(weights, logprobs, old_logprobs))
    return policy(mean_d, weights, advantages, old_logprobs, clip, weigh, **knobs)


def gspo(
    *,
    logprobs: Rows,
    weights: Rows,
    advantages: Rows,
    old_logprobs: Rows,
    clip: Clip = (1 - 3e-4, 1 + 4e-4),
    weigh: str = "sequence_mean",
    **knobs: Unpack[Knobs],
) -> Loss:
    """PPO's term at log s = Σ w·d / Σ w, so ∂L/∂lpⱼ = wⱼ/Σw · Σₜ (∂L/∂log s)ₜ (Zheng et al. 2025)."""
    mean_d = averaged(weights, difference(weights, logprobs, old_logprobs))
    loss, slopes = policy(mean_d, weights, advantages, old_logprobs, clip, weigh, **knobs)
    return loss, through_mean(weights, slopes)


def limited(d: float, lp: float, advantage: float, clip: Clip, cap: float | None) -> Term:
    """−sg(w)·A·lp with w = clamp(r), r = e^clamp(d, ±cap); slope −wA, within the bounds and beyond."""
    pull = min(max(exp(capped(d, cap)[0]), clip[0]), clip[1]) * advantage
    return -pull * lp, -pull


def cispo(
    *,
    logprobs: Rows,
    weights: Rows,
    advantages: Rows,
    old_logprobs: Rows,
    clip: Clip = (0.0, 4.0),
    weigh: str = "token_mean",
    log_ratio_cap: float | None = 20.0,
    **correction: Unpack[Correction],
) -> Loss:
    """Term −sg(clamp(r))·A·lp with r = e^(lp − old): a bound limits the weight, not the gradient (MiniMax 2025)."""
    d = difference(weights, logprobs, old_logprobs)

    def term(i: int, t: int) -> Term:
        return limited(d[i][t], logprobs[i][t], advantages[i][t], clip, log_ratio_cap)

    return corrected(term, weights, old_logprobs, weigh, **correction)


def dro(
    *,
    logprobs: Rows,
    weights: Rows,
    advantages: Rows,
    old_logprobs: Rows,
    beta: float = 0.05,
    weigh: str = "token_mean",
    **correction: Unpack[Correction],
) -> Loss:
    """Term −(A·lp − ½βd²) with d = lp − old, so its slope is −A + βd (Richemond et al. 2024, by token)."""
    d = difference(weights, logprobs, old_logprobs)

    def term(i: int, t: int) -> Term:
        x = d[i][t]
        return beta * x * x / 2 - advantages[i][t] * logprobs[i][t], beta * x - advantages[i][t]

    return corrected(term, weights, old_logprobs, weigh, **correction)


# Preferences


def dpo(
    *,
    logprobs: Rows,
    weights: Rows,
    ref_logprobs: Rows,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    weigh: str = "pair_mean",
    length: int | None = None,
    denominator: float | None = None,
) -> Loss:
    """Term −(1−ε)·log σ(βm) − ε·log σ(−βm) at m = h_w − h_l, h = Σ w·(lp − ref) (Rafailov et al. 2023).

    ε > 0 allows for swapped labels (Mitchell 2023).
    """

    def term(chosen: float, rejected: float) -> tuple[float, float, float]:
        z, eps = beta * (chosen - rejected), label_smoothing
        slope = beta * (eps * sigmoid(z) - (1 - eps) * sigmoid(-z))
        return (1 - eps) * softplus(-z) + eps * softplus(z), slope, -slope

    gaps = difference(weights, logprobs, ref_logprobs)
    return reduce_pairs(term, gaps, weights, weigh, length, denominator)


def log_odds(a: float) -> Term:
    """log(p / (1 − p)) at p = eᵃ, slope 1 + p / (1 − p), with 1 − p at least 1e-15."""
    p, q = exp(a), max(-math.expm1(a), 1e-15)
    return a - math.log(q), 1 + p / q


def orpo(
    *,
    logprobs: Rows,
    weights: Rows,
    lam: float = 0.1,
    weigh: str = "pair_mean",
    length: int | None = None,
    denominator: float | None = None,
) -> Loss:
    """Term −a_w − λ·log σ(logodds a_w − logodds a_l) at a = Σw·lp / Σw (Hong et al. 2024)."""

    def term(chosen: float, rejected: float) -> tuple[float, float, float]:
        (odds_w, slope_w), (odds_l, slope_l) = log_odds(chosen), log_odds(rejected)
        doubt = lam * sigmoid(odds_l - odds_w)
        return lam * softplus(odds_l - odds_w) - chosen, -1 - doubt * slope_w, doubt * slope_l

    return reduce_pairs(term, logprobs, normalized(weights), weigh, length, denominator)
