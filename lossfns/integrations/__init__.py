"""Losses in other people's trainers: one module for each host, each on top of ``padded`` and ``packed``.

Import the module of your host, such as ``lossfns.integrations.trl``. Only that module imports the host.
"""
