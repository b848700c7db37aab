"""Draw the curves of the three runs of docs/train.md: python -m tools.runs FOLDER

The folder has the run folders ``sft``, ``dpo`` and ``grpo``. The picture is docs/runs.svg (extra ``viz``).
"""

from __future__ import annotations

import sys
from pathlib import Path

from lossfns.plot.figures import COLOURS, finish, panels, save, style
from lossfns.train.record import read_record

PICTURE = Path("docs/runs.svg")
MEASURED = {
    "sft": ("nll", "nll per token"),
    "dpo": ("accuracy", "preference accuracy"),
    "grpo": ("reward", "mean reward"),
}
"""What is drawn of each run: a metric of the batches, which is measured on the held-out rows as well, and its title."""


def main(folder: Path) -> None:
    with style():
        figure, axes = panels(len(MEASURED))
        for axis, (run, (metric, title)) in zip(axes.flat, MEASURED.items()):
            record = read_record(folder / run)
            axis.plot([row["step"] for row in record.history], [row[metric] for row in record.history],
                      color=COLOURS[0], label="batch of the step")  # fmt: skip
            axis.plot(*zip(*record.held_out()), color=COLOURS[1], marker="o", linestyle="none", label="held out")
            axis.set_title(f"{run}: {title}")
            axis.set_xlabel("step")
        save(finish(figure, axes.flat[0], 2), PICTURE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
