"""20,000 malformed calls: each is refused with the name of the wrong argument, and changes no weight and no gradient.

Call i depends on ``Random(i)`` alone: it is a valid call with one or two spoiled arguments.
"""

import inspect
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from batches import sdks
from tiny import SHAPE, client, gradients, same, texts, weights
from torch import Tensor

import lossfns
from lossfns import LossInputError, TensorData
from lossfns.backend import AdamParams, APIFuture, Decoder, LocalSamplingClient, LocalTrainingClient, SamplingParams
from lossfns.backend.client.profiles import PROFILES
from lossfns.export.builtins import BUILTINS

pytestmark = pytest.mark.filterwarnings("ignore")

BATCH = 100
VOCABULARY = SHAPE["vocab_size"]

Arguments = dict[str, Any]
Place = tuple[str, ...]
"""The parts of a message that together name a wrong place."""
Spoil = Callable[[Random, Arguments, str], Place]
"""Spoils the argument of that name, and says where."""


# Valid calls

CONFIGS: dict[str, list[Any]] = {
    "clip_low_threshold": [0.0, 0.8, 1.0],
    "clip_high_threshold": [1.0, 1.2, 4.0],
    "ratio_log_cap": [0.5, 20.0],
    "beta": [0.05, 1.0],
    "kl_beta": [0.0, 0.1],
    "eps_clip_c": [1.5, 3.0],
}


def builtin_call(rng: Random) -> Arguments:
    name = rng.choice(list(BUILTINS))
    own = BUILTINS[name]
    data = datums(rng, rng.choice((0, 2)) if name == "cross_entropy" else 0, (*own.required, *own.optional))
    config = {key: rng.choice(CONFIGS[key]) for key in own.config if key in CONFIGS and rng.random() < 0.3}
    return {"data": data, "loss_fn": name, "loss_fn_config": config or rng.choice((None, {}))}


def datums(rng: Random, targets: int, keys: tuple[str, ...] = ("weights",)) -> list[Any]:
    """Make one to three datums with these fields: ours, tinker's, or of unknown classes."""
    sdk = rng.choice(sdks())
    data = texts(rng, rng.randint(1, 3), sdk, targets=targets)
    for datum in data:
        shape = list(datum.loss_fn_inputs["target_tokens"].shape)
        for key in ("weights", *keys):
            values = [ONE[key](rng) for _ in range(math.prod(shape))]
            datum.loss_fn_inputs[key] = sdk.TensorData(data=values, dtype="float32", shape=shape)
        if "weights" not in keys:
            del datum.loss_fn_inputs["weights"]
    return [duck(datum, rng) for datum in data] if rng.random() < 0.25 else data


ONE: dict[str, Callable[[Random], float]] = {
    "weights": lambda rng: rng.choice((0.5, 1.0)),
    "logprobs": lambda rng: -rng.uniform(0.1, 4),
    "ref_logprobs": lambda rng: -rng.uniform(0.1, 4),
    "advantages": lambda rng: rng.gauss(0, 1),
    "sequence_ratio_mask": lambda rng: 1.0,
}


def duck(datum: Any, rng: Random) -> Any:
    """Return the same datum, made of lists, arrays or tensors."""
    form = rng.choice((list, np.asarray, torch.tensor))
    ids, fields = datum.model_input.to_ints(), datum.loss_fn_inputs
    inputs = {name: form(x.to_numpy().tolist()) for name, x in fields.items()}
    return SimpleNamespace(model_input=SimpleNamespace(to_ints=lambda: ids), loss_fn_inputs=inputs)


def forward_call(rng: Random) -> Arguments:
    return embedding_call(rng, "cross_entropy") if rng.random() < 0.2 else builtin_call(rng)


def embedding_call(rng: Random, loss_fn: Any) -> Arguments:
    data = texts(rng, rng.randint(1, 3))
    for datum in data:
        datum.loss_fn_inputs.clear()
    return {"data": data, "loss_fn": loss_fn, "output": "embedding", "pooling": rng.choice(("mean", "last"))}


