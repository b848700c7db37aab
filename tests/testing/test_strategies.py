"""Strategies draw every edge case, nothing that a loss refuses, and shrink to readable examples."""

import importlib
import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

import lossfns
from lossfns.testing import strategies
from lossfns.testing.batch import Batch
from lossfns.testing.public import presets
from lossfns.testing.strategies import batches, datums
from lossfns.tokens import DATUM_COLUMNS, LOGPROB_COLUMNS, TOKEN_COLUMNS

pytestmark = pytest.mark.filterwarnings("ignore:.*log-ratio.*")
BOUNDS = (0.8, 1.2, 1.28, 1 - 3e-4, 1 + 4e-4)
COLUMNS = ("advantages", *LOGPROB_COLUMNS)
OTHERS = (*TOKEN_COLUMNS, *DATUM_COLUMNS)
OPTIONS: dict[str, dict[str, Any]] = {
    "policy": {"reads": (*COLUMNS, *OTHERS)},
    "pairs": {"reads": ("ref_logprobs", "sum_square_probs", *DATUM_COLUMNS), "pairs": True},
    "targets": {"reads": ("teacher_logprobs",), "targets": 3},
    "signed": {"reads": (), "signed": True},
    "signed targets": {"reads": (), "signed": True, "targets": 2},
}
every_kind = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def drawn(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """Draw ``count`` examples, the same ones every time."""
    examples: list[Any] = []
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=checks)
    @given(strategy)
    def collect(example: Any) -> None:
        examples.append(example)

    collect()
    return examples


def least(strategy: st.SearchStrategy[Any], condition: Callable[[Any], bool]) -> Any:
    """Return the example to which the condition shrinks."""
    shrink = settings(max_examples=1000, database=None, phases=[Phase.generate, Phase.shrink])
    return find(strategy, condition, settings=shrink, random=Random(0))


def tokens(batch: Batch) -> Iterator[dict[str, float]]:
    """Yield logprob, weight and columns of every token."""
    table = {"logprobs": batch.logprobs, "weights": batch.weights, **batch.columns}
    flat = [itertools.chain(*rows) for rows in table.values()]
    return (dict(zip(table, values)) for values in zip(*flat))


def log_ratios(batch: Batch) -> Iterator[float]:
    return (t["logprobs"] - t[name] for t in tokens(batch) if t["weights"] for name in LOGPROB_COLUMNS if name in t)


EDGES: dict[str, Callable[[Batch], bool]] = {
    "an empty sequence": lambda b: any(not any(row) for row in b.weights),
    "a zero between two tokens that are trained on": lambda b: any(
        w[i - 1] and not w[i] and w[i + 1] for w in b.weights for i in range(1, len(w) - 1)
    ),
    "a sequence of one token": lambda b: any(len(row) == 1 for row in b.weights),
    "a single sequence": lambda b: len(b.weights) == 1,
    "lengths that differ": lambda b: len({len(row) for row in b.weights}) > 1,
    "a fractional weight": lambda b: any(t["weights"] == 0.5 for t in tokens(b)),
    "a weight of 2": lambda b: any(t["weights"] == 2 for t in tokens(b)),
    "log-ratios of 0": lambda b: not any(log_ratios(b)),
    "a log-ratio above 20": lambda b: max(log_ratios(b)) > 20,
    "a log-ratio below −20": lambda b: min(log_ratios(b)) < -20,
    "no log-ratio past 20": lambda b: max(map(abs, log_ratios(b))) < 20,
    "logprob 0": lambda b: any(t["logprobs"] == 0 and t["weights"] for t in tokens(b)),
    "logprob almost 0": lambda b: any(-1e-5 < t["logprobs"] < 0 and t["weights"] for t in tokens(b)),
    "logprob −1e4": lambda b: any(t["logprobs"] == -1e4 and t["weights"] for t in tokens(b)),
    "advantages by token": lambda b: any(len(set(row)) > 1 for row in b.columns["advantages"]),
    "advantages by sequence": lambda b: all(len(set(row)) == 1 < len(row) for row in b.columns["advantages"]),
    "advantage 0": lambda b: any(t["advantages"] == 0 for t in tokens(b)),
    "advantages of both signs": lambda b: {1, -1} <= {math.copysign(1, t["advantages"]) for t in tokens(b)},
    **{
        f"{side} {bound}": lambda b, bound=bound, sign=sign: any(
            0 < sign * (math.exp(d) / bound - 1) < 1e-3 and d != 0 for d in log_ratios(b)
        )
        for bound in BOUNDS
        for side, sign in (("just below", -1), ("just above", 1))
    },
}


