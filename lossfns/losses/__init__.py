"""The losses by family: each preset with its equation. ``lossfns`` exports them all."""
