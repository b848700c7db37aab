"""The record itself: repr, binding, metrics, host transfers, and a loss of one's own."""

import copy
import dataclasses
import math
import warnings
from random import Random
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from batches import CASES, Batch, Case, call, random_batch
from torch import Tensor

import lossfns
from lossfns import ON_POLICY, Loss, LossInputError, LossWarning, Tokens, datum_from_tokens, merge_metrics, token_mean
from lossfns.loss import METRICS
from lossfns.pack import RESERVED_COLUMNS
from lossfns.preset import make_loss

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


@pytest.mark.parametrize(
    ("preset", "defaults"),
    [
        (lossfns.reinforce, "weigh=token_mean"),
        (lossfns.importance_sampling, "weigh=token_mean, log_ratio_cap=20.0"),
        (lossfns.ppo, "clip=(0.8, 1.2), weigh=token_mean, log_ratio_cap=20.0, dual_clip=None"),
        (lossfns.dapo, "clip=(0.8, 1.28), weigh=token_mean, log_ratio_cap=20.0, dual_clip=None"),
        (lossfns.gspo, "clip=(0.9997, 1.0004), weigh=sequence_mean, log_ratio_cap=20.0, dual_clip=None"),
        (lossfns.gspo_token, "clip=(0.9997, 1.0004), weigh=sequence_mean, log_ratio_cap=20.0, dual_clip=None"),
        (lossfns.cispo, "clip=(0.0, 4.0), weigh=token_mean, log_ratio_cap=20.0"),
        (lossfns.dro, "beta=0.05, weigh=token_mean"),
        (lossfns.cross_entropy, "weigh=token_mean"),
        (lossfns.multi_target_cross_entropy, "weigh=token_mean"),
        (lossfns.dpo, "beta=0.1, label_smoothing=0.0, weigh=pair_mean"),
        (lossfns.orpo, "lam=0.1, weigh=pair_mean"),
    ],
)
def test_defaults_of_the_presets(preset: Any, defaults: str) -> None:
    assert repr(preset()) == f"{preset.__name__}({defaults})"


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


def test_grad_l1_of_chunks_merges_like_the_loss() -> None:
    """Token-mean CE: Σ|∂L/∂lp| = Σ w / Σ w = 1, of the whole and of each chunk with a denominator of its own."""
    first, second = data_and_logprobs(), data_and_logprobs((1.0, 1.0, 1.0))
    loss = lossfns.cross_entropy().bind(grad_l1=True)
    merged = merge_metrics([loss(*first)[1], loss(*second)[1]])
    assert merged["grad_l1"] == loss(first[0] + second[0], first[1] + second[1])[1]["grad_l1"] == pytest.approx(1.0)


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
    assert type(lossfns.cross_entropy().denominator(data)) is float
    assert lossfns.cross_entropy(weigh=lossfns.fixed_length(7)).denominator(data * 3) == 21
    assert lossfns.cross_entropy(weigh=lossfns.token_sum).denominator(data) == 1
    assert lossfns.cross_entropy().bind(weights=[[1.0, 0.5, 0.25]]).denominator(data) == 1.75


def test_a_raw_sum_is_divided_by_1_whatever_is_bound() -> None:
    data, logprobs = data_and_logprobs()
    value, metrics = lossfns.cross_entropy(weigh=lossfns.token_sum).bind(denominator=8)(data, logprobs)
    assert value.item() == 5 and metrics["denominator"] == 1 and "count" not in metrics


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
    value, metrics = lossfns.cross_entropy().bind(denominator=torch.tensor(5.0))(data, logprobs)
    assert value.item() == 1.0 and metrics["denominator"] == 5 and type(metrics["denominator"]) is float
    assert lossfns.cross_entropy().bind(denominator=0.5).divisor == 0.5
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(LossInputError, match="cross_entropy: denominator: expected a finite number above 0"):
            lossfns.cross_entropy().bind(denominator=torch.tensor(value))


