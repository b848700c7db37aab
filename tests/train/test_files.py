"""Files of rows: every row that cannot be used is named with file, line and field; the usual formats are read."""

import gzip
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lossfns import LossInputError
from lossfns.backend import ByteTokenizer
from lossfns.train import tasks
from lossfns.train.examples import Example, Problem, prompt_of, sequences
from lossfns.train.options import Options
from lossfns.train.recipes import METHODS, complete_options
from lossfns.train.render import Renderer
from lossfns.train.tasks import Task

BYTES = Renderer(ByteTokenizer())


def load(method: str, path: Path, **more: Any) -> Task[Any]:
    options: Options = complete_options({"method": method, "data": str(path), **more})
    return METHODS[method].task(options, BYTES)


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


@pytest.mark.parametrize(
    ("row", "says"),
    [
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
        (b'{"prompt": "a", "completion": "b"', r"a JSON object, got Expecting ',' delimiter"),
        (b'{"prompt": "a\x1b[2J", "completion": "b"}', r"a JSON object, got Invalid control character"),
        (b'{"prompt": "' + b"a" * 2**24 + b'", "completion": "b"}', r"a line of at most 16777216 characters"),
        (b'{"prompt": "a", "completion": "' + b"b" * 20_000 + b'"}', r"at most 2048 tokens with.*, got 20002"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_file_line_and_field(row: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + row + b"\n" + GOOD)
    message = refusal("sft", path)
    assert message.startswith(f"{path}:3: expected ") and re.search(says, message), message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "at least 2 rows, got 0"),
        (b"\n \n", "at least 2 rows, got 0"),
        (b"\xef\xbb\xbf", "at least 2 rows, got 0"),
        (b"[]", "at least 2 rows, got 0"),
        (b"[{}", "rows:1: expected ',' or ']' after the row, got the end of the file"),
        (b"[", "rows:1: expected a JSON object"),
        (b'[{"text": "a"},\n]', "rows:2: expected a JSON object"),
        (b'[{"text": "a"}] {}', "the end of the file after the array"),
        (b'{\n "data": [{"text": "a"}]\n}', "one object over many lines. Write its list as rows: python -c"),
        (b'{\n "rows": [{"text": "a"}]\n}', "['rows']]"),
        (b"prompt,completion\na,b\n", "CSV is read if the name ends in .csv"),
        (b"Once upon a time.\nThe end.\n", "Convert plain text: python -c"),
        (b"PAR1....", "a Parquet file. Convert it: python -c"),
        (b"ARROW1", "an Arrow file. Convert it: python -c"),
        (gzip.compress(GOOD, mtime=0), "a gzip file. Unpack it: gunzip -k"),
        (b"PK\x03\x04", "a zip archive or a spreadsheet. Unpack it (unzip"),
        (b"\x80\x04\x95", "a pickle"),
        (b"\x89PNG\r\n", "an image. The model reads text only"),
        ("text".encode("utf-16"), "text in UTF-16. Convert it: iconv"),
        (b"h\x00e\x00", "a NUL byte (byte 1)"),
    ],
)
def test_a_file_of_another_kind_is_named_with_a_recipe(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(content)
    assert says in refusal("sft", path)


def test_a_folder_a_device_and_a_missing_file_are_named(tmp_path: Path) -> None:
    assert "which is a folder. It is empty." in refusal("sft", tmp_path)
    (tmp_path / "train.jsonl").touch()
    assert "which is a folder. Name one of its files ('train.jsonl', ...)." in refusal("sft", tmp_path)
    assert "No such file" in refusal("sft", tmp_path / "none")
    if sys.platform != "win32":
        assert "which is a pipe or a device" in refusal("sft", Path("/dev/zero"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("prompt,completion\na,b\nc\n", ":3: expected 2 columns, got 1. The columns are 'prompt', 'completion'"),
        ("prompt,prompt\na,b\n", ":1: expected a name for each column, once"),
        ('prompt,completion\na,"b\n', ":2: expected a row of CSV, got unexpected end of data"),
        ('prompt,completion\na,"b"c\n', ":2: expected a row of CSV"),
        ('prompt,completion\n"x\ny",b\na,\n', ":4: expected text under 'completion', got ''"),
        (
            "prompt,completion\na," + "b" * 200_000 + "\n",
            ":2: expected a row of CSV, got field larger than field limit",
        ),
    ],
)
def test_a_table_that_cannot_be_used_is_named_by_its_line(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(content)
    assert says in refusal("sft", path)


CHAT = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3+3"},
    {"role": "assistant", "content": "6"},
]
TURNS = {("system: Add.\nuser: 2+2\nassistant: ", "4")}
BOTH = {("system: Add.\nuser: 2+2\nassistant: ", "4\nuser: 3+3\nassistant: 6")}
LATER = {("system: Add.\nuser: 2+2\nassistant: 4\nuser: 3+3\nassistant: ", "6")}
USER, FOUR, FIVE = CHAT[1], CHAT[2], {"role": "assistant", "content": "5"}
SHAREGPT = [{"from": "human", "value": "2+2"}, {"from": "gpt", "value": "4"}]
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: 2+2\n\nAssistant:"
HI = "user: hi\nassistant: hello\nuser: 2+2\nassistant: "
ASKED = "user: 2+2\nassistant: "

FORMATS: list[tuple[str, str, dict[str, Any], set[tuple[str, ...]]]] = [
    ("sft", "prompt and completion", {"prompt": "2+2=", "completion": "4"}, {("2+2=", "4")}),
    ("sft", "prompt and completion", {"prompt": "2+2=", "completion": 4.50}, {("2+2=", "4.5")}),
    ("sft", "prompt and completion", {"prompt": [USER], "completion": [FOUR]}, {(ASKED, "4")}),
    ("sft", "prompt and completion", {"prompt": [USER], "completion": "4"}, {(ASKED, "4")}),
    ("sft", "messages", {"messages": CHAT}, BOTH),
    ("sft", "messages", {"messages": [USER, FOUR | {"content": [{"type": "text", "text": "4"}]}]}, {(ASKED, "4")}),
    ("sft", "ShareGPT conversations", {"conversations": SHAREGPT}, {(ASKED, "4")}),
    ("sft", "ShareGPT conversations", {"conversations": SHAREGPT, "system": "Add."}, TURNS),
    ("sft", "Alpaca instructions", {"instruction": "Add", "input": "2+2", "output": "4"},
     {("user: Add\n2+2\nassistant: ", "4")}),
    ("sft", "Alpaca instructions", {"instruction": "2+2", "input": "", "output": "4"}, {(ASKED, "4")}),
    ("sft", "question and answer", {"question": "2+2", "answer": "add #### 4"}, {(ASKED, "add #### 4")}),
    ("sft", "text", {"text": "2+2=4"}, {("", "2+2=4")}),
    ("dpo", "prompt, chosen and rejected", {"prompt": "2+2=", "chosen": "4", "rejected": 5}, {("2+2=", "4", "5")}),
    ("dpo", "prompt, chosen and rejected", {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]},
     {(ASKED, "4", "5")}),
    ("orpo", "prompt, chosen and rejected", {"prompt": "2+2", "chosen": [USER, FOUR], "rejected": [USER, FIVE]},
     {(ASKED, "4", "5")}),
    ("dpo", "prompt, chosen and rejected", {"prompt": [USER], "chosen": [USER, FOUR], "rejected": [USER, FIVE]},
     {(ASKED, "4", "5")}),
    ("dpo", "prompt, chosen and rejected", {"prompt": [USER], "chosen": "4", "rejected": "5"}, {(ASKED, "4", "5")}),
    ("dpo", "chosen and rejected with a common start",
     {"chosen": [USER, FOUR], "rejected": [USER, FIVE]}, {(ASKED, "4", "5")}),
    ("dpo", "chosen and rejected with a common start", {"chosen": HH + " 4", "rejected": HH + " 5"}, {(HI, "4", "5")}),
    ("grpo", "prompt and answer", {"prompt": "2+2=", "answer": 4}, {("2+2=", "4")}),
    ("grpo", "prompt and answer", {"prompt": [USER], "answer": "4"}, {(ASKED, "4")}),
    ("grpo", "question and answer", {"question": "2+2", "answer": "It is <<2+2=4>>4.\n#### 1,004"}, {(ASKED, "1004")}),
    ("dapo", "messages", {"messages": CHAT}, LATER),
    ("grpo", "ShareGPT conversations", {"conversations": SHAREGPT}, {(ASKED, "4")}),
    ("gspo-token", "Alpaca instructions", {"instruction": "2+2", "output": "4"}, {(ASKED, "4")}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "name", "row", "expected"), FORMATS)
