"""The hosted APIs' documented custom losses, as they are documented, beside ours with the right weighing."""

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batches import Batch, random_batch, sdks

from lossfns import Loss, TensorData, cross_entropy, dpo, k1, reinforce, sequence_sum_mean, with_kl

# The three functions below are verbatim from Fireworks' "Loss Functions" page, but for `compute_advantages`,
# whose result is passed in.
# fmt: off


def cross_entropy_loss(data, logprobs_list):
    total_loss = torch.tensor(0.0)
    for i, logprobs in enumerate(logprobs_list):
        weights = torch.tensor(data[i].loss_fn_inputs["weights"].data, dtype=torch.float32)
        min_len = min(len(logprobs), len(weights))
        weighted_sum = torch.dot(logprobs[:min_len].float(), weights[:min_len])
        total_loss = total_loss - weighted_sum  # Negative log-likelihood
    loss = total_loss / len(logprobs_list)
    return loss, {"cross_entropy": loss.item()}


def make_grpo_loss(advantages, ref_logprobs, kl_beta=0.001):
    ref_tensors = [torch.tensor(lp, dtype=torch.float32) for lp in ref_logprobs]

    def loss_fn(data, logprobs_list):
        total_loss = torch.tensor(0.0)
        for i in range(len(logprobs_list)):
            weights = torch.tensor(data[i].loss_fn_inputs["weights"].data, dtype=torch.float32)
            pi = logprobs_list[i][:len(weights)]
            ref = ref_tensors[i][:len(weights)]

            pg_loss = -advantages[i] * torch.dot(pi.float(), weights)
            kl_term = torch.dot((pi - ref).float(), weights)
            total_loss = total_loss + pg_loss + kl_beta * kl_term

        return total_loss / len(logprobs_list), {"loss": (total_loss / len(logprobs_list)).item()}

    return loss_fn


def make_dpo_loss(ref_chosen, ref_rejected, beta=0.1):
    ref_c = torch.tensor(ref_chosen, dtype=torch.float32)
    ref_r = torch.tensor(ref_rejected, dtype=torch.float32)

    def loss_fn(data, logprobs_list):
        pi_c, pi_r = logprobs_list[0], logprobs_list[1]
        w_c = torch.tensor(data[0].loss_fn_inputs["weights"].data, dtype=torch.float32)
        w_r = torch.tensor(data[1].loss_fn_inputs["weights"].data, dtype=torch.float32)

        margin = (torch.dot(pi_c.float(), w_c) - torch.dot(ref_c, w_c)) - \
                 (torch.dot(pi_r.float(), w_r) - torch.dot(ref_r, w_r))

        return -F.logsigmoid(beta * margin), {"margin": margin.item()}

    return loss_fn


# fmt: on


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
    assert_same(cross_entropy_loss, cross_entropy(weigh=sequence_sum_mean), full(Random(seed)))


@pytest.mark.parametrize("seed", range(5))
def test_grpo_with_kl(seed: int) -> None:
    batch = full(Random(seed))
    advantages = [Random(seed + i).gauss(0, 1) for i in range(len(batch.weights))]
    ref = batch.columns["ref_logprobs"]
    with pytest.warns(UserWarning, match="k1"):
        loss = with_kl(reinforce(weigh=sequence_sum_mean), kl_beta=0.3, kl=k1)
    assert_same(make_grpo_loss(advantages, ref, kl_beta=0.3), loss.bind(advantages=advantages, ref_logprobs=ref), batch)


@pytest.mark.parametrize("seed", range(5))
def test_dpo_margin(seed: int) -> None:
    batch = full(Random(seed), pairs=True, sequences=2)
    ref = batch.columns["ref_logprobs"]
    metrics = assert_same(make_dpo_loss(*ref, beta=0.2), dpo(beta=0.2).bind(ref_logprobs=ref), batch)
    documented = make_dpo_loss(*ref, beta=0.2)(datums(batch, sdks()[-1]), batch.tensors(torch.float32))[1]
    assert metrics["margin"] == pytest.approx(documented["margin"], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_min_length_truncation_on_request(seed: int) -> None:
    """The documents cut to the shorter of logprobs and weights; ``align="truncate"`` asks for just that."""
    batch = full(Random(seed), longest=6)
    data = datums(batch, sdks()[-1])
    for datum, weights in zip(data, batch.weights):
        datum.loss_fn_inputs["weights"] = TensorData([*weights, 1.0, 1.0], "float32", [len(weights) + 2])
    expected, expected_gradients, _ = run(cross_entropy_loss, data, batch)
    value, gradients, _ = run(cross_entropy(weigh=sequence_sum_mean).bind(align="truncate"), data, batch)
    assert value == pytest.approx(expected, rel=1e-6)
    for got, want in zip(gradients, expected_gradients):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_the_comparison_can_fail() -> None:
    """The wrong weighing is not the documents' loss."""
    wrong: Loss = cross_entropy()
    with pytest.raises(AssertionError):
        assert_same(cross_entropy_loss, wrong, full(Random(0)))
