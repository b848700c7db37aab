"""Formats of rows: a small file of each, and a wrong one of each."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lossfns import LossInputError
from lossfns.backend import ByteTokenizer
from lossfns.train import tasks
from lossfns.train.examples import Demonstration, Example, Labelled, Preference, Problem, prompt_of, sequences
from lossfns.train.render import Renderer

BYTES = Renderer(ByteTokenizer())

Kind = type[Example]


def load(kind: Any, path: Path, renderer: Renderer = BYTES) -> tasks.Task[Any]:
    return tasks.load(str(path), renderer, kind)


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(example: Example, renderer: Renderer = BYTES) -> tuple[str, ...]:
    """The prompt, and the answer or what follows the prompt in each sequence; of labels, whether it is desirable."""
    prompt = renderer.decode(prompt_of(example))
    if isinstance(example, Problem):
        return prompt, str(example.answer)
    answers = tuple(renderer.decode(each.tokens).removeprefix(prompt) for each in sequences(example))
    return (prompt, *answers, *([str(example.desirable)] if isinstance(example, Labelled) else []))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Add."}
CHAT = [SYSTEM, user("2+2"), answer("4"), user("3+3"), answer("6")]
USER, FOUR, FIVE = user("2+2"), answer("4"), answer("5")
SHAREGPT = [{"from": "human", "value": "2+2"}, {"from": "gpt", "value": "4"}]
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: 2+2\n\nAssistant:"
HI = "user: hi\nassistant: hello\nuser: 2+2\nassistant: "
ASKED = "user: 2+2\nassistant: "
ADDED = "system: Add.\nuser: 2+2\nassistant: "
PARTS = [{"type": "text", "text": "4"}]

FORMATS: list[tuple[Kind, str, dict[str, Any], tuple[str, ...]]] = [
    (Demonstration, "prompt and completion", {"prompt": "2+2=", "completion": "4"}, ("2+2=", "4")),
    (Demonstration, "prompt and completion", {"prompt": "2+2=", "completion": 4.50}, ("2+2=", "4.5")),
    (Demonstration, "prompt and completion", {"prompt": "", "completion": "2+2=4"}, ("", "2+2=4")),
    (Demonstration, "prompt and completion", {"prompt": [USER], "completion": [FOUR]}, (ASKED, "4")),
    (Demonstration, "prompt and completion", {"prompt": [USER], "completion": "4"}, (ASKED, "4")),
    (Demonstration, "prompt and completion", {"prompt": CHAT[:3], "completion": CHAT[3:]},
     (ADDED + "4\nuser: 3+3\nassistant: ", "6")),
    (Demonstration, "messages", {"messages": CHAT}, (ADDED, "4\nuser: 3+3\nassistant: 6")),
    (Demonstration, "messages", {"messages": [USER, FOUR | {"content": PARTS}]}, (ASKED, "4")),
    (Demonstration, "messages", {"messages": [*CHAT[:2], FOUR | {"weight": 0}, *CHAT[3:]]},
     (ADDED + "4\nuser: 3+3\nassistant: ", "6")),
    (Demonstration, "messages", {"messages": [*CHAT[:4], FIVE | {"train": False}]}, (ADDED, "4")),
    (Demonstration, "ShareGPT conversations", {"conversations": SHAREGPT}, (ASKED, "4")),
    (Demonstration, "ShareGPT conversations", {"conversations": SHAREGPT, "system": "Add."}, (ADDED, "4")),
    (Demonstration, "Alpaca instructions", {"instruction": "Add", "input": "2+2", "output": "4"},
     ("user: Add\n2+2\nassistant: ", "4")),
    (Demonstration, "Alpaca instructions", {"instruction": "2+2", "input": "", "output": "4"}, (ASKED, "4")),
    (Demonstration, "question and answer", {"question": "2+2", "answer": "add #### 4"}, (ASKED, "add #### 4")),
    (Demonstration, "text", {"text": "2+2=4"}, ("", "2+2=4")),
    (Preference, "prompt, chosen and rejected", {"prompt": "2+2=", "chosen": "4", "rejected": 5}, ("2+2=", "4", "5")),
    (Preference, "prompt, chosen and rejected", {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]},
     (ASKED, "4", "5")),
    (Preference, "prompt, chosen and rejected", {"prompt": "2+2", "chosen": [USER, FOUR], "rejected": [USER, FIVE]},
     (ASKED, "4", "5")),
    (Preference, "prompt, chosen and rejected", {"prompt": [USER], "chosen": [USER, FOUR], "rejected": [USER, FIVE]},
     (ASKED, "4", "5")),
    (Preference, "prompt, chosen and rejected", {"prompt": [USER], "chosen": "4", "rejected": "5"}, (ASKED, "4", "5")),
    (Preference, "chosen and rejected with a common start", {"chosen": [USER, FOUR], "rejected": [USER, FIVE]},
     (ASKED, "4", "5")),
    (Preference, "chosen and rejected with a common start",
     {"chosen": [USER, FOUR, user("b"), FIVE], "rejected": [USER, FIVE]}, (ASKED, "4\nuser: b\nassistant: 5", "5")),
    (Preference, "chosen and rejected with a common start", {"chosen": HH + " 4", "rejected": HH + " 5"},
     (HI, "4", "5")),
    (Labelled, "prompt, completion and label", {"prompt": "2+2=", "completion": "4", "label": True},
     ("2+2=", "4", "True")),
    (Labelled, "prompt, completion and label", {"prompt": [USER], "completion": [FIVE], "label": 0},
     (ASKED, "5", "False")),
    (Labelled, "prompt, completion and label", {"prompt": "2+2=", "completion": "5", "label": "false"},
     ("2+2=", "5", "False")),
    (Problem, "prompt and answer", {"prompt": "2+2=", "answer": 4}, ("2+2=", "4")),
    (Problem, "prompt and answer", {"prompt": [USER], "answer": "4"}, (ASKED, "4")),
    (Problem, "question and answer", {"question": "2+2", "answer": "It is <<2+2=4>>4.\n#### 1,004"}, (ASKED, "1004")),
    (Problem, "messages", {"messages": CHAT}, (ADDED + "4\nuser: 3+3\nassistant: ", "6")),
    (Problem, "ShareGPT conversations", {"conversations": SHAREGPT}, (ASKED, "4")),
    (Problem, "Alpaca instructions", {"instruction": "2+2", "output": "4"}, (ASKED, "4")),
    (Problem, "prompt without an answer", {"prompt": "2+2="}, ("2+2=", "None")),
]  # fmt: skip


def test_the_usual_formats_are_read(tmp_path: Path) -> None:
    """As JSONL and as a JSON array; texts also as CSV. A second row makes the file long enough."""
    for kind, name, row, expected in FORMATS:
        rows = [row, json.loads(json.dumps(row).replace("2+2", "1+1"))]
        task = load(kind, written(tmp_path / "rows.jsonl", rows))
        found = {texts(each) for each in task.train + task.held_out}
        assert expected in found and len(found) == 2, (row, found)
        assert f"2 rows of {name}" in task.note and "not read" not in task.note, (row, task.note)
        assert all(isinstance(each, kind) for each in task.train + task.held_out), row
        (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
        again = load(kind, tmp_path / "rows.json")
        assert {texts(each) for each in again.train + again.held_out} == found, row
        if all(isinstance(value, str) for value in row.values()):
            with (tmp_path / "rows.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader(), writer.writerows(rows)
            again = load(kind, tmp_path / "rows.csv")
            assert {texts(each) for each in again.train + again.held_out} == found, row


TWICE = {"weight": 1, "train": False}
TOOL = {"name": "add"}


def called(arguments: str | None = None, **more: Any) -> dict[str, Any]:
    """A row with the call of a tool."""
    given = {} if arguments is None else {"arguments": arguments}
    return {"messages": [USER, answer(None, tool_calls=[{"function": {"name": "add", **given, **more}}])]}


WRONG: list[tuple[Kind, dict[str, Any], str]] = [
    (Demonstration, {"prompt": "a", "chosen": "b", "rejected": "c"},
     "prompt, chosen and rejected, which preference methods (dpo, orpo) read"),
    (Demonstration, {"query": "a", "reply": "b"}, "has 'query', 'reply'. Supervised methods (sft) read prompt,"),
    (Demonstration, {"promt": "a", "reply": "b"}, "Did you mean 'prompt' by 'promt'? Rename the fields, with your own "
     "in place of FIELD: jq -c '{prompt: .[\"promt\"], completion: .FIELD}'"),
    (Demonstration, {"promt": "a", "completion": "b"}, "Rename the fields: jq -c '{prompt: .[\"promt\"], completion}'"),
    (Demonstration, {"query": "a", "reply": "b"}, "jq -c '{prompt: .FIELD, completion: .FIELD}'"),
    (Demonstration, {"prompt": "a", "completion": "b", "label": True}, "a label, which losses of unpaired preference"),
    (Demonstration, {"prompt": "a", "completion": "b", "label": 0}, "a label, which losses of unpaired preference"),
    (Demonstration, {"prompt": "a", "completion": "b", "label": "bad"}, "without a label, got the label 'bad'"),
    (Demonstration, {"prompt": "a", "reply": "b"}, "jq -c '{prompt, completion: .FIELD}'"),
    (Demonstration, {"prompt": "a", "completion": "b", "images": ["x.png"]}, "got 'images', which are not read"),
    (Demonstration, {"prompt": "a", "completion": "b", "tools": [{"name": "add"}]}, "messages beside the tools, got"),
    (Demonstration, {"prompt": "a", "completion": [FOUR]}, "text under 'completion', got [{"),
    (Demonstration, {"prompt": [USER], "completion": [USER]}, "an answer of the assistant under 'completion' that is"),
    (Demonstration, {"messages": [USER, FOUR], "tools": [{"name": "add"}]}, "got tools: the model has no chat"),
    (Demonstration, {"messages": [USER, FOUR], "tools": "[{"}, "JSON under 'tools', got '[{'"),
    (Demonstration, {"messages": [USER, FOUR], "tools": [3]}, "a function under 'tools[0]', got 3"),
    (Demonstration, {"messages": [USER, answer(None, tool_calls=[1])]}, "under 'messages[1].tool_calls[0]', got 1"),
    (Demonstration, called("{"), "JSON under 'messages[1].tool_calls[0].arguments', got '{'"),
    (Demonstration, called('{"a": "\\ud800"}'), "under 'messages[1].tool_calls[0].arguments.a', got half a surrogate"),
    (Demonstration, called('{"a": "\\u0000"}'), "under 'messages[1].tool_calls[0].arguments.a', got a NUL"),
    (Demonstration, called('{"a": 1, "a": 2}'), "the key 'a' once under 'messages[1].tool_calls[0].arguments', got it"),
    (Demonstration, called('{"a": NaN}'), "JSON under 'messages[1].tool_calls[0].arguments.a', got NaN"),
    (Demonstration, called('{"a":' * 60 + "1" + "}" * 60), "at most 50 levels under 'messages[1]', got more"),
    (Demonstration, called(parameters={"a": 1}), "under 'messages[1].tool_calls[0].arguments', got nothing"),
    (Demonstration, {"messages": [USER, FOUR], "tools": [TOOL], "functions": [TOOL]}, "or 'functions', got both"),
    (Demonstration, {"messages": [USER, FOUR], "tools": "[]", "functions": [TOOL]}, "got tools: the model has no chat"),
    (Demonstration, {"messages": [USER | {"tool_calls": [{"name": "add"}]}, FOUR]}, "by the assistant under 'mess"),
    (Demonstration, {"messages": [USER, {"role": "tool", "content": "4"}, FOUR]}, "a result of a tool: the model has"),
    (Demonstration, {"messages": [user(None) | {"content": [{"type": "image_url"}]}, FOUR]}, "parts that are no text"),
    (Demonstration, {"messages": [USER, answer("") | {"content": [{"type": "thinking", "text": "x"}]}]}, "are no text"),
    (Demonstration, {"messages": [USER | {"images": ["x"]}, FOUR]}, "text only under 'messages[0]', got 'images'"),
    (Demonstration, {"messages": [USER]}, "an answer of the assistant under 'messages' that is trained, got none"),
    (Demonstration, {"messages": [USER, FOUR | {"weight": 0}]}, "under 'messages' that is trained, got none"),
    (Demonstration, {"messages": [USER, FOUR | {"weight": 2}]}, "from 0 to 1 under 'messages[1].weight', got 2"),
    (Demonstration, {"messages": [USER, FOUR | {"weight": 1e-50}]}, "0, or at least 1e-37, under 'messages[1].weight'"),
    (Demonstration, {"messages": [USER, FOUR | {"train": "no"}]}, "true or false under 'messages[1].train', got 'no'"),
    (Demonstration, {"messages": [USER, FOUR | TWICE]}, "one answer under 'messages[1].weight' and"),
    (Demonstration, {"messages": [USER | {"weight": 1}, FOUR]}, "weight 0 for the user under 'messages[0]', got 1"),
    (Demonstration, {"messages": [USER | {"name": [3]}, FOUR]}, "text under 'messages[0].name', got [3]"),
    (Demonstration, {"messages": []}, "a list of messages under 'messages', got []"),
    (Demonstration, {"messages": "hello"}, "a list of messages under 'messages', got 'hello'"),
    (Demonstration, {"messages": [USER, 3]}, "a message under 'messages[1]', got 3"),
    (Demonstration, {"messages": [{"role": "wizard", "content": ""}]}, "under 'messages[0].role', got 'wizard'"),
    (Demonstration, {"messages": [{"content": "x"}]}, "under 'messages[0].role', got nothing"),
    (Demonstration, {"messages": [USER, {"role": "assistant"}]}, "text under 'messages[1].content', got nothing"),
    (Demonstration, {"messages": [USER, answer("")]}, "text in each answer under 'messages', got ''"),
    (Demonstration, {"conversations": [{"from": "human"}]}, "text under 'conversations[0].value', got nothing"),
    (Demonstration, {"instruction": "a", "input": 3, "output": None}, "text under 'output', got None"),
    (Demonstration, {"question": None, "answer": "b"}, "text under 'question', got None"),
    (Demonstration, {"text": ""}, "text under 'text', got ''"),
    (Demonstration, {"data": [{"text": "a"}], "n": 1}, "['data']]\" > rows.jsonl"),
    (Demonstration, {"k" * 5000: "a"}, "text under 'prompt', got nothing"),
    (Preference, {"messages": [USER, FOUR]}, "of the format messages, which supervised methods (sft) read"),
    (Preference, {"prompt": "a", "completion": "b", "label": True}, "prompt, completion and label, which methods of"),
    (Preference, {"prompt": "a", "chosen": "b", "rejected": None}, "text under 'rejected', got None"),
    (Preference, {"prompt": "a", "chosen": [FOUR], "rejected": "b"}, "a list of messages under 'rejected', got 'b'"),
    (Preference, {"chosen": "4", "rejected": "5"}, "a dialogue of 'Human:' and 'Assistant:' under 'chosen', got '4'"),
    (Preference, {"chosen": HH + " 4", "rejected": HH[:-16] + "3+3\n\nAssistant: 5"}, "got a message of the user"),
    (Preference, {"chosen": HH, "rejected": HH + " 5"}, "text in each answer under 'chosen'"),
    (Preference, {"prompt": "a", "chosen": [USER, FOUR], "rejected": [USER, FIVE]}, "got others. Leave out one"),
    (Preference, {"prompt": "a", "chosen": [SYSTEM, FOUR], "rejected": [SYSTEM, FIVE]}, "got others. Leave out one"),
    (Preference, {"chosen": [USER, FOUR], "rejected": [FIVE]}, "an answer under 'chosen' after the messages"),
    (Preference, {"prompt": "a", "chosen": "b", "rejected": "b"}, "under 'chosen' and 'rejected', got equal ones"),
    (Preference, {"chosen": [USER, FOUR], "rejected": [USER, FOUR]}, "jq -c 'select(.chosen != .rejected)'"),
    (Preference, {"chosen": HH + " 4", "rejected": HH + " 4"}, "got equal ones"),
    (Labelled, {"prompt": "a", "completion": "b", "label": "good"}, "true or false under 'label', got 'good'"),
    (Labelled, {"prompt": "a", "completion": "b", "label": None}, "true or false under 'label', got None"),
    (Labelled, {"prompt": "a", "completion": "b"}, "text under 'label', got nothing"),
    (Problem, {"question": "a", "answer": "b ####"}, "an answer after '####' under 'answer', got nothing"),
    (Problem, {"prompt": "a", "answer": ""}, "text under 'answer', got ''"),
    (Problem, {"prompt": 3.5e999, "answer": "b"}, "under 'prompt', got"),
    (Problem, {"messages": [USER]}, "an answer of the assistant under 'messages', got none"),
    (Problem, {"text": "a"}, "of the format text, which supervised methods (sft) read"),
]  # fmt: skip


def test_fields_of_messages_that_are_not_read_are_named(tmp_path: Path) -> None:
    rows = [{"messages": [user(str(i)), FOUR | {"thinking": "hm", "refusal": None}], "id": i} for i in range(2)]
    assert load(Demonstration, written(tmp_path / "rows.jsonl", rows)).note.endswith(
        "; not read: 'id', 'messages[].thinking'"
    )
    later = [{"chosen": [USER, FOUR], "rejected": [USER, FIVE]}, {"prompt": "a", "chosen": [FOUR], "rejected": [FIVE]}]
    assert "not read" not in load(Preference, written(tmp_path / "rows.jsonl", later)).note


def test_a_row_that_a_format_cannot_use_is_named(tmp_path: Path) -> None:
    for kind, row, says in WRONG:
        path = written(tmp_path / "rows.jsonl", [row, row])
        with pytest.raises(LossInputError) as refused:
            load(kind, path)
        message = str(refused.value)
        assert message.startswith(f"{path}:1: expected ") and says in message, (row, message)
        assert message.isprintable() and len(message) < 1000, row
    path = written(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b", "answer": "c"}])
    with pytest.raises(LossInputError, match=r":2: expected a prompt without an answer, got one with"):
        load(Problem, path)


def test_tools_of_a_row_reach_the_template(tmp_path: Path) -> None:
    """OpenAI's calls with arguments as JSON text, an older call of a function, and ShareGPT's; tools as JSON text."""
    from small_tokenizers import TOOLS, byte_pairs

    renderer = Renderer(byte_pairs(TOOLS))
    tool = {"type": "function", "function": {"name": "add", "parameters": {"n": 1}}}
    call = {"id": "7", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    result = {"role": "tool", "tool_call_id": "7", "content": "4"}
    openai = [user("x"), answer(None, tool_calls=[call]), result, answer("four")]
    older = [user("x"), answer(None, function_call=call["function"]), result, answer("four")]
    talk = [
        ("human", "x"),
        ("function_call", '{"name": "add", "arguments": {"a": 2}}'),
        ("observation", "4"),
        ("gpt", "four"),
    ]
    rows: list[dict[str, Any]] = [
        {"messages": openai, "tools": [tool]},
        {"messages": older, "functions": [tool["function"]]},
        {"messages": openai, "tools": json.dumps([tool])},
        {"conversations": [{"from": role, "value": text} for role, text in talk], "tools": json.dumps([tool])},
    ]  # fmt: skip
    for row in rows:
        other = json.loads(json.dumps(row).replace("four", "five"))
        task = load(Demonstration, written(tmp_path / "rows.jsonl", [row, other]), renderer)
        example = next(e for e in task.train + task.held_out if "four" in renderer.decode(e.tokens))
        text = renderer.decode(example.tokens)
        trained = renderer.decode(token for token, weight in zip(example.tokens, example.weights) if weight)
        assert trained == '<call>add {"a": 2}</call>four', row
        assert '"parameters": {"n": 1}' in text and "4 from" in text, row
