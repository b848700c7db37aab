"""Write the golden vectors: the cases are written by hand, and the oracle gives the answers."""
