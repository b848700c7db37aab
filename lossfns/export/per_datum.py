"""A function of one datum, as ``create_custom_loss`` takes it, turned into a custom loss of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lossfns.errors import LossInputError
from lossfns.loss import LossFn

SUM, MEAN = ":sum", ":mean"


def per_datum(fn: Callable[..., tuple[Tensor, Mapping[str, Tensor]]], input_ranks: Mapping[str, int]) -> LossFn:
    """Return the loss of a batch that sums a function over its datums, as the service runs ``create_custom_loss``.

    The gradient of a datum is computed before the next datum is read, so that only one graph is in memory. All metrics
    are read in one transfer.

    Args:
        fn: ``fn(logprobs, *inputs) -> (0-d tensor, {"custom/<name>:sum" or ":mean": 0-d tensor})``. A metric is summed
            over the datums; ``:mean`` is then divided by their number.
        input_ranks: the dimensions of ``logprobs`` and of each input by name, in the order of the arguments. Inputs are
            fields of the datums.

    Returns:
        ``loss_fn(data, logprobs_list) -> (loss, metrics)``.

    Raises:
        LossInputError: when it is called: for a datum without an input, or with one of another rank, for a loss that is
            no 0-d tensor with a finite gradient, and for metrics that are no 0-d tensors or differ between datums.

    >>> from lossfns import cross_entropy, datum_from_tokens
    >>> from lossfns.export import as_datum_fn, with_denominators
    >>> data = with_denominators(cross_entropy(), [datum_from_tokens([1, 2, 3], prompt_length=n) for n in (1, 2)])
    >>> loss_fn = per_datum(as_datum_fn(cross_entropy()), {"logprobs": 1, "weights": 1})
    >>> logprobs = [torch.tensor([-1.0, -2.0], requires_grad=True) for _ in data]
    >>> loss, metrics = loss_fn(data, logprobs)
    >>> round(loss.item(), 4), metrics["custom/rows:sum"]
    (1.6667, 3.0)
    """
    names = list(input_ranks)
    if not names or names[0] != "logprobs":
        fix = 'Pass {"logprobs": 1, ...}, in the order of the arguments.'
        raise LossInputError("input_ranks", "logprobs, then the inputs", f"{names}", fix)

    def loss_fn(data: list[Any], logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        losses: list[Tensor] = []
        metrics_of_datums: list[Mapping[str, Tensor]] = []
        for i, (datum, logprobs) in enumerate(zip(data, logprobs_list, strict=True)):
            inputs = [read_input(datum, name, i) for name in names[1:]]
            for name, x in zip(names, (logprobs, *inputs)):
                check_rank(name, x, input_ranks[name], i)
            loss, metrics = loss_of_datum(fn, logprobs, inputs, i)
            if metrics_of_datums and metrics.keys() != metrics_of_datums[0].keys():
                fix = "Return the same metrics for every datum."
                raise LossInputError("metrics", ", ".join(metrics_of_datums[0]), ", ".join(metrics), fix, datum=i)
            losses.append(loss)
            metrics_of_datums.append(metrics)
        return torch.stack(losses).sum(), reduce_metrics(metrics_of_datums)

    return loss_fn


def loss_of_datum(
    fn: Callable[..., tuple[Tensor, Mapping[str, Tensor]]], logprobs: Tensor, inputs: Sequence[Tensor], i: int
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Return value + Σ gradient·(lp − sg lp), which has the value and the gradient of the loss, and the metrics."""
    leaf = logprobs.detach().requires_grad_()
    loss, metrics = fn(leaf, *inputs)
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise LossInputError("loss", "a 0-d tensor", got, "Reduce it with .sum().", datum=i)
    for name, value in metrics.items():
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise LossInputError(f"metrics[{name!r}]", "a 0-d tensor", got, "Reduce it with .sum().", datum=i)
    gradient = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
    if gradient is None:
        got, fix = "a constant", "Every datum's logprobs must enter the loss, if only as 0.0 * logprobs.sum()."
        raise LossInputError("loss", "a loss that depends on logprobs", got, fix, datum=i)
    if not gradient.isfinite().all():
        got, fix = "nan or inf", "Mask before the maths, not after; sqrt and log have no slope at 0."
        raise LossInputError("logprobs", "a finite gradient", got, fix, datum=i)
    return loss.detach() + (gradient * (logprobs - leaf.detach())).sum(), metrics


def read_input(datum: Any, name: str, i: int) -> Tensor:
    """Return a field of a datum as a tensor."""
    value = datum.loss_fn_inputs.get(name)
    if value is None:
        got = f"only {', '.join(datum.loss_fn_inputs)}"
        raise LossInputError(name, "a field that the loss reads", got, "Put it into loss_fn_inputs.", datum=i)
    return torch.from_numpy(value.to_numpy().copy())  # torch warns of arrays that cannot be written to


def check_rank(name: str, x: Tensor, rank: int, i: int) -> None:
    if x.ndim != rank:
        fix = "Send the rank that the loss was created with."
        raise LossInputError(name, f"{rank} dimensions", f"shape {tuple(x.shape)}", fix, datum=i)


def reduce_metrics(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Reduce the metrics of all datums by their suffix, in one transfer to the host."""
    names = list(rows[0])
    for name in names:
        if not name.endswith((SUM, MEAN)):
            raise LossInputError("metrics", "names that end in :sum or :mean", f"{name!r}", "Name the reduction.")
    if not names:
        return {}
    table = torch.stack([torch.stack([row[name].detach().double() for name in names]) for row in rows])
    totals = dict(zip(names, table.sum(0).tolist()))
    return {name: total / len(rows) if name.endswith(MEAN) else total for name, total in totals.items()}
