"""A client on a device: every request gives what it gives on the CPU, for every kind of model."""

import copy
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from accelerator import CPU, DEVICE, DTYPE, NAME, TOLERANCE, assert_same, recorded_waits, waits_of
from tiny import BYTE_SHAPE
from torch import Tensor, nn

import lossfns
from lossfns import LossInputError, ModelInput, datum_from_tokens
from lossfns.backend import (
    AdamParams,
    Decoder,
    LocalReferenceClient,
    LocalServiceClient,
    LocalTrainingClient,
    SamplingParams,
)
from lossfns.backend.engine.budget import MARGIN
from lossfns.backend.engine.pooling import POOLS
from lossfns.backend.model import hf, lora

RNG = Random(0)
PREFIX = [RNG.randrange(256) for _ in range(20)]  # long enough to be computed once


def text(length: int, prefix: list[int] | None = None) -> list[int]:
    return [*(prefix or []), *(RNG.randrange(256) for _ in range(length))]


TEXTS = [text(9), text(4), text(17), *(text(5, PREFIX) for _ in range(3))]
DATA = [datum_from_tokens(ids, prompt_length=2) for ids in TEXTS]
ADVANTAGES = [0.5, -1.0, 2.0, 0.1, -0.2, 0.0]
POLICY = [
    datum_from_tokens(
        ids, prompt_length=2, logprobs=[-5.5] * (len(ids) - 1), advantages=[a * (j > 0) for j in range(len(ids) - 1)]
    )
    for ids, a in zip(TEXTS, ADVANTAGES)
]
EMBEDDED = [lossfns.Datum(ModelInput.from_ints(ids), {}) for ids in TEXTS]


def users_loss(data: Any, logprobs_list: list[Tensor]) -> Any:
    """Return −Σ lp·exp(lp) and a metric, as a loss of a user's own."""
    total = torch.stack([-(lp.exp() * lp).sum() for lp in logprobs_list]).sum()
    return total, {"datums": float(len(data))}


def distances(data: Any, embeddings: list[Tensor]) -> Any:
    return torch.stack([(a - b).square().sum() for a, b in pairwise(embeddings)]).sum(), {}


def decoder(**options: Any) -> nn.Module:
    return Decoder(**{**BYTE_SHAPE, **options})


def adapted(parts: tuple[str, ...] = ("attn", "mlp")) -> nn.Module:
    model = lora.adapt(decoder(), rank=2, parts=parts, seed=1)
    with torch.no_grad():
        for layer in lora.adapted_layers(model):
            layer.lora_B[lora.ADAPTER].weight.fill_(0.01)
    return model


def checkpointing() -> nn.Module:
    model: Any = decoder()
    model.checkpointing = True
    return model


TINY: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 257,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def llama() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY, num_key_value_heads=2, tie_word_embeddings=True)
    return hf.CausalLM(transformers.LlamaForCausalLM(config))


