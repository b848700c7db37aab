"""``linear_logprobs`` against its definition in float64, and the laws that its plans keep."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lossfns import LossInputError
from lossfns.logprobs import plans, tiles
from lossfns.logprobs.linear import linear_logprobs, model_outputs
from lossfns.tokens import MODEL_COLUMNS

TILES = {"TILE_TOKENS": 16, "TILE_VOCAB": 20, "BLOCK_LOGITS": 140, "SEPARABLE_TOKENS": 8}
"""Sizes so small that a few dozen tokens make several tiles, with ragged edges: blocks of 7 rows."""

OPTIONS: dict[str, dict[str, Any]] = {
    "auto": {},
    "tiled": {"plan": "tiled"},
    "saved": {"plan": "saved"},
    "some tiles saved": {"memory_budget": 7000},
    "separable": {"plan": "separable"},
    "frozen": {"plan": "frozen"},
}
"""Every plan, and a mixture of two."""

RECOMPUTING = ["auto", "tiled", "saved", "some tiles saved"]
"""The plans that take any gradient and can return the entropy."""

KNOBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"biased": True},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0},
    "all of them": {"biased": True, "temperature": 1.3, "softcap": 5.0},
}

every_plan = pytest.mark.parametrize("plan", OPTIONS)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tiles, plans):
        for name, size in TILES.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, size)


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    g: Tensor  # ∂loss/∂logprob, in the shape of the targets
    knobs: dict[str, Any]

    @property
    def inputs(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None and x.requires_grad]


def draw(
    n: int = 37,
    d: int = 12,
    v: int = 83,
    k: int | None = None,
    dtype: torch.dtype = torch.float64,
    biased: bool = False,
    scale: float = 1.0,
    seed: int = 0,
    **knobs: Any,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape = (n,) if k is None else (n, k)
    return Case(
        (scale * normal(n, d)).to(dtype).requires_grad_(),
        (normal(v, d) / d**0.5).to(dtype).requires_grad_(),
        normal(v).to(dtype).requires_grad_() if biased else None,
        torch.randint(v, shape, generator=generator),
        normal(*shape).to(torch.promote_types(dtype, torch.float32)),
        knobs,
    )


def definition(case: Case) -> Tensor:
    """Return log softmax over the whole vocabulary, [N, V] in float64."""
    z = case.hidden.double() @ case.weight.double().T
    z = z if case.bias is None else z + case.bias.double()
    c, t = case.knobs.get("softcap"), case.knobs.get("temperature", 1.0)
    return ((z if c is None else c * torch.tanh(z / c)) / t).log_softmax(1)


def expected(case: Case) -> Tensor:
    rows = case.targets.reshape(len(case.targets), -1)
    return definition(case).gather(1, rows).view_as(case.targets)


def freeze(case: Case) -> Case:
    return case._replace(weight=case.weight.detach(), bias=None if case.bias is None else case.bias.detach())


def in_double(case: Case) -> Case:
    """Return the same numbers in float64, so that gradients are not rounded to the precision of the case."""
    hidden, weight, bias = (
        x if x is None else x.detach().double().requires_grad_(x.requires_grad)
        for x in (case.hidden, case.weight, case.bias)
    )
    assert hidden is not None and weight is not None
    return case._replace(hidden=hidden, weight=weight, bias=bias)


def suited(case: Case, plan: str) -> Case:
    return freeze(case) if plan == "frozen" else case


def compute(case: Case, plan: str, **more: Any) -> Any:
    """Call the function; for the separable plan, ``gradient`` declares the gradient of the case."""
    options = OPTIONS[plan] | case.knobs | more
    if options.get("plan") == "separable":
        options.setdefault("gradient", lambda _, index: case.g[index])
    return linear_logprobs(case.hidden, case.weight, case.targets, bias=case.bias, **options)


def gradients(case: Case, out: Tensor, g: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
    g = case.g if g is None else g
    return torch.autograd.grad(out, case.inputs, g.to(out.dtype), **options)


def relative_error(got: Any, reference: Any) -> float:
    """Return the largest relative error of a gradient, by norm."""
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(got, reference, strict=True))


def agrees(case: Case, plan: str, tolerance: float = 1e-12, **more: Any) -> None:
    case = suited(case, plan)
    out, reference = compute(case, plan, **more), expected(case)
    assert out.shape == case.targets.shape
    assert float((out.double() - reference).detach().abs().max()) <= tolerance
    assert relative_error(gradients(case, out), gradients(case, reference)) <= tolerance


class CostTracker(TorchDispatchMode):
    """Count operations of matrix products and bytes that are alive, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.largest, self.peak = 0, 0, 0
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.operations += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and not any(aliases(x, y) for y in args):
                storage = x.untyped_storage()
                self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    @property
    def alive(self) -> int:
        self.seen = {key: (ref, size) for key, (ref, size) in self.seen.items() if not ref.expired()}
        return sum(size for _, size in self.seen.values())


