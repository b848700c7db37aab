"""The hosted APIs' documented custom losses, as they are documented, beside ours with the right weighing."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from batches import Batch, random_batch, sdks

from lossfns import Loss, TensorData, cross_entropy, dpo, k1, reinforce, sequence_sum_mean, with_kl
from lossfns.loading import from_file

documented = from_file(str(Path(__file__).parents[1] / "examples" / "documented_losses.py"))


def datums(batch: Batch, sdk: Any) -> list[Any]:
    """SDK objects that carry ``weights``, as the documented losses read them."""
    data = batch.data(sdk)
    for datum, weights in zip(data, batch.weights):
        datum.loss_fn_inputs["weights"] = sdk.TensorData(weights, "float32", [len(weights)])
    return data


def run(
    loss_fn: Callable[..., Any], data: list[Any], batch: Batch
) -> tuple[float, list[torch.Tensor], dict[str, float]]:
    logprobs = batch.tensors(torch.float32)
    loss, metrics = loss_fn(data, logprobs)
    loss.backward()
    return loss.item(), [lp.grad for lp in logprobs], metrics


def assert_same(documented: Callable[..., Any], ours: Callable[..., Any], batch: Batch) -> dict[str, float]:
    for sdk in sdks():
        data = datums(batch, sdk)
        expected, expected_gradients, _ = run(documented, data, batch)
        value, gradients, metrics = run(ours, data, batch)
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-6)
        for got, want in zip(gradients, expected_gradients):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    return metrics


def full(rng: Random, **options: Any) -> Batch:
    """A batch in which every sequence has an active token: the documents divide by all sequences."""
    batch = random_batch(rng, **options)
    batch.weights = [w if any(w) else [1.0] * len(w) for w in batch.weights]
    return batch


@pytest.mark.parametrize("seed", range(5))
def test_simple_cross_entropy(seed: int) -> None:
    assert_same(documented.cross_entropy_loss, cross_entropy(weigh=sequence_sum_mean), full(Random(seed)))


@pytest.mark.parametrize("seed", range(5))
def test_grpo_with_kl(seed: int) -> None:
    batch = full(Random(seed))
    advantages = [Random(seed + i).gauss(0, 1) for i in range(len(batch.weights))]
    ref = batch.columns["ref_logprobs"]
    with pytest.warns(UserWarning, match="k1"):
        loss = with_kl(reinforce(weigh=sequence_sum_mean), kl_beta=0.3, kl=k1)
    assert_same(
        documented.make_grpo_loss(advantages, ref, kl_beta=0.3),
        loss.bind(advantages=advantages, ref_logprobs=ref),
        batch,
    )


@pytest.mark.parametrize("seed", range(5))
def test_dpo_margin(seed: int) -> None:
    batch = full(Random(seed), pairs=True, sequences=2)
    ref = batch.columns["ref_logprobs"]
    metrics = assert_same(documented.make_dpo_loss(*ref, beta=0.2), dpo(beta=0.2).bind(ref_logprobs=ref), batch)
    expected = documented.make_dpo_loss(*ref, beta=0.2)(datums(batch, sdks()[-1]), batch.tensors(torch.float32))[1]
    assert metrics["margin"] == pytest.approx(expected["margin"], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_min_length_truncation_on_request(seed: int) -> None:
    """The documents cut to the shorter of logprobs and weights; ``align="truncate"`` asks for just that."""
    batch = full(Random(seed), longest=6)
    data = datums(batch, sdks()[-1])
    for datum, weights in zip(data, batch.weights):
        datum.loss_fn_inputs["weights"] = TensorData([*weights, 1.0, 1.0], "float32", [len(weights) + 2])
    expected, expected_gradients, _ = run(documented.cross_entropy_loss, data, batch)
    value, gradients, _ = run(cross_entropy(weigh=sequence_sum_mean).bind(align="truncate"), data, batch)
    assert value == pytest.approx(expected, rel=1e-6)
    for got, want in zip(gradients, expected_gradients):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_the_comparison_can_fail() -> None:
    """The wrong weighing is not the documents' loss."""
    wrong: Loss = cross_entropy()
    with pytest.raises(AssertionError):
        assert_same(documented.cross_entropy_loss, wrong, full(Random(0)))
