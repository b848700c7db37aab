"""Attention over a layout of segments, against attention that is written out in float64 with a mask."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask
from torch.utils._python_dispatch import TorchDispatchMode

from lossfns import LossInputError
from lossfns.backend.model import attention
from lossfns.backend.model.attention import Layout, SegmentGroup, choose_cuda_route, mask_mod

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def sees(lengths: list[int], previous: list[int | None], window: int | None) -> Tensor:
    """Return [N, N], whether token i sees token j, from a list of the tokens up to each."""
    seen, up_to = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool), list[list[int]]()
    for length, token in zip(lengths, previous, strict=True):
        before = [] if token is None else up_to[token]
        for i in range(len(up_to), len(up_to) + length):
            before = [*before, i]
            seen[i, before[-window:] if window else before] = True
            up_to.append(before)
    return seen


def written_out(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None, softcap: float | None) -> Tensor:
    """Compute attention head by head, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    heads = []
    for h in range(q.shape[1]):
        group = h * k.shape[1] // q.shape[1]
        scores = q[:, h] @ k[:, group].T * (scale or q.shape[2] ** -0.5)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        exp = (scores - scores.detach().amax()).exp() * seen.to(q.device)
        heads.append(exp / exp.sum(1, keepdim=True) @ v[:, group])
    return torch.stack(heads, 1)


def draw(n: int, heads: int = 4, kv_heads: int = 2, dim: int = 16, seed: int = 0, **kind: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, heads, dim), (n, kv_heads, dim), (n, kv_heads, dim)]
    return [torch.randn(shape, generator=generator).to(**kind).requires_grad_() for shape in shapes]


def largest_difference(layout: Layout, qkv: list[Tensor], *, window: int | None = None, **options: Any) -> float:
    """Return the largest difference to ``written_out``, of the output and of the three gradients."""
    seen = sees(layout.lengths, layout.previous, window)
    ours = layout.attend(*qkv, window=window, **options)
    theirs = written_out(*qkv, seen, options.get("scale"), options.get("softcap"))
    assert ours.shape == theirs.shape and ours.dtype == qkv[0].dtype
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(ours)
    pairs = zip(*(torch.autograd.grad((x * direction).sum(), qkv) for x in (ours, theirs)))
    return max(float((a.detach().double() - b.detach()).abs().max()) for a, b in [(ours, theirs), *pairs])


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], list[int | None]]:
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    return lengths, [draw(st.sampled_from([None, *range(start)])) for start in accumulate(lengths[:-1], initial=0)]


@given(
    layouts(),
    st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    st.sampled_from([None, 1, 2, 5]),
    st.sampled_from([None, 0.5, 3.0]),
    st.sampled_from([None, 0.4]),
    st.integers(0, 99),
)
def test_any_layout_is_what_its_mask_says(
    of: tuple[list[int], list[int | None]],
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    scale: float | None,
    seed: int,
) -> None:
    qkv = draw(sum(of[0]), *heads, dim=5, seed=seed, dtype=torch.float64)
    assert largest_difference(Layout(*of), qkv, window=window, softcap=softcap, scale=scale) < 1e-12


GROUPS: tuple[list[int], list[int | None]] = ([70, 33, 9, 9, 1, 140, 5], [None, None, 69, 69, 115, 80, None])
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.1}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"window": 20}, {"softcap": 2.0}, {"window": 3, "softcap": 2.0, "scale": 0.3}])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("of", [GROUPS, ([50], [None]), ([40, 40, 40], [None] * 3)], ids=["groups", "one", "equal"])
def test_routes_agree_with_the_mask(of: Any, dtype: torch.dtype, options: dict[str, Any], device: str) -> None:
    layout = Layout(*of, device=device)
    assert largest_difference(layout, draw(sum(of[0]), device=device, dtype=dtype), **options) < TOLERANCES[dtype]
    assert layout.route == attention.choose_route(torch.device(device), dtype, 16, "softcap" in options)


