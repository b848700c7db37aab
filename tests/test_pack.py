"""The door: whatever form a batch comes in, one masked table of numbers leaves it."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lossfns import (
    ON_POLICY,
    Datum,
    Loss,
    LossInputError,
    ModelInput,
    Rows,
    TensorData,
    cross_entropy,
    dapo,
    dpo,
    fixed_length,
    grpo,
    gspo,
    gspo_token,
    importance_sampling,
    multi_target_cross_entropy,
    orpo,
    pack,
    ppo,
    sequence_level,
    sequence_mean,
    sequence_sum_mean,
    token_sum,
    with_tis,
)
from lossfns.pack import pack_side_columns

# Two sequences with a masked slot each, an empty one, and one masked throughout; as pairs: one that counts.
WEIGHTS = [[0.0, 1.0, 0.5], [1.0, 0.0], [], [0.0, 0.0]]
LOGPROBS = [[-9.0, -1.0, -2.0], [-0.5, -1.5], [], [-1.0, -2.0]]
COLUMNS: dict[str, list[Any]] = {
    "advantages": [[1.0, 1.0, 1.0], [-0.5, -0.5], [], [3.0, 3.0]],
    "old_logprobs": [[-8.0, -1.25, -1.5], [-0.25, -1.0], [], [-1.0, -1.0]],
    "ref_logprobs": [[-8.5, -0.75, -1.75], [-0.5, -2.0], [], [-2.0, -1.0]],
    "sampler_logprobs": [[-8.0, -1.5, -1.5], [-0.5, -1.0], [], [-1.0, -1.0]],
}
ADVANTAGES = [1.0, -0.5, 7.0, 3.0]

LOSSES = [
    cross_entropy(),
    cross_entropy(weigh=sequence_mean),
    cross_entropy(weigh=token_sum),
    importance_sampling(weigh=sequence_sum_mean, log_ratio_cap=None),
    ppo(clip=(0.9, 1.1), dual_clip=2.0),
    grpo(kl_beta=0.1),
    dapo(weigh=fixed_length(8)),
    gspo(clip=(0.5, 2.0)),
    gspo_token(clip=(0.5, 2.0)),
    with_tis(ppo(), level=sequence_level),
    dpo(),
    orpo(),
]


def datums(*rows: list[Any], name: str = "weights", **fields: Any) -> list[Datum]:
    """One datum per row of a field, with the targets it needs."""
    return [
        Datum(ModelInput.from_ints(range(len(row))), {"target_tokens": list(range(len(row))), name: row, **fields})
        for row in rows
    ]


def bare(rows: list[Any]) -> list[Datum]:
    """Datums of targets alone, for what is bound."""
    return [Datum(ModelInput.from_ints(range(len(row))), {"target_tokens": list(range(len(row)))}) for row in rows]


def leaves(rows: list[Any], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.tensor(row, dtype=dtype, requires_grad=True) for row in rows]


def columns_of(loss: Loss) -> dict[str, Any]:
    return {name: COLUMNS[name] for name in loss.reads}


def outcome(loss: Any, data: list[Datum], rows: list[Any]) -> tuple[float, list[Any], dict[str, float]]:
    """Loss, gradients and metrics of logprobs given as nested lists."""
    logprobs = leaves(rows)
    total, metrics = loss(data, logprobs)
    total.backward()
    return total.item(), [lp.grad.tolist() for lp in logprobs], metrics


def poisoned(rows: list[list[float]], value: float) -> list[list[float]]:
    """The rows with the value in every inactive slot."""
    return [[x if w else value for x, w in zip(row, weights)] for row, weights in zip(rows, WEIGHTS)]


# ---- masking -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_nothing_leaks_from_an_inactive_slot(loss: Loss, value: float) -> None:
    """Poison in the logprobs and in every column changes neither loss, gradient nor metrics by a bit."""
    clean = outcome(loss.bind(weights=WEIGHTS, **columns_of(loss)), bare(LOGPROBS), LOGPROBS)
    bad = {name: poisoned(rows, value) for name, rows in columns_of(loss).items()}
    dirty = outcome(loss.bind(weights=WEIGHTS, **bad), bare(LOGPROBS), poisoned(LOGPROBS, value))
    assert dirty == clean
    inactive = [g for grads, weights in zip(dirty[1], WEIGHTS) for g, w in zip(grads, weights) if not w]
    assert inactive == [0.0] * 4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_nothing_leaks_from_an_unused_target(value: float) -> None:
    """K = 2 with one unused slot in the first position and both in the second: L = 3·0.5/0.5."""
    data = datums([[0.5, 0.0], [0.0, 0.0]])
    loss, (grad,), metrics = outcome(multi_target_cross_entropy(), data, [[[-3.0, value], [value, value]]])
    assert (loss, grad, metrics["tokens"]) == (3.0, [[-1.0, 0.0], [0.0, 0.0]], 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_masked_datum_may_have_any_advantage(value: float) -> None:
    """Datums 2 and 3 have no active token: their advantages are never read."""
    loss = importance_sampling().bind(weights=WEIGHTS, old_logprobs=COLUMNS["old_logprobs"])
    clean = outcome(loss.bind(advantages=ADVANTAGES), bare(LOGPROBS), LOGPROBS)
    assert outcome(loss.bind(advantages=[1.0, -0.5, value, value]), bare(LOGPROBS), LOGPROBS) == clean


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_an_empty_or_masked_sequence_has_a_gradient_of_zeros(loss: Loss) -> None:
    """Present, not None: the services refuse a tensor without one."""
    bound = loss.bind(weights=WEIGHTS, **columns_of(loss))
    _, grads, metrics = outcome(bound, bare(LOGPROBS), LOGPROBS)
    assert grads[2:] == [[], [0.0, 0.0]]
    assert (metrics["sequences"], metrics["sequences_empty"]) == (4.0, 2.0)


@pytest.mark.parametrize("loss", LOSSES[:10], ids=lambda loss: loss.name)
def test_an_empty_or_masked_sequence_changes_nothing(loss: Loss) -> None:
    two = {name: rows[:2] for name, rows in columns_of(loss).items()}
    alone = outcome(loss.bind(weights=WEIGHTS[:2], **two), bare(LOGPROBS[:2]), LOGPROBS[:2])
    total, grads, _ = outcome(loss.bind(weights=WEIGHTS, **columns_of(loss)), bare(LOGPROBS), LOGPROBS)
    assert (total, grads[:2]) == alone[:2]


def test_null_may_stand_where_nothing_is_trained() -> None:
    """As a sampler returns it, bound or in the datum; on-policy otherwise, so L = −A·(1 + 1)/2."""
    loss = importance_sampling().bind(advantages=[2.0])
    rows, old = [[-5.0, -1.0, -2.0]], [None, -1.0, -2.0]
    in_datum = outcome(loss, datums([0.0, 1.0, 1.0], logprobs=old), rows)
    bound = outcome(loss.bind(old_logprobs=[old]), datums([0.0, 1.0, 1.0]), rows)
    assert in_datum == bound
    assert bound[:2] == (-2.0, [[0.0, -1.0, -1.0]])


# ---- the packed batch --------------------------------------------------------------------------------------------


def test_tokens_are_laid_end_to_end_and_masked() -> None:
    t = pack(datums(*WEIGHTS), leaves(LOGPROBS), ("advantages", "old_logprobs"), {**COLUMNS, "advantages": ADVANTAGES})
    assert t.lengths.tolist() == [3, 2, 0, 2]
    assert t.weights.tolist() == [0.0, 1.0, 0.5, 1.0, 0.0, 0.0, 0.0]
    assert t.active.tolist() == [False, True, True, True, False, False, False]
    assert t.logprobs.tolist() == [0.0, -1.0, -2.0, -0.5, 0.0, 0.0, 0.0]
    assert t.old_logprobs.tolist() == [0.0, -1.25, -1.5, -0.25, 0.0, 0.0, 0.0]
    assert t.advantages.tolist() == [0.0, 1.0, 1.0, -0.5, 0.0, 0.0, 0.0]


def test_a_column_that_was_not_read_is_not_there() -> None:
    t = pack(datums(*WEIGHTS), leaves(LOGPROBS))
    with pytest.raises(AttributeError, match=r"no column 'ref_logprobs'.*`reads`"):
        _ = t.ref_logprobs


def test_on_policy_is_the_logprobs_without_gradient() -> None:
    t = pack(datums(*WEIGHTS), leaves(LOGPROBS), ("old_logprobs",), {"old_logprobs": ON_POLICY})
    assert torch.equal(t.old_logprobs, t.logprobs)
    assert t.logprobs.requires_grad
    assert not t.old_logprobs.requires_grad


# ---- dtypes ------------------------------------------------------------------------------------------------------

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    "dtypes, result",
    [
        ((F32, F32), F32),
        ((F32, F64), F64),
        ((F64, F32), F64),
        ((F64, F64), F64),
        ((BF16, BF16), F32),
        ((F16, F16), F32),
        ((F16, BF16), F32),
        ((BF16, F64), F64),
    ],
)
def test_the_widest_dtype_is_computed_in_and_float32_at_least(dtypes: Any, result: torch.dtype) -> None:
    """L = (1 + 2)/2, and each logprob gets its gradient in its own dtype."""
    logprobs = [torch.tensor([-x], dtype=dtype, requires_grad=True) for x, dtype in zip((1.0, 2.0), dtypes)]
    loss, _ = cross_entropy()(datums([1.0], [1.0]), logprobs)
    loss.backward()
    assert (loss.dtype, loss.item()) == (result, 1.5)
    assert [(lp.grad.dtype, lp.grad.item()) for lp in logprobs] == [(dtype, -0.5) for dtype in dtypes]


def test_columns_follow_the_logprobs() -> None:
    """Their dtype does not widen the result: 1/3 in float32 where the logprobs are."""
    for dtype in (F32, F64):
        old = [torch.tensor([-1 / 3], dtype=F64)]
        t = pack(datums([1.0]), leaves([[-1.0]], dtype), ("old_logprobs",), {"old_logprobs": old})
        assert t.old_logprobs.dtype == t.weights.dtype == dtype
        assert t.old_logprobs.item() == torch.tensor(-1 / 3, dtype=dtype).item()


# ---- forms of a column -------------------------------------------------------------------------------------------

ROWS: dict[str, list[list[float]]] = {
    "weights": [[0.0, 1.0, 1.0], [1.0, 0.5, 0.0]],
    "advantages": [[1.0, 1.0, 1.0], [-2.0, -2.0, -2.0]],
    "old_logprobs": [[-1.5, -2.0, -0.5], [-1.0, -1.0, -3.0]],
    "ref_logprobs": [[-1.0, -2.5, -0.5], [-1.5, -1.0, -2.0]],
}
LPS = [[-1.0, -2.25, -0.75], [-1.25, -0.75, -2.0]]
FORMS: dict[str, Callable[[list[list[float]]], Any]] = {
    "tuple of tuples": lambda rows: tuple(map(tuple, rows)),
    "arrays": lambda rows: [np.array(row) for row in rows],
    "float32 arrays": lambda rows: [np.array(row, np.float32) for row in rows],
    "tensors": lambda rows: [torch.tensor(row) for row in rows],
    "float64 tensors": lambda rows: [torch.tensor(row, dtype=F64) for row in rows],
    "bfloat16 tensors": lambda rows: [torch.tensor(row, dtype=BF16) for row in rows],
    "TensorData": lambda rows: [TensorData(row, "float32") for row in rows],
    "TensorData with shape": lambda rows: [TensorData(row, "float32", [3]) for row in rows],
    "[B, T] tensor": torch.tensor,
    "[B, T] array": np.array,
    "a mix": lambda rows: [rows[0], torch.tensor(rows[1], dtype=F64)],
    "another mix": lambda rows: [torch.tensor(rows[0]), TensorData(rows[1], "float32")],
    "strided tensors": lambda rows: torch.tensor(rows).T.contiguous().T,
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("form", FORMS)
def test_a_column_may_come_in_any_form(name: str, form: str) -> None:
    loss = grpo(kl_beta=0.1).bind(**ROWS)
    given = FORMS[form](ROWS[name])
    assert outcome(loss.bind(**{name: given}), bare(LPS), LPS) == outcome(loss, bare(LPS), LPS)


@pytest.mark.parametrize(
    "numbers",
    [
        [1.0, -2.0],
        [1, -2],
        (1.0, -2.0),
        np.array([1.0, -2.0]),
        np.array([1, -2]),
        torch.tensor([1.0, -2.0]),
        torch.tensor([1, -2]),
        torch.tensor([1.0, -2.0], dtype=F64, requires_grad=True),
        [torch.tensor(1.0), torch.tensor(-2.0)],
        [np.float32(1.0), torch.tensor(-2.0)],
        [TensorData(1.0, "float32"), TensorData(-2.0, "float32")],
    ],
    ids=lambda numbers: f"{type(numbers).__name__} of {getattr(numbers, 'dtype', type(numbers[0]).__name__)}",
)
def test_an_advantage_may_be_one_number_for_each_datum(numbers: Any) -> None:
    loss = grpo(kl_beta=0.1).bind(**ROWS)
    assert outcome(loss.bind(advantages=numbers), bare(LPS), LPS) == outcome(loss, bare(LPS), LPS)


def test_a_mask_may_be_of_booleans() -> None:
    for mask in ([[True, False]], torch.tensor([[True, False]]), np.array([[True, False]])):
        assert outcome(cross_entropy().bind(weights=mask), datums([1.0, 1.0]), [[-3.0, -1.0]])[0] == 3.0


def test_targets_may_be_flat() -> None:
    """[N, K] in row-major order: (0.5·1 + 0.25·2 + 0·3 + 1·4)/1.75."""
    rows = [[[-1.0, -2.0], [-3.0, -4.0]]]
    for weights in ([0.5, 0.25, 0.0, 1.0], [[0.5, 0.25], [0.0, 1.0]]):
        loss, (grad,), _ = outcome(multi_target_cross_entropy().bind(weights=[weights]), datums([1.0, 1.0]), rows)
        assert loss == pytest.approx(5 / 1.75, rel=1e-6)
        assert grad == [pytest.approx([-0.5 / 1.75, -0.25 / 1.75]), pytest.approx([0.0, -1 / 1.75])]


def test_logprobs_may_be_slices_of_one_output() -> None:
    """Non-contiguous columns of a [T, B] tensor, as a time-major model returns them."""
    output = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], requires_grad=True)
    loss, _ = cross_entropy()(datums([1.0, 0.0], [1.0, 1.0]), list(output.unbind(1)))
    loss.backward()
    assert loss.item() == pytest.approx((1 + 2 + 4) / 3)
    assert output.grad.tolist() == [pytest.approx([-1 / 3, -1 / 3]), pytest.approx([0.0, -1 / 3])]


# ---- one flat leaf -----------------------------------------------------------------------------------------------

FLAT = [x for row in LOGPROBS for x in row]
LENGTHS = [len(row) for row in LOGPROBS]


def flat_leaf() -> torch.Tensor:
    return torch.tensor(FLAT, requires_grad=True)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_parts_of_one_leaf_are_the_same_batch(loss: Loss) -> None:
    """And the gradient reaches the leaf past the parts: there are none of them in the graph."""
    bound = loss.bind(weights=WEIGHTS, **columns_of(loss))
    total, grads, metrics = outcome(bound, bare(LOGPROBS), LOGPROBS)
    leaf = flat_leaf()
    parts = torch.split(leaf, LENGTHS)
    part_total, part_metrics = bound(bare(LOGPROBS), parts)
    assert torch.autograd.grad(part_total, parts, retain_graph=True, allow_unused=True) == (None,) * len(parts)
    part_total.backward()
    assert (part_total.item(), part_metrics) == (total, metrics)
    assert leaf.grad.tolist() == [g for grad in grads for g in grad]


def test_parts_may_have_a_rank_of_two() -> None:
    """(1 + 2 + 4 + 5 + 6)/5, of rows [N, K] of one leaf."""
    leaf = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]], requires_grad=True)
    parts = torch.split(leaf, [2, 1])
    loss, _ = multi_target_cross_entropy()(datums([[1.0, 1.0], [0.0, 1.0]], [[1.0, 1.0]]), parts)
    assert torch.autograd.grad(loss, parts, retain_graph=True, allow_unused=True) == (None, None)
    loss.backward()
    assert loss.item() == pytest.approx(18 / 5)
    assert leaf.grad.tolist() == [pytest.approx(row) for row in ([-0.2, -0.2], [0.0, -0.2], [-0.2, -0.2])]


class Reversed(torch.autograd.Function):
    """Its value is a view of what it is given, its gradient is not."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return -gradient


