"""Custom losses: a function of the client, and a traced function that the server may run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lossfns.conformance.base import Check, Finding, Unsupported, refuse, require, worst
from lossfns.conformance.bench import Act, Bench, Gradient
from lossfns.conformance.client import Trainer
from lossfns.conformance.expected import differentiate
from lossfns.conformance.rows import BATCH, policy_rows
from lossfns.export.builtins import builtin_loss


def summed_likelihood(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
    """Return −Σ w·lp, the cross_entropy of the service, and metrics of its own."""
    weights = [torch.as_tensor(np.asarray(d.loss_fn_inputs["weights"].to_numpy())) for d in data]
    loss = -sum(torch.dot(w.to(lp.dtype), lp) for w, lp in zip(weights, logprobs))
    return loss, {"datums": float(len(data)), "a/count:sum": 3.0}


def custom_answers(bench: Bench) -> None:
    """forward_backward_custom answers with the loss and the metrics of its function."""
    answer = bench.idle().custom(BATCH, summed_likelihood)
    metrics, found = answer.metrics, answer.metrics.get("loss:sum")
    require(metrics.get("datums") == len(BATCH) and metrics.get("a/count:sum") == 3.0,
        f"the metrics of the function are lost: {metrics}")  # fmt: skip
    right = -sum(float(row.weights @ lp) for row, lp in zip(BATCH, bench.start_logprobs(BATCH)))
    require(found is not None and abs(found - right) <= 1e-3 * abs(right), f"the loss is {right:.6g}, loss:sum {found}")


def custom_is_builtin(bench: Bench) -> Finding:
    """A custom loss has the gradient of the same built-in loss."""
    logprobs = bench.start_logprobs(BATCH)
    rows = policy_rows(logprobs)
    # Not every version sends other fields than targets and weights for a custom loss: the function holds the others.
    ppo = builtin_loss("ppo").bind(
        weights=[np.ones(len(row.tokens)) for row in rows],
        old_logprobs=[row.fields["logprobs"] for row in rows],
        advantages=[row.fields["advantages"] for row in rows],
    )
    right = differentiate(ppo, BATCH, logprobs).as_cross_entropy(BATCH)
    likelihood = Act("custom-likelihood", lambda trainer: trainer.custom(BATCH, summed_likelihood))
    clipped = Act("custom-ppo", lambda trainer: trainer.custom(BATCH, ppo))
    return worst([
        bench.same(bench.effect(likelihood), bench.effect(Gradient(BATCH)), "−Σ w·lp as a custom loss, and built in"),
        bench.same(bench.effect(clipped), bench.effect(Gradient(right)), "ppo as a custom loss, and its gradient"),
    ])  # fmt: skip


def custom_over_calls(bench: Bench) -> Finding:
    """Custom losses add up with each other and with built-in losses."""

    def custom(trainer: Trainer) -> None:
        trainer.custom(BATCH[:1], summed_likelihood)

    found = bench.effect(Act("custom-first", custom), Gradient(BATCH[1:]))
    return bench.same(found, bench.effect(Gradient(BATCH)), "a custom loss and a built-in one, and the batch at once")


def traced_likelihood(logprobs: Any, weights: Any) -> tuple[Any, dict[str, Any]]:
    """Return −Σ w·lp of one datum, and a metric."""
    return -(weights * logprobs).sum(), {"custom/tokens:sum": (weights != 0).sum()}


def custom_on_server(bench: Bench) -> Finding:
    """A loss that is uploaded with create_custom_loss has the gradient and the metrics of its function."""
    if not hasattr(bench.connection.service, "create_custom_loss"):
        raise Unsupported("this version of the SDK has no create_custom_loss")
    metrics: dict[str, float] = {}

    def custom(trainer: Trainer) -> None:
        try:  # the loss belongs to the session of the client
            creating = bench.connection.service.create_custom_loss(traced_likelihood, {"logprobs": 1, "weights": 1})
            handle = bench.connection.wait(creating, "create_custom_loss")
        except Exception as error:
            refuse(error)
        metrics.update(trainer.custom(BATCH, handle).metrics)

    found = bench.effect(Act("custom-traced", custom))
    counted, tokens = metrics.get("custom/tokens:sum"), sum(int(np.count_nonzero(row.weights)) for row in BATCH)
    require(counted == tokens, f"the metric custom/tokens:sum is {counted}, not {tokens}")
    return bench.same(found, bench.effect(Gradient(BATCH)), "−Σ w·lp traced, and built in")


CHECKS = (
    Check.of(custom_answers, "custom-loss", needs=("forward", "forward-backward")),
    Check.of(custom_is_builtin, "custom-loss", needs=("gradient-descent", "custom-answers")),
    Check.of(custom_over_calls, "custom-loss", "full", needs=("gradient-descent", "custom-answers")),
    Check.of(custom_on_server, "custom-loss", "full", needs=("gradient-descent",)),
)
