"""What crosses the wire of ``forward_backward_custom``: ∂L/∂logprob of every token, and where it comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lossfns.errors import LossInputError
from lossfns.inspect.probe import (
    LossFn,
    Shapes,
    columns_of,
    gradient_of,
    having,
    name_of,
    quietly,
    reads_of,
    rows_of,
    split,
)
from lossfns.pack import check_data, check_logprobs, check_shapes
from lossfns.terms import KL_LOG_RATIO_CAP
from lossfns.tokens import PAIRS, TOKENS


def grad_report(
    loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor], *, pairs: bool | None = None
) -> GradReport:
    """The gradient that a loss sends back for each token, by sequence, by pair and by column.

    Args:
        loss_fn: anything that follows the contract: a ``Loss``, a ``BoundLoss``, a function.
        data: B datums.
        logprobs: B tensors ``[N]`` or ``[N, K]``. The report makes leaves of its own; nothing is written to these.
        pairs: whether datums 2i and 2i + 1 are chosen and rejected; by default what the loss says.

    Raises:
        LossInputError: where the loss breaks the contract: no scalar tensor, no graph, a datum without gradient.

    >>> from lossfns import ppo
    >>> from lossfns.testing.batch import Batch
    >>> batch = Batch([[-1.0, -1.0]], [[1.0, 1.0]], {"advantages": [[1.0, -2.0]], "old_logprobs": [[-2.0, -1.0]]})
    >>> report = grad_report(ppo(), batch.data(), batch.tensors())       # the ratios are e, which is clipped, and 1
    >>> report.gradients, report.clipped
    ([tensor([0., 1.], dtype=torch.float64)], tensor([ True, False]))
    """
    paired = rows_of(loss_fn) == PAIRS if pairs is None else pairs
    check_data(data, PAIRS if paired else TOKENS)
    check_logprobs(data, logprobs)
    check_shapes(data, [lp.shape for lp in logprobs], 2 if logprobs[0].ndim == 2 else 1)
    if getattr(loss_fn, "align", "strict") != "strict":
        fix = "Cut the rows to one length first: every token needs its place."
        raise LossInputError("align", "a loss bound with align='strict'", "'truncate'", fix)
    shapes = [tuple(x.shape) for x in logprobs]
    lp = torch.cat([x.detach().flatten() for x in logprobs]).double().cpu()
    columns = columns_of(loss_fn, data, shapes)
    active = columns["weights"] != 0
    old = columns.get("old_logprobs", lp)
    neutral = {"advantages": 0 * lp, "old_logprobs": lp, "ref_logprobs": lp, "sampler_logprobs": old}

    def gradient_without(*names: str) -> Tensor:
        silent = {name: torch.where(active, neutral[name], columns[name]) for name in names}
        with quietly():
            return gradient_of(*having(loss_fn, data, silent, shapes), logprobs)[1]

    loss, gradient, metrics = gradient_of(loss_fn, data, logprobs)
    without = {name: gradient_without(name) for name in reads_of(loss_fn) if name in columns}
    capped = (active & ((lp - old).abs() > KL_LOG_RATIO_CAP)) if "old_logprobs" in without else None
    clipped = None
    if {"advantages", "old_logprobs"} <= without.keys():
        pulls = gradient != without["advantages"]  # what other terms add, such as KL, is in both
        would = without["old_logprobs"] != gradient_without("advantages", "old_logprobs")
        clipped = active & (columns["advantages"] != 0) & ~pulls & would
    effects = {name: mass(gradient - other) for name, other in without.items()}
    return GradReport(name_of(loss_fn), loss, metrics, gradient, active, clipped, capped, shapes, effects, paired)


def finite(x: Tensor) -> Tensor:
    return x.nan_to_num(0, 0, 0)


def mass(gradient: Tensor) -> float:
    """Σ|g| of what is finite."""
    return float(finite(gradient).abs().sum())


def cancelled(total: Tensor, l1: Tensor) -> Tensor:
    """1 − |Σg| / Σ|g|, and 0 where there is no gradient."""
    return torch.where(l1 > 0, 1 - total.abs() / l1, 0.0)


@dataclass(frozen=True, repr=False)
class GradReport:
    """Gradients g = ∂L/∂logprob of a batch: ``[N]``, datums end to end, entries of [N, K] row-major.

    Attributes:
        gradient: as it came, in float64; sums leave out what is not finite, ``nonfinite`` names it.
        active: weight not 0.
        clipped: active, advantage not 0, yet the advantage adds nothing to the gradient, although on-policy it
            would; ``None`` where advantages or old logprobs cannot be seen.
        capped: active and |lp − old| > 20; ``None`` where old logprobs cannot be seen.
        effects: for each column Σ|g − g′|, g′ being the gradient where the column says nothing: advantages 0,
            old and ref the current logprobs, sampler the old ones. They overlap, and need not add up to Σ|g|.
        pairs: whether datums 2i and 2i + 1 are chosen and rejected.
    """

    loss_fn: str
    loss: float
    metrics: dict[str, float]
    gradient: Tensor
    active: Tensor
    clipped: Tensor | None
    capped: Tensor | None
    shapes: Shapes
    effects: dict[str, float]
    pairs: bool

    @property
    def gradients(self) -> list[Tensor]:
        """The gradient of each datum, in the shape of its logprobs."""
        return split(self.gradient, self.shapes)

    @property
    def l1(self) -> float:
        """Σ|g|."""
        return mass(self.gradient)

    @property
    def l2(self) -> float:
        """√Σg²."""
        return float(finite(self.gradient).norm())

    @property
    def cancellation(self) -> float:
        """1 − |Σg| / Σ|g|: 0 where every token is pushed the same way, 1 where the pushes sum to nothing."""
        g = finite(self.gradient)
        return float(cancelled(g.sum(), g.abs().sum()))

    @property
    def kinds(self) -> dict[str, Tensor]:
        """Which entries are what. Signs are those of active entries; a leak is a gradient at a masked one."""
        g, on = self.gradient, self.active
        signs = {"positive": on & (g > 0), "negative": on & (g < 0), "zero": on & (g == 0)}
        known = {name: x for name, x in (("clipped", self.clipped), ("capped", self.capped)) if x is not None}
        return {"active": on, "masked": ~on, **signs, **known, "leaking": ~on & (g != 0)}

    def by_sequence(self, x: Tensor) -> Tensor:
        """Σ of x over each datum: ``[N] -> [B]``."""
        lengths = torch.tensor([prod(shape) for shape in self.shapes])
        datums = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        return torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, datums, x.double())

    def sequences(self) -> dict[str, list[float]]:
        """What the gradient of each datum amounts to: a list over the datums for every quantity."""
        g = finite(self.gradient)
        l1, total = self.by_sequence(g.abs()), self.by_sequence(g)
        sums = {"l1": l1, "share": l1 / (self.l1 or 1.0), "sum": total, "cancellation": cancelled(total, l1)}
        return {name: x.tolist() for name, x in (sums | each(self.by_sequence, self.kinds)).items()}

    def pair_masses(self) -> list[dict[str, float]]:
        """Σ|g| of the chosen and of the rejected side of each pair."""
        sides = self.by_sequence(finite(self.gradient).abs()).reshape(-1, 2).tolist()
        return [{"chosen": chosen, "rejected": rejected} for chosen, rejected in sides]

    def largest(self, count: int = 5) -> list[dict[str, float]]:
        """The entries with the largest |g| above 0: datum, position (and which of K targets), gradient."""
        size = finite(self.gradient).abs()
        return [self.entry(i) for i in size.topk(min(count, len(size))).indices.tolist() if size[i] > 0]

    def nonfinite(self) -> list[dict[str, float]]:
        """Every gradient that is nan or infinite."""
        return [self.entry(i) for i in (~self.gradient.isfinite()).nonzero().flatten().tolist()]

    def entry(self, i: int) -> dict[str, float]:
        ends = torch.tensor([prod(shape) for shape in self.shapes]).cumsum(0)
        datum = int(torch.searchsorted(ends, i, right=True))
        offset = i - (int(ends[datum - 1]) if datum else 0)
        targets = self.shapes[datum][1] if len(self.shapes[datum]) == 2 else 0
        place = {"position": offset // targets, "target": offset % targets} if targets else {"position": offset}
        return {"datum": datum, **place, "gradient": float(self.gradient[i])}

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON: numbers, strings and lists; nan and infinities are strings."""
        report = {
            "loss_fn": self.loss_fn,
            "loss": self.loss,
            "metrics": each(float, self.metrics),
            "l1": self.l1,
            "l2": self.l2,
            "cancellation": self.cancellation,
            "tokens": {"all": len(self.gradient), **each(lambda x: int(x.sum()), self.kinds)},
            "columns": each(lambda x: {"l1_change": x, "share": x / (self.l1 or 1.0)}, self.effects),
            "sequences": self.sequences(),
            **({"pairs": self.pair_masses()} if self.pairs else {}),
            "largest": self.largest(),
            "nonfinite": self.nonfinite(),
            "gradients": [row.tolist() for row in self.gradients],
            "signs": [row.sign().tolist() for row in self.gradients],
        }
        return plain(report)  # type: ignore[no-any-return]

    def table(self, rows: int = 16) -> str:
        """The report for a terminal, with at most so many sequences."""
        from lossfns.inspect.pictures import report_text

        return report_text(self, rows)

    __str__ = __repr__ = table

    def picture(self, path: str | Path) -> None:
        """A heat strip, one cell for each token, written to a file; needs the extra ``viz``."""
        from lossfns.inspect.pictures import heat_strip

        heat_strip(self).savefig(path, dpi=120)


def each(f: Any, named: Any) -> dict[str, Any]:
    return {name: f(x) for name, x in named.items()}


def plain(x: Any) -> Any:
    """JSON has no nan and no infinity: they become strings."""
    if isinstance(x, dict):
        return each(plain, x)
    if isinstance(x, list):
        return [plain(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x
