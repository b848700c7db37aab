"""The packed batch: kinds of rows, columns by name, and logprobs that are views of one tensor."""

import copy
import pickle
from typing import Any

import pytest
import torch

import lossfns
from lossfns import ON_POLICY, LossInputError, Rows, Tokens, Weighing
from lossfns.tokens import COLUMNS, DATUM_FIELDS


@pytest.mark.parametrize(
    ("rows", "name", "rank", "datums", "per_token", "unit"),
    [
        (Rows.TOKENS, "tokens", 1, 1, True, "tokens"),
        (Rows.TARGETS, "targets", 2, 1, True, "tokens"),
        (Rows.PAIRS, "pairs", 1, 2, False, "pairs"),
        (Rows.SEQUENCES, "sequences", 1, 1, False, "datums"),
    ],
)
def test_kinds_of_rows(rows: Rows, name: str, rank: int, datums: int, per_token: bool, unit: str) -> None:
    assert Rows(name) is rows and str(rows) == name
    assert (rows.rank, rows.datums, rows.per_token, rows.unit) == (rank, datums, per_token, unit)


@pytest.mark.parametrize(("rows", "hint"), [("pair", "Did you mean 'pairs'?"), ("PAIRS", "Known: "), (None, "Known: ")])
def test_another_kind_of_row_is_refused(rows: Any, hint: str) -> None:
    token_mean = lossfns.token_mean
    with pytest.raises(LossInputError, match="rows: expected a kind of row") as error:
        Weighing("mine", rows, token_mean.share, token_mean.count)
    assert hint in error.value.fix


def test_a_weighing_of_your_own_may_name_its_rows() -> None:
    mine = Weighing("mine", "tokens", lossfns.token_mean.share, lossfns.token_mean.count)  # type: ignore[arg-type]
    assert mine.rows is Rows.TOKENS and lossfns.ppo(weigh=mine).rows is Rows.TOKENS


def test_public_names_are_what_a_star_import_brings() -> None:
    assert all(hasattr(lossfns, name) for name in lossfns.__all__)
    assert {"grpo", "with_kl", "token_mean", "Loss", "export"} <= set(lossfns.__all__)
    assert not {"loss", "metrics", "inspect", "values"} & set(lossfns.__all__)


def test_the_usual_columns() -> None:
    """Each may be bound to any loss, with a warning where it is not read."""
    assert COLUMNS == ("weights", "advantages", "old_logprobs", "ref_logprobs", "sampler_logprobs")
    assert DATUM_FIELDS == {"old_logprobs": ("old_logprobs", "logprobs")}


def test_columns_are_attributes() -> None:
    """Active where the weight is not 0, whatever its sign."""
    t = Tokens(torch.zeros(3), torch.tensor([0.5, 0.0, -1.0]), columns={"advantages": torch.ones(3)})
    assert t.active.tolist() == [True, False, True] and t.advantages.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(AttributeError, match="Tokens has no column 'ref_logprobs'; a loss names the columns it uses"):
        _ = t.ref_logprobs
    assert copy.copy(t).advantages is t.advantages


def test_on_policy_is_one_object() -> None:
    assert repr(ON_POLICY) == "ON_POLICY"
    assert copy.deepcopy(ON_POLICY) is ON_POLICY and pickle.loads(pickle.dumps(ON_POLICY)) is ON_POLICY
