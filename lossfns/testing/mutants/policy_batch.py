"""Policy-gradient losses that do one thing wrong with the batch: its contract, masks, denominators and frame."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lossfns import terms as eq
from lossfns.segments import nonempty, sequence_sum, to_tokens, weight_divisor
from lossfns.testing.mutants import parts, wrong
from lossfns.testing.mutants.families import (
    LIKE_GRPO,
    LIKE_GSPO,
    LIKE_GSPO_TOKEN,
    LIKE_PPO,
    LIKE_PPO_SEQUENCE_MEAN,
    gspo,
    gspo_token,
    mutant,
    outside,
)
from lossfns.testing.mutants.parts import (
    CLIP,
    GRPO,
    Clip,
    Data,
    Logprobs,
    Mean,
    Result,
    capped_exp,
    clipped,
    each_sequence,
    k3,
    lengths_of,
    log_ratio,
    mean_log_ratio,
    packed,
    penalised,
    policy,
    report,
    sequence_mean,
    token_mean,
    token_ratio,
    unclipped,
)
from lossfns.testing.mutants.wrong import over, times
from lossfns.tokens import Tokens

# The contract


@mutant("not-the-contract", like=LIKE_PPO, seen="thinking-machines-lab/tinker-cookbook#703")
def ppo_metrics_are_tensors(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Any:
    """Metrics that still are tensors."""
    loss, metrics = policy(data, logprobs_list, clip=clip)
    return loss, {name: torch.tensor(value) for name, value in metrics.items()}


@mutant("not-the-contract", like=LIKE_PPO)
def ppo_loss_is_detached(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """A loss that is attached to nothing."""
    loss, metrics = policy(data, logprobs_list, clip=clip)
    return loss.detach(), metrics


@mutant("inputs-mutated", like=LIKE_PPO)
def ppo_masks_in_place(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """The datums' own old logprobs are overwritten where the weight is 0."""
    return policy(data, logprobs_list, clip=clip, read=wrong.blanking("old_logprobs"))


AVERAGE: list[Tensor] = []


