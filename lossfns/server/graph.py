"""A custom loss that a client uploads: a graph as plain data, rebuilt from the operations of ``operations.py``.

The graph is never code. Each node names an operation in a table, and runs it on the results of earlier nodes. Before
any memory is allocated for a datum, the graph runs once on tensors without data of the same shapes, which gives the
size of every result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lossfns.errors import LossInputError, show
from lossfns.server.operations import (
    ATTRIBUTES,
    DEFAULTS,
    DTYPES,
    KEYWORDS,
    LARGEST_INTEGER,
    TEXTS,
    Operation,
    find_operation,
)

MOST_NODES, MOST_ITEMS, DEEPEST, MOST_INPUTS, MOST_METRICS = 4096, 1024, 8, 64, 256
"""Limits of a graph: nodes, items in the arguments of a node, levels of lists in them, inputs, and metrics."""

ELEMENTS, ELEMENTS_PER_INPUT = 2**26, 2**10
"""Limit of the numbers that the nodes read and write for a datum: the first, plus the second for each input number."""

NAME = re.compile(r"[\w.]{1,128}", re.ASCII)
INPUT_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
METRIC_NAME = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
FIX = "Upload the graph that create_custom_loss traces."


@dataclass(frozen=True)
class Ref:
    """An argument that is the result of an earlier node."""

    name: str


@dataclass(frozen=True)
class Node:
    """An operation and its arguments, in which ``Ref`` stands for results."""

    name: str
    where: str
    operation: Operation
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Output:
    """What a graph returns: the loss, and metrics by name."""

    loss: Ref
    metrics: dict[str, Ref]


def rebuild(
    graph: Mapping[str, Any], inputs: Sequence[Mapping[str, Any]]
) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """Rebuild a loss of one datum from the graph that ``ServiceClient.create_custom_loss`` uploads.

    Args:
        graph: ``{"format": 1, "nodes": [{"op", "name", "target", "args", "kwargs"}, ...]}``, the nodes in the order of
            execution, as in the SDK's ``CustomLossGraph``.
        inputs: ``{"name", "rank"}`` of each input in order, ``logprobs`` first.

    Returns:
        ``fn(logprobs, *inputs) -> (0-d tensor, {"custom/<name>:sum" or ":mean": 0-d tensor})``. The function raises
        LossInputError, which names the node, for an operation that fails or whose result is too large.

    Raises:
        LossInputError: for anything but a graph of tensor arithmetic. The message has the node and the name of what
            is refused.

    >>> returned = {"tuple": [{"ref": "total"}, {"dict": {}}]}
    >>> nodes = [
    ...     {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
    ...     {"op": "call_method", "name": "total", "target": "sum", "args": [{"ref": "logprobs"}]},
    ...     {"op": "output", "name": "output", "target": "output", "args": [returned]},
    ... ]
    >>> rebuild({"format": 1, "nodes": nodes}, [{"name": "logprobs", "rank": 1}])(torch.tensor([-1.0, -2.0]))
    (tensor(-3.), {})
    """
    ranks = read_inputs(inputs)
    nodes, placeholders, output = read_graph(graph, list(ranks))

    @lru_cache(maxsize=4096)
    def check_sizes(forms: tuple[tuple[torch.Size, torch.dtype], ...]) -> None:
        """Run the graph on tensors without data. The shapes and dtypes alone determine all sizes."""
        empty = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in forms]
        limit = ELEMENTS + ELEMENTS_PER_INPUT * sum(map(count_elements, empty))
        with torch.no_grad(), torch.device("meta"):
            read_output(run(nodes, dict(zip(placeholders, empty)), limit), output)

    def fn(*arguments: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        check_arguments(arguments, ranks)
        check_sizes(tuple((x.shape, x.dtype) for x in arguments))
        return read_output(run(nodes, dict(zip(placeholders, arguments))), output)

    return fn


def run(nodes: Sequence[Node], results: dict[str, Any], limit: float = math.inf) -> dict[str, Any]:
    """Run the nodes in order, and add the result of each to ``results``; refuse more than ``limit`` numbers in all."""
    total = 0
    for node in nodes:
        args, kwargs = resolve(node.args, results), resolve(node.kwargs, results)
        try:
            result = node.operation(*args, **kwargs)
        except LossInputError:
            raise
        except NotImplementedError as error:
            fix = "Mask with torch.where, which keeps the shape."
            raise LossInputError(node.where, "a size that depends on no value", first_line(error), fix) from error
        except (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            fix = "Call the function on tensors like these before you upload it."
            raise LossInputError(node.where, "arguments that fit", first_line(error), fix) from error
        check_result(result, node.where)
        total += count_elements(args) + count_elements([*kwargs.values()]) + count_elements(result)
        if total > limit:
            expected, got = f"at most {limit} numbers read and written for a datum", f"{total} up to here"
            raise LossInputError(node.where, expected, got, "Make no tensor much larger than the inputs.")
        results[node.name] = result
    return results


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0][:300].rstrip(".")


def count_elements(x: Any) -> int:
    """Return how many numbers there are in a tensor, or in the tensors of lists and tuples."""
    if isinstance(x, Tensor):
        return x.numel()
    return sum(map(count_elements, x)) if isinstance(x, (list, tuple)) else 0


def check_result(x: Any, where: str) -> None:
    """Refuse a result that is no plain tensor, number, dtype, or a tuple of those."""
    if isinstance(x, tuple):
        for each in x:
            check_result(each, where)
    elif isinstance(x, int) and abs(x) > LARGEST_INTEGER:
        raise LossInputError(where, "a whole number below 2**63", "a larger one", "Use floats.")
    elif type(x) is Tensor and x.dtype not in DTYPES.values():
        raise LossInputError(where, f"a result of dtype {', '.join(DTYPES)}", f"{x.dtype}", "Use real numbers.")
    elif type(x) not in (Tensor, bool, int, float, torch.dtype):
        raise LossInputError(where, "a tensor or a number", f"a {type(x).__name__}", FIX)


def resolve(argument: Any, results: Mapping[str, Any]) -> Any:
    """Return an argument with each ``Ref`` replaced by its result."""
    if isinstance(argument, Ref):
        return results[argument.name]
    if isinstance(argument, (list, tuple)):
        return type(argument)(resolve(each, results) for each in argument)
    if isinstance(argument, dict):
        return {key: resolve(value, results) for key, value in argument.items()}
    if isinstance(argument, slice):
        return slice(*(resolve(each, results) for each in (argument.start, argument.stop, argument.step)))
    return argument


def check_arguments(arguments: Sequence[Any], ranks: Mapping[str, int]) -> None:
    """Require a tensor of the declared rank for each input."""
    if len(arguments) != len(ranks):
        got, fix = f"{len(arguments)}", "Pass logprobs, then each input in order."
        raise LossInputError("inputs", f"{len(ranks)} tensors ({', '.join(ranks)})", got, fix)
    for (name, rank), x in zip(ranks.items(), arguments):
        if not isinstance(x, Tensor) or x.ndim != rank:
            got = f"{x.ndim} dimensions" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            fix = "Send the rank that the loss was created with."
            raise LossInputError(name, f"a tensor of {rank} dimensions", got, fix)


def read_output(results: Mapping[str, Any], output: Output) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the metrics; refuse all but 0-d tensors."""
    loss = results[output.loss.name]
    if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
        raise LossInputError("loss", "a 0-d tensor of floats", form_of(loss), "Reduce it with .sum().")
    metrics = {name: results[ref.name] for name, ref in output.metrics.items()}
    for name, value in metrics.items():
        if not isinstance(value, Tensor) or value.ndim:
            raise LossInputError(f"metrics[{name!r}]", "a 0-d tensor", form_of(value), "Reduce it with .sum().")
    return loss, metrics


def form_of(x: Any) -> str:
    return f"shape {tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"


# Reading


def read_inputs(inputs: Any) -> dict[str, int]:
    """Return the rank of each input by name, ``logprobs`` first."""
    if not isinstance(inputs, Sequence) or isinstance(inputs, str) or not 0 < len(inputs) <= MOST_INPUTS:
        raise LossInputError("inputs", f"a list of 1 to {MOST_INPUTS} inputs", show(inputs), FIX)
    ranks: dict[str, int] = {}
    for i, each in enumerate(inputs):
        name, rank = read_fields(each, ("name", "rank"), f"inputs[{i}]")
        if not isinstance(name, str) or not INPUT_NAME.fullmatch(name) or name in ranks:
            raise LossInputError(
                f"inputs[{i}].name", "another name of lowercase letters, digits and _", show(name), FIX
            )
        if type(rank) is not int or rank not in (0, 1, 2):
            raise LossInputError(f"inputs[{i}].rank", "0, 1 or 2", show(rank), FIX)
        ranks[name] = rank
    if next(iter(ranks)) != "logprobs" or ranks["logprobs"] == 0:
        raise LossInputError("inputs[0]", "logprobs, of rank 1 or 2", show(inputs[0]), FIX)
    return ranks


def read_graph(graph: Any, inputs: list[str]) -> tuple[list[Node], list[str], Output]:
    """Return the nodes of a graph in order, the names of its placeholders, and its output."""
    version, rows = read_fields(graph, ("format", "nodes"), "graph", optional={"format": 1})
    if version != 1 or isinstance(version, bool):
        raise LossInputError("graph.format", "1", show(version), FIX)
    if not isinstance(rows, list) or not 0 < len(rows) <= MOST_NODES:
        got = f"{len(rows)}" if isinstance(rows, list) else f"a {type(rows).__name__}"
        raise LossInputError("graph.nodes", f"a list of 1 to {MOST_NODES} nodes", got, "Upload a smaller loss.")
    nodes: list[Node] = []
    placeholders: list[str] = []
    earlier: set[str] = set()
    for i, row in enumerate(rows):
        fields = ("op", "name", "target", "args", "kwargs")
        op, name, target, args, kwargs = read_fields(row, fields, f"nodes[{i}]", optional={"args": [], "kwargs": {}})
        for field, value in (("name", name), ("op", op), ("target", target)):
            if not isinstance(value, str) or not NAME.fullmatch(value):
                expected = "at most 128 letters, digits, dots and _"
                raise LossInputError(f"nodes[{i}].{field}", expected, show(value), FIX)
        where = f"nodes[{i}] {name} ({target})"
        if name in earlier:
            raise LossInputError(where, "a name of its own", "that of an earlier node", FIX)
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise LossInputError(where, "a list of arguments and a dict of keywords", show((args, kwargs)), FIX)
        if op == "placeholder":
            if nodes or len(placeholders) >= len(inputs) or target != inputs[len(placeholders)] or args or kwargs:
                expected = f"placeholders {', '.join(inputs)} in order, before all other nodes, without defaults"
                raise LossInputError(where, expected, show(target), FIX)
            placeholders.append(name)
        elif op == "output":
            if i + 1 < len(rows) or len(placeholders) < len(inputs):
                raise LossInputError(
                    where, f"an output after all other nodes, with {len(inputs)} placeholders", "another", FIX
                )
            return nodes, placeholders, read_returned(args, kwargs, earlier, where)
        elif op in ("call_function", "call_method"):
            nodes.append(read_node(op, name, target, args, kwargs, earlier, where))
        else:
            expected = "placeholder, call_function, call_method or output"
            raise LossInputError(where, expected, show(op), "A loss captures no tensor and no module.")
        earlier.add(name)
    raise LossInputError("graph.nodes", "an output as the last node", "none", FIX)


def read_fields(row: Any, names: Sequence[str], where: str, optional: Mapping[str, Any] | None = None) -> list[Any]:
    """Return the fields of a record; refuse one that is missing or has another name."""
    fields = {**(optional or {}), **row} if isinstance(row, Mapping) else {}
    if fields.keys() != set(names):
        got = f"{', '.join(map(show, row))}" if isinstance(row, Mapping) else f"a {type(row).__name__}"
        raise LossInputError(where, f"a record of {', '.join(names)}", got[:300], FIX)
    return [fields[name] for name in names]


def read_node(
    op: str, name: str, target: str, args: list[Any], kwargs: dict[str, Any], earlier: set[str], where: str
) -> Node:
    """Return the operation of a node with its arguments; refuse arguments that no operation may get."""
    operation = find_operation(op, target, where)
    if count_items([args, kwargs], where) > MOST_ITEMS:
        raise LossInputError(where, f"at most {MOST_ITEMS} arguments", "more", "Compute them from the inputs.")
    if target == "getattr":
        if len(args) != 2 or kwargs or not isinstance(args[1], str) or args[1] not in ATTRIBUTES:
            got, fix = show(args[1:]), "A loss sees the values of a tensor, its shape and its dtype."
            raise LossInputError(where, f"an attribute among {', '.join(ATTRIBUTES)}", got, fix)
        return Node(name, where, operation, (read_argument(args[0], earlier, where), args[1]), {})
    keywords = {key: value for key, value in kwargs.items() if not is_default(key, value)}
    for key, value in keywords.items():
        if key not in KEYWORDS:
            fix = "An operation neither changes a tensor nor chooses a device."
            raise LossInputError(where, "keywords that an uploaded loss may use", show(key), fix)
        if isinstance(value, str) and value not in TEXTS.get(key, ()):
            raise LossInputError(where, f"{key} among {', '.join(TEXTS.get(key, ())) or 'numbers'}", show(value), FIX)
    values = {k: v if isinstance(v, str) else read_argument(v, earlier, where) for k, v in keywords.items()}
    return Node(name, where, operation, tuple(read_argument(each, earlier, where) for each in args), values)


def is_default(key: str, value: Any) -> bool:
    """Return whether a keyword has the only value that it may have, and can be left out."""
    return key in DEFAULTS and type(value) is type(DEFAULTS[key]) and value == DEFAULTS[key]


def count_items(x: Any, where: str, depth: int = 0) -> int:
    """Return how many numbers, texts and results there are in arguments; refuse lists that are nested too deep."""
    if depth > DEEPEST:
        raise LossInputError(where, f"lists of at most {DEEPEST} levels", "more", "Compute it from the inputs.")
    if isinstance(x, (list, dict)):
        return 1 + sum(count_items(each, where, depth + 1) for each in (x.values() if isinstance(x, dict) else x))
    return 1


def read_argument(x: Any, earlier: set[str], where: str) -> Any:
    """Read an argument from its form on the wire."""
    if x is None or isinstance(x, (bool, float)):
        return x
    if isinstance(x, int):
        if abs(x) > LARGEST_INTEGER:
            raise LossInputError(where, "a whole number below 2**63", "a larger one", "Use floats.")
        return x
    if isinstance(x, list):
        return [read_argument(each, earlier, where) for each in x]
    if not isinstance(x, dict) or len(x) != 1:
        fix = "An uploaded loss has no text in its arguments, and chooses no device."
        raise LossInputError(where, "numbers, results and lists of them", show(x), fix)
    ((kind, value),) = x.items()
    if kind == "ref" and isinstance(value, str):
        if value not in earlier:
            raise LossInputError(where, "a reference to an earlier node", show(value), FIX)
        return Ref(value)
    if kind == "tuple" and isinstance(value, list):
        return tuple(read_argument(each, earlier, where) for each in value)
    if kind == "slice" and isinstance(value, list) and len(value) == 3:
        parts = [read_argument(each, earlier, where) for each in value]
        if all(part is None or type(part) is int or isinstance(part, Ref) for part in parts):
            return slice(*parts)
    if kind == "ellipsis" and value is True:
        return ...
    if kind == "float" and value in ("inf", "-inf", "nan"):
        return float(value)
    if kind == "dtype" and isinstance(value, str) and value in DTYPES:
        return DTYPES[value]
    fix = "A loss takes tensors as they come: it chooses no device, layout or memory format."
    raise LossInputError(
        where, f"a ref, tuple, slice, ellipsis, float, or a dtype of {', '.join(DTYPES)}", show(x), fix
    )


def read_returned(args: list[Any], kwargs: dict[str, Any], earlier: set[str], where: str) -> Output:
    """Read the loss and the metrics that a graph returns, from their form on the wire."""
    pair = args[0] if len(args) == 1 and not kwargs else None
    pair = pair.get("tuple") if isinstance(pair, dict) else pair
    if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[1], dict):
        raise LossInputError(where, "(loss, metrics)", show(args), "Return the loss and a dict of 0-d tensors.")
    loss, metrics = pair[0], pair[1].get("dict")
    if not isinstance(metrics, dict) or len(pair[1]) != 1 or len(metrics) > MOST_METRICS:
        raise LossInputError(where, f"a dict of at most {MOST_METRICS} metrics", show(pair[1]), "Return {} for none.")
    returned = {"loss": loss, **{f"metrics[{key!r}]": value for key, value in metrics.items()}}
    for key in metrics:
        if not METRIC_NAME.fullmatch(key):
            raise LossInputError(where, "metrics named custom/<name>:sum or custom/<name>:mean", show(key), FIX)
    refs = {}
    for key, value in returned.items():
        if not isinstance(value, dict) or [*value] != ["ref"]:
            raise LossInputError(f"{where} {key}", "the result of a node", show(value), "Return a tensor.")
        refs[key] = read_argument(value, earlier, f"{where} {key}")
    return Output(refs.pop("loss"), dict(zip(metrics, refs.values())))
