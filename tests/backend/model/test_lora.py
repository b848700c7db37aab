"""Adapters: gradients by hand, frozen weights, the reference, checkpoints and samplers."""

import math
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import DATA, RATE, SHAPE, logprobs, train
from torch import Tensor, nn

from lossfns import LossInputError, ModelInput
from lossfns.backend import AdamParams, Decoder, LocalServiceClient, LocalTrainingClient, SamplingParams
from lossfns.backend.model import lora
from lossfns.backend.model.tokenizer import ByteTokenizer

PARTS = {"mlp": ("gate_up", "down"), "attn": ("qkv", "out"), "unembed": ("unembed",)}


def base(**options: Any) -> Decoder:
    return Decoder(**SHAPE | {"layers": 2} | options)


def service(dtype: torch.dtype | None = None, **options: Any) -> LocalServiceClient:
    return LocalServiceClient({"tiny": lambda: (base(**options), ByteTokenizer())}, device="cpu", dtype=dtype)


def client(rank: int = 4, seed: int | None = 0, **options: Any) -> LocalTrainingClient:
    return service().create_lora_training_client("tiny", rank, seed, **options)


def tensors(c: LocalTrainingClient) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in c.model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def move(c: LocalTrainingClient) -> None:
    """Make B other than zero, without a step."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in c.model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gradients_are_those_by_hand(tied: bool) -> None:
    """y = x(W + s·BA)ᵀ: with dW of the merged weight, dB = s·dW·Aᵀ and dA = s·Bᵀ·dW."""
    c = service(torch.float64, tied=tied).create_lora_training_client("tiny", 4, seed=0, alpha=12)
    move(c)
    merged, scale = base(tied=False).double(), 12 / 4
    pairs = {}
    with torch.no_grad():
        merged.embed.weight.copy_(c.model.embed.weight)  # type: ignore[arg-type, union-attr]
        for name, module in c.model.named_modules():
            if hasattr(module, "lora_A"):
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight  # type: ignore[index, union-attr]
                weight = merged.get_submodule(name).weight
                weight.copy_(module.weight + scale * b @ a)
                pairs[name] = (a, b, weight)
    assert len(pairs) == 2 * 4 + 1
    full = LocalTrainingClient(merged, device="cpu")
    for each in (c, full):
        each.forward_backward(DATA, "cross_entropy").result()
    for a, b, weight in pairs.values():
        assert weight.grad.abs().max() > 1e-3
        torch.testing.assert_close(b.grad, scale * weight.grad @ a.T, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(a.grad, scale * b.T @ weight.grad, rtol=1e-9, atol=1e-9)


def test_the_first_logprobs_are_the_base_models() -> None:
    s = service()
    c = s.create_lora_training_client("tiny", 4)
    reference = logprobs(s.create_reference_client("tiny"))
    assert all(map(torch.equal, logprobs(c), reference))
    train(c, 1)
    assert not any(map(torch.equal, logprobs(c), reference))


def test_adapters_alone_have_gradients_and_moments_and_move() -> None:
    c = client()
    before = tensors(c)
    c.forward_backward(DATA, "cross_entropy").result()
    names = {name for name, p in c.model.named_parameters() if p.grad is not None}
    assert names == {name for name in before if "lora_" in name}
    c.optim_step(RATE).result()
    kept = {c.model.get_parameter(name) for name in names}
    assert set(c._engine.optimizer.state) == kept
    c.forward_backward(DATA, "cross_entropy").result()
    c.optim_step(AdamParams(learning_rate=1e-2, weight_decay=0.1)).result()
    moved = {name for name, x in tensors(c).items() if not torch.equal(x, before[name])}
    assert moved == names


@pytest.mark.parametrize("part", PARTS)
def test_parts_are_trained_as_asked(part: str) -> None:
    flags = {f"train_{name}": name == part for name in PARTS}
    c = client(**flags)
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in tensors(c) if "lora_" in name}
    assert layers == set(PARTS[part])
    first, *_, last = train(c, 4)
    assert last < first


def test_the_unembeddings_adapter_leaves_a_tied_embedding_alone() -> None:
    c = client(train_mlp=False, train_attn=False)
    tokens = torch.arange(6)
    with torch.no_grad():
        hidden, head = c.model(tokens, [6]), c.model.head
    train(c)
    with torch.no_grad():
        assert torch.equal(c.model(tokens, [6]), hidden)
        assert not torch.equal(c.model.head, head)
        assert c.model.head.shape == head.shape and not torch.equal(c.model.head, c.model.embed.weight)


def test_a_seed_is_an_initialisation() -> None:
    one, again, other = (tensors(client(seed=seed)) for seed in (0, 0, 1))
    assert same(one, again) and not same(one, other)
    assert not same(tensors(client(seed=None)), tensors(client(seed=None)))
    for name, x in one.items():
        if "lora_A" in name:
            bound = 1 / math.sqrt(x.shape[1])
            assert 0.5 * bound < x.abs().max() <= bound and x.mean().abs() < 0.5 * bound
        assert "lora_B" not in name or not x.any()


def test_a_seed_does_not_depend_on_torchs_own_generator() -> None:
    torch.manual_seed(1)
    one = tensors(client())
    torch.manual_seed(2)
    assert same(one, tensors(client()))


def test_info_tells_adapters_from_all_parameters() -> None:
    s = service()
    full, adapted = s.create_training_client("tiny").get_info(), s.create_training_client("tiny", 4).get_info()
    assert (full.is_lora, full.lora_rank, full.model_name) == (False, None, "tiny")
    assert (adapted.is_lora, adapted.lora_rank, adapted.model_name) == (True, 4, "tiny")
    assert adapted.parameters > full.parameters


def test_create_training_client_with_a_rank_is_create_lora_training_client() -> None:
    s = service()
    a = s.create_training_client("tiny", 4, 7, False, True, True, 16, {"run": "a"})
    b = s.create_lora_training_client("tiny", 4, 7, False, True, True, {"run": "a"}, alpha=16)
    assert same(tensors(a), tensors(b)) and a.model.lora == b.model.lora == {
        "rank": 4,
        "alpha": 16,
        "parts": ["attn", "unembed"],
    }
    assert a.user_metadata == b.user_metadata == {"run": "a"}


def test_gradients_add_up_over_requests() -> None:
    one, parts = client(), client()
    one.forward_backward(DATA, "cross_entropy").result()
    for d in DATA:
        parts.forward_backward([d], "cross_entropy").result()
    for x, y in zip(one.model.parameters(), parts.model.parameters()):
        assert (x.grad is None) == (y.grad is None)
        if x.grad is not None:
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-6)


def test_a_loss_over_embeddings_trains_all_but_the_unembedding() -> None:
    c = client()

    def pull(data: Any, embeddings: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        return torch.stack(embeddings).square().sum(), {}

    c.forward_backward_custom(DATA, pull, output="embedding").result()
    trained = {name for name, p in c.model.named_parameters() if p.grad is not None}
    assert trained == {name for name in tensors(c) if "lora_" in name and "unembed" not in name}
    c.optim_step(RATE).result()


def test_the_head_is_used_in_two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No request makes the [V, D] product of the factors, and the parts add up to ``head``: for one adapter and two.

    An adapter that is more than a product is added to the weight.
    """
    c = client()
    move(c)
    layer: Any = c.model.unembed
    with monkeypatch.context() as patched:
        patched.setattr(type(layer), "get_delta_weight", lambda *_: pytest.fail("a [V, D] matrix is made"))
        c.forward_backward(DATA, "cross_entropy").result()
        c.forward(DATA, "cross_entropy").result()
        c.optim_step(RATE).result()
        sampler = c.save_weights_and_get_sampling_client()
        sampler.sample(ModelInput.from_ints([1, 2]), 1, SamplingParams(max_tokens=2)).result()
    assert layer.weight.grad is None
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["unembed"], use_rslora=True), c.model, "second")
    nn.init.normal_(layer.lora_B["second"].weight)
    layer.set_adapter(["default", "second"])
    weight, adapter = lora.factored_weight(layer)
    assert weight is layer.weight and adapter is not None
    a, b, scale = adapter
    torch.testing.assert_close(weight + scale * b @ a, c.model.head)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["unembed"], use_dora=True), c.model, "third")
    layer.set_adapter(["third"])
    weight, adapter = lora.factored_weight(layer)
    assert adapter is None and torch.equal(weight, c.model.head)
    with lora.disabled(c.model):
        assert lora.factored_weight(layer) == (layer.weight, None)


