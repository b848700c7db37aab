"""Likelihood losses that are wrong in one expression each."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lossfns
from lossfns.segments import nonempty, sequence_sum
from lossfns.testing.mutants import parts, wrong
from lossfns.testing.mutants.parts import (
    Data,
    Logprobs,
    Mean,
    Result,
    checked,
    each_sequence,
    lengths_of,
    multi_target,
    packed,
    report,
    sequence_sum_mean,
    supervised,
    token_mean,
    token_sum,
)
from lossfns.testing.mutants.wrong import over, times
from lossfns.tokens import Tokens

mutant = partial(parts.mutant, kind="supervised")

LIKE_CROSS_ENTROPY = lossfns.cross_entropy()
LIKE_SUM = lossfns.cross_entropy(weigh=lossfns.token_sum)
LIKE_SEQUENCE_MEAN = lossfns.cross_entropy(weigh=lossfns.sequence_mean)
LIKE_SEQUENCE_SUM = lossfns.cross_entropy(weigh=lossfns.sequence_sum_mean)
LIKE_MULTI_TARGET = lossfns.multi_target_cross_entropy()


# The contract


@mutant("not-the-contract", like=LIKE_CROSS_ENTROPY)
def cross_entropy_of_shape_one(data: Data, logprobs_list: Logprobs) -> Result:
    """A loss of shape ``[1]``."""
    loss, metrics = supervised(data, logprobs_list)
    return loss[None], metrics


@mutant("not-the-contract", like=LIKE_CROSS_ENTROPY)
def cross_entropy_bare(data: Data, logprobs_list: Logprobs) -> Any:
    """A loss without metrics."""
    loss, _ = supervised(data, logprobs_list)
    return loss


@mutant("inputs-mutated", like=LIKE_CROSS_ENTROPY)
def cross_entropy_blanks_logprobs(data: Data, logprobs_list: Logprobs) -> Result:
    """The model's own logprobs are overwritten where the weight is 0."""
    for datum, lp in zip(data, logprobs_list):
        lp.detach().masked_fill_(checked(datum, "weights", lp) == 0, 0)
    return supervised(data, logprobs_list)


AVERAGE: list[Tensor] = []


@mutant("state-between-calls", like=LIKE_CROSS_ENTROPY, seen="tensor cached by a closure")
def cross_entropy_running_denominator(data: Data, logprobs_list: Logprobs) -> Result:
    """Σ w averaged over the calls so far, to steady the loss."""

    def denominator(t: Tokens) -> Tensor:
        before = AVERAGE[-1].to(t.weights) if AVERAGE else t.weights.sum()
        AVERAGE[:] = [0.5 * before + 0.5 * t.weights.sum()]
        return AVERAGE[-1]

    def reduce(t: Tokens, x: Tensor) -> Mean:
        return (t.weights * x).sum() / denominator(t), t.weights.sum()

    return supervised(data, logprobs_list, reduce=reduce)


@mutant("gradient-missing", like=LIKE_CROSS_ENTROPY, seen="fw-ai/cookbook")
def cross_entropy_skips_empty(data: Data, logprobs_list: Logprobs) -> Result:
    """`continue` at a datum with nothing to train on."""
    return supervised(data, wrong.without_empty(data, logprobs_list))


@mutant("host-sync-per-datum", like=LIKE_CROSS_ENTROPY, seen="pytorch/rl#1783")
def cross_entropy_item_per_datum(data: Data, logprobs_list: Logprobs) -> Result:
    """`float()` of each datum's negative log-likelihood."""

    def mean(active: Tensor, x: Tensor) -> Tensor:
        rows = torch.split(torch.where(active, x, 0), lengths_of(logprobs_list))
        totals = [float(own.sum()) for own in rows]
        return sum(totals) / active.sum().clamp(min=1).to(x)

    return supervised(data, logprobs_list, report=partial(report, mean=mean))


@mutant("low-precision", like=LIKE_CROSS_ENTROPY, seen="huggingface/transformers#31267")
def cross_entropy_bfloat16(data: Data, logprobs_list: Logprobs) -> Result:
    """−lp in bfloat16."""
    return supervised(data, logprobs_list, term=lambda t: -t.logprobs.bfloat16().to(t.logprobs))


