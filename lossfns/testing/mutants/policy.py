"""Policy-gradient losses that have one expression of a token's term wrong, or of what they report of it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import lossfns
from lossfns import terms as eq
from lossfns.segments import active_mean, sequence_sum, to_tokens
from lossfns.testing.mutants import parts
from lossfns.testing.mutants.families import (
    LIKE_CISPO,
    LIKE_DAPO,
    LIKE_DRO,
    LIKE_DUAL_CLIP,
    LIKE_GRPO,
    LIKE_GSPO,
    LIKE_GSPO_TOKEN,
    LIKE_PPO,
    LIKE_TIS,
    cispo,
    gspo,
    gspo_token,
    mutant,
    outside,
)
from lossfns.testing.mutants.parts import (
    CLIP,
    Clip,
    Data,
    Logprobs,
    Result,
    capped_exp,
    clipped,
    corrected,
    dro,
    half_square,
    k3,
    lengths_of,
    log_ratio,
    mean_log_ratio,
    penalised,
    policy,
    reinforce,
    report,
    reward,
    token_ratio,
    unclipped,
    weighted,
)
from lossfns.tokens import Tokens

# Sign and advantages


@mutant("sign-flipped", like=LIKE_PPO)
def ppo_sign_flipped(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """+min(r·A, clip(r)·A)."""
    return policy(data, logprobs_list, clip=clip, term=lambda t, r, clip: -clipped(t, r, clip))


@mutant("sign-flipped", like=lossfns.reinforce())
def reinforce_sign_flipped(data: Data, logprobs_list: Logprobs) -> Result:
    """+A·lp."""
    return reinforce(data, logprobs_list, lambda t: t.advantages * t.logprobs)


def with_advantages(t: Tokens, advantages: Tensor) -> Tokens:
    return replace(t, columns={**t.columns, "advantages": advantages})


@mutant("advantage-sign-lost", like=LIKE_PPO)
def ppo_advantage_sign_lost(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """|A|."""
    return policy(
        data,
        logprobs_list,
        clip=clip,
        term=lambda t, r, clip: clipped(with_advantages(t, t.advantages.abs()), r, clip),
    )


@mutant("advantage-inert", like=LIKE_PPO, seen="fw-ai/cookbook#212")
def ppo_advantage_inert(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """1 in place of A."""
    return policy(
        data,
        logprobs_list,
        clip=clip,
        term=lambda t, r, clip: clipped(with_advantages(t, t.active.to(r)), r, clip),
    )


@mutant("advantage-inert", like=LIKE_GRPO)
def grpo_advantage_inert(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, kl_beta: float = 0.1) -> Result:
    """0 in place of A: the KL term alone is trained."""
    return penalised(
        data,
        logprobs_list,
        clip=clip,
        kl_beta=kl_beta,
        term=lambda t, r, clip: clipped(with_advantages(t, torch.zeros_like(r)), r, clip),
    )


@mutant("advantages-pooled", like=LIKE_PPO)
def ppo_advantages_averaged(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """The mean of the sequence's advantages at each of its tokens."""
    return policy(
        data,
        logprobs_list,
        clip=clip,
        term=lambda t, r, clip: clipped(
            with_advantages(t, t.active * to_tokens(t, active_mean(t, t.advantages))), r, clip
        ),
    )


