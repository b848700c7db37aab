"""Everything that can run on a GPU runs on a rehearsed one, and the host waits no more often than documented."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.long
def test_all_that_runs_on_a_gpu_runs_on_a_rehearsed_one() -> None:
    """A process keeps a device that it has registered, so the tests in ``tests/device`` have a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "tests/device"]
    environment = os.environ | {"LOSSFNS_DEVICE": "rehearsal"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
