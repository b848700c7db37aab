"""``token_gradient``: any part of a batch's tokens has the same gradient as in the whole batch."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lossfns
from lossfns import ON_POLICY, Loss, LossInputError, Tokens, evaluate
from lossfns.export.token_gradient import token_gradient
from lossfns.logprobs.linear import linear_logprobs
from lossfns.testing.public import presets
from lossfns.tokens import DATUM_COLUMNS, MODEL_COLUMNS

LENGTHS = (5, 1, 8, 3)
N = sum(LENGTHS)

SETTINGS: dict[str, dict[str, Any]] = {
    "reinforce": {"weigh": lossfns.sequence_mean},
    "importance_sampling": {"weigh": lossfns.token_sum},
    "ppo": {"weigh": lossfns.sequence_sum_mean},
    "grpo": {"kl_beta": 0.1},
    "dapo": {"dual_clip": 3.0},
}


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def couples_tokens(loss: Loss) -> bool:
    """Whether the gradient of a token changes with the logprob of an earlier or later one."""
    if not loss.rows.per_token or loss.couples_groups:
        return True
    t = Tokens(-1 - random(0, 4).abs(), torch.ones(4), None, {name: -1 - random(0, 4).abs() for name in loss.reads})

    def inner_gradient(first: float, last: float) -> Tensor:
        leaf = (t.logprobs - torch.tensor([first, 0, 0, last])).requires_grad_()
        return torch.autograd.grad(evaluate(loss, replace(t, logprobs=leaf))[0], leaf)[0][1:-1]

    others = [inner_gradient(*by) for by in ((0.02, 0), (-0.02, 0), (0, 0.02), (0, -0.02))]
    return not all(torch.equal(inner_gradient(0, 0), other) for other in others)


LOSSES = [preset(**SETTINGS.get(name, {})) for name, preset in presets().items() if preset().rows != "targets"]
BY_SEQUENCE = [loss for loss in LOSSES if couples_tokens(loss)]
BY_TOKEN = [*(loss for loss in LOSSES if loss not in BY_SEQUENCE), lossfns.with_tis(lossfns.ppo())]


def batch() -> list[Any]:
    return [lossfns.datum_from_tokens(range(2, n + 3), prompt_length=min(2, n)) for n in LENGTHS]


def bound(loss: Loss) -> Any:
    columns: dict[str, Any] = {
        "advantages": [1.0, -2.0, 0.5, 3.0],
        **{key: [1.0, 0.0, 0.0, 1.0] for key in DATUM_COLUMNS},
    }
    names = [name for name in loss.reads if name not in columns]
    signs = {name: 1 if name in MODEL_COLUMNS else -1 for name in names}
    columns |= {name: list((sign * random(len(name), N).abs()).split(LENGTHS)) for name, sign in signs.items()}
    return loss.bind(**{name: columns[name] for name in loss.reads})


def whole(loss: Any, logprobs: Tensor) -> Tensor:
    leaf = logprobs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(batch(), list(leaf.split(LENGTHS)))[0], leaf)
    return gradient


@pytest.mark.parametrize("loss", BY_TOKEN, ids=repr)
@pytest.mark.parametrize(
    "index", [slice(None), slice(3, 9), slice(16, 17), torch.tensor([11, 0, 4])], ids=["all", "some", "one", "any"]
)
def test_a_part_has_the_gradient_that_it_has_in_the_whole(loss: Loss, index: Any) -> None:
    logprobs = -random(7, N).abs()
    gradient = token_gradient(bound(loss), batch())
    torch.testing.assert_close(
        gradient(logprobs[index], index), whole(bound(loss), logprobs)[index], rtol=1e-6, atol=1e-8
    )


def test_a_denominator_that_is_bound_and_one_that_is_not() -> None:
    """Weights of the four datums: 4, 1, 7 and 2 completion tokens, so the batch's own count is 14."""
    logprobs = -random(7, N).abs()
    own, fixed = (
        token_gradient(loss, batch())
        for loss in (lossfns.cross_entropy(), lossfns.cross_entropy().bind(denominator=7.0))
    )
    torch.testing.assert_close(2 * own(logprobs, slice(None)), fixed(logprobs, slice(None)))
    assert sorted(set(own(logprobs, slice(None)).tolist())) == pytest.approx([-1 / 14, 0])


