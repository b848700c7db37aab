"""ROLL 8eb27cc2, of August 2026: pg_variant of the RLVR pipeline."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.rosetta.batch import Batch
from tools.rosetta.formulas import clipped, log_ratio, token_mean, weighted
from tools.rosetta.row import Framework

roll = Framework("ROLL 8eb27cc2", "roll/pipeline/rlvr/actor_pg_worker.py")


def topr(b: Batch) -> Tensor:
    """−A·lp where A > 0, −sg(min(r, 1))·A·lp elsewhere, with the ratio of each token."""
    ratio = log_ratio(b).exp().clamp(0, 1)
    return token_mean(b, weighted(b, torch.where(b.A > 0, torch.ones_like(ratio), ratio)))


def rows() -> None:
    """Add the rows."""
    no_cap = "log_ratio_cap=None"
    roll.equal("pg_variant=vanilla", "reinforce()", lambda b: token_mean(b, -b.A * b.lp))
    roll.equal(
        "pg_variant=ppo, pg_clip=0.2, dual_clip_loss",
        f"ppo({no_cap}, dual_clip=1.4)",
        lambda b: token_mean(b, clipped(log_ratio(b).exp(), b.A, 0.8, 1.2, 1.4)),
        why="the constant of the dual clip is 1 + 2·pg_clip",
    )
    roll.equal(
        "pg_variant=tis",
        f"cispo(clip=(0.0, 1.0), {no_cap})",
        lambda b: token_mean(b, weighted(b, log_ratio(b).exp().clamp(0, 1))),
        why="bounds of the current ratio, not of old / sampler",
    )
    roll.equal(
        "pg_variant=cispo",
        f"cispo(clip=(0.9, 1.1), {no_cap})",
        lambda b: token_mean(b, weighted(b, log_ratio(b).exp().clamp(0.9, 1.1))),
    )
    roll.equal("pg_variant=topr, weights 1 and 1", f"topr(level=token_level, weigh=token_mean, {no_cap})", topr)
    roll.equal(
        "pg_variant=kimi15, tau 0.1", "kimi15()", lambda b: token_mean(b, -b.A * b.lp + 0.05 * log_ratio(b).square())
    )


rows()
