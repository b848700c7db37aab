"""``lossfns data``: the format, the rows as the model sees them, their lengths, and what training would refuse."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lossfns import LossInputError
from lossfns.backend import ByteTokenizer
from lossfns.cli import main
from lossfns.train import tasks
from lossfns.train.data_command import examine
from lossfns.train.examples import Problem
from lossfns.train.render import Renderer

CHAT = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]
LATER = [*CHAT, {"role": "user", "content": "3+3\x1b[2J"}, {"role": "assistant", "content": "6", "weight": 0.5}]


def shown(path: Path, rows: list[Any], capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    """The exit status and the output for a file of rows; each line fits 80 columns, as a short name leaves room."""
    name = f"t{path.suffix}"
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    (path.parent / name).write_text(text)
    with contextlib.chdir(path.parent):
        status = main(["data", name, *more])
    out, err = capsys.readouterr()
    assert all(len(line) <= 80 for line in out.splitlines()), out
    return status, (out + err).replace(name, "F")


def test_a_file_that_training_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": LATER, "id": 1}, *({"messages": CHAT, "id": i} for i in range(3))]
    status, text = shown(path, rows, capsys)
    assert status == 0 and text.splitlines()[:11] == [
        "F: 4 rows of messages",
        "  read as demonstrations, for supervised methods (sft)",
        "  also problems, for policy methods (grpo, dapo, gspo-token):",
        "    `lossfns data FILE --kind problem` shows them; `train grpo` reads them so",
        "  tokens of the embedded model; messages are written as plain lines",
        "  not read: 'id'",
        "",
        "F:1: 51 tokens, 4 trained",
        "    user: 2+2",
        "    assistant: [[4<|eos|>]]",
        "    user: 3+3\\x1b[2J",
    ]
    assert "    assistant: [[0.5: 6<|eos|>]]" in text and "F:3: 23 tokens, 2 trained" in text and "F:4" not in text
    assert "tokens of a row: 23 at least, 23 median, 51 at most" in text
    assert "in all: 120 tokens in 4 sequences, 10 of them trained" in text
    assert re.search(r"16 to 31 +3  #{40}\n +32 to 63 +1  #{13}\n", text)
    assert text.endswith("equal to other rows, and counted once: 2\nlossfns train takes it\n")
    status, text = shown(path, rows, capsys, "--kind", "problem")
    assert status == 0 and "F:1, prompt with the answer '6': 49 tokens\n" in text


def test_a_file_that_training_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every row that cannot be used is listed in the order of the file, not the first one alone."""
    rows = [
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "completion": "x" * 200, "label": False},
        '{"prompt": \n',
        {"prompt": "a", "completion": None, "label": True},
        {"prompt": "\ud800", "completion": "c", "label": True},
        *({"prompt": "a", "completion": "c", "label": label} for label in (7, 7, 7, 8, 7, *range(9, 16))),
    ]
    path = tmp_path / "rows.jsonl"
    status, text = shown(path, rows, capsys, "--max-length", "100")
    assert status == 1 and "F: 17 rows of prompt, completion and label" in text
    assert "F:1, desirable: 3 tokens, 2 trained" in text and "F:2, undesirable: 202 tokens" in text
    words = " ".join(text.split())
    assert "1 row is longer than 100 tokens and is refused: pass --drop-longer, or" in words
    assert "--max-length 202 F:2: 202 tokens" in words
    places = re.findall(r"F:(\d+): expected", words)
    assert "15 rows are refused" in text and places == ["3", "4", "5", "9", "11", "12", "13"] and "and 4 more" in text
    assert "4 rows (6 to 8, 10): expected true or false under 'label', got 7." in words
    assert text.endswith("lossfns train refuses it: it needs 2 usable rows, and 1 of 17 rows is\n")
    status, text = shown(path, rows[:1] * 3, capsys)
    assert status == 1 and text.endswith("refuses it: it needs 2 different rows, and all 3 are equal\n")
    status, text = shown(path, [{"prompt": f"{i}"} for i in range(2)], capsys)
    assert status == 0 and "The rows have no answer. Pass a --reward that needs none: regex:PATTERN" in text
    status, text = shown(path, [*rows[:2], {"prompt": "c", "completion": "d", "label": 0}], capsys, "--max-length",
                         "100", "--drop-longer")  # fmt: skip
    assert status == 0 and "1 row is longer than 100 tokens and is left out" in text


