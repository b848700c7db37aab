"""A trace of a loss: the tensor operations of one call, which can be run again on other logprobs.

It behaves like the traces of torch's own tracers, whose import takes as long as all other laws together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Value(int):
    """The place of a tensor among the values of a trace."""


class Trace(TorchDispatchMode):
    """The operations of a call, recorded below autograd, so that ``detach`` leaves a trace and ``no_grad`` does not.

    Tensors that no recorded operation made are constants. So is every number that the call read from a tensor.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> trace = Trace(lambda lps: (lps[0] * lps[0].sum().item()).sum(), [x])
    >>> trace([torch.tensor([2.0, 2.0])])                               # 4 · 3, not 4 · 4
    tensor(12.)
    """

    recording = False
    """Whether a call is being recorded now."""

    def __init__(self, call: Callable[[list[Tensor]], Tensor], leaves: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[tuple[Any, Any, Any]] = []
        self.kept: list[Any] = list(leaves)  # alive, so that no other tensor gets the id of one of them
        self.places = {id(leaf): Value(i) for i, leaf in enumerate(leaves)}
        Trace.recording = True
        try:
            with self:
                result = call(list(leaves))
        finally:
            Trace.recording = False
        self.result = self.place(result)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, to keep it away from this class

    def place(self, tensor: Tensor) -> Any:
        """Return the place of a tensor, or the tensor if it is a constant."""
        return self.places.get(id(tensor), tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.lift_fresh.default:  # of torch.tensor(...): each run needs a tensor of its own
            func = torch.ops.aten.lift_fresh_copy.default
        used = tree_map_only(Tensor, self.place, (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, *used))
        for tensor in results(result):
            self.places[id(tensor)] = Value(len(self.kept))
            self.kept.append(tensor)
        return result

    def __call__(self, leaves: Sequence[Tensor]) -> Tensor:
        """Run the operations on other leaves, with autograd."""
        values: list[Any] = list(leaves)

        def find(x: Any) -> Any:
            return values[x] if isinstance(x, Value) else x

        for func, args, kwargs in self.steps:
            result = func(*tree_map_only(Value, find, args), **tree_map_only(Value, find, kwargs))
            values.extend(results(result))
        return find(self.result)  # type: ignore[no-any-return]


def results(result: Any) -> list[Tensor]:
    """Return the tensors that an operation returns."""
    found = result if isinstance(result, (tuple, list)) else [result]
    return [x for x in found if isinstance(x, Tensor)]
