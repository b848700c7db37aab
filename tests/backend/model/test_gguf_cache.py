"""GGUF files: what is read from them, and the cache of their conversions."""

import multiprocessing
import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from lossfns import LossInputError, ModelInput
from lossfns.backend import LocalTrainingClient, SamplingParams
from lossfns.backend.client.sampling import end_tokens
from lossfns.backend.model import gguf_cache, hf

TEMPLATE = "{% for m in messages %}<u>{{ m['content'] }}<e>{% endfor %}"


def write_gguf(path: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Write a small Llama with a byte-level vocabulary, and return its weights by their names in Hugging Face's."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), "llama")
    dim, hidden, heads, kv_heads = 16, 32, 2, 1
    letters = [*map(chr, range(33, 127)), "Ġ", "Ċ", "ab", "Ġa", "<u>", "<e>", "<end>"]
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(dim)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(dim // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(letters))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(letters) - 3) + [gguf.TokenType.CONTROL] * 3)
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_eos_token_id(letters.index("<end>"))
    writer.add_eot_token_id(letters.index("<e>"))
    writer.add_chat_template(TEMPLATE)

    shapes = {
        "token_embd": ("model.embed_tokens", (len(letters), dim)),
        "output": ("lm_head", (len(letters), dim)),
        "output_norm": ("model.norm", (dim,)),
        "blk.0.attn_norm": ("model.layers.0.input_layernorm", (dim,)),
        "blk.0.ffn_norm": ("model.layers.0.post_attention_layernorm", (dim,)),
        "blk.0.attn_v": ("model.layers.0.self_attn.v_proj", (dim // heads * kv_heads, dim)),
        "blk.0.attn_output": ("model.layers.0.self_attn.o_proj", (dim, dim)),
        "blk.0.attn_q": ("", (dim, dim)),  # rows in another order than Hugging Face's
        "blk.0.attn_k": ("", (dim // heads * kv_heads, dim)),
        "blk.0.ffn_gate": ("model.layers.0.mlp.gate_proj", (hidden, dim)),
        "blk.0.ffn_up": ("model.layers.0.mlp.up_proj", (hidden, dim)),
        "blk.0.ffn_down": ("model.layers.0.mlp.down_proj", (dim, hidden)),
    }
    weights = {}
    for name, (theirs, shape) in shapes.items():
        weight = (rng.standard_normal(shape) * 0.3).astype(np.float32)
        writer.add_tensor(f"{name}.weight", weight)
        weights[f"{theirs}.weight"] = weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lossfns" / "gguf"


def count_conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    seen, convert = [], gguf_cache.convert

    def counted(file: Path, folder: Path) -> None:
        seen.append(file)
        convert(file, folder)

    monkeypatch.setattr(gguf_cache, "convert", counted)
    return seen


def test_a_file_is_converted_once_and_comes_with_its_template_and_end_tokens(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, conversions = write_gguf(tmp_path / "m.gguf"), count_conversions(monkeypatch)
    models = [hf.load(tmp_path / "m.gguf") for _ in range(2)]
    assert len(conversions) == 1
    for model, tokenizer in models:
        weights = model.model.state_dict()
        for name, weight in written.items():
            if name != ".weight":
                assert np.array_equal(weights[name].numpy(), weight), name
        assert tokenizer.chat_template == TEMPLATE
        assert tokenizer.decode(tokenizer.encode("ab, a!")) == "ab, a!"
        ends = [tokenizer.convert_tokens_to_ids(end) for end in ("<end>", "<e>")]
        assert end_tokens(model, tokenizer) == sorted(ends)
        model.model.save_pretrained(tmp_path / "out")  # as any model: it is not quantised any more
    first, second = (model.model.state_dict() for model, _ in models)
    assert all(torch.equal(first[name], second[name]) for name in first)

    half, _ = hf.load(tmp_path / "m.gguf", dtype=torch.bfloat16)
    assert half.head.dtype == torch.bfloat16 and len(conversions) == 1
    client = LocalTrainingClient(*models[1][:1], tokenizer=models[1][1], device="cpu")
    sampler = client.save_weights_and_get_sampling_client()
    sampler.sample(ModelInput.from_ints([1, 2]), 1, SamplingParams(max_tokens=3)).result()


def test_only_what_was_written_is_trusted(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each damage leads to a new conversion that takes its place; other files, versions and copies have folders of
    their own or the same one."""
    file, conversions = tmp_path / "m.gguf", count_conversions(monkeypatch)
    write_gguf(file)
    folder = gguf_cache.converted(file)
    intact = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = bytearray(intact["model.safetensors"])
    weights[-1] ^= 1
    damages = {
        "a bit of the weights": lambda: (folder / "model.safetensors").write_bytes(weights),
        "cut short": lambda: os.truncate(folder / "model.safetensors", 100),
        "a file less": lambda: (folder / "config.json").unlink(),
        "a file more": lambda: (folder / "adapter_config.json").write_text("{}"),
        "no contents": lambda: (folder / "contents.json").unlink(),
        "contents of something else": lambda: (folder / "contents.json").write_text('{"source": {}, "sha256": {}}'),
        "contents that are no JSON": lambda: (folder / "contents.json").write_text("["),
        "contents of another form": lambda: (folder / "contents.json").write_text("[]"),
        "a file in its place": lambda: (shutil.rmtree(folder), folder.write_text("")),
    }
    for count, (damage, do) in enumerate(damages.items(), 2):
        do()
        assert gguf_cache.converted(file) == folder and len(conversions) == count, damage
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == intact, damage
        assert [path.name for path in cache.iterdir()] == [folder.name], f"{damage}: something is left over"

    shutil.copy(file, tmp_path / "n.gguf")
    assert gguf_cache.converted(tmp_path / "n.gguf") != folder  # of another name, which is a part of the folder's
    write_gguf(file, seed=1)
    assert gguf_cache.converted(file) != folder
    write_gguf(file)
    before = len(conversions)
    assert gguf_cache.converted(file) == folder and len(conversions) == before
    monkeypatch.setattr(gguf_cache, "version", lambda name: "0")
    assert gguf_cache.converted(file) != folder and len(conversions) == before + 1


def convert_at_once(
    file: str, barrier: "multiprocessing.synchronize.Barrier", answers: "multiprocessing.Queue"
) -> None:
    barrier.wait()
    answers.put(str(gguf_cache.converted(Path(file))))


def test_processes_that_convert_at_once_get_one_folder(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(3), context.Queue()
    children = [
        context.Process(target=convert_at_once, args=(str(tmp_path / "m.gguf"), barrier, answers)) for _ in range(3)
    ]
    for child in children:
        child.start()
    folders = {answers.get(timeout=120) for _ in children}
    for child in children:
        child.join()
    assert len(folders) == 1 and [path.name for path in cache.iterdir()] == [Path(folders.pop()).name]


def test_what_cannot_be_converted_is_refused_and_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in {"empty": b"", "text": b"not a model", "cut": b"GGUF\3\0\0\0\1\0\0\0"}.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(LossInputError, match=rf"source: expected a folder, a GGUF file .*{name}\.gguf"):
            hf.load(tmp_path / f"{name}.gguf")
        assert not list(cache.iterdir()), name
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(LossInputError, match=r"cache: expected a folder that can be written, .* Set XDG_CACHE_HOME"):
        hf.load(tmp_path / "m.gguf")


def test_the_cache_is_where_the_desktop_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    for value, folder in {
        "/x": "/x",
        "": "/home/u/.cache",
        "not/absolute": "/home/u/.cache",
    }.items():
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert str(gguf_cache.cache_folder()) == f"{folder}/lossfns", value
