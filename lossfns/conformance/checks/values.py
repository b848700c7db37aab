"""Values of losses: loss:sum is the loss of the logprobs that come with it, a sum over tokens."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lossfns.conformance.base import Check, Finding, Inconclusive, refuse, require, worst
from lossfns.conformance.bench import Bench
from lossfns.conformance.client import Rows
from lossfns.conformance.expected import expected
from lossfns.conformance.rows import BATCH, GSPO_CLIP, policy_rows
from lossfns.conformance.wrong import variants

RTOL = 1e-4
"""The relative error of a sum in float32 over the wire."""

ROUNDED = 1e-6
"""The relative difference up to which two wrong answers are the same: the first one of the list then counts."""


class Case(NamedTuple):
    """A built-in loss under a config; ``tag`` tells cases of one loss apart."""

    loss: str
    config: dict[str, Any] | None
    tag: str
    level: str

    @property
    def name(self) -> str:
        return "-".join(filter(None, [self.loss.replace("_", "-"), self.tag]))

    @property
    def words(self) -> str:
        given = ", ".join(f"{key} {x:g}" for key, x in (self.config or {}).items())
        return f"{self.loss} with {given}" if given else self.loss

    def rows(self, bench: Bench) -> Rows:
        """Return the datums: those of every regime of a policy loss, around the logprobs of the start."""
        if self.loss == "cross_entropy":
            return BATCH
        return policy_rows(bench.start_logprobs(BATCH), mask=self.loss == "gspo")


CLIP = {"clip_low_threshold": 0.7, "clip_high_threshold": 1.1}

CASES = (
    Case("cross_entropy", None, "", "core"),
    Case("importance_sampling", None, "", "core"),
    Case("ppo", None, "", "core"),
    Case("ppo", CLIP, "clip", "core"),
    Case("cispo", None, "", "full"),
    Case("cispo", CLIP, "clip", "full"),
    Case("dro", None, "", "full"),
    Case("dro", {"beta": 0.5}, "beta", "full"),
    Case("gspo", GSPO_CLIP, "clip", "full"),
)
"""The services' built-in losses under default and given settings. The services do not publish defaults of gspo."""


def loss_offered(loss: str, bench: Bench) -> None:
    """Ask for a loss once. A server that does not have it says so at once, in a status that the SDK does not repeat."""
    case = next(case for case in CASES if case.loss == loss)
    trainer, rows = bench.idle(), case.rows(bench)
    try:
        trainer.forward(rows, loss, case.config)
    except Exception as error:
        refuse(error)


def value(case: Case, bench: Bench) -> Finding:
    """Compare loss:sum with the loss of the logprobs that came with it."""
    return worst(own_value(case, call, case.rows(bench), bench) for call in CALLS)


def own_value(case: Case, call: str, rows: Rows, bench: Bench) -> Finding:
    """Compare the loss:sum of a call with the loss of the logprobs that came with it."""
    answer = getattr(bench.idle(), call)(rows, case.loss, case.config)
    if "loss:sum" not in answer.metrics:
        raise Inconclusive(f"{call} of {case.loss} has no loss:sum in its metrics")
    found, logprobs = answer.metrics["loss:sum"], answer.logprobs
    require([lp.shape for lp in logprobs] == [row.fields["target_tokens"].shape for row in rows],
        f"{call}: the logprobs do not have the shape of the targets", "output-shape")  # fmt: skip
    right = expected(case.loss, case.config, rows, logprobs)
    error = abs(found - right.value) / right.scale
    if error <= RTOL:
        return Finding(error, RTOL, seen=f"loss:sum of {case.words} is that of its own logprobs")
    seen = f"{call}: loss:sum is {found:.6g}, the loss of its own logprobs {right.value:.6g}"
    near = [(abs(found - wrong.answer.value) / max(wrong.answer.scale, 1e-3 * right.scale), wrong)
            for wrong in variants(case.loss, case.config, rows, logprobs)]  # fmt: skip
    best = min([gap for gap, _ in near if gap <= RTOL], default=-1.0)
    for gap, wrong in near:
        if best >= 0 and gap <= 2 * best + ROUNDED:
            return Finding(error, RTOL, seen=f"{seen}; as if {wrong.words}", bug=wrong.bug)
    return Finding(error, RTOL, seen=seen)


def large_ratios(bench: Bench) -> Finding:
    """A large importance ratio counts as it is: the formula has no clamp."""
    case, findings = CASES[1], []
    for log_ratio in (6.0, 22.0):
        lp = bench.start_logprobs(BATCH)[0]
        row = BATCH[0].having(logprobs=lp - log_ratio, advantages=np.ones(len(lp)), weights=None)
        findings.append(own_value(case, "forward", [row], bench))
    return worst(findings)


CALLS = ("forward", "forward_backward")

OFFERED = tuple(
    Check(f"offers-{loss.replace('_', '-')}", f"The server has {loss}, or says at once that it has not.", "no-answer",
        partial(loss_offered, loss), level, needs=("forward",))
    for loss, level in {case.loss: case.level for case in reversed(CASES)}.items()
)[::-1]  # fmt: skip

CHECKS = (
    *OFFERED,
    *(
        Check(f"value-{case.name}", f"loss:sum of {case.words} is the sum over tokens, of its own logprobs.",
            "loss-not-summed" if case.loss == "cross_entropy" else "another-loss", partial(value, case), case.level,
            needs=(f"offers-{case.loss.replace('_', '-')}", "loss-sum", "forward-backward"))
        for case in CASES
    ),
    Check.of(large_ratios, "ratio-clamped", "full", needs=("value-importance-sampling",)),
)  # fmt: skip
