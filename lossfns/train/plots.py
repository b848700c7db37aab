"""The curves of a run as a picture; needs the extra ``viz``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PLOTTED = ("reward", "accuracy", "loss", "ratio", "kl_old", "kl_ref", "clip_high", "margin", "grad_norm")
"""The metrics that get a panel, if they are not constant."""


def plot_metrics(
    history: Sequence[Mapping[str, Any]], evaluations: Mapping[str, tuple[float, float]], path: Path
) -> bool:
    """Plot each metric that is not constant: its values as a faint line, their running mean as a bold one.

    Args:
        history: the rows of ``metrics.jsonl``.
        evaluations: for each metric, its held-out values before and after training, plotted at the first and last step.
        path: where to write the picture.

    Returns:
        Whether a picture was written. None is written if all metrics are constant.
    """
    from matplotlib.figure import Figure

    phases = list(dict.fromkeys(row["phase"] for row in history))
    panels = [(p, name) for p in phases for name in changing([row for row in history if row["phase"] == p])]
    if not panels:
        return False
    figure = Figure(figsize=(4 * min(3, len(panels)), 2.6 * -(-len(panels) // 3)), layout="constrained")
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
    figure.savefig(path, dpi=120)
    return True


def changing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the metrics of ``PLOTTED`` that are not constant."""
    return [name for name in PLOTTED if len({row[name] for row in rows if name in row}) > 1]


def running_mean(values: Sequence[float], fraction: float = 0.1) -> list[float]:
    """Return for each value the mean of the values around it. The window holds this fraction of all values."""
    half = max(1, round(len(values) * fraction / 2))
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
