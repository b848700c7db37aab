"""Losses that the SDK traces and uploads are rebuilt with the same value, gradient and metrics."""

import json
import math
from random import Random
from typing import Any

import pytest
import torch
from batches import CASES, apart
from graphs import ROWS
from torch import Tensor

import lossfns
from lossfns import export
from lossfns.server.graph import rebuild

pytest.importorskip("tinker", reason="needs the extra server")
from tinker.lib.public_interfaces.custom_loss import encode_graph, trace_loss


def user_losses() -> dict[str, Any]:
    """Losses as people write them, of logprobs and weights."""
    F = torch.nn.functional

    def arithmetic(lp: Tensor, w: Tensor) -> Tensor:
        total = 2 * lp
        total += w
        total *= 1 - lp / 3
        return (-(total**2) + 2 ** (lp.detach() // 1) + (1 / (w + 1)) % 2).sum() / max(1, 3)

    def shapes(lp: Tensor, w: Tensor) -> Tensor:
        n = lp.shape[0]
        ramp = torch.arange(n) / math.sqrt(lp.size(0) + 1)
        pairs = lp[:, None] - lp[None, :]
        return (
            (lp[1:] * w[:-1]).sum()
            + (lp * ramp).mean()
            + pairs.abs().mean()
            + (lp @ w) / n
            + lp.view(n, 1)[..., 0].sum()
        )

    def parts(lp: Tensor, w: Tensor) -> Tensor:
        top = lp.max(dim=0)
        ordered, index = lp.sort(descending=True)
        return top.values + ordered[0] * 2 + w[index].sum() + lp.gather(0, index)[-1] + torch.stack([lp, w]).amax()

    def functional(lp: Tensor, w: Tensor) -> Tensor:
        soft = F.softplus(lp) + F.logsigmoid(lp) + F.relu(lp + 1) + F.softmax(lp, dim=0) + F.elu(lp) + torch.tanh(lp)
        return soft.sum() + F.mse_loss(lp, w) + F.huber_loss(lp, w, reduction="sum", delta=0.5) + F.l1_loss(lp, w)

    def masked(lp: Tensor, w: Tensor) -> Tensor:
        mask = (w > 0) & ~(lp < -5)
        kept = torch.where(mask, lp, torch.zeros_like(lp)).clamp(min=-2.5)
        return kept.sum() / mask.float().sum().clamp(min=1.0) + lp.masked_fill(~mask, 0).to(torch.float64).sum()

    return {f.__name__: f for f in (arithmetic, shapes, parts, functional, masked)}


def uploaded(fn: Any, ranks: dict[str, Any]) -> tuple[Any, Any]:
    """The graph and the inputs of a loss as the SDK sends them, after a passage through JSON."""
    handle = trace_loss(fn, ranks, session_id="here")
    sent = encode_graph(handle).model_dump(), [each.model_dump() for each in handle.inputs]
    graph, inputs = json.loads(json.dumps(sent))
    return graph, inputs


def value_and_gradient(fn: Any, logprobs: Tensor, *columns: Tensor) -> tuple[float, list[float], dict[str, float]]:
    leaf = logprobs.detach().clone().requires_grad_()
    loss, metrics = fn(leaf, *columns)
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad.flatten().tolist(), {name: x.item() for name, x in metrics.items()}


def test_every_loss_with_a_per_datum_form_is_rebuilt_from_what_the_sdk_uploads() -> None:
    """Value, gradient and metrics, in float64 to 1e-12 and in float32 to 1e-6."""
    count = 0
    for case in CASES:
        if case.pairs or case.loss.couples_groups or case.loss.gradient_columns:
            continue
        fn = export.as_datum_fn(case.loss)
        names = fn.__code__.co_varnames
        rebuilt = rebuild(*uploaded(fn, dict.fromkeys(names, 2 if case.loss.rows == "targets" else 1)))
        batch = case.batch(Random(1))
        data = export.with_denominators(case.loss.bind(**batch.bound(case.loss.reads)), batch.data())
        for datum, row in zip(data[:3], batch.tensors()):
            columns = [datum.loss_fn_inputs[name].to_torch() for name in names[1:]]
            for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
                expected = value_and_gradient(fn, row.to(dtype), *columns)
                got = value_and_gradient(rebuilt, row.to(dtype), *columns)
                assert expected[2].keys() == got[2].keys(), case
                for a, b in zip(expected[:2], got[:2]):
                    assert apart(a, b) < tolerance, (case, dtype)
                assert apart([*expected[2].values()], [*got[2].values()]) < tolerance, (case, dtype)
        count += 1
    assert count > 150


def test_losses_as_people_write_them_are_rebuilt() -> None:
    for name, body in user_losses().items():
        fn = with_metric(body)
        rebuilt = rebuild(*uploaded(fn, {"logprobs": 1, "weights": 1}))
        assert value_and_gradient(fn, *ROWS) == value_and_gradient(rebuilt, *ROWS), name


def with_metric(body: Any) -> Any:
    """A loss of the contract that returns the body's value and a metric."""

    def loss(logprobs: Tensor, weights: Tensor) -> Any:
        return body(logprobs, weights), {"custom/total:sum": logprobs.detach().sum()}

    return loss


def test_a_rebuilt_loss_runs_in_one_pass_of_the_client() -> None:
    loss = lossfns.ppo(weigh=lossfns.sequence_mean)
    fn = export.as_datum_fn(loss)
    ranks = dict.fromkeys(fn.__code__.co_varnames, 1)
    rebuilt = rebuild(*uploaded(fn, ranks))
    data = [lossfns.datum_from_tokens([1, 2, 3, 4, 5][:n], prompt_length=1) for n in (3, 5, 4)]
    columns = {"advantages": [1.0, -0.5, 2.0], "old_logprobs": [[-5.0] * (n - 1) for n in (3, 5, 4)]}
    bound = loss.bind(**columns)
    ready = export.with_denominators(bound, data)
    gradients = []
    for batch, loss_fn in ((data, bound), (ready, export.per_datum(rebuilt, ranks))):
        client = lossfns.backend.LocalTrainingClient(seed=3)
        result = client.forward_backward_custom(batch, loss_fn).result()
        assert result.metrics["passes"] == 1
        gradients.append(torch.cat([p.grad.flatten() for p in client.model.parameters()]))
    difference = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert difference < 1e-6, difference
