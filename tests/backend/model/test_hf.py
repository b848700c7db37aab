"""Packed models of ``transformers`` against the library's own forward pass of each sequence alone."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import texts
from tokenizers import Tokenizer, models
from torch import Tensor, nn

from lossfns import LossInputError, LossWarning, ModelInput, datum_from_tokens, reinforce, token_sum, with_entropy
from lossfns.backend import AdamParams, LocalReferenceClient, LocalServiceClient, LocalTrainingClient, SamplingParams
from lossfns.backend.model import hf, lora
from lossfns.backend.model.prefixes import share_prefixes

COMMON: dict[str, Any] = {"vocab_size": 31, "max_position_embeddings": 512}
SIZE: dict[str, Any] = {
    **COMMON,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE)),
    "llama, tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE, tie_word_embeddings=True)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZE)),  # biases
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZE, head_dim=8)),  # norms of q and k
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZE, sliding_window=3)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(  # two softcaps, a window in every other layer, its own scale
        transformers.Gemma2Config(
            **SIZE,
            head_dim=4,
            sliding_window=3,
            query_pre_attn_scalar=9,
            attn_logit_softcapping=1.0,
            final_logit_softcapping=2.0,
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(  # learned positions
        transformers.GPT2Config(
            vocab_size=31, n_positions=512, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, **NO_DROPOUT
        )
    ),
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**SIZE)),  # a bias in the head
    "granite": lambda: transformers.GraniteForCausalLM(  # scaled logits
        transformers.GraniteConfig(**SIZE, logits_scaling=0.25, attention_multiplier=0.7, residual_multiplier=0.5)
    ),
    "cohere": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**SIZE, logit_scale=3.0)),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZE, num_local_experts=3)),
}

PREFIX = [Random(1).randrange(31) for _ in range(17)]  # two datums have it in common, so it is computed once
DATA = texts(Random(0), count=5, longest=12) + [
    datum_from_tokens([*PREFIX, *end], prompt_length=17) for end in ([3, 5], [4, 1, 2])
]


def own(name: str) -> Any:
    """Return the library's model, the same at every call, with weights large enough for all parts to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shaken(MODELS[name]())


def shaken(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() > 1 else 0.1))
    model.set_attn_implementation("eager")
    return model.eval()


def client(name: str, **options: Any) -> LocalTrainingClient:
    return LocalTrainingClient(hf.CausalLM(own(name)), device="cpu", **options)


def rows(datum: Any) -> tuple[Tensor, Tensor, Tensor]:
    fields = datum.loss_fn_inputs
    ids = torch.tensor(datum.model_input.to_ints())
    return ids, fields["target_tokens"].to_torch().long(), fields["weights"].to_torch()


def alone(model: Any) -> list[Tensor]:
    """Return the logprobs of ``DATA`` by the library's own forward pass, one sequence at a time."""
    each = []
    for ids, targets, _ in map(rows, DATA):
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        each.append(logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0])
    return each


def logprobs(c: LocalReferenceClient) -> list[Tensor]:
    return [o["logprobs"].to_torch() for o in c.forward(DATA, "cross_entropy").result().loss_fn_outputs]


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).float()


def relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# Logprobs and gradients


@pytest.mark.parametrize("name", MODELS)
def test_packed_sequences_equal_the_librarys_own_forward(name: str) -> None:
    c, reference = client(name), own(name)
    expected = alone(reference)
    for got, lp in zip(logprobs(c), expected):
        torch.testing.assert_close(got, lp.detach(), rtol=0, atol=1e-5)
    c.forward_backward(DATA, "cross_entropy").result()
    torch.stack([-(rows(d)[2] * lp).sum() for d, lp in zip(DATA, expected)]).sum().backward()
    assert relative_difference(gradient(c.model), gradient(reference)) < 1e-5


@pytest.mark.parametrize("name", ["llama, tied", "gemma2", "gpt2"])
def test_in_bfloat16(name: str) -> None:
    c, reference = client(name, dtype=torch.bfloat16), own(name)
    for got, lp in zip(logprobs(c), alone(reference)):
        assert got.dtype == torch.float32
        assert (got - lp.detach()).abs().mean() < 0.1
    c.forward_backward(DATA, "cross_entropy").result()
    torch.stack([-(rows(d)[2] * lp).sum() for d, lp in zip(DATA, alone(reference))]).sum().backward()
    assert relative_difference(gradient(c.model), gradient(reference)) < 0.1


