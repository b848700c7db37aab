"""Tasks: examples to train on and held-out examples, built in or from a file of rows.

The built-in tasks need no download. They use the documentation that comes with CPython, and arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pydoc_data.topics import topics
from random import Random
from typing import Generic, NamedTuple, TypeVar

from lossfns.backend.model.tokenizer import ByteTokenizer
from lossfns.errors import LossInputError
from lossfns.train import files, formats
from lossfns.train.formats import Format
from lossfns.train.options import Options

TOKENIZER = ByteTokenizer()
END = [TOKENIZER.eos_token_id]
"""Ends a completion, and starts a text that has no prompt."""

MAX_HELD_OUT = 400
"""The largest number of held-out examples. Passages are longer, so half as many are enough."""

MAX_LENGTH = 2048
"""The longest row of a file in tokens, unless ``--max-length`` says otherwise."""


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
    """A task.

    Attributes:
        name: the file, or the name of the built-in data.
        draw: ``draw(rng, n)`` returns n training examples; none of them is in ``held_out``.
        held_out: the examples to measure on.
        train: the examples that are drawn; empty if they are made by ``draw``.
        note: for the terminal, what was recognised in a file.
        style: how prompts are written; see ``formats.prompt_style``.
    """

    name: str
    draw: Callable[[Random, int], list[T]]
    held_out: list[T]
    train: list[T] = field(default_factory=list)
    note: str = ""
    style: str = "text"


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
    return Task("CPython's documentation", draw, examples, style="passage")


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
    return Task("true continuations in CPython's documentation", draw, examples, style="passage")


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

    held_out = [joined(e) for e in task.held_out]
    return Task(task.name, lambda rng, n: [joined(e) for e in task.draw(rng, n)], held_out, style=task.style)


# Arithmetic: held-out problems are never trained on


def arithmetic() -> Task[Problem]:
    """Add a number of one digit to a number of two digits: "47+8=" -> "55"."""
    problems = [(a, b) for a in range(10, 100) for b in range(1, 10)]
    Random(0).shuffle(problems)
    examples = [Problem(TOKENIZER.encode(f"{a}+{b}="), str(a + b)) for a, b in problems]
    held_out, train = examples[:200], examples[200:]
    return Task("sums", lambda rng, n: rng.sample(train, min(n, len(train))), held_out[:MAX_HELD_OUT], train)


def noisy_demonstration(problem: Problem, rng: Random, error_rate: float = 0.6) -> Demonstration:
    """Make a demonstration whose answer is mostly off by 1 or 10, for reinforcement learning to correct."""
    answer = int(problem.answer)
    if rng.random() < error_rate:
        answer += rng.choice([d for d in (-10, -1, 1, 10) if answer + d >= 0])
    return Demonstration(problem.prompt, TOKENIZER.encode(str(answer)) + END)


def correct_demonstration(problem: Problem, rng: Random) -> Demonstration:
    return Demonstration(problem.prompt, TOKENIZER.encode(problem.answer) + END)


# Rows of a file


def load_task(options: Options, kinds: Sequence[Format], example: Callable[..., T]) -> Task[T]:
    """Load the rows of the file ``--data``, hold out one in ten, and train on the rest.

    Equal rows count once. The examples of a row (the answers of a chat) are held out together: at least one row, and
    not more rows than have ``MAX_HELD_OUT`` examples.

    Args:
        options: those of the run: the file, the longest example and the seed.
        kinds: the formats that the method reads; the first row tells which one the file has.
        example: makes an example of the texts that the format reads.

    Raises:
        LossInputError: for a row that cannot be used, and if all rows are equal.
    """
    path, limit = str(options.data), options.max_length or MAX_LENGTH
    rows = files.read_rows(path)
    kind = formats.recognise(rows[0], kinds) if rows else kinds[0]
    for row in rows:
        formats.refuse_unread(row)
    texts = [kind.read(row) for row in rows]
    if len(rows) < 2:
        raise LossInputError("--data", "at least 2 rows", f"{len(rows)} in {path}", "One in ten is held out.")
    groups = [[example(*each) for each in group] for group in texts]
    lengths = [max(length(each) for each in group) for group in groups]
    check_lengths(path, rows, lengths, limit)
    groups = list({repr(group): group for group in groups}.values())
    if len(groups) < 2:
        raise LossInputError("--data", "at least 2 different rows", f"1 in {path}", "One in ten is held out.")
    Random(options.seed).shuffle(groups)
    size = min(MAX_HELD_OUT, max(1, len(groups) // 10))
    while size > 1 and sum(map(len, groups[:size])) > MAX_HELD_OUT:
        size -= 1
    held_out = [each for group in groups[:size] for each in group]
    kept_apart = {repr(each) for group in groups[:size] for each in group}
    train = [each for group in groups[size:] for each in group if repr(each) not in kept_apart]
    if not train:
        raise LossInputError("--data", "rows that differ from those held out", "none", "One in ten is held out.")

    def draw(rng: Random, n: int) -> list[T]:
        return rng.sample(train, n) if n <= len(train) else rng.choices(train, k=n)

    named = dict.fromkeys(name for row in rows for name in row.fields)
    unread = [name for name in named if name not in kind.keys + kind.also]
    note = f"{len(rows)} rows of {kind.name}, up to {max(lengths)} bytes; {len(held_out)} held out"
    note += f"; not read: {', '.join(map(files.shown, unread[:8]))}{', ...' if unread[8:] else ''}" if unread else ""
    return Task(path, draw, held_out, train, note, formats.prompt_style(texts[0][0][0]))


def length(example: Demonstration | Preference | Problem) -> int:
    """Return the tokens of the longest sequence of an example: its bytes, and the end of the sequence."""
    completions = [example.answer.encode()] if isinstance(example, Problem) else example[1:]
    end = 1 if isinstance(example, Problem) else 0
    return len(example.prompt) + max(len(completion) for completion in completions) + end


def check_lengths(path: str, rows: Sequence[files.Row], lengths: Sequence[int], limit: int) -> None:
    """Refuse rows that are longer than the limit, before a step of the run takes minutes."""
    longer = [(row, n) for row, n in zip(rows, lengths) if n > limit]
    if longer:
        (row, n), most = longer[0], max(lengths)
        others = f", and {len(longer) - 1} longer rows after it" if len(longer) > 1 else ""
        fix = f"Shorten them: nothing is cut. Or pass --max-length {most}; a step then takes longer."
        raise LossInputError(row.place, f"at most {limit} tokens (bytes) with its prompt", f"{n}{others}", fix)


def as_demonstration(prompt: str, completion: str) -> Demonstration:
    return Demonstration(TOKENIZER.encode(prompt) or END, TOKENIZER.encode(completion) + END)


def as_preference(prompt: str, chosen: str, rejected: str) -> Preference:
    encode = TOKENIZER.encode
    return Preference(encode(prompt) or END, encode(chosen) + END, encode(rejected) + END)


def as_problem(prompt: str, answer: str) -> Problem:
    """Make a problem. The reward is 1 for exactly the answer, and 0 for anything else."""
    return Problem(TOKENIZER.encode(prompt) or END, answer)


def load_demonstrations(options: Options) -> Task[Demonstration]:
    return load_task(options, formats.DEMONSTRATIONS, as_demonstration)


def load_preferences(options: Options) -> Task[Preference]:
    return load_task(options, formats.PREFERENCES, as_preference)


def load_problems(options: Options) -> Task[Problem]:
    return load_task(options, formats.PROBLEMS, as_problem)
