"""Models that come with adapters: by every way in, a client starts as the model that was given."""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from test_hf import DATA, SIZE, alone, logprobs, shaken
from tiny import RATE
from tokenizers import Tokenizer, models
from torch import Tensor, nn

from lossfns import LossInputError, ModelInput, dpo
from lossfns.backend import Decoder, LocalReferenceClient, LocalServiceClient, LocalTrainingClient
from lossfns.backend.model import hf, lora

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")


def base(tied: bool = False) -> Any:
    torch.manual_seed(0)
    return shaken(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE, tie_word_embeddings=tied)))


@pytest.fixture(autouse=True)
def own_random_numbers() -> Iterator[None]:
    """Let peft draw the same adapters in every test."""
    with torch.random.fork_rng():
        yield


def low_rank(*layers: str, **options: Any) -> Any:
    return peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(layers), task_type="CAUSAL_LM", **options)


def adapted(config: Any, tied: bool = False) -> Any:
    """Return a PeftModel whose adapters change what the model computes."""
    return shaken_adapters(peft.get_peft_model(base(tied), config))


def shaken_adapters(model: Any) -> Any:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("lora_", "ia3_", "modules_to_save", "trainable_tokens_delta")):
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


def two() -> Any:
    model = adapted(low_rank("q_proj", "down_proj"))
    model.add_adapter("second", low_rank("q_proj", "o_proj"))
    model.base_model.set_adapter(["default", "second"])
    return shaken_adapters(model)


def merged() -> Any:
    model = adapted(low_rank("q_proj", "lm_head"))
    model.merge_adapter()
    return model


def off() -> Any:
    model = adapted(low_rank("q_proj", "lm_head")).get_base_model()
    for layer in lora.wrapped_layers(model):
        layer.enable_adapters(False)
    return model


def by_transformers() -> Any:
    model = base()
    model.add_adapter(low_rank("q_proj", "up_proj"))
    return shaken_adapters(model)


GIVEN: dict[str, Callable[[], Any]] = {
    "low rank": lambda: adapted(low_rank("q_proj", "v_proj", "down_proj")),
    "low rank on the head": lambda: adapted(low_rank("q_proj", "lm_head")),
    "low rank on a tied head": lambda: adapted(low_rank("q_proj", "lm_head"), tied=True),
    "low rank on a tied embedding": lambda: adapted(low_rank("embed_tokens", "q_proj"), tied=True),
    "low rank in a tied model": lambda: adapted(low_rank("q_proj"), tied=True),
    "rank-stabilised": lambda: adapted(low_rank("q_proj", use_rslora=True)),
    "weight-decomposed": lambda: adapted(low_rank("q_proj", "down_proj", use_dora=True)),
    "layers trained as a whole": lambda: adapted(low_rank("q_proj", modules_to_save=["norm", "up_proj"])),
    "IA3": lambda: adapted(
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    ),
    "two at once": two,
    "merged in place": merged,
    "switched off": off,
    "of transformers": by_transformers,
}


def inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def service(model: Any) -> LocalServiceClient:
    return LocalServiceClient({"given": lambda: hf.CausalLM(model)}, device="cpu")


def from_state(model: Any, folder: Path, name: str) -> LocalTrainingClient:
    """Save a client at its start, and start another one from the file."""
    s = service(model)
    path = s.create_lora_training_client("given", rank=2).save_state(folder / "start").result().path
    created: LocalTrainingClient = getattr(s, name)(path)
    return created


WAYS: dict[str, Callable[[Any, Path], LocalReferenceClient]] = {
    "LocalTrainingClient": lambda model, _: LocalTrainingClient(hf.CausalLM(model), device="cpu"),
    "LocalReferenceClient": lambda model, _: LocalReferenceClient(hf.CausalLM(model), device="cpu"),
    "lora.adapt": lambda model, _: LocalTrainingClient(
        lora.adapt(hf.CausalLM(model), rank=2, parts=["attn", "mlp", "unembed"]), device="cpu"
    ),
    "create_training_client": lambda model, _: service(model).create_training_client("given"),
    "create_training_client, lora_rank": lambda model, _: service(model).create_training_client("given", 2),
    "create_lora_training_client": lambda model, _: service(model).create_lora_training_client("given", rank=2),
    "create_reference_client": lambda model, _: service(model).create_reference_client("given"),
    "create_training_client_from_state": lambda model, folder: from_state(
        model, folder, "create_training_client_from_state"
    ),
    "create_training_client_from_state_with_optimizer": lambda model, folder: from_state(
        model, folder, "create_training_client_from_state_with_optimizer"
    ),
}


