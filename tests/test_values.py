"""Checks of values at their bounds: the first entry that is wrong, and how to mend it."""

import math
import warnings
from typing import Any

import pytest
import torch

import lossfns
from lossfns import Datum, Loss, LossInputError, LossWarning, ModelInput, Tokens
from lossfns.describe import presets
from lossfns.tokens import DATUM_COLUMNS, PAIRS, TARGETS, TOKENS
from lossfns.values import check_values, extremes, raise_at_first, warn_if_far_off_policy

NAN = math.nan
LOGPROB_COLUMNS = ("old_logprobs", "ref_logprobs", "sampler_logprobs")


def data(*weights: list[float]) -> list[Datum]:
    rows = [{"target_tokens": [7] * len(w), "weights": w} for w in weights]
    return [Datum(ModelInput.from_ints([1] * len(w)), row) for w, row in zip(weights, rows)]


def refused(logprobs: list[list[float]], weights: list[list[float]], **columns: Any) -> LossInputError:
    """The error of a loss that reads every column, where the others are in order."""
    rows = [[-1.0] * len(row) for row in logprobs]
    bound = {"advantages": [1.0] * len(rows), **dict.fromkeys(LOGPROB_COLUMNS, rows), **columns}
    tensors = [torch.tensor(row, dtype=torch.float64) for row in logprobs]
    with pytest.raises(LossInputError) as caught:
        lossfns.with_kl(lossfns.with_tis(lossfns.ppo())).bind(**bound)(data(*weights), tensors)
    return caught.value


SERVERS = "Servers send null for the prompt: give those positions weight 0."


@pytest.mark.parametrize(
    ("columns", "field", "fix"),
    [
        ({}, "logprobs[1]", "A token that the model cannot produce has no finite logprob: mask it."),
        ({"old_logprobs": [[-1.0, NAN]]}, "old_logprobs[1]", SERVERS),
        ({"ref_logprobs": [[-1.0, NAN]]}, "ref_logprobs[1]", SERVERS),
        ({"sampler_logprobs": [[-1.0, NAN]]}, "sampler_logprobs[1]", SERVERS),
        (
            {"advantages": [[1.0, NAN]]},
            "advantages[1]",
            "A group of one has no standard deviation: use group_advantages, or larger groups.",
        ),
    ],
)
def test_what_is_not_finite_is_refused_with_the_fix_of_its_column(columns: Any, field: str, fix: str) -> None:
    error = refused([[-1.0, -1.0 if columns else NAN]], [[1.0, 1.0]], **columns)
    assert (error.datum, error.field, error.fix) == (0, field, fix)
    assert (error.expected, error.got) == ("a finite number at every active token", "nan")


def test_a_weight_that_is_not_finite_has_no_fix_of_its_own() -> None:
    error = refused([[-1.0, -1.0]], [[1.0, NAN]])
    assert (error.field, error.got, error.fix) == ("weights[1]", "nan", "Check the data.")


@pytest.mark.parametrize("infinite", [math.inf, -math.inf])
def test_one_infinite_side_is_enough(infinite: float) -> None:
    error = refused([[-1.0, -1.0]], [[1.0, 1.0]], advantages=[[0.0, infinite]])
    assert (error.field, error.got) == ("advantages[1]", str(infinite))


def test_a_logprob_may_lie_above_0_by_the_tolerance() -> None:
    """1e-4 is rounding, a little more is a probability. An advantage may be anything."""
    loss = lossfns.grpo(kl_beta=0).bind(advantages=[9.0], old_logprobs=[[-1.0, 1e-4]])
    loss(data([1.0, 1.0]), [torch.tensor([-1.0, 1e-4], dtype=torch.float64)])
    for name in LOGPROB_COLUMNS:
        error = refused([[-1.0] * 3], [[1.0] * 3], **{name: [[-1.0, 1e-4, 1.1e-4]]})
        assert (error.field, error.expected, error.got) == (f"{name}[2]", "a logprob, at most 0", "0.00011")
        assert error.fix == "Were probabilities or logits passed?"


