"""``lossfns train --model`` end to end, on a Llama of a few thousand parameters with adapters."""

import contextlib
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_tokenizers import CHATML, byte_pairs

from lossfns.backend import ByteTokenizer, LocalTrainingClient
from lossfns.backend.model import hf
from lossfns.cli import main
from lossfns.train import measures, sample_command, tasks
from lossfns.train.examples import Demonstration, Problem, demonstration
from lossfns.train.render import Renderer

CHAT = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]
ROWS: dict[str, dict[str, Any]] = {
    "sft": {"messages": CHAT},
    "dpo": {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "5"}]},
    "kto": {"prompt": CHAT[:1], "completion": CHAT[1:], "label": True},
    "grpo": {"prompt": CHAT[:1], "answer": "4"},
}


def test_an_exported_model_starts_where_its_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bits per byte count the bytes of the text alone, whatever the tokens are."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+2=", "completion": f"{i + 2} é"}) + "\n" for i in range(20)))
    given = ["--data", str(data), "--steps", "1", "--batch", "2", "--out"]
    assert main(["train", "sft", *given, str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("lossfns: DIR: expected a new or empty folder")
    told: list[str] = []
    monkeypatch.setattr("lossfns.train.export_command.status", lambda: contextlib.nullcontext(told.append))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "model")]) == 0
    assert torch.get_num_threads() == 1  # two threads took four times the CPU time on a busy machine
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    assert told == ["loading the model", f"reading {checkpoint}", f"writing {tmp_path}/model"]
    assert main(["train", "sft", "--model", str(tmp_path / "model"), *given, str(tmp_path / "next")]) == 0
    assert "Loading weights" not in capsys.readouterr().err  # no bar where no terminal shows it
    ended, began = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("run", "next"))
    assert began["bits_per_byte"]["before"] == pytest.approx(ended["bits_per_byte"]["after"], rel=1e-5)
    adapted = ["--model", str(tmp_path / "model"), "--lora", "2", *given, str(tmp_path / "adapted")]
    assert main(["train", "sft", *adapted, "--eval-examples", "1"]) == 0
    assert "measuring on held-out examples: 1 of 2, as --eval-examples says" in capsys.readouterr().err
    capsys.readouterr()
    assert main(["export", str(tmp_path / "adapted"), str(tmp_path / "adapters")]) == 0
    assert f"base model  {tmp_path}/model, only on this machine; --merge writes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "--resume", str(tmp_path / "run"), "--steps", "3"])
    assert f"--init {tmp_path}/run/checkpoint.safetensors" in capsys.readouterr().err


