"""Every route of packed attention against dense attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_checks.measure import BOUNDS, Checks, Figures, error_of, pick, skip, timed
from torch import Tensor

from lossfns.backend.model.attention import ROUTES, Layout, sdpa, varlen_kernel


def attention(device: str) -> Checks:
    """Every route of packed attention, and dense SDPA with a mask, against dense attention in float64."""
    scale = pick(device, 20, 1)
    lengths = [scale * n for n in (35, 16, 5, 5, 1, 70, 3)]
    # Two segments continue the first one from its end, one continues one of these, one the second from its middle.
    continued = [None, None, 35 * scale - 1, 35 * scale - 1, 53 * scale, 43 * scale, None]
    # The window and the softcap apply to the batch with prefixes.
    batches: dict[str, tuple[list[int | None], dict[str, Any]]] = {
        "packed": ([None] * 7, {}),
        "prefixes": (continued, {}),
        "window": (continued, {"window": 8 * scale}),
        "softcap": (continued, {"softcap": 2.0}),
    }
    checks: Checks = {}
    for dtype in BOUNDS:
        for batch, (previous, options) in batches.items():
            for route in ("dense", *ROUTES):
                name = f"{route} {batch} {'float32' if dtype == torch.float32 else 'bfloat16'}"
                if is_for(route, device, dtype, options):
                    layout = Layout(lengths, previous, device)
                    checks[name] = partial(check_route, route, layout, dtype, **options)
    for route in ROUTES if device == "cpu" else ():
        if route != "sdpa-by-length":
            checks[route] = partial(skip, "needs a GPU")
    if device == "cuda" and varlen_kernel() is None:
        checks["varlen"] = partial(skip, "varlen_attn is missing, or takes no windows or grouped queries")
    return checks


def is_for(route: str, device: str, dtype: torch.dtype, options: dict[str, Any]) -> bool:
    """Return whether a route takes such inputs."""
    if route == "varlen":
        return device == "cuda" and dtype == torch.bfloat16 and "softcap" not in options and varlen_kernel() is not None
    return route != "flex" or device == "cuda"


def check_route(
    route: str, layout: Layout, dtype: torch.dtype, window: int | None = None, softcap: float | None = None
) -> Figures:
    tokens, generator = sum(layout.lengths), torch.Generator().manual_seed(0)
    drawn = [torch.randn(tokens, heads, 64, generator=generator) for heads in (8, 4, 4, 8)]
    *qkv, direction = (x.to(layout.device, dtype) for x in drawn)
    bias = torch.zeros(tokens, tokens).masked_fill_(~visible(layout, window), -torch.inf).to(layout.device)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        return sdpa(*heads, bias.to(q.dtype), None, softcap)[0].transpose(0, 1)

    def run(attend: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = attend(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, direction.to(output.dtype))]

    packed = dense if route == "dense" else lambda q, k, v: ROUTES[route](layout, q, k, v, None, window, softcap)
    error = error_of(run(packed, qkv), run(dense, [x.double() for x in qkv]))
    return {"found": error, "limit": BOUNDS[dtype], **timed(partial(run, packed, qkv))}


def visible(layout: Layout, window: int | None) -> Tensor:
    """Return [N, N] bool, whether token i sees token j: the tokens up to i in its sequence, within the window."""
    seen, up_to = torch.zeros(sum(layout.lengths), sum(layout.lengths), dtype=torch.bool), list[list[int]]()
    for length, previous in zip(layout.lengths, layout.previous, strict=True):
        before = [] if previous is None else up_to[previous]
        for i in range(len(up_to), len(up_to) + length):
            before = [*before, i]
            seen[i, before if window is None else before[-window:]] = True
            up_to.append(before)
    return seen
