"""Every mutant has one bug: it shows, and nothing else is wrong."""

import ast
import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from batches import apart, random_batch
from torch.overrides import TorchFunctionMode

import lossfns
from lossfns.testing import mutants
from lossfns.testing.batch import Batch
from lossfns.testing.bugs import BUGS
from lossfns.testing.mutants import BASELINES, MUTANTS

pytestmark = pytest.mark.filterwarnings("ignore::lossfns.LossWarning")
BASELINE = {repr(function.like): function for function in BASELINES.values()}
LOSSES = {name: f for name, f in (BASELINES | MUTANTS).items() if f.kind != "advantages"}
every_loss = pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=LOSSES.keys())
LOGPROBS = ("old_logprobs", "ref_logprobs", "sampler_logprobs")
FIELDS = ("logprobs", "advantages", *LOGPROBS)


def every_loss_but(*bugs: str) -> Any:
    """Parametrise over the losses that are not meant to fail this test."""
    meant = {name: f for name, f in LOSSES.items() if getattr(f, "bug", "") not in bugs}
    return pytest.mark.parametrize("loss_fn", meant.values(), ids=meant.keys())


def kind_batch(loss_fn: Any, seed: int, **options: Any) -> Batch:
    """A random batch of the loss's kind, in the form that carries its columns."""
    rows = getattr(loss_fn.like, "rows", "tokens")
    drawn = random_batch(Random(seed), pairs=rows == "pairs", targets=3 if rows == "targets" else 0, **options)
    return Batch(drawn.logprobs, drawn.weights, drawn.columns, drawn.targets)


def calm_batch(loss_fn: Any, seed: int, sequences: int = 6) -> Batch:
    """A batch within every bound: log-ratios below 0.1, no sequence fully masked, weights 0 (first) or 1."""
    rng = Random(seed)
    batch = kind_batch(loss_fn, seed, sequences=sequences, longest=6)
    weights = [[float(w != 0 and j > 0) for j, w in enumerate(row[:-1])] + [1.0] for row in batch.weights]
    near = lambda: [[lp + rng.uniform(-0.1, 0.1) for lp in row] for row in below]  # noqa: E731
    below = [[lp - 0.1 for lp in row] for row in batch.logprobs]
    return batch.having(logprobs=below, weights=weights, **{name: near() for name in LOGPROBS})


def call(loss_fn: Any, batch: Batch, dtype: torch.dtype = torch.float64, **knobs: Any) -> Any:
    """Value, gradients and metrics; what the call raises, if it does."""
    logprobs = batch.tensors(dtype)
    try:
        result = loss_fn(batch.data(), logprobs, **knobs)
        value, metrics = result
        value.backward()
    except Exception as error:
        return type(error).__name__
    return [value.tolist(), [lp.grad if lp.grad is None else lp.grad.flatten().tolist() for lp in logprobs], metrics]


