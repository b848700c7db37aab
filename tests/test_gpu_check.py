"""The check on a GPU, tried on a CPU: all of its sections, and what becomes of a section that fails."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tools"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.exhaustive
def test_every_section_runs_on_a_cpu(tmp_path: Path) -> None:
    """Each section has a check that is ok. Checks that need a GPU or a package that is missing say so."""
    ended = run("tools/gpu_check.py", "--device", "cpu", "--output", str(tmp_path / "rows.json"))
    result = json.loads((tmp_path / "rows.json").read_text())
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert {row["result"] for row in result["rows"]} == {"ok", "skipped"}
    sections = {"losses", "compiled", "attention", "tiles", "linear_logprobs", "waits", "step", "tests"}
    assert {row["section"] for row in result["rows"] if row["result"] == "ok"} == set(result["seconds"]) == sections
    assert all("needs a GPU" in row["note"] or "not installed" in row["note"] for row in rows_of(result, "skipped"))
    assert max(map(len, ended.stdout.splitlines())) <= 80
    assert ended.stdout.startswith("Without a GPU: the checks run on the CPU, in small shapes.")


def rows_of(result: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["result"] == kind]


FAILURES = """
import os, sys, time
import gpu_check
from gpu_checks.client import recorded_warnings
from gpu_checks.measure import error_of, skip
from lossfns.errors import warn

def raising(device):
    def fail():
        raise ValueError("broken")

    def warned():
        with recorded_warnings("waits") as places:
            warn("something else")
            warn("it waits")
        return {"found": len(places), "limit": 0, "note": places[0].split(":")[0]}

    return {
        "within": lambda: {"found": 1.0, "limit": 1.0},
        "beyond": lambda: {"found": 1.5, "limit": 1.0},
        "nan": lambda: {"found": error_of([1.0, float("nan")], [1.0, 1.0]), "limit": 1.0},
        "raises": fail,
        "skips": lambda: skip("a reason"),
        "warns": warned,
        "after all": lambda: {},
    }

def without_inputs(device):
    raise RuntimeError("no inputs")

def hanging(device):
    return {"before": lambda: {}, "hangs": lambda: time.sleep(600)}

def dying(device):
    return {"before": lambda: {}, "dies": lambda: os._exit(7)}

limits = {raising: 30, without_inputs: 30, hanging: 2, dying: 30}
gpu_check.SECTIONS = {each.__name__: gpu_check.Section(each, limit) for each, limit in limits.items()}
gpu_check.TIME_LIMIT = int(sys.argv[2])
sys.argv = ["gpu_check.py", "--device", "cpu", "--output", sys.argv[1]]
sys.exit(gpu_check.main())
"""


def test_a_section_that_fails_stops_no_other(tmp_path: Path) -> None:
    ended = run("-c", FAILURES, str(tmp_path / "rows.json"), "480")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert ended.returncode == 1, ended.stderr
    assert [(row["section"], row["check"], row["result"]) for row in rows] == [
        ("raising", "within", "ok"),
        ("raising", "beyond", "FAILED"),
        ("raising", "nan", "FAILED"),
        ("raising", "raises", "FAILED"),
        ("raising", "skips", "skipped"),
        ("raising", "warns", "FAILED"),
        ("raising", "after all", "ok"),
        ("without_inputs", "inputs", "FAILED"),
        ("hanging", "before", "ok"),
        ("hanging", "the rest", "FAILED"),
        ("dying", "before", "ok"),
        ("dying", "the rest", "FAILED"),
    ]
    notes = [row.get("note", "").split(": ")[-1] for row in rows if row["result"] != "ok"]
    assert notes == [
        "",
        "",
        "broken",
        "a reason",
        "lossfns/errors.py",
        "no inputs",
        "not done within 2 s",
        "the process ended with 7",
    ]
    assert "Traceback" not in ended.stdout + ended.stderr


def test_a_section_without_time_left_is_skipped(tmp_path: Path) -> None:
    ended = run("-c", FAILURES, str(tmp_path / "rows.json"), "9")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert ended.returncode == 0, ended.stderr
    assert len(rows) == 4
    assert {(row["result"], row["note"]) for row in rows} == {("skipped", "the 9 s of the command are over")}
