"""``linear_logprobs`` with a low-rank adapter of the head, against the sum of weight and adapter in float64."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_linear import OPTIONS, CostTracker, draw, expected, relative_error, shrink, small
from torch import Tensor

from lossfns import LossInputError
from lossfns.logprobs.head import head_of
from lossfns.logprobs.linear import linear_logprobs, model_outputs

__all__ = ["small"]

SCALE = 0.7
PARTS = ("hidden", "weight", "bias", "a", "b")


def leaves_of(case: Any, rank: int = 3, trained: str = "hidden a b", dtype: torch.dtype | None = None) -> Any:
    """Return the tensors of a case by name, with factors of an adapter in ``dtype``; those named require grad."""
    generator = torch.Generator().manual_seed(1)
    (vocabulary, width), dtype = case.weight.shape, dtype or case.weight.dtype
    a, b = (torch.randn(shape, generator=generator).to(dtype) / 3 for shape in ((rank, width), (vocabulary, rank)))
    given = dict(zip(PARTS, (case.hidden, case.weight, case.bias, a, b)))
    return {
        name: x.detach().clone().requires_grad_(name in trained.split()) for name, x in given.items() if x is not None
    }


def whole(case: Any, leaves: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logprobs of one weight, W + scale·b·a, and the leaves, in float64."""
    double = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in leaves.items()}
    weight = double["weight"] + SCALE * double["b"] @ double["a"]
    return expected(case._replace(hidden=double["hidden"], weight=weight, bias=double.get("bias"))), double


def compute(case: Any, leaves: dict[str, Tensor], plan: str, **more: Any) -> Any:
    options = OPTIONS[plan] | case.knobs | more
    if options.get("plan") == "separable":
        options["gradient"] = lambda _, index: case.g[index]
    hidden, weight, bias, a, b = (leaves.get(name) for name in PARTS)
    return linear_logprobs(hidden, weight, case.targets, bias=bias, adapter=(a, b, SCALE), **options)  # type: ignore[arg-type]


def gradients(leaves: dict[str, Tensor], out: Tensor, g: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, [x for x in leaves.values() if x.requires_grad], g.to(out.dtype)))


def error(case: Any, plan: str, trained: str) -> float:
    """Return the largest relative error of logprobs and gradients."""
    leaves = leaves_of(case, trained=trained)
    out, (reference, double) = compute(case, leaves, plan), whole(case, leaves)
    assert out.shape == case.targets.shape
    found, want = gradients(leaves, out, case.g), gradients(double, reference, case.g)
    assert [x.shape for x in found] == [x.shape for x in want]
    return relative_error([out, *found], [reference, *want])


def test_values_and_gradients_are_those_of_one_weight(small: None) -> None:
    """In every plan, with and without a bias, softcap and temperature, for one target and several."""
    knobs: tuple[dict[str, Any], ...] = ({}, {"biased": True, "temperature": 1.3, "softcap": 3.0})
    trained = ("hidden a b", "hidden weight bias a b", "b", "a", "hidden")
    for plan, options, k, names in itertools.product(OPTIONS, knobs, (None, 3), trained):
        if plan == "frozen" and ("b" in names.split() or "weight" in names):
            continue
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            found = error(draw(k=k, dtype=dtype, **options), plan, names)
            assert found <= bound, f"{plan}, {options}, K = {k}, {dtype}, trained: {names}: {found:.1e}"


def test_bfloat16_has_the_rounding_of_the_layer_of_peft() -> None:
    """Which computes h·Wᵀ in bfloat16, adds s·(h·aᵀ)·bᵀ in float32 and rounds. Here b and h·aᵀ are rounded as well."""
    for plan, scale in itertools.product(("auto", "tiled", "saved", "separable"), (1.0, 8.0)):
        case = draw(n=64, d=48, v=9000, scale=scale, dtype=torch.bfloat16)
        leaves = leaves_of(case, dtype=torch.float32)
        reference, double = whole(case, leaves)
        hidden, weight, _, a, b = (leaves.get(name) for name in PARTS)
        logits = (hidden @ weight.T + SCALE * (hidden.float() @ a.T) @ b.T).bfloat16()  # type: ignore[union-attr]
        naive = logits.float().log_softmax(1)[torch.arange(64), case.targets]
        out = compute(case, leaves, plan)
        exact = [reference, *gradients(double, reference, case.g)]
        ours, naives = ([x, *gradients(leaves, x, case.g)] for x in (out, naive))
        for name, got, plain, want in zip(("logprobs", "hidden", "a", "b"), ours, naives, exact, strict=True):
            errors = relative_error([got], [want]), relative_error([plain], [want])
            assert errors[0] <= 2 * errors[1], f"{plan}, {scale}, {name}: {errors}"


def test_entropy_rows_and_autocast(small: None) -> None:
    case, rows = draw(k=2), torch.arange(37) % 3 != 0
    leaves = leaves_of(case)
    _, entropy, squares = compute(case, leaves, "auto", return_entropy=True, return_sum_square_probs=True)
    z = leaves["hidden"] @ (leaves["weight"] + SCALE * leaves["b"] @ leaves["a"]).T
    log_p = z.log_softmax(1)
    exact = -(log_p.exp() * log_p).sum(1), (2 * log_p).exp().sum(1)
    found = gradients(leaves, entropy + squares, torch.ones(37))
    assert relative_error(found, gradients(leaves, sum(exact), torch.ones(37))) < 1e-12  # type: ignore[arg-type]
    out, reference = compute(case, leaves, "saved", rows=rows), whole(case, leaves)[0]
    assert not out[~rows].any() and torch.allclose(out[rows], reference[rows], atol=1e-12, rtol=0)
    single = draw(dtype=torch.float32)
    leaves = leaves_of(single)
    with torch.autocast("cpu", torch.bfloat16):
        out = compute(single, leaves, "tiled")
    narrow = leaves | {name: leaves[name].bfloat16() for name in ("hidden", "weight")}
    assert torch.equal(out, compute(single, narrow, "tiled"))


