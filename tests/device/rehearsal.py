"""A device that rehearses a GPU where there is none, written in Python on PyTorch's PrivateUse1 backend.

Its tensors say that they are on ``rehearsal:0``. Their numbers lie in the memory of the CPU, and CPU kernels compute
with them, so results equal those of a CPU. The rules are those of a GPU: no operation mixes tensors of the device and
of the CPU, NumPy cannot read a tensor of the device, and a generator belongs to one device. ``waits`` records each
operation for which a GPU makes the host wait until it has finished.

Importing this module registers the device, for the whole process. It replaces ``torch.tensor``, ``torch.as_tensor`` and
``torch.Generator`` by ones that know the device, and makes ``Module.to`` exchange parameters as it does for a GPU.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "rehearsal"
DEVICE = torch.device("cpu")  # set once the name is registered

waits: list[str] = []
"""For each wait of the host: the operation, and the place outside of PyTorch that called it."""

aten = torch.ops.aten


class Backend(_DummyBackendModule):
    """``torch.rehearsal``: the functions that autocast and checkpointing call."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


class DeviceTensor(Tensor):
    """A tensor of the device. ``held`` is the CPU tensor with its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> DeviceTensor:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        with torch.inference_mode(False):  # a wrapper made in inference mode could not be a view of another one
            made = Tensor._make_wrapper_subclass(cls, held.shape, **layout, device=DEVICE)
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.held!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert a tensor on {self.device} to numpy: call .cpu() first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(op, args, kwargs or {})


class Generator(torch.Generator):
    """``torch.Generator``, also for the device."""

    of_device: ClassVar[set[int]] = set()
    """Addresses of the generators of the device. An operation gets another object for the same generator."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        is_rehearsed = torch.device(device).type == NAME
        made = super().__new__(cls, "cpu" if is_rehearsed else device)
        if is_rehearsed:
            cls.of_device.add(made._cdata)
            weakref.finalize(made, cls.of_device.discard, made._cdata)
        return made

    @property
    def device(self) -> torch.device:
        return DEVICE if self._cdata in self.of_device else super().device


# Operations

COPIES = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default, aten._copy_from_and_resize.default}
"""Operations that may read one device and write the other."""

INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
"""Operations that take an index of the CPU on a GPU, which they copy there."""

READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
"""Operations that return a number of Python."""

SIZED_BY_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
}
"""Operations whose result has a size that depends on values: the host waits for it, and allocates then."""


def run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the held tensors. Refuse what a GPU refuses, and record a wait."""
    parts = op.decompose(*args, **kwargs)  # in inference mode, operations that consist of others arrive whole
    if parts is not NotImplemented:
        return parts
    tensors = [*tensors_of(args), *tensors_of(kwargs)]
    device_tensors = [x for x in tensors if isinstance(x, DeviceTensor)]
    host_tensors = [x for x in tensors if not isinstance(x, DeviceTensor)]
    check_devices(op, args, kwargs, device_tensors, host_tensors)
    target = kwargs.get("device")
    result_on_device = bool(device_tensors) if target is None else torch.device(target).type == NAME
    if op is aten.copy_.default:
        result_on_device = isinstance(args[0], DeviceTensor)
    if makes_host_wait(op, args, kwargs, device_tensors, host_tensors, result_on_device):
        waits.append(f"{op} at {caller()}")
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = op(*mapped(unwrap, args), **mapped(unwrap, kwargs))
    if not result_on_device:
        return result
    if op is aten._to_copy.default and any(result is unwrap(x) for x in tensors):
        result = result.clone()  # between two devices nothing is shared
    originals = {id(x.held): x for x in device_tensors}

    def wrap(x: Tensor) -> Tensor:
        if isinstance(x, DeviceTensor):
            return x
        return originals[id(x)] if id(x) in originals else DeviceTensor(x)

    return mapped(wrap, result)


def tensors_of(x: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested lists, tuples and dicts."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple, dict)):
        for item in x.values() if isinstance(x, dict) else x:
            yield from tensors_of(item)


def mapped(change: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Apply a function to the tensors of nested lists, tuples and dicts."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, (list, tuple)):
        return type(x)([mapped(change, item) for item in x])
    return {name: mapped(change, item) for name, item in x.items()} if isinstance(x, dict) else x


def unwrap(x: Tensor) -> Tensor:
    return x.held if isinstance(x, DeviceTensor) else x


def check_devices(
    op: Any, args: Any, kwargs: dict[str, Any], device_tensors: list[Any], host_tensors: list[Tensor]
) -> None:
    """Refuse tensors of two devices in one operation, other than numbers of no dimension, and a foreign generator."""
    foreign = [tuple(x.shape) for x in host_tensors if x.ndim]
    takes_both = op in COPIES or (op in INDEXING and isinstance(args[0], DeviceTensor))
    if device_tensors and foreign and not takes_both:
        raise RuntimeError(f"Expected all tensors to be on the same device: {op} got {DEVICE}, and {foreign} on cpu")
    generator = kwargs.get("generator")
    if device_tensors and generator is not None and generator._cdata not in Generator.of_device:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'")


def makes_host_wait(
    op: Any, args: Any, kwargs: Any, device_tensors: list[Any], host_tensors: list[Tensor], result_on_device: bool
) -> bool:
    """Return whether CUDA's kernels make the host wait in this operation."""
    if op in COPIES:
        if not result_on_device:
            return bool(device_tensors)
        blocking = not (kwargs.get("non_blocking") or (op is aten.copy_.default and len(args) > 2 and args[2]))
        return blocking and any(x.numel() for x in host_tensors)
    if not device_tensors:
        return False
    if op in INDEXING:
        indices = [x for x in args[1] if x is not None]
        one_value = op is not aten.index.Tensor and len(args) > 2 and args[2].numel() == 1
        masked = any(x.dtype in (torch.bool, torch.uint8) for x in indices)
        return any(not isinstance(x, DeviceTensor) for x in indices) or (masked and not one_value)
    if op is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    if op is aten.multinomial.default:
        return True  # it reads whether the probabilities are valid
    return op in READS or op in SIZED_BY_VALUES


def caller() -> str:
    """Return file and line of the innermost frame outside of PyTorch and this module."""
    frame = sys._getframe()
    while frame is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return "?" if frame is None else f"{'/'.join(frame.f_code.co_filename.split('/')[-2:])}:{frame.f_lineno}"


# Registration


def built_on_host(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a constructor build a tensor of the device on the CPU first, and copy it: that makes the host wait."""

    @wraps(make)
    def made(data: Any, *args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> Tensor:
        to_device = device is not None and torch.device(device).type == NAME
        result = make(data, *args, device=None if to_device else device, **kwargs)
        result = result.to(DEVICE) if to_device else result
        return result.requires_grad_() if requires_grad else result

    return made


_setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
DEVICE = torch.device(NAME, 0)
torch.__future__.set_swap_module_params_on_conversion(True)
torch.tensor, torch.as_tensor = built_on_host(torch.tensor), built_on_host(torch.as_tensor)
torch.Generator = Generator  # type: ignore[misc]
library = torch.library.Library("_", "IMPL")
library.fallback(lambda op, *args, **kwargs: run(op, args, kwargs), "PrivateUse1")
