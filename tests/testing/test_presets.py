"""``check`` calls no preset of the library wrong, whatever columns it reads."""

from __future__ import annotations

import pytest

import lossfns
from lossfns.testing.check import check
from lossfns.testing.completed import CompletedLoss, completed
from lossfns.testing.kinds import READS, SMALL, broken_by_design, columns_for_kind, detect_kind
from lossfns.testing.mutants import CLOSED_FORMS
from lossfns.testing.public import presets

OTHERS = [name for name in presets() if name not in CLOSED_FORMS]
"""The presets that test_laws_kit.py does not check."""


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", OTHERS)
def test_every_preset_obeys_the_laws_of_its_kind(name: str) -> None:
    report = check(presets()[name](), examples=0)
    assert report.ok, report.failures


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (lossfns.clip_cov(), "policy"),
        (lossfns.real(), "any"),
        (lossfns.a2po(), "any"),
        (lossfns.kto(), "unpaired"),
        (lossfns.sampled_reverse_kl(), "distillation"),
        (lossfns.top_k_jsd(), "any"),
        (lossfns.unlikelihood(), "any"),
    ],
    ids=str,
)
def test_the_columns_of_a_loss_tell_its_kind(loss: lossfns.Loss, kind: str) -> None:
    assert detect_kind(loss) == (kind, False)


def test_a_loss_gets_the_columns_that_its_kind_lacks() -> None:
    """Each datum has a label of its own; the datum's own columns come first."""
    whole = completed(lossfns.m2po(), READS["policy"])
    assert isinstance(whole, CompletedLoss) and whole.others == ("groups",)
    batch = columns_for_kind(SMALL[1], "policy", 0)
    alone = [[float(i)] * len(row) for i, row in enumerate(batch.weights)]
    (loss, _), (expected, _) = (
        whole(batch.data(), batch.tensors()),
        lossfns.m2po()(batch.having(groups=alone).data(), batch.tensors()),
    )
    assert loss == expected
    together = batch.having(groups=[[0.0] * len(row) for row in batch.weights])
    assert whole(together.data(), batch.tensors())[0] == lossfns.m2po()(together.data(), batch.tensors())[0]
    for other in (lossfns.ppo(), print):
        assert completed(other, READS["policy"]) is other


def test_a_loss_that_is_constant_for_a_group_of_one_is_said_to_couple() -> None:
    report = check(lossfns.real(), examples=0)
    assert report.couples == "it compares the datums of a group"
    assert {v.verdict for v in report.verdicts if v.law in ("independence", "split", "duplication")} == {"skipped"}


def test_laws_that_a_preset_breaks_by_design_are_skipped_with_the_reason() -> None:
    """Also where a combinator wraps the preset. A stranger's loss of the same name is tested."""
    wrapped = lossfns.with_kl(lossfns.ce_gppo())
    assert broken_by_design(wrapped) == broken_by_design(lossfns.ce_gppo().bind()) != {}
    assert broken_by_design(lossfns.ppo()) == {} == broken_by_design(print)
