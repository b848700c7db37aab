"""Files of rows: every row that cannot be used is named with file, line and field; the usual formats are read."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lossfns import LossInputError
from lossfns.backend import ByteTokenizer
from lossfns.train import files, tasks
from lossfns.train.examples import Demonstration, Example, Preference, Problem, prompt_of, sequences
from lossfns.train.render import Renderer
from lossfns.train.tasks import Task

BYTES = Renderer(ByteTokenizer())


KINDS: dict[str, Any] = {"sft": Demonstration, "dpo": Preference, "grpo": Problem}


def load(method: str, path: Path, **more: Any) -> Task[Any]:
    return tasks.load(str(path), BYTES, KINDS[method], **more)


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(example: Example) -> tuple[str, ...]:
    """The prompt, and the answer or what follows the prompt in each sequence."""
    prompt = BYTES.decode(prompt_of(example))
    if isinstance(example, Problem):
        return prompt, str(example.answer)
    return (prompt, *(BYTES.decode(each.tokens).removeprefix(prompt) for each in sequences(example)))


def examples(task: Task[Any]) -> set[tuple[str, ...]]:
    return {texts(e) for e in task.train + task.held_out}


def refusal(method: str, path: Path, **more: Any) -> str:
    """The message of the refusal, which is one line that can be printed."""
    with pytest.raises(LossInputError) as refused:
        load(method, path, **more)
    message = str(refused.value)
    assert message.isprintable() and len(message) < 1000, message
    message.encode()
    return message


GOOD = b'{"prompt": "a", "completion": "b"}\n'


WRONG_ROWS: list[tuple[bytes, str]] = [
    (rb'{"prompt": "\ud83d", "completion": "b"}', r"under 'prompt', got half a surrogate pair \(\\ud83d\) at"),
    (rb'{"prompt": "a", "completion": "b", "x": {"y": ["\udc00"]}}', r"under 'x\.y\[0\]', got half a surrogate"),
    (rb'{"prompt": "a", "completion": "b", "x": {"\ud800": 1}}', r"a key under 'x', got half a surrogate"),
    (rb'{"prompt": "a", "completion": "b\u0000"}', r"text, under 'completion', got a NUL at character 1"),
    (b'{"prompt": "a", "completion": "b", "x": ' + b"[" * 60 + b"]" * 60 + b"}", r"at most 50 levels under 'x"),
    (b'{"prompt": "a", "completion": ' + b"[" * 100_000, r"at most 50 levels, got deeper nesting"),
    (b'{"prompt": "a", "completion": ' + b"7" * 5000 + b"}", r"at most 400 digits under 'completion', got 5000"),
    (b'{"prompt": "a", "completion": "b", "x": 1e999}', r"a finite number under 'x', got 1e999"),
    (b'{"prompt": "a", "completion": NaN}', r"JSON under 'completion', got NaN"),
    (b'{"prompt": "a", "completion": "b", "x": [-Infinity]}', r"JSON under 'x\[0\]', got -Infinity"),
    (b'{"prompt": "a", "prompt": "c", "completion": "b"}', r"the key 'prompt' once, got it twice"),
    (b'{"prompt": "a", "completion": "b", "x": {"y": 1, "y": 1}}', r"the key 'y' once, got it twice"),
    (b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}', r"a byte order mark: two files were joined"),
    (b'{"prompt": "a\x00", "completion": "b"}', r"text in UTF-8, got a NUL byte"),
    (b'{"prompt": "\xff", "completion": "b"}', r"text in UTF-8, got byte 0xff"),
    (b'{"prompt": "a", "completion": null}', r"text under 'completion', got None"),
    (b'{"prompt": "a", "completion": ["b"]}', r"text under 'completion', got \['b'\]"),
    (b'{"prompt": {}, "completion": "b"}', r"text under 'prompt', got {}"),
    (b'{"prompt": "a", "completion": ""}', r"text under 'completion', got ''"),
    (b'{"prompt": "a"}', r"text under 'completion', got nothing"),
    (b'"prompt"', r"text under 'prompt', got nothing"),
    (b"[]", r"text under 'prompt', got nothing"),
    (b'{"prompt": "a", "completion": "b"} {}', r"a JSON object, got more after it: ' {}'"),
    (b'{"prompt": "a", "completion": "b"', r"a JSON object, got '.*' at column 34 \(expecting ',' delimiter\)"),
    (b'{"prompt": "a", "completion": "b", }', r"a JSON object, got .*\. Delete the comma after the last entry\."),
    (b'{"prompt": "a\x1b[2J", "completion": "b"}', r"a JSON object, got .* at column 14 \(invalid control character\)"),
    (b'{"prompt": "' + b"a" * 2**24 + b'", "completion": "b"}', r"a line of at most 16777216 characters"),
    (b'{"prompt": "a", "completion": "' + b"b" * 20_000 + b'"}', r"at most 2048 tokens with.*, got 20002"),
]


def test_a_row_that_cannot_be_used_is_named_by_file_line_and_field(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for row, says in WRONG_ROWS:
        path.write_bytes(GOOD + b"\n" + row + b"\n" + GOOD)
        message = refusal("sft", path)
        assert message.startswith(f"{path}:3: expected ") and re.search(says, message), (row[:80], message)


OTHER_FILES: list[tuple[bytes, str]] = [
    (b"", "at least 2 rows, got 0"),
    (b"\n \n", "at least 2 rows, got 0"),
    (b"\xef\xbb\xbf", "at least 2 rows, got 0"),
    (b"[]", "at least 2 rows, got 0"),
    (b"[{}", "rows:1: expected ',' or ']' after the row, got the end of the file"),
    (b"[", "rows:1: expected a JSON object"),
    (b'[{"text": "a"},\n]', "rows:2: expected a row after ',', got ']'. Delete the comma after the last row."),
    (b'[{"text": "a"}] {}', "the end of the file after the array"),
    (b'{\n "data": [{"text": "a"}]\n}', "one object over many lines. Write its list as rows: python -c"),
    (b'{\n "rows": [{"text": "a"}]\n}', "['rows']]"),
    (b"prompt,completion\na,b\n", "CSV is read if the name ends in .csv"),
    (b"Once upon a time.\nThe end.\n", "Convert plain text: python -c"),
    (b"PAR1....", "a whole Parquet file, got"),
    (b"ARROW1", "a whole Arrow file, got"),
    (b"\xff\xff\xff\xff\x10", "a whole Arrow file, got"),
    (gzip.compress(GOOD, mtime=0), "a gzip file. Unpack it: gunzip -k"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet. Unpack it (unzip"),
    (b"\x80\x04\x95", "a pickle"),
    (b"\x89PNG\r\n", "an image. The model reads text only"),
    ("text".encode("utf-16"), "text in UTF-16. Convert it: iconv"),
    (b"h\x00e\x00", "a NUL byte (byte 1)"),
]


def test_a_file_of_another_kind_is_named_with_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    for content, says in OTHER_FILES:
        path.write_bytes(content)
        assert says in refusal("sft", path), content


def test_a_folder_a_device_and_a_missing_file_are_named(tmp_path: Path) -> None:
    assert "which is a folder. It is empty." in refusal("sft", tmp_path)
    (tmp_path / "train.jsonl").touch()
    assert "which is a folder. Name one of its files ('train.jsonl', ...)." in refusal("sft", tmp_path)
    assert "No such file" in refusal("sft", tmp_path / "none")
    if sys.platform != "win32":
        assert "which is a pipe or a device" in refusal("sft", Path("/dev/zero"))


WRONG_TABLES: list[tuple[str, str]] = [
    ("prompt,completion\na,b\nc\n", ":3: expected 2 columns, got 1. The columns are 'prompt', 'completion'"),
    ("prompt,prompt\na,b\n", ":1: expected a name for each column, once"),
    ('prompt,completion\na,"b\n', ":2: expected a row of CSV, got a damaged one (unexpected end of data)"),
    ('prompt,completion\na,"b"c\n', ":2: expected a row of CSV"),
    ('prompt,completion\n"x\ny",b\na,\n', ":4: expected text under 'completion', got ''"),
    (
        "prompt,completion\na," + "b" * 2**24 + "b\n",
        ":2: expected a row of CSV, got a damaged one (field larger than field limit",
    ),
]


def test_a_table_that_cannot_be_used_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    for content, says in WRONG_TABLES:
        path.write_text(content)
        assert says in refusal("sft", path), content[:80]


def test_a_table_with_another_separator_gets_a_command_that_works(tmp_path: Path) -> None:
    """Its first line is one name with the separator in it. A table of one column has no such sign."""
    for name, separator, wanted in (("rows.csv", ";", ","), ("it's.csv", "\t", ","), ("rows.tsv", ",", "\t")):
        path = tmp_path / name
        path.write_text(f'prompt{separator}completion\né{separator}"b;,|"\n', encoding="utf-8")
        says = refusal("sft", path)
        assert f":1: expected columns with {wanted!r} between them, got 'prompt" in says, says
        assert f"The separator is {separator!r}." in says
        command = says[says.index("PYTHONIOENCODING") :].replace("python -c", f"{sys.executable} -c")
        subprocess.run(command, shell=True, cwd=tmp_path, check=True)
        (row,) = files.read_rows(str(tmp_path / f"separated{path.suffix}"))
        assert row.fields == {"prompt": "é", "completion": "b;,|"}
    for header, fields in (("text", {"text": "a;b"}), ('"a,b"', {"a,b": "a;b"})):
        (tmp_path / "one.csv").write_text(f"{header}\na;b\n")
        assert [row.fields for row in files.read_rows(str(tmp_path / "one.csv"))] == [fields]


def test_a_converted_table_is_named_as_a_table(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    for encoding in ("utf-16", "latin1"):
        path.write_bytes("prompt,completion\né,b\n".encode(encoding))
        assert "' > rows.csv" in refusal("sft", path), encoding


def test_a_cell_of_a_table_may_be_as_long_as_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"prompt,completion\na,{'b' * 200_000}\nc,d\n")
    assert [len(row.fields["completion"]) for row in files.read_rows(str(path))] == [200_000, 1]


def test_the_answers_of_a_chat_are_held_out_together(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": r, "content": f"{i} {j}"} for j in range(4) for r in ("user", "assistant")]}
        for i in range(20)
    ]
    task = load("sft", written(tmp_path / "rows.jsonl", rows))
    assert len(task.held_out) == 2 and len(task.train) == 18
    chats = [{texts(e)[0].split()[1] for e in part} for part in (task.train, task.held_out)]
    assert len(chats[1]) == 2 and not chats[0] & chats[1]


def test_of_chats_with_many_answers_no_more_than_the_limit_are_held_out_and_none_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that writes earlier answers in another way gives a sequence for each answer."""
    from small_tokenizers import THINKS, byte_pairs

    monkeypatch.setattr(tasks, "MAX_HELD_OUT", 8)
    turns = [{"role": r, "content": f"{j}"} for j in range(3) for r in ("user", "assistant")]
    rows = [{"messages": [{"role": "system", "content": f"{i}"}, *turns]} for i in range(40)]
    path = written(tmp_path / "rows.jsonl", rows)
    task = tasks.load(str(path), Renderer(byte_pairs(THINKS)), Demonstration)
    assert len(task.held_out) == 6 and len(task.held_out) + len(task.train) == 120


