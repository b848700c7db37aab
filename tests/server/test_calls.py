"""The calls of the unmodified SDK, over loopback."""

from __future__ import annotations

from server import served, tinker


def test_a_model_is_trained_saved_loaded_and_sampled() -> None:
    with served() as url, tinker.ServiceClient(base_url=url, api_key="tml-local") as service:
        client = service.create_lora_training_client("Decoder", rank=4, seed=1).result()
        types = tinker.types
        tokens = types.ModelInput.from_ints([1, 2, 3])
        data = [types.Datum(tokens, {"target_tokens": [2, 3, 4], "weights": [1.0, 0.5, 2.0]})]
        before = client.forward_backward(data, "cross_entropy").result()
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        path = client.save_state("first").result().path
        after = client.forward(data, "cross_entropy").result()
        assert after.metrics["loss:sum"] < before.metrics["loss:sum"]
        again = service.create_training_client_from_state_with_optimizer(path).result()
        assert again.forward(data, "cross_entropy").result().metrics["loss:sum"] == after.metrics["loss:sum"]
        sampler = client.save_weights_and_get_sampling_client().result()
        sampled = sampler.sample(tokens, 2, types.SamplingParams(max_tokens=4)).result()
        assert [len(sequence.tokens) for sequence in sampled.sequences] == [4, 4]