def plain_loss(data: Any, outputs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return torch.stack([x.square().sum() for x in outputs]).sum(), {"mine": 1.0}


def custom_call(rng: Random) -> Arguments:
    if rng.random() < 0.2:
        return embedding_call(rng, plain_loss)
    if rng.random() < 0.4:
        return {"data": datums(rng, 0), "loss_fn": lossfns.cross_entropy(weigh=lossfns.token_sum)}
    return {"data": datums(rng, rng.choice((0, 2))), "loss_fn": plain_loss}


ADAM = {
    "learning_rate": 1e-3,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "grad_clip_norm": 1.0,
}


def step_call(rng: Random) -> Arguments:
    mode = rng.choice((None, "none", "num_loss_tokens", "NUM_SEQUENCES"))
    return {"optim_params": rng.choice((AdamParams, SimpleNamespace))(**ADAM), "grad_accumulation_normalization": mode}


def sample_call(rng: Random) -> Arguments:
    sdk = rng.choice(sdks())
    params = sdk.SamplingParams if hasattr(sdk, "SamplingParams") else SamplingParams
    temperature, top_k = rng.choice((0.0, 0.7)), rng.choice((-1, 2))
    return {
        "prompt": sdk.ModelInput.from_ints([rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 4))]),
        "num_samples": rng.randint(1, 2),
        "sampling_params": params(max_tokens=2, seed=rng.choice((None, 3)), temperature=temperature, top_k=top_k),
    }


def batch_call(rng: Random) -> Arguments:
    call = sample_call(rng)
    return {"prompts": [call.pop("prompt")] * rng.randint(1, 2), **call}


def prompt_call(rng: Random) -> Arguments:
    return {"prompt": sample_call(rng)["prompt"]}


def targets_call(rng: Random) -> Arguments:
    prompt = sample_call(rng)["prompt"]
    while len(prompt.to_ints()) < 2:
        prompt = sample_call(rng)["prompt"]
    return {"prompt": prompt, "targets": [[rng.randrange(VOCABULARY) for _ in range(2)] for _ in prompt.to_ints()[1:]]}


def top_call(rng: Random) -> Arguments:
    return prompt_call(rng) | {"k": rng.randint(1, VOCABULARY)}


# Junk


class Raises:
    """A value that raises when it is read."""

    dtype, shape = "float32", [3]

    def to_numpy(self) -> Any:
        return 1 / 0

    def to_ints(self) -> Any:
        return [].pop()


class Lies:
    """A value with all attributes and with nonsense in them."""

    dtype, shape, ndim, value, length = "float32", [3], 1, 7, 3

    def to_numpy(self) -> Any:
        return "no array"

    def to_ints(self) -> Any:
        return "no ids"

    def items(self) -> Any:
        return 3

    def __len__(self) -> int:
        return 3


JUNK: list[Callable[[], Any]] = [
    *map(lambda x: lambda: x, (None, 3, -1, 2.5, math.nan, -math.inf, 10**400, 1j, True, "x", "", "\0", b"bytes")),
    *map(lambda x: lambda: x, ((), range(0), object, len, object())),
    list,
    dict,
    lambda: {1, 2},
    lambda: [None],
    lambda: ["x", 1],
    lambda: [[1, 2], [3]],
    lambda: {"a": 1},
    lambda: iter([1]),
    lambda: np.zeros((2, 3, 4)),
    lambda: np.array(["a"]),
    lambda: np.array([object()]),
    lambda: np.array([1j]),
    lambda: np.array(None),
    lambda: torch.zeros(2, 3, 4),
    lambda: torch.tensor([1j]),
    lambda: torch.zeros(0),
    lambda: torch.eye(3).to_sparse(),
    lambda: torch.zeros(2, device="meta"),
    lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(1)]),
    lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.quint8),
    lambda: TensorData([], "float32"),
    Raises,
    Lies,
]

IDS: list[Callable[[], Any]] = [
    *map(lambda x: lambda: x, (None, 3, "abc", (), [0.5], [math.nan], [1.0, 2.0], [VOCABULARY], [1, -1], [2**63])),
    *map(lambda x: lambda: x, ([2**200], [[1], [2]], [[1, 2], [3]], ["a"], [None], [True], {1: 2}, object())),
    lambda: np.array([1.5]),
    lambda: torch.tensor([[1]]),
    lambda: torch.tensor([0.5]),
    lambda: 1 / 0,
    lambda: [].pop(),
    lambda: {}["chunk"],
    lambda: int("x"),
]
"""Values that a model input may return for its ids."""


