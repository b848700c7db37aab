"""``target_logprobs``: exact value and gradient, in blocks, from views, in every dtype."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lossfns import LossInputError, target_logprobs
from lossfns.logprobs import target


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (2, 1, 3, 5), (0, 5)])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_value_and_gradient_are_those_of_log_softmax(shape: tuple[int, ...], temperature: float) -> None:
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, shape[-1], shape[:-1])
    found = target_logprobs(logits, targets, temperature=temperature)
    expected = (logits / temperature).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    torch.testing.assert_close(found, expected)
    g = torch.randn(shape[:-1], dtype=torch.float64)
    (a,), (b,) = (torch.autograd.grad(x, logits, g) for x in (found, expected))
    torch.testing.assert_close(a, b)


def test_entropy_and_sum_of_squares_are_those_of_the_softmax_with_their_gradients() -> None:
    """Each alone, and all with the logprobs; rows of two leading dimensions, and of a view."""
    whole = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    for logits in (whole, whole[:, :-1]):
        targets = torch.randint(0, 7, logits.shape[:-1])
        lp = (logits / 0.7).log_softmax(-1)
        expected = [lp.gather(-1, targets[..., None])[..., 0], -(lp.exp() * lp).sum(-1), (2 * lp).exp().sum(-1)]
        for asked in ((True, False), (False, True), (True, True)):
            options = dict(zip(("return_entropy", "return_sum_square_probs"), asked))
            found = target_logprobs(logits, targets, temperature=0.7, **options)
            want = [expected[0], *(x for x, y in zip(expected[1:], asked) if y)]
            torch.testing.assert_close(list(found), want)
            g = [torch.randn_like(x) for x in want]
            for of in ([*range(len(want))], [len(want) - 1]):
                a, b = (torch.autograd.grad([x[i] for i in of], whole, [g[i] for i in of], retain_graph=True)
                        for x in (found, want))  # fmt: skip
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_logits_give_float32(dtype: torch.dtype) -> None:
    logits = (4 * torch.randn(7, 50)).to(dtype).requires_grad_()
    targets = torch.randint(0, 50, (7,))
    found = target_logprobs(logits, targets)
    expected = logits.float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == dtype


class Sizes(TorchDispatchMode):
    """Record the sizes in bytes of the results of operations in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.made.append(result.numel() * result.element_size())
        return result


def test_no_copy_of_the_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even of a view: no float32 tensor has more than a block of rows."""
    monkeypatch.setattr(target, "row_blocks", lambda x: (slice(i, i + 2) for i in range(0, len(x), 2)))
    whole = torch.randn(2, 33, 64, dtype=torch.bfloat16)
    logits = whole[:, :-1].detach().requires_grad_()
    targets = torch.randint(0, 64, (2, 32))
    with Sizes() as forward:
        logprobs = target_logprobs(logits, targets)
    assert max(forward.made) <= 2 * 64 * 4
    g = torch.rand(2, 32)
    with Sizes() as backward:
        logprobs.backward(g)
    assert max(backward.made) <= 2 * 64 * 4


def test_a_masked_row_of_infinities_gets_gradient_0() -> None:
    logits = torch.zeros(2, 3)
    logits[0] = torch.nan
    logits.requires_grad_()
    logprobs = target_logprobs(logits, torch.tensor([0, 1]))
    torch.where(torch.tensor([False, True]), logprobs, 0).sum().backward()
    assert logits.grad is not None and logits.grad[0].tolist() == [0, 0, 0] and logits.grad[1].isfinite().all()
    outputs = target_logprobs(logits, torch.tensor([0, 1]), return_entropy=True, return_sum_square_probs=True)
    logits.grad = None
    sum(torch.where(torch.tensor([False, True]), x, 0).sum() for x in outputs).backward()
    assert logits.grad[0].tolist() == [0, 0, 0] and logits.grad[1].isfinite().all()


def test_a_block_spans_many_short_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    logsumexp = torch.Tensor.logsumexp

    def counted(x: torch.Tensor, dim: int) -> torch.Tensor:
        calls.append(tuple(x.shape))
        return logsumexp(x, dim)

    monkeypatch.setattr(torch.Tensor, "logsumexp", counted)
    logits, ids = torch.zeros(64, 2, 5), torch.zeros(64, 2, dtype=torch.long)
    assert target_logprobs(logits, ids).shape == (64, 2) and calls == [(128, 5)]


def test_it_is_a_part_of_a_compiled_step() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.tensor([[0, 4, 2], [1, 1, 3]])
    step = torch.compile(lambda x: target_logprobs(x, ids).square().sum(), fullgraph=True, backend="aot_eager")
    (fused,), (eager,) = (torch.autograd.grad(f(logits), logits) for f in (step, step._torchdynamo_orig_callable))
    torch.testing.assert_close(fused, eager)


LOGITS, IDS = torch.zeros(2, 3), torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (([[0.0]], IDS), {}),
        ((LOGITS.long(), IDS), {}),
        ((LOGITS, IDS.float()), {}),
        ((LOGITS, IDS[:1]), {}),
        ((LOGITS, IDS + 1), {}),
        ((LOGITS, IDS - 100), {}),
        ((LOGITS, IDS), {"temperature": 0.0}),
        ((LOGITS, IDS), {"temperature": float("nan")}),
    ],
)
def test_what_does_not_fit_is_refused(args: Any, options: Any) -> None:
    with pytest.raises(LossInputError):
        target_logprobs(*args, **options)
