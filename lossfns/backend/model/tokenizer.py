"""A byte-level tokenizer that needs no vocabulary file."""

from __future__ import annotations

from collections.abc import Iterable


class ByteTokenizer:
    """Tokenizer of UTF-8 bytes, ids 0 to 255, with the end-of-sequence token as id 256."""

    eos_token = "<|eos|>"
    eos_token_id = 256
    vocab_size = 257

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the text's bytes; with ``add_special_tokens`` the end of sequence follows."""
        ids = [*text.encode("utf-8")]
        return [*ids, self.eos_token_id] if add_special_tokens else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text; broken UTF-8 becomes U+FFFD. The end of sequence is left out, or written as its name."""
        parts = [b""]
        for i in ids:
            if i != self.eos_token_id:
                parts[-1] += bytes([i])
            elif not skip_special_tokens:
                parts += [b""]
        return self.eos_token.join(part.decode("utf-8", errors="replace") for part in parts)
