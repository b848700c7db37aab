"""Datums: coercion by key, sparse targets, the builders' one shift, and sampler logprobs in the targets' frame."""

import dataclasses
import importlib
import importlib.util
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lossfns import (
    Datum,
    EncodedTextChunk,
    Loss,
    LossInputError,
    ModelInput,
    TensorData,
    align_sampler_logprobs,
    cross_entropy,
    datum_from_model_input_weights,
    datum_from_tokens,
    dpo,
    grpo,
    gspo,
    importance_sampling,
    multi_target_cross_entropy,
    orpo,
    sequence_mean,
    with_tis,
)

OURS = SimpleNamespace(Datum=Datum, ModelInput=ModelInput, TensorData=TensorData, EncodedTextChunk=EncodedTextChunk)


def sdks() -> list[Any]:
    """Our types, and the SDK's own where it is installed: each test runs over what there is."""
    return [OURS, importlib.import_module("tinker")] if importlib.util.find_spec("tinker") else [OURS]


def inputs(sdk: Any = OURS, **fields: Any) -> dict[str, Any]:
    """The fields of a datum after its construction."""
    datum = sdk.Datum(sdk.ModelInput.from_ints([1, 2]), fields)
    return dict(datum.loss_fn_inputs)


def outcome(loss: Loss, data: list[Any], rows: list[Any]) -> tuple[float, list[Any]]:
    """Loss and gradients of logprobs given as nested lists."""
    logprobs = [torch.tensor(row, requires_grad=True) for row in rows]
    total, _ = loss(data, logprobs)
    total.backward()
    return total.item(), [lp.grad.tolist() for lp in logprobs]


def csr(dense: list[list[float]], dtype: str = "float32") -> TensorData:
    """Our sparse form of a matrix, by definition: the non-zero values row by row, where rows end, which columns."""
    entries = [[(k, x) for k, x in enumerate(row) if x != 0] for row in dense]
    ends = [sum(map(len, entries[:i])) for i in range(len(dense) + 1)]
    columns, values = zip(*[entry for row in entries for entry in row]) if ends[-1] else ((), ())
    return TensorData(list(values), dtype, [len(dense), len(dense[0])], ends, list(columns))


# ---- coercion ----------------------------------------------------------------------------------------------------

COERCED = [
    ("target_tokens", [1, 2], "int64", [2], [1, 2]),
    ("target_tokens", [1.0, 2.0], "int64", [2], [1, 2]),
    ("target_tokens", [[1, 2], [3, 4], [5, 6]], "int64", [3, 2], [1, 2, 3, 4, 5, 6]),
    ("target_tokens", np.array([1, 2], np.int32), "int64", [2], [1, 2]),
    ("target_tokens", torch.tensor([1, 2], dtype=torch.int32), "int64", [2], [1, 2]),
    ("weights", [0, 1], "float32", [2], [0.0, 1.0]),
    ("weights", [True, False], "float32", [2], [1.0, 0.0]),
    ("weights", [0.1], "float32", [1], [0.10000000149011612]),
    ("weights", [], "float32", [0], []),
    ("weights", torch.tensor([1, 0]), "int64", [2], [1, 0]),
    ("weights", torch.tensor([0.5, 1.0], dtype=torch.float64), "float32", [2], [0.5, 1.0]),
    ("weights", torch.tensor([0.5, 1.0], dtype=torch.bfloat16), "float32", [2], [0.5, 1.0]),
    ("weights", np.array([0.5, 1.0], np.float16), "float32", [2], [0.5, 1.0]),
    ("weights", torch.tensor([[0.5, 0.5], [1.0, 2.0]]), "float32", [2, 2], [0.5, 0.5, 1.0, 2.0]),
    ("advantages", [-1, 2], "float32", [2], [-1.0, 2.0]),
    ("logprobs", [-1.5, -2.0], "float32", [2], [-1.5, -2.0]),
    ("clip_low_threshold", [0.5], "float32", [1], [0.5]),
    ("clip_high_threshold", [1.5], "float32", [1], [1.5]),
    ("sequence_ratio_mask", [0, 1], "float32", [2], [0.0, 1.0]),
    ("anything", np.array([1.0, 2.0]), "float32", [2], [1.0, 2.0]),
    ("anything", torch.tensor([3, 4]), "int64", [2], [3, 4]),
]