def test_on_policy_the_old_logprobs_are_those_of_each_part() -> None:
    """r = 1 for any part, so ∂/∂lp = −A/n over the 14 active tokens."""
    loss = lossfns.ppo().bind(advantages=[1.0, -2.0, 0.5, 3.0], old_logprobs=ON_POLICY)
    gradient = token_gradient(loss, batch())(-random(7, N).abs()[5:6], slice(5, 6))
    assert gradient.item() == pytest.approx(2 / 14)


def test_several_targets() -> None:
    data = [
        lossfns.Datum(
            lossfns.ModelInput.from_ints([1, 2]),
            {"target_tokens": [[1, 2], [3, 4]], "weights": [[0.5, 0.0], [1.0, 0.5]]},
        )
    ]
    gradient = token_gradient(lossfns.multi_target_cross_entropy(weigh=lossfns.token_sum), data)
    assert gradient(torch.tensor([[-1.0, -2.0]]), slice(1, 2)).tolist() == [[-1.0, -0.5]]


def test_the_entries_of_several_targets_may_be_listed() -> None:
    """A flat row of four weights stands for two weights of each of two tokens, as everywhere else."""
    fields = {"target_tokens": [[1, 2], [3, 4]], "weights": [0.5, 0.0, 1.0, 0.5]}
    data = [lossfns.Datum(lossfns.ModelInput.from_ints([1, 2]), fields)]
    gradient = token_gradient(lossfns.multi_target_cross_entropy(weigh=lossfns.token_sum), data)
    assert gradient(torch.tensor([[-1.0, -2.0]]), slice(1, 2)).tolist() == [[-1.0, -0.5]]


def test_rows_that_would_be_cut_are_refused() -> None:
    """An index counts all targets, also those whose advantages are missing."""
    loss = lossfns.reinforce().bind(advantages=[[1.0] * n for n in (5, 1, 2, 3)], align="truncate")
    with pytest.raises(LossInputError, match="reinforce: align: expected rows as long as target_tokens"):
        token_gradient(loss, batch())
    whole_rows = loss.bind(advantages=[[1.0] * n for n in LENGTHS])
    assert (token_gradient(whole_rows, batch())(torch.zeros(2), slice(5, 7)) != 0).tolist() == [True, False]


@pytest.mark.parametrize(("loss", "data", "field"), [(lossfns.cross_entropy(), [], "data"), (sum, batch(), "loss")])
def test_neither_an_empty_batch_nor_another_function_has_one(loss: Any, data: list[Any], field: str) -> None:
    with pytest.raises(LossInputError) as caught:
        token_gradient(loss, data)
    assert caught.value.field == field


@pytest.mark.parametrize("loss", BY_SEQUENCE, ids=repr)
def test_a_loss_of_whole_sequences_is_refused_by_name(loss: Loss) -> None:
    with pytest.raises(LossInputError, match="tokens stand for themselves") as error:
        token_gradient(bound(loss), batch())
    assert loss.name in str(error.value)


@pytest.mark.parametrize("loss_fn", BY_TOKEN, ids=repr)
def test_the_separable_plan_with_a_loss_is_the_loss(loss_fn: Loss) -> None:
    """Gradients straight from hidden states, compared with the loss on logits in float64."""
    hidden, weight = random(1, N, 6), random(2, 11, 6)
    targets = torch.cat([torch.tensor(d.loss_fn_inputs["target_tokens"].data) for d in batch()]) % 11
    loss = bound(loss_fn)
    leaves = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    logprobs = (leaves[0] @ leaves[1].T).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    expected = torch.autograd.grad(loss(batch(), list(logprobs.split(LENGTHS)))[0], leaves)
    ours = [hidden.requires_grad_(), weight.requires_grad_()]
    logprobs = linear_logprobs(*ours, targets, plan="separable", gradient=token_gradient(loss, batch()))
    got = torch.autograd.grad(loss(batch(), list(logprobs.split(LENGTHS)))[0], ours)
    for g, e in zip(got, expected):
        torch.testing.assert_close(g.double(), e, rtol=1e-4, atol=1e-6)
