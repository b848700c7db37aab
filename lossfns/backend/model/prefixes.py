"""Sharing of prefixes: which tokens of a batch to compute, so that a common prefix is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np


class SharedPrefixes(NamedTuple):
    """A batch of N tokens as M ≤ N computed ones, in segments. A segment may continue an earlier one, its parent.

    Attributes:
        order: [M] the tokens to compute, segment after segment, as indices into the batch.
        lengths: tokens of each segment.
        parents: for each segment the index of its parent, or None.
        inverse: [N] for each token of the batch the computed token that has its hidden state.
    """

    order: np.ndarray
    lengths: list[int]
    parents: list[int | None]
    inverse: np.ndarray


def share_prefixes(tokens: Sequence[np.ndarray], min_length: int = 16) -> SharedPrefixes:
    """Group sequences that have a prefix in common, such that the most tokens are saved.

    The prefix of a group becomes one segment, and what a member has beyond it becomes another, which continues the
    first. A member that is no longer than the prefix has no segment of its own. A sequence is in at most one group.
    Segments with the same parent and the same length are adjacent, so that they attend in one call.

    Args:
        tokens: ids of each sequence, at least one.
        min_length: shorter prefixes are not shared; they save less than their attention calls cost.
    """
    flat = np.concatenate(tokens)
    lengths = np.array([len(row) for row in tokens])
    # Sorting by bytes is much faster than by tokens, and it brings common prefixes together just as well.
    ranking = np.array(sorted(range(len(tokens)), key=[row.tobytes() for row in tokens].__getitem__))
    common = common_prefixes(flat, (lengths.cumsum() - lengths)[ranking], lengths[ranking], min_length)
    if not common.any():
        each = np.arange(len(flat))
        return SharedPrefixes(each, lengths.tolist(), [None] * len(tokens), each)
    group, prefix = np.empty_like(ranking), np.empty_like(ranking)
    group[ranking], prefix[ranking] = best_groups(common)
    return build_segments(lengths, group, prefix)


def common_prefixes(flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray, min_length: int) -> np.ndarray:
    """Return how many tokens each sequence but the last has in common with the next; 0 below ``min_length``.

    ``flat`` holds the tokens; a sequence begins at its entry of ``starts``.
    """
    common = np.zeros(len(starts) - 1, int)
    shorter = np.minimum(lengths[:-1], lengths[1:])
    pairs = np.flatnonzero(shorter >= min_length)
    beginning = starts[:, None] + np.arange(min_length)
    # Most pairs differ in their first tokens already.
    pairs = pairs[(flat[beginning[pairs]] == flat[beginning[pairs + 1]]).all(1)]
    # The pairs are compared end to end: pair i at ends[i] − counts[i] : ends[i]. ``first`` is the first unequal entry
    # from the beginning of a pair on; it may lie beyond the pair.
    counts = shorter[pairs]
    ends = counts.cumsum()
    unequal = np.flatnonzero(flat[ranges(starts[pairs], counts)] != flat[ranges(starts[pairs + 1], counts)])
    first = np.append(unequal, counts.sum())[np.searchsorted(unequal, ends - counts)]
    common[pairs] = np.minimum(first, ends) - (ends - counts)
    return common


def best_groups(common: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose the prefixes to share, such that the most tokens are saved.

    Common prefixes form a tree. A node is a range of sorted sequences and the longest prefix that they all have; its
    children are the ranges within it that have a longer one. Some nodes are opened: their prefix is computed once. A
    sequence uses the longest open prefix that it has, so

        saved = Σ over sequences of the length of the prefix that they use − Σ over open nodes of their prefix's length.

    Dynamic programming finds the maximum. What a subtree saves depends on the rest of the tree only through the length
    of the longest prefix that is open above it. From the leaves to the root, it is computed for each such length.

    Args:
        common: tokens that each sequence, in sorted order, has in common with the next.

    Returns:
        For each sequence in sorted order its group, −1 for none, and the length of the prefix that the group shares.
    """
    nodes = [(0, len(common) + 1, 0)]  # first sequence, last + 1, parent; a parent comes before its children
    candidates: list[np.ndarray] = []  # per node: what the longest open prefix may be: 0 (none), an ancestor's, its own
    saved = []  # per node and candidate: what the subtree saves if the candidate is the longest open prefix
    for node, (first, last, parent) in enumerate(nodes):  # nodes grows in the loop
        inside = common[first : last - 1]
        candidates.append(np.append(candidates[parent] if node else 0, inside.min()))
        cuts = first + 1 + np.flatnonzero(inside == inside.min())
        children = [(a, b, node) for a, b in pairwise([first, *cuts.tolist(), last]) if b - a > 1]
        without_child = last - first - sum(b - a for a, b, _ in children)
        saved.append(without_child * candidates[node])
        nodes += children
    # Per node: it is opened if the longest open prefix above it is one of its first ``opens`` candidates. The first are
    # the shortest, and a node gains less by being opened below a longer one.
    opens = np.zeros(len(nodes), int)
    for node in reversed(range(len(nodes))):
        closed, opened = saved[node][:-1], saved[node][-1] - candidates[node][-1]
        opens[node] = np.count_nonzero(opened > closed)
        if node:
            saved[nodes[node][2]] += np.maximum(closed, opened)
    group, prefix = np.full(len(common) + 1, -1), np.zeros(len(common) + 1, int)
    longest = np.zeros(len(nodes), int)  # per node: index of the candidate that is the longest open prefix
    for node, (first, last, parent) in enumerate(nodes):
        longest[node] = longest[parent]
        if longest[node] < opens[node]:
            longest[node] = len(candidates[node]) - 1
            group[first:last], prefix[first:last] = node, candidates[node][-1]
    return group, prefix