# The reference


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_with_its_adapters_off_the_model_is_the_base(tied: bool) -> None:
    s = service(tied=tied)
    c = s.create_lora_training_client("tiny", 4, seed=0)
    move(c)
    expected, tokens = s.create_reference_client("tiny").model, torch.arange(6)
    before = c.model.head.clone()
    with torch.no_grad(), lora.disabled(c.model):
        assert torch.equal(c.model(tokens, [6]), expected(tokens, [6]))
        assert torch.equal(c.model.head, expected.head)
        with lora.disabled(c.model):
            pass
        assert torch.equal(c.model.head, expected.head)  # still
    assert torch.equal(c.model.head, before) and not torch.equal(before, expected.head)


def test_adapters_that_were_off_train_as_if_nothing_had_happened() -> None:
    one, other = client(), client()
    other.forward_backward(DATA[:2], "cross_entropy").result()
    with pytest.raises(ZeroDivisionError), lora.disabled(other.model):
        assert not any(p.requires_grad for p in other.model.parameters())
        raise ZeroDivisionError
    one.forward_backward(DATA[:2], "cross_entropy").result()
    assert [p.requires_grad for p in one.model.parameters()] == [p.requires_grad for p in other.model.parameters()]
    assert train(one) == train(other) and same(tensors(one), tensors(other))


