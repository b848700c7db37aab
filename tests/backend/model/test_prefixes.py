"""Sharing prefixes: nothing is lost, the most is saved, and a model computes the same."""

from collections.abc import Sequence
from itertools import accumulate

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


@given(families(8), st.integers(1, 4))
def test_each_prefix_that_is_long_enough_is_computed_once(sequences: Sequences, min_length: int) -> None:
    """Count the distinct prefixes, of all sequences that have their first ``min_length`` tokens in common."""
    prefixes = set()
    for i, row in enumerate(sequences):
        family = tuple(row[:min_length]) if len(row) >= min_length else i
        prefixes |= {(family, *row[:n]) for n in range(1, len(row) + 1)}
    assert len(shared(sequences, min_length).order) == len(prefixes)


@given(families(12), st.integers(1, 4))
def test_every_sequence_is_there_token_by_token(sequences: Sequences, min_length: int) -> None:
    order, lengths, previous, rows, _ = shared(sequences, min_length)
    layout = Layout(lengths, previous)
    tokens = np.concatenate([np.array(row) for row in sequences])[order]
    starts = list(accumulate(lengths, initial=0))
    before = list(range(-1, len(order) - 1))  # for each computed token the one before it
    for start, token in zip(starts, previous):
        before[start] = -1 if token is None else token
    for sequence, at in zip(sequences, np.split(rows, list(accumulate(map(len, sequences)))[:-1]), strict=True):
        assert tokens[at].tolist() == sequence
        assert layout.positions[at].tolist() == list(range(len(sequence)))
        assert [before[row] for row in at] == [-1, *at[:-1]]
    assert set(rows) == set(range(len(order)))


def test_by_hand() -> None:
    """5 6 is computed once, with 9, and 7 8 follows its 6. Levels come one after the other, each by length."""
    order, lengths, previous, rows, _ = shared([[5, 6, 7, 8], [5, 6, 9], [1]], min_length=2)
    assert order.tolist() == [7, 4, 5, 6, 2, 3]
    assert lengths == [1, 3, 2]
    assert previous == [None, None, 2]
    assert rows.tolist() == [1, 2, 4, 5, 1, 2, 3, 0]


def test_a_tree_of_three_levels_by_hand() -> None:
    """9 9 9 is whole, 7 6 5 follows its first 9, a 4 follows 7 and another 6. 9 7 6 is a prefix."""
    order, lengths, previous, rows, _ = shared(
        [[9, 7, 6, 4], [9, 9, 9], [9, 7, 6], [9, 7, 6, 5], [9, 7, 4]], min_length=1
    )
    assert lengths == [3, 3, 1, 1]
    assert previous == [None, 0, 3, 4]
    assert order.tolist() == [4, 5, 6, 11, 12, 13, 16, 3]
    assert rows.tolist() == [0, 3, 4, 7, 0, 1, 2, 0, 3, 4, 0, 3, 4, 5, 0, 3, 6]


def test_a_sequence_that_is_a_prefix_has_no_segment() -> None:
    _, lengths, previous, rows, _ = shared([[5, 6], [5, 6, 9]], min_length=2)
    assert (lengths, previous, rows.tolist()) == ([3], [None], [0, 1, 0, 1, 2])


def test_equal_sequences_are_one() -> None:
    _, lengths, previous, rows, _ = shared([[5, 6], [5, 6], [5, 6]], min_length=2)
    assert (lengths, previous, rows.tolist()) == ([2], [None], [0, 1] * 3)


@pytest.mark.parametrize("min_length", [3, 16])
def test_short_prefixes_are_left_alone(min_length: int) -> None:
    order, lengths, previous, rows, _ = shared([[5, 6, 7], [5, 6, 8, 9], [5, 6]], min_length)
    assert order.tolist() == rows.tolist() == list(range(9))
    assert (lengths, previous) == ([3, 4, 2], [None, None, None])
    assert saved([[*range(min_length), i] for i in range(2)], min_length) == min_length


def test_one_sequence_is_as_it_was() -> None:
    assert shared([[7, 8]], 1).lengths == [2]


