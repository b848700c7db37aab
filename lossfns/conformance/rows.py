"""The datums of the suite: a few short sequences of tokens that every vocabulary has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lossfns.conformance.client import Row

FIRST, SPAN = 33, 90
"""Tokens are ids from 33 to 122: bytes of letters and signs, or frequent tokens of a larger vocabulary."""


def tokens(seed: int, length: int) -> list[int]:
    """Return distinct-looking tokens that depend on the seed."""
    return [FIRST + (37 * seed + 11 * i + 7 * i * i) % SPAN for i in range(length)]


def other_tokens(ids: np.ndarray) -> np.ndarray:
    """Return tokens of which each is another one than the given."""
    return FIRST + (ids - FIRST + 31) % SPAN


def row(seed: int, n: int, weights: Sequence[float] | None = None, **fields: Any) -> Row:
    """Return a datum of N next-token targets; all have weight 1 unless weights are given."""
    ids = tokens(seed, n + 1)
    return Row(tuple(ids[:-1]), {}).having(
        target_tokens=ids[1:], weights=np.ones(n) if weights is None else weights, **fields
    )


BATCH = (
    row(1, 6, [0, 0, 1, 1, 1, 1]),
    row(2, 9, [0, 0, 0, 1, 0.5, 2, 0, 1, 1]),
    row(3, 4, [0, 1, 1, 0.25]),
)
"""The batch of most checks: masked prompts, a masked token between others, and weights that are no mask."""

PROBE = (*(r.having(weights=np.ones(len(r.tokens))) for r in BATCH), row(4, 7))
"""The datums whose logprobs are watched."""

REGIMES = (
    (0.05, 1.0), (0.5, 0.7), (-0.5, 1.3), (-0.05, -1.0), (0.5, -0.8), (-0.5, -1.2), (1.6, 0.5), (0.1, -0.3),
    (-0.1, 0.9), (0.02, 2.0), (0.14, 0.6), (-0.16, -0.9), (1.5, -0.6),
)  # fmt: skip
"""(log-ratio, advantage) of tokens: both signs of the advantage within the clip bounds and beyond each of them.

The ratios 1.15 and 0.85 are within the usual bounds and beyond narrower ones. The last one is where a dual clip acts.
"""

PROMPT = (2, 3, 1)
"""The prompts of the policy datums, in tokens: their advantages are 0."""


def policy_rows(logprobs: Sequence[np.ndarray], *, mask: bool = False) -> list[Row]:
    """Return datums of a policy loss with the log-ratios and advantages of ``REGIMES``.

    Args:
        logprobs: the current logprobs of the datums of ``BATCH``, from which the old ones are set apart.
        mask: whether to add the field ``sequence_ratio_mask``, with log-ratios for the bounds of ``GSPO_CLIP``.
    """
    rows, k = [], 0
    for datum, lp, prompt in zip(BATCH, logprobs, PROMPT):
        n = len(lp)
        regimes = [REGIMES[(k + i) % len(REGIMES)] for i in range(n - prompt)]
        k += len(regimes)
        log_ratio = np.array([0.3] * prompt + [d for d, _ in regimes])
        log_ratio = np.where(lp - log_ratio > -1e-3, abs(log_ratio), log_ratio)  # no logprob is above 0
        advantages = [0.0] * prompt + [a for _, a in regimes]
        fields: dict[str, Any] = {"logprobs": lp - log_ratio, "advantages": advantages, "weights": None}
        rows.append(datum.having(**fields))
    return gspo_rows(rows, logprobs) if mask else rows


GSPO_RATIOS = ((0.02, 1.0), (0.3, -0.7), (0.3, 1.2))
"""(log-ratio, factor of the advantages) of the sequences for gspo: within the bounds of ``GSPO_CLIP`` and beyond."""


def gspo_rows(rows: Sequence[Row], logprobs: Sequence[np.ndarray]) -> list[Row]:
    """Return policy datums for gspo: the ratio is one of the sequence, and its mask leaves out the prompt."""
    made = []
    for r, lp, prompt, (log_ratio, sign) in zip(rows, logprobs, PROMPT, GSPO_RATIOS):
        n = len(lp) - prompt
        mask = np.array([0.0] * prompt + [1.0] * n)
        ripple = 0.1 * np.cos(np.arange(len(lp)))  # the tokens' own ratios are not that of the sequence
        ripple -= (ripple * mask).sum() / n
        advantages = sign * mask * (1 + 0.1 * np.arange(len(lp)))
        fields = {"logprobs": lp - log_ratio - ripple, "advantages": advantages, "sequence_ratio_mask": mask}
        made.append(r.having(**fields))
    return made


GSPO_CLIP = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
"""The bounds for gspo."""
