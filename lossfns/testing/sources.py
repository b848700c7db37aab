"""What the source of a function says of its arguments and results: shapes in comments, names of returned elements."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import torch

from lossfns.testing.settings import parameters

VERL_RETURNS = ("pg_loss", "pg_clipfrac", "ppo_kl", "pg_clipfrac_lower")


@functools.cache
def return_statements(fn: Any) -> list[list[str]]:
    """Return the names in each tuple that a function's source returns; "" for an element that has no name."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(fn)))
    except (OSError, TypeError, SyntaxError):
        return []
    outer = next((node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))), None)
    found: list[list[str]] = []
    nodes: list[ast.AST] = list(outer.body) if outer else []
    while nodes:
        node = nodes.pop(0)
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            found.append([element_name(element) for element in node.value.elts])
        if not isinstance(node, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            nodes += ast.iter_child_nodes(node)
    return found


def source_of(fn: Any) -> Any:
    """Return the function that a callable runs: ``forward`` of a module, ``__call__`` of an object."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn.forward if isinstance(fn, torch.nn.Module) else fn if inspect.isroutine(fn) else type(fn).__call__


SHAPE_OF_ADVANTAGES = re.compile(
    r"\badv\w*[^\n.;]{0,30}?[\[(] *(?:B|N|bs|bsz|batch|batch_size) *(?:, *(1|T|L|S|seq\w*)? *)?[\])]", re.IGNORECASE
)


def stated_shape(fn: Any) -> str:
    """Return ``Form.advantages`` as docstrings and comments state it: "datum" for ``[B]``, ...; or ""."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(source_of(fn))))
        body = ast.parse(source).body[0]
        documented = ast.get_docstring(body) or "" if isinstance(body, ast.FunctionDef) else ""
    except (OSError, TypeError, SyntaxError, IndexError):
        return ""
    comments = "\n".join(re.findall(r"#(.*)", source))
    found = SHAPE_OF_ADVANTAGES.findall(f"{documented}\n{inspect.getdoc(fn) or ''}\n{comments}")
    shapes = {"column" if size == "1" else "tokens" if size else "datum" for size in found}
    return shapes.pop() if len(shapes) == 1 else ""


def element_name(node: ast.AST) -> str:
    """Return the name of a returned element such as ``ppo_kl.detach()`` or ``float(kl)``, or ""."""
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute):
            same = node.func.attr in ("item", "detach", "mean", "cpu", "float", "clone", "to", "sum")
            return element_name(node.func.value) if same else ""
        return element_name(node.args[0]) if len(node.args) == 1 else ""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def result_names(fn: Any, count: int) -> Sequence[str]:
    """Return the names of the elements of a returned tuple: from the source, or those of verl where it has none."""
    statements = return_statements(inspect.unwrap(source_of(fn)))
    named = [names for names in statements if len(names) == count]
    if named:
        return named[-1]
    verl = {"response_mask", "old_log_prob"} <= {p.name for p in parameters(fn)}
    return VERL_RETURNS[:count] if verl and not statements and count <= 4 else [""] * count
