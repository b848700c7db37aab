"""Examples as tokens: the four kinds that the methods train on, made by ``render.Renderer`` from rows of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lossfns.datum import Datum
from lossfns.frame import datum_from_tokens


class Demonstration(NamedTuple):
    """A sequence to learn from.

    Attributes:
        tokens: token ids, ``[T]``.
        weights: the weight of each token as a target, ``[T]``: 0 for a token that is read and not trained. The first
            token is no target, so its weight has no effect.
    """

    tokens: list[int]
    weights: list[float]


class Preference(NamedTuple):
    """Two answers to one prompt. Both sequences start with the tokens of the prompt."""

    chosen: Demonstration
    rejected: Demonstration


class Labelled(NamedTuple):
    """An answer that is desirable or not, for losses of unpaired preference."""

    example: Demonstration
    desirable: bool


class Problem(NamedTuple):
    """A prompt whose sampled answers are rewarded.

    Attributes:
        prompt: token ids.
        answer: the right answer; None if the reward needs none.
        fields: the row as it was read, as plain JSON values.
    """

    prompt: list[int]
    answer: str | None
    fields: Mapping[str, Any] = {}


Example = Demonstration | Preference | Labelled | Problem


def demonstration(prompt: Sequence[int], completion: Sequence[int]) -> Demonstration:
    """Make a demonstration with weight 1 on the completion and 0 on the prompt.

    >>> demonstration([5, 6], [7])
    Demonstration(tokens=[5, 6, 7], weights=[0.0, 0.0, 1.0])
    """
    return Demonstration([*prompt, *completion], [0.0] * len(prompt) + [1.0] * len(completion))


def datum_of(example: Demonstration) -> Datum:
    """Make the datum of a demonstration: its targets are ``tokens[1:]``."""
    return datum_from_tokens(example.tokens, example.weights)


def sequences(example: Example) -> list[Demonstration]:
    """Return the sequences that are trained; none for a problem, whose answers are sampled."""
    if isinstance(example, Demonstration):
        return [example]
    return [part for part in example if isinstance(part, Demonstration)]


def prompt_of(example: Example) -> list[int]:
    """Return the tokens before the first trained one."""
    if isinstance(example, Problem):
        return example.prompt
    first = sequences(example)[0]
    return first.tokens[: next(i for i, weight in enumerate(first.weights) if weight)]
