"""Laws of policies, settings, metrics and state: what they find in losses of the field, and what they leave alone."""

import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lossfns
from lossfns.loading import load
from lossfns.testing import padded
from lossfns.testing.check import prepare, without_side_effects
from lossfns.testing.laws.settings import asks_for_k1, claims_to_be, named_numbers, role_of
from lossfns.testing.report import Verdict

Loss = Callable[..., Any]


def verdicts(subject: Any, *names: str) -> Iterator[Verdict]:
    """Yield the verdicts of these laws, or of all laws, without random batches."""
    for trial in prepare(subject, kind="policy", examples=0).trials:
        if not names or trial.law in names:
            with without_side_effects():
                yield trial.run()


def found(subject: Any, law: str) -> tuple[str, str]:
    """Return the verdict and the bug of one law."""
    (verdict,) = verdicts(subject, law)
    return verdict.verdict, verdict.bug


# Parts of losses as others write them


def mean(x: Tensor, mask: Tensor) -> Tensor:
    return (torch.where(mask > 0, x, 0.0) * mask).sum() / mask.sum().clamp(min=1e-8)


def gap(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask > 0, a - b, 0.0).clamp(-20, 20)


def clipped(r: Tensor, a: Tensor, low: float = 0.8, high: float = 1.2) -> Tensor:
    return -torch.min(r * a, r.clamp(low, high) * a)


def k3(x: Tensor) -> Tensor:
    return x.exp() - x - 1


