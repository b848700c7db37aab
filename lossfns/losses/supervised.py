"""Cross-entropy on target logprobs. Weights are real numbers: a mask, importances, or probabilities of targets."""

from __future__ import annotations

from torch import Tensor

from lossfns import terms as eq
from lossfns.loss import Loss, Statistics, make_loss, preset
from lossfns.tokens import TARGETS, Tokens
from lossfns.weigh import Weighing, token_mean


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

    Reads no column besides the weights, which may be negative. Statistic:

        nll: unweighted mean −lp over active tokens, in nats, at least 0.

    >>> import torch
    >>> from lossfns import datum_from_tokens
    >>> data = [datum_from_tokens([5, 6, 7], weights=[0.0, 1.0, 3.0])]
    >>> loss, metrics = cross_entropy()(data, [torch.tensor([-1.0, -2.0])])
    >>> float(loss), metrics["nll"]  # (1·1 + 3·2) / 4, and (1 + 2) / 2
    (1.75, 1.5)
    """
    return make_loss(nll_of_token, (), weigh)


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
