"""The local client: what a request computes, accumulates, refuses and saves."""

import asyncio
import gc
import math
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from batches import sdks
from tiny import BYTE_SHAPE, assert_same_gradients, byte_client, byte_texts, take_gradients
from torch import Tensor

import lossfns
from lossfns import LossInputError, TensorData, export
from lossfns.backend import AdamParams, Decoder, LocalTrainingClient, SamplingParams
from lossfns.backend.model.tokenizer import ByteTokenizer
from lossfns.backend.storage import checkpoint


def policy_columns(data: list[Any]) -> dict[str, Any]:
    rng = Random(5)
    old = [[-5.5 + rng.gauss(0, 0.3) for _ in d.loss_fn_inputs["weights"].data] for d in data]
    return {"advantages": [rng.gauss(0, 1) for _ in data], "old_logprobs": old, "ref_logprobs": old}


def test_custom_cross_entropy_has_the_built_ins_gradient_and_value() -> None:
    for sdk in sdks():
        c, data = byte_client(), byte_texts(sdk)
        builtin = c.forward_backward(data, "cross_entropy").result()
        expected = take_gradients(c)
        custom = c.forward_backward_custom(data, lossfns.cross_entropy(weigh=lossfns.token_sum)).result()
        assert_same_gradients(expected, take_gradients(c))
        assert custom.metrics["loss:sum"] == pytest.approx(builtin.metrics["loss:sum"], rel=1e-6)


METHODS = [
    lossfns.cross_entropy(),
    lossfns.importance_sampling(),
    lossfns.grpo(),
    lossfns.dapo(),
    lossfns.gspo(),
    lossfns.gspo_token(),
    lossfns.dpo(),
    lossfns.orpo(),
]


@pytest.mark.parametrize("loss", METHODS, ids=lambda loss: loss.name)
def test_one_pass_has_the_gradient_of_autograd_through_the_whole(loss: lossfns.Loss) -> None:
    """The gradient is cut at the logprobs and continued; autograd has one graph from weights to loss."""
    c, data = byte_client(), byte_texts()
    columns = policy_columns(data)
    bound = loss.bind(**{name: columns[name] for name in loss.reads})
    result = c.forward_backward_custom(data, bound).result()
    cut = take_gradients(c)
    forward = c._engine.logprobs(data)
    outputs = forward.outputs(forward.compute(forward.inputs, lambda tokens: 0.0))
    logprobs = torch.split(outputs.values, outputs.lengths)
    value, metrics = bound(data, list(logprobs))
    value.backward()
    assert_same_gradients(cut, take_gradients(c))
    assert result.metrics["loss:sum"] == pytest.approx(value.item())
    assert {name: result.metrics[name] for name in metrics} == pytest.approx(metrics)


@pytest.mark.parametrize("loss", METHODS, ids=lambda loss: loss.name)
def test_one_pass_has_the_gradient_of_the_two_pass_protocol(loss: lossfns.Loss) -> None:
    """The protocol: forward, gradient on the logprobs, then built-in cross-entropy with weights −gradient."""
    c, data = byte_client(), byte_texts()
    columns = policy_columns(data)
    bound = loss.bind(**{name: columns[name] for name in loss.reads})
    c.forward_backward_custom(data, bound).result()
    once = take_gradients(c)
    forward = c.forward(data, "cross_entropy").result()
    leaves = [o["logprobs"].to_torch().clone().requires_grad_() for o in forward.loss_fn_outputs]
    bound(data, leaves)[0].backward()
    surrogate = [
        lossfns.Datum(
            d.model_input,
            {"target_tokens": d.loss_fn_inputs["target_tokens"], "weights": TensorData.from_torch(-leaf.grad)},
        )
        for d, leaf in zip(data, leaves)
    ]
    c.forward_backward(surrogate, "cross_entropy").result()
    assert_same_gradients(once, take_gradients(c))


