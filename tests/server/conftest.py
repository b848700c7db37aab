"""Without the extra `server`, modules that import the SDK cannot be collected; the other tests skip themselves."""

from importlib.util import find_spec

collect_ignore = []
if any(find_spec(name) is None for name in ("starlette", "tinker", "zstandard")):
    collect_ignore += ["malformed.py", "malformed_messages.py", "requests_of_endpoints.py", "test_fuzz.py"]