def test_a_teachers_probability_in_place_of_its_logprob_is_refused() -> None:
    of_one = {"logprobs": torch.tensor([[[-1.0, -2.0]]]), "teacher_logprobs": torch.tensor([[[0.7, 0.2]]])}
    for loss in (lossfns.top_k_forward_kl(), lossfns.top_k_jsd(), lossfns.sampled_reverse_kl()):
        flat = {} if loss.rows is TARGETS else {"old_logprobs": -torch.ones(1, 2)}
        columns = of_one if loss.rows is TARGETS else {name: x[0] for name, x in of_one.items()}
        lp, teacher = columns["logprobs"], columns["teacher_logprobs"]
        with pytest.raises(LossInputError, match=r"teacher_logprobs\[0\]: expected a logprob, at most 0, got 0.7"):
            loss.padded(lp, torch.ones_like(lp), teacher_logprobs=teacher, **flat)


def of_datums(loss: Loss, **columns: Any) -> LossInputError | None:
    """The error of a loss on two pairs of two tokens each, if it has one. Other columns are in order."""
    rows = [[-1.0, -1.0]] * 4
    others = {name: [1.0] * 4 if name in DATUM_COLUMNS else rows for name in loss.reads}
    tensors = [torch.tensor(row) for row in rows]
    try:
        loss.bind(**{**others, **columns})(data(*[[1.0, 1.0]] * 4), tensors)
    except LossInputError as error:
        return error
    return None


def test_a_column_with_one_number_for_each_datum_is_refused_where_its_tokens_differ() -> None:
    """No loss takes one of them silently. In a masked slot anything may stand."""
    tried = set()
    for name, preset in presets().items():
        loss = preset()
        for column in set(loss.reads) & set(DATUM_COLUMNS):
            tried.add(column)
            rows = [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 1.0]]
            error = of_datums(loss, **{column: rows})
            assert error is not None and error.expected.startswith("one number for "), (name, column, error)
            assert (error.datum, error.field, error.got) == (3, f"{column}[0]", "0"), (name, column)
            masked = [[1.0, 1.0]] * 3 + [[0.0, 1.0]]
            assert of_datums(loss, **{column: rows}, weights=masked) is None, (name, column)
    assert tried == set(DATUM_COLUMNS)


def test_labels_are_1_or_0_and_groups_whole_numbers_that_float32_tells_apart() -> None:
    for name, preset in presets().items():
        loss = preset()
        if "labels" in loss.reads:
            assert of_datums(loss, labels=[1, 0, 1, 0]) is None is of_datums(loss, labels=torch.ones(4, dtype=bool)), (
                name
            )
            for wrong in (0.5, 2, -1, 1.001):
                error = of_datums(loss, labels=[1, 0, wrong, 0])
                assert error is not None and (error.datum, error.expected) == (2, "1 or 0"), (name, wrong)
        if "groups" in loss.reads:
            largest = 2**24 - 1
            assert of_datums(loss, groups=[-largest] * 2 + [largest] * 2) is None, name
            for wrong in (largest + 1, largest + 2, -largest - 1, 0.5):
                error = of_datums(loss, groups=[1, 1, wrong, wrong])
                assert error is not None and error.expected == f"a whole number of at most {largest}", (name, wrong)
            error = of_datums(loss, groups=["a", "a", "b", "b"])
            assert error is not None and error.fix == "Number the groups of the batch from 0.", name


def test_a_pair_is_of_one_group() -> None:
    """The label of either side would group the pair with others."""
    for name, preset in presets().items():
        loss = preset()
        if loss.rows is PAIRS and "groups" in loss.reads:
            error = of_datums(loss, groups=[0, 0, 0, 1])
            assert error is not None and error.expected == "one number for both sides of a pair", name
            assert (error.datum, error.field) == (3, "groups[0]")


def test_a_negative_weight_is_found_behind_masked_ones() -> None:
    error = refused([[-1.0], [-1.0] * 3], [[1.0], [1.0, 0.0, -2.0]])
    assert (error.datum, error.field, error.expected) == (1, "weights[2]", "a weight of at least 0")
    assert (error.got, error.fix) == ("-2", "Put the sign into the advantages.")


