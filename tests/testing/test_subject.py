"""Forms of a loss under test: each is called with the columns that it means, or refused with the reason."""

from __future__ import annotations

import functools
import pickle
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lossfns
from lossfns import LossInputError
from lossfns.loading import from_file, load
from lossfns.testing import Batch, check
from lossfns.testing.factories import FactoryLoss
from lossfns.testing.forms import PROBE, ContractLoss, PaddedLoss
from lossfns.testing.kinds import detect_kind, takes_rewards
from lossfns.testing.laws.base import NotApplicable, Probe, reads_only_mask
from lossfns.testing.names import column_of
from lossfns.testing.settings import knobs, with_settings
from lossfns.testing.subject import adapt, adapt_advantages, padded

# One number for each datum, so that a loss that takes one advantage for each datum can be compared.
BATCH = PROBE.having(
    advantages=[[a] * len(row) for a, row in zip((0.5, -1.5, 2.0, -0.25, -1.0, 1.0), PROBE.weights)],
    logprobs=[[x - 0.125 * i for x in row] for i, row in enumerate(PROBE.logprobs)],
)


def outcome(loss_fn: Any, batch: Batch = BATCH) -> tuple[float, list[list[float]]]:
    """Return the value and the gradients of a loss."""
    logprobs = batch.tensors()
    loss, _ = loss_fn(batch.data(), logprobs)
    loss.backward()
    return loss.item(), [lp.grad.tolist() for lp in logprobs]


def assert_same(subject: Any, reference: Any, batch: Batch = BATCH) -> None:
    """Assert that an adapted subject has the value and the gradient of a loss of ours."""
    (value, gradients), (expected, wanted) = outcome(adapt(subject), batch), outcome(reference, batch)
    assert value == pytest.approx(expected, rel=1e-5)
    assert np.concatenate(gradients) == pytest.approx(np.concatenate(wanted), rel=1e-4, abs=1e-7)


# PPO in the forms of the field


def surrogate(lp: Tensor, old: Tensor, adv: Tensor, mask: Tensor, eps: float = 0.2) -> Tensor:
    ratio = torch.where(mask > 0, lp - old, 0.0).clamp(-20, 20).exp()
    adv = torch.where(mask > 0, adv, 0.0)
    return -(torch.min(ratio * adv, ratio.clamp(1 - eps, 1 + eps) * adv) * mask).sum() / mask.sum()


def padded_ppo(logprobs, old_logprobs, advantages, mask, clip_eps=0.2):  # type: ignore[no-untyped-def]
    return surrogate(logprobs, old_logprobs, advantages, mask, clip_eps), {"clip_eps": clip_eps}


def trl_ppo(per_token_logps, old_per_token_logps, ref_per_token_logps, advantages, completion_mask, epsilon=0.2):  # type: ignore[no-untyped-def]
    return surrogate(per_token_logps, old_per_token_logps, advantages.unsqueeze(1), completion_mask, epsilon), {}


def trl_ppo_that_keeps_dims(per_token_logps, old_per_token_logps, advantages, completion_mask):  # type: ignore[no-untyped-def]
    return surrogate(per_token_logps, old_per_token_logps, advantages, completion_mask)


def verl_ppo(
    old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None, rollout_is_weights=None
):  # type: ignore[no-untyped-def]
    assert config is None and rollout_is_weights is None and loss_agg_mode == "token-mean"
    pg_loss = surrogate(log_prob, old_log_prob, advantages, response_mask)
    pg_clipfrac, ppo_kl = torch.tensor(0.25), ((old_log_prob - log_prob) * response_mask).sum() / response_mask.sum()
    return pg_loss, pg_clipfrac, ppo_kl.detach(), torch.zeros(())


def old_verl_ppo(old_log_prob, log_prob, advantages, eos_mask, cliprange=0.2):  # type: ignore[no-untyped-def]
    return surrogate(log_prob, old_log_prob, advantages, eos_mask, cliprange)


def ppo_of_a_trainers_and_an_inference_policy(trainer_logprobs, inference_logprobs, advantages, loss_mask):  # type: ignore[no-untyped-def]
    return surrogate(trainer_logprobs, inference_logprobs, advantages, loss_mask)


def ppo_with_a_bool_mask(log_probs, old_log_probs, advantages, action_mask):  # type: ignore[no-untyped-def]
    ratio = (log_probs - old_log_probs).masked_fill(~action_mask, 0.0).exp()
    gain = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -gain[action_mask].mean()


def ppo_of_advantages_in_a_column(logprobs, old_logprobs, advantages, mask):  # type: ignore[no-untyped-def]
    assert advantages.shape[1:] == (1,)
    return surrogate(logprobs, old_logprobs, advantages, mask)


def ppo_of_advantages_that_may_broadcast(logprobs, old_logprobs, advantages, mask):  # type: ignore[no-untyped-def]
    return surrogate(logprobs, old_logprobs, advantages.unsqueeze(1), mask)


def ppo_keyword_only(*, logprobs, old_logprobs, advantages, mask, eps=0.2):  # type: ignore[no-untyped-def]
    return surrogate(logprobs, old_logprobs, advantages, mask, eps)


def ppo_positional_only(logprobs, old_logprobs, advantages, mask, /):  # type: ignore[no-untyped-def]
    return surrogate(logprobs, old_logprobs, advantages, mask)


def ppo_of_each_sequence(logprobs, old_logprobs, advantages, mask):  # type: ignore[no-untyped-def]
    return {"loss": surrogate(logprobs, old_logprobs, advantages, mask), "kl": torch.zeros(3)}