def test_rotary_frequencies_stay_in_float32() -> None:
    """In bfloat16 they would have three digits: at position 1000 an angle could be wrong by 4."""
    model = hf.CausalLM(own("llama"))
    before = model.model.model.rotary_emb.inv_freq.clone()
    model = copy.deepcopy(model).to("cpu", torch.bfloat16)
    assert torch.equal(model.model.model.rotary_emb.inv_freq, before)
    assert model.head.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_shared_prefix_changes_no_hidden_state_and_no_gradient(name: str) -> None:
    model = hf.CausalLM(own(name))
    prefix, a, b = torch.arange(5), torch.arange(7, 9), torch.arange(11, 17)
    shared = model(torch.cat((prefix, a, b)), [5, 2, 6], [None, 4, 4])
    shared[5:].square().sum().backward()
    one = gradient(model)
    model.zero_grad()
    separate = model(torch.cat((prefix, a, prefix, b)), [7, 11])
    torch.testing.assert_close(shared, torch.cat((separate[:7], separate[12:])), rtol=0, atol=1e-5)
    torch.cat((separate[5:7], separate[12:])).square().sum().backward()
    assert relative_difference(one, gradient(model)) < 1e-5


def test_trees_of_sequences_have_the_hidden_states_and_gradients_of_sequences_alone() -> None:
    """Three turns of 8 tokens, with 3 answers of 1 to 3 tokens on each; one is continued, some from its middle.

    With rotary and learned positions, windows and softcaps. Norms of the library round to float32 in any dtype, so
    float64 is checked with PyTorch's.
    """
    draw, talk, batch = np.random.default_rng(0), np.zeros(0, int), []
    for _ in range(3):
        talk = np.append(talk, draw.integers(0, 31, 8))
        batch += [np.append(talk, draw.integers(0, 31, length)) for length in (1, 2, 3, 3)]
        talk = batch[-1][: draw.integers(len(talk) + 1, len(batch[-1]) + 1)]
    tokens, shared = np.concatenate(batch), share_prefixes(batch, min_length=2)
    assert len(shared.order) < len(tokens) / 2 and len(set(shared.previous)) >= 4
    packed, inverse = torch.from_numpy(tokens[shared.order]), torch.from_numpy(shared.inverse)
    direction = torch.randn(len(tokens), 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name, dtype in [
        *((name, torch.float32) for name in ("llama", "mistral", "gemma2", "gpt2")),
        ("llama", torch.float64),
    ]:
        model = hf.CausalLM(own(name)).to(dtype)
        if dtype == torch.float64:
            with_norms_of_pytorch(model)
        alone = model(torch.from_numpy(tokens), list(map(len, batch)))
        tree = model(packed, shared.lengths, shared.previous)[inverse]
        one, other = (
            torch.autograd.grad((x.double() * direction).sum(), list(model.parameters()), allow_unused=True)
            for x in (tree, alone)
        )
        one, other = (torch.cat([x.flatten() for x in each if x is not None]) for each in (one, other))
        values, gradients = (1e-5, 1e-4) if dtype == torch.float32 else (1e-12, 1e-10)
        assert (tree - alone).abs().max() < values * alone.abs().max(), (name, dtype)
        assert relative_difference(one, other) < gradients, (name, dtype)


def with_norms_of_pytorch(model: nn.Module) -> None:
    for path, norm in [(path, x) for path, x in model.named_modules() if type(x).__name__ == "LlamaRMSNorm"]:
        own_norm = nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon, dtype=norm.weight.dtype)
        own_norm.weight = norm.weight
        model.set_submodule(path, own_norm)