def far(a: Any, b: Any) -> bool:
    """Whether two results are apart by more than rounding."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() != b.keys() or any(far(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) != len(b) or any(map(far, a, b))
    if type(a) is float and type(b) is float and not math.isnan(a + b):
        return apart(a, b) > 1e-10
    return repr(a) != repr(b)


# The baselines


@pytest.mark.parametrize("name", [name for name in BASELINES if name in LOSSES])
@pytest.mark.parametrize("seed", range(12))
def test_a_baseline_equals_the_library(name: str, seed: int) -> None:
    baseline = BASELINES[name]
    batch = with_empty(kind_batch(baseline, seed))
    if name == "cross_entropy_sum_loss":
        batch = signed(batch)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        (value, gradients, _), expected = call(baseline, batch, dtype), call(baseline.like, batch, dtype)
        assert apart(value, expected[0]) < tolerance
        assert apart(gradients, expected[1]) < tolerance


def test_the_baseline_of_advantages_equals_the_library() -> None:
    rng = Random(0)
    for _ in range(50):
        groups = [rng.choice("abcd") for _ in range(rng.randint(1, 12))]
        rewards = [rng.choice((0.0, 1.0, rng.random())) for _ in groups]
        expected = lossfns.group_advantages(rewards, groups).tolist()
        assert apart(BASELINES["group_advantages"](rewards, groups), expected) < 1e-9


def with_empty(batch: Batch) -> Batch:
    """The batch and two datums (a pair) in which nothing is trained on."""
    more = batch.take([0, 1])
    both = batch.take([*range(len(batch.weights)), 0, 1])
    return both.having(weights=batch.weights + [[0.0] * len(row) for row in more.weights])


# The list


def test_there_are_many_and_names_are_unique() -> None:
    paths = sorted(Path(mutants.__file__).parent.glob("*.py"))
    nodes = [node for path in paths for node in ast.parse(path.read_text()).body]
    marked = [
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d).startswith("mutant(") for d in node.decorator_list)
    ]
    assert len(marked) == len(MUTANTS) >= 75
    assert set(marked) == set(MUTANTS)


def test_every_bug_has_a_mutant() -> None:
    assert {function.bug for function in MUTANTS.values()} == set(BUGS)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_says_what_it_is(name: str) -> None:
    function = MUTANTS[name]
    assert getattr(mutants, name) is function and function.__name__ == name and function.__doc__
    assert function.bug in BUGS and isinstance(function.seen, str)
    assert repr(function.like) in BASELINE
    assert function.kind == BASELINE[repr(function.like)].kind
    _, _, *knobs = inspect.signature(function).parameters.values()
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in knobs)


# Each shows


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_differs_from_its_baseline(name: str) -> None:
    function = MUTANTS[name]
    if function.kind == "advantages":
        expected = lossfns.group_advantages
        assert any(far(function(*case), expected(*case).tolist()) for case in REWARDS)
        return
    baseline = BASELINE[repr(function.like)]
    assert any(far(probe(function), probe(baseline)) for probe in probes(function))


REWARDS = (
    ([1.0, 0.0, 0.5, 0.25, 0.0], ["a", "b", "a", "b", "a"]),
    ([0.1] * 3 + [0.7] * 8, ["a"] * 3 + ["b"] * 8),
    ([1.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"]),
)


def probes(function: Any) -> Iterator[Callable[[Any], Any]]:
    """Ways to look at a loss, each a function from the loss to what was seen."""
    knobs = inspect.signature(function).parameters.keys() - {"data", "logprobs_list"}
    for seed in range(6):
        batch = with_empty(kind_batch(function, seed))
        yield lambda loss_fn, batch=batch: call(loss_fn, batch)
        yield lambda loss_fn, batch=batch: call(loss_fn, signed(batch))
        yield lambda loss_fn, batch=batch: call(loss_fn, poisoned(batch, *FIELDS))
        for name in knobs:
            values = {name: OTHER[name]}
            yield lambda loss_fn, batch=batch, values=values: call(loss_fn, batch, **values)
    yield from (contract, unchanged, repeated, transfers, grad_switches, refusals, ranks, extremes)


OTHER = {
    "clip": (0.9, 1.5),
    "kl_beta": 0.5,
    "dual_clip": 1.5,
    "cap": 1.1,
    "beta": 0.7,
    "label_smoothing": 0.2,
    "lam": 0.9,
}


def signed(batch: Batch) -> Batch:
    """The batch with every other weight negative."""
    return batch.having(weights=[[w * (-1) ** j for j, w in enumerate(row)] for row in batch.weights])


def poisoned(batch: Batch, *names: str, value: float = math.nan) -> Batch:
    """The batch with this value in the masked slots of these columns."""
    fill = lambda rows: [[x if w else value for x, w in zip(r, ws)] for r, ws in zip(rows, batch.weights)]  # noqa: E731
    columns = {"logprobs": batch.logprobs, **batch.columns}
    return batch.having(**{name: fill(rows) for name, rows in columns.items() if name in names})


def contract(loss_fn: Any) -> Any:
    """Whether it returns a 0-d tensor that requires grad, and plain floats."""
    batch = calm_batch(loss_fn, 1)
    result = loss_fn(batch.data(), batch.tensors())
    if not isinstance(result, tuple):
        return "no pair"
    loss, metrics = result
    return [list(loss.shape), loss.requires_grad, [type(value).__name__ for value in metrics.values()]]


def unchanged(loss_fn: Any) -> Any:
    """Whether datums and logprobs are as they were."""
    batch = calm_batch(loss_fn, 2)
    data, logprobs = batch.data(), batch.tensors()
    loss_fn(data, logprobs)
    return repr(Batch.of(data, logprobs)) == repr(Batch.of(batch.data(), batch.tensors()))


def repeated(loss_fn: Any) -> Any:
    """Whether a call gives something else after one with another batch of the same lengths."""
    batch = calm_batch(loss_fn, 3)
    other = batch.having(
        weights=[[1.0] * len(row) for row in batch.weights],
        advantages=[[x + 1 for x in row] for row in batch.columns["advantages"]],
    )
    first, _, again = call(loss_fn, other), call(loss_fn, batch), call(loss_fn, other)
    return far(first, again)


class Seen(TorchFunctionMode):
    """The names of the functions called on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def seen(loss_fn: Any, sequences: int, *names: str) -> int:
    batch = calm_batch(loss_fn, 4, sequences)
    data, logprobs = batch.data(), batch.tensors()
    with Seen() as mode:
        loss_fn(data, logprobs)
    return sum(name in names for name in mode.names)


