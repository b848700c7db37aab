"""The kind of a loss is found out where that is certain, and else guessed and said so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lossfns
from lossfns.testing.forms import coupling
from lossfns.testing.kinds import KINDS, READS, SMALL, columns_for_kind, detect_kind, detect_targets, takes_rewards
from lossfns.testing.subject import adapt


def contract(terms: Callable[..., Tensor], *names: str) -> Any:
    """Return a contract function of the token mean of terms of (logprobs, weights, columns)."""

    def loss_fn(data: Any, logprobs_list: Any) -> Any:
        fields = [[d.loss_fn_inputs[name].to_torch() for d in data] for name in ("weights", *names)]
        weights, *columns = map(torch.cat, fields)
        return (weights * terms(torch.cat(list(logprobs_list)), *columns)).sum() / weights.sum(), {}

    return loss_fn


def sequence_sums(data: Any, logprobs_list: Any, ref: str = "") -> Tensor:
    """Return Σ w·(lp − ref) of each datum."""
    sums = []
    for d, lp in zip(data, logprobs_list):
        base = d.loss_fn_inputs[ref].to_torch() if ref else 0.0
        sums.append((d.loss_fn_inputs["weights"].to_torch() * (lp - base)).sum())
    return torch.stack(sums)


def dpo_by_coupling(data: Any, logprobs_list: Any) -> Any:
    """It neither refuses odd batches nor names its sides."""
    gaps = sequence_sums(data, logprobs_list, "ref_logprobs")
    n = len(gaps) // 2
    return F.softplus(-0.1 * (gaps[: 2 * n : 2] - gaps[1 : 2 * n : 2])).mean(), {}


def pairs_without_reference(data: Any, logprobs_list: Any) -> Any:
    sums = sequence_sums(data, logprobs_list)
    return F.relu(1 - 0.1 * (sums[0::2] - sums[1::2])).mean(), {}


def pairs_in_halves(data: Any, logprobs_list: Any) -> Any:
    chosen, rejected = sequence_sums(data, logprobs_list, "ref_logprobs").chunk(2)
    return F.softplus(-0.1 * (chosen - rejected)).mean(), {}


def kto(data: Any, logprobs_list: Any) -> Any:
    gaps = sequence_sums(data, logprobs_list, "ref_logprobs")
    sign = torch.stack([2 * d.loss_fn_inputs["labels"].to_torch()[0] - 1 for d in data])
    return (1 - torch.sigmoid(0.1 * sign * (gaps - gaps.detach().mean().clamp(min=0)))).mean(), {}


def batch_normalised(data: Any, logprobs_list: Any) -> Any:
    sums = sequence_sums(data, logprobs_list, "ref_logprobs")
    return ((sums - sums.mean()) ** 2).mean(), {}


def sft_of_sequences(data: Any, logprobs_list: Any) -> Any:
    return -sequence_sums(data, logprobs_list).mean(), {}


def sequence_reweighted(data: Any, logprobs_list: Any) -> Any:
    sums = sequence_sums(data, logprobs_list)
    return -(sums.detach().exp() * sums).mean(), {}


def soft_targets(data: Any, logprobs_list: Any) -> Any:
    """It multiplies [N, K] by weights [N, K], and refuses [N]."""
    total = sum((d.loss_fn_inputs["weights"].to_torch() * lp).sum(dim=1).sum() for d, lp in zip(data, logprobs_list))
    return -total, {}


@pytest.mark.parametrize(
    ("loss_fn", "kind", "guessed"),
    [
        (contract(lambda lp, a: -lp * a, "advantages"), "policy", False),
        (contract(lambda lp, a, old: -(lp - old).exp() * a, "advantages", "logprobs"), "policy", False),
        (contract(lambda lp: -lp), "likelihood", False),
        (sft_of_sequences, "likelihood", False),
        (contract(lambda lp: -lp.exp().detach() * lp), "reweighted", False),
        (contract(lambda lp: -((1 - lp.exp()) ** 2) * lp), "reweighted", False),
        (contract(lambda lp: -(1 - lp.exp()).clamp(min=1e-6).log()), "reweighted", True),
        (sequence_reweighted, "reweighted", True),
        (dpo_by_coupling, "preference", False),
        (pairs_without_reference, "preference", False),
        (pairs_in_halves, "preference", False),
        (kto, "unpaired", False),
        (batch_normalised, "any", True),
        (contract(lambda lp, ref: (lp - ref).detach() * lp, "teacher_logprobs"), "distillation", False),
        (contract(lambda lp, ref: -lp + 0.1 * (ref - lp) ** 2, "teacher_logprobs"), "distillation", False),
        (contract(lambda lp, ref: (ref - lp).exp() - (ref - lp) - 1, "ref_logprobs"), "distillation", False),
        (contract(lambda lp, ref: (lp - ref).detach() * lp, "ref_logprobs"), "distillation", False),
        (contract(lambda lp, old, ref: -(lp - old).exp() * (ref - old), "old_logprobs", "ref_logprobs"),
         "distillation", False),
        (contract(lambda lp, s, t: -(lp - s).exp() * (t - s), "sampler_logprobs", "ref_logprobs"),
         "distillation", False),
        (contract(lambda lp, ref: -lp + 0.1 * (ref - lp) ** 2, "ref_logprobs"), "distillation", True),
        (contract(lambda lp, old: -(lp - old).exp(), "old_logprobs"), "any", True),
        (soft_targets, "likelihood", False),
        (lossfns.cross_entropy(), "likelihood", False),
        (lossfns.grpo(), "policy", False),
        (lossfns.dpo(), "preference", False),
        (lossfns.orpo(), "preference", False),
    ],
)  # fmt: skip
def test_the_kind_is_certain_where_it_is_and_else_guessed(loss_fn: Any, kind: str, guessed: bool) -> None:
    assert detect_kind(adapt(loss_fn)) == (kind, guessed)


def test_a_loss_of_k_targets_is_found_out() -> None:
    assert detect_targets(adapt(soft_targets), "likelihood") == 3
    assert detect_targets(adapt(sft_of_sequences), "likelihood") == 0


def test_every_kind_of_loss_has_small_batches_with_its_columns() -> None:
    for kind in KINDS:
        if kind != "advantages":
            for batch in SMALL:
                assert set(columns_for_kind(batch, kind, 0).columns) == set(READS[kind])
    assert "labels" in READS["unpaired"] and "ref_logprobs" in READS["distillation"]


def test_optional_columns_tell_the_kind_only_if_they_are_used() -> None:
    def nll(logprobs, mask, labels=None, ref_logprobs=None, advantages=None):  # type: ignore[no-untyped-def]
        return -(logprobs * mask).sum() / mask.sum()

    def pg(logprobs, mask, advantages=None):  # type: ignore[no-untyped-def]
        return -(logprobs * mask * (1 if advantages is None else advantages)).sum() / mask.sum()

    assert detect_kind(adapt(nll)) == ("likelihood", False)
    assert detect_kind(adapt(pg)) == ("policy", False)


def test_how_datums_depend_on_one_another() -> None:
    found = [coupling(f) for f in (sft_of_sequences, pairs_without_reference, pairs_in_halves, kto, soft_targets)]
    assert found == ["none", "pairs", "halves", "batch", ""]


def test_a_loss_of_rewards_computes_no_advantages() -> None:
    def loss(rewards, logprobs, mask):  # type: ignore[no-untyped-def]
        return -(logprobs * rewards * mask).sum() / mask.sum()

    assert not takes_rewards(loss) and detect_kind(adapt(loss)) == ("policy", False)
    assert takes_rewards(lambda rewards, uids: rewards) and not takes_rewards(max) and not takes_rewards(3)
