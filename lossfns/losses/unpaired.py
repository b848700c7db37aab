"""Preference losses on single datums. The label of a datum is 1 if its answer is desirable, else 0."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lossfns import terms as eq
from lossfns.errors import LossInputError, show
from lossfns.loss import Loss, Statistics
from lossfns.margins import Link, log_ratio_sum, logistic_link
from lossfns.pack import as_rows, as_tensor, has_length
from lossfns.preset import make_loss, preset
from lossfns.segments import sequence_value
from lossfns.tokens import SEQUENCES, Tokens
from lossfns.weigh import Weighing, datum_mean

Row = Sequence[float] | Tensor
"""The numbers of one answer's tokens."""


def labelled_loss(link: Link, beta: float, desirable_weight: float, undesirable_weight: float, weigh: Weighing) -> Loss:
    """λ_D·f(β·(m − z)) if desirable, λ_U·f(β·(z − m)) if not, with f the link and m = Σ w·(lp − ref)."""

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        m = log_ratio_sum(t)
        desirable = sequence_value(t, t.labels) > 0.5
        sign = eq.select(desirable, 1.0, -1.0, like=m)
        distance = sign * (m - sequence_value(t, t.reference_point))
        weight = eq.select(desirable, desirable_weight, undesirable_weight, like=m)
        statistics = {"log_ratio": m.detach(), "reward": beta * m.detach(), "accuracy": distance.detach() > 0}
        return weight * link(beta * distance), statistics

    return make_loss(terms, ("ref_logprobs", "labels", "reference_point"), weigh, rows=SEQUENCES)


@preset
def kto(
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weigh: Weighing = datum_mean,
) -> Loss:
    """λ_D·(1 − σ(β·(m − z₀))) if desirable, λ_U·(1 − σ(β·(z₀ − m))) if not, with m = Σ w·(lp − ref).

    Ethayarajh et al. 2024, arXiv:2402.01306, equation 8. The reference point z₀ is an estimate of KL(π‖ref) without
    gradient: max(0, mean m) over answers to other prompts, as ``kto_reference_point`` computes it. TRL takes this
    maximum, Liger takes the mean itself. With z₀ = 0 the loss is the unpaired form of APO-zero (arXiv:2408.06266),
    which TRL calls ``apo_zero_unpaired``.

    Args:
        beta: β, a finite number above 0.
        desirable_weight: λ_D, a finite number of at least 0.
        undesirable_weight: λ_U, a finite number of at least 0.
        weigh: how datums count: ``datum_mean`` or ``datum_sum``.

    Reads ``ref_logprobs``, ``labels`` (1 if desirable, 0 if not, for each datum) and ``reference_point`` (z₀, one
    number for each datum). Statistics, means over datums:

        log_ratio: m, in nats.
        reward: β·m.
        accuracy: share of datums with m > z₀ if desirable, m < z₀ if not, in [0, 1].

    >>> kto().reads
    ('ref_logprobs', 'labels', 'reference_point')
    """

    return labelled_loss(lambda h: torch.sigmoid(-h), beta, desirable_weight, undesirable_weight, weigh)


@preset
def bco(
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weigh: Weighing = datum_mean,
) -> Loss:
    """−λ_D·log σ(β·(m − z)) if desirable, −λ_U·log σ(β·(z − m)) if not, with m = Σ w·(lp − ref).

    Jung et al. 2024 (binary classifier optimisation), arXiv:2404.04656. Its shift δ is β·z: the mean of the mean
    rewards β·m of desirable and of undesirable answers, a moving average that the caller keeps.

    Args:
        beta: β, a finite number above 0.
        desirable_weight: λ_D, a finite number of at least 0.
        undesirable_weight: λ_U, a finite number of at least 0.
        weigh: how datums count: ``datum_mean`` or ``datum_sum``.

    Reads ``ref_logprobs``, ``labels`` (1 if desirable, 0 if not, for each datum) and ``reference_point`` (z, one number
    for each datum, in nats). Statistics, means over datums:

        log_ratio: m, in nats.
        reward: β·m.
        accuracy: share of datums with m > z if desirable, m < z if not, in [0, 1].

    >>> import torch
    >>> lp, ref, ones = torch.tensor([[-1.0]]), torch.tensor([[-2.0]]), torch.ones(1)
    >>> loss, metrics = bco(beta=2.0).padded(lp, ones[None], ref_logprobs=ref, labels=ones, reference_point=0 * ones)
    >>> round(float(loss), 4)  # −log σ(2 · 1)
    0.1269
    """

    return labelled_loss(logistic_link, beta, desirable_weight, undesirable_weight, weigh)


