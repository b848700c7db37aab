"""Laws that every loss obeys, on random batches."""

import functools
import math
from random import Random
from typing import Any

import pytest
import torch
from batches import LAW_CASES, LOGPROBS, Batch, Case, apart, call
from hypothesis import given, settings
from hypothesis import strategies as st

import lossfns
from lossfns import merge_metrics
from lossfns.testing.settings import knobs, setting_elements, variants
from lossfns.testing.vectors import load
from lossfns.tokens import DATUM_COLUMNS, MODEL_COLUMNS

pytestmark = pytest.mark.filterwarnings("ignore:.*log-ratio.*")
POISON = (math.nan, math.inf, -math.inf, 1e30)
every_loss = pytest.mark.parametrize("case", LAW_CASES, ids=str)
seeds = given(st.integers(0, 2**32 - 1))
STOP_GRADIENT = {vector.loss for vector in load() if "missing-stop-gradient" in vector.flags}
"""The losses whose gradient is not the slope of their value, by design."""
few = settings(max_examples=max(8, settings().max_examples // 8))
"""Two hundred losses draw batches: 8 of them each, or 12 in the exhaustive run."""
FIRST = list({case.loss.name: case for case in reversed(LAW_CASES)}.values())
OTHERS = [case for case in LAW_CASES if case not in FIRST]
"""One case of each loss and combinator, and those that differ from it by settings alone, which draw 8 batches each."""


def partition(rng: Random, case: Case, batch: Batch) -> list[list[int]]:
    """The batch's datums in random chunks; pairs and groups stay together."""
    units = case.units(batch)
    rng.shuffle(units)
    cuts = sorted(rng.sample(range(1, len(units)), rng.randint(0, len(units) - 1))) if len(units) > 1 else []
    parts = [units[a:b] for a, b in zip([0, *cuts], [*cuts, len(units)])]
    return [[i for unit in part for i in unit] for part in parts]


Result = tuple[float, list[list[float]], dict[str, float]]
"""Value, gradients and metrics of a batch."""


def denominator(case: Case, batch: Batch) -> float:
    return case.loss.bind(weights=batch.shaped(batch.weights)).denominator(batch.data())


@pytest.mark.parametrize("case", FIRST, ids=str)
@few
@seeds
def test_parts_copies_and_order(case: Case, seed: int) -> None:
    check_parts_copies_and_order(case, seed)


@pytest.mark.parametrize("case", OTHERS, ids=str)
@settings(max_examples=8)
@seeds
def test_parts_copies_and_order_with_other_settings(case: Case, seed: int) -> None:
    check_parts_copies_and_order(case, seed)


def check_parts_copies_and_order(case: Case, seed: int) -> None:
    rng = Random(seed)
    batch = case.batch(rng)
    chunks, result = partition(rng, case, batch), call(case.loss, batch)
    any_partition_sums_to_the_whole(case, batch, chunks, result)
    order_does_not_matter(case, batch, [i for chunk in chunks for i in chunk], result)
    duplicating_the_batch_leaves_means_and_doubles_sums(case, batch, result)


def any_partition_sums_to_the_whole(case: Case, batch: Batch, chunks: list[list[int]], result: Result) -> None:
    """With the denominator added up front: loss, gradients and metrics."""
    value, gradients, metrics = result
    whole = denominator(case, batch)
    if case.loss.count is not None:
        assert apart(whole, sum(denominator(case, batch.take(chunk)) for chunk in chunks)) < 1e-12
    total, parts = 0.0, []
    for chunk in chunks:
        loss, chunk_gradients, chunk_metrics = call(case.loss, batch.take(chunk), denominator=whole)
        total += loss
        parts.append(chunk_metrics)
        assert apart(chunk_gradients, [gradients[i] for i in chunk]) < 1e-12
    assert apart(total, value) < 1e-12
    merged = merge_metrics(parts)
    assert merged.keys() == metrics.keys()
    # A mean that nearly cancels keeps the rounding of its summands: rewards of chi_po reach e²⁰.
    rounding = 64 * torch.finfo(torch.float64).eps * max(map(abs, metrics.values()))
    for name, metric in metrics.items():
        assert apart(merged[name], metric) < max(1e-12, rounding), name


def duplicating_the_batch_leaves_means_and_doubles_sums(case: Case, batch: Batch, result: Result) -> None:
    value, gradients, _ = result
    indices = list(range(len(batch.weights)))
    doubled = batch.take(indices * 2)
    for i in indices:  # the copies are groups of their own
        doubled.columns["groups"][len(indices) + i] = [label + 8 for label in batch.columns["groups"][i]]
    twice, twice_gradients, _ = call(case.loss, doubled)
    factor = 1 if case.loss.count is not None else 2
    assert apart(twice, factor * value) < 1e-12
    halves = [[g * (2 / factor) for g in row] for row in twice_gradients[: len(indices)]]
    assert apart(halves, gradients) < 1e-12


def order_does_not_matter(case: Case, batch: Batch, order: list[int], result: Result) -> None:
    value, gradients, _ = result
    shuffled, shuffled_gradients, _ = call(case.loss, batch.take(order))
    assert apart(shuffled, value) < 1e-12
    assert apart(shuffled_gradients, [gradients[i] for i in order]) < 1e-12


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_stands_in_an_inactive_slot_changes_nothing_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    for seed in range(3):
        batch = case.batch(Random(seed))
        clean = call(case.loss, batch, dtype)
        for poison in POISON:
            poisoned = call(case.loss, poisoned_batch(batch, poison), dtype)
            assert repr(poisoned) == repr(clean)


def poisoned_batch(batch: Batch, poison: float) -> Batch:
    def fill(rows: Any) -> Any:
        return [[poison if w == 0 else x for x, w in zip(row, ws)] for row, ws in zip(rows, batch.weights)]

    columns = {name: fill(rows) for name, rows in batch.columns.items()}
    return Batch(fill(batch.logprobs), batch.weights, columns, batch.targets)


@every_loss
def test_masked_tokens_have_a_gradient_of_exactly_zero(case: Case) -> None:
    """And it is present for a datum with no active token at all (in pairs: for a pair of such datums)."""
    batch = case.batch(Random(5))
    masked = [0, 1] if case.pairs else [1]
    for i in masked:
        batch.weights[i] = [0.0] * len(batch.weights[i])
    _, gradients, metrics = call(case.loss, batch)
    for row, weights in zip(gradients, batch.weights):
        assert all(g == 0 for g, w in zip(row, weights) if w == 0)
    assert metrics["sequences_empty"] == sum(not any(row) for row in batch.weights)
    assert any(g != 0 for row in gradients for g in row)


@every_loss
def test_prepended_and_appended_masked_tokens_change_nothing(case: Case) -> None:
    batch = case.batch(Random(11))
    pad = [0.0] * (batch.targets or 1)

    def padded(rows: Any) -> Any:
        return [pad + row + pad + pad for row in rows]

    wide = Batch(
        padded(batch.logprobs), padded(batch.weights), {n: padded(r) for n, r in batch.columns.items()}, batch.targets
    )
    value, gradients, metrics = call(case.loss, batch)
    wide_value, wide_gradients, wide_metrics = call(case.loss, wide)
    assert apart(wide_value, value) < 1e-14
    assert apart(wide_gradients, padded(gradients)) < 1e-14
    assert all(apart(wide_metrics[name], metrics[name]) < 1e-14 for name in metrics)


@every_loss
def test_no_knob_is_inert(case: Case) -> None:
    """Changing any one knob changes value or gradient on some batch."""
    changes: dict[str, Any] = {
        "clip": (0.97, 1.02),
        "kl_beta": 0.9,
        "kl": lossfns.k2,
        "log_ratio_cap": 0.05,
        "dual_clip": 1.01,
        "beta": 0.33,
        "lam": 0.77,
        "label_smoothing": 0.4,
    }
    preset, own = getattr(lossfns, case.loss.name), dict(case.loss.knobs)

    @functools.cache
    def batch_and_result(seed: int) -> tuple[Batch, Any]:
        batch = case.batch(Random(seed))
        return batch, call(case.loss, batch)[:2]

    def has_effect(changed: lossfns.Loss) -> bool:
        """Whether one of many batches shows it: outer bounds of a ratio matter to few tokens."""
        return any(call(changed, batch)[:2] != result for batch, result in map(batch_and_result, range(48)))

    for name in own.keys() & changes.keys():
        changed = preset(**{**own, name: changes[name]})
        assert own[name] == changes[name] or changed.reads != case.loss.reads or has_effect(changed), name
    for name in knobs(case.loss).keys() - changes.keys():
        for element in setting_elements(own[name]):
            others = [other for other in variants(case.loss, name, element) if other.reads == case.loss.reads]
            assert not others or any(map(has_effect, others)), (name, element)


@every_loss
def test_no_column_is_inert(case: Case) -> None:
    """Changing any column that the loss reads, at one active token, changes value or gradient on some batch."""
    for name in case.loss.reads:
        assert any(changes_at_one_token(case, name, seed) for seed in range(48)), name


def changes_at_one_token(case: Case, name: str, seed: int) -> bool:
    batch = case.batch(Random(seed))
    before = call(case.loss, batch)[:2]
    row = next(i for i, w in enumerate(batch.weights) if any(w))
    slot = batch.weights[row].index(next(filter(None, batch.weights[row])))
    if name in DATUM_COLUMNS:
        sides = case.loss.rows.datums if name == "groups" else 1  # a pair is of one group
        for i in range(row, row + sides):
            batch.columns[name][i] = [1 - x for x in batch.columns[name][i]]
    elif name in MODEL_COLUMNS:  # at least 0, or above 0
        batch.columns[name][row][slot] /= 2
    else:
        batch.columns[name][row][slot] -= 0.37
    return call(case.loss, batch)[:2] != before


@every_loss
def test_inputs_are_left_as_they_were(case: Case) -> None:
    batch = case.batch(Random(3))
    logprobs, data, columns = batch.tensors(), batch.data(), batch.bound(case.loss.reads)
    before = repr((logprobs, [d.loss_fn_inputs for d in data], columns))
    first = case.loss.bind(**columns)(data, logprobs)
    assert repr((logprobs, [d.loss_fn_inputs for d in data], columns)) == before
    again = case.loss.bind(**columns)(data, logprobs)
    assert repr(first) == repr(again)


@every_loss
def test_gradcheck_in_float64(case: Case) -> None:
    """Away from kinks, and for losses without a stop-gradient."""
    batch = case.batch(Random(21), sequences=4, longest=4)
    calm = Random(4)
    for name in (*LOGPROBS, "teacher_logprobs"):
        batch.columns[name] = [[lp - calm.choice((0.03, 0.05, 0.6)) for lp in row] for row in batch.logprobs]
    if any(name in str(case) for name in STOP_GRADIENT) or not is_slope(case, batch):
        return
    loss = case.loss.bind(**batch.bound(case.loss.reads))
    data = batch.data()
    assert torch.autograd.gradcheck(
        lambda *lps: loss(data, list(lps))[0], batch.tensors(), eps=1e-6, atol=1e-7, rtol=1e-5
    )


def is_slope(case: Case, batch: Batch) -> bool:
    """Whether the oracle's gradient is the slope of its value, as it is without a stop-gradient."""
    _, gradients = case.expected(batch)
    for i, row in enumerate(batch.logprobs):
        for t, lp in enumerate(row):
            ends = []
            for by in (1e-5, -1e-5):
                row[t] = lp + by
                ends.append(case.expected(batch)[0])
            row[t] = lp
            if abs((ends[0] - ends[1]) / 2e-5 - gradients[i][t]) > 1e-7 + 1e-5 * abs(gradients[i][t]):
                return False
    return True


EXTREMES = (0.0, -1e-10, -1e-6, -1.0, -50.0, -1e4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loss", [lossfns.orpo(), lossfns.dpo(), lossfns.orpo(lam=10), lossfns.dpo(beta=1)], ids=str)
def test_preferences_are_finite_at_the_extremes(loss: lossfns.Loss, dtype: torch.dtype) -> None:
    for chosen in EXTREMES:
        for rejected in EXTREMES:
            for length in (1, 3):
                rows = [[chosen] * length, [rejected] * length]
                ref = {"ref_logprobs": [[-1.0] * length] * 2}
                value, gradients, metrics = call(loss, Batch(rows, [[1.0] * length] * 2, ref), dtype)
                assert math.isfinite(value) and all(math.isfinite(m) for m in metrics.values())
                assert all(math.isfinite(g) for row in gradients for g in row), (chosen, rejected)


@pytest.mark.parametrize("weigh", [lossfns.token_mean, lossfns.token_sum])
def test_weights_count_like_repetitions(weigh: lossfns.Weighing) -> None:
    """A token of weight 2 is two tokens of weight 1, in a policy loss as in cross-entropy."""
    for loss in (lossfns.cross_entropy(weigh=weigh), lossfns.ppo(weigh=weigh)):
        columns = {"advantages": [[1.0, -2.0]], "old_logprobs": [[-1.1, -0.4]]}
        twice = {name: [[row[0][0], row[0][1], row[0][1]]] for name, row in columns.items()}
        value, _, _ = call(loss, Batch([[-1.0, -0.5]], [[1.0, 2.0]], columns))
        repeated, _, _ = call(loss, Batch([[-1.0, -0.5, -0.5]], [[1.0, 1.0, 1.0]], twice))
        assert value == pytest.approx(repeated, rel=1e-14)