def junk(rng: Random, good: Callable[[Any], bool] = lambda x: False) -> Any:
    """Draw a value that ``good`` does not accept."""
    while good(value := rng.choice(JUNK)()):
        pass
    return value


def other_than(good: Callable[[Any], bool]) -> Spoil:
    """Replace the argument by a value that ``good`` does not accept."""

    def spoil(rng: Random, arguments: Arguments, name: str) -> Place:
        arguments[name] = junk(rng, good)
        return (name,)

    return spoil


def nothing(x: Any) -> bool:
    return x is None


def number(x: Any, low: float = -(10.0**300), high: float = 10.0**300) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and low <= x <= high


def whole(x: Any, low: int) -> bool:
    return isinstance(x, int) and number(x, low, 2**20)


# Spoiled data


def data_is_wrong(rng: Random, arguments: Arguments, name: str) -> Place:
    if rng.random() < 0.1:
        arguments["data"] = junk(rng)
        return ("datum[0]." if isinstance(arguments["data"], list) and arguments["data"] else "data",)
    data = arguments["data"] = list(arguments["data"])
    i = rng.randrange(len(data))
    place = f"datum[{i}]."
    if rng.random() < 0.1:
        data[i] = junk(rng)
        return (place,)
    fields = dict(data[i].loss_fn_inputs)
    data[i] = SimpleNamespace(model_input=data[i].model_input, loss_fn_inputs=fields)
    if rng.random() < 0.1:
        data[i].loss_fn_inputs = junk(rng, lambda x: isinstance(x, Mapping))
        return (f"{place}loss_fn_inputs",)
    loss_fn = arguments["loss_fn"]
    if "output" in arguments or rng.random() < 0.3:
        data[i].model_input = junk(rng) if rng.random() < 0.3 else SimpleNamespace(to_ints=rng.choice(IDS))
        return (f"{place}model_input",)
    if loss_fn in BUILTINS and rng.random() < 0.2:
        key = rng.choice(("mask", "loss_mask", "", 3, None, (1, 2)))
        fields[key] = [1.0]
        return place, repr(key)
    required = BUILTINS[loss_fn].required if loss_fn in BUILTINS else ()
    if rng.random() < 0.2:
        name = rng.choice(("target_tokens", *required))
        fields[name] = None
        if rng.random() < 0.5:
            del fields[name]
    else:
        read = {"target_tokens", *required} | ({"weights"} if loss_fn is not plain_loss else set())
        name = rng.choice(sorted(read & set(fields)))
        fields[name] = field_of(rng, name, fields[name])
        place = place if len(data) > 1 else ""
    return place, name


WRONG: dict[str, list[Any]] = {
    "target_tokens": [-1, VOCABULARY, 2**62, 0.5, math.nan],
    "weights": [math.nan, math.inf],
    "logprobs": [math.nan, -math.inf, 0.7],
    "advantages": [math.nan, math.inf],
    "sequence_ratio_mask": [math.nan, 0.5, 2.0],
}


def field_of(rng: Random, name: str, right: Any) -> Any:
    """Return no row of numbers, a row that does not fit, or a row with a number that the field cannot hold."""
    row = right.tolist() if hasattr(right, "tolist") else list(right)
    at = rng.randrange(len(row))
    width = len(row[at]) if isinstance(row[at], list) else 0
    match rng.randrange(6):
        case 0:
            return junk(rng, lambda x: x is None or (name == "advantages" and number(x, -9, 9)) or x is True)
        case 1:
            return row[:-1]
        case 2:
            return [*row, row[-1]]
        case 3:
            return [[[x, x], [x, x]] for x in row]
        case 4:
            return [*row[:at], rng.choice(("a", {}, [], 1j, object())), *row[at + 1 :]]
    wrong = rng.choice(WRONG[name])
    return [*row[:at], [wrong] * width if width else wrong, *row[at + 1 :]]


# Spoiled names and numbers


def name_is_wrong(rng: Random, arguments: Arguments, name: str) -> Place:
    if "output" in arguments:
        return output_is_wrong(rng, arguments, "output")
    others = ("cross-entropy", "crossentropy", "PPO", "mse", plain_loss, lossfns.grpo(), lossfns.grpo)
    arguments[name] = rng.choice(others) if rng.random() < 0.5 else junk(rng)
    return (name,)