def test_multi_target_is_cross_entropy_over_the_candidates() -> None:
    """K copies of the target with weights that sum to one are the single target."""
    c, data = byte_client(), byte_texts()
    c.forward_backward(data, "cross_entropy").result()
    single = take_gradients(c)
    multi = []
    for d in data:
        ids, weights = (d.loss_fn_inputs[name].to_numpy() for name in ("target_tokens", "weights"))
        two = np.stack([ids, ids], 1)
        shares = np.stack([0.25 * weights, 0.75 * weights], 1)
        fields = {"target_tokens": TensorData(two, "int64", two.shape), "weights": TensorData.from_numpy(shares)}
        multi.append(lossfns.Datum(d.model_input, fields))
    result = c.forward_backward(multi, "cross_entropy").result()
    assert_same_gradients(single, take_gradients(c))
    assert result.loss_fn_outputs[0]["logprobs"].shape == [len(data[0].loss_fn_inputs["weights"].data), 2]
    c.forward_backward_custom(multi, lossfns.multi_target_cross_entropy(weigh=lossfns.token_sum)).result()
    assert_same_gradients(single, take_gradients(c))


@pytest.mark.parametrize(
    "loss", [lossfns.ppo(log_ratio_cap=None), lossfns.importance_sampling(log_ratio_cap=None)], ids=str
)
def test_a_folded_loss_through_the_built_in_has_the_custom_gradient(loss: lossfns.Loss) -> None:
    c, data = byte_client(), byte_texts()
    columns = policy_columns(data)
    bound = loss.bind(**{name: columns[name] for name in loss.reads})
    c.forward_backward_custom(data, bound).result()
    custom = take_gradients(c)
    folded = export.fold(bound, data)
    c.forward_backward(folded.data, folded.loss_fn, folded.loss_fn_config).result()
    assert_same_gradients(custom, take_gradients(c), 2e-6)


def test_gradients_add_up_until_the_step() -> None:
    """In float64, since float32 products of other sizes round in ways that depend on the processor."""
    c, data = byte_client(dtype=torch.float64), byte_texts()
    c.forward_backward(data, "cross_entropy").result()
    whole = take_gradients(c)
    for datum in data:
        c.forward_backward([datum], "cross_entropy").result()
    assert_same_gradients(whole, take_gradients(c), 1e-12)


def test_forward_changes_no_gradient_and_agrees_with_forward_backward() -> None:
    c, data = byte_client(), byte_texts()
    forward = c.forward(data, "cross_entropy").result()
    assert all(p.grad is None for p in c.model.parameters())
    both = c.forward_backward(data, "cross_entropy").result()
    for a, b in zip(forward.loss_fn_outputs, both.loss_fn_outputs):
        assert a["logprobs"].data == b["logprobs"].data
    weighed = [np.dot(o["logprobs"].data, d.loss_fn_inputs["weights"].data) for o, d in zip(both.loss_fn_outputs, data)]
    assert both.metrics["loss:sum"] == pytest.approx(-sum(weighed), rel=1e-6)


def test_missing_weights_are_ones_for_a_built_in() -> None:
    c, data = byte_client(), byte_texts()
    for d in data:
        n = len(d.loss_fn_inputs.pop("weights").data)
        assert n
    result = c.forward_backward(data, "cross_entropy").result()
    assert result.metrics["loss:sum"] == pytest.approx(-sum(sum(o["logprobs"].data) for o in result.loss_fn_outputs))


