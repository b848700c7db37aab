"""Runs of the command line in processes that are forked, so that they need not import torch again."""

import multiprocessing
import sys
from pathlib import Path
from typing import Any

from lossfns.cli import main

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lossfns.cli", "pytest", "torch._dynamo"])
"""Forks children from a process without computations or threads."""


def child(arguments: list[str], said: Path) -> None:
    """Run the command line with its output in a file, and without the picture."""
    sys.modules["matplotlib"] = None  # type: ignore[assignment]
    with said.open("a") as sys.stderr, said.open("a") as sys.stdout:
        sys.exit(main(arguments))


def start(arguments: list[str], said: Path) -> Any:
    """Start a process that runs the command line and writes to the file ``said``."""
    process = SERVER.Process(target=child, args=(arguments, said))
    process.start()
    return process
