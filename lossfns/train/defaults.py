"""The defaults of each loss and method, and the options that each method has."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lossfns.errors import LossInputError
from lossfns.train.columns import check_columns, compares_samples
from lossfns.train.losses import AnyLoss, family_loss, method_of, spelled
from lossfns.train.options import LARGEST, NAMES, Options, check_known, check_option, flag
from lossfns.train.paths import with_lasting_paths

POLICY = {"steps": 100, "batch": 16, "lr": 5e-4, "warmup_steps": 200, "group": 16, "updates": 2}
PREFERENCE = {"steps": 400, "batch": 32, "lr": 3e-4, "warmup_steps": 300}
SUPERVISED = {"steps": 400, "batch": 16, "lr": 3e-3}

DEFAULTS: dict[str, dict[str, Any]] = {
    "supervised": SUPERVISED,
    "preference": PREFERENCE,
    "unpaired": PREFERENCE,
    "policy": POLICY,
    "distillation": SUPERVISED,
}
"""The defaults of each method with the embedded model, which is trained from scratch."""

LEARNS_THE_CHOSEN = {"steps": 500, "batch": 32, "lr": 3e-3, "warmup_steps": 0}
DEFAULTS_OF_LOSSES = {"orpo": LEARNS_THE_CHOSEN}
"""The defaults of losses that differ from those of their method: orpo needs no supervised start."""

MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "supervised": {"steps": 100, "batch": 8},
    "preference": {"steps": 100, "batch": 8},
    "unpaired": {"steps": 100, "batch": 8},
    "policy": {"steps": 50, "batch": 4, "group": 8, "updates": 1},
    "distillation": {"steps": 100, "batch": 8},
}
"""The defaults of each method with ``--model``, which is pretrained."""

EVAL_EXAMPLES = 50
"""The default of ``--eval-examples`` with ``--model``: a pretrained model takes a second or so for each, on a CPU."""

LEARNING_RATE, LEARNING_RATE_OF_ADAPTERS = 1e-5, 1e-4
"""The default learning rates with ``--model``: of all parameters, and of adapters."""

OPTION_METHODS = {
    "group": ("policy",),
    "updates": ("policy",),
    "max_tokens": ("policy",),
    "reward": ("policy",),
    "advantage_scale": ("policy",),
    "warmup_steps": ("policy", "preference", "unpaired"),
    "teacher": ("policy", "distillation"),
    "candidates": ("distillation",),
}
"""The methods that have an option, for the options that not every method has."""


def loss_of(text: str, settings: Mapping[str, Any]) -> AnyLoss:
    """Return the loss that ``--loss`` names, with the settings of ``--set``.

    Args:
        text: the name of a loss, as in ``lossfns list``; a call, such as ``with_tis(dapo(), cap=2)``; or
            ``module:function`` or ``file.py:function``, which names a contract function, a factory of one, or any form
            that ``lossfns check`` takes.
        settings: settings by name. A text stands for a public name, such as ``sequence_mean``, or for a call of one.

    Raises:
        LossInputError: if there is no such loss, or it does not have a setting, or the value of one is wrong.

    >>> loss_of("dapo", {"clip": [0.8, 1.3], "weigh": "sequence_mean"})
    dapo(clip=(0.8, 1.3), weigh=sequence_mean, log_ratio_cap=20.0, dual_clip=None)
    """
    if ":" not in text.partition("(")[0]:
        return family_loss(text, settings)
    from lossfns.train.own_losses import own_loss  # the kit, which takes half a second to import

    return own_loss(text, settings)


def complete_options(given: Mapping[str, Any]) -> Options:
    """Check the options that are given, and fill in the defaults of the method. ``None`` counts as not given.

    Raises:
        LossInputError: for an option that does not exist, that the method does not have, or whose value is wrong, and
            for a loss whose columns no run can make.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if "loss" not in given:
        raise LossInputError("--loss", "the name of a loss", "none", "lossfns list has them all.")
    for name, value in given.items():
        check_known(name, "options")
        check_option(name, value)
    given = with_lasting_paths(given)
    loss = loss_of(given["loss"], given.get("set", {}))
    method = method_of(loss)
    check_columns(loss, teacher="teacher" in given, outputs="base_url" not in given)
    for name in given:
        if not has_option(method, name):
            expected = f"a loss that has it ({' and '.join(OPTION_METHODS[name])} losses)"
            raise LossInputError(flag(name), expected, f"{loss.name}, a {method} loss", "Leave it out.")
    options = Options(**{**defaults_of(given, method), **given})
    if options.advantage_scale != Options.advantage_scale and "advantages" not in loss.reads:
        got = f"{loss.name}, which reads {', '.join(loss.reads)}"
        raise LossInputError("--advantage-scale", "a loss that reads advantages", got, "Leave it out.")
    if options.group == 1 and compares_samples(loss):
        got = f"1 with {loss.name}, which compares the samples of a problem"
        fix = "A sample that is alone is no better or worse than others: nothing would be learned."
        raise LossInputError("--group", "at least 2 samples of each problem", got, fix)
    check_together(options)
    return options


def defaults_of(given: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Return the defaults of a loss and its method."""
    if "model" in given:
        rate = LEARNING_RATE_OF_ADAPTERS if given.get("lora") else LEARNING_RATE
        return MODEL_DEFAULTS[method] | {"lr": rate, "eval_examples": EVAL_EXAMPLES}
    return DEFAULTS_OF_LOSSES.get(spelled(given["loss"]), DEFAULTS[method])


def check_together(options: Options) -> None:
    """Refuse options that exclude one another, or need one another."""
    for name in ("device", "model", "lora", "lora_parts", "dtype", "gradient_checkpointing", "init", "teacher"):
        if options.base_url and (value := getattr(options, name)) != getattr(Options, name):
            expected, fix = "no --base-url with it", "The server has the model: it starts from its own weights."
            raise LossInputError(flag(name), expected, reprlib.repr(value), fix)
    if options.lora and options.model is None and options.init is None and options.base_url is None:
        way = "--init RUN/checkpoint.safetensors starts adapters on the weights of a run."
        raise LossInputError("--lora", "a pretrained model with it: --model or --init", "neither", way)
    for name in ("max_length", "drop_longer"):
        if getattr(options, name) and not options.data:
            raise LossInputError(flag(name), "--data with it", "none", "The built-in data has its own length.")
    if options.batch * max(1, options.group) > LARGEST["batch"]:
        expected, got = f"--batch times --group of at most {LARGEST['batch']}", f"{options.batch * options.group}"
        raise LossInputError("--group", expected, got, "Take fewer samples in a step, and more steps.")


def has_option(method: str, name: str) -> bool:
    """Whether a method has an option."""
    return method in OPTION_METHODS.get(name, (method,))


def recorded_options(options: Options, loss: AnyLoss) -> dict[str, Any]:
    """Return the options as ``config.json`` holds them: ``None`` for those that the method or the loss does not use."""
    values, method = asdict(options), method_of(loss)
    if "advantages" not in loss.reads:
        values["advantage_scale"] = None
    return {name: values[name] if has_option(method, name) else None for name in NAMES}