def hooked(leaf: torch.Tensor) -> list[torch.Tensor]:
    parts = list(torch.split(leaf, [1, 2]))
    parts[1].register_hook(lambda gradient: 10 * gradient)
    return parts


def retained(leaf: torch.Tensor) -> list[torch.Tensor]:
    parts = list(torch.split(leaf, [1, 2]))
    for part in parts:
        part.retain_grad()
    return parts


def made_without_a_graph(leaf: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        parts = list(torch.split(leaf, [1, 2]))
    return [part.requires_grad_() for part in parts]


@pytest.mark.parametrize(
    "parts, gradient",
    [
        (lambda leaf: [leaf[:1], leaf[1:]], [-0.5, -0.25, -0.25]),
        (hooked, [-0.5, -2.5, -2.5]),
        (retained, [-0.5, -0.25, -0.25]),
        (lambda leaf: list(map(Reversed.apply, torch.split(leaf, [1, 2]))), [0.5, 0.25, 0.25]),
        (lambda leaf: list(torch.split(Reversed.apply(leaf), [1, 2])), [0.5, 0.25, 0.25]),
        (lambda leaf: [torch.split(leaf, [1, 2])[0], torch.split(leaf, [1, 2])[1]], [-0.5, -0.25, -0.25]),
        (lambda leaf: list(torch.split(leaf * 2, [1, 2])), [-1.0, -0.5, -0.5]),
        (made_without_a_graph, None),
    ],
    ids=["slices", "hook", "retain_grad", "function", "function before", "two splits", "no leaf", "leaves themselves"],
)
def test_what_else_looks_like_parts_keeps_its_own_gradient(parts: Any, gradient: list[float] | None) -> None:
    """Weights 1 and ½, ½: −w/2 each, times whatever stands between the leaf and the list."""
    leaf = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    given = parts(leaf)
    cross_entropy()(datums([1.0], [0.5, 0.5]), given)[0].backward()
    assert (None if leaf.grad is None else leaf.grad.tolist()) == gradient
    if all(part.is_leaf or part.retains_grad for part in given):
        assert [part.grad.tolist() for part in given] == [[-0.5], [-0.25, -0.25]]


@pytest.mark.parametrize(
    "order, loss, gradient",
    [
        ([1, 0], (2 + 0.5 * 1) / 1.5, [-1 / 3, -2 / 3, 0.0]),
        ([0, 0], (1 + 0.5 * 1) / 1.5, [-1.0, 0.0, 0.0]),
        ([1, 2], (2 + 0.5 * 3) / 1.5, [0.0, -2 / 3, -1 / 3]),
        ([0, 1], (1 + 0.5 * 2) / 1.5, [-2 / 3, -1 / 3, 0.0]),
    ],
    ids=str,
)
def test_some_of_the_parts_and_in_another_order(order: list[int], loss: float, gradient: list[float]) -> None:
    """Weights 1 and ½ of the list as it is, whatever it was cut from."""
    leaf = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    parts = torch.split(leaf, 1)
    total, _ = cross_entropy()(datums([1.0], [0.5]), [parts[i] for i in order])
    total.backward()
    assert total.item() == pytest.approx(loss)
    assert leaf.grad.tolist() == pytest.approx(gradient)


@pytest.mark.parametrize(
    "made, gradient", [(lambda leaf: 2 * leaf, [-1.5, -0.5]), (Reversed.apply, [0.75, 0.25])], ids=["2x", "function"]
)
def test_one_tensor_made_of_a_leaf_is_no_part_of_it(made: Any, gradient: list[float]) -> None:
    """The leaf itself would get −w/2 = −0.75 and −0.25."""
    leaf = torch.tensor([-1.0, -2.0], requires_grad=True)
    cross_entropy()(datums([1.5, 0.5]), [made(leaf)])[0].backward()
    assert leaf.grad.tolist() == gradient


def test_parts_of_two_leaves_are_no_leaf() -> None:
    one, other = (torch.tensor(row, requires_grad=True) for row in ([-1.0, -2.0], [-3.0, -4.0]))
    loss, _ = cross_entropy()(datums([1.0], [1.0]), [torch.split(one, 1)[0], torch.split(other, 1)[1]])
    loss.backward()
    assert (loss.item(), one.grad.tolist(), other.grad.tolist()) == (2.5, [-0.5, 0.0], [0.0, -0.5])


def test_columns_of_a_matrix_are_laid_end_to_end() -> None:
    """Split the other way the parts are not what the leaf holds in a row: 1·1 + 3·1 + 2·0 + 4·½."""
    leaf = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], requires_grad=True)
    loss, _ = multi_target_cross_entropy()(datums([[1.0], [1.0]], [[0.0], [0.5]]), torch.split(leaf, 1, dim=1))
    loss.backward()
    assert loss.item() == pytest.approx(6 / 2.5)
    assert leaf.grad.tolist() == [pytest.approx([-0.4, 0.0]), pytest.approx([-0.4, -0.2])]


