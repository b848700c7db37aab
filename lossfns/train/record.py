"""The files of a run as they are now, to read while it is running, too."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from lossfns.errors import LossInputError
from lossfns.train.run import BATCH, EVALUATIONS, METRICS, RESULT, load_config

Row = dict[str, Any]


class Record(NamedTuple):
    """The record of a run.

    Attributes:
        folder: the run folder.
        config: the content of ``config.json``.
        history: the rows of ``metrics.jsonl``.
        evaluations: the rows of ``evaluations.jsonl``.
        result: the content of ``result.json``; empty if the run has not ended.
        batch: the content of ``batch.json``; empty if there is none yet.
    """

    folder: Path
    config: Row
    history: list[Row]
    evaluations: list[Row]
    result: Row
    batch: Row

    @property
    def state(self) -> str:
        """The state of the run in words. A result that is older than a resumption does not count."""
        if not self.result or self.history[-1]["seconds"] > self.result.get("seconds", math.inf) + 0.1:
            return "not ended"
        return "stopped early" if self.result.get("stopped_early") else "finished"

    @property
    def seconds(self) -> float:
        """The time spent on the run, measurements included; of a run that has not ended, until the last row."""
        if self.state != "not ended" and "seconds" in self.result:
            return float(self.result["seconds"])
        return max(float(rows[-1]["seconds"]) for rows in (self.history, self.evaluations) if rows)

    @property
    def phases(self) -> list[str]:
        """The phases that have begun, in their order."""
        return list(dict.fromkeys(row["phase"] for row in [*self.history, *self.evaluations]))

    @property
    def main_phase(self) -> str:
        """The phase of the last held-out evaluation, or the last one that has begun."""
        return str(self.evaluations[-1]["phase"]) if self.evaluations else self.phases[-1]

    @property
    def measure(self) -> str | None:
        """The name of the held-out measure; None before the first evaluation."""
        rows = self.evaluations or [self.result]
        names = [name for name, x in rows[-1].items() if name not in PLACE and isinstance(x, (int, float, dict))]
        return next(iter(names), None)

    def held_out(self) -> list[tuple[int, float]]:
        """Return pairs of step and held-out measure in the last phase; without evaluations, of ``result.json``."""
        if self.measure is None:
            return []
        if self.evaluations:
            return values_of(self.evaluations, self.main_phase, self.measure)
        measured = self.result[self.measure]
        return [(0, float(measured["before"])), (self.history[-1]["step"], float(measured["after"]))]


EMPTY = "(empty: the model ended at once)"
"""The text that is shown for a sample without text."""

PLACE = ("phase", "step", "seconds", "stopped_early", "samples")
"""The fields of a row, or of a result, that are no measurements."""


def read_record(folder: Path, argument: str = "RUN") -> Record:
    """Read the files of a run.

    Args:
        folder: the run folder.
        argument: the argument that an error names.

    Raises:
        LossInputError: if the folder holds no run, the run has made no step, or a row is damaged.
    """
    config = load_config(folder, argument)
    history, evaluations = read_metric_rows(folder / METRICS), read_metric_rows(folder / EVALUATIONS)
    if not history:
        got = f"none in {folder}"
        raise LossInputError(argument, "a run with metrics", got, "It has not made a step yet.")
    result = read_json(folder / RESULT)
    return Record(folder, config, history, evaluations, result if is_result(result) else {}, read_json(folder / BATCH))


def read_metric_rows(path: Path) -> list[Row]:
    """Read the rows of a file; none if there is no file. A last line without its end is left out.

    Raises:
        LossInputError: if a row is damaged.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({**row, "phase": str(row["phase"]), "step": int(row["step"])})
            numbers = [float(x) for name, x in row.items() if name != "phase" and isinstance(x, (int, float))]
            valid = len(numbers) == len(row) - 1 and all(math.isfinite(row[name]) for name in ("step", "seconds"))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            valid = False
        if not valid:
            raise LossInputError(f"{path}:{number}", "a row of metrics", "a damaged one", "Was the file changed?")
    return rows


def is_result(content: Row) -> bool:
    """Whether the content of ``result.json`` is that of a run: numbers before and after, and samples as texts."""
    try:
        measured = [x[when] for name, x in content.items() if name not in PLACE for when in ("before", "after")]
        texts = [x for row in content.get("samples", []) for x in row.values()]
        seconds = content.get("seconds", 0.0)
    except (AttributeError, KeyError, TypeError):
        return False
    return all(isinstance(x, (int, float)) for x in [*measured, seconds]) and all(isinstance(x, str) for x in texts)


def read_json(path: Path) -> Row:
    """Return the content of a file; empty if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def values_of(rows: list[Row], phase: str, name: str) -> list[tuple[int, float]]:
    """Return the steps of a phase with the values of a metric. Values that are not finite are left out."""
    points = [(row["step"], row[name]) for row in rows if row["phase"] == phase and name in row]
    return [(step, x) for step, x in points if math.isfinite(x)]


CURVES = ("reward", "accuracy", "loss", "nll", "ratio", "kl_old", "kl_ref", "clip_high", "margin", "grad_norm")
"""The metrics that are shown as curves, in this order, if they are not constant."""


def changing(record: Record) -> list[tuple[str, str]]:
    """Return the phases with their metrics of ``CURVES`` that are not constant, the last phase first.

    A metric that equals one before it, as the nll of a cross-entropy equals its loss, is left out.
    """
    names: list[tuple[str, str]] = []
    for phase in reversed(record.phases):
        seen: list[list[str]] = []
        for name in CURVES:
            shown = [f"{x:.4g}" for _, x in values_of(record.history, phase, name)]
            if len(set(shown)) > 1 and shown not in seen:
                seen.append(shown)
                names.append((phase, name))
    return names


def rises(measure: str) -> bool:
    """Whether a larger value of a held-out measure is better, as for all measures but losses."""
    return not measure.startswith(("bits", "loss", "nll", "perplexity"))


def best(record: Record) -> tuple[int, float]:
    """Return the step and the value of the best held-out evaluation."""
    choose = max if rises(record.measure or "") else min
    return choose(record.held_out(), key=lambda point: point[1])
