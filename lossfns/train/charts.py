"""Curves: as SVG for a page, whose style sheet gives the colours, and as a line of blocks for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple, TypeVar

T = TypeVar("T")

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT, LEFT, BOTTOM, EDGE = 340, 190, 46, 22, 8
"""The size of a chart, and the space for the labels of its axes, in pixels."""

MOST_POINTS = 300
"""The most points of a line. A longer line is drawn by the smallest and the largest value of each of its parts."""

STYLE = """
.chart { width: 100%; height: auto; overflow: visible; font: 11px system-ui, sans-serif }
.chart text { fill: var(--dim) } .chart .grid { stroke: var(--line); stroke-width: 1 }
.chart polyline { fill: none; stroke-width: 2; stroke-linejoin: round; stroke: var(--c) }
.chart .faint { stroke-width: 1; opacity: .4 } .chart .dashed { stroke-dasharray: 5 4 }
.chart circle { fill: var(--c); stroke: var(--page); stroke-width: 1.5 }
.c0 { --c: var(--c0) } .c1 { --c: var(--c1) } .c2 { --c: var(--c2) } .c3 { --c: var(--c3) }
.c4 { --c: var(--c4) } .c5 { --c: var(--c5) }
:root { --c0: #0072b2; --c1: #d55e00; --c2: #008060; --c3: #a34f87; --c4: #8a6d00; --c5: #56606b }
@media (prefers-color-scheme: dark) {
  :root { --c0: #56b4e9; --c1: #ff9e4a; --c2: #3ccf9f; --c3: #e69fc8; --c4: #f0e442; --c5: #b8c0c8 }
}
"""
"""Okabe and Ito's colours, darker on a light page and lighter on a dark one."""

COLOURS = 6


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
        points: pairs of x and y, all finite, in the order of x.
        look: classes of the style sheet: a colour ``c0`` to ``c5``, and ``faint`` or ``dashed``.
        marks: whether each point has a mark.
    """

    points: Points
    look: str = "c0"
    marks: bool = False


def svg(lines: Sequence[Line], label: str) -> str:
    """Return a chart of lines over one another. There is at least one point.

    Args:
        lines: the lines, drawn in this order.
        label: a description for those who do not see it.
    """
    xs, ys = ([point[i] for line in lines for point in line.points] for i in (0, 1))
    left, right = min(xs), max(xs)
    marks = ticks(min(ys), max(ys))
    low, high = min(*ys, *marks), max(*ys, *marks)

    def at(x: float, y: float) -> tuple[float, float]:
        """Return the place of a point in the chart."""
        across = (x - left) / ((right - left) or 1)
        up = (y - low) / ((high - low) or 1)
        inner, tall = WIDTH - LEFT - EDGE, HEIGHT - BOTTOM - EDGE
        return round(LEFT + across * inner, 1), round(EDGE + (1 - up) * tall, 1)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for y in marks:
        _, down = at(left, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - EDGE}" y1="{down}" y2="{down}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4}" text-anchor="end">{short(y)}</text>')
    for x in (x for x in ticks(left, right) if left <= x <= right and x == int(x)):  # x counts steps
        across, _ = at(x, low)
        parts.append(f'<text x="{across}" y="{HEIGHT - 5}" text-anchor="middle">{short(x)}</text>')
    for line in lines:
        place = [at(x, y) for x, y in thinned(line.points)]
        path = " ".join(f"{x},{y}" for x, y in place)
        parts.append(f'<polyline class="{line.look}" points="{path}"/>')
        if line.marks:
            parts += [
                f'<circle class="{line.look}" cx="{across}" cy="{down}" r="4"><title>step {x}: {y:.4g}</title></circle>'
                for (across, down), (x, y) in zip((at(x, y) for x, y in line.points), line.points)
            ]
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about ``count`` round numbers that cover a range.

    >>> ticks(0.1, 0.93), ticks(3.0, 3.0)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [2.0, 2.5, 3.0, 3.5, 4.0])
    """
    if high <= low:
        pad = abs(low) / 3 or 1.0
        low, high = low - pad, high + pad
    size = (high - low) / count
    power = 10.0 ** math.floor(math.log10(size))
    step = power * min((m for m in (1, 2, 5, 10)), key=lambda m: abs(math.log(m * power / size)))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def short(x: float) -> str:
    """Return a number in a few characters.

    >>> short(0.25), short(12000.0), short(3.0), short(-1e-05)
    ('0.25', '12k', '3', '-1e-05')
    """
    if 10_000 <= abs(x) < 1e6:
        return f"{x / 1000:g}k"
    return f"{x:g}"


def thinned(points: Points) -> Points:
    """Return a line with at most ``MOST_POINTS`` points: the smallest and the largest of each part of a longer line."""
    if len(points) <= MOST_POINTS:
        return points
    kept: list[tuple[float, float]] = []
    for part in split(points, MOST_POINTS // 2):
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def split(items: Sequence[T], count: int) -> list[Sequence[T]]:
    """Split a sequence into ``count`` parts of nearly equal length."""
    return [items[i * len(items) // count : (i + 1) * len(items) // count] for i in range(count)]


def smooth(points: Points) -> Points:
    """Return the running mean of a line."""
    return [(x, y) for (x, _), y in zip(points, running_mean([y for _, y in points]))]


def running_mean(values: Sequence[float], fraction: float = 0.1) -> list[float]:
    """Return for each value the mean of the values around it. The window holds ``fraction`` of all values."""
    half = max(1, round(len(values) * fraction / 2))
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    ends = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


BLOCKS = "▁▂▃▄▅▆▇█"


def block_line(values: Sequence[float], width: int, scale: tuple[float, float] | None = None) -> str:
    """Return a curve as blocks. Each block shows the mean of one of ``width`` parts of the values.

    Args:
        values: the values, all finite; at least one.
        width: the most blocks.
        scale: the values of the lowest and of the highest block; by default those of the curve.

    >>> block_line([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 8)
    '▁▂▃▄▅▆▇█'
    """
    means = [sum(part) / len(part) for part in split(values, min(width, len(values)))]
    low, high = scale or (min(means), max(means))
    return "".join(BLOCKS[max(0, min(7, int((x - low) / ((high - low) or 1.0) * 8)))] for x in means)
