"""Token weights in plain floats, a loop over tokens, and the oracles of ppo with a penalty or a weight.

A weight ρ >= 0 is a constant, and PPO's term is homogeneous in the advantage: ρ·l(A) = l(ρ·A). So the oracle of a
weighted ppo is that of ppo with the advantages ρ·A.
"""

import math
from collections.abc import Callable
from typing import Any

from lossfns.testing import oracle
from lossfns.testing.oracle import Row, Rows, active, capped, exp
from lossfns.testing.oracle.kl import kl_penalty


def penalised_ppo(
    *,
    kl_beta: float,
    kl: str,
    kl_weight: str,
    kl_cap: float | None,
    kl_to: str,
    log_ratio_cap: float = math.inf,
    **given: Any,
) -> oracle.Loss:
    """PPO + β·clamp(w·k, ±cap)."""
    own = {name: x for name, x in given.items() if name not in ("ref_logprobs", "sampler_logprobs")}
    knobs = {"kl": kl, "kl_weight": kl_weight, "kl_cap": kl_cap, "kl_to": kl_to, "log_ratio_cap": log_ratio_cap}
    policy, gradients = oracle.ppo(**own)
    penalty, pulls = kl_penalty(**given, **knobs)
    return policy + kl_beta * penalty, [[g + kl_beta * p for g, p in zip(*rows)] for rows in zip(gradients, pulls)]


# Token weights


def ratios(weights: Rows, top: Rows, sampler: Rows, level: str) -> Rows:
    """e^clamp(x, ±20), x = top − sampler of a token, or Σ w·x or Σ w·x / Σ w of its sequence."""
    rows = []
    for w, a, b in zip(weights, top, sampler):
        gaps = [x - y for x, y in zip(a, b)]
        if level != "token":
            total = math.fsum(w[t] * gaps[t] for t in active(w))
            gaps = [total / (math.fsum(w) or 1.0) if level == "geometric" else total] * len(w)
        rows.append([exp(capped(x, 20.0)[0]) for x in gaps])
    return rows


def whole(weights: Rows, values: Rows, how: Callable[[Row, Row], float]) -> Rows:
    """One number for each sequence, of the weights and values of its active tokens, at each of its tokens."""
    rows = []
    for w, x in zip(weights, values):
        slots = active(w)
        rows.append([how([w[t] for t in slots], [x[t] for t in slots]) if slots else 0.0] * len(w))
    return rows


def maximum(w: Row, x: Row) -> float:
    return max(x)


def weighted_sum(w: Row, x: Row) -> float:
    return math.fsum(a * b for a, b in zip(w, x))


def weighted_mean(w: Row, x: Row) -> float:
    return weighted_sum(w, x) / math.fsum(w)


def of_pairs(function: Callable[[float, float], float], left: Rows, right: Rows) -> Rows:
    return [[function(x, y) for x, y in zip(*rows)] for rows in zip(left, right)]


def binary_kl(lp: float, ref: float) -> float:
    p, q = math.exp(lp), math.exp(ref)
    return p * (lp - ref) + (1 - p) * (math.log(1 - p) - math.log(1 - q))


def kept(values: Rows, low: float, high: float) -> Rows:
    return [[float(low <= x <= high) for x in row] for row in values]


def product(*factors: Rows) -> Rows:
    return [[math.prod(column) for column in zip(*rows)] for rows in zip(*factors)]


def weighted_ppo(*, factor: Callable[..., Rows], **given: Any) -> oracle.Loss:
    """PPO with the advantages ρ·A."""
    own = {name: x for name, x in given.items() if name not in ("sampler_logprobs", "groups")}
    return oracle.ppo(**own | {"advantages": product(factor(**given), given["advantages"])})


def banded(**given: Any) -> Rows:
    """clamp(ρ, 0.5, 1.3) of a token, times 1 where ½ <= ρ <= 2 for the product over its sequence."""
    columns = given["weights"], given["old_logprobs"], given["sampler_logprobs"]
    token = [[min(max(r, 0.5), 1.3) for r in row] for row in ratios(*columns, "token")]
    return product(token, kept(ratios(*columns, "sequence"), 0.5, 2.0))
