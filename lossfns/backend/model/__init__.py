"""Models, their attention, adapters, tokenizer and sampling."""