def test_an_entropy_bonus_has_the_gradient_of_the_librarys_own_logits() -> None:
    """With a tied head, a bias, a softcap and scaled logits."""
    for name in ("llama, tied", "phi", "gemma2", "granite"):
        c, reference, total = client(name), own(name), torch.zeros(())
        for ids, targets, weights in map(rows, DATA):
            lp = reference(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
            h = -(lp.exp() * lp).sum(-1)
            total = total + (weights * (-lp.gather(1, targets[:, None])[:, 0] - 0.3 * h)).sum()
        total.backward()
        loss = with_entropy(reinforce(weigh=token_sum), 0.3).bind(advantages=[1.0] * len(DATA))
        metrics = c.forward_backward_custom(DATA, loss).result().metrics
        assert metrics["loss:sum"] == pytest.approx(total.item(), rel=1e-5), name
        assert relative_difference(gradient(c.model), gradient(reference)) < 1e-5, name


def test_a_bias_of_the_head_that_is_not_finite_is_refused_by_clients() -> None:
    model = hf.CausalLM(own("phi"))
    with torch.no_grad():
        model.head_bias[3] = -torch.inf
    with pytest.raises(LossInputError, match="model: expected finite numbers in the head_bias of CausalLM"):
        LocalTrainingClient(model, device="cpu")


def test_heads_are_what_the_library_has() -> None:
    tied, untied = hf.CausalLM(own("llama, tied")), hf.CausalLM(own("llama"))
    assert tied.head is tied.model.model.embed_tokens.weight
    assert untied.head is untied.model.lm_head.weight is not untied.model.model.embed_tokens.weight
    assert hf.CausalLM(own("phi")).head_bias.abs().min() > 0 and tied.head_bias is None
    assert hf.CausalLM(own("gemma2")).head_softcap == 2.0 and tied.head_softcap is None
    assert [hf.CausalLM(own(name)).head_temperature for name in ("granite", "cohere", "llama")] == [0.25, 1 / 3, 1.0]


# Checkpointing


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_checkpointing_runs_each_layer_again_for_the_same_gradient(name: str) -> None:
    c = client(name)
    runs: list[nn.Module] = []
    for layer in c.model.modules():
        if type(layer).__name__.endswith("MLP"):
            layer.register_forward_pre_hook(lambda module, _: runs.append(module))
    found = []
    for on in (False, True, False):
        c.model.checkpointing = on  # type: ignore[assignment]
        assert c.model.checkpointing is on
        for _ in range(2):  # the first call may run more, to measure memory
            runs.clear()
            c.model.zero_grad()
            c.forward_backward(DATA, "cross_entropy").result()
        found.append((len(runs), gradient(c.model)))
    (once, expected), (twice, same), (again, after) = found
    assert once == again == 2 and twice == 4
    assert torch.equal(same, expected) and torch.equal(after, expected)


def test_a_copy_of_a_checkpointing_model_runs_its_own_weights() -> None:
    model = hf.CausalLM(own("llama"))
    model.checkpointing = True
    other = copy.deepcopy(model)
    assert other.checkpointing
    tokens = torch.arange(5)
    before = other(tokens, [5])
    with torch.no_grad():
        model.model.model.layers[0].mlp.up_proj.weight.zero_()
    assert torch.equal(other(tokens, [5]), before) and not torch.equal(model(tokens, [5]), before)


def test_checkpointing_of_a_model_without_layers_to_run_again_is_refused() -> None:
    sizes: dict[str, Any] = {"vocab_size": 31, "n_positions": 32, "n_embd": 16, "dff": 24, "n_layer": 1, "n_head": 2}
    sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
    model = hf.CausalLM(shaken(transformers.CTRLLMHeadModel(transformers.CTRLConfig(**sizes))))
    model.checkpointing = False
    assert model.checkpointing is False
    with pytest.raises(LossInputError, match="layers to run again, got CTRLLMHeadModel"):
        model.checkpointing = True


# Adapters


def adapted(name: str, rank: int = 2) -> LocalTrainingClient:
    service = LocalServiceClient({name: lambda: hf.CausalLM(own(name))}, device="cpu")
    return service.create_lora_training_client(name, rank, seed=0)


def step(c: LocalTrainingClient) -> None:
    c.forward_backward(DATA, "cross_entropy").result()
    c.optim_step(AdamParams(learning_rate=0.05)).result()


@pytest.mark.parametrize("name", ["llama, tied", "gpt2"])
def test_adapters_are_a_change_of_weights_and_off_they_are_none(name: str) -> None:
    c, merged = adapted(name), own(name)
    base = [lp.detach() for lp in alone(merged)]
    for _ in range(2):
        step(c)
    for got, lp in zip(logprobs(c.reference()), base):
        torch.testing.assert_close(got, lp, rtol=0, atol=1e-5)
    assert relative_difference(torch.cat(logprobs(c)), torch.cat(base)) > 0.01

    untied = copy.deepcopy(merged)
    head = untied.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    count = 0
    with torch.no_grad():
        for path, module in c.model.named_modules():
            if hasattr(module, "lora_A"):
                delta = 16.0 * module.lora_B["default"].weight @ module.lora_A["default"].weight  # type: ignore[index, union-attr]
                weight = untied.get_submodule(path.removeprefix("model.")).weight
                weight += delta if delta.shape == weight.shape and "c_" not in path else delta.T
                count += 1
    assert count == {"llama, tied": 2 * 7 + 1, "gpt2": 2 * 4 + 1}[name]
    for got, lp in zip(logprobs(c), alone(untied)):
        torch.testing.assert_close(got, lp.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("part", "layers"),
    [("attn", {"q_proj", "k_proj", "v_proj", "o_proj"}), ("mlp", {"gate_proj", "up_proj", "down_proj"})],
)
def test_parts_are_named(part: str, layers: set[str]) -> None:
    names = hf.CausalLM(own("llama")).lora_targets[part]
    assert {name.rpartition(".")[2] for name in names} == layers and len(names) == 2 * len(layers)


def test_layers_of_one_name_are_told_apart() -> None:
    """GPT-2 has a c_proj in its attention and another in its MLP."""
    model = hf.CausalLM(own("gpt2"))
    lora.adapt(model, rank=2, parts=["attn"])
    names = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"model.transformer.h.{i}.attn.{layer}" for i in (0, 1) for layer in ("c_attn", "c_proj")}