def aliases(x: Tensor, y: Any) -> bool:
    return isinstance(y, Tensor) and x.untyped_storage()._cdata == y.untyped_storage()._cdata


# Against float64


@every_plan
@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("k", [None, 1, 3])
def test_values_and_gradients_are_those_of_the_definition(small: None, plan: str, knobs: str, k: int | None) -> None:
    agrees(draw(k=k, **KNOBS[knobs]), plan)


@every_plan
@pytest.mark.parametrize("n, v", [(1, 1), (1, 83), (3, 19), (16, 20), (17, 21), (32, 40), (33, 2)])
def test_tiles_of_any_shape(small: None, plan: str, n: int, v: int) -> None:
    """Less than a tile, one tile, a little more than one, exactly two by two."""
    case = suited(draw(n=n, v=v, k=2, biased=True), plan)
    out, reference = compute(case, plan), expected(case)
    torch.testing.assert_close(out, reference, atol=1e-12, rtol=0)
    for got, want in zip(gradients(case, out), gradients(case, reference)):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@every_plan
def test_one_target_twice_counts_twice(small: None, plan: str) -> None:
    case = draw(k=3)
    case.targets[:, 1] = case.targets[:, 0]
    agrees(case, plan)
    half = draw(k=3, dtype=torch.bfloat16)
    half.targets[:, 1] = half.targets[:, 0]
    agrees(half, plan, tolerance=1e-1)


@every_plan
@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias", "hidden and bias"])
def test_gradients_of_some_inputs_alone(small: None, plan: str, wanted: str) -> None:
    case = draw(biased=True)
    for name in ("hidden", "weight", "bias"):
        getattr(case, name).requires_grad_(name in wanted)
    if plan != "frozen" or wanted == "hidden":
        agrees(case, plan)


@pytest.mark.parametrize("plan", RECOMPUTING)
@pytest.mark.parametrize("knobs", KNOBS)
def test_entropy_and_sum_of_squares_and_their_gradients(small: None, plan: str, knobs: str) -> None:
    """Each alone, and all with the logprobs."""
    case = draw(k=2, **KNOBS[knobs])
    logprobs, *others = compute(case, plan, return_entropy=True, return_sum_square_probs=True)
    p = definition(case)
    references = -(p.exp() * p).sum(1), (2 * p).exp().sum(1)
    loss, exact = (logprobs * case.g).sum(), (expected(case) * case.g).sum()
    for name, found, reference in zip(("return_entropy", "return_sum_square_probs"), others, references):
        torch.testing.assert_close(found, reference, atol=1e-12, rtol=0)
        d = torch.linspace(-1, 1, len(found), dtype=torch.float64)
        alone = torch.autograd.grad((reference * d).sum(), case.inputs, retain_graph=True)
        of_one = (compute(case, plan, **{name: True})[1] * d).sum()
        assert relative_error(torch.autograd.grad(of_one, case.inputs), alone) < 1e-12
        loss, exact = loss + (found * d).sum(), exact + (reference * d).sum()
    both = torch.autograd.grad(exact, case.inputs)
    assert relative_error(torch.autograd.grad(loss, case.inputs), both) < 1e-12


