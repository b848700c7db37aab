"""Sums of losses that papers name. Each is a call of ``sum_losses``: losses, coefficients, columns of weights.

The losses themselves are arguments, so that each sum works with any policy or preference loss and any weighing. The
statistics of each part are those of its loss, under the name of the part, as in ``sft/nll``.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lossfns import terms as eq
from lossfns.checks import check_number
from lossfns.loss import Loss, Statistics
from lossfns.losses.supervised import cross_entropy
from lossfns.preset import make_loss, preset
from lossfns.segments import chosen, weighted_mean
from lossfns.sums import sum_losses
from lossfns.tokens import PAIRS, Tokens
from lossfns.weigh import pair_mean

SFT = cross_entropy()
"""−Σ w·lp / Σ w, over the tokens of its own weights."""


def nll_of_chosen(t: Tokens) -> tuple[Tensor, Statistics]:
    """−Σ w·lp / Σ w over the chosen side of each pair, which is also its statistic."""
    term = eq.nll(chosen(t, weighted_mean(t, t.logprobs)))
    return term, {"nll": term.detach()}


CHOSEN_NLL = replace(make_loss(nll_of_chosen, (), pair_mean, rows=PAIRS), name="chosen_nll")
"""The mean over pairs of the mean NLL of a token of the chosen side."""


@preset
def echo(policy: Loss, alpha: float = 0.1) -> Loss:
    """L_policy + α·CE, where CE is the cross-entropy on the tokens of the environment.

    ECHO, as prime-rl 0.6 documents it (docs/algorithms.md): each part is divided by its own tokens of the whole batch.

    Args:
        policy: the loss on the tokens of the policy, those of ``weights``.
        alpha: α, a finite number of at least 0.

    Reads ``ce_weights``, 1 at tokens that a tool returned, besides the columns of the policy loss. Statistics: those of
    the policy loss under ``rl/``, and

        ce/nll: mean −lp over the tokens of ``ce_weights``, in nats, at least 0.

    >>> from lossfns import importance_sampling
    >>> echo(importance_sampling()).reads
    ('advantages', 'old_logprobs', 'ce_weights')
    """
    return sum_losses(rl=policy, ce=SFT, coefficients={"ce": alpha})


@preset
def chord(policy: Loss, mu: float = 0.1, sft: Loss = SFT) -> Loss:
    """(1 − μ)·L_policy + μ·L_SFT: the policy loss on rollouts, and SFT on expert datums of the same batch.

    Zhang et al. 2025, arXiv:2508.11408 (CHORD-μ). MIX of Trinity-RFT is the same sum with a constant μ. For a schedule
    of μ, build the loss anew in each step.

    Args:
        policy: the loss on rollouts, those of ``weights``, which are 0 in expert datums.
        mu: μ, a number in [0, 1].
        sft: the loss on the tokens of ``sft_weights``, which are 0 in rollouts.

    Reads ``sft_weights`` besides the columns of both losses. In expert datums any number fills those of the policy
    loss. Statistics: those of the losses under ``rl/`` and ``sft/``.

    >>> from lossfns import ppo
    >>> [part.coefficient for part in chord(ppo(), mu=0.25).parts.values()]
    [0.75, 0.25]
    """
    check_number("mu", mu, "a number in [0, 1]", lambda x: 0 <= x <= 1, "1 is SFT alone.")
    return sum_losses(rl=policy, sft=sft, coefficients={"rl": 1 - mu, "sft": mu})


@preset
def vapo_nll(policy: Loss, mu: float = 0.1) -> Loss:
    """L_policy + μ·NLL, where NLL is the mean −lp over all tokens of correct samples.

    Yue et al. 2025, arXiv:2504.05118, "positive example LM loss".

    Args:
        policy: the loss on all samples, the tokens of ``weights``.
        mu: μ, a finite number of at least 0.

    Reads ``nll_weights``, the weights of correct samples and 0 in others, besides the columns of the policy loss. A
    batch without a correct sample is no error: NLL is then 0. Statistics: those of the policy loss under ``rl/``, and

        nll/nll: mean −lp over the tokens of ``nll_weights``, in nats, at least 0.

    >>> from lossfns import ppo
    >>> vapo_nll(ppo()).parts["nll"].coefficient
    0.1
    """
    return sum_losses(rl=policy, nll=SFT, coefficients={"nll": mu})


@preset
def oreal(policy: Loss, positive_factor: float = 1.0, negative_factor: float = 1.0, sft_factor: float = 1.0) -> Loss:
    """c_neg·L_policy(A <= 0) + c_pos·(L_policy(A > 0) + c_sft·SFT(A > 0)), each over its own count of tokens.

    Lyu et al. 2025, arXiv:2502.06781, in the form of xtuner 1.0 (``xtuner/v1/rl/loss/oreal_loss.py``), with its
    ``positive_loss_factor``, ``negative_loss_factor`` and ``pos_sft_loss_weight``, and without its KL term.

    Args:
        policy: the policy loss.
        positive_factor, negative_factor, sft_factor: c_pos, c_neg and c_sft, finite numbers of at least 0.

    Reads ``positive_weights`` besides the columns of the policy loss: the weights of tokens with A > 0, and 0 at the
    others. ``weights`` are those of tokens with A <= 0. Statistics: those of the policy loss under ``negative/`` and
    ``positive/``, and

        sft/nll: mean −lp over the tokens of ``positive_weights``, in nats, at least 0.

    >>> from lossfns import reinforce
    >>> {name: part.weights for name, part in oreal(reinforce()).parts.items()}
    {'negative': 'weights', 'positive': 'positive_weights', 'sft': 'positive_weights'}
    """
    coefficients = {"negative": negative_factor, "positive": positive_factor, "sft": positive_factor * sft_factor}
    shared = {"sft": "positive_weights"}
    return sum_losses(negative=policy, positive=policy, sft=SFT, coefficients=coefficients, weights=shared)


@preset
def rpo(preference: Loss, alpha: float = 1.0) -> Loss:
    """L_preference + α·NLL, where NLL is the mean over pairs of −Σ w·lp / Σ w of the chosen side.

    Pang et al. 2024, arXiv:2404.19733, equation 1. The NLL of CPO, and that of ORPO, is the same part. A mean over the
    tokens of all chosen sides, as in TRL, is ``sum_losses(preference=dpo(), nll=cross_entropy())`` with ``nll_weights``
    that are 0 on rejected sides.

    Args:
        preference: a loss over pairs.
        alpha: α, a finite number of at least 0.

    Both parts read ``weights``. Statistics: those of the preference loss under ``preference/``, and

        nll/nll: NLL, in nats, at least 0.

    >>> from lossfns import dpo
    >>> rpo(dpo(), alpha=0.5).reads
    ('ref_logprobs',)
    """
    shared = {"nll": "weights"}
    return sum_losses(preference=preference, nll=CHOSEN_NLL, coefficients={"nll": alpha}, weights=shared)


@preset
def mpo(preference: Loss, quality: Loss, coefficients: tuple[float, float, float] = (0.8, 0.2, 1.0)) -> Loss:
    """c_p·L_preference + c_q·L_quality + c_g·NLL: mixed preference optimisation.

    Wang et al. 2024, arXiv:2411.10442, equation 1. In the paper the preference loss is that of DPO, and the quality
    loss that of BCO. NLL is the mean over pairs of −Σ w·lp / Σ w of the chosen side.

    Args:
        preference: a loss over pairs, which says which side is better.
        quality: a loss over pairs or sequences, which says how good each side is.
        coefficients: (c_p, c_q, c_g), finite numbers of at least 0.

    All parts read ``weights``. Statistics: those of the losses under ``preference/`` and ``quality/``, and

        nll/nll: NLL, in nats, at least 0.

    >>> from lossfns import dpo, orpo
    >>> list(mpo(dpo(), orpo()).parts)
    ['preference', 'quality', 'nll']
    """
    names = ("preference", "quality", "nll")
    shared = dict.fromkeys(names, "weights")
    parts = {"preference": preference, "quality": quality, "nll": CHOSEN_NLL}
    return sum_losses(**parts, coefficients=dict(zip(names, coefficients)), weights=shared)
