"""Sharing prefixes: nothing is lost, the most is saved, and a model computes the same."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, takewhile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lossfns
from lossfns.backend import LocalTrainingClient
from lossfns.backend.model.attention import Layout
from lossfns.backend.model.decoder import Decoder
from lossfns.backend.model.prefixes import SharedPrefixes, logit_rows, share_prefixes

Sequences = list[list[int]]


def shared(sequences: Sequences, min_length: int) -> SharedPrefixes:
    return share_prefixes([np.array(row) for row in sequences], min_length)


def saved(sequences: Sequences, min_length: int) -> int:
    return sum(map(len, sequences)) - len(shared(sequences, min_length).order)


@st.composite
def families(draw: st.DrawFn, most: int = 5) -> Sequences:
    """Draw sequences; many of them continue a part of an earlier one."""
    rows: Sequences = []
    for _ in range(draw(st.integers(1, most))):
        base = draw(st.sampled_from([[], *rows]))
        tail = draw(st.lists(st.integers(0, 2), max_size=5))
        rows.append(base[: draw(st.integers(0, len(base)))] + tail or [draw(st.integers(0, 300))])
    return rows


def partitions(rows: Sequences) -> Iterator[list[Sequences]]:
    if not rows:
        yield []
        return
    for rest in partitions(rows[1:]):
        yield [rows[:1], *rest]
        for i, group in enumerate(rest):
            yield [*rest[:i], [rows[0], *group], *rest[i + 1 :]]


@given(families(), st.integers(1, 4))
def test_no_grouping_saves_more(sequences: Sequences, min_length: int) -> None:
    """Compare with every possible grouping."""

    def saving(group: Sequences) -> int:
        prefix = len(list(takewhile(lambda column: len(set(column)) == 1, zip(*group))))
        return (len(group) - 1) * prefix if prefix >= min_length else 0

    assert saved(sequences, min_length) == max(sum(map(saving, groups)) for groups in partitions(sequences))


@given(families(12), st.integers(1, 4))
def test_every_sequence_is_there_token_by_token(sequences: Sequences, min_length: int) -> None:
    order, lengths, parents, rows = shared(sequences, min_length)
    layout = Layout(lengths, parents)
    tokens = np.concatenate([np.array(row) for row in sequences])[order]
    ends = list(accumulate(map(len, sequences)))
    starts = list(accumulate(lengths, initial=0))
    for sequence, at in zip(sequences, np.split(rows, ends[:-1]), strict=True):
        assert tokens[at].tolist() == sequence
        assert layout.positions[at].tolist() == list(range(len(sequence)))
        segment = next(i for i, end in enumerate(starts[1:]) if at[-1] < end)
        parent = parents[segment]
        before = [] if parent is None else list(range(starts[parent], starts[parent + 1]))
        assert at.tolist() == [*before, *range(starts[segment], at[-1] + 1)]
    assert set(rows) == set(range(len(order)))


def test_by_hand() -> None:
    """5 6 is computed once; segments without a parent come first, each kind by length."""
    order, lengths, parents, rows = shared([[5, 6, 7, 8], [5, 6, 9], [1]], min_length=2)
    assert order.tolist() == [7, 0, 1, 6, 2, 3]
    assert lengths == [1, 2, 1, 2]
    assert parents == [None, None, 1, 1]
    assert rows.tolist() == [1, 2, 4, 5, 1, 2, 3, 0]


def test_a_sequence_that_is_the_prefix_is_the_parent_itself() -> None:
    _, lengths, parents, rows = shared([[5, 6, 9], [5, 6]], min_length=2)
    assert (lengths, parents, rows.tolist()) == ([2, 1], [None, 0], [0, 1, 2, 0, 1])


def test_equal_sequences_are_one() -> None:
    _, lengths, parents, rows = shared([[5, 6], [5, 6], [5, 6]], min_length=2)
    assert (lengths, parents, rows.tolist()) == ([2], [None], [0, 1] * 3)


@pytest.mark.parametrize("min_length", [3, 16])
def test_short_prefixes_are_left_alone(min_length: int) -> None:
    order, lengths, parents, rows = shared([[5, 6, 7], [5, 6, 8, 9], [5, 6]], min_length)
    assert order.tolist() == rows.tolist() == list(range(9))
    assert (lengths, parents) == ([3, 4, 2], [None, None, None])
    assert saved([[*range(min_length), i] for i in range(2)], min_length) == min_length


def test_one_sequence_is_as_it_was() -> None:
    assert shared([[7, 8]], 1).lengths == [2]


def test_a_long_prefix_and_a_short_one_are_both_shared() -> None:
    """30 sequences share 4 tokens and 10 of them share 20: two groups save 19 · 4 + 9 · 20, one group saves 29 · 4."""
    start = [1, 2, 3, 4]
    alike, loose = [*start, *[5] * 16], [[*start, 10 + i, i] for i in range(20)]
    assert saved([[*alike, i] for i in range(10)] + loose, min_length=4) == 19 * 4 + 9 * 20


def test_a_conversation_that_grows_turn_by_turn() -> None:
    """Lengths 10, 20, ..., 3000. A group from the a-th to the b-th shares the a-th, which saves b - a times it."""
    talk = np.random.default_rng(0).integers(0, 300, 3000).tolist()
    best = [0]
    for b in range(1, 301):
        best.append(max(best[a - 1] + (b - a) * 10 * a for a in range(1, b + 1)))
    assert saved([talk[: 10 * i] for i in range(1, 301)], min_length=1) == best[-1]


def test_a_row_of_logits_for_each_hidden_state_and_target() -> None:
    """The last token of a prefix has another target in each sequence."""
    *_, rows = shared([[5, 6, 7, 8], [5, 6, 9], [5, 6, 7]], min_length=2)
    targets = np.array([6, 7, 8, 1, 6, 9, 1, 6, 7, 3])
    hidden_rows, inverse = logit_rows(rows, targets)
    assert hidden_rows[inverse].tolist() == rows.tolist()
    assert len(hidden_rows) == len(set(zip(rows.tolist(), targets.tolist())))
    assert [inverse[i] == inverse[j] for i, j in [(0, 4), (0, 7), (1, 5), (1, 8), (2, 9)]] == [
        True,
        True,
        False,
        True,
        False,
    ]


@given(families(8), st.sampled_from([(), (2,)]), st.integers(0, 99))
def test_logit_rows_give_every_token_its_own(sequences: Sequences, more: tuple[int, ...], seed: int) -> None:
    rows = shared(sequences, min_length=1).inverse
    targets = np.random.default_rng(seed).integers(0, 2, (len(rows), *more))
    hidden_rows, inverse = logit_rows(rows, targets)
    assert hidden_rows[inverse].tolist() == rows.tolist()
    target_of = {row: targets[n].tolist() for n, row in reversed(list(enumerate(inverse.tolist())))}
    assert [target_of[row] for row in inverse.tolist()] == targets.tolist()
    assert set(inverse.tolist()) == set(range(len(hidden_rows)))


PROMPT, OTHER = list(range(20)), [7, *range(30, 48)]
BATCH = [
    *[[*PROMPT, i, *tail] for i, tail in enumerate([[1, 2], [3], [4, 5], []])],
    [9, 8],
    [*OTHER, 2, 3],
    OTHER,
    [*OTHER, 2],
    [*OTHER, 2],
    [*PROMPT[:3], 40],
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_computes_the_same(dtype: torch.dtype, checkpointing: bool) -> None:
    """Compare hidden states and the gradient of every parameter."""
    model = Decoder(vocab_size=50, dim=32, layers=2, heads=4, kv_heads=2, hidden=48, seed=1).to(dtype)
    with torch.no_grad():  # large embeddings, so that every token matters
        model.embed.weight.mul_(20)
    tokens = torch.tensor([token for row in BATCH for token in row])
    direction = torch.randn(len(tokens), 32, dtype=dtype, generator=torch.Generator().manual_seed(0))
    order, lengths, parents, rows = shared(BATCH, min_length=16)
    assert len(order) == len(tokens) - 3 * 20 - 3 * 19

    def gradients(hidden: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((hidden * direction).sum(), list(model.parameters())))

    alone = model(tokens, list(map(len, BATCH)))
    model.checkpointing = checkpointing
    together = model(tokens[order], lengths, parents)[rows]
    exact = dtype == torch.float64
    torch.testing.assert_close(together, alone, atol=1e-12 if exact else 1e-5, rtol=0)
    for a, b in zip(gradients(together), gradients(alone), strict=True):
        assert (a - b).norm() <= (1e-12 if exact else 1e-5) * b.norm()


class Unshared(Decoder):
    """A decoder without ``parents``, so that a client shares no prefixes."""

    def forward(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:  # type: ignore[override]
        return super().forward(tokens, lengths)


def test_a_client_computes_the_same() -> None:
    """Compare logprobs of each datum and the gradient of a loss over all of them."""
    data = [lossfns.datum_from_tokens(row, prompt_length=1) for row in BATCH]
    logprobs, gradients = [], []
    for kind in (Decoder, Unshared):
        c = LocalTrainingClient(kind(vocab_size=50, dim=16, layers=1, heads=2, kv_heads=1, hidden=24), device="cpu")
        output = c.forward_backward_custom(data, lossfns.cross_entropy()).result()
        logprobs.append([o["logprobs"].to_torch() for o in output.loss_fn_outputs])
        gradients.append([p.grad for p in c.model.parameters()])
    for ours, theirs in zip(*logprobs, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    for a, b in zip(*gradients, strict=True):
        assert b.norm() > 0 and (a - b).norm() <= 1e-5 * b.norm()
