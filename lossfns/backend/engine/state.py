"""The state of a model in training as named tensors: weights, optimizer, random numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossfns.backend.engine.names import OPTIMIZER, RANDOM, public_names
from lossfns.backend.engine.ranks import full_tensor
from lossfns.backend.model import lora
from lossfns.errors import LossInputError

# Weights


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return every tensor of the model by its name in a checkpoint. Tied weights appear once, by their first name."""
    public, tied = public_names(model), tied_names(model)
    return {public[name]: x for name, x in model.state_dict().items() if name not in tied}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Map each further name of a tied parameter to its first name."""
    first: dict[nn.Parameter, str] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: first[p] for name, p in parameters if first.setdefault(p, name) != name}


def check_weights(model: nn.Module, tensors: Mapping[str, Tensor], path: str) -> None:
    """Refuse weights whose names, shapes or kinds of numbers are not the model's, and weights that are not finite.

    Further names of tied weights may be there, with the same numbers.
    """
    public, state = public_names(model), weights(model)
    first = {public[name]: public[other] for name, other in tied_names(model).items()}
    loaded = {name: x for name, x in tensors.items() if not name.startswith((OPTIMIZER, RANDOM))}
    expected, shapes = ({name: tuple(x.shape) for name, x in each.items()} for each in (state, loaded))
    if missing := next((name for name in expected if shapes.get(name) != expected[name]), None):
        raise other_model(path, f"{missing} is {shapes.get(missing, 'missing')} in place of {expected[missing]}")
    for name in [name for name in loaded if name not in state]:
        if name not in first:
            raise other_model(path, f"{name} is {shapes[name]} in place of nothing")
        if shapes[name] != shapes[first[name]] or not all_true(loaded[name] == loaded[first[name]]):
            raise other_model(path, f"{name} is not {first[name]}, to which this model ties it")
    for name, x in state.items():
        if loaded[name].dtype != x.dtype and not (loaded[name].is_floating_point() and x.is_floating_point()):
            raise other_model(path, f"{name} is {loaded[name].dtype} in place of {x.dtype}")
    for name, p in model.named_parameters():
        if not all_true(loaded[public[name]].to(p.dtype).isfinite()):
            fix = "Take an earlier checkpoint."
            got = f"{path}, with nan or inf in {public[name]}"
            raise LossInputError("path", "a checkpoint of finite weights", got, fix)


def all_true(x: Tensor) -> bool:
    """Return whether all entries are True, on all ranks."""
    return bool(full_tensor(x.all()))


def replace_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load weights that ``check_weights`` has accepted."""
    public, tied = public_names(model), tied_names(model)
    model.load_state_dict({name: tensors[public[tied.get(name, name)]] for name in public})