def phi() -> nn.Module:
    """Return a model with a bias in the head."""
    import transformers

    torch.manual_seed(0)
    return hf.CausalLM(transformers.PhiForCausalLM(transformers.PhiConfig(**TINY)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied": decoder,
    "untied": lambda: decoder(tied=False),
    "adapters": adapted,
    "adapters of the head": lambda: adapted(("unembed",)),
    "checkpointing": checkpointing,
    "llama": llama,
    "phi": phi,
}

every_model = pytest.mark.parametrize("model", MODELS)

REQUESTS: dict[str, Callable[[LocalTrainingClient], Any]] = {
    "forward": lambda c: c.forward(DATA, "cross_entropy"),
    "forward of a policy loss": lambda c: c.forward(POLICY, "ppo"),
    "forward of embeddings": lambda c: c.forward(EMBEDDED, "cross_entropy", output="embedding"),
    "cross_entropy": lambda c: c.forward_backward(DATA, "cross_entropy"),
    "ppo": lambda c: c.forward_backward(POLICY, "ppo"),
    "a loss": lambda c: c.forward_backward_custom(DATA, lossfns.ppo().bind(**bound_columns())),
    "a loss of pairs": lambda c: c.forward_backward_custom(DATA, lossfns.orpo()),
    "a function": lambda c: c.forward_backward_custom(DATA, users_loss),
    "a function of the means": lambda c: c.forward_backward_custom(EMBEDDED, distances, output="embedding"),
    "a function of the ends": lambda c: c.forward_backward_custom(
        EMBEDDED, distances, output="embedding", pooling="last"
    ),
}
"""Every kind of request."""

FEW = ["forward", "a loss", "a function"]
"""Requests that take every path through a model."""

MAX_WAITS = {"forward": 1, "forward of a policy loss": 1, "forward of embeddings": 1}
"""How often a request may make the host wait, where it is not twice."""


def bound_columns() -> dict[str, Any]:
    """Columns of both sides: advantages on the host, old logprobs on the device."""
    old = [torch.full((len(ids) - 1,), -5.5, device=DEVICE) for ids in TEXTS]
    return {"advantages": ADVANTAGES, "old_logprobs": old}


def client(model: str, device: Any, **options: Any) -> LocalTrainingClient:
    return LocalTrainingClient(MODELS[model](), device=device, **{"dtype": DTYPE, **options})


def result_of(c: LocalTrainingClient, request: str) -> tuple[Any, list[str]]:
    """Return the outputs and metrics of a request with the gradient that it leaves, and the waits."""
    c.model.zero_grad(set_to_none=True)
    with recorded_waits() as waits:
        result = REQUESTS[request](c).result()
    outputs = [x.to_torch() for record in result.loss_fn_outputs for x in record.values()]
    metrics = {name: x for name, x in result.metrics.items() if not name.startswith("peak_memory")}
    return (outputs, metrics, [p.grad for p in c.model.parameters() if p.grad is not None]), waits


@every_model
def test_every_request(model: str) -> None:
    """The library transformers looks for packed positions itself, which makes the host wait once more."""
    on_host, on_device = (client(model, device) for device in (CPU, NAME))
    for request in ("forward", "cross_entropy"):
        REQUESTS[request](on_device).result()  # the first ones measure the memory that the model takes
    for request in REQUESTS if model == "tied" else FEW:
        expected, _ = result_of(on_host, request)
        found, waits = result_of(on_device, request)
        assert_same(found, expected)
        our_waits = [w for w in waits if "transformers/" not in w]
        assert len(our_waits) <= MAX_WAITS.get(request, 2), (request, waits)
        assert len(waits) <= len(our_waits) + 1
    assert {p.device for p in on_device.model.parameters()} == {DEVICE}


@pytest.mark.parametrize("request_name", ["cross_entropy", "a loss", "a function", "a function of the means"])
def test_in_micro_batches(request_name: str) -> None:
    expected, _ = result_of(client("tied", CPU), request_name)
    engine = client("tied", NAME)._engine
    inputs = engine.embeddings(EMBEDDED, POOLS["mean"]).inputs
    limit = engine.budget.costs(inputs).step_bytes(max(inputs.lengths) + 1) / MARGIN + 1
    (outputs, metrics, gradients), _ = result_of(client("tied", NAME, memory_budget=limit), request_name)
    assert max(x for name, x in metrics.items() if name.startswith("micro_batches")) > 1
    assert_same((outputs, gradients), (expected[0], expected[2]))


@pytest.mark.parametrize("model", ["untied", "adapters", "llama"])
def test_training(model: str) -> None:
    """Two steps on each device have the same losses and norms, with counts that divide the gradient."""
    runs = []
    for device in (CPU, NAME):
        c, seen = client(model, device), []
        for _ in range(2):
            seen.append(c.forward_backward(DATA, "cross_entropy").result().metrics["loss:sum"])
            c.forward_backward_custom(DATA, users_loss).result()
            step = c.optim_step(AdamParams(learning_rate=1e-2, grad_clip_norm=1.0), "num_loss_tokens").result()
            seen.append(step.metrics["grad_norm"])
        runs.append(seen)
    assert_same(runs[1], runs[0])


def test_a_step_waits_once() -> None:
    c = client("tied", NAME)

    for _ in range(2):
        c.forward_backward(DATA, "cross_entropy").result()
        with recorded_waits() as waits:
            c.optim_step(AdamParams(grad_clip_norm=1.0), "num_sequences").result()
    assert len(waits) == 1, waits


def no_slope(data: Any, logprobs_list: list[Tensor]) -> Any:
    total = torch.stack([lp.sum() for lp in logprobs_list]).sum()
    return (total - total.detach()).sqrt(), {}


def overflow(data: Any, logprobs_list: list[Tensor]) -> Any:
    """A finite loss with a finite gradient, which overflows on its way through the model."""
    return torch.stack([(lp - lp.detach()).sum() for lp in logprobs_list]).sum() * (torch.finfo(DTYPE).max / 2), {}


WRONG: list[tuple[Any, Any]] = [
    (DATA, no_slope),
    (DATA, overflow),
    (DATA, lambda data, lps: (lps[0].sum(), {})),
    (DATA, lambda data, lps: (torch.cat(lps).sum() * torch.inf, {})),
    (DATA, lossfns.reinforce().bind(advantages=[torch.nan] * len(DATA))),
    (DATA, lossfns.cross_entropy().bind(weights=[[0] * (len(ids) - 1) for ids in TEXTS])),
    ([datum_from_tokens([1, 999], prompt_length=1)], lossfns.cross_entropy()),
]


def test_errors_leave_the_gradient_as_it_was() -> None:
    messages = []
    for device in (CPU, NAME):
        c = client("tied", device)
        c.forward_backward(DATA, "cross_entropy").result()
        before = [p.grad.clone() for p in c.model.parameters()]
        for data, loss in WRONG:
            with pytest.raises(LossInputError) as caught:
                c.forward_backward_custom(data, loss).result()
            messages.append(str(caught.value))
        assert_same([p.grad for p in c.model.parameters()], before, 0)
    assert messages[: len(WRONG)] == messages[len(WRONG) :] and len(set(messages)) == len(WRONG)


def test_checkpoints_pass_between_devices(tmp_path: Path) -> None:
    """Training goes on from a state of the device, on the device and on the CPU, as if it had not been interrupted."""
    c = client("adapters", NAME)
    c.forward_backward(DATA, "cross_entropy").result()
    c.optim_step(AdamParams(learning_rate=1e-2)).result()
    c.save_state(tmp_path / "state").result()
    c.save_weights_for_sampler(tmp_path / "weights").result()
    others = {device: client("adapters", device) for device in (NAME, CPU)}
    for each in others.values():
        each.load_state_with_optimizer(tmp_path / "state").result()
    runs = []
    for each in (c, *others.values()):
        each.forward_backward(DATA, "cross_entropy").result()
        norm = each.optim_step(AdamParams(learning_rate=1e-2)).result().metrics["grad_norm"]
        runs.append((norm, [p.detach().cpu().clone() for p in each.model.parameters()]))
        each.load_state(tmp_path / "weights").result()
    assert_same(runs[1], runs[0])
    assert_same(runs[2], runs[0])
    sampler = c.create_sampling_client(tmp_path / "weights")
    assert_same(sampler.compute_logprobs(ModelInput.from_ints(TEXTS[0])).result()[1:], logprobs_of(c, TEXTS[0]))


def logprobs_of(c: LocalReferenceClient, ids: list[int]) -> Any:
    data = [datum_from_tokens(ids, prompt_length=1)]
    return c.forward(data, "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_torch()


def test_the_reference_of_a_model_with_adapters() -> None:
    clients = [client("adapters", device) for device in (CPU, NAME)]
    for c in clients:
        c._starts_unadapted = True
    assert_same(logprobs_of(clients[1].reference(), TEXTS[2]), logprobs_of(clients[0].reference(), TEXTS[2]))
    assert not torch.allclose(logprobs_of(clients[1].reference(), TEXTS[2]), logprobs_of(clients[1], TEXTS[2]))


def test_a_service_puts_its_models_on_the_device() -> None:
    service = LocalServiceClient({"tiny": lambda: (decoder(), None)}, device=NAME)
    c = service.create_lora_training_client("tiny", rank=2, seed=1)
    c.forward_backward(DATA, "cross_entropy").result()
    c.optim_step(AdamParams()).result()
    assert c.get_info().device == str(DEVICE)


SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"seed": 3},
    "of the most probable tokens": {"seed": 3, "top_k": 5, "top_p": 0.9, "temperature": 0.7},
    "with stops": {"seed": 3, "stop": list(range(0, 256, 5))},
}


