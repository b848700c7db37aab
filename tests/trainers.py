"""A tiny Llama, a tokenizer of words and arguments for one step of SGD, for the tests of other people's trainers."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 24
STEP: dict[str, Any] = {
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,  # no clipping
    "num_train_epochs": 1,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "seed": 0,
}


def llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,  # so that gradients are far from 0
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype)


@contextmanager
def quick_collection() -> Iterator[None]:
    """Keep what is alive already out of ``gc.collect``, which trainers call, and which takes most of a tiny run."""
    gc.freeze()
    yield
    gc.unfreeze()


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    fast = Tokenizer(models.WordLevel(words, unk_token="w3"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "w0", "bos_token": "w1", "eos_token": "w2", "unk_token": "w3"}
    return PreTrainedTokenizerFast(tokenizer_object=fast, padding_side="left", **names)


def parameters(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def output(folder: Path) -> dict[str, Any]:
    return {**STEP, "output_dir": str(folder)}
