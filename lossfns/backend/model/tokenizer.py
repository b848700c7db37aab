"""A byte-level tokenizer that needs no vocabulary file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


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

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files that ``AutoTokenizer.from_pretrained`` reads, as the tokenizers of transformers do."""
        write_byte_tokenizer(Path(folder))


def byte_characters() -> list[str]:
    """Return the character that stands for each byte in byte-level vocabularies: itself, where it can be printed."""
    printed = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printed else chr(next(others)) for byte in range(256)]


def write_byte_tokenizer(folder: Path) -> Path:
    """Write the files that ``AutoTokenizer.from_pretrained`` reads, unless they are there, and return the folder."""
    if (folder / "tokenizer.json").exists():
        return folder
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    end = {"id": ByteTokenizer.eos_token_id, "content": ByteTokenizer.eos_token, "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [end | flags],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": ByteTokenizer.eos_token}
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (("tokenizer_config.json", config), ("tokenizer.json", tokenizer)):
        part = folder / f"{name}.part"
        part.write_text(json.dumps(value))
        os.replace(part, folder / name)
    return folder