def test_a_part_has_the_columns_of_its_datums() -> None:
    """On-policy the loss is −A: −(1 − 2) / 2 of both datums, and 2 of the second alone."""
    data, logprobs = data_and_logprobs()
    bound = lossfns.ppo().bind(advantages=[1.0, -2.0], old_logprobs=ON_POLICY, align="truncate")
    assert bound(data * 2, logprobs * 2)[0].item() == 0.5
    second = bound.part(slice(1, 2))
    assert second(data, logprobs)[0].item() == 2 and second.align == "truncate"
    assert second.columns == {"advantages": [-2.0], "old_logprobs": ON_POLICY}


def test_the_value_alone_is_that_of_the_call() -> None:
    """(2 + 3) / 2, or over 5 where that is bound; its gradient is the call's."""
    data, logprobs = data_and_logprobs()
    bound = lossfns.cross_entropy().bind(weights=[[0.0, 1.0, 1.0]])
    assert bound.value(data, logprobs).item() == bound(data, logprobs)[0].item() == 2.5
    with pytest.raises(LossInputError, match="cross_entropy: logprobs_list"):
        bound.value(data, [])
    value = bound.bind(denominator=5).value(data, logprobs)
    value.backward()
    assert value.item() == 1.0 and logprobs[0].grad.tolist() == pytest.approx([0.0, -0.2, -0.2])


def test_the_kind_of_row_may_be_a_string() -> None:
    dpo = dataclasses.replace(lossfns.dpo(), rows="pairs")
    assert dpo.rows is lossfns.Rows.PAIRS
    assert make_loss(dpo.terms, dpo.reads, lossfns.pair_mean, rows="pairs").rows is lossfns.Rows.PAIRS
    with pytest.raises(ValueError, match="pair"):
        dataclasses.replace(dpo, rows="pair")


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


def test_defaults_of_the_combinators() -> None:
    """β = 0.001 with k3, a weight of at most 2 on each token, and a dual clip at 3."""
    knobs = {"loss": ANY, "kl_beta": 1e-3, "kl": lossfns.k3, "kl_weight": None, "kl_cap": None, "kl_to": "ref_logprobs"}
    assert lossfns.with_kl(lossfns.ppo()).knobs == knobs
    corrected = lossfns.with_rollout_weight(lossfns.ppo(), lossfns.rollout.truncated())
    shown = f"with_rollout_weight(loss={lossfns.ppo()!r}, weight=rollout.truncated((0.0, 2.0), token_level))"
    assert repr(corrected) == shown
    assert lossfns.with_tis(lossfns.ppo()).knobs == {"loss": ANY, "cap": 2.0, "level": lossfns.token_level}
    assert lossfns.with_dual_clip(lossfns.ppo()).knobs == {"loss": ANY, "c": 3.0}


def test_a_combinator_adds_the_columns_it_reads_once_and_in_order() -> None:
    assert lossfns.with_tis(lossfns.reinforce()).reads == ("advantages", "old_logprobs", "sampler_logprobs")
    assert lossfns.with_tis(lossfns.ppo()).reads == ("advantages", "old_logprobs", "sampler_logprobs")
    assert lossfns.with_kl(lossfns.reinforce()).reads == ("advantages", "ref_logprobs")
    assert lossfns.with_dual_clip(lossfns.ppo()).reads == ("advantages", "old_logprobs")


def test_a_combinator_keeps_the_statistics_of_the_loss_inside() -> None:
    batch = random_batch(Random(1))
    inside = call(lossfns.ppo(), batch)[2]
    for outer, added in (
        (lossfns.with_kl(lossfns.ppo()), {"kl_ref"}),
        (lossfns.with_tis(lossfns.ppo()), {"tis_weight", "tis_capped"}),
        (lossfns.with_dual_clip(lossfns.ppo()), {"clip_dual"}),
    ):
        metrics = call(outer, batch)[2]
        assert metrics.keys() == inside.keys() | added
        assert all(metrics[name] == inside[name] for name in inside.keys() - {"loss"})


