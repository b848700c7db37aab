"""Cross-entropy on target logprobs. Weights are real numbers: a mask, importances, or soft-target probabilities."""

from __future__ import annotations

from torch import Tensor

from lossfns import terms as eq
from lossfns.loss import Loss, Statistics, method, weighed
from lossfns.tokens import TARGETS, Tokens
from lossfns.weigh import Weighing, token_mean


def nll_of_row(t: Tokens) -> tuple[Tensor, Statistics]:
    term = eq.nll(t.logprobs)
    return term, {"nll": term.detach()}


def nll_of_target(t: Tokens) -> tuple[Tensor, Statistics]:
    return eq.nll(t.logprobs), {}


@method
def cross_entropy(weigh: Weighing = token_mean) -> Loss:
    """−Σ w·lp / Σ w: one target for each position. Statistic: ``nll``, the plain mean over active tokens.

    The hosted APIs' example loss is ``cross_entropy(weigh=sequence_sum_mean)``, their built-in
    ``cross_entropy(weigh=token_sum)``.
    """
    return weighed(nll_of_row, (), weigh)


@method
def multi_target_cross_entropy(weigh: Weighing = token_mean) -> Loss:
    """−Σ w·lp / Σ w over N·K entries: K weighted candidate targets for each position.

    Logprobs, weights and target tokens are ``[N, K]``, row-major when flat, dense or CSR; logprobs are
    those of the full vocabulary, never renormalised over K. Unused slots have weight 0. With teacher
    probabilities as weights it is the forward KL(teacher‖π) up to the teacher's entropy.
    """
    return weighed(nll_of_target, (), weigh, rows=TARGETS)
