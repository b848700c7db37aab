"""10,000 mutated rows: each file is read whole, or refused in one line that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from small_tokenizers import TOOLS, byte_pairs
from test_formats import BYTES, CHAT, FIVE, FOUR, HH, SHAREGPT, USER, load

from lossfns import LossInputError
from lossfns.train.examples import Demonstration, Example, Labelled, Preference, Problem, sequences
from lossfns.train.render import Renderer

CALL = {"id": "7", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
CALLED = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
    {"role": "tool", "content": "4"},
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "required": ["a"]}}}
SEEDS: list[tuple[Any, list[Any]]] = [
    (Demonstration, [{"prompt": "2+2=", "completion": "4", "meta": {"id": 7, "tags": ["x", None, 1.5]}}]),
    (Demonstration, [{"messages": CHAT}, {"messages": [*CALLED, FOUR], "tools": [TOOL]}]),
    (
        Demonstration,
        [{"conversations": SHAREGPT, "system": "Add."}, {"instruction": "2+2", "output": "c"}],
    ),
    (Preference, [{"prompt": "2+2=", "chosen": "4", "rejected": "5"}, {"chosen": HH + " 4", "rejected": HH + " 5"}]),
    (Preference, [{"prompt": [USER], "chosen": [USER, FOUR], "rejected": [USER, FIVE]}]),
    (
        Labelled,
        [{"prompt": "2+2=", "completion": "4", "label": True}, {"prompt": [USER], "completion": [FOUR], "label": 0}],
    ),
    (Problem, [{"prompt": "2+2=", "answer": 4}, {"question": "2+2", "answer": "so #### 4"}, {"messages": CHAT}]),
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


@pytest.mark.parametrize(
    "count", [pytest.param(400, marks=pytest.mark.repeated), pytest.param(10_000, marks=pytest.mark.exhaustive)]
)
def test_mutated_rows_give_nothing_but_named_errors(count: int, tmp_path: Path) -> None:
    """What is read can be encoded and has tokens to train on, or an answer. Half of the files meet a chat template."""
    rng, read, refused = Random(count), 0, 0
    renderers, path = (BYTES, Renderer(byte_pairs(TOOLS))), tmp_path / "rows.jsonl"
    mutate: Callable[[list[Any], Random], bytes]
    for number in range(count):
        kind, rows = rng.choice(SEEDS)
        rows = [rng.choice(rows)] * 2
        rows = [json.loads(json.dumps(row).replace("2+2", f"{i}+2")) for i, row in enumerate(rows)]
        mutate = rng.choice([mutated_bytes, mutated_values])
        path.write_bytes(mutate(rows, rng))
        try:
            task = load(kind, path, rng.choice(renderers))
        except LossInputError as error:
            message = str(error)
            assert message.isprintable() and len(message) < 1000, (number, message)
            assert message.startswith((f"{path}:", "--data: ")), (number, message)
            refused += 1
        else:
            assert task.train and task.held_out and all(map(usable, task.train)), number
            read += 1
    assert read > count // 20 and refused > count // 5