def ppo_of_lists(logprobs_list, old_logprobs_list, advantages_list, mask_list):  # type: ignore[no-untyped-def]
    assert all(isinstance(x, list) for x in (logprobs_list, mask_list))
    return surrogate(*map(torch.cat, (logprobs_list, old_logprobs_list, advantages_list, mask_list)))


class Output(NamedTuple):
    loss: Tensor
    kl: float


def ppo_as_a_named_tuple(logprobs, old_logprobs, advantages, mask):  # type: ignore[no-untyped-def]
    return Output(surrogate(logprobs, old_logprobs, advantages, mask), 0.5)


class PaddedModule(nn.Module):
    def __init__(self, eps: float = 0.2) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, logprobs, old_logprobs, advantages, mask, ref_logprobs=None):  # type: ignore[no-untyped-def]
        return surrogate(logprobs, old_logprobs, advantages, mask, self.eps)


class ContractModule(nn.Module):
    def __init__(self, eps: float = 0.2) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, data: Any, logprobs_list: Any) -> Any:
        columns = ("old_logprobs", "advantages", "weights")
        flat = (torch.cat([d.loss_fn_inputs[name].to_torch() for d in data]) for name in columns)
        return surrogate(torch.cat(list(logprobs_list)), *flat, self.eps), {}


class CallableClass:
    def __init__(self, eps: float = 0.2) -> None:
        self.eps = eps

    def __call__(self, logprobs, old_logprobs, advantages, mask):  # type: ignore[no-untyped-def]
        return surrogate(logprobs, old_logprobs, advantages, mask, self.eps)

    def method(self, log_prob, old_log_prob, advantages, response_mask):  # type: ignore[no-untyped-def]
        return surrogate(log_prob, old_log_prob, advantages, response_mask, self.eps)


def make_padded_ppo(eps: float = 0.2) -> Any:
    """A factory with a setting of a function of padded tensors."""

    def loss(logprobs, old_logprobs, advantages, mask):  # type: ignore[no-untyped-def]
        return surrogate(logprobs, old_logprobs, advantages, mask, eps)

    return loss


def make_ppo_of_columns(advantages, old_logprobs, weights=None, eps=0.2):  # type: ignore[no-untyped-def]
    def loss_fn(data: Any, logprobs_list: Any) -> Any:
        rows = [torch.tensor(a).expand(len(lp)) for a, lp in zip(advantages, logprobs_list)]
        masks = [torch.ones(len(lp)) for lp in logprobs_list] if weights is None else weights
        return surrogate(torch.cat(list(logprobs_list)), torch.cat(old_logprobs), torch.cat(rows), torch.cat(masks)), {}

    return loss_fn


def ppo_with_fields_of_other_names(data: Any, logprobs_list: Any) -> Any:
    names = ("old_log_probs", "advantage", "loss_mask")
    assert "response_mask" in data[0].loss_fn_inputs and "entropy" not in data[0].loss_fn_inputs
    assert data[0].loss_fn_inputs.get("entropy") is None and data[0].loss_fn_inputs.get("rollout_log_probs") is not None
    return surrogate(
        torch.cat(list(logprobs_list)), *(torch.cat([d.loss_fn_inputs[n].to_torch() for d in data]) for n in names)
    ), {}


@pytest.mark.parametrize(
    "subject",
    [
        padded_ppo,
        trl_ppo,
        trl_ppo_that_keeps_dims,
        verl_ppo,
        old_verl_ppo,
        ppo_of_a_trainers_and_an_inference_policy,
        ppo_with_a_bool_mask,
        ppo_of_advantages_in_a_column,
        ppo_of_advantages_that_may_broadcast,
        ppo_keyword_only,
        ppo_positional_only,
        ppo_of_each_sequence,
        ppo_of_lists,
        ppo_as_a_named_tuple,
        PaddedModule,
        PaddedModule(),
        ContractModule,
        ContractModule(),
        CallableClass,
        CallableClass(),
        CallableClass().method,
        functools.partial(padded_ppo, clip_eps=0.2),
        functools.partial(PaddedModule, eps=0.2),
        functools.partial(PaddedModule(), ref_logprobs=None),
        torch.compile(padded_ppo, backend="eager"),
        make_padded_ppo,
        make_ppo_of_columns,
        ppo_with_fields_of_other_names,
    ],
    ids=lambda x: getattr(x, "__name__", type(x).__name__),
)
def test_ppo_in_every_form_is_ppo(subject: Any) -> None:
    assert_same(subject, lossfns.ppo())
    assert detect_kind(adapt(subject)) == ("policy", False)


def test_a_padded_module_is_called_with_the_columns_that_its_forward_names() -> None:
    """A padded nn.Module was accused: "missing 4 required arguments"."""
    report = check(PaddedModule, like=lossfns.ppo(), examples=0)
    assert report.kind == "policy" and report.ok, report.table()


def test_an_optional_column_is_passed_only_where_it_has_an_effect() -> None:
    """An optional ``ref_logprobs`` that a setting switches on was called inert."""

    def with_kl(logprobs, old_logprobs, advantages, mask, ref_logprobs=None, kl_coef=0.0):  # type: ignore[no-untyped-def]
        loss = surrogate(logprobs, old_logprobs, advantages, mask)
        return loss + kl_coef * ((ref_logprobs - logprobs) ** 2 * mask).sum() if kl_coef else loss

    def make_with_kl(advantages, old_logprobs, ref_logprobs=None, kl_coef=0.0):  # type: ignore[no-untyped-def]
        def loss_fn(data: Any, logprobs_list: Any) -> Any:
            masks = [datum.loss_fn_inputs["mask"].to_torch() for datum in data]
            columns = [old_logprobs, advantages, masks, *([ref_logprobs] if ref_logprobs else [])]
            flat = map(torch.cat, columns)
            lp = torch.cat(list(logprobs_list))
            return with_kl(lp, *flat, kl_coef=kl_coef), {}

        return loss_fn

    for subject in (with_kl, make_with_kl):
        found = adapt(subject)
        assert found.unused == {"ref_logprobs"}  # type: ignore[attr-defined]
        assert with_settings(found, kl_coef=0.5).unused == set()  # type: ignore[attr-defined]
        assert outcome(with_settings(found, kl_coef=0.5)) != outcome(found)
        assert detect_kind(found) == ("policy", False)


