"""``lossfns sample RUN PROMPT``: generate from the weights of a run. Without a prompt, line by line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lossfns.backend.types import SamplingParams
from lossfns.datum import ModelInput
from lossfns.errors import LossInputError
from lossfns.terminal import one_line, print_refusal, say, while_read, width_of
from lossfns.train import models, remote
from lossfns.train.checkpoints import checkpoints
from lossfns.train.defaults import complete_options
from lossfns.train.measures import TEMPERATURE, context_length
from lossfns.train.options import check_option, naming
from lossfns.train.render import Message, Renderer, typed_prompt
from lossfns.train.run import load_config


def add_sample(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``sample`` command to a command line."""
    p = commands.add_parser(
        "sample",
        help="generate text from a run of lossfns train, or chat with it",
        description="Generate from the newest checkpoint of a run. The prompt is written as the prompts of the run's "
        "data are: after a chat, as a message of the user. Without a prompt, each line that you type gets an answer, "
        "and a chat goes on turn by turn; /new begins another, /quit or Ctrl-D ends.",
    )
    add = p.add_argument
    add("folder", metavar="RUN", help="the run folder")
    add("prompt", metavar="PROMPT", nargs="?", help="the text to continue or to answer; '' begins a text")
    add("--max-tokens", type=int, default=128, metavar="N", help="longest sample in tokens (default: 128, or up "
        "to the end of the model's context)")  # fmt: skip
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
        torch.set_num_threads(1)
        with opened(Path(args.folder), args.device) as model:
            if args.prompt is None:
                converse(model, args)
            else:
                show(sample_texts(model, prompt_of(model, args.prompt), args))
    except (LossInputError, ImportError, OSError) as error:
        return print_refusal(error)
    except KeyboardInterrupt:
        os._exit(130)
    return 0


class Model(NamedTuple):
    """The model of a run.

    Attributes:
        sampler: a sampling client of its newest checkpoint.
        renderer: makes the tokens of prompts and the texts of samples.
        style: how the prompts of the run's data are written.
    """

    sampler: Any
    renderer: Renderer
    style: str


@contextmanager
def opened(folder: Path, device: str) -> Iterator[Model]:
    """Yield the model of a run's newest checkpoint, in this process or on the server of the run."""
    config = load_config(folder, "RUN")
    if not checkpoints(folder):
        fix = "A run saves its first one after --save-every steps."
        raise LossInputError("RUN", "a run with a checkpoint", f"{folder}, which has none", fix)
    options, path = complete_options(config["options"]), checkpoints(folder)[0]
    style = config.get("prompts", "text")
    if options.base_url is None:
        with naming({"--model": "RUN", "path": "RUN"}):
            client = models.load_client(replace(options, device=device))
            sampler = client.create_sampling_client(path)
        yield Model(sampler, Renderer(client.get_tokenizer()), style)
        return
    with remote.connected(options.base_url) as server:
        server.load_state(path).result()
        yield Model(server.save_weights_and_get_sampling_client(), Renderer(server.get_tokenizer()), style)


def prompt_of(model: Model, text: str) -> list[int]:
    """Return the tokens of a prompt that was typed."""
    try:
        return typed_prompt(model.renderer, model.style, text)
    except UnicodeEncodeError:
        fix = "Check the encoding of the terminal."
        raise LossInputError("PROMPT", "text in UTF-8", ascii(text[:40]), fix) from None


def sample_texts(model: Model, prompt: list[int], args: argparse.Namespace, turn: int = 0) -> list[str]:
    """Return the texts of samples. ``turn`` is added to the seed of the command line.

    A sample ends where the model's context does, and standard error says so.

    Raises:
        LossInputError: for a prompt that fills the context.
    """
    context = context_length(model.sampler)
    room = context - len(prompt)
    if room < 1:
        fix = "Shorten it; in a chat, /new begins another one."
        raise LossInputError("PROMPT", f"less than {context:g} tokens, the context", f"{len(prompt)}", fix)
    most = int(min(args.max_tokens, room))
    params = SamplingParams(
        max_tokens=most, temperature=args.temperature, seed=args.seed + turn, stop=model.renderer.end
    )
    (response,) = model.sampler.sample_batch([ModelInput.from_ints(prompt)], args.samples, params).result()
    if most < args.max_tokens and any(sequence.stop_reason == "length" for sequence in response.sequences):
        with while_read(sys.stderr):
            say(f"a sample ends where the context of {context:g} tokens is full", sys.stderr)
    texts = [model.renderer.decode(sequence.tokens) for sequence in response.sequences]
    if not all(texts):
        with while_read(sys.stderr):
            say("a sample is empty: the model ended at once", sys.stderr)
    return texts


def show(texts: list[str]) -> None:
    """Print samples. A terminal would obey the escape sequences in them, so they are escaped there."""
    live = width_of(sys.stdout) is not None
    with while_read(sys.stdout):
        for number, text in enumerate(texts, 1):
            if len(texts) > 1:
                say(f"sample {number}:")
            say("\n".join(one_line(line, sys.maxsize) for line in text.split("\n")) if live else text)


def converse(model: Model, args: argparse.Namespace) -> None:
    """Answer each line that is typed, until /quit or the end of the input. The first sample continues a chat."""
    messages: list[Message] = []
    for turn, line in enumerate(typed_lines()):
        if line == "/quit":
            return
        if line == "/new":
            messages = []
            continue
        asked: list[Message] = [*messages, {"role": "user", "content": line}]
        prompt = model.renderer.prompt(asked) if model.style == "chat" else prompt_of(model, line)
        if len(prompt) >= context_length(model.sampler):
            with while_read(sys.stderr):
                say(f"the chat has filled the context, {len(prompt)} tokens: /new begins another one", sys.stderr)
            continue
        texts = sample_texts(model, prompt, args, turn)
        show(texts)
        messages = [*asked, {"role": "assistant", "content": texts[0]}]


def typed_lines() -> Iterator[str]:
    """Yield the lines of standard input that are not empty, after a prompt if a person types them."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line
