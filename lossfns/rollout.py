"""Token weights: factors that correct a loss for tokens that another policy has sampled.

Three policies are distinct: the current policy π (``logprobs``), the old policy at the start of the step
(``old_logprobs``), and the sampler, which sampled the tokens with other kernels or older weights
(``sampler_logprobs``). A factor is 1 where they agree. Factors multiply: ``truncated() * inside((0.999, 1.002),
geometric_level)``.

A factor of 0 rejects a token or a sequence. Its terms become 0, and the denominator of the loss does not change.
``accepted_weights`` in ``lossfns.sampler`` takes rejected tokens out of the denominator too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lossfns import terms as eq
from lossfns.checks import check_knobs, check_positive
from lossfns.errors import LossInputError, show
from lossfns.kl import KL, name_of
from lossfns.segments import (
    Level,
    active_counts,
    group_labels,
    group_sum,
    maximum_level,
    nonempty,
    sequence_sum,
    to_tokens,
    token_level,
    weighted_mean,
    weighted_sum,
)
from lossfns.tokens import Tokens, to_dtype

Bounds = tuple[float, float]
"""Bounds (low, high) of a ratio, 0 <= low <= 1 <= high; high may be inf."""


def no_limit(t: Tokens) -> Tensor:
    """False at each token: no bound limits this factor."""
    return torch.zeros_like(t.active)


@dataclass(frozen=True, repr=False)
class TokenWeight:
    """A factor for the term of each token.

    Attributes:
        name: the text that ``repr`` shows.
        reads: the columns that the factor needs besides ``logprobs`` and ``weights``.
        factor: ``t -> [N]``, at least 0.
        limited: ``t -> [N]`` bool, True where a bound has changed the factor.
        levels: the levels over which the factor is taken; ``sequence_level`` if it contains a sum over the sequence.

    ``a * b`` is the product of two token weights.

    >>> from lossfns import geometric_level, k3
    >>> masked((0.5, 2.0)) * within(k3, 0.01, geometric_level)
    rollout.masked((0.5, 2.0), token_level) * rollout.within(k3, 0.01, geometric_level)
    """

    name: str
    reads: tuple[str, ...]
    factor: Callable[[Tokens], Tensor]
    limited: Callable[[Tokens], Tensor] = no_limit
    levels: tuple[Level, ...] = ()

    def __post_init__(self) -> None:
        reads = isinstance(self.reads, tuple) and all(isinstance(name, str) for name in self.reads)
        if not isinstance(self.name, str) or not reads or not callable(self.factor) or not callable(self.limited):
            got = f"{show(self.name)}, {show(self.reads)}, {show(self.factor)} and {show(self.limited)}"
            fix = 'TokenWeight("mine", ("old_logprobs",), lambda t: ...) is one.'
            raise LossInputError("name, reads, factor, limited", "a string, a tuple and two functions", got, fix)

    def __repr__(self) -> str:
        return self.name

    def __call__(self, t: Tokens) -> Tensor:
        return self.factor(t)

    def __mul__(self, other: TokenWeight) -> TokenWeight:
        check_token_weight("weight", other)
        return TokenWeight(
            f"{self!r} * {other!r}",
            tuple(dict.fromkeys((*self.reads, *other.reads))),
            lambda t: self.factor(t) * other.factor(t),
            lambda t: self.limited(t) | other.limited(t),
            self.levels + other.levels,
        )


def check_token_weight(name: str, value: object) -> None:
    """Refuse anything but a ``TokenWeight``."""
    if not isinstance(value, TokenWeight):
        fix = "Pass one of lossfns.rollout, such as truncated((0.0, 2.0))."
        raise LossInputError(name, "a TokenWeight", show(value), fix)


# Ratios of the old policy to the sampler


def log_ratio(t: Tokens, level: Level, numerator: str) -> Tensor:
    """log(numerator / sampler) of each token or of its sequence, without gradient: ``[N]``."""
    return level(t, getattr(t, numerator).detach() - t.sampler_logprobs)


def columns_of(numerator: str) -> tuple[str, ...]:
    """Return the columns that numerator / sampler needs."""
    return ("sampler_logprobs",) if numerator == "logprobs" else (numerator, "sampler_logprobs")


def call_text(name: str, numerator: str) -> str:
    """Return the text of a constructor's call, with the numerator unless it is the default."""
    return f"{name})" if numerator == "old_logprobs" else f"{name}, {numerator!r})"


