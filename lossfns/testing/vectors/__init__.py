"""Golden vectors: right answers from the oracle as JSON, flagged with the bugs they detect. See docs/vectors.md."""

from lossfns.testing.vectors.library import subject_for
from lossfns.testing.vectors.runner import run
from lossfns.testing.vectors.vector import METHODS, Vector, load, mistake

__all__ = ["METHODS", "Vector", "load", "mistake", "run", "subject_for"]
