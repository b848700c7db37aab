"""The options of a run: one record, from the command line, a TOML file, or the config of an earlier run."""

from __future__ import annotations

import json
import math
import os
import reprlib
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lossfns.errors import LossInputError, did_you_mean
from lossfns.train.trackers import names_of


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``lossfns train``.

    Attributes:
        loss: the loss: the name of one of the family, such as ``"grpo"``, a call of it, or ``module:function``.
        set: settings of the loss by name.
        data: the rows to train on; ``None`` for the built-in data.
        out: path of the run folder; ``None`` for ``runs/LOSS-TIME``.
        init: path of a checkpoint to start from.
        model: a model as ``hf.load`` takes it, such as ``"smollm2"`` or a folder; ``None`` for the embedded one.
        lora: rank of low-rank adapters; 0 trains all weights.
        lora_parts: the parts with adapters, among ``"attn"``, ``"mlp"`` and ``"unembed"``.
        dtype: dtype of the weights, such as ``"bfloat16"``; ``None`` keeps that of the file.
        gradient_checkpointing: whether the layers run again in the backward pass, to save memory.
        teacher: the model to learn from; without ``model`` the checkpoint of one.
        candidates: candidate tokens of the teacher at each position.
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
        reward: how samples are rewarded; ``None`` for the default of the data.
        advantage_scale: ``"std"``, or ``"none"`` as in Dr. GRPO.
        max_length: most tokens of a row of ``data``; ``None`` for 2048. Longer ones are refused.
        drop_longer: whether longer rows are left out and counted, instead.
        eval_every: steps from one held-out evaluation to the next; 0 for only before and after.
        eval_examples: most held-out examples to measure on. No more than 400 are held out.
        save_every: steps from one checkpoint to the next.
        track: names of trackers that get the metrics, too, with commas between them.
    """

    loss: str
    set: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    out: str | None = None
    init: str | None = None
    model: str | None = None
    lora: int = 0
    lora_parts: str = "attn,mlp"
    dtype: str | None = None
    gradient_checkpointing: bool = False
    teacher: str | None = None
    candidates: int = 16
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
    reward: str | None = None
    advantage_scale: str = "std"
    max_length: int | None = None
    drop_longer: bool = False
    eval_every: int = 0
    eval_examples: int = 400
    save_every: int = 20
    track: str | None = None


NAMES = tuple(each.name for each in fields(Options))
TEXTS = (
    "loss", "data", "out", "init", "model", "lora_parts", "dtype", "teacher", "base_url", "device", "reward", "track",
    *("resume", "config", "RUN", "DIR", "FILE"),  # of commands
)  # fmt: skip
"""The options and other arguments that are text."""

CHOICES = {"advantage_scale": ("std", "none")}


def check_option(name: str, value: Any) -> None:
    """Refuse a value that has the wrong type or is out of range.

    Raises:
        LossInputError: with the flag of the option.
    """
    if name in TEXTS:
        expected, accepted = "text", isinstance(value, str) and is_path(value)
        if isinstance(value, str) and not accepted:
            expected = "text in UTF-8 that is not empty and has no NUL"
    elif name in CHOICES:
        expected, accepted = f"one of {', '.join(CHOICES[name])}", value in CHOICES[name]
    elif name == "set":
        expected, accepted = "settings by name", isinstance(value, Mapping) and all(map(str.isidentifier, value))
    elif name in ("gradient_checkpointing", "drop_longer"):
        expected, accepted = "true or false", isinstance(value, bool)
    elif name == "lr":
        expected, accepted = "a finite number above 0", type(value) in (int, float) and 0 < value < math.inf
        if accepted and value > 1:
            expected, accepted = "a learning rate of at most 1", False
    else:
        # `group` and `updates` are 0 only by default, for a method that has none.
        smallest = 0 if name in ("seed", "warmup_steps", "eval_every", "lora") else 1
        expected = f"a whole number of at least {smallest}"
        accepted = type(value) is int and smallest <= value
        if accepted and value > LARGEST[name]:
            expected, accepted = f"a whole number from {smallest} to {LARGEST[name]}", False
    if name == "track" and accepted:
        names_of(value)
    if not accepted:
        raise LossInputError(flag(name), expected, reprlib.repr(value), "See lossfns train --help.")


LARGEST = {
    "threads": max(64, os.cpu_count() or 1),
    "seed": 2**63 - 1,
    "steps": 10**9,
    "warmup_steps": 10**9,
    "batch": 2**16,
    "lora": 2**16,
    "candidates": 2**12,
    "group": 2**12,
    "updates": 2**16,
    "max_tokens": 2**16,
    "max_length": 2**20,
    "eval_every": 10**9,
    "eval_examples": 10**9,
    "save_every": 10**9,
}
"""The largest value of each whole number. More threads than this can end the process."""


def is_path(text: str) -> bool:
    """Whether text can name a file: it is not empty, is UTF-8 and has no NUL."""
    return text != "" and "\0" not in text and not any(0xD800 <= ord(c) < 0xE000 for c in text)


def flag(name: str) -> str:
    """Return the flag of an option on the command line."""
    return name if name.isupper() else f"--{name.replace('_', '-')}"


@contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """Rename the input that an error in a ``with`` block names, to the word of the command line for it.

    >>> with naming({"source": "--model"}):
    ...     raise LossInputError("source", "a folder", "none", "Name another.")
    Traceback (most recent call last):
    lossfns.errors.LossInputError: --model: expected a folder, got none. Name another.
    """
    try:
        yield
    except LossInputError as error:
        if error.field not in names:
            raise
        parts = (error.expected, error.got, error.fix)
        raise LossInputError(names[error.field], *parts, datum=error.datum, loss=error.loss) from error


# TOML


def read_toml(path: str) -> dict[str, Any]:
    """Return the options in a TOML file, by the names of ``Options``. The settings of the loss are under ``[set]``.

    Raises:
        LossInputError: if the file cannot be read, is no TOML, or has a name that is no option.
    """
    check_option("config", path)
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LossInputError("--config", "a TOML file of options", f"{path} ({error})", "See docs/train.md.") from None
    for name in content:
        check_known(name, f"{path}")
    return content


def check_known(name: str, where: str) -> None:
    """Refuse a name that is no option."""
    if name not in NAMES:
        raise LossInputError(where, "the name of an option", repr(name), did_you_mean(name, NAMES))


SWITCHED_OFF = {"lora": 0, "gradient_checkpointing": False, "drop_longer": False, "eval_every": 0}
"""The values of options that have no effect."""


def with_effect(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that have an effect on what a run does: without its folder, and what is switched off.

    >>> with_effect({"loss": "sft", "data": None, "out": "runs/a", "lora": 0, "lora_parts": "attn", "seed": 0})
    {'loss': 'sft', 'seed': 0}
    """
    off = {name for name, x in SWITCHED_OFF.items() if options.get(name) == x}
    unused = {"out", "device" if options.get("base_url") else "", "" if options.get("lora") else "lora_parts"}
    return {name: x for name, x in options.items() if x is not None and name not in off | unused}


def to_toml(options: Mapping[str, Any]) -> str:
    """Return options as TOML; those that are None are left out.

    >>> print(to_toml({"loss": "dapo", "lr": 0.001, "data": None, "set": {"clip": [0.8, 1.3]}}), end="")
    loss = "dapo"
    lr = 0.001
    <BLANKLINE>
    [set]
    clip = [0.8, 1.3]
    """
    settings = options.get("set") or {}
    lines = [f"{name} = {toml_value(x)}" for name, x in options.items() if x is not None and name != "set"]
    lines += ["", "[set]", *(f"{name} = {toml_value(x)}" for name, x in settings.items())] if settings else []
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """Return a value as TOML: text, a bool, a number, or a list or table of them."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name} = {toml_value(x)}' for name, x in value.items())}}}"
    if isinstance(value, float):
        return repr(value)  # also inf and nan
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
