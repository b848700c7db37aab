"""The gradient report: ∂L/∂logprob of every token, and how much of it each column causes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lossfns.errors import LossInputError
from lossfns.inspect.pictures import Strip, heat_strip
from lossfns.inspect.probe import (
    active_tokens,
    gradient_of,
    loss_name,
    readable_columns,
    row_kind,
    split_by_datum,
    sum_by_datum,
    visible_columns,
    with_columns,
    without_warnings,
)
from lossfns.loss import LossFn
from lossfns.pack import Shapes, check_data, check_logprobs, check_shapes
from lossfns.terms import KL_LOG_RATIO_CAP
from lossfns.tokens import PAIRS, TOKENS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def grad_report(
    loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor], *, pairs: bool | None = None
) -> GradReport:
    """Report the gradient that a loss sends back for each token, by sequence, by pair and by column.

    Args:
        loss_fn: any function that follows the contract: a ``Loss``, a ``BoundLoss``, a function of your own.
        data: B datums.
        logprobs: B tensors ``[N]`` or ``[N, K]``. The report copies them: they get no gradient.
        pairs: whether datums 2i and 2i + 1 are chosen and rejected; None takes it from the loss.

    Raises:
        LossInputError: if the loss breaks the contract: no scalar tensor, no graph, a datum without gradient.

    >>> from lossfns import ppo
    >>> from lossfns.testing.batch import Batch
    >>> batch = Batch([[-1.0, -1.0]], [[1.0, 1.0]], {"advantages": [[1.0, -2.0]], "old_logprobs": [[-2.0, -1.0]]})
    >>> report = grad_report(ppo(), batch.data(), batch.tensors())       # ratios: e (clipped), 1
    >>> report.gradients, report.clipped
    ([tensor([0., 1.], dtype=torch.float64)], tensor([ True, False]))
    """
    paired = row_kind(loss_fn) == PAIRS if pairs is None else pairs
    check_data(data, PAIRS if paired else TOKENS)
    check_logprobs(data, logprobs)
    check_shapes(data, [lp.shape for lp in logprobs], 2 if logprobs[0].ndim == 2 else 1)
    if getattr(loss_fn, "align", "strict") != "strict":
        fix = "Cut the rows to one length first: the report gives a gradient for every token."
        raise LossInputError("align", "a loss bound with align='strict'", "'truncate'", fix)
    shapes = [tuple(x.shape) for x in logprobs]
    lp = torch.cat([x.detach().flatten() for x in logprobs]).double().cpu()
    columns = visible_columns(loss_fn, data, shapes)
    active = active_tokens(columns)
    old = columns.get("old_logprobs", lp)
    # The values with which a column has no effect: advantages of 0, and log-ratios of 0.
    neutral = {"advantages": 0 * lp, "old_logprobs": lp, "ref_logprobs": lp, "sampler_logprobs": old}

    def gradient_with_neutral(*names: str) -> Tensor:
        neutralized = {name: torch.where(active, neutral[name], columns[name]) for name in names}
        with without_warnings():
            return gradient_of(*with_columns(loss_fn, data, neutralized, shapes), logprobs)[1]

    loss, gradient, metrics = gradient_of(loss_fn, data, logprobs)
    gradient_if_neutral = {name: gradient_with_neutral(name) for name in readable_columns(loss_fn) if name in columns}
    capped = (active & ((lp - old).abs() > KL_LOG_RATIO_CAP)) if "old_logprobs" in gradient_if_neutral else None
    clipped = None
    if {"advantages", "old_logprobs"} <= gradient_if_neutral.keys():
        # Compared, and not tested for 0: a clipped token keeps the gradient of terms without advantages, such as KL.
        advantage_matters = gradient != gradient_if_neutral["advantages"]
        on_policy = gradient_if_neutral["old_logprobs"]
        advantage_matters_on_policy = on_policy != gradient_with_neutral("advantages", "old_logprobs")
        clipped = active & (columns["advantages"] != 0) & ~advantage_matters & advantage_matters_on_policy
    effects = {name: l1_norm(gradient - other) for name, other in gradient_if_neutral.items()}
    return GradReport(loss_name(loss_fn), loss, metrics, gradient, active, clipped, capped, shapes, effects, paired)


def finite(x: Tensor) -> Tensor:
    """Put 0 in place of nan and infinities."""
    return x.nan_to_num(0, 0, 0)


def l1_norm(gradient: Tensor) -> float:
    """Return Σ|g| over finite entries."""
    return float(finite(gradient).abs().sum())


def cancelled(total: Tensor, l1: Tensor) -> Tensor:
    """Return 1 − |Σg| / Σ|g|, and 0 where there is no gradient."""
    return torch.where(l1 > 0, 1 - total.abs() / l1, 0.0)


@dataclass(frozen=True, repr=False)
class GradReport:
    """Gradients g = ∂L/∂logprob of a batch: ``[N]``, datums end to end, entries of [N, K] row-major.

    Attributes:
        loss_fn: name of the loss.
        loss: value of the loss.
        metrics: metrics of the loss.
        gradient: the gradient in float64. Sums leave out entries that are not finite; ``nonfinite`` lists them.
        active: whether the weight is not 0.
        clipped: whether an active token has an advantage other than 0 that does not change its gradient, but would
            change it on-policy. ``None`` if advantages or old logprobs are not visible.
        capped: whether an active token has |lp − old| > 20; ``None`` if old logprobs are not visible.
        shapes: shape of each datum's logprobs.
        effects: for each column Σ|g − g′|, where g′ is the gradient if the column is neutral. Neutral advantages are 0;
            neutral old and reference logprobs are the current logprobs; neutral sampler logprobs are the old ones.
            Effects overlap, so their sum need not be Σ|g|.
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
        return split_by_datum(self.gradient, self.shapes)

    @property
    def l1(self) -> float:
        """Σ|g|."""
        return l1_norm(self.gradient)

    @property
    def l2(self) -> float:
        """√Σg²."""
        return float(finite(self.gradient).norm())

    @property
    def cancellation(self) -> float:
        """1 − |Σg| / Σ|g|: 0 if all gradients have one sign, 1 if they sum to 0."""
        g = finite(self.gradient)
        return float(cancelled(g.sum(), g.abs().sum()))

    @property
    def kinds(self) -> dict[str, Tensor]:
        """A mask ``[N]`` for each kind of token. Signs cover active tokens; ``leaking`` covers masked ones."""
        g, on = self.gradient, self.active
        signs = {"positive": on & (g > 0), "negative": on & (g < 0), "zero": on & (g == 0)}
        bounds = {name: x for name, x in (("clipped", self.clipped), ("capped", self.capped)) if x is not None}
        return {"active": on, "masked": ~on, **signs, **bounds, "leaking": ~on & (g != 0)}

    def by_sequence(self, x: Tensor) -> Tensor:
        """Sum over each datum: ``[N] -> [B]``."""
        return sum_by_datum(x, self.shapes)

    def sequences(self) -> dict[str, list[float]]:
        """Return Σ|g|, its share of the batch, Σg, cancellation and counts: for each, a list over the datums."""
        g = finite(self.gradient)
        l1, total = self.by_sequence(g.abs()), self.by_sequence(g)
        sums = {"l1": l1, "share": l1 / (self.l1 or 1.0), "sum": total, "cancellation": cancelled(total, l1)}
        return {name: x.tolist() for name, x in (sums | map_values(self.by_sequence, self.kinds)).items()}

    def pair_masses(self) -> list[dict[str, float]]:
        """Return Σ|g| of the chosen side and of the rejected side of each pair."""
        sides = self.by_sequence(finite(self.gradient).abs()).reshape(-1, 2).tolist()
        return [{"chosen": chosen, "rejected": rejected} for chosen, rejected in sides]

    def largest(self, count: int = 5) -> list[dict[str, float]]:
        """Return the entries with the largest |g| above 0: datum, position (and which of K targets), gradient."""
        size = finite(self.gradient).abs()
        return [self.entry(i) for i in size.topk(min(count, len(size))).indices.tolist() if size[i] > 0]

    def nonfinite(self) -> list[dict[str, float]]:
        """Return the entries whose gradient is nan or infinite."""
        return [self.entry(i) for i in (~self.gradient.isfinite()).nonzero().flatten().tolist()]

    def entry(self, i: int) -> dict[str, float]:
        """Return datum, position (and which of K targets) and gradient of entry i of the batch."""
        ends = torch.tensor([prod(shape) for shape in self.shapes]).cumsum(0)
        datum = int(torch.searchsorted(ends, i, right=True))
        offset = i - (int(ends[datum - 1]) if datum else 0)
        targets = self.shapes[datum][1] if len(self.shapes[datum]) == 2 else 0
        place = {"position": offset // targets, "target": offset % targets} if targets else {"position": offset}
        return {"datum": datum, **place, "gradient": float(self.gradient[i])}

    def as_dict(self) -> dict[str, Any]:
        """Return the whole report as JSON: numbers, strings and lists. nan and infinities are strings."""
        report = {
            "loss_fn": self.loss_fn,
            "loss": self.loss,
            "metrics": map_values(float, self.metrics),
            "l1": self.l1,
            "l2": self.l2,
            "cancellation": self.cancellation,
            "tokens": {"all": len(self.gradient), **map_values(lambda x: int(x.sum()), self.kinds)},
            "columns": map_values(lambda x: {"l1_change": x, "share": x / (self.l1 or 1.0)}, self.effects),
            "sequences": self.sequences(),
            **({"pairs": self.pair_masses()} if self.pairs else {}),
            "largest": self.largest(),
            "nonfinite": self.nonfinite(),
            "gradients": [row.tolist() for row in self.gradients],
            "signs": [row.sign().tolist() for row in self.gradients],
        }
        return json_safe(report)  # type: ignore[no-any-return]

    def table(self, rows: int = 16) -> str:
        """Return the report as text. Each list shows at most ``rows`` entries."""
        totals = f"loss {self.loss:.6g}   Σ|g| {self.l1:.4g}   √Σg² {self.l2:.4g}"
        head = [self.loss_fn, f"{totals}   cancelled {self.cancellation:.0%}   (g = ∂L/∂logprob)"]
        tables = [kind_rows(self), column_rows(self), sequence_rows(self, rows), pair_rows(self, rows)]
        blocks = [head, *(in_columns(cells) for cells in tables if len(cells) > 1)]
        if len(self.shapes) > rows:
            blocks[-1].append(f"(the first {rows} of {len(self.shapes)}; as_dict() has them all)")
        for name, entries in (("largest", self.largest()), ("not finite", self.nonfinite())):
            blocks.append([f"{name}: {entry_text(entry)}" for entry in entries[:rows]])
        return "\n\n".join("\n".join(lines) for lines in blocks if lines)

    __str__ = __repr__ = table

    def figure(self) -> Figure:
        """Draw a heat strip with a cell for each token; needs the extra ``viz``."""
        clipped = None if self.clipped is None else split_by_datum(self.clipped, self.shapes)
        strip = Strip(self.gradients, split_by_datum(self.active, self.shapes), clipped)
        sides = ("chosen", "rejected")
        labels = [f"{sides[i % 2]} {i // 2}" if self.pairs else str(i) for i in range(len(self.shapes))]
        title = (self.loss_fn, f"loss {self.loss:.4g}, Σ|g| {self.l1:.4g}")
        return heat_strip(strip, title=title, labels=labels, axis="" if self.pairs else "datum")

    def picture(self, path: str | Path) -> None:
        """Write the heat strip to a file; needs the extra ``viz``."""
        self.figure().savefig(path, dpi=120)


# The report as text


def in_columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Align cells in columns: the first column to the left, the others to the right."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells]


def entry_text(entry: Mapping[str, float]) -> str:
    target = f" target {entry['target']}" if "target" in entry else ""
    return f"datum {entry['datum']} position {entry['position']}{target}, g = {entry['gradient']:.4g}"


def kind_rows(report: GradReport) -> list[list[str]]:
    """Return a row for each kind of token: its count, and its share of all tokens (indented: of active tokens)."""
    count = {name: int(x.sum()) for name, x in report.kinds.items()}
    total = len(report.gradient)

    def cells(name: str, of: int) -> list[str]:
        return [str(count[name]), f"{count[name] / max(of, 1):.1%}"]

    titles = {
        "negative": "g < 0, made more likely",
        "positive": "g > 0, made less likely",
        "zero": "g = 0",
        "clipped": "clipped",
        "capped": "|lp - old| > 20",
    }
    rows = [["tokens", str(total), ""], ["masked", *cells("masked", total)], ["active", *cells("active", total)]]
    rows += [[f"  {text}", *cells(name, count["active"])] for name, text in titles.items() if name in count]
    return rows + ([["masked, with a gradient!", *cells("leaking", total)]] if count["leaking"] else [])


def column_rows(report: GradReport) -> list[list[str]]:
    """Return a row for each column: how much the gradient changes if the column is made neutral."""
    shares = [[name, f"{x:.4g}", f"{x / (report.l1 or 1):.1%}"] for name, x in report.effects.items()]
    return [["without", "g changes by", "of Σ|g|"], *shares]


def sequence_rows(report: GradReport, max_rows: int) -> list[list[str]]:
    """Return a row for each of the first ``max_rows`` sequences."""
    columns = report.sequences()
    counts = [name for name in ("active", "negative", "positive", "zero", "clipped") if name in columns]
    signs = {"negative": "g < 0", "positive": "g > 0", "zero": "g = 0"}
    rows = [["datum", "Σ|g|", "share", "Σg", "cancelled", *(signs.get(name, name) for name in counts)]]
    for i in range(min(max_rows, len(report.shapes))):
        l1, share, total, cancelled = (columns[name][i] for name in ("l1", "share", "sum", "cancellation"))
        numbers = [f"{l1:.4g}", f"{share:.1%}", f"{total:.4g}", f"{cancelled:.0%}"]
        rows.append([str(i), *numbers, *(f"{columns[name][i]:.0f}" for name in counts)])
    return rows


def pair_rows(report: GradReport, max_rows: int) -> list[list[str]]:
    """Return a row for each of the first ``max_rows`` pairs."""
    sides = report.pair_masses()[:max_rows] if report.pairs else []
    numbers = [[str(i), f"{side['chosen']:.4g}", f"{side['rejected']:.4g}"] for i, side in enumerate(sides)]
    return [["pair", "Σ|g| chosen", "rejected"], *numbers]


# JSON


def map_values(f: Callable[[Any], Any], table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: f(x) for name, x in table.items()}


def json_safe(x: Any) -> Any:
    """Turn nan and infinities into strings, as JSON has neither."""
    if isinstance(x, dict):
        return map_values(json_safe, x)
    if isinstance(x, list):
        return [json_safe(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x