def test_the_frozen_plan_gives_both_as_constants(small: None) -> None:
    case = suited(draw(k=2, **KNOBS["all of them"]), "frozen")
    model = SimpleNamespace(head=case.weight, head_bias=case.bias, head_temperature=1.3, head_softcap=5.0)
    found = model_outputs(model, case.hidden, case.targets, MODEL_COLUMNS, ())
    swept = model_outputs(model, case.hidden, case.targets, MODEL_COLUMNS, MODEL_COLUMNS)
    assert [x.requires_grad for x in found + swept] == [True, False, False, True, True, True]
    for x, y in zip(found, swept, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=0)
    of_logprobs = (torch.autograd.grad(x, case.hidden, case.g)[0] for x in (found[0], swept[0]))
    torch.testing.assert_close(*of_logprobs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("plan", ["tiled", "saved", "frozen"])
def test_gradcheck(small: None, plan: str) -> None:
    case = suited(draw(n=19, d=3, v=23, k=2, biased=True, temperature=0.8, softcap=4.0), plan)
    assert torch.autograd.gradcheck(lambda *_: compute(case, plan), case.inputs, nondet_tol=1e-12)


def test_gradcheck_with_the_entropy(small: None) -> None:
    case = draw(n=19, d=3, v=23, biased=True, temperature=0.8, softcap=4.0)
    options = {"return_entropy": True, "return_sum_square_probs": True}
    assert torch.autograd.gradcheck(lambda *_: compute(case, "tiled", **options), case.inputs)


@every_plan
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_float32_at_the_real_tile_size(plan: str, scale: float) -> None:
    case = suited(draw(n=64, d=48, v=9000, scale=scale, dtype=torch.float32), plan)
    out, reference = compute(case, plan), expected(case)
    assert out.dtype == torch.float32
    assert float((out - reference).detach().abs().max()) <= 2e-5
    assert relative_error(gradients(case, out), gradients(case, reference)) <= 1e-5


@every_plan
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_half_precision_is_no_worse_than_the_naive_way_with_float32_logits(plan: str, scale: float) -> None:
    """For flat and peaked distributions, in tiles of the real size."""
    case = suited(draw(n=64, d=48, v=9000, scale=scale, dtype=torch.bfloat16), plan)
    double = in_double(case)
    reference = expected(double)
    exact = gradients(double, reference)
    naive = (case.hidden @ case.weight.T).float().log_softmax(1)[torch.arange(64), case.targets]
    out = compute(case, plan)
    assert out.dtype == torch.float32
    assert (out - reference).abs().max() <= 1.2 * (naive - reference).abs().max()
    for got, plain, want in zip(gradients(case, out), gradients(case, naive), exact):
        assert got.dtype == torch.bfloat16
        assert relative_error([got], [want]) <= 1.2 * relative_error([plain], [want])


@pytest.mark.parametrize("plan", ["tiled", "separable"])
def test_blocks_of_tokens_are_summed_in_float32(small: None, plan: str) -> None:
    """∂weight of 2,048 tokens, 8 or 16 at a time: summed in bfloat16, its error would be six times that of rounding."""
    case = draw(n=2048, d=16, v=64, dtype=torch.bfloat16)._replace(g=torch.ones(2048))
    double = in_double(case)
    _, want = gradients(double, expected(double))
    _, got = gradients(case, compute(case, plan))
    assert relative_error([got], [want]) < 0.005


def test_a_frozen_head_keeps_what_nearly_cancels_in_float32() -> None:
    """The rows of the weight share a mean as large as their differences; in ∂hidden it cancels."""
    case = freeze(draw(n=64, d=48, v=20_000))
    weight = (case.weight + torch.linspace(-0.2, 0.2, 48)).bfloat16()
    case = case._replace(hidden=case.hidden.detach().bfloat16().requires_grad_(), weight=weight, g=torch.ones(64))
    exact = in_double(case)
    naive = (case.hidden @ weight.T).float().log_softmax(1)[torch.arange(64), case.targets]
    (want,), (plain,) = gradients(exact, expected(exact)), gradients(case, naive)
    assert relative_error(gradients(case, compute(case, "frozen")), [want]) <= 1.2 * relative_error([plain], [want])


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4])
@pytest.mark.parametrize("plan", ["tiled", "saved"])
def test_a_common_offset_of_all_logits_costs_no_more_than_rounding(plan: str, offset: float) -> None:
    """Float32 rounds logits to 6e-8 of the offset; entropy and gradients may be wrong by a few times that."""
    case = draw(n=16, d=8, v=20_000, dtype=torch.float32)._replace(bias=torch.full((20_000,), offset))
    double, d_entropy = in_double(case), torch.ones(16)
    logprobs, entropy = compute(case, plan, return_entropy=True)
    log_p = definition(double)
    exact = -(log_p.exp() * log_p).sum(1)
    rounding = 1e-6 * max(5.0, offset)
    assert (entropy - exact).abs().max() <= rounding * 10
    got = torch.autograd.grad((logprobs, entropy), case.inputs, (case.g, d_entropy))
    want = torch.autograd.grad((expected(double) * case.g).sum() + exact.sum(), double.inputs)
    assert relative_error(got, want) <= rounding


def test_half_precision_is_normalised_in_float32() -> None:
    case = draw(n=7, v=50, dtype=torch.bfloat16)._replace(targets=torch.arange(50).expand(7, 50))
    total = compute(case, "tiled").exp().sum(1)
    torch.testing.assert_close(total, torch.ones(7), atol=1e-5, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 40),
    d=st.integers(1, 6),
    v=st.integers(1, 70),
    k=st.sampled_from([None, 1, 2, 5]),
    knobs=st.sampled_from(list(KNOBS)),
    seed=st.integers(0, 2**16),
)
def test_all_plans_agree(n: int, d: int, v: int, k: int | None, knobs: str, seed: int) -> None:
    case = draw(n=n, d=d, v=v, k=k, seed=seed, **KNOBS[knobs])
    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink(monkeypatch)
        outs = {plan: compute(suited(case, plan), plan) for plan in OPTIONS}
        ds = {plan: gradients(suited(case, plan), out) for plan, out in outs.items()}
    for plan, out in outs.items():
        torch.testing.assert_close(out, outs["tiled"], atol=1e-10, rtol=0)
        for got, want in zip(ds[plan], ds["tiled"]):
            torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