def test_a_frozen_weight_costs_one_product_less_and_no_tensor_of_its_size() -> None:
    """Products of N·D·V besides the narrow ones of the adapter; with rank 1, these are few."""
    case = draw(n=32, d=40, v=9000, dtype=torch.bfloat16)
    leaves, one = leaves_of(case, rank=1), 2 * 32 * 40 * 9000
    for plan, products in (("tiled", 3), ("saved", 2), ("separable", 2)):
        with CostTracker() as tracker:
            gradients(leaves, compute(case, leaves, plan), case.g)
        assert products <= tracker.operations / one < products + 0.2, plan
        assert tracker.largest < leaves["weight"].nbytes, plan
    assert leaves["weight"].grad is None


def test_auto_keeps_as_many_bytes_of_logits_as_the_gradients_take(small: None) -> None:
    """With 16 tokens of width 3 and a rank of 5: hidden and u take 16·8 numbers, b takes 200·5, a tile takes 320."""
    case = draw(n=16, d=3, v=200)
    leaves = leaves_of(case, rank=5)

    def operations(**options: Any) -> float:
        with CostTracker() as tracker:
            gradients(leaves, compute(case, leaves, "auto", **options), case.g)
        return tracker.operations

    costs = [operations(memory_budget=8 * tiles * 320) for tiles in (2, 3, 4)]
    assert operations() == costs[1] and costs == sorted(set(costs), reverse=True)


def test_a_model_with_a_factored_head_never_adds_the_two() -> None:
    """Its ``head`` would be their sum, so asking for it is an error here."""

    class Model:
        head_bias, head_temperature, head_softcap = None, 1.3, 3.0

        @property
        def factored_head(self) -> Any:
            return leaves["weight"], (leaves["a"], leaves["b"], SCALE)

        @property
        def head(self) -> Tensor:
            raise AssertionError("the sum was asked for")

    case = draw(k=2, temperature=1.3, softcap=3.0)
    leaves = leaves_of(case)
    (out,), (reference, double) = model_outputs(Model(), leaves["hidden"], case.targets, (), ()), whole(case, leaves)
    assert relative_error(gradients(leaves, out, case.g), gradients(double, reference, case.g)) < 1e-12
    logits = head_of(Model()).logits(leaves["hidden"])
    weight = leaves["weight"] + SCALE * leaves["b"] @ leaves["a"]
    one = SimpleNamespace(head=weight, head_temperature=1.3, head_softcap=3.0)
    torch.testing.assert_close(logits, head_of(one).logits(leaves["hidden"]), atol=1e-12, rtol=0)


@pytest.mark.exhaustive
def test_in_a_compiled_function_it_is_the_same() -> None:
    case = draw(n=5, v=20, dtype=torch.float32)
    leaves = leaves_of(case)
    step = torch.compile(lambda: (compute(case, leaves, "tiled") * case.g).sum(), backend="eager")
    trained = [leaves[name] for name in ("hidden", "a", "b")]
    found = torch.autograd.grad(step(), trained)
    want = torch.autograd.grad((compute(case, leaves, "tiled") * case.g).sum(), trained)
    assert all(map(torch.equal, found, want))


def test_what_is_no_adapter_of_the_weight_is_refused() -> None:
    hidden, weight, targets = torch.zeros(3, 2), torch.zeros(5, 2), torch.tensor([0, 1, 4])
    a, b = torch.zeros(1, 2), torch.zeros(5, 1)
    wrong: dict[str, tuple[Any, str]] = {
        "a pair": ((a, b), "adapter: expected"),
        "a list": ([a, b, 1.0], "adapter: expected"),
        "factors the wrong way round": ((b, a, 1.0), "got shapes (5, 1) and (1, 2)"),
        "another width": ((torch.zeros(1, 3), b, 1.0), "got shapes (1, 3) and (5, 1)"),
        "another rank": ((a, torch.zeros(5, 2), 1.0), "got shapes (1, 2) and (5, 2)"),
        "ids": ((a.long(), b, 1.0), "got torch.int64"),
        "on the meta device": ((a, b.to("meta"), 1.0), "got one on meta"),
        "scale nan": ((a, b, math.nan), "scale: expected a finite number"),
        "scale a tensor": ((a, b, torch.ones(2)), "scale: expected a finite number"),
    }
    for name, (adapter, text) in wrong.items():
        with pytest.raises(LossInputError) as caught:
            linear_logprobs(hidden, weight, targets, adapter=adapter)
        assert text in str(caught.value), name
    with pytest.raises(LossInputError, match="frozen head"):
        linear_logprobs(hidden, weight, targets, adapter=(a, b.requires_grad_(), 1.0), plan="frozen")


def test_no_token_at_all_and_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    for plan, n in itertools.product(OPTIONS, (0, 1)):
        case = draw(n=n, v=21)
        leaves = leaves_of(case, trained="hidden" if plan == "frozen" else "hidden a b")
        out = compute(case, leaves, plan)
        found = gradients(leaves, out, case.g)
        reference, double = whole(case, leaves) if n else (leaves["hidden"].sum() + leaves["b"].sum() * 0, leaves)
        want = gradients(double, reference, case.g) if n else [torch.zeros_like(x) for x in found]
        for x, y in zip([out.reshape(-1), *found], [reference.reshape(-1)[:n], *want], strict=True):
            torch.testing.assert_close(x, y, atol=1e-12, rtol=0, msg=f"{plan}, {n} tokens")
