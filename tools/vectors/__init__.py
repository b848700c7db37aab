"""The writer of the golden vectors: cases written by hand, answered by the oracle."""