# ---- without the logprobs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_columns_are_packed_once_for_any_logprobs(loss: Loss) -> None:
    """Packed before them, the columns with two sets of logprobs are two calls."""
    bound = loss.bind(weights=WEIGHTS, **columns_of(loss))
    shapes = [(n,) for n in LENGTHS]
    columns = pack_side_columns(bare(LOGPROBS), shapes, torch.empty(0), loss.reads, bound.columns, rows=loss.rows)
    for rows in (LOGPROBS, [[2 * x for x in row] for row in LOGPROBS]):
        total, grads, metrics = outcome(bound, bare(rows), rows)
        leaf = torch.tensor([x for row in rows for x in row], requires_grad=True)
        packed_total, packed_metrics = bound.evaluate_packed(columns.with_logprobs(leaf))
        packed_total.backward()
        assert (packed_total.item(), packed_metrics) == (total, metrics)
        assert leaf.grad.tolist() == [g for grad in grads for g in grad]


@pytest.mark.parametrize("align", ["strict", "truncate"])
@pytest.mark.parametrize("old", [ON_POLICY, COLUMNS["old_logprobs"]], ids=["on-policy", "old"])
def test_a_part_of_the_columns_is_that_of_the_datums(old: Any, align: str) -> None:
    """Also where the last logprob of datum 0 is cut off, as it has no advantage."""
    reads = ("advantages", "old_logprobs")
    whole = {"advantages": [row[:2] for row in COLUMNS["advantages"]], "old_logprobs": old}
    if align == "strict":
        whole["advantages"] = ADVANTAGES
    columns = pack_side_columns(datums(*WEIGHTS), [(n,) for n in LENGTHS], torch.empty(0), reads, whole, align=align)
    for which in (slice(0, 1), slice(0, 3), slice(1, 4), slice(2, 4), slice(None)):
        part = {name: given if given is ON_POLICY else given[which] for name, given in whole.items()}
        expected = pack(datums(*WEIGHTS[which]), leaves(LOGPROBS[which]), reads, part, align=align)
        got = columns.part(which).with_logprobs(torch.tensor([x for row in LOGPROBS[which] for x in row]))
        assert len(got.logprobs) == sum(LENGTHS[which]) - (align == "truncate" and which.start in (0, None))
        for name in ("logprobs", "weights", "lengths", "active", *reads):
            assert torch.equal(getattr(got, name), getattr(expected, name)), (which, name)


