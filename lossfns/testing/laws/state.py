"""Laws of state: what a loss keeps between calls, and the global state that it may not set."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossfns.testing.batch import Batch
from lossfns.testing.laws.base import (
    LawBroken,
    LossFn,
    Probe,
    assume,
    column_rows,
    repeat_rows,
    require,
    unpoisoned,
    wrong,
)
from lossfns.testing.laws.settings import names_in, underlying_function


@wrong("what the first batch leaves behind changes the loss of all later batches")
def fresh_state(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """What a loss keeps from its first batch does not change the results of later ones."""
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unpoisoned(repeat_rows(probe.batch, 3))
    other = batch.having(
        **{name: [[2.5 * x for x in row] for row in column_rows(batch, name)] for name in scaled(batch)}
    )
    kept = list(mutable_state(loss_fn))
    assume(bool(kept), "it keeps no state")
    for container in kept:
        with emptied(container):
            try:
                first = probe(batch)
            except LawBroken:
                continue  # the loss needs what is in it: it is no cache
        with emptied(container):
            probe(other)
            second = probe(batch)
        same = repr((first.value, first.gradients)) == repr((second.value, second.gradients))
        difference = probe.difference(second, first, scale=0) or "a zero has the other sign"
        seen = f"After another first batch, {difference}, as for this batch first."
        require(same, "state-between-calls", seen, batch)


def scaled(batch: Batch) -> list[str]:
    """Return the columns whose numbers may be scaled, and the logprobs."""
    return ["logprobs", *(name for name in batch.columns if name != "labels")]


def mutable_state(loss_fn: LossFn) -> Iterator[Any]:
    """Yield the dicts, lists and sets that may hold state of a function: of its module, defaults, closure and object.

    The functions of its module that it calls are searched as well.
    """
    fn = underlying_function(loss_fn)
    owner = getattr(fn, "__self__", None)
    candidates = list(vars(owner).values()) if hasattr(owner, "__dict__") else []
    functions, known = [fn], set()
    while functions:
        fn = functions.pop()
        known.add(id(fn))
        found = reachable(fn)
        same_module = [
            x for x in found if isinstance(x, FunctionType) and x.__module__ == getattr(fn, "__module__", "")
        ]
        functions += [x for x in same_module if id(x) not in known]
        candidates += found
    containers = {id(x): x for x in candidates if type(x) in (dict, list, set)}
    yield from containers.values()


def reachable(fn: Any) -> list[Any]:
    """Return the objects of the module that a function names, its defaults, and what it closes over."""
    namespace, code = getattr(fn, "__globals__", {}), getattr(fn, "__code__", None)
    found = [namespace.get(name) for name in set(names_in(code))] if code is not None else []
    found += [*(getattr(fn, "__defaults__", None) or ()), *(getattr(fn, "__kwdefaults__", None) or {}).values()]
    for cell in getattr(fn, "__closure__", None) or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # an empty cell
            continue
    return found


@contextmanager
def emptied(container: Any) -> Iterator[None]:
    """Empty a dict, list or set within a block, and put its contents back."""
    contents = container.copy()
    container.clear()
    try:
        yield
    finally:
        container.clear()
        container.extend(contents) if isinstance(container, list) else container.update(contents)


@wrong("whatever runs after the loss, such as sampling or dropout, is no longer what it was")
def global_state(loss_fn: LossFn, data: Sequence[Any], logprobs: Sequence[Tensor]) -> None:
    """A call leaves global state as it was: random seeds, the default dtype, grad mode, threads, warnings, environment.

    A loss may draw random numbers, which moves the state of the generators on. It may not set them.
    """
    probe = Probe.of(loss_fn, data, logprobs)
    batch = unpoisoned(probe.batch)
    with global_state_kept():
        ends = []
        for seed in (11, 12):
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            starts, before = generators(), global_settings()
            probe.loss_fn(batch.data(), batch.tensors(probe.dtype))  # not by ``probe``, which restores the grad mode
            for name, was in before.items():
                now = global_settings()[name]
                require(now == was, "global-state-changed", f"The call changes {name} from {was} to {now}.")
            ends.append({name: state for name, state in generators().items() if state != starts[name]})
        for name, state in ends[0].items():
            seen = f"After calls from two different random states, the state of {name} is the same: the call sets it."
            require(ends[1].get(name) != state, "global-state-changed", seen)


def generators() -> dict[str, Any]:
    """Return the states of the random generators."""
    numpy_state = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy.random": repr((numpy_state["state"]["key"].tobytes(), numpy_state["state"]["pos"])),
        "random": random.getstate(),
    }


def global_settings() -> dict[str, Any]:
    """Return the global settings that a call must not change."""
    return {
        "the default dtype": torch.get_default_dtype(),
        "the grad mode": torch.is_grad_enabled(),
        "the inference mode": torch.is_inference_mode_enabled(),
        "the number of threads": torch.get_num_threads(),
        "torch.use_deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "the float32 matmul precision": torch.get_float32_matmul_precision(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "numpy's error handling": np.geterr(),
        "warnings.filters": list(warnings.filters),
        "os.environ": dict(os.environ),
    }


@contextmanager
def global_state_kept() -> Iterator[None]:
    """Put the global state back after a block."""
    before, torch_state, numpy_state, python_state = (
        global_settings(), torch.get_rng_state(), np.random.get_state(), random.getstate()
    )  # fmt: skip
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        now = global_settings()
        for name, was in before.items():
            if now[name] != was and name in RESTORE:
                RESTORE[name](was)


def restore_environment(was: dict[str, str]) -> None:
    """Set the environment variables to these."""
    os.environ.clear()
    os.environ.update(was)


RESTORE: Mapping[str, Callable[[Any], Any]] = {
    "the default dtype": torch.set_default_dtype,
    "the grad mode": torch.set_grad_enabled,
    "the number of threads": torch.set_num_threads,
    "torch.use_deterministic_algorithms": torch.use_deterministic_algorithms,
    "cudnn.benchmark": lambda was: setattr(torch.backends.cudnn, "benchmark", was),
    "cudnn.deterministic": lambda was: setattr(torch.backends.cudnn, "deterministic", was),
    "the float32 matmul precision": torch.set_float32_matmul_precision,
    "anomaly detection": torch.autograd.set_detect_anomaly,
    "numpy's error handling": lambda was: np.seterr(**was),
    "warnings.filters": lambda was: setattr(warnings, "filters", was),
    "os.environ": restore_environment,
}
"""Global setting → how to set it."""
