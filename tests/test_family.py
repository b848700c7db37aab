"""One table over every preset of ``lossfns.__all__``: its oracle in every setting, its forms, its documents, its twins.

``test_methods.py`` and ``testing/test_laws.py`` take each loss with its defaults and with all settings changed. Here
each setting changes alone. A preset that lacks an oracle, vectors or a complete docstring fails by its name.
"""

import inspect
import json
import math
import re
from collections.abc import Iterator
from functools import cache
from itertools import chain, permutations
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from batches import TWINS, WEIGHINGS, Batch, Case, apart, call, derived_case
from torch import Tensor

import lossfns
from lossfns import Loss, LossInputError, Rows, Tokens, evaluate, pack
from lossfns.testing import oracle
from lossfns.testing.oracle import TOKEN_WEIGHINGS
from lossfns.testing.public import presets
from lossfns.testing.settings import knobs, setting_elements, variants, with_settings
from lossfns.tokens import DATUM_COLUMNS

PRESETS = presets()
VECTORS = Path(lossfns.__file__).parent / "testing" / "data"
every_preset = pytest.mark.parametrize("name", PRESETS)
pytestmark = pytest.mark.filterwarnings("ignore:.*log-ratio.*")  # tails of ±25 are in the batches on purpose


def settings(loss: Loss) -> Iterator[Loss]:
    """The loss with its defaults, with each weighing of its rows, and with each other setting at another value."""
    yield loss
    for weigh in WEIGHINGS.get(loss.rows, TOKEN_WEIGHINGS):
        yield with_settings(loss, weigh=lossfns.fixed_length(7) if weigh == "fixed_length" else weigh)
    for name, value in knobs(loss).items():
        for element in setting_elements(value) if name != "weigh" else ():
            changed = next(variants(loss, name, element), None)
            assert changed is not None, f"no other value for {name}: add one to settings.other_values"
            yield changed


def differences(case: Case, batch: Batch, dtype: torch.dtype) -> float:
    """How far value and gradient are from the oracle's."""
    value, gradients, _ = call(case.loss, batch, dtype)
    expected, slopes = case.expected(batch)
    return max(apart(value, expected), apart(gradients, slopes))


def in_float32(batch: Batch) -> Batch:
    """The batch with the numbers that float32 holds."""
    rounded = lambda rows: [torch.tensor(row, dtype=torch.float32).tolist() for row in rows]  # noqa: E731
    columns = {name: rounded(rows) for name, rows in batch.columns.items()}
    return Batch(rounded(batch.logprobs), rounded(batch.weights), columns, batch.targets)


def check_settings(name: str, seeds: range, **size: int) -> None:
    """Compare every setting with the oracle: 1e-12 in float64, 1e-5 in float32."""
    for loss in settings(PRESETS[name]()):
        case = derived_case(loss)
        for seed in seeds:
            batch = case.batch(Random(seed), **size)
            assert differences(case, batch, torch.float64) < 1e-12, (loss, seed)
        assert differences(case, in_float32(batch), torch.float32) < 1e-5, (loss, seed)


@pytest.mark.repeated
@every_preset
def test_every_setting_gives_the_value_and_gradient_of_the_oracle(name: str) -> None:
    check_settings(name, range(100, 102), sequences=4, longest=5)


@pytest.mark.exhaustive
@every_preset
def test_every_setting_gives_the_value_and_gradient_of_the_oracle_on_many_batches(name: str) -> None:
    check_settings(name, range(8))


# Forms


def wide(batch: Batch, width: int, fill: float) -> Batch:
    """The batch with each row filled up to a width, by tokens of weight 0; a number of the datum stays the same."""
    missing = [width * (batch.targets or 1) - len(row) for row in batch.weights]

    def filled(rows: Any, x: float | None) -> Any:
        return [row + [row[0] if x is None else x] * n for row, n in zip(rows, missing)]

    columns = {name: filled(rows, None if name in DATUM_COLUMNS else fill) for name, rows in batch.columns.items()}
    return Batch(filled(batch.logprobs, fill), filled(batch.weights, 0.0), columns, batch.targets)


def tensors(loss: Loss, batch: Batch) -> dict[str, list[Tensor]]:
    """The rows of the batch as tensors ``[T]`` or ``[T, K]``, and numbers of a datum as 0-d ones."""
    named = {"logprobs": batch.logprobs, "weights": batch.weights, **{x: batch.columns[x] for x in loss.reads}}
    shape = (-1, batch.targets) if batch.targets else (-1,)
    rows = {x: [torch.tensor(row, dtype=torch.float64).reshape(shape) for row in y] for x, y in named.items()}
    return {x: [row[0] for row in y] if x in DATUM_COLUMNS else y for x, y in rows.items()}


def called(form: Any, logprobs: Tensor, columns: dict[str, Tensor], **bounds: Any) -> tuple[float, list[float], Any]:
    """Value, gradient and metrics of a form that takes tensors."""
    leaf = logprobs.clone().requires_grad_()
    value, metrics = form(leaf, **columns, **bounds)
    value.backward()
    assert leaf.grad is not None
    return value.item(), leaf.grad.flatten().tolist(), metrics