# Laws


@every_plan
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
def test_never_above_zero(small: None, plan: str, dtype: torch.dtype, scale: float) -> None:
    """For the most likely token of flat, peaked and certain distributions."""
    case = suited(draw(n=60, dtype=dtype, scale=scale), plan)
    best = (case.hidden @ case.weight.T).argmax(1)
    out = compute(case._replace(targets=best), plan)
    assert float(out.detach().max()) <= 0
    assert scale < 1e4 or float(out.detach().max()) == 0
    assert all(x.isfinite().all() for x in gradients(case, out))


@every_plan
def test_large_finite_logits_stay_finite(small: None, plan: str) -> None:
    case = suited(draw(n=33, d=1, dtype=torch.float32), plan)
    hidden = torch.full((33, 1), 1e30).requires_grad_()
    case = case._replace(hidden=hidden)
    out = compute(case, plan)
    assert out.isfinite().all() and float(out.detach().min()) < -1e29
    for softcap in (None, 30.0):
        out = compute(case, plan, softcap=softcap)
        assert out.isfinite().all()
        assert all(x.isfinite().all() for x in gradients(case, out))


@every_plan
def test_a_vocabulary_of_one_is_certain(small: None, plan: str) -> None:
    case = suited(draw(v=1, k=2, dtype=torch.float32), plan)
    out = compute(case, plan)
    assert (out == 0).all()
    assert all(x.abs().max() < 1e-6 for x in gradients(case, out))


def test_entropy_of_flat_and_of_certain_tokens(small: None) -> None:
    hidden, weight = torch.tensor([[0.0], [1e4]]), torch.linspace(-1, 1, 41)[:, None]
    _, entropy = linear_logprobs(hidden, weight, torch.tensor([0, 40]), return_entropy=True)
    torch.testing.assert_close(entropy, torch.tensor([math.log(41), 0.0]), atol=1e-5, rtol=0)


@every_plan
def test_a_factor_on_the_gradient_is_a_factor_on_the_result(small: None, plan: str) -> None:
    case = suited(draw(), plan)
    once = gradients(case, compute(case, plan))
    for factor in (0.0, -3.0, 1e-6):
        got = gradients(case, compute(case, plan), factor * case.g)
        for a, b in zip(got, once):
            torch.testing.assert_close(a, factor * b, atol=1e-12, rtol=1e-9)


@every_plan
def test_the_same_call_gives_the_same_bits(small: None, plan: str) -> None:
    case = suited(draw(dtype=torch.float32), plan)
    first, second = compute(case, plan), compute(case, plan)
    assert torch.equal(first, second)
    assert all(map(torch.equal, gradients(case, first), gradients(case, second)))


@every_plan
def test_backward_may_run_again_and_leaves_the_inputs_alone(small: None, plan: str) -> None:
    case = suited(draw(), plan)
    before = [x.detach().clone() for x in case.inputs]
    out = compute(case, plan)
    first = gradients(case, out, retain_graph=True)
    kept = [x.clone() for x in first]
    second = gradients(case, out, retain_graph=True)
    for a, b, c in zip(first, second, kept):
        torch.testing.assert_close(b, a, atol=1e-12, rtol=0)
        assert torch.equal(a, c)
        b.zero_()  # the caller may overwrite its gradient
    assert all(map(torch.equal, gradients(case, out), kept))
    assert all(map(torch.equal, case.inputs, before))


@every_plan
def test_there_is_no_second_derivative(small: None, plan: str) -> None:
    case = suited(draw(), plan)
    for g in (case.g, case.g.clone().requires_grad_()):
        with pytest.raises(RuntimeError, match="second derivative"):
            gradients(case, compute(case, plan), g, create_graph=True)


# Rows


