"""Cases at a kink, where the two one-sided gradients differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from tools.vectors.cases.form import CLIPPED, DEFAULTS, SURROGATES, WITH_KL, Case, Data, policy_data, select_columns


def kinks() -> Iterator[Case]:
    """Yield cases at a bound. Both one-sided gradients and every gradient between them are right."""
    near = 1e-12
    for loss in CLIPPED:
        negative = policy_data(lp="-1 -2", w="1 1", adv="-1 -1", d="0 0", x="0 0")
        positive = policy_data(lp="-1 -2", w="1 1", adv="1 1", d="0 0", x="0 0")
        at_upper = policy_data(lp="-1 -2 | -1", w="1 1 | 1", adv="1 1 | -1", d="0.25 0.25 | 0", x="0 0 | 0")
        bound = math.exp(0.25)
        yield kink(
            loss, "on-policy with a lower bound of 1, A < 0", negative, {"clip": [1.0, 1.5]}, {"clip": (1 + near, 1.5)}
        )
        yield kink(
            loss, "on-policy with an upper bound of 1, A > 0", positive, {"clip": [0.5, 1.0]}, {"clip": (0.5, 1 - near)}
        )
        yield kink(
            loss, "a ratio of exactly the upper bound", at_upper, {"clip": [0.5, bound]}, {"clip": (0.5, bound - near)}
        )
    for loss in SURROGATES:
        wide = {"clip": [0.25, 8.0]} if loss in CLIPPED else {}
        tie = policy_data(lp="-1 -2", w="1 1", adv="-1 -1", d="1.5 1.5", x="0 0")
        c = math.exp(1.5)
        for sign, word in ((1, "at the cap"), (-1, "at minus the cap")):
            cap = policy_data(lp="-1 -2", w="1 1", adv="1 1", d=f"{0.5 * sign} {0.5 * sign}", x="0 0")
            settings = {**wide, "log_ratio_cap": 0.5}
            yield kink(loss, f"log-ratios exactly {word}", cap, settings, {"log_ratio_cap": 0.5 - near})
        yield kink(loss, "a dual clip that ties with the ratio", tie, {**wide, "dual_clip": c}, {"dual_clip": c - near})
    for loss, x in product(WITH_KL, (20.0, -20.0)):
        # ref = lp + x is at most 0, so lp is −21 where x is 20.
        far = policy_data(lp="-21 -1" if x > 0 else "-1 -1", w="1 1", adv="0 0", d="0 0", x=f"{x} 0")
        nudged = [[row["ref_logprobs"][0] + math.copysign(1e-9, x), *row["ref_logprobs"][1:]] for row in far]
        yield kink(loss, f"a reference of exactly {x:g} nats away, where k3 stops", far, {}, {"ref_logprobs": nudged})


def kink(loss: str, comment: str, given: Data, settings: Mapping[str, Any], beyond_kink: Mapping[str, Any]) -> Case:
    """Return a case at a kink. ``beyond_kink`` holds the oracle's arguments on the other side of it."""
    config, data = {**DEFAULTS[loss], **settings}, select_columns(loss, given, settings)
    return Case(loss, "kink", comment, config, data, beyond_kink=beyond_kink)