@pytest.mark.parametrize("model", ["tied", "llama"])
@pytest.mark.parametrize("options", SAMPLING)
def test_samples(model: str, options: str) -> None:
    """A seed seeds a generator of the device, which draws in another way than the CPU does. One wait for each token."""
    params = SamplingParams(max_tokens=6, **SAMPLING[options])
    prompts = [ModelInput.from_ints(ids) for ids in TEXTS[:2]]
    samplers = [client(model, device).save_weights_and_get_sampling_client() for device in (CPU, NAME)]
    expected, found = ([r.sequences for r in s.sample_batch(prompts, 2, params).result()] for s in samplers)
    again = [r.sequences for r in samplers[1].sample_batch(prompts, 2, params).result()]
    for same_draws in (again, expected) if options == "greedy" else (again,):
        for x, y in zip(chain(*found), chain(*same_draws), strict=True):
            assert (x.tokens, x.stop_reason) == (y.tokens, y.stop_reason)
            assert_same(x.logprobs, y.logprobs)
    for ids, sequences in zip(TEXTS, found):
        for sequence in sequences:
            logprobs = samplers[0].compute_logprobs(ModelInput.from_ints([*ids, *sequence.tokens])).result()
            assert_same(sequence.logprobs, logprobs[len(ids) :], 10 * TOLERANCE)
    waits = waits_of(lambda: samplers[1].sample_batch(prompts, 2, params).result())
    our_waits = [w for w in waits if "transformers/" not in w]
    assert len(our_waits) == max(len(s.tokens) for s in chain(*found)), waits


def test_unseeded_samples_come_from_the_state_of_the_device() -> None:
    sampler = client("tied", NAME).save_weights_and_get_sampling_client()
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        params = SamplingParams(max_tokens=8)
        drawn.append(sampler.sample(ModelInput.from_ints([1, 2]), 1, params).result().sequences[0].tokens)
    assert drawn[0] == drawn[1]


def test_a_copy_of_a_model_stays_on_the_device() -> None:
    model = copy.deepcopy(client("llama", NAME).model)
    assert {x.device for x in (*model.parameters(), *model.buffers())} == {DEVICE}