def build_segments(lengths: np.ndarray, group: np.ndarray, prefix: np.ndarray) -> SharedPrefixes:
    """Lay out segments, those without a parent first.

    Args:
        lengths: tokens of each sequence.
        group: the group of each sequence, −1 for none.
        prefix: tokens that a sequence shares with its group.
    """
    each, suffix, starts = np.arange(len(lengths)), lengths - prefix, lengths.cumsum() - lengths
    _, member, group_index = np.unique(group, return_index=True, return_inverse=True)
    leader = np.where(group >= 0, member[group_index], each)  # the sequence that a group's prefix is copied from
    leaders, continued = np.flatnonzero((group >= 0) & (leader == each)), np.flatnonzero(suffix)

    # The segments: prefixes of the groups, then suffixes of the sequences.
    sources = np.append(starts[leaders], (starts + prefix)[continued])
    counts = np.append(prefix[leaders], suffix[continued])
    parent_leader = np.append(np.full(len(leaders), -1), np.where(group >= 0, leader, -1)[continued])
    order = np.lexsort((counts, parent_leader))
    counts_in_order = counts[order]

    # Where the two parts of each sequence begin among the computed tokens.
    segment_starts = np.empty_like(order)
    segment_starts[order] = counts_in_order.cumsum() - counts_in_order
    begins = np.zeros((len(lengths), 2), int)
    begins[leaders, 0], begins[continued, 1] = segment_starts[: len(leaders)], segment_starts[len(leaders) :]
    begins[:, 0] = begins[leader, 0]

    prefix_segment = np.zeros(len(lengths), int)
    prefix_segment[leaders] = np.argsort(order)[: len(leaders)]  # the inverse of the order
    return SharedPrefixes(
        ranges(sources[order], counts_in_order),
        counts_in_order.tolist(),
        [int(prefix_segment[i]) if i >= 0 else None for i in parent_leader[order]],
        ranges(begins.ravel(), np.stack((prefix, suffix), 1).ravel()),
    )


def logit_rows(rows: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose the rows of logits to compute: tokens with the same hidden state and the same targets share a row.

    Args:
        rows: [N] for each token the index of its hidden state.
        targets: [N] or [N, K] target ids.

    Returns:
        ``hidden_rows`` [R], for each row of logits the hidden state that it reads, and ``inverse`` [N], for each token
        its row of logits.
    """
    each = np.arange(len(rows))
    first = np.empty(rows.max() + 1, int)
    first[rows[::-1]] = each[::-1]  # numpy keeps the last of several writes: the first token's
    same_hidden = first[rows]
    same = (targets == targets[same_hidden]).reshape(len(rows), -1).all(1)
    representative = np.where(same, same_hidden, each)
    computed = representative == each
    return rows[computed], (computed.cumsum() - 1)[representative]


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Concatenate arange(starts[i], starts[i] + counts[i]) for all i."""
    offsets: np.ndarray = np.repeat(starts - (counts.cumsum() - counts), counts)
    return offsets + np.arange(len(offsets))