@mutant("advantages-pooled", like=LIKE_GSPO_TOKEN, seen="AReaL#501")
def gspo_token_advantages_summed(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """The sum of the sequence's advantages at each of its tokens."""
    return gspo_token(
        data,
        logprobs_list,
        clip=clip,
        term=lambda t, r, clip: clipped(
            with_advantages(t, t.active * to_tokens(t, sequence_sum(t, t.advantages))), r, clip
        ),
    )


# Ratio


@mutant("missing-stop-gradient", like=LIKE_GSPO_TOKEN, seen="unsloth-zoo#870")
def gspo_token_missing_stop_gradient(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """s·exp(lp − sg(lp)): the sequence ratio has a gradient of its own."""
    return gspo_token(
        data,
        logprobs_list,
        clip=clip,
        ratio=lambda t: capped_exp(mean_log_ratio(t) + (t.logprobs - t.logprobs.detach())),
    )


@mutant("missing-stop-gradient", like=lossfns.reinforce())
def reinforce_missing_stop_gradient(data: Data, logprobs_list: Logprobs) -> Result:
    """−r·A·lp, r = exp(lp − sg(lp)) without sg around r: 1 in value, not in gradient."""
    return reinforce(
        data, logprobs_list, lambda t: -(t.logprobs - t.logprobs.detach()).exp() * t.advantages * t.logprobs
    )


@mutant("missing-stop-gradient", like=LIKE_CISPO)
def cispo_weight_carries_gradient(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """−clip(r)·A·lp: the weight has a gradient of its own."""
    return cispo(data, logprobs_list, clip=clip, term=lambda t, r, clip: -r.clamp(*clip) * t.advantages * t.logprobs)


def constant(x: Tensor) -> Tensor:
    """x with a gradient of 0."""
    return x.detach() + 0 * x


@mutant("no-gradient", like=LIKE_PPO)
def ppo_ratio_detached(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """exp(sg(lp) − old)."""
    return policy(data, logprobs_list, clip=clip, ratio=lambda t: constant(token_ratio(t)))


@mutant("no-gradient", like=LIKE_GRPO, seen="mlx-lm-lora#50")
def grpo_ratio_detached(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, kl_beta: float = 0.1) -> Result:
    """The ratio is constant: KL alone is trained."""
    return penalised(data, logprobs_list, clip=clip, kl_beta=kl_beta, ratio=lambda t: constant(token_ratio(t)))


@mutant("no-gradient", like=LIKE_CISPO)
def cispo_without_logprob(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """−sg(clip(r))·A: what the weight should multiply is forgotten."""
    return cispo(data, logprobs_list, clip=clip, term=lambda t, r, clip: -constant(r.clamp(*clip)) * t.advantages)


@mutant("old-logprobs-inert", like=LIKE_PPO, seen="GMISWE/tinker-cloud#66")
def ppo_old_inert(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """exp(lp − sg(lp))."""
    return policy(data, logprobs_list, clip=clip, ratio=lambda t: capped_exp(t.logprobs - t.logprobs.detach()))


@mutant("old-logprobs-inert", like=lossfns.importance_sampling(), seen="torchforge#571")
def importance_sampling_old_inert(data: Data, logprobs_list: Logprobs) -> Result:
    """The policy gradient as if the current policy had sampled."""
    return policy(data, logprobs_list, term=unclipped, ratio=lambda t: capped_exp(t.logprobs - t.logprobs.detach()))


@mutant("ratio-inverted", like=LIKE_PPO)
def ppo_ratio_inverted(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """exp(old − lp)."""
    return policy(data, logprobs_list, clip=clip, ratio=lambda t: capped_exp(-log_ratio(t)))


@mutant("ratio-inverted", like=LIKE_GSPO)
def gspo_ratio_inverted(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """exp(mean of old − lp)."""
    return gspo(data, logprobs_list, clip=clip, ratio=lambda t: capped_exp(-mean_log_ratio(t)))


@mutant("ratio-inverted", like=LIKE_CISPO)
def cispo_ratio_inverted(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """A weight of exp(old − lp)."""
    return cispo(data, logprobs_list, clip=clip, ratio=lambda t: capped_exp(-log_ratio(t)))


@mutant("ratio-not-exponentiated", like=LIKE_PPO)
def ppo_ratio_not_exponentiated(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """lp − old."""
    return policy(data, logprobs_list, clip=clip, ratio=log_ratio)


@mutant("ratio-not-exponentiated", like=lossfns.importance_sampling())
def importance_sampling_not_exponentiated(data: Data, logprobs_list: Logprobs) -> Result:
    """−(lp − old)·A."""
    return policy(data, logprobs_list, term=unclipped, ratio=log_ratio)


@mutant("ratio-product", like=LIKE_GSPO, seen="NVIDIA-NeMo/RL#2269")
def gspo_ratio_product(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """exp(Σ d)."""
    return gspo(data, logprobs_list, clip=clip, ratio=lambda t: capped_exp(to_tokens(t, sequence_sum(t, log_ratio(t)))))


@mutant("ratio-product", like=LIKE_GSPO_TOKEN, seen="walkinglabs/hands-on-modern-rl#75")
def gspo_token_ratio_product(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """exp(Σ d) in value."""

    def ratio(t: Tokens) -> Tensor:
        return capped_exp(eq.straight_through(to_tokens(t, sequence_sum(t, log_ratio(t))), t.logprobs))

    return gspo_token(data, logprobs_list, clip=clip, ratio=ratio)


@mutant("ratio-sum", like=LIKE_GSPO, seen="unsloth-zoo#870")
def gspo_ratio_sum(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """Σ exp(d)."""
    return gspo(
        data, logprobs_list, clip=clip, ratio=lambda t: to_tokens(t, sequence_sum(t, t.active * token_ratio(t)))
    )


@mutant("ratio-sum", like=LIKE_GSPO)
def gspo_ratio_arithmetic(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """The mean of exp(d)."""
    return gspo(data, logprobs_list, clip=clip, ratio=lambda t: to_tokens(t, active_mean(t, token_ratio(t))))


# Clipping


@mutant("clip-max-for-min", like=LIKE_PPO, seen="spinningup#255")
def ppo_clip_max_for_min(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """−max(r·A, clip(r)·A)."""

    def term(t: Tokens, r: Tensor, clip: Clip) -> Tensor:
        return -torch.maximum(r * t.advantages, r.clamp(*clip) * t.advantages)

    return policy(data, logprobs_list, clip=clip, term=term)


def clamped(t: Tokens, r: Tensor, clip: Clip) -> Tensor:
    """−clip(r)·A."""
    return -r.clamp(*clip) * t.advantages


@mutant("clip-without-min", like=LIKE_PPO, seen="GMPO#4")
def ppo_clip_without_min(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """−clip(r)·A."""
    return policy(data, logprobs_list, clip=clip, term=clamped)


@mutant("clip-without-min", like=LIKE_GSPO)
def gspo_clip_without_min(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """−clip(s)·A."""
    return gspo(data, logprobs_list, clip=clip, term=clamped)


@mutant("clip-without-min", like=LIKE_CISPO)
def cispo_drops_outside(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """A weight of r within the bounds and of 0 beyond them."""

    def term(t: Tokens, r: Tensor, clip: Clip) -> Tensor:
        return torch.where(outside(t, r.detach(), clip), 0, weighted(t, r, clip))

    return cispo(data, logprobs_list, clip=clip, term=term)


@mutant("clip-drops-tokens", like=LIKE_CISPO)
def cispo_drops_clipped(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """PPO's min on top: where it would cut, the token is dropped."""

    def term(t: Tokens, r: Tensor, clip: Clip) -> Tensor:
        return torch.where(parts.binding(t, r.detach(), clip), 0, weighted(t, r, clip))

    return cispo(data, logprobs_list, clip=clip, term=term)


@mutant("clip-as-epsilon", like=LIKE_PPO, seen="NovaSky-AI/SkyRL#924")
def ppo_bounds_as_epsilons(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """Bounds 1 − 0.8 and 1 + 1.2, where 0.8 and 1.2 were meant."""
    low, high = clip
    return policy(data, logprobs_list, clip=(1 - low, 1 + high))


@mutant("clip-as-epsilon", like=LIKE_CISPO)
def cispo_bounds_as_epsilons(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """The same of the bounds of a weight."""
    low, high = clip
    return cispo(data, logprobs_list, clip=(1 - low, 1 + high))


@mutant("clip-as-epsilon", like=LIKE_DAPO, seen="NovaSky-AI/SkyRL#924")
def dapo_epsilons_as_bounds(data: Data, logprobs_list: Logprobs, *, clip: Clip = (0.2, 0.28)) -> Result:
    """Bounds 0.2 and 0.28, where 1 − 0.2 and 1 + 0.28 were meant."""
    return policy(data, logprobs_list, clip=clip)


@mutant("another-loss", like=LIKE_PPO, seen="huggingface/trl#6808")
def ppo_trains_importance_sampling(data: Data, logprobs_list: Logprobs) -> Result:
    """Asked for PPO, it trains on −r·A."""
    return policy(data, logprobs_list, term=unclipped)


@mutant("clip-inert", like=LIKE_PPO, seen="huggingface/trl#3120")
def ppo_clip_inert(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """−r·A."""
    return policy(data, logprobs_list, clip=clip, term=unclipped)


@mutant("clip-inert", like=LIKE_GSPO)
def gspo_clip_inert(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """−s·A."""
    return gspo(data, logprobs_list, clip=clip, term=unclipped)


@mutant("clip-inert", like=LIKE_CISPO)
def cispo_clip_inert(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """−sg(r)·A·lp."""
    return cispo(data, logprobs_list, clip=clip, term=lambda t, r, clip: weighted(t, r, (0.0, math.inf)))


@mutant("clip-gradient-leaks", like=LIKE_PPO)
def ppo_clip_gradient_leaks(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """clip(r) in value, r in gradient."""

    def term(t: Tokens, r: Tensor, clip: Clip) -> Tensor:
        bounded = eq.straight_through(r.clamp(*clip), r)
        return -torch.minimum(r * t.advantages, bounded * t.advantages)

    return policy(data, logprobs_list, clip=clip, term=term)


@mutant("dual-clip-on-positive", like=LIKE_DUAL_CLIP, seen="tianshou#433")
def ppo_dual_clip_on_positive(
    data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, dual_clip: float = 3.0
) -> Result:
    """max(min(r·A, clip(r)·A), c·A) whatever the sign of A."""

    def term(t: Tokens, r: Tensor, clip: Clip) -> Tensor:
        return torch.minimum(clipped(t, r, clip), -dual_clip * t.advantages)

    return policy(data, logprobs_list, clip=clip, term=term)


@mutant("dual-clip-below-one", like=LIKE_DUAL_CLIP, seen="PPOxFamily#95")
def ppo_dual_clip_below_one(
    data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, dual_clip: float = 0.5
) -> Result:
    """c = 0.5: a bad token that is still as likely as before has no gradient."""
    return parts.dual_clip_loss(data, logprobs_list, clip=clip, dual_clip=dual_clip)


@mutant("tis-inverted", like=LIKE_TIS)
def ppo_tis_inverted(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, cap: float = 2.0) -> Result:
    """min(exp(sampler − old), cap)."""
    return corrected(
        data, logprobs_list, clip, lambda t: eq.importance_weight(t.sampler_logprobs - t.old_logprobs, cap)
    )


@mutant("tis-uncapped", like=LIKE_TIS, seen="huggingface/trl#7120")
def ppo_tis_uncapped(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """exp(old − sampler)."""
    return corrected(data, logprobs_list, clip, lambda t: capped_exp(t.old_logprobs - t.sampler_logprobs))


@mutant("tis-inert", like=LIKE_TIS, seen="linkedin/Liger-Kernel#1082")
def ppo_tis_inert(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """The sampler's logprobs are read and not used."""
    return corrected(data, logprobs_list, clip, lambda t: torch.ones_like(t.sampler_logprobs))


@mutant("exp-overflow", like=LIKE_PPO, seen="PrimeIntellect-ai/prime-rl#2084")
def ppo_exp_overflow(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """exp(lp − old) without a cap: inf, and a gradient of 0·inf where it is clipped."""
    return policy(data, logprobs_list, clip=clip, ratio=lambda t: log_ratio(t).exp())


@mutant("exp-overflow", like=LIKE_GRPO)
def grpo_kl_overflow(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, kl_beta: float = 0.1) -> Result:
    """exp(ref − lp) without a cap."""

    def kl(t: Tokens) -> Tensor:
        x = t.ref_logprobs - t.logprobs
        return x.exp() - x - 1

    return penalised(data, logprobs_list, clip=clip, kl_beta=kl_beta, kl=kl)


# Penalty


@mutant("penalty-sign", like=LIKE_DRO)
def dro_penalty_sign(data: Data, logprobs_list: Logprobs, *, beta: float = 0.5) -> Result:
    """−(A·lp + ½β(lp − old)²)."""
    return dro(data, logprobs_list, beta=beta, penalty=lambda t: -half_square(t))


@mutant("half-missing", like=LIKE_DRO)
def dro_half_missing(data: Data, logprobs_list: Logprobs, *, beta: float = 0.5) -> Result:
    """−(A·lp − β(lp − old)²)."""
    return dro(data, logprobs_list, beta=beta, penalty=lambda t: 2 * half_square(t))


@mutant("penalty-gated", like=LIKE_DRO, seen="fw-ai/cookbook")
def dro_penalty_gated(data: Data, logprobs_list: Logprobs, *, beta: float = 0.5) -> Result:
    """−(A·lp − ½β(lp − old)²·1[A ≠ 0])."""
    return dro(data, logprobs_list, beta=beta, penalty=lambda t: torch.where(t.advantages != 0, half_square(t), 0))


@mutant("detached-term", like=LIKE_DRO)
def dro_penalty_detached(data: Data, logprobs_list: Logprobs, *, beta: float = 0.5) -> Result:
    """−(A·lp − sg(½β(lp − old)²))."""
    return dro(data, logprobs_list, beta=beta, penalty=lambda t: half_square(t).detach())


@mutant("constant-factor", like=LIKE_DRO)
def dro_beta_on_the_reward(data: Data, logprobs_list: Logprobs, *, beta: float = 0.5) -> Result:
    """−(β·A·lp − ½(lp − old)²)."""
    return dro(data, logprobs_list, beta=1.0, reward=lambda t: beta * reward(t))


# KL


@mutant("k1-in-loss", like=LIKE_GRPO, seen="allenai/open-instruct#534")
def grpo_k1_in_loss(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, kl_beta: float = 0.1) -> Result:
    """β·(lp − ref)."""
    return penalised(data, logprobs_list, clip=clip, kl_beta=kl_beta, kl=lambda t: eq.k1(t.logprobs, t.ref_logprobs))


@mutant("kl-sign", like=LIKE_GRPO)
def grpo_kl_sign(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, kl_beta: float = 0.1) -> Result:
    """−β·KL."""
    return penalised(data, logprobs_list, clip=clip, kl_beta=kl_beta, kl=lambda t: -k3(t))


@mutant("kl-detached", like=LIKE_GRPO, seen="PrimeIntellect-ai/prime-rl#1390")
def grpo_kl_detached(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, kl_beta: float = 0.1) -> Result:
    """β·sg(KL)."""
    return penalised(data, logprobs_list, clip=clip, kl_beta=kl_beta, kl=lambda t: k3(t).detach())


@mutant("kl-scaled-by-advantage", like=LIKE_GRPO)
def grpo_kl_scaled_by_advantage(
    data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, kl_beta: float = 0.1
) -> Result:
    """β·KL inside the bracket that A multiplies."""
    return penalised(data, logprobs_list, clip=clip, kl_beta=kl_beta, kl=lambda t: t.advantages * k3(t))


@mutant("ref-inert", like=LIKE_GRPO)
def grpo_kl_to_old(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, kl_beta: float = 0.1) -> Result:
    """β·KL to the old policy."""
    return penalised(data, logprobs_list, clip=clip, kl_beta=kl_beta, kl=lambda t: eq.k3(t.logprobs, t.old_logprobs))


# Knobs and metrics


@mutant("inert-knob", like=LIKE_GRPO, seen="NVIDIA-NeMo/RL#3792")
def grpo_kl_beta_inert(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, kl_beta: float = 0.1) -> Result:
    """0.1 whatever ``kl_beta`` is."""
    return penalised(data, logprobs_list, clip=clip, kl_beta=0.1)


@mutant("inert-knob", like=LIKE_DAPO, seen="huggingface/trl#6808")
def dapo_clip_higher_inert(data: Data, logprobs_list: Logprobs, *, clip: Clip = (0.8, 1.28)) -> Result:
    """The upper bound is taken from the lower one."""
    low, _ = clip
    return policy(data, logprobs_list, clip=(low, 2 - low))


@mutant("metric-not-mergeable", like=LIKE_PPO, seen="verl-project/verl#3129")
def ppo_metric_of_last_datum(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """The last datum's ratio and clip fraction reported for all."""
    last = lengths_of(logprobs_list)[-1]

    def mean(active: Tensor, x: Tensor) -> Tensor:
        return parts.mean_of(active[-last:], x[-last:])

    return policy(data, logprobs_list, clip=clip, report=partial(report, mean=mean))


@mutant("metric-scaled-twice", like=LIKE_PPO, seen="verl-project/verl#4711")
def ppo_loss_metric_divided_twice(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """The reported loss is divided by the number of datums."""
    loss, metrics = policy(data, logprobs_list, clip=clip)
    return loss, metrics | {"loss": metrics["loss"] / len(data)}


@mutant("metric-scaled-twice", like=LIKE_GRPO)
def grpo_kl_metric_scaled(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP, kl_beta: float = 0.1) -> Result:
    """The reported KL is multiplied by β."""
    loss, metrics = penalised(data, logprobs_list, clip=clip, kl_beta=kl_beta)
    return loss, metrics | {"kl_ref": kl_beta * metrics["kl_ref"]}


@mutant("metric-counts-nonbinding", like=LIKE_PPO, seen="huggingface/trl#6021")
def ppo_clip_frac_nonbinding(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """|r − 1| > ε, whatever the advantage's sign."""
    return policy(data, logprobs_list, clip=clip, binds=outside)


@mutant("metric-counts-nonbinding", like=LIKE_CISPO)
def cispo_clip_frac_of_weights(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """Tokens whose weight is at a bound count as clipped; they have their gradient."""
    return cispo(data, logprobs_list, clip=clip, binds=outside)


@mutant("metric-counts-nonbinding", like=LIKE_GSPO_TOKEN)
def gspo_token_clip_frac_nonbinding(data: Data, logprobs_list: Logprobs, *, clip: Clip = CLIP) -> Result:
    """The same of the sequence ratio."""
    return gspo_token(data, logprobs_list, clip=clip, binds=outside)
