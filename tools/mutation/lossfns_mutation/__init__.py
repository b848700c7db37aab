"""Plugins for cosmic-ray; see the README beside this package."""
