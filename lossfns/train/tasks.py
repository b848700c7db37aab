"""What there is to learn: examples to train on and examples held out, built in or from a JSONL file.

Built in is only what every machine has: the documentation that comes with CPython, and arithmetic.
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


HELD_OUT = 400
"""Held-out examples, where there are that many; passages of text are longer and half as many do."""


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
    """``draw(rng, n)`` gives n training examples; ``held_out`` shares none with them."""

    name: str
    draw: Callable[[Random, int], list[T]]
    held_out: list[T]


# English: whole topics are held out


def corpus() -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """The topics to train on and the topics held out (one in six), as bytes.

    Topics quote one another at length: a paragraph of a held-out one is taken out of all the others.
    """
    names = sorted(name for name, text in topics.items() if len(text) > 600)
    Random(0).shuffle(names)
    held_out = names[: len(names) // 6]
    known = {words(p) for name in held_out for p in paragraphs(topics[name])}
    texts = {n: "\n\n".join(p for p in paragraphs(topics[n]) if words(p) not in known) for n in names[len(held_out) :]}
    train = {name: TOKENIZER.encode(text) for name, text in texts.items() if len(text) > 600}
    return train, {name: TOKENIZER.encode(topics[name]) for name in held_out}


def paragraphs(text: str) -> list[str]:
    return text.split("\n\n")


def words(paragraph: str) -> str:
    """The paragraph without its indentation and line breaks."""
    return " ".join(paragraph.split())


def english(length: int = 128) -> Task[Demonstration]:
    """Passages of CPython's documentation, to be learned byte by byte."""
    train, held_out = corpus()

    def draw(rng: Random, n: int) -> list[Demonstration]:
        return [Demonstration(END, passage(rng, train, length)) for _ in range(n)]

    rng = Random(1)
    return Task(
        "CPython's documentation",
        draw,
        [Demonstration(END, passage(rng, held_out, length)) for _ in range(HELD_OUT // 2)],
    )


def passage(rng: Random, texts: dict[str, list[int]], length: int) -> list[int]:
    """A stretch of one text, texts drawn by their length."""
    text = rng.choices(list(texts.values()), weights=[len(text) for text in texts.values()])[0]
    start = rng.randrange(len(text) - length)
    return text[start : start + length]


def continuations(prompt: int = 16, length: int = 6) -> Task[Preference]:
    """A prompt cut inside a word, its true continuation, and one from inside a word of another topic."""
    train, held_out = corpus()
    cuts = {name: within_words(text, prompt, length) for name, text in (train | held_out).items()}

    def pair(rng: Random, texts: dict[str, list[int]]) -> Preference:
        names, weights = list(texts), [len(cuts[name]) for name in texts]
        here = there = rng.choices(names, weights)[0]
        while there == here:
            there = rng.choices(names, weights)[0]
        i, j = rng.choice(cuts[here]), rng.choice(cuts[there])
        own, other = texts[here], texts[there]
        return Preference([*END, *own[i - prompt : i]], own[i : i + length], other[j : j + length])

    def draw(rng: Random, n: int) -> list[Preference]:
        return [pair(rng, train) for _ in range(n)]

    rng = Random(1)
    return Task("true continuations in CPython's documentation", draw, [pair(rng, held_out) for _ in range(HELD_OUT)])


def whole_texts(task: Task[Preference]) -> Task[Preference]:
    """The same pairs with the prompt as the beginning of both sides: learned too, where it is chosen."""

    def whole(e: Preference) -> Preference:
        begin = e.prompt[len(END) :]
        return Preference(END, begin + e.chosen, begin + e.rejected)

    return Task(task.name, lambda rng, n: [whole(e) for e in task.draw(rng, n)], [whole(e) for e in task.held_out])


def within_words(text: Sequence[int], before: int, after: int) -> list[int]:
    """Positions between two letters, the second letter of a word at least, with room on both sides."""
    letter = [ord("a") <= byte <= ord("z") for byte in text]
    return [i for i in range(before, len(text) - after) if letter[i - 2] and letter[i - 1] and letter[i]]


# Arithmetic: held-out problems are never trained on


def arithmetic() -> Task[Problem]:
    """Sums of a number of two digits and one of one digit: "47+8=" -> "55"."""
    problems = [(a, b) for a in range(10, 100) for b in range(1, 10)]
    Random(0).shuffle(problems)
    examples = [Problem(TOKENIZER.encode(f"{a}+{b}="), str(a + b)) for a, b in problems]
    held_out, train = examples[:200], examples[200:]
    return Task("sums", lambda rng, n: rng.sample(train, min(n, len(train))), held_out[:HELD_OUT])


def careless(problem: Problem, rng: Random, slips: float = 0.6) -> Demonstration:
    """A demonstration that is off by 1 or by 10 in six cases of ten: what reinforcement learning has to mend."""
    answer = int(problem.answer)
    if rng.random() < slips:
        answer += rng.choice([d for d in (-10, -1, 1, 10) if answer + d >= 0])
    return Demonstration(problem.prompt, TOKENIZER.encode(str(answer)) + END)


def correct(problem: Problem, rng: Random) -> Demonstration:
    return Demonstration(problem.prompt, TOKENIZER.encode(problem.answer) + END)


# One's own data


def read(path: str | Path, keys: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a JSONL file, each with text under every one of the keys; an error names the line."""
    rows = []
    try:
        # Not splitlines: JSON may hold other line separators than the newline as they are.
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


def own(name: str, examples: list[T], seed: int) -> Task[T]:
    """One in ten of the different examples held out (at least one, at most ``HELD_OUT``), the rest to train on."""
    examples = list({repr(example): example for example in examples}.values())
    if len(examples) < 2:
        raise LossInputError("--data", "at least 2 different rows", "1", "One in ten is held out.")
    Random(seed).shuffle(examples)
    size = min(HELD_OUT, max(1, len(examples) // 10))
    held_out, train = examples[:size], examples[size:]

    def draw(rng: Random, n: int) -> list[T]:
        return rng.sample(train, n) if n <= len(train) else rng.choices(train, k=n)

    return Task(name, draw, held_out)


def own_demonstrations(path: str, seed: int) -> Task[Demonstration]:
    """``{"prompt", "completion"}``"""
    rows = read(path, ("prompt", "completion"))
    encode = TOKENIZER.encode
    examples = [Demonstration(encode(r["prompt"]) or END, encode(r["completion"]) + END) for r in rows]
    return own(path, examples, seed)


def own_preferences(path: str, seed: int) -> Task[Preference]:
    """``{"prompt", "chosen", "rejected"}``"""
    rows = read(path, ("prompt", "chosen", "rejected"))
    encode = TOKENIZER.encode
    examples = [
        Preference(encode(r["prompt"]) or END, encode(r["chosen"]) + END, encode(r["rejected"]) + END) for r in rows
    ]
    return own(path, examples, seed)


def own_problems(path: str, seed: int) -> Task[Problem]:
    """``{"prompt", "answer"}``; the reward is 1 for exactly the answer."""
    rows = read(path, ("prompt", "answer"))
    return own(path, [Problem(TOKENIZER.encode(r["prompt"]) or END, r["answer"]) for r in rows], seed)
