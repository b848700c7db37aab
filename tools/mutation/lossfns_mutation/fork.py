"""A distributor that imports torch once and runs the tests of each mutant in a forked child."""

from __future__ import annotations

import gc
import importlib.util
import os
import shlex
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import cosmic_ray.mutating
import pytest
from cosmic_ray.distribution.distributor import Distributor
from cosmic_ray.work_item import TestOutcome

PACKAGE = "lossfns"
POLL_SECONDS = 0.01


class ForkDistributor(Distributor):
    """Runs the work items one after another.

    The test command is a list of paths for pytest, separated by ``;``, the quickest first. Options of the distributor:

        options: arguments of pytest that go before each part of the test command.
        preload: modules that are imported before the first fork; the mutated package itself must not be one of them.
        first: by the name of a mutated module, the tests that run before the test command.
    """

    def __call__(
        self, pending_work: Any, test_command: str, timeout: float, distributor_config: Any, on_task_complete: Any
    ) -> None:
        spec = importlib.util.find_spec(PACKAGE)
        assert spec is not None and Path(str(spec.origin)).is_relative_to(Path.cwd()), f"another {PACKAGE} is installed"
        for module in distributor_config.get("preload", []):
            importlib.import_module(module)
        assert PACKAGE not in sys.modules, f"{PACKAGE} was imported before the fork"
        gc.freeze()
        sys.dont_write_bytecode = True  # two mutants of one second and one size would share a cache
        cosmic_ray.mutating.run_tests = run_tests
        options, first = distributor_config.get("options", ""), distributor_config.get("first", {})
        for item in pending_work:
            own = [first[m.module_path.stem] for m in item.mutations if m.module_path.stem in first]
            command = ";".join(f"{options} {part}" for part in [*own, *test_command.split(";")])
            on_task_complete(item.job_id, cosmic_ray.mutating.mutate_and_test(item.mutations, command, timeout))


def run_tests(command: str, timeout: float) -> tuple[TestOutcome, str]:
    """Killed where a test fails or the time is up, incompetent where pytest itself does; and pytest's output."""
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            os._exit(tested(command))
        status = wait(child, timeout)
        out.seek(0)
        return outcome(status), "timeout" if status is None else out.read()


def tested(command: str) -> int:
    """Pytest's exit code on the first part of the command that does not pass, 1 where the package does not import."""
    try:
        importlib.import_module(PACKAGE)
    except Exception:
        traceback.print_exc()
        return pytest.ExitCode.TESTS_FAILED
    codes = (pytest.main(shlex.split(part)) for part in command.split(";"))
    code = next((code for code in codes if code != pytest.ExitCode.OK), pytest.ExitCode.OK)
    sys.stdout.flush()
    return int(code)


def outcome(status: int | None) -> TestOutcome:
    """A module of tests that cannot be collected interrupts pytest; a signal is a crash."""
    if status is None or os.WIFSIGNALED(status):
        return TestOutcome.KILLED
    match os.waitstatus_to_exitcode(status):
        case pytest.ExitCode.OK:
            return TestOutcome.SURVIVED
        case pytest.ExitCode.TESTS_FAILED | pytest.ExitCode.INTERRUPTED:
            return TestOutcome.KILLED
    return TestOutcome.INCOMPETENT


def wait(child: int, timeout: float) -> int | None:
    """The exit status of a child, or None where it had to be killed with its process group."""
    end = time.monotonic() + timeout
    try:
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        os.killpg(child, signal.SIGKILL)
        raise
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
