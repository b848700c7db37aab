"""``lossfns export RUN DIR``: the model of a run or a checkpoint in the formats of Hugging Face and ``peft``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lossfns.backend.client.service import adapted_as_saved
from lossfns.backend.client.training import LocalTrainingClient
from lossfns.backend.engine.state import check_description
from lossfns.backend.model import lora
from lossfns.backend.model.decoder import Decoder
from lossfns.backend.model.tokenizer import ByteTokenizer
from lossfns.backend.storage import checkpoint
from lossfns.errors import LossInputError
from lossfns.terminal import print_refusal, say, status, while_read
from lossfns.train.checkpoints import checkpoints
from lossfns.train.options import check_option, naming
from lossfns.train.remote import path_on_server
from lossfns.train.run import CONFIG, check_new, load_config


def add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``export`` command to a command line."""
    p = commands.add_parser(
        "export",
        help="write a trained model for transformers and peft",
        description="Write the newest checkpoint of a run, or any checkpoint, to a new folder that transformers loads. "
        "A model with adapters becomes a folder for peft, unless they are merged.",
    )
    p.add_argument("source", metavar="RUN", help="the run folder, or a checkpoint")
    p.add_argument("folder", metavar="DIR", help="the new folder")
    p.add_argument("--merge", action="store_true", help="merge the adapters into the weights")
    p.add_argument("--model", metavar="MODEL", help="where the model was loaded from, if it has moved since")
    p.set_defaults(run=export_command, parser=p)


def export_command(args: argparse.Namespace) -> int:
    """Run ``lossfns export``.

    Returns:
        0, or 2 if the input was refused.
    """
    try:
        check_option("RUN", args.source)
        check_option("DIR", args.folder)
        path, model = newest(Path(args.source))
        torch.set_num_threads(1)  # others would mostly wait, at full load
        with naming(dict.fromkeys(("source", "model"), "--model" if args.model else "RUN")):
            export(path, args.folder, merge=args.merge, model=args.model or model)
    except (LossInputError, ImportError, OSError) as error:
        return print_refusal(error)
    except KeyboardInterrupt:
        return 130
    with while_read(sys.stdout):
        say(f"exported    {args.folder}")
        if base := base_of(Path(args.folder)):
            say(f"base model  {base}")
        say(f"train more  lossfns train sft --model {args.folder}")
    return 0


def base_of(folder: Path) -> str:
    """Return where the base model of exported adapters is; an empty text for a whole model."""
    adapters = folder / "adapter_config.json"
    if not adapters.is_file():
        return ""
    base = str(json.loads(adapters.read_text(encoding="utf-8"))["base_model_name_or_path"])
    if not os.path.exists(base):
        return base
    place = "within it" if Path(base).absolute().is_relative_to(folder.absolute()) else "only on this machine"
    return f"{base}, {place}; --merge writes a whole model"


def newest(source: Path) -> tuple[Path, str | None]:
    """Return the newest checkpoint of a run and the run's ``--model``; for a checkpoint, itself and None."""
    if not (source / CONFIG).is_file():
        return source, None
    options = load_config(source, "RUN")["options"]
    found = checkpoints(source)
    if not found:
        fix = "A run saves its first one after --save-every steps."
        raise LossInputError("RUN", "a run with a checkpoint in its folder", f"{source}, which has none", fix)
    if url := options.get("base_url"):
        path = path_on_server(found[0])
        got = f"{source}, whose newest checkpoint is {path} of {url}"
        file = path.removeprefix("tinker://").replace(":train:", "/")
        fix = f"On the machine of the server: lossfns export STATE/{file} DIR, with the --state of lossfns serve."
        raise LossInputError("RUN", "a run with a checkpoint in its folder", got, fix)
    return found[0], options.get("model")


def export(path: Path, folder: str, *, merge: bool = False, model: str | None = None) -> None:
    """Write the model of a checkpoint to a new folder.

    Args:
        path: the checkpoint.
        folder: a folder that is new or empty.
        merge: whether to merge adapters into the weights.
        model: where the model was loaded from; None takes what the checkpoint says.

    Raises:
        LossInputError: a checkpoint that cannot be read, or a model that is not found or cannot be written.
    """
    check_new(Path(folder), "DIR")
    with naming({"path": "RUN"}):
        data = checkpoint.metadata(path)
    with status() as tell:
        tell("loading the model")
        base, tokenizer = base_model(path, data, model or data.get("source"))
        lora.merge(base)
        with naming({"path": "RUN"}):
            check_description(base, data, str(path))
            whole = base if data.get("lora") is None else adapted_as_saved(base, data["lora"], str(path))
            client = LocalTrainingClient(whole, tokenizer=tokenizer, device="cpu", name=str(data.get("model")))
            tell(f"reading {path}")
            client.load_state(path).result()
        tell(f"writing {folder}")
        with naming({"path": "DIR"}):
            client.export(folder, merge=merge).result()


def base_model(path: Path, data: dict[str, Any], source: str | None) -> tuple[nn.Module, Any]:
    """Build the model of a checkpoint and its tokenizer. The weights are not those of the checkpoint yet."""
    shape = data.get("shape")
    dtype = getattr(torch, str(data.get("dtype")).removeprefix("torch."), None)
    if isinstance(shape, dict) and "architecture" in shape:
        from lossfns.backend.model import hf

        if source is None:
            got, fix = f"{path}, which does not say", "Name it with --model."
            raise LossInputError("RUN", "a checkpoint that says where its model came from", got, fix)
        return hf.load(source, dtype=dtype or "auto")
    if not isinstance(shape, dict) or shape.keys() != DECODER.keys():
        fix = "Export it with client.export in the program that made it."
        raise LossInputError("RUN", "a checkpoint of a known model", f"{path}, of {data.get('model')!r}", fix)
    return Decoder(**shape).to(dtype=dtype), ByteTokenizer()


DECODER = Decoder(vocab_size=1, dim=2, layers=0, heads=1, kv_heads=1, hidden=1).shape
"""The settings of a decoder."""