def test_rows_longer_than_the_limit_are_said_at_once(tmp_path: Path) -> None:
    """12 rows of 20 kB: 200 s of silence before. All are counted, and the limit that reads them is named."""
    rows = [{"prompt": f"{i:02}", "completion": "x" * (20_000 + i)} for i in range(12)]
    path = written(tmp_path / "rows.jsonl", rows)
    message = refusal("sft", path)
    assert "got 20003, and 11 longer rows after it" in message and "--max-length 20014" in message
    assert len(load("sft", path, max_length=20_014).train) == 11
    assert len(load("sft", path, max_length=20_014).train[0].tokens) > 20_000


def test_longer_rows_are_left_out_only_if_asked_for_and_counted(tmp_path: Path) -> None:
    """Ten rows of 12 to 21 tokens, then three that are equal to some of them; 5 are longer than 17 tokens."""
    rows = [{"text": "x" * (10 + i)} for i in range(10)] + [{"text": "x" * (10 + i)} for i in (0, 0, 9)]
    path = written(tmp_path / "rows.jsonl", rows)
    assert "rows.jsonl:7: expected at most 17 tokens with its prompt, got 18, and 4 longer rows" in refusal(
        "sft", path, max_length=17
    )
    task = load("sft", path, max_length=17, drop_longer=True)
    assert sorted(len(each.tokens) for each in task.train + task.held_out) == [12, 13, 14, 15, 16, 17]
    assert task.note == (
        "13 rows of text, up to 17 tokens; 1 held out; 5 rows longer than 17 tokens left out; "
        "2 rows equal to others left out"
    )
    assert "of at most 11 tokens" in refusal("sft", path, max_length=11, drop_longer=True)


def test_numbers_of_answers_are_read_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": 0.50}\n{"prompt": "b", "answer": 12345678901234567890123}\n')
    assert examples(load("grpo", path)) == {("a", "0.50"), ("b", "12345678901234567890123")}


def test_the_longest_answer_of_all_rows_sets_the_length_of_samples(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "answer": "x" * (40 if i == 700 else 2)} for i in range(1000)]
    task = load("grpo", written(tmp_path / "rows.jsonl", rows))
    assert max(len(p.answer) for p in task.train + task.held_out) == 40
    assert len(tasks.arithmetic(BYTES).train) == 610
