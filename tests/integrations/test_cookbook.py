"""Training entry points of ``tinker_cookbook``, unmodified, on a server of this process. They need no hub.

The tokenizer is in a folder that has the name of the model: one token for each byte, as the embedded model has it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tinker_cookbook", reason="needs tinker_cookbook")
from serving import served, tinker
from tinker_cookbook.preference import train_dpo
from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons
from tinker_cookbook.preference.preference_datasets import ComparisonBuilderFromJsonl
from tinker_cookbook.recipes.chat_sl import train as chat_sl
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lossfns.backend.client.reference import embedded_model
from lossfns.server.service import Service

# The cookbook's RL datums have logprob 0 and advantage 0 at the prompt, and no weights.
pytestmark = pytest.mark.filterwarnings("ignore:the mean .*log-ratio")

MODEL, RENDERER = "org/bytes", "role_colon"
SAME: dict[str, Any] = {"model_name": MODEL, "renderer_name": RENDERER, "lora_rank": 4, "max_steps": 3}


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server of the embedded model, under a name that is also the folder of its tokenizer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*letters, "<|eos|>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eos|>").save_pretrained(tmp_path / MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINKER_API_KEY", "tml-local")
    with served(Service({MODEL: embedded_model}, device="cpu")) as address:
        yield address


def written(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def said(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def metrics(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_chat_sl_learns_a_conversation(url: str) -> None:
    chats = [{"messages": said("user", f"What is {i}?") + said("assistant", "A number.")} for i in range(12)]
    path, sizes = written("chats.jsonl", chats), {"batch_size": 4, "eval_every": 0, "learning_rate": 1e-2}
    config = chat_sl.CLIConfig(dataset=path, base_url=url, log_path="sl", **SAME, **sizes)
    chat_sl.cli_main(config)
    losses = [row["train_mean_nll"] for row in metrics("sl")]
    assert len(losses) == 3 and losses[2] < losses[0]


def test_train_dpo_moves_apart_chosen_and_rejected(url: str) -> None:
    def comparison(i: int) -> dict[str, Any]:
        sides = {"completion_A": said("assistant", "A number."), "completion_B": said("assistant", "No.")}
        return {"comparison": {"prompt_conversation": said("user", f"What is {i}?"), **sides}, "label": "A"}

    path = written("pairs.jsonl", [comparison(i) for i in range(12)])
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=MODEL, renderer_name=RENDERER, max_length=256, batch_size=4
    )
    pairs = ComparisonBuilderFromJsonl(train_path=path)
    builder = DPODatasetBuilderFromComparisons(common_config=common, comparison_builder=pairs)
    sizes = {"learning_rate": 1e-2, "eval_every": 0, "recipe_name": "dpo"}
    train_dpo.main(train_dpo.Config(log_path="dpo", base_url=url, dataset_builder=builder, **SAME, **sizes))
    losses = [row["dpo_loss"] for row in metrics("dpo")]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[2] < losses[0]


def test_math_rl_trains_on_arithmetic_with_a_published_loss_and_is_refused_with_its_default(url: str) -> None:
    pytest.importorskip("math_verify", reason="needs tinker-cookbook[math-rl]")
    from tinker_cookbook.recipes.math_rl import train as math_rl

    sizes: dict[str, Any] = {"groups_per_batch": 3, "group_size": 4, "base_url": url, **SAME}
    for loss_fn in ("importance_sampling", "ppo", "cispo"):
        asyncio.run(math_rl.cli_main(math_rl.CLIConfig(log_path=loss_fn, loss_fn=loss_fn, num_substeps=2, **sizes)))
        assert [row["step"] for row in metrics(loss_fn)][:3] == [0, 1, 2], loss_fn
    with pytest.raises((tinker.RequestFailedError, tinker.APIStatusError), match="record_stability_info"):
        asyncio.run(math_rl.cli_main(math_rl.CLIConfig(log_path="default", **sizes)))