def test_every_edge_is_drawn() -> None:
    found = Counter(name for batch in drawn(batches(reads=COLUMNS), 300) for name, has in EDGES.items() if has(batch))
    assert {name: found[name] for name in EDGES if found[name] < 9} == {}


def test_pairs_are_empty_on_both_sides_or_on_neither() -> None:
    drawn_pairs = drawn(batches(pairs=True, max_sequences=6), 100)
    sides = [tuple(map(any, pair)) for b in drawn_pairs for pair in zip(b.weights[0::2], b.weights[1::2])]
    assert set(sides) == {(True, True), (False, False)}
    assert {len(batch.weights) for batch in drawn_pairs} == {2, 4, 6}


def test_negative_weights_are_drawn_only_when_asked_for() -> None:
    assert any(w < 0 for b in drawn(batches(signed=True), 50) for row in b.weights for w in row)
    assert all(w >= 0 for b in drawn(batches(), 50) for row in b.weights for w in row)


@every_kind
def test_limits_hold_and_some_token_is_active(options: dict[str, Any]) -> None:
    k = options.get("targets") or 1
    for batch in drawn(batches(**options, min_sequences=2, max_sequences=4, max_length=3), 50):
        assert 2 <= len(batch.weights) <= 4
        assert all(len(row) in (k, 2 * k, 3 * k) for row in batch.weights)
        assert any(w for row in batch.weights for w in row)
        shapes = [[len(row) for row in rows] for rows in (batch.logprobs, batch.weights, *batch.columns.values())]
        assert all(shape == shapes[0] for shape in shapes)
        assert tuple(batch.columns) == tuple(options["reads"])


def test_advantages_may_be_one_number_for_each_sequence() -> None:
    for batch in drawn(batches(per_token=False), 50):
        assert all(len(set(row)) == 1 for row in batch.columns["advantages"])


def test_calm_batches_stay_away_from_every_kink() -> None:
    for batch in drawn(batches(reads=COLUMNS, extremes=False), 100):
        for token in tokens(batch):
            assert -5 <= token["logprobs"] <= -0.05
            ds = [token["logprobs"] - token[name] for name in LOGPROB_COLUMNS]
            assert max(map(abs, ds)) <= 0.7
            between = [a - b for a, b in itertools.combinations(ds, 2)]  # what an importance correction sees
            assert all(off_bounds(d) for d in [*ds, *between])


def off_bounds(log_ratio: float) -> bool:
    ratio = math.exp(log_ratio)
    return ratio == 1 or all(abs(ratio / bound - 1) > 1e-3 for bound in (*BOUNDS, 0.5, 1.3, 2.0, 3.0))


PRESETS = [preset() for preset in presets().values()]
LOSSES = {
    "policy": [
        *(loss for loss in PRESETS if loss.rows in ("tokens", "sequences")),
        lossfns.with_kl(lossfns.with_tis(lossfns.ppo())),
        lossfns.cross_entropy(weigh=lossfns.sequence_mean),
    ],
    "pairs": [loss for loss in PRESETS if loss.rows == "pairs"],
    "targets": [loss for loss in PRESETS if loss.rows == "targets"],
    "signed": [lossfns.cross_entropy(weigh=lossfns.token_sum)],
    "signed targets": [lossfns.multi_target_cross_entropy(weigh=lossfns.token_sum)],
}


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("kind", OPTIONS)
def test_our_losses_accept_every_batch(kind: str, poison: bool) -> None:
    """Value and gradient are finite. A poisoned batch is one without poison whose inactive slots are filled."""
    for batch in drawn(batches(**OPTIONS[kind], poison=poison), 40 if poison else 10):
        data = batch.data()
        for loss in LOSSES[kind]:
            logprobs = batch.tensors()
            value, metrics = loss(data, logprobs)
            value.backward()
            assert all(map(math.isfinite, (value.item(), *metrics.values())))
            assert all(lp.grad is not None and lp.grad.isfinite().all() for lp in logprobs), loss


