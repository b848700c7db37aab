"""The losses by family: equation and preset side by side."""