def config_is_wrong(rng: Random, arguments: Arguments, name: str) -> Place:
    own = BUILTINS[arguments["loss_fn"]].config
    if rng.random() < 0.3:
        arguments[name] = junk(rng, lambda x: x is None or isinstance(x, Mapping))
        return (name,)
    known = [key for key in own if key in CONFIGS]
    if not known or rng.random() < 0.3:
        key = rng.choice([key for key in (*CONFIGS, "clip", "temperature", 3, None, (1,)) if key not in own])
        arguments[name] = {key: 1.0}
        return name, str(key)
    key = rng.choice(known)
    wrong = rng.choice((math.nan, -math.inf, -1.0)) if rng.random() < 0.5 else junk(rng, GOOD[key])
    arguments[name] = {key: wrong}
    return name, key


GOOD: dict[str, Callable[[Any], bool]] = {
    "clip_low_threshold": lambda x: number(x, 0, 1),
    "clip_high_threshold": lambda x: number(x, 1, math.inf),
    "ratio_log_cap": lambda x: x is None or number(x, 1e-9),
    "beta": lambda x: number(x, 1e-9),
    "kl_beta": lambda x: number(x, 0),
    "eps_clip_c": lambda x: x is None or number(x, 1.001),
}


def output_is_wrong(rng: Random, arguments: Arguments, name: str) -> Place:
    arguments[name] = junk(rng)
    return (name,)


def params_are_wrong(rng: Random, arguments: Arguments, name: str) -> Place:
    if rng.random() < 0.2:
        arguments[name] = junk(rng)
        return ("adam_params",)
    key = rng.choice(list(ADAM))
    beta = key.startswith("beta")
    wrong = rng.choice((-0.1, -1, 1.0 if beta else -1.0))
    value = wrong if rng.random() < 0.5 else junk(rng, lambda x: not beta and number(x, 0))
    arguments[name] = SimpleNamespace(**ADAM | {key: value})
    return (key,)


# Custom losses


def loss_is_wrong(rng: Random, arguments: Arguments, name: str) -> Place:
    if rng.random() < 0.15:
        arguments[name] = rng.choice((junk(rng, callable), "cross_entropy", "ppo"))
        return (name,)
    arguments[name], *place = rng.choice(CUSTOM)
    return tuple(place)


def returns(make: Callable[[Tensor], Any]) -> Callable[[Any, list[Tensor]], Any]:
    """Make a loss that returns a function of the sum of all outputs."""
    return lambda data, outputs: make(torch.cat([x.flatten() for x in outputs]).sum())


def under_no_grad(data: Any, outputs: list[Tensor]) -> Any:
    with torch.no_grad():
        return outputs[0].sum(), {}


def unrelated(data: Any, outputs: list[Tensor]) -> Any:
    return torch.ones((), requires_grad=True) * 2, {}


def forgets_one(data: Any, outputs: list[Tensor]) -> Any:
    return torch.stack([x.sum() for x in outputs[:-1]] or [torch.ones((), requires_grad=True)]).sum(), {}


def infinite_slope(data: Any, outputs: list[Tensor]) -> Any:
    return torch.stack([(x - x.detach()).abs().sqrt().sum() for x in outputs]).sum(), {}


def frees_its_graph(data: Any, outputs: list[Tensor]) -> Any:
    loss, metrics = plain_loss(data, outputs)
    loss.backward()
    return loss, metrics


def goes_back_itself(data: Any, outputs: list[Tensor]) -> Any:
    loss, metrics = plain_loss(data, outputs)
    loss.backward(retain_graph=True)
    return loss, metrics


def detaches_a_datum(data: Any, outputs: list[Tensor]) -> Any:
    return torch.stack(
        [x.sum() for x in (outputs[0].detach(), *outputs[1:], torch.ones(1, requires_grad=True))]
    ).sum(), {}


def spoils_its_graph(data: Any, outputs: list[Tensor]) -> Any:
    twice = outputs[0] * 2
    loss = (twice * twice).sum() + torch.stack([x.sum() for x in outputs]).sum()
    twice.add_(1)
    return loss, {}