@pytest.mark.parametrize("pairs", [False, True])
def test_columns_that_few_losses_read_hold_what_they_mean(pairs: bool) -> None:
    """A number of a datum stands at each of its tokens, and both sides of a pair have the same."""
    sides = 2 if pairs else 1
    for batch in drawn(batches(reads=OTHERS, pairs=pairs, poison=True), 60):
        for rows in (batch.columns[name] for name in DATUM_COLUMNS):
            units = [rows[i : i + sides] for i in range(0, len(rows), sides)]
            assert all(len(set(itertools.chain(*unit))) == 1 for unit in units)
        for token in tokens(batch):
            assert token["labels"] in (0, 1) and token["groups"] in (0, 1, 2) and token["reference_point"] >= 0
            if token["weights"]:
                assert token["entropy"] >= 0 < token["sum_square_probs"] <= 1 and token["teacher_logprobs"] <= 0


@every_kind
def test_a_batch_prints_what_makes_it_again(options: dict[str, Any]) -> None:
    for batch in drawn(batches(**options), 50):
        assert eval(repr(batch)) == batch


def test_a_poisoned_batch_prints_what_makes_it_again() -> None:
    for batch in drawn(batches(poison=True), 50):
        assert repr(eval(repr(batch), {"Batch": Batch, "nan": math.nan, "inf": math.inf})) == repr(batch)


@every_kind
def test_numbers_are_exact_in_float32_and_survive_the_datum(options: dict[str, Any]) -> None:
    for batch in drawn(batches(**options), 50):
        assert Batch.of(batch.data(), batch.tensors(torch.float32)) == batch


def test_all_logprobs_but_the_lowest_are_exact_in_half_precision() -> None:
    for batch in drawn(batches(), 50):
        for dtype in (torch.bfloat16, torch.float16):
            rows = [row.tolist() for row in batch.tensors(dtype)]
            assert all(a == b or b == -1e4 for ours, row in zip(rows, batch.logprobs) for a, b in zip(ours, row))


def test_poison_stands_in_inactive_slots_alone() -> None:
    seen: set[str] = set()
    for batch in drawn(batches(poison=True), 150):
        for token in tokens(batch):
            assert math.isfinite(token["weights"])
            found = {repr(x) for x in token.values() if not abs(x) < 1e30}
            assert not (found and token["weights"])
            seen |= found
    assert seen == {"nan", "inf", "-inf", "1e+30"}


MINIMAL = Batch([[-1.0]], [[1.0]], {name: [[1.0 if name == "advantages" else -1.0]] for name in COLUMNS})


def test_what_shrinks_without_a_condition() -> None:
    assert least(batches(reads=COLUMNS, poison=True), lambda batch: True) == MINIMAL
    assert least(batches(reads=(), pairs=True), lambda batch: True) == Batch([[-1.0]] * 2, [[1.0]] * 2)
    assert least(batches(reads=(), targets=2), lambda batch: True) == Batch([[-1.0] * 2], [[1.0] * 2], targets=2)
    assert [least(s(), lambda row: True) for s in (strategies.logprobs, strategies.log_ratios)] == [[-1.0], [0.0]]
    assert [least(s(), lambda row: True) for s in (strategies.weights, strategies.advantages)] == [[1.0], [1.0]]


def test_an_interior_zero_shrinks_to_three_tokens() -> None:
    found = least(batches(reads=("advantages",)), EDGES["a zero between two tokens that are trained on"])
    assert found == Batch([[-1.0] * 3], [[1.0, 0.0, 1.0]], {"advantages": [[1.0] * 3]})


