"""Wrong ways to read, to order and to average a batch, which losses of several kinds share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lossfns.segments import sequence_sum
from lossfns.testing.mutants.parts import (
    Data,
    Logprobs,
    Mean,
    Read,
    Reduce,
    blanked,
    checked,
    column,
    masked,
    packed,
    token_mean,
)
from lossfns.tokens import Tokens


def truncated(data: Data, logprobs_list: Logprobs, reads: Sequence[str]) -> Tokens:
    """Every row cut to the shortest of its datum, as the hosted APIs' examples do."""
    lengths = [
        min(len(lp), *(len(column(d, name)) for name in ("weights", *reads))) for d, lp in zip(data, logprobs_list)
    ]
    cut = [lp[:n] for lp, n in zip(logprobs_list, lengths)]
    return masked(data, cut, reads, row=lambda datum, name, lp: column(datum, name)[: len(lp)].to(lp))


def expanded(data: Data, logprobs_list: Logprobs, reads: Sequence[str]) -> Tokens:
    """A row of one value stands for all the datum's tokens."""
    return masked(data, logprobs_list, reads, row=lambda datum, name, lp: column(datum, name).to(lp).expand_as(lp))


def edited(name: str, edit: Callable[[Tensor], Tensor]) -> Read:
    """One column edited, datum by datum, before anything is masked."""

    def row(datum: Any, wanted: str, logprobs: Tensor) -> Tensor:
        values = checked(datum, wanted, logprobs)
        return edit(values) if wanted == name else values

    return lambda data, logprobs_list, reads: masked(data, logprobs_list, reads, row)


def shifted(name: str) -> Read:
    """One column a token late: as if it were in the frame of the inputs."""
    return edited(name, lambda values: values.roll(1, 0))


def reordered(name: str, order: Callable[[Data], list[int]]) -> Read:
    """One column laid out in another order of the datums than the logprobs."""

    def read(data: Data, logprobs_list: Logprobs, reads: Sequence[str]) -> Tokens:
        t, indices = packed(data, logprobs_list, reads), order(data)
        other = packed([data[i] for i in indices], [logprobs_list[i] for i in indices], reads)
        if name == "weights":
            return blanked(replace(t, weights=other.weights))
        return blanked(replace(t, columns={**t.columns, name: other.columns[name]}))

    return read


def reverse(data: Data) -> list[int]:
    """The last datum first."""
    return list(range(len(data)))[::-1]


def by_length(data: Data) -> list[int]:
    """The longest datum first."""
    return sorted(range(len(data)), key=lambda i: -column(data[i], "weights").numel())


def blanking(name: str) -> Read:
    """One column blanked where the datum holds it."""

    def row(datum: Any, wanted: str, logprobs: Tensor) -> Tensor:
        values = checked(datum, wanted, logprobs)
        if wanted == name:
            column(datum, name).masked_fill_(column(datum, "weights") == 0, 0)
        return values

    return lambda data, logprobs_list, reads: masked(data, logprobs_list, reads, row)


EOS = 5
"""The id of the token that ends a sequence."""


def not_eos(t: Tokens, data: Data) -> Tensor:
    """Which targets are not the end of a sequence, by their ids."""
    return torch.cat([column(datum, "target_tokens").flatten() != EOS for datum in data]).to(t.active)


def not_last(t: Tokens) -> Tensor:
    """Which targets are not the last of their sequence."""
    keep = torch.ones_like(t.active)
    return keep.index_fill(0, t.lengths.cumsum(0) - 1, False) if t.lengths is not None else keep


def numbers(datum: Any, name: str) -> list[Any]:
    """A datum's own values on the host, where they are."""
    values: list[Any] = datum.loss_fn_inputs[name].to_numpy().ravel().tolist()
    return values


def without_empty(data: Data, logprobs_list: Logprobs) -> list[Tensor]:
    """The logprobs of fully masked datums left out of the graph."""
    return detached(logprobs_list, [not any(numbers(datum, "weights")) for datum in data])


def detached(logprobs_list: Logprobs, where: Sequence[bool]) -> list[Tensor]:
    """The logprobs, some of them cut off from the graph."""
    return [lp.detach() if out else lp for lp, out in zip(logprobs_list, where)]


def chunks_of_two(t: Tokens, x: Tensor) -> Mean:
    """The mean over chunks of two datums of each chunk's own mean."""
    total, mass = sequence_sum(t, t.weights * x), sequence_sum(t, t.weights)
    odd = len(total) % 2
    totals, masses = (F.pad(sums, (0, odd)).reshape(-1, 2).sum(1) for sums in (total, mass))
    trained = masses != 0
    return (totals / torch.where(trained, masses, 1)).sum() / trained.sum(), t.weights.sum()


def times(factor: Callable[[Tokens], Any], reduce: Reduce = token_mean) -> Reduce:
    """A mean that is off by a factor."""

    def scaled(t: Tokens, x: Tensor) -> Mean:
        loss, denominator = reduce(t, x)
        return factor(t) * loss, denominator

    return scaled


def world_size() -> int:
    """The number of ranks."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def over(denominator: Callable[[Tokens], Tensor]) -> Reduce:
    """Σ w·x over another denominator."""

    def reduce(t: Tokens, x: Tensor) -> Mean:
        return (t.weights * x).sum() / denominator(t), denominator(t)

    return reduce