def weight_of_ratio(
    name: str,
    level: Level,
    numerator: str,
    factor: Callable[[Tensor], Tensor],
    limited: Callable[[Tensor], Tensor] | None = None,
) -> TokenWeight:
    """Make a token weight that is a function of the ratio numerator / sampler at a level."""

    def ratio_of(t: Tokens) -> Tensor:
        return eq.importance_ratio(log_ratio(t, level, numerator), eq.KL_LOG_RATIO_CAP)

    return TokenWeight(
        call_text(name, numerator),
        columns_of(numerator),
        lambda t: factor(ratio_of(t)),
        no_limit if limited is None else lambda t: limited(ratio_of(t)),
        (level,),
    )


def is_inside(ratio: Tensor, bounds: Bounds) -> Tensor:
    """Where low <= r <= high."""
    low, high = bounds
    return (ratio >= low) & (ratio <= high)


def ratio(level: Level = token_level, numerator: str = "old_logprobs") -> TokenWeight:
    """ρ = old / sampler, bounded by exp(±20) alone.

    Args:
        level: what the ratio is taken over: ``token_level`` (each token), ``sequence_level`` (the product over the
            sequence) or ``geometric_level`` (its geometric mean).
        numerator: ``"old_logprobs"``, or ``"logprobs"`` for the current policy.

    >>> from lossfns import geometric_level
    >>> ratio(geometric_level)
    rollout.ratio(geometric_level)
    """
    check_knobs({"level": level, "numerator": numerator})
    return weight_of_ratio(f"rollout.ratio({name_of(level)}", level, numerator, lambda r: r)


def truncated(bounds: Bounds = (0.0, 2.0), level: Level = token_level, numerator: str = "old_logprobs") -> TokenWeight:
    """clamp(ρ, low, high): truncated importance sampling (TIS). With low = 0 it is the factor of ``with_tis``.

    verl and SkyRL have the upper bound alone. slime's ``tis_clip_low`` and TRL's ``clip_min`` are lower bounds.

    Args:
        bounds: (low, high) of ρ, 0 <= low <= 1 <= high; high may be inf.
        level, numerator: as for ``ratio``.

    >>> truncated((0.0, 2.0))
    rollout.truncated((0.0, 2.0), token_level)
    """
    check_knobs({"bounds": bounds, "level": level, "numerator": numerator})
    name = f"rollout.truncated({bounds!r}, {name_of(level)}"
    return weight_of_ratio(name, level, numerator, lambda r: r.clamp(*bounds), lambda r: ~is_inside(r, bounds))


def masked(bounds: Bounds = (0.5, 2.0), level: Level = token_level, numerator: str = "old_logprobs") -> TokenWeight:
    """ρ where low <= ρ <= high, else 0: masked importance sampling, which is IcePop at ``token_level``.

    verl ("low_high"), SkyRL, NeMo-RL, slime and OpenRLHF have IcePop. TRL's default ``sequence_mask`` is ``masked((0.0,
    3.0), sequence_level)``.

    Args:
        bounds: (low, high) of ρ, 0 <= low <= 1 <= high; high may be inf.
        level, numerator: as for ``ratio``.
    """
    check_knobs({"bounds": bounds, "level": level, "numerator": numerator})
    name = f"rollout.masked({bounds!r}, {name_of(level)}"
    return weight_of_ratio(name, level, numerator, lambda r: torch.where(is_inside(r, bounds), r, 0))


def inside(bounds: Bounds, level: Level = token_level, numerator: str = "old_logprobs") -> TokenWeight:
    """1 where low <= ρ <= high, else 0: rejection by the ratio, or by k1 in [log low, log high].

    These are SkyRL's token, geometric and product masks. verl's ``k1`` options bound 1/ρ in place of ρ, which is the
    same if low = 1/high. NeMo-RL's ``seq-mask-tis`` is ``ratio() * inside((0.999, 1.002), geometric_level)``.

    Args:
        bounds: (low, high) of ρ, 0 <= low <= 1 <= high; high may be inf.
        level, numerator: as for ``ratio``. open-instruct's mask takes ``numerator="logprobs"``.
    """
    check_knobs({"bounds": bounds, "level": level, "numerator": numerator})
    name = f"rollout.inside({bounds!r}, {name_of(level)}"
    return weight_of_ratio(name, level, numerator, lambda r: to_dtype(is_inside(r, bounds), r.dtype))


