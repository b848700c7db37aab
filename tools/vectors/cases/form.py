"""The form of a case and the notation of its rows.

Rows are written as text, with ``|`` between datums. A policy case may give the differences ``d = lp − old``,
``x = ref − lp`` and ``gap = old − sampler`` instead of the columns. All numbers of data are exact in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

from lossfns.testing.vectors.library import build_loss

Data = list[dict[str, Any]]
Refusal = tuple[str, str, int | None]
"""The reason why an input is refused: code, field, datum."""


class Case(NamedTuple):
    """The inputs of one vector.

    ``beyond_kink`` replaces arguments of the oracle, so that a case at a kink lies just past it. The oracle then gives
    the other one-sided gradient. ``error`` is the answer of a must-reject case.
    """

    loss: str
    kind: str
    comment: str
    config: Mapping[str, Any]
    data: Data
    denominator: float | None = None
    beyond_kink: Mapping[str, Any] = {}
    error: Refusal | None = None


class Situation(NamedTuple):
    """Data that cases of several losses share."""

    kind: str
    comment: str
    data: Data
    denominator: float | None = None

    def case_for(self, loss: str, suffix: str = "", **settings: Any) -> Case:
        """Return the case of a loss on these data, with some settings away from its defaults."""
        config, data = DEFAULTS[loss] | settings, select_columns(loss, self.data, settings)
        comment = f"{self.comment}; {suffix}" if suffix else self.comment
        return Case(loss, self.kind, comment, config, data, self.denominator)


TIS_SETTINGS: dict[str, Any] = {"tis_cap": None, "tis_level": "token"}
RATIO_SETTINGS: dict[str, Any] = {"weigh": "token_mean", "log_ratio_cap": 20.0, "dual_clip": None, **TIS_SETTINGS}

DEFAULTS: dict[str, dict[str, Any]] = {
    "cross_entropy": {"weigh": "token_mean"},
    "multi_target_cross_entropy": {"weigh": "token_mean"},
    "reinforce": {"weigh": "token_mean"},
    "importance_sampling": RATIO_SETTINGS,
    "ppo": {"clip": [0.8, 1.2], **RATIO_SETTINGS},
    "grpo": {"clip": [0.8, 1.2], "kl": "k3", "kl_beta": 0.25, **RATIO_SETTINGS},
    "dapo": {"clip": [0.8, 1.28], **RATIO_SETTINGS},
    "gspo": {"clip": [0.8, 1.25], **RATIO_SETTINGS, "weigh": "sequence_mean"},
    "gspo_token": {"clip": [0.8, 1.25], **RATIO_SETTINGS, "weigh": "sequence_mean"},
    "cispo": {"clip": [0.8, 1.2], "weigh": "token_mean", "log_ratio_cap": 20.0, **TIS_SETTINGS},
    "dro": {"beta": 0.5, "weigh": "token_mean", **TIS_SETTINGS},
    "dpo": {"beta": 0.1, "label_smoothing": 0.0, "weigh": "pair_mean"},
    "orpo": {"lam": 0.1, "weigh": "pair_mean"},
    "group_advantages": {"scale": "std"},
}
"""The default settings of cases. They differ from the papers' where those would hide
mistakes: a KL coefficient of 0.001 is too small to see, and GSPO's bounds leave almost every ratio outside."""

# group_advantages has no weighing: it is no loss, and reads no columns.
READS = {loss: build_loss(loss, row).reads for loss, row in DEFAULTS.items() if "weigh" in row}
"""The columns of each loss besides logprobs and weights."""


def losses_with(*settings: str, without: str = "") -> tuple[str, ...]:
    """Return the losses that have these settings, in the order of ``DEFAULTS``."""
    return tuple(loss for loss, row in DEFAULTS.items() if row.keys() >= set(settings) and without not in row)


CLIPPED = losses_with("clip", "dual_clip")
"""The losses with PPO's clipping."""

SURROGATES = losses_with("dual_clip")
"""The losses whose term is −r·A, clipped or not. The ratio of CISPO has no gradient, so it is not among them."""

