"""GGUF files, converted once to folders in Hugging Face's format, in a cache on this machine. Needs the extra ``hf``.

``transformers`` takes half a minute to read a small GGUF file, and a second to read the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

from lossfns.errors import LossInputError

FORMAT = 1
"""The version of the folders that are written here. Folders of another version are not read."""

CONTENTS = "contents.json"
"""The file of a folder with its source and the digests of its other files. It is written last."""


def converted(file: Path) -> Path:
    """Return a folder with the model and the tokenizer of a GGUF file; convert the file if there is none yet.

    The folder is under ``$XDG_CACHE_HOME/lossfns``, or ``~/.cache/lossfns``. Its name tells the content of the file and
    the versions of the libraries that read it. A folder whose files are not those that were written is replaced.

    Raises:
        OSError, ValueError: the file cannot be read.
        LossInputError: the cache cannot be written.
    """
    with file.open("rb") as content:
        source = {"sha256": hashlib.file_digest(content, "sha256").hexdigest(), **versions()}
    name = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_folder() / "gguf" / f"{file.stem}-{name}"
    if is_intact(folder, source):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(mkdtemp(prefix=f".{name}-", dir=folder.parent))
    except OSError as error:
        got, fix = f"{folder.parent} ({error.strerror})", "Set XDG_CACHE_HOME to a folder that can be."
        raise LossInputError("cache", "a folder that can be written", got, fix) from error
    try:
        try:
            convert(file, partial)
        except Exception as error:  # a damaged file leads the readers into errors of any kind
            raise ValueError(str(error) or type(error).__name__) from error
        digests = {path.name: digest(path) for path in partial.iterdir()}
        (partial / CONTENTS).write_text(json.dumps({"source": source, "sha256": digests}))
        publish(partial, folder, source)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def versions() -> dict[str, str]:
    """Return the versions of everything that takes part in a conversion."""
    return {"format": str(FORMAT), **{name: version(name) for name in ("gguf", "torch", "transformers")}}


def cache_folder() -> Path:
    """Return the folder of this user's caches of lossfns."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "lossfns"


def is_intact(folder: Path, source: dict[str, str]) -> bool:
    """Return whether a folder holds the conversion of a source, and all of its files as they were written."""
    try:
        contents = json.loads((folder / CONTENTS).read_text())
        names = {path.name for path in folder.iterdir()} - {CONTENTS}
        return bool(
            contents["source"] == source
            and names == set(contents["sha256"])
            and all(digest(folder / name) == known for name, known in contents["sha256"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def publish(partial: Path, folder: Path, source: dict[str, str]) -> None:
    """Rename a complete folder to its final path. An intact folder there is kept, a damaged one is replaced."""
    for _ in range(2):
        try:
            partial.rename(folder)
            return
        except OSError:
            if is_intact(folder, source):
                return
            with TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as aside, suppress(OSError):
                folder.rename(Path(aside) / "damaged")
    raise LossInputError("cache", "a folder of its own", f"{folder}, which others change", "Try again.")


def convert(file: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer into a folder, in Hugging Face's format.

    The end tokens that only the GGUF file declares join those of the generation settings.
    """
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype="auto", trust_remote_code=False
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    ends = end_tokens(file)
    if model.generation_config is not None and ends:
        model.generation_config.eos_token_id = ends
    model.hf_quantizer = None  # the weights are floating-point numbers now, which a quantised model would not save
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def end_tokens(file: Path) -> list[int]:
    """Return the ids that a GGUF file declares as the end of a text, of a turn or of a message."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    found = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return sorted({int(field.contents()) for field in found if field is not None})