def test_a_conversation_that_grows_turn_by_turn_is_its_last_turn() -> None:
    talk = np.random.default_rng(0).integers(0, 300, 3000).tolist()
    _, lengths, previous, rows, _ = shared([talk[: 10 * i] for i in range(1, 301)], min_length=1)
    assert (lengths, previous) == ([3000], [None])
    assert rows[:10].tolist() == rows[10:20].tolist() == list(range(10))


def test_a_group_of_one_length_attends_in_one_call_on_each_turn() -> None:
    """4 turns of 20 tokens with 4 answers of 5 each; the last answer of a turn goes on: 1 + 4 calls."""
    draw, talk, batch = np.random.default_rng(0), list[int](), []
    for _ in range(4):
        talk += draw.integers(0, 10**6, 20).tolist()
        batch += [[*talk, *draw.integers(0, 10**6, 5).tolist()] for _ in range(4)]
        talk = batch[-1]
    _, lengths, previous, *_ = shared(batch, min_length=16)
    assert sum(lengths) == 4 * 20 + 16 * 5 and len(lengths) == 13
    assert len(Layout(lengths, previous).groups) <= 1 + 2 * 4


def test_a_row_of_logits_for_each_hidden_state_and_target() -> None:
    """The last token of a prefix has another target in each sequence; two have the same."""
    prefixes = shared([[5, 6, 7, 8], [5, 6, 9], [5, 6, 7], [5, 6]], min_length=2)
    targets = np.array([6, 7, 8, 1, 6, 9, 1, 6, 7, 3, 6, 7])
    tokens, inverse = logit_rows(prefixes, targets)
    assert prefixes.inverse[tokens][inverse].tolist() == prefixes.inverse.tolist()
    assert targets[tokens][inverse].tolist() == targets.tolist()
    assert len(tokens) == len(set(zip(prefixes.inverse.tolist(), targets.tolist()))) == 7


@given(families(8), st.sampled_from([(), (2,)]), st.integers(0, 99))
def test_logit_rows_give_every_token_its_own(sequences: Sequences, more: tuple[int, ...], seed: int) -> None:
    prefixes = shared(sequences, min_length=1)
    targets = np.random.default_rng(seed).integers(0, 2, (len(prefixes.inverse), *more))
    tokens, inverse = logit_rows(prefixes, targets)
    kinds = [(row, *np.atleast_1d(target)) for row, target in zip(prefixes.inverse, targets)]
    assert [kinds[token] for token in tokens[inverse]] == kinds
    assert len(tokens) == len(set(kinds)) == len(set(inverse))


PROMPT, OTHER = list(range(20)), [7, *range(30, 48)]
BATCH = [
    *[[*PROMPT, i, *tail] for i, tail in enumerate([[1, 2], [3], [4, 5], []])],
    [9, 8],
    [*OTHER, 2, 3],
    OTHER,
    [*OTHER, 2],
    [*OTHER, 2],
    [*PROMPT[:3], 40],
    [*PROMPT, 0, 1, 2, *range(25), 7],
    [*PROMPT, 0, 1, 2, *range(25), 8, 8],
    [*PROMPT, 0, 1, 2, *range(20), 9],
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
    order, lengths, previous, rows, _ = shared(BATCH, min_length=16)
    assert len(order) == 2 + 4 + 21 + (20 + 3 + 2 + 3 + 1) + (25 + 1 + 2 + 1)  # loose ones, OTHER, PROMPT, PROMPT 0 1 2

    def gradients(hidden: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((hidden * direction).sum(), list(model.parameters())))

    alone = model(tokens, list(map(len, BATCH)))
    model.checkpointing = checkpointing
    together = model(tokens[order], lengths, previous)[rows]
    exact = dtype == torch.float64
    torch.testing.assert_close(together, alone, atol=1e-12 if exact else 1e-5, rtol=0)
    for a, b in zip(gradients(together), gradients(alone), strict=True):
        assert (a - b).norm() <= (1e-12 if exact else 1e-5) * b.norm()


class Unshared(Decoder):
    """A decoder without ``previous``, so that a client shares no prefixes."""

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