@pytest.mark.parametrize("key, value, dtype, shape, data", COERCED)
def test_a_value_becomes_tensor_data_by_its_key(key: str, value: Any, dtype: str, shape: list[int], data: list) -> None:
    for sdk in sdks():
        field = inputs(sdk, **{key: value})[key]
        assert isinstance(field, sdk.TensorData)
        assert (field.dtype, field.shape, field.data) == (dtype, shape, data)
        assert list(map(type, field.data)) == list(map(type, data))
        assert field.to_torch().dtype == getattr(torch, dtype)
        assert list(field.to_torch().shape) == list(field.to_numpy().shape) == shape


def test_tensor_data_stays_as_it_is() -> None:
    """Even with another dtype than the key's; the SDK's own type is one as well."""
    for sdk in sdks():
        given = sdk.TensorData(data=[1, 2], dtype="int64")
        assert inputs(sdk, weights=given)["weights"] is given
        assert inputs(OURS, weights=given)["weights"] is given


@pytest.mark.parametrize("value", [(1.0,), 1.0, None, {1.0}, ModelInput.from_ints([1])], ids=lambda x: type(x).__name__)
def test_other_types_are_refused(value: Any) -> None:
    with pytest.raises(LossInputError, match=f"weights: expected a list, array, .* got a {type(value).__name__}"):
        inputs(weights=value)


@pytest.mark.parametrize("key", ["logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs"])
def test_null_is_nan_in_logprobs_and_nothing_elsewhere(key: str) -> None:
    first, second = inputs(**{key: [None, -1.0]})[key].data
    assert math.isnan(first)
    assert second == -1.0
    for other in ("weights", "advantages", "target_tokens"):
        with pytest.raises(LossInputError, match=f"{other}: expected a rectangular numeric array"):
            inputs(**{other: [None, 1.0]})


def test_our_columns_may_be_lists() -> None:
    """The SDK fails on these keys with a bare KeyError."""
    for key in ("old_logprobs", "ref_logprobs", "sampler_logprobs"):
        assert inputs(**{key: [-1, -2]})[key].dtype == "float32"


# ---- TensorData --------------------------------------------------------------------------------------------------


def test_data_is_flat_and_row_major_and_shape_may_be_none() -> None:
    for sdk in sdks():
        shaped = sdk.TensorData(data=[1, 2, 3, 4, 5, 6], dtype="int64", shape=[3, 2])
        assert shaped.data == [1, 2, 3, 4, 5, 6]
        assert shaped.tolist() == shaped.to_torch().tolist() == [[1, 2], [3, 4], [5, 6]]
        plain = sdk.TensorData(data=[0.5, 1.5], dtype="float32")
        assert plain.shape is None
        assert plain.to_numpy().tolist() == plain.data == [0.5, 1.5]
        assert sdk.TensorData(dtype="float32").data == []


def test_tensor_and_array_share_their_memory() -> None:
    for sdk in sdks():
        tensor_data = sdk.TensorData(data=[1.0, 2.0], dtype="float32")
        assert np.shares_memory(tensor_data.to_numpy(), tensor_data.to_torch().numpy())


def test_equality_is_identity() -> None:
    for sdk in sdks():
        one, other = (sdk.TensorData(data=[1.0], dtype="float32") for _ in range(2))
        assert one == one
        assert one != other


@pytest.mark.parametrize("values, dtype", [([1.5], "int64"), ([math.nan], "int64"), ([math.inf], "int64")])
def test_what_an_integer_cannot_hold_is_refused(values: list[float], dtype: str) -> None:
    with pytest.raises(LossInputError, match="whole numbers, got fractions"):
        TensorData(values, dtype)


