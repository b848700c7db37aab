"""Cases of group_advantages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lossfns.testing.vectors.cases.form import Case, Data


def samples(rewards: Sequence[float], groups: Sequence[Any]) -> Data:
    return [{"reward": float(reward), "group": group} for reward, group in zip(rewards, groups, strict=True)]


GROUPS: list[tuple[str, str, Data, tuple[str, ...]]] = [
    ("valid", "one group of two", samples([1, 0], "aa"), ("std-over-n", "not-centred", "order-lost")),
    ("valid", "one group of four", samples([1, 0, 0.5, 2], "aaaa"), ("std-over-n", "not-centred", "order-lost")),
    (
        "valid",
        "two groups in a row",
        samples([1, 0, 3, 5], "aabb"),
        ("groups-ignored", "std-over-n", "not-centred", "order-lost"),
    ),
    ("valid", "two groups, interleaved", samples([1, 10, 0, 14], "abab"), ("groups-by-position", "groups-ignored")),
    ("valid", "groups of different sizes", samples([1, 0, 2, 5, 9], "aaabb"), ("groups-by-position", "std-over-n")),
    (
        "valid",
        "three groups out of order",
        samples([1, 7, 4, 3, 9, 5], "cabbac"),
        ("groups-by-position", "groups-ignored"),
    ),
    ("valid", "labels that are numbers", samples([1, 7, 4, 3], [7, 3, 3, 7]), ("groups-by-position", "groups-ignored")),
    ("valid", "negative rewards", samples([-1, -3, 2, -0.5], "aaaa"), ("not-centred", "order-lost", "std-over-n")),
    (
        "valid",
        "the same rewards with 100 more",
        samples([101, 100, 103, 105], "aabb"),
        ("not-centred", "groups-ignored"),
    ),
    ("valid", "rewards of 0 and 1", samples([1, 0, 0, 0, 1, 1, 1, 0], "aaaabbbb"), ("std-over-n", "groups-ignored")),
    ("edge", "a group whose rewards agree", samples([2, 2, 2], "aaa"), ("not-centred",)),
    (
        "edge",
        "a group whose rewards of 0.1 agree",
        samples([0.1, 0.1, 0.1], "aaa"),
        ("constant-group-noise", "not-centred"),
    ),
    (
        "edge",
        "groups that agree on 0.1 and on 0.7, beside one that does not",
        samples([0.1, 0.1, 0.1, 0.7, 0.7, 0.7, 1, 0], "aaabbbcc"),
        ("constant-group-noise", "groups-ignored"),
    ),
    ("edge", "a group of one", samples([3], "a"), ("group-of-one-nan", "not-centred")),
    ("edge", "a group of one beside one of two", samples([3, 1, 0], "abb"), ("group-of-one-nan", "groups-ignored")),
    ("edge", "every group has one sample", samples([3, 1, 0], "abc"), ("group-of-one-nan", "groups-ignored")),
    ("edge", "rewards that differ by 2^-20", samples([1, 1 + 2**-20, 1], "aaa"), ("not-centred", "order-lost")),
    ("edge", "large rewards", samples([1e6, -1e6, 2e6], "aaa"), ("order-lost", "std-over-n")),
]


def groups() -> Iterator[Case]:
    for scale in ("std", "none"):
        for kind, comment, rewards, flags in GROUPS:
            more = ("inert-knob",) if scale == "none" else ()
            words = f"{comment}; centred only" if scale == "none" else comment
            yield Case("group_advantages", kind, words, {"scale": scale}, rewards, (*more, *flags))
