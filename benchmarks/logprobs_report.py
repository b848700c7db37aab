"""The rows of ``linear_logprobs`` as tables, as limits (``Bar``) to meet, and as a picture.

Run as a script, it shows the rows that were measured on this device before.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import product
from math import cos, radians, sin
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from side_by_side import device_name, load, ratio, table

from lossfns.plot.figures import COLOURS, GREY, style

PICTURE = Path(__file__).parents[1] / "docs" / "linear_logprobs.png"

Row = dict[str, Any]

# Tables


def report(rows: list[Row]) -> str:
    found = ", ".join(f"{name} {v}" for name, v in rows[0]["versions"].items() if v is not None)
    parts = [f"{device_name()}; {found}"]
    parts += [f"{row['section']}, {row['shape']}\n\n{section(row)}" for row in rows]
    missing = {name: why for row in rows for name, why in row["missing"].items()}
    if missing:
        parts.append("left out:\n" + "\n".join(f"  {name}: {why}" for name, why in missing.items()))
    parts.append("what ours has to show\n\n" + cleared(rows))
    return "\n\n".join(parts)


def section(row: Row) -> str:
    reference = next(iter(row["runs"]))
    lines = [[name, *cells(row, name, reference)] for name in row["runs"]]
    return table(["", "ms", "times", "MiB", "times", "value error", "gradient error"], lines)


def cells(row: Row, name: str, to: str) -> list[str]:
    run = row["runs"][name]
    errors = run.get("gradient_errors") or []
    return [
        f"{1e3 * statistics.median(run['seconds']):.0f}",
        f"{slower(row, name, to):.2f}",
        "-" if run["bytes"] is None else f"{run['bytes'] / 2**20:.0f}",
        "-" if run["bytes"] is None else f"{larger(row, name, to):.3f}",
        f"{run['value_error']:.1e}" if "value_error" in run else "-",
        f"{max(errors):.1e}" if errors else "-",
    ]


def slower(row: Row, name: str, to: str) -> float:
    """Return the ratio of the times."""
    return ratio({key: run["seconds"] for key, run in row["runs"].items()}, name, to)


def larger(row: Row, name: str, to: str) -> float:
    """Return the ratio of the memories."""
    value: float = row["runs"][name]["bytes"] / row["runs"][to]["bytes"]
    return value


# Bars


class Bar(NamedTuple):
    text: str
    most: float
    value: float


SHARES_OF_NAIVE = {
    "bfloat16:4096x1024x65536": (0.70, 0.10),
    "bfloat16:2048x1024x32768": (0.90, 0.25),
    "float32:2048x512x32768": (1.15, 0.20),
}
"""The limits of the time and memory of ours, as shares of naive."""

SHARES_OF_OTHERS = {
    "bfloat16": {"Liger chunked": 1 / 2.5, "TRL chunked": 1 / 2.5, "torch LCE, chunked": 1 / 3},
    "float32": {"Liger chunked": 1, "TRL chunked": 1, "torch LCE, chunked": 1, "torch LCE, 512 rows": 1},
}
"""The limit of the time of ours, as a share of each of these."""


def bars(row: Row) -> Iterator[Bar]:
    """Yield the limits that ours has to meet in a section, with the measured values."""

    def time(name: str, to: str, most: float) -> Iterator[Bar]:
        if {name, to} <= row["runs"].keys():
            yield Bar(f"time of {name} / {to}", most, slower(row, name, to))

    def memory(name: str, to: str, most: float) -> Iterator[Bar]:
        if {name, to} <= row["runs"].keys():
            yield Bar(f"memory of {name} / {to}", most, larger(row, name, to))

    if row["section"] == "training":
        dtype, _, _ = row["shape"].partition(":")
        if row["shape"] in SHARES_OF_NAIVE:
            most_time, most_memory = SHARES_OF_NAIVE[row["shape"]]
            yield from time("ours", "naive", most_time)
            yield from memory("ours", "naive", most_memory)
        for name, most in SHARES_OF_OTHERS[dtype].items():
            yield from time("ours", name, most)
        yield from time("ours, saved", "CCE torch_compile", 1)
        yield from memory("ours, saved", "CCE torch_compile", 1)
        yield from time("ours, saved", "3 products", 1.25)
        yield from time("ours, separable", "3 products", 1.25)
        yield from time("ours, tiled", "4 products", 1.25)
        yield from exactness(row, dtype)
    if row["section"] == "frozen":
        yield from time("ours", "naive", 0.7)
        yield from memory("ours", "naive", 0.1)
        yield from time("ours", "2 products", 1.25)
    if row["section"] == "skipped":
        yield from time("ours, tiled, found in backward", "ours, tiled, all rows", 0.55)
        yield from time("ours, tiled, rows known", "ours, tiled, all rows", 0.45)
    if row["section"] == "grpo":
        yield from time("ours", "Liger GRPO", 1 / 3)
        yield from memory("ours", "Liger GRPO", 0.6)


def exactness(row: Row, dtype: str) -> Iterator[Bar]:
    """Yield the limits of the errors: absolute in float32, relative to naive in half precision."""
    naive, ours = row["runs"]["naive"], [run for name, run in row["runs"].items() if name.startswith("ours")]
    value = max(run["value_error"] for run in ours)
    if dtype == "float32":
        yield Bar("error of a logprob, absolute", 2e-5, value)
        yield Bar("error of a gradient, relative norm", 1e-5, max(max(run["gradient_errors"]) for run in ours))
    else:
        pairs = [pair for run in ours for pair in zip(run["gradient_errors"], naive["gradient_errors"])]
        yield Bar("error of a logprob / naive", 1.2, value / naive["value_error"])
        yield Bar("error of a gradient / naive", 1.2, max(a / b for a, b in pairs))


def cleared(rows: list[Row]) -> str:
    lines = [
        [f"{row['section']}, {row['shape']}", bar.text, f"{bar.most:.3g}", f"{bar.value:.3g}", yes_or_no(bar)]
        for row in rows
        for bar in bars(row)
    ]
    return table(["", "", "at most", "measured", ""], lines)


def yes_or_no(bar: Bar) -> str:
    return "yes" if bar.value <= bar.most else "NO"


# The picture

OURS, OTHERS, NAIVE = COLOURS[3], COLOURS[0], GREY


def picture(rows: list[Row], path: Path) -> Path:
    """Draw the time and memory of training at each shape, as shares of naive."""
    rows = [row for row in rows if row["section"] == "training"]
    with style():
        figure = Figure(figsize=(7.2, 3.4 * len(rows)), dpi=110, layout="constrained")
        figure.suptitle(f"Logprobs and their gradients, as shares of naive\n{device_name()}", fontsize=10)
        panels = [panel(axes, row) for axes, row in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows)]
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)  # the layout is made here, and labels are placed on it
        figure.set_layout_engine("none")
        for axes, points in panels:
            name_points(axes, points, renderer)
        figure.savefig(path, dpi=150)
    return path


def panel(axes: Any, row: Row) -> tuple[Any, dict[str, tuple[float, float]]]:
    names = [name for name, run in row["runs"].items() if run["bytes"] is not None]
    points = {name: (slower(row, name, "naive"), larger(row, name, "naive")) for name in names}
    for name, point in points.items():
        axes.plot(*point, "o", color=color(name), markersize=8 if color(name) == OURS else 6)
    (left, right), (low, high) = (extent(column) for column in zip(*points.values()))
    axes.set(xscale="log", yscale="log", xlim=(left / 1.15, right * 1.9), ylim=(low / 1.5, high * 1.5))
    axes.set(title=f"{row['shape'].replace(':', '  ')}", xlabel="time / naive", ylabel="peak memory / naive")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    axes.grid(False)
    axes.axvline(1, color=GREY, alpha=0.3, zorder=0)
    axes.axhline(1, color=GREY, alpha=0.3, zorder=0)
    return axes, points


def extent(values: tuple[float, ...]) -> tuple[float, float]:
    return min(values), max(values)


def color(name: str) -> str:
    return OURS if name.startswith("ours") else NAIVE if name in ("naive", "cross_entropy") else OTHERS


def name_points(axes: Any, points: dict[str, tuple[float, float]], renderer: Any) -> None:
    """Write a label beside each point, at the nearest place where it covers neither a point nor another label."""
    pixels = {name: axes.transData.transform(point) for name, point in points.items()}
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in pixels.values()]
    for name in sorted(pixels, key=lambda name: -pixels[name][1]):
        for distance, angle in product(range(8, 120, 4), range(0, 360, 15)):
            dx, dy = distance * cos(radians(angle)), distance * sin(radians(angle))
            label = axes.annotate(
                name,
                points[name],
                (dx, dy),
                textcoords="offset points",
                ha="left" if dx > 1 else "right" if dx < -1 else "center",
                va="center",
                fontsize=9,
                color=color(name),
                arrowprops={"arrowstyle": "-", "color": color(name), "lw": 0.6} if distance > 16 else None,
            )
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # without the line
            if inside(box, axes.bbox) and not box.count_overlaps(taken):
                taken.append(box)
                break
            label.remove()


def inside(box: Bbox, frame: Bbox) -> bool:
    return bool(frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1)


if __name__ == "__main__":
    stored = load("linear_logprobs")
    print(report(stored))
    picture(stored, PICTURE)