def replaces_leaves(data: Any, outputs: list[Tensor]) -> Any:
    outputs[:] = [x.detach().requires_grad_() for x in outputs]
    return plain_loss(data, outputs)


def raises_on_the_way_back(data: Any, outputs: list[Tensor]) -> Any:
    loss, metrics = plain_loss(data, outputs)
    return Refuses.apply(loss), metrics


class Refuses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, gradient


CUSTOM: list[tuple[Any, ...]] = [
    *((returns(lambda s, x=x: x), "loss_fn") for x in (None, (), 1.0, "loss", {}, (1, 2, 3))),
    (returns(lambda s: s), "loss_fn"),
    (returns(lambda s: (s,)), "loss_fn"),
    (returns(lambda s: (s, {}, 1)), "loss_fn"),
    (returns(lambda s: {"loss": s}), "loss_fn"),
    (returns(lambda s: [s, {}]), "loss_fn"),
    *((returns(lambda s, x=x: (x, {})), "loss") for x in (1.0, 1, True, None, "1.0", {}, 1j, np.float32(1))),
    *((returns(lambda s, x=x: (torch.tensor(x), {})), "loss") for x in (1, True, 1.0, 1j, [1.0, 2.0], [])),
    (returns(lambda s: (s.item(), {})), "loss"),
    (returns(lambda s: (s.detach(), {})), "loss"),
    (returns(lambda s: (s.expand(2), {})), "loss"),
    (returns(lambda s: (s * 1j, {})), "loss"),
    (returns(lambda s: (s * math.nan, {})), "loss"),
    (returns(lambda s: (s * math.inf, {})), "loss"),
    (returns(lambda s: (s - math.inf, {})), "loss"),
    (returns(lambda s: (s.reshape(1).to_sparse(), {})), "loss"),
    (returns(lambda s: (torch.zeros(0, requires_grad=True), {})), "loss"),
    (returns(lambda s: (torch.zeros((), device="meta", requires_grad=True), {})), "loss"),
    *((returns(lambda s, x=x: (s, x)), "metrics") for x in (None, [], 1.0, [("a", 1.0)], {1: 1.0}, {None: 1, "a": 2})),
    (under_no_grad, "loss"),
    (unrelated, "datum[0].", "No gradient computed"),
    (forgets_one, "datum[", "No gradient computed"),
    (infinite_slope, "datum[0].", "a finite gradient"),
    (frees_its_graph, "loss"),
    (goes_back_itself, "loss"),
    (detaches_a_datum, "datum[0].", "No gradient computed"),
    (spoils_its_graph, "loss"),
    (replaces_leaves, "datum[0].", "No gradient computed"),
    (raises_on_the_way_back, "loss"),
]
"""Losses that break the contract, and what the message says."""


class Own(Exception):
    """The error of a user's own loss."""


def with_an_error(rng: Random) -> tuple[Callable[..., Any], BaseException]:
    """Make a loss that spoils what it can reach, then raises."""
    error = rng.choice((Own, KeyError, RuntimeError, ZeroDivisionError, AssertionError, TypeError, OSError))("its own")

    def loss_fn(data: Any, outputs: list[Tensor]) -> Any:
        plain_loss(data, outputs)[0].backward()
        with torch.no_grad():
            outputs[0].fill_(0)
        outputs.clear()
        data.clear()
        raise error

    return loss_fn, error


# Spoiled files and samples


def path_is_wrong(*kinds: str) -> Spoil:
    def spoil(rng: Random, arguments: Arguments, name: str) -> Place:
        if rng.random() < 0.4:
            arguments[name] = junk(rng, lambda x: isinstance(x, str) and x == "x")
            return (name,)
        kind = rng.choice(kinds)
        arguments[name] = Path(kind)
        return "name" if name == "name" else "path", kind

    return spoil


def prompt_is_wrong(rng: Random, arguments: Arguments, name: str) -> Place:
    wrong = junk(rng) if rng.random() < 0.4 else SimpleNamespace(to_ints=rng.choice(IDS))
    arguments[name] = wrong if name == "prompt" else [*arguments[name][:-1], wrong]
    if name == "prompts" and rng.random() < 0.3:
        arguments[name] = junk(rng, lambda x: isinstance(x, (list, tuple)) and not x)
    return ("prompt",)


