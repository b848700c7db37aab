"""Batched sampling with a key-value cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lossfns.backend.model.decoder import Decoder
from lossfns.checks import number
from lossfns.errors import LossInputError
from lossfns.logprobs.linear import head_of


class Sample(NamedTuple):
    """Sampled tokens, a stop token included, and their logprobs under the full softmax at temperature 1."""

    tokens: list[int]
    logprobs: list[float]
    stop_reason: Literal["stop", "length"]


@torch.inference_mode()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = -1,
    top_p: float = 1.0,
    stop: Collection[int] = (),
    seed: int | None = None,
) -> list[Sample]:
    """One sample per prompt, ended by a token in ``stop`` or after ``max_tokens``; temperature 0 is greedy.

    A prompt that occurs many times is read once. Without ``seed``, PyTorch's global generator draws.
    """
    if not all(map(len, prompts)):
        raise LossInputError("prompt", "at least one token", "none", "Start from the end-of-sequence token.")
    number("temperature", temperature, "0, or a finite number above 1e-6", lambda x: x == 0 or x > 1e-6, "0 is greedy.")
    number("top_p", top_p, "a number in (0, 1]", lambda x: 0 < x <= 1, "1 keeps all of the distribution.")
    if not prompts:
        return []
    head = head_of(model)
    device = head.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    stops = torch.tensor(sorted(stop), dtype=torch.long, device=device)

    tokens = torch.zeros(len(prompts), max_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(prompts), max_tokens, device=device)
    counts = torch.zeros(len(prompts), dtype=torch.long, device=device)
    rows = torch.arange(len(prompts), device=device)  # the prompts still being continued
    training = model.training
    model.eval()
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    packed = torch.tensor([token for prompt in distinct for token in prompt], device=device)
    hidden, cache = model.prefill(packed, [len(prompt) for prompt in distinct], max_tokens)
    which = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=device)
    hidden, cache = hidden[which], cache.select(which)
    for t in range(max_tokens):
        logits = head.logits(hidden).float()
        chosen = pick(logits, temperature, top_k, top_p, generator)
        tokens[rows, t] = chosen
        logprobs[rows, t] = logits.log_softmax(1).gather(1, chosen[:, None]).squeeze(1)
        counts[rows] += 1
        going = (~torch.isin(chosen, stops)).nonzero().squeeze(1)
        if len(going) < len(rows):
            rows, chosen, cache = rows[going], chosen[going], cache.select(going)
        if len(rows) == 0 or t == max_tokens - 1:
            break
        hidden = model.step(chosen, cache)
    model.train(training)

    unfinished = set(rows.tolist())
    columns = zip(tokens.tolist(), logprobs.tolist(), counts.tolist(), strict=True)
    return [
        Sample(row[:n], logprob[:n], "length" if i in unfinished else "stop")
        for i, (row, logprob, n) in enumerate(columns)
    ]


def pick(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token per row of logits [B, V], from the tempered softmax cut to its ``top_k``, then to ``top_p``."""
    if temperature == 0:
        return logits.argmax(1)
    probs = (logits / temperature).softmax(1)
    if top_k > 0 or top_p < 1:
        probs, order = probs.sort(1, descending=True)
        if top_k > 0:
            probs = probs[:, :top_k] / probs[:, :top_k].sum(1, keepdim=True)
        before = probs.cumsum(1) - probs
        rank = torch.multinomial(probs.masked_fill(before >= top_p, 0), 1, generator=generator)
        return order.gather(1, rank).squeeze(1)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)
