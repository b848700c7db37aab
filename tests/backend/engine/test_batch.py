"""Datums as the model takes them: every token and target is found again, with shared and separate prefixes."""

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import DATA, SHAPE, client, texts

from lossfns import Datum, LossInputError, ModelInput, TensorData
from lossfns.backend.engine.batch import ModelInputs, inputs_with_targets, inputs_without_targets, pack_inputs
from lossfns.backend.model.prefixes import share_prefixes, unshared

CPU = torch.device("cpu")


@st.composite
def datums(draw: Callable[..., Any]) -> ModelInputs:
    """Draw sequences: some share 16 tokens or more, some are equal. Targets are [N] or [N, K]."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    beginnings = [rng.integers(5, size=rng.integers(1, 40)) for _ in range(draw(st.integers(1, 3)))]
    count, targets = draw(st.integers(1, 8)), draw(st.sampled_from([(), (1,), (3,)]))
    ends = [rng.integers(5, size=rng.integers(0, 12)) for _ in range(count)]
    tokens = [np.concatenate([beginnings[rng.integers(len(beginnings))], end]) for end in ends]
    rows = [rng.integers(draw(st.sampled_from([1, 3])), size=(len(ids), *targets)) for ids in tokens]
    return ModelInputs(tokens, rows)


def whole(index: torch.Tensor | None, count: int) -> torch.Tensor:
    return torch.arange(count) if index is None else index


@pytest.mark.parametrize("share_prefixes", [share_prefixes, unshared])
@given(datums())
def test_every_position_reads_its_own_past_and_its_own_target(share_prefixes: Any, inputs: ModelInputs) -> None:
    """Follow a position to its row of the head, and from there to the token whose hidden state the row reads."""
    batch = pack_inputs(inputs, share_prefixes(inputs.tokens), CPU)
    begins = np.cumsum([0, *batch.lengths])
    segment = np.repeat(np.arange(len(batch.lengths)), batch.lengths)

    def past(token: int) -> list[int]:
        """The tokens that a computed token sees, itself last."""
        i = segment[token]
        previous = batch.previous[i]
        return ([] if previous is None else past(previous)) + batch.tokens[begins[i] : token + 1].tolist()

    assert batch.targets is not None
    hidden_rows, count = whole(batch.hidden_rows, len(batch.tokens)), len(batch.targets)
    inverse = whole(batch.inverse, count)
    assert len(hidden_rows) == count and len(inverse) == sum(inputs.lengths)
    n = 0
    for ids, targets in zip(inputs.tokens, inputs.targets):
        for i, target in enumerate(targets.tolist()):
            assert past(int(hidden_rows[inverse[n]])) == ids[: i + 1].tolist()
            assert batch.targets[inverse[n]].tolist() == target
            n += 1


@given(datums())
def test_nothing_is_computed_or_scored_for_nothing(inputs: ModelInputs) -> None:
    batch = pack_inputs(inputs, share_prefixes(inputs.tokens), CPU)
    assert batch.targets is not None
    assert set(whole(batch.hidden_rows, len(batch.tokens)).tolist()) == set(range(len(batch.tokens)))
    assert set(whole(batch.inverse, len(batch.targets)).tolist()) == set(range(len(batch.targets)))
    assert len(batch.tokens) <= sum(inputs.lengths) == len(pack_inputs(inputs, unshared(inputs.tokens), CPU).tokens)


@given(datums(), st.integers(0, 8), st.integers(0, 8))
def test_a_part_is_that_of_the_datums(inputs: ModelInputs, first: int, last: int) -> None:
    part = inputs.part(slice(first, last))
    assert part.lengths == inputs.lengths[first:last] == part.output_lengths
    assert part.targets == inputs.targets[first:last]
    embedded = ModelInputs(inputs.tokens, [])
    assert embedded.output_lengths == [1] * len(inputs.tokens) and embedded.targets_per_token == 1


def test_without_targets_a_token_that_is_shared_is_read_by_each() -> None:
    """Two sequences of 20 tokens that differ in the last one: 19 shared tokens, 21 in all."""
    ids = np.arange(20)
    inputs = ModelInputs([ids, np.append(ids[:-1], 25)], [])
    batch = pack_inputs(inputs, share_prefixes(inputs.tokens), CPU)
    assert batch.targets is None and batch.inverse is None and batch.hidden_rows is not None
    assert len(batch.tokens) == 21
    assert batch.tokens[batch.hidden_rows].tolist() == [*ids, *ids[:-1], 25]


def test_datums_become_rows_of_ids() -> None:
    inputs = inputs_with_targets(texts_of([3, 1, 2], [1, 2, 3]), 4)
    assert [ids.tolist() for ids in inputs.tokens] == [[3, 1, 2]]
    assert [ids.tolist() for ids in inputs.targets] == [[1, 2, 3]]
    assert inputs.tokens[0].dtype == np.int64
    assert inputs_without_targets(texts_of([3, 1, 2], [1, 2, 3]), 4).targets == []


def texts_of(ids: list[int], targets: list[int]) -> list[Datum]:
    return [Datum(ModelInput.from_ints(ids), {"target_tokens": TensorData(targets, "int64", [len(targets)])})]


@pytest.mark.parametrize(
    ("ids", "targets", "field"),
    [
        ([4], [1], "model_input"),
        ([-1], [1], "model_input"),
        ([], [], "model_input"),
        ([1], [4], "target_tokens"),
        ([1, 2], [1], "target_tokens"),
    ],
)
def test_ids_that_the_model_does_not_have_are_refused_by_their_datum(
    ids: list[int], targets: list[int], field: str
) -> None:
    with pytest.raises(LossInputError) as error:
        inputs_with_targets([*texts_of([1], [1]), *texts_of(ids, targets)], 4)
    assert (error.value.datum, error.value.field) == (1, field)


def test_one_call_has_one_number_of_targets() -> None:
    with pytest.raises(LossInputError, match=r"datum\[4\].*one K"):
        inputs_with_targets([*DATA, *texts(Random(0), count=1, targets=2)], SHAPE["vocab_size"])


def test_the_model_gets_what_the_datums_share_once() -> None:
    """A group of five with a prompt of 20 tokens and one token each."""
    c, counted = client(), []
    prompt = list(range(20))
    data = [
        Datum(
            ModelInput.from_ints([*prompt, i]),
            {"target_tokens": [*prompt[1:], i, 30], "weights": [0.0] * 20 + [1.0]},
        )
        for i in range(5)
    ]
    c.model.register_forward_hook(lambda module, args, hidden: counted.append(len(hidden)))
    c.forward_backward(data, "cross_entropy").result()
    assert counted[-1] == 20 + 5