SAMPLING: dict[str, tuple[list[Any], Callable[[Any], bool]]] = {
    "max_tokens": ([0, -1, 1.5], lambda x: x is None or whole(x, 1)),
    "temperature": ([-0.1], lambda x: number(x, 0)),
    "top_k": ([0.5], lambda x: whole(x, -1)),
    "top_p": ([0.0, 1.1], nothing),
    "seed": ([1.5, 2**64], lambda x: x is None or whole(x, -1)),
    "stop": (
        [[[1]], [1.5], ["a", 2, None], VOCABULARY + 5, [-3]],
        lambda x: x is None or isinstance(x, str) or whole(x, 0) or (isinstance(x, (list, tuple)) and good_stops(x)),
    ),
}


def good_stops(x: Any) -> bool:
    return all(isinstance(s, str) or whole(s, 0) for s in x)


def sampling_is_wrong(rng: Random, arguments: Arguments, name: str) -> Place:
    if rng.random() < 0.2:
        arguments[name] = junk(rng)
        return (name,)
    key = rng.choice(list(SAMPLING))
    values, good = SAMPLING[key]
    known = {field: getattr(arguments[name], field) for field in SamplingParams.__dataclass_fields__}
    value = rng.choice(values) if rng.random() < 0.5 else junk(rng, good)
    arguments[name] = SimpleNamespace(**known | {key: value})
    return (key,)


# Malformed calls


class Method(NamedTuple):
    """How to call a method and to spoil each argument, and the method's share of all calls."""

    valid: Callable[[Random], Arguments]
    spoils: dict[str, Spoil]
    share: int


EMBEDDING: dict[str, Spoil] = {"output": output_is_wrong, "pooling": output_is_wrong}
BUILTIN: dict[str, Spoil] = {"data": data_is_wrong, "loss_fn_config": config_is_wrong, "loss_fn": name_is_wrong}
FILES = ("missing", "folder", "garbage", "empty", "truncated", "other.npz", "pickle", "plain.npz", "foreign")
SAVE: dict[str, Spoil] = {
    "name": path_is_wrong("state.npz", "folder", "garbage/x.safetensors"),
    "ttl_seconds": other_than(nothing),
    "user_metadata": other_than(lambda x: x is None or (isinstance(x, dict) and not x)),
}
COUNT, SAMPLE = other_than(lambda x: whole(x, 1)), {"sampling_params": sampling_is_wrong}

METHODS = {
    "forward": Method(forward_call, BUILTIN | EMBEDDING, 5),
    "forward_backward": Method(builtin_call, BUILTIN, 8),
    "forward_backward_custom": Method(
        custom_call,
        {"data": data_is_wrong, "loss_fn": loss_is_wrong, "loss_type_input": other_than(nothing), **EMBEDDING},
        8,
    ),
    "optim_step": Method(
        step_call,
        {
            "optim_params": params_are_wrong,
            "grad_accumulation_normalization": other_than(nothing),
            "adam_params": other_than(nothing),
        },
        3,
    ),
    "save_state": Method(lambda rng: {"name": Path("new")}, SAVE, 1),
    "save_weights_for_sampler": Method(lambda rng: {"name": Path("new")}, SAVE, 1),
    "load_state": Method(lambda rng: {"path": Path("state.npz")}, {"path": path_is_wrong(*FILES)}, 1),
    "load_state_with_optimizer": Method(
        lambda rng: {"path": Path("state.npz")}, {"path": path_is_wrong(*FILES, "weights.npz")}, 1
    ),
    "create_sampling_client": Method(
        lambda rng: {"model_path": Path("state.npz")}, {"model_path": path_is_wrong(*FILES)}, 1
    ),
    "export": Method(
        lambda rng: {"path": Path("exported"), "merge": rng.random() < 0.5},
        {"path": path_is_wrong("state.npz", "garbage/x"), "merge": other_than(lambda x: isinstance(x, bool))},
        1,
    ),
    "sample": Method(sample_call, {"prompt": prompt_is_wrong, "num_samples": COUNT} | SAMPLE, 4),
    "sample_batch": Method(batch_call, {"prompts": prompt_is_wrong, "num_samples": COUNT} | SAMPLE, 1),
    "compute_logprobs": Method(prompt_call, {"prompt": prompt_is_wrong}, 1),
    "target_logprobs": Method(targets_call, {"prompt": prompt_is_wrong, "targets": other_than(nothing)}, 1),
    "top_logprobs": Method(top_call, {"prompt": prompt_is_wrong, "k": other_than(lambda x: whole(x, 1))}, 1),
}