def with_new_adapters(model: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Add the adapters of the model to the weights of a checkpoint without adapters.

    Only adapters that change nothing yet are added: they then start on the weights of the checkpoint.
    """
    own = {name: x for name, x in weights(model).items() if ".lora_" in name}
    if own.keys() & tensors.keys() or not adapters_change_nothing(model):
        return tensors
    return {**tensors, **own}


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], path: str) -> None:
    """Load the weights, or refuse them and change nothing."""
    check_weights(model, tensors, path)
    replace_weights(model, tensors)


def other_model(path: str, difference: str) -> LossInputError:
    """Return the error for a checkpoint of another model."""
    got, fix = f"{path}, in which {difference}", "Build the same model first."
    return LossInputError("path", "a checkpoint of this model", got, fix)


@torch.no_grad()
def adapters_change_nothing(model: nn.Module) -> bool:
    """Return whether a model computes the same with its adapters switched off. It does so before their first step."""
    settings = getattr(model, "lora", None)  # set by lora.adapt; other adapters are assumed to change something
    return bool(settings) and all(
        all_true(layer.lora_B[lora.ADAPTER].weight == 0) for layer in lora.adapted_layers(model)
    )


# Description


def description(model: nn.Module) -> dict[str, Any]:
    """Return the settings that the tensors do not show: the arguments of a ``Decoder``, and those of its adapters."""
    settings = {name: getattr(model, name, None) for name in ("shape", "lora")}
    return {name: value if isinstance(value, dict) else None for name, value in settings.items()}


def check_description(model: nn.Module, data: Mapping[str, Any], path: str) -> None:
    """Refuse the checkpoint of a model that computes something else from tensors of the same shapes."""
    for name, expected in description(model).items():
        stored = data.get(name)
        if not expected or stored is None:
            continue
        if not isinstance(stored, dict):
            raise other_model(path, f"{name} is {stored!r} in place of {expected}")
        for key in expected:  # all but the seed, which sets the initial weights alone
            if key != "seed" and as_json(expected[key]) != stored.get(key):
                raise other_model(path, f"{key} is {stored.get(key)} in place of {expected[key]}")


def as_json(value: Any) -> Any:
    """Return a value as JSON writes and reads it."""
    return json.loads(json.dumps(value, default=str))


# Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps of a parameter."""


def moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return what the optimizer keeps of each parameter as ``optimizer/<key>/<parameter>``."""
    names = parameter_names(model)
    states = optimizer.state_dict()["state"]
    return {f"{OPTIMIZER}{key}/{names[i]}": x for i, state in states.items() for key, x in state.items()}


def parameter_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters in a checkpoint, in the order of the optimizer."""
    public = public_names(model)
    return [public[name] for name, _ in model.named_parameters()]


def load_moments(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load what ``moments`` has returned into an optimizer of the same parameters."""
    states: dict[int, dict[str, Tensor]] = {}
    index = {name: i for i, name in enumerate(parameter_names(model))}
    for name, x in tensors.items():
        if name.startswith(OPTIMIZER):
            key, parameter = name.removeprefix(OPTIMIZER).split("/", 1)
            states.setdefault(index[parameter], {})[key] = x
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def parameters_with_moments(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the parameters that have moments."""
    return sorted({name.split("/", 2)[2] for name in tensors if name.startswith(OPTIMIZER) and name.count("/") > 1})


LARGEST_STEPS = 2**53
"""The largest number of steps that a state may have."""


def check_complete(model: nn.Module, tensors: Mapping[str, Tensor], data: Mapping[str, Any], path: str) -> None:
    """Refuse a state from which training could not continue as if it had not been interrupted.

    Such a state has other dtypes, or lacks a part of the optimizer's state, or has one that AdamW cannot have left.
    """
    check_dtypes(model, tensors, path)
    steps, parameters = data.get("steps"), dict(zip(parameter_names(model), model.parameters()))
    names = parameters_with_moments(tensors)
    if not isinstance(steps, int) or isinstance(steps, bool) or not 0 <= steps <= LARGEST_STEPS:
        wrong: str | None = f"steps = {steps!r}"
    elif data.get("stepped") != names or (steps == 0) != (not names):
        wrong = "an incomplete optimizer"
    elif not set(names) <= parameters.keys():
        wrong = f"moments of {min(set(names) - parameters.keys())}, which is no parameter of this model"
    else:
        wrong = next((w for name in names if (w := wrong_moments(name, parameters[name], tensors, steps))), None)
    known = tuple(f"{OPTIMIZER}{key}/" for key in MOMENTS)
    unknown = [name for name in tensors if name.startswith(OPTIMIZER) and not name.startswith(known)]
    if unknown:
        wrong = wrong or f"{unknown[0]}, which AdamW does not keep"
    if wrong is not None:
        raise not_continued(path, wrong)


def wrong_moments(name: str, p: nn.Parameter, tensors: Mapping[str, Tensor], steps: int) -> str | None:
    """Return what is wrong with the moments of a parameter; None if AdamW may have left them."""
    keys = [f"{OPTIMIZER}{key}/{name}" for key in MOMENTS]
    shapes = [tuple(tensors[key].shape) if key in tensors else None for key in keys]
    if shapes != [tuple(p.shape), tuple(p.shape), ()]:
        return f"moments of {name} of shapes {shapes}"
    first, second, step = (tensors[key] for key in keys)
    if (first.dtype, second.dtype, step.dtype) != (p.dtype, p.dtype, torch.float32):
        return f"moments of {name} of dtypes {first.dtype}, {second.dtype} and {step.dtype}"
    if not all_true(first.isfinite()) or not all_true(second.isfinite() & (second >= 0)):
        return f"moments of {name} that are negative, nan or inf"
    count = float(full_tensor(step))
    if not (count.is_integer() and 1 <= count <= steps):
        return f"moments of {name} after {count} of {steps} steps"
    return None


def not_continued(path: str, wrong: str) -> LossInputError:
    """Return the error for a state from which training cannot continue."""
    fix = "The client's load_state takes the weights alone."
    return LossInputError("path", "a whole state of training", f"{path}, with {wrong}", fix)


def check_dtypes(model: nn.Module, tensors: Mapping[str, Tensor], path: str) -> None:
    """Refuse weights of another precision, which would be rounded."""
    for name, x in weights(model).items():
        if name in tensors and tensors[name].dtype != x.dtype:
            got = f"{path}, in which {name} is {tensors[name].dtype} in place of {x.dtype}"
            fix = "Build the client with that dtype, or call its load_state: it loads only weights, and converts them."
            raise LossInputError("path", "a checkpoint of the same precision", got, fix)


# Random numbers

CPU, CUDA = f"{RANDOM}cpu", f"{RANDOM}cuda"


def random(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's generators as ``random/<device>``. Samples without a seed are drawn from them."""
    cuda = {CUDA: torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {CPU: torch.get_rng_state(), **cuda}


def check_random(tensors: Mapping[str, Tensor], device: torch.device, path: str) -> None:
    """Refuse states that torch's generators cannot take, by a trial on new generators."""
    if CPU not in tensors:
        raise not_continued(path, "no state of random numbers")
    devices = {CPU: torch.device("cpu")} | ({CUDA: device} if device.type == "cuda" else {})
    for name in devices.keys() & tensors.keys():
        try:
            torch.Generator(devices[name]).set_state(full_tensor(tensors[name]))
        except (RuntimeError, TypeError) as error:
            raise not_continued(path, f"a state of random numbers that torch refuses ({error})") from error


def load_random(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Set the states of torch's generators, for the whole process."""
    torch.set_rng_state(tensors[CPU])
    if CUDA in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors[CUDA], device)
