"""Preference losses that are wrong in one expression each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lossfns
from lossfns import terms as eq
from lossfns.segments import nonempty, sequence_sum, weighted_mean, weighted_sum
from lossfns.testing.mutants import parts, wrong
from lossfns.testing.mutants.parts import (
    Data,
    Logprobs,
    Mean,
    Result,
    blanked,
    dpo,
    lengths_of,
    orpo,
    packed,
    pair_mean,
    report,
)
from lossfns.testing.mutants.wrong import times
from lossfns.tokens import Tokens
from lossfns.weigh import each_pair

mutant = partial(parts.mutant, kind="preference")

LIKE_DPO = lossfns.dpo()
LIKE_ORPO = lossfns.orpo()


# The contract


@mutant("not-the-contract", like=LIKE_DPO)
def dpo_margins_in_metrics(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Any:
    """A list of margins among the metrics."""
    loss, metrics = dpo(data, logprobs_list, beta=beta, label_smoothing=label_smoothing)
    return loss, metrics | {"margins": [metrics["margin"]]}


@mutant("inputs-mutated", like=LIKE_DPO)
def dpo_masks_in_place(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """The datums' own reference logprobs are overwritten where the weight is 0."""
    read = wrong.blanking("ref_logprobs")
    return dpo(data, logprobs_list, beta=beta, label_smoothing=label_smoothing, read=read)


