"""Graphs of uploaded losses as plain data, for the tests."""

import json
from typing import Any

import torch
from torch import Tensor

from lossfns import LossInputError
from lossfns.server.graph import rebuild

X, W = {"ref": "logprobs"}, {"ref": "weights"}
INPUTS = [{"name": "logprobs", "rank": 1}, {"name": "weights", "rank": 1}]
PLACEHOLDERS = [{"op": "placeholder", "name": each["name"], "target": each["name"]} for each in INPUTS]
ROWS = torch.tensor([-1.0, -2.0, -0.5, -3.0]), torch.tensor([1.0, 0.0, 2.0, 1.0])


def node(op: str, target: str, *args: Any, name: str = "y", **kwargs: Any) -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": [*args], "kwargs": kwargs}


def function(target: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return node("call_function", target, *args, **kwargs)


def method(target: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return node("call_method", target, *args, **kwargs)


def returned(loss: Any, metrics: Any = None) -> dict[str, Any]:
    return node("output", "output", {"tuple": [loss, {"dict": metrics or {}}]}, name="output")


def whole(*nodes: dict[str, Any], loss: Any = None) -> dict[str, Any]:
    """A graph of these nodes, whose loss is the sum of the logprobs."""
    ends = [] if loss else [method("sum", X, name="total")]
    return {"format": 1, "nodes": [*PLACEHOLDERS, *nodes, *ends, returned(loss or {"ref": "total"})]}


def refusal(graph: Any, inputs: Any = INPUTS, *, rows: tuple[Tensor, ...] = ROWS) -> str:
    """The message with which a graph is refused, when it is uploaded or when it is run; none if it is accepted."""
    try:
        rebuild(json.loads(json.dumps(graph)), json.loads(json.dumps(inputs)))(*rows)
    except LossInputError as error:
        return str(error)
    return ""