# ---- sparse ------------------------------------------------------------------------------------------------------

MATRICES = [
    [[0.0, 0.25, 0.0, 0.75], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]],
    [[0.0, 0.0, 0.0]],
    [[0.0], [2.0], [0.0], [0.0]],
    [[1.0, 2.0], [3.0, 4.0]],
]


@pytest.mark.parametrize("dense", MATRICES)
def test_sparse_is_dense_with_the_zeros_left_out(dense: list[list[float]]) -> None:
    sparse = csr(dense)
    assert sparse.tolist() == sparse.to_torch().tolist() == dense
    assert sparse.data == [x for row in dense for x in row if x != 0]
    assert sparse.shape == [len(dense), len(dense[0])]


@pytest.mark.parametrize("dense", MATRICES)
def test_the_sdk_reads_our_sparse_form_and_we_read_its(dense: list[list[float]]) -> None:
    for sdk in sdks():
        ours = csr(dense)
        theirs = sdk.TensorData(ours.data, "float32", ours.shape, ours.sparse_crow_indices, ours.sparse_col_indices)
        back = TensorData(
            theirs.data, theirs.dtype, theirs.shape, theirs.sparse_crow_indices, theirs.sparse_col_indices
        )
        assert theirs.tolist() == back.tolist() == dense


def test_sparse_dense_flat_and_nested_targets_give_one_loss_and_gradient() -> None:
    """L = −Σ w·lp / Σ w: (0.25·2 + 0.75·4 + 2·3)/3 = 19/6, each gradient −w/3; unused slots get exactly 0."""
    weights = [[0.0, 0.25, 0.0, 0.75], [0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]]
    rows = [[[-1.0, -2.0, -3.0, -4.0], [-1.0, -2.0, -3.0, -4.0], [-3.0, -2.0, -1.0, -0.5]]]
    flat = [w for row in weights for w in row]
    forms = [csr(weights), weights, np.array(weights), torch.tensor(weights), TensorData(flat, "float32", [3, 4])]
    forms += [TensorData(flat, "float32")]
    data = [Datum(ModelInput.from_ints([1, 2, 3]), {"weights": form}) for form in forms]
    for sdk in sdks()[1:]:
        sparse = sdk.TensorData.from_torch_sparse(torch.tensor(weights))
        assert sparse.sparse_crow_indices is not None
        data += [
            sdk.Datum(sdk.ModelInput.from_ints([1, 2, 3]), {"weights": w}) for w in (sparse, torch.tensor(weights))
        ]
    results = [outcome(multi_target_cross_entropy(), [datum], rows) for datum in data]
    assert all(result == results[0] for result in results)
    loss, (grad,) = results[0]
    assert loss == pytest.approx(19 / 6, rel=1e-6)
    assert grad[0] == pytest.approx([0.0, -0.25 / 3, 0.0, -0.25], rel=1e-6)
    assert grad[1] == [0.0] * 4
    assert grad[2] == pytest.approx([-2 / 3, 0.0, 0.0, 0.0], rel=1e-6)


def test_a_sparse_denominator_counts_values_not_slots() -> None:
    """Σ w of the matrix: 0.25 + 0.75 + 1."""
    datum = Datum(ModelInput.from_ints([1, 2, 3]), {"weights": csr(MATRICES[0])})
    assert multi_target_cross_entropy().denominator([datum]) == 2.0


# ---- Datum and ModelInput ----------------------------------------------------------------------------------------


