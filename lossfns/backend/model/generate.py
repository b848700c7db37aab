"""Batched sampling of a model, with a key-value cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lossfns.backend.model.decoder import Decoder
from lossfns.checks import check_number
from lossfns.devices import to_device
from lossfns.errors import LossInputError
from lossfns.logprobs.head import head_of


class Sample(NamedTuple):
    """A sampled sequence.

    Attributes:
        tokens: ids, the stop token included.
        logprobs: for each token its logprob under the full softmax at temperature 1, whatever the sampling options.
        stop_reason: ``"stop"`` after a stop, ``"length"`` after ``max_tokens``.
    """

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
    ends: Callable[[int, list[int]], bool] | None = None,
    seed: int | None = None,
) -> list[Sample]:
    """Sample one sequence for each prompt. A prompt that occurs several times is read once.

    Args:
        model: a ``Decoder`` or ``hf.CausalLM``; it runs in eval mode.
        prompts: token ids, at least one each.
        max_tokens: the most tokens to sample for each prompt.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: sample from the k most probable tokens; 0 or less keeps all.
        top_p: sample from the fewest tokens whose probabilities sum to ``top_p`` or more; applied after ``top_k``.
        stop: ids that end a sequence.
        ends: called after each token with the index of a prompt and all tokens sampled for it; True ends the sequence.
        seed: the seed of the draws; None uses PyTorch's global generator.

    Raises:
        LossInputError: an empty prompt, or a temperature or ``top_p`` out of range.
    """
    if not all(map(len, prompts)):
        raise LossInputError("prompt", "at least one token", "none", "Start from the end-of-sequence token.")
    check_number(
        "temperature", temperature, "0, or a finite number above 1e-6", lambda x: x == 0 or x > 1e-6, "0 is greedy."
    )
    check_number("top_p", top_p, "a number in (0, 1]", lambda x: 0 < x <= 1, "1 keeps all of the distribution.")
    if not prompts:
        return []
    head = head_of(model)
    device = head.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    stop = frozenset(stop)
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the sequences that have not ended

    def has_ended(i: int) -> bool:
        return (ends is not None and ends(i, tokens[i])) or tokens[i][-1] in stop

    training = model.training
    model.eval()
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    packed = to_device(torch.tensor([token for prompt in distinct for token in prompt]), device)
    hidden, cache = model.prefill(packed, [len(prompt) for prompt in distinct], max_tokens)
    prompt_index = to_device(torch.tensor([distinct[tuple(prompt)] for prompt in prompts]), device)
    hidden, cache = hidden[prompt_index], cache.select(prompt_index)
    for t in range(max_tokens):
        logits = head.logits(hidden).float()
        chosen = draw(logits, temperature, top_k, top_p, generator)
        # float64 holds every id exactly, so ids and logprobs travel in one tensor, and the host waits once for them.
        drawn = torch.stack((chosen.double(), logits.log_softmax(1).gather(1, chosen[:, None]).squeeze(1).double()))
        for i, token, logprob in zip(rows, *drawn.tolist()):
            if not math.isfinite(logprob):
                got, fix = f"a token with a logprob of {logprob}", "Are the model's weights finite?"
                raise LossInputError("model", "finite logits", got, fix)
            tokens[i].append(int(token))
            logprobs[i].append(logprob)
        unfinished = [k for k, i in enumerate(rows) if not has_ended(i)]
        some_ended = len(unfinished) < len(rows)
        rows = [rows[k] for k in unfinished]
        if not rows or t == max_tokens - 1:
            break
        if some_ended:
            index = to_device(torch.tensor(unfinished), device)
            chosen, cache = chosen[index], cache.select(index)
        hidden = model.step(chosen, cache)
    model.train(training)
    cut_off = set(rows)
    return [Sample(*row, "length" if i in cut_off else "stop") for i, row in enumerate(zip(tokens, logprobs))]


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Draw one token [B] for each row of logits [B, V], with the options of ``generate``."""
    if temperature == 0:
        return logits.argmax(1)
    probs = (logits / temperature).softmax(1)
    if top_k > 0 or top_p < 1:
        probs, order = probs.sort(1, descending=True)
        if top_k > 0:
            probs = probs[:, :top_k] / probs[:, :top_k].sum(1, keepdim=True)
        before = probs.cumsum(1) - probs
        rank = draw_index(probs.masked_fill(before >= top_p, 0), generator)
        return order.gather(1, rank[:, None]).squeeze(1)
    return draw_index(probs, generator)


def draw_index(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw an index [B] for each row of probabilities [B, V], which need not sum to 1.

    ``torch.multinomial`` takes a random number for each probability, a fifth of a step on a CPU, and on a GPU makes the
    host wait to check the probabilities. ``generate`` checks the logprobs of the drawn tokens instead.
    """
    if probs.device.type == "cpu":  # the first index whose cumulative probability is above u·Σp
        cumulative = probs.double().cumsum(1)
        u = torch.rand(len(probs), 1, dtype=torch.float64, generator=generator)
        index = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).squeeze(1)
        return index.clamp_(max=probs.shape[1] - 1)  # where a probability is nan
    # With q_i ~ Exp(1), p_i / q_i is the largest with probability p_i.
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(1)