class Call(NamedTuple):
    """A method, its arguments, the places that are wrong, and the error that the loss itself raises."""

    method: str
    arguments: Arguments
    places: list[Place]
    raises: BaseException | None = None


def make(i: int) -> Call:
    """Make the malformed call of that number."""
    rng = Random(i)
    (name,) = rng.choices(list(METHODS), [method.share for method in METHODS.values()])
    method = METHODS[name]
    arguments = method.valid(rng)
    if name == "forward_backward_custom" and rng.random() < 0.05:
        arguments["loss_fn"], error = with_an_error(rng)
        return Call(name, arguments, [], error)
    if rng.random() < 0.03:
        extra = rng.choice(("normalize", "extra", "model", "lr"))
        return Call(name, arguments | {extra: 1}, [("argument", extra)])
    spoiled = sorted(rng.sample(list(method.spoils), min(len(method.spoils), rng.choice((1, 1, 2)))), key=order(method))
    return Call(name, arguments, [method.spoils[key](rng, arguments, key) for key in spoiled])


def order(method: Method) -> Callable[[str], int]:
    """Sort data before the loss's name: spoiling data needs the name, which says what the data should be."""
    return list(method.spoils).index


class Subjects:
    """Clients after a step, with a gradient, one client without (a save refuses gradients), and a sampler."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rested, *self.busy = (client(), *(client(profile=name) for name in PROFILES))
        for c in (self.rested, *self.busy):
            c.forward_backward(texts(Random(0)), "cross_entropy")
            c.optim_step(AdamParams()).result()
        for c in self.busy:
            c.forward_backward(texts(Random(1)), "cross_entropy").result()
        self.sampler = self.rested.save_weights_and_get_sampling_client()

    def perform(self, call: Call, rng: Random) -> BaseException | None:
        """Make the call and return its error."""
        saves = call.method.startswith("save")
        subject = (
            self.sampler if hasattr(self.sampler, call.method) else self.rested if saves else rng.choice(self.busy)
        )
        paths = {key: self.folder / value for key, value in call.arguments.items() if isinstance(value, Path)}
        try:
            result = getattr(subject, call.method)(**call.arguments | paths)
            if isinstance(result, APIFuture):
                result.result(60)
        except Exception as error:
            return error
        return None

    def state(self) -> list[Tensor | None]:
        """Return weights, gradients, and the numbers of steps and sequences."""
        clients = (self.rested, *self.busy)
        counts = [torch.tensor([c._engine.steps, *c._engine.gradients.accumulated[:2]]) for c in clients]
        return [*counts, *self.sampler.model.parameters(), *(x for c in clients for x in (*weights(c), *gradients(c)))]


def verdict(call: Call, error: BaseException | None) -> str:
    """Say what is wrong with the answer to a malformed call; an empty string if nothing is."""
    if call.raises is not None:
        return "" if error is call.raises else f"the loss's own error became {error!r}"
    if error is None:
        return f"accepted, although {call.places} is wrong"
    if not isinstance(error, (ValueError, TypeError)):
        return f"{error!r} in place of words for {call.places}"
    if not any(all(part in str(error) for part in place) for place in call.places):
        return f"names none of {call.places}: {error}"
    return ""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a checkpoint, weights for a sampler, and files that are neither."""
    return fill(tmp_path)


