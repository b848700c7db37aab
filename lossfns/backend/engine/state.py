"""The state of a model in training as named tensors: weights, optimizer, random numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossfns.errors import LossInputError

# Weights


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return every tensor of the model as ``model.<name>``. Tied weights are one tensor under several names."""
    tensors, tied = model.state_dict(), tied_names(model)
    return {f"model.{name}": tensors[tied.get(name, name)] for name in tensors}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Map each further name of a tied parameter to its first name."""
    first: dict[nn.Parameter, str] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: first[p] for name, p in parameters if first.setdefault(p, name) != name}


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], path: str) -> None:
    """Load the weights, or refuse them and change nothing."""
    loaded = {name.removeprefix("model."): x for name, x in tensors.items() if name.startswith("model.")}
    expected, shapes = ({name: tuple(x.shape) for name, x in state.items()} for state in (model.state_dict(), loaded))
    if shapes != expected:
        wrong = next(name for name in (*expected, *shapes) if shapes.get(name) != expected.get(name))
        got = f"{path}, in which {wrong} is {shapes.get(wrong, 'missing')} in place of {expected.get(wrong, 'nothing')}"
        raise LossInputError("path", "a checkpoint of this model", got, "Build the same model first.")
    model.load_state_dict(loaded)


# Description


def description(model: nn.Module) -> dict[str, Any]:
    """Return the settings that the tensors do not show: the arguments of a ``Decoder``, and those of its adapters."""
    settings = {name: getattr(model, name, None) for name in ("shape", "lora")}
    return {name: value if isinstance(value, dict) else None for name, value in settings.items()}


def check_description(model: nn.Module, data: Mapping[str, Any], path: str) -> None:
    """Refuse the checkpoint of a model that computes something else from tensors of the same shapes."""
    for name, expected in description(model).items():
        stored = data.get(name)
        if not expected or not isinstance(stored, dict):
            continue
        for key in expected:  # all but the seed, which sets the initial weights alone
            if key != "seed" and as_json(expected[key]) != stored.get(key):
                got = f"{path}, in which {key} is {stored.get(key)} in place of {expected[key]}"
                raise LossInputError("path", "a checkpoint of this model", got, "Build the same model first.")


def as_json(value: Any) -> Any:
    """Return a value as JSON writes and reads it."""
    return json.loads(json.dumps(value, default=str))


# Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps of a parameter."""


def moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return what the optimizer keeps of each parameter as ``optim.<key>.<parameter>``."""
    names = [name for name, _ in model.named_parameters()]
    kept = optimizer.state_dict()["state"]
    return {f"optim.{key}.{names[i]}": x for i, state in kept.items() for key, x in state.items()}


def load_moments(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load what ``moments`` has returned into an optimizer of the same parameters."""
    kept: dict[int, dict[str, Tensor]] = {}
    index = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    for name, x in tensors.items():
        if name.startswith("optim."):
            _, key, parameter = name.split(".", 2)
            kept.setdefault(index[parameter], {})[key] = x
    optimizer.load_state_dict({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})


def parameters_with_moments(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the parameters that have moments."""
    return sorted({name.split(".", 2)[2] for name in tensors if name.startswith("optim.")})


def check_complete(model: nn.Module, tensors: Mapping[str, Tensor], data: Mapping[str, Any], path: str) -> None:
    """Refuse a state from which training could not continue as if it had not been interrupted.

    Such a state has other dtypes, or lacks a part of the optimizer's or the random state.
    """
    check_dtypes(model, tensors, path)
    steps, parameters = data.get("steps"), dict(model.named_parameters())
    names = parameters_with_moments(tensors)
    wrong = None
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        wrong = f"steps = {steps!r}"
    elif data.get("stepped") != names:
        wrong = "an incomplete optimizer"
    elif not set(names) <= parameters.keys():
        wrong = f"moments of {min(set(names) - parameters.keys())}, which is no parameter of this model"
    else:
        for name in names:
            keys = [f"optim.{k}.{name}" for k in MOMENTS]
            shapes = [tuple(tensors[key].shape) if key in tensors else None for key in keys]
            if shapes != [tuple(parameters[name].shape), tuple(parameters[name].shape), ()]:
                wrong = f"moments of {name} of shapes {shapes}"
    generator = tensors.get("random.cpu")
    if generator is None or generator.dtype != torch.uint8 or generator.shape != torch.get_rng_state().shape:
        wrong = wrong or "no state of random numbers"
    if wrong is not None:
        fix = "The client's load_state takes the weights alone."
        raise LossInputError("path", "a whole state of training", f"{path}, with {wrong}", fix)


def check_dtypes(model: nn.Module, tensors: Mapping[str, Tensor], path: str) -> None:
    """Refuse weights of another precision, which would be rounded."""
    for name, x in weights(model).items():
        if name in tensors and tensors[name].dtype != x.dtype:
            got = f"{path}, in which {name} is {tensors[name].dtype} in place of {x.dtype}"
            fix = "Build the client with that dtype, or call its load_state: it loads only weights, and converts them."
            raise LossInputError("path", "a checkpoint of the same precision", got, fix)


# Random numbers


def random(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's generators as ``random.<device>``. Samples without a seed are drawn from them."""
    cuda = {"random.cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"random.cpu": torch.get_rng_state(), **cuda}


def load_random(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the states of torch's generators, for the whole process."""
    if "random.cpu" in tensors:
        torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