def test_a_loss_without_a_preset_is_named_loss() -> None:
    bare = make_loss(lambda t: (-t.logprobs, {}), ["advantages"], token_mean)
    assert repr(bare) == "loss()" and bare.reads == ("advantages",) and bare.rows == "tokens"


def own(term: float, advantages: list[float]) -> tuple[Tensor, dict[str, float]]:
    """A loss of one's own, the same at every token, dual-clipped at 3."""
    terms: Any = lambda t: (term + 0 * t.logprobs, {})  # noqa: E731
    loss = lossfns.with_dual_clip(Loss("own", {}, ("advantages",), terms, token_mean.share, token_mean.count))
    data, logprobs = data_and_logprobs((1.0, 1.0, 1.0))
    return loss.bind(advantages=[advantages])(data, logprobs)


@pytest.mark.parametrize(
    ("advantages", "value", "binds"),
    [
        ([-0.25, -0.25, -0.25], 0.75, 1.0),  # min(1.5, 3·0.25)
        ([-0.25, -1.0, -0.25], 1.0, 2 / 3),  # min(1.5, 3) at the second
        ([-0.5, -0.5, -0.5], 1.5, 0.0),  # on the bound nothing changes
        ([0.0, 1.0, 0.25], 1.5, 0.0),  # only a negative advantage is clipped by
    ],
)
def test_a_dual_clip_binds_where_it_changes_the_loss(advantages: list[float], value: float, binds: float) -> None:
    """A loss of 1.5 against −3·A."""
    got, metrics = own(1.5, advantages)
    assert got.item() == pytest.approx(value) and metrics["clip_dual"] == pytest.approx(binds)


def test_a_weight_at_its_cap_is_not_counted_as_capped() -> None:
    """old = sampler: weight 1 with a cap of 1 is what it would be without."""
    data, logprobs = data_and_logprobs()
    columns = {"advantages": [1.0], "old_logprobs": [[-1.0, -2.0, -3.0]], "sampler_logprobs": [[-1.0, -2.0, -3.5]]}
    _, metrics = lossfns.with_tis(lossfns.ppo(), cap=1.0).bind(**columns)(data, logprobs)
    assert metrics["tis_capped"] == 0.5 and metrics["tis_weight"] == 1.0


def test_statistics_are_means_over_active_tokens_whatever_their_share() -> None:
    """The second of two active tokens has a share of 0: it is no part of the loss, but still a token."""
    loss = Loss(
        name="first",
        knobs={},
        reads=(),
        terms=lambda t: (-t.logprobs, {"nll": -t.logprobs}),
        share=lambda t: t.weights * torch.tensor([0.0, 1.0, 0.0]),
        count=token_mean.count,
    )
    data, logprobs = data_and_logprobs()
    value, metrics = loss(data, logprobs)
    assert value.item() == 2 / 2 and metrics["nll"] == (2 + 3) / 2


def test_a_pair_of_negative_share_is_a_pair() -> None:
    """Two pairs, the first with share −1, the second with none: one row, and its margin is the mean."""
    dpo = lossfns.dpo()
    loss = dataclasses.replace(dpo, share=lambda t: torch.tensor([-1.0, 0.0], dtype=t.weights.dtype), count=None)
    ref = {"ref_logprobs": [[-1.0]] * 4}
    value, _, metrics = call(loss, Batch([[-1.0], [-3.0], [-1.0], [-9.0]], [[1.0]] * 4, ref))
    assert value == pytest.approx(-math.log1p(math.exp(-0.2))) and metrics["pairs"] == 1 and metrics["margin"] == 2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_statistics_of_every_loss_are_constants(case: Case) -> None:
    batch, reads = case.batch(Random(0)), case.loss.reads
    t = lossfns.pack(batch.data(), batch.tensors(), reads, batch.bound(reads), rows=case.loss.rows)
    term, statistics = case.loss.terms(t)
    assert term.requires_grad and not any(x.requires_grad for x in statistics.values())