def fill(folder: Path) -> Path:
    c, other = client(), LocalTrainingClient(Decoder(**SHAPE | {"hidden": 8}), device="cpu")
    content = Path(c.save_state(folder / "state.npz").result().path).read_bytes()
    c.save_weights_for_sampler(folder / "weights.npz").result()
    other.save_state(folder / "other.npz").result()
    (folder / "folder").mkdir()
    (folder / "garbage").write_bytes(bytes(range(256)))
    (folder / "empty").touch()
    (folder / "truncated").write_bytes(content[: len(content) // 2])
    (folder / "pickle").write_bytes(pickle.dumps({"weights": [1.0]}))
    np.savez(folder / "plain.npz", a=np.zeros(3))
    torch.save({"model": torch.zeros(3)}, folder / "foreign")
    return folder


@pytest.mark.parametrize(
    "count", [pytest.param(500, marks=pytest.mark.repeated), pytest.param(4_000, marks=pytest.mark.exhaustive)]
)
def test_malformed_calls_are_refused_by_name_and_change_nothing(folder: Path, count: int) -> None:
    subjects = Subjects(folder)
    before = [x if x is None else x.clone() for x in subjects.state()]
    failures: list[str] = []
    for start in range(0, count, BATCH):
        calls = range(start, start + BATCH)
        for i in calls:
            call = make(i)
            said = verdict(call, subjects.perform(call, Random(i)))
            failures += [f"call {i}, {call.method}: {said}"] if said else []
        assert same(before, subjects.state()), f"call {culprit(calls, folder)} changed weights or gradients"
    assert not failures, "\n".join([*failures[:20], f"{len(failures)} of {count}"])


def culprit(calls: range, folder: Path) -> int | None:
    """Find the first call that changes something, on new subjects."""
    subjects = Subjects(folder)
    before = [x if x is None else x.clone() for x in subjects.state()]
    for i in calls:
        subjects.perform(make(i), Random(i))
        if not same(before, subjects.state()):
            return i
    return None


def test_the_calls_are_valid_until_they_are_spoiled(folder: Path) -> None:
    subjects = Subjects(folder)
    for i in range(600):
        rng = Random(i)
        name = list(METHODS)[i % len(METHODS)]
        arguments = METHODS[name].valid(rng)
        if name.startswith("save"):
            arguments["name"] = Path(f"{i}.npz")
        if name == "export":
            arguments["path"] = Path(f"{i}")
        if name == "optim_step":
            for c in subjects.busy:
                c._engine.gradients.clear()
                c.forward_backward(texts(Random(1)), "cross_entropy").result()
        assert subjects.perform(Call(name, arguments, []), rng) is None, (i, name, arguments)


def test_every_method_is_among_them() -> None:
    """Except for methods without arguments, or with unused ones alone, and ``_async`` methods, which only pass on."""
    for kind in (LocalTrainingClient, LocalSamplingClient):
        for name, method in inspect.getmembers(kind, inspect.isfunction):
            parameters = set(inspect.signature(method).parameters) - {"self", "timeout", "name", "retry_config"}
            if parameters and not name.startswith("_") and not name.endswith("_async"):
                assert name in METHODS


# Well-formed calls that would do harm


def test_a_gradient_that_overflows_in_the_model_is_refused_and_spoils_nothing() -> None:
    """The loss is 0, and its gradient with respect to the logprobs is finite."""

    def huge(data: Any, outputs: list[Tensor]) -> Any:
        return torch.stack([1e38 * (x - x.detach()).sum() for x in outputs]).sum(), {}

    c = client()
    c.forward_backward(texts(Random(1)), "cross_entropy").result()
    before = gradients(c)
    with pytest.raises(LossInputError, match="gradient: expected finite gradients of the parameters, got nan or inf"):
        c.forward_backward_custom(texts(Random(2)), huge).result()
    assert same(gradients(c), before)


def test_a_loss_that_switches_gradients_off_does_so_for_itself() -> None:
    c = client()

    def loss_fn(data: Any, outputs: list[Tensor]) -> Any:
        torch.set_grad_enabled(False)
        return outputs[0].sum(), {}

    with pytest.raises(LossInputError, match="depends on logprobs"):
        c.forward_backward_custom(texts(Random(1)), loss_fn).result()
    c.forward_backward(texts(Random(1)), "cross_entropy").result()
    assert c.optim_step(AdamParams()).result().metrics["grad_norm"] > 0


def test_a_step_whose_numbers_would_overflow_half_way_is_refused_before_it_begins() -> None:
    """1e300 is a float, but not one of the float32 that AdamW multiplies with."""
    c = client()
    c.forward_backward(texts(Random(1)), "cross_entropy").result()
    before = weights(c)
    for name in ("learning_rate", "eps", "weight_decay"):
        with pytest.raises(LossInputError, match=f"{name}: expected"):
            c.optim_step(AdamParams(**{name: 1e300})).result()
    assert same(weights(c), before)
    c.optim_step(AdamParams()).result()
