"""Parquet, Arrow, and folders and names of the library ``datasets``."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from test_formats import BYTES, texts

from lossfns import LossInputError
from lossfns.train import files, tasks
from lossfns.train.examples import Demonstration, Labelled, Problem
from lossfns.train.values import plain

datasets = pytest.importorskip("datasets")
arrow = pytest.importorskip("pyarrow")

CALL = {"function": {"name": "add", "arguments": "{}"}}
ROWS: list[dict[str, Any]] = [
    {"prompt": f"{i}+2=", "answer": i + 2, "score": i / 4, "at": datetime(2026, 1, 2), "cost": Decimal("0.50"),
     "messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "b", "weight": 0.5}]}
    for i in range(12)
]  # fmt: skip
EXPECTED = {(f"{i}+2=", str(i + 2)) for i in range(12)}


def written(folder: Path) -> dict[str, str]:
    """The rows in every form, by the form; of a folder with splits the one that is asked for."""
    table, data = arrow.Table.from_pylist(ROWS), datasets.Dataset.from_list(ROWS)
    paths = {name: str(folder / name) for name in ("parquet", "arrow", "stream", "saved", "one", "many")}
    arrow.parquet.write_table(table, paths["parquet"])
    with arrow.OSFile(paths["arrow"], "wb") as file, arrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with arrow.OSFile(paths["stream"], "wb") as file, arrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    data.save_to_disk(paths["saved"])
    datasets.DatasetDict({"only": data}).save_to_disk(paths["one"])
    datasets.DatasetDict({"test": data.select([0]), "train": data}).save_to_disk(paths["many"])
    return paths | {"train": paths["many"] + ":train"}


def refusal(source: str | Path, kind: Any = Problem) -> str:
    with pytest.raises(LossInputError) as refused:
        tasks.load(str(source), BYTES, kind)
    assert str(refused.value).isprintable()
    return str(refused.value)


def test_rows_of_tables_are_those_of_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row, default=str) + "\n" for row in ROWS))
    expected = [plain(row.fields) for row in files.read_rows(str(lines))]
    for name, source in written(tmp_path).items():
        rows = files.read_rows(source)
        got = [plain(row.fields) | {"at": "2026-01-02 00:00:00", "cost": "0.50"} for row in rows]
        assert got == expected, name  # no "weight": None in the messages of users
        assert {plain(row.fields["cost"]) for row in rows} == {0.5} and rows[1].fields["at"].startswith("2026-01-02"), (
            name
        )
        task = tasks.load(source, BYTES, Problem)
        assert {texts(each) for each in task.train + task.held_out} == EXPECTED, name
        assert task.name == {"one": source + ":only", "many": source + ":train"}.get(name, source)
        chats = tasks.load(source, BYTES, Demonstration)
        assert {each.weights[-1] for each in chats.train + chats.held_out} == {0.5}, name
        assert files.located(source) == source and len(files.digest(source)) == 64, name


def test_a_table_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = written(tmp_path)
    for name in ("parquet", "arrow", "stream"):
        cut = tmp_path / f"cut-{name}"
        cut.write_bytes(Path(paths[name]).read_bytes()[:-500])
        assert f"a whole {'Parquet' if name == 'parquet' else 'Arrow'} file, got {cut}" in refusal(cut), name
    assert "expected no split of" in refusal(paths["saved"] + ":train")
    assert "(test, train), got 'valid'. Name one: --data" in refusal(paths["many"] + ":valid")
    (Path(paths["saved"]) / "state.json").write_text("{")
    assert "a whole folder of datasets, got" in refusal(paths["saved"])
    arrow.parquet.write_table(arrow.Table.from_pylist([{"prompt": "a", "answer": float("nan")}] * 2), paths["parquet"])
    assert f"{paths['parquet']}:1: expected JSON under 'answer', got nan" in refusal(paths["parquet"])
    arrow.parquet.write_table(arrow.Table.from_pylist([{"prompt": b"a", "answer": "b"}] * 2), paths["parquet"])
    assert f"{paths['parquet']}:1: expected text under 'prompt', got b'a'" in refusal(paths["parquet"])
    twice = arrow.Table.from_arrays([arrow.array(["a", "b"])] * 3, names=["prompt", "answer", "answer"])
    with arrow.ipc.new_file(paths["arrow"], twice.schema) as file:
        file.write_table(twice)
    assert f"a whole Arrow file, got {paths['arrow']} (a column comes twice)" in refusal(paths["arrow"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'lossfns[data]'" in refusal(paths["parquet"])


LABELLED = [{"prompt": f"{i}", "completion": "b", "label": i % 3 > 0} for i in range(6)]
LABELS: list[tuple[str, str]] = [("True", "False"), ("1", "0"), ("TRUE", "FALSE"), ("1.0", "0.0")]


def test_a_table_with_labels_is_no_table_of_demonstrations(tmp_path: Path) -> None:
    """However the labels are written: the bad completions must not be trained."""
    path = tmp_path / "rows.csv"
    for labels in LABELS:
        path.write_text("prompt,completion,label\n" + "".join(f"{i},b,{labels[i % 2]}\n" for i in range(6)))
        says = "got a label, which losses of unpaired preference read. Train on the good ones: write them to another"
        assert says in refusal(path, Demonstration), labels
        task = tasks.load(str(path), BYTES, Labelled)
        assert sum(each.desirable for each in task.train + task.held_out) == 3, labels
    path.write_text("prompt,completion,label\na,b,\nc,d,\n")
    assert len(tasks.load(str(path), BYTES, Demonstration).train) == 1  # nothing is labelled


def test_the_commands_for_a_file_work_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other, lines = (tmp_path / name for name in ("it's.parquet", "rows.csv", "rows.jsonl"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(message: str) -> list[dict[str, Any]]:
        command = re.search(r"(python -c|jq -c) .*", message)
        assert command, message
        text = command[0].replace("python", sys.executable, 1)
        subprocess.run(text.replace("FIELD1", "reply").replace("FIELD", "reply"), shell=True, cwd=tmp_path, check=True)
        return [plain(row.fields) for row in files.read_rows(str(lines))]

    good = [{"prompt": row["prompt"], "completion": "b"} for row in LABELLED if row["label"]]
    renamed = [{"prompt": f"{i}", "completion": "b"} for i in range(2)]
    arrow.parquet.write_table(arrow.Table.from_pylist(LABELLED), path)
    assert run(refusal(path, Demonstration)) == good
    arrow.parquet.write_table(arrow.Table.from_pylist([{"prompt": f"{i}", "reply": "b"} for i in range(2)]), path)
    assert run(refusal(path, Demonstration)) == renamed
    other.write_text("prompt,reply\na,b\nc,d\n")
    assert refusal(other, Demonstration).endswith("Rename the columns in the first line.")
    if shutil.which("jq"):
        array = tmp_path / "rows.json"
        array.write_text(json.dumps([{"prompt": f"{i}", "reply": "b"} for i in range(2)]))
        assert run(refusal(array, Demonstration)) == renamed
        array.write_text(json.dumps([row | {"label": int(row["label"])} for row in LABELLED]))
        assert run(refusal(array, Demonstration)) == good


def test_a_name_without_a_connection_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub is an address where nobody answers. A path with the suffix of a file, or in a folder, is no name."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub.HfApi, "__init__", lambda self: setattr(self, "endpoint", "http://127.0.0.1:9"))
    assert refusal("nobody/none").startswith(
        "--data: expected a file, a folder or the name of a data set, got 'nobody/none'"
    )
    for missing in ("none.jsonl", "data/rows.parquet", str(tmp_path / "none")):
        assert "No such file" in refusal(missing), missing
    assert files.located("nobody/none:main:train") == "nobody/none:main:train" and files.digest("nobody/none") == ""
