"""Losses on the model's outputs: what a loss gets, its gradient, and the refusal of a loss that leaves out a datum."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from lossfns import (
    Datum,
    LossInputError,
    ModelInput,
    TensorData,
    cross_entropy,
    dpo,
    grpo,
    multi_target_cross_entropy,
    token_sum,
)
from lossfns.backend.engine.differentiate import Differentiated, Outputs, objective_of

LENGTHS = [1, 2, 3]
LOGPROBS = [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
WEIGHTS = [[1.0], [0.5, 0.0], [0.0, 0.0, 2.0]]
SUMMED = [-1.0, -0.5, 0.0, 0.0, 0.0, -2.0]
"""The gradient of −Σ w·lp."""


def data(rows: list[Any] = WEIGHTS) -> list[Datum]:
    return [
        Datum(ModelInput.from_ints(range(len(row))), {"target_tokens": list(range(len(row))), "weights": row})
        for row in rows
    ]


def outputs(values: Any = LOGPROBS, lengths: list[int] = LENGTHS, name: str = "logprobs") -> Outputs:
    """Outputs that have the graph of a model."""
    return Outputs(name, torch.tensor(values, requires_grad=True) * 1, lengths, TensorData)


def bind(loss_fn: Any, data: list[Datum], form: Outputs) -> Callable[[Outputs], Differentiated]:
    """Bind a loss to outputs of this form."""
    deferred = objective_of(loss_fn, agreeing=lambda loss_fn: loss_fn).bind(data, form)
    return lambda given: deferred(given).finalise()


def differentiate(loss_fn: Any, data: list[Datum], given: Outputs) -> Differentiated:
    return bind(loss_fn, data, given)(given)


def of(loss: Callable[[list[Tensor]], Tensor], given: Outputs | None = None) -> Differentiated:
    """Differentiate a function of the logprobs alone."""
    return differentiate(lambda data, logprobs_list: (loss(logprobs_list), {}), data(), given or outputs())


# What a loss gets


@pytest.mark.parametrize(
    "given, shapes",
    [
        (outputs(), [(1,), (2,), (3,)]),
        (outputs([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]], [1, 2]), [(1, 2), (2, 2)]),
        (outputs([[1.0, 2.0], [3.0, 4.0]], [1, 1], "embedding"), [(2,), (2,)]),
        (outputs([-1.0, -2.0], [2]), [(2,)]),
    ],
    ids=["[N]", "[N, K]", "[D]", "one"],
)
def test_any_callable_gets_a_list_of_tensors_on_the_cpu(given: Outputs, shapes: list[Any]) -> None:
    """Each datum has its own tensor and gradient, here the datum's index + 1."""

    def loss(parts: list[Tensor]) -> Tensor:
        assert type(parts) is list
        assert [type(part) for part in parts] == [Tensor] * len(shapes)
        assert [tuple(part.shape) for part in parts] == shapes
        assert all(part.requires_grad and part.device.type == "cpu" and part.dtype == torch.float32 for part in parts)
        assert torch.equal(torch.cat([part.flatten() for part in parts]), given.values.flatten())
        return torch.stack([(i + 1) * part.sum() for i, part in enumerate(parts)]).sum()

    value = of(loss, given)
    rows = torch.repeat_interleave(torch.arange(1.0, len(shapes) + 1), torch.tensor(given.lengths))
    assert torch.equal(value.gradient, rows.reshape(-1, *[1] * (given.values.ndim - 1)).expand_as(given.values))


def test_the_gradient_has_the_outputs_dtype() -> None:
    given = outputs()._replace(values=torch.tensor(LOGPROBS, dtype=torch.float64, requires_grad=True) * 1)
    for loss in (cross_entropy(weigh=token_sum), lambda d, lps: (torch.cat(lps).square().sum() / 2, {})):
        assert differentiate(loss, data(), given).gradient.dtype == torch.float64


def test_what_it_does_to_its_tensors_does_not_reach_the_outputs() -> None:
    """Changes of the list do not reach the gradient either."""
    given = outputs()

    def loss(parts: list[Tensor]) -> Tensor:
        total = torch.stack([part.sum() for part in parts]).sum()
        with torch.no_grad():
            parts[0].fill_(7.0)
        parts.clear()
        return total

    assert of(loss, given).gradient.tolist() == [1.0] * 6
    assert given.values.tolist() == LOGPROBS


def test_it_may_take_gradients_of_its_own() -> None:
    """∂Σlp²/∂lp = 2lp, as a number and in the graph: Σ(2lp)² has the gradient 8lp."""
    seen = []

    def loss(parts: list[Tensor]) -> Tensor:
        total = torch.stack([part.square().sum() for part in parts]).sum()
        gradients = torch.autograd.grad(total, parts, create_graph=True)
        seen.extend(g.tolist() for g in gradients)
        return torch.stack([g.square().sum() for g in gradients]).sum()

    assert of(loss).gradient.tolist() == [8 * x for x in LOGPROBS]
    assert seen == [[-2.0], [-4.0, -6.0], [-8.0, -10.0, -12.0]]


