"""Cases of ``group_advantages``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tools.vectors.cases.form import Case, Data


def samples(rewards: Sequence[float], groups: Sequence[Any]) -> Data:
    """Return the data of ``group_advantages``: a reward and a group for each sample."""
    return [{"reward": float(reward), "group": group} for reward, group in zip(rewards, groups, strict=True)]


GROUPS: list[tuple[str, str, Data]] = [
    ("valid", "one group of two", samples([1, 0], "aa")),
    ("valid", "one group of four", samples([1, 0, 0.5, 2], "aaaa")),
    ("valid", "two groups in a row", samples([1, 0, 3, 5], "aabb")),
    ("valid", "two groups, interleaved", samples([1, 10, 0, 14], "abab")),
    ("valid", "groups of different sizes", samples([1, 0, 2, 5, 9], "aaabb")),
    ("valid", "three groups out of order", samples([1, 7, 4, 3, 9, 5], "cabbac")),
    ("valid", "labels that are numbers", samples([1, 7, 4, 3], [7, 3, 3, 7])),
    ("valid", "negative rewards", samples([-1, -3, 2, -0.5], "aaaa")),
    ("valid", "the same rewards with 100 more", samples([101, 100, 103, 105], "aabb")),
    ("valid", "rewards of 0 and 1", samples([1, 0, 0, 0, 1, 1, 1, 0], "aaaabbbb")),
    ("edge", "a group whose rewards agree", samples([2, 2, 2], "aaa")),
    ("edge", "a group whose rewards of 0.1 agree", samples([0.1, 0.1, 0.1], "aaa")),
    (
        "edge",
        "groups that agree on 0.1 and on 0.7, beside one that does not",
        samples([0.1, 0.1, 0.1, 0.7, 0.7, 0.7, 1, 0], "aaabbbcc"),
    ),
    ("edge", "a group of one", samples([3], "a")),
    ("edge", "a group of one beside one of two", samples([3, 1, 0], "abb")),
    ("edge", "every group has one sample", samples([3, 1, 0], "abc")),
    ("edge", "rewards that differ by 2^-20", samples([1, 1 + 2**-20, 1], "aaa")),
    ("edge", "large rewards", samples([1e6, -1e6, 2e6], "aaa")),
]


def group_advantage_cases() -> Iterator[Case]:
    """Yield the cases of ``group_advantages``, with and without division by the deviation."""
    for scale in ("std", "none"):
        for kind, comment, rewards in GROUPS:
            words = f"{comment}; centred only" if scale == "none" else comment
            yield Case("group_advantages", kind, words, {"scale": scale}, rewards)
