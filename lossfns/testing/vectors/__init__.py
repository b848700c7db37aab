"""Golden vectors: right answers from the oracle as JSON, each flagged with the bugs it hunts; see docs/vectors.md."""

from lossfns.testing.vectors.ours import subject_for
from lossfns.testing.vectors.runner import run
from lossfns.testing.vectors.vector import METHODS, Vector, load, mistake

__all__ = ["METHODS", "Vector", "load", "mistake", "run", "subject_for"]
