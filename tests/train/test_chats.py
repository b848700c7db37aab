"""``examples/chats.py``: its files are what ``lossfns train`` reads, and two calls write the same."""

import json
from pathlib import Path

import pytest

from lossfns.backend import ByteTokenizer
from lossfns.loading import from_file
from lossfns.train import tasks
from lossfns.train.examples import Demonstration, Preference, Problem
from lossfns.train.render import Renderer

chats = from_file(str(Path(__file__).parents[2] / "examples" / "chats.py"))


def test_the_files_are_read_and_repeat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    renderer = Renderer(ByteTokenizer())
    for folder in ("a", "b"):
        chats.main(tmp_path / folder)
    for name, kind in {"python": Demonstration, "concise": Preference, "larger": Problem, "sums": Problem}.items():
        path = tmp_path / "a" / f"{name}.jsonl"
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), name
        task = tasks.load(str(path), renderer, kind)
        assert len(task.train) > 300 and len(task.held_out) >= 40, name
        questions = [row.get("prompt", row.get("messages"))[-1 if "prompt" in row else 0]["content"]
                     for row in map(json.loads, path.read_text().splitlines())]  # fmt: skip
        assert len(set(questions)) == len(questions), name
    for row in map(json.loads, (tmp_path / "a" / "concise.jsonl").read_text().splitlines()):
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert chosen in rejected and len(chosen) < len(rejected)


def test_the_reward_takes_the_first_number() -> None:
    problem = Problem([1], "22", {})
    rewards = {"22 is larger than 13.": 1, "13 is larger than 22.": 0, "It is 22": 1, "220": 0, "none": 0, "": 0}
    assert {text: chats.first_number(problem, text) for text in rewards} == rewards
