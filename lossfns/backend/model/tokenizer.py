"""A byte-level tokenizer that needs no vocabulary file."""

from __future__ import annotations

from collections.abc import Iterable


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and one end-of-sequence id after them."""

    eos_token = "<|eos|>"
    eos_token_id = 256
    vocab_size = 257

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The text's bytes, and the end of sequence if special tokens are asked for."""
        return [*text.encode("utf-8")] + [self.eos_token_id] * add_special_tokens

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; the end of sequence is dropped, broken UTF-8 becomes U+FFFD."""
        return bytes(i for i in ids if i != self.eos_token_id).decode("utf-8", errors="replace")
