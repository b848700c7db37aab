"""Tests of a device run in a process of their own, which ``LOSSFNS_DEVICE`` names it: ``rehearsal``, or a real GPU."""

import os

if not os.environ.get("LOSSFNS_DEVICE"):
    collect_ignore_glob = ["*.py"]  # an import of rehearsal.py would register the device in every other test's process
