"""``config.json`` and ``config.toml`` of a run: everything that is needed to repeat it."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from lossfns.errors import LossInputError
from lossfns.terminal import while_read
from lossfns.train import files
from lossfns.train.checkpoints import checkpoints
from lossfns.train.defaults import recorded_options
from lossfns.train.losses import AnyLoss
from lossfns.train.options import Options, to_toml, with_effect
from lossfns.train.paths import code_files, with_absolute_paths
from lossfns.train.remote import Client, RemoteTrainingClient
from lossfns.train.run import replaced
from lossfns.version import __version__

CONFIG_TOML = "config.toml"


def config_of(options: Options, loss: AnyLoss, client: Client) -> dict[str, Any]:
    """Return the content of ``config.json``: everything that is needed to repeat the run."""
    recorded = with_absolute_paths(recorded_options(options, loss))
    sources = {name: recorded[name] for name in ("data", "init") if recorded[name]} | code_files(recorded)
    return {
        "id": uuid4().hex,
        "options": recorded,
        "sha256": {name: files.digest(path) for name, path in sources.items()},
        "loss": repr(loss),
        **description_of(client),
        "versions": {"lossfns": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"platform": platform.platform(), "processors": os.cpu_count()},
    }


def write_config_toml(folder: Path, options: Mapping[str, Any]) -> None:
    """Write the options with an effect to ``config.toml``. ``lossfns train --config`` repeats the run with it."""
    if not (folder / CONFIG_TOML).exists():
        with replaced(folder, CONFIG_TOML) as path:
            path.write_text(to_toml(with_effect(options)), encoding="utf-8")


def description_of(client: Client) -> dict[str, Any]:
    """Return the description and the shape of the model; the shape is None for a model on a server."""
    if isinstance(client, RemoteTrainingClient):
        return {"model": client.describe(), "shape": None}
    return {"model": asdict(client.get_info()), "shape": client.model.shape}


def check_same(then: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Compare the config of a run with the present one.

    Another version, device or loss, and a changed file of a function, are reported on standard error: the run may then
    not continue bit for bit.

    Raises:
        LossInputError: if a file that the run needs has changed.
    """
    needed = ["data"] if checkpoints(folder) else ["data", "init"]
    for name in needed:
        if then["sha256"].get(name) != now["sha256"].get(name):
            got, fix = f"{now['options'][name]}, which has changed since", "Put it back, or start a new run."
            raise LossInputError(f"--{name}", f"the file that {folder} began with", got, fix)
    old, new = ({"loss": c.get("loss"), "device": c["model"].get("device"), **c["versions"]} for c in (then, now))
    changed = [f"{name} {old.get(name)}, now {new[name]}" for name in new if old.get(name) != new[name]]
    told = [f"{folder} began with {'; '.join(changed)}"] if changed else []
    for name, file in code_files(now["options"]).items():
        if then["sha256"].get(name, now["sha256"][name]) != now["sha256"][name]:
            told.append(f"{file} has changed since")
    for text in told:
        with while_read(sys.stderr):
            print(f"lossfns: {text}: the run may not continue bit for bit", file=sys.stderr)