def test_adapters_train_with_checkpointing_as_without() -> None:
    one, other = adapted("llama, tied"), adapted("llama, tied")
    other.model.checkpointing = True  # type: ignore[assignment]
    for c in (one, other):
        step(c)
        c.forward_backward(DATA, "cross_entropy").result()
    assert torch.equal(gradient(one.model), gradient(other.model))


# Checkpoints


def test_a_state_restores_model_and_adapters(tmp_path: Path) -> None:
    name = "gemma2"
    service = LocalServiceClient({name: lambda: hf.CausalLM(own(name))}, device="cpu")
    c = service.create_lora_training_client(name, 2, seed=0)
    step(c)
    path = c.save_state(tmp_path / "state").result().path
    restored = service.create_training_client_from_state_with_optimizer(path)
    step(c), step(restored)
    assert all(map(torch.equal, logprobs(c), logprobs(restored)))


def test_a_state_of_a_model_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    path = client("mistral").save_state(tmp_path / "state").result().path
    wider = transformers.MistralForCausalLM(transformers.MistralConfig(**SIZE, sliding_window=4))
    with pytest.raises(LossInputError, match="sliding_window is 3 in place of 4"):
        LocalTrainingClient(hf.CausalLM(wider), device="cpu").load_state(path).result()
    with pytest.raises(LossInputError, match="architecture is MistralForCausalLM in place of LlamaForCausalLM"):
        client("llama").load_state(path).result()


# Sampling


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "phi", "cohere"])
def test_samples_are_drawn_from_the_packed_distribution(name: str) -> None:
    """With prompts of several lengths, each sampled logprob is that of one pass over the whole sequence."""
    sampler = client(name).save_weights_and_get_sampling_client()
    prompts = [[3, 5], [7, 1, 4, 9, 2, 6], [8], [3, 5]]
    params = SamplingParams(max_tokens=7, seed=0)
    responses = sampler.sample_batch([ModelInput.from_ints(p) for p in prompts], 2, params).result()
    for prompt, response in zip(prompts, responses):
        for sequence in response.sequences:
            full = ModelInput.from_ints([*prompt, *sequence.tokens])
            read = sampler.compute_logprobs(full).result()[len(prompt) :]
            assert sequence.logprobs == pytest.approx(read, abs=1e-5)


