"""Losses in other trainers: one module for each, on top of ``padded`` and ``packed``.

Import the module of your trainer, such as ``lossfns.integrations.trl``. Only that module imports the trainer.
"""
