"""The two profiles: each difference between the hosted services, and the behaviour that both profiles share."""

import asyncio
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import BYTE_SHAPE, byte_client, byte_texts, own_metrics
from torch import Tensor

import lossfns
from lossfns import LossInputError, TensorData
from lossfns.backend import AdamParams, Decoder, LocalTrainingClient

PROFILES = ("tinker", "fireworks")
each_profile = pytest.mark.parametrize("profile", PROFILES)


def client(profile: str) -> LocalTrainingClient:
    return byte_client(profile=profile)


def weights_of(data: list[Any]) -> list[list[float]]:
    return [d.loss_fn_inputs["weights"].data for d in data]


def squares(data: Any, logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """Σ lp², with gradient 2·lp, so that the surrogate Σ lp·∂L/∂lp is twice the loss."""
    return torch.cat(logprobs_list).square().sum(), {"mine": 1.5}


def squares_of(result: Any) -> float:
    return sum(x * x for output in result.loss_fn_outputs for x in output["logprobs"].data)


def failing(data: Any, logprobs_list: list[Tensor]) -> Any:
    raise ZeroDivisionError("in the loss")


# Extra keys


def with_extra(data: list[Any]) -> list[Any]:
    for d in data[1:]:
        d.loss_fn_inputs.update(mask=d.loss_fn_inputs["weights"], advantages=d.loss_fn_inputs["weights"])
    return data


def test_tinker_hands_extra_keys_to_the_loss() -> None:
    seen: list[list[str]] = []

    def loss_fn(data: Any, logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, Any]]:
        seen.extend(sorted(d.loss_fn_inputs) for d in data)
        return squares(data, logprobs_list)

    client("tinker").forward_backward_custom(with_extra(byte_texts()), loss_fn).result()
    assert seen == [["target_tokens", "weights"]] + [["advantages", "mask", "target_tokens", "weights"]] * 3


def test_fireworks_refuses_extra_keys_at_the_call_in_its_own_words() -> None:
    c = client("fireworks")
    message = (
        r"datum\[1\].loss_fn_inputs: .*forward_backward_custom only supports loss_fn_inputs keys "
        r"{'target_tokens', 'weights'}; found unexpected keys: \['advantages', 'mask'\].*bind\(advantages="
    )
    with pytest.raises(LossInputError, match=message):
        c.forward_backward_custom(with_extra(byte_texts()), squares)
    assert all(p.grad is None for p in c.model.parameters())
    with pytest.raises(LossInputError, match="unexpected keys"):
        c.forward_backward_custom(with_extra(byte_texts()), lossfns.cross_entropy())
    bound = lossfns.importance_sampling().bind(advantages=[1.0] * 4, old_logprobs=[[-5.0] * len(w) for w in weights()])
    assert c.forward_backward_custom(byte_texts(), bound).result().metrics["response_tokens"] > 0


def weights() -> list[list[float]]:
    return weights_of(byte_texts())


def test_the_keys_of_embeddings_and_built_ins_are_their_own() -> None:
    c = client("fireworks")
    c.forward_backward_custom(with_extra(byte_texts()), squares, output="embedding").result()
    c.forward_backward([targets(2, logprobs=row(-5, -5), advantages=row(1, 1))], "ppo").result()


# When an error is raised, and the client after it


def test_tinker_runs_the_loss_on_its_own_thread_and_raises_when_the_result_is_read() -> None:
    c, threads = client("tinker"), []

    def loss_fn(data: Any, logprobs_list: list[Tensor]) -> Any:
        threads.append(threading.current_thread())
        raise ZeroDivisionError("in the loss")

    future = c.forward_backward_custom(byte_texts(), loss_fn)
    with pytest.raises(ZeroDivisionError, match="in the loss"):
        future.result()
    assert threads and threads[0] is not threading.current_thread()


def test_fireworks_raises_at_the_call() -> None:
    with pytest.raises(ZeroDivisionError, match="in the loss"):
        client("fireworks").forward_backward_custom(byte_texts(), failing)


@each_profile
def test_the_same_for_code_that_awaits_twice(profile: str) -> None:
    """The second await raises under Tinker's profile, the first under Fireworks'."""

    async def run() -> str:
        c = client(profile)
        try:
            future = await c.forward_backward_custom_async(byte_texts(), failing)
        except ZeroDivisionError:
            return "fireworks"
        with pytest.raises(ZeroDivisionError):
            await future
        return "tinker"

    assert asyncio.run(run()) == profile


@each_profile
def test_the_client_is_usable_after_a_loss_error(profile: str) -> None:
    """Tinker's own client is not. Here the step uses the gradient from before the error."""
    c, d = client(profile), client(profile)
    for x in (c, d):
        x.forward_backward(byte_texts(), "cross_entropy").result()
    with pytest.raises(ZeroDivisionError):
        c.forward_backward_custom(byte_texts(), failing).result()
    steps = [x.optim_step(AdamParams()).result().metrics for x in (c, d)]
    assert steps[0] == steps[1] and steps[0]["grad_norm"] > 0
    assert all(map(torch.equal, c.model.parameters(), d.model.parameters()))


