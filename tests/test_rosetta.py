"""The Rosetta table: our calls and the formulas give the recorded numbers, and every verdict holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lossfns.describe import peer_lines, presets
from tools import drift
from tools.rosetta import installed
from tools.rosetta.compare import fault, ours, peers
from tools.rosetta.inputs import INPUTS
from tools.rosetta.installed import Definition, Peer, installed_version
from tools.rosetta.page import PAGE, render
from tools.rosetta.record import definitions, key, runs_here, stored
from tools.rosetta.row import DIFFERENT, EQUAL, FACTOR, Row
from tools.rosetta.table import all_rows

ROWS = all_rows()
RECORDED = {key(row): row for row in stored()["rows"]}
PACKAGES = sorted({row.peer.package for row in ROWS if isinstance(row.peer, Peer)})


def close(x: float, y: float) -> bool:
    """Whether two numbers agree to 1e-9 of the larger, or to 1e-9 where both are below 1."""
    return abs(x - y) <= 1e-9 * max(1.0, abs(x), abs(y))


def names(row: Row) -> str:
    return f"{row.framework}, {row.setting}: {row.call}"


def check_side(row: Row, side: Any, name: str) -> None:
    recorded = RECORDED[key(row)]
    assert close(side.value, recorded[name]), f"{names(row)}: {name} {side.value}, recorded {recorded[name]}"
    assert close(side.slope, recorded[f"{name}_slope"]), f"{names(row)}: slope of {name}"


def test_every_row_gives_its_recorded_numbers_and_its_verdict_holds() -> None:
    """Our side of every row and all formulas are evaluated. For a package's row, its recorded number is compared."""
    assert len(ROWS) >= 120 and len(RECORDED) == len(ROWS) == len(stored()["rows"])
    for row in ROWS:
        mine = ours(row)
        check_side(row, mine, "ours")
        recorded = RECORDED[key(row)]
        if isinstance(row.peer, Peer):
            both = [(recorded["ours"], recorded["peer"]), (recorded["ours_slope"], recorded["peer_slope"])]
            if row.verdict == EQUAL:
                assert all(abs(x - y) <= 1e-5 * max(1.0, abs(x)) for x, y in both), names(row)
            if row.verdict == DIFFERENT:
                assert any(abs(x - y) > 1e-5 * max(abs(x), abs(y)) for x, y in both), names(row)
        else:
            theirs = peers(row)
            check_side(row, theirs, "peer")
            assert not fault(row, mine, theirs), f"{names(row)} {fault(row, mine, theirs)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_an_installed_framework_gives_its_recorded_numbers(package: str) -> None:
    rows = [row for row in ROWS if isinstance(row.peer, Peer) and row.peer.package == package]
    if not runs_here(rows[0]):
        version = installed_version(package)
        pytest.skip(f"needs {rows[0].framework}: {'not installed' if version is None else f'{version} is installed'}")
    for row in rows:
        theirs = peers(row)
        check_side(row, theirs, "peer")
        assert not fault(row, ours(row), theirs), f"{names(row)} {fault(row, ours(row), theirs)}"


def test_the_stored_rows_and_the_page_are_those_that_are_written() -> None:
    rows = stored()["rows"]
    assert [key(row) for row in rows] == [key(row) for row in ROWS], "python -m tools.rosetta write"
    for row, recorded in zip(ROWS, rows, strict=True):
        written = {name: getattr(row, name) for name in ("call", "verdict", "why", "source", "inputs")}
        assert {name: recorded[name] for name in written} == written, f"{names(row)}: python -m tools.rosetta write"
    assert PAGE.read_text(encoding="utf-8") == render(rows), "python -m tools.rosetta write"
    assert set(stored()["definitions"]) == {str(definition) for definition in definitions(ROWS)}


def test_every_row_has_a_reason_where_it_needs_one_and_every_batch_is_used() -> None:
    assert all(row.why for row in ROWS if row.verdict in (FACTOR, DIFFERENT))
    assert {row.verdict for row in ROWS} == {EQUAL, FACTOR, DIFFERENT}
    assert {row.inputs for row in ROWS} == set(INPUTS)


def test_a_wrong_verdict_does_not_hold() -> None:
    """A row that says equal of two losses that differ, one that says different of one loss, and a wrong factor."""
    row = next(row for row in ROWS if row.setting == "pg_variant=cispo")
    for wrong in (replace(row, call="cispo()"), replace(row, verdict=DIFFERENT), replace(row, factor="2")):
        assert fault(wrong, ours(wrong), peers(wrong))
    assert not fault(row, ours(row), peers(row))


def test_a_description_has_the_rows_of_a_loss_and_most_losses_have_some() -> None:
    lines = peer_lines("rec_ring")
    assert any("Trinity" in line and "ring" in line and line.endswith("(equal)") for line in lines), lines
    assert any("(different: beta is 0.04 in Liger and 0 in TRL)" in line for line in peer_lines("bnpo"))
    without = [name for name in presets() if not peer_lines(name)]
    assert len(without) < len(presets()) / 3, without


def planted(folder: Path, text: str) -> Definition:
    (folder / "losses.py").write_text(text)
    installed.parsed.cache_clear()
    return Definition("planted", "losses.py", "loss")


def test_drift_finds_a_changed_text_and_no_change_of_white_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed, "folder", lambda package: tmp_path)
    monkeypatch.setattr(drift, "folder", lambda package: tmp_path)
    row = replace(ROWS[0], peer=Peer("planted", (("losses.py", "loss"),), lambda names, b: names["loss"](b.lp)))
    definition = planted(tmp_path, "def loss(x):\n    return x.sum()\n")
    recorded = {str(definition): definition.digest()}
    assert not drift.drifted([row], recorded)
    planted(tmp_path, "# moved\n\n\ndef loss(x):\n        return   x.sum()\n")
    assert not drift.drifted([row], recorded)
    planted(tmp_path, "def loss(x):\n    return x.mean()\n")
    (found,) = drift.drifted([row], recorded)
    assert row.setting in str(found) and "has changed" in str(found)
    planted(tmp_path, "def other(x):\n    return x.sum()\n")
    assert "is gone" in str(drift.drifted([row], recorded)[0])
    installed.parsed.cache_clear()


def test_a_definition_is_executed_without_its_decorators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "folder", lambda package: tmp_path)
    method = "    @register('x')\n    def loss(self, x: Unknown) -> Unknown:\n        return LIMIT * x\n"
    text = f"class A:\n{method}\n\nLIMIT = 3\n"
    (tmp_path / "losses.py").write_text(text)
    installed.parsed.cache_clear()
    peer = Peer("planted", (("losses.py", "LIMIT"), ("losses.py", "A.loss")), lambda names, b: names["loss"](None, b))
    assert peer(2) == 6  # type: ignore[arg-type, comparison-overlap]
    installed.parsed.cache_clear()