@mutant("state-between-calls", like=LIKE_PPO)
def ppo_running_baseline(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """A − the moving average of the batches before."""

    def term(t: Tokens, r: Tensor, clip: Clip) -> Tensor:
        before = AVERAGE[-1].to(r) if AVERAGE else r.new_zeros(())
        AVERAGE[:] = [0.9 * before + 0.1 * parts.mean_of(t.active, t.advantages)]
        advantages = torch.where(t.active, t.advantages - before, 0)
        return clipped(replace(t, columns={**t.columns, "advantages": advantages}), r, clip)

    return policy(data, logprobs_list, clip=clip, term=term)


@mutant("gradient-missing", like=LIKE_PPO, seen="fw-ai/cookbook")
def ppo_skips_empty(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """`continue` at a datum with nothing to train on: its logprobs never enter the graph."""
    return policy(data, wrong.without_empty(data, logprobs_list), clip=clip)


@mutant("gradient-missing", like=LIKE_PPO)
def ppo_skips_zero_advantages(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """`continue` at a datum whose advantages are all 0."""
    signal = [zip(wrong.numbers(datum, "weights"), wrong.numbers(datum, "advantages")) for datum in data]
    zero = [not any(w != 0 and advantage != 0 for w, advantage in rows) for rows in signal]
    return policy(data, wrong.detached(logprobs_list, zero), clip=clip)


@mutant("host-sync-per-datum", like=LIKE_PPO, seen="torchtune#522")
def ppo_item_per_datum(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """`.item()` for the ratio of each datum."""

    def mean(active: Tensor, x: Tensor) -> Tensor:
        total = 0.0
        for own in torch.split(torch.where(active, x, 0), lengths_of(logprobs_list)):
            total += own.sum().item()
        return total / active.sum().clamp(min=1).to(x)

    return policy(data, logprobs_list, clip=clip, report=partial(report, mean=mean))


@mutant("branch-on-values", like=LIKE_PPO, seen="create_custom_loss of tinker 0.38")
def ppo_branches_on_clip(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """Clips if any ratio is outside the bounds."""

    def term(t: Tokens, r: Tensor, clip: Clip) -> Tensor:
        if outside(t, r, clip).any():
            return clipped(t, r, clip)
        return unclipped(t, r, clip)

    return policy(data, logprobs_list, clip=clip, term=term)


@mutant("branch-on-values", like=LIKE_GRPO)
def grpo_branches_on_kl(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, kl_beta: float = 0.1) -> Result:
    """Adds KL if the policy has left the reference."""

    def kl(t: Tokens) -> Tensor:
        if (t.logprobs != t.ref_logprobs).any():
            return k3(t)
        return torch.zeros_like(t.weights)

    return penalised(data, logprobs_list, clip=clip, kl_beta=kl_beta, kl=kl)


@mutant("no-grad-for-detach", like=LIKE_GSPO_TOKEN)
def gspo_token_no_grad(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """sg(s) by `no_grad`."""

    def ratio(t: Tokens) -> Tensor:
        with torch.no_grad():
            s = mean_log_ratio(t)
        return capped_exp(s + (t.logprobs - t.logprobs.detach()))

    return policy(data, logprobs_list, clip=clip, ratio=ratio, reduce=sequence_mean)


@mutant("low-precision", like=LIKE_PPO, seen="allenai/open-instruct#1387")
def ppo_bfloat16(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """lp − old in bfloat16."""
    return policy(
        data,
        logprobs_list,
        clip=clip,
        ratio=lambda t: capped_exp((t.logprobs.bfloat16() - t.old_logprobs.bfloat16()).to(t.logprobs)),
    )


@mutant("low-precision", like=LIKE_GRPO, seen="huggingface/trl#4303")
def grpo_kl_bfloat16(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, kl_beta: float = 0.1) -> Result:
    """KL from logprobs in bfloat16."""

    def kl(t: Tokens) -> Tensor:
        return eq.k3(t.logprobs.bfloat16(), t.ref_logprobs.bfloat16()).to(t.logprobs)

    return penalised(data, logprobs_list, clip=clip, kl_beta=kl_beta, kl=kl)


@mutant("silent-truncation", like=LIKE_PPO, seen="Fireworks' and Tinker's documented examples")
def ppo_truncates(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """Rows cut to the shortest of their datum."""
    return policy(data, logprobs_list, clip=clip, read=wrong.truncated)


@mutant("silent-truncation", like=LIKE_PPO)
def ppo_expands_rows(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """A row of one value broadcast over the datum's tokens."""
    return policy(data, logprobs_list, clip=clip, read=wrong.expanded)


# Masks


@mutant("mask-after-exp", like=LIKE_PPO, seen="PrimeIntellect-ai/prime-rl#2084")
def ppo_mask_after_exp(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """Σ w·l over whatever stands in the masked slots."""
    return policy(data, logprobs_list, clip=clip, read=packed)


@mutant("mask-after-exp", like=LIKE_GRPO, seen="NVIDIA-NeMo/RL#4120")
def grpo_kl_mask_after_exp(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, kl_beta: float = 0.1) -> Result:
    """Σ w·KL over whatever stands in the masked slots."""
    return penalised(
        data, logprobs_list, clip=clip, kl_beta=kl_beta, kl=lambda t: k3(packed(data, logprobs_list, GRPO))
    )


@mutant("mask-after-exp", like=LIKE_GSPO)
def gspo_mask_after_exp(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """Σ mask·d over whatever stands in the masked slots."""
    return gspo(data, logprobs_list, clip=clip, read=packed)


def loosely_capped(d: Tensor) -> Tensor:
    """d held within ±20; unlike `clamp`, it passes on the gradient of a nan."""
    return torch.maximum(torch.minimum(d, d.new_tensor(20.0)), d.new_tensor(-20.0))


def active_token_mean(t: Tokens, x: Tensor) -> Mean:
    """The token mean with the mask applied to the finished term."""
    return token_mean(t, torch.where(t.active, x, 0))


@mutant("where-after-exp", like=LIKE_PPO, seen="PrimeIntellect-ai/prime-rl#2085")
def ppo_where_after_exp(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """where() around the finished term: the value is right, the gradient is 0·nan."""
    return policy(
        data,
        logprobs_list,
        clip=clip,
        read=packed,
        ratio=lambda t: loosely_capped(log_ratio(t)).exp(),
        reduce=active_token_mean,
    )


@mutant("where-after-exp", like=LIKE_GRPO, seen="huggingface/trl#5413")
def grpo_kl_where_after_exp(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, kl_beta: float = 0.1) -> Result:
    """where() around the finished KL."""

    def kl(t: Tokens) -> Tensor:
        every = packed(data, logprobs_list, GRPO)
        x = loosely_capped(every.ref_logprobs - every.logprobs)
        return torch.expm1(x) - x

    return penalised(data, logprobs_list, clip=clip, kl_beta=kl_beta, kl=kl, reduce_kl=active_token_mean)


def unmasked_sum(t: Tokens, x: Tensor) -> Mean:
    """Σ x / Σ w."""
    return x.sum() / t.weights.sum(), t.weights.sum()


@mutant("mask-missing", like=LIKE_PPO, seen="ROLL#444")
def ppo_mask_missing(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """Σ l / Σ w: the mask is in the denominator alone."""
    return policy(data, logprobs_list, clip=clip, read=packed, reduce=unmasked_sum)


@mutant("kl-unmasked", like=LIKE_GRPO, seen="slime#1370")
def grpo_kl_unmasked(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, kl_beta: float = 0.1) -> Result:
    """Σ KL / Σ w: the prompt's tokens are held to the reference too."""
    return penalised(
        data,
        logprobs_list,
        clip=clip,
        kl_beta=kl_beta,
        kl=lambda t: k3(packed(data, logprobs_list, GRPO)),
        reduce_kl=unmasked_sum,
    )


def token_count(t: Tokens) -> Tensor:
    """How many tokens there are, masked or not."""
    return torch.ones_like(t.weights).sum()


@mutant("padding-in-denominator", like=LIKE_PPO)
def ppo_padding_in_denominator(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """Σ w·l / the number of all tokens."""
    return policy(data, logprobs_list, clip=clip, reduce=over(token_count))


@mutant("padding-in-denominator", like=LIKE_PPO_SEQUENCE_MEAN)
def ppo_padding_in_sequence_mean(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """Each sequence's sum over its full length."""
    return policy(
        data,
        logprobs_list,
        clip=clip,
        reduce=lambda t, x: sequence_mean(t, x * to_tokens(t, weight_divisor(t)) / to_tokens(t, full_length(t))),
    )


def full_length(t: Tokens) -> Tensor:
    return sequence_sum(t, torch.ones_like(t.weights)).clamp(min=1)


@mutant("padding-in-sequence-ratio", like=LIKE_GSPO, seen="fw-ai/cookbook")
def gspo_padding_in_ratio(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """s = exp(Σ d / full length)."""
    return gspo(
        data,
        logprobs_list,
        clip=clip,
        ratio=lambda t: capped_exp(to_tokens(t, sequence_sum(t, log_ratio(t)) / full_length(t))),
    )


@mutant("padding-in-sequence-ratio", like=LIKE_GSPO_TOKEN, seen="Soup#744")
def gspo_token_padding_in_ratio(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """The same for GSPO-token."""

    def ratio(t: Tokens) -> Tensor:
        mean = to_tokens(t, sequence_sum(t, log_ratio(t)) / full_length(t))
        return capped_exp(eq.straight_through(mean, t.logprobs))

    return gspo_token(data, logprobs_list, clip=clip, ratio=ratio)


@mutant("mask-by-token-id", like=LIKE_PPO, seen="Automodel#1336")
def ppo_masks_eos(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """Every end-of-sequence token taken for padding."""
    return policy(data, logprobs_list, clip=clip, reduce=lambda t, x: token_mean(t, x * wrong.not_eos(t, data)))


@mutant("empty-sequence-nan", like=LIKE_PPO_SEQUENCE_MEAN, seen="nanochat#618")
def ppo_empty_sequence_nan(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """Σ w·l / Σ w of a sequence that has no weight."""

    def reduce(t: Tokens, x: Tensor) -> Mean:
        count = nonempty(t).sum()
        return (sequence_sum(t, t.weights * x) / sequence_sum(t, t.weights)).sum() / count, count

    return policy(data, logprobs_list, clip=clip, reduce=reduce)


@mutant("empty-sequence-nan", like=LIKE_GSPO, seen="OLMo-core#657")
def gspo_empty_sequence_nan(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """The mean log-ratio of a sequence that has no active token."""

    def ratio(t: Tokens) -> Tensor:
        mean = sequence_sum(t, log_ratio(t)) / sequence_sum(t, t.active.to(t.weights))
        return capped_exp(to_tokens(t, mean))

    return gspo(data, logprobs_list, clip=clip, ratio=ratio)


def mean_over_all_sequences(t: Tokens, x: Tensor) -> Mean:
    """The sequence mean, with B below."""
    loss, count = sequence_mean(t, x)
    every = torch.ones_like(nonempty(t)).sum()
    return loss * count / every, every


@mutant("empty-sequence-counted", like=LIKE_PPO_SEQUENCE_MEAN, seen="huggingface/trl")
def ppo_empty_sequence_counted(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """Divided by the number of datums, trained on or not."""
    return policy(data, logprobs_list, clip=clip, reduce=mean_over_all_sequences)


@mutant("empty-sequence-counted", like=LIKE_GSPO, seen="linkedin/Liger-Kernel")
def gspo_empty_sequence_counted(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """The same for GSPO."""
    return gspo(data, logprobs_list, clip=clip, reduce=mean_over_all_sequences)


@mutant("weights-squared", like=LIKE_PPO, seen="allenai/open-instruct#535")
def ppo_weights_squared(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """The advantages are weighted, and the loss once more."""
    return policy(data, logprobs_list, clip=clip, term=lambda t, r, clip: t.weights * clipped(t, r, clip))


@mutant("weights-binarised", like=LIKE_PPO)
def ppo_weights_binarised(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """w != 0 in place of w."""
    return policy(data, logprobs_list, clip=clip, reduce=lambda t, x: token_mean(replace(t, weights=t.active.to(x)), x))


# Normalisation


@mutant("mean-of-means", like=LIKE_PPO, seen="rllm#782")
def ppo_mean_of_means(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """Micro-batches of two datums, each averaged by itself."""
    return policy(data, logprobs_list, clip=clip, reduce=wrong.chunks_of_two)


@mutant("mean-of-means", like=LIKE_GRPO, seen="verl-project/verl#5625")
def grpo_mean_of_means(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, kl_beta: float = 0.1) -> Result:
    """The same for GRPO."""
    return penalised(
        data,
        logprobs_list,
        clip=clip,
        kl_beta=kl_beta,
        reduce=wrong.chunks_of_two,
        reduce_kl=wrong.chunks_of_two,
    )


@mutant("mixed-denominators", like=LIKE_GRPO, seen="huggingface/trl#2995")
def grpo_mixed_denominators(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, kl_beta: float = 0.1) -> Result:
    """The policy term by token, the KL term by sequence."""
    return penalised(data, logprobs_list, clip=clip, kl_beta=kl_beta, reduce_kl=sequence_mean)


@mutant("divided-twice", like=LIKE_PPO, seen="swift#10117")
def ppo_divided_twice(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """The token mean, over the number of datums."""
    return policy(data, logprobs_list, clip=clip, reduce=times(lambda t: 1 / len(data)))


@mutant("divided-twice", like=LIKE_GSPO)
def gspo_divided_twice(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """The sequence mean, over the number of tokens."""
    return gspo(data, logprobs_list, clip=clip, reduce=times(lambda t: 1 / t.active.sum().clamp(min=1), sequence_mean))


@mutant("world-size-factor", like=LIKE_PPO, seen="arctic#119")
def ppo_world_size(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """Multiplied by the number of ranks, for a mean that nobody takes."""
    return policy(data, logprobs_list, clip=clip, reduce=times(lambda t: wrong.world_size()))


@mutant("constant-factor", like=LIKE_PPO, seen="huggingface/trl#5619")
def ppo_constant_factor(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """A quarter of the gradient, for accumulation steps that are already in the denominator."""
    return policy(data, logprobs_list, clip=clip, reduce=times(lambda t: 1 / 4))


@mutant("epsilon-in-denominator", like=LIKE_PPO, seen="verl-project/verl")
def ppo_epsilon_in_denominator(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """Σ w·l / (Σ w + 1)."""
    return policy(data, logprobs_list, clip=clip, reduce=over(lambda t: t.weights.sum() + 1))


@mutant("broadcast", like=LIKE_PPO_SEQUENCE_MEAN, seen="RLinf#1565")
def ppo_broadcast(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """The sequences' sums ``[B]`` over their weights ``[B, 1]``: every sum over every weight."""

    def reduce(t: Tokens, x: Tensor) -> Mean:
        has, count = nonempty(t), nonempty(t).sum()
        every = sequence_sum(t, t.weights * x) / weight_divisor(t)[:, None]
        return (has[:, None] * every).sum() / count**2, count

    return policy(data, logprobs_list, clip=clip, reduce=reduce)


@mutant("cross-talk", like=LIKE_PPO)
def ppo_whitens_advantages(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """(A − mean) / (std + 1e-8) over the batch, inside the loss."""

    def term(t: Tokens, r: Tensor, clip: Clip) -> Tensor:
        centred = torch.where(t.active, t.advantages - parts.mean_of(t.active, t.advantages), 0)
        white = centred / (parts.mean_of(t.active, centred.square()).sqrt() + 1e-8)
        return clipped(replace(t, columns={**t.columns, "advantages": white}), r, clip)

    return policy(data, logprobs_list, clip=clip, term=term)


@mutant("cross-talk", like=LIKE_PPO)
def ppo_normalises_ratios(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """r / the batch's mean ratio."""
    return policy(
        data,
        logprobs_list,
        clip=clip,
        ratio=lambda t: token_ratio(t) / parts.mean_of(t.active, token_ratio(t).detach()),
    )


@mutant("zero-advantage-denominator", like=LIKE_PPO, seen="Fireworks' NUM_LOSS_TOKENS")
def ppo_zero_advantages_not_counted(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """Divided by the weight of the tokens that have a gradient."""

    def trained(t: Tokens) -> Tensor:
        weight = torch.where(t.advantages != 0, t.weights, 0).sum()
        return torch.where(weight > 0, weight, 1)

    return policy(data, logprobs_list, clip=clip, reduce=over(trained))


# Frame


@mutant("frame-shift", like=LIKE_PPO, seen="GMISWE/tinker-cloud#66")
def ppo_old_shifted(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """Old logprobs in the frame of the inputs."""
    return policy(data, logprobs_list, clip=clip, read=wrong.shifted("old_logprobs"))


@mutant("frame-shift", like=LIKE_PPO)
def ppo_advantages_shifted(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """Advantages in the frame of the inputs."""
    return policy(data, logprobs_list, clip=clip, read=wrong.shifted("advantages"))


@mutant("frame-shift", like=LIKE_PPO, seen="allenai/open-instruct#1549")
def ppo_weights_shifted(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """Weights shifted twice."""
    return policy(data, logprobs_list, clip=clip, read=wrong.shifted("weights"))


@mutant("frame-shift", like=LIKE_GRPO)
def grpo_ref_shifted(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, kl_beta: float = 0.1) -> Result:
    """Reference logprobs in the frame of the inputs."""
    return penalised(data, logprobs_list, clip=clip, kl_beta=kl_beta, read=wrong.shifted("ref_logprobs"))


@mutant("target-dropped", like=LIKE_PPO, seen="arctic#110")
def ppo_last_target_dropped(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """[:-1] once more, on targets that already are shifted."""
    return policy(data, logprobs_list, clip=clip, reduce=lambda t, x: token_mean(t, x * wrong.not_last(t)))


@mutant("datum-misaligned", like=LIKE_PPO, seen="arctic#110")
def ppo_advantages_by_length(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """Advantages in the order of a sort by length that was never undone."""
    return policy(data, logprobs_list, clip=clip, read=wrong.reordered("advantages", wrong.by_length))


@mutant("datum-misaligned", like=LIKE_GRPO)
def grpo_ref_reversed(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, kl_beta: float = 0.1) -> Result:
    """Reference logprobs of the datums in reverse order."""
    read = wrong.reordered("ref_logprobs", wrong.reverse)
    return penalised(data, logprobs_list, clip=clip, kl_beta=kl_beta, read=read)


@mutant("datum-ignored", like=LIKE_PPO, seen="fw-ai/cookbook#376")
def ppo_last_datum_only(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """`=` where `+=` should stand: the last datum's sum alone."""
    return policy(
        data,
        logprobs_list,
        clip=clip,
        reduce=lambda t, x: token_mean(t, x * each_sequence(t, torch.eye(len(data))[-1])),
    )


@mutant("order-dependent", like=LIKE_PPO)
def ppo_decays_by_index(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """Datum i counts 1 / (i + 1)."""
    return policy(
        data,
        logprobs_list,
        clip=clip,
        reduce=lambda t, x: token_mean(t, x * each_sequence(t, 1 / torch.arange(1, len(data) + 1))),
    )
