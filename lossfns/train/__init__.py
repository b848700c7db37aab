"""``lossfns train``: every method on a local model, on built-in data or on one's own."""
