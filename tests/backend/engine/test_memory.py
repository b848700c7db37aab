"""Memory of a step: counted, predicted, kept within a budget, and refused where the budget is too small."""

import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import BYTE_SHAPE, DATA, SHAPE, client, gradients, same, text
from torch import Tensor, nn

import lossfns
from lossfns import Datum, LossInputError, ModelInput, TensorData, datum_from_tokens
from lossfns.backend import AdamParams, Decoder, LocalReferenceClient, LocalTrainingClient
from lossfns.backend.engine.batch import ModelInputs
from lossfns.backend.engine.budget import LOSS_BYTES_PER_VALUE, MARGIN, into_micro_batches
from lossfns.backend.engine.memory import (
    PROBE_TOKENS,
    AllocationTracker,
    Footprint,
    available_bytes,
    cgroup_headroom,
    footprint,
)
from lossfns.backend.engine.pooling import mean_pool
from lossfns.backend.model import lora

# Counting

KB = 1000
"""Bytes of 250 float32 numbers."""


def numbers(kilobytes: int = 1) -> Tensor:
    return torch.ones(250 * kilobytes)


class Doubled(torch.autograd.Function):
    """2x, by way of a temporary tensor; keeps x for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.clone())
        return torch.cat([x, x]).view(2, -1).sum(0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0].sign()


def test_a_tensor_counts_until_it_is_freed() -> None:
    with AllocationTracker(set()) as watch:
        a = numbers(2)
        assert (watch.growing.total, watch.growing.peak) == (2 * KB, 2 * KB)
        b = numbers(1)
        assert watch.growing.total == 3 * KB
        del a
        assert watch.growing.total == KB
        c = numbers(1)
        assert (watch.growing.total, watch.growing.peak) == (2 * KB, 3 * KB)
        del b, c
    assert watch.growing.total == 0 and watch.fixed.peak == 0


def test_a_view_keeps_its_tensor_and_takes_nothing_itself() -> None:
    with AllocationTracker(set()) as watch:
        a = numbers(4)
        view, first = a.view(2, -1)[1], torch.split(a, 250)[0]
        del a
        assert watch.growing.total == 4 * KB
        detached = view.detach()
        del view, first
        assert watch.growing.total == 4 * KB
        del detached
    assert watch.growing.total == 0


def test_what_is_done_in_place_takes_nothing() -> None:
    before = numbers(4)
    with AllocationTracker(set()) as watch:
        before.add_(1).mul_(2)[:250].zero_()
        torch.add(before, 1, out=before)
        assert watch.growing.peak == 0
        a = numbers(1)
        a += 1
        a.copy_(a)
    assert watch.growing.peak == KB


def test_every_result_of_an_operation_counts() -> None:
    """The values are float32 and the places int64."""
    with AllocationTracker(set()) as watch:
        result = torch.ones(250).sort()
    assert watch.growing.total == KB + 2 * KB and len(result) == 2


def test_what_autograd_keeps_counts_until_the_backward_pass_is_over() -> None:
    x = numbers(1).requires_grad_()
    with AllocationTracker(set()) as watch:
        y = (x * x).exp()  # keeps x, which existed before, and the result
        assert (watch.growing.total, watch.growing.peak) == (KB, 2 * KB)
        total = y.sum()
        del y
        assert watch.growing.total == KB + 4
        total.backward()
        del total
        assert x.grad is not None and watch.growing.total == KB
        x.grad = None
    assert watch.growing.total == 0


def test_what_a_function_makes_and_keeps_inside_counts() -> None:
    x = numbers(1).requires_grad_()
    with AllocationTracker(set()) as watch:
        y = Doubled.apply(x)  # type: ignore[no-untyped-call]
        assert watch.growing.total == 2 * KB and watch.growing.peak == 4 * KB
        y.backward(torch.ones_like(y))
        del y
        assert watch.growing.total == KB
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 2))


def test_certain_sizes_are_counted_by_themselves() -> None:
    with AllocationTracker({2 * KB}) as watch:
        a, b, c = numbers(1), numbers(2), numbers(2)
        del b
        assert (watch.growing.peak, watch.fixed.peak, watch.fixed.total) == (KB, 4 * KB, 2 * KB)
        del a, c
    assert watch.growing.total == watch.fixed.total == 0


def test_a_footprint_is_that_of_the_peak_by_tokens_and_by_weight() -> None:
    """At the peak, two activations of 8 numbers a token; earlier, one of 8 and one of 4. Then a weight's gradient."""
    weight = torch.ones(8, 8)

    def step() -> None:
        for widths in ((8, 4), (8, 8)):
            activations = [torch.ones(PROBE_TOKENS, width) for width in widths]
            gradient = torch.ones(8, 8)
            del activations, gradient

    found = footprint(step, [weight])
    assert found == Footprint(fixed=8 * 8 * 4, per_token=(8 + 8) * 4)
    assert found.of(10) == 256 + 640


