"""Checkpoints: one file, or a folder that many processes write."""