@pytest.mark.parametrize(
    "shapes, message",
    [
        ([(2,)], r"logprobs_list: expected one tensor per datum, got 2 datums but 1 logprobs tensors"),
        ([(2,), (2, 3)], r"datum\[1\].logprobs: expected \[N\], got shape \(2, 3\). For \[N, K\] use multi_target"),
        ([(2,), (3,)], r"datum\[1\].logprobs: expected 2 rows \(the length of target_tokens\), got 3"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_before_there_are_logprobs(shapes: Any, message: str) -> None:
    with pytest.raises(LossInputError, match=message):
        pack_side_columns(datums([1.0, 1.0], [1.0, 1.0]), shapes, torch.empty(0))


# ---- truncation --------------------------------------------------------------------------------------------------


def cut(rows: list[list[float]], lengths: list[int]) -> list[list[float]]:
    return [row[:n] for row, n in zip(rows, lengths)]


@pytest.mark.parametrize("short", ["logprobs", "weights", "advantages", "old_logprobs", "ref_logprobs"])
def test_truncation_is_to_the_shortest_row_of_each_datum(short: str) -> None:
    """The documents' ``min_len = min(len(lp), len(w), ...)``: the same as cutting by hand, then strictly."""
    lengths = [2, 3]
    table = {"logprobs": LPS, **ROWS}
    table[short] = cut(table[short], lengths)
    logprobs = table.pop("logprobs")
    by_hand = {name: cut(rows, lengths) for name, rows in ROWS.items()}
    loss = grpo(kl_beta=0.1)
    total, grads, metrics = outcome(loss.bind(align="truncate", **table), bare(LPS), logprobs)
    expected, expected_grads, expected_metrics = outcome(
        loss.bind(**by_hand), bare(cut(LPS, lengths)), cut(LPS, lengths)
    )
    assert (total, metrics) == (expected, expected_metrics)
    assert cut(grads, lengths) == expected_grads
    assert grads[0][2:] in ([], [0.0])
    if short != "logprobs":
        with pytest.raises(LossInputError, match=f"{short}: expected 3 values"):
            outcome(loss.bind(**table), bare(LPS), logprobs)


@pytest.mark.parametrize("short", ["weights", "advantages", "old_logprobs"])
def test_a_truncated_denominator_is_known_in_advance(short: str) -> None:
    """PackedColumns that are already bound cut as much before the forward pass as after it."""
    table = {**ROWS, short: cut(ROWS[short], [2, 3])}
    bound = grpo(kl_beta=0.1).bind(align="truncate", **table)
    assert bound.denominator(bare(LPS)) == outcome(bound, bare(LPS), LPS)[2]["denominator"] == 2.5


def test_truncation_of_targets_cuts_positions() -> None:
    """Of two weighted positions one has logprobs: (0.5·1 + 0.25·2)/0.75."""
    loss = multi_target_cross_entropy().bind(align="truncate", weights=[[[0.5, 0.25], [0.0, 1.0]]])
    assert outcome(loss, bare([[1, 2]]), [[[-1.0, -2.0]]])[0] == pytest.approx(1 / 0.75)


@pytest.mark.parametrize("weights", [[[0.5, 0.25], [0.0, 1.0]], [0.5, 0.25, 0.0, 1.0]], ids=["nested", "flat"])
def test_truncation_with_nothing_to_cut_changes_nothing(weights: list[Any]) -> None:
    loss = multi_target_cross_entropy().bind(weights=[weights])
    rows = [[[-1.0, -2.0], [-3.0, -4.0]]]
    assert outcome(loss.bind(align="truncate"), bare([[1, 2]]), rows) == outcome(loss, bare([[1, 2]]), rows)


def test_numbers_for_each_datum_are_not_truncated() -> None:
    loss = importance_sampling().bind(advantages=[1.0, -2.0], old_logprobs=LPS, align="truncate")
    assert outcome(loss, datums([1.0], [1.0, 1.0, 1.0]), LPS)[0] == (-1.0 + 3 * 2.0) / 4


# ---- where a column is found -------------------------------------------------------------------------------------


def test_what_is_bound_replaces_what_a_datum_has() -> None:
    for name, rows in ROWS.items():
        other = {other: x for other, x in ROWS.items() if other != name}
        wrong = TensorData([-9.0] * 3, "float32")
        loss = grpo(kl_beta=0.1).bind(**other)
        data = bare(LPS)
        for datum, row in zip(data, rows):
            datum.loss_fn_inputs[name] = row
        found = outcome(loss, data, LPS)
        for datum in data:
            datum.loss_fn_inputs[name] = wrong
        assert outcome(loss.bind(**{name: rows}), data, LPS) == found


def test_what_is_bound_again_is_replaced() -> None:
    loss = grpo(kl_beta=0.1).bind(**ROWS)
    assert outcome(loss.bind(advantages=[9.0, 9.0]).bind(advantages=ROWS["advantages"]), bare(LPS), LPS) == outcome(
        loss, bare(LPS), LPS
    )
    assert loss.columns["advantages"] is ROWS["advantages"]


def test_a_datum_s_logprobs_are_the_old_ones() -> None:
    """r = e^(−1 + 1.5) = e^½, L = −r·A; under both names ``old_logprobs`` is the one."""
    loss = importance_sampling().bind(advantages=[2.0])
    expected = pytest.approx(-2 * math.exp(0.5), rel=1e-6)
    assert outcome(loss, datums([1.0], logprobs=[-1.5]), [[-1.0]])[0] == expected
    assert outcome(loss, datums([1.0], logprobs=[-9.0], old_logprobs=[-1.5]), [[-1.0]])[0] == expected


def test_other_columns_do_not_stand_in_for_one_another() -> None:
    """Neither old logprobs for the sampler's nor the sampler's for the reference's."""
    fields = {"logprobs": [-1.0], "sampler_logprobs": [-1.0], "advantages": [1.0]}
    with pytest.raises(LossInputError, match="sampler_logprobs"):
        outcome(with_tis(ppo()), datums([1.0], logprobs=[-1.0], advantages=[1.0]), [[-1.0]])
    with pytest.raises(LossInputError, match="ref_logprobs"):
        outcome(grpo(), datums([1.0], **fields), [[-1.0]])


def test_an_rl_datum_without_weights_trains_on_every_token() -> None:
    """Per-token advantages are the format: L = −(1·A₀ + 1·A₁)/2, on-policy."""
    data = datums([1.0, 3.0], name="advantages", logprobs=[-1.0, -2.0])
    loss, grads, metrics = outcome(importance_sampling(), data, [[-1.0, -2.0]])
    assert (loss, grads, metrics["tokens"]) == (-2.0, [[-0.5, -1.5]], 2.0)
    assert importance_sampling().denominator(data) == 2.0


def test_bound_advantages_do_not_make_weights() -> None:
    with pytest.raises(LossInputError, match=r"datum\[0\]\.weights"):
        outcome(
            importance_sampling().bind(advantages=[[1.0, 3.0]]),
            datums([-1.0, -2.0], name="logprobs"),
            [[-1.0, -2.0]],
        )


# ---- what is handed in stays as it was ---------------------------------------------------------------------------


def test_no_gradient_reaches_a_column() -> None:
    given = {name: torch.tensor(rows, requires_grad=True) for name, rows in ROWS.items()}
    rowwise = {name: [torch.tensor(row, requires_grad=True) for row in rows] for name, rows in ROWS.items()}
    for columns in (given, rowwise):
        loss = grpo(kl_beta=0.1).bind(**columns)
        assert outcome(loss, bare(LPS), LPS) == outcome(grpo(kl_beta=0.1).bind(**ROWS), bare(LPS), LPS)
        assert all(x.grad is None for column in columns.values() for x in column if x.is_leaf)


@pytest.mark.parametrize("form", ["arrays", "tensors", "TensorData", "[B, T] tensor", "[B, T] array"])
def test_inputs_are_not_written_to(form: str) -> None:
    """Although every inactive slot becomes 0 inside."""
    rows = {**ROWS, "weights": [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]}
    given = {name: FORMS[form](x) for name, x in rows.items()}
    data, logprobs = bare(LPS), leaves(LPS)
    fields = [dict(datum.loss_fn_inputs) for datum in data]
    loss, _ = grpo(kl_beta=0.1).bind(**given)(data, logprobs)
    loss.backward()
    assert {name: [list(row.tolist()) for row in column] for name, column in given.items()} == rows
    assert [lp.tolist() for lp in logprobs] == LPS
    assert [datum.loss_fn_inputs for datum in data] == fields


def test_a_leaf_of_one_sequence_is_not_written_to() -> None:
    leaf = torch.tensor([-1.0, -2.0], requires_grad=True)
    cross_entropy()(datums([0.0, 1.0]), torch.split(leaf, 2))[0].backward()
    assert leaf.tolist() == [-1.0, -2.0]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_calling_twice_is_calling_once(loss: Loss) -> None:
    bound = loss.bind(weights=WEIGHTS, **columns_of(loss))
    data = bare(LOGPROBS)
    assert outcome(bound, data, LOGPROBS) == outcome(bound, data, LOGPROBS)


# Malformed batches that only some paths meet


def refusal(call: Callable[[], Any]) -> str:
    """Return the message with which a call is refused."""
    with pytest.raises(LossInputError) as error:
        call()
    return str(error.value)


def test_flat_weights_of_targets_are_cut_by_positions() -> None:
    """Three positions of two targets, two of them in the logprobs: of the flat list the first 2·2 entries stay.

    −(0.5·(−1) + 0.25·(−2) + 1·(−4)) / 1.75 = 5 / 1.75.
    """
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    loss = multi_target_cross_entropy().bind(align="truncate", weights=[[0.5, 0.25, 0.0, 1.0, 8.0, 8.0]])
    total, _ = loss(bare([[0, 1, 2]]), [logprobs])
    assert float(total) == pytest.approx(5 / 1.75)


def test_a_flat_list_that_is_no_number_of_positions_is_refused() -> None:
    """Five entries are no whole number of positions with two targets each, cut or not."""
    loss = multi_target_cross_entropy().bind(weights=[[0.5, 0.25, 0.0, 1.0, 8.0]])
    for bound in (loss, loss.bind(align="truncate")):
        message = refusal(lambda bound=bound: bound(bare([[0, 1]]), [torch.zeros(2, 2) - 1]))  # type: ignore[misc]
        assert "datum[0].weights: expected shape (2, 2)" in message


@pytest.mark.parametrize("weights", [[0.5] * 6, [[0.5]] * 4, [[0.5] * 4]], ids=["too long", "[N·K, 1]", "[1, N·K]"])
def test_weights_of_targets_have_their_shape_or_are_flat(weights: list[Any]) -> None:
    message = refusal(
        lambda: multi_target_cross_entropy().bind(weights=[weights])(bare([[0, 1]]), [torch.zeros(2, 2) - 1])
    )
    assert "expected shape (2, 2), that of logprobs" in message


def test_advantages_that_a_loss_does_not_read_make_no_weights() -> None:
    [datum] = datums([1.0, -1.0], name="advantages")
    message = refusal(lambda: cross_entropy()([datum], [torch.tensor([-1.0, -2.0])]))
    assert "datum[0].weights: expected a row for each datum, got loss_fn_inputs without weights" in message


@pytest.mark.parametrize("name", ["mask", "loss_mask"])
def test_an_rl_datum_with_a_mask_of_another_name_is_refused(name: str) -> None:
    fields = {"advantages": [1.0, -1.0], "logprobs": [-1.0, -2.0], name: [0.0, 1.0]}
    datum = SimpleNamespace(loss_fn_inputs=fields)  # ours takes no other field
    message = refusal(lambda: ppo()([datum], [torch.tensor([-1.0, -2.0])]))
    assert f"Its {name!r} is not read: pass it as weights." in message


def test_one_advantage_for_each_datum_makes_no_weights() -> None:
    datum = SimpleNamespace(loss_fn_inputs={"advantages": 1.0, "logprobs": [-1.0, -2.0]})
    message = refusal(lambda: ppo()([datum], [torch.tensor([-1.0, -2.0])]))
    assert "datum[0].weights" in message and "without weights" in message


@pytest.mark.parametrize(
    ("loss", "data", "message"),
    [
        (ppo(), [], "data: expected at least one datum"),
        (dpo(), datums([1.0]), "an odd number"),
        (ppo(), datums([1.0])[0], "data: expected a list of datums"),
        (ppo(), [{"weights": [1.0]}], "datum[0].loss_fn_inputs: expected a Datum"),
        (ppo(), [Datum(ModelInput.from_ints([0]), {"target_tokens": [0]})], "datum[0].weights"),
    ],
    ids=["empty", "odd", "no list", "no datum", "no weights"],
)
def test_a_denominator_is_of_a_batch_that_a_call_accepts(loss: Loss, data: Any, message: str) -> None:
    assert message in refusal(lambda: loss.denominator(data))


def test_a_truncated_denominator_needs_targets() -> None:
    datum = Datum(ModelInput.from_ints([0]), {"weights": [1.0]})
    message = refusal(lambda: ppo().bind(align="truncate").denominator([datum]))
    assert "target_tokens" in message and "Build the datum with datum_from_tokens." in message


@pytest.mark.parametrize(
    "row",
    [
        torch.empty(2, device="meta"),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2).to_sparse(),
        np.array(["-1", "-2"]),
        np.array([-1.0, "x"], dtype=object),
    ],
    ids=["meta", "complex", "sparse", "strings", "a string among numbers"],
)
def test_a_row_that_is_no_array_of_numbers_is_refused(row: Any) -> None:
    loss = ppo().bind(advantages=[1.0], old_logprobs=[row])
    message = refusal(lambda: loss(datums([1.0, 1.0]), [torch.tensor([-1.0, -2.0])]))
    assert "datum[0].old_logprobs: expected a number or a row of numbers" in message


def test_columns_may_be_arrays_for_some_datums_and_tensors_for_others() -> None:
    mixed = [np.array([-1.0, -1.0]), torch.tensor([-2.0])]
    t = pack(
        datums([1.0, 1.0], [1.0]), [torch.zeros(2) - 1, torch.zeros(1) - 1], ("ref_logprobs",), {"ref_logprobs": mixed}
    )
    assert t.ref_logprobs.tolist() == [-1.0, -1.0, -2.0]


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 2, 0], [0, 2, 1]], ids=str)
def test_all_parts_of_a_leaf_in_another_order(order: list[int]) -> None:
    """Weights 4, 2, 1 of the list as it is: Σ w·(−lp) / 7, and −w/7 at the entry that each part was cut from."""
    leaf = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    parts = torch.split(leaf, 1)
    total, _ = cross_entropy()(datums([4.0], [2.0], [1.0]), [parts[i] for i in order])
    total.backward()
    assert total.item() == pytest.approx(sum(w * (i + 1) for w, i in zip((4, 2, 1), order)) / 7)
    assert leaf.grad.tolist() == pytest.approx([-{order[0]: 4, order[1]: 2, order[2]: 1}[i] / 7 for i in range(3)])


@pytest.mark.parametrize("old", ["in the datums", "nowhere", ON_POLICY], ids=str)
def test_a_truncated_denominator_reads_the_columns_that_there_are(old: Any) -> None:
    """Weights 1, ½, 2 and two advantages: 1 + ½. Old logprobs of one token cut to 1, where the datum has them."""
    fields = {"weights": [1.0, 0.5, 2.0], "advantages": [1.0, 1.0]}
    if old == "in the datums":
        fields["old_logprobs"] = [-1.0]
    inputs = {"target_tokens": np.arange(3), **{name: np.array(row) for name, row in fields.items()}}
    bound = ppo().bind(align="truncate", **({"old_logprobs": ON_POLICY} if old is ON_POLICY else {}))
    assert bound.denominator([SimpleNamespace(loss_fn_inputs=inputs)]) == (1.0 if old == "in the datums" else 1.5)


def test_a_denominator_is_summed_in_float64() -> None:
    """In float32 2²⁴ + 1 is 2²⁴."""
    assert cross_entropy().denominator(datums([2.0**24, 1.0])) == 2.0**24 + 1


@pytest.mark.parametrize("shape", [[4], [2, 2], None], ids=str)
def test_targets_of_an_sdk_count_positions_or_entries(shape: list[int] | None) -> None:
    """Two positions of two targets, nested, flat or without a shape; the logprobs of three positions are others'."""
    targets = SimpleNamespace(shape=shape, to_numpy=lambda: np.arange(4).reshape(shape or 4))
    datum = SimpleNamespace(loss_fn_inputs={"target_tokens": targets, "weights": np.ones((2, 2))})
    total, _ = multi_target_cross_entropy()([datum], [torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])])
    assert float(total) == 2.5
    message = refusal(lambda: multi_target_cross_entropy()([datum], [torch.zeros(3, 2) - 1]))
    assert f"logprobs: expected {(shape or [4])[0]} rows (the length of target_tokens), got 3" in message


@pytest.mark.parametrize("name", ["weights", "old_logprobs", "ref_logprobs", "sampler_logprobs"])
def test_numbers_stand_for_rows_of_labels_and_advantages_alone(name: str) -> None:
    """Also in a loss with one row for each sequence, which may read labels: one number for each datum."""
    call = partial(pack_side_columns, datums([1.0, 1.0], [1.0]), [(2,), (1,)], torch.empty(0), rows=Rows.SEQUENCES)
    labels = call(reads=("label",), columns={"label": torch.tensor([1.0, -1.0])})
    assert labels.columns["label"].tolist() == [1.0, 1.0, -1.0]
    message = refusal(lambda: call(reads=(name,) if name != "weights" else (), columns={name: [-1.0, -2.0]}))
    assert f"{name}: expected a row for each datum, got a number for each" in message
    message = refusal(lambda: pack_side_columns(datums([1.0]), [(1,)], torch.empty(0), ("label",), {"label": [1.0]}))
    assert "label: expected a row for each datum, got a number for each" in message


def test_a_number_among_rows_is_named() -> None:
    message = refusal(lambda: ppo().bind(advantages=[[1.0], 2.0])(datums([1.0], [1.0]), [torch.zeros(1) - 1] * 2))
    assert (
        "datum[1].advantages: expected a row for each datum, or a number for each, got a number among rows" in message
    )


def test_nulls_and_long_doubles_keep_the_precision_of_double_logprobs() -> None:
    """0.1 in float32 is another number. A null is nan, and stands where the weight is 0."""
    rows = {"old_logprobs": [[None, -0.1]], "ref_logprobs": [np.array([0, -0.1], dtype=np.longdouble)]}
    t = pack(datums([0.0, 1.0]), [torch.zeros(2, dtype=torch.float64)], tuple(rows), rows)
    assert t.old_logprobs.tolist() == t.ref_logprobs.tolist() == [0.0, -0.1]


NO_PLAIN_NUMBERS: dict[str, Callable[[], torch.Tensor]] = {
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2)]),
    "nested jagged": lambda: torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
    "sparse": lambda: torch.zeros(2).to_sparse(),
    "meta": lambda: torch.zeros(2, device="meta"),
    "complex": lambda: torch.zeros(2, dtype=torch.complex64),
}
"""Made inside of a test: a prototype of torch may warn, or be missing, at collection."""


def without_plain_numbers(kind: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return NO_PLAIN_NUMBERS[kind]()


@pytest.mark.parametrize("kind", NO_PLAIN_NUMBERS)
@pytest.mark.parametrize("align", ["strict", "truncate"])
def test_a_tensor_that_holds_no_plain_numbers_is_refused(kind: str, align: str) -> None:
    """As a row, as a whole column, as logprobs, and where only the weights are packed."""
    tensor, good, data = without_plain_numbers(kind), [torch.tensor([-1.0, -2.0])], datums([1.0, 1.0])
    bound = ppo().bind(advantages=[1.0], old_logprobs=[[-1.0, -2.0]], align=align)
    message = refusal(lambda: bound.bind(old_logprobs=[tensor])(data, good))
    assert "datum[0].old_logprobs: expected a number or a row of numbers" in message
    message = refusal(lambda: bound.bind(old_logprobs=tensor)(data, good))
    assert "ppo: old_logprobs: expected 1 entries, one per datum, got a " in message
    message = refusal(lambda: bound.bind(weights=[tensor]).denominator(data))
    assert "datum[0].weights: expected a number or a row of numbers" in message
    assert "datum[0].logprobs: expected a " in refusal(lambda: bound(data, [tensor]))
