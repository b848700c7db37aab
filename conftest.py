"""Modules that are not searched for doctests: they import the host that they adapt, which is slow or not installed."""

collect_ignore = ["lossfns/integrations/transformers.py", "lossfns/integrations/trl.py"]
