"""The sections of ``tools/gpu_check.py``: functions of the device that return their checks by name."""
