"""Tests of a device, in a process of their own. ``LOSSFNS_DEVICE`` names the device: ``rehearsal``, or a real GPU."""

import os

if not os.environ.get("LOSSFNS_DEVICE"):
    collect_ignore_glob = ["*.py"]  # importing rehearsal.py would register the device for all tests of the process