def test_settings_of_every_form_are_seen_and_changed() -> None:
    far = BATCH.having(old_logprobs=[[x - 1 for x in row] for row in BATCH.logprobs])
    for subject, name in [
        (padded_ppo, "clip_eps"),
        (padded(padded_ppo, clip_eps=0.2), "clip_eps"),
        (functools.partial(padded_ppo, clip_eps=0.2), "clip_eps"),
        (PaddedModule, "eps"),
        (PaddedModule(0.2), "eps"),
        (ContractModule, "eps"),
        (ContractModule(), "eps"),
        (CallableClass(0.2), "eps"),
        (make_padded_ppo, "eps"),
        (trl_ppo, "epsilon"),
    ]:
        loss_fn = adapt(subject)
        assert knobs(loss_fn) == {name: 0.2}
        changed = with_settings(loss_fn, **{name: 0.9})
        assert knobs(changed) == {name: 0.9} and outcome(changed, far) != outcome(loss_fn, far)
        assert outcome(loss_fn, far)[0] == pytest.approx(outcome(lossfns.ppo(), far)[0], rel=1e-5)


def test_an_object_that_does_not_keep_its_arguments_has_no_settings() -> None:
    class Doubled:
        def __init__(self, scale: float = 1.0) -> None:
            self.twice = 2 * scale

        def __call__(self, logprobs: Tensor, mask: Tensor) -> Tensor:
            return -self.twice * (logprobs * mask).sum() / mask.sum()

    assert knobs(adapt(Doubled())) == {} and knobs(adapt(Doubled)) == {"scale": 1.0}


# Advantages


def whitened(adv: Tensor) -> Tensor:
    return (adv - adv.mean()) / (adv.std() + 1e-6)


def whitens_one_for_each_datum(logprobs, advantages, mask):  # type: ignore[no-untyped-def]
    return -(logprobs * whitened(advantages).unsqueeze(1) * mask).sum() / mask.sum()


def takes_either(logprobs, advantages, mask):  # type: ignore[no-untyped-def]
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    return -(logprobs * advantages * mask).sum() / mask.sum()


def of_sums(seq_logprobs, advantages):  # type: ignore[no-untyped-def]
    assert seq_logprobs.ndim == 1
    return -(seq_logprobs * advantages).mean()


@pytest.mark.parametrize(
    ("subject", "form", "level"),
    [
        (whitens_one_for_each_datum, "datum", "tokens"),
        (takes_either, "tokens", "tokens"),
        (of_sums, "datum", "sums"),
        (ppo_of_advantages_that_may_broadcast, "datum", "tokens"),
        (ppo_of_advantages_in_a_column, "column", "tokens"),
        (padded_ppo, "tokens", "tokens"),
    ],
)
def test_broadcasting_does_not_fool_the_form_of_the_advantages(subject: Any, form: str, level: str) -> None:
    found = adapt(subject)
    assert isinstance(found, PaddedLoss) and found.form is not None
    assert (found.form.advantages, found.form.level) == (form, level)
    assert found.takes_datum_advantages == (form != "tokens")


def test_advantages_have_the_shape_that_the_source_says() -> None:
    """A sum ``[B, 1]`` times advantages ``[B]`` broadcasts. Advantages ``[B, T]`` or ``[B, 1]`` would hide that."""

    def broadcasts(logprobs, advantages, mask):  # type: ignore[no-untyped-def]
        """REINFORCE on whole answers; advantages has shape (B,)."""
        return -((logprobs * mask).sum(-1, keepdim=True) * advantages).mean()

    def of_tokens(logprobs, advantages, mask):  # type: ignore[no-untyped-def]
        # advantages: [B, T], mask: [B, T]
        return -(logprobs * advantages * mask).sum() / mask.sum()

    def of_either(logprobs, advantages, mask):  # type: ignore[no-untyped-def]
        """advantages: [B] or advantages: [B, 1]"""
        return takes_either(logprobs, advantages, mask)

    forms = [adapt(f).form.advantages for f in (broadcasts, of_tokens, of_either)]  # type: ignore[attr-defined]
    assert forms == ["datum", "tokens", "tokens"]
    assert check(broadcasts, examples=0).bug == "broadcast"


def test_unequal_advantages_in_a_datum_do_not_apply_to_a_loss_of_one_for_each() -> None:
    uneven = BATCH.having(advantages=[[float(j) for j in range(len(row))] for row in BATCH.weights])
    with pytest.raises(NotApplicable):
        outcome(adapt(trl_ppo), uneven)


# Preference


def dpo_term(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    return F.softplus(-beta * (chosen - rejected))


def trl_dpo(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta=0.1):  # type: ignore[no-untyped-def]
    losses = dpo_term(
        policy_chosen_logps - reference_chosen_logps, policy_rejected_logps - reference_rejected_logps, beta
    )
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps).detach()
    return losses, chosen_rewards, chosen_rewards * 0


