"""Sharing of prefixes: which tokens of a batch to compute, so that a common prefix is computed once.

The sequences of a batch form a tree: the turns of a conversation, groups of completions that continue each of them. One
sequence is computed whole. Each other one is computed from the token on at which it leaves the tree of those before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class SharedPrefixes(NamedTuple):
    """A batch of N tokens as M ≤ N computed ones, in segments. A segment may continue another from any of its tokens.

    Attributes:
        order: [M] the tokens to compute, segment after segment, as indices into the batch. They are all tokens in order
            if M = N.
        lengths: tokens of each segment.
        previous: for each segment the computed token that comes before its first one, in an earlier segment; None where
            a sequence begins.
        inverse: [N] for each token of the batch the computed token that has its hidden state.
        copied: the summed lengths of the sequences whose segments continue others: attention may copy their keys.
    """

    order: np.ndarray
    lengths: list[int]
    previous: list[int | None]
    inverse: np.ndarray
    copied: int = 0

    @property
    def tokens_in_memory(self) -> int:
        """The number of tokens that would take as much memory if sequences shared nothing.

        A copied token counts as a quarter: its key and value, and where queries are added a query and an output. That
        is at most 4 of the some 20 vectors that a layer keeps of a token.
        """
        return len(self.order) + math.ceil(self.copied / 4)


def share_prefixes(tokens: Sequence[np.ndarray], min_length: int = 16) -> SharedPrefixes:
    """Compute each common prefix of at least ``min_length`` tokens once.

    In sorted order, the longest prefix that a sequence shares with any earlier sequence is the prefix that it shares
    with the sequence before it. So each sequence continues the sequence before it, and its segment is the rest. A
    sequence that is a prefix of the sequence before it has no segment.

    Args:
        tokens: ids of each sequence, at least one.
        min_length: shorter prefixes are not shared; they save less than the attention to them costs. There is
            no such bound for tokens that follow a shared prefix: to share them needs no further segment.
    """
    flat = np.concatenate(tokens)
    lengths = np.array([len(row) for row in tokens])
    # Sorting by bytes is much faster than by tokens, and it brings common prefixes together just as well. Descending
    # order puts a sequence before its prefixes.
    ranking = np.array(sorted(range(len(tokens)), key=[row.tobytes() for row in tokens].__getitem__, reverse=True))
    starts, lengths_in_order = (lengths.cumsum() - lengths)[ranking], lengths[ranking]
    common = common_prefixes(flat, starts, lengths_in_order, min_length)
    if not common.any():
        return unshared(tokens)
    return build_segments(starts, lengths_in_order, np.append(0, common))


def unshared(tokens: Sequence[np.ndarray]) -> SharedPrefixes:
    """Make each sequence a segment of its own."""
    in_order = np.arange(sum(map(len, tokens)))
    return SharedPrefixes(in_order, [len(ids) for ids in tokens], [None] * len(tokens), in_order)


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


def build_segments(starts: np.ndarray, lengths: np.ndarray, prefixes: np.ndarray) -> SharedPrefixes:
    """Lay out segments level by level; those that continue the same token and are equally long are adjacent.

    Args:
        starts: index of the first token of each sequence, in sorted order.
        lengths: tokens of each sequence.
        prefixes: tokens that a sequence has in common with the one before it.
    """
    parents, levels = tree_of_sequences(prefixes.tolist(), lengths.tolist())
    rest = lengths - prefixes  # tokens of each segment
    order = np.lexsort((rest, prefixes, parents, levels))
    order = order[rest[order] > 0]
    segment_starts = np.zeros_like(starts)
    segment_starts[order] = rest[order].cumsum() - rest[order]
    previous = segment_starts[parents] + prefixes - prefixes[parents] - 1
    inverse = np.empty(lengths.sum(), int)
    last = 0
    for start, prefix, length, segment in zip(*(x.tolist() for x in (starts, prefixes, lengths, segment_starts))):
        inverse[start : start + prefix] = inverse[last : last + prefix]
        inverse[start + prefix : start + length] = np.arange(segment, segment + length - prefix)
        last = start
    copied = int(lengths[(prefixes > 0) & (rest > 0)].sum())
    return SharedPrefixes(
        ranges((starts + prefixes)[order], rest[order]),
        rest[order].tolist(),
        [row if level else None for row, level in zip(previous[order].tolist(), levels[order].tolist())],
        inverse,
        copied,
    )


def tree_of_sequences(prefixes: list[int], lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return for each sequence, in sorted order, the sequence whose segment its segment continues, and its level.

    The segment of sequence i begins at position ``prefixes[i]``. It continues the last earlier segment that begins
    before this position. On level 0 a segment continues none.
    """
    parents, levels = [], []
    path: list[int] = []  # the segments that the last sequence consists of
    for i, (prefix, length) in enumerate(zip(prefixes, lengths)):
        while path and prefixes[path[-1]] >= prefix:
            path.pop()
        parents.append(path[-1] if path else 0)
        levels.append(len(path))
        if length > prefix:
            path.append(i)
    return np.array(parents), np.array(levels)


def logit_rows(shared: SharedPrefixes, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose the rows of logits to compute: one for all tokens with the same hidden state and the same targets.

    Args:
        shared: the computed tokens of the batch.
        targets: [N] or [N, K] target ids.

    Returns:
        ``tokens`` [R], for each row of logits a token of the batch that reads it, and ``inverse`` [N], for each token
        its row of logits. The first M rows are those of the computed tokens.
    """
    differ = targets != targets[shared.order][shared.inverse]
    # Few tokens have other targets than the computed token: those at which sequences part.
    others = np.flatnonzero(differ if differ.ndim == 1 else differ.any(1))
    if not len(others):
        return shared.order, shared.inverse
    kinds = np.column_stack((shared.inverse[others], targets[others]))
    _, first, kind = np.unique(kinds, axis=0, return_index=True, return_inverse=True)
    inverse = shared.inverse.copy()
    inverse[others] = len(shared.order) + kind.reshape(-1)
    return np.append(shared.order, others[first]), inverse


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Concatenate arange(starts[i], starts[i] + counts[i]) for all i."""
    offsets: np.ndarray = np.repeat(starts - (counts.cumsum() - counts), counts)
    return offsets + np.arange(len(offsets))
