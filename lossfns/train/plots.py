"""The curves of a run: as a picture, which needs the extra ``viz``, and as a line of blocks on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import IO, Any

PLOTTED = ("reward", "accuracy", "loss", "ratio", "kl_old", "kl_ref", "clip_high", "margin", "grad_norm")
"""The metrics that get a panel, if they are not constant."""


def plot_metrics(
    history: Sequence[Mapping[str, Any]], evaluations: Mapping[str, tuple[float, float]], file: IO[bytes]
) -> bool:
    """Plot each metric that is not constant: its values as a faint line, their running mean as a bold one.

    Args:
        history: the rows of ``metrics.jsonl``.
        evaluations: for each metric, its held-out values before and after training, plotted at the first and last step.
        file: where to write the picture, as PNG.

    Returns:
        Whether a picture was written. None is written if all metrics are constant.
    """
    from matplotlib.figure import Figure

    panels = changing_metrics(history)
    if not panels:
        return False
    figure = Figure(figsize=(4 * min(3, len(panels)), 2.6 * -(-len(panels) // 3)), layout="constrained")
    phases = list(dict.fromkeys(row["phase"] for row in history))
    for i, (phase, name) in enumerate(panels):
        axes = figure.add_subplot(-(-len(panels) // 3), min(3, len(panels)), i + 1)
        rows = [row for row in history if row["phase"] == phase and name in row]
        steps, values = [row["step"] for row in rows], [row[name] for row in rows]
        axes.plot(steps, values, color="C0", alpha=0.3, linewidth=1)
        axes.plot(steps, running_mean(values), color="C0", linewidth=2)
        if name in evaluations and phase == phases[-1]:
            axes.plot([steps[0], steps[-1]], evaluations[name], "o--", color="C1", label="held out")
            axes.legend(frameon=False)
        axes.set_title(f"{phase}: {name}" if len(phases) > 1 else name, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.2)
    figure.savefig(file, dpi=120, format="png")
    return True


def changing_metrics(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the phases with their metrics of ``PLOTTED`` that are not constant."""
    phases = dict.fromkeys(row["phase"] for row in history)
    return [(p, name) for p in phases for name in PLOTTED if len(set(values_of(history, p, name))) > 1]


def values_of(history: Sequence[Mapping[str, Any]], phase: str, name: str) -> list[float]:
    """Return a metric of a phase, step by step."""
    return [row[name] for row in history if row["phase"] == phase and name in row]


BLOCKS = "▁▂▃▄▅▆▇█"


def block_line(values: Sequence[float], width: int) -> str:
    """Return a curve as blocks, one for the mean of each of ``width`` parts of the values.

    >>> block_line([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 8)
    '▁▂▃▄▅▆▇█'
    """
    width = min(width, len(values))
    parts = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in parts]
    low, height = min(means), (max(means) - min(means)) or 1.0
    return "".join(BLOCKS[min(7, int((x - low) / height * 8))] for x in means)


def running_mean(values: Sequence[float], fraction: float = 0.1) -> list[float]:
    """Return for each value the mean of the values around it. The window holds this fraction of all values."""
    half = max(1, round(len(values) * fraction / 2))
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
