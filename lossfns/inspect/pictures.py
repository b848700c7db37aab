"""A gradient report to look at: as text for a terminal, and as a heat strip of tokens (extra ``viz``)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lossfns.inspect.gradients import GradReport, finite
from lossfns.inspect.probe import split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_ROWS, MOST_CELLS = 64, 250
"""What a strip shows legibly; it says so where it shows less than there is."""

MASKED, CLIPPED, NONFINITE = "0.75", "black", "gold"
OUTLIER = 2.0
"""Colours end at the 99th percentile of |g| where the largest is so many times that; else one token pales the rest."""


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of cells under one another: the first column set left, the others right."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells]


def report_text(report: GradReport, most: int) -> str:
    """What a terminal shows of a ``GradReport``: totals, kinds of tokens, columns, sequences, pairs, the largest."""
    totals = f"loss {report.loss:.6g}   Σ|g| {report.l1:.4g}   √Σg² {report.l2:.4g}"
    head = [report.loss_fn, f"{totals}   cancelled {report.cancellation:.0%}   (g = ∂L/∂logprob)"]
    tables = [kinds_rows(report), column_rows(report), sequence_rows(report, most), pair_rows(report, most)]
    blocks = [head, *(aligned(rows) for rows in tables if len(rows) > 1)]
    if len(report.shapes) > most:
        blocks[-1].append(f"(the first {most} of {len(report.shapes)}; as_dict() has them all)")
    for name, entries in (("largest", report.largest()), ("not finite", report.nonfinite())):
        blocks.append([f"{name}: {place(entry)}" for entry in entries[:most]])
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def place(entry: dict[str, float]) -> str:
    target = f" target {entry['target']}" if "target" in entry else ""
    return f"datum {entry['datum']} position {entry['position']}{target}, g = {entry['gradient']:.4g}"


def kinds_rows(report: GradReport) -> list[list[str]]:
    """How many tokens are what; shares are of all tokens, then of the active ones."""
    count = {name: int(x.sum()) for name, x in report.kinds.items()}
    total = len(report.gradient)

    def share(name: str, of: int) -> list[str]:
        return [str(count[name]), f"{count[name] / max(of, 1):.1%}"]

    words = {
        "negative": "g < 0, made more likely",
        "positive": "g > 0, made less likely",
        "zero": "g = 0",
        "clipped": "clipped",
        "capped": "|lp - old| > 20",
    }
    rows = [["tokens", str(total), ""], ["masked", *share("masked", total)], ["active", *share("active", total)]]
    rows += [[f"  {text}", *share(name, count["active"])] for name, text in words.items() if name in count]
    return rows + ([["masked, with a gradient!", *share("leaking", total)]] if count["leaking"] else [])


def column_rows(report: GradReport) -> list[list[str]]:
    """By how much the gradient would change where a column said nothing."""
    shares = [[name, f"{x:.4g}", f"{x / (report.l1 or 1):.1%}"] for name, x in report.effects.items()]
    return [["without", "Σ|g - g'|", "of Σ|g|"], *shares]


def sequence_rows(report: GradReport, most: int) -> list[list[str]]:
    columns = report.sequences()
    counts = [name for name in ("active", "negative", "positive", "zero", "clipped") if name in columns]
    signs = {"negative": "g < 0", "positive": "g > 0", "zero": "g = 0"}
    rows = [["datum", "Σ|g|", "share", "Σg", "cancelled", *(signs.get(name, name) for name in counts)]]
    for i in range(min(most, len(report.shapes))):
        l1, share, total, cancelled = (columns[name][i] for name in ("l1", "share", "sum", "cancellation"))
        numbers = [f"{l1:.4g}", f"{share:.1%}", f"{total:.4g}", f"{cancelled:.0%}"]
        rows.append([str(i), *numbers, *(f"{columns[name][i]:.0f}" for name in counts)])
    return rows


def pair_rows(report: GradReport, most: int) -> list[list[str]]:
    sides = report.pair_masses()[:most] if report.pairs else []
    masses = [[str(i), f"{side['chosen']:.4g}", f"{side['rejected']:.4g}"] for i, side in enumerate(sides)]
    return [["pair", "Σ|g| chosen", "rejected"], *masses]


class Cells(NamedTuple):
    """What a strip shows, all ``[rows, cells]``; gradients are masked (in numpy's sense) beyond a row's end."""

    gradient: np.ma.MaskedArray[Any, Any]
    masked: np.ndarray[Any, Any]
    clipped: np.ndarray[Any, Any]
    nonfinite: np.ndarray[Any, Any]
    tokens_each: int


def cells(report: GradReport, most_rows: int = MOST_ROWS, most_cells: int = MOST_CELLS) -> Cells:
    """One cell for each token, or, where rows are too long, for a few neighbours: the largest |g| of them.

    K targets of a position are summed. A cell is masked if all its tokens are, clipped or not finite if any is.
    """
    g = report.gradient
    clipped = torch.zeros_like(report.active) if report.clipped is None else report.clipped
    layers = [finite(g), torch.ones_like(g), report.active, clipped, ~g.isfinite()]
    longest = max(1, *(shape[0] for shape in report.shapes[:most_rows]))
    each = max(1, math.ceil(longest / most_cells))
    width = math.ceil(longest / each)

    def grid(x: Tensor) -> np.ndarray[Any, Any]:
        rows = [row.double().reshape(len(row), -1).sum(1).numpy() for row in split(x, report.shapes)[:most_rows]]
        return np.stack([np.pad(row, (0, width * each - len(row))) for row in rows]).reshape(len(rows), width, each)

    gradient, *marks = map(grid, layers)
    strongest = np.take_along_axis(gradient, np.abs(gradient).argmax(-1)[..., None], -1)[..., 0]
    inside, active, clips, broken = (np.asarray(mark.any(-1)) for mark in marks)
    return Cells(np.ma.array(strongest, mask=~inside), inside & ~active, clips, broken, each)


def heat_strip(report: GradReport) -> Figure:
    """The figure: a row for each sequence, a cell for each token, red where g > 0 and blue where g < 0.

    Masked cells are grey, clipped ones are crossed, gradients that are not finite are golden. The scale is
    symmetric. What is left out or put together is said below.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'lossfns[viz]'") from error

    shown = cells(report)
    rows, width = shown.gradient.shape
    limit, largest = scale(np.abs(shown.gradient.compressed()))
    across, down = min(11.0, max(5.0, 0.3 * width)), min(0.4, max(0.15, 6 / rows))  # inches of the strip and a row
    figure = Figure(figsize=(across + 2.2, max(2.8, down * rows + 1.8)), layout="constrained")
    axes = figure.add_subplot()
    image = paint(axes, shown, limit, side=72 * min(across / width, down))
    ends = [shape[0] - 0.5 for shape in report.shapes[:rows]]
    axes.vlines(ends, np.arange(rows) - 0.4, np.arange(rows) + 0.4, colors="0.5", linewidth=1)
    labels = [f"{('chosen', 'rejected')[i % 2]} {i // 2}" if report.pairs else str(i) for i in range(rows)]
    axes.set_yticks(range(rows), labels, fontsize=min(9, 55 * down))
    axes.set_xlabel("position in target_tokens")
    axes.set_ylabel("" if report.pairs else "datum")
    name = textwrap.fill(report.loss_fn, int(14 * across))
    axes.set_title(f"{name}\nloss {report.loss:.4g}, Σ|g| {report.l1:.4g}", fontsize=9, loc="left")
    extend = "both" if limit < largest else "neither"
    bar: Any = figure.colorbar(image, ax=axes, extend=extend, extendfrac=0.03, pad=0.01, aspect=max(8, 6 * rows * down))
    bar.formatter.set_powerlimits((-3, 4))
    bar.set_label("g = ∂L/∂logprob\n← more likely   less likely →", fontsize=8)
    figure.legend(handles=key(report, shown), loc="outside lower right", ncols=3, frameon=False, fontsize=8)
    figure.text(0.01, 0.01, "  ".join(notes(report, shown, limit, largest)), fontsize=8)
    return figure


def paint(axes: Any, shown: Cells, limit: float, side: float) -> Any:
    """The cells, with crosses to fit cells of ``side`` points; returns the image of the gradients."""
    from matplotlib.colors import ListedColormap

    rows, width = shown.gradient.shape
    right = width * shown.tokens_each - 0.5
    options = {"aspect": "auto", "interpolation": "nearest", "extent": (-0.5, right, rows - 0.5, -0.5)}
    image = axes.imshow(shown.gradient, cmap="RdBu_r", vmin=-limit, vmax=limit, **options)
    for mark, colour in ((shown.masked, MASKED), (shown.nonfinite, NONFINITE)):
        axes.imshow(np.ma.array(mark, mask=~mark), cmap=ListedColormap([colour]), **options)
    row, cell = shown.clipped.nonzero()
    middle = (cell + 0.5) * shown.tokens_each - 0.5
    axes.scatter(middle, row, s=(0.45 * side) ** 2, c=CLIPPED, marker="x", linewidths=side / 10)
    axes.hlines(np.arange(1, rows) - 0.5, -0.5, right, colors="white", linewidth=2)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def key(report: GradReport, shown: Cells) -> list[Any]:
    """What the marks mean, of those that there can be."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    cross = Line2D([], [], color=CLIPPED, marker="x", linestyle="", label="clipped")
    clipped = [cross] if report.clipped is not None else []
    broken = [Patch(color=NONFINITE, label="not finite")] if shown.nonfinite.any() else []
    return [Patch(color=MASKED, label="masked"), *clipped, *broken]


def scale(sizes: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Where the colours end, and the largest |g|."""
    above = sizes[sizes > 0]
    if not above.size:
        return 1.0, 0.0
    largest, usual = float(above.max()), float(np.quantile(above, 0.99))
    return (usual if largest > OUTLIER * usual else largest), largest


def notes(report: GradReport, shown: Cells, limit: float, largest: float) -> list[str]:
    """What the picture leaves out or puts together."""
    found = []
    if len(report.shapes) > len(shown.gradient):
        found.append(f"The first {len(shown.gradient)} of {len(report.shapes)} sequences.")
    if shown.tokens_each > 1:
        found.append(f"A cell is {shown.tokens_each} tokens: the largest |g| of them, clipped if any is.")
    if any(len(shape) == 2 for shape in report.shapes):
        found.append("The K targets of a position are summed.")
    if limit < largest:
        found.append(f"Colours end at the 99th percentile; the largest |g| is {largest:.3g}.")
    return found