CALLS: dict[str, Callable[[LocalTrainingClient], Any]] = {
    "forward": lambda c: c.forward([], "cross_entropy"),
    "forward_backward": lambda c: c.forward_backward([], "cross_entropy"),
    "forward_backward_custom": lambda c: c.forward_backward_custom([], squares),
    "embedding": lambda c: c.forward_backward_custom([], squares, output="embedding"),
}


@each_profile
@pytest.mark.parametrize("call", CALLS)
def test_an_empty_batch_is_refused_at_the_call_but_by_fireworks_when_read(call: str, profile: str) -> None:
    """Under Fireworks' profile the call of a custom loss waits, so it is refused there."""
    c = client(profile)
    if profile == "fireworks" and call.startswith("forward") and call != "forward_backward_custom":
        future = CALLS[call](c)
        with pytest.raises(LossInputError, match="No data provided"):
            future.result()
    else:
        with pytest.raises(LossInputError, match="No data provided"):
            CALLS[call](c)
    assert c.forward(byte_texts(), "cross_entropy").result().metrics


# Metrics of a custom loss


def test_tinkers_loss_sum_is_the_loss_beside_the_surrogate() -> None:
    result = client("tinker").forward_backward_custom(byte_texts(), squares).result()
    loss = squares_of(result)
    expected = {"mine": 1.5, "loss:sum": loss, "surrogate_loss:sum": 2 * loss}
    assert own_metrics(result.metrics) == pytest.approx(expected, rel=1e-5)


def test_fireworks_loss_sum_is_the_surrogate_and_response_tokens_have_a_gradient() -> None:
    result = client("fireworks").forward_backward_custom(byte_texts(), squares).result()
    expected = {"mine": 1.5, "loss:sum": 2 * squares_of(result), "response_tokens": float(sum(map(len, weights())))}
    assert own_metrics(result.metrics) == pytest.approx(expected, rel=1e-5)


def test_response_tokens_of_a_custom_loss_are_the_entries_that_it_moves() -> None:
    """The loss moves the first token of each datum; the others enter with a factor of 0."""

    def firsts(data: Any, logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, Any]]:
        return sum(-lp[0] + 0.0 * lp[1:].sum() for lp in logprobs_list), {}

    assert client("fireworks").forward_backward_custom(byte_texts(), firsts).result().metrics["response_tokens"] == 4.0
    masked = sum(w != 0 for row in weights() for w in row)
    ours = client("fireworks").forward_backward_custom(byte_texts(), lossfns.cross_entropy()).result().metrics
    assert ours["response_tokens"] == masked < sum(map(len, weights()))


COLLIDING: dict[str, Any] = {"loss:sum": 5.0, "surrogate_loss:sum": 6.0, "response_tokens": 7.0, "note": "any object"}


def colliding(data: Any, logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, Any]]:
    return squares(data, logprobs_list)[0], COLLIDING


def test_names_of_tinker_win_over_the_users_and_those_of_fireworks_lose() -> None:
    tinker = client("tinker").forward_backward_custom(byte_texts(), colliding).result()
    loss = squares_of(tinker)
    note = {"note": "any object"}
    assert tinker.metrics.pop("note") == note["note"]
    expected = {"loss:sum": loss, "surrogate_loss:sum": 2 * loss, "response_tokens": 7.0}
    assert own_metrics(tinker.metrics) == pytest.approx(expected, rel=1e-5)
    assert (
        own_metrics(client("fireworks").forward_backward_custom(byte_texts(), colliding).result().metrics) == COLLIDING
    )
    assert COLLIDING["loss:sum"] == 5.0  # the loss's own dict is not written to


def test_a_loss_of_ours_keeps_its_metrics_under_both() -> None:
    """``loss`` is the mean that was differentiated; ``loss:sum`` depends on the profile."""
    tinker, fireworks = (
        client(p).forward_backward_custom(byte_texts(), lossfns.cross_entropy()).result().metrics for p in PROFILES
    )
    assert tinker["loss"] == tinker["loss:sum"] == pytest.approx(fireworks["loss"])
    assert fireworks["loss:sum"] == pytest.approx(tinker["surrogate_loss:sum"])
    assert tinker["surrogate_loss:sum"] == pytest.approx(tinker["loss"], rel=1e-5)  # it is linear in the logprobs
    assert tinker.keys() - fireworks.keys() == {"surrogate_loss:sum"}
    assert fireworks.keys() - tinker.keys() == {"response_tokens"}


# Metrics of a built-in


