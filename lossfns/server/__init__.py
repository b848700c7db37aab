"""A server for the ``tinker`` SDK on local models: ``lossfns serve``, or ``local_service`` without a socket.

The public names need the extra ``server``, and are imported when they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossfns.server.app import create_app
    from lossfns.server.command import serve
    from lossfns.server.local import local_service
    from lossfns.server.service import Service

__all__ = ["Service", "create_app", "local_service", "serve"]

MODULES = {"Service": "service", "create_app": "app", "local_service": "local", "serve": "command"}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lossfns"):
            raise
        raise ImportError(f"the server needs {error.name}: pip install 'lossfns[server]'") from error
