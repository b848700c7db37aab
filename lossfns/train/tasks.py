"""Tasks: examples to train on and held-out examples, built in or from a JSONL file.

The built-in tasks need no download. They use the documentation that comes with CPython, and arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from random import Random
from typing import Generic, NamedTuple, TypeVar

from lossfns.backend.model.tokenizer import ByteTokenizer
from lossfns.errors import LossInputError

TOKENIZER = ByteTokenizer()
END = [TOKENIZER.eos_token_id]
"""Ends a completion, and starts a text that has no prompt."""

MAX_HELD_OUT = 400
"""The largest number of held-out examples. Passages are longer, so half as many are enough."""


class Demonstration(NamedTuple):
    prompt: list[int]
    completion: list[int]


class Preference(NamedTuple):
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class Problem(NamedTuple):
    prompt: list[int]
    answer: str


T = TypeVar("T", Demonstration, Preference, Problem)


@dataclass(frozen=True)
class Task(Generic[T]):
    """A task. ``draw(rng, n)`` returns n training examples; none of them is in ``held_out``."""

    name: str
    draw: Callable[[Random, int], list[T]]
    held_out: list[T]


# English: whole topics are held out


def corpus() -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Return the training topics and the held-out topics (one in six), as tokens by name.

    Topics quote one another at length. The paragraphs of held-out topics are therefore removed from all others.
    """
    names = sorted(name for name, text in topics.items() if len(text) > 600)
    Random(0).shuffle(names)
    held_out = names[: len(names) // 6]
    reserved = {normalized(p) for name in held_out for p in paragraphs(topics[name])}
    texts = {
        name: "\n\n".join(p for p in paragraphs(topics[name]) if normalized(p) not in reserved)
        for name in names[len(held_out) :]
    }
    train = {name: TOKENIZER.encode(text) for name, text in texts.items() if len(text) > 600}
    return train, {name: TOKENIZER.encode(topics[name]) for name in held_out}


def paragraphs(text: str) -> list[str]:
    return text.split("\n\n")


def normalized(paragraph: str) -> str:
    """Return the paragraph without its indentation and line breaks."""
    return " ".join(paragraph.split())


def documentation(length: int = 128) -> Task[Demonstration]:
    """Predict passages of CPython's documentation, byte by byte."""
    train, held_out = corpus()

    def draw(rng: Random, n: int) -> list[Demonstration]:
        return [Demonstration(END, passage(rng, train, length)) for _ in range(n)]

    rng = Random(1)
    examples = [Demonstration(END, passage(rng, held_out, length)) for _ in range(MAX_HELD_OUT // 2)]
    return Task("CPython's documentation", draw, examples)


def passage(rng: Random, texts: dict[str, list[int]], length: int) -> list[int]:
    """Draw a passage of one text. A text is drawn with a probability proportional to its length."""
    text = rng.choices(list(texts.values()), weights=[len(text) for text in texts.values()])[0]
    start = rng.randrange(len(text) - length)
    return text[start : start + length]


def continuations(prompt: int = 16, length: int = 6) -> Task[Preference]:
    """Prefer the true continuation of a prompt that ends inside a word to one from another topic."""
    train, held_out = corpus()
    splits = {name: splits_of_words(text, prompt, length) for name, text in (train | held_out).items()}

    def pair(rng: Random, texts: dict[str, list[int]]) -> Preference:
        names, weights = list(texts), [len(splits[name]) for name in texts]
        topic = other_topic = rng.choices(names, weights)[0]
        while other_topic == topic:
            other_topic = rng.choices(names, weights)[0]
        i, j = rng.choice(splits[topic]), rng.choice(splits[other_topic])
        text, other_text = texts[topic], texts[other_topic]
        return Preference([*END, *text[i - prompt : i]], text[i : i + length], other_text[j : j + length])

    def draw(rng: Random, n: int) -> list[Preference]:
        return [pair(rng, train) for _ in range(n)]

    rng = Random(1)
    examples = [pair(rng, held_out) for _ in range(MAX_HELD_OUT)]
    return Task("true continuations in CPython's documentation", draw, examples)


def splits_of_words(text: Sequence[int], before: int, after: int) -> list[int]:
    """Return the positions i that split a word after its second letter or later.

    There are at least ``before`` tokens before i, and ``after`` tokens from i on.
    """
    letter = [ord("a") <= byte <= ord("z") for byte in text]
    return [i for i in range(before, len(text) - after) if letter[i - 2] and letter[i - 1] and letter[i]]


def with_prompts_trained(task: Task[Preference]) -> Task[Preference]:
    """Move the prompts into both sides of the pairs, so that the prompt of a chosen text is trained too."""

    def joined(e: Preference) -> Preference:
        prompt = e.prompt[len(END) :]
        return Preference(END, prompt + e.chosen, prompt + e.rejected)

    return Task(task.name, lambda rng, n: [joined(e) for e in task.draw(rng, n)], [joined(e) for e in task.held_out])


# Arithmetic: held-out problems are never trained on


def arithmetic() -> Task[Problem]:
    """Add a number of one digit to a number of two digits: "47+8=" -> "55"."""
    problems = [(a, b) for a in range(10, 100) for b in range(1, 10)]
    Random(0).shuffle(problems)
    examples = [Problem(TOKENIZER.encode(f"{a}+{b}="), str(a + b)) for a, b in problems]
    held_out, train = examples[:200], examples[200:]
    return Task("sums", lambda rng, n: rng.sample(train, min(n, len(train))), held_out[:MAX_HELD_OUT])


def noisy_demonstration(problem: Problem, rng: Random, error_rate: float = 0.6) -> Demonstration:
    """Make a demonstration whose answer is mostly off by 1 or 10, for reinforcement learning to correct."""
    answer = int(problem.answer)
    if rng.random() < error_rate:
        answer += rng.choice([d for d in (-10, -1, 1, 10) if answer + d >= 0])
    return Demonstration(problem.prompt, TOKENIZER.encode(str(answer)) + END)


def correct_demonstration(problem: Problem, rng: Random) -> Demonstration:
    return Demonstration(problem.prompt, TOKENIZER.encode(problem.answer) + END)


# Rows of a JSONL file


def read_rows(path: str | Path, keys: Sequence[str]) -> list[dict[str, str]]:
    """Read a JSONL file whose rows have text under every one of the keys.

    Raises:
        LossInputError: with the line that does not fit, or if there are fewer than two rows.
    """
    rows = []
    try:
        # Not splitlines: a JSON string may contain line separators other than the newline.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise LossInputError("--data", "a JSONL file", f"{path} ({error})", "One JSON object a line.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise LossInputError(f"{path}:{number}", "a JSON object", f"{error}", "One object a line.") from None
        for key in keys:
            if not isinstance(row, dict) or not isinstance(row.get(key), str) or not (row[key] or key == "prompt"):
                got = f"{row.get(key)!r}" if isinstance(row, dict) and key in row else "nothing"
                fix = f"This method reads {', '.join(keys)}."
                raise LossInputError(f"{path}:{number}", f"text under {key!r}", got, fix)
        rows.append(row)
    if len(rows) < 2:
        raise LossInputError("--data", "at least 2 rows", f"{len(rows)} in {path}", "One in ten is held out.")
    return rows


def split_task(name: str, examples: list[T], seed: int) -> Task[T]:
    """Hold out one in ten of the different examples (at least one, at most ``MAX_HELD_OUT``), and train on the rest.

    Raises:
        LossInputError: if all examples are equal.
    """
    examples = list({repr(example): example for example in examples}.values())
    if len(examples) < 2:
        raise LossInputError("--data", "at least 2 different rows", "1", "One in ten is held out.")
    Random(seed).shuffle(examples)
    size = min(MAX_HELD_OUT, max(1, len(examples) // 10))
    held_out, train = examples[:size], examples[size:]

    def draw(rng: Random, n: int) -> list[T]:
        return rng.sample(train, n) if n <= len(train) else rng.choices(train, k=n)

    return Task(name, draw, held_out)


def load_demonstrations(path: str, seed: int) -> Task[Demonstration]:
    """Load rows ``{"prompt", "completion"}``."""
    rows = read_rows(path, ("prompt", "completion"))
    encode = TOKENIZER.encode
    examples = [Demonstration(encode(r["prompt"]) or END, encode(r["completion"]) + END) for r in rows]
    return split_task(path, examples, seed)


def load_preferences(path: str, seed: int) -> Task[Preference]:
    """Load rows ``{"prompt", "chosen", "rejected"}``."""
    rows = read_rows(path, ("prompt", "chosen", "rejected"))
    encode = TOKENIZER.encode
    examples = [
        Preference(encode(r["prompt"]) or END, encode(r["chosen"]) + END, encode(r["rejected"]) + END) for r in rows
    ]
    return split_task(path, examples, seed)


def load_problems(path: str, seed: int) -> Task[Problem]:
    """Load rows ``{"prompt", "answer"}``. The reward is 1 for exactly the answer, and 0 for anything else."""
    rows = read_rows(path, ("prompt", "answer"))
    return split_task(path, [Problem(TOKENIZER.encode(r["prompt"]) or END, r["answer"]) for r in rows], seed)
