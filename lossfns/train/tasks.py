"""Tasks: examples to train on and held-out examples, built in or from a file of rows.

The built-in tasks need no download. They use the documentation that comes with CPython, and arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pydoc_data.topics import topics
from random import Random
from typing import Generic, TypeVar

from lossfns.errors import LossInputError
from lossfns.terminal import status
from lossfns.train import files, formats, values
from lossfns.train.examples import Demonstration, Labelled, Preference, Problem, demonstration, sequences
from lossfns.train.render import DATED, Renderer
from lossfns.train.values import Row

MAX_HELD_OUT = 400
"""The largest number of held-out examples. Passages are longer, so half as many are enough."""

MAX_LENGTH = 2048
"""The longest example of a file in tokens, unless ``--max-length`` says otherwise."""

T = TypeVar("T", Demonstration, Preference, Labelled, Problem)


@dataclass(frozen=True)
class Task(Generic[T]):
    """A task.

    Attributes:
        name: the file, or the name of the built-in data.
        renderer: the renderer that made the tokens.
        draw: ``draw(rng, n)`` returns n training examples; none of them is in ``held_out``.
        held_out: the examples to measure on.
        train: the examples that are drawn; empty if they are made by ``draw``.
        note: a text for the terminal: what was recognised in a file.
        style: how prompts are written; see ``formats.prompt_style``.
    """

    name: str
    renderer: Renderer
    draw: Callable[[Random, int], list[T]]
    held_out: list[T]
    train: list[T] = field(default_factory=list)
    note: str = ""
    style: str = "text"


# English: whole topics are held out


def corpus() -> tuple[dict[str, str], dict[str, str]]:
    """Return the training topics and the held-out topics (one in six), as texts by name.

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
    train = {name: text for name, text in texts.items() if len(text) > 600}
    return train, {name: topics[name] for name in held_out}


def paragraphs(text: str) -> list[str]:
    return text.split("\n\n")


def normalized(paragraph: str) -> str:
    """Return the paragraph without its indentation and line breaks."""
    return " ".join(paragraph.split())


