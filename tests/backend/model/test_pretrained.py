"""Models that leave: written by a client, loaded by ``transformers`` and ``peft``, they give the same logprobs."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import SafetensorError
from test_given_adapters import adapted, base, low_rank, own_random_numbers, two  # noqa: F401
from test_hf import DATA, alone, logprobs
from tiny import RATE, byte_client, byte_texts
from tokenizers import Tokenizer, models
from torch import nn

from lossfns import LossInputError
from lossfns.backend import ByteTokenizer, Decoder, LocalTrainingClient
from lossfns.backend.model import hf, lora
from lossfns.backend.storage import checkpoint
from lossfns.cli import main

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

DECODER: dict[str, Any] = {"vocab_size": 31, "dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 24}
PARTS = ["attn", "mlp", "unembed"]

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.CausalLM(base()),
    "llama, tied": lambda: hf.CausalLM(base(tied=True)),
    "decoder": lambda: Decoder(**DECODER, tied=False, rope_theta=500.0),
    "decoder, tied": lambda: Decoder(**DECODER),
}


def trained(model: nn.Module, tokenizer: Any = None) -> LocalTrainingClient:
    client = LocalTrainingClient(model, tokenizer=tokenizer or ByteTokenizer(), device="cpu")
    for _ in range(2):
        client.forward_backward(DATA, "cross_entropy")
        client.optim_step(RATE).result()
    return client


def loaded(folder: Path, merge: bool) -> Any:
    """Load a folder with the libraries alone."""
    if (folder / "config.json").exists():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert not merge
    return peft.AutoPeftModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def distance(client: LocalTrainingClient, other: Any) -> float:
    """The largest difference of the logprobs of ``DATA``."""
    theirs = other if isinstance(other, LocalTrainingClient) else None
    others = logprobs(theirs) if theirs else [x.detach() for x in alone(other.eval())]
    return max(float((a - b).abs().max()) for a, b in zip(logprobs(client), others, strict=True))


@pytest.mark.skipif(os.name == "nt", reason="needs the modes of files")
def test_the_files_of_an_export_have_the_modes_of_the_umask(tmp_path: Path) -> None:
    """A server of another user can read them: safetensors alone would write 0600."""
    before = os.umask(0o027)
    try:
        client = trained(hf.CausalLM(base()))
        client.export(tmp_path / "whole").result()
        lora.adapt(client.model, rank=2, parts=PARTS)
        LocalTrainingClient(client.model, device="cpu").export(tmp_path / "adapters").result()
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"model.safetensors", "adapter_model.safetensors"}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


@pytest.mark.parametrize("name", MODELS)
def test_whatever_was_trained_is_loaded_elsewhere_with_the_same_logprobs(name: str, tmp_path: Path) -> None:
    """As a whole, as adapters on all layers and on the head, and merged; and it trains on from where it ended."""
    for adapters, merge in ((False, False), (True, False), (True, True)):
        model = MODELS[name]()
        start = LocalTrainingClient(copy.deepcopy(model), device="cpu")
        client = trained(lora.adapt(model, rank=2, parts=PARTS, seed=0) if adapters else model)
        assert distance(client, start) > 0.05
        case, folder = (adapters, merge), tmp_path / f"{adapters}-{merge}"
        assert client.export(folder, merge=merge).result().path == str(folder)
        assert distance(client, loaded(folder, merge)) < 1e-5, case
        again = LocalTrainingClient(hf.load(folder)[0], device="cpu")
        assert distance(client, again) < 1e-5, case
        metrics = [c.forward_backward(DATA, "cross_entropy").result().metrics["loss:sum"] for c in (client, again)]
        assert metrics[0] == pytest.approx(metrics[1], abs=1e-4), case
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def source(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a base model and its tokenizer."""
    base().to(dtype).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({chr(97 + i): i for i in range(31)}, "a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    client = LocalTrainingClient(MODELS["decoder"](), device="cpu")
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    with pytest.raises(LossInputError, match=r"path: expected a folder to write to, got .*No space left"):
        client.export(tmp_path / "out").result()
    assert not [*tmp_path.iterdir()]


def test_adapters_name_the_base_model_if_its_weights_are_those_of_its_source(tmp_path: Path) -> None:
    narrow = source(tmp_path / "narrow", torch.bfloat16)
    wide = source(tmp_path / "wide")
    for name, where, change, expected in (
        ("same", wide, 0.0, wide),
        ("changed", wide, 0.1, tmp_path / "changed" / "base"),
        ("read as float32", narrow, 0.0, narrow),
    ):
        model, tokenizer = hf.load(where, dtype=torch.float32)
        with torch.no_grad():
            model.model.model.norm.weight.add_(change)
        client = trained(lora.adapt(model, rank=2, parts=["attn"], seed=0), tokenizer)
        client.export(tmp_path / name).result()
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(expected), name
        assert (tmp_path / name / "base").exists() == (name == "changed"), name
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / name).encode("c") == [2], name
        assert name == "read as float32" or distance(client, loaded(tmp_path / name, False)) < 1e-5, name


def test_half_precision_leaves_as_it_is_and_is_merged_in_float32(tmp_path: Path) -> None:
    client = trained(lora.adapt(hf.CausalLM(base().bfloat16()), rank=2, parts=PARTS, seed=0))
    for merge, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        client.export(tmp_path / f"{merge}", merge=merge).result()
        other = loaded(tmp_path / f"{merge}", merge)
        assert other.get_input_embeddings().weight.dtype == dtype
        assert distance(client, other) < 0.1, merge


