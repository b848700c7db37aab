"""Trackers, which also get the metrics of a run. Each needs its own package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from lossfns.errors import LossInputError

PROJECT = "lossfns"
"""The project under which a tracker files the runs."""


class Tracker(NamedTuple):
    """An open tracker.

    Attributes:
        name: its name.
        log: ``log(step, values)`` with the number of steps of the whole run, and values by name.
        close: ends it.
    """

    name: str
    log: Callable[[int, Mapping[str, float]], Any]
    close: Callable[[], Any]


def tensorboard(folder: Path, config: Mapping[str, Any], step: int) -> Tracker:
    """Write event files to the folder ``tensorboard`` of the run. A resumed run hides the steps that it repeats."""
    writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker("tensorboard", log, writer.close)


def wandb(folder: Path, config: Mapping[str, Any], step: int) -> Tracker:
    """Send the values to Weights & Biases, under the id of the run, so that a resumed run goes on there."""
    run = import_module("wandb").init(
        project=PROJECT, name=folder.name, id=config["id"], resume="allow", dir=str(folder), config=config["options"]
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return Tracker("wandb", lambda step, values: run.log({**values, "step": step}), run.finish)


def mlflow(folder: Path, config: Mapping[str, Any], step: int) -> Tracker:
    """Send the values to MLflow. A resumed run goes on in the MLflow run that has the tag of its id."""
    package = import_module("mlflow")
    package.set_experiment(PROJECT)
    earlier = package.search_runs(filter_string=f"tags.lossfns_id = '{config['id']}'", output_format="list")
    run_id = earlier[0].info.run_id if earlier else None
    package.start_run(run_id=run_id, run_name=None if run_id else folder.name, tags={"lossfns_id": config["id"]})
    if not earlier:
        package.log_params(config["options"])
    return Tracker("mlflow", lambda step, values: package.log_metrics(dict(values), step=step), package.end_run)


def trackio(folder: Path, config: Mapping[str, Any], step: int) -> Tracker:
    """Send the values to Trackio, under the id of the run."""
    package = import_module("trackio")
    package.init(project=PROJECT, name=f"{folder.name}-{config['id'][:8]}", resume="allow", config=config["options"])
    return Tracker("trackio", lambda step, values: package.log(dict(values), step=step), package.finish)


TRACKERS = {tracker.__name__: tracker for tracker in (tensorboard, wandb, mlflow, trackio)}


def names_of(text: str | None) -> list[str]:
    """Return the names of trackers in a text such as ``tensorboard,wandb``.

    Raises:
        LossInputError: if there is no such tracker, or its package is not installed.

    >>> names_of(None), names_of("tensorboard")
    ([], ['tensorboard'])
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(","))) if text else []
    for name in names:
        if name not in TRACKERS:
            expected = f"names among {', '.join(TRACKERS)}, with commas between them"
            raise LossInputError("--track", expected, repr(name), "metrics.jsonl always has everything.")
        try:
            import_module(name)
        except ImportError:
            fix = "pip install 'lossfns[tensorboard]'" if name == "tensorboard" else f"pip install {name}"
            raise LossInputError("--track", f"the package {name}", "none", fix) from None
    return names


def open_trackers(text: str | None, folder: Path, config: Mapping[str, Any], step: int) -> list[Tracker]:
    """Open trackers by name.

    Args:
        text: their names, with commas between them; None for none.
        folder: the run folder.
        config: the content of its ``config.json``.
        step: the number of steps that are done.
    """
    return [TRACKERS[name](folder, config, step) for name in names_of(text)]
