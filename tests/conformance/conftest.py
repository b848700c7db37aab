"""Without the extra `server`, modules that import the SDK cannot be collected; the other tests skip themselves."""

from importlib.util import find_spec
from pathlib import Path

collect_ignore = []
if any(find_spec(name) is None for name in ("starlette", "tinker", "zstandard")):
    collect_ignore += [path.name for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("test_")]
