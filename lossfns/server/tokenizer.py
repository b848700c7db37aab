"""The byte tokenizer as a folder of ``transformers``, for the SDK's ``get_tokenizer`` on the machine of the server."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lossfns.backend.model.tokenizer import ByteTokenizer


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
