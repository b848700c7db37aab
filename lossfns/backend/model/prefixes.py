"""Prefixes that sequences have in common: which tokens to compute, so that none is computed twice."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np


class SharedPrefixes(NamedTuple):
    """What is computed of N tokens end to end, and where each of them finds what was computed.

    ``order`` [M] are the tokens to compute, segment after segment of ``lengths``; segment i continues segment
    ``parents[i]``. Token n has the hidden state of computed token ``inverse[n]``.
    """

    order: np.ndarray
    lengths: list[int]
    parents: list[int | None]
    inverse: np.ndarray


def share_prefixes(tokens: Sequence[np.ndarray], least: int = 16) -> SharedPrefixes:
    """Groups the sequences by common prefixes such that the most tokens are saved.

    A sequence is in one group at most; each group computes the prefix of all its members once, and each member
    what it has beyond: nothing, if it is the prefix itself. Prefixes shorter than ``least`` are not worth the
    attention calls that they cost. Segments of one parent and one length are put side by side.
    """
    flat = np.concatenate(tokens)
    lengths = np.array([len(row) for row in tokens])
    # Bytes sort much faster than tokens, and no less together: a prefix in tokens is one in bytes.
    ranking = np.array(sorted(range(len(tokens)), key=[row.tobytes() for row in tokens].__getitem__))
    common = common_prefixes(flat, (lengths.cumsum() - lengths)[ranking], lengths[ranking], least)
    if not common.any():
        each = np.arange(len(flat))
        return SharedPrefixes(each, lengths.tolist(), [None] * len(tokens), each)
    group, prefix = np.empty_like(ranking), np.empty_like(ranking)
    group[ranking], prefix[ranking] = best_groups(common)
    return lay_out(lengths, group, prefix)


def common_prefixes(flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray, least: int) -> np.ndarray:
    """How many tokens each sequence but the last has in common with the next; 0 if fewer than ``least``."""
    common = np.zeros(len(starts) - 1, int)
    both = np.minimum(lengths[:-1], lengths[1:])
    near = np.flatnonzero(both >= least)
    head = starts[:, None] + np.arange(least)
    near = near[(flat[head[near]] == flat[head[near + 1]]).all(1)]  # of most pairs, no more needs to be read
    counts = both[near]
    ends = counts.cumsum()
    unequal = np.flatnonzero(flat[ranges(starts[near], counts)] != flat[ranges(starts[near + 1], counts)])
    first = np.append(unequal, counts.sum())[np.searchsorted(unequal, ends - counts)]
    common[near] = np.minimum(first, ends) - (ends - counts)
    return common


def best_groups(common: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The group of each sorted sequence (-1 for none) and the prefix it shares, from what neighbours share.

    A set of nodes in the tree of prefixes is opened; a sequence shares the longest open prefix that it has, so

        saved = Σ over sequences of the prefix it shares − Σ over open nodes of their prefix,

    and this is its maximum. What can be saved below a node depends on the rest through one number, the prefix
    that is open above it; from the leaves up, it is computed for all that there might be.
    """
    nodes = [(0, len(common) + 1, 0)]  # first sequence, last + 1, the node above; those above come first
    prefixes: list[np.ndarray] = []  # of those above, from 0 (none is open) on, and the node's own
    saved = []  # below the node if that one is the longest open prefix
    for i, (first, last, above) in enumerate(nodes):
        inside = common[first : last - 1]
        prefixes.append(np.append(prefixes[above] if i else 0, inside.min()))
        cuts = first + 1 + np.flatnonzero(inside == inside.min())
        below = [(a, b, i) for a, b in pairwise([first, *cuts.tolist(), last]) if b - a > 1]
        alone = last - first - sum(b - a for a, b, _ in below)
        saved.append(alone * prefixes[i])
        nodes += below
    opens = np.zeros(len(nodes), int)  # under how many of those above, the shortest ones, opening it saves more
    for i in reversed(range(len(nodes))):
        closed, opened = saved[i][:-1], saved[i][-1] - prefixes[i][-1]
        opens[i] = np.count_nonzero(opened > closed)
        if i:
            saved[nodes[i][2]] += np.maximum(closed, opened)
    group, prefix = np.full(len(common) + 1, -1), np.zeros(len(common) + 1, int)
    longest = np.zeros(len(nodes), int)  # which of a node's prefixes is the longest open one
    for i, (first, last, above) in enumerate(nodes):
        longest[i] = longest[above]
        if longest[i] < opens[i]:
            longest[i] = len(prefixes[i]) - 1
            group[first:last], prefix[first:last] = i, prefixes[i][-1]
    return group, prefix


def lay_out(lengths: np.ndarray, group: np.ndarray, prefix: np.ndarray) -> SharedPrefixes:
    """The segments of sequences of which those of one group share a prefix: first what continues nothing."""
    each, own, starts = np.arange(len(lengths)), lengths - prefix, lengths.cumsum() - lengths
    _, member, which = np.unique(group, return_index=True, return_inverse=True)
    leader = np.where(group >= 0, member[which], each)  # whose tokens a group's prefix is read from
    leads, goes_on = np.flatnonzero((group >= 0) & (leader == each)), np.flatnonzero(own)
    reads = np.append(starts[leads], (starts + prefix)[goes_on])
    counts = np.append(prefix[leads], own[goes_on])
    after = np.append(np.full(len(leads), -1), np.where(group >= 0, leader, -1)[goes_on])
    place = np.lexsort((counts, after))
    at = np.empty_like(place)  # where each segment begins among the computed tokens
    at[place] = counts[place].cumsum() - counts[place]
    begins = np.zeros((len(lengths), 2), int)
    begins[leads, 0], begins[goes_on, 1] = at[: len(leads)], at[len(leads) :]
    begins[:, 0] = begins[leader, 0]
    segment = np.zeros(len(lengths), int)
    segment[leads] = np.argsort(place)[: len(leads)]
    return SharedPrefixes(
        ranges(reads[place], counts[place]),
        counts[place].tolist(),
        [int(segment[i]) if i >= 0 else None for i in after[place]],
        ranges(begins.ravel(), np.stack((prefix, own), 1).ravel()),
    )


def head_rows(rows: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which logprobs to compute, for tokens n that have hidden state ``rows[n]`` and ``targets`` [N] or [N, K].

    Row r of the head reads hidden state ``read[r]`` [R], and token n takes what row ``spread[n]`` [N] gives: the
    same as the first token that has its hidden state, if they have the same targets.
    """
    each = np.arange(len(rows))
    first = np.empty(rows.max() + 1, int)
    first[rows[::-1]] = each[::-1]  # of several tokens the one that is written last stays
    like = first[rows]
    same = (targets == targets[like]).reshape(len(rows), -1).all(1)
    takes = np.where(same, like, each)
    reads = takes == each
    return rows[reads], (reads.cumsum() - 1)[takes]


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``counts[i]`` whole numbers from ``starts[i]`` on, for one i after the other."""
    offsets: np.ndarray = np.repeat(starts - (counts.cumsum() - counts), counts)
    return offsets + np.arange(len(offsets))
