"""The rows of each framework, beside the formulas or the calls of its own functions that compute its numbers."""