def dpo_of_short_names(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, beta=0.1):  # type: ignore[no-untyped-def]
    return dpo_term(policy_chosen - ref_chosen, policy_rejected - ref_rejected, beta).mean()


def dpo_of_winners(logp_w, logp_l, ref_logp_w, ref_logp_l):  # type: ignore[no-untyped-def]
    return dpo_term(logp_w - ref_logp_w, logp_l - ref_logp_l, 0.1).mean()


def dpo_of_rows(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, chosen_mask, rejected_mask
):  # type: ignore[no-untyped-def]
    chosen = ((chosen_logprobs - ref_chosen_logprobs) * chosen_mask).sum(-1)
    rejected = ((rejected_logprobs - ref_rejected_logprobs) * rejected_mask).sum(-1)
    return dpo_term(chosen, rejected, 0.1).mean(), {"acc": (chosen > rejected).float().mean()}


def dpo_interleaved(logprobs, ref_logprobs, mask):  # type: ignore[no-untyped-def]
    gaps = ((logprobs - ref_logprobs) * mask).sum(-1)
    return dpo_term(gaps[0::2], gaps[1::2], 0.1).mean()


def dpo_in_halves(logprobs, ref_logprobs, mask):  # type: ignore[no-untyped-def]
    chosen, rejected = ((logprobs - ref_logprobs) * mask).sum(-1).chunk(2)
    return dpo_term(chosen, rejected, 0.1).mean()


def dpo_of_sums_in_halves(policy_logps, reference_logps):  # type: ignore[no-untyped-def]
    chosen, rejected = (policy_logps - reference_logps).chunk(2)
    return dpo_term(chosen, rejected, 0.1)


class DPOModule(nn.Module):
    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps):  # type: ignore[no-untyped-def]
        return dpo_term(chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps, self.beta).mean()


class Trainer:
    beta = 0.1

    def dpo_loss(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):  # type: ignore[no-untyped-def]
        return trl_dpo(
            policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, self.beta
        )


def make_dpo_of_sums(ref_chosen_logps, ref_rejected_logps, beta=0.1):  # type: ignore[no-untyped-def]
    def loss_fn(data: Any, logprobs_list: Any) -> Any:
        weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in data]
        sums = torch.stack([(w * lp).sum() for w, lp in zip(weights, logprobs_list)])
        ref = torch.tensor(ref_chosen_logps) - torch.tensor(ref_rejected_logps)
        return F.softplus(-beta * (sums[0::2] - sums[1::2] - ref)).mean(), {}

    return loss_fn


@pytest.mark.parametrize(
    "subject",
    [
        trl_dpo,
        dpo_of_short_names,
        dpo_of_winners,
        dpo_of_rows,
        dpo_interleaved,
        dpo_in_halves,
        dpo_of_sums_in_halves,
        DPOModule,
        DPOModule(),
        Trainer().dpo_loss,
        make_dpo_of_sums,
    ],
    ids=lambda x: getattr(x, "__name__", type(x).__name__),
)
def test_dpo_in_every_form_is_dpo(subject: Any) -> None:
    assert_same(subject, lossfns.dpo(beta=0.1))
    assert detect_kind(adapt(subject)) == ("preference", False)


def test_a_pair_without_tokens_is_not_shown_to_a_loss_of_sums() -> None:
    weights = [[0.0] * len(row) if i == 3 else row for i, row in enumerate(BATCH.weights)]
    empty = BATCH.having(weights=weights)
    value, gradients = outcome(adapt(trl_dpo), empty)
    assert value == pytest.approx(outcome(adapt(trl_dpo), BATCH.take([0, 1, 4, 5]))[0], rel=1e-6)
    assert not any(gradients[2] + gradients[3])


def test_the_mean_of_a_vector_of_losses_is_taken_and_the_report_says_so() -> None:
    found = adapt(trl_dpo)
    title = check(trl_dpo, examples=0).title
    assert title == "trl_dpo (preference), called with sums over trained tokens, the mean of its losses is taken"
    _, metrics = found(BATCH.data(), BATCH.tensors())
    assert set(metrics) == {"chosen_rewards"}
    assert found.returns_vector  # type: ignore[attr-defined]
    assert not adapt(dpo_of_rows).returns_vector  # type: ignore[attr-defined]


# Unpaired preference


def kto_values(gaps: Tensor, good: Tensor, z0: Tensor) -> Tensor:
    return 1 - torch.sigmoid(0.1 * torch.where(good, gaps - z0, z0 - gaps))


def contract_kto(data: Any, logprobs_list: Any) -> Any:
    gaps, good = [], []
    for datum, lp in zip(data, logprobs_list):
        w, ref = (datum.loss_fn_inputs[name].to_torch() for name in ("mask", "ref_logprobs"))
        gaps.append((w * (lp - ref)).sum())
        good.append(bool(datum.loss_fn_inputs["labels"].to_torch()[0] > 0))
    stacked = torch.stack(gaps)
    return kto_values(stacked, torch.tensor(good), stacked.detach().mean().clamp(min=0)).mean(), {}


def trl_kto(
    policy_chosen_logps, policy_rejected_logps, policy_KL_logps,
    reference_chosen_logps, reference_rejected_logps, reference_KL_logps,
):  # type: ignore[no-untyped-def]  # fmt: skip
    assert policy_rejected_logps.requires_grad and not policy_KL_logps.requires_grad
    kl = (policy_KL_logps - reference_KL_logps).mean().clamp(min=0)
    good = 1 - torch.sigmoid(0.1 * (policy_chosen_logps - reference_chosen_logps - kl))
    bad = 1 - torch.sigmoid(0.1 * (kl - (policy_rejected_logps - reference_rejected_logps)))
    return torch.cat((good, bad)), good.detach(), bad.detach(), kl