@every_plan
@pytest.mark.parametrize("k", [None, 2])
def test_unwanted_rows_have_no_effect(small: None, plan: str, k: int | None) -> None:
    case = suited(draw(k=k, biased=True), plan)
    rows = torch.arange(37) % 3 != 0
    poisoned = case.hidden.detach().clone()
    poisoned[~rows] = torch.tensor([math.nan, math.inf, -math.inf] * 4, dtype=torch.float64)
    poisoned.requires_grad_()
    there = case._replace(hidden=poisoned)
    out = compute(there, plan, rows=rows)
    assert (out[~rows] == 0).all()
    few = case._replace(hidden=case.hidden.detach()[rows].requires_grad_(), targets=case.targets[rows], g=case.g[rows])
    alone = compute(few, plan)
    torch.testing.assert_close(out[rows], alone, atol=1e-12, rtol=0)
    (d_hidden, *d_head), (d_few, *d_few_head) = gradients(there, out), gradients(few, alone)
    assert (d_hidden[~rows] == 0).all()
    torch.testing.assert_close(d_hidden[rows], d_few, atol=1e-12, rtol=0)
    for a, b in zip(d_head, d_few_head):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_entropy_of_wanted_rows(small: None) -> None:
    case, rows = draw(), torch.arange(37) < 20
    _, entropy = compute(case, "tiled", rows=rows, return_entropy=True)
    _, of_all = compute(case, "tiled", return_entropy=True)
    torch.testing.assert_close(entropy, of_all * rows, atol=1e-12, rtol=0)


@every_plan
def test_no_rows_at_all(small: None, plan: str) -> None:
    """With a mask of zeros, and without tokens."""
    case = suited(draw(biased=True), plan)
    out = compute(case, plan, rows=torch.zeros(37, dtype=torch.bool))
    assert out.shape == (37,) and (out == 0).all()
    assert all((x == 0).all() for x in gradients(case, out))
    empty = case._replace(hidden=case.hidden.detach()[:0].requires_grad_(), targets=case.targets[:0], g=case.g[:0])
    out = compute(empty, plan)
    assert out.shape == (0,)
    assert [x.shape for x in gradients(empty, out)] == [x.shape for x in empty.inputs]
    assert all((x == 0).all() for x in gradients(empty, compute(empty, plan)))


@every_plan
def test_rows_without_gradient_get_exact_zeros_and_touch_nothing(small: None, plan: str) -> None:
    case = suited(draw(k=2), plan)
    dead = torch.arange(37) % 4 != 1
    case.g[dead] = 0
    spared = gradients(case, compute(case, plan))
    assert (spared[0][dead] == 0).all() and (spared[0][~dead] != 0).any(1).all()
    assert relative_error(spared, gradients(case, expected(case))) < 1e-12
    poisoned = case.hidden.detach().clone()
    poisoned[dead] = math.inf
    there = case._replace(hidden=poisoned.requires_grad_())
    got = gradients(there, compute(there, plan))
    assert (got[0][dead] == 0).all()
    for a, b in zip(got, spared):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@every_plan
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_gradient_at_all_gives_zeros(small: None, plan: str, dtype: torch.dtype) -> None:
    case = suited(draw(dtype=dtype, biased=True), plan)
    case.g.zero_()
    assert all((x == 0).all() for x in gradients(case, compute(case, plan)))


@pytest.mark.parametrize("plan", RECOMPUTING)
def test_a_row_with_an_entropy_gradient_alone_is_reached(small: None, plan: str) -> None:
    case = draw()
    _, entropy = compute(case, plan, return_entropy=True)
    d_entropy = (torch.arange(37) == 5).double()
    d_hidden, _ = torch.autograd.grad(entropy, case.inputs, d_entropy)
    assert d_hidden[5].abs().sum() > 0 and (d_hidden[d_entropy == 0] == 0).all()


# Costs of the plans: one product of matrices is 2·N·D·V operations

COST = {"auto": 3, "tiled": 4, "saved": 3, "separable": 3, "frozen": 2}


@pytest.mark.parametrize("plan", COST)
def test_products_of_matrices(small: None, plan: str) -> None:
    case = suited(draw(), plan)
    one, budget = 2 * 37 * 12 * 83, {"memory_budget": 1e9} if plan == "auto" else {}
    with CostTracker() as tracker:
        out = compute(case, plan, **budget)
        gradients(case, out)
    assert tracker.operations == COST[plan] * one


@pytest.mark.parametrize("plan", COST)
def test_rows_without_gradient_cost_nothing_in_the_backward_pass(small: None, plan: str) -> None:
    """Unwanted rows are in no product. Rows without gradient are in those of the forward pass alone."""
    case = suited(draw(), plan)
    rows = torch.arange(37) < 9
    case.g[~rows] = 0
    one, budget = 2 * 12 * 83, {"memory_budget": 1e9} if plan == "auto" else {}
    with CostTracker() as tracker:
        gradients(case, compute(case, plan, rows=rows, **budget))
    assert tracker.operations == COST[plan] * 9 * one
    with CostTracker() as tracker:
        gradients(case, compute(case, plan, **budget))
    forward = 2 if plan == "frozen" else 1
    assert tracker.operations == (forward * 37 + (COST[plan] - forward) * 9) * one


