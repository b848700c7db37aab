"""Gradients that the server accumulates are those of direct differentiation."""

from __future__ import annotations

from typing import Any

import torch
from serving import batch, datum, sdk, tiny_model, tiny_service
from torch import Tensor

from lossfns import cross_entropy, ppo
from lossfns.backend.client.service import LocalServiceClient
from lossfns.export import as_datum_fn, with_denominators


def logprobs_of(model: Any, data: list[Any]) -> list[Tensor]:
    """The logprobs of the targets, from the logits of one sequence at a time."""
    result = []
    for each in data:
        ids = torch.tensor(each.model_input.to_ints())
        logits = model(ids, [len(ids)]) @ model.head.T
        targets = each.loss_fn_inputs["target_tokens"].to_torch()
        picked = logits.log_softmax(1).gather(1, targets.reshape(len(ids), -1))
        result.append(picked.reshape(targets.shape))
    return result


def weighted(data: list[Any], logprobs: list[Tensor]) -> Tensor:
    return sum(-(d.loss_fn_inputs["weights"].to_torch() * lp).sum() for d, lp in zip(data, logprobs))


def surrogate(data: list[Any], logprobs: list[Tensor], low: float, high: float) -> Tensor:
    """PPO's clipped objective, negated and summed."""
    total = torch.zeros(())
    for d, lp in zip(data, logprobs):
        old, a = (d.loss_fn_inputs[key].to_torch() for key in ("logprobs", "advantages"))
        ratio = (lp - old).exp()
        total = total - torch.minimum(ratio * a, ratio.clamp(low, high) * a).sum()
    return total


def mean_of_all(data: list[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return torch.cat(logprobs).square().mean(), {}


def per_datum(logprobs: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return (weights * logprobs.exp()).sum(), {}


def test_gradients_are_those_of_direct_differentiation() -> None:
    wide = [datum([1, 2, 3], target_tokens=[[2, 9], [3, 8]], weights=[[0.7, 0.3], [1.0, -0.5]])]
    policy = [
        datum(
            row,
            logprobs=[-5.5 + 0.3 * i for i in range(len(row) - 1)],
            advantages=[1.0, -2.0, 0.5, 3.0][: len(row) - 1],
        )
        for row in ([1, 2, 3, 4], [9, 8, 7, 6, 5])
    ]
    cases: dict[str, tuple[list[Any], Any, Any]] = {
        "cross_entropy": (batch(), lambda c, d: c.forward_backward(d, "cross_entropy"), weighted),
        "targets [N, K]": (wide, lambda c, d: c.forward_backward(d, "cross_entropy"), weighted),
        "ppo": (
            policy,
            lambda c, d: c.forward_backward(d, "ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
            lambda d, lp: surrogate(d, lp, 0.9, 1.1),
        ),
        "importance_sampling": (
            policy,
            lambda c, d: c.forward_backward(d, "importance_sampling"),
            lambda d, lp: surrogate(d, lp, 0.0, float("inf")),
        ),
        "a function": (batch(), lambda c, d: c.forward_backward_custom(d, mean_of_all), lambda *x: mean_of_all(*x)[0]),
        "a loss of lossfns": (
            batch(),
            lambda c, d: c.forward_backward_custom(d, cross_entropy()),
            lambda d, lp: weighted(d, lp) / sum(x.loss_fn_inputs["weights"].to_torch().sum() for x in d),
        ),
    }
    service = tiny_service()
    with sdk(service) as client_of:
        handle = client_of.create_custom_loss(per_datum, {"logprobs": 1, "weights": 1}).result()
        cases["an uploaded loss"] = (
            batch(),
            lambda c, d: c.forward_backward_custom(d, handle),
            lambda d, lp: sum(per_datum(x, y.loss_fn_inputs["weights"].to_torch())[0] for x, y in zip(lp, d)),
        )
        names = ("logprobs", "weights", "advantages", "old_logprobs")
        traced = client_of.create_custom_loss(as_datum_fn(ppo()), dict.fromkeys(names, 1)).result()
        cases["an uploaded loss of lossfns"] = (
            with_denominators(ppo(), policy),
            lambda c, d: c.forward_backward_custom(d, traced),
            lambda _, lp: surrogate(policy, lp, 0.8, 1.2) / sum(len(x) for x in lp),
        )
        for name, (data, call, loss) in cases.items():
            client = client_of.create_lora_training_client("Tiny", rank=4, seed=5).result()
            assert_trained(service.models[client.model_id].client.model)
            call(client, data).result()
            ours = service.models[client.model_id].client.model
            direct = (
                LocalServiceClient({"Tiny": tiny_model}, device="cpu").create_lora_training_client("Tiny", 4, 5).model
            )
            direct.load_state_dict(ours.state_dict())
            loss(data, logprobs_of(direct, data)).backward()
            for (key, p), q in zip(ours.named_parameters(), direct.parameters()):
                if q.grad is not None:
                    assert torch.allclose(p.grad, q.grad, rtol=1e-6, atol=1e-6 * q.grad.abs().max()), (name, key)
            assert any(q.grad is not None and q.grad.abs().max() > 0 for q in direct.parameters()), name


def assert_trained(model: Any) -> None:
    """Give the adapters' B, which start at zero, other values: all gradients then count."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) / 10)