def parts(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ratio, advantages and logprobs, with zeros (a ratio of 1) in masked slots."""
    a, lp = (torch.where(mask > 0, x, 0.0) for x in (advantages, logprobs))
    return gap(logprobs, old, mask).exp(), a, lp


# Correct losses


def grpo_as_trl(
    per_token_logps: Tensor, old_per_token_logps: Tensor, ref_per_token_logps: Tensor, advantages: Tensor,
    completion_mask: Tensor, beta: float = 0.04, epsilon_low: float = 0.2, epsilon_high: float = 0.28,
) -> Any:  # fmt: skip
    m = completion_mask
    r, a, _ = parts(per_token_logps, old_per_token_logps, advantages, m)
    kl = k3(gap(ref_per_token_logps, per_token_logps, m))
    terms = clipped(r, a, 1 - epsilon_low, 1 + epsilon_high) + beta * kl
    low, high = (r < 1 - epsilon_low) & (a < 0), (r > 1 + epsilon_high) & (a > 0)
    clips = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high}
    metrics = {"kl": mean(kl, m), **{name: mean(x.float(), m) for name, x in clips.items()}}
    per_sequence = (terms * m).sum(1) / m.sum(1).clamp(min=1e-8)
    return per_sequence.sum() / (m.sum(1) > 0).sum().clamp(min=1), {name: x.item() for name, x in metrics.items()}


def dual_clip_as_verl(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, response_mask: Tensor, cliprange_low: float = 0.2,
    cliprange_high: float = 0.28, clip_ratio_c: float = 3.0,
) -> Any:  # fmt: skip
    m = response_mask
    r, a, _ = parts(log_prob, old_log_prob, advantages, m)
    first, bounded = -a * r, -a * r.clamp(1 - cliprange_low, 1 + cliprange_high)
    upper = torch.maximum(first, bounded)
    terms = torch.where(a < 0, torch.min(-a * clip_ratio_c, upper), upper)
    return mean(terms, m), {
        "actor/ppo_kl": mean(-r.log(), m).item(),
        "actor/pg_clipfrac": mean((bounded > first).float(), m).item(),
        "actor/pg_clipfrac_lower": mean(((upper > -a * clip_ratio_c) & (a < 0)).float(), m).item(),
    }


def ppo_with_entropy_bonus(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float = 0.2,
    ent_coef: float = 0.01,
) -> Any:  # fmt: skip
    r, a, lp = parts(logprobs, old_logprobs, advantages, mask)
    loss = mean(clipped(r, a, 1 - clip_range, 1 + clip_range) + ent_coef * lp.detach() * lp, mask)
    log_ratio = r.log()
    return loss, {
        "approx_kl": mean((r - 1) - log_ratio, mask).item(),
        "old_approx_kl": mean(-log_ratio, mask).item(),
        "entropy": -mean(lp, mask).item(),
        "ratio_mean": mean(r, mask).item(),
    }


def cispo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, epsilon_high: float = 5.0
) -> Tensor:
    r, a, lp = parts(logprobs, old_logprobs, advantages, mask)
    return mean(-r.clamp(max=epsilon_high).detach() * a * lp, mask)


def gspo_token(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, eps_low: float = 3e-4,
    eps_high: float = 4e-4,
) -> Tensor:  # fmt: skip
    _, a, lp = parts(logprobs, old_logprobs, advantages, mask)
    n = mask.sum(1, keepdim=True).clamp(min=1e-8)
    mean_gap = (gap(logprobs, old_logprobs, mask) * mask).sum(1, keepdim=True) / n
    terms = clipped((mean_gap.detach() + lp - lp.detach()).exp(), a, 1 - eps_low, 1 + eps_high)
    return ((terms * mask).sum(1, keepdim=True) / n).sum() / (mask.sum(1) > 0).sum().clamp(min=1)


def ppo_with_tis(
    logprobs: Tensor, old_logprobs: Tensor, rollout_log_probs: Tensor, advantages: Tensor, mask: Tensor,
    clip_ratio: float = 0.2, imp_ratio_cap: float = 2.0,
) -> Any:  # fmt: skip
    r, a, _ = parts(logprobs, old_logprobs, advantages, mask)
    weight = gap(old_logprobs, rollout_log_probs, mask).exp().clamp(max=imp_ratio_cap)
    terms = clipped(r, a, 1 - clip_ratio, 1 + clip_ratio) * weight
    return mean(terms, mask), {"mismatch_kl": mean(old_logprobs - rollout_log_probs, mask).item()}


def ppo_with_masked_correction(
    logprobs: Tensor, old_logprobs: Tensor, rollout_log_probs: Tensor, advantages: Tensor, mask: Tensor,
    tis_threshold: float = 2.0,
) -> Tensor:  # fmt: skip
    r, a, _ = parts(logprobs, old_logprobs, advantages, mask)
    weight = gap(old_logprobs, rollout_log_probs, mask).exp()
    return mean(clipped(r, a) * torch.where(weight <= tis_threshold, weight, 0.0), mask)


def kl_in_the_reward(
    logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, advantages: Tensor, mask: Tensor,
    clip_eps: float = 0.2, beta: float = 0.1,
) -> Tensor:  # fmt: skip
    r, a, lp = parts(logprobs, old_logprobs, advantages, mask)
    return mean(clipped(r, a - beta * gap(lp.detach(), ref_logprobs, mask), 1 - clip_eps, 1 + clip_eps), mask)


def kl_of_the_old_policy_in_the_reward(
    logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, advantages: Tensor, mask: Tensor,
    kl_coef: float = 0.1,
) -> Tensor:  # fmt: skip
    r, a, _ = parts(logprobs, old_logprobs, advantages, mask)
    return mean(clipped(r, a - kl_coef * gap(old_logprobs, ref_logprobs, mask)), mask)


def sapo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, tau_pos: float = 1.0,
    tau_neg: float = 1.05,
) -> Tensor:  # fmt: skip
    r, a, _ = parts(logprobs, old_logprobs, advantages, mask)
    tau = torch.where(a > 0, tau_pos, tau_neg)
    return mean(-torch.sigmoid(tau * (r - 1)) * 4 / tau * a, mask)


def awr(logprobs: Tensor, advantages: Tensor, mask: Tensor, beta: float = 1.0, max_weight: float = 20.0) -> Tensor:
    a, lp = (torch.where(mask > 0, x, 0.0) for x in (advantages, logprobs))
    return mean(-(a / beta).exp().clamp(max=max_weight) * lp, mask)


def gmpo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, eps: float = 0.4) -> Tensor:
    """Clip each token's log-ratio on the side of its advantage, then take the geometric mean of the sequence."""
    a, n = torch.where(mask > 0, advantages, 0.0), mask.sum(1).clamp(min=1e-8)
    d = gap(logprobs, old_logprobs, mask) * a.sign()
    bounded = torch.minimum(d, d.clamp(-eps, eps)) * a.sign()
    s, mean_a = ((bounded * mask).sum(1) / n).exp(), (a * mask).sum(1) / n
    return -(s * mean_a).sum() / (mask.sum(1) > 0).sum().clamp(min=1)


def topr(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    a, lp = (torch.where(mask > 0, x, 0.0) for x in (advantages, logprobs))
    s = (gap(logprobs, old_logprobs, mask) * mask).sum(1, keepdim=True).clamp(-20, 20).exp().detach()
    weight = torch.where((a * mask).sum(1, keepdim=True) >= 0, 1.0, s.clamp(0, 1))
    return -(weight * a * lp * mask).sum() / (mask.sum(1) > 0).sum().clamp(min=1)


def dr_grpo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, eps: float = 0.2, max_tokens: int = 256
) -> Tensor:
    r, a, _ = parts(logprobs, old_logprobs, advantages, mask)
    return (clipped(r, a, 1 - eps, 1 + eps) * mask).sum() / max_tokens


def absolute_bounds(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float = 0.8,
    clip_high: float = 1.2, denom_eps: float = 1e-8,
) -> Tensor:  # fmt: skip
    r, a, _ = parts(logprobs, old_logprobs, advantages, mask)
    return (clipped(r, a, clip_low, clip_high) * mask).sum() / (mask.sum() + denom_eps)


def old_logprobs_in_metrics(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Any:
    r, a, lp = parts(logprobs, old_logprobs, advantages, mask)
    return mean(-a * lp, mask), {"approx_kl": mean(-r.log(), mask).item(), "importance_ratio": mean(r, mask).item()}


CORRECT = (
    grpo_as_trl, dual_clip_as_verl, ppo_with_entropy_bonus, cispo, gspo_token, ppo_with_tis, ppo_with_masked_correction,
    kl_in_the_reward, kl_of_the_old_policy_in_the_reward, sapo, awr, gmpo, topr, dr_grpo, absolute_bounds,
    old_logprobs_in_metrics,
)  # fmt: skip


@pytest.mark.parametrize("loss", CORRECT)
def test_a_correct_policy_loss_of_the_field_is_not_called_wrong(loss: Loss) -> None:
    assert [(v.law, v.bug, v.seen) for v in verdicts(loss) if v.verdict == "wrong"] == []


def test_the_product_of_ratios_of_a_sequence_level_loss_is_fragile_and_of_gspo_wrong() -> None:
    def rloo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        s = (gap(logprobs, old_logprobs, mask) * mask).sum(1).clamp(-20, 20).exp()
        a = (torch.where(mask > 0, advantages, 0.0) * mask).sum(1) / mask.sum(1).clamp(min=1e-8)
        return clipped(s, a).sum() / (mask.sum(1) > 0).sum().clamp(min=1)

    assert found(rloo, "ratio_length") == ("fragile", "ratio-product")
    assert found(rloo, "ratio")[0] == "n/a"
    rloo.__name__ = "gspo_loss"
    assert found(rloo, "ratio") == ("wrong", "ratio-product")


def test_a_kl_term_that_is_weighted_by_the_ratio_is_fragile_unless_a_setting_asks_for_it() -> None:
    def weighted(
        logprobs: Tensor,
        old_logprobs: Tensor,
        ref_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        beta: float = 0.1,
    ) -> Tensor:
        r, a, _ = parts(logprobs, old_logprobs, advantages, mask)
        return mean(clipped(r, a) + beta * r * k3(gap(ref_logprobs, logprobs, mask)), mask)

    def asked(
        logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, advantages: Tensor, mask: Tensor,
        unbiased_kl: bool = True,
    ) -> Tensor:  # fmt: skip
        return weighted(logprobs, old_logprobs, ref_logprobs, advantages, mask)

    assert found(weighted, "kl_unscaled") == ("fragile", "kl-scaled-by-ratio")
    assert found(weighted, "kl_everywhere")[0] == "n/a"
    assert found(asked, "kl_unscaled")[0] == "n/a"


# Wrong losses: a change of a term of PPO with a KL term, its settings and its metrics


def ppo_with(
    term: Callable[..., Tensor] | None = None,
    metrics: Callable[..., dict[str, Tensor]] | None = None,
    **settings: float,
) -> Loss:
    """Return a padded loss with this term, of (r, a, lp, x = ref − lp, s = old − sampler), and with these metrics."""

    def loss(
        logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, sampler_logprobs: Tensor, advantages: Tensor,
        mask: Tensor, **chosen: float,
    ) -> Any:  # fmt: skip
        chosen = {**settings, **chosen}
        r, a, lp = parts(logprobs, old_logprobs, advantages, mask)
        x, s = gap(ref_logprobs, logprobs, mask), gap(old_logprobs, sampler_logprobs, mask)
        terms = clipped(r, a) if term is None else term(r=r, a=a, lp=lp, x=x, s=s, **chosen)
        reported = metrics(r=r, a=a, lp=lp, x=x, mask=mask, old=old_logprobs, raw=logprobs) if metrics else {}
        return mean(terms, mask), {name: value.item() for name, value in reported.items()}

    signature = inspect.signature(loss)
    positional = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    keywords = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=v) for n, v in settings.items()]
    vars(loss)["__signature__"] = signature.replace(parameters=[*positional, *keywords])
    return loss