def transfers(loss_fn: Any) -> list[int]:
    """How often a value goes to the host, for two datums and for eight."""
    return [seen(loss_fn, n, "item", "tolist", "__bool__", "__float__", "numpy") for n in (2, 8)]


def grad_switches(loss_fn: Any) -> int:
    """How often grad mode is switched."""
    return seen(loss_fn, 4, "_set_grad_enabled", "set_grad_enabled")


def refusals(loss_fn: Any) -> list[str]:
    """What is raised where a row is too short, too long or of one value, and where a datum is one too many."""
    batch = calm_batch(loss_fn, 5)
    width = batch.targets or 1
    found = []
    for name in ("weights", *getattr(loss_fn.like, "reads", ())):
        for change in (
            lambda row: row[:-width],
            lambda row: row + row[:width],
            lambda row: row[:width] * (len(row) > width),
        ):
            short = batch.map(lambda rows, change=change: [change(row) for row in rows])
            wrong = [
                type(d)(d.model_input, d.loss_fn_inputs | {name: s.loss_fn_inputs[name]})
                for d, s in zip(batch.data(), short.data())
            ]
            found.append(raised(loss_fn, wrong, batch.tensors()))
    found.append(raised(loss_fn, batch.data(), batch.tensors()[:-1]))
    odd = batch.take(range(5))
    found.append(raised(loss_fn, odd.data(), odd.tensors()))
    return found


def raised(loss_fn: Any, data: Any, logprobs: Any) -> str:
    try:
        loss_fn(data, logprobs)
    except Exception as error:
        return type(error).__name__
    return ""


