"""Check anyone's loss: oracle now; laws, strategies and vectors build on it."""