def test_a_datum_is_frozen_but_its_inputs_are_a_mutable_dict() -> None:
    """What is assigned later is not converted, and a loss reads it all the same."""
    for sdk in sdks():
        given = {"target_tokens": [2, 3], "weights": [1.0, 1.0]}
        datum = sdk.Datum(sdk.ModelInput.from_ints([1, 2]), given)
        with pytest.raises(dataclasses.FrozenInstanceError):
            datum.model_input = None
        assert given == {"target_tokens": [2, 3], "weights": [1.0, 1.0]}
        assert type(datum.loss_fn_inputs) is dict
        datum.loss_fn_inputs["weights"] = [0.0, 1.0]
        datum.loss_fn_inputs.pop("target_tokens")
        assert outcome(cross_entropy(), [datum], [[-1.0, -2.0]]) == (2.0, [[0.0, -1.0]])


def test_a_datum_without_inputs_has_none() -> None:
    for sdk in sdks():
        assert sdk.Datum(sdk.ModelInput.empty()).loss_fn_inputs == {}


def test_a_model_input_is_its_tokens() -> None:
    for sdk in sdks():
        made = sdk.ModelInput.from_ints([1, 2])
        assert made.append_int(3).to_ints() == [1, 2, 3]
        assert made.append(sdk.EncodedTextChunk(tokens=[4, 5])).to_ints() == [1, 2, 4, 5]
        assert (made.to_ints(), made.length, sdk.ModelInput.empty().length) == ([1, 2], 2, 0)
        assert made == sdk.ModelInput.from_ints([1, 2])
        assert made != sdk.ModelInput.from_ints([1, 3])
        assert [list(chunk.tokens) for chunk in made.chunks] == [[1, 2]]
        for same in ((1, 2), range(1, 3), [1.0, 2.0], [True, 2]):
            assert sdk.ModelInput.from_ints(same).to_ints() == [1, 2]


@pytest.mark.parametrize("tokens", [[1.5], [[1, 2]], ["a"], [None]], ids=str)
def test_a_model_input_refuses_what_is_no_id(tokens: list[Any]) -> None:
    """As the SDK does: every error here is a ValueError."""
    for sdk in sdks():
        with pytest.raises(ValueError):
            sdk.ModelInput.from_ints(tokens)


def test_a_fractional_id_is_not_cut_off() -> None:
    for sdk in sdks():
        with pytest.raises(ValueError):
            sdk.ModelInput.empty().append_int(1.5)


# ---- one result for both SDKs' objects ---------------------------------------------------------------------------

POLICY = {"advantages": [[0.5, 0.5, 0.5], [-2.0, -2.0]], "old_logprobs": [[-1.5, -2.5, -0.5], [-1.0, -1.0]]}
REFERENCE = {"ref_logprobs": [[-1.0, -2.0, -1.5], [-0.5, -1.25]]}
SAMPLER = {"sampler_logprobs": [[-1.25, -2.0, -1.0], [-1.0, -1.5]]}
CALLS: list[tuple[Loss, dict[str, Any]]] = [
    (cross_entropy(), {}),
    (cross_entropy(weigh=sequence_mean), {}),
    (importance_sampling(), POLICY),
    (grpo(kl_beta=0.1), POLICY | REFERENCE),
    (gspo(clip=(0.5, 2.0)), POLICY),
    (with_tis(grpo(kl_beta=0)), POLICY | SAMPLER),
    (dpo(), REFERENCE),
    (orpo(), {}),
]


@pytest.mark.parametrize("loss, columns", CALLS, ids=lambda x: getattr(x, "name", ""))
def test_a_loss_is_the_same_on_our_datums_and_the_sdk_s(loss: Loss, columns: dict[str, Any]) -> None:
    """Every field from the datum, in every type it may have there; bit for bit."""
    weights, targets = [[0.0, 1.0, 1.0], [0.5, 1.0]], [[2, 3, 4], [5, 6]]
    kinds: list[Callable[[Any, list], Any]] = [
        lambda sdk, row: sdk.TensorData(data=row, dtype="float32", shape=[len(row)]),
        lambda sdk, row: sdk.TensorData(data=row, dtype="float32"),
        lambda sdk, row: np.array(row),
        lambda sdk, row: torch.tensor(row),
    ]
    results = []
    for sdk in sdks():
        for kind in kinds:
            fields = [
                {name: kind(sdk, rows[i]) for name, rows in {"weights": weights, **columns}.items()} for i in range(2)
            ]
            data = [
                sdk.Datum(sdk.ModelInput.from_ints(range(len(y))), {"target_tokens": y, **field})
                for y, field in zip(targets, fields)
            ]
            results.append(outcome(loss, data, [[-1.0, -2.0, -1.0], [-0.5, -1.5]]))
    assert all(result == results[0] for result in results)
    assert any(g != 0 for grad in results[0][1] for g in grad)


