"""Arguments that no client can use are refused by name, and a batch without a weight is refused by both lanes."""

import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from tiny import DATA, SHAPE, byte_client, client, gradients, logprobs, same, texts

from lossfns import LossInputError, TensorData
from lossfns.backend import Decoder, LocalReferenceClient, LocalServiceClient, LocalTrainingClient
from lossfns.backend.model.tokenizer import ByteTokenizer
from lossfns.export.builtins import BUILTINS, builtin_loss

HUGE = 10**400
NUL = "a\0b"


def service(**options: Any) -> LocalServiceClient:
    return LocalServiceClient({"tiny": lambda: (Decoder(**SHAPE), ByteTokenizer())}, device="cpu", **options)


CLIENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "a budget of 400 digits": (lambda: client(memory_budget=HUGE), "memory_budget: expected bytes"),
    "a negative budget of 400 digits": (lambda: client(memory_budget=-HUGE), "memory_budget: expected bytes"),
    "a service's budget": (lambda: service(memory_budget=HUGE), "memory_budget: expected bytes"),
    "a seed of 400 digits": (lambda: LocalTrainingClient(seed=HUGE, device="cpu"), "seed: expected a whole number"),
    "a seed that is a text": (lambda: LocalTrainingClient(seed="x", device="cpu"), "seed: expected a whole number"),  # type: ignore[arg-type]
    "a negative seed": (lambda: LocalReferenceClient(seed=-1, device="cpu"), "seed: expected a whole number"),
    "a dtype that is a text": (lambda: client(dtype="float32"), "dtype: expected a floating-point dtype"),
    "a dtype of integers": (lambda: client(dtype=torch.int8), "dtype: expected a floating-point dtype"),
    "a service's dtype": (lambda: service(dtype="float32"), "dtype: expected a floating-point dtype"),
    "a device of 400 digits": (lambda: LocalTrainingClient(device=HUGE), "device: expected a device of this machine"),  # type: ignore[arg-type]
    "a device that holds nothing": (lambda: LocalTrainingClient(device="meta"), "device: expected a device that holds"),
    "a name that is a number": (lambda: client(name=3), "name: expected a string"),
    "a mesh that is none": (lambda: client(mesh="cpu"), "mesh: expected one dimension"),
    "a rank of 400 digits": (lambda: service().create_lora_training_client("tiny", HUGE), "rank: expected at most"),
    "a rank beyond all memory": (lambda: service().create_training_client("tiny", 10**9), "rank: expected at most"),
    "an alpha of 400 digits": (
        lambda: service().create_lora_training_client("tiny", 2, alpha=HUGE),
        "alpha: expected a finite number",
    ),
    "a part that is a text": (
        lambda: service().create_lora_training_client("tiny", 2, train_mlp="False"),  # type: ignore[arg-type]
        "train_mlp: expected True or False, got 'False'",
    ),
    "a part that is a number": (
        lambda: service().create_training_client("tiny", train_attn=1),  # type: ignore[arg-type]
        "train_attn: expected True or False, got 1",
    ),
    "a base model that is a list": (lambda: service().create_training_client(["tiny"]), "base_model: expected one of"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", CLIENTS)
def test_an_argument_that_no_client_can_use_is_refused_by_name(what: str) -> None:
    make, message = CLIENTS[what]
    with pytest.raises(LossInputError) as caught:
        make()
    assert str(caught.value).startswith(message)


PATHS: dict[str, Callable[[Any], Any]] = {
    "save_state": lambda path: client().save_state(path),
    "save_state, overwrite": lambda path: client().save_state(path, overwrite=True),
    "save_weights_for_sampler": lambda path: client().save_weights_for_sampler(path),
    "load_state": lambda path: client().load_state(path),
    "load_state_with_optimizer": lambda path: client().load_state_with_optimizer(path),
    "create_sampling_client": lambda path: client().create_sampling_client(path),
    "service, create_sampling_client": lambda path: service().create_sampling_client(path),
    "create_training_client_from_state": lambda path: service().create_training_client_from_state(path),
    "create_training_client_from_state_with_optimizer": lambda path: (
        service().create_training_client_from_state_with_optimizer(path)
    ),
}


@pytest.mark.parametrize(
    "path", [NUL, Path(NUL), "", b"x", 3, None, "x" * 5000, "\ud800", HUGE], ids=lambda path: repr(path)[:12]
)
@pytest.mark.parametrize("call", PATHS)
def test_a_path_that_is_none_is_refused_by_name(call: str, path: Any, tmp_path: Path) -> None:
    usable = isinstance(path, str) and path not in (NUL, "")
    with pytest.raises(LossInputError, match=r"^(name|path|model_path): expected"):
        PATHS[call](tmp_path / path if usable else path).result(60)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("timeout", [HUGE, math.inf, math.nan, "1", [1], True])
def test_a_timeout_that_no_thread_can_wait_is_refused_by_name(timeout: Any) -> None:
    c = client()
    future = c.forward(texts(Random(0)), "cross_entropy")
    with pytest.raises(LossInputError, match="timeout: expected seconds"):
        future.result(timeout)
    assert future.result(60).metrics


# A batch without a weight


def masked(name: str) -> list[Any]:
    """Make datums of all fields that the loss reads, with weights of 0."""
    data = texts(Random(0))
    for datum in data:
        n = datum.loss_fn_inputs["target_tokens"].shape[0]
        columns = {"logprobs": -1.0, "advantages": 1.0, "weights": 0.0, "ref_logprobs": -1.0}
        if name == "cross_entropy":
            columns = {"weights": 0.0}
        elif name == "gspo":
            columns = {"logprobs": -1.0, "advantages": 0.0, "sequence_ratio_mask": 0.0}
        elif name != "grpo":
            del columns["ref_logprobs"]
        del datum.loss_fn_inputs["weights"]
        datum.loss_fn_inputs.update({key: TensorData([x] * n, "float32") for key, x in columns.items()})
    return data


@pytest.mark.parametrize("name", BUILTINS)
def test_a_wholly_masked_batch_is_refused_by_both_lanes(name: str) -> None:
    """A step would have a gradient of 0. A forward pass, which has no step, gives the logprobs."""
    c, data = byte_client(), masked(name)
    c.forward_backward(DATA, "cross_entropy").result()
    before = gradients(c)
    expected = "weights: expected at least one active token in the batch, got only zeros"
    with pytest.raises(LossInputError, match=expected):
        c.forward_backward(data, name).result()
    loss = builtin_loss(name, None, multi_target=False)
    for datum in data:
        zeros = datum.loss_fn_inputs.pop("sequence_ratio_mask", None)
        datum.loss_fn_inputs.update({} if zeros is None else {"weights": zeros})
    with pytest.raises(LossInputError, match=expected):
        c.forward_backward_custom(data, loss).result()
    assert same(gradients(c), before)
    forward = c.forward(masked(name), name).result()
    assert forward.metrics["loss:sum"] == 0 and len(forward.loss_fn_outputs) == len(data)


def test_a_masked_batch_is_refused_in_micro_batches_too() -> None:
    c, data = byte_client(memory_budget=3_000_000), masked("cross_entropy") * 40
    with pytest.raises(LossInputError, match="weights: expected at least one active token"):
        c.forward_backward(data, "cross_entropy").result()
    data[-1] = DATA[0]
    assert c.forward_backward(data, "cross_entropy").result().metrics["micro_batches:sum"] > 1


def test_a_batch_without_an_advantage_is_not_a_masked_one() -> None:
    """Its gradient is 0, too, but its tokens count: a policy loss of a constant group has no signal."""
    c, data = byte_client(), masked("ppo")
    for datum in data:
        n = datum.loss_fn_inputs["target_tokens"].shape[0]
        columns = {"weights": TensorData([1.0] * n, "float32"), "advantages": TensorData([0.0] * n, "float32")}
        datum.loss_fn_inputs.update(columns)
    assert c.forward_backward(data, "ppo").result().metrics["tokens:sum"] > 0
    assert len(logprobs(c)) == len(DATA)