def test_a_hook_on_a_tensor_is_called() -> None:
    """∂(3·lp)/∂lp = 3, doubled on its way in datum 1."""

    def loss(parts: list[Tensor]) -> Tensor:
        parts[1].register_hook(lambda gradient: 2 * gradient)
        return torch.stack([3 * part.sum() for part in parts]).sum()

    assert of(loss).gradient.tolist() == [3.0, 6.0, 6.0, 3.0, 3.0, 3.0]


# A loss of this library


@pytest.mark.parametrize(
    "loss",
    [
        cross_entropy(weigh=token_sum),
        cross_entropy(weigh=token_sum).bind(weights=WEIGHTS),
        lambda data, logprobs_list: cross_entropy(weigh=token_sum)(data, logprobs_list),
        lambda data, logprobs_list: cross_entropy(weigh=token_sum)(data, tuple(logprobs_list)),
        lambda data, logprobs_list: cross_entropy(weigh=token_sum)(data[::-1], logprobs_list[::-1]),
        lambda data, logprobs_list: cross_entropy(weigh=token_sum)(data, [lp * 1 for lp in logprobs_list]),
    ],
    ids=["ours", "bound", "within", "in a tuple", "in another order", "of its own tensors"],
)
def test_a_loss_of_ours_is_the_same_within_another_callable(loss: Any) -> None:
    """−Σ w·lp = 1 + 0.5·2 + 2·6."""
    value = differentiate(loss, data(), outputs())
    assert (value.loss, value.gradient.tolist()) == (14.0, SUMMED)
    assert value.metrics["tokens"] == 3.0


def test_k_targets_are_one_leaf_too() -> None:
    given = outputs([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]], [1, 2])
    weights = [[[1.0, 0.5]], [[0.0, 2.0], [0.0, 0.0]]]
    loss = multi_target_cross_entropy(weigh=token_sum)
    for loss_fn in (loss, lambda d, lps: loss(d, lps)):
        assert differentiate(loss_fn, data(weights), given).gradient.tolist() == [[-1.0, -0.5], [0.0, -2.0], [0.0, 0.0]]


