"""Without the extra `server`, modules that import the SDK cannot be collected; the other tests skip themselves."""

from importlib.util import find_spec

OF_THE_SDK = ("malformed_requests.py", "malformed_messages.py", "requests_of_endpoints.py", "test_malformed_requests.py")

missing = any(find_spec(name) is None for name in ("starlette", "tinker", "zstandard"))
collect_ignore = [*OF_THE_SDK] if missing else []
