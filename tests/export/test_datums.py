"""Three forms of a loss have one gradient: the loss, its traced function of one datum, and the built-in."""

import math
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
from batches import CASES, Case, apart, call, sdks
from torch import Tensor

import lossfns
from lossfns import LossInputError, export

SINGLE = [case for case in CASES if not case.pairs and not case.loss.couples_groups]
pytestmark = pytest.mark.filterwarnings("ignore:.*log-ratio.*")


def trace(fn: Any, ranks: dict[str, int]) -> list[Any]:
    """The function itself, traced by torch.fx, and traced by the SDK's own tracer where it is installed."""
    traced = [fn, torch.fx.symbolic_trace(fn)]
    if len(sdks()) > 1:
        from tinker.lib.public_interfaces.custom_loss import trace_loss

        traced.append(trace_loss(fn, ranks, session_id="here").graph)
    return traced


@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_the_traced_form_summed_over_datums_is_the_batch_loss(case: Case) -> None:
    fn = export.as_datum_fn(case.loss)
    rank = 2 if case.loss.rows == "targets" else 1
    names = fn.__code__.co_varnames
    graphs = trace(fn, dict.fromkeys(names, rank))
    for seed in (1, 2):
        batch = case.batch(Random(seed))
        value, gradients, metrics = call(case.loss, batch)
        for sdk in sdks():
            bound = case.loss.bind(**batch.bound(case.loss.reads))
            data = export.with_denominators(bound, batch.data(sdk))
            assert all(type(d) is sdk.Datum for d in data)
            for graph in graphs:
                logprobs = batch.tensors()
                parts = [graph(lp, *inputs(d, names[1:])) for d, lp in zip(data, logprobs)]
                total = sum(loss for loss, _ in parts)
                total.backward()
                assert apart(total.item(), value) < 5e-6  # the columns of datums are float32, and terms cancel
                assert apart([lp.grad.flatten().tolist() for lp in logprobs], gradients) < 1e-6
                rows = sum(m["custom/rows:sum"].item() for _, m in parts)
                for name in parts[0][1].keys() - {"custom/rows:sum"}:
                    mean = sum(m[name].item() for _, m in parts) / rows
                    assert apart(mean, metrics[name.removeprefix("custom/").removesuffix(":sum")]) < 1e-5


def inputs(datum: Any, names: Sequence[str]) -> list[Tensor]:
    return [datum.loss_fn_inputs[name].to_torch() for name in names]


@pytest.mark.parametrize("loss", [lossfns.dpo(), lossfns.orpo()], ids=str)
def test_losses_that_couple_datums_have_no_per_datum_form(loss: lossfns.Loss) -> None:
    with pytest.raises(LossInputError, match="couples two"):
        export.as_datum_fn(loss)


def hosted(name: str, datum: Any, lp: Tensor, config: dict[str, float] | None) -> Tensor:
    """The services' built-ins as their documentation gives them: a raw sum over the datum's tokens."""
    field = {name: data.to_torch() for name, data in datum.loss_fn_inputs.items()}
    if name == "cross_entropy":
        return -(lp * field["weights"]).sum()
    d = lp - field["logprobs"]
    if name == "gspo":
        mask = field["sequence_ratio_mask"] != 0
        mean = d[mask].mean().detach() if mask.any() else torch.tensor(0.0)
        d = mean + lp - lp.detach()
    r, a = d.exp(), field["advantages"]
    if name == "importance_sampling":
        return -(r * a).sum()
    assert config is not None
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    if name == "cispo":
        return -(r.clamp(low, high).detach() * lp * a).sum()
    return -torch.minimum(r * a, r.clamp(low, high) * a).sum()


FOLDABLE = [
    lossfns.cross_entropy(weigh=lossfns.sequence_mean),
    lossfns.multi_target_cross_entropy(),
    lossfns.importance_sampling(log_ratio_cap=None),
    lossfns.ppo(log_ratio_cap=None, weigh=lossfns.fixed_length(5)),
    lossfns.dapo(log_ratio_cap=None),
    lossfns.grpo(log_ratio_cap=None, kl_beta=0, weigh=lossfns.sequence_mean),
    lossfns.gspo_token(log_ratio_cap=None, clip=(0.7, 1.5)),
    lossfns.gspo_token(log_ratio_cap=None, weigh=lossfns.token_mean),
    lossfns.cispo(log_ratio_cap=None),
    lossfns.cispo(log_ratio_cap=None, clip=(0.8, 1.28), weigh=lossfns.sequence_mean),
    lossfns.with_tis(lossfns.ppo(log_ratio_cap=None), cap=1.3),
    lossfns.with_tis(lossfns.cispo(log_ratio_cap=None), cap=1.3, level=lossfns.sequence_level),
    lossfns.with_tis(lossfns.importance_sampling(log_ratio_cap=None), cap=1.3, level=lossfns.geometric_level),
    lossfns.with_tis(lossfns.gspo_token(log_ratio_cap=None, clip=(0.7, 1.5)), cap=1.3, level=lossfns.sequence_level),
]


