"""Mutation operators for code that is mostly arithmetic on tensors, in addition to those of cosmic-ray.

Each operator is one function: it takes a node and yields the sources that can replace the node.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import parso
from cosmic_ray.operators.operator import Operator

MODULES = {"torch", "np", "F", "eq", "math", "functools", "inspect"}
MESSAGES = {"LossInputError", "TypeError", "warn", "did_you_mean", "not_divisible"}
BINARY = {"arith_expr", "term", "expr", "xor_expr", "and_expr", "and_test", "or_test"}
SWAPPED = [
    ("min", "max"),
    ("minimum", "maximum"),
    ("chosen", "rejected"),
    ("any", "all"),
    ("sum", "mean"),
    ("low", "high"),
    ("exp", "expm1"),
    ("isnan", "isfinite"),
    ("PAIRS", "TOKENS"),
    ("TARGETS", "SEQUENCES"),
    ("amin", "amax"),
    ("weights", "active"),
    ("old_logprobs", "sampler_logprobs"),
    ("ref_logprobs", "logprobs"),
    ("weighted_sum", "weighted_mean"),
    ("k2", "k3"),
    ("float64", "float32"),
]
SWAPS = dict(SWAPPED) | {b: a for a, b in SWAPPED}


def source(*nodes: Any) -> str:
    return "".join(node.get_code() for node in nodes).strip()


def children(node: Any) -> list[Any]:
    return getattr(node, "children", [])


def is_call(node: Any) -> bool:
    return node.type == "trailer" and node.children[0].value == "("


def is_message(node: Any) -> bool:
    """Whether the node is a part of an error or a warning."""
    while node is not None and node.type != "funcdef":
        if node.type == "raise_stmt":
            return True
        if node.type == "atom_expr" and getattr(node.children[0], "value", "") in MESSAGES:
            return True
        node = node.parent
    return False


def elements(node: Any) -> list[list[Any]]:
    """Return the elements of a comma-separated node: for each, the list of its nodes, without the commas."""
    groups: list[list[Any]] = [[]]
    for child in children(node):
        if getattr(child, "value", "") == ",":
            groups.append([])
        else:
            groups[-1].append(child)
    return [group for group in groups if group]


def without_each(groups: list[list[Any]], droppable: Callable[[list[Any]], bool] = bool) -> Iterator[str]:
    for i, group in enumerate(groups):
        if droppable(group):
            yield ", ".join(source(*other) for j, other in enumerate(groups) if j != i) + ","


def is_keyword(group: list[Any]) -> bool:
    return group[0].type == "argument" and getattr(group[0].children[1], "value", "") == "="


def is_positional(group: list[Any]) -> bool:
    return group[0].type != "argument" and len(group) == 1


def arguments(trailer: Any) -> list[list[Any]]:
    inside = trailer.children[1:-1]
    if not inside:
        return []
    return elements(inside[0]) if inside[0].type == "arglist" else [inside]


def drop_operand(node: Any) -> Iterator[str]:
    """``a + b`` -> ``a``, ``b``; ``a - b`` -> ``a``, ``-b``; ``a / b`` -> ``a``, ``1 / b``."""
    if node.type in BINARY:
        parts = node.children
        first = {"-": "-", "/": "1 /"}.get(parts[1].value, "")
        yield f"({first}{source(*parts[2:])})"
        for i in range(2, len(parts), 2):
            yield f"({source(*parts[: i - 1], *parts[i + 1 :])})"


def swap_operands(node: Any) -> Iterator[str]:
    """``a - b`` -> ``b - a``; ``a / b`` -> ``b / a``."""
    if node.type in ("arith_expr", "term") and len(node.children) == 3 and node.children[1].value in "-/":
        a, op, b = node.children
        yield f"({source(b)} {op.value} ({source(a)}))"


def drop_method(node: Any) -> Iterator[str]:
    """``x.detach().abs()`` -> ``x.abs()``, ``x.detach()``."""
    if node.type == "atom_expr" and not is_message(node):
        parts = node.children
        for i in range(2, len(parts)):
            named = parts[i - 1].type == "trailer" and parts[i - 1].children[0].value == "."
            if is_call(parts[i]) and named and not (i == 2 and getattr(parts[0], "value", "") in MODULES):
                yield f"({source(*parts[: i - 1], *parts[i + 1 :])})"


def drop_function(node: Any) -> Iterator[str]:
    """``f(a, b)`` -> ``a``, ``b``."""
    if node.type == "atom_expr" and is_call(node.children[-1]) and not is_message(node):
        for group in arguments(node.children[-1]):
            if is_positional(group):
                yield f"({source(*group)})"


def drop_keyword(node: Any) -> Iterator[str]:
    """``x.clamp(max=c)`` -> ``x.clamp()``."""
    if node.type == "trailer" and is_call(node) and not is_message(node):
        for rest in without_each(arguments(node), is_keyword):
            yield f"({rest.lstrip(',')})"


def swap_arguments(node: Any) -> Iterator[str]:
    """``f(a, b)`` -> ``f(b, a)``."""
    if node.type == "arglist" and not is_message(node):
        groups = elements(node)
        for i in range(len(groups) - 1):
            if is_positional(groups[i]) and is_positional(groups[i + 1]):
                swapped = [*groups[:i], groups[i + 1], groups[i], *groups[i + 2 :]]
                yield ", ".join(source(*group) for group in swapped)


def swap_name(node: Any) -> Iterator[str]:
    """``min`` -> ``max``, ``chosen`` -> ``rejected``, and so on: a name -> the other name of its pair."""
    if node.type == "name" and node.value in SWAPS and not node.is_definition():
        yield SWAPS[node.value]


def scale_number(node: Any) -> Iterator[str]:
    """``c`` -> ``2c``, ``0``."""
    if node.type == "number" and float(node.value) != 0:
        yield f"({node.value} * 2)"
        yield "0.0" if "." in node.value or "e" in node.value else "0"


def negate_return(node: Any) -> Iterator[str]:
    """``return x`` -> ``return -(x)`` for a number or tensor, ``return not (x)`` for a bool."""
    if node.type == "return_stmt" and len(node.children) == 2:
        function = parso.tree.search_ancestor(node, "funcdef")
        returns = source(function.annotation) if function is not None and function.annotation else ""
        sign = {"Tensor": "-", "float": "-", "np.ndarray": "-", "bool": "not "}.get(returns)
        if sign:
            yield f"return {sign}({source(node.children[1])})"


def drop_statement(node: Any) -> Iterator[str]:
    """A call, a raise or an assignment to an attribute -> ``pass``."""
    if node.type == "simple_stmt":
        statement = node.children[0]
        sets_attribute = statement.type == "expr_stmt" and statement.children[0].type == "atom_expr"
        calls = statement.type == "atom_expr" and is_call(statement.children[-1])
        if statement.type == "raise_stmt" or calls or sets_attribute:
            yield "pass" + node.children[-1].get_code()


def drop_context(node: Any) -> Iterator[str]:
    """``with c: ...`` -> ``...``."""
    if node.type == "with_stmt":
        yield "if True:" + node.children[-1].get_code()


def choose_branch(node: Any) -> Iterator[str]:
    """``a if c else b`` -> ``a``, ``b``."""
    if node.type in ("test", "ternary") and getattr(node.children[1], "value", "") == "if":
        yield f"({source(node.children[0])})"
        yield f"({source(node.children[4])})"


def drop_item(node: Any) -> Iterator[str]:
    """A tuple, list, set or dict -> the same without one of its items."""
    literal = node.type in ("testlist_comp", "dictorsetmaker") and not is_message(node)
    if literal and not any(child.type.endswith("comp_for") for child in node.children):
        yield from without_each(elements(node))


def drop_condition(node: Any) -> Iterator[str]:
    """``x for x in y if c`` -> ``x for x in y``."""
    if node.type == "comp_if":
        yield ""


def misspell(node: Any) -> Iterator[str]:
    """A string that is a name and not a part of a message -> another name."""
    if node.type == "string" and re.fullmatch(r'"[\w:-]+"', node.value) and not is_message(node):
        yield f'"XX{node.value[1:]}'


class Rewrite(Operator):
    """An operator of cosmic-ray that a function of this module defines."""

    variants: Callable[[Any], Iterator[str]]

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        for _ in self.variants(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        return parso.parse(node.get_first_leaf().prefix + list(self.variants(node))[index])

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class Provider:
    """All operators by name, in the form that cosmic-ray expects."""

    functions = (
        drop_operand,
        swap_operands,
        drop_method,
        drop_function,
        drop_keyword,
        swap_arguments,
        swap_name,
        scale_number,
        negate_return,
        drop_statement,
        drop_context,
        choose_branch,
        drop_item,
        drop_condition,
        misspell,
    )

    def __init__(self) -> None:
        self.operators = {
            f.__name__: type(f.__name__, (Rewrite,), {"variants": staticmethod(f)}) for f in self.functions
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self.operators)

    def __getitem__(self, name: str) -> type[Rewrite]:
        return self.operators[name]
