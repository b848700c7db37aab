"""``lossfns sample RUN PROMPT``: generate from the weights of a run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lossfns.backend.client.training import LocalTrainingClient
from lossfns.backend.model.tokenizer import ByteTokenizer
from lossfns.backend.types import SamplingParams
from lossfns.datum import ModelInput
from lossfns.errors import LossInputError
from lossfns.terminal import console_on, say, while_read
from lossfns.train import remote
from lossfns.train.checkpoints import checkpoints
from lossfns.train.methods import TEMPERATURE, one_line
from lossfns.train.options import check_option
from lossfns.train.outcome import refused
from lossfns.train.render import Renderer, typed_prompt
from lossfns.train.run import load_config


def add_sample(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``sample`` command to a command line."""
    p = commands.add_parser(
        "sample",
        help="generate text from a run of lossfns train",
        description="Generate from the newest checkpoint of a run. The prompt is written as the prompts of the run's "
        "data are: after a chat, as a message of the user.",
    )
    add = p.add_argument
    add("folder", metavar="RUN", help="the run folder")
    add("prompt", metavar="PROMPT", help="the text to continue or to answer; '' begins a text")
    add("--max-tokens", type=int, default=128, metavar="N", help="longest sample in tokens (default: 128)")
    add("--temperature", type=float, default=TEMPERATURE, metavar="X", help=f"0 is greedy (default: {TEMPERATURE})")
    add("--samples", type=int, default=1, metavar="N", help="how many samples (default: 1)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the samples (default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    p.set_defaults(run=sample_command, parser=p)


def sample_command(args: argparse.Namespace) -> int:
    """Run ``lossfns sample``.

    Returns:
        0, or 2 if the input was refused.
    """
    try:
        check_option("RUN", args.folder)
        texts = sample_run(Path(args.folder), args)
    except (LossInputError, OSError) as error:
        return refused(error)
    except KeyboardInterrupt:
        os._exit(130)
    with while_read(sys.stdout):
        for number, text in enumerate(texts, 1):
            if len(texts) > 1:
                say(f"sample {number}:")
            live = console_on(sys.stdout) is not None  # a terminal would obey the escape sequences of a sample
            say("\n".join(one_line(line, sys.maxsize) for line in text.split("\n")) if live else text)
    return 0


def sample_run(folder: Path, args: argparse.Namespace) -> list[str]:
    """Return samples from the newest checkpoint of a run."""
    config = load_config(folder, "RUN")
    if not checkpoints(folder):
        fix = "A run saves its first one after --save-every steps."
        raise LossInputError("RUN", "a run with a checkpoint", f"{folder}, which has none", fix)
    renderer = Renderer(ByteTokenizer())
    try:
        ids = typed_prompt(renderer, config.get("prompts", "text"), args.prompt)
    except UnicodeEncodeError:
        got = ascii(args.prompt[:40])
        raise LossInputError("PROMPT", "text in UTF-8", got, "Check the encoding of the terminal.") from None
    torch.set_num_threads(1)
    path, base_url = checkpoints(folder)[0], config["options"].get("base_url")
    params = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed)
    prompt = ModelInput.from_ints(ids)
    with sampler_of(path, base_url, args.device) as sampler:
        (response,) = sampler.sample_batch([prompt], args.samples, params).result()
    return [renderer.decode(sequence.tokens) for sequence in response.sequences]


@contextmanager
def sampler_of(path: Path, base_url: str | None, device: str) -> Iterator[Any]:
    """Yield a sampler of a run's checkpoint, in this process or on the server of the run."""
    if base_url is None:
        yield LocalTrainingClient(device=device).create_sampling_client(path)
        return
    with remote.connected(base_url) as client:
        client.load_state(path).result()
        yield client.save_weights_and_get_sampling_client()
