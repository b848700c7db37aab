"""Filter: skip mutants that do not compile, or that are the same program as the original or an earlier mutant.

python -m lossfns_mutation.skip session.sqlite
"""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path
from typing import Any

from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.tools.filters.filter_app import FilterApp
from cosmic_ray.work_item import WorkerOutcome, WorkResult


class StripTypesAndDocstrings(ast.NodeTransformer):
    """Removes the annotations, docstrings and type aliases of a module."""

    def __init__(self, aliases: set[str]) -> None:
        self.aliases = aliases

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        if getattr(node.targets[0], "id", "") in self.aliases:
            node.value = ast.Constant(...)
        self.generic_visit(node)
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        node.annotation = ast.Constant(...)
        self.generic_visit(node)
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.Expr:
        if isinstance(node.value, ast.Constant):
            node.value = ast.Constant(...)
        self.generic_visit(node)
        return node


def aliases(code: str) -> set[str]:
    """Return the names of type aliases, such as ``KL = Callable[[Tensor], Tensor]`` or ``P = ParamSpec("P")``."""
    return set(re.findall(r"^(\w+) = (?:\w+\[|ParamSpec\()", code, re.MULTILINE))


def meaning(code: str, aliases: set[str]) -> str | None:
    """Return a text that is equal for equal programs; None if the code does not compile."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(code)
            compile(code, "mutant", "exec")
    except (SyntaxError, ValueError):
        return None
    return ast.dump(StripTypesAndDocstrings(aliases).visit(tree))


class Skip(FilterApp):
    def description(self) -> str | None:
        return __doc__

    def filter(self, work_db: Any, args: Any) -> None:
        seen: dict[Path, set[str | None]] = {}
        for item in list(work_db.pending_work_items):
            mutation = item.mutations[0]
            path = mutation.module_path
            code = path.read_text()
            known = seen.setdefault(path, {None, meaning(code, aliases(code))})
            mutant = mutate_code(code, get_operator(mutation.operator_name)(), mutation.occurrence)
            key = None if mutant is None else meaning(mutant, aliases(code))
            if key in known:
                work_db.set_result(item.job_id, WorkResult(WorkerOutcome.SKIPPED, output="no new program"))
            known.add(key)


if __name__ == "__main__":
    Skip().main()