def test_an_empty_sequence_shrinks_to_two_tokens() -> None:
    found = least(batches(reads=()), EDGES["an empty sequence"])
    assert found == Batch([[-1.0], [-1.0]], [[1.0], [0.0]])


def test_a_far_ratio_shrinks_to_one_token() -> None:
    far = lambda batch: any(old < -20 for row in batch.columns["old_logprobs"] for old in row)  # noqa: E731
    found = least(batches(reads=("old_logprobs", "ref_logprobs")), far)
    assert found == Batch([[-1.0]], [[1.0]], {"old_logprobs": [[-26.0]], "ref_logprobs": [[-1.0]]})


def test_leaked_poison_shrinks_to_the_slot_that_leaks() -> None:
    found = least(batches(reads=(), poison=True, max_sequences=1), lambda b: math.inf in b.logprobs[0])
    assert found == Batch([[-1.0, math.inf]], [[1.0, 0.0]])


IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "pairs of several targets": {"pairs": True, "targets": 2},
    "negative weights in pairs": {"pairs": True, "signed": True},
    "no sequence": {"max_sequences": 0},
    "half a pair": {"pairs": True, "max_sequences": 1},
    "no even number": {"pairs": True, "min_sequences": 3, "max_sequences": 3},
    "more than at most": {"min_sequences": 6},
    "no token": {"max_length": 0},
    "a fraction": {"max_length": 2.5},
    "a truth for a number": {"targets": True},
    "targets below 0": {"targets": -1},
    "an unknown column": {"reads": ("old_logprob",)},
    "weights, which are always there": {"reads": ("weights",)},
    "a column twice": {"reads": ("advantages", "advantages")},
    "a string": {"reads": "advantages"},
}


@pytest.mark.parametrize("options", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_the_impossible_is_refused_when_it_is_drawn(options: dict[str, Any]) -> None:
    for make in (batches, datums):
        strategy = make(**options)
        with pytest.raises(InvalidArgument):
            drawn(strategy, 1)


def test_a_misspelt_column_is_named_with_the_nearest_one() -> None:
    with pytest.raises(InvalidArgument, match="Did you mean 'old_logprobs'"):
        drawn(batches(reads=("old_logprob",)), 1)


def test_impossible_rows_are_refused_when_they_are_drawn() -> None:
    rows = (strategies.logprobs, strategies.log_ratios, strategies.advantages, strategies.weights)
    for strategy in [*[make(min_length=3, max_length=2) for make in rows], strategies.lengths(max_length=0)]:
        with pytest.raises(InvalidArgument):
            drawn(strategy, 1)


def test_rows_and_values() -> None:
    for row in drawn(strategies.logprobs(min_length=2, max_length=3), 50):
        assert len(row) in (2, 3) and all(-1e4 <= lp <= 0 for lp in row)
    assert all(-5 <= lp < -0.05 for row in drawn(strategies.logprobs(extremes=False), 50) for lp in row)
    assert all(off_bounds(d) for row in drawn(strategies.log_ratios(extremes=False), 50) for d in row)
    assert {25.0, -25.0} <= {d for row in drawn(strategies.log_ratios(), 100) for d in row}
    assert any(w < 0 for row in drawn(strategies.weights(signed=True), 50) for w in row)
    assert all(len(set(row)) == 1 for row in drawn(strategies.advantages(per_token=False), 50))
    assert all(1 <= n <= 4 for ns in drawn(strategies.lengths(max_sequences=2, max_length=4), 50) for n in ns)
    assert {repr(x) for x in drawn(strategies.poisons(), 50)} == {"nan", "inf", "-inf", "1e+30"}
    assert set(drawn(strategies.dtypes(), 50)) == {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def test_without_hypothesis_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, strategies.__name__)
    needs = re.escape("lossfns.testing.strategies needs hypothesis: pip install 'lossfns[testing]'")
    with pytest.raises(ImportError, match=f"^{needs}$"):
        importlib.import_module(strategies.__name__)