def documentation(renderer: Renderer, length: int = 128) -> Task[Demonstration]:
    """Predict passages of CPython's documentation, token by token. They fit the context of the model."""
    length = longest_of(renderer, length + len(renderer.start)) - len(renderer.start)
    train, held_out = (
        {name: ids for name, text in part.items() if len(ids := renderer.encode(text)) > length} for part in corpus()
    )

    def passages(rng: Random, texts: dict[str, list[int]], n: int) -> list[Demonstration]:
        return [demonstration(renderer.start, passage(rng, texts, length)) for _ in range(n)]

    examples = passages(Random(1), held_out, MAX_HELD_OUT // 2)
    name = "CPython's documentation"
    return Task(name, renderer, lambda rng, n: passages(rng, train, n), examples, style="passage")


def passage(rng: Random, texts: dict[str, list[int]], length: int) -> list[int]:
    """Draw a passage of one text. A text is drawn with a probability proportional to its length."""
    text = rng.choices(list(texts.values()), weights=[len(text) for text in texts.values()])[0]
    start = rng.randrange(len(text) - length)
    return text[start : start + length]


def continuations(renderer: Renderer, prompt_length: int = 16, length: int = 6) -> Task[Preference]:
    """Prefer the true continuation of a prompt that ends inside a word to one from another topic, in bytes."""
    train, held_out = ({name: text.encode() for name, text in part.items()} for part in corpus())
    splits = {name: splits_of_words(text, prompt_length, length) for name, text in (train | held_out).items()}

    def side(before: bytes, after: bytes) -> Demonstration:
        prompt, answer = (part.decode(errors="ignore") for part in (before, after))  # a character may be cut
        return demonstration(renderer.opening(prompt), renderer.encode(answer))

    def pair(rng: Random, texts: dict[str, bytes]) -> Preference:
        names, weights = list(texts), [len(splits[name]) for name in texts]
        topic = other_topic = rng.choices(names, weights)[0]
        while other_topic == topic:
            other_topic = rng.choices(names, weights)[0]
        i, j = rng.choice(splits[topic]), rng.choice(splits[other_topic])
        text, other_text = texts[topic], texts[other_topic]
        before = text[i - prompt_length : i]
        return Preference(side(before, text[i : i + length]), side(before, other_text[j : j + length]))

    def draw(rng: Random, n: int) -> list[Preference]:
        return [pair(rng, train) for _ in range(n)]

    rng = Random(1)
    examples = [pair(rng, held_out) for _ in range(MAX_HELD_OUT)]
    return Task("true continuations in CPython's documentation", renderer, draw, examples, style="passage")


def splits_of_words(text: bytes, before: int, after: int) -> list[int]:
    """Return the positions i that split a word after its second letter or later.

    There are at least ``before`` bytes before i, and ``after`` bytes from i on.
    """
    letter = [ord("a") <= byte <= ord("z") for byte in text]
    return [i for i in range(before, len(text) - after) if letter[i - 2] and letter[i - 1] and letter[i]]


def with_prompts_trained(task: Task[Preference]) -> Task[Preference]:
    """Return the task with weight 1 on the prompts, too, on both sides of the pairs."""
    first = len(task.renderer.start)

    def side(each: Demonstration) -> Demonstration:
        return demonstration(each.tokens[:first], each.tokens[first:])

    def trained(pairs: list[Preference]) -> list[Preference]:
        return [Preference(side(e.chosen), side(e.rejected)) for e in pairs]

    return replace(task, draw=lambda rng, n: trained(task.draw(rng, n)), held_out=trained(task.held_out))


# Arithmetic: held-out problems are never trained on


def arithmetic(renderer: Renderer) -> Task[Problem]:
    """Add a number of one digit to a number of two digits: "47+8=" -> "55"."""
    problems = [(a, b) for a in range(10, 100) for b in range(1, 10)]
    Random(0).shuffle(problems)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in problems]
    examples = [Problem(renderer.prompt(row["prompt"]), row["answer"], row) for row in rows]
    held_out, train = examples[:200], examples[200:]
    return Task("sums", renderer, lambda rng, n: rng.sample(train, min(n, len(train))), held_out, train)


def noisy_answer(problem: Problem, rng: Random, error_rate: float = 0.6) -> str:
    """Return an answer that is mostly off by 1 or 10, for reinforcement learning to correct."""
    answer = int(str(problem.answer))
    if rng.random() < error_rate:
        answer += rng.choice([d for d in (-10, -1, 1, 10) if answer + d >= 0])
    return str(answer)


# Rows of a file