def kto_of_labels(policy_logps, reference_logps, labels):  # type: ignore[no-untyped-def]
    gaps = policy_logps - reference_logps
    kl = gaps.detach().mean().clamp(min=0)
    good, bad = 1 - torch.sigmoid(0.1 * (gaps - kl)), 1 - torch.sigmoid(0.1 * (kl - gaps))
    return (labels * good + (1 - labels) * bad).mean()


def kto_of_bools(policy_logps, reference_logps, is_desirable):  # type: ignore[no-untyped-def]
    gaps = policy_logps - reference_logps
    return kto_values(gaps, is_desirable, gaps.detach().mean().clamp(min=0))


def kto_of_indices(policy_logps, reference_logps, desirable):  # type: ignore[no-untyped-def]
    gaps = policy_logps - reference_logps
    kl = gaps.detach().mean().clamp(min=0)
    both = torch.stack((1 - torch.sigmoid(0.1 * (kl - gaps)), 1 - torch.sigmoid(0.1 * (gaps - kl))))
    return both.gather(0, desirable[None]).mean()


def kto_of_signs(policy_logps, reference_logps, labels):  # type: ignore[no-untyped-def]
    gaps = policy_logps - reference_logps
    return (1 - torch.sigmoid(0.1 * labels * (gaps - gaps.detach().mean().clamp(min=0)))).mean()


def kto_padded(logprobs, ref_logprobs, mask, labels):  # type: ignore[no-untyped-def]
    return kto_of_labels((logprobs * mask).sum(-1), (ref_logprobs * mask).sum(-1), labels)


def make_kto(labels, ref_logprobs):  # type: ignore[no-untyped-def]
    """Labels as a list of lists are all true."""
    good = torch.tensor([bool(label) for label in labels])

    def loss_fn(data: Any, logprobs_list: Any) -> Any:
        weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in data]
        gaps = torch.stack([(w * (lp - ref)).sum() for w, lp, ref in zip(weights, logprobs_list, ref_logprobs)])
        return kto_values(gaps, good, gaps.detach().mean().clamp(min=0)).mean(), {}

    return loss_fn


def make_kto_of_signs(labels, ref_logprobs):  # type: ignore[no-untyped-def]
    return make_kto([label > 0 for label in labels if label], ref_logprobs)


@pytest.mark.parametrize(
    "subject",
    [
        make_kto,
        make_kto_of_signs,
        contract_kto,
        trl_kto,
        kto_of_labels,
        kto_of_bools,
        kto_of_indices,
        kto_of_signs,
        kto_padded,
    ],
)
def test_kto_in_every_form_is_kto(subject: Any) -> None:
    assert_same(subject, contract_kto)
    assert detect_kind(adapt(subject)) == ("unpaired", False)


def test_a_kto_is_checked_on_batches_with_labels() -> None:
    """A KTO was taken for a preference loss and called "k1-in-loss"; ``Batch.of`` lost its labels."""
    report = check(trl_kto, examples=0, couples="the KL term is a mean over the batch")
    assert report.kind == "unpaired" and next(v for v in report.verdicts if v.law == "contract").verdict == "pass"
    assert Batch.of(BATCH.data(), BATCH.tensors()) == BATCH


# Distillation, likelihood


def test_a_teacher_is_the_reference() -> None:
    def reverse_kl(student_logprobs, teacher_logprobs, mask):  # type: ignore[no-untyped-def]
        gap = (student_logprobs - teacher_logprobs).detach()
        return (gap * student_logprobs * mask).sum() / mask.sum()

    def contract(data: Any, logprobs_list: Any) -> Any:
        columns = [[d.loss_fn_inputs[n].to_torch() for d in data] for n in ("teacher_logprobs", "mask")]
        return reverse_kl(torch.cat(list(logprobs_list)), *map(torch.cat, columns)), {}

    assert isinstance(adapt(contract), ContractLoss)
    assert_same(reverse_kl, adapt(contract))
    assert detect_kind(adapt(contract)) == detect_kind(adapt(reverse_kl)) == ("distillation", False)


def test_losses_of_each_sequence_are_averaged_over_those_with_tokens() -> None:
    def nll(logprobs, mask):  # type: ignore[no-untyped-def]
        return -(logprobs * mask).sum(-1) / mask.sum(-1).clamp(min=1)

    weights = [[0.0] * len(row) if i == 2 else row for i, row in enumerate(BATCH.weights)]
    assert_same(nll, lossfns.cross_entropy(weigh=lossfns.sequence_mean), BATCH.having(weights=weights))


def test_lengths_are_counted() -> None:
    def simpo(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta=2.0, gamma=1.0):  # type: ignore[no-untyped-def]
        return F.softplus(gamma - beta * (chosen_logps / chosen_lengths - rejected_logps / rejected_lengths)).mean()

    def padded_simpo(logprobs, mask):  # type: ignore[no-untyped-def]
        means = (logprobs * mask).sum(-1) / mask.sum(-1)
        return F.softplus(1.0 - 2.0 * (means[0::2] - means[1::2])).mean()

    assert_same(simpo, adapt(padded_simpo))
    assert detect_kind(adapt(simpo)) == detect_kind(adapt(padded_simpo)) == ("preference", False)


def nll_of_ids(logprobs, labels):  # type: ignore[no-untyped-def]
    return -logprobs[labels != -100].mean()