def starts_at_log_2(c: LocalTrainingClient, reference: LocalReferenceClient) -> bool:
    pairs = DATA[:4]
    outputs = reference.forward(pairs, "cross_entropy").result().loss_fn_outputs
    loss = dpo().bind(ref_logprobs=[out["logprobs"].to_torch() for out in outputs])
    start: float = c.forward_backward_custom(pairs, loss).result().metrics["loss:sum"]
    return math.isclose(start, math.log(2), abs_tol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["low rank", "low rank on a tied head", "layers trained as a whole"])
def test_a_given_adapter_is_part_of_the_start_and_of_the_reference(name: str, way: str, tmp_path: Path) -> None:
    check_start(name, way, tmp_path)


@pytest.mark.parametrize("name", GIVEN)
def test_every_kind_of_given_adapter_is_part_of_the_start(name: str, tmp_path: Path) -> None:
    check_start(name, "create_lora_training_client", tmp_path)


def check_start(name: str, way: str, folder: Path) -> None:
    given = GIVEN[name]()
    expected = [x.detach() for x in alone(inner(copy.deepcopy(given)))]
    c = WAYS[way](given, folder)
    for got, wanted in zip(logprobs(c), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=5e-5)
    if not isinstance(c, LocalTrainingClient):
        return
    if way == "LocalTrainingClient" and name in ("merged in place", "switched off"):
        with pytest.raises(LossInputError, match="a model in which all that computes them is frozen"):
            c.forward_backward(DATA, "cross_entropy").result()
        return
    copied = LocalReferenceClient(copy.deepcopy(c.model), device="cpu")
    assert starts_at_log_2(c, c.reference() if "lora" in way else copied)
    c.optim_step(RATE).result()
    assert not any(map(torch.equal, logprobs(c), expected))


def test_the_given_adapter_changes_what_the_model_computes() -> None:
    """Without this, the tests above would show nothing."""
    for name, build in GIVEN.items():
        same = [torch.allclose(a, b, atol=1e-2) for a, b in zip(alone(inner(build())), alone(base("tied" in name)))]
        assert all(same) == (name == "switched off"), name


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Iterator[tuple[Path, list[Tensor]]]:
    """A folder of an adapter without a tokenizer, whose base model lies in another folder, and its logprobs."""
    base().save_pretrained(tmp_path / "base")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(31)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(tmp_path / "base")
    library = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = shaken_adapters(peft.get_peft_model(library, low_rank("q_proj", modules_to_save=["norm"])))
    expected = [x.detach() for x in alone(inner(model))]
    model.save_pretrained(tmp_path / "adapter")
    yield tmp_path / "adapter", expected


def test_an_adapter_folder_is_loaded_with_its_effect(adapter_folder: tuple[Path, list[Tensor]]) -> None:
    folder, expected = adapter_folder
    s = LocalServiceClient({"given": lambda: hf.load(folder)}, device="cpu")
    clients: list[LocalReferenceClient] = [
        LocalTrainingClient(hf.load(folder)[0], device="cpu"),
        s.create_training_client(),
        s.create_lora_training_client(rank=2),
        s.create_reference_client(),
    ]
    for c in clients:
        for got, wanted in zip(logprobs(c), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=5e-5)
    adapted_client = clients[2]
    assert isinstance(adapted_client, LocalTrainingClient)
    assert starts_at_log_2(adapted_client, adapted_client.reference())
    assert adapted_client.get_tokenizer().eos_token_id == 2  # of the base model
    sampler = s.create_sampling_client(base_model="given")
    ids = DATA[0].model_input.to_ints()
    known = sampler.compute_logprobs(ModelInput.from_ints(ids)).result()[1:]
    targets = DATA[0].loss_fn_inputs["target_tokens"].to_torch()[:-1]
    assert targets.tolist() == ids[1:] and known == pytest.approx(expected[0][:-1].tolist(), abs=5e-5)


def test_a_merge_into_half_precision_would_round_the_adapter_away_and_is_refused() -> None:
    given = adapted(low_rank("q_proj")).to(torch.bfloat16)
    with pytest.raises(LossInputError, match=r"adapters on float32 weights.* got weights of torch\.bfloat16"):
        service(given).create_lora_training_client("given")