def test_gradient_is_that_of_finite_differences() -> None:
    layout = Layout([3, 2, 2, 2], [None, 2, 3, None])
    qkv = draw(9, heads=2, kv_heads=1, dim=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(layout.attend, qkv)
    assert torch.autograd.gradcheck(lambda *qkv: layout.attend(*qkv, window=2, softcap=1.0), qkv)


def test_the_gradient_of_what_is_continued_is_summed_in_float32() -> None:
    """Each of 512 calls adds less than bfloat16 can add. Only the last rounding, 0.4 %, may remain."""
    lengths, previous = [3] + [1, 2] * 256, [None] + [2] * 512
    qkv = draw(sum(lengths), heads=1, kv_heads=1, dim=8, dtype=torch.bfloat16)
    direction = torch.ones(sum(lengths) - 3, 1, 8, dtype=torch.bfloat16)
    ours = Layout(lengths, previous).attend(*qkv)[3:]
    theirs = written_out(*qkv, sees(lengths, previous, None), None, None)[3:].to(torch.bfloat16)
    a, b = (torch.autograd.grad(x, qkv[2], direction)[0][:3].double() for x in (ours, theirs))
    assert ((a - b).abs() / b).max() < 2**-8


def test_positions_go_on_after_the_previous_token() -> None:
    layout = Layout([3, 2, 1, 2, 1], [None, None, 2, 3, 6])
    assert layout.positions.tolist() == [0, 1, 2, 0, 1, 3, 1, 2, 2]


def test_adjacent_segments_of_one_previous_token_and_length_are_one_call() -> None:
    layout = Layout([2, 2, 3, 1, 1, 1], [None, None, None, 1, 1, 3])
    assert layout.groups == [
        SegmentGroup(None, 2, 2),
        SegmentGroup(None, 3, 1),
        SegmentGroup(1, 1, 2),
        SegmentGroup(3, 1, 1),
    ]
    assert Layout([1, 2, 1]).groups == [SegmentGroup(None, 1, 1), SegmentGroup(None, 2, 1), SegmentGroup(None, 1, 1)]


class Calls(TorchDispatchMode):
    """Record the operations that are executed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(op._schema.name.removeprefix("aten::"))
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("lengths", [[12], [4, 4, 4], [1] * 12])
def test_sequences_of_one_length_are_not_copied(lengths: list[int]) -> None:
    layout, qkv = Layout(lengths), [x.detach() for x in draw(12)]
    with Calls() as calls:
        layout.attend(*qkv)
    views = ("split_with_sizes", "view", "transpose", "detach")
    assert [name for name in calls.names if name not in views] == ["_scaled_dot_product_flash_attention_for_cpu"]


def test_the_bias_of_continuations_is_computed_once() -> None:
    """One tensor serves all lengths and layers. The last segment is longer than what it continues and needs none."""
    layout, qkv = Layout([9, 5, 3, 2, 4], [None, None, 13, 13, 2]), draw(23)
    layout.attend(*qkv)
    (bias,) = layout.biases.values()
    assert bias.tolist() == [[0.0] * (6 + i) + [-torch.inf] * (2 - i) for i in range(3)]
    layout.attend(*qkv)
    assert [each is bias for each in layout.biases.values()] == [True]


@pytest.mark.parametrize(
    ("lengths", "previous", "message"),
    [
        ([], None, "lengths: expected segments of at least one token, got []"),
        ([3, 0], None, "got [3, 0]"),
        ([3, 2], [None], "previous: expected 2, one per segment, got 1"),
        ([3, 2], [None, 3], "for segment 1 a token of an earlier one, 0 to 2, got 3"),
        ([3, 2], [1, None], "None for segment 0, got 1"),
        ([3, 2, 1], [None, 0, 5], "for segment 2"),
        ([3, 2], [None, -2], "got -2"),
    ],
)
def test_segments_that_do_not_fit_are_refused(lengths: Any, previous: Any, message: str) -> None:
    with pytest.raises(LossInputError) as error:
        Layout(lengths, previous)
    assert message in str(error.value)


# Routes that run on a GPU alone, as far as they can be tested without one.


@pytest.mark.parametrize(
    ("dtype", "head_dim", "softcap", "has_varlen", "expected"),
    [
        (torch.bfloat16, 64, False, True, "varlen"),
        (torch.float16, 256, False, True, "varlen"),
        (torch.bfloat16, 96, False, True, "varlen"),
        (torch.bfloat16, 100, False, True, "sdpa-by-length"),
        (torch.bfloat16, 512, False, True, "sdpa-by-length"),
        (torch.bfloat16, 64, False, False, "flex"),
        (torch.bfloat16, 256, True, True, "flex"),
        (torch.float32, 64, False, True, "flex"),
        (torch.float32, 256, False, True, "sdpa-by-length"),
        (torch.float32, 8, False, True, "sdpa-by-length"),
        (torch.float32, 80, True, True, "sdpa-by-length"),
        (torch.float64, 64, False, True, "sdpa-by-length"),
    ],
)
def test_route_on_a_gpu(dtype: torch.dtype, head_dim: int, softcap: bool, has_varlen: bool, expected: str) -> None:
    assert choose_cuda_route(dtype, head_dim, softcap, has_varlen) == expected


def test_route_elsewhere() -> None:
    for dtype in TOLERANCES:
        assert attention.choose_route(torch.device("cpu"), dtype, 64) == "sdpa-by-length"


def kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
) -> Tensor:
    """Do what ``varlen_attn`` documents: sequence by sequence, causal from the end, ``window_size[0]`` keys back."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and options["enable_gqa"] and options["window_size"][1] == 0
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    outputs = []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        ago = torch.arange(d - c)[-(b - a) :, None] - torch.arange(d - c)
        left = options["window_size"][0]
        seen = (ago >= 0) & (ago <= (left if left >= 0 else ago.max()))
        padded = torch.cat((q.new_zeros(int(d - c - b + a), *q.shape[1:]), q[a:b]))
        everything = torch.cat((torch.ones(int(d - c - b + a), int(d - c), dtype=torch.bool), seen))
        outputs.append(written_out(padded, k[c:d], v[c:d], everything, options["scale"], None)[-(b - a) :].to(q.dtype))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("of", [([5, 3, 2, 2, 1], [None, None, 4, 6, 10]), ([2, 5], [None, None])])
def test_varlen_route_asks_the_kernel_for_the_mask(
    of: Any, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel runs on GPUs alone. A stand-in checks the arguments that it is given."""
    monkeypatch.setattr(attention, "varlen_kernel", lambda: kernel)
    monkeypatch.setattr(attention, "choose_route", lambda *_: "varlen")
    layout = Layout(*of)
    assert largest_difference(layout, draw(sum(of[0])), window=window) < 2e-5
    assert layout.route == "varlen"


@given(layouts(), st.sampled_from([None, 1, 3]))
def test_flex_route_has_the_mask(of: tuple[list[int], list[int | None]], window: int | None) -> None:
    n = sum(of[0])
    mask = create_mask(mask_mod(Layout(*of), window), None, None, n, n, "cpu")
    assert torch.equal(mask[0, 0], sees(*of, window))