@each_profile
def test_metrics_of_a_built_in_say_how_they_combine(profile: str) -> None:
    c = client(profile)
    for result in (
        c.forward(byte_texts(), "cross_entropy").result(),
        c.forward_backward(byte_texts(), "cross_entropy").result(),
    ):
        lps = [output["logprobs"].data for output in result.loss_fn_outputs]
        rows = [(lp, w) for row, own in zip(lps, weights()) for lp, w in zip(row, own)]
        expected = {
            "loss:sum": -sum(lp * w for lp, w in rows),
            "tokens:sum": sum(w != 0 for _, w in rows),
            "sequences:sum": 4.0,
            "sequences_empty:sum": 0.0,
            "nll:mean": -sum(lp for lp, w in rows if w) / sum(w != 0 for _, w in rows),
        }
        got = {name: x for name, x in own_metrics(result.metrics).items() if name != "response_tokens"}
        assert got == pytest.approx(expected, rel=1e-5)
        assert all(name.split(":")[1] in ("sum", "mean") for name in got)


def targets(n: int, k: int = 0, **fields: Any) -> lossfns.Datum:
    shape = (n, k) if k else (n,)
    ids = TensorData([7] * math.prod(shape), "int64", shape)
    return lossfns.Datum(lossfns.ModelInput.from_ints([5] * n), {"target_tokens": ids, **fields})


def row(*values: float) -> TensorData:
    return TensorData(list(values), "float32", [len(values)])


WIDE = torch.zeros(8, 9)
WIDE[2, 3], WIDE[2, 5], WIDE[7, 0] = 0.5, -1.0, 2.0
BACKFILL: list[tuple[str, list[Any], float]] = [
    ("absent: every target", [targets(5), targets(2)], 7),
    ("absent in one datum", [targets(5), targets(2, weights=row(0, 1))], 6),
    ("zeros do not count", [targets(4, weights=row(0, 1, 1, 0)), targets(2, weights=row(0, 0))], 2),
    ("fractional and negative count one each", [targets(4, weights=row(0.25, -1, 0, 1e-6))], 3),
    ("-0 is 0", [targets(2, weights=row(-0.0, 1))], 1),
    ("[N, K] absent: every entry", [targets(3, 2)], 6),
    ("[N, K]: every entry by itself", [targets(2, 3, weights=TensorData([1, 0, 0.5, 0, 0, 0], "float32", [2, 3]))], 2),
    ("[N, K], sparse", [targets(8, 9, weights=TensorData.from_torch_sparse(WIDE))], 3),
]


@pytest.mark.parametrize(("data", "count"), [case[1:] for case in BACKFILL], ids=[case[0] for case in BACKFILL])
def test_fireworks_counts_the_response_tokens_of_a_cross_entropy(data: list[Any], count: float) -> None:
    c = client("fireworks")
    assert c.forward_backward(data, "cross_entropy").result().metrics["response_tokens"] == count
    assert "response_tokens" not in c.forward(data, "cross_entropy").result().metrics
    assert "response_tokens" not in client("tinker").forward_backward(data, "cross_entropy").result().metrics


@each_profile
def test_a_batch_that_is_masked_as_a_whole_has_no_response_and_is_refused(profile: str) -> None:
    with pytest.raises(LossInputError, match="cross_entropy: weights: expected at least one active token"):
        client(profile).forward_backward([targets(2, weights=row(0, 0))], "cross_entropy").result()


def test_the_sparse_case_is_sparse() -> None:
    assert BACKFILL[-1][1][0].loss_fn_inputs["weights"].sparse_crow_indices is not None


def test_fireworks_counts_them_for_no_other_built_in() -> None:
    data = [targets(2, logprobs=row(-5, -5), advantages=row(1, 1))]
    assert "response_tokens" not in client("fireworks").forward_backward(data, "ppo").result().metrics


# Features of both profiles that one service lacks


@each_profile
def test_embeddings_and_normalisation_are_there_under_both(profile: str) -> None:
    c = client(profile)
    c.forward_backward_custom(byte_texts(), squares, output="embedding", pooling="last").result()
    assert c.optim_step(AdamParams(), "num_sequences").result().metrics["grad_norm"] > 0


@each_profile
def test_the_gradient_is_the_same_under_both(profile: str) -> None:
    c, d = client(profile), client("tinker")
    for x in (c, d):
        x.forward_backward(byte_texts(), "cross_entropy")
        x.forward_backward_custom(byte_texts(), squares).result()
    for p, q in zip(c.model.parameters(), d.model.parameters()):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)
    assert c.get_info().profile == profile


@pytest.mark.parametrize(
    ("name", "hint"),
    [("thinker", "Did you mean 'tinker'"), ("Fireworks", "Did you mean 'fireworks'"), ("", "Known: "), (None, "None")],
)
def test_an_unknown_profile_is_refused(name: Any, hint: str) -> None:
    with pytest.raises(LossInputError, match=rf"profile: expected 'tinker' or 'fireworks', got .*{hint}"):
        LocalTrainingClient(Decoder(**BYTE_SHAPE), device="cpu", profile=name)