def test_the_usual_formats_are_read(
    method: str, name: str, row: dict[str, Any], expected: set[tuple[str, ...]], tmp_path: Path
) -> None:
    """As JSONL and as a JSON array; texts also as CSV. A second row makes the file long enough."""
    second = json.loads(json.dumps(row).replace("2+2", "1+1"))
    task = load(method, written(tmp_path / "rows.jsonl", [row, second]))
    assert expected <= examples(task) and f"2 rows of {name}" in task.note
    (tmp_path / "rows.json").write_text(json.dumps([row, second], indent=1))
    assert examples(load(method, tmp_path / "rows.json")) == examples(task)
    if all(isinstance(value, str) for value in row.values()):
        import csv

        with (tmp_path / "rows.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader(), writer.writerows([row, second])
        assert examples(load(method, tmp_path / "rows.csv")) == examples(task)


@pytest.mark.parametrize(
    ("method", "row", "says"),
    [
        (
            "sft",
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "prompt, chosen and rejected, which preference methods (dpo, orpo) read",
        ),
        ("dpo", {"messages": [USER, FOUR]}, "of the format messages, which supervised methods (sft) read"),
        ("sft", {"query": "a", "reply": "b"}, "The row has 'query', 'reply'. This method reads prompt, completion;"),
        ("sft", {"query": "a", "reply": "b"}, "jq -c '{prompt: .FIELD, completion: .FIELD}'"),
        ("sft", {"prompt": "a", "completion": "b", "label": True}, "a label, which losses of unpaired preference read"),
        ("sft", {"prompt": "a", "completion": "b", "images": ["x.png"]}, "got 'images', which are not read"),
        ("sft", {"messages": [USER, FOUR], "tools": [{"name": "add"}]}, "got tools: the model has no chat template"),
        (
            "sft",
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [1]}]},
            "'messages[1].tool_calls[0]', got 1",
        ),
        ("sft", {"messages": [USER, {"role": "tool", "content": "4"}, FOUR]}, "a result of a tool: the model has no"),
        ("sft", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, FOUR]}, "parts that are no text"),
        ("sft", {"messages": [USER]}, "an answer of the assistant under 'messages' that is trained, got none"),
        ("sft", {"messages": []}, "a list of messages under 'messages', got []"),
        ("sft", {"messages": "hello"}, "a list of messages under 'messages', got 'hello'"),
        ("sft", {"messages": [USER, 3]}, "a message under 'messages[1]', got 3"),
        ("sft", {"messages": [{"role": "wizard", "content": ""}]}, "under 'messages[0].role', got 'wizard'"),
        ("sft", {"messages": [{"content": "x"}]}, "under 'messages[0].role', got nothing"),
        ("sft", {"messages": [USER, {"role": "assistant"}]}, "text under 'messages[1].content', got nothing"),
        ("sft", {"messages": [USER, FOUR | {"content": ""}]}, "text in each answer under 'messages', got ''"),
        ("dpo", {"chosen": "4", "rejected": "5"}, "a dialogue of 'Human:' and 'Assistant:' under 'chosen', got '4'"),
        ("dpo", {"chosen": HH + " 4", "rejected": HH[:-16] + "3+3\n\nAssistant: 5"}, "got a message of the user"),
        ("dpo", {"chosen": HH, "rejected": HH + " 5"}, "text in each answer under 'chosen'"),
        ("dpo", {"prompt": "a", "chosen": [USER, FOUR], "rejected": [USER, FIVE]}, "got others. Leave out one"),
        ("dpo", {"chosen": [USER, FOUR], "rejected": [FIVE]}, "an answer under 'chosen' after the messages"),
        ("sft", {"data": [{"text": "a"}], "n": 1}, "open('"),
        ("sft", {"data": [{"text": "a"}], "n": 1}, "['data']]\" > rows.jsonl"),
        ("sft", {"k" * 5000: "a"}, "text under 'prompt', got nothing"),
        ("grpo", {"question": "a", "answer": "b ####"}, "an answer after '####' under 'answer', got nothing"),
    ],
)
def test_a_format_that_is_not_read_is_recognised_and_named(
    method: str, row: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "rows.jsonl", [row, row])
    message = refusal(method, path)
    assert message.startswith(f"{path}:1: expected ") and says in message, message