# ---- builders ----------------------------------------------------------------------------------------------------


def test_tokens_are_shifted_once() -> None:
    """[5 6 | 7 8 9]: the input is all but the last, the targets all but the first, and so are the weights."""
    datum = datum_from_tokens([5, 6, 7, 8, 9], prompt_length=2)
    assert datum.model_input.to_ints() == [5, 6, 7, 8]
    assert datum.loss_fn_inputs["target_tokens"].data == [6, 7, 8, 9]
    assert datum.loss_fn_inputs["weights"].data == [0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("prompt_length, weights", [(0, [1, 1, 1]), (1, [1, 1, 1]), (3, [0, 0, 1]), (4, [0, 0, 0])])
def test_the_first_token_is_never_a_target(prompt_length: int, weights: list[int]) -> None:
    assert datum_from_tokens([5, 6, 7, 8], prompt_length=prompt_length).loss_fn_inputs["weights"].data == weights


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda w: TensorData(w, "float32")])
def test_weights_of_all_tokens_may_be_of_any_kind(kind: Callable[[list], Any]) -> None:
    datum = datum_from_tokens(np.array([5, 6, 7]), kind([9.0, 0.25, 0.5]))
    assert datum.loss_fn_inputs["weights"].data == [0.25, 0.5]


def test_fields_in_the_targets_frame_are_kept() -> None:
    datum = datum_from_tokens(
        [5, 6, 7], prompt_length=1, advantages=[2.0, 3.0], old_logprobs=torch.tensor([-1.0, -2.0])
    )
    assert datum.loss_fn_inputs["advantages"].data == [2.0, 3.0]
    assert datum.loss_fn_inputs["old_logprobs"].data == [-1.0, -2.0]


def test_fields_are_cut_with_the_tokens() -> None:
    """4 tokens have 3 targets; of the 3 tokens kept, 2."""
    datum = datum_from_tokens([5, 6, 7, 8], prompt_length=1, max_length=3, advantages=[1.0, 2.0, 3.0])
    assert datum.loss_fn_inputs["target_tokens"].data == [6, 7]
    assert datum.loss_fn_inputs["advantages"].data == [1.0, 2.0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "either weights or prompt_length, got both or neither"),
        ({"weights": [0, 1, 1], "prompt_length": 1}, "either weights or prompt_length"),
        ({"weights": [1, 1]}, "weights: expected 3 values, one per token, got 2. .* shifted here, once"),
        ({"weights": 1.0}, "weights: expected 3 values, one per token"),
        ({"prompt_length": 1, "max_length": 1}, "tokens: expected at least 2 tokens, got 1"),
        ({"prompt_length": 1, "advantages": [1.0] * 3}, "advantages: expected 2 values, one per target, got 3"),
        ({"prompt_length": 1, "advantages": TensorData([1.0], "float32")}, "advantages: expected 2 values.* got 1"),
        ({"prompt_length": 1, "advantages": 1.0}, "advantages: expected 2 values, one per target"),
        ({"prompt_length": 1, "reward": [1.0, 1.0]}, "unknown field 'reward'"),
        ({"prompt_length": 1, "old_logprobs": torch.ones(2, requires_grad=True)}, "old_logprobs: .* requires grad"),
    ],
)
def test_what_a_builder_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LossInputError, match=message):
        datum_from_tokens([5, 6, 7], **options)


