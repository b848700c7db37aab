"""The options of a run: one record, from the command line or from the ``config.json`` of an earlier run."""

from __future__ import annotations

import math
import os
import reprlib
from dataclasses import dataclass
from typing import Any

from lossfns.errors import LossInputError


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``lossfns train``.

    Attributes:
        method: name of the method, such as ``"grpo"``.
        data: path of a file of rows to train on; ``None`` for the built-in data.
        out: path of the run folder; ``None`` for ``runs/METHOD-TIME``.
        model: a model as ``hf.load`` takes it, such as ``"smollm2"`` or a folder; ``None`` for the embedded one.
        lora: rank of low-rank adapters; 0 trains all weights.
        lora_parts: the parts with adapters, among ``"attn"``, ``"mlp"`` and ``"unembed"``.
        dtype: dtype of the weights, such as ``"bfloat16"``; ``None`` keeps that of the file.
        gradient_checkpointing: whether the layers run again in the backward pass, to save memory.
        init: path of a checkpoint to start from.
        base_url: address of a server of the Tinker API to train on; ``None`` trains in this process.
        device: device to train on, such as ``"auto"`` or ``"cuda:1"``.
        threads: CPU threads.
        seed: seed of the model, the batches and the samples.
        steps: steps of the method.
        warmup_steps: supervised steps before the method; 0 for none.
        batch: examples, pairs or problems in a step.
        lr: learning rate.
        group: samples of each problem; 0 for a method that does not sample.
        updates: optimizer steps for each round of samples; 0 for a method that does not sample.
        max_tokens: most tokens of a sample; ``None`` for the length of the longest answer.
        max_length: most tokens of a row of ``data``; ``None`` for 2048. Longer rows are refused unless ``drop_longer``.
        drop_longer: leave out longer rows and count them, instead of refusing them.
        save_every: steps from one checkpoint to the next.
    """

    method: str
    data: str | None = None
    out: str | None = None
    model: str | None = None
    lora: int = 0
    lora_parts: str = "attn,mlp"
    dtype: str | None = None
    gradient_checkpointing: bool = False
    init: str | None = None
    base_url: str | None = None
    device: str = "auto"
    threads: int = 1
    seed: int = 0
    steps: int
    warmup_steps: int = 0
    batch: int
    lr: float
    group: int = 0
    updates: int = 0
    max_tokens: int | None = None
    max_length: int | None = None
    drop_longer: bool = False
    save_every: int = 20


def check_option(name: str, value: Any) -> None:
    """Refuse a value that has the wrong type or is out of range.

    Raises:
        LossInputError: with the flag of the option.
    """
    if name in ("method", "data", "out", "model", "lora_parts", "dtype", "init", "base_url", "device", "resume", "RUN"):
        expected, accepted = "text", isinstance(value, str) and is_path(value)
        if isinstance(value, str) and not accepted:
            expected = "text in UTF-8 that is not empty and has no NUL"
    elif name in ("drop_longer", "gradient_checkpointing"):
        expected, accepted = "true or false", isinstance(value, bool)
    elif name == "lr":
        expected, accepted = "a finite number above 0", type(value) in (int, float) and 0 < value < math.inf
        if accepted and value > 1:
            expected, accepted = "a learning rate of at most 1", False
    else:
        # `group` and `updates` are 0 only by default, for a method that has none.
        smallest = 0 if name in ("seed", "warmup_steps", "lora") else 1
        expected = f"a whole number of at least {smallest}"
        accepted = type(value) is int and smallest <= value
        if accepted and value > LARGEST[name]:
            expected, accepted = f"a whole number from {smallest} to {LARGEST[name]}", False
    if not accepted:
        raise LossInputError(flag(name), expected, reprlib.repr(value), "See lossfns train --help.")


LARGEST = {
    "threads": max(64, os.cpu_count() or 1),
    "seed": 2**63 - 1,
    "lora": 2**16,
    "steps": 10**9,
    "warmup_steps": 10**9,
    "batch": 2**16,
    "group": 2**12,
    "updates": 2**16,
    "max_tokens": 2**16,
    "max_length": 2**20,
    "save_every": 10**9,
}
"""The largest value of each whole number. More threads than this can end the process."""


def is_path(text: str) -> bool:
    """Whether text can name a file: it is not empty, is UTF-8 and has no NUL."""
    return text != "" and "\0" not in text and not any(0xD800 <= ord(c) < 0xE000 for c in text)


def flag(name: str) -> str:
    """Return the flag of an option on the command line."""
    return name if name.isupper() else f"--{name.replace('_', '-')}"
