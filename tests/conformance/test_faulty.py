"""Faulty servers and correct variants of them, each over loopback in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

for name in ("starlette", "uvicorn"):
    pytest.importorskip(name)
pytest.importorskip("tinker", "0.38")

from tests.conformance.faulty import DEFECTS
from tests.conformance.variants import VARIANTS

ROOT = Path(__file__).parents[2]


def measured(folder: Path, *names: str) -> dict[str, Any]:
    """Return what the suite finds on servers: name → finding, under ``wrong`` and ``right``."""
    file = folder / "findings.json"
    command = [sys.executable, "-m", "tests.conformance.measure", *names, "--json", str(file)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_every_defect_can_be_planted() -> None:
    command = [sys.executable, "-m", "tests.conformance.measure", "--plant"]
    planted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert planted.returncode == 0, planted.stderr


def test_a_server_that_says_nothing_or_answers_badly_is_caught_and_named(tmp_path: Path) -> None:
    names = ("silent", "one-record", "loss-avg")
    for name, (bug, check, *_) in measured(tmp_path, *names)["wrong"].items():
        assert check and bug == DEFECTS[name].bug, f"{name}: {check} names {bug}"


@pytest.mark.exhaustive
def test_every_defect_is_caught_most_are_named_and_no_correct_server_is_accused(tmp_path: Path) -> None:
    found = measured(tmp_path)
    assert set(found["wrong"]) == set(DEFECTS) and set(found["right"]) == set(VARIANTS)
    missed = [name for name, (_, check, *_) in found["wrong"].items() if not check]
    assert not missed, f"not caught: {missed}"
    others = {name: bug for name, (bug, *_) in found["wrong"].items() if bug != DEFECTS[name].bug}
    assert len(others) <= 0.15 * len(DEFECTS), f"named otherwise: {others}"
    accused = {name: broken for name, (_, _, _, broken, *_) in found["right"].items() if broken}
    assert not accused, f"correct servers that fail: {accused}"
    slow = {name: seconds for name, (*_, seconds) in found["wrong"].items() if seconds > 180}
    assert not slow, f"no report within three minutes: {slow}"