def test_auto_takes_the_plan_with_the_fewest_products(small: None) -> None:
    def operations(case: Case, **options: Any) -> float:
        with CostTracker() as tracker:
            out = compute(case, "auto", **options)
            if out.requires_grad:
                gradients(case, out)
        return tracker.operations / (2 * 37 * 12 * 83)

    case = draw()
    assert operations(freeze(case)) == 2
    assert operations(freeze(case), memory_budget=0) == 2
    assert operations(case, gradient=lambda _, index: case.g[index]) == 3
    costs = [operations(case, memory_budget=budget) for budget in (0, 4000, 12000, math.inf)]
    assert costs[0] == 4 and costs == sorted(costs, reverse=True) and len(set(costs)) == 4 and costs[-1] == 3
    with torch.no_grad():
        assert operations(case, memory_budget=1e9) == 1
    assert operations(case._replace(hidden=case.hidden.detach(), weight=case.weight.detach())) == 1


def test_auto_keeps_as_many_bytes_of_logits_as_the_inputs_take(small: None) -> None:
    """The inputs have 3·(16 + 200) = 648 numbers, so two tiles of 16 × 20 are kept."""
    case = draw(n=16, d=3, v=200)
    size, tile = 8 * 648, 8 * 320

    def operations(**options: Any) -> float:
        with CostTracker() as tracker:
            gradients(case, compute(case, "auto", **options))
        return tracker.operations

    costs = [operations(memory_budget=budget) for budget in (size - tile, size, size + tile)]
    assert operations() == costs[1] and costs == sorted(set(costs), reverse=True)


def test_auto_with_the_entropy_of_a_frozen_head(small: None) -> None:
    case = freeze(draw())
    logprobs, entropy = compute(case, "auto", return_entropy=True)
    p = definition(case)
    want = torch.autograd.grad((expected(case) * case.g).sum() - (p.exp() * p).sum(), case.inputs)
    assert relative_error(torch.autograd.grad((logprobs * case.g).sum() + entropy.sum(), case.inputs), want) < 1e-12


@pytest.mark.parametrize("plan, each", [("tiled", 5), ("saved", 83 + 5), ("frozen", 12 + 1)])
def test_the_floats_that_a_plan_keeps(small: None, plan: str, each: int) -> None:
    """Per token, besides its logprob: a float for each of ceil(83 / 20) tiles, and a few more for indices."""
    case = suited(draw(), plan)
    with CostTracker() as tracker:
        out = compute(case, plan)
        kept = tracker.alive / 8 - out.numel()
    assert each <= kept / 37 <= each + 2


@pytest.mark.parametrize("plan", OPTIONS)
def test_nothing_is_kept_without_gradients(small: None, plan: str) -> None:
    case = draw()
    with torch.no_grad(), CostTracker() as tracker:
        out = compute(case, plan)
        assert tracker.alive == out.nbytes
    assert not out.requires_grad


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("knobs", KNOBS)
def test_the_logits_never_exist(small: None, entropy: bool, knobs: str) -> None:
    """At its peak the tiled plan holds the gradients and a few tiles, much less than the [N, V] logits."""
    case = draw(n=100, d=2, v=200, **KNOBS[knobs])
    with CostTracker() as tracker:
        out = compute(case, "tiled", return_entropy=entropy)
        logprobs = out[0] if entropy else out
        gradients(case, logprobs)
    outputs, tile, column = sum(x.nbytes for x in case.inputs), 16 * 20 * 8, 100 * 8
    each = 10 * column  # a float for each token and tile: log Σ exp, the tile's probability and, for the entropy, Σ q·z
    assert tracker.largest <= each
    assert tracker.peak <= 2 * outputs + 5 * tile + 3 * each + 12 * column < 100 * 200 * 8 / 2


def test_the_budget_is_kept(small: None) -> None:
    case, peaks = draw(n=100, d=2, v=200), []
    for budget in (0, 40_000, 120_000):
        with CostTracker() as tracker:
            gradients(case, compute(case, "auto", memory_budget=budget))
        peaks.append(tracker.peak)
    assert 20_000 <= peaks[1] - peaks[0] <= 40_000
    assert 100_000 <= peaks[2] - peaks[0] <= 120_000


# The separable plan


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("step", [1, 3])
def test_separable_gives_the_gradient_of_the_loss(small: None, k: int | None, step: int) -> None:
    """For Σ (logprob − goal)² over some of the tokens; ``gradient`` gets logprobs in the shape of the targets."""
    case, rows = draw(k=k), torch.arange(37) % step == 0
    goal = torch.linspace(-4, 0, case.targets.numel(), dtype=torch.float64).view_as(case.targets)

    def gradient(logprobs: Tensor, index: Any) -> Tensor:
        assert logprobs.shape == goal[index].shape and not logprobs.requires_grad
        return 2 * (logprobs - goal[index])

    def loss(logprobs: Tensor) -> Tensor:
        return (logprobs - goal)[rows].square().sum()

    out = compute(case, "separable", gradient=gradient, rows=None if step == 1 else rows)
    got = torch.autograd.grad(loss(out), case.inputs)
    assert relative_error(got, torch.autograd.grad(loss(expected(case)), case.inputs)) < 1e-12