def test_save_pretrained_of_an_adapted_model_writes_the_adapter(tmp_path: Path) -> None:
    """The library's own, called on the model within the client."""
    for tied in (False, True):
        start = base(tied)
        client = trained(lora.adapt(hf.CausalLM(copy.deepcopy(start)), rank=2, parts=PARTS, seed=0))
        inner: Any = client.model.model
        inner.save_pretrained(tmp_path / f"{tied}")
        assert distance(client, peft.PeftModel.from_pretrained(start, tmp_path / f"{tied}")) < 1e-5, tied
        lora.merge(client.model)
        inner.save_pretrained(tmp_path / f"{tied}-merged")
        assert distance(client, loaded(tmp_path / f"{tied}-merged", True)) < 1e-5, tied


GIVEN: dict[str, Callable[[], Any]] = {
    "weight-decomposed": lambda: adapted(low_rank("q_proj", "down_proj", use_dora=True)),
    "layers trained as a whole": lambda: adapted(low_rank("q_proj", modules_to_save=["norm", "up_proj"])),
    "IA3": lambda: adapted(
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    ),
}


def test_adapters_that_came_with_the_model_leave_as_they_are_or_merged(tmp_path: Path) -> None:
    for name, build in (*GIVEN.items(), ("two", two)):
        client = trained(hf.CausalLM(build()))
        client.export(tmp_path / f"{name}-merged", merge=True).result()
        assert distance(client, loaded(tmp_path / f"{name}-merged", True)) < 1e-5, name
        if name == "two":
            with pytest.raises(LossInputError, match=r"one adapter in effect, .* got \['default', 'second'\]"):
                client.export(tmp_path / name).result()
            assert not (tmp_path / name).exists()
            continue
        client.export(tmp_path / name).result()
        assert distance(client, loaded(tmp_path / name, False)) < 1e-5, name


def test_what_cannot_be_written_is_refused_by_name_and_leaves_nothing(tmp_path: Path) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Parameter(torch.zeros(3, 2))

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    small = lambda **more: LocalTrainingClient(Decoder(**DECODER), device="cpu", **more)  # noqa: E731
    cases: list[tuple[LocalTrainingClient, Any, str]] = [
        (LocalTrainingClient(Other(), device="cpu"), tmp_path / "a", "a Decoder or a hf.CausalLM, got a Other"),
        (small(tokenizer=3), tmp_path / "a", "save_pretrained(folder), got a int"),
        (small(), tmp_path / "mine", "a new or empty folder, got"),
        (small(), tmp_path / "mine" / "file" / "x", "a folder to write to, got"),
        (small(), "", "the path of a file"),
    ]
    for client, path, message in cases:
        with pytest.raises(LossInputError) as error:
            client.export(path).result()
        assert message in str(error.value), message
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["mine", "mine/file"]


# The command


def test_the_command_exports_a_run_and_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, rows = str(tmp_path / "run"), tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}=", "completion": f"{i}"}) + "\n" for i in range(12)))
    assert main(["train", "sft", "--data", str(rows), "--steps", "2", "--batch", "2", "--out", run]) == 0
    assert main(["export", run, str(tmp_path / "whole")]) == 0
    assert f"--model {tmp_path / 'whole'}" in capsys.readouterr().out
    client = LocalTrainingClient(device="cpu")
    client.load_state(tmp_path / "run" / "checkpoint.safetensors").result()
    model, tokenizer = hf.load(tmp_path / "whole")
    other = LocalTrainingClient(model, device="cpu")
    text = "2+3=5 é"
    assert tokenizer.encode(text) == ByteTokenizer().encode(text) and tokenizer.eos_token_id == 256
    outputs = [c.forward(byte_texts(), "cross_entropy").result().loss_fn_outputs for c in (other, client)]
    for got, wanted in zip(*outputs, strict=True):
        torch.testing.assert_close(got["logprobs"].to_torch(), wanted["logprobs"].to_torch(), rtol=0, atol=1e-5)
    assert main(["export", run, str(tmp_path / "whole")]) == 2
    assert "a new or empty folder" in capsys.readouterr().err
    adapted_client = trained(lora.adapt(hf.load(source(tmp_path / "source"))[0], rank=2, parts=PARTS, seed=0))
    path = adapted_client.save_state(tmp_path / "state").result().path
    names = checkpoint.load(path)[0].keys()
    assert {"lm_head.weight", "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"} <= names
    assert set(base().state_dict()) <= names
    for merge in (False, True):
        folder = tmp_path / f"from-state-{merge}"
        assert main(["export", path, str(folder), *["--merge"][: int(merge)]]) == 0
        assert distance(adapted_client, loaded(folder, merge)) < 1e-5, merge
    (tmp_path / "source").rename(tmp_path / "moved")
    assert main(["export", path, str(tmp_path / "x")]) == 2
    assert f"'{tmp_path / 'source'}'" in capsys.readouterr().err
    assert main(["export", path, str(tmp_path / "x"), "--model", str(tmp_path / "moved")]) == 0
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "y")]) == 2
    own = byte_client().save_state(tmp_path / "own").result().path
    tensors, data = checkpoint.load(own)
    other_kind = checkpoint.save(tmp_path / "other", tensors, data | {"shape": None})
    assert main(["export", str(other_kind), str(tmp_path / "y")]) == 2
    assert "a checkpoint of a known model" in capsys.readouterr().err
