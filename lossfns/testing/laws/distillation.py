"""Laws of distillation on sampled tokens, whose teacher's logprobs stand in ``ref_logprobs``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lossfns.testing.laws.base import (
    LossFn,
    Outcome,
    Probe,
    assume,
    influences,
    require,
    uniform_batch,
    wrong,
)
from lossfns.testing.laws.settings import words


def beside_teacher(probe: Probe, student: float, teacher: float) -> Outcome:
    """Return the outcome of one token that the student sampled itself, by the logprobs of student and teacher."""
    return probe(uniform_batch(probe.batch, logprobs=student, ref_logprobs=teacher))


@wrong("the student must come closer to the teacher")
def towards_teacher(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A token that the teacher finds likelier than the student is not made less likely.

    It is raised at least as much as a token that the teacher finds less likely. Reverse KL lowers the latter; forward
    KL, which weighs tokens by the teacher, raises both.
    """
    probe = Probe.of(loss_fn, data, logprobs)
    below, above = (beside_teacher(probe, s, t).gradients[0][0] for s, t in ((-4.0, -1.0), (-1.0, -4.0)))
    assume(below != 0 or above != 0, "there is no gradient")
    seen = f"A token 3 nats below the teacher has the gradient {below:g}, one 3 nats above it {above:g}."
    constant = below > 0 and probe.close(below, above)
    require(not constant, "k1-in-loss", f"{seen} The log-ratio itself is differentiated.")
    require(below <= 0 and below <= above + 1e-6 * abs(above), "kl-sign", seen)


@wrong("a teacher without effect teaches nothing")
def teacher(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """The teacher's logprobs change the value or the gradient."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = uniform_batch(probe.batch, length=2, ref_logprobs=-1.5)
    matters = influences(probe, "ref_logprobs", batch, [(0, 0)], by=-1.0)
    require(matters, "ref-inert", "Changing the teacher's logprobs changes nothing.")


@wrong("the metric is not what its name says")
def teacher_metrics(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """An estimate of the reverse KL is positive for a token that the student finds likelier than the teacher."""
    probe = Probe.of(loss_fn, data, logprobs)
    metrics = beside_teacher(probe, -1.0, -4.0).metrics
    named = [name for name in metrics if is_reverse_kl(name)]
    assume(bool(named), "it reports no reverse KL")
    for name in named:
        seen = f"For a token with logprob −1 of the student and −4 of the teacher {name!r} is {metrics[name]}."
        require(metrics[name] > 0, "metric-wrong", seen)


def is_reverse_kl(name: str) -> bool:
    """Return whether a metric is called a reverse KL, or the KL to the teacher."""
    found = set(words(name))
    return "rkl" in found or ("kl" in found and bool(found & {"reverse", "teacher"}) and "loss" not in found)