@every_preset
def test_padded_and_packed_are_the_datum_form_bit_for_bit_and_rows_have_their_own_gradients(name: str) -> None:
    """Padding is nan. ``vmap(grad)`` of the rows of the padded batch gives its gradient."""
    case = derived_case(PRESETS[name]())
    loss, batch = case.loss, case.batch(Random(7), sequences=4, longest=5)
    width = max(len(row) for row in batch.weights) // (batch.targets or 1)

    value, rows, metrics = call(loss, batch)
    columns = {x: torch.stack(y) if x in DATUM_COLUMNS else torch.cat(y) for x, y in tensors(loss, batch).items()}
    lengths = [len(row) // (batch.targets or 1) for row in batch.weights]
    assert called(loss.packed, columns.pop("logprobs"), columns, lengths=lengths) == (value, [*chain(*rows)], metrics)

    value, rows, metrics = call(loss, wide(batch, width, -1.0))
    columns = {x: torch.stack(y) for x, y in tensors(loss, wide(batch, width, math.nan)).items()}
    logprobs = columns.pop("logprobs")
    assert called(loss.padded, logprobs, columns) == (value, [*chain(*rows)], metrics)
    if not loss.couples_groups:
        gradients = by_row(loss, logprobs, columns, metrics.get("count", 1.0))
        assert apart(gradients.tolist(), [*chain(*rows)]) < 1e-13


def by_row(loss: Loss, logprobs: Tensor, columns: dict[str, Tensor], denominator: float) -> Tensor:
    """The gradient of each row, or of each pair of rows, as its part of the batch."""
    size = loss.rows.datums

    def part(logprobs: Tensor, columns: dict[str, Tensor]) -> Tensor:
        return loss.deferred().padded(logprobs, **columns, denominator=denominator)[0]

    parts = {x: y.unflatten(0, (-1, size)) for x, y in columns.items()}
    return torch.func.vmap(torch.func.grad(part))(logprobs.unflatten(0, (-1, size)), parts).flatten()


# Documents


def documented(doc: str, section: str) -> str:
    """The part of a docstring from a heading on."""
    return doc[doc.find(section) :]


@every_preset
def test_a_preset_has_an_oracle_vectors_and_a_docstring_with_all_that_it_takes_reads_and_returns(name: str) -> None:
    assert callable(getattr(oracle, name, None)), "no oracle"
    path = VECTORS / f"{name}.json"
    assert path.exists(), "no vectors: python -m tools.vectors write"
    assert sum(len(group["tests"]) for group in json.loads(path.read_text())["groups"]) >= 10
    doc = inspect.getdoc(PRESETS[name]) or ""
    assert ">>>" in doc
    for knob in inspect.signature(PRESETS[name]).parameters:
        assert re.search(rf"^    {knob}: ", documented(doc, "Args:"), re.M), knob
    for column in PRESETS[name]().reads:
        assert f"``{column}``" in documented(doc, "Reads"), column
    for statistic in {statistic for loss in settings(PRESETS[name]()) for statistic in statistics(loss)}:
        assert re.search(rf"^    {statistic}: |``{statistic}``", documented(doc, "tatistic"), re.M), statistic


# Twins


@cache
def one_batch(rows: Rows, output: str, reads: tuple[str, ...]) -> Tokens:
    """Some 1,000 tokens, whose ratios are on either side of all bounds and whose advantages differ by token."""
    loss = Loss("any", {}, reads, evaluate, evaluate, None, rows, output)
    batch = Case(loss, oracle.ppo).batch(Random(1), sequences=256)
    return pack(batch.data(), batch.tensors(), reads, batch.bound(reads), rows=rows)


def statistics(loss: Loss) -> list[str]:
    """The names of the statistics of a loss."""
    return list(loss.terms(one_batch(*form(loss)))[1])


def value_and_gradient(loss: Loss) -> list[float]:
    t = one_batch(*form(loss))
    total, _ = evaluate(loss, t)
    (slope,) = torch.autograd.grad(total, t.logprobs)
    return [total.item(), *slope.tolist()]


def form(loss: Loss) -> tuple[Rows, str, tuple[str, ...]]:
    """What a loss is a function of."""
    return loss.rows, loss.output, tuple(sorted(loss.reads))


def original(name: str) -> str:
    """The preset that a preset is a twin of, or itself."""
    return original(TWINS[name].name) if name in TWINS else name


def test_no_preset_is_another_under_the_same_settings_unless_it_is_documented_as_its_twin() -> None:
    """The settings that two presets share are made equal, so that only what they compute can differ."""
    losses = {name: preset() for name, preset in PRESETS.items()}
    found = {name: value_and_gradient(loss) for name, loss in losses.items()}
    undocumented = []
    for first, second in permutations(losses, 2):
        loss, other = losses[first], losses[second]
        if original(first) != original(second) and form(loss) == form(other):
            try:
                other = PRESETS[second](**{knob: x for knob, x in loss.knobs.items() if knob in other.knobs})
            except LossInputError:  # a value that the other refuses
                continue
            if form(loss) == form(other) and apart(found[first], value_and_gradient(other)) < 1e-9:
                undocumented.append((loss, other))
    assert undocumented == []


@pytest.mark.parametrize("name", TWINS)
def test_a_documented_twin_is_the_loss_that_its_docstring_names(name: str) -> None:
    assert f"``{name}()`` is ``" in " ".join((PRESETS[name].__doc__ or "").split())
    loss, twin = PRESETS[name](), TWINS[name]
    assert value_and_gradient(loss) == value_and_gradient(twin)
    for changed in settings(loss):
        shared = {knob: x for knob, x in changed.knobs.items() if knob in twin.knobs}
        if all(changed.knobs[knob] == x for knob, x in loss.knobs.items() if knob not in shared):
            assert value_and_gradient(changed) == value_and_gradient(with_settings(twin, **shared)), changed