def test_the_answers_of_a_chat_are_held_out_together(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": r, "content": f"{i} {j}"} for j in range(4) for r in ("user", "assistant")]}
        for i in range(20)
    ]
    task = load("sft", written(tmp_path / "rows.jsonl", rows))
    assert len(task.held_out) == 2 and len(task.train) == 18
    chats = [{texts(e)[0].split()[1] for e in part} for part in (task.train, task.held_out)]
    assert len(chats[1]) == 2 and not chats[0] & chats[1]


def test_of_chats_with_many_answers_no_more_than_the_limit_are_held_out_and_none_is_lost(tmp_path: Path) -> None:
    turns = [{"role": r, "content": f"{j}"} for j in range(30) for r in ("user", "assistant")]
    rows = [{"messages": [{"role": "system", "content": f"{i}"}, *turns]} for i in range(300)]
    task = load("sft", written(tmp_path / "rows.jsonl", rows))
    assert len(task.held_out) == 30 and len(task.held_out) + len(task.train) == 300


def test_rows_longer_than_the_limit_are_said_at_once(tmp_path: Path) -> None:
    """12 rows of 20 kB: 200 s of silence before. All are counted, and the limit that reads them is named."""
    rows = [{"prompt": f"{i:02}", "completion": "x" * (20_000 + i)} for i in range(12)]
    path = written(tmp_path / "rows.jsonl", rows)
    message = refusal("sft", path)
    assert "got 20003, and 11 longer rows after it" in message and "--max-length 20014" in message
    assert len(load("sft", path, max_length=20_014).train) == 11
    assert len(load("sft", path, max_length=20_014).train[0].tokens) > 20_000