def test_labels_beside_logprobs_alone_are_token_ids() -> None:
    assert_same(nll_of_ids, lossfns.cross_entropy())
    assert detect_kind(adapt(nll_of_ids)) == ("likelihood", False)


def test_a_loss_of_masks_need_not_apply_fractional_weights() -> None:
    """Weights that only the adapter read made a bool mask "weights-binarised"."""

    def nll(logprobs, loss_mask):  # type: ignore[no-untyped-def]
        return -logprobs[loss_mask].mean()

    assert "weights-binarised" not in {verdict.bug for verdict in check(nll, examples=0).broken}
    for subject in (ppo_with_a_bool_mask, padded_ppo):
        assert reads_only_mask(Probe(adapt(subject), BATCH, torch.float32))
    assert reads_only_mask(Probe(adapt(nll_of_ids), BATCH, torch.float32))
    assert not reads_only_mask(Probe(adapt(of_sums), BATCH, torch.float32))


# Metrics


def test_a_metric_of_each_token_is_left_out() -> None:
    def loss(logprobs, mask):  # type: ignore[no-untyped-def]
        return -(logprobs * mask).sum() / mask.sum(), {"loss": logprobs, "nll": -logprobs.mean(1), "text": "no number"}

    assert list(adapt(loss)(BATCH.data(), BATCH.tensors())[1]) == ["nll"]


def test_metrics_of_a_tuple_have_the_names_of_its_source() -> None:
    _, metrics = adapt(verl_ppo)(BATCH.data(), BATCH.tensors())
    assert list(metrics) == ["pg_clipfrac", "ppo_kl"] and metrics["pg_clipfrac"] == 0.25
    _, metrics = adapt(ppo_as_a_named_tuple)(BATCH.data(), BATCH.tensors())
    assert metrics == {"kl": 0.5}


def test_metrics_of_verl_are_known_without_the_source() -> None:
    scope: dict[str, Any] = {"surrogate": surrogate}
    exec(  # a function without a source file
        "def fn(old_log_prob, log_prob, advantages, response_mask):\n"
        "    return surrogate(log_prob, old_log_prob, advantages, response_mask), 0.5, 0.25",
        scope,
    )
    assert adapt(scope["fn"])(BATCH.data(), BATCH.tensors())[1] == {"pg_clipfrac": 0.5, "ppo_kl": 0.25}


# Refusals


def of_logits(logits, labels):  # type: ignore[no-untyped-def]
    return F.cross_entropy(logits, labels)


def of_outputs(outputs, labels, num_items_in_batch=None):  # type: ignore[no-untyped-def]
    return outputs.loss


def compute_loss(self, model, inputs, return_outputs=False):  # type: ignore[no-untyped-def]
    return model(**inputs).loss


def of_a_batch(batch):  # type: ignore[no-untyped-def]
    return batch["logprobs"].sum()


def unknown_names(logprobs, mask, temperature, entropies, old_logprobss):  # type: ignore[no-untyped-def]
    return logprobs.sum()


def required_setting(data, logprobs_list, clip_range: float):  # type: ignore[no-untyped-def]
    return logprobs_list[0].sum(), {}


def without_defaults(log_prob, old_log_prob, advantages, response_mask, cliprange=None):  # type: ignore[no-untyped-def]
    return surrogate(log_prob, old_log_prob, advantages, response_mask, cliprange)


def in_numpy(logprobs, mask):  # type: ignore[no-untyped-def]
    return -(logprobs.detach().numpy() * mask.numpy()).sum()


def contract_in_numpy(data, logprobs_list):  # type: ignore[no-untyped-def]
    return np.sum([lp.detach().numpy().sum() for lp in logprobs_list]), {}


def a_float(logprobs, mask):  # type: ignore[no-untyped-def]
    return float((logprobs * mask).sum())


def of_each_token(logprobs, mask):  # type: ignore[no-untyped-def]
    return -logprobs * mask


def unknown_field(data, logprobs_list):  # type: ignore[no-untyped-def]
    return sum((lp * d.loss_fn_inputs["entropy"].to_torch()).sum() for d, lp in zip(data, logprobs_list)), {}


def make_of_settings(beta, gamma):  # type: ignore[no-untyped-def]
    return lambda data, logprobs_list: (beta * gamma * torch.cat(logprobs_list).sum(), {})


class NotCallable:
    pass


class NeedsASetting(nn.Module):
    def __init__(self, beta: float) -> None:
        super().__init__()

    def forward(self, logprobs, mask):  # type: ignore[no-untyped-def]
        return -(logprobs * mask).sum()


@pytest.mark.parametrize(
    ("subject", "words"),
    [
        (of_logits, ["a function of logits", "log_softmax", "Known forms"]),
        (of_outputs, ["a function of a model's outputs", "log_softmax"]),
        (compute_loss, ["a method of a trainer", "per_token_logps"]),
        (Trainer.dpo_loss, ["a method of a trainer", "bound method"]),
        (of_a_batch, ["a function of a batch", "Take the columns"]),
        (unknown_names, ["'temperature', 'entropies', 'old_logprobss'", "Did you mean 'old_logprobs'", "a setting"]),
        (required_setting, ["'clip_range'", "functools.partial(fn, clip_range=...)"]),
        (without_defaults, ["TypeError", "functools.partial(fn, name=value)"]),
        (in_numpy, ["numpy.float32", "torch"]),
        (contract_in_numpy, ["numpy.float32", "no gradient"]),
        (a_float, ["a torch tensor, got float"]),
        (of_each_token, ["shape (6, 7)", "Reduce it"]),
        (unknown_field, ["reads the field 'entropy', which no datum of the kit has", "Known fields: advantages"]),
        (make_of_settings, ["'beta', 'gamma'", "'beta' may be a setting"]),
        (NotCallable, ["a factory of a loss function", "NotCallable"]),
        (NotCallable(), ["Known forms"]),
        (NeedsASetting, ["'beta'", "a setting"]),
        (max, ["subject"]),
        (dict, ["subject"]),
        (lambda logprobs: None, ["a torch tensor, got NoneType"]),
        (lambda **kwargs: None, ["subject"]),
    ],
    ids=lambda x: getattr(x, "__name__", type(x).__name__) if not isinstance(x, list) else "",
)
def test_what_has_no_known_form_is_refused_with_the_reason(subject: Any, words: list[str]) -> None:
    """Such subjects gave bare TypeErrors, or were called "not-the-contract"."""
    with pytest.raises(LossInputError) as caught:
        check(subject, examples=0)
    assert all(word in str(caught.value) for word in words), caught.value