def test_the_step_is_adamw() -> None:
    """Three steps agree with torch's own optimizer, with decay and clipping."""
    c, d, data = byte_client(), byte_client(), byte_texts()
    adam = AdamParams(learning_rate=1e-2, beta1=0.8, beta2=0.9, eps=1e-7, weight_decay=0.1, grad_clip_norm=0.5)
    reference = torch.optim.AdamW(d.model.parameters(), lr=1e-2, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.1)
    for _ in range(3):
        c.forward_backward(data, "cross_entropy")
        response = c.optim_step(adam).result()
        d.forward_backward(data, "cross_entropy").result()
        norm = torch.nn.utils.clip_grad_norm_(d.model.parameters(), 0.5)
        reference.step()
        reference.zero_grad()
        assert response.metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    for a, b in zip(c.model.parameters(), d.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert c.get_info().steps == 3


def test_sdk_adam_params_are_accepted() -> None:
    for sdk in sdks():
        c = byte_client()
        params = AdamParams(learning_rate=1e-3) if sdk is lossfns else sdk.AdamParams(learning_rate=1e-3)
        c.forward_backward(byte_texts(sdk), "cross_entropy")
        before = [p.detach().clone() for p in c.model.parameters()]
        c.optim_step(params).result()
        assert any((a != b).any() for a, b in zip(before, c.model.parameters()))


def test_a_documents_style_loss_gets_ordinary_tensors() -> None:
    def loss_fn(data: list[Any], logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        assert all(type(lp) is Tensor and lp.requires_grad and lp.dtype == torch.float32 for lp in logprobs_list)
        total = torch.tensor(0.0)
        for d, lp in zip(data, logprobs_list):
            total = total - torch.dot(lp, torch.tensor(d.loss_fn_inputs["weights"].data))
        return total, {"mine": 1.5}

    c, data = byte_client(), byte_texts()
    result = c.forward_backward_custom(data, loss_fn).result()
    custom = take_gradients(c)
    c.forward_backward(data, "cross_entropy").result()
    assert_same_gradients(custom, take_gradients(c))
    assert result.metrics["mine"] == 1.5
    assert result.metrics["surrogate_loss:sum"] == pytest.approx(result.metrics["loss:sum"], rel=1e-5)


BAD_LOSSES: list[tuple[Callable[[Any, list[Tensor]], Any], str]] = [
    (lambda data, lps: lps[0].sum(), r"expected \(loss, metrics\), got a Tensor"),
    (lambda data, lps: (lps[0].sum(), {}, 0), "a tuple of 3"),
    (lambda data, lps: (1.0, {}), "got a float"),
    (lambda data, lps: (torch.cat(lps), {}), "Reduce it"),
    (lambda data, lps: (lps[0].detach().sum(), {}), "constant without grad_fn"),
    (lambda data, lps: (torch.cat(lps).sum() * math.nan, {}), "got nan"),
    (lambda data, lps: (torch.cat(lps).sum(), None), "a dict of floats"),
    (lossfns.bradley_terry(), "a loss of logprobs, got bradley_terry.*, a loss of scores"),
    (lambda data, lps: (lps[0].sum() + lps[2].sum(), {}), r"datum\[1\].logprobs: .*No gradient computed"),
]


@pytest.mark.parametrize(("loss_fn", "message"), BAD_LOSSES, ids=[message for _, message in BAD_LOSSES])
def test_a_custom_loss_that_breaks_the_contract_is_refused_before_any_gradient(loss_fn: Any, message: str) -> None:
    c, data = byte_client(), byte_texts()
    with pytest.raises(LossInputError, match=message):
        c.forward_backward_custom(data, loss_fn).result()
    assert all(p.grad is None for p in c.model.parameters())
    c.forward_backward(data, "cross_entropy").result()


def datum(ids: list[int], targets: Any) -> lossfns.Datum:
    return lossfns.Datum(lossfns.ModelInput.from_ints(ids), {"target_tokens": TensorData(targets, "int64")})


@pytest.mark.parametrize(
    ("data", "loss_fn", "config", "message"),
    [
        ([], "cross_entropy", None, "No data provided"),
        (
            [lossfns.Datum(lossfns.ModelInput.from_ints([1]))],
            "cross_entropy",
            None,
            "missing required field 'target_tokens'",
        ),
        ([datum([1, 2], [2])], "cross_entropy", None, r"datum\[0\].target_tokens: expected 2 rows .*got 1"),
        ([datum([1], [2]), datum([1, 300], [2, 3])], "cross_entropy", None, r"datum\[1\].model_input: .*\[0, 257\)"),
        ([datum([1, 2], [2, 257])], "cross_entropy", None, "target_tokens: expected integers in .* 2 to 257"),
        ([datum([1, 2], [2, -1])], "cross_entropy", None, "-1 to 2"),
        ([datum([], [])], "cross_entropy", None, "at least one token"),
        ([datum([1], [2])], "crossentropy", None, "Did you mean 'cross_entropy'"),
        (
            [datum([1], [2])],
            "cross_entropy",
            {"beta": 1},
            "loss_fn_config: expected nothing for cross_entropy, got 'beta'",
        ),
        ([datum([1], [2])], "ppo", {"clip": 0.2}, "clip_low_threshold"),
        ([datum([1], [2])], "ppo", None, "advantages"),
        (
            [datum([1, 2], [1, 2]), datum([1], [2])],
            "ppo",
            {"clip_low_threshold": 0.2, "clip_high_threshold": 0.28},
            "epsilons",
        ),
    ],
    ids=str,
)
def test_a_bad_request_is_refused_by_name(data: Any, loss_fn: str, config: Any, message: str) -> None:
    c = byte_client()
    with pytest.raises(LossInputError, match=message):
        c.forward_backward(data, loss_fn, config).result()
    assert all(p.grad is None for p in c.model.parameters())


def test_a_key_that_the_built_in_does_not_read_is_refused() -> None:
    data = byte_texts()
    data[1].loss_fn_inputs["mask"] = data[1].loss_fn_inputs["weights"]
    with pytest.raises(LossInputError, match=r"datum\[1\].loss_fn_inputs: .*'mask'"):
        byte_client().forward_backward(data, "cross_entropy").result()


def test_a_step_without_a_gradient_is_refused() -> None:
    with pytest.raises(LossInputError, match="Call forward_backward first"):
        byte_client().optim_step(AdamParams()).result()


def test_an_error_that_nobody_read_is_raised_by_the_next_call() -> None:
    c = byte_client()
    failed = c.forward_backward([datum([1, 2], [2])], "cross_entropy")
    failed.future().exception()
    with pytest.raises(LossInputError, match="expected 2 rows"):
        c.forward(byte_texts(), "cross_entropy")
    assert c.forward(byte_texts(), "cross_entropy").result().metrics


def test_futures_can_be_read_often_awaited_and_out_of_order() -> None:
    c, data = byte_client(), byte_texts()
    first, step = c.forward_backward(data, "cross_entropy"), c.optim_step(AdamParams())

    async def awaited() -> Any:
        return await step, await first, await first.result_async(10)

    response, a, b = asyncio.run(awaited())
    assert a is b is first.result(timeout=10) and response is step.result()


def test_a_saved_state_resumes_bit_for_bit(tmp_path: Path) -> None:
    data, adam = byte_texts(), AdamParams(learning_rate=1e-2)

    def train(c: LocalTrainingClient, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(c.forward_backward(data, "cross_entropy").result().metrics["loss:sum"])
            c.optim_step(adam).result()
        return losses

    whole = train(byte_client(), 6)
    c = byte_client()
    first = train(c, 3)
    path = c.save_state(tmp_path / "state.npz").result().path
    resumed = byte_client(seed=9)
    resumed.load_state_with_optimizer(path).result()
    assert first + train(resumed, 3) == whole
    fresh = byte_client(seed=9)
    fresh.load_state(path).result()
    rest = train(fresh, 3)
    assert rest[0] == whole[3] and rest != whole[3:]


def test_accumulated_gradients_are_not_dropped_by_a_save(tmp_path: Path) -> None:
    c = byte_client()
    c.forward_backward(byte_texts(), "cross_entropy")
    with pytest.raises(LossInputError, match="optim_step first"):
        c.save_state(tmp_path / "state.npz").result()


def test_sampling_is_from_a_snapshot_and_reports_its_logprobs() -> None:
    c = byte_client()
    sampler = c.save_weights_and_get_sampling_client()
    prompt = lossfns.ModelInput.from_ints([72, 105])
    params = SamplingParams(max_tokens=6, seed=1)
    before = sampler.sample(prompt, 3, params).result()
    assert len(before.sequences) == 3
    c.forward_backward(byte_texts(), "cross_entropy")
    c.optim_step(AdamParams(learning_rate=0.1)).result()
    assert sampler.sample(prompt, 3, params).result() == before
    for sequence in before.sequences:
        known = sampler.compute_logprobs(lossfns.ModelInput.from_ints([72, 105, *sequence.tokens])).result()
        assert known[0] is None
        assert known[2:] == pytest.approx(sequence.logprobs, abs=1e-4)


def test_stops_end_a_sample_where_they_end() -> None:
    """The same greedy text is sampled again, with two of its own bytes, or one, as the stop."""
    sampler = byte_client().save_weights_and_get_sampling_client()
    prompt = lossfns.ModelInput.from_ints([72, 105])
    free = sampler.sample(prompt, 1, SamplingParams(max_tokens=8, temperature=0)).result().sequences[0]
    one = (
        sampler.sample(prompt, 1, SamplingParams(max_tokens=8, temperature=0, stop=[free.tokens[2]]))
        .result()
        .sequences[0]
    )
    end = free.tokens.index(free.tokens[2]) + 1
    assert one.tokens == free.tokens[:end] and one.stop_reason == "stop"
    two = free.tokens[3:5]
    text = sampler.get_tokenizer().decode(two)
    assert len(text) == 2 and "\ufffd" not in text
    both = sampler.sample(prompt, 1, SamplingParams(max_tokens=8, temperature=0, stop=[text])).result().sequences[0]
    end = next(n for n in range(2, 9) if free.tokens[n - 2 : n] == two)
    assert (both.tokens, both.stop_reason) == (free.tokens[:end], "stop")
    assert both.logprobs == pytest.approx(free.logprobs[:end])


def test_a_checkpoint_of_another_shape_leaves_the_client_as_it_was(tmp_path: Path) -> None:
    other = LocalTrainingClient(Decoder(**BYTE_SHAPE | {"hidden": 32}), tokenizer=ByteTokenizer(), device="cpu")
    path = other.save_state(tmp_path / "other.npz").result().path
    c = byte_client()
    before = [p.detach().clone() for p in c.model.parameters()]
    with pytest.raises(LossInputError, match="a checkpoint of this model"):
        c.load_state(path).result()
    assert all(torch.equal(a, b) for a, b in zip(before, c.model.parameters()))


def test_a_load_clears_gradients_and_takes_a_model_with_frozen_parts(tmp_path: Path) -> None:
    c, data = byte_client(), byte_texts()
    c.model.norm.weight.requires_grad_(False)
    c.forward_backward(data, "cross_entropy")
    c.optim_step(AdamParams()).result()
    path = c.save_state(tmp_path / "x.safetensors").result().path
    c.forward_backward(data, "cross_entropy").result()
    c.load_state_with_optimizer(path).result()
    assert all(p.grad is None for p in c.model.parameters()) and c.get_info().steps == 1


@pytest.mark.parametrize(
    "change", [{"learning_rate": -1.0}, {"learning_rate": math.nan}, {"beta1": 1.0}, {"eps": -1.0}]
)
def test_a_step_with_numbers_out_of_range_is_refused(change: dict[str, float]) -> None:
    c = byte_client()
    c.forward_backward(byte_texts(), "cross_entropy").result()
    with pytest.raises(LossInputError, match=next(iter(change))):
        c.optim_step(AdamParams(**change)).result()
    with pytest.raises(LossInputError, match="adam_params"):
        c.optim_step(None).result()
    assert c.optim_step(AdamParams()).result().metrics["grad_norm"] > 0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda c: c.forward_backward(byte_texts()[0], "cross_entropy"), "a list of datums"),
        (lambda c: c.forward_backward(["x"], "cross_entropy"), "a Datum"),
        (lambda c: c.forward_backward(byte_texts(), lossfns.cross_entropy()), "the name of a built-in"),
        (lambda c: c.forward_backward_custom(byte_texts(), "cross_entropy"), "a function"),
    ],
)
def test_a_confused_call_is_refused_in_words(request_: Any, message: str) -> None:
    with pytest.raises(LossInputError, match=message):
        request_(byte_client()).result()