@preset
def sppo(beta: float = 0.1, weigh: Weighing = datum_mean) -> Loss:
    """(m − (P − ½)/β)², with m = Σ w·(lp − ref) and P the probability that the answer wins against the policy.

    Wu et al. 2024 (self-play preference optimisation), arXiv:2405.00675, equation 4.7 with η = 1/β. The reference is
    the policy that sampled the answers. On pairs with P = 1 and P = 0 it is half of ``sppo_hard``.

    Args:
        beta: β, a finite number above 0.
        weigh: how datums count: ``datum_mean`` or ``datum_sum``.

    Reads ``ref_logprobs`` and ``rewards`` (P, one number for each datum). Statistics, means over datums:

        log_ratio: m, in nats.
        reward: β·m.

    >>> import torch
    >>> lp, ref, ones = torch.tensor([[-1.0]]), torch.tensor([[-2.0]]), torch.ones(1)
    >>> loss, metrics = sppo(beta=0.25).padded(lp, ones[None], ref_logprobs=ref, rewards=ones)
    >>> float(loss)  # (1 − 0.5 / 0.25)²
    1.0
    """

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        m = log_ratio_sum(t)
        target = (sequence_value(t, t.rewards) - 0.5) / beta
        return (m - target).square(), {"log_ratio": m.detach(), "reward": beta * m.detach()}

    return make_loss(terms, ("ref_logprobs", "rewards"), weigh, rows=SEQUENCES)


def kto_reference_point(logprobs: Sequence[Row], ref_logprobs: Sequence[Row], weights: Sequence[Row]) -> float:
    """max(0, mean of Σ w·(lp − ref)) over mismatched answers: the reference point of ``kto``.

    An answer is mismatched if it was given to another prompt, such as that of the next datum of the batch. The number
    is a constant for all datums of the batch, even if the batch is split: bind ``[z] * len(data)``.

    Args:
        logprobs: for each mismatched answer the logprobs of its tokens under the policy, or a padded tensor of them.
        ref_logprobs: the same under the reference.
        weights: the weights of the tokens, such as 1 in the answer and 0 in the prompt.

    Raises:
        LossInputError: if there is no answer, if the numbers of answers or tokens differ, or if a number is not finite.

    >>> kto_reference_point([[-1.0, -2.0], [-3.0]], [[-2.0, -2.5], [-3.25]], [[1.0, 1.0], [1.0]])
    0.875
    """
    given = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "weights": weights}
    for name, rows in given.items():
        if not has_length(rows) or len(rows) == 0:
            raise LossInputError(name, "rows of equal lengths, at least one", show(rows), "Pass a row for each answer.")
    columns = [[as_tensor(row).double() for row in as_rows(list(rows), name)] for name, rows in given.items()]
    shapes = [[tuple(row.shape) for row in rows] for rows in columns]
    if shapes.count(shapes[0]) != 3 or any(len(shape) != 1 for shape in shapes[0]):
        fix = "Pass the rows of the same answers."
        raise LossInputError("kto_reference_point", "rows of equal lengths", f"shapes {shapes}", fix)
    sums = [float((w * (lp - ref))[w != 0].sum()) for lp, ref, w in zip(*columns, strict=True)]
    bad = next((i for i, x in enumerate(sums) if not math.isfinite(x)), None)
    if bad is not None:
        fix = "Give weight 0 to a token without a logprob."
        raise LossInputError("kto_reference_point", "finite numbers", f"the sum {sums[bad]}", fix, datum=bad)
    return max(0.0, sum(sums) / len(sums))
