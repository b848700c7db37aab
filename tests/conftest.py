"""Property tests: the same examples every time in CI, new ones on every local run."""

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("explore", deadline=None, max_examples=100)
settings.load_profile("ci" if os.environ.get("CI") else "explore")
