"""The calls of the unmodified SDK, over loopback."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from serving import batch, datum, sdk, tinker

from lossfns.server import local_service
from lossfns.server.wire import PROTOBUF, pb, read_pass

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
types = tinker.types
TOKENS = types.ModelInput.from_ints([1, 2, 3])


def adam(rate: float = 1e-2) -> object:
    return types.AdamParams(learning_rate=rate)


def test_every_training_call() -> None:
    with sdk() as service:
        client = service.create_lora_training_client("Tiny", rank=4, seed=1, user_metadata={"run": "a"}).result()
        info = client.get_info()
        assert (info.model_data.model_name, info.is_lora, info.lora_rank) == ("Tiny", True, 4)
        assert info.model_id == client.model_id and client.model_id.endswith(":train:0")
        data = batch()
        before = client.forward(data, "cross_entropy").result()
        assert [record["logprobs"].shape for record in before.loss_fn_outputs] == [[3], [5], [1]]
        summed = sum(
            -(d.loss_fn_inputs["weights"].to_numpy() * out["logprobs"].to_numpy()).sum()
            for d, out in zip(data, before.loss_fn_outputs)
        )
        assert before.metrics["loss:sum"] == pytest.approx(summed, rel=1e-6)
        passed = client.forward_backward(data, "cross_entropy").result()
        assert passed.metrics["loss:sum"] == pytest.approx(summed, rel=1e-6)
        assert all(key.count(":") == 1 for key in passed.metrics), passed.metrics
        step = client.optim_step(adam()).result()
        assert step.metrics["grad_norm"] > 0
        custom = client.forward_backward_custom(
            data, lambda _, logprobs: (-torch.cat(logprobs).mean(), {"seen": 1.0})
        ).result()
        assert custom.metrics["seen"] == 1.0 and custom.metrics["loss:sum"] > 0
        client.optim_step(adam()).result()
        state, weights = client.save_state("a").result().path, client.save_weights_for_sampler("a").result().path
        assert state == f"tinker://{client.model_id}/weights/a"
        assert weights == f"tinker://{client.model_id}/sampler_weights/a"
        now = client.forward(data, "cross_entropy").result().metrics["loss:sum"]
        assert now < summed

        def step_of(other: object) -> float:
            other.forward_backward(data, "cross_entropy").result()
            other.optim_step(adam()).result()
            return other.forward(data, "cross_entropy").result().metrics["loss:sum"]

        after = step_of(client)
        fresh = service.create_training_client_from_state(state).result()
        whole = service.create_training_client_from_state_with_optimizer(state).result()
        assert fresh.get_info().lora_rank == 4
        losses = [c.forward(data, "cross_entropy").result().metrics["loss:sum"] for c in (fresh, whole)]
        assert losses == [now, now]
        assert step_of(whole) == after != step_of(fresh)
        client.load_state_with_optimizer(state).result()
        assert step_of(client) == after
        client.load_state(weights).result()
        assert client.forward(data, "cross_entropy").result().metrics["loss:sum"] == now


def test_every_sampling_call() -> None:
    with sdk() as service:
        client = service.create_lora_training_client("Tiny", rank=4, seed=1).result()
        saved = client.save_weights_for_sampler("a").result().path
        base = service.create_sampling_client(base_model="Tiny").result()
        samplers = {
            "copy": client.save_weights_and_get_sampling_client().result(),
            "inflight": client.save_weights_and_get_sampling_client(kind="inflight").result(),
            "path": service.create_sampling_client(model_path=saved).result(),
            "of the client": client.create_sampling_client(saved).result(),
            "base": base,
        }
        greedy = types.SamplingParams(max_tokens=5, temperature=0.0)
        seeded = types.SamplingParams(max_tokens=5, seed=3, top_k=20, top_p=0.9)
        expected = base.sample(TOKENS, 1, greedy).result().sequences[0].tokens
        for name, sampler in samplers.items():
            response = sampler.sample(TOKENS, 2, greedy, include_prompt_logprobs=True).result()
            assert [s.tokens for s in response.sequences] == [expected] * 2, name
            assert len({s.sequence_id for s in response.sequences}) == 2, name
            logprobs = sampler.compute_logprobs(TOKENS).result()
            assert logprobs == response.prompt_logprobs and logprobs[0] is None and logprobs[1] < 0, name
            again = [sampler.sample(TOKENS, 1, seeded).result().sequences[0] for _ in range(2)]
            assert again[0].tokens == again[1].tokens and again[0].logprobs == again[1].logprobs, name
            assert again[0].sequence_id != again[1].sequence_id, name
        scored = base.compute_logprobs(types.ModelInput.from_ints([1, 2, 3, *expected])).result()
        sampled = base.sample(TOKENS, 1, greedy).result().sequences[0]
        assert np.allclose(scored[3:], sampled.logprobs, atol=1e-5)
        stop = types.SamplingParams(max_tokens=5, temperature=0.0, stop=[expected[1]])
        ended = base.sample(TOKENS, 1, stop).result().sequences[0]
        assert ended.stop_reason == "stop" and ended.tokens == expected[: expected.index(expected[1]) + 1]


def test_targets_of_several_k_sparse_and_dense() -> None:
    row = [1, 2, 3, 4]
    wide = torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0], [0, 0, 0, 0]])
    shares = torch.tensor([[0.5, 0.5, 0, 0], [1.0, 0, 0, 0], [0, 0, 0, 0]])
    sparse = datum(row, target_tokens=wide, weights=shares)
    dense = datum(row, target_tokens=wide.numpy(), weights=shares.numpy())
    assert sparse.loss_fn_inputs["weights"].sparse_crow_indices is not None, "the case is not sparse"
    narrow = datum(row, target_tokens=wide[:, :2].numpy(), weights=shares[:, :2].numpy())
    flat, column = datum(row, weights=[1.0, 1.0, 1.0]), datum(row, target_tokens=[[2], [3], [4]])
    with sdk() as service:
        client = service.create_lora_training_client("Tiny", rank=4, seed=1).result()

        def run(data: list[object]) -> tuple[list[np.ndarray], float]:
            result = client.forward_backward(data, "cross_entropy").result()
            return [out["logprobs"].to_numpy() for out in result.loss_fn_outputs], result.metrics["loss:sum"]

        mixed, total = run([sparse, flat, dense, narrow, column])
        assert [x.shape for x in mixed] == [(3, 4), (3,), (3, 4), (3, 2), (3, 1)]
        alone = [run([each]) for each in (sparse, flat, dense, narrow, column)]
        for got, (expected, _) in zip(mixed, alone):
            assert np.allclose(got, expected[0], atol=1e-6)
        assert total == pytest.approx(sum(loss for _, loss in alone), rel=1e-6)


def test_a_batch_without_a_weight_adds_zeros() -> None:
    with sdk() as service:
        client = service.create_lora_training_client("Tiny", rank=4, seed=1).result()
        data = [datum([1, 2, 3], weights=[0.0, 0.0])]
        result = client.forward_backward(data, "cross_entropy").result()
        assert result.metrics["loss:sum"] == 0.0
        assert client.optim_step(adam()).result().metrics["grad_norm"] == 0.0
        clipped = client.forward_backward_custom(data, lambda _, logprobs: (0 * logprobs[0].sum(), {})).result()
        assert clipped.metrics["loss:sum"] == 0.0


def test_what_clients_read_of_a_server() -> None:
    with sdk() as service, warnings.catch_warnings():
        rest = service.create_rest_client()
        assert [m.model_name for m in rest.get_server_capabilities().result().supported_models] == ["Tiny"]
        client = service.create_lora_training_client("Tiny", rank=4, seed=1, user_metadata={"run": "a"}).result()
        path = client.save_state("first", user_metadata={"step": "1"}).result().path
        sampler = client.save_weights_for_sampler("second").result().path
        run = rest.get_training_run(client.model_id).result()
        assert (run.base_model, run.lora_rank, run.user_metadata) == ("Tiny", 4, {"run": "a"})
        assert run.last_checkpoint.tinker_path == path and run.last_sampler_checkpoint.tinker_path == sampler
        assert [r.training_run_id for r in rest.list_training_runs().result().training_runs] == [client.model_id]
        found = rest.list_checkpoints(client.model_id).result().checkpoints
        assert {c.tinker_path for c in found} == {path, sampler}
        assert {c.tinker_path for c in rest.list_user_checkpoints().result().checkpoints} == {path, sampler}
        info = rest.get_weights_info_by_tinker_path(path).result()
        assert (info.base_model, info.lora_rank, info.train_mlp) == ("Tiny", 4, True)
        session = rest.get_session(client.model_id.split(":")[0]).result()
        assert session.training_run_ids == [client.model_id]
        rest.delete_checkpoint_from_tinker_path(sampler).result()
        assert [c.tinker_path for c in rest.list_checkpoints(client.model_id).result().checkpoints] == [path]


def test_an_uploaded_loss_runs_on_the_server() -> None:
    def loss(logprobs: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor) -> object:
        value = -(scale * weights * logprobs).sum()
        return value, {"custom/weight:sum": weights.sum(), "custom/scale:mean": scale + 0}

    data = [datum([1, 2, 3], weights=[1.0, 0.5], scale=np.float32([2.0])) for _ in range(2)]
    for each in data:
        each.loss_fn_inputs["scale"] = types.TensorData(data=[2.0], dtype="float32", shape=[])
    with sdk() as service:
        client = service.create_lora_training_client("Tiny", rank=4, seed=1).result()
        handle = service.create_custom_loss(loss, {"logprobs": 1, "weights": 1, "scale": 0}).result()
        assert handle.loss_id is not None
        result = client.forward_backward_custom(data, handle).result()
        plain = client.forward([datum([1, 2, 3], weights=[2.0, 1.0])] * 2, "cross_entropy").result()
        assert result.metrics["loss:sum"] == pytest.approx(plain.metrics["loss:sum"], rel=1e-6)
        assert result.metrics["custom/weight:sum"] == 3.0 and result.metrics["custom/scale:mean"] == 2.0


def test_the_same_client_without_a_socket() -> None:
    original = tinker.lib.internal_client_holder.AsyncTinker
    with local_service() as service:
        client = service.create_lora_training_client("Decoder", rank=2, seed=1).result()
        client.forward_backward(batch(), "cross_entropy").result()
        assert client.optim_step(adam()).result().metrics["grad_norm"] > 0
        with pytest.raises(tinker.RequestFailedError, match="stable_reinforce"):
            client.forward_backward(batch(), "stable_reinforce").result()
    assert tinker.lib.internal_client_holder.AsyncTinker is original


def test_logprobs_beside_those_of_the_samples() -> None:
    tokens, greedy = types.ModelInput.from_ints([1, 2, 3, 4]), types.SamplingParams(max_tokens=3, temperature=0.0)
    with sdk() as service:
        base = service.create_sampling_client(base_model="Tiny").result()
        named = torch.tensor([[2, -1], [-1, -1], [4, 9]])
        for targets in (types.TensorData.from_torch(named), types.TensorData.from_torch_sparse(named, pad_value=-1)):
            response = base.sample(
                tokens, 2, greedy, True, topk_prompt_logprobs=3, topk_sample_logprobs=2, target_prompt_logprobs=targets
            ).result()
            logprobs, found = response.prompt_logprobs, response.target_prompt_logprobs
            assert (found.sparse_crow_indices is None) == (targets.sparse_crow_indices is None)
            assert np.allclose(found.to_numpy()[[0, 2], 0], [logprobs[1], logprobs[3]], atol=1e-6)
            assert (found.to_numpy()[named.numpy() < 0] == 0).all()
        first, *others = response.topk_prompt_logprobs
        assert first is None and all(len(top) == 3 and top[0][1] >= top[1][1] for top in others)
        for sequence in response.sequences:  # greedy: the most probable token is the one that was drawn
            assert [top[0][0] for top in sequence.topk_logprobs] == sequence.tokens
            assert np.allclose([top[0][1] for top in sequence.topk_logprobs], sequence.logprobs, atol=1e-5)
        assert base.compute_logprobs(tokens, prompt_logprobs_last_n=2).result() == [None, None, *logprobs[2:]]
        end = types.SamplingParams(max_tokens=200, seed=1)
        never = types.SamplingParams(max_tokens=200, seed=1, stop=[])
        assert base.sample(tokens, 8, end).result().sequences[0].stop_reason in ("stop", "length")
        assert {s.stop_reason for s in base.sample(tokens, 8, never).result().sequences} == {"length"}
        with pytest.raises(tinker.RequestFailedError, match="prompt_alt_tokens_k"):
            base.sample(tokens, 1, greedy, prompt_alt_tokens_k=2).result()


def test_the_tokenizer_of_the_embedded_model_needs_no_hub() -> None:
    with sdk() as service:
        tokenizer = service.create_lora_training_client("Tiny", rank=4).result().get_tokenizer()
        text = "byte, \n Bytes: é 漢字 🙂 \x00\x7f"
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert (tokenizer.eos_token_id, len(tokenizer)) == (256, 257)
        assert tokenizer.decode(list(range(257)), skip_special_tokens=True) == bytes(range(256)).decode(
            errors="replace"
        )


def test_samples_that_are_requested_at_once_are_those_of_one_after_the_other() -> None:
    prompts = [types.ModelInput.from_ints([i, i + 1, i + 2]) for i in range(40)]
    greedy, other = (types.SamplingParams(max_tokens=n, temperature=0.0) for n in (6, 3))
    seeded = types.SamplingParams(max_tokens=6, seed=7)
    with sdk() as service:
        base = service.create_sampling_client(base_model="Tiny").result()

        def run(prompt: Any, i: int) -> Any:
            return base.sample(prompt, 1 + i % 2, (greedy, other, seeded)[i % 3])

        alone = [run(prompt, i).result() for i, prompt in enumerate(prompts)]
        futures = [run(prompt, i) for i, prompt in enumerate(prompts)]
        bad = base.sample(types.ModelInput.from_ints([5000]), 1, greedy)
        for i, future in enumerate(futures):
            got = [sequence.tokens for sequence in future.result().sequences]
            assert got == [sequence.tokens for sequence in alone[i].sequences], i
        with pytest.raises(tinker.RequestFailedError, match="prompt"):
            bad.result()


def test_a_pass_to_the_endpoint_of_forward_has_no_gradient() -> None:
    """The SDK sends protobuf to the other endpoint alone, where the message says which pass it is."""
    for only, forward_only, expected in ((False, False, False), (True, False, True), (False, True, True)):
        message = pb.ForwardBackwardRequest(model_id="m", seq_id=1, forward_only=only, loss_fn="cross_entropy")
        body = message.SerializeToString()
        assert read_pass(body, PROTOBUF, forward_only=forward_only).forward_only is expected