def beyond(r: Tensor, a: Tensor) -> Tensor:
    return ((r > 1.2) & (a > 0)) | ((r < 0.8) & (a < 0))


WRONG: dict[str, tuple[str, str, Loss]] = {
    "the KL term is dropped at clipped tokens": ("kl_everywhere", "kl-dropped-at-clip", ppo_with(
        lambda r, a, x, kl_coef, **_: torch.where(beyond(r, a), clipped(r, a).detach(), -r * a + kl_coef * k3(x)),
        kl_coef=0.05)),
    "k3 is taken the wrong way round": ("kl", "kl-inverted", ppo_with(
        lambda r, a, x, beta, **_: clipped(r, a) + beta * k3(-x), beta=0.05)),
    "beta is applied twice": ("kl_strength", "kl-beta-twice", ppo_with(
        lambda r, a, x, kl_beta, **_: clipped(r, a) + kl_beta * kl_beta * k3(x), kl_beta=0.05)),
    "the KL coefficient scales the whole loss": ("kl_strength", "setting-misplaced", ppo_with(
        lambda r, a, x, kl_loss_coef, **_: kl_loss_coef * (clipped(r, a) + k3(x)), kl_loss_coef=0.05)),
    "eps_low and eps_high are exchanged": ("clip_bounds", "bounds-exchanged", ppo_with(
        lambda r, a, eps_low, eps_high, **_: clipped(r, a, 1 - eps_high, 1 + eps_low), eps_low=0.2, eps_high=0.28)),
    "bounds of equal size are exchanged": ("clip_bounds", "bounds-exchanged", ppo_with(
        lambda r, a, clip_ratio_low, clip_ratio_high, **_: clipped(r, a, 1 - clip_ratio_high, 1 + clip_ratio_low),
        clip_ratio_low=0.2, clip_ratio_high=0.2)),
    "absolute bounds are read as epsilons": ("clip_bounds", "clip-as-epsilon", ppo_with(
        lambda r, a, clip_low, clip_high, **_: clipped(r, a, 1 - clip_low, 1 + clip_high),
        clip_low=0.8, clip_high=1.2)),
    "epsilon is squared": ("clip_bounds", "bound-elsewhere", ppo_with(
        lambda r, a, epsilon, **_: clipped(r, a, 1 - epsilon**2, 1 + epsilon**2), epsilon=0.2)),
    "the upper bound is twice as far": ("clip_bounds", "bound-elsewhere", ppo_with(
        lambda r, a, cliprange, **_: clipped(r, a, 1 - cliprange, 1 + 2 * cliprange), cliprange=0.2)),
    "tis_cap limits the logarithm": ("caps", "bound-elsewhere", ppo_with(
        lambda r, a, s, tis_cap, **_: clipped(r, a) * s.clamp(max=tis_cap).exp(), tis_cap=2.0)),
    "the dual clip acts on the logarithm": ("caps", "bound-elsewhere", ppo_with(
        lambda r, a, clip_ratio_c, **_: torch.where(
            a < 0, torch.min(clipped(r, a), -math.exp(clip_ratio_c) * a), clipped(r, a)), clip_ratio_c=3.0)),
    "the limited weight multiplies the ratio": ("ratio", "ratio-squared", ppo_with(
        lambda r, a, **_: -r.clamp(max=1.28).detach() * r * a)),
    "the gradient leaves the ratio out": ("ratio_gradient", "ratio-without-gradient", ppo_with(
        lambda r, a, lp, **_: -r.detach() * a - a * (lp - lp.detach()))),
    "lp stands in place of the ratio": ("ratio_symmetry", "ratio-not-exponentiated", ppo_with(
        lambda r, a, lp, **_: -torch.min(lp * a, r.clamp(0.8, 1.2) * a))),
    "the weight carries gradient": ("stop_gradient", "missing-stop-gradient", ppo_with(
        lambda r, a, lp, **_: -r.clamp(max=1.28) * a * lp)),
    "advantages are clipped": ("advantage_size", "advantage-size-lost", ppo_with(
        lambda r, a, **_: clipped(r, a.clamp(-1, 1)))),
    "advantages are reduced to their sign": ("advantage_size", "advantage-size-lost", ppo_with(
        lambda r, a, **_: clipped(r, a.sign()))),
    "the entropy bonus has the wrong sign": ("entropy", "entropy-sign", ppo_with(
        lambda r, a, lp, entropy_coef, **_: clipped(r, a) - entropy_coef * lp.detach() * lp, entropy_coef=0.01)),
    "approx_kl has the wrong sign": ("kl_metrics", "metric-sign", ppo_with(
        metrics=lambda r, mask, **_: {"approx_kl": mean(r.log(), mask)})),
    "ppo_kl has the wrong sign": ("kl_metrics", "metric-sign", ppo_with(
        metrics=lambda r, mask, **_: {"actor/ppo_kl": mean(r.log(), mask)})),
    "kl is that of ref over policy": ("kl_metrics", "metric-sign", ppo_with(
        metrics=lambda x, mask, **_: {"kl": mean(x, mask)})),
    "kl_ref is scaled by beta": ("kl_metrics", "metric-scaled-twice", ppo_with(
        metrics=lambda x, mask, **_: {"kl_ref": 0.1 * mean(k3(x), mask)})),
    "the ratio is reported upside down": ("ratio_metrics", "metric-sign", ppo_with(
        metrics=lambda r, mask, **_: {"mean_ratio": mean(1 / r, mask)})),
    "the entropy is reported negative": ("ratio_metrics", "metric-sign", ppo_with(
        metrics=lambda lp, mask, **_: {"entropy": mean(lp, mask)})),
    "the clip fraction counts the others": ("clip_metrics", "metric-miscounts", ppo_with(
        metrics=lambda r, a, mask, **_: {"pg_clipfrac": mean((~beyond(r, a)).float(), mask)})),
    "clip fractions of the two sides are exchanged": ("clip_metrics", "metric-miscounts", ppo_with(
        metrics=lambda r, a, mask, **_: {"clip_frac_low": mean((r > 1.2).float(), mask),
            "clip_frac_high": mean((r < 0.8).float(), mask)})),
    "the KL is a mean over all slots": ("metric_scope", "metric-unmasked", ppo_with(
        metrics=lambda old, raw, **_: {"approx_kl": (old - raw).mean()})),
    "the metric is of the first datum": ("permutation", "metric-not-mergeable", ppo_with(
        metrics=lambda r, mask, **_: {"ratio_of_batch": mean(r[:1], mask[:1])})),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_policy_loss_is_called_wrong_by_its_law(name: str) -> None:
    law, bug, loss = WRONG[name]
    assert found(loss, law) == ("wrong", bug)


def test_k1_instead_of_k3_is_fragile() -> None:
    loss = ppo_with(lambda r, a, x, beta, **_: clipped(r, a) - beta * x, beta=0.05)
    assert found(loss, "kl_estimator") == ("fragile", "k1-in-loss")


def test_gspo_token_without_the_ratio_in_its_gradient_is_found() -> None:
    def loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        _, a, lp = parts(logprobs, old_logprobs, advantages, mask)
        n = mask.sum(1, keepdim=True).clamp(min=1e-8)
        s = ((gap(logprobs, old_logprobs, mask) * mask).sum(1, keepdim=True) / n).exp().detach()
        terms = -torch.min(s * a, s.clamp(1 - 3e-4, 1 + 4e-4) * a) - torch.where(beyond(s, a), 0.0, a) * (
            lp - lp.detach()
        )
        return ((terms * mask).sum(1, keepdim=True) / n).sum() / (mask.sum(1) > 0).sum().clamp(min=1)

    assert found(loss, "ratio_gradient") == ("wrong", "ratio-without-gradient")
    assert found(gspo_token, "ratio_gradient")[0] == "pass"


def test_good_and_bad_advantages_may_have_different_weights() -> None:
    def loss(
        logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, neg_weight: float = 0.5
    ) -> Tensor:
        r, a, _ = parts(logprobs, old_logprobs, advantages, mask)
        return mean(clipped(r, torch.where(a < 0, neg_weight * a, a)), mask)

    assert [(v.law, v.bug, v.seen) for v in verdicts(loss) if v.verdict == "wrong"] == []


def test_an_entropy_bonus_obeys_its_law() -> None:
    assert found(ppo_with_entropy_bonus, "entropy")[0] == "pass"


def test_the_share_of_all_ratios_out_of_bounds_is_a_fragile_clip_fraction() -> None:
    loss = ppo_with(metrics=lambda r, mask, **_: {"clip_fraction": mean(((r - 1).abs() > 0.2).float(), mask)})
    assert found(loss, "clip_metrics")[0] == "pass"
    assert found(loss, "clip_binding") == ("fragile", "metric-counts-nonbinding")


def test_a_count_in_bfloat16_is_found_with_301_tokens() -> None:
    def loss(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        a, lp = (torch.where(mask > 0, x, 0.0) for x in (advantages, logprobs))
        return -(a * lp * mask).sum() / mask.bfloat16().sum().float().clamp(min=1e-8)

    assert found(loss, "many_tokens") == ("wrong", "low-precision")


# State


def with_effect(effect: Callable[[], Any]) -> Loss:
    def loss(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        effect()
        a, lp = (torch.where(mask > 0, x, 0.0) for x in (advantages, logprobs))
        return mean(-a * lp, mask)

    return loss


EFFECTS: dict[str, Callable[[], Any]] = {
    "torch.manual_seed": lambda: torch.manual_seed(0),
    "numpy.random.seed": lambda: np.random.seed(0),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "grad mode": lambda: torch.set_grad_enabled(False) and None,
    "threads": lambda: torch.set_num_threads(3),
    "warnings": lambda: warnings.filterwarnings("ignore", message="of this test"),
    "environment": lambda: os.environ.update(OF_THIS_TEST="1"),
    "numpy errors": lambda: np.seterr(all="raise"),
}


@pytest.mark.parametrize("name", [name for name in EFFECTS if name != "grad mode"])
def test_a_loss_that_sets_global_state_is_found_and_the_state_put_back(name: str) -> None:
    before = (torch.get_default_dtype(), torch.get_num_threads(), dict(os.environ), np.geterr(), torch.get_rng_state())
    assert found(with_effect(EFFECTS[name]), "global_state") == ("wrong", "global-state-changed")
    after = (torch.get_default_dtype(), torch.get_num_threads(), dict(os.environ), np.geterr(), torch.get_rng_state())
    assert before[:-1] == after[:-1] and torch.equal(before[-1], after[-1])


def test_a_loss_that_leaves_grad_mode_off_is_found() -> None:
    def loss(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        a, lp = (torch.where(mask > 0, x, 0.0) for x in (advantages, logprobs))
        result = mean(-a * lp, mask)
        torch.set_grad_enabled(False)
        return result

    assert found(loss, "global_state") == ("wrong", "global-state-changed")
    assert torch.is_grad_enabled()


def test_a_loss_that_draws_random_numbers_does_not_set_the_seed() -> None:
    assert found(with_effect(lambda: torch.rand(3)), "global_state")[0] == "pass"


def contract_loss(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> tuple[Tensor, float]:
    """Return Σ −w·A·lp and Σ w."""
    total, count = torch.zeros(()), 0.0
    for datum, lp in zip(data, logprobs_list, strict=True):
        w, a = (datum.loss_fn_inputs[name].to_torch() for name in ("weights", "advantages"))
        total = total - (w * torch.where(w > 0, a * lp, 0.0)).sum()
        count += float(w.sum())
    return total, count


def test_a_clip_fraction_in_a_mutable_default_is_found() -> None:
    def loss(data: Sequence[Any], logprobs_list: Sequence[Tensor], seen: list[float] = []) -> Any:  # noqa: B006
        total, count = contract_loss(data, logprobs_list)
        seen.append(count)
        return total / count, {"mean_tokens": sum(seen) / len(seen)}

    assert found(loss, "repeatable") == ("wrong", "state-between-calls")
    assert found(loss, "no_inert_knob")[0] == "n/a"


def test_a_statistic_kept_from_the_first_batch_is_found() -> None:
    kept: dict[str, float] = {}

    def loss(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Any:
        rows = torch.cat([datum.loss_fn_inputs["advantages"].to_torch() for datum in data])
        kept.setdefault("scale", float(rows.abs().max()))
        total, count = contract_loss(data, logprobs_list)
        return total / count / kept["scale"], {}

    assert found(loss, "fresh_state") == ("wrong", "state-between-calls")


def test_a_table_that_the_loss_needs_is_no_state() -> None:
    table = {"scale": 1.0}

    def loss(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Any:
        total, count = contract_loss(data, logprobs_list)
        return table["scale"] * total / count, {}

    assert found(loss, "fresh_state")[0] == "pass"
    assert table == {"scale": 1.0}


def test_an_iterator_that_the_first_call_exhausts_is_found() -> None:
    def make(advantages: Sequence[Any], eps: float = 0.2) -> Loss:
        rows = iter(advantages)

        def loss(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Any:
            terms = [-(torch.as_tensor(a) * lp).sum() for a, lp in zip(rows, logprobs_list)]
            return sum(terms, 0 * logprobs_list[0].sum()), {}

        return loss

    assert found(make, "repeatable") == ("wrong", "state-between-calls")


def test_a_padded_function_that_changes_its_tensors_is_found() -> None:
    def loss(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        advantages.mul_(mask)
        return mean(-advantages * logprobs, mask)

    assert found(loss, "inputs_unchanged") == ("wrong", "inputs-mutated")


# The contract


@pytest.mark.parametrize("convert", [torch.tensor, np.float32, lambda x: torch.tensor([x, x])])
def test_metrics_of_other_types_are_fragile(convert: Callable[[float], Any]) -> None:
    def loss(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Any:
        total, count = contract_loss(data, logprobs_list)
        return total / count, {"mean_weight": convert(count / count)}

    broken = {v.law: v.verdict for v in verdicts(loss, "contract", "metric_types", "metric_loss", "metric_scope")}
    assert broken == {"contract": "pass", "metric_types": "fragile", "metric_loss": "pass", "metric_scope": "pass"}


def test_a_datum_left_out_of_the_graph_is_wrong_if_it_is_active() -> None:
    def skips(where: Callable[[Any], bool]) -> Loss:
        def loss(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Any:
            kept = [(d, lp) for d, lp in zip(data, logprobs_list) if not where(d)]
            total, _ = contract_loss([d for d, _ in kept], [lp for _, lp in kept])
            return total + 0 * logprobs_list[0].sum(), {}

        return loss

    masked = skips(lambda datum: not datum.loss_fn_inputs["weights"].to_numpy().any())
    assert found(masked, "active_gradient")[0] == "pass"
    assert found(masked, "every_gradient") == ("fragile", "gradient-missing")
    short = skips(lambda datum: len(datum.loss_fn_inputs["weights"].to_numpy()) == 1)
    assert found(short, "active_gradient") == ("wrong", "datum-ignored")


def test_numpy_in_a_detached_weight_is_never_wrong() -> None:
    def loss(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Any:
        total, count = torch.zeros(()), 0.0
        for datum, lp in zip(data, logprobs_list, strict=True):
            w, a, old = (datum.loss_fn_inputs[n].to_numpy() for n in ("weights", "advantages", "old_logprobs"))
            ratio = np.exp(np.clip(np.where(w > 0, lp.detach().numpy() - old, 0), -20, 20))
            weight = torch.as_tensor(np.minimum(ratio, 4.0) * w * np.where(w > 0, a, 0), dtype=lp.dtype)
            total = total - (weight * torch.where(torch.as_tensor(w > 0), lp, 0.0)).sum()
            count += float(w.sum())
        return total / count, {}

    assert [(v.law, v.bug) for v in verdicts(loss) if v.verdict == "wrong"] == []


# Names


ROLES = {
    "low": "eps_low clip_eps_low clip_ratio_low epsilon_low cliprange_low EPSILON_LOW clip_min",
    "high": "eps_high clip_eps_high clip_ratio_high epsilon_high cliprange_high eps_max clipHigh",
    "clip": "clip eps epsilon cliprange clip_range clip_eps clip_ratio eps_clip clip_coef clip_param",
    "dual": "dual_clip clip_ratio_c dual_clip_c",
    "tis": "tis_cap imp_ratio_cap tis_imp_ratio_cap c_max rho rho_max rollout_is_threshold tis_threshold",
    "kl": "beta kl_coef kl_beta kl_loss_coef kl_coeff beta_kl kl_weight init_kl_coef",
    "": "temperature lr vf_clip clip_grad_norm adv_clip log_ratio_cap entropy_coef kl_target value_clip gamma",
}


@pytest.mark.parametrize("role", ROLES)
def test_settings_are_known_by_the_spellings_of_the_field(role: str) -> None:
    assert {name: role_of(name) for name in ROLES[role].split()} == dict.fromkeys(ROLES[role].split(), role)


def test_named_numbers_are_parameters_elements_of_bounds_and_constants_of_the_module(tmp_path: Any) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "EPSILON_LOW, EPSILON_HIGH, NAME = 0.2, 0.4, 'x'\n"
        "def loss(data, logprobs_list, clip=(0.8, 1.2), beta=0.1):\n"
        "    return sum(lp.sum() * EPSILON_LOW for lp in logprobs_list), {NAME: beta}\n"
    )
    loss = load(f"{path}:loss")
    numbers = {number.name: (number.value, number.role) for number in named_numbers(loss)}
    assert numbers == {
        "clip[0]": (0.8, "low"), "clip[1]": (1.2, "high"), "beta": (0.1, "kl"), "EPSILON_LOW": (0.2, "low"),
    }  # fmt: skip
    (constant,) = (number for number in named_numbers(loss) if number.name == "EPSILON_LOW")
    rows = [torch.ones(2)]
    assert constant.change(0.5)([], rows)[0] == 1.0 and loss([], rows)[0] == pytest.approx(0.4)


@pytest.mark.filterwarnings("ignore:k1 in a loss:lossfns.LossWarning")
def test_k1_that_is_asked_for_is_no_bug() -> None:
    loss = lossfns.grpo(kl=lossfns.k1)
    assert asks_for_k1(loss) and not asks_for_k1(lossfns.grpo())
    assert [v.law for v in verdicts(loss) if v.verdict == "wrong"] == []


def test_a_method_is_known_by_the_name_or_the_docstring() -> None:
    assert claims_to_be(lossfns.gspo(), "gspo") and claims_to_be(padded(gspo_token), "gspo")
    assert not claims_to_be(padded(topr), "gspo")
