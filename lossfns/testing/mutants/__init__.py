"""Known-wrong losses, each with one bug: what a law must kill, and what a test of yours should catch.

Every mutant is ``(data, logprobs_list) -> (loss, metrics)`` with its knobs as keywords (those of advantages are
``(rewards, groups) -> advantages``), and says what it is: ``.bug``, an id of ``lossfns.testing.bugs``; ``.kind``;
``.like``, the loss it claims to be; ``.seen``, where such a bug happened. ``BASELINES`` are the correct losses
they were made from, one expression apart.

>>> from lossfns.testing.mutants import MUTANTS, ppo_ratio_inverted
>>> ppo_ratio_inverted.bug, ppo_ratio_inverted.like.name, ppo_ratio_inverted is MUTANTS["ppo_ratio_inverted"]
('ratio-inverted', 'ppo', True)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lossfns.testing.mutants import advantages, parts, policy, policy_batch, preference, supervised


def marked(module: Any, name: str) -> dict[str, Callable[..., Any]]:
    """A module's functions that carry the attribute."""
    return {key: value for key, value in vars(module).items() if hasattr(value, name)}


MUTANTS = {
    name: function
    for module in (policy_batch, policy, supervised, preference, advantages)
    for name, function in marked(module, "bug").items()
}
"""Every mutant by its name."""

BASELINES = marked(parts, "like")
"""Every correct loss by its name."""

globals().update(MUTANTS)