def test_tokens_are_one_row() -> None:
    with pytest.raises(LossInputError, match="tokens"):
        datum_from_tokens([[1, 2], [3, 4]], prompt_length=1)


def by_the_cookbook(
    tokens: list[int], weights: list[float], max_length: int | None, reduction: str
) -> tuple[list[int], list[int], list[float]]:
    """Truncate the unshifted sequence, shift, then divide by the sum of the weights that are left."""
    tokens = tokens[:max_length]
    targets = tokens[1:]
    weights = weights[1 : len(targets) + 1]
    if reduction == "mean" and sum(weights) > 0:
        weights = [w / sum(weights) for w in weights]
    return tokens[:-1], targets, weights


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("max_length", [None, 2, 4, 6, 99])
@pytest.mark.parametrize("weights", [[0, 0, 1, 1, 1, 1], [3, 0.5, 0, 2, 0.25, 1], [1, 0, 0, 0, 0, 0]])
def test_a_model_input_and_weights_make_the_cookbook_s_datum(
    weights: list[float], max_length: int | None, reduction: str
) -> None:
    tokens = [10, 11, 12, 13, 14, 15]
    expected_input, targets, expected = by_the_cookbook(tokens, weights, max_length, reduction)
    for sdk in sdks():
        model_input = sdk.ModelInput.from_ints(tokens[:4]).append(sdk.EncodedTextChunk(tokens=tokens[4:]))
        for given in (weights, torch.tensor(weights)):
            datum = datum_from_model_input_weights(model_input, given, max_length, reduction=reduction)
            assert datum.model_input.to_ints() == expected_input
            assert datum.loss_fn_inputs["target_tokens"].data == targets
            assert datum.loss_fn_inputs["weights"].data == pytest.approx(expected, rel=1e-6)
            assert datum.loss_fn_inputs["weights"].dtype == "float32"


def test_mean_reduction_by_hand() -> None:
    """[_ 0 2 6 | cut]: of weights (9, 0, 2, 6, 4) with max_length 4 the shifted (0, 2, 6) sum to 8."""
    datum = datum_from_tokens([1, 2, 3, 4, 5], [9, 0, 2, 6, 4], max_length=4, reduction="mean")
    assert datum.loss_fn_inputs["weights"].data == [0.0, 0.25, 0.75]


# ---- sampler logprobs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, prompt_length, aligned",
    [
        ([-1.0, -2.0], 3, [0.0, 0.0, -1.0, -2.0]),
        ([], 5, [0.0, 0.0, 0.0, 0.0]),
        ([-4.0, -3.0, -2.0, -1.0], None, [-4.0, -3.0, -2.0, -1.0]),
        ([-4.0, -3.0, -2.0, -1.0], 1, [-4.0, -3.0, -2.0, -1.0]),
        ([-4.0, -3.0, -2.0, -1.0], 4, [-4.0, -3.0, -2.0, -1.0]),
        ([None, -4.0, -3.0, -2.0, -1.0], None, [-4.0, -3.0, -2.0, -1.0]),
        ([None, -4.0, -3.0, -2.0, -1.0], 3, [-4.0, -3.0, -2.0, -1.0]),
        ([None, None, -3.0, -2.0, -1.0], 2, [0.0, -3.0, -2.0, -1.0]),
        ([None, -3.0, None, -2.0, -1.0], 3, [-3.0, 0.0, -2.0, -1.0]),
        ([None, None, -2.0, -1.0], 3, [0.0, 0.0, -2.0, -1.0]),
        ([None] * 5, 5, [0.0, 0.0, 0.0, 0.0]),
        (torch.tensor([-1.0, -2.0]), 3, [0.0, 0.0, -1.0, -2.0]),
        (np.array([-1.0, -2.0]), 3, [0.0, 0.0, -1.0, -2.0]),
        (np.array([None, -4.0, -3.0, -2.0, -1.0]), None, [-4.0, -3.0, -2.0, -1.0]),
        ((-1.0, -2.0), 3, [0.0, 0.0, -1.0, -2.0]),
    ],
)
def test_sampler_logprobs_are_aligned_to_four_targets(given: Any, prompt_length: Any, aligned: list[float]) -> None:
    """Completion alone, all four targets, or all five tokens; None only where the prompt is."""
    result = align_sampler_logprobs(given, targets=4, prompt_length=prompt_length)
    assert result.dtype == torch.float32
    assert result.tolist() == aligned