@given(st.integers(0, 10**12), st.integers(1, 10**8), st.integers(1, 10**6))
def test_as_many_tokens_fit_as_do_and_not_one_more(fixed: int, each: int, tokens: int) -> None:
    found = Footprint(fixed, each)
    assert found.tokens(found.of(tokens)) == tokens
    assert found.tokens(found.of(tokens) - 1) == tokens - 1
    assert found.tokens(math.inf) == math.inf


# Predicting


def backward(c: LocalTrainingClient, loss_fn: Any, data: list[Any], forward: Any) -> Any:
    """A request without its response."""
    with c._engine.gradients.all_or_nothing():
        return c._engine.backward(loss_fn, data, forward)


def adapted(model: Decoder) -> None:
    lora.adapt(model, rank=2, parts=["attn", "mlp"])


def checkpointing(model: Decoder) -> None:
    model.checkpointing = True


def frozen_head(model: Decoder) -> None:
    model.embed.requires_grad_(False)


MODELS: dict[str, tuple[dict[str, Any], Callable[[Decoder], Any], Any]] = {
    "tiny": (SHAPE, id, None),
    "small": (BYTE_SHAPE, id, None),
    "untied": ({**BYTE_SHAPE, "tied": False}, id, None),
    "mostly head": ({**BYTE_SHAPE, "vocab_size": 20000}, id, None),
    "deep": ({**BYTE_SHAPE, "layers": 8, "heads": 4, "kv_heads": 4}, id, None),
    "bfloat16": (BYTE_SHAPE, id, torch.bfloat16),
    "checkpointing": (BYTE_SHAPE, checkpointing, None),
    "adapted": (BYTE_SHAPE, adapted, None),
    "frozen head": (BYTE_SHAPE, frozen_head, None),
}


