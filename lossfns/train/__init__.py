"""``lossfns train``: train a local model with any of the methods, on built-in data or on your own."""