@pytest.mark.parametrize(
    "given, prompt_length, message",
    [
        (
            [-0.4],
            3,
            r"expected 2 values \(the completion\) or 4 .* or None and 4 .*, got 1. Pass a value",
        ),
        ([-0.4], None, "expected 4 values .* or None and 4 .*, got 1. .*need prompt_length"),
        ([-1.0, -2.0, -3.0], 3, r"2 values \(the completion\) .*, got 3"),
        ([-1.0, -2.0], 5, r"0 values \(the completion\) .*, got 2"),
        ([-1.0] * 5, None, r"expected 4 values \(all targets\) or None and 4 \(all tokens\), got 5"),
        ([-1.0] * 5, 3, "got 5"),
        ([None, *[-1.0] * 5], 3, "got 6"),
        ([None, -0.6], 3, r"logprobs\[0\]: expected a number, got None. Only tokens of the prompt may have None"),
        ([-1.0, None], 3, r"logprobs\[1\]: expected a number, got None"),
        ([None, None, -1.0, None, -2.0], 3, r"logprobs\[3\]: expected a number, got None"),
        ([None, None, -1.0, -2.0, -3.0], None, r"logprobs\[1\]: expected a number, got None. .*prompt_length="),
        (["a", -1.0], 3, r"logprobs\[0\]"),
        ([10**400, -1.0], 3, r"logprobs\[0\]"),
        ([-1.0, -2.0], 6, "prompt_length: expected 1 to 5"),
        ([-1.0, -2.0], 0, "prompt_length: expected 1 to 5"),
        ([-1.0, -2.0], "3", "prompt_length"),
        (torch.zeros(2, 2), 3, "logprobs: expected a flat row of numbers, got shape"),
        (torch.zeros(2, device="meta"), 3, "got a meta torch.float32 tensor"),
        ("ab", 3, "logprobs: expected a list of numbers, got a str"),
        ({0: -1.0, 1: -1.0}, 3, "got a dict"),
    ],
)
def test_sampler_logprobs_that_cannot_be_placed_are_refused(given: Any, prompt_length: Any, message: str) -> None:
    """Positions count in what was handed in."""
    with pytest.raises(LossInputError, match=message):
        align_sampler_logprobs(given, targets=4, prompt_length=prompt_length)


def test_no_trained_token_gets_a_logprob_that_the_sampler_did_not_give() -> None:
    """After a prompt of one token both targets are trained, so a None has no place in a row of two."""
    with pytest.raises(LossInputError, match=r"logprobs\[0\]"):
        align_sampler_logprobs([None, -0.6], targets=2, prompt_length=1)
    with pytest.raises(LossInputError, match=r"targets: expected at least 0, got 2\.5"):
        align_sampler_logprobs([-0.6], targets=2.5)  # type: ignore[arg-type]


def test_aligned_logprobs_go_into_a_loss() -> None:
    """On-policy in the sampler's own frame: r = 1, L = −A = −1."""
    aligned = align_sampler_logprobs([-1.0, -2.0], 3, prompt_length=2)
    datum = datum_from_tokens([5, 6, 7, 8], prompt_length=2, logprobs=aligned)
    loss, _ = importance_sampling().bind(advantages=[1.0])([datum], [torch.tensor([-9.0, -1.0, -2.0])])
    assert loss.item() == -1.0
