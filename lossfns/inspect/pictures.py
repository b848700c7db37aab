"""A heat strip of token gradients (extra ``viz``)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ROWS, MAX_CELLS = 64, 250
"""The largest number of rows and cells of a strip. A note in the picture tells if there are more."""

MASKED, CLIPPED, NONFINITE = "0.75", "black", "gold"
OUTLIER = 2.0
"""Colours end at the 99th percentile of |g| if the largest is this many times larger: it would pale all others."""


class Strip(NamedTuple):
    """The token gradients to draw: for each sequence ``[N]``, or ``[N, K]`` for K targets of a position.

    Attributes:
        gradients: the gradients.
        active: whether a token is active.
        clipped: whether a token is clipped; None if that is not known.
    """

    gradients: list[Tensor]
    active: list[Tensor]
    clipped: list[Tensor] | None


class Cells(NamedTuple):
    """The cells that a strip shows, all ``[rows, cells]``.

    Attributes:
        gradient: the gradient of each cell, masked (in numpy's sense) beyond the end of a row.
        masked, clipped, nonfinite: whether a cell has the mark.
        tokens_each: the number of neighbouring tokens that a cell stands for.
    """

    gradient: np.ma.MaskedArray[Any, Any]
    masked: np.ndarray[Any, Any]
    clipped: np.ndarray[Any, Any]
    nonfinite: np.ndarray[Any, Any]
    tokens_each: int


def cells(strip: Strip, max_rows: int = MAX_ROWS, max_cells: int = MAX_CELLS) -> Cells:
    """Return one cell for each token. In long rows, neighbours share a cell, which has their largest |g|.

    K targets of a position are summed. A cell is masked if all its tokens are masked. It is clipped or nonfinite if one
    of its tokens is.
    """
    longest = max(1, *(len(row) for row in strip.gradients[:max_rows]))
    tokens_each = max(1, math.ceil(longest / max_cells))
    width = math.ceil(longest / tokens_each)

    def grid(rows: Sequence[Tensor]) -> np.ndarray[Any, Any]:
        flat = [row.double().reshape(len(row), -1).sum(1).numpy() for row in rows[:max_rows]]
        return np.stack([np.pad(row, (0, width * tokens_each - len(row))) for row in flat]).reshape(
            len(flat), width, tokens_each
        )

    def marks(rows: Sequence[Tensor]) -> np.ndarray[Any, Any]:
        return np.asarray(grid(rows).any(-1))

    gradient = grid([g.nan_to_num(0, 0, 0) for g in strip.gradients])
    inside, active = marks([torch.ones_like(g) for g in strip.gradients]), marks(strip.active)
    nonfinite = marks([~g.isfinite() for g in strip.gradients])
    clipped = np.zeros_like(inside) if strip.clipped is None else marks(strip.clipped)
    strongest = np.take_along_axis(gradient, np.abs(gradient).argmax(-1)[..., None], -1)[..., 0]
    return Cells(np.ma.array(strongest, mask=~inside), inside & ~active, clipped, nonfinite, tokens_each)


def heat_strip(strip: Strip, *, title: tuple[str, str], labels: Sequence[str], axis: str = "datum") -> Figure:
    """Draw a row for each sequence and a cell for each token, red where g > 0 and blue where g < 0.

    Masked cells are grey, clipped ones are crossed, gradients that are not finite are golden. The scale is
    symmetric. Notes below say what the picture leaves out.

    Args:
        strip: the gradients.
        title: two lines; the first one is wrapped.
        labels: the labels of the rows.
        axis: the label of all rows.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'lossfns[viz]'") from error

    shown = cells(strip)
    rows, width = shown.gradient.shape
    limit, largest = colour_limit(np.abs(shown.gradient.compressed()))
    across, down = min(11.0, max(5.0, 0.3 * width)), min(0.4, max(0.15, 6 / rows))  # inches of the strip and a row
    figure = Figure(figsize=(across + 2.2, max(2.8, down * rows + 1.8)), layout="constrained")
    axes = figure.add_subplot()
    image = paint(axes, shown, limit, side=72 * min(across / width, down))
    ends = [len(row) - 0.5 for row in strip.gradients[:rows]]
    axes.vlines(ends, np.arange(rows) - 0.4, np.arange(rows) + 0.4, colors="0.5", linewidth=1)
    axes.set_yticks(range(rows), labels[:rows], fontsize=min(9, 55 * down))
    axes.set_xlabel("position in target_tokens")
    axes.set_ylabel(axis)
    axes.set_title("\n".join([textwrap.fill(title[0], int(14 * across)), title[1]]), fontsize=9, loc="left")
    extend = "both" if limit < largest else "neither"
    bar: Any = figure.colorbar(image, ax=axes, extend=extend, extendfrac=0.03, pad=0.01, aspect=max(8, 6 * rows * down))
    bar.formatter.set_powerlimits((-3, 4))
    bar.set_label("g = ∂L/∂logprob\n← more likely   less likely →", fontsize=8)
    handles = legend_handles(shown, with_clipped=strip.clipped is not None)
    figure.legend(handles=handles, loc="outside lower right", ncols=3, frameon=False, fontsize=8)
    figure.text(0.01, 0.01, "  ".join(notes(strip, shown, limit, largest)), fontsize=8)
    return figure


def paint(axes: Any, shown: Cells, limit: float, side: float) -> Any:
    """Draw the cells and their marks, and return the image of the gradients. ``side`` is a cell's side, in points."""
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


def legend_handles(shown: Cells, with_clipped: bool) -> list[Any]:
    """Return the marks that can occur in the strip."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    cross = Line2D([], [], color=CLIPPED, marker="x", linestyle="", label="clipped")
    nonfinite = [Patch(color=NONFINITE, label="not finite")] if shown.nonfinite.any() else []
    return [Patch(color=MASKED, label="masked"), *([cross] if with_clipped else []), *nonfinite]


def colour_limit(sizes: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the |g| at which the colours end, and the largest |g|."""
    above = sizes[sizes > 0]
    if not above.size:
        return 1.0, 0.0
    largest, usual = float(above.max()), float(np.quantile(above, 0.99))
    return (usual if largest > OUTLIER * usual else largest), largest


def notes(strip: Strip, shown: Cells, limit: float, largest: float) -> list[str]:
    """Return sentences about what the picture leaves out or puts together."""
    sentences = []
    if len(strip.gradients) > len(shown.gradient):
        sentences.append(f"The first {len(shown.gradient)} of {len(strip.gradients)} sequences.")
    if shown.tokens_each > 1:
        sentences.append(f"A cell is {shown.tokens_each} tokens: the largest |g| of them, clipped if any is.")
    if any(row.ndim == 2 for row in strip.gradients):
        sentences.append("The K targets of a position are summed.")
    if limit < largest:
        sentences.append(f"Colours end at the 99th percentile; the largest |g| is {largest:.3g}.")
    return sentences


def coefficient_picture(weighings: dict[str, Sequence[Tensor]], *, title: str) -> Figure:
    """Draw the coefficient of a token against the length of its sequence, one panel for each weighing.

    Args:
        weighings: label → the result of ``token_coefficients``. A sequence is a point: its length in active tokens, and
            the mean coefficient of these tokens.
        title: the title of the figure.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'lossfns[viz]'") from error

    figure = Figure(figsize=(2.4 * len(weighings) + 0.8, 2.9), layout="constrained")
    panels: Any = figure.subplots(1, len(weighings), sharey=True, squeeze=False)
    for panel, (label, rows) in zip(panels[0], weighings.items()):
        used = [row[row != 0] for row in rows if (row != 0).any()]
        panel.plot([len(row) for row in used], [float(row.mean()) for row in used], "o", markersize=4, color="#0072b2")
        panel.set_title(label, fontsize=9)
        panel.set_xlabel("active tokens of the sequence", fontsize=8)
        panel.set_yscale("log")
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    panels[0][0].set_ylabel("coefficient of a token's term", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure
