"""A request has the same gradient, loss and metrics in a single pass, streamed, and in two passes."""

import math
import warnings
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from tiny import SHAPE, client, own_metrics, same, text, texts
from tiny import gradients as gradients_of
from torch import Tensor

import lossfns
from lossfns import (
    ON_POLICY,
    Datum,
    Loss,
    LossInputError,
    LossWarning,
    ModelInput,
    TensorData,
    datum_from_tokens,
    token_mean,
)
from lossfns.backend import AdamParams, Decoder, LocalReferenceClient, LocalTrainingClient
from lossfns.backend.engine.budget import MARGIN
from lossfns.backend.engine.pooling import last_pool
from lossfns.backend.model import lora
from lossfns.backend.model.tokenizer import ByteTokenizer
from lossfns.export.builtins import BUILTINS
from lossfns.testing.public import presets
from lossfns.tokens import DATUM_COLUMNS, MODEL_COLUMNS

Make = Callable[..., LocalTrainingClient]
Call = Callable[[LocalTrainingClient], Any]


def budget(make: Make, data: list[Any], tokens: int | None = None, extras: tuple[str, ...] = ()) -> int:
    """Bytes for micro-batches of ``tokens`` tokens; by default as many as the longest datum has."""
    engine = make()._engine
    inputs = engine.logprobs(data).inputs
    needed = engine.budget.costs(inputs, extras=extras).step_bytes(tokens or max(inputs.lengths))
    return math.ceil(needed / engine.budget.margin) + 1


def vector(c: LocalTrainingClient) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in c.model.parameters() if p.grad is not None])