def test_separable_refuses_another_gradient_than_was_declared(small: None) -> None:
    case = draw()
    other = case.g.clone()
    other[5] += 1e-2
    for g in (other, torch.ones_like(case.g)):
        with pytest.raises(RuntimeError, match="another gradient"):
            gradients(case, compute(case, "separable"), g)
    with pytest.raises(RuntimeError, match="another gradient"):
        gradients(case, compute(case, "separable", gradient=lambda lp, _: torch.zeros_like(lp)))
    for wrong in (math.nan, math.inf):
        with pytest.raises(RuntimeError, match="another gradient"):
            gradients(case, compute(case, "separable"), torch.full_like(case.g, wrong))


def test_separable_holds_as_many_logits_as_the_budget_allows(small: None) -> None:
    case, peaks = draw(n=50, d=2, v=200), []
    for budget in (4 * 200 * 8, 24 * 200 * 8, math.inf):
        with CostTracker() as tracker:
            gradients(case, compute(case, "separable", memory_budget=budget))
        peaks.append(tracker.peak)
    assert 15 * 200 * 8 < peaks[1] - peaks[0] < 24 * 200 * 8 and peaks[2] > peaks[1]


# Inputs of other shapes and dtypes


@every_plan
def test_memory_layout_does_not_matter(small: None, plan: str) -> None:
    case = draw(k=2, biased=True)
    scattered = Case(
        case.hidden.detach().T.contiguous().T.requires_grad_(),
        torch.stack([case.weight.detach(), case.weight.detach()], 2)[:, :, 1].requires_grad_(),
        torch.stack([case.bias.detach()] * 2, 1)[:, 0].requires_grad_() if case.bias is not None else None,
        case.targets.T.contiguous().T,
        case.g.T.contiguous().T,
        {},
    )
    assert not scattered.hidden.is_contiguous() and not scattered.weight.is_contiguous()
    case, scattered = suited(case, plan), suited(scattered, plan)
    out, want = compute(scattered, plan), compute(case, plan)
    torch.testing.assert_close(out, want, atol=1e-12, rtol=0)
    for a, b in zip(gradients(scattered, out), gradients(case, want)):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    expanded = case.g[:, :1].expand(37, 2)
    if plan != "separable":
        assert (
            relative_error(gradients(case, compute(case, plan), expanded), gradients(case, expected(case), expanded))
            < 1e-12
        )


