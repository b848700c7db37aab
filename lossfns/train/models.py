"""The model of a run: what ``--model``, ``--lora``, ``--dtype`` and ``--gradient-checkpointing`` name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lossfns.backend.client.reference import embedded_model
from lossfns.backend.client.training import LocalTrainingClient
from lossfns.backend.engine.ranks import start as start_ranks
from lossfns.backend.model import hf, lora
from lossfns.backend.model.tokenizer import ByteTokenizer
from lossfns.errors import LossInputError
from lossfns.train.options import Options, naming
from lossfns.train.render import Renderer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
"""The dtypes of weights by the names that ``--dtype`` takes."""

MODEL = {"source": "--model", "model": "--model"}
"""How the command line calls what the errors of a model name."""

PARTS = ("attn", "mlp", "unembed")
"""The parts of a model that can have adapters."""


def load_client(options: Options) -> LocalTrainingClient:
    """Load the model that the options name, and return a training client of it.

    Without ``model`` it is the embedded one. With ``lora`` only adapters are trained, and ``client.reference()`` is the
    model as it was loaded.

    Raises:
        LossInputError: a model that is not found or cannot be trained here, or an unknown dtype or part.
        ImportError: the extra that the model needs is not installed.
    """
    dtype = None if options.dtype is None else check_dtype(options.dtype)
    parts = check_parts(options.lora_parts) if options.lora else []
    mesh = start_ranks(options.device)
    with naming(MODEL):
        model, tokenizer = load_model(options, dtype)
    if options.lora:
        with naming({"base_model": "--lora"}):
            lora.adapt(model, rank=options.lora, parts=parts, seed=options.seed)
    if options.gradient_checkpointing:
        model.checkpointing = True  # type: ignore[assignment]
    return LocalTrainingClient(model, tokenizer=tokenizer, device=options.device, mesh=mesh, name=options.model)


def check_trained(client: LocalTrainingClient) -> None:
    """Refuse to train weights of float16: the eps of AdamW is 0 there, and steps of usual size are lost to rounding."""
    if any(p.dtype == torch.float16 and p.requires_grad for p in client.model.parameters()):
        fix = "Pass --dtype float32, or train adapters, which are float32: --lora 8."
        raise LossInputError("--dtype", "trained weights of float32, bfloat16 or float64", "float16", fix)


def renderer_of(model: str | None) -> Renderer:
    """Return the renderer of a model, or of the embedded one. Only the tokenizer and the configuration are loaded."""
    with naming(MODEL):
        if model is None:
            return Renderer(ByteTokenizer())
        return Renderer(hf.load_tokenizer(model), *hf.sizes(model))


def load_model(options: Options, dtype: torch.dtype | None) -> tuple[nn.Module, Any]:
    """Return the model that the options name, with weights of a dtype, and its tokenizer."""
    if options.model is not None:
        return hf.load(options.model, dtype=dtype or "auto")
    model, tokenizer = embedded_model(options.seed)
    return model.to(dtype=dtype), tokenizer


def check_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name."""
    if name not in DTYPES:
        raise LossInputError("--dtype", f"one of {', '.join(DTYPES)}", repr(name), "Leave it out to keep the file's.")
    return DTYPES[name]


def check_parts(text: str) -> list[str]:
    """Return the parts that a text names, separated by commas.

    >>> check_parts("attn,mlp")
    ['attn', 'mlp']
    """
    parts = text.split(",")
    if not set(parts) <= set(PARTS) or len(set(parts)) < len(parts):
        expected = f"some of {', '.join(PARTS)}, each once, with commas between them"
        raise LossInputError("--lora-parts", expected, repr(text), "attn,mlp is usual.")
    return parts