def assert_near(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """Compare relative to the norm of ``b``, which is not 0."""
    assert a.shape == b.shape and 0 < b.norm() < math.inf
    assert (a - b).norm() <= tolerance * b.norm()


def assert_cut_changes_nothing(
    call: Call,
    data: list[Any],
    passes: int = 1,
    make: Make = client,
    room: int | None = None,
    extras: tuple[str, ...] = (),
) -> Any:
    """Compare all results of a request in one micro-batch and in as many as possible."""
    limit = budget(make, data, room, extras)
    whole, cut = make(memory_budget=math.inf), make(memory_budget=limit)  # a limit: what both plan is comparable
    a, b = call(whole), call(cut)
    cost = [{name.partition(":")[0]: x for name, x in r.metrics.items()} for r in (a, b)]
    assert (cost[0]["passes"], cost[0]["micro_batches"]) == (1, 1)
    assert cost[1]["passes"] == passes and cost[1]["micro_batches"] > 1
    assert cost[1]["peak_memory"] <= limit and cost[1]["peak_memory"] < cost[0]["peak_memory"]
    own = [own_metrics(r.metrics) for r in (a, b)]
    surrogates = [each.pop("surrogate_loss:sum", 0.0) for each in own]  # a sum of products that may cancel
    assert surrogates[1] == pytest.approx(surrogates[0], rel=1e-5, abs=3e-6)
    assert own[1] == pytest.approx(own[0], rel=1e-5, abs=1e-6)
    for x, y in zip(a.loss_fn_outputs, b.loss_fn_outputs, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name].shape == y[name].shape
            torch.testing.assert_close(y[name].to_torch(), x[name].to_torch(), rtol=1e-5, atol=1e-5)
    assert_near(vector(cut), vector(whole))
    counted = [[int(n) for n in c._engine.gradients.accumulated[:2]] for c in (whole, cut)]
    assert counted[0] == counted[1]
    return b


def columns(rng: Random, data: list[Any], loss: Loss) -> dict[str, Any]:
    """Values for the columns that a loss reads and the model does not compute, with old logprobs near its own."""

    def rows() -> list[list[float]]:
        return [[-3.4 + rng.gauss(0, 0.3) for _ in range(d.model_input.length)] for d in data]

    found: dict[str, Any] = {name: [rng.random() for _ in data] for name in DATUM_COLUMNS}
    found["advantages"] = [rng.gauss(0, 1) for _ in data]
    indices = range(len(data))
    found |= {"groups": [float(i // 2 % 2) for i in indices], "labels": [float(i % 2) for i in indices]}
    return {name: found.get(name) or rows() for name in loss.reads if name not in MODEL_COLUMNS}


def custom(loss_fn: Any, data: list[Any], **options: Any) -> Call:
    return lambda c: c.forward_backward_custom(data, loss_fn, **options).result()


def builtin(c: LocalTrainingClient) -> Any:
    return c.forward_backward(DATA, "cross_entropy").result()


DATA = texts(Random(2), count=10, longest=12)

SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"dual_clip": 3.0},
    "grpo": {"kl_beta": 0.1},
    "gspo": {"clip": (0.8, 1.2)},
    "gspo_token": {"clip": (0.8, 1.2)},
    "dpo": {"label_smoothing": 0.1},
}
LOSSES = [
    *(
        preset(**SETTINGS.get(name, {}))
        for name, preset in presets().items()
        if preset().rows != "targets" and preset().output == "logprobs"
    ),
    lossfns.with_tis(lossfns.ppo(), level=lossfns.sequence_level),
]
WEIGHINGS = [
    lossfns.sequence_mean,
    lossfns.sequence_sum_mean,
    lossfns.token_sum,
    lossfns.fixed_length(7),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_a_loss_of_ours_streams_unless_it_compares_the_datums_of_a_group(loss: Loss) -> None:
    """A loss that couples groups takes two passes."""
    bound = loss.bind(**columns(Random(1), DATA, loss))
    longest_pair = max(a.model_input.length + b.model_input.length for a, b in zip(DATA[::2], DATA[1::2]))
    extras = tuple(name for name in MODEL_COLUMNS if name in loss.reads)
    passes = 2 if loss.couples_groups else 1
    assert_cut_changes_nothing(custom(bound, DATA), DATA, passes, room=longest_pair, extras=extras)


def test_a_sum_of_losses_streams() -> None:
    """Most micro-batches have no token of the second part; those of rpo keep pairs whole."""
    few = [[float(i < 2)] * d.model_input.length for i, d in enumerate(DATA)]
    loss = lossfns.chord(lossfns.grpo(kl_beta=0.1), mu=0.3)
    bound = loss.bind(**columns(Random(1), DATA, loss) | {"sft_weights": few})
    pairs = lossfns.rpo(lossfns.dpo())
    for each in (bound, bound.bind(denominator=[50.0, 3.0]), pairs.bind(**columns(Random(1), DATA, pairs))):
        assert_cut_changes_nothing(custom(each, DATA), DATA, room=40)


@pytest.mark.parametrize("weigh", WEIGHINGS, ids=repr)
@pytest.mark.parametrize("preset", [lossfns.cross_entropy, lossfns.ppo])
def test_so_it_does_with_every_denominator(weigh: lossfns.Weighing, preset: Callable[..., Loss]) -> None:
    loss = preset(weigh=weigh)
    assert_cut_changes_nothing(custom(loss.bind(**columns(Random(1), DATA, loss)), DATA), DATA)


@pytest.mark.parametrize("loss", [lossfns.dpo(), lossfns.orpo(weigh=lossfns.pair_sum)], ids=lambda loss: loss.name)
def test_a_pair_that_does_not_fit_is_split_and_needs_two_passes(loss: Loss) -> None:
    """The budget has room for the longest datum, but not for a pair."""
    bound = loss.bind(**columns(Random(1), DATA, loss))
    assert_cut_changes_nothing(custom(bound, DATA), DATA, passes=2)


def test_pairs_stay_together_also_where_a_cut_would_fill_the_budget_better() -> None:
    """Six datums of 5 tokens and room for 15 make micro-batches of two, not of three."""
    rng = Random(0)
    data = [text(rng, 6) for _ in range(6)]
    loss = lossfns.dpo()
    call = custom(loss.bind(**columns(rng, data, loss)), data)
    assert assert_cut_changes_nothing(call, data, room=15).metrics["micro_batches"] == 3
    assert (
        assert_cut_changes_nothing(custom(lossfns.cross_entropy(), data), data, room=15).metrics["micro_batches"] == 2
    )


def rows_of(x: list[float]) -> list[Any]:
    """One row for each datum, which repeats its number for each token."""
    return [[a] * d.model_input.length for a, d in zip(x, DATA)]


FORMS: list[Callable[[list[float]], Any]] = [
    list,
    tuple,
    deque,
    np.array,
    torch.tensor,
    rows_of,
    lambda x: tuple(map(np.array, rows_of(x))),
    lambda x: list(map(torch.tensor, rows_of(x))),
    lambda x: [TensorData.from_torch(torch.tensor(row)) for row in rows_of(x)],
]


@pytest.mark.parametrize("form", FORMS)
def test_bound_columns_are_cut_with_their_datums_whatever_form_they_have(form: Callable[[list[float]], Any]) -> None:
    advantages = [Random(3).gauss(0, 1) for _ in DATA]
    bound = lossfns.ppo().bind(advantages=form([i + a for i, a in enumerate(advantages)]), old_logprobs=ON_POLICY)
    assert_cut_changes_nothing(custom(bound, DATA), DATA)


def test_rows_of_one_array_are_cut_with_their_datums() -> None:
    rng = Random(5)
    data = [text(rng, 7) for _ in range(6)]
    old = torch.tensor([[-3.4 + rng.gauss(0, 0.3) for _ in range(6)] for _ in data])
    for form in (torch.Tensor.clone, torch.Tensor.numpy, torch.Tensor.tolist):
        bound = lossfns.ppo().bind(advantages=np.arange(6.0), old_logprobs=form(old))
        assert_cut_changes_nothing(custom(bound, data), data)


def test_rows_that_are_too_long_are_truncated_datum_by_datum() -> None:
    """Each datum is cut to its shortest row, which is another column each time."""
    rng = Random(5)
    old = [
        [-3.4 + rng.gauss(0, 0.3) for _ in range(max(1, d.model_input.length + i % 3 - 1))] for i, d in enumerate(DATA)
    ]
    bound = lossfns.grpo(kl_beta=0.1).bind(advantages=range(10), old_logprobs=old, ref_logprobs=old, align="truncate")
    assert_cut_changes_nothing(custom(bound, DATA), DATA)


def masked(data: list[Any], *which: int) -> list[Any]:
    """Give these datums weights of 0."""
    zeros = [TensorData([0.0] * d.model_input.length, "float32") for d in data]
    return [
        Datum(d.model_input, {**d.loss_fn_inputs, "weights": zeros[i]}) if i in which else d for i, d in enumerate(data)
    ]


@pytest.mark.parametrize("loss", [lossfns.cross_entropy(), lossfns.gspo(), lossfns.dpo()], ids=lambda loss: loss.name)
def test_a_micro_batch_may_have_no_weight_at_all(loss: Loss) -> None:
    """Datums of one length in micro-batches of two: the second pair is a micro-batch by itself."""
    rng = Random(0)
    data = masked([text(rng, 6) for _ in range(8)], 2, 3)
    bound = loss.bind(**columns(rng, data, loss))
    done = assert_cut_changes_nothing(custom(bound, data), data, room=10)
    assert done.metrics["micro_batches"] == 4 and done.metrics["sequences_empty"] == 2


def test_a_bound_denominator_is_that_of_every_micro_batch() -> None:
    """The raw sum −Σ w·lp is divided by 100 and by no other count."""
    bound = lossfns.cross_entropy().bind(denominator=100.0)
    done = assert_cut_changes_nothing(custom(bound, DATA), DATA)
    logprobs = torch.cat([output["logprobs"].to_torch() for output in done.loss_fn_outputs])
    weights = torch.cat([d.loss_fn_inputs["weights"].to_torch() for d in DATA])
    assert done.metrics["loss"] == pytest.approx(-float(weights @ logprobs) / 100, rel=1e-5)


def test_a_part_without_any_weight_is_a_part_in_one_pass() -> None:
    data = masked(DATA, *range(10))
    c = client(memory_budget=budget(client, data))
    metrics = custom(lossfns.cross_entropy().bind(denominator=100.0), data)(c).metrics
    assert metrics["loss"] == 0 and metrics["passes"] == 1 and metrics["micro_batches"] > 1
    assert vector(c).count_nonzero() == 0


def test_the_sum_of_absolute_gradients_is_that_of_the_whole() -> None:
    bound = lossfns.ppo().bind(advantages=range(10), old_logprobs=ON_POLICY, grad_l1=True)
    done = assert_cut_changes_nothing(custom(bound, DATA), DATA)
    active = [sum(w * i for w in d.loss_fn_inputs["weights"].data) for i, d in enumerate(DATA)]
    assert done.metrics["grad_l1"] == pytest.approx(sum(active) / done.metrics["count"], rel=1e-5)


# Built-ins


def rl_data(name: str, sdk: Any = lossfns) -> list[Any]:
    """Make datums with the fields that a built-in reads."""
    rng, data = Random(7), texts(Random(2), count=10, longest=12)
    result = []
    for d in data:
        n = d.model_input.length
        rows = {"logprobs": [-3.4 + rng.gauss(0, 0.3) for _ in range(n)], "advantages": [rng.gauss(0, 1)] * n}
        if name == "grpo":
            rows["ref_logprobs"] = [-3.4 + rng.gauss(0, 0.3) for _ in range(n)]
        if name == "gspo":
            rows["sequence_ratio_mask"] = [1.0] * n
        fields = {key: sdk.TensorData(data=row, dtype="float32", shape=[n]) for key, row in rows.items()}
        targets = sdk.TensorData(data=d.loss_fn_inputs["target_tokens"].data, dtype="int64", shape=[n])
        ids = sdk.ModelInput.from_ints(d.model_input.to_ints())
        result.append(sdk.Datum(model_input=ids, loss_fn_inputs={"target_tokens": targets, **fields}))
    return result


@pytest.mark.parametrize("profile", ["tinker", "fireworks"])
@pytest.mark.parametrize("name", BUILTINS)
def test_a_built_in_streams_and_steps_as_at_once(name: str, profile: str) -> None:
    data = DATA if name == "cross_entropy" else rl_data(name)
    config = {"kl_beta": 0.1} if name == "grpo" else {"beta": 0.2} if name == "dro" else None

    def call(c: LocalTrainingClient) -> Any:
        return c.forward_backward(data, name, config).result()

    make: Make = lambda **options: client(profile=profile, **options)  # noqa: E731
    assert_cut_changes_nothing(call, data, make=make)
    clients = make(), make(memory_budget=budget(make, data))
    for c in clients:
        call(c)
        c.optim_step(AdamParams(learning_rate=1e-2), "num_sequences").result()
    for x, y in zip(*(c.model.parameters() for c in clients)):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_many_targets_of_a_token_are_cut_with_it() -> None:
    data = texts(Random(4), count=8, longest=9, targets=3)
    assert_cut_changes_nothing(lambda c: c.forward_backward(data, "cross_entropy").result(), data)
    for weigh in (lossfns.token_mean, lossfns.sequence_mean):
        assert_cut_changes_nothing(custom(lossfns.multi_target_cross_entropy(weigh=weigh), data), data)


# Losses of one's own


def spread_of_all(data: list[Any], logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """The standard deviation of all logprobs, which is not a sum over datums."""
    std = torch.cat([lp.flatten() for lp in logprobs_list]).std()
    return std, {"std": std.item()}


def contrast(data: list[Any], logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """A loss over all pairs of sequences."""
    sums = torch.stack([lp.sum() for lp in logprobs_list])
    return -sums.log_softmax(0)[::2].sum(), {}


def ours_within(data: list[Any], logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    loss, metrics = lossfns.cross_entropy()(data, logprobs_list)
    return loss.square(), metrics


@pytest.mark.parametrize("profile", ["tinker", "fireworks"])
@pytest.mark.parametrize("loss_fn", [spread_of_all, contrast, ours_within])
def test_any_callable_sees_the_whole_batch_and_takes_two_passes(loss_fn: Any, profile: str) -> None:
    make: Make = lambda **options: client(profile=profile, **options)  # noqa: E731
    assert_cut_changes_nothing(custom(loss_fn, DATA), DATA, passes=2, make=make)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_loss_over_embeddings_sees_the_whole_batch(pooling: str) -> None:
    def variance(data: list[Any], vectors: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        return torch.stack(vectors).var(0).sum(), {"vectors": float(len(vectors))}

    call = custom(variance, DATA, output="embedding", pooling=pooling)
    assert assert_cut_changes_nothing(call, DATA, passes=2, room=14).metrics["vectors"] == 10


def centred(t: lossfns.Tokens) -> tuple[Tensor, dict[str, Tensor]]:
    """Terms that couple all tokens of a batch."""
    return (t.logprobs - t.logprobs.mean()).square(), {}


def test_a_loss_object_whose_terms_couple_datums_gets_its_gradient_all_the_same() -> None:
    """Its parts do not sum to the whole, which the comparison with the whole shows."""
    loss = Loss("variance", {}, (), centred, token_mean.share, token_mean.count)
    assert_cut_changes_nothing(custom(loss, DATA), DATA, passes=2)


# Errors are those of a single pass


def broken(**columns: Any) -> Any:
    """Replace a column of ones in a bound loss."""
    ones = {"advantages": rows_of([1.0] * 10), "old_logprobs": rows_of([-3.4] * 10)}
    return lossfns.ppo(log_ratio_cap=None).bind(**{**ones, **columns})


def changed(row: int, values: Callable[[int], list[float]]) -> list[list[float]]:
    rows = rows_of([-3.4] * 10)
    rows[row] = values(len(rows[row]))
    return rows


def without(data: list[Any], which: int, name: str) -> list[Any]:
    fields = {key: x for key, x in data[which].loss_fn_inputs.items() if key != name}
    return [*data[:which], Datum(data[which].model_input, fields), *data[which + 1 :]]


def signed(data: list[Any], which: int, weight: float) -> list[Any]:
    fields = {**data[which].loss_fn_inputs, "weights": TensorData([weight] * data[which].model_input.length, "float32")}
    return [*data[:which], Datum(data[which].model_input, fields), *data[which + 1 :]]


def leaves_out_the_last_but_one(data: list[Any], logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return torch.stack([lp.sum() for i, lp in enumerate(logprobs_list) if i != 8]).sum(), {}


def infinite_slope(data: list[Any], logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return torch.stack([(lp.sum() * (i != 7)).abs().sqrt() for i, lp in enumerate(logprobs_list)]).sum(), {}


WRONG = {
    "nan advantage": (broken(advantages=changed(6, lambda n: [math.nan] * n)), DATA, 6),
    "old logprob above 0": (broken(old_logprobs=changed(8, lambda n: [-1.0] * (n - 1) + [0.5])), DATA, 8),
    "overflowing ratio": (
        lossfns.importance_sampling(log_ratio_cap=None).bind(
            advantages=range(10), old_logprobs=changed(7, lambda n: [-200.0] * n)
        ),
        DATA,
        None,
    ),
    "short row": (broken(old_logprobs=changed(9, lambda n: [-1.0] * (n + 1))), DATA, 9),
    "too few rows": (broken(old_logprobs=rows_of([-3.4] * 10)[:9]), DATA, None),
    "negative weight": (broken(), signed(DATA, 7, -1.0), 7),
    "nan weight": (lossfns.cross_entropy(), signed(DATA, 7, math.nan), 7),
    "no weights": (lossfns.cross_entropy(), without(DATA, 5, "weights"), 5),
    "unread column": (broken(), without(DATA, 9, "weights"), 9),
    "no active token": (lossfns.cross_entropy(), masked(DATA, *range(10)), None),
    "signed sequence": (lossfns.cross_entropy(weigh=lossfns.sequence_mean), signed(DATA, 4, -1.0), None),
    "lone side": (lossfns.orpo(), masked(DATA, 7), 7),
    "odd pairs": (lossfns.orpo(), DATA[:9], None),
    "no gradient": (leaves_out_the_last_but_one, DATA, 8),
    "infinite slope": (infinite_slope, DATA, 7),
    "no loss": (lambda data, logprobs_list: 1.0, DATA, None),
    "constant": (lambda data, logprobs_list: (torch.tensor(1.0), {}), DATA, None),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_error_names_the_datum_of_the_whole_and_says_what_it_says_at_once(name: str) -> None:
    loss_fn, data, datum = WRONG[name]
    told = []
    for c in (client(), client(memory_budget=budget(client, DATA))):
        with pytest.raises(LossInputError) as error:
            custom(loss_fn, data)(c)
        told.append(str(error.value))
        assert error.value.datum == datum
        assert all(p.grad is None for p in c.model.parameters())
    assert told[0] == told[1]


def test_what_does_not_fit_together_is_refused_before_the_first_forward() -> None:
    c = client(memory_budget=budget(client, DATA))
    custom(lossfns.cross_entropy(), DATA)(c)  # the model has been measured
    calls = []
    c.model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(LossInputError, match=r"datum\[9\]"):
        custom(WRONG["short row"][0], DATA)(c)
    assert not calls


def test_a_warning_is_given_once_for_the_whole() -> None:
    bound = broken(old_logprobs=rows_of([0.0] * 10))
    told = []
    for c in (client(), client(memory_budget=budget(client, DATA))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            custom(bound, DATA)(c)
        told.append([str(w.message) for w in caught if w.category is LossWarning])
    assert told[0] == told[1] and len(told[0]) == 1


# All or nothing


def stop_at(c: LocalTrainingClient, call: int, error: BaseException) -> None:
    """Make the model raise in one of its forward passes, counted from 1."""
    calls = iter(range(1, 1000))

    def fail(*_: Any) -> None:
        if next(calls) == call:
            raise error

    c.model.register_forward_pre_hook(fail)


@pytest.mark.parametrize("loss_fn", [lossfns.cross_entropy(), spread_of_all], ids=["streamed", "two_pass"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), torch.OutOfMemoryError("no more"), LossInputError("x", "y", "z", "w")], ids=type
)
def test_a_micro_batch_that_fails_leaves_the_gradient_of_those_before_out(error: BaseException, loss_fn: Any) -> None:
    c = client(memory_budget=budget(client, DATA))
    done = custom(loss_fn, DATA)(c)
    before = gradients_of(c)
    counted = [int(n) for n in c._engine.gradients.accumulated[:2]]
    forwards = int(done.metrics["micro_batches"] * done.metrics["passes"])
    stop_at(c, forwards - 1, error)
    with pytest.raises(type(error)):
        custom(loss_fn, DATA)(c)
    assert same(gradients_of(c), before)
    assert [int(n) for n in c._engine.gradients.accumulated[:2]] == counted


@pytest.mark.parametrize("call", [custom(lossfns.cross_entropy(), DATA), builtin], ids=["custom", "builtin"])
def test_so_does_a_response_that_cannot_be_made(call: Call) -> None:
    c = client(memory_budget=budget(client, DATA))
    custom(lossfns.cross_entropy(), DATA)(c)
    before, counted = gradients_of(c), [int(n) for n in c._engine.gradients.accumulated[:2]]
    c._profile = c._profile._replace(custom_metrics=lambda value: 1 / 0, builtin_metrics=lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(c)
    assert same(gradients_of(c), before)
    assert [int(n) for n in c._engine.gradients.accumulated[:2]] == counted


def test_a_gradient_that_overflows_in_one_micro_batch_is_none_of_the_whole() -> None:
    make: Make = lambda **options: client(dtype=torch.float16, **options)  # noqa: E731
    c = make(memory_budget=budget(make, DATA))
    custom(lossfns.cross_entropy(), DATA)(c)
    before = gradients_of(c)
    with pytest.raises(LossInputError, match="finite gradients of the parameters"):
        custom(lossfns.cross_entropy(weigh=lossfns.token_sum), signed(DATA, 6, 1e6))(c)
    assert same(gradients_of(c), before)


@pytest.mark.parametrize("loss_fn", [lossfns.cross_entropy(), spread_of_all], ids=["streamed", "two_pass"])
def test_gradients_of_requests_add_up(loss_fn: Any) -> None:
    """Three equal requests add the same gradient each time."""
    c, whole = client(memory_budget=budget(client, DATA, 20)), client()
    for k in (1, 2, 3):
        custom(loss_fn, DATA)(c)
        custom(loss_fn, DATA)(whole)
        assert_near(vector(c), vector(whole), 1e-6 if k > 1 else 1e-5)
        assert_near(vector(c) / k, vector(whole) / k)


@pytest.mark.parametrize("loss_fn", ["streamed", "two_pass"])
def test_hundreds_of_micro_batches_in_half_precision_are_as_near_as_one(loss_fn: str) -> None:
    """bfloat16 has 8 bits: beyond 256, a sum in bfloat16 would no longer change."""
    rng = Random(1)
    data = [text(rng, 3) for _ in range(400)]
    loss: Any = lossfns.cross_entropy() if loss_fn == "streamed" else ours_within
    make: Make = lambda **options: client(dtype=torch.bfloat16, **options)  # noqa: E731
    exact, whole, cut = client(), make(), make(memory_budget=budget(make, data))
    custom(loss, data)(exact)
    custom(loss, data)(whole)
    assert custom(loss, data)(cut).metrics["micro_batches"] == 400
    far, near = ((vector(c) - vector(exact)).norm() for c in (cut, whole))
    assert far <= 1.1 * near
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in cut.model.parameters())


# Models


def group(rng: Random) -> list[Any]:
    """Completions of two prompts, which are long enough to be computed once."""
    rows = []
    for _ in range(2):
        prompt = [rng.randrange(31) for _ in range(20)]
        rows += [prompt + [rng.randrange(31) for _ in range(rng.randint(2, 9))] for _ in range(5)]
    return [datum_from_tokens(row, prompt_length=20) for row in rows]


@pytest.mark.parametrize("loss_fn", [lossfns.cross_entropy(), contrast], ids=["streamed", "two_pass"])
@pytest.mark.parametrize("room", [30, 60, 100])
def test_a_prefix_in_common_may_be_cut_apart(loss_fn: Any, room: int) -> None:
    data = group(Random(0))
    assert_cut_changes_nothing(custom(loss_fn, data), data, 1 + (loss_fn is contrast), room=room)


def built(change: Callable[[Decoder], Any], **shape: Any) -> Make:
    """Make clients of a model that is changed before its use."""

    def make(**options: Any) -> LocalTrainingClient:
        model = Decoder(**{**SHAPE, **shape}, seed=3)
        change(model)
        return LocalTrainingClient(model, tokenizer=ByteTokenizer(), device="cpu", **options)

    return make


def frozen_body(model: Decoder) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_(name == "unembed.weight")


def frozen_head(model: Decoder) -> None:
    model.unembed.weight.requires_grad_(False)


def checkpointing(model: Decoder) -> None:
    model.checkpointing = True


def adapted(model: Decoder) -> None:
    lora.adapt(model, rank=2, parts=["attn", "mlp", "unembed"], seed=0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p += 0.1


@pytest.mark.parametrize("change", [frozen_body, frozen_head, checkpointing, adapted])
@pytest.mark.parametrize("loss_fn", [lossfns.cross_entropy(), spread_of_all], ids=["streamed", "two_pass"])
def test_any_part_of_a_model_may_be_trained(change: Callable[[Decoder], Any], loss_fn: Any) -> None:
    make = built(change, tied=False, layers=2)
    assert_cut_changes_nothing(custom(loss_fn, DATA), DATA, 1 + (loss_fn is spread_of_all), make=make)


def test_in_float64_too() -> None:
    make: Make = lambda **options: client(dtype=torch.float64, **options)  # noqa: E731
    whole, cut = make(), make(memory_budget=budget(make, DATA))
    for c in (whole, cut):
        custom(lossfns.grpo(kl_beta=0.1).bind(**columns(Random(1), DATA, lossfns.grpo())), DATA)(c)
    assert_near(vector(cut), vector(whole), 1e-12)


@pytest.mark.parametrize("loss_fn", [lossfns.cross_entropy(), spread_of_all], ids=["streamed", "two_pass"])
def test_a_model_of_which_nothing_is_trained_is_refused(loss_fn: Any) -> None:
    make = built(lambda model: model.requires_grad_(False))
    for options in ({}, {"memory_budget": budget(make, DATA)}):
        with pytest.raises(LossInputError, match="all that computes them is frozen"):
            custom(loss_fn, DATA)(make(**options))


# Forward alone


def counted(c: LocalReferenceClient) -> list[int]:
    """Count the tokens of each forward pass from now on."""
    tokens: list[int] = []
    c.model.register_forward_hook(lambda module, args, result: tokens.append(len(args[0])))
    return tokens


@pytest.mark.parametrize("output", ["logprobs", "embedding"])
def test_a_forward_alone_is_cut_to_the_same_outputs(output: str) -> None:
    config = {"output": "embedding", "pooling": "last"} if output == "embedding" else None
    whole = LocalReferenceClient(Decoder(**SHAPE), device="cpu")
    with torch.no_grad():
        engine = whole._engine
        forward = engine.logprobs(DATA) if output == "logprobs" else engine.embeddings(DATA, last_pool)
        least = math.ceil(engine.budget.costs(forward.inputs).step_bytes(11) / MARGIN) + 1
    cut = LocalReferenceClient(Decoder(**SHAPE), device="cpu", memory_budget=least)
    results = [c.forward(DATA, "cross_entropy", config).result() for c in (whole, cut)]
    tokens = counted(cut)
    cut.forward(DATA, "cross_entropy", config).result()
    assert max(tokens) <= 11 and sum(tokens) == sum(d.model_input.length for d in DATA)
    assert results[1].metrics == pytest.approx(results[0].metrics, rel=1e-5)
    for a, b in zip(*(r.loss_fn_outputs for r in results)):
        torch.testing.assert_close(a[output].to_torch(), b[output].to_torch(), rtol=1e-5, atol=1e-6)


def test_a_forward_needs_less_than_a_step() -> None:
    """A reference policy has no gradients: a budget that is too small for them is enough to run it."""
    model, data = Decoder(**{**SHAPE, "hidden": 400}), texts(Random(2), count=10, longest=3)
    c = LocalTrainingClient(model, tokenizer=1, device="cpu", memory_budget=sum(p.nbytes for p in model.parameters()))
    c.forward(data, "cross_entropy").result()
    with pytest.raises(LossInputError, match="memory_budget"):
        c.forward_backward(data, "cross_entropy").result()


def test_a_long_datum_among_short_ones_has_a_micro_batch_of_its_own() -> None:
    data = [
        Datum(ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:], "weights": [1.0] * (len(ids) - 1)})
        for ids in ([1, 2, 3], [4, 5], list(range(1, 30)), [6, 7, 8, 9])
    ]
    c = client(memory_budget=budget(client, data))
    tokens = counted(c)
    assert custom(lossfns.cross_entropy(), data)(c).metrics["micro_batches"] == 3
    assert tokens[-3:] == [3, 28, 3]
