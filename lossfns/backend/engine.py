"""What a training client executes: forward, loss, backward, optimizer step, on one model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lossfns import BoundLoss, Loss, LossInputError, TensorData
from lossfns.backend.builtins import builtin
from lossfns.backend.logprobs import linear_logprobs
from lossfns.backend.types import ForwardBackwardOutput, OptimStepResponse
from lossfns.checks import number
from lossfns.pack import check_data
from lossfns.tokens import TOKENS, FlatLogprobs

LossFn = Callable[[list[Any], list[Tensor]], tuple[Tensor, dict[str, float]]]


class Batch(NamedTuple):
    """Datums laid end to end: ``inputs`` [N], ``targets`` [N] or [N, K], and the rows of each datum."""

    inputs: Tensor
    targets: Tensor
    lengths: list[int]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [(n, *self.targets.shape[1:]) for n in self.lengths]


class Engine:
    """A model with accumulated gradients and an AdamW optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters())
        self.steps = 0

    def forward(self, data: list[Any], loss_fn: str, config: Mapping[str, Any] | None) -> ForwardBackwardOutput:
        """Logprobs and the built-in's value, no gradient."""
        batch = pack_datums(data, self.model)
        with torch.no_grad():
            logprobs = self.logprobs(batch)
            _, metrics = builtin(loss_fn, config, data, batch.targets.ndim - 1)(data, views(logprobs, batch))
        return output(logprobs, batch, server_metrics(metrics))

    def forward_backward(
        self, data: list[Any], loss_fn: str, config: Mapping[str, Any] | None
    ) -> ForwardBackwardOutput:
        """A built-in loss: forward, backward, gradients added to what is accumulated."""
        batch = pack_datums(data, self.model)
        loss = builtin(loss_fn, config, data, batch.targets.ndim - 1)
        logprobs = self.logprobs(batch)
        _, gradient, metrics = value_and_gradient(loss, data, logprobs, batch)
        torch.autograd.backward(logprobs, gradient)
        return output(logprobs, batch, server_metrics(metrics))

    def custom(self, data: list[Any], loss_fn: LossFn) -> ForwardBackwardOutput:
        """Any callable of the contract, in the same single forward and backward as a built-in.

        The loss sees logprobs cut off from the model; its gradient then continues through the graph that
        the forward left, so parameters get exactly the gradient of the whole.
        """
        batch = pack_datums(data, self.model)
        logprobs = self.logprobs(batch)
        loss, gradient, metrics = value_and_gradient(loss_fn, data, logprobs, batch)
        torch.autograd.backward(logprobs, gradient)
        surrogate = float((logprobs.detach() * gradient).sum())
        return output(logprobs, batch, {**metrics, "loss:sum": loss, "surrogate_loss:sum": surrogate})

    def logprobs(self, batch: Batch) -> Tensor:
        """Float32 logprobs of the targets, in their shape."""
        hidden = self.model(batch.inputs, batch.lengths)
        return linear_logprobs(hidden, self.model.head, batch.targets)  # type: ignore[arg-type]

    def optim_step(self, adam: Any) -> OptimStepResponse:
        """Clip, step, clear: AdamW on the accumulated gradient."""
        check_adam(adam)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if not parameters:
            fix = "Call forward_backward first."
            raise LossInputError("optim_step", "an accumulated gradient", "none since the last step", fix)
        for group in self.optimizer.param_groups:
            group.update(
                lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay
            )
        limit = adam.grad_clip_norm if adam.grad_clip_norm > 0 else math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return OptimStepResponse({"grad_norm": float(norm), "lr": adam.learning_rate})


def check_adam(adam: Any) -> None:
    """Refuse what is no AdamParams, or would move the weights nowhere or up."""
    if not all(hasattr(adam, name) for name in ADAM):
        got, fix = f"a {type(adam).__name__}", "Pass AdamParams(learning_rate=...)."
        raise LossInputError("adam_params", "AdamParams", got, fix)
    for name, (expected, accept) in ADAM.items():
        number(name, getattr(adam, name), expected, accept, "AdamW has no use for it.")


ADAM: dict[str, tuple[str, Callable[[float], bool]]] = {
    "learning_rate": ("a finite number of at least 0", lambda x: x >= 0),
    "beta1": ("a number in [0, 1)", lambda x: 0 <= x < 1),
    "beta2": ("a number in [0, 1)", lambda x: 0 <= x < 1),
    "eps": ("a finite number of at least 0", lambda x: x >= 0),
    "weight_decay": ("a finite number of at least 0", lambda x: x >= 0),
    "grad_clip_norm": ("a finite number of at least 0", lambda x: x >= 0),
}


def pack_datums(data: Sequence[Any], model: nn.Module) -> Batch:
    """Datums to flat tensors on the model's device; refuses what does not fit together, or the vocabulary."""
    if isinstance(data, (list, tuple)) and not data:
        raise LossInputError("data", "at least one datum", "No data provided", "Skip the call for an empty batch.")
    check_data(data, TOKENS)
    tokens, targets = [], []
    for i, datum in enumerate(data):
        if "target_tokens" not in datum.loss_fn_inputs:
            got, fix = "missing required field 'target_tokens'", "Build it with datum_from_tokens."
            raise LossInputError("loss_fn_inputs", "target_tokens", got, fix, datum=i)
        tokens.append(np.asarray(datum.model_input.to_ints(), dtype=np.int64))
        targets.append(np.asarray(datum.loss_fn_inputs["target_tokens"].to_numpy()))
        check_frame(tokens[i], targets[i], targets[0], len(model.head), i)  # type: ignore[arg-type]
    device = next(model.parameters()).device
    inputs, flat_targets = (torch.from_numpy(np.concatenate(rows)).to(device) for rows in (tokens, targets))
    return Batch(inputs, flat_targets, [len(row) for row in tokens])


