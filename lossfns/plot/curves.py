"""A loss and its derivative over what it sees: the ratio of a token, the margin of a pair, the probability of a token.

Each point is the loss of a batch of one row, computed and differentiated by the loss itself in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lossfns.errors import LossInputError
from lossfns.loss import Loss

OLD, REFERENCE = -2.0, -40.0
"""The logprobs around which ratios and margins vary. Over the range of a curve, no logprob exceeds 0."""


class Curve(NamedTuple):
    """A loss along a line of inputs.

    Attributes:
        x: the inputs.
        value: the loss at each of them.
        slope: its derivative by the logprob of the token, or by the margin of the pair.
    """

    x: list[float]
    value: list[float]
    slope: list[float]

    def from_zero(self) -> Curve:
        """Return the curve moved to value 0 at the input that is nearest to 0."""
        middle = min(range(len(self.x)), key=lambda i: abs(self.x[i]))
        return self._replace(value=[v - self.value[middle] for v in self.value])

    def by_slope_at_zero(self) -> Curve:
        """Return the curve in units of the size of its slope at the input that is nearest to 0."""
        middle = min(range(len(self.x)), key=lambda i: abs(self.x[i]))
        unit = abs(self.slope[middle]) or 1.0
        return Curve(self.x, [v / unit for v in self.value], [s / unit for s in self.slope])


POLICY_COLUMNS = {"advantages", "old_logprobs", "ref_logprobs", "sampler_logprobs"}
"""The columns of the losses that are drawn over the ratio."""


UNPAIRED_COLUMNS = {"ref_logprobs", "labels", "reference_point"}
"""The columns of the losses that are drawn over the log-ratio of a labelled answer."""


def is_policy(loss: Loss) -> bool:
    return loss.rows == "tokens" and "advantages" in loss.reads and set(loss.reads) <= POLICY_COLUMNS


def is_preference(loss: Loss) -> bool:
    return loss.rows == "pairs" and loss.output == "logprobs" and set(loss.reads) <= {"ref_logprobs"}


def is_unpaired(loss: Loss) -> bool:
    return loss.rows == "sequences" and "labels" in loss.reads and set(loss.reads) <= UNPAIRED_COLUMNS


def is_supervised(loss: Loss) -> bool:
    return loss.rows == "tokens" and loss.output == "logprobs" and not loss.reads


def ratio_curve(loss: Loss, advantage: float, ratios: Sequence[float]) -> Curve:
    """Return a policy loss of one token over its ratio π/π_old. Sampler and reference are the old policy.

    >>> from lossfns import ppo
    >>> [round(slope, 3) for slope in ratio_curve(ppo(), 1.0, [0.5, 1.0, 1.5]).slope]
    [-0.5, -1.0, 0.0]
    """
    columns = {name: torch.full((1, 1), OLD).double() for name in loss.reads if name != "advantages"}
    columns["advantages"] = torch.tensor([advantage])

    def differentiate(ratio: float) -> tuple[float, float]:
        logprob = torch.full((1, 1), OLD + math.log(ratio), dtype=torch.float64, requires_grad=True)
        return value_and_slope(loss, logprob, logprob, columns)

    return curve(differentiate, ratios)


def margin_curve(loss: Loss, margins: Sequence[float]) -> Curve:
    """Return a preference loss of one pair over its margin, (lp₊ − ref₊) − (lp₋ − ref₋), in nats.

    Half of the margin is gained by the chosen side, the other half is lost by the rejected one. Each side has one
    token, and both have the same reference logprob.

    >>> from lossfns import dpo
    >>> [round(v, 4) for v in margin_curve(dpo(), [0.0]).value]
    [0.6931]
    """
    columns = {name: torch.full((2, 1), REFERENCE).double() for name in loss.reads}

    def differentiate(margin: float) -> tuple[float, float]:
        m = torch.tensor(margin, dtype=torch.float64, requires_grad=True)
        return value_and_slope(loss, torch.stack([REFERENCE + m / 2, REFERENCE - m / 2])[:, None], m, columns)

    return curve(differentiate, margins)


def log_ratio_curve(loss: Loss, label: float, log_ratios: Sequence[float]) -> Curve:
    """Return the loss of one labelled answer over its log-ratio to the reference, in nats; the reference point is 0.

    >>> from lossfns import kto
    >>> [round(v, 4) for v in log_ratio_curve(kto(), 1.0, [0.0]).value]
    [0.5]
    """
    columns = {"ref_logprobs": torch.full((1, 1), REFERENCE).double(), "labels": torch.tensor([label])}
    columns |= {"reference_point": torch.tensor([0.0])} if "reference_point" in loss.reads else {}

    def differentiate(x: float) -> tuple[float, float]:
        logprob = torch.full((1, 1), REFERENCE + x, dtype=torch.float64, requires_grad=True)
        return value_and_slope(loss, logprob, logprob, columns)

    return curve(differentiate, log_ratios)


def probability_curve(loss: Loss, probabilities: Sequence[float]) -> Curve:
    """Return a supervised loss of one token over the probability of the token.

    >>> from lossfns import cross_entropy
    >>> probability_curve(cross_entropy(), [0.25, 0.5]).slope
    [-1.0, -1.0]
    """

    def differentiate(p: float) -> tuple[float, float]:
        logprob = torch.full((1, 1), math.log(p), dtype=torch.float64, requires_grad=True)
        return value_and_slope(loss, logprob, logprob, {})

    return curve(differentiate, probabilities)


def curve(differentiate: Callable[[float], tuple[float, float]], x: Sequence[float]) -> Curve:
    value, slope = zip(*map(differentiate, x), strict=True)
    return Curve(list(x), list(value), list(slope))


def value_and_slope(loss: Loss, logprobs: Tensor, x: Tensor, columns: dict[str, Tensor]) -> tuple[float, float]:
    """Return the numerator of a loss of one row, and its derivative by x; 0 where the loss does not depend on x."""
    total, metrics = loss.padded(logprobs, torch.ones_like(logprobs, requires_grad=False), **columns)
    (slope,) = torch.autograd.grad(total, x, allow_unused=True, materialize_grads=True)
    count = metrics["denominator"]
    return total.item() * count, slope.item() * count


def linspace(first: float, last: float, count: int = 161) -> list[float]:
    """Return numbers at equal distances. With an odd count, the middle is one of them."""
    return [first + (last - first) * i / (count - 1) for i in range(count)]


def no_picture(loss: Loss) -> LossInputError:
    """Return the error for a loss that has no picture."""
    reads = ", ".join(loss.reads) or "nothing"
    expected = "a policy loss over ratios, a preference loss over margins, or a supervised loss over logprobs"
    fix = "lossfns describe has its columns."
    return LossInputError("loss", expected, f"{loss.name}, which reads {reads}", fix)