def test_a_statistic_of_a_combinator_replaces_one_of_the_same_name() -> None:
    """The loss's own statistic is 7; k3 of equal logprobs is 0."""

    def terms(t: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
        return -t.logprobs, {"kl_ref": torch.full_like(t.logprobs, 7.0)}

    loss = lossfns.with_kl(make_loss(terms, (), token_mean), kl_beta=0.1)
    logprobs = torch.full((1, 2), -1.0)
    assert loss.padded(logprobs, torch.ones(1, 2), ref_logprobs=logprobs)[1]["kl_ref"] == 0.0


def test_the_reduction_takes_statistics_off_the_graph() -> None:
    loss = Loss("nll", {}, (), lambda t: (-t.logprobs, {"nll": -t.logprobs}), token_mean.share, token_mean.count)
    _, statistics = lossfns.evaluate(loss, Tokens(torch.zeros(2, requires_grad=True), torch.ones(2)))
    assert statistics.keys() == {"rows", "nll"} and not any(x.requires_grad for x in statistics.values())


def test_weights_with_a_negative_sum_have_no_mean() -> None:
    data, logprobs = data_and_logprobs((1.0, -2.0, 0.0))
    with pytest.raises(LossInputError, match=r"weights: expected a denominator above 0, got -1\."):
        lossfns.cross_entropy()(data, logprobs)
    assert lossfns.cross_entropy().denominator(data) == -1  # a part: the others may make the sum positive
    assert lossfns.cross_entropy().bind(denominator=2)(data, logprobs)[0].item() == (1 - 4) / 2


def test_what_is_bound_stays_bound_until_it_is_bound_again() -> None:
    data, logprobs = data_and_logprobs()
    loss = lossfns.cross_entropy().bind(grad_l1=True, align="truncate", denominator=4)
    again = loss.bind(weights=[[0.0, 1.0, 1.0, 7.0]])
    value, metrics = again(data, logprobs)
    assert value.item() == 5 / 4 and metrics["grad_l1"] == 2 / 4 and metrics["denominator"] == 4
    assert again.align == "truncate" and lossfns.cross_entropy().bind().align == "strict"
    assert "grad_l1" not in again.bind(grad_l1=False)(data, logprobs)[1]
    with pytest.raises(LossInputError, match="weights"):
        again.bind(align="strict")(data, logprobs)


@pytest.mark.parametrize(
    ("columns", "field", "got", "fix"),
    [
        ({"advantage": [1.0]}, "bind", "the name 'advantage'", "Did you mean 'advantages'?"),
        ({"denominators": 3}, "bind", "the name 'denominators'", "Did you mean 'denominator'?"),
        ({"aling": "strict"}, "bind", "the name 'aling'", "Did you mean 'align'?"),
        ({"grad_11": True}, "bind", "the name 'grad_11'", "Did you mean 'grad_l1'?"),
        ({"align": "truncated"}, "align", "'truncated'", "Did you mean 'truncate'?"),
        ({"align": "strickt"}, "align", "'strickt'", "Did you mean 'strict'?"),
        ({"advantages": None}, "advantages", "None", "Leave it out to read the datums' own."),
        ({"advantages": ON_POLICY}, "advantages", "ON_POLICY", "Leave it out to read the datums' own."),
        ({"ref_logprobs": ON_POLICY}, "ref_logprobs", "ON_POLICY", "Leave it out to read the datums' own."),
        ({"denominator": 0}, "denominator", "0", "Take it from loss.denominator(whole_batch)."),
        ({"denominator": torch.ones(0)}, "denominator", "tensor([])", "Take it from loss.denominator(whole_batch)."),
        (
            {"denominator": torch.ones(2)},
            "denominator",
            "tensor([1., 1.])",
            "Take it from loss.denominator(whole_batch).",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_bound_is_refused(columns: dict[str, Any], field: str, got: str, fix: str) -> None:
    with pytest.raises(LossInputError) as caught:
        lossfns.grpo().bind(**columns)
    error = caught.value
    assert (error.loss, error.field, error.got, error.fix) == ("grpo", field, got, fix)


def test_everything_is_bound_by_name() -> None:
    with pytest.raises(TypeError):
        lossfns.ppo().bind().bind(5)


def test_a_column_that_is_not_read_is_bound_with_a_warning() -> None:
    with pytest.warns(LossWarning, match=r"reinforce\(weigh=token_mean\) does not read old_logprobs"):
        lossfns.reinforce().bind(old_logprobs=[[0.0, -1.0, -2.0]])
    lossfns.reinforce().bind(weights=[[0.0, 1.0, 1.0]], advantages=[1.0])


def test_grad_l1_adds_over_chunks_of_one_denominator() -> None:
    data, logprobs = data_and_logprobs()
    loss = lossfns.cross_entropy().bind(grad_l1=True, denominator=4)
    assert merge_metrics([loss(data, logprobs)[1], loss(data, logprobs)[1]])["grad_l1"] == 1.0


def test_grad_l1_of_constants_is_refused() -> None:
    data, logprobs = data_and_logprobs()
    with pytest.raises(LossInputError, match="logprobs_list: expected tensors that require grad, for grad_l1"):
        lossfns.cross_entropy().bind(grad_l1=True)(data, [logprobs[0].detach()])


def test_k1_as_a_penalty_is_doubted() -> None:
    with pytest.warns(LossWarning, match="k1 in a loss has an expected gradient of 0"):
        lossfns.with_kl(lossfns.ppo(), kl=lossfns.k1)


@pytest.mark.parametrize(
    ("build", "field", "got", "fix"),
    [
        (lambda: lossfns.with_kl(lossfns.ppo), "loss", "ppo", "Call the preset: ppo(), not ppo."),
        (lambda: lossfns.with_kl(3), "loss", "3", "Call the preset: ppo(), not ppo."),
        (
            lambda: lossfns.with_kl(lossfns.dpo(weigh=lossfns.pair_sum)),
            "loss",
            "dpo(beta=0.1, label_smoothing=0.0, weigh=pair_sum)",
            "Apply with_kl last, with_tis before it, with_dual_clip first: with_kl(with_tis(ppo()), kl_beta=0.01).",
        ),
        (
            lambda: lossfns.with_kl(lossfns.orpo()),
            "loss",
            "orpo(lam=0.1, weigh=pair_mean) over pairs",
            "It works on a term of each token.",
        ),
        (
            lambda: lossfns.with_dual_clip(lossfns.cross_entropy()),
            "loss",
            "cross_entropy(weigh=token_mean)",
            "There is nothing to clip by.",
        ),
    ],
)
def test_what_cannot_be_wrapped_is_refused(build: Any, field: str, got: str, fix: str) -> None:
    with pytest.raises(LossInputError) as caught:
        build()
    assert (caught.value.field, caught.value.got, caught.value.fix) == (field, got, fix)


def test_an_unknown_knob_is_a_type_error_with_a_hint() -> None:
    with pytest.raises(TypeError, match=r"^ppo\(\) has no knob 'clp'\. Did you mean 'clip'\?$"):
        lossfns.ppo(clp=(0.8, 1.2))


def test_records_cannot_be_changed() -> None:
    loss = lossfns.ppo()
    for record, name in ((loss, "name"), (loss.bind(denominator=2), "divisor")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, None)


# Names where functions are expected


@pytest.mark.parametrize(
    ("by_name", "by_function"),
    [
        (lambda: lossfns.ppo(weigh="sequence_mean"), lambda: lossfns.ppo(weigh=lossfns.sequence_mean)),
        (lambda: lossfns.dpo(weigh="pair_sum"), lambda: lossfns.dpo(weigh=lossfns.pair_sum)),
        (lambda: lossfns.grpo(kl="k2"), lambda: lossfns.grpo(kl=lossfns.k2)),
        (lambda: lossfns.with_kl(lossfns.ppo(), 0.1, "k3"), lambda: lossfns.with_kl(lossfns.ppo(), 0.1, lossfns.k3)),
        (
            lambda: lossfns.with_tis(lossfns.ppo(), level="geometric_level"),
            lambda: lossfns.with_tis(lossfns.ppo(), level=lossfns.geometric_level),
        ),
    ],
)
def test_a_weighing_an_estimator_and_a_level_may_be_given_by_name(by_name: Any, by_function: Any) -> None:
    """The loss is the same, and its knobs hold the function."""
    one, other = by_name(), by_function()
    assert repr(one) == repr(other)
    assert [one.knobs[name] for name in ("weigh", "kl", "level") if name in one.knobs] == [
        other.knobs[name] for name in ("weigh", "kl", "level") if name in other.knobs
    ]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: lossfns.ppo(weigh="sequence-mean"),
            "ppo: weigh: .* got 'sequence-mean'. Did you mean 'sequence_mean'?",
        ),
        (lambda: lossfns.ppo(weigh="pair_mean"), "ppo: weigh: expected a weighing of tokens, got pair_mean"),
        (lambda: lossfns.ppo(weigh="fixed_length"), r"ppo: weigh: .* pass weigh=fixed_length\(1024\)"),
        (lambda: lossfns.grpo(kl="mse"), "grpo: kl: expected a function such as k3, got 'mse'. Pass kl=k2."),
        (lambda: lossfns.grpo(kl="k5"), "grpo: kl: .* got 'k5'. Known: k1, k2, k3"),
        (lambda: lossfns.grpo(kl=lossfns.grpo), "grpo: kl: expected a function such as k3, got .*. Known: k1, k2, k3"),
        (lambda: lossfns.grpo(kl=lossfns.ppo().bind()), "grpo: kl: expected a function such as k3"),
        (
            lambda: lossfns.with_tis(lossfns.ppo(), level=lossfns.k3),
            "level: .* a function for level, got k3, one",
        ),
        (lambda: lossfns.with_kl(lossfns.ppo(), kl_to="ref"), "with_kl: kl_to: .* Use one of: old_logprobs, ref"),
        (lambda: lossfns.with_kl(lossfns.ppo(), kl_weight=lambda t: 1), "with_kl: kl_weight: expected a TokenWeight"),
        (
            lambda: lossfns.with_tis(lossfns.ppo(), level="sequence"),
            r"level: .* Did you mean 'sequence_level'\?",
        ),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_one_and_never_with_itself(build: Any, message: str) -> None:
    with pytest.raises(LossInputError, match=message) as caught:
        build()
    assert f"Did you mean {caught.value.got}?" not in str(caught.value)


# Losses of one's own


def record(terms: Any = None, reads: Any = (), name: str = "own", **changes: Any) -> Loss:
    terms = terms or (lambda t: (-t.logprobs, {}))
    fields = {"share": token_mean.share, "count": token_mean.count, **changes}
    return Loss(name=name, knobs={}, reads=reads, terms=terms, **fields)


RAN: list[str] = []


@pytest.mark.parametrize(
    "name",
    [
        "x=__import__('test_loss').RAN.append('ran')",
        "x: body(x), 0)[1] if [__import__('test_loss').RAN.append('ran')] else (lambda y",
        "a b",
        "lambda",
        "1st",
        "",
        3,
        None,
    ],
)
def test_a_name_of_a_column_is_an_identifier_and_no_code(name: Any) -> None:
    with pytest.raises(LossInputError, match="reads: expected names of columns that are identifiers"):
        record(reads=(name,))
    with pytest.raises(LossInputError, match="identifiers"):
        dataclasses.replace(lossfns.ppo(), reads=("advantages", name))
    assert RAN == []


@pytest.mark.parametrize("name", RESERVED_COLUMNS)
def test_a_column_cannot_have_the_name_of_something_else(name: str) -> None:
    """t.lengths would be the lengths of the sequences, and bind(denominator=...) the denominator."""
    with pytest.raises(LossInputError, match=f"reads: expected names other than .*, got '{name}'"):
        record(reads=(name,))


def test_reads_are_names_each_once() -> None:
    for reads, message in (("advantages", "a tuple of names"), (("a", "a"), "each name once"), (None, "a tuple")):
        with pytest.raises(LossInputError, match=f"reads: expected {message}"):
            record(reads=reads)
    assert record(reads=["label"]).reads == ("label",)


@pytest.mark.parametrize("changes", [{"terms": 3}, {"share": None}, {"count": 1.0}, {"name": 3}, {"knobs": None}])
def test_a_record_of_something_else_than_functions_is_refused_where_it_is_made(changes: dict[str, Any]) -> None:
    with pytest.raises(LossInputError, match="expected"):
        dataclasses.replace(lossfns.ppo(), **changes)


DATA = [datum_from_tokens([5, 6, 7], prompt_length=1), datum_from_tokens([5, 6], prompt_length=1)]
LPS = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])]


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (lambda t: (-t.logprobs.sum(), {}), r"own: terms: expected a tensor of shape \(3,\), .* got .* of shape \(\)"),
        (lambda t: (-t.logprobs[:2], {}), r"own: terms: .* got .* of shape \(2,\)"),
        (lambda t: (-t.logprobs[:, None], {}), r"own: terms: .* got .* of shape \(3, 1\)"),
        (lambda t: (3.0, {}), "own: terms: .* got a float"),
        (lambda t: -t.logprobs, "own: terms: expected the loss of each row, and a dict .* got a Tensor"),
        (lambda t: (-t.logprobs, None), "own: terms: expected the loss of each row, and a dict"),
        (lambda t: (t.active, {}), "own: terms: expected floating point numbers, got torch.bool"),
        (lambda t: (-t.logprobs, {"x": t.logprobs[:2]}), r"own: x: .* got .* of shape \(2,\)"),
        (lambda t: (-t.logprobs, {"x": 0.5}), "own: x: .* got a float"),
    ],
)
def test_terms_of_a_wrong_shape_are_refused_by_name(terms: Any, message: str) -> None:
    for call_it in (record(terms), record(terms).bind().value):
        with pytest.raises(LossInputError, match=message):
            call_it(DATA, LPS)


