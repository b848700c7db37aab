"""Combinators on the entropy of the policy: bonuses, and masks of tokens by their entropy.

H = −Σ p·log p is the entropy of the policy's distribution at a token, the column ``entropy``. The local client supplies
it; in a loop ``linear_logprobs`` and ``target_logprobs`` return it. A hosted service returns logprobs alone:
``with_sampled_entropy`` estimates the bonus from these.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lossfns import terms as eq
from lossfns.checks import check_number
from lossfns.combine import check_wrappable
from lossfns.errors import LossInputError
from lossfns.loss import Loss, Statistics
from lossfns.preset import preset
from lossfns.segments import group_labels, over_group, to_tokens
from lossfns.statistics import OnDemand
from lossfns.tokens import Tokens, to_dtype


@preset
def with_entropy(loss: Loss, entropy_coef: float = 0.01) -> Loss:
    """l − c·H: an entropy bonus, under the share and the denominator of the loss, as in verl.

    SkyRL weighs the bonus by ``sequence_mean``, whatever the loss is. TRL takes the mean of H over the tokens of a
    batch (with ``top_entropy_quantile``, over the kept tokens). For a bonus with another weighing, sum the loss and a
    loss of the bonus alone, each over its own denominator.

    Args:
        loss: a loss over tokens. Apply ``with_tis`` and ``with_dual_clip`` before: they would change the bonus.
        entropy_coef: c, a finite number of at least 0. With 0 the entropy is reported and has no gradient.

    Reads ``entropy`` besides the columns of the loss, with its gradient. Its statistics are those of the loss, and

        entropy: mean H over active tokens, in nats, at least 0.

    >>> from lossfns import ppo
    >>> with_entropy(ppo(), entropy_coef=0.01).gradient_columns
    ('entropy',)
    >>> import torch
    >>> logprobs, entropy = (torch.tensor([[-1.0, -2.0]], requires_grad=True), torch.ones(1, 2, requires_grad=True))
    >>> columns = {"advantages": [1.0], "old_logprobs": [[-1.0, -2.0]], "entropy": entropy}
    >>> total, metrics = with_entropy(ppo(), 0.5).padded(logprobs, torch.ones(1, 2), **columns)
    >>> total.item(), metrics["entropy"]  # −1 − 0.5·1
    (-1.5, 1.0)
    """
    check_wrappable(loss, penalty=True)
    is_constant = "entropy" in loss.reads and "entropy" not in loss.gradient_columns

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        inner = replace(t, columns={**t.columns, "entropy": t.entropy.detach()}) if is_constant else t
        term, statistics = loss.terms(inner)
        rewarded = term.sub(t.entropy, alpha=entropy_coef) if entropy_coef else term
        return rewarded, statistics | OnDemand(entropy=t.entropy.detach)

    differentiates = (*loss.gradient_columns, *(["entropy"] if entropy_coef else []))
    return replace(
        loss, reads=joined(loss.reads, "entropy"), terms=terms, differentiates=tuple(dict.fromkeys(differentiates))
    )


@preset
def with_sampled_entropy(loss: Loss, entropy_coef: float = 0.01, log_ratio_cap: float | None = 20.0) -> Loss:
    """l + c·r·lp with r = exp(lp − old): an entropy bonus from logprobs alone, for services that return no entropy.

    A score-function estimate. For a token sampled from the old policy, E[−r·lp] = H and E[∇(−r·lp)] = ∇H, on- and
    off-policy. −lp by itself has the right expected value on-policy, but its expected gradient is 0, since E[∇lp] = 0.
    The estimate is noisier than H: if the backend supplies ``entropy``, use ``with_entropy``.

    Args:
        loss: a loss over tokens. Apply ``with_tis`` and ``with_dual_clip`` before: they would change the bonus.
        entropy_coef: c, a finite number of at least 0. With 0 the result is the loss itself.
        log_ratio_cap: bound of |lp − old| before the exponential, above 0; ``None``: no bound.

    Reads ``old_logprobs`` besides the columns of the loss: those of the policy that sampled. Its statistics are those
    of the loss, and

        entropy_sampled: mean −r·lp over active tokens, an estimate of H in nats, at least 0.

    >>> from lossfns import reinforce
    >>> with_sampled_entropy(reinforce(), entropy_coef=0.01).reads
    ('advantages', 'old_logprobs')
    """
    check_wrappable(loss, penalty=True)
    if entropy_coef == 0:
        return loss

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        term, statistics = loss.terms(t)
        negative_entropy = eq.importance_ratio(t.logprobs - t.old_logprobs, log_ratio_cap) * t.logprobs
        rewarded = term.add(negative_entropy, alpha=entropy_coef)
        return rewarded, statistics | OnDemand(entropy_sampled=lambda: -negative_entropy.detach())

    return replace(loss, reads=joined(loss.reads, "old_logprobs"), terms=terms, differentiates=loss.gradient_columns)


@preset
def with_top_entropy(loss: Loss, top_quantile: float = 0.2) -> Loss:
    """l·1[H >= τ]: only the tokens of highest entropy in their group are trained. Wang et al. 2025, arXiv:2506.01939.

    Of the n active tokens of a group, 1 + ⌊ρ·(n − 1)⌋ are kept, and all that tie with the last of these. So τ is the (1
    − ρ)-quantile of H, as in TRL's ``top_entropy_quantile``. The other tokens have the term 0 and stay in the
    denominator. The mask is a constant. Bind ``groups=[0] * len(data)`` for a quantile over the whole batch, as TRL and
    the paper take it.

    Args:
        loss: a loss over tokens. Apply ``with_kl`` after, so that the penalty is not masked, as in TRL. TRL masks an
            entropy
        bonus: ``with_top_entropy(with_entropy(loss))``.
        top_quantile: ρ, a number in [0, 1]. With 1 the result is the loss itself.

    Reads ``entropy``, as a constant, and ``groups`` (an integer label for each datum; all datums of one label must be
    in one call) besides the columns of the loss. Its statistics are those of the loss, over all active tokens, and

        entropy: mean H over active tokens, in nats, at least 0.
        entropy_kept: share of active tokens that are kept, in (0, 1].

    >>> from lossfns import dapo
    >>> with_top_entropy(dapo(), top_quantile=0.2).reads
    ('advantages', 'old_logprobs', 'entropy', 'groups')
    """
    check_wrappable(loss, "ref_logprobs")
    if top_quantile == 1:
        return loss

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        term, statistics = loss.terms(t)
        kept = in_top_quantile(t, t.entropy.detach(), top_quantile)
        more = OnDemand(entropy=t.entropy.detach, entropy_kept=lambda: kept)
        return torch.where(kept, term, 0), statistics | more

    return replace(
        loss, reads=joined(loss.reads, "entropy", "groups"), terms=terms, differentiates=loss.gradient_columns
    )


def in_top_quantile(t: Tokens, x: Tensor, share: float) -> Tensor:
    """``[N]`` bool: True at the 1 + ⌊share·(n − 1)⌋ largest x of the n active tokens of a group, and at their ties."""
    labels = torch.where(t.active, to_tokens(t, group_labels(t)), torch.inf)  # inactive tokens come last
    descending = x.argsort(descending=True)
    order = descending[labels[descending].argsort(stable=True)]
    by_group, places = labels[order], torch.arange(len(order), device=x.device)
    is_first = torch.cat([by_group.new_ones(1, dtype=torch.bool), by_group[1:] != by_group[:-1]])
    first = torch.where(is_first, places, 0).cummax(0).values
    count = torch.where(t.active, over_group(t, to_dtype(t.active, x.dtype)), 1)[order]
    last = first + (share * (count.double() - 1)).floor().long()
    threshold = torch.empty_like(x).scatter(0, order, x[order][last])
    return t.active & (x >= threshold)


@preset
def with_clip_b(loss: Loss, mu: float = 2.5) -> Loss:
    """l·1[A >= 0 or S − E[S] >= −μ·σ(S)], S = p·(H + lp): masks the tokens with A < 0 that lower the entropy most.

    Clip_B of Wang et al. 2026, arXiv:2602.03392, and of Trinity-RFT (``clipb_advantage.py``). To first order, lowering
    the logit of a token by ε changes H by ε·S. Mean E and standard deviation σ (divisor n) are over the active tokens
    of the group. The mask is a constant, of the current policy; Trinity-RFT computes it once, before the updates.
    Dropped tokens have the term 0 and stay in the denominator, while Trinity-RFT takes them out of the mask. Bind
    ``groups=[0] * len(data)`` to compare the whole batch, as Trinity-RFT does.

    Args:
        loss: a loss over tokens that reads ``advantages``. Apply ``with_kl`` after, so that the penalty is not masked.
        mu: μ, a finite number of at least 0.

    Reads ``entropy``, as a constant, and ``groups`` (an integer label for each datum; all datums of one label must be
    in one call) besides the columns of the loss. Its statistics are those of the loss, over all active tokens, and

        entropy: mean H over active tokens, in nats, at least 0.
        clip_b: share of active tokens that are dropped, in [0, 1].

    >>> from lossfns import dapo
    >>> with_clip_b(dapo()).knobs["mu"]
    2.5
    """
    check_wrappable(loss, "ref_logprobs")
    if "advantages" not in loss.reads:
        raise LossInputError("loss", "a loss that reads advantages", repr(loss), "There is nothing to clip by.")

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        term, statistics = loss.terms(t)
        lp, entropy = t.logprobs.detach(), t.entropy.detach()
        s = torch.where(t.active, lp.exp() * (entropy + lp), 0)
        n = over_group(t, to_dtype(t.active, s.dtype)).clamp(min=1)
        centred = torch.where(t.active, s - over_group(t, s) / n, 0)
        deviation = (over_group(t, centred.square()) / n).sqrt()
        dropped = (t.advantages < 0) & (centred < -mu * deviation)
        more = OnDemand(entropy=lambda: entropy, clip_b=lambda: dropped)
        return torch.where(dropped, 0, term), statistics | more

    return replace(
        loss, reads=joined(loss.reads, "entropy", "groups"), terms=terms, differentiates=loss.gradient_columns
    )


def joined(reads: tuple[str, ...], *names: str) -> tuple[str, ...]:
    """Return the names of columns with more names, each once."""
    return tuple(dict.fromkeys((*reads, *names)))


def adapt_entropy_coef(
    coef: float, entropy: float, *, target: float, delta: float = 0.005, low: float = 0.0, high: float = 1.0
) -> tuple[float, float]:
    """Return the next entropy coefficient, and the one to apply in the next step.

    The coefficient grows by δ if H <= target, else it shrinks by δ, within [low, high]. It is applied only if H <=
    target. He et al. 2025 (Skywork-OR1, arXiv:2505.22312); TRL's ``use_adaptive_entropy``, whose target is 0.2. TRL
    applies 0 in the first step. The two results are the whole state: keep them in checkpoints.

    Args:
        coef: the coefficient so far, the first result of the last call.
        entropy: mean H of the last step, the metric ``entropy`` of ``with_entropy``, in nats.
        target: the entropy to keep, in nats.
        delta: δ, the step of the coefficient, above 0.
        low, high: bounds of the coefficient, 0 <= low <= high.

    Raises:
        LossInputError: for a number that is out of its range.

    >>> adapt_entropy_coef(0.0, 0.15, target=0.2)
    (0.005, 0.005)
    >>> adapt_entropy_coef(0.005, 0.3, target=0.2)
    (0.0, 0.0)
    """
    for name, value in {"coef": coef, "entropy": entropy, "target": target, "low": low}.items():
        check_number(name, value, "a finite number of at least 0", lambda x: x >= 0, "The unit is the nat.")
    check_number("delta", delta, "a finite number above 0", lambda x: x > 0, "0.005 in TRL.")
    check_number("high", high, f"a finite number of at least {low}", lambda x: x >= low, "It bounds the coefficient.")
    below = entropy <= target
    coef = min(coef + delta, high) if below else max(coef - delta, low)
    return coef, coef if below else 0.0