@pytest.mark.parametrize("loss", FOLDABLE, ids=str)
def test_a_folded_loss_is_the_built_in_with_the_same_gradient(loss: lossfns.Loss) -> None:
    case = Case(loss, lambda: (0.0, []))
    for seed in (1, 2, 3):
        batch = case.batch(Random(seed))
        if "gspo_token" in repr(loss):  # its built-in takes a mask
            batch.weights = [[float(w != 0) for w in row] for row in batch.weights]
        value, gradients, _ = call(loss, batch)
        for sdk in sdks():
            folded = export.fold(loss.bind(**batch.bound(loss.reads)), batch.data(sdk))
            logprobs = batch.tensors()
            total = sum(hosted(folded.loss_fn, d, lp, folded.loss_fn_config) for d, lp in zip(folded.data, logprobs))
            total.backward()
            assert apart(total.item(), value) < 1e-6
            assert apart([lp.grad.flatten().tolist() for lp in logprobs], gradients) < 1e-6


def test_cispo_folds_to_the_services_own_thresholds() -> None:
    batch = Case(lossfns.cispo(log_ratio_cap=None), lambda: (0.0, [])).batch(Random(1))
    loss = lossfns.cispo(log_ratio_cap=None)
    folded = export.fold(loss.bind(**batch.bound(loss.reads)), batch.data())
    assert folded.loss_fn == "cispo"
    assert folded.loss_fn_config == {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}


def test_folded_datums_carry_only_what_the_built_in_takes() -> None:
    case = Case(FOLDABLE[3], lambda: (0.0, []))
    batch = case.batch(Random(1))
    folded = export.fold(case.loss.bind(**batch.bound(case.loss.reads)), batch.data())
    assert all(d.loss_fn_inputs.keys() == {"target_tokens", "logprobs", "advantages"} for d in folded.data)
    assert folded.loss_fn_config == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    assert all(math.isfinite(x) for d in folded.data for x in d.loss_fn_inputs["advantages"].data)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lossfns.grpo(log_ratio_cap=None), "kl_beta=0"),
        (lossfns.ppo(), "log_ratio_cap=None"),
        (lossfns.ppo(log_ratio_cap=None, dual_clip=3.0), "dual_clip=None"),
        (lossfns.gspo(log_ratio_cap=None), "gspo_token"),
        (lossfns.cispo(), "log_ratio_cap=None"),
        (lossfns.dro(), "no place for a share, nor for a mask"),
        (lossfns.dro(weigh=lossfns.token_sum), "no place for a share, nor for a mask"),
        (lossfns.dpo(), "cross_entropy"),
        (lossfns.with_kl(lossfns.ppo()), "ppo"),
        (lossfns.with_tis(lossfns.ppo()), "log_ratio_cap=None"),
        (lossfns.with_tis(lossfns.dro()), "no place for a share, nor for a mask"),
        (lossfns.with_kl(lossfns.with_tis(lossfns.ppo(log_ratio_cap=None))), "pass kl_beta=0"),
    ],
    ids=str,
)
def test_what_no_built_in_computes_is_refused(loss: lossfns.Loss, reason: str) -> None:
    with pytest.raises(LossInputError, match=reason):
        export.fold(loss, [])


def test_gspo_with_weights_that_differ_is_not_folded_into_a_mean_over_a_mask() -> None:
    data = [lossfns.datum_from_tokens([1, 2, 3], [0, 2, 2]), lossfns.datum_from_tokens([1, 2, 3, 4], [0, 0, 1, 0.25])]
    columns = {"advantages": [1.0, 1.0], "old_logprobs": [[-1.0, -1.0], [-1.0, -1.0, -1.0]]}
    loss = lossfns.gspo_token(log_ratio_cap=None).bind(**columns)
    with pytest.raises(LossInputError, match=r"gspo_token: datum\[1\].weights: expected one weight for all"):
        export.fold(loss, data)