KNOWN = (
    "logprobs old_logprobs ref_logprobs advantages mask weights labels policy_chosen_logps policy_rejected_logps "
    "reference_chosen_logps policy_KL_logps reference_KL_logps chosen_mask rejected_mask rewards groups "
    "num_generations per_token_logps teacher_logprobs sampler_logprobs is_desirable chosen_lengths data logprobs_list"
)
OTHER = "temperature beta logits outputs model inputs batch config values x y index"
RESULTS = """None; 1.0; np.float32(1); np.zeros(3); torch.zeros(()); torch.zeros(2, 3); torch.zeros(0); 1 / 0; {}['a'];
{'loss': 1}; (); (None, {}); (torch.zeros(()), None); lambda *a: None; args; object(); 'text'; len; sum(args);
lambda data, lps: (sum(lp.sum() for lp in lps), {}); sum(a.sum() for a in args); args[0].mean(-1); args[0] * args[-1];
((args[0] * args[-1]).sum(), {'m': args[0]}); (args[0].sum(), 'x', [1], {'y': 'z'}, 3); torch.nn.Linear(1, 1);
args[0].sum() * float('nan')"""


def random_subject(rng: random.Random) -> Any:
    """Return a function, a class or an object with random parameters that returns anything."""
    names = rng.sample((f"{KNOWN} {OTHER}" if rng.random() < 0.2 else KNOWN).split(), rng.randrange(6))
    first_default = rng.randrange(len(names) + 3)
    defaults = [f"={rng.choice(('None', '0.1', 'True'))}" if i >= first_default else "" for i in range(len(names))]
    given = [name + default for name, default in zip(names, defaults)]
    given = ["*", *given] if given and rng.random() < 0.2 else given
    given += ["**kwargs"] if rng.random() < 0.1 else []
    body = f"args = [{', '.join(names)}]; return {rng.choice(RESULTS.split(';')).strip()}"
    form = rng.choice(("function", "module", "class", "object"))
    base, method = ("torch.nn.Module", "forward") if form == "module" else ("object", "__call__")
    source = f"def {method}({', '.join(given if form == 'function' else ['self', *given])}): {body}"
    scope: dict[str, Any] = {"torch": torch, "np": np}
    exec(source if form == "function" else f"class C({base}):\n    {source}", scope)
    return scope["__call__"] if form == "function" else scope["C"]() if form == "object" else scope["C"]


@pytest.mark.parametrize(
    "count", [pytest.param(300, marks=pytest.mark.repeated), pytest.param(1000, marks=pytest.mark.exhaustive)]
)
def test_any_callable_is_a_loss_or_refused(count: int) -> None:
    """No subject gives a bare TypeError."""
    rng, seen = random.Random(0), {"kind": 0, "refused": 0}
    for _ in range(count):
        subject = random_subject(rng)
        try:
            if takes_rewards(subject):
                adapt_advantages(subject)
            else:
                detect_kind(adapt(subject))
            seen["kind"] += 1
        except LossInputError as error:
            assert str(error)
            seen["refused"] += 1
        except NotApplicable:
            continue
    assert min(seen.values()) > count / 50, seen


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("eos_mask", "weights"),
        ("prox_logp", "old_logprobs"),
        ("policy_KL_logps", "KL logprobs"),
        ("win_logps", "chosen logprobs"),
        ("reference_rejected_log_probs", "rejected ref_logprobs"),
        ("vllm_logprobs", "sampler_logprobs"),
        ("expert_logprobs", "ref_logprobs"),
        ("temperature", None),
        ("beta", None),
        ("kl", None),
        ("loss_scale", None),
        ("rollout_is_weights", None),
        ("old_weights", None),
        ("num_items_in_batch", None),
        ("chosen_rewards", None),
    ],
)
def test_names_of_the_field_are_known(name: str, column: str | None) -> None:
    assert column_of(name) == column


def test_proximal_logprobs_make_the_old_ones_the_samplers() -> None:
    def decoupled(logprobs, proximal_logprobs, old_logprobs, advantages, loss_mask):  # type: ignore[no-untyped-def]
        return surrogate(logprobs, proximal_logprobs, advantages, loss_mask) + 0 * old_logprobs.sum()

    found = adapt(decoupled)
    assert isinstance(found, PaddedLoss) and found.column_by_name["old_logprobs"] == "sampler_logprobs"
    assert_same(decoupled, lossfns.ppo())


# Group advantages

REWARDS, GROUPS = [1.0, 0.0, 0.5, 0.25, 0.0, 1.0], ["b", "a", "b", "a", "a", "b"]


def centre(rewards: Sequence[float], groups: Sequence[Any]) -> list[float]:
    means = {g: sum(r for r, h in zip(rewards, groups) if h == g) / list(groups).count(g) for g in set(groups)}
    return [r - means[g] for r, g in zip(rewards, groups)]