@pytest.mark.parametrize(
    ("prompt", "count", "params", "message"),
    [
        ([72], 1, {}, "a ModelInput"),
        (lossfns.ModelInput.from_ints([999]), 1, {}, r"integers in \[0, 257\)"),
        (lossfns.ModelInput.empty(), 1, {}, "no token"),
        (lossfns.ModelInput.from_ints([72]), 0, {}, "num_samples"),
        (lossfns.ModelInput.from_ints([72]), 1, {"max_tokens": 0}, "max_tokens"),
        (lossfns.ModelInput.from_ints([72]), 1, {"temperature": -1.0}, "temperature"),
    ],
)
def test_a_sample_that_cannot_be_drawn_is_refused(prompt: Any, count: int, params: Any, message: str) -> None:
    sampler = byte_client().save_weights_and_get_sampling_client()
    with pytest.raises(LossInputError, match=message):
        sampler.sample(prompt, count, SamplingParams(**params)).result()


# The client after a failure


def test_results_come_in_the_datums_own_class() -> None:
    """They can thus go straight into another datum, for example as the old policy's logprobs."""
    for sdk in sdks():
        data = byte_texts(sdk)
        forward = byte_client().forward(data, "cross_entropy").result()
        logprobs = forward.loss_fn_outputs[0]["logprobs"]
        again = sdk.Datum(data[0].model_input, {**data[0].loss_fn_inputs, "logprobs": logprobs})
        assert again.loss_fn_inputs["logprobs"].data == logprobs.data