def test_a_share_of_a_wrong_shape_is_refused_by_name() -> None:
    with pytest.raises(LossInputError, match=r"own: share: .* got .* of shape \(2,\)"):
        record(share=lossfns.datum_mean.share)(DATA, LPS)


@pytest.mark.parametrize("name", [*METRICS, "x:sum"])
def test_a_statistic_cannot_replace_a_metric(name: str) -> None:
    loss = record(lambda t: (-t.logprobs, {name: t.logprobs.detach()}))
    with pytest.raises(LossInputError, match=f"own: statistics: expected names that are no metric .* got '{name}'"):
        loss(DATA, LPS)


def test_the_fix_for_a_negative_weight_is_one_that_the_loss_allows() -> None:
    """Only a loss with advantages has a place for the sign."""
    data = [datum_from_tokens([5, 6, 7], [0.0, 1.0, -1.0])] * 2
    logprobs = [LPS[0]] * 2
    with pytest.raises(LossInputError, match=r"orpo: datum\[0\].weights\[1\]: .* Give 0 to a token"):
        lossfns.orpo()(data, logprobs)
    with pytest.raises(LossInputError, match="Put the sign into the advantages"):
        lossfns.reinforce().bind(advantages=[1.0, 1.0])(data, logprobs)


def test_a_label_in_a_row_of_one_is_answered_with_a_flat_list() -> None:
    labelled = Loss(
        "labelled", {}, ("label",), lambda t: (lossfns.segments.weighted_sum(t, t.label * t.logprobs), {}),
        lossfns.datum_mean.share, lossfns.datum_mean.count, lossfns.Rows.SEQUENCES,
    )  # fmt: skip
    with pytest.raises(LossInputError, match=r"datum\[0\].label: .* got a row of 1. Bind a flat list: label=\[...\]"):
        labelled.bind(label=[[1.0], [-1.0]])(DATA, LPS)
    labelled.bind(label=[1.0, -1.0])(DATA, LPS)