@pytest.mark.parametrize(
    ("weights", "datum", "got"),
    [
        ([[0.0], [1.0], [1.0], [1.0]], 0, "none on the chosen side of pair 0"),
        ([[1.0], [1.0], [1.0], [0.0]], 3, "none on the rejected side of pair 1"),
        ([[0.0], [0.0], [0.0], [1.0]], 2, "none on the chosen side of pair 1"),
        ([[1.0], [0.0], [0.0], [1.0]], 1, "none on the rejected side of pair 0"),
    ],
)
def test_a_pair_with_one_side_is_refused_by_the_datum_without_tokens(weights: Any, datum: int, got: str) -> None:
    with pytest.raises(LossInputError) as caught:
        lossfns.dpo().bind(ref_logprobs=[[-1.0]] * 4)(data(*weights), [torch.tensor([-1.0])] * 4)
    error = caught.value
    assert (error.datum, error.field, error.got) == (datum, "weights", got)
    assert (error.expected, error.fix) == ("active tokens on both sides", "Drop the pair, or mask both.")


def test_the_numbers_that_are_checked() -> None:
    """The least and the greatest of each column; of pairs, how many have one side."""
    t = Tokens(torch.tensor([-1.0, -3.0]), torch.tensor([0.5, 0.0]), torch.tensor([1, 1]), {"x": torch.ones(2)})
    names = [f"{name} {side}" for name in ("logprobs", "weights", "x") for side in ("min", "max")]
    assert {name: float(x) for name, x in extremes(t, TOKENS).items()} == dict(zip(names, [-3, -1, 0, 0.5, 1, 1]))
    assert extremes(t, PAIRS).keys() == {*names, "one-sided pairs"} and int(extremes(t, PAIRS)["one-sided pairs"]) == 1
    empty = Tokens(torch.zeros(0), torch.zeros(0), torch.tensor([0]))
    assert extremes(empty, PAIRS) == {}
    check_values({}, lambda: empty, signed=False)
    with pytest.raises(TypeError):
        check_values({}, lambda: empty, False)


def test_only_weights_have_a_sign() -> None:
    """A column of one's own may be negative, whatever its name."""
    t = Tokens(torch.tensor([-1.0]), torch.tensor([1.0]), torch.tensor([1]), {"a": -torch.ones(1), "z": -torch.ones(1)})
    check_values({name: float(x) for name, x in extremes(t, TOKENS).items()}, lambda: t, signed=False)


def test_the_place_of_an_entry() -> None:
    """Lengths 2, 0, 2: entry 2 is the first of datum 2. Without lengths all entries are of one datum."""
    x = torch.tensor([-1.0, -1.0, 0.5, 0.5])
    for lengths, datum, field in ((torch.tensor([2, 0, 2]), 2, "logprobs[0]"), (None, 0, "logprobs[2]")):
        with pytest.raises(LossInputError) as caught:
            raise_at_first(Tokens(x, torch.ones(4), lengths), "logprobs", x > 0, "a logprob", "")
        error = caught.value
        assert (error.datum, error.field, error.got, error.fix) == (datum, field, "0.5", "Check the data.")
        assert type(error.datum) is int


@pytest.mark.parametrize(
    ("old", "logprobs", "doubted"),
    [
        ([0.0, 0.0], [-1.0, -1.0], True),
        ([0.0, 0.0], [0.0, -1.0], True),  # the new ones are not 0 everywhere
        ([0.0, 0.0], [0.0, -1e-4], False),  # the model is certain
        ([0.0, -1.0], [-1.0, -1.0], False),
    ],
)
def test_old_logprobs_of_0_everywhere_are_doubted(old: list[float], logprobs: list[float], doubted: bool) -> None:
    loss = lossfns.importance_sampling().bind(advantages=[1.0], old_logprobs=[old])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LossWarning)
        loss(data([1.0, 1.0]), [torch.tensor(logprobs, dtype=torch.float64)])
    message = "old_logprobs are 0 at every active token: were they left unset?"
    assert [str(w.message) for w in caught] == [message] * doubted


def test_a_mean_log_ratio_above_5_is_doubted() -> None:
    for metrics in ({}, {"log_ratio_abs": 5.0}):
        warn_if_far_off_policy(metrics)
    with pytest.warns(LossWarning, match=r"the mean \|log-ratio\| is 5\.01: are the old_logprobs those of these"):
        warn_if_far_off_policy({"log_ratio_abs": 5.01})