def test_a_failed_request_holds_no_graph_and_its_error_travels() -> None:
    c, leaves = byte_client(), []

    def fails(data: Any, logprobs_list: list[Tensor]) -> Any:
        leaves.append(weakref.ref(logprobs_list[0]))
        raise KeyError("mine")

    gc.disable()
    try:
        with pytest.raises(KeyError) as caught:
            c.forward_backward_custom(byte_texts(), fails).result()
        assert leaves[0]() is None
    finally:
        gc.enable()
    assert pickle.loads(pickle.dumps(caught.value)).args == ("mine",)


def test_a_step_that_fails_leaves_the_gradient_as_it_was() -> None:
    """The gradient is also restored after division and clipping, since a retry would repeat both."""
    c = byte_client()
    c.forward_backward(byte_texts(), "cross_entropy").result()
    before, step = [p.grad.clone() for p in c.model.parameters() if p.grad is not None], c._engine.optimizer.step

    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("no room for the moments")

    c._engine.optimizer.step = out_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        c.optim_step(AdamParams(grad_clip_norm=0.1), "num_loss_tokens").result()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, c.model.parameters()))
    c._engine.optimizer.step = step
    assert c.optim_step(AdamParams(), "num_loss_tokens").result().metrics["grad_norm"] > 0


@pytest.mark.parametrize(
    ("dtype", "eps"), [(torch.float32, 0.0), (torch.float16, 1e-12), (torch.float32, 1e-50)], ids=str
)
def test_an_epsilon_that_is_zero_would_make_nan_of_weights_without_gradient(dtype: torch.dtype, eps: float) -> None:
    c = LocalTrainingClient(Decoder(**BYTE_SHAPE), device="cpu", dtype=dtype)
    c.forward_backward(byte_texts(), "cross_entropy").result()
    with pytest.raises(LossInputError, match="eps: expected a number above 0"):
        c.optim_step(AdamParams(eps=eps)).result()
    c.optim_step(AdamParams(eps=1e-4)).result()
    assert all(p.isfinite().all() for p in c.model.parameters())