def test_what_cannot_be_shown_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    cases: list[tuple[list[Any], list[str], str]] = [
        ([], [], "lossfns: FILE: expected at least 2 rows, got 0 in F"),
        (["{"], [], "lossfns: F:1: expected a JSON object"),
        ([{"a": 1}], [], "lossfns: F:1: expected text under 'prompt', got nothing"),
        ([{"text": "a"}], ["--kind", "preference"], "lossfns: F:1: expected text under 'prompt'"),
        ([{"text": "a"}], ["--max-length", "0"], "lossfns: --max-length: expected a whole number of at least 1"),
        ([{"text": "a"}], ["--model", str(tmp_path / "none")], "lossfns: --model: expected a folder, a GGUF file"),
    ]
    for rows, more, says in cases:
        status, text = shown(path, rows, capsys, *more)
        assert status == 2 and text.startswith(says) and text.count("\n") == 1, (rows, text)


def test_long_rows_are_shown_by_their_ends_and_a_terminal_has_colours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i} " + "word " * 400, "completion": "the end"} for i in range(2)]
    _, text = shown(path, rows, capsys)
    assert "    ... 11 lines ..." in text and text.count("[[the end<|eos|>]]") == 2
    _, text = shown(path, [row | {"prompt": row["prompt"] * 9} for row in rows], capsys)
    assert text.count("    ... the middle of 18026 tokens ...") == 2 and text.count("[[the end<|eos|>]]") == 2
    pair = [{"prompt": f"{i}", "chosen": "yes", "rejected": "no"} for i in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in pair))
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["data", str(path)]) == 0
    text = terminal.getvalue()
    first = r"chosen: 5 tokens, 4 trained\n    \x1b\[2m0\x1b\[0m\x1b\[[\d;]*32myes<\|eos\|>\x1b\[0m"
    assert re.search(first, text), text
    assert "rejected: 4 tokens, 3 trained" in text and "[[" not in text


def test_tokens_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": "a", "answer": "b"}, {"prompt": "é", "answer": "c"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not examine(str(path), Renderer(ByteTokenizer(), 257), None).errors
    (error,) = examine(str(path), Renderer(ByteTokenizer(), 128), None).errors
    assert str(error).startswith(f"{path}:2: expected token ids in [0, 128), those of the model, got 195")
    with pytest.raises(LossInputError) as raised:
        tasks.load(str(path), Renderer(ByteTokenizer(), 128), Problem)
    assert str(raised.value) == str(error)


def test_rows_longer_than_the_context_of_the_model_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both commands refuse them or leave them out before a model is built, whatever --max-length says."""
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a" * n, "answer": "bc"} for n in (3, 4, 10, 11)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    renderer = Renderer(ByteTokenizer(), None, 12)
    with pytest.raises(LossInputError) as raised:
        tasks.load(str(path), renderer, Problem)
    assert str(raised.value).startswith(
        f"{path}:3: expected at most 12 tokens with its prompt, the context of the model, got 13, and 1 longer"
    )
    task = tasks.load(str(path), renderer, Problem, drop_longer=True)
    assert len(task.train + task.held_out) == 2 and "2 rows longer than 12 tokens left out" in task.note
    for options, status, says in (([], 1, "refused: pass --drop-longer"), (["--drop-longer"], 0, "left out")):
        with mock.patch("lossfns.train.data_command.renderer_of", return_value=renderer):
            assert main(["data", str(path), *options]) == status
        out = " ".join(capsys.readouterr().out.split())
        assert f"2 rows are longer than 12 tokens, the context of the model, and are {says}" in out


def test_answers_without_a_number_are_refused_where_the_default_reward_needs_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": f"{i}", "answer": answer} for i, answer in enumerate(["#### 4", "#### 5", "four"])]
    status, text = shown(tmp_path / "rows.jsonl", rows, capsys, "--kind", "problem")
    assert status == 1 and "F:3: expected a number in the answer (--reward number), got 'four'" in text
    assert shown(tmp_path / "rows.jsonl", rows[:2], capsys, "--kind", "problem")[0] == 0
    assert shown(tmp_path / "rows.jsonl", rows, capsys, "--kind", "demonstration")[0] == 0
