"""Modules that are not searched for doctests: they import the host that they adapt, which is slow or not installed."""

from importlib.util import find_spec
from pathlib import Path

collect_ignore = ["lossfns/integrations/transformers.py", "lossfns/integrations/trl.py"]
if find_spec("starlette") is None or find_spec("tinker") is None:  # the extra `server`
    collect_ignore += [f"lossfns/server/{path.name}" for path in Path("lossfns/server").glob("*.py")]