def test_gradients_cleared_by_hand_are_not_counted() -> None:
    c, data = byte_client(), byte_texts()
    c.forward_backward(data, "cross_entropy").result()
    c.model.zero_grad()
    c.forward_backward(data[:1], "cross_entropy").result()
    assert int(c._engine.gradients.accumulated.sequences) == 1


def test_a_state_without_all_its_moments_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    c, data = byte_client(), byte_texts()
    c.forward_backward(data, "cross_entropy")
    c.optim_step(AdamParams()).result()
    path = c.save_state(tmp_path / "whole").result().path
    tensors, meta = checkpoint.load(path)
    less = {name: x for name, x in tensors.items() if name != "optimizer/exp_avg/norm.weight"}
    for kept, told in ((less, meta), (tensors, meta | {"steps": "many"}), (tensors, meta | {"stepped": []})):
        checkpoint.save(tmp_path / "part", kept, told)
        other = byte_client(seed=5)
        before = [p.detach().clone() for p in other.model.parameters()]
        with pytest.raises(LossInputError, match="a whole state of training"):
            other.load_state_with_optimizer(tmp_path / "part").result()
        assert all(torch.equal(a, b) for a, b in zip(before, other.model.parameters()))


def test_a_model_of_which_nothing_is_trained_is_refused() -> None:
    c = byte_client()
    c.model.requires_grad_(False)
    with pytest.raises(LossInputError, match="outputs that parameters can move"):
        c.forward_backward(byte_texts(), "cross_entropy").result()


