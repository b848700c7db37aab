"""Adapters from losses to the hooks of other trainers, one module for each trainer."""
