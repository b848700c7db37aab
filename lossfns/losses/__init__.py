"""The losses by family: each preset with its equation."""