class Headless(torch.nn.Linear):
    """A model with hidden states but without a head."""


def without_weights() -> torch.nn.Module:
    model = Decoder(**BYTE_SHAPE)
    return model.to("meta")


@pytest.mark.parametrize(
    ("model", "got"),
    [
        ("gpt2", "a str"),
        (Decoder, "the class Decoder"),
        (Headless(2, 2), "a Headless without head"),
        (without_weights(), "a Decoder whose weights are not there"),
    ],
    ids=["name", "class", "no head", "no weights"],
)
def test_what_is_no_model_is_refused(model: Any, got: str) -> None:
    with pytest.raises(LossInputError, match=f"model: expected a module .*, got {got}"):
        LocalTrainingClient(model, device="cpu")


def test_a_fork_is_told_that_it_has_not_got_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    c = byte_client()
    monkeypatch.setattr("lossfns.backend.futures.os.getpid", lambda: -1)
    with pytest.raises(LossInputError, match="a client in each process"):
        c.forward(byte_texts(), "cross_entropy")


def test_failures_of_other_requests_than_gradients_do_not_hold_up_a_step() -> None:
    c, bad = byte_client(), [datum([1, 2], [2])]
    gate = threading.Event()

    def waits(data: Any, logprobs_list: list[Tensor]) -> Any:
        gate.wait(60)
        return sum(lp.sum() for lp in logprobs_list), {}

    first = c.forward_backward_custom(byte_texts(), waits)
    step, empty = c.optim_step(AdamParams()), c.optim_step(AdamParams())
    forward = c.forward(bad, "cross_entropy")
    second, last = c.forward_backward(byte_texts(), "cross_entropy"), c.optim_step(AdamParams())
    gate.set()
    assert first.result() and step.result() and second.result() and last.result()
    for failed, words in ((empty, "none since the last step"), (forward, "expected 2 rows")):
        with pytest.raises(LossInputError, match=words):
            failed.result()
    assert c.get_info().steps == 2
