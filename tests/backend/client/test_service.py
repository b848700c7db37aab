"""The service client: clients of base models and of checkpoints, and its refusals."""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DATA, SHAPE, logprobs, train
from torch import Tensor, nn

from lossfns import LossInputError, ModelInput
from lossfns.backend import (
    Decoder,
    LocalReferenceClient,
    LocalSamplingClient,
    LocalServiceClient,
    LocalTrainingClient,
    SamplingParams,
)
from lossfns.backend.model.tokenizer import ByteTokenizer
from lossfns.backend.storage import checkpoint

TOKENIZER = ByteTokenizer()


def tiny() -> tuple[nn.Module, Any]:
    return Decoder(**SHAPE), TOKENIZER


def service(**options: Any) -> LocalServiceClient:
    return LocalServiceClient({"tiny": tiny, "other": lambda: Decoder(**SHAPE | {"dim": 16})}, device="cpu", **options)


def weights(c: LocalReferenceClient) -> list[Tensor]:
    return [p.detach().clone() for p in c.model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def saved(c: LocalTrainingClient, path: Path, **options: Any) -> str:
    return c.save_state(path, **options).result().path


# Base models


def test_a_training_client_trains_all_parameters() -> None:
    c = service().create_training_client("tiny")
    before = weights(c)
    first, *_, last = train(c)
    assert last < first
    assert not any(map(torch.equal, before, weights(c)))
    info = c.get_info()
    assert (info.model_name, info.model_data.model_name, info.is_lora) == ("tiny", "tiny", False)
    assert c.get_tokenizer() is TOKENIZER


def test_clients_start_alike_and_none_moves_another() -> None:
    s = service()
    policy, other = s.create_training_client("tiny"), s.create_training_client("tiny")
    reference = s.create_reference_client("tiny")
    sampler = s.create_sampling_client(base_model="tiny")
    before, prompt = logprobs(reference), ModelInput.from_ints([1, 2, 3])
    sampled = sampler.compute_logprobs(prompt).result()
    assert same(logprobs(policy), before) and same(logprobs(other), before)
    train(policy)
    assert same(logprobs(reference), before) and same(logprobs(other), before)
    assert same(logprobs(s.create_training_client("tiny")), before)
    assert sampler.compute_logprobs(prompt).result() == sampled
    assert not same(logprobs(policy), before)


def test_a_model_that_the_caller_keeps_is_not_the_services() -> None:
    """The function returns one module each time, which its owner changes afterwards."""
    own = Decoder(**SHAPE)
    s = LocalServiceClient({"own": lambda: own}, device="cpu")
    before = logprobs(s.create_reference_client("own"))
    with torch.no_grad():
        own.embed.weight.zero_()
    assert same(logprobs(s.create_training_client("own")), before)


def test_a_base_model_is_built_once_and_when_it_is_needed() -> None:
    calls = []

    def build() -> nn.Module:
        calls.append(0)
        return Decoder(**SHAPE | {"seed": len(calls)})

    s = LocalServiceClient({"a": build, "b": build}, device="cpu")
    assert not calls
    clients = [s.create_training_client("a") for _ in range(3)]
    assert len(calls) == 1 and same(weights(clients[0]), weights(clients[2]))
    s.create_training_client("b")
    assert len(calls) == 2


def test_the_service_without_models_has_the_embedded_one() -> None:
    s = LocalServiceClient(device="cpu")
    assert [m.model_name for m in s.get_server_capabilities().supported_models] == ["Decoder"]
    c = s.create_training_client("Decoder")
    assert same(weights(c), weights(LocalTrainingClient(device="cpu")))
    assert c.get_tokenizer().decode([72, 105]) == "Hi"


def test_capabilities_name_the_models() -> None:
    models = service().get_server_capabilities().supported_models
    assert [(m.model_name, m.trainable, m.max_context_length) for m in models] == [
        ("tiny", True, None),
        ("other", True, None),
    ]


def test_options_are_every_clients() -> None:
    s = service(dtype=torch.float64, profile="fireworks")
    for c in (s.create_training_client("tiny"), s.create_reference_client("tiny")):
        info = c.get_info()
        assert (info.dtype, info.profile, info.device) == ("torch.float64", "fireworks", "cpu")
    assert s.create_sampling_client(base_model="tiny").model.head.dtype == torch.float64


def test_what_a_remote_service_needs_is_let_be() -> None:
    s = service(base_url="https://example.invalid", api_key="secret", project_id="p")
    assert not any("secret" in repr(value) for value in vars(s).values())
    s.create_sampling_client(base_model="tiny", retry_config={"max_retries": 3})


# References


def test_a_reference_client_has_no_way_to_move_its_weights() -> None:
    c = service().create_reference_client("tiny", lora_rank=8, policy_client=None)
    assert isinstance(c, LocalReferenceClient) and not isinstance(c, LocalTrainingClient)
    public = {name for name in dir(c) if not name.startswith("_")}
    assert public == {
        *("forward", "forward_async", "get_info", "get_info_async", "get_tokenizer"),
        *("model", "ranks", "user_metadata", "result", "result_async"),
    }
    assert not any(p.requires_grad for p in c.model.parameters())
    before = weights(c)
    c.forward(DATA, "cross_entropy").result()
    c.forward(DATA, "cross_entropy", output="embedding").result()
    assert same(before, weights(c)) and all(p.grad is None for p in c.model.parameters())


# Checkpoints


def test_with_its_optimizer_a_restored_client_continues_bit_for_bit(tmp_path: Path) -> None:
    c = service().create_training_client("tiny")
    train(c)
    path = saved(c, tmp_path / "state")
    restored = service().create_training_client_from_state_with_optimizer(path)
    assert restored.get_info().steps == 3 and restored.get_info().model_name == "tiny"
    assert restored.get_tokenizer() is TOKENIZER
    assert train(c) == train(restored)
    assert same(weights(c), weights(restored))


def test_without_its_optimizer_a_restored_client_has_the_weights_alone(tmp_path: Path) -> None:
    c = service().create_training_client("tiny")
    train(c)
    path = saved(c, tmp_path / "state")
    restored = service().create_training_client_from_state(path)
    assert same(weights(c), weights(restored)) and restored.get_info().steps == 0
    continued, afresh = train(c), train(restored)
    assert continued[0] == afresh[0] and continued[1] != afresh[1]
    c.load_state(path).result()
    assert train(c) == afresh
    assert same(weights(c), weights(restored))


def test_weights_for_a_sampler_are_a_start_and_a_sampler(tmp_path: Path) -> None:
    s = service()
    c = s.create_training_client("tiny")
    train(c)
    path = c.save_weights_for_sampler(tmp_path / "weights").result().path
    assert same(weights(c), weights(s.create_training_client_from_state(path)))
    with pytest.raises(LossInputError, match="weights for a sampler"):
        s.create_training_client_from_state_with_optimizer(path)
    prompt = ModelInput.from_ints([1, 2, 3])
    sampler = s.create_sampling_client(path)
    assert sampler.get_tokenizer() is TOKENIZER
    expected = c.save_weights_and_get_sampling_client().compute_logprobs(prompt).result()
    assert sampler.compute_logprobs(prompt).result() == expected
    sampled = sampler.sample(prompt, 2, SamplingParams(max_tokens=3, seed=0)).result().sequences
    assert all(1 <= len(each.tokens) <= 3 for each in sampled)


def test_a_checkpoint_of_a_lone_client_is_one_of_the_embedded_model(tmp_path: Path) -> None:
    c = LocalTrainingClient(device="cpu")
    path = saved(c, tmp_path / "state")
    assert same(weights(c), weights(LocalServiceClient(device="cpu").create_training_client_from_state(path)))


def test_a_checkpoint_under_another_name_takes_a_base_model(tmp_path: Path) -> None:
    lone = LocalTrainingClient(Decoder(**SHAPE, seed=3), device="cpu")
    path = saved(lone, tmp_path / "state")
    with pytest.raises(LossInputError, match="one of 'tiny', 'other', got 'Decoder'"):
        service().create_training_client_from_state(path)
    restored = service().create_training_client_from_state(path, "tiny")
    assert same(weights(lone), weights(restored)) and restored.get_info().model_name == "tiny"
    with pytest.raises(LossInputError, match="state, in which dim is 8 in place of 16"):
        service().create_training_client_from_state(path, base_model="other")
    with pytest.raises(LossInputError, match="state, in which dim is 8 in place of 16"):
        service().create_sampling_client(path, "other")


def test_a_model_of_the_same_tensors_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    """With one head or two, and as many keys and values, all tensors have the same shapes."""
    c = LocalTrainingClient(Decoder(**SHAPE | {"heads": 2, "kv_heads": 2}), device="cpu")
    other = LocalTrainingClient(Decoder(**SHAPE | {"heads": 1, "kv_heads": 1}), device="cpu")
    path, before = saved(c, tmp_path / "state"), weights(other)
    for load in (other.load_state, other.load_state_with_optimizer):
        with pytest.raises(LossInputError, match="state, in which heads is 2 in place of 1"):
            load(path).result()
    with pytest.raises(LossInputError, match="state, in which heads is 2 in place of 1"):
        other.create_sampling_client(path)
    assert same(before, weights(other))


def test_metadata_is_in_every_checkpoint(tmp_path: Path) -> None:
    s = service(user_metadata={"owner": "a", "run": "1"})
    c = s.create_training_client("tiny", user_metadata={"run": "2"})
    first = saved(c, tmp_path / "first")
    second = saved(c, tmp_path / "second", user_metadata={"run": "3", "step": "0"})
    assert checkpoint.load(first)[1]["user_metadata"] == {"owner": "a", "run": "2"}
    assert checkpoint.load(second)[1]["user_metadata"] == {"owner": "a", "run": "3", "step": "0"}
    third = saved(s.create_training_client_from_state(second), tmp_path / "third")
    assert checkpoint.load(third)[1]["user_metadata"] == {"owner": "a", "run": "1"}


# Clients as futures, and async methods

CREATORS: dict[str, Callable[[str], dict[str, Any]]] = {
    "create_training_client": lambda path: {"base_model": "tiny"},
    "create_lora_training_client": lambda path: {"base_model": "tiny", "rank": 2},
    "create_training_client_from_state": lambda path: {"path": path},
    "create_training_client_from_state_with_optimizer": lambda path: {"path": path},
    "create_reference_client": lambda path: {"base_model": "tiny"},
    "create_sampling_client": lambda path: {"model_path": path},
}
KINDS = (LocalTrainingClient, LocalReferenceClient, LocalSamplingClient)


@pytest.mark.parametrize("name", CREATORS)
def test_a_client_is_there_at_once_and_answers_as_a_future(name: str, tmp_path: Path) -> None:
    s = service()
    options = CREATORS[name](saved(s.create_training_client("tiny"), tmp_path / "state"))

    async def run() -> None:
        c = getattr(s, name)(**options)
        assert isinstance(c, KINDS) and c.result() is c and await c is c
        other = await getattr(s, f"{name}_async")(**options)
        assert type(other) is type(c) and other is not c
        assert same(*([p.detach() for n, p in m.model.named_parameters() if "lora_" not in n] for m in (c, other)))

    asyncio.run(run())


def test_async_methods_leave_the_event_loop_free() -> None:
    """Building the model waits for a coroutine that runs meanwhile."""
    begun, meanwhile = threading.Event(), threading.Event()

    def build() -> nn.Module:
        begun.set()
        assert meanwhile.wait(30)
        return Decoder(**SHAPE)

    async def run() -> None:
        creating = asyncio.create_task(LocalServiceClient({"a": build}).create_training_client_async("a"))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        meanwhile.set()
        assert isinstance(await creating, LocalTrainingClient)
        assert (await LocalServiceClient().get_server_capabilities_async()).supported_models

    asyncio.run(run())


def test_threads_that_ask_at_once_get_the_same_base() -> None:
    calls = []

    def build() -> nn.Module:
        calls.append(0)
        time.sleep(0.05)  # long enough for the others to arrive
        return Decoder(**SHAPE | {"seed": len(calls)})

    s = LocalServiceClient({"a": build}, device="cpu")

    async def run() -> list[LocalTrainingClient]:
        return list(await asyncio.gather(*(s.create_training_client_async("a") for _ in range(8))))

    first, *rest = asyncio.run(run())
    assert len(calls) == 1 and all(same(weights(first), weights(c)) for c in rest)


def test_the_only_model_needs_no_name() -> None:
    service = LocalServiceClient({"tiny": tiny}, device="cpu")
    clients = [service.create_training_client(), service.create_lora_training_client(rank=2)]
    assert [client.get_info().model_name for client in (*clients, service.create_reference_client())] == ["tiny"] * 3


# Refusals

REFUSED: dict[str, tuple[Callable[[LocalServiceClient], Any], str]] = {
    "unknown model": (
        lambda s: s.create_training_client("Qwen/Qwen3-8B"),
        "base_model: expected one of 'tiny', 'other', got 'Qwen/Qwen3-8B'. LocalServiceClient(models={name: build})",
    ),
    "no name": (lambda s: s.create_reference_client(None), "base_model: expected one of 'tiny', 'other', got None"),
    "unknown sampler": (
        lambda s: s.create_sampling_client(base_model="x"),
        "base_model: expected one of 'tiny', 'other', got 'x'",
    ),
    "no sampler": (lambda s: s.create_sampling_client(), "Either model_path or base_model must be provided"),
    "stability": (
        lambda s: s.create_sampling_client(base_model="tiny", record_stability_info=True),
        "record_stability_info: expected False",
    ),
    "parts without adapters": (
        lambda s: s.create_training_client("tiny", train_mlp=False),
        "train_mlp: expected True, got False. Pass a lora_rank",
    ),
    "metadata": (
        lambda s: s.create_training_client("tiny", user_metadata={"step": 1}),
        "user_metadata: expected a dict of strings",
    ),
    "no file": (lambda s: s.create_training_client_from_state("/nowhere"), "path: expected a checkpoint, got no file"),
    "no path": (lambda s: s.create_training_client_from_state(None), "path: expected the path of a file, got None"),
    "optimizer": (
        lambda s: s.create_lora_training_client("tiny", optimizer="dimuon"),
        "optimizer: expected None or AdamW, got 'dimuon'",
    ),
    "optimizer of a state": (
        lambda s: s.create_training_client_from_state("/nowhere", optimizer="dimuon"),
        "optimizer: expected None or AdamW, got 'dimuon'",
    ),
    "service metadata": (
        lambda s: LocalServiceClient(user_metadata={"step": 1}),
        "user_metadata: expected a dict of strings",
    ),
    "profile": (lambda s: LocalServiceClient(profile="x"), "profile: expected 'tinker' or 'fireworks', got 'x'"),
    "device": (lambda s: LocalServiceClient(device="x"), "device: expected a device of this machine"),
    "no models": (lambda s: LocalServiceClient({}), "models: expected functions by name, got {}"),
    "a list of models": (lambda s: LocalServiceClient([tiny]), "models: expected functions by name"),
    "a module": (
        lambda s: LocalServiceClient({"a": Decoder(**SHAPE)}),
        "models: expected a function that builds 'a', got a Decoder.",
    ),
    "a name": (
        lambda s: LocalServiceClient({"a": "Qwen/Qwen3-8B"}),
        "models: expected a function that builds 'a', got a str.",
    ),
    "no module": (
        lambda s: LocalServiceClient({"a": dict}).create_training_client("a"),
        "models: expected a torch module from the function of 'a', got a dict.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_here_is_refused(case: str) -> None:
    call, text = REFUSED[case]
    with pytest.raises(LossInputError) as caught:
        call(service())
    assert text in str(caught.value)


def test_adamw_by_its_name_is_the_optimizer() -> None:
    class AdamConfig:
        type = "adamw"

    train(service().create_lora_training_client("tiny", 2, optimizer=AdamConfig()), 1)