# Rejection


def within(divergence: KL, high: float, level: Level = token_level, numerator: str = "old_logprobs") -> TokenWeight:
    """1 where the divergence KL(sampler‖old) of a token or sequence is at most ``high``, else 0.

    verl's ``rollout_rs``: ``seq_mean_k3`` is ``within(k3, 0.01, geometric_level)``.

    Args:
        divergence: ``k2``, ``k3``, ``binary_kl``, ``binary_tv`` or another function, called with the logprobs of
            (sampler, old): its mean over the sampler's tokens estimates KL(sampler‖old). AReaL has k3 of (old,
            sampler): ``swapped(k3)``.
        high: the largest divergence, in nats, a finite number above 0.
        level: what the divergence is taken over: ``token_level`` (each token), ``sequence_level`` (the sum over the
            sequence), ``geometric_level`` (the mean) or ``maximum_level`` (the maximum). With the last three a sequence
            is kept or rejected as a whole.
        numerator: as for ``ratio``.
    """
    check_knobs({"kl": divergence, "level": level, "numerator": numerator})
    check_positive("high", high)

    def factor(t: Tokens) -> Tensor:
        x = level(t, divergence(t.sampler_logprobs, getattr(t, numerator).detach()))
        return to_dtype(x <= high, x.dtype)

    name = call_text(f"rollout.within({name_of(divergence)}, {high!r}, {name_of(level)}", numerator)
    return TokenWeight(name, columns_of(numerator), factor, levels=(level,))


def without_outliers(bounds: Bounds = (1e-4, 100.0), numerator: str = "old_logprobs") -> TokenWeight:
    """1 where every active token of the sequence has low <= ρ <= high, else 0.

    One token outside the bounds rejects its sequence, as SkyRL's ``outlier_token_is_threshold_low`` and ``_high`` do.

    Args:
        bounds: (low, high) of a token's ρ, 0 <= low <= 1 <= high; high may be inf.
        numerator: as for ``ratio``.
    """
    check_knobs({"bounds": bounds, "numerator": numerator})
    token = inside(bounds, token_level, numerator)

    def factor(t: Tokens) -> Tensor:
        return 1 - maximum_level(t, 1 - token(t))

    name = call_text(f"rollout.without_outliers({bounds!r}", numerator)
    return TokenWeight(name, token.reads, factor, levels=(maximum_level,))


def total_variation_mask(radius: float = 0.02) -> TokenWeight:
    """0 where the group's total variation is above the radius and the term would raise it further, else 1.

    The total variation of a group is ½·E|r − 1| with r = π / sampler: the mean over its sequences of the mean over
    their tokens. A term raises it where A·(π − sampler) > 0; all other terms are kept. This is open-instruct's "tvpo",
    whose groups are prompts.

    Args:
        radius: the largest total variation of a group, a finite number above 0.

    Reads ``advantages``, ``sampler_logprobs`` and ``groups`` (an integer label for each datum; all datums of one label
    must be in one call).
    """
    check_positive("radius", radius)

    def factor(t: Tokens) -> Tensor:
        x = t.logprobs.detach() - t.sampler_logprobs
        variation = weighted_mean(t, (eq.importance_ratio(x, eq.KL_LOG_RATIO_CAP) - 1).abs() / 2)
        present, labels = to_dtype(nonempty(t), variation.dtype), group_labels(t)
        of_group = group_sum(labels, variation) / group_sum(labels, present).clamp(min=1)
        rejected = (to_tokens(t, of_group) > radius) & (t.advantages * x > 0)
        return to_dtype(~rejected, x.dtype)

    return TokenWeight(
        f"rollout.total_variation_mask({radius!r})", ("advantages", "sampler_logprobs", "groups"), factor
    )


# Normalisation over a group