def test_off_leaves_frozen_adapters_frozen() -> None:
    c = client()
    c.model.requires_grad_(False)
    with lora.disabled(c.model):
        pass
    assert not any(p.requires_grad for p in c.model.parameters())


def test_the_reference_is_the_base_model_while_the_policy_moves() -> None:
    s = service()
    c = s.create_lora_training_client("tiny", 4, seed=0)
    reference, expected = c.reference(), logprobs(s.create_reference_client("tiny"))
    c.forward_backward(DATA, "cross_entropy").result()
    assert all(map(torch.equal, logprobs(reference), expected))
    c.optim_step(RATE).result()
    assert all(map(torch.equal, logprobs(reference), expected))
    assert not any(map(torch.equal, logprobs(c), expected))
    assert not hasattr(reference, "optim_step") and reference.model is c.model
    embedding = [o["embedding"] for o in reference.forward(DATA, "", output="embedding").result().loss_fn_outputs]
    wanted = s.create_reference_client("tiny").forward(DATA, "", output="embedding").result().loss_fn_outputs
    assert [e.data for e in embedding] == [o["embedding"].data for o in wanted]


def test_a_reference_of_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(LossInputError, match="a model with adapters, which can be switched off"):
        LocalTrainingClient(base(), device="cpu").reference()


# Samplers


def test_a_sampler_has_the_adapters_and_is_a_snapshot() -> None:
    c = client()
    train(c)
    sampler = c.save_weights_and_get_sampling_client()
    prompt = ModelInput.from_ints([1, 2, 3])
    drawn = sampler.sample(prompt, 1, SamplingParams(max_tokens=6, temperature=0)).result().sequences[0]
    full = ModelInput.from_ints([1, 2, 3, *drawn.tokens])
    before = sampler.compute_logprobs(full).result()
    assert drawn.logprobs == pytest.approx(before[3:], abs=1e-5)
    expected = service().create_sampling_client(base_model="tiny").compute_logprobs(full).result()
    assert before[3:] != pytest.approx(expected[3:], abs=1e-3)
    train(c, 1)
    assert sampler.compute_logprobs(full).result() == before
    assert c.save_weights_and_get_sampling_client().compute_logprobs(full).result() != before


