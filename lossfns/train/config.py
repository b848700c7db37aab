"""``config.json`` of a run: everything that is needed to repeat it."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from lossfns.errors import LossInputError
from lossfns.terminal import while_read
from lossfns.train import files, recipes
from lossfns.train.checkpoints import checkpoints
from lossfns.train.options import Options
from lossfns.train.remote import Client, RemoteTrainingClient
from lossfns.version import __version__


def config_of(options: Options, client: Client) -> dict[str, Any]:
    """Return the content of ``config.json``: everything that is needed to repeat the run."""
    data = {"data": files.located(options.data)} if options.data else {}
    sources = data | ({"init": os.path.abspath(options.init)} if options.init else {})
    return {
        "id": uuid4().hex,
        "options": recipes.own_options(options) | sources,
        "sha256": {name: files.digest(path) for name, path in sources.items()},
        "loss": repr(recipes.METHODS[options.method].loss()),
        **description_of(client),
        "versions": {"lossfns": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def description_of(client: Client) -> dict[str, Any]:
    """Return the model and its shape, as far as they are known here."""
    if isinstance(client, RemoteTrainingClient):
        return {"model": client.describe(), "shape": None}
    return {"model": asdict(client.get_info()), "shape": client.model.shape}


def check_same(then: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Compare the config of a run with the present one.

    Another version, device or loss is reported on standard error: the run may then not continue bit for bit.

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
    if changed:
        with while_read(sys.stderr):
            text = f"lossfns: {folder} began with {'; '.join(changed)}: it may not continue bit for bit"
            print(text, file=sys.stderr)