@mutant("gradient-missing", like=LIKE_DPO)
def dpo_skips_empty(data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Result:
    """`continue` at a pair with nothing to train on."""
    return dpo(data, wrong.without_empty(data, logprobs_list), beta=beta, label_smoothing=label_smoothing)


@mutant("host-sync-per-datum", like=LIKE_DPO, seen="NVIDIA-NeMo/RL#3751")
def dpo_item_per_pair(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """`.item()` for the margin of each pair."""

    def mean(active: Tensor, x: Tensor) -> Tensor:
        total = 0.0
        for own in torch.where(active, x, 0):
            total += own.item()
        return total / active.sum().clamp(min=1).to(x)

    return dpo(data, logprobs_list, beta=beta, label_smoothing=label_smoothing, report=partial(report, mean=mean))


@mutant("low-precision", like=LIKE_DPO)
def dpo_bfloat16(data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Result:
    """lp − ref in bfloat16."""

    def score(t: Tokens) -> Tensor:
        return weighted_sum(t, (t.logprobs.bfloat16() - t.ref_logprobs.bfloat16()).to(t.logprobs))

    return dpo(data, logprobs_list, beta=beta, label_smoothing=label_smoothing, score=score)


@mutant("silent-truncation", like=LIKE_DPO, seen="Fireworks' and Tinker's documented examples")
def dpo_truncates(data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Result:
    """Rows cut to the shortest of their datum."""
    return dpo(data, logprobs_list, beta=beta, label_smoothing=label_smoothing, read=wrong.truncated)


# Masks


@mutant("mask-after-exp", like=LIKE_DPO, seen="OpenRLHF/OpenRLHF#1240")
def dpo_mask_after_log(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """Σ w·(lp − ref) over whatever stands in the masked slots."""
    return dpo(data, logprobs_list, beta=beta, label_smoothing=label_smoothing, read=packed)


@mutant("mask-missing", like=LIKE_DPO)
def dpo_mask_missing(data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Result:
    """Σ (lp − ref) over prompt and response."""
    return dpo(
        data,
        logprobs_list,
        beta=beta,
        label_smoothing=label_smoothing,
        read=packed,
        score=lambda t: sequence_sum(t, t.logprobs - t.ref_logprobs),
    )


@mutant("mask-missing", like=LIKE_ORPO)
def orpo_mask_missing(data: Data, logprobs_list: Logprobs, *, lam: float = 0.1) -> Result:
    """The mean of lp over prompt and response."""
    return orpo(
        data,
        logprobs_list,
        lam=lam,
        read=packed,
        score=lambda t: sequence_sum(t, t.logprobs) / sequence_sum(t, torch.ones_like(t.weights)).clamp(min=1),
    )


@mutant("padding-in-denominator", like=LIKE_ORPO, seen="CosyVoice#1449")
def orpo_padding_in_mean(data: Data, logprobs_list: Logprobs, *, lam: float = 0.1) -> Result:
    """Σ w·lp / full length."""
    return orpo(
        data,
        logprobs_list,
        lam=lam,
        score=lambda t: weighted_sum(t, t.logprobs) / sequence_sum(t, torch.ones_like(t.weights)).clamp(min=1),
    )


@mutant("empty-sequence-nan", like=LIKE_ORPO)
def orpo_empty_sequence_nan(data: Data, logprobs_list: Logprobs, *, lam: float = 0.1) -> Result:
    """Σ w·lp / Σ w of a sequence that has no weight."""
    return orpo(data, logprobs_list, lam=lam, score=lambda t: weighted_sum(t, t.logprobs) / sequence_sum(t, t.weights))


@mutant("empty-sequence-counted", like=LIKE_DPO)
def dpo_empty_pair_counted(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """A fully masked pair costs log 2."""

    def reduce(t: Tokens, x: Tensor) -> Mean:
        return x.mean(), torch.ones_like(x).sum()

    return dpo(data, logprobs_list, beta=beta, label_smoothing=label_smoothing, reduce=reduce)


@mutant("weights-squared", like=LIKE_DPO)
def dpo_weights_squared(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """Σ w²·(lp − ref)."""
    return dpo(
        data,
        logprobs_list,
        beta=beta,
        label_smoothing=label_smoothing,
        score=lambda t: weighted_sum(t, t.weights * (t.logprobs - t.ref_logprobs)),
    )


@mutant("weights-binarised", like=LIKE_DPO)
def dpo_weights_binarised(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """w != 0 in place of w."""
    return dpo(
        data,
        logprobs_list,
        beta=beta,
        label_smoothing=label_smoothing,
        score=lambda t: sequence_sum(t, t.active * (t.logprobs - t.ref_logprobs)),
    )


@mutant("mask-by-token-id", like=LIKE_DPO)
def dpo_masks_eos(data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Result:
    """Every end-of-sequence token taken for padding."""
    score = lambda t: weighted_sum(t, wrong.not_eos(t, data) * (t.logprobs - t.ref_logprobs))  # noqa: E731
    return dpo(data, logprobs_list, beta=beta, label_smoothing=label_smoothing, score=score)


def chosen_masks(data: Data, logprobs_list: Logprobs, reads: Sequence[str]) -> Tokens:
    """The chosen side's weights, cut or padded with 0, for the rejected side too."""
    t = packed(data, logprobs_list, reads)
    rows = list(torch.split(t.weights, lengths_of(logprobs_list)))
    for i in range(0, len(rows), 2):
        own, other = rows[i], rows[i + 1]
        rows[i + 1] = F.pad(own, (0, max(0, len(other) - len(own))))[: len(other)]
    return blanked(replace(t, weights=torch.cat(rows)))


@mutant("pair-masks-swapped", like=LIKE_DPO, seen="CosyVoice#1449")
def dpo_chosen_masks(data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Result:
    """The chosen side's mask on both sides."""
    return dpo(data, logprobs_list, beta=beta, label_smoothing=label_smoothing, read=chosen_masks)


@mutant("pair-masks-swapped", like=LIKE_ORPO, seen="CosyVoice#1449")
def orpo_chosen_masks(data: Data, logprobs_list: Logprobs, *, lam: float = 0.1) -> Result:
    """The same for ORPO."""
    return orpo(data, logprobs_list, lam=lam, read=chosen_masks)


# Normalisation


@mutant("divided-twice", like=LIKE_DPO)
def dpo_divided_twice(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """The mean over pairs, over the number of pairs."""
    return dpo(
        data,
        logprobs_list,
        beta=beta,
        label_smoothing=label_smoothing,
        reduce=times(lambda t: 2 / len(data), pair_mean),
    )


@mutant("world-size-factor", like=LIKE_DPO)
def dpo_world_size(data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Result:
    """Multiplied by the number of ranks."""
    return dpo(
        data,
        logprobs_list,
        beta=beta,
        label_smoothing=label_smoothing,
        reduce=times(lambda t: wrong.world_size(), pair_mean),
    )


@mutant("constant-factor", like=LIKE_DPO)
def dpo_divided_by_beta(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """The loss over β, so that the gradient at the start does not depend on it."""
    return dpo(
        data,
        logprobs_list,
        beta=beta,
        label_smoothing=label_smoothing,
        reduce=times(lambda t: 1 / beta, pair_mean),
    )


@mutant("pairs-miscounted", like=LIKE_DPO)
def dpo_divided_by_sequences(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """Σ over pairs / the number of sequences."""
    return dpo(data, logprobs_list, beta=beta, label_smoothing=label_smoothing, reduce=mean_over_sequences)


@mutant("pairs-miscounted", like=LIKE_ORPO)
def orpo_divided_by_sequences(data: Data, logprobs_list: Logprobs, *, lam: float = 0.1) -> Result:
    """The same for ORPO."""
    return orpo(data, logprobs_list, lam=lam, reduce=mean_over_sequences)


def mean_over_sequences(t: Tokens, x: Tensor) -> Mean:
    sequences = nonempty(t).sum()
    return (each_pair(t) * x).sum() / sequences, sequences


@mutant("broadcast", like=LIKE_DPO)
def dpo_broadcast(data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Result:
    """Chosen ``[P, 1]`` less rejected ``[P]``: every chosen against every rejected."""
    return dpo(
        data,
        logprobs_list,
        beta=beta,
        label_smoothing=label_smoothing,
        margin=lambda h_w, h_l: h_w[:, None] - h_l,
    )


@mutant("cross-talk", like=LIKE_DPO)
def dpo_centres_margins(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """Each margin less the batch's mean margin."""
    return dpo(
        data,
        logprobs_list,
        beta=beta,
        label_smoothing=label_smoothing,
        margin=lambda h_w, h_l: h_w - h_l - (h_w - h_l).mean().detach(),
    )


# Frame


@mutant("frame-shift", like=LIKE_DPO, seen="wyf3/llm_related#33")
def dpo_ref_shifted(data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Result:
    """Reference logprobs in the frame of the inputs."""
    read = wrong.shifted("ref_logprobs")
    return dpo(data, logprobs_list, beta=beta, label_smoothing=label_smoothing, read=read)


@mutant("target-dropped", like=LIKE_DPO)
def dpo_last_target_dropped(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """[:-1] once more, on targets that already are shifted."""
    score = lambda t: weighted_sum(t, wrong.not_last(t) * (t.logprobs - t.ref_logprobs))  # noqa: E731
    return dpo(data, logprobs_list, beta=beta, label_smoothing=label_smoothing, score=score)


@mutant("datum-misaligned", like=LIKE_DPO)
def dpo_ref_reversed(data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Result:
    """Reference logprobs of the datums in reverse order."""
    read = wrong.reordered("ref_logprobs", wrong.reverse)
    return dpo(data, logprobs_list, beta=beta, label_smoothing=label_smoothing, read=read)


@mutant("datum-ignored", like=LIKE_DPO)
def dpo_first_pair_only(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """Datums 0 and 1 taken for the batch's chosen and rejected; the rest is counted alone."""

    def reduce(t: Tokens, x: Tensor) -> Mean:
        return pair_mean(t, x * torch.eye(len(x)).to(x)[0])

    return dpo(data, logprobs_list, beta=beta, label_smoothing=label_smoothing, reduce=reduce)


@mutant("order-dependent", like=LIKE_DPO)
def dpo_decays_by_index(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """Pair i counts 1 / (i + 1)."""

    def reduce(t: Tokens, x: Tensor) -> Mean:
        return pair_mean(t, x / torch.arange(1, len(x) + 1).to(x))

    return dpo(data, logprobs_list, beta=beta, label_smoothing=label_smoothing, reduce=reduce)


# Pairs


@mutant("sign-flipped", like=LIKE_DPO)
def dpo_sign_flipped(data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Result:
    """+log σ(β·m)."""
    return dpo(
        data,
        logprobs_list,
        beta=beta,
        label_smoothing=label_smoothing,
        term=lambda m, beta, eps: -eq.preference(m, beta, eps),
    )


def swapped(h: Tensor) -> tuple[Tensor, Tensor]:
    """Rejected 2i and chosen 2i + 1."""
    return h[1::2], h[0::2]


def halves(h: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen first, then the rejected."""
    half = len(h) // 2
    return h[:half], h[half:]


@mutant("sides-swapped", like=LIKE_DPO)
def dpo_sides_swapped(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """The rejected less the chosen."""
    return dpo(data, logprobs_list, beta=beta, label_smoothing=label_smoothing, sides=swapped)


@mutant("sides-swapped", like=LIKE_ORPO)
def orpo_sides_swapped(data: Data, logprobs_list: Logprobs, *, lam: float = 0.1) -> Result:
    """The same for ORPO: the rejected side's likelihood is trained."""
    return orpo(data, logprobs_list, lam=lam, sides=swapped)


@mutant("pair-layout", like=LIKE_DPO)
def dpo_halves(data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Result:
    """The first half of the batch against the second."""
    return dpo(data, logprobs_list, beta=beta, label_smoothing=label_smoothing, sides=halves)


@mutant("pair-layout", like=LIKE_ORPO)
def orpo_halves(data: Data, logprobs_list: Logprobs, *, lam: float = 0.1) -> Result:
    """The same for ORPO."""
    return orpo(data, logprobs_list, lam=lam, sides=halves)


@mutant("ref-inert", like=LIKE_DPO, seen="linkedin/Liger-Kernel#387")
def dpo_without_reference(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """Σ w·lp."""
    return dpo(
        data,
        logprobs_list,
        beta=beta,
        label_smoothing=label_smoothing,
        score=lambda t: weighted_sum(t, t.logprobs),
    )


@mutant("reference-misused", like=LIKE_DPO)
def dpo_reference_added(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """Σ w·(lp + ref)."""
    return dpo(
        data,
        logprobs_list,
        beta=beta,
        label_smoothing=label_smoothing,
        score=lambda t: weighted_sum(t, t.logprobs + t.ref_logprobs),
    )


@mutant("reference-misused", like=LIKE_DPO, seen="huggingface/trl#6527")
def dpo_reference_of_chosen_only(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """The rejected side without a reference."""

    def score(t: Tokens) -> Tensor:
        ref = weighted_sum(t, t.ref_logprobs)
        is_chosen = torch.arange(len(ref)).to(ref) % 2 == 0
        return weighted_sum(t, t.logprobs) - torch.where(is_chosen, ref, 0)

    return dpo(data, logprobs_list, beta=beta, label_smoothing=label_smoothing, score=score)


@mutant("side-detached", like=LIKE_DPO)
def dpo_rejected_detached(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """h_w − sg(h_l)."""
    return dpo(
        data,
        logprobs_list,
        beta=beta,
        label_smoothing=label_smoothing,
        margin=lambda h_w, h_l: h_w - h_l.detach(),
    )


@mutant("side-detached", like=LIKE_ORPO)
def orpo_rejected_detached(data: Data, logprobs_list: Logprobs, *, lam: float = 0.1) -> Result:
    """The rejected side is a constant."""
    return orpo(data, logprobs_list, lam=lam, sides=lambda a: (a[0::2], a[1::2].detach()))


@mutant("detached-term", like=LIKE_ORPO)
def orpo_odds_detached(data: Data, logprobs_list: Logprobs, *, lam: float = 0.1) -> Result:
    """The odds-ratio term is in the value, not in the gradient."""
    return orpo(data, logprobs_list, lam=lam, odds_ratio=lambda difference: eq.odds_ratio(difference).detach())


@mutant("mean-logprob-margin", like=LIKE_DPO, seen="huggingface/trl#1265")
def dpo_mean_logprobs(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """Σ w·(lp − ref) / Σ w."""
    return dpo(
        data,
        logprobs_list,
        beta=beta,
        label_smoothing=label_smoothing,
        score=lambda t: weighted_mean(t, t.logprobs - t.ref_logprobs),
    )


def even(data: Data, logprobs_list: Logprobs) -> tuple[Data, list[Tensor], Tensor]:
    """The batch without an odd last datum, and a 0 that gives that one a gradient of 0."""
    count = len(data) // 2 * 2
    rest = [lp.flatten()[:0].sum() for lp in logprobs_list[count:]]
    return data[:count], list(logprobs_list[:count]), torch.stack(rest).sum() if rest else torch.zeros(())


@mutant("odd-datum-dropped", like=LIKE_DPO)
def dpo_odd_datum_dropped(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """`len(data) // 2` pairs, whatever is left over."""
    pairs, logprobs, zero = even(data, logprobs_list)
    loss, metrics = dpo(pairs, logprobs, beta=beta, label_smoothing=label_smoothing)
    return loss + zero.to(loss), metrics


@mutant("odd-datum-dropped", like=LIKE_ORPO)
def orpo_odd_datum_dropped(data: Data, logprobs_list: Logprobs, *, lam: float = 0.1) -> Result:
    """The same for ORPO."""
    pairs, logprobs, zero = even(data, logprobs_list)
    loss, metrics = orpo(pairs, logprobs, lam=lam)
    return loss + zero.to(loss), metrics


# Numerics


@mutant("log-of-sigmoid", like=LIKE_DPO)
def dpo_log_of_sigmoid(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """log(σ(β·m))."""

    def term(m: Tensor, beta: float, eps: float) -> Tensor:
        return -(1 - eps) * (beta * m).sigmoid().log() - eps * F.logsigmoid(-beta * m)

    return dpo(data, logprobs_list, beta=beta, label_smoothing=label_smoothing, term=term)


@mutant("log-of-sigmoid", like=LIKE_ORPO)
def orpo_log_of_sigmoid(data: Data, logprobs_list: Logprobs, *, lam: float = 0.1) -> Result:
    """log(σ(log-odds ratio))."""
    return orpo(data, logprobs_list, lam=lam, odds_ratio=lambda difference: -difference.sigmoid().log())


@mutant("log-odds-nan", like=LIKE_ORPO, seen="huggingface/trl#2564")
def orpo_log_odds_naive(data: Data, logprobs_list: Logprobs, *, lam: float = 0.1) -> Result:
    """a − log(1 − exp(a))."""
    return orpo(data, logprobs_list, lam=lam, log_odds=lambda a: a - torch.log(1 - a.exp()))


@mutant("log-odds-nan", like=LIKE_ORPO, seen="huggingface/trl#3237")
def orpo_log_odds_single_where(data: Data, logprobs_list: Logprobs, *, lam: float = 0.1) -> Result:
    """One where() around both branches of log(1 − exp(a)): the branch not taken has a nan gradient."""

    def log_odds(a: Tensor) -> Tensor:
        return a - torch.where(a > -0.6931, torch.log(-torch.expm1(a)), torch.log1p(-a.exp()))

    return orpo(data, logprobs_list, lam=lam, log_odds=log_odds)


@mutant("log-odds-biased", like=LIKE_ORPO, seen="ColossalAI#6407")
def orpo_log_odds_biased(data: Data, logprobs_list: Logprobs, *, lam: float = 0.1) -> Result:
    """a − log(1.0001 − exp(a))."""
    return orpo(data, logprobs_list, lam=lam, log_odds=lambda a: a - torch.log(1.0001 - a.exp()))


@mutant("log-odds-biased", like=LIKE_ORPO)
def orpo_log_odds_clamped(data: Data, logprobs_list: Logprobs, *, lam: float = 0.1) -> Result:
    """a held at −0.1 and below."""
    return orpo(data, logprobs_list, lam=lam, log_odds=lambda a: eq.log_odds(a.clamp(max=-0.1)))


# Knobs and metrics


@mutant("inert-knob", like=LIKE_DPO, seen="huggingface/trl#6808")
def dpo_beta_inert(data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Result:
    """0.1 whatever ``beta`` is."""
    return dpo(data, logprobs_list, beta=0.1, label_smoothing=label_smoothing)


@mutant("inert-knob", like=LIKE_DPO, seen="NovaSky-AI/SkyRL#1053")
def dpo_label_smoothing_inert(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """0 whatever ``label_smoothing`` is."""
    return dpo(data, logprobs_list, beta=beta, label_smoothing=0.0)


@mutant("inert-knob", like=LIKE_ORPO)
def orpo_lam_inert(data: Data, logprobs_list: Logprobs, *, lam: float = 0.1) -> Result:
    """0.1 whatever ``lam`` is."""
    return orpo(data, logprobs_list, lam=0.1)


@mutant("metric-not-mergeable", like=LIKE_DPO)
def dpo_metric_of_last_pair(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """The last pair's margin reported for all."""
    mean = lambda active, x: parts.mean_of(active[-1:], x[-1:])  # noqa: E731
    return dpo(data, logprobs_list, beta=beta, label_smoothing=label_smoothing, report=partial(report, mean=mean))


@mutant("metric-scaled-twice", like=LIKE_DPO, seen="thinking-machines-lab/tinker-cookbook#21")
def dpo_reward_margin_scaled_twice(
    data: Data, logprobs_list: Logprobs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Result:
    """β²·m reported as β·m."""
    loss, metrics = dpo(data, logprobs_list, beta=beta, label_smoothing=label_smoothing)
    return loss, metrics | {"reward_margin": beta * metrics["reward_margin"]}
