"""Runs of the suite on a server in the workers themselves, in a process that has used neither SDK nor autograd."""

from __future__ import annotations

import io
import multiprocessing
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import cache, partial
from typing import Any

import pytest
import tinker

from lossfns.cli import main
from lossfns.conformance import runner
from lossfns.conformance.checks import CHECKS
from lossfns.conformance.client import Connection
from lossfns.conformance.report import Report
from lossfns.conformance.runner import Target, run
from lossfns.errors import LossWarning
from lossfns.server import local_service
from lossfns.server.service import Service
from tests.conformance.faulty import DEFECTS

OPEN: list[Any] = []
"""The services of a worker, which are open until it ends."""


def opened(defect: str, folder: str) -> Connection:
    """Open a session with a server in this process, with a planted defect."""
    if defect:
        DEFECTS[defect].plant()
    warnings.simplefilter("ignore", LossWarning)  # of large ratios: a server only logs it
    OPEN.append(local_service(Service(device="cpu", state=folder)))
    OPEN[-1].__enter__()
    return Connection(lambda: tinker.ServiceClient(base_url="http://local", api_key="tml-local"), tinker.types)


def run_here(defect: str, names: set[str] | None) -> Report:
    """Run the checks of these names, or all, on a server with a defect. Workers are forks of this process."""
    checks = [check for check in CHECKS if names is None or check.name in names]
    with tempfile.TemporaryDirectory() as folder:
        target = Target(partial(opened, defect, folder), lambda: "")
        return run(target, checks, Report("local", tinker.__version__, "full"))


IMPATIENT = {"SETUP_SECONDS": 2.0, "CHECK_SECONDS": 0.7, "EXPERIMENTS": 0, "MARGIN": 0.3, "HEALTH_SECONDS": 1.0}
"""Limits of the runner that tests can wait for."""


def command_here(url: str) -> tuple[int, str]:
    """Run the command on a server with short limits, and return its status and what it prints."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        for name, value in IMPATIENT.items():
            patch.setattr(runner, name, value)
        return main(["conformance", "--base-url", url]), out.getvalue()


@cache
def fresh_process() -> ProcessPoolExecutor:
    """Return a process that is no fork: the SDK and autograd do not work in forks of one that has used them."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def run_on(defect: str, names: set[str] | None = None) -> Report:
    """Return the report on a server with a defect, or on the right one for no name."""
    return fresh_process().submit(run_here, defect, names).result()


def command_on(url: str) -> tuple[int, str]:
    """Return the status of the command on a server, with short limits, and what it prints."""
    return fresh_process().submit(command_here, url).result()
