"""Functions of the user, imported by name from a module or a Python file."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from functools import cache
from pathlib import Path
from typing import Any

from lossfns.errors import LossInputError, did_you_mean


def load(path: str, where: str = "subject") -> Any:
    """Import the object that ``package.module:name`` or ``file.py:name`` names. The name may be dotted.

    Args:
        path: the module or file, and the name after a colon.
        where: the argument that an error names.

    Raises:
        LossInputError: if there is no such module or name, or the module cannot be imported.
    """
    module_name, _, attribute = path.rpartition(":")
    if not module_name or not attribute:
        expected, fix = "module:function or file.py:function", "Name the function after a colon."
        raise LossInputError(where, expected, repr(path), fix)
    if os.getcwd() not in sys.path:  # as for ``python``: modules in the current folder are found
        sys.path.insert(0, os.getcwd())
    try:
        module = from_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
    except LossInputError:
        raise
    except (Exception, SystemExit) as error:
        got = described(error)
        fix = "Check the name." if place_of(error) == "" else "Correct it there."
        if "relative import" in str(error):
            fix = "It is part of a package: name it as package.module:name, from the folder that holds the package."
        raise LossInputError(where, f"that {module_name} can be imported", got, fix) from error
    result: Any = module
    for name in attribute.split("."):
        if not hasattr(result, name):
            hint = did_you_mean(name, [n for n in dir(result) if not n.startswith("_")])
            raise LossInputError(where, f"a name in {module_name}", repr(name), hint)
        result = getattr(result, name)
    return result


def file_of(path: str) -> str | None:
    """Return the Python file of a module that ``load`` has imported, for the same path; None if it has none."""
    module_name = path.rpartition(":")[0]
    loaded = sys.modules.get(module_name)
    return module_name if module_name.endswith(".py") else getattr(loaded, "__file__", None)


PACKAGES = tuple({os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "purelib", "platlib")})
LIBRARY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")


def place_of(error: BaseException) -> str:
    """Return ``file:line`` of the innermost code of the user in a traceback; an empty text if there is none there."""
    others = (*PACKAGES, LIBRARY, "<")
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(others)]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""


def described(error: BaseException) -> str:
    """Return an error of the user's code in a line: its type, what it says, and the file and line that raised it."""
    place, text = place_of(error), " ".join(str(error).split())
    return f"{type(error).__name__}{text and f': {text}'}{place and f' ({place})'}"


def from_file(path: str) -> Any:
    """Import a Python file as Python imports a script, but under the name of the file.

    Its folder comes first on ``sys.path``, and the module is in ``sys.modules``, so that it can import its neighbours,
    define dataclasses and be pickled. A file runs once, unless it has changed since.
    """
    file = Path(path).resolve()
    folder, state = str(file.parent), file.stat()
    sys.path[:] = [folder, *(entry for entry in sys.path if entry != folder)]
    return module_of(file, state.st_mtime_ns, state.st_size)


@cache
def module_of(file: Path, mtime: int, size: int) -> Any:
    """Import a file of this time of change and size."""
    name = file.stem
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) != str(file):
        name = f"{name}_under_test"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