# 10,000 mutated rows

SEEDS: list[tuple[str, list[Any]]] = [
    ("sft", [{"prompt": "2+2=", "completion": "4", "meta": {"id": 7, "tags": ["x", None, 1.5]}}]),
    ("sft", [{"messages": CHAT}]),
    ("sft", [{"conversations": SHAREGPT, "system": "Add."}, {"instruction": "a", "input": "b", "output": "c"}]),
    ("dpo", [{"prompt": "2+2=", "chosen": "4", "rejected": "5"}, {"chosen": HH + " 4", "rejected": HH + " 5"}]),
    ("dpo", [{"prompt": [USER], "chosen": [USER, FOUR], "rejected": [USER, FIVE]}]),
    ("grpo", [{"prompt": "2+2=", "answer": 4}, {"question": "2+2", "answer": "so #### 4"}]),
]
TOKENS = [
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\n", b"\r", b"\0", b"\xff", b"\xef\xbb\xbf", b"\x1b[2J"),
    *(
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"null",
        b"true",
        b"{}",
        b"[]",
        b"7" * 5000,
        b"[" * 3000,
        b"0x1",
        b"-",
        b"\xe2\x80",
    ),
    *(rb"\ud83d", rb"\udc00", rb"\u0000", rb"\uZZZZ", b'"prompt":1,', b'"role":"tool",', b'"images":["x"],', b"####"),
]
VALUES: list[Any] = [None, True, 0, -1.5, "", "x", [], {}, [[]], {"role": "assistant"}, [1], "\0", "\ud800", 10**30]


def mutated_bytes(rows: list[Any], rng: Random) -> bytes:
    """Change the text of a file in one to three places."""
    content = bytearray(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(content) + 1)
        until = min(len(content), at + rng.choice([0, 0, 1, 3, 20]))
        content[at:until] = rng.choice([b"", *TOKENS])
    return bytes(content)


def mutated_values(rows: list[Any], rng: Random) -> bytes:
    """Replace, delete or add a value anywhere in a row."""
    rows = json.loads(json.dumps(rows))
    inner: list[Any] = [rng.choice(rows)]
    while rng.random() < 0.6 and any(isinstance(x, (dict, list)) and x for x in contents(inner[-1])):
        inner.append(rng.choice([x for x in contents(inner[-1]) if isinstance(x, (dict, list)) and x]))
    place = inner[-1]
    key = rng.choice(list(place) if isinstance(place, dict) else list(range(len(place))))
    if rng.random() < 0.2:
        del place[key]
    else:
        place[key] = rng.choice(VALUES)
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def contents(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def usable(example: Example) -> bool:
    """Whether an example has tokens to read and tokens to train on, or an answer."""
    if isinstance(example, Problem):
        return bool(example.prompt and (example.answer or "answer" not in example.fields))
    return all(len(each.tokens) == len(each.weights) and any(each.weights[1:]) for each in sequences(example))


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.exhaustive)])
def test_mutated_rows_give_nothing_but_named_errors(count: int, tmp_path: Path) -> None:
    """Each file is read whole, or refused in one line with its path; what is read can be encoded and is not empty."""
    rng, read, refused = Random(count), 0, 0
    mutate: Callable[[list[Any], Random], bytes]
    for number in range(count):
        method, rows = rng.choice(SEEDS)
        rows = [rng.choice(rows)] * 2
        rows = [json.loads(json.dumps(row).replace("2+2", f"{i}+2")) for i, row in enumerate(rows)]
        mutate = rng.choice([mutated_bytes, mutated_values])
        path = tmp_path / "rows.jsonl"
        path.write_bytes(mutate(rows, rng))
        try:
            task = load(method, path)
        except LossInputError as error:
            message = str(error)
            assert message.isprintable() and len(message) < 1000, (number, message)
            assert message.startswith((f"{path}:", "--data: ")), (number, message)
            refused += 1
        else:
            assert task.train and task.held_out and all(map(usable, task.train))
            read += 1
    assert read > count // 20 and refused > count // 5


def test_numbers_of_answers_are_read_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": 0.50}\n{"prompt": "b", "answer": 12345678901234567890123}\n')
    assert examples(load("grpo", path)) == {("a", "0.50"), ("b", "12345678901234567890123")}


def test_the_longest_answer_of_all_rows_sets_the_length_of_samples(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "answer": "x" * (40 if i == 700 else 2)} for i in range(1000)]
    task = load("grpo", written(tmp_path / "rows.jsonl", rows))
    assert max(len(p.answer) for p in task.train + task.held_out) == 40
    assert len(tasks.arithmetic(BYTES).train) == 610