def test_samplers_of_a_file_are_the_clients(tmp_path: Path) -> None:
    c = client()
    train(c)
    path = c.save_weights_for_sampler(tmp_path / "weights").result().path
    prompt = ModelInput.from_ints([1, 2, 3, 4])
    expected = c.save_weights_and_get_sampling_client().compute_logprobs(prompt).result()
    assert c.create_sampling_client(path).compute_logprobs(prompt).result() == expected
    assert service().create_sampling_client(path).compute_logprobs(prompt).result() == expected


# Checkpoints


def test_a_checkpoint_restores_adapters_optimizer_and_steps(tmp_path: Path) -> None:
    c = client(rank=3, alpha=7, train_mlp=False)
    train(c)
    path = c.save_state(tmp_path / "state").result().path
    restored = service().create_training_client_from_state_with_optimizer(path)
    assert same(tensors(c), tensors(restored))
    assert restored.get_info().steps == 3 and restored.get_info().lora_rank == 3
    assert restored.model.lora == {"rank": 3, "alpha": 7, "parts": ["attn", "unembed"]}
    assert train(c) == train(restored)
    assert same(tensors(c), tensors(restored))


def test_a_checkpoint_without_its_optimizer_is_its_weights(tmp_path: Path) -> None:
    c = client()
    train(c)
    path = c.save_state(tmp_path / "state").result().path
    restored = service().create_training_client_from_state(path)
    assert same(tensors(c), tensors(restored)) and restored.get_info().steps == 0
    c.load_state(path).result()
    assert train(c) == train(restored)
    assert same(tensors(c), tensors(restored))


@pytest.mark.parametrize(
    ("other", "key"),
    [({"alpha": 16}, "alpha"), ({"rank": 2}, "rank"), ({"train_mlp": False}, "parts")],
    ids=str,
)
def test_a_checkpoint_of_other_adapters_is_refused(tmp_path: Path, other: dict[str, Any], key: str) -> None:
    path = client(**other).save_state(tmp_path / "state").result().path
    c = client()
    before = tensors(c)
    for load in (c.load_state, c.load_state_with_optimizer):
        with pytest.raises(LossInputError, match=f"state, in which {key} is "):
            load(path).result()
    with pytest.raises(LossInputError, match=f"state, in which {key} is "):
        c.create_sampling_client(path)
    assert same(before, tensors(c))


def test_new_adapters_start_on_the_weights_of_a_checkpoint_without_adapters(tmp_path: Path) -> None:
    full, adapted = service(seed=3).create_training_client("tiny"), client()
    path = full.save_state(tmp_path / "full").result().path
    adapted.load_state(path).result()
    expected = torch.cat(logprobs(full))
    torch.testing.assert_close(torch.cat(logprobs(adapted)), expected)
    own = {name: x for name, x in tensors(client()).items() if "lora_" in name}
    assert own and all(torch.equal(x, tensors(adapted)[name]) for name, x in own.items())
    train(adapted)
    assert not torch.allclose(torch.cat(logprobs(adapted)), expected, atol=1e-4)
    torch.testing.assert_close(torch.cat(logprobs(adapted.reference())), expected)


def test_a_checkpoint_of_all_parameters_is_none_of_trained_adapters_and_the_reverse(tmp_path: Path) -> None:
    full, adapted = service().create_training_client("tiny"), client()
    train(adapted)
    for a, b in ((full, adapted), (adapted, full)):
        path = a.save_state(tmp_path / a.get_info().model_id).result().path
        with pytest.raises(LossInputError, match="a checkpoint of this model"):
            b.load_state(path).result()
        with pytest.raises(LossInputError, match="a checkpoint of this model"):
            b.load_state_with_optimizer(path).result()