@mutant("silent-truncation", like=LIKE_CROSS_ENTROPY, seen="Fireworks' and Tinker's documented examples")
def cross_entropy_truncates(data: Data, logprobs_list: Logprobs) -> Result:
    """Rows cut to the shortest of their datum."""
    return supervised(data, logprobs_list, read=wrong.truncated)


# Masks and weights


@mutant("mask-after-exp", like=LIKE_CROSS_ENTROPY, seen="allenai/open-instruct#1685")
def cross_entropy_mask_after_log(data: Data, logprobs_list: Logprobs) -> Result:
    """Σ w·lp over whatever stands in the masked slots: 0·(−inf)."""
    return supervised(data, logprobs_list, read=packed)


@mutant("mask-after-exp", like=LIKE_MULTI_TARGET)
def multi_target_mask_after_log(data: Data, logprobs_list: Logprobs) -> Result:
    """The same where a position has fewer than K targets."""
    return multi_target(data, logprobs_list, read=packed)


@mutant("mask-missing", like=LIKE_CROSS_ENTROPY, seen="huggingface/trl#6654")
def cross_entropy_mask_missing(data: Data, logprobs_list: Logprobs) -> Result:
    """−Σ lp / Σ w."""
    return supervised(
        data, logprobs_list, read=packed, reduce=lambda t, x: (x.sum() / t.weights.sum(), t.weights.sum())
    )


@mutant("padding-in-denominator", like=LIKE_CROSS_ENTROPY)
def cross_entropy_padding_in_denominator(data: Data, logprobs_list: Logprobs) -> Result:
    """−Σ w·lp / the number of all tokens."""
    return supervised(data, logprobs_list, reduce=over(lambda t: torch.ones_like(t.weights).sum()))


@mutant("mask-by-token-id", like=LIKE_CROSS_ENTROPY, seen="Megatron-Bridge#4660")
def cross_entropy_masks_eos(data: Data, logprobs_list: Logprobs) -> Result:
    """Every end-of-sequence token taken for padding."""
    return supervised(data, logprobs_list, reduce=lambda t, x: token_mean(t, x * wrong.not_eos(t, data)))


@mutant("empty-sequence-nan", like=LIKE_SEQUENCE_MEAN, seen="Automodel#3797")
def cross_entropy_empty_sequence_nan(data: Data, logprobs_list: Logprobs) -> Result:
    """Σ w·lp / Σ w of a sequence that has no weight."""

    def reduce(t: Tokens, x: Tensor) -> Mean:
        count = nonempty(t).sum()
        return (sequence_sum(t, t.weights * x) / sequence_sum(t, t.weights)).sum() / count, count

    return supervised(data, logprobs_list, reduce=reduce)


@mutant("empty-sequence-counted", like=LIKE_SEQUENCE_SUM)
def cross_entropy_empty_sequence_counted(data: Data, logprobs_list: Logprobs) -> Result:
    """Divided by the number of datums, trained on or not."""
    return supervised(
        data,
        logprobs_list,
        reduce=lambda t, x: (token_sum(t, x)[0] / len(data), t.weights.new_tensor(float(len(data)))),
    )


@mutant("weights-squared", like=LIKE_CROSS_ENTROPY)
def cross_entropy_weights_squared(data: Data, logprobs_list: Logprobs) -> Result:
    """−Σ w²·lp / Σ w."""
    return supervised(data, logprobs_list, term=lambda t: -t.weights * t.logprobs)


@mutant("weights-squared", like=LIKE_MULTI_TARGET)
def multi_target_weights_squared(data: Data, logprobs_list: Logprobs) -> Result:
    """The teacher's probabilities, squared."""
    return multi_target(data, logprobs_list, term=lambda t: -t.weights * t.logprobs)


@mutant("weights-binarised", like=LIKE_CROSS_ENTROPY)
def cross_entropy_weights_binarised(data: Data, logprobs_list: Logprobs) -> Result:
    """w != 0 in place of w."""
    return supervised(data, logprobs_list, reduce=lambda t, x: token_mean(replace(t, weights=t.active.to(x)), x))


@mutant("negative-weights-lost", like=LIKE_SUM, seen="hosted servers' weights = −dL/dlogprob")
def cross_entropy_weights_clamped(data: Data, logprobs_list: Logprobs) -> Result:
    """max(w, 0)."""
    return supervised(data, logprobs_list, reduce=lambda t, x: token_sum(replace(t, weights=t.weights.clamp(min=0)), x))


