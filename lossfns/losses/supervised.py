"""Cross-entropy on target logprobs. Weights are real numbers: a mask, importances, or probabilities of targets."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from lossfns import terms as eq
from lossfns.loss import Loss, Statistics
from lossfns.preset import make_loss, preset
from lossfns.statistics import OnDemand
from lossfns.tokens import TARGETS, Tokens
from lossfns.weigh import Weighing, token_mean

LOG_20 = math.log(20)
"""The entropy of 20 equally likely tokens, in nats."""


def nll_of_token(t: Tokens) -> tuple[Tensor, Statistics]:
    """−lp of each token, which is also its statistic."""
    term = eq.nll(t.logprobs)
    return term, {"nll": term.detach()}


def nll_of_target(t: Tokens) -> tuple[Tensor, Statistics]:
    """−lp of each target, without a statistic: a mean over candidates has no meaning."""
    return eq.nll(t.logprobs), {}


@preset
def cross_entropy(weigh: Weighing = token_mean) -> Loss:
    """−Σ w·lp / Σ w, with one target for each position.

    The hosted APIs' example loss is ``cross_entropy(weigh=sequence_sum_mean)``, and their built-in is
    ``cross_entropy(weigh=token_sum)``.

    Args:
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.

    Reads no column besides the weights, which may be negative. Statistics, means over active tokens:

        nll: unweighted mean −lp, in nats, at least 0.

    >>> import torch
    >>> from lossfns import datum_from_tokens
    >>> data = [datum_from_tokens([5, 6, 7], weights=[0.0, 1.0, 3.0])]
    >>> loss, metrics = cross_entropy()(data, [torch.tensor([-1.0, -2.0])])
    >>> float(loss), metrics["nll"]  # (1·1 + 3·2) / 4, and (1 + 2) / 2
    (1.75, 1.5)
    """
    return make_loss(nll_of_token, (), weigh)


@preset
def eaft(power: float = 1.0, entropy_scale: float = LOG_20, weigh: Weighing = token_mean) -> Loss:
    """−sg(H/s)^α·lp: a token counts less where the model is sure, so that conflicting data overwrite the model less.

    Entropy-adaptive fine-tuning: Diao et al. 2026, arXiv:2601.02151. The paper approximates H by the entropy of the 20
    most likely tokens among themselves, and divides by log 20, its largest value; here H is the exact entropy over the
    whole vocabulary, which may exceed log 20. LLaMA-Factory (``use_eaft_loss``) divides the approximation by 3.0.

    Args:
        power: α, a finite number of at least 0 (LLaMA-Factory's ``eaft_alpha``). With 0 it is ``cross_entropy``.
        entropy_scale: s, the entropy at which a token has weight 1, in nats, above 0.
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.

    Reads ``entropy``, as a constant. Statistics, means over active tokens:

        nll: unweighted mean −lp, in nats, at least 0.
        entropy: mean H, in nats, at least 0.
        eaft_weight: mean (H/s)^α, at least 0.

    >>> eaft().reads, eaft().gradient_columns
    (('entropy',), ())
    """

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        nll, entropy = eq.nll(t.logprobs), t.entropy.detach()
        weight = (entropy / entropy_scale) ** power
        return weight * nll, {"nll": nll.detach(), "entropy": entropy, "eaft_weight": weight}

    return make_loss(terms, ("entropy",), weigh, differentiates=())


@preset
def multi_target_cross_entropy(weigh: Weighing = token_mean) -> Loss:
    """−Σ w·lp / Σ w over N·K entries: K weighted candidate targets for each position.

    Logprobs, weights and target tokens are ``[N, K]``, row-major where they are flat, dense or CSR. Logprobs are
    over the full vocabulary, and are not renormalised over K. Unused slots have weight 0. With a teacher's
    probabilities as weights, the loss is the forward KL(teacher‖π) up to the teacher's entropy.

    Args:
        weigh: how entries count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.

    Reads no column besides the weights, which may be negative. It has no statistic of its own.

    >>> import torch
    >>> from lossfns import Datum, ModelInput
    >>> inputs = {"target_tokens": torch.tensor([[6, 7]]), "weights": torch.tensor([[0.75, 0.25]])}
    >>> data = [Datum(ModelInput.from_ints([5]), inputs)]
    >>> loss, _ = multi_target_cross_entropy()(data, [torch.tensor([[-1.0, -2.0]])])
    >>> float(loss)
    1.25
    """
    return make_loss(nll_of_target, (), weigh, rows=TARGETS)


def reweighted(term: Callable[[Tensor], Tensor], weigh: Weighing) -> Loss:
    """term(lp) of each token: a likelihood whose tokens are weighted by their own probability."""

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        return term(t.logprobs), OnDemand(nll=lambda: -t.logprobs.detach())

    return make_loss(terms, (), weigh)


@preset
def dft(weigh: Weighing = token_mean) -> Loss:
    """−sg(p)·lp: dynamic fine-tuning, whose gradient is that of −p. Wu et al. 2025, arXiv:2508.05629, equation 9.

    Cross-entropy with a weight p on each token: likely tokens learn most, and unlikely tokens hardly learn.

    Args:
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.

    Reads no column besides the weights, which may be negative. Statistics, means over active tokens:

        nll: unweighted mean −lp, in nats, at least 0.

    >>> import torch
    >>> loss, _ = dft().padded(torch.tensor([[0.5]]).log(), torch.ones(1, 1))
    >>> round(float(loss), 4)  # ½·log 2
    0.3466
    """
    return reweighted(lambda lp: -lp.detach().exp() * lp, weigh)


@preset
def sft_phi(weigh: Weighing = token_mean) -> Loss:
    """−sg(p·(1 − p))·lp: cross-entropy on tokens that are neither certain nor unlikely.

    Zhang et al. 2025, CHORD (arXiv:2508.11408), equation 6, where it is the supervised part of a sum: see ``chord``.

    Args:
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.

    Reads no column besides the weights, which may be negative. Statistics, means over active tokens:

        nll: unweighted mean −lp, in nats, at least 0.

    >>> import torch
    >>> loss, _ = sft_phi().padded(torch.tensor([[0.5]]).log(), torch.ones(1, 1))
    >>> round(float(loss), 4)  # ¼·log 2
    0.1733
    """

    def term(lp: Tensor) -> Tensor:
        p = lp.detach().exp()
        return -p * (1 - p) * lp

    return reweighted(term, weigh)


@preset
def focal(gamma: float = 2.0, weigh: Weighing = token_mean) -> Loss:
    """−(1 − p)^γ·lp: cross-entropy that fades on tokens that are already likely. The factor has a gradient.

    Lin et al. 2017, arXiv:1708.02002, equation 4.

    Args:
        gamma: γ, a finite number of at least 0. At 0 it is ``cross_entropy``.
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.

    Reads no column besides the weights, which may be negative. Statistics, means over active tokens:

        nll: unweighted mean −lp, in nats, at least 0.

    >>> import torch
    >>> loss, _ = focal().padded(torch.tensor([[0.5]]).log(), torch.ones(1, 1))
    >>> round(float(loss), 4)  # ¼·log 2
    0.1733
    """
    return reweighted(lambda lp: -(gamma * eq.log_one_minus(lp)).exp() * lp, weigh)


@preset
def unlikelihood(weigh: Weighing = token_mean) -> Loss:
    """−log(1 − p): the loss makes tokens unlikely. Welleck et al. 2020, arXiv:1908.04319, equation 4.

    The paper adds it to cross-entropy on other tokens. Value and gradient are finite up to p = 1.

    Args:
        weigh: how tokens count: ``token_mean``, ``sequence_mean``, ``sequence_sum_mean``, ``token_sum`` or
            ``fixed_length(L)``.

    Reads no column besides the weights, which may be negative. Statistics, means over active tokens:

        nll: unweighted mean −lp, in nats, at least 0.

    >>> import torch
    >>> loss, _ = unlikelihood().padded(torch.tensor([[0.75]]).log(), torch.ones(1, 1))
    >>> round(float(loss), 4)  # log 4
    1.3863
    """
    return reweighted(lambda lp: -eq.log_one_minus(lp), weigh)