def test_adapters_of_a_bfloat16_model_are_float32(tmp_path: Path) -> None:
    """In bfloat16 a step of 1e-4 would vanish in a weight of 0.3."""
    s = service(torch.bfloat16)
    c = s.create_lora_training_client("tiny", 4, seed=0)
    dtypes = {"lora_" in name: p.dtype for name, p in c.model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert c.model.head.dtype == torch.float32 and c.get_info().dtype == "torch.bfloat16"
    before = tensors(c)
    for _ in range(2):
        c.forward_backward(DATA, "cross_entropy").result()
        c.optim_step(AdamParams(learning_rate=1e-4)).result()
    changed = [(x - before[name]).abs().max() for name, x in tensors(c).items() if "lora_" in name]
    assert all(0 < d < 1e-3 for d in changed)
    c.save_weights_and_get_sampling_client().sample(ModelInput.from_ints([1]), 1, SamplingParams(max_tokens=2)).result()
    path = c.save_state(tmp_path / "state").result().path
    assert same(tensors(c), tensors(s.create_training_client_from_state_with_optimizer(path)))


# Refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank: expected a whole number of at least 1, got 0"),
        ({"rank": -1}, "rank: expected a whole number of at least 1, got -1"),
        ({"rank": 1.5}, "rank: expected a whole number of at least 1, got 1.5"),
        ({"rank": True}, "rank: expected a whole number of at least 1, got True"),
        ({"alpha": 0}, "alpha: expected a finite number above 0, got 0"),
        ({"alpha": math.nan}, "alpha: expected a finite number above 0, got nan"),
        ({"alpha": None}, "alpha: expected a finite number above 0, got None"),
        ({"seed": -1}, "seed: expected a whole number in"),
        ({"seed": 0.5}, "seed: expected a whole number in"),
        (
            {"train_mlp": False, "train_attn": False, "train_unembed": False},
            "At least one of train_mlp, train_attn, or train_unembed must be True.",
        ),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(LossInputError) as caught:
        client(**options)
    assert text in str(caught.value)


class Plain(nn.Module):
    """A model that names no layers for adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.unembed = nn.Embedding(31, 8), nn.Linear(8, 8), nn.Linear(8, 31, bias=False)

    @property
    def head(self) -> Tensor:
        return self.unembed.weight

    def forward(self, tokens: Tensor, lengths: Any) -> Tensor:
        hidden: Tensor = self.mix(self.embed(tokens))
        return hidden


class Named(Plain):
    lora_targets = {"mlp": ("mix",), "attn": ("embed",), "unembed": ("unembed",)}  # noqa: RUF012


def test_a_module_of_ones_own_says_which_layers_are_adapted() -> None:
    c = LocalServiceClient({"mine": Named}, device="cpu").create_lora_training_client(
        "mine", 2, train_attn=False, train_unembed=False
    )
    first, *_, last = train(c)
    assert last < first


class Dotted(Plain):
    lora_targets = {"unembed": ("unembed",), "mlp": ("first.mix",), "attn": ("second.mix", "third.mix")}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.ModuleDict({"mix": nn.Linear(8, 8)}) for _ in range(2))


def test_layers_of_one_name_are_told_apart_by_the_path() -> None:
    model = lora.adapt(Dotted(), rank=2, parts=["mlp"])
    assert {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad} == {"first.mix"}


@pytest.mark.parametrize(
    ("model", "parts", "text"),
    [
        (Plain, ("mlp",), "a model that names its layers for adapters, got a Plain without lora_targets"),
        (Named, ("attn",), "linear layers of part 'attn', got no linear layer 'embed'"),
        (Named, ("mlp", "unembed"), "a head with its adapter, got Named.head without"),
        (Dotted, ("attn",), "linear layers of part 'attn', got no linear layer 'third.mix'"),
        (Named, ("experts",), "linear layers of part 'experts', got none in lora_targets"),
    ],
    ids=str,
)
def test_a_module_that_would_not_be_adapted_as_asked_is_refused(model: Any, parts: Any, text: str) -> None:
    with pytest.raises(LossInputError) as caught:
        lora.adapt(model(), rank=2, parts=parts)
    assert text in str(caught.value)


def test_without_peft_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'lossfns\[lora\]'"):
        client()
    service().create_training_client("tiny").forward(DATA, "cross_entropy").result()