def ranks(loss_fn: Any) -> Any:
    """What a second rank changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "4")
        return call(loss_fn, calm_batch(loss_fn, 6))


def extremes(loss_fn: Any) -> list[Any]:
    """What comes of logprobs at both ends of what there is."""
    batch = calm_batch(loss_fn, 7)
    found = []
    for here in (-1e4, -0.01, -1e-8, 0.0):
        for there in (-1e4, -1.0, 0.0):
            row = lambda x: [[x] * len(row) for row in batch.weights]  # noqa: E731
            sides = [[there if i % 2 else here] * len(row) for i, row in enumerate(batch.weights)]
            others = dict.fromkeys(LOGPROBS, row(there))
            moved = batch.having(logprobs=sides if loss_fn.kind == "preference" else row(here), **others)
            found.append(call(loss_fn, moved)[:2])
    return found


def finite(value: float, gradients: list[list[float]]) -> bool:
    return math.isfinite(value) and all(math.isfinite(g) for row in gradients for g in row)


# Nothing else is wrong


CHANGES_NOTHING_HERE = {
    "not-the-contract", "inputs-mutated", "gradient-missing", "host-sync-per-datum", "branch-on-values",
    "no-grad-for-detach", "silent-truncation", "mask-after-exp", "where-after-exp", "empty-sequence-nan",
    "empty-sequence-counted", "weights-squared", "weights-binarised", "negative-weights-lost", "world-size-factor",
    "clip-inert", "clip-without-min", "clip-max-for-min", "clip-gradient-leaks", "tis-uncapped", "exp-overflow",
    "metric-not-mergeable", "metric-scaled-twice", "metric-counts-nonbinding", "odd-datum-dropped",
    "log-of-sigmoid", "log-odds-nan", "inert-knob",
}  # fmt: skip
"""Bugs that value and gradient do not show on a calm batch: log-ratios within the bounds, weights of 0 and 1."""


@every_loss
def test_a_bug_that_is_not_triggered_changes_nothing(loss_fn: Any) -> None:
    if getattr(loss_fn, "bug", "") not in CHANGES_NOTHING_HERE:
        return
    for seed in range(3):
        batch = calm_batch(loss_fn, seed)
        logprobs, expected = batch.tensors(), call(BASELINE[repr(loss_fn.like)], batch)
        result = loss_fn(batch.data(), logprobs)
        loss = result[0] if isinstance(result, tuple) else result
        assert not far(loss.sum().item(), expected[0])
        if loss.requires_grad:
            loss.backward()
            present = [torch.zeros_like(lp) if lp.grad is None else lp.grad for lp in logprobs]
            assert not far([g.flatten().tolist() for g in present], expected[1])


@every_loss_but("not-the-contract")
def test_it_returns_the_contract(loss_fn: Any) -> None:
    shape, requires_grad, types = contract(loss_fn)
    assert shape == [] and requires_grad and set(types) == {"float"}


@every_loss_but("inputs-mutated")
def test_inputs_stay_as_they_were(loss_fn: Any) -> None:
    assert unchanged(loss_fn)


@every_loss_but("state-between-calls")
def test_calls_do_not_know_of_each_other(loss_fn: Any) -> None:
    assert not repeated(loss_fn)


@every_loss_but("gradient-missing", "not-the-contract")
def test_every_datum_has_a_gradient(loss_fn: Any) -> None:
    """Where nothing is trained on, or all advantages are 0."""
    batch = with_empty(calm_batch(loss_fn, 0))
    zero = batch.having(
        advantages=[[0.0] * len(row) if i else row for i, row in enumerate(batch.columns["advantages"])]
    )
    for tried in (batch, zero):
        gradients = call(loss_fn, tried)[1]
        assert all(g is not None for g in gradients)


@every_loss_but("host-sync-per-datum", "branch-on-values")
def test_values_go_to_the_host_once(loss_fn: Any) -> None:
    assert transfers(loss_fn) == [1, 1]


@every_loss_but("no-grad-for-detach")
def test_grad_mode_is_not_switched(loss_fn: Any) -> None:
    assert grad_switches(loss_fn) == 0


@every_loss_but("silent-truncation", "odd-datum-dropped")
def test_bad_inputs_are_refused(loss_fn: Any) -> None:
    *lengths, odd = refusals(loss_fn)
    assert set(lengths) == {"LossInputError"}
    assert odd == ("LossInputError" if loss_fn.kind == "preference" else "")


@every_loss_but("world-size-factor", "state-between-calls")
def test_the_number_of_ranks_does_not_matter(loss_fn: Any) -> None:
    assert not far(ranks(loss_fn), call(loss_fn, calm_batch(loss_fn, 6)))


@every_loss_but("exp-overflow", "log-of-sigmoid", "log-odds-nan", "not-the-contract")
def test_extremes_are_finite(loss_fn: Any) -> None:
    assert all(finite(*outcome) for outcome in extremes(loss_fn))


@every_loss_but("not-the-contract")
def test_the_dtype_is_kept_and_at_least_float32(loss_fn: Any) -> None:
    batch = calm_batch(loss_fn, 8)
    for given, computed in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        assert loss_fn(batch.data(), batch.tensors(given))[0].dtype == computed


LEAKS = (
    "mask-after-exp", "where-after-exp", "mask-missing", "kl-unmasked", "frame-shift", "datum-misaligned",
    "pair-masks-swapped", "targets-transposed", "not-the-contract", "state-between-calls",
)  # fmt: skip
"""Bugs by which a masked slot is read."""


@every_loss_but(*LEAKS)
@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_masked_slots_are_not_read(loss_fn: Any, value: float) -> None:
    batch = calm_batch(loss_fn, 9)
    plain = call(loss_fn, batch)
    for names in (FIELDS, *((name,) for name in FIELDS)):
        assert repr(call(loss_fn, poisoned(batch, *names, value=value))) == repr(plain)


@every_loss_but(
    *("not-the-contract", "gradient-missing", "mask-missing", "kl-unmasked", "padding-in-denominator"),
    *("empty-sequence-nan", "empty-sequence-counted", "divided-twice", "datum-misaligned", "datum-ignored"),
    *("order-dependent", "state-between-calls", "pair-layout", "pair-masks-swapped", "broadcast", "cross-talk"),
    *("metric-not-mergeable", "metric-scaled-twice", "targets-transposed"),
)
def test_a_fully_masked_datum_is_inert(loss_fn: Any) -> None:
    """In these bugs' mutants too, but for those that lose count of datums."""
    batch = calm_batch(loss_fn, 10)
    (value, gradients, metrics), plain = call(loss_fn, with_empty(batch)), call(loss_fn, batch)
    assert not far([value, gradients[:-2], metrics], plain)
    assert all(g == 0 for row in gradients[-2:] for g in row)


INERT = (
    "inert-knob", "clip-inert", "old-logprobs-inert", "advantage-inert", "empty-sequence-nan", "not-the-contract",
    "state-between-calls",
)  # fmt: skip


@every_loss_but(*INERT)
def test_every_knob_has_an_effect(loss_fn: Any) -> None:
    for name in inspect.signature(loss_fn).parameters.keys() - {"data", "logprobs_list"}:
        batches = [kind_batch(loss_fn, seed, sequences=6) for seed in range(4)]
        assert any(far(call(loss_fn, b)[:2], call(loss_fn, b, **{name: OTHER[name]})[:2]) for b in batches), name