@pytest.mark.parametrize("lengths", [[600], [100, 200, 300, 200], [40] * 10, [400, 3, 50, 60]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_predicted_peak_is_a_bound_and_not_twice_what_a_step_takes(name: str, lengths: list[int]) -> None:
    shape, change, dtype = MODELS[name]
    model = Decoder(**shape)
    change(model)
    c, rng = LocalTrainingClient(model, tokenizer=1, device="cpu", dtype=dtype), Random(0)
    data = [
        datum_from_tokens([rng.randrange(shape["vocab_size"]) for _ in range(n + 1)], prompt_length=1) for n in lengths
    ]
    forward = c._engine.logprobs(data)
    c._engine.budget.footprint(forward.inputs)
    with AllocationTracker(set()) as watch:
        predicted = backward(c, lossfns.cross_entropy(), data, forward).peak_memory
    assert watch.growing.peak <= predicted <= 2 * watch.growing.peak


def test_trees_are_planned_by_the_tokens_that_they_compute() -> None:
    """3 turns of 60 tokens with 4 answers each take less than half of the tokens of 12 sequences.

    The predicted peak is a bound here, too. A budget for these tokens holds the batch, and a smaller one does not.
    """
    rng, talk, rows = Random(0), list[int](), []
    for _ in range(3):
        talk += [rng.randrange(257) for _ in range(60)]
        rows += [[*talk, *(rng.randrange(257) for _ in range(n))] for n in (10, 15, 15, 20)]
    data = [datum_from_tokens(row, prompt_length=1) for row in rows]
    for name in ("small", "deep", "checkpointing"):
        shape, change, _ = MODELS[name]

        def make(limit: float | None = None, shape: Any = shape, change: Any = change) -> LocalTrainingClient:
            model = Decoder(**shape)
            change(model)
            return LocalTrainingClient(model, tokenizer=1, device="cpu", memory_budget=limit)

        c = make()
        forward = c._engine.logprobs(data)
        costs, shared = c._engine.budget.costs(forward.inputs), forward.inputs.shared
        assert len(shared.order) < shared.tokens_in_memory < sum(forward.inputs.lengths) / 2
        with AllocationTracker(set()) as watch:
            predicted = backward(c, lossfns.cross_entropy(), data, forward).peak_memory
        assert watch.growing.peak <= predicted <= 2 * watch.growing.peak, name
        limit = costs.step_bytes(shared.tokens_in_memory) / c._engine.budget.margin + 1
        counts = []
        for part in (1.0, 0.9):
            cut = make(part * limit)
            cut.forward_backward_custom(data, lossfns.cross_entropy()).result()
            counts.append(len(cut._engine.budget.plan(forward.inputs).micro_batches))
            pairs = zip(gradients(cut), gradients(c), strict=True)
            assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in pairs if a is not None and b is not None), name
        assert counts[0] == 1 and 2 <= counts[1] <= 3, (name, counts)


def many_targets(count: int, k: int) -> list[Any]:
    """Datums of 8 tokens, each with K targets."""
    rng = torch.Generator().manual_seed(0)
    return [
        Datum(
            ModelInput.from_ints([1 + i % 7] * 8),
            {
                "target_tokens": TensorData.from_torch(torch.randint(31, (8, k), generator=rng)),
                "weights": TensorData.from_torch(torch.rand(8, k, generator=rng)),
            },
        )
        for i in range(count)
    ]


def spread_out(data: list[Any], vectors: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return torch.stack(vectors).square().mean(), {}


def grouped(data: list[Any]) -> Any:
    old = [[-3.0] * d.model_input.length for d in data]
    return lossfns.grpo(kl_beta=0.1).bind(advantages=[1.0, -1.0] * (len(data) // 2), old_logprobs=old, ref_logprobs=old)


@pytest.mark.parametrize("what", ["a loss of many tokens", "many targets", "embeddings"])
def test_the_memory_of_a_loss_over_all_micro_batches_is_predicted(what: str) -> None:
    """The step itself takes little here."""
    data = many_targets(200, 300) if what == "many targets" else [text(Random(i), 9) for i in range(4000)]
    loss_fn = {"a loss of many tokens": grouped(data), "many targets": lossfns.multi_target_cross_entropy()}.get(
        what, spread_out
    )

    def step(c: LocalTrainingClient) -> tuple[int, int]:
        forward = c._engine.embeddings(data, mean_pool) if what == "embeddings" else c._engine.logprobs(data)
        value = backward(c, loss_fn, data, forward)
        return value.peak_memory, value.micro_batches

    whole, _ = step(client())
    c = client(memory_budget=whole)
    step(c)
    c._engine.gradients.clear()
    with AllocationTracker(set()) as watch:
        predicted, parts = step(c)
    assert parts > 1 and watch.growing.peak <= predicted <= whole * MARGIN


def test_the_bytes_that_are_asked_for_are_enough_with_checkpointing_and_many_targets() -> None:
    data, loss = many_targets(2, 50), lossfns.multi_target_cross_entropy()
    c = client(memory_budget=1000)
    c.model.checkpointing = True  # type: ignore[assignment]
    enough = client(memory_budget=asked_for(c, data, 0, loss))
    enough.model.checkpointing = True  # type: ignore[assignment]
    assert enough.forward_backward_custom(data, loss).result().metrics["micro_batches"] == 2


def test_freed_memory_is_handed_back_between_micro_batches_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.device] = []
    monkeypatch.setattr("lossfns.backend.engine.forward.trim_heap", calls.append)
    client().forward_backward_custom(DATA, lossfns.cross_entropy()).result()
    assert calls == []
    c = client(memory_budget=30_000)
    parts = c.forward_backward_custom(DATA, lossfns.cross_entropy()).result().metrics["micro_batches"]
    assert len(calls) == parts > 1


def like(n: int) -> ModelInputs:
    """The inputs of a call over one sequence of n tokens."""
    return ModelInputs([np.zeros(n, dtype=np.int64)], [np.zeros(n, dtype=np.int64)])


def test_the_measurement_leaves_no_trace() -> None:
    """Gradients and the random state, which a resumed training needs, are as before."""
    c = client()
    custom = c.forward_backward_custom(DATA, lossfns.cross_entropy()).result()
    before, random = gradients(c), torch.get_rng_state()
    c.model.register_forward_hook(lambda module, args, hidden: nn.functional.dropout(hidden, 0.5))
    c._engine.budget.footprints = {}
    c._engine.budget.footprint(like(7))
    assert len(c._engine.budget.footprints) == 1
    assert same(gradients(c), before) and torch.equal(torch.get_rng_state(), random)
    assert not any(p._post_accumulate_grad_hooks for p in c.model.parameters())  # type: ignore[attr-defined]
    assert custom.metrics["passes"] == 1


def test_a_model_that_fails_in_the_measurement_keeps_its_gradients() -> None:
    c = client()
    c.forward_backward_custom(DATA, lossfns.cross_entropy()).result()
    before = gradients(c)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no more")

    c.model.register_forward_pre_hook(fail)
    c._engine.budget.footprints = {}
    with pytest.raises(torch.OutOfMemoryError):
        c.forward_backward_custom(DATA, lossfns.cross_entropy()).result()
    assert same(gradients(c), before)
    assert not any(p._post_accumulate_grad_hooks for p in c.model.parameters())  # type: ignore[attr-defined]


class Positions(nn.Module):
    """A user's model, with a table of positions."""

    def __init__(self, positions: int, loops: int = 1) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(31, 8), nn.Embedding(positions, 8)
        self.inner, self.loops = nn.Linear(8, 8), loops

    @property
    def head(self) -> Tensor:
        return self.embed.weight

    def forward(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        x: Tensor = self.embed(tokens) + self.places(torch.cat([torch.arange(n) for n in lengths]))
        for _ in range(self.loops):
            x = x + self.inner(x).tanh()
        return x


def test_a_model_need_not_read_more_than_the_datums_have() -> None:
    longest = max(d.model_input.length for d in DATA)
    c = LocalTrainingClient(Positions(longest), tokenizer=1, device="cpu")
    assert c.forward_backward_custom(DATA, lossfns.cross_entropy()).result().metrics["micro_batches"] == 1


def test_models_that_do_not_say_what_they_are_are_measured_one_by_one() -> None:
    """Two models of the same class and parameters, one of which takes more memory."""
    once, often = (LocalTrainingClient(Positions(300, loops), tokenizer=1, device="cpu") for loops in (1, 20))
    assert often._engine.budget.footprint(like(100)).per_token > 3 * once._engine.budget.footprint(like(100)).per_token


def test_few_tokens_are_measured_as_they_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a limit and where they surely fit. More tokens than before are measured again, fewer are not.

    The peak that a request reports is a bound of what it takes, and not twice as much.
    """
    monkeypatch.setattr("lossfns.backend.engine.budget.footprint", lambda *_: pytest.fail("a step besides"))
    model = Decoder(**MODELS["deep"][0])
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    c, rng, measurements = LocalTrainingClient(model, tokenizer=1, device="cpu"), Random(0), []
    run = c._engine.budget.measured
    monkeypatch.setattr(c._engine.budget, "measured", lambda *given: measurements.append(1) or run(*given))
    for lengths, count in (([30, 40], 1), ([20], 1), ([60, 90], 2), ([60, 80], 2)):
        data = [datum_from_tokens([rng.randrange(257) for _ in range(n + 1)], prompt_length=1) for n in lengths]
        measured = backward(c, lossfns.cross_entropy(), data, c._engine.logprobs(data)).peak_memory
        assert len(measurements) == count, lengths
        c._engine.gradients.clear()
        with AllocationTracker(set()) as watch:
            later = backward(c, lossfns.cross_entropy(), data, c._engine.logprobs(data)).peak_memory
        c._engine.gradients.clear()
        assert measured == later and watch.growing.peak <= later <= 2 * watch.growing.peak, lengths
    assert len(passes) == 8
    monkeypatch.undo()
    c._engine.budget.footprint(like(500))  # what follows has too many tokens
    data = [datum_from_tokens([1] * 520, prompt_length=1)]
    assert backward(c, lossfns.cross_entropy(), data, c._engine.logprobs(data)).micro_batches == 1


def test_a_reference_runs_no_backward_pass() -> None:
    c = LocalReferenceClient(Decoder(**{**SHAPE, "hidden": 13}), device="cpu")  # a shape that was not measured before
    backward = []
    c.model.embed.weight.register_hook(lambda g: backward.append(g))
    c.forward(DATA, "cross_entropy").result()
    assert not backward


def test_with_a_budget_training_is_the_same_to_the_bit() -> None:
    """Without a budget, the free memory decides."""
    runs = []
    for _ in range(2):
        c = client(memory_budget=30_000)
        for _ in range(3):
            done = c.forward_backward_custom(DATA, lossfns.grpo(kl_beta=0).bind(**RL)).result()
            c.optim_step(AdamParams(learning_rate=1e-2)).result()
        assert done.metrics["micro_batches"] > 1
        runs.append([p.detach().clone() for p in c.model.parameters()])
    assert same(*runs)


RL = {"advantages": [1.0, -2.0, 0.5, 1.0], "old_logprobs": [[-3.4] * d.model_input.length for d in DATA]}


# Splitting

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=30)


def split(lengths: list[int], room: float, group: int) -> list[slice]:
    return into_micro_batches(len(lengths), lambda part: sum(lengths[part]), room, group)


@given(LENGTHS, st.one_of(st.integers(-5, 100), st.just(math.inf)))
def test_micro_batches_are_all_datums_in_order_as_many_as_there_is_room_for(lengths: list[int], room: float) -> None:
    parts = split(lengths, room, 1)
    assert [i for part in parts for i in range(len(lengths))[part]] == list(range(len(lengths)))
    sizes = [sum(lengths[part]) for part in parts]
    assert all(size <= room or part.stop - part.start == 1 for size, part in zip(sizes, parts))
    for part, after in pairwise(parts):
        assert sum(lengths[part]) + lengths[after.start] > room


@given(LENGTHS, st.integers(1, 100))
def test_pairs_stay_together_if_all_of_them_fit(lengths: list[int], room: int) -> None:
    pairs = [sum(lengths[i : i + 2]) for i in range(0, len(lengths), 2)]
    parts = split(lengths, room, 2)
    if max(pairs) > room:
        assert parts == split(lengths, room, 1)
    else:
        assert parts == [slice(2 * p.start, min(2 * p.stop, len(lengths))) for p in split(pairs, room, 1)]


# Budgets


def test_what_is_free_is_part_of_what_there_is() -> None:
    device = torch.device("cpu")
    assert 0 < available_bytes(device) < 2**60


@pytest.mark.parametrize(
    ("limit", "expected"), [("max", math.inf), ("1000000", 1_000_000 - 700_000 + 200_000), (None, math.inf)]
)
def test_a_container_has_what_its_limit_leaves(limit: str | None, expected: float, tmp_path: Path) -> None:
    """The cache of files that are not in use does not count as used."""
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text("700000\n")
        (tmp_path / "memory.stat").write_text("anon 500000\nfile 200000\ninactive_file 200000\nactive_file 0\n")
    assert cgroup_headroom(tmp_path) == expected


@pytest.mark.parametrize("budget", [0, -1, True, "1GB", math.nan, [1], 1j])
def test_a_budget_that_is_none_is_refused(budget: Any) -> None:
    with pytest.raises(LossInputError, match="memory_budget"):
        client(memory_budget=budget)


@pytest.mark.parametrize("budget", [10**9, 1e9, np.int64(10**9), np.float32(1e9), math.inf, None])
def test_any_number_is_a_budget(budget: Any) -> None:
    c = client(memory_budget=budget)
    assert c.forward_backward_custom(DATA, lossfns.cross_entropy()).result().metrics["micro_batches"] == 1


def asked_for(c: LocalTrainingClient, data: list[Any], datum: int, loss: Any = None) -> int:
    """The bytes that a refusal says are enough."""
    with pytest.raises(LossInputError, match="for this datum by itself") as error:
        c.forward_backward_custom(data, loss or lossfns.cross_entropy()).result()
    assert error.value.datum == datum and error.value.field == "memory_budget"
    return int(error.value.expected.split()[2].replace(",", ""))


@pytest.mark.parametrize("length", [1, 2, 7, 40, 100, 300])
def test_a_datum_that_does_not_fit_is_refused_with_the_bytes_that_are_enough(length: int) -> None:
    data = [text(Random(n), n + 1) for n in (length, 2 * length)]
    first = asked_for(client(memory_budget=1000), data, 0)
    enough = asked_for(client(memory_budget=first), data, 1)
    assert asked_for(client(memory_budget=enough - 5), data, 1) == enough > first
    metrics = client(memory_budget=enough).forward_backward_custom(data, lossfns.cross_entropy()).result().metrics
    assert metrics["micro_batches"] == 2 and metrics["peak_memory"] <= enough


def test_adding_a_gradient_to_another_has_to_fit_as_well() -> None:
    """From the second request on, the rounding errors of the sum are kept as well; they dominate for few tokens."""

    def step(c: LocalTrainingClient) -> int:
        return backward(c, lossfns.cross_entropy(), data, c._engine.logprobs(data)).peak_memory

    shape, data = {**SHAPE, "hidden": 40, "layers": 40}, [text(Random(0), 2)]
    c = LocalTrainingClient(Decoder(**shape), tokenizer=1, device="cpu", memory_budget=math.inf)
    weights = sum(p.nbytes for p in c.model.parameters())
    first = step(c)
    with AllocationTracker(set()) as watch:
        second = step(c)
    assert first < 2 * weights <= watch.growing.peak <= second
    third = step(c)
    assert third == first
    lean = LocalTrainingClient(Decoder(**shape), tokenizer=1, device="cpu", memory_budget=1.9 * weights / MARGIN)
    assert step(lean) == first
    before = gradients(lean)
    with pytest.raises(LossInputError, match=f"{(2 * weights + LOSS_BYTES_PER_VALUE) / MARGIN + 1:,.0f} bytes"):
        step(lean)
    assert same(gradients(lean), before)


@pytest.mark.parametrize("loss_fn", [lossfns.cross_entropy(), spread_out], ids=["streamed", "two_pass"])
def test_what_is_free_is_read_once_for_a_request(loss_fn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches and logits are thus planned with the same number."""
    reads = []
    monkeypatch.setattr("lossfns.backend.engine.budget.available_bytes", lambda device: reads.append(1) or 40_000)
    c = client()
    options = {} if loss_fn is not spread_out else {"output": "embedding"}
    assert c.forward_backward_custom(DATA, loss_fn, **options).result().metrics["micro_batches"] > 1
    assert reads == [1]
    c.forward(DATA, "cross_entropy").result()
    assert reads == [1, 1]


def test_requests_that_add_up_are_cut_alike() -> None:
    c = client(memory_budget=30_000)
    counts = [
        c.forward_backward_custom(DATA, lossfns.cross_entropy()).result().metrics["micro_batches"] for _ in range(3)
    ]
    assert len(set(counts)) == 1 and counts[0] > 1


# A process of its own

DEEP: dict[str, Any] = {"vocab_size": 300, "dim": 128, "layers": 12, "heads": 4, "kv_heads": 4, "hidden": 256}
SCRIPT = f"""
import sys
sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:3]]!r}
from test_memory import *
trained(float(sys.argv[1]), Path(sys.argv[2]), two_pass=coupled, streamed=lossfns.cross_entropy())
"""


def coupled(data: list[Any], logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """A loss over all pairs of sequences."""
    return torch.stack([lp.mean() for lp in logprobs_list]).logsumexp(0), {}


def in_use(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def trained(budget: float, folder: Path, **losses: Any) -> None:
    """Write, for each loss, its metrics, the rise of the memory in use until it was done, and the gradients."""
    torch.set_num_threads(1)
    rng = Random(0)
    rows = [[rng.randrange(300) for _ in range(rng.randint(60, 150))] for _ in range(20)]
    data = [datum_from_tokens(row, prompt_length=5) for row in rows]
    c = LocalTrainingClient(Decoder(**DEEP), tokenizer=1, device="cpu", memory_budget=budget)
    client().forward_backward(DATA, "cross_entropy").result()  # memory that is allocated once does not count
    before = in_use("VmRSS")
    for name, loss_fn in losses.items():
        metrics = c.forward_backward_custom(data, loss_fn).result().metrics
        rise = in_use("VmHWM") - before
        torch.save([metrics, rise, [p.grad for p in c.model.parameters()]], folder / name)
        c._engine.gradients.clear()


def test_a_batch_of_four_times_the_budget_trains_within_it(tmp_path: Path) -> None:
    """The memory of the whole process, as the system counts it."""
    trained(math.inf, tmp_path, whole=lossfns.cross_entropy())
    whole, _, gradient = torch.load(tmp_path / "whole")
    budget = whole["peak_memory"] / 4
    command = [sys.executable, "-c", SCRIPT, str(budget), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name, passes in (("two_pass", 2), ("streamed", 1)):
        metrics, rise, own = torch.load(tmp_path / name)
        assert metrics["micro_batches"] >= 4 and metrics["passes"] == passes
        assert metrics["peak_memory"] <= budget and rise <= budget
    assert metrics["loss:sum"] == pytest.approx(whole["loss:sum"], rel=1e-5)
    a, b = (torch.cat([x.flatten() for x in each]) for each in (own, gradient))
    assert (a - b).norm() <= 1e-5 * b.norm() > 0