def token_normalized(weight: TokenWeight) -> TokenWeight:
    """ρ / (Σ w·ρ / Σ w over the tokens of the group): the mean weight of the group's tokens becomes 1.

    This is verl's ``rollout_is_batch_normalize`` at token level, if all datums have one label.

    Reads ``groups`` (an integer label for each datum; all datums of one label must be in one call) besides the columns
    of the weight.
    """
    return normalized("token_normalized", weight, lambda t, r: (weighted_sum(t, r), sequence_sum(t, t.weights)))


def sequence_normalized(weight: TokenWeight) -> TokenWeight:
    """ρ / the mean over the group's sequences of Σ w·ρ / Σ w: the mean weight of the group's sequences becomes 1.

    This is verl's ``rollout_is_batch_normalize`` at sequence level, if all datums have one label.

    Reads ``groups`` (an integer label for each datum; all datums of one label must be in one call) besides the columns
    of the weight.
    """
    return normalized("sequence_normalized", weight, lambda t, r: (weighted_mean(t, r), to_dtype(nonempty(t), r.dtype)))


def normalized(name: str, weight: TokenWeight, parts: Callable[[Tokens, Tensor], tuple[Tensor, Tensor]]) -> TokenWeight:
    """Divide a weight by Σ numerators / Σ denominators of its group. Weights that are all 0 in a group stay 0."""
    check_token_weight("weight", weight)

    def factor(t: Tokens) -> Tensor:
        r = weight(t).detach()
        numerator, denominator = (group_sum(group_labels(t), x) for x in parts(t, r))
        mean = numerator / torch.where(denominator > 0, denominator, 1)
        return r / to_tokens(t, torch.where(mean > 0, mean, 1))

    reads = tuple(dict.fromkeys((*weight.reads, "groups")))
    return TokenWeight(f"rollout.{name}({weight!r})", reads, factor, weight.limited, weight.levels)


# Weights of a KL penalty: they may have a gradient


def ratio_to(column: str = "old_logprobs", log_ratio_cap: float | None = 20.0) -> TokenWeight:
    """r = exp(lp − column), with its gradient: it turns an expectation over the column's policy into one over π.

    As ``kl_weight`` it makes ``k1`` and ``k3`` exact off-policy, in value and gradient of KL(π‖ref): DeepSeek-V3.2
    (arXiv:2512.02556), TRL's ``use_bias_correction_kl`` (with ``log_ratio_cap=None``), slime's ``--use-unbiased-kl``.

    Args:
        column: ``"old_logprobs"`` or ``"sampler_logprobs"``, the policy that the tokens come from.
        log_ratio_cap: bound of |lp − column|, above 0, with gradient 0 beyond; ``None``: no bound.
    """
    check_knobs({"column": column, "log_ratio_cap": log_ratio_cap})
    shown = f"rollout.ratio_to({column!r}" + ("" if log_ratio_cap == 20.0 else f", {log_ratio_cap!r}") + ")"
    return TokenWeight(shown, (column,), lambda t: eq.importance_ratio(t.logprobs - getattr(t, column), log_ratio_cap))


def detached(weight: TokenWeight) -> TokenWeight:
    """sg(weight): the same factor as a constant."""
    check_token_weight("weight", weight)
    return TokenWeight(
        f"rollout.detached({weight!r})", weight.reads, lambda t: weight(t).detach(), weight.limited, weight.levels
    )


score_function = TokenWeight("rollout.score_function", (), lambda t: (t.logprobs - t.logprobs.detach()).exp())
"""exp(lp − sg(lp)): the value 1, whose gradient adds KL·∇lp to that of an estimator. As ``kl_weight`` it makes the
gradients of ``k1`` and ``k3`` on-policy those of KL(π‖ref). NeMo-RL's factor (arXiv:2506.09477)."""


def rejected_sequences(t: Tokens, factor: Tensor) -> Tensor:
    """1 / (active tokens of the sequence) at each active token of a sequence whose factors are all 0, else 0: ``[N]``.

    Its sum over the active tokens is the number of rejected sequences.
    """
    counts = active_counts(t)
    kept = sequence_sum(t, to_dtype(t.active & (factor != 0), counts.dtype))
    return to_tokens(t, torch.where(kept == 0, 1 / counts.clamp(min=1), 0))
