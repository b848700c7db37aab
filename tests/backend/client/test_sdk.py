"""The two-pass protocol on the local model, with the published SDK's own code and written by hand."""

from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from batches import sdks
from tiny import client, text
from torch import Tensor

import lossfns
from lossfns.backend import ForwardBackwardOutput, LocalTrainingClient

LENGTHS = (2, 17, 3, 9, 30, 5, 12, 8)


class Surrogate(NamedTuple):
    """Datums for the built-in cross-entropy, with weights −∂loss/∂logprob, and the value of the loss."""

    data: list[Any]
    loss: float


Protocol = Callable[[list[Any], Any, ForwardBackwardOutput], Surrogate]


def by_hand(data: list[Any], loss_fn: Any, forward: ForwardBackwardOutput) -> Surrogate:
    leaves = [output["logprobs"].to_torch().clone().requires_grad_() for output in forward.loss_fn_outputs]
    loss, _ = loss_fn(data, leaves)
    loss.backward()
    sent = []
    for datum, leaf in zip(data, leaves):
        fields = {"target_tokens": datum.loss_fn_inputs["target_tokens"], "weights": -leaf.grad}
        sent.append(type(datum)(model_input=datum.model_input, loss_fn_inputs=fields))
    return Surrogate(sent, loss.item())


def by_tinker(data: list[Any], loss_fn: Any, forward: ForwardBackwardOutput) -> Surrogate:
    import tinker

    result = tinker.TrainingClient._compute_custom_loss(data, loss_fn, forward)
    return Surrogate(result.data, result.loss_sum)


def protocols() -> list[tuple[Any, Protocol]]:
    """The protocol by hand with our datums; if ``tinker`` is installed, also its own code with its datums."""
    return [(lossfns, by_hand), *((sdk, by_tinker) for sdk in sdks()[1:])]


def datums(sdk: Any, targets: int) -> list[Any]:
    rng = Random(1)
    data = [text(rng, length, sdk, targets) for length in LENGTHS]
    for datum in data:  # a long prompt, so that a gradient [N, 2] is mostly zeros
        held = datum.loss_fn_inputs["weights"].to_numpy().copy()
        held[: 3 * len(held) // 4] = 0
        datum.loss_fn_inputs["weights"] = sdk.TensorData(
            data=held.flatten().tolist(), dtype="float32", shape=list(held.shape)
        )
    return data


def columns(data: list[Any]) -> dict[str, Any]:
    """Columns of a policy near the current one: some ratios are beyond their clips."""
    rng = Random(2)
    old = [[-3.4 + rng.gauss(0, 0.4) for _ in range(n - 1)] for n in LENGTHS]
    ref = [[lp + rng.gauss(0, 0.2) for lp in row] for row in old]
    return {"advantages": [rng.gauss(0, 1) for _ in data], "old_logprobs": old, "ref_logprobs": ref}


LOSSES = [
    lossfns.cross_entropy(),
    lossfns.multi_target_cross_entropy(),
    lossfns.grpo(kl_beta=0.1),
    lossfns.gspo_token(),
    lossfns.dpo(),
    lossfns.orpo(),
]


def gradient(c: LocalTrainingClient) -> Tensor:
    """Return the gradient of all parameters as one vector, and clear it."""
    whole = torch.cat([p.grad.flatten() for p in c.model.parameters() if p.grad is not None])
    c._engine.gradients.clear()
    return whole


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_the_surrogate_of_the_two_pass_protocol_has_the_gradient_of_one_pass(loss: lossfns.Loss) -> None:
    for sdk, protocol in protocols():
        c = client()
        data = datums(sdk, 2 if loss.rows == "targets" else 0)
        known = columns(data)
        loss_fn = loss.bind(**{name: known[name] for name in loss.reads})
        one = c.forward_backward_custom(data, loss_fn).result()
        single = gradient(c)
        surrogate = protocol(data, loss_fn, c.forward(data, "cross_entropy").result())
        two = c.forward_backward(surrogate.data, "cross_entropy").result()
        double = gradient(c)
        assert single.norm() > 1e-3
        assert (single - double).norm() < 1e-6 * single.norm()
        assert (single - double).abs().max() < 1e-6 * single.abs().max()
        assert surrogate.loss == pytest.approx(one.metrics["loss:sum"], rel=1e-6)
        assert two.metrics["loss:sum"] == pytest.approx(one.metrics["surrogate_loss:sum"], rel=1e-5, abs=1e-6)


def test_the_published_sdk_sends_a_sparse_gradient_of_many_targets() -> None:
    """So the test above does compare a sparse gradient."""
    for sdk, protocol in protocols():
        c, data = client(), datums(sdk, 2)
        forward = c.forward(data, "cross_entropy").result()
        sent = protocol(data, lossfns.multi_target_cross_entropy(), forward).data
        sparse = [datum.loss_fn_inputs["weights"].sparse_crow_indices is not None for datum in sent]
        assert any(sparse) == (protocol is by_tinker)