def test_greedy_samples_are_the_librarys() -> None:
    reference = own("gemma2")
    sampler = client("gemma2").save_weights_and_get_sampling_client()
    drawn = sampler.sample(ModelInput.from_ints([3, 5, 7]), 1, SamplingParams(max_tokens=9, temperature=0)).result()
    ids = torch.tensor([[3, 5, 7]])
    for _ in range(9):
        ids = torch.cat((ids, reference(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert drawn.sequences[0].tokens == ids[0, 3:].tolist()


# Loading


def test_load_reads_a_folder(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(31)}, unk_token="w0"))
    reference = own("llama")
    with torch.no_grad():
        for p in reference.parameters():
            p.copy_(p.bfloat16())
    copy.deepcopy(reference).to(torch.bfloat16).save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(tmp_path)
    model, tokenizer = hf.load(tmp_path)
    assert model.head.dtype == torch.bfloat16 and tokenizer.eos_token_id == 2
    for dtype in (torch.float32, torch.float64):
        model, _ = hf.load(str(tmp_path), dtype=dtype)
        assert model.head.dtype == dtype
    for got, lp in zip(logprobs(LocalTrainingClient(model, device="cpu")), alone(reference)):
        torch.testing.assert_close(got, lp.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["nothing", "nothing.gguf"])
def test_load_from_a_missing_source_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(LossInputError, match=f"source: expected a folder, a GGUF file .*{name}"):
        hf.load(tmp_path / name)


def test_a_folder_whose_weights_are_not_whole_is_refused(tmp_path: Path) -> None:
    """transformers draws missing weights at random."""
    file = tmp_path / "model.safetensors"
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(31)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(tmp_path)
    own("llama").save_pretrained(tmp_path)
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(LossInputError, match=r"source: expected a model with all .* without model\.norm\.weight\."):
        hf.load(tmp_path)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(LossInputError, match="source: expected a folder, a GGUF file"):
        hf.load(tmp_path)


def test_without_transformers_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'lossfns\[hf\]'"):
        hf.load("anything")
    with pytest.raises(ImportError, match=r"pip install 'lossfns\[hf\]'"):
        hf.CausalLM(nn.Linear(2, 2))


# Refusals


def mamba() -> Any:
    config = transformers.MambaConfig(**COMMON, hidden_size=16, num_hidden_layers=2, state_size=4)
    return transformers.MambaForCausalLM(config)


def recurrent_gemma() -> Any:
    config = transformers.RecurrentGemmaConfig(**SIZE, attention_window_size=8, block_types=["recurrent", "attention"])
    return transformers.RecurrentGemmaForCausalLM(config)


def lfm2() -> Any:
    """A model with short convolutions, whose effect is small next to the rounding of bfloat16."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.Lfm2Config(**SIZE, layer_types=["conv", "full_attention"])
        return transformers.Lfm2ForCausalLM(config).to(torch.bfloat16)


def llama4() -> Any:
    config = transformers.Llama4TextConfig(**SIZE, intermediate_size_mlp=24, num_local_experts=2, head_dim=4)
    return transformers.Llama4ForCausalLM(config)


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(**SIZE, head_dim=4, num_local_experts=2, num_experts_per_tok=1)
    return transformers.GptOssForCausalLM(config)


def t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=31, **sizes))


def bloom() -> Any:
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=31, hidden_size=16, n_layer=2, n_head=4))


def gptj() -> Any:
    """A model whose own attention masks by positions. In a batch with shared prefixes they are ambiguous."""
    return transformers.GPTJForCausalLM(
        transformers.GPTJConfig(vocab_size=31, n_embd=16, n_layer=2, n_head=4, rotary_dim=4)
    )


def bidirectional() -> Any:
    config = transformers.Gemma3TextConfig(**SIZE, head_dim=4, use_bidirectional_attention=True)
    return transformers.Gemma3ForCausalLM(config)


def electra() -> Any:
    """A model with another layer between the last hidden state and the head."""
    sizes = {"embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.ElectraForCausalLM(transformers.ElectraConfig(vocab_size=31, is_decoder=True, **sizes))


def stablelm() -> Any:
    return transformers.StableLmForCausalLM(transformers.StableLmConfig(**SIZE))


def scaled() -> Any:
    """A model whose head has a part that is not known here."""
    model = own("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, z: 1.1 * z)
    return model


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (mamba, "a MambaForCausalLM with the same logits for packed sequences as alone"),
        (recurrent_gemma, "a RecurrentGemmaForCausalLM with the same logits for packed sequences"),
        (
            lfm2,
            "a Lfm2ForCausalLM with the same logits for packed sequences as alone, got logits that another sequence",
        ),
        (bloom, "a BloomForCausalLM with the same logits for packed sequences"),
        (gptj, "a GPTJForCausalLM with the same logits for packed sequences"),
        (bidirectional, "got a mask of its own"),
        (electra, "mat1 and mat2 shapes cannot be multiplied (9x16 and 8x31)"),
        (stablelm, "StableLm"),
        (
            scaled,
            "a LlamaForCausalLM with the same logits for packed sequences as alone, got logits that differ by 9.1%",
        ),
        (gpt_oss, "got GptOssAttention with s_aux"),
        (llama4, "got Llama4TextAttention, which sees 8192 tokens by its mask, all by its window"),
        (t5, "a causal language model of transformers, got a T5ForConditionalGeneration"),
        (lambda: transformers.LlamaModel(transformers.LlamaConfig(**SIZE)), "got a LlamaModel"),
        (lambda: nn.Linear(2, 2), "got a Linear"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_models_that_would_be_computed_wrongly_are_refused(build: Callable[[], Any], text: str) -> None:
    model = build()
    with pytest.raises(LossInputError) as caught:
        hf.CausalLM(shaken(model) if hasattr(model, "config") and build is not scaled else model)
    assert text in str(caught.value)


def test_a_sequence_longer_than_the_context_is_refused() -> None:
    c = client("gpt2")
    assert c.model.context_length == 512
    with pytest.raises(LossInputError, match="at most 512 tokens, the context of the model, got 513"):
        c.model(torch.ones(513, dtype=torch.long), [40, 473], [None, 39])
    sampler = c.save_weights_and_get_sampling_client()
    read = sampler.compute_logprobs
    assert len(read(ModelInput.from_ints([1] * 513)).result()) == 513  # the last token is only predicted
    with pytest.raises(LossInputError, match="at most 512 tokens, the context of the model, got 513"):
        read(ModelInput.from_ints([1] * 514)).result()
    with pytest.raises(LossInputError, match=r"max_tokens: expected sequences of at most 512 tokens.*got 513"):
        sampler.sample(ModelInput.from_ints([1] * 500), 1, SamplingParams(max_tokens=13)).result()


def test_where_frequencies_depend_on_the_batch_sequences_stay_below() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    config = transformers.LlamaConfig(**SIZE, rope_parameters=rope)
    assert hf.CausalLM(transformers.LlamaForCausalLM(config)).context_length == 16


def test_dropout_is_refused() -> None:
    with pytest.warns(LossWarning, match=r"LlamaForCausalLM is trained without attention_dropout=0\.5"):
        model = hf.CausalLM(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE, attention_dropout=0.5)))
    model(torch.arange(4), [4])
    with pytest.raises(LossInputError, match=r"dropout of 0\.5 in training mode"):
        model.train()(torch.arange(4), [4])


# What a configuration asks for


@pytest.mark.parametrize(
    "build",
    [
        lambda **o: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZE, num_local_experts=3, **o)),
        lambda **o: transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(**SIZE, num_experts=3, num_experts_per_tok=2, **o)
        ),
        lambda **o: transformers.OlmoeForCausalLM(
            transformers.OlmoeConfig(**SIZE, num_experts=3, num_experts_per_tok=2, **o)
        ),
    ],
    ids=["mixtral", "qwen3 moe", "olmoe"],
)
def test_a_routers_auxiliary_loss_is_refused_by_name(build: Callable[..., Any]) -> None:
    """transformers adds it to the loss only if output_router_logits is set."""
    with pytest.raises(LossInputError) as caught:
        hf.CausalLM(build(output_router_logits=True, router_aux_loss_coef=0.5))
    assert "output_router_logits=True, which asks for the router's auxiliary loss" in str(caught.value)
    model = build(router_aux_loss_coef=0.5)
    hf.CausalLM(shaken(model))


def vision_language(kind: str) -> Any:
    text = SIZE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def test_a_model_that_reads_images_is_not_taken_for_a_text_model() -> None:
    with pytest.raises(LossInputError, match="a model of text alone, got a Qwen2VLForConditionalGeneration with pixel"):
        hf.CausalLM(vision_language("Qwen2VL"))


def test_a_text_model_of_a_family_that_also_reads_images_is_accepted() -> None:
    config = transformers.Gemma3TextConfig(**SIZE, head_dim=4)
    assert hf.CausalLM(shaken(transformers.Gemma3ForCausalLM(config))).context_length == 512


def test_dropout_and_noise_that_the_configuration_asks_for_are_named() -> None:
    """Heads that are not used do not matter: GPT-2's configuration also has summary_first_dropout."""
    config = transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2, attn_pdrop=0.0, embd_pdrop=0.0)
    with pytest.warns(LossWarning) as warned:
        hf.CausalLM(shaken(transformers.GPT2LMHeadModel(config)))
    (message,) = (str(w.message) for w in warned)
    assert "GPT2LMHeadModel is trained without resid_pdrop=0.1: models run in eval mode" in message
    moe = transformers.MixtralConfig(**SIZE, num_local_experts=3, router_jitter_noise=0.01)
    with pytest.warns(LossWarning, match=r"without router_jitter_noise=0\.01"):
        hf.CausalLM(shaken(transformers.MixtralForCausalLM(moe)))


@pytest.mark.parametrize("source", ["a\0b", "a\0b.gguf", ""])
def test_a_path_that_is_none_is_refused_by_load(source: str) -> None:
    with pytest.raises(LossInputError, match="source: expected a folder, a GGUF file"):
        hf.load(source)