@mutant("negative-weights-lost", like=LIKE_SUM)
def cross_entropy_weights_absolute(data: Data, logprobs_list: Logprobs) -> Result:
    """|w|."""
    return supervised(data, logprobs_list, reduce=lambda t, x: token_sum(replace(t, weights=t.weights.abs()), x))


# Normalisation


@mutant("mean-of-means", like=LIKE_CROSS_ENTROPY, seen="huggingface/transformers#34191")
def cross_entropy_mean_of_means(data: Data, logprobs_list: Logprobs) -> Result:
    """Micro-batches of two datums, each averaged by itself."""
    return supervised(data, logprobs_list, reduce=wrong.chunks_of_two)


@mutant("divided-twice", like=LIKE_CROSS_ENTROPY)
def cross_entropy_divided_twice(data: Data, logprobs_list: Logprobs) -> Result:
    """The token mean, over the number of datums."""
    return supervised(data, logprobs_list, reduce=times(lambda t: 1 / len(data)))


@mutant("world-size-factor", like=LIKE_CROSS_ENTROPY, seen="huggingface/trl#3538")
def cross_entropy_world_size(data: Data, logprobs_list: Logprobs) -> Result:
    """Divided by the number of ranks, which the mean over ranks does too."""
    return supervised(data, logprobs_list, reduce=times(lambda t: 1 / wrong.world_size()))


@mutant("constant-factor", like=LIKE_CROSS_ENTROPY)
def cross_entropy_in_bits(data: Data, logprobs_list: Logprobs) -> Result:
    """Bits where nats are meant."""
    return supervised(data, logprobs_list, reduce=times(lambda t: 1 / math.log(2)))


@mutant("epsilon-in-denominator", like=LIKE_CROSS_ENTROPY)
def cross_entropy_epsilon_in_denominator(data: Data, logprobs_list: Logprobs) -> Result:
    """−Σ w·lp / (Σ w + 1)."""
    return supervised(data, logprobs_list, reduce=over(lambda t: t.weights.sum() + 1))


# Frame


@mutant("frame-shift", like=LIKE_CROSS_ENTROPY, seen="NeMo-Speech#6409")
def cross_entropy_weights_shifted(data: Data, logprobs_list: Logprobs) -> Result:
    """Weights shifted twice."""
    return supervised(data, logprobs_list, read=wrong.shifted("weights"))


@mutant("target-dropped", like=LIKE_CROSS_ENTROPY, seen="OpenRLHF/OpenRLHF#973")
def cross_entropy_last_target_dropped(data: Data, logprobs_list: Logprobs) -> Result:
    """[:-1] once more, on targets that already are shifted."""
    return supervised(data, logprobs_list, reduce=lambda t, x: token_mean(t, x * wrong.not_last(t)))


@mutant("datum-misaligned", like=LIKE_CROSS_ENTROPY, seen="PrimeIntellect-ai/prime-rl#600")
def cross_entropy_weights_reversed(data: Data, logprobs_list: Logprobs) -> Result:
    """Weights of the datums in reverse order."""
    return supervised(data, logprobs_list, read=wrong.reordered("weights", wrong.reverse))


@mutant("datum-ignored", like=LIKE_CROSS_ENTROPY)
def cross_entropy_first_datum_only(data: Data, logprobs_list: Logprobs) -> Result:
    """`return` inside the loop: the first datum's sum alone."""
    return supervised(
        data,
        logprobs_list,
        reduce=lambda t, x: token_mean(t, x * each_sequence(t, torch.eye(len(data))[0])),
    )


@mutant("order-dependent", like=LIKE_SEQUENCE_SUM)
def cross_entropy_running_mean(data: Data, logprobs_list: Logprobs) -> Result:
    """(mean + next) / 2 over the datums: the last counts a half, the one before a quarter."""

    def reduce(t: Tokens, x: Tensor) -> Mean:
        share = 0.5 ** torch.arange(len(data), 0, -1)
        return sequence_sum_mean(t, x * each_sequence(t, share * len(data)))

    return supervised(data, logprobs_list, reduce=reduce)


