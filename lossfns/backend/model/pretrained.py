"""Write a model as a folder in the format of Hugging Face, and adapters in that of ``peft``. Needs the extra ``hf``."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from lossfns.backend.model import hf, lora
from lossfns.backend.model.decoder import Decoder
from lossfns.errors import LossInputError

BASE = "base"
"""The folder of the base model within that of its adapters, if it is nowhere else."""


def save_pretrained(model: nn.Module, tokenizer: Any, path: str | Path, merge: bool = False) -> Path:
    """Write a model to a new folder that ``transformers`` or ``peft`` loads, whole or not at all; see ``export``.

    Args:
        model: a ``Decoder`` or an ``hf.CausalLM``. It is changed: pass a copy.
        tokenizer: written beside the model by its ``save_pretrained``; None if there is none.
        path: a folder that is new or empty.
        merge: whether to merge adapters into the weights.

    Raises:
        LossInputError: a model or tokenizer of another kind, adapters that ``peft`` has no file for, or a folder that
            cannot be written to.
    """
    if not isinstance(model, (Decoder, hf.CausalLM)):
        fix = "Its checkpoints are safetensors files, which any program can read."
        raise LossInputError("model", "a Decoder or a hf.CausalLM", f"a {type(model).__name__}", fix)
    if tokenizer is not None and not callable(getattr(tokenizer, "save_pretrained", None)):
        got, fix = f"a {type(tokenizer).__name__}", "Give it one, or create the client without a tokenizer."
        raise LossInputError("tokenizer", "one with save_pretrained(folder)", got, fix)
    model = model.cpu()
    with new_folder(Path(path)) as (folder, final):
        if merge or all(layer.disable_adapters for layer in lora.wrapped_layers(model)):
            plain_model(model).save_pretrained(folder)
            save_tokenizer(tokenizer, folder)
        else:
            save_adapters(model.model if isinstance(model, hf.CausalLM) else as_llama(model), tokenizer, folder, final)
    return Path(path)


@contextmanager
def new_folder(path: Path) -> Iterator[tuple[Path, Path]]:
    """Yield a temporary folder, and its final path: it is moved there if the ``with`` block ends without an error."""
    final = path.absolute()
    temporary = final.with_name(f".{final.name}.{uuid4().hex[:12]}.partial")
    try:
        if final.exists() and (not final.is_dir() or any(final.iterdir())):
            raise LossInputError("path", "a new or empty folder", f"{path}", "Choose another: nothing is overwritten.")
        temporary.mkdir(parents=True)
        yield temporary, final
        readable_as_others(temporary)
        if final.exists():
            final.rmdir()
        os.rename(temporary, final)
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":  # of a full disk
            raise
        raise LossInputError("path", "a folder to write to", f"{path} ({error})", "Choose another.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def readable_as_others(folder: Path) -> None:
    """Give files the mode that the umask gives: ``safetensors`` writes them for their owner alone."""
    mode = folder.stat().st_mode & 0o666  # that of a new folder, without the bits to enter it
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


# Whole models


def plain_model(model: Decoder | hf.CausalLM) -> Any:
    """Return the model of transformers with its enabled adapters merged. Narrow weights then become float32."""
    if any(not layer.disable_adapters for layer in lora.wrapped_layers(model)):
        model = model.to(torch.promote_types(next(model.parameters()).dtype, torch.float32))
    lora.merge(model)
    return model.model if isinstance(model, hf.CausalLM) else as_llama(model)


@torch.no_grad()
def as_llama(decoder: Decoder) -> Any:
    """Return a ``LlamaForCausalLM`` that computes what a decoder does, with the same adapters."""
    shape = decoder.shape
    config = hf.transformers().LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["dim"],
        intermediate_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=decoder.head_dim,
        rms_norm_eps=1e-6,
        rope_theta=shape["rope_theta"],
        tie_word_embeddings=decoder.unembed.weight is decoder.embed.weight,
        max_position_embeddings=2**20,  # a decoder has no limit, and Llama needs a number
        bos_token_id=None,
        eos_token_id=256 if shape["vocab_size"] == 257 else None,
    )
    model = hf.transformers().LlamaForCausalLM(config).to(decoder.embed.weight.dtype)
    model.generation_config.eos_token_id = config.eos_token_id
    parts = {path: llama_parts(path, decoder) for path in weighted_paths(decoder)}
    for path, rows in parts.items():
        weights = decoder.get_submodule(path).weight.split([*rows.values()])  # type: ignore[operator]
        for place, weight in zip(rows, weights):
            model.get_submodule(place).weight.copy_(weight)
    if lora.wrapped_layers(decoder):
        copy_adapters(decoder, model, parts)
    return model.eval()


def weighted_paths(decoder: Decoder) -> list[str]:
    """Return the paths of the modules with a weight. An adapted layer counts as one module."""
    return [path for path, module in decoder.named_modules() if hasattr(module, "weight") and ".lora_" not in path
            and not path.endswith("base_layer")]  # fmt: skip


LLAMA = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "unembed": "lm_head",
    "attention_norm": "input_layernorm",
    "out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "down": "mlp.down_proj",
}
"""The names in Llama of the modules of ``Decoder`` and of its layers."""


def llama_parts(path: str, decoder: Decoder) -> dict[str, int]:
    """Return the modules of Llama that a module of a decoder consists of, and the number of rows of each."""
    _, layer, name = path.split(".") if "." in path else ("", "", path)
    heads, kv_heads, hidden, d = *(decoder.shape[key] for key in ("heads", "kv_heads", "hidden")), decoder.head_dim
    if name == "qkv":
        rows = {"self_attn.q_proj": heads * d, "self_attn.k_proj": kv_heads * d, "self_attn.v_proj": kv_heads * d}
    elif name == "gate_up":
        rows = {"mlp.gate_proj": hidden, "mlp.up_proj": hidden}
    else:
        rows = {LLAMA[name]: len(decoder.get_submodule(path).weight)}  # type: ignore[arg-type]
    return {f"model.layers.{layer}.{place}": n for place, n in rows.items()} if layer else rows


def copy_adapters(decoder: Decoder, model: Any, parts: Mapping[str, Mapping[str, int]]) -> None:
    """Copy the adapters of a decoder to its Llama. Each part of a layer gets a copy of A, and its own rows of B."""
    settings: Any = decoder.lora
    adapted = {path: layer for path, layer in decoder.named_modules() if hasattr(layer, "lora_A")}
    if settings is None or any([*layer.active_adapters] != [lora.ADAPTER] for layer in adapted.values()):
        raise other_adapters("others")
    targets = [place for path in adapted for place in parts[path]]
    lora.inject(model, targets, settings["rank"], settings["alpha"])
    for path, layer in adapted.items():
        b = layer.lora_B[lora.ADAPTER].weight.split([*parts[path].values()])
        for place, rows in zip(parts[path], b):
            target = model.get_submodule(place)
            for module, weight in ((target.lora_A, layer.lora_A[lora.ADAPTER].weight), (target.lora_B, rows)):
                module.to(weight.dtype)[lora.ADAPTER].weight.copy_(weight)


# Adapters


def save_adapters(model: Any, tokenizer: Any, folder: Path, final: Path) -> None:
    """Write the adapter in effect of a model of transformers as ``peft`` does, and the base model if it has no source.

    ``base_model_name_or_path`` names the source of the model if the source has the weights of the base model; otherwise
    the base model is written, too. The tokenizer is written beside the base model. It is written beside the adapter if
    it is as large as the vocabulary: ``peft`` resizes the base model to a tokenizer that is there.
    """
    layers = lora.wrapped_layers(model)
    names = {name for layer in layers for name in layer.active_adapters}
    if len(names) != 1 or any(layer.disable_adapters for layer in layers):
        raise other_adapters(f"{sorted(names)}, or some switched off")
    (name,) = names
    for layer in layers:
        if getattr(layer, "merged", False):
            layer.unmerge()
    config = copy.deepcopy(model.peft_config[name])
    state = lora.peft().get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    without_adapters(model)
    source = os.path.abspath(model.name_or_path) if os.path.exists(model.name_or_path) else model.name_or_path
    if not has_weights_of(model, source):
        model.save_pretrained(folder / BASE)
        save_tokenizer(tokenizer, folder / BASE)
        source = str(final / BASE)
    config.base_model_name_or_path, config.task_type, config.inference_mode = source, "CAUSAL_LM", True
    config.save_pretrained(folder)
    if tokenizer is not None and len(tokenizer) == len(model.get_input_embeddings().weight):
        save_tokenizer(tokenizer, folder)
    save_tensors({f"base_model.model.{key}": x for key, x in state.items()}, folder / "adapter_model.safetensors")


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: x.contiguous().clone() for name, x in tensors.items()}, path, {"format": "pt"})


def other_adapters(got: str) -> LossInputError:
    """Return the error for adapters that one file of ``peft`` cannot hold."""
    fix = "merge=True writes the model with all of them."
    return LossInputError("merge", "one adapter in effect, as one file of peft has", got, fix)


def without_adapters(model: Any) -> None:
    """Take the adapters off a model of transformers, in place."""
    for layer in lora.wrapped_layers(model):
        layer.enable_adapters(False)
    lora.merge(model)


def has_weights_of(model: Any, source: str) -> bool:
    """Return whether a model's weights are those that transformers loads from ``source``."""
    try:
        auto = hf.transformers().AutoModelForCausalLM
        loaded = auto.from_pretrained(source, dtype="auto", trust_remote_code=False) if source else None
    except (OSError, ValueError):
        return False
    if loaded is None or lora.wrapped_layers(loaded):
        return False
    weights, stored = model.state_dict(), loaded.state_dict()
    if weights.keys() != stored.keys():
        return False
    return all(torch.equal(x, stored[name].to(x.dtype)) for name, x in weights.items())
