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

    The test command is a list of paths for pytest, separated by ``;``, with the quickest tests first.

    Options of the distributor:

        options: arguments of pytest that go before each part of the test command.
        preload: modules that are imported before the first fork. The mutated package must not be one of them.
        first: the tests that run before the test command, by the name of a mutated module.
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
        sys.dont_write_bytecode = True  # bytecode is reused by size and second: one mutant would run another's
        cosmic_ray.mutating.run_tests = run_tests
        options, first = distributor_config.get("options", ""), distributor_config.get("first", {})
        for item in pending_work:
            own = [first[m.module_path.stem] for m in item.mutations if m.module_path.stem in first]
            command = ";".join(f"{options} {part}" for part in [*own, *test_command.split(";")])
            on_task_complete(item.job_id, cosmic_ray.mutating.mutate_and_test(item.mutations, command, timeout))


def run_tests(command: str, timeout: float) -> tuple[TestOutcome, str]:
    """Run the tests in a fork, and return the outcome and pytest's output.

    A mutant is killed if a test fails or the time is up. It is incompetent if pytest itself fails.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            os._exit(run_pytest(command))
        status = wait(child, timeout)
        out.seek(0)
        return outcome_of(status), "timeout" if status is None else out.read()


def run_pytest(command: str) -> int:
    """Return pytest's exit code for the first part of the command that fails; 1 if the package cannot be imported."""
    try:
        importlib.import_module(PACKAGE)
    except Exception:
        traceback.print_exc()
        return pytest.ExitCode.TESTS_FAILED
    codes = (pytest.main(shlex.split(part)) for part in command.split(";"))
    code = next((code for code in codes if code != pytest.ExitCode.OK), pytest.ExitCode.OK)
    sys.stdout.flush()
    return int(code)


def outcome_of(status: int | None) -> TestOutcome:
    """Return the outcome of a child's exit status; None is a timeout.

    A signal means that the child crashed. pytest is interrupted if a module of tests cannot be collected.
    """
    if status is None or os.WIFSIGNALED(status):
        return TestOutcome.KILLED
    match os.waitstatus_to_exitcode(status):
        case pytest.ExitCode.OK:
            return TestOutcome.SURVIVED
        case pytest.ExitCode.TESTS_FAILED | pytest.ExitCode.INTERRUPTED:
            return TestOutcome.KILLED
    return TestOutcome.INCOMPETENT


def wait(child: int, timeout: float) -> int | None:
    """Return the exit status of a child. After the timeout, kill its process group and return None."""
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