def centre_ids(rewards, group_ids):  # type: ignore[no-untyped-def]
    means = torch.zeros(8).index_reduce(0, group_ids, rewards, "mean", include_self=False)
    return rewards - means[group_ids]


def centre_flat(rewards, num_generations):  # type: ignore[no-untyped-def]
    grid = rewards.view(-1, num_generations)
    return (grid - grid.mean(1, keepdim=True)).flatten()


def centre_grid(rewards):  # type: ignore[no-untyped-def]
    return rewards - rewards.mean(dim=1, keepdim=True)


def centre_one(rewards):  # type: ignore[no-untyped-def]
    return [r - sum(rewards) / len(rewards) for r in rewards]


def centre_keywords(*, rewards, groups):  # type: ignore[no-untyped-def]
    return centre(rewards, groups)


def centre_array(rewards, groups, scale=1.0):  # type: ignore[no-untyped-def]
    return scale * (rewards - np.array([rewards[groups == g].mean() for g in groups]))


def verl_centre(token_level_rewards, response_mask, index, epsilon=1e-6):  # type: ignore[no-untyped-def]
    scores = token_level_rewards.sum(-1)
    means = torch.stack([scores[torch.as_tensor(index == g)].mean() for g in index])
    advantages = (scores - means)[:, None] * response_mask
    return advantages, advantages


@pytest.mark.parametrize(
    "fn",
    [centre, centre_ids, centre_flat, centre_grid, centre_one, centre_keywords, centre_array, verl_centre],
)
def test_group_advantages_in_every_form(fn: Callable[..., Any]) -> None:
    assert adapt_advantages(fn)(REWARDS, GROUPS) == pytest.approx(centre(REWARDS, GROUPS))
    report = check(fn)
    assert report.kind == "advantages" and report.bug == "", report.table()


def test_rewards_are_arrays_or_tensors_as_the_function_is_written() -> None:
    """The standard deviation of an array divides by n, that of a tensor by n − 1."""

    def of_arrays(rewards: np.ndarray, group_size: int = 4) -> Any:
        grid = rewards.reshape(-1, group_size)
        return ((grid - grid.mean(1, keepdims=True)) / (grid.std(1, keepdims=True) + 1e-6)).reshape(-1)

    def of_tensors(rewards: Tensor, group_size: int = 4) -> Any:
        grid = rewards.reshape(-1, group_size)
        return ((grid - grid.mean(1, keepdims=True)) / (grid.std(1, keepdims=True) + 1e-6)).reshape(-1)

    rewards, groups = [1.0, -1.0, 0.0], ["a"] * 3
    assert np.square(adapt_advantages(of_arrays)(rewards, groups)).sum() == pytest.approx(3, rel=1e-4)
    assert np.square(adapt_advantages(of_tensors)(rewards, groups)).sum() == pytest.approx(2, rel=1e-4)


def test_unequal_groups_do_not_apply_to_a_grid() -> None:
    with pytest.raises(NotApplicable, match="equal size"):
        adapt_advantages(centre_flat)([1.0, 0.0, 0.5], ["a", "a", "b"])


def test_other_required_parameters_of_advantages_are_named() -> None:
    with pytest.raises(LossInputError, match="'values'"):
        adapt_advantages(lambda rewards, values, gamma: rewards)


# Files


def test_a_file_imports_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_a_loss.py").write_text("SCALE = 2.0\n")
    (tmp_path / "with_a_neighbour.py").write_text(
        "from neighbour_of_a_loss import SCALE\n"
        "def nll(data, logprobs_list):\n"
        "    return -SCALE * sum(lp.sum() for lp in logprobs_list), {}\n"
        "if __name__ == '__main__':\n"
        "    raise SystemExit('it is no script')\n"
    )
    loss = load(f"{tmp_path / 'with_a_neighbour.py'}:nll")
    assert loss([], [torch.ones(2)])[0] == -4


def test_a_file_with_a_dataclass_under_future_annotations_is_imported_and_pickled(tmp_path: Path) -> None:
    file = tmp_path / "with_a_dataclass.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Nll:\n"
        "    scale: float = 2.0\n"
        "    def __call__(self, logprobs, mask):\n"
        "        return -self.scale * (logprobs * mask).sum() / mask.sum()\n"
    )
    module = from_file(str(file))
    assert module.__name__ == "with_a_dataclass" and sys.modules["with_a_dataclass"] is module
    assert pickle.loads(pickle.dumps(module.Nll(3.0))) == module.Nll(3.0)
    assert knobs(adapt(module.Nll)) == {"scale": 2.0} and knobs(adapt(module.Nll(3.0))) == {"scale": 3.0}


def test_a_file_with_the_name_of_a_module_does_not_replace_it(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("loss = 1\n")
    assert from_file(str(tmp_path / "numpy.py")).loss == 1 and sys.modules["numpy"] is np
    sys.path.remove(str(tmp_path))


@pytest.mark.parametrize("text", ["raise SystemExit(3)", "import no_such_module", "1 +", "raise KeyError('x')"])
def test_a_file_that_cannot_be_imported_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken_file.py").write_text(text)
    with pytest.raises(LossInputError, match="can be imported"):
        load(f"{tmp_path / 'broken_file.py'}:loss")
    assert "broken_file" not in sys.modules


def test_a_factory_and_a_contract_function_keep_their_form() -> None:
    assert isinstance(adapt(make_ppo_of_columns), FactoryLoss)
    assert isinstance(adapt(ContractModule), ContractLoss)
