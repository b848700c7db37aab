"""The writer of the golden vectors. Cases are written by hand; the oracle answers them."""