def test_ours_and_its_own_maths_may_be_added() -> None:
    """−Σ w·lp + Σ lp²/2: the leaf and its parts both have a gradient."""

    def loss(data: list[Datum], parts: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        total, metrics = cross_entropy(weigh=token_sum)(data, parts)
        return total + sum(part.square().sum() / 2 for part in parts), metrics

    assert differentiate(loss, data(), outputs()).gradient.tolist() == [x + y for x, y in zip(SUMMED, LOGPROBS)]


def test_what_is_wrong_with_the_datums_is_said_before_there_are_outputs() -> None:
    """Only the form of the outputs is known: the lengths, but no values."""
    form = outputs([])
    with pytest.raises(LossInputError, match=r"grpo: datum\[0\].advantages: .* nothing bound"):
        bind(grpo(), data(), form)
    with pytest.raises(LossInputError, match=r"dpo: data: expected chosen/rejected pairs, got 3 datums"):
        bind(dpo(), data(), form)
    with pytest.raises(LossInputError, match=r"cross_entropy: datum\[1\].logprobs: expected 2 rows .* got 1"):
        bind(cross_entropy(), data(), form._replace(lengths=[1, 1, 3]))
    with pytest.raises(LossInputError, match="loss_fn: expected a function"):
        bind("cross_entropy", data(), form)


def test_a_bound_loss_takes_any_outputs() -> None:
    evaluate = bind(cross_entropy(weigh=token_sum), data(), outputs([]))
    for scale in (1.0, 2.0):
        value = evaluate(outputs([scale * x for x in LOGPROBS]))
        assert (value.loss, value.gradient.tolist()) == (scale * 14.0, SUMMED)


# No datum is left out


class Scaled(torch.autograd.Function):
    """3x, with another gradient than autograd would find."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 5 * gradient


class Passed(Scaled):
    """x itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda lp: lp.sum(),
    "reshape": lambda lp: lp.reshape(-1, 1).sum(),
    "view": lambda lp: lp.view(1, -1).T.sum(),
    "one entry": lambda lp: lp[-1],
    "slice": lambda lp: lp[-1:].sum(),
    "index": lambda lp: lp[torch.tensor([0, 0])].sum(),
    "mask": lambda lp: lp[lp < -9].sum(),
    "where": lambda lp: torch.where(lp < -9, lp, 0.0).sum(),
    "unbind": lambda lp: torch.stack(lp.unbind()).sum(),
    "a function": lambda lp: Scaled.apply(lp).sum(),
    "a function of itself": lambda lp: Passed.apply(lp).sum(),
    "in place on a copy": lambda lp: lp.clone().mul_(2).sum(),
    "recomputed": lambda lp: checkpoint(torch.exp, lp, use_reentrant=False).sum(),
    "float64": lambda lp: lp.double().sum().float(),
    "padded": lambda lp: pad_sequence([lp, lp[:1]], batch_first=True).sum(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("datum", range(3))
def test_a_datum_without_a_gradient_is_refused(way: str, datum: int) -> None:
    """The loss leaves it out, or uses it without its graph. A gradient of 0 counts as a gradient."""
    enters = WAYS[way]

    def loss(parts: list[Tensor], with_it: Callable[[Tensor], Tensor] | None) -> Tensor:
        others = [i * enters(part) for i, part in enumerate(parts) if i != datum]
        return torch.stack(others + ([with_it(parts[datum])] if with_it else [])).sum()

    for without in (None, lambda lp: enters(lp.detach())):
        with pytest.raises(
            LossInputError, match=rf"datum\[{datum}\].logprobs: .*No gradient computed for logprob tensor"
        ):
            of(lambda parts, without=without: loss(parts, without))
    value = of(lambda parts: loss(parts, lambda lp: 0.0 * enters(lp)))
    assert not torch.split(value.gradient, LENGTHS)[datum].any()


JOINT: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "cat": torch.cat,
    "stack": lambda parts: torch.stack([part.mean() for part in parts]),
    "padded": lambda parts: pad_sequence(parts, batch_first=True),
    "one after the other": lambda parts: torch.stack([part[0] for part in parts]).cumsum(0),
}


@pytest.mark.parametrize("way", JOINT)
def test_datums_that_enter_together(way: str) -> None:
    """First all datums, with gradient 0; then without the last or the first one."""
    together = JOINT[way]
    assert of(lambda parts: 0.0 * together(parts).sum()).gradient.tolist() == [0.0] * 6
    for which, datum in ((slice(0, 2), 2), (slice(1, 3), 0)):
        with pytest.raises(LossInputError, match=rf"datum\[{datum}\].*No gradient computed"):
            of(lambda parts, which=which: 0.0 * together(parts[which]).sum())


def test_the_first_that_is_left_out_is_named() -> None:
    with pytest.raises(LossInputError, match=r"datum\[1\].*No gradient computed"):
        of(lambda parts: 0.0 * parts[0].sum())
    with pytest.raises(LossInputError, match=r"datum\[0\].*No gradient computed"):
        of(lambda parts: torch.tensor(1.0, requires_grad=True))


def test_a_tensor_may_be_the_loss() -> None:
    """The loss is one of the parts itself."""
    assert of(lambda parts: parts[0], outputs([-1.0], [1])).gradient.tolist() == [1.0]
    with pytest.raises(LossInputError, match=r"datum\[1\].*No gradient computed"):
        of(lambda parts: parts[0])
    with pytest.raises(LossInputError, match=r"datum\[0\].*No gradient computed"):
        of(lambda parts: parts[1], outputs([-1.0, -2.0], [1, 1]))


def test_a_loss_of_ours_uses_every_datum_that_it_is_given() -> None:
    """Datums of weight 0 count as used, with gradient 0. Datums that it is not given do not."""
    weights = [[1.0], [0.0, 0.0], [0.0, 0.0, 0.0]]
    value = differentiate(lambda d, lps: cross_entropy()(d, lps), data(weights), outputs())
    assert value.gradient.tolist() == [-1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    with pytest.raises(LossInputError, match=r"datum\[2\].*No gradient computed"):
        differentiate(lambda d, lps: cross_entropy()(d[:2], lps[:2]), data(weights), outputs())
    with pytest.raises(LossInputError, match=r"datum\[1\].*No gradient computed"):
        differentiate(lambda d, lps: cross_entropy()(d[::2], lps[::2]), data(weights), outputs())


def test_an_embedding_may_not_be_left_out_either() -> None:
    given = outputs([[1.0, 2.0], [3.0, 4.0]], [1, 1], "embedding")
    assert of(lambda parts: parts[0].sum() + 0.0 * parts[1].sum(), given).gradient.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    with pytest.raises(LossInputError, match=r"datum\[1\].embedding: .*No gradient computed for embedding tensor"):
        of(lambda parts: parts[0].sum(), given)


# Gradients that are refused


def goes_back_itself(parts: list[Tensor]) -> Tensor:
    total = torch.cat(parts).sum()
    total.backward(retain_graph=True)
    return total


def changes_what_it_used(parts: list[Tensor]) -> Tensor:
    total = torch.cat([part.exp() for part in parts])
    loss = total.square().sum()
    total.zero_()
    return loss


def root_at_its_end(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts[:2]).add(3).sqrt().sum() + 0.0 * parts[2].sum()


@pytest.mark.parametrize(
    "loss, message",
    [
        (goes_back_itself, "one whose loss_fn has called backward"),
        (changes_what_it_used, "modified by an inplace operation"),
        (lambda parts: torch.cat(parts).add(3).abs().sqrt().sum(), r"datum\[1\].logprobs: expected a finite gradient"),
        (root_at_its_end, r"datum\[1\].logprobs: expected a finite gradient"),
        (lambda parts: -root_at_its_end(parts), r"datum\[1\].logprobs: expected a finite gradient"),
    ],
    ids=["backward", "in place", "nan", "inf", "-inf"],
)
def test_a_gradient_that_cannot_be_used_is_refused(loss: Any, message: str) -> None:
    """√|lp + 3| has no slope at −3, the second logprob of datum 1; √(lp + 3) an infinite one."""
    with pytest.raises(LossInputError, match=message):
        of(loss)