def test_adapters_that_no_weight_can_hold_are_refused_or_taken_as_they_are(tmp_path: Path) -> None:
    given = adapted(low_rank("q_proj", lora_bias=True))
    expected = alone(inner(copy.deepcopy(given)))
    with pytest.raises(LossInputError, match="adapters that can be merged into the weights, got Impossible to merge"):
        service(given).create_lora_training_client("given")
    for got, wanted in zip(logprobs(WAYS["LocalTrainingClient"](given, tmp_path)), expected, strict=True):
        torch.testing.assert_close(got, wanted.detach(), rtol=0, atol=5e-5)


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_a_tied_weight_that_a_merge_has_untied_is_saved_by_the_library(layer: str, tmp_path: Path) -> None:
    given = adapted(low_rank(layer), tied=True)
    expected = [x.detach() for x in alone(inner(copy.deepcopy(given)))]
    model = hf.CausalLM(given)
    lora.merge(model)
    model.model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    for got, wanted in zip(alone(loaded), expected, strict=True):
        torch.testing.assert_close(got.detach(), wanted, rtol=0, atol=5e-5)


def test_the_models_owner_keeps_the_adapters() -> None:
    model = hf.CausalLM(adapted(low_rank("q_proj")))
    s = LocalServiceClient({"given": lambda: model}, device="cpu")
    s.create_lora_training_client("given")
    assert lora.wrapped_layers(model)


def test_learned_prompts_are_refused_by_name() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=16)
    with pytest.raises(LossInputError, match="adapters that are layers of the model, got a PeftModelForCausalLM"):
        hf.CausalLM(peft.get_peft_model(base(), config))


# The reference


def test_a_reference_by_switching_off_adapters_that_were_trained_before_is_refused(tmp_path: Path) -> None:
    """Switched off, they would leave another policy than the one that the client starts from."""
    given = LocalTrainingClient(hf.CausalLM(adapted(low_rank("q_proj"))), device="cpu")
    with pytest.raises(LossInputError, match="reference: expected adapters that are zero at the start"):
        given.reference()
    s = LocalServiceClient({"tiny": lambda: hf.CausalLM(base())}, device="cpu")
    c = s.create_lora_training_client("tiny", rank=2)
    c.forward_backward(DATA, "cross_entropy")
    c.optim_step(RATE).result()
    path = c.save_state(tmp_path / "state").result().path
    afresh = s.create_training_client_from_state(path)
    with pytest.raises(LossInputError, match="reference: expected adapters that are zero at the start"):
        afresh.reference()
    assert starts_at_log_2(afresh, LocalReferenceClient(copy.deepcopy(afresh.model), device="cpu"))
    continued = s.create_training_client_from_state_with_optimizer(path)
    for got, wanted in zip(logprobs(continued.reference()), logprobs(s.create_reference_client()), strict=True):
        assert torch.equal(got, wanted)  # the policy from which the run that continues has started
    afresh.optim_step(RATE).result()
    path = afresh.save_state(tmp_path / "again").result().path
    with pytest.raises(LossInputError, match="reference: expected adapters that are zero at the start"):
        s.create_training_client_from_state_with_optimizer(path).reference()


# Frozen parts


def test_layers_that_are_frozen_get_no_adapters_and_stay_as_they_are(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = Decoder(vocab_size=31, dim=8, layers=2, heads=2, kv_heads=1, hidden=12)
        model.layers[0].requires_grad_(False)
        return model

    s = LocalServiceClient({"frozen": build}, device="cpu")
    c = s.create_lora_training_client("frozen", rank=2, seed=0)
    names = [name for name, module in c.model.named_modules() if hasattr(module, "lora_A")]
    assert names and not any(name.startswith("layers.0.") for name in names)
    c.forward_backward(DATA, "cross_entropy")
    c.optim_step(RATE).result()
    path = c.save_state(tmp_path / "state").result().path
    restored = s.create_training_client_from_state(path)
    for got, wanted in zip(logprobs(restored), logprobs(c), strict=True):
        assert torch.equal(got, wanted)
    full = s.create_training_client("frozen")
    before = [p.clone() for p in full.model.layers[0].parameters()]  # type: ignore[index, union-attr]
    full.forward_backward(DATA, "cross_entropy")
    full.optim_step(RATE).result()
    assert all(map(torch.equal, before, full.model.layers[0].parameters()))  # type: ignore[index, union-attr]


def test_a_part_that_is_frozen_as_a_whole_is_refused_by_name() -> None:
    model = hf.CausalLM(base())
    for layer in model.model.model.layers:
        layer.mlp.requires_grad_(False)
    with pytest.raises(LossInputError, match="a layer of part 'mlp' that is not frozen"):
        lora.adapt(model, rank=2, parts=["attn", "mlp"])
    lora.adapt(model, rank=2, parts=["attn"])


def test_a_frozen_base_model_is_adapted_like_any_other() -> None:
    model = hf.CausalLM(base()).requires_grad_(False)
    lora.adapt(model, rank=2, parts=["attn", "mlp", "unembed"])
    assert len(lora.adapted_layers(model)) == 15
