"""Options of a run with absolute paths."""

from pathlib import Path

import pytest

from lossfns.cli import main
from lossfns.train.paths import with_absolute_paths


def test_a_name_stays_a_name_where_a_folder_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("grpo", "exact", "weights"):
        Path(name).mkdir()
    Path("own.py").touch()
    given = {"loss": "grpo", "reward": "exact", "model": "weights", "teacher": "org/name"}
    assert with_absolute_paths(given) == {**given, "model": str(tmp_path / "weights")}
    assert with_absolute_paths({"loss": "own.py:f"}) == {"loss": f"{tmp_path}/own.py:f"}


def test_an_interrupt_while_a_loss_is_imported_is_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("raise KeyboardInterrupt\n")
    assert main(["train", "own.py:f"]) == 130
    assert capsys.readouterr() == ("", "")