@every_plan
@pytest.mark.parametrize("of_hidden, of_weight", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_hidden_states_are_taken_in_the_dtype_of_the_weight(
    small: None, plan: str, of_hidden: str, of_weight: str
) -> None:
    case = suited(draw(dtype=getattr(torch, of_weight), biased=True), plan)
    other = case._replace(hidden=case.hidden.detach().to(getattr(torch, of_hidden)).requires_grad_())
    same = case._replace(hidden=other.hidden.detach().to(case.weight.dtype).requires_grad_())
    out, want = compute(other, plan), compute(same, plan)
    assert out.dtype == torch.float32 and torch.equal(out, want)
    for x, a, b in zip(other.inputs, gradients(other, out), gradients(same, want)):
        assert a.dtype == x.dtype
        assert torch.equal(a, b.to(x.dtype))


@every_plan
def test_autocast_sets_the_dtype_of_the_product(small: None, plan: str) -> None:
    case = suited(draw(dtype=torch.float32), plan)
    with torch.autocast("cpu", torch.bfloat16):
        out = compute(case, plan)
    half = case._replace(hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16())
    assert torch.equal(out, compute(half, plan))
    assert all(x.dtype == torch.float32 for x in gradients(case, out))


@every_plan
def test_autocast_around_the_backward_pass_has_no_effect(small: None, plan: str) -> None:
    """The products have the dtypes of the forward pass, wherever ``backward`` is called."""
    case = suited(draw(k=3, dtype=torch.float32), plan)
    outside = gradients(case, compute(case, plan))
    out = compute(case, plan)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradients(case, out)
    assert all(map(torch.equal, inside, outside))


@every_plan
def test_gradients_arrive_through_the_graph_around_it(small: None, plan: str) -> None:
    """With a leaf below hidden, a tied weight, and a loss above."""
    case = draw(v=37)
    leaf = case.weight.detach().clone().requires_grad_()
    frozen = plan == "frozen"

    def loss(f: Callable[[Case], Tensor]) -> Tensor:
        tied = case._replace(hidden=torch.tanh(leaf) * 2, weight=leaf.detach() if frozen else leaf)
        return (f(tied) * case.g).sum()

    (got,) = torch.autograd.grad(loss(lambda c: compute(c, plan)), leaf)
    (want,) = torch.autograd.grad(loss(expected), leaf)
    assert relative_error([got], [want]) < 1e-12


# Refusals

H, W, Y = torch.zeros(3, 2), torch.zeros(5, 2), torch.tensor([0, 1, 4])

WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "hidden of three axes": ("hidden", {"hidden": torch.zeros(1, 3, 2)}),
    "hidden that is a list": ("hidden", {"hidden": [[0.0, 1.0]]}),
    "hidden of ids": ("hidden", {"hidden": torch.zeros(3, 2, dtype=torch.long)}),
    "weight of one axis": ("weight", {"weight": torch.zeros(2)}),
    "weight of another width": ("weight", {"weight": torch.zeros(5, 3)}),
    "weight of ids": ("weight", {"weight": torch.zeros(5, 2, dtype=torch.int32)}),
    "too few targets": ("targets", {"targets": Y[:2]}),
    "targets of three axes": ("targets", {"targets": Y.view(3, 1, 1)}),
    "targets of int32": ("targets", {"targets": Y.int()}),
    "float targets": ("targets", {"targets": Y.float()}),
    "a negative id": ("targets", {"targets": torch.tensor([0, -100, 1])}),
    "an id past the end": ("targets", {"targets": torch.tensor([0, 5, 1])}),
    "bias of another length": ("bias", {"bias": torch.zeros(4)}),
    "bias that is a list": ("bias", {"bias": [0.0] * 5}),
    "bias of -inf, which could fill a tile": ("bias", {"bias": torch.full((5,), -math.inf)}),
    "bias outside the range of float16": (
        "bias",
        {"hidden": torch.zeros(3, 2).half(), "weight": torch.zeros(5, 2).half(), "bias": torch.full((5,), -1e30)},
    ),
    "bias of a column": ("bias", {"bias": torch.zeros(5, 1)}),
    "rows of another length": ("rows", {"rows": torch.ones(2, dtype=torch.bool)}),
    "rows that are a list": ("rows", {"rows": [True, False, True]}),
    "rows that are indices": ("rows", {"rows": torch.arange(3)}),
    "temperature 0": ("temperature", {"temperature": 0.0}),
    "temperature below 0": ("temperature", {"temperature": -1.0}),
    "temperature nan": ("temperature", {"temperature": math.nan}),
    "temperature of text": ("temperature", {"temperature": "1"}),
    "softcap 0": ("softcap", {"softcap": 0.0}),
    "softcap infinite": ("softcap", {"softcap": math.inf}),
    "no values": ("hidden", {"hidden": torch.empty(5, 3, device="meta")}),
    "budget below 0": ("memory_budget", {"memory_budget": -1}),
    "an unknown plan": ("plan", {"plan": "tilde"}),
    "separable without a gradient": ("gradient", {"plan": "separable"}),
    "a gradient for another plan": ("gradient", {"plan": "tiled", "gradient": lambda lp, _: lp}),
    "frozen with a weight that requires grad": ("weight", {"plan": "frozen", "weight": W.clone().requires_grad_()}),
    "frozen with the entropy": ("return_entropy", {"plan": "frozen", "return_entropy": True}),
    "frozen with squares": ("return_sum_square_probs", {"plan": "frozen", "return_sum_square_probs": True}),
    "a declared gradient with the entropy": ("return_entropy", {"gradient": lambda x, _: x, "return_entropy": True}),
    "separable with the entropy": (
        "return_entropy",
        {"plan": "separable", "gradient": lambda lp, _: lp, "return_entropy": True},
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_do_not_fit_are_refused(name: str) -> None:
    field, wrong = WRONG[name]
    arguments = {"hidden": H, "weight": W, "targets": Y} | wrong
    with pytest.raises(LossInputError) as caught:
        linear_logprobs(**arguments)
    assert caught.value.field == field


def test_the_error_for_a_misspelt_plan_suggests_the_right_one() -> None:
    with pytest.raises(LossInputError, match="tiled"):
        linear_logprobs(H, W, Y, plan="tield")


def test_the_error_for_a_masked_target_names_rows() -> None:
    with pytest.raises(LossInputError, match="rows="):
        linear_logprobs(H, W, torch.tensor([0, -100, 1]), rows=torch.tensor([True, False, True]))