def load(
    source: str,
    renderer: Renderer,
    kind: type[T],
    *,
    max_length: int = MAX_LENGTH,
    drop_longer: bool = False,
    seed: int = 0,
) -> Task[T]:
    """Load the rows of ``--data``, hold out one in ten, and train on the rest.

    Equal rows count once; see ``hold_out``.

    Args:
        source: see ``files.read_rows``.
        renderer: makes the tokens.
        kind: the kind of example; the first row decides which of its formats the file has.
        max_length: the longest example in tokens; see ``longest_of``.
        drop_longer: leave out rows that are longer, and count them, instead of refusing them.
        seed: shuffles the rows.

    Raises:
        LossInputError: for a row that cannot be used, and if all rows are equal.
    """
    groups: list[list[T]] = []
    with status() as tell:
        tell(f"reading {source}")
        rows = files.read_rows(source)
        tell(f"making the tokens of {len(rows)} rows")
        if rows:
            row_format = formats.recognise(rows[0], kind)
            groups = [list(formats.examples_of(row, row_format, renderer)) for row in rows]
    if len(rows) < 2:
        raise LossInputError("--data", "at least 2 rows", f"{len(rows)} in {source}", "One in ten is held out.")
    lengths = [max(length(each, renderer) for each in group) for group in groups]
    limit = longest_of(renderer, max_length)
    if drop_longer:
        groups = [group for group, n in zip(groups, lengths) if n <= limit]
    else:
        check_lengths(rows, lengths, limit, max_length)
    used = len(groups)
    groups = list({repr(group): group for group in groups}.values())
    if len(groups) < 2:
        got = f"{len(groups)} of at most {limit} tokens in {source}"
        raise LossInputError("--data", "at least 2 different rows", got, "One in ten is held out.")
    equal = used - len(groups)
    Random(seed).shuffle(groups)
    held_out, train = hold_out(groups)
    if not train:
        raise LossInputError("--data", "rows that differ from those held out", "none", "One in ten is held out.")

    def draw(rng: Random, n: int) -> list[T]:
        return rng.sample(train, n) if n <= len(train) else rng.choices(train, k=n)

    unread = formats.unread(rows, row_format)
    longest = max(n for n in lengths if n <= limit)
    notes = [
        f"{len(rows)} rows of {row_format.name}, up to {values.counted(longest, 'token')}; {len(held_out)} held out",
        f"{values.counted(len(rows) - used, 'row')} longer than {limit} tokens left out" if used < len(rows) else "",
        f"{values.counted(equal, 'row')} equal to others left out" if equal else "",
        f"not read: {', '.join(map(values.shown, unread[:8]))}{', ...' if unread[8:] else ''}" if unread else "",
        DATED if renderer.dated else "",
    ]
    note, style = "; ".join(filter(None, notes)), formats.prompt_style(rows[0], row_format)
    if style == "text" and renderer.template is not None:
        note += (
            "\nwarning: the model has a chat template, and these prompts are text, which it gets without the template: "
            'a chat model may end at once. A prompt of messages, [{"role": "user", "content": ...}], gets it'
        )
    name = rows[0].place.rpartition(":")[0]  # with the split that was taken
    return Task(name, renderer, draw, held_out, train, note, style)


def hold_out(groups: Sequence[list[T]]) -> tuple[list[T], list[T]]:
    """Return the held-out examples, those of the first tenth of the groups, and the training examples.

    A group has the examples of one row. At least one group is held out; more only up to ``MAX_HELD_OUT`` examples. A
    held-out example is not trained on, even if another group has it too.
    """
    size = min(MAX_HELD_OUT, max(1, len(groups) // 10))
    while size > 1 and sum(map(len, groups[:size])) > MAX_HELD_OUT:
        size -= 1
    held_out = [each for group in groups[:size] for each in group]
    known = {repr(each) for each in held_out}
    return held_out, [each for group in groups[size:] for each in group if repr(each) not in known]


def length(example: Demonstration | Preference | Labelled | Problem, renderer: Renderer) -> int:
    """Return the length of the longest sequence of an example; for a problem, of its prompt and answer together."""
    if isinstance(example, Problem):
        return len(example.prompt) + len(renderer.encode(example.answer or "")) + 1
    return max(len(each.tokens) for each in sequences(example))


def longest_of(renderer: Renderer, max_length: int) -> int:
    """Return the length of the longest row that can be used: the context of the model is a limit, too."""
    return int(min(max_length, renderer.context))


def check_lengths(rows: Sequence[Row], lengths: Sequence[int], limit: int, max_length: int) -> None:
    """Refuse rows that are longer than the limit, before a step of the run takes minutes.

    A limit below ``max_length`` is the context of the model.
    """
    longer = [(row, n) for row, n in zip(rows, lengths) if n > limit]
    if longer:
        (row, n), most = longer[0], max(lengths)
        others = f", and {values.counted(len(longer) - 1, 'longer row')} after it" if len(longer) > 1 else ""
        fix = f"Nothing is cut. Pass --drop-longer to leave them out, or --max-length {most}; a step then takes longer."
        why = ""
        if limit < max_length:
            why = ", the context of the model"
            fix = "Nothing is cut. Pass --drop-longer to leave them out, or take a model with a longer context."
        raise LossInputError(row.place, f"at most {limit} tokens with its prompt{why}", f"{n}{others}", fix)