WEIGHT_LIMITED = losses_with("clip", without="dual_clip")
"""The losses whose bounds limit the coefficient of the logprob."""

PENALISED = losses_with("beta", "tis_cap")  # DPO has a beta too, and no tis_cap
"""The losses with a penalty on leaving the old policy."""

WITH_KL = losses_with("kl")
"""The losses with a KL term."""
POLICY = tuple(loss for loss in READS if "advantages" in READS[loss])
SEQUENCE_RATIO = tuple(loss for loss in CLIPPED if DEFAULTS[loss]["weigh"] == "sequence_mean")
"""The losses with one ratio for each sequence. They average over sequences by default."""
PAIRS = tuple(loss for loss in READS if DEFAULTS[loss]["weigh"] == "pair_mean")
GSPO_BOUNDS = [1 - 3e-4, 1 + 4e-4]
"""GSPO's own bounds."""

NAN, INF, HUGE = math.nan, math.inf, 2.0**100


def rows(text: str) -> list[list[float]]:
    """Parse rows of numbers. Bars separate the rows; a row may be empty.

    >>> rows("-1 -2 | | -0.5")
    [[-1.0, -2.0], [], [-0.5]]
    """
    return [[float(word) for word in row.split()] for row in text.split("|")]


def data(**columns: str | list[Any]) -> Data:
    """Return one mapping for each datum, from one text or list of rows for each column."""
    named = {name: rows(text) if isinstance(text, str) else text for name, text in columns.items()}
    return [dict(zip(named, values)) for values in zip(*named.values(), strict=True)]


def policy_data(lp: str, w: str, adv: str, d: str = "", old: str = "", x: str = "", gap: str = "") -> Data:
    """Return data with every column of the policy losses.

    A difference that is left out cycles through a few numbers. ``old`` may be given instead of ``d``.
    """
    logprobs = rows(lp)

    def cycled(*gaps: float) -> list[list[float]]:
        return [[g for _, g in zip(row, cycle(gaps))] for row in logprobs]

    ds = rows(d) if d else cycled(0.125, -0.0625)
    olds = rows(old) if old else shift(logprobs, ds, -1)
    refs = shift(logprobs, rows(x) if x else cycled(0.25, -0.125, 0.5, -0.25), 1)
    samplers = shift(olds, rows(gap) if gap else cycled(0.25, -0.5, 0.75), -1)
    return data(logprobs=lp, weights=w, advantages=adv, old_logprobs=olds, ref_logprobs=refs, sampler_logprobs=samplers)


def shift(values: list[list[float]], by: list[list[float]], sign: float) -> list[list[float]]:
    """Return values + sign·by. Where a logprob would become a number above 0, return values − sign·by."""

    def at_most_zero(u: float, v: float) -> float:
        return u + v if u <= 0 < u - v else u - v

    return [[at_most_zero(u, -sign * v) for u, v in zip(*pair, strict=True)] for pair in zip(values, by, strict=True)]


def select_columns(loss: str, data: Data, settings: Mapping[str, Any]) -> Data:
    """Return the data with only the columns that the loss reads with these settings."""
    names = ["logprobs", "weights", *READS[loss]]
    if settings.get("tis_cap") is not None:
        names.append("sampler_logprobs")
    return [{name: row[name] for name in names} for row in data]


WEIGHINGS: list[dict[str, Any]] = [
    {"weigh": "sequence_mean"},
    {"weigh": "sequence_sum_mean"},
    {"weigh": "token_sum"},
    {"weigh": "fixed_length", "length": 8},
]
"""The settings of each weighing of tokens, without token_mean, the default of most cases."""


def with_every_weighing(loss: str, situations: Sequence[Situation]) -> Iterator[Case]:
    """Yield the cases of a loss on these situations with every weighing except its default."""
    for settings in ({"weigh": "token_mean"}, *WEIGHINGS):
        if settings["weigh"] != DEFAULTS[loss]["weigh"]:
            for situation in situations:
                yield situation.case_for(loss, settings["weigh"], **settings)