def check_frame(tokens: np.ndarray, targets: np.ndarray, first: np.ndarray, vocabulary: int, datum: int) -> None:
    """One target row for each input token, ids in the vocabulary, one K for the whole batch."""
    if len(tokens) == 0:
        raise LossInputError("model_input", "at least one token", "none", "Drop the datum.", datum=datum)
    if len(targets) != len(tokens):
        fix = "model_input is tokens[:-1] and target_tokens is tokens[1:]."
        expected = f"{len(tokens)} rows (the length of model_input)"
        raise LossInputError("target_tokens", expected, str(len(targets)), fix, datum=datum)
    if targets.shape[1:] != first.shape[1:]:
        got = f"shape {targets.shape}, while datum[0] has {first.shape}"
        raise LossInputError("target_tokens", "one K for the whole call", got, "Pad K with weight 0.", datum=datum)
    for name, ids in (("model_input", tokens), ("target_tokens", targets)):
        if ids.dtype.kind != "i" or ids.min() < 0 or ids.max() >= vocabulary:
            got = f"{ids.dtype}" if ids.dtype.kind != "i" else f"ids from {ids.min()} to {ids.max()}"
            fix = "Use the tokenizer of this model."
            raise LossInputError(name, f"integers in [0, {vocabulary})", got, fix, datum=datum)


def views(logprobs: Tensor, batch: Batch) -> FlatLogprobs:
    """One flat leaf of the logprobs, and its views by datum."""
    flat = logprobs.detach().reshape(-1).requires_grad_()
    return FlatLogprobs(flat, batch.shapes)


def value_and_gradient(
    loss_fn: LossFn | Loss | BoundLoss, data: list[Any], logprobs: Tensor, batch: Batch
) -> tuple[float, Tensor, dict[str, float]]:
    """Value, ∂loss/∂logprobs and metrics. Nothing of the model is touched, so an error leaves it as it was.

    Our own losses run where the logprobs are, on one flat leaf. Any other callable gets what the hosted
    services give it: one float32 leaf for each datum, on the CPU.
    """
    if isinstance(loss_fn, str) or not callable(loss_fn):
        fix = "A built-in's name goes to forward_backward, a loss such as grpo() comes here."
        raise LossInputError("loss_fn", "a function (data, logprobs_list) -> (loss, metrics)", repr(loss_fn), fix)
    if isinstance(loss_fn, (Loss, BoundLoss)):
        leaves: list[Tensor] = views(logprobs, batch)
    else:
        sizes = [math.prod(shape) for shape in batch.shapes]
        parts = torch.split(logprobs.detach().cpu().flatten(), sizes)
        leaves = [part.reshape(shape).clone().requires_grad_() for part, shape in zip(parts, batch.shapes)]
    loss, metrics = check_result(loss_fn(data, leaves))
    torch.autograd.backward(loss)
    if isinstance(leaves, FlatLogprobs):
        gradient = leaves.flat.grad
        assert gradient is not None  # the door put the flat leaf into the graph
    else:
        gradient = torch.cat([gradient_of(leaf, i).flatten() for i, leaf in enumerate(leaves)])
    return float(loss.detach()), gradient.view_as(logprobs).to(logprobs.device), metrics


def check_result(result: Any) -> tuple[Tensor, dict[str, float]]:
    """``(loss, metrics)`` as the contract has it: a finite scalar with a graph, and a dict."""
    if not isinstance(result, tuple) or len(result) != 2:
        got = f"a {type(result).__name__}" + (f" of {len(result)}" if isinstance(result, tuple) else "")
        raise LossInputError("loss_fn", "(loss, metrics)", got, "Return the loss and a dict of floats.")
    loss, metrics = result
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise LossInputError("loss", "a 0-d tensor", got, "Reduce it, and do not call .item().")
    if not loss.requires_grad:
        got = "a constant without grad_fn"
        raise LossInputError("loss", "a loss that depends on logprobs", got, "Was something detached?")
    if not math.isfinite(float(loss.detach())):
        raise LossInputError("loss", "a finite value", f"{float(loss.detach())}", "Mask before the maths, not after.")
    if not isinstance(metrics, dict):
        raise LossInputError("metrics", "a dict of floats", f"a {type(metrics).__name__}", "Return {} for none.")
    return loss, metrics


def gradient_of(leaf: Tensor, datum: int) -> Tensor:
    if leaf.grad is None:
        fix = "Every datum's logprobs must enter the loss, if only as 0.0 * logprobs.sum()."
        raise LossInputError("logprobs", "a gradient", "No gradient computed for logprob tensor", fix, datum=datum)
    return leaf.grad


TOTALS = ("loss", "tokens", "sequences", "sequences_empty")


def server_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics in the services' ``name:reduction`` form, which says how they combine over requests."""
    return {f"{name}:{'sum' if name in TOTALS else 'mean'}": x for name, x in metrics.items() if name != "denominator"}


def output(logprobs: Tensor, batch: Batch, metrics: dict[str, float]) -> ForwardBackwardOutput:
    rows = np.split(logprobs.detach().cpu().numpy(), np.cumsum(batch.lengths)[:-1])
    outputs = [{"logprobs": TensorData(row, "float32", row.shape)} for row in rows]
    return ForwardBackwardOutput("TensorData", outputs, metrics)