def test_a_loss_with_a_sum_over_the_sequence_keeps_its_weights_beside_the_share() -> None:
    """The sum is Σ w·d: share / denominator in place of the weights would change it."""
    data = [lossfns.datum_from_tokens([1, 2, 3, 4], [0, 0, 1, 3])]
    rows = {"old_logprobs": [[-1.0, -1.0, -1.0]], "sampler_logprobs": [[-1.0, -1.0, -1.0]]}
    loss = lossfns.with_tis(lossfns.ppo(), level=lossfns.sequence_level).bind(advantages=[1.0], **rows)
    (ready,) = export.with_denominators(loss, data)
    assert ready.loss_fn_inputs["weights"].data == [0.0, 1.0, 3.0]
    assert ready.loss_fn_inputs["share"].data == [0.0, 0.25, 0.75]
    fn = export.as_datum_fn(lossfns.with_kl(loss.loss))
    assert fn.__code__.co_varnames[:3] == ("logprobs", "weights", "share")


def test_denominators_of_pairs_are_refused_by_name() -> None:
    data = [lossfns.datum_from_tokens([1, 2, 3], prompt_length=n) for n in (1, 2)]
    with pytest.raises(LossInputError, match=r"with_denominators: expected a loss of single datums, got dpo.* couples"):
        export.with_denominators(lossfns.dpo().bind(ref_logprobs=[[-1.0, -1.0]] * 2), data)


def test_datums_hold_share_over_denominator() -> None:
    """Two sequences with weights (0, 1, 1) and (2): sequence_mean gives 1/2 · (0, ½, ½) and 1/2 · (1)."""
    data = [lossfns.datum_from_tokens([1, 2, 3, 4], [0, 0, 1, 1]), lossfns.datum_from_tokens([1, 2], [0, 2])]
    ready = export.with_denominators(lossfns.cross_entropy(weigh=lossfns.sequence_mean), data)
    assert [d.loss_fn_inputs["weights"].data for d in ready] == [[0.0, 0.25, 0.25], [0.5]]
    assert data[0].loss_fn_inputs["weights"].data == [0.0, 1.0, 1.0]


PPO = lossfns.ppo(log_ratio_cap=None)
ROW = [-1.0, -1.0, -1.0]


@pytest.mark.parametrize(
    ("bind", "message"),
    [
        ({"advantages": [1.0], "old_logprobs": [[-1.0]]}, r"ppo: datum\[0\].old_logprobs: expected 3 values"),
        ({"advantages": [math.nan], "old_logprobs": [ROW]}, r"ppo: datum\[0\].advantages\[0\]: .* got nan"),
        ({"advantages": [1.0], "old_logprobs": [[1.0, 2.0, 3.0]]}, "a logprob, at most 0"),
        ({"advantages": [1.0], "old_logprobs": [ROW], "weights": [[-1.0, -1.0, -1.0]]}, "a weight of at least 0"),
        ({"advantages": [1.0], "old_logprobs": [ROW], "weights": [[0.0, 0.0, 0.0]]}, "a denominator above 0, got 0"),
        ({"advantages": [1.0], "old_logprobs": lossfns.ON_POLICY}, "ON_POLICY"),
        ({"advantages": [1.0], "old_logprobs": [ROW], "align": "truncate"}, "truncate"),
    ],
)
def test_the_lanes_refuse_what_the_batch_contract_refuses(bind: dict[str, Any], message: str) -> None:
    data = [lossfns.datum_from_tokens([1, 2, 3, 4], prompt_length=0)]
    for export_to in (export.with_denominators, export.fold):
        with pytest.raises(LossInputError, match=message):
            export_to(PPO.bind(**bind), data)


def test_a_bound_loss_has_a_per_datum_form_and_an_uncalled_preset_has_none() -> None:
    assert export.as_datum_fn(PPO.bind(advantages=[1.0])).__name__ == "ppo"
    for export_to in (
        export.as_datum_fn,
        lambda loss: export.fold(loss, []),
        lambda loss: export.with_denominators(loss, []),
    ):
        with pytest.raises(LossInputError, match="Call the preset"):
            export_to(lossfns.ppo)
