"""The record itself: repr, binding, metrics, host transfers, and a loss of one's own."""

import copy
import math
import warnings
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from batches import CASES, Case, call, random_batch
from torch import Tensor

import lossfns
from lossfns import Loss, LossInputError, LossWarning, Tokens, datum_from_tokens, merge_metrics, token_mean

NAMESPACE = {name: getattr(lossfns, name) for name in dir(lossfns)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_repr_builds_the_same_loss(case: Case) -> None:
    again = eval(repr(case.loss), dict(NAMESPACE))
    assert repr(again) == repr(case.loss)
    batch = case.batch(Random(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LossWarning)
        assert call(again, batch) == call(case.loss, batch)


def test_knobs_are_what_was_passed_and_the_defaults() -> None:
    assert lossfns.grpo(kl_beta=0.1).knobs == {
        "clip": (0.8, 1.2),
        "kl_beta": 0.1,
        "kl": lossfns.k3,
        "weigh": token_mean,
        "log_ratio_cap": 20.0,
        "dual_clip": None,
    }
    assert lossfns.dpo().name == "dpo" and lossfns.dpo().reads == ("ref_logprobs",)


def test_the_documents_table_of_defaults() -> None:
    """Clip, KL and aggregation of grpo, dapo and gspo-token."""
    grpo, dapo, gspo_token = lossfns.grpo().knobs, lossfns.dapo().knobs, lossfns.gspo_token().knobs
    assert (grpo["clip"], grpo["kl_beta"], grpo["weigh"]) == ((0.8, 1.2), 0.001, token_mean)
    assert (dapo["clip"], dapo["weigh"]) == ((0.8, 1.28), token_mean)
    assert (gspo_token["clip"], gspo_token["weigh"]) == ((1 - 3e-4, 1 + 4e-4), lossfns.sequence_mean)


def data_and_logprobs(weights: tuple[float, ...] = (0.0, 1.0, 1.0)) -> tuple[list[Any], list[Tensor]]:
    data = [datum_from_tokens([1, 2, 3, 4], [0.0, *weights])]
    return data, [torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)]


def test_metrics_are_plain_floats_with_one_name_each() -> None:
    batch = random_batch(Random(1))
    metrics = call(lossfns.grpo(), batch)[2]
    assert all(type(value) is float for value in metrics.values())
    assert metrics.keys() == {
        *("loss", "denominator", "count", "tokens", "sequences", "sequences_empty"),
        *("ratio", "ratio_capped", "log_ratio_abs", "kl_old", "kl_ref", "clip_low", "clip_high"),
    }


def test_grad_l1_on_request() -> None:
    data, logprobs = data_and_logprobs()
    loss, metrics = lossfns.cross_entropy().bind(grad_l1=True)(data, logprobs)
    loss.backward()
    assert metrics["grad_l1"] == pytest.approx(logprobs[0].grad.abs().sum().item()) == pytest.approx(1.0)


def test_binding_accumulates_and_replaces() -> None:
    data, logprobs = data_and_logprobs()
    bound = lossfns.ppo().bind(advantages=[1.0]).bind(old_logprobs=lossfns.ON_POLICY)
    assert bound(data, logprobs)[0].item() == -1
    assert bound.bind(advantages=[-2.0])(data, logprobs)[0].item() == 2
    assert bound.bind(denominator=8)(data, logprobs)[0].item() == -0.25
    assert bound(data, logprobs)[0].item() == -1


def test_denominator_before_any_forward_pass() -> None:
    data, _ = data_and_logprobs()
    assert lossfns.cross_entropy().denominator(data) == 2
    assert lossfns.cross_entropy(weigh=lossfns.fixed_length(7)).denominator(data * 3) == 21
    assert lossfns.cross_entropy(weigh=lossfns.token_sum).denominator(data) == 1
    assert lossfns.cross_entropy().bind(weights=[[1.0, 0.5, 0.25]]).denominator(data) == 1.75


def test_a_chunk_without_any_active_token_is_a_valid_part_of_a_larger_batch() -> None:
    data, logprobs = data_and_logprobs((0.0, 0.0, 0.0))
    for loss in (lossfns.cross_entropy(), lossfns.cross_entropy(weigh=lossfns.token_sum)):
        with pytest.raises(LossInputError, match="at least one active token"):
            loss(data, logprobs)
        value, metrics = loss.bind(denominator=5)(data, logprobs)
        value.backward()
        assert value.item() == 0 and metrics["nll"] == 0 and metrics["sequences_empty"] == 1
        assert logprobs[0].grad.tolist() == [0.0, 0.0, 0.0]


def test_merged_metrics_of_separate_batches_are_those_of_the_whole() -> None:
    """Each part with its own denominator: losses average by it."""
    batch = random_batch(Random(4), sequences=6)
    parts = [call(lossfns.cross_entropy(), batch.take(part))[2] for part in ([0, 1, 2], [3, 4, 5])]
    assert merge_metrics(parts) == pytest.approx(call(lossfns.cross_entropy(), batch)[2])


def test_a_loss_of_ones_own_obeys_the_same_contract() -> None:
    """Focal loss, in one line of terms: everything else comes with the record."""
    focal = Loss(
        name="focal",
        knobs={"gamma": 2.0},
        reads=(),
        terms=lambda t: (-((1 - t.logprobs.exp()) ** 2) * t.logprobs, {}),
        share=token_mean.share,
        count=token_mean.count,
    )
    data, logprobs = data_and_logprobs()
    value, metrics = focal(data, logprobs)
    expected = sum((1 - math.exp(lp)) ** 2 * -lp for lp in (-2.0, -3.0)) / 2
    assert value.item() == pytest.approx(expected) and metrics["tokens"] == 2
    assert repr(focal) == "focal(gamma=2.0)"


def test_a_loss_of_ones_own_may_read_a_column_of_its_own() -> None:
    def terms(t: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        return (t.logprobs - t.teacher_logprobs) ** 2, {}

    loss = Loss("distance", {}, ("teacher_logprobs",), terms, token_mean.share, token_mean.count)
    data, logprobs = data_and_logprobs()
    assert loss.bind(teacher_logprobs=[[9.0, -1.0, -1.0]])(data, logprobs)[0].item() == (1 + 4) / 2
    with pytest.raises(LossInputError, match=r"distance: datum\[0\].teacher_logprobs"):
        loss(data, logprobs)


def test_one_transfer_to_the_host_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """``tolist`` is the only way a value leaves the tensors in a call that raises nothing."""
    batch = random_batch(Random(1))
    transfers: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy"):
        original = getattr(Tensor, name)

        def spy(self: Tensor, *args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            transfers.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, spy)
    for loss in (lossfns.grpo(), lossfns.gspo_token(), lossfns.cross_entropy(weigh=lossfns.sequence_mean)):
        transfers.clear()
        loss.bind(**batch.bound(loss.reads))(batch.data(), batch.tensors())
        assert transfers == ["tolist"]


def test_gradients_do_not_reach_the_columns() -> None:
    data, logprobs = data_and_logprobs()
    old = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    value, _ = lossfns.ppo().bind(advantages=[1.0], old_logprobs=[old])(data, logprobs)
    value.backward()
    assert old.grad is None and logprobs[0].grad is not None


def test_float64_in_float64_out_and_half_precision_is_widened() -> None:
    data, logprobs = data_and_logprobs()
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        leaf = logprobs[0].detach().to(dtype).requires_grad_()
        value, _ = lossfns.cross_entropy()(data, [leaf])
        value.backward()
        assert value.dtype == expected and leaf.grad.dtype == dtype


def test_merging_adds_what_is_named_a_sum_and_takes_chunks_without_any_token() -> None:
    data, logprobs = data_and_logprobs((0.0, 0.0, 0.0))
    _, empty = lossfns.cross_entropy().bind(denominator=5)(data, logprobs)
    assert merge_metrics([empty, empty])["loss"] == 0
    full = call(lossfns.cross_entropy(), random_batch(Random(1)))[2] | {"loss:sum": 2.0}
    assert merge_metrics([full, full])["loss:sum"] == 4.0
    with pytest.raises(LossInputError, match="at least one chunk"):
        merge_metrics([])


def test_a_denominator_may_be_a_tensor_as_all_reduce_leaves_it() -> None:
    data, logprobs = data_and_logprobs()
    assert lossfns.cross_entropy().bind(denominator=torch.tensor(5.0))(data, logprobs)[0].item() == 1.0
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(LossInputError, match="cross_entropy: denominator: expected a finite number above 0"):
            lossfns.cross_entropy().bind(denominator=torch.tensor(value))


def test_a_share_may_be_a_mask() -> None:
    data, logprobs = data_and_logprobs()
    loss = Loss("nll", {}, (), lambda t: (-t.logprobs, {}), lambda t: t.active, lambda t: t.active.sum())
    assert loss(data, logprobs)[0].item() == 2.5


def test_a_bound_tensor_is_not_written_to() -> None:
    """Blanking happens in the door's own copy, for a single datum too."""
    data, logprobs = data_and_logprobs()
    for old in (torch.tensor([math.nan, -2.0, -3.0]), np.array([math.nan, -2.0, -3.0], dtype=np.float32)):
        before = repr(old)
        lossfns.ppo().bind(advantages=[1.0], old_logprobs=[old])(data, logprobs)
        assert repr(old) == before


def test_losses_can_be_copied_and_kept_in_sets() -> None:
    data, logprobs = data_and_logprobs()
    bound = copy.deepcopy(lossfns.ppo().bind(advantages=[1.0], old_logprobs=lossfns.ON_POLICY))
    assert bound(data, logprobs)[0].item() == -1
    assert len({lossfns.ppo(), lossfns.ppo()}) == 2


@pytest.mark.parametrize("advantages", ["12", ["1", "2"], [b"1", b"2"], [1j, 2j], [torch.tensor(1j)] * 2])
def test_text_and_complex_numbers_are_no_numbers(advantages: Any) -> None:
    data, logprobs = data_and_logprobs()
    bound = lossfns.ppo().bind(advantages=advantages, old_logprobs=lossfns.ON_POLICY)
    with pytest.raises(LossInputError, match="advantages: expected a number or a row of numbers"):
        bound(data * 2, logprobs * 2)