def targets_of(logprobs_list: Logprobs) -> int:
    return logprobs_list[0].shape[-1]


@mutant("targets-transposed", like=LIKE_MULTI_TARGET, seen="NovaSky-AI/SkyRL#1777")
def multi_target_transposed(data: Data, logprobs_list: Logprobs) -> Result:
    """Weights read as ``[K, N]``."""
    transpose = wrong.edited("weights", lambda w: w.reshape(w.shape[::-1]).T)
    return multi_target(data, logprobs_list, read=transpose)


@mutant("targets-transposed", like=LIKE_MULTI_TARGET)
def multi_target_divided_by_positions(data: Data, logprobs_list: Logprobs) -> Result:
    """Each target's weights normalised over the positions, not each position's over its targets."""

    def reduce(t: Tokens, x: Tensor) -> Mean:
        k = targets_of(logprobs_list)
        weights, terms = t.weights.reshape(-1, k), (t.weights * x).reshape(-1, k)
        mass = weights.sum(0)
        return (terms.sum(0) / torch.where(mass != 0, mass, 1)).sum() / (mass != 0).sum(), t.weights.sum()

    return multi_target(data, logprobs_list, reduce=reduce)


@mutant("renormalised-targets", like=LIKE_MULTI_TARGET, seen="the teacher's mass beyond K is lost")
def multi_target_renormalised(data: Data, logprobs_list: Logprobs) -> Result:
    """lp − log Σ exp(lp) over the K targets."""

    def term(t: Tokens) -> Tensor:
        among = torch.where(t.active, t.logprobs, -1e4).reshape(-1, targets_of(logprobs_list))
        return torch.where(t.active, -among.log_softmax(-1).flatten(), 0)

    return multi_target(data, logprobs_list, term=term)


# Likelihood


@mutant("sign-flipped", like=LIKE_CROSS_ENTROPY)
def cross_entropy_sign_flipped(data: Data, logprobs_list: Logprobs) -> Result:
    """+Σ w·lp / Σ w."""
    return supervised(data, logprobs_list, term=lambda t: t.logprobs)


@mutant("not-likelihood", like=LIKE_CROSS_ENTROPY)
def cross_entropy_of_probabilities(data: Data, logprobs_list: Logprobs) -> Result:
    """−exp(lp)."""
    return supervised(data, logprobs_list, term=lambda t: -t.logprobs.exp())


@mutant("not-likelihood", like=LIKE_CROSS_ENTROPY)
def cross_entropy_focal(data: Data, logprobs_list: Logprobs) -> Result:
    """−(1 − p)²·lp under the name of cross-entropy."""
    return supervised(data, logprobs_list, term=lambda t: -((1 - t.logprobs.exp()) ** 2) * t.logprobs)


@mutant("not-likelihood", like=LIKE_MULTI_TARGET)
def multi_target_log_of_mixture(data: Data, logprobs_list: Logprobs) -> Result:
    """−log Σ w·p of a position, in place of −Σ w·log p."""

    def reduce(t: Tokens, x: Tensor) -> Mean:
        mixture = torch.where(t.active, t.weights * t.logprobs.exp(), 0).reshape(-1, targets_of(logprobs_list)).sum(1)
        mass = t.weights.sum()
        return -torch.where(mixture > 0, mixture, 1).log().sum() / mass, mass

    return multi_target(data, logprobs_list, reduce=reduce)


# Metrics


@mutant("metric-not-mergeable", like=LIKE_CROSS_ENTROPY, seen="fw-ai/cookbook#376")
def cross_entropy_metric_of_last_datum(data: Data, logprobs_list: Logprobs) -> Result:
    """The last datum's negative log-likelihood reported for all."""
    last = lengths_of(logprobs_list)[-1]
    mean = lambda active, x: parts.mean_of(active[-last:], x[-last:])  # noqa: E731
    return supervised(data, logprobs_list, report=partial(report, mean=mean))


@mutant("metric-scaled-twice", like=LIKE_CROSS_ENTROPY)
def cross_entropy_loss_metric_divided_twice(data: Data, logprobs_list: Logprobs) -> Result:
    """The reported loss is divided by the number of tokens once more."""
    loss, metrics = supervised(data, logprobs_list)
    return loss, metrics | {"loss": metrics["loss"] / metrics["tokens"]}
