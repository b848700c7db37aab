"""``linear_logprobs`` on a device: every plan gives logprobs and gradients of the CPU, in one tile and in many."""

import math
from typing import Any

import pytest
import torch
from accelerator import DEVICE, REHEARSED, assert_same, on_device, recorded_waits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lossfns import LossInputError, target_logprobs
from lossfns.logprobs import plans, target, tiles
from lossfns.logprobs.linear import linear_logprobs

N, D, V, K = 40, 6, 50, 3
PLANS: dict[str, dict[str, Any]] = {
    "auto": {},
    "tiled": {"plan": "tiled"},
    "saved": {"plan": "saved"},
    "some tiles saved": {"memory_budget": 4000},
    "with entropy": {"return_entropy": True},
    "frozen": {"plan": "frozen"},
    "separable": {"plan": "separable"},
}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "with all options": {"biased": True, "adapted": True, "softcap": 4.0, "temperature": 0.8},
}

every_plan = pytest.mark.parametrize("plan", PLANS)


@pytest.fixture(autouse=True, params=["one tile", "many tiles"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many tiles":
        sizes = {"TILE_TOKENS": 16, "TILE_VOCAB": 20, "BLOCK_LOGITS": 140}
        for module in (plans, tiles):
            for name in sizes.keys() & vars(module).keys():
                monkeypatch.setattr(module, name, sizes[name])
        monkeypatch.setattr(plans, "SEPARABLE_TOKENS", 8)


def draw(dtype: torch.dtype = torch.float32, several: bool = False) -> dict[str, Tensor]:
    g = torch.Generator("cpu").manual_seed(0)
    targets = torch.randint(V, (N, K) if several else (N,), generator=g)
    if several:
        targets[::3, 1] = targets[::3, 0]  # the same target twice
    return {
        "hidden": torch.randn(N, D, generator=g).to(dtype),
        "weight": torch.randn(V, D, generator=g).to(dtype),
        "bias": torch.randn(V, generator=g).to(dtype),
        "a": torch.randn(2, D, generator=g),
        "b": torch.randn(V, 2, generator=g),
        "targets": targets,
        "gradient": torch.randn(targets.shape, generator=g) * (torch.rand(targets.shape, generator=g) > 0.3),
        "rows": torch.rand(N, generator=g) > 0.4,
    }


def run(
    given: dict[str, Tensor],
    plan: str,
    *,
    selected: bool = False,
    biased: bool = False,
    adapted: bool = False,
    waits: tuple[int, int] | None = None,
    **knobs: Any,
) -> Any:
    """Return logprobs, entropy, and the gradients of the parameters; ``waits`` are those of the two passes."""
    leaves = {name: given[name].detach().requires_grad_() for name in ("hidden", "weight", "bias", "a", "b")}
    if plan == "frozen":
        leaves |= {name: given[name] for name in ("weight", "bias", "a", "b")}
    options = PLANS[plan] | knobs | ({"rows": given["rows"]} if selected else {})
    options |= {"bias": leaves["bias"]} if biased else {}
    options |= {"adapter": (leaves["a"], leaves["b"], 0.5)} if adapted else {}
    if plan == "separable":
        options["gradient"] = lambda logprobs, rows: given["gradient"][rows]
    with recorded_waits() as forward:
        result = linear_logprobs(leaves["hidden"], leaves["weight"], given["targets"], **options)
    logprobs, entropy = result if plan == "with entropy" else (result, result.new_zeros(1))
    total = (logprobs * given["gradient"]).sum() + 0.1 * entropy.sum()
    with recorded_waits() as backward:
        total.backward()
    if waits is not None:
        assert (len(forward), len(backward)) == waits, (forward, backward)
    return logprobs, entropy, [x.grad for x in leaves.values() if x.grad is not None]


@every_plan
@pytest.mark.parametrize("several", [False, True], ids=["[N]", "[N, K]"])
@pytest.mark.parametrize("head", HEADS)
def test_every_plan(plan: str, several: bool, head: str) -> None:
    given = draw(several=several)
    assert_same(run(on_device(given), plan, **HEADS[head]), run(given, plan, **HEADS[head]), 1e-5)


@every_plan
def test_selected_rows(plan: str) -> None:
    given = draw()
    assert_same(run(on_device(given), plan, selected=True), run(given, plan, selected=True), 1e-5)


@every_plan
def test_half_precision(plan: str) -> None:
    """bfloat16 has eight bits. A GPU sums a product in float32, where a CPU rounds it."""
    given = draw(torch.bfloat16)
    assert_same(run(on_device(given), plan), run(given, plan), 1e-5 if REHEARSED else 0.05)


@pytest.mark.parametrize("plan", ["auto", "tiled", "saved", "some tiles saved", "with entropy", "frozen"])
def test_the_host_waits_once_in_each_pass(plan: str) -> None:
    """For the range of the ids; and for the tokens that have a gradient, which plan frozen need not know."""
    given = on_device(draw())
    run(given, plan, biased=True)
    run(given, plan, biased=True, waits=(1, 0 if plan == "frozen" else 1))


def test_wrong_ids_and_a_wrong_bias_are_refused() -> None:
    given = on_device(draw())
    hidden, weight, targets = given["hidden"], given["weight"], given["targets"]
    with pytest.raises(LossInputError, match="ids from 1000 to 1000"):
        linear_logprobs(hidden, weight, torch.full_like(targets, 1000))
    with pytest.raises(LossInputError, match="bias"):
        linear_logprobs(hidden, weight, targets, bias=torch.full_like(given["bias"], math.inf))
    with pytest.raises(LossInputError, match=f"targets: expected a tensor on {DEVICE}, got one on cpu"):
        linear_logprobs(hidden, weight, targets.cpu())


def test_from_logits() -> None:
    given = draw()
    logits = torch.randn(2, N // 2, V, generator=torch.Generator("cpu").manual_seed(1))
    results = []
    for move in (lambda x: x, on_device):
        z, g = move(logits.clone().requires_grad_()), move(given["gradient"]).view(2, -1)
        with recorded_waits() as waits:
            logprobs = target_logprobs(z, move(given["targets"]).view(2, -1), temperature=0.5)
            logprobs.backward(g)
        results.append((logprobs, z.grad))
    assert len([w for w in waits if "accelerator" not in w]) == 0
    assert_same(results[1], results[0], 1e-5)


class Widest(TorchDispatchMode):
    """Keeps the size of the largest tensor of float32."""

    size = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        found = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor) and x.dtype == torch.float32]
        self.size = max([self.size, *found])
        return result


def test_logits_are_never_copied_to_float32_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 rows of 50 at a time, out of 40."""
    monkeypatch.setattr(target, "TILE_TOKENS", 2)
    monkeypatch.setattr(target, "TILE_VOCAB", V)
    logits = on_device(torch.randn(N, V, generator=torch.Generator("cpu").manual_seed(0)).bfloat16().requires_grad_())
    targets = on_device(draw()["targets"])
    with Widest() as widest:
        target_logprobs(logits, targets).sum().backward()
    assert widest.size == 2 * V