def test_a_model_with_adapters_is_trained_measured_and_sampled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps of each method. The measurement is per token and per byte, and the reference is the model itself."""
    tokenizer = byte_pairs(CHATML)
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16, "intermediate_size": 24}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **sizes)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for loss, row in ROWS.items():
        rows = [json.loads(json.dumps(row).replace("2+2", f"{i}+2")) for i in range(8)]
        rows = [each | {"label": i % 2 == 0} if "label" in each else each for i, each in enumerate(rows)]
        (tmp_path / f"{loss}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        run = tmp_path / f"run-{loss}"
        options = ["--model", str(tmp_path / "model"), "--lora", "2", "--steps", "2", "--batch", "2", "--lr", "0.01"]
        options += ["--reward", "regex:.", "--max-tokens", "4", "--group", "2"] if loss == "grpo" else []
        assert main(["train", loss, *options, "--data", str(tmp_path / f"{loss}.jsonl"), "--out", str(run)]) == 0, loss
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["phase"] for row in metrics] == [loss, loss], loss  # a pretrained model needs no supervised start
        result = json.loads((run / "result.json").read_text())
        if loss == "sft":
            ratio = [result["nll"][when] / result["bits_per_byte"][when] for when in ("before", "after")]
            assert ratio[0] == pytest.approx(ratio[1]) and result["nll"]["after"] < result["nll"]["before"]
        if loss == "dpo":
            assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        sample = ["sample", str(run), "3+2", "--max-tokens", "3", "--temperature", "0"]
        shown = []
        for _ in range(2):
            capsys.readouterr()
            assert main(sample) == 0, loss
            shown.append(capsys.readouterr().out)
        assert shown[0] == shown[1] != "", loss


def test_a_chat_model_that_gets_texts_as_prompts_is_warned_about(tmp_path: Path) -> None:
    renderer, data = Renderer(byte_pairs(CHATML)), tmp_path / "rows.jsonl"
    for prompt, warned in (("{}+2=", True), ([{"role": "user", "content": "{}+2="}], False)):
        rows = [json.dumps({"prompt": prompt, "answer": "4"}).replace("{}", f"{i}") for i in range(4)]
        data.write_text("\n".join(rows))
        note = tasks.load(str(data), renderer, Problem).note
        assert ("\nwarning: the model has a chat template" in note) == warned
    data.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert "warning" not in tasks.load(str(data), renderer, Demonstration).note  # no prompt that a template could write


def test_a_sample_ends_with_the_context_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Llama with room for 30 tokens: "user: 5?" and "assistant: " take 20 of them, and the chat then fills it."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.LlamaConfig(vocab_size=257, max_position_embeddings=30, eos_token_id=256, **size)
    client = LocalTrainingClient(hf.CausalLM(transformers.LlamaForCausalLM(config)), tokenizer=ByteTokenizer())
    sampler, renderer = client.save_weights_and_get_sampling_client(), Renderer(ByteTokenizer())
    model = sample_command.Model(sampler, renderer, "chat")
    monkeypatch.setattr(sample_command, "opened", lambda *_: contextlib.nullcontext(model))
    assert main(["sample", "run", "5?", "--temperature", "0"]) == 0
    shown = capsys.readouterr()
    assert shown.out and shown.err == "a sample ends where the context of 30 tokens is full\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("5?\n6?\n/new\n7?\n"))
    assert main(["sample", "run", "--max-tokens", "8", "--temperature", "0"]) == 0
    assert "the chat has filled the context" in capsys.readouterr().err
    assert main(["sample", "run", "5" * 20]) == 2
    assert "PROMPT: expected less than 30 tokens, the context, got 38" in capsys.readouterr().err
    prompts = [demonstration([5] * 25, [6, 256])]
    assert len(measures.sample_texts(client, renderer, prompts)) == 1  # those that a run shows end there, too


def test_what_the_context_of_the_model_has_no_room_for_is_refused_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Room for 30 tokens: a long row, or a prompt of 20 tokens with samples of 11. Built-in texts are shorter there."""
    tokenizer, size = byte_pairs(CHATML), {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=30, num_attention_heads=1, **size
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert hf.sizes(tmp_path / "model") == (len(tokenizer), 30)
    data, run = tmp_path / "rows.jsonl", tmp_path / "run"
    given = ["--model", str(tmp_path / "model"), "--steps", "1", "--batch", "2", "--eval-examples", "2"]
    given += ["--out", str(run)]
    data.write_text("".join(json.dumps({"prompt": "a" * n, "completion": "b"}) + "\n" for n in (3, 28, 29)))
    assert main(["train", "sft", "--data", str(data), *given]) == 2 and not run.exists()
    assert "rows.jsonl:3: expected at most 30 tokens with its prompt, the context" in capsys.readouterr().err
    data.write_text("".join(json.dumps({"prompt": "a" * n, "answer": "b"}) + "\n" for n in (19, 20)))
    samples = ["--data", str(data), "--max-tokens", "11", "--reward", "regex:b"]
    assert main(["train", "grpo", *samples, *given]) == 2 and not run.exists()
    says = "--max-tokens: expected at most 10, what the longest prompt (20 tokens) leaves of the model's context"
    assert says in capsys.readouterr().err
    assert main(["train", "sft", *given]) == 0
