"""``linear_logprobs``: compiled tiles against eager ones, and all of it beside naive ones and installed kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_checks.measure import BOUNDS, Checks, Figures, Skipped, compared, pick, skip, timed
from torch import Tensor

from lossfns import linear_logprobs, target_logprobs


def tiles(device: str) -> Checks:
    """The tiles of ``linear_logprobs``, which are compiled on a GPU, against eager ones on the same device."""
    checks: Checks = {}
    for name, entropy in (("logprobs", False), ("logprobs and entropies", True)):
        run = partial(tiled, *pick(device, (4096, 2048, 65536), (64, 32, 256)), entropy, device)
        checks[f"{name}, eager"] = partial(timed, partial(eagerly, run))
        checks[f"{name}, compiled"] = partial(compared, run, partial(eagerly, run), BOUNDS[torch.bfloat16])
    return checks


def eagerly(call: Callable[[], Any]) -> Any:
    with torch.compiler.set_stance("force_eager"):
        return call()


def tiled(tokens: int, width: int, vocabulary: int, entropy: bool, device: str) -> list[Tensor]:
    """Return logprobs, entropies on request, and the gradients of ``linear_logprobs`` in bfloat16."""
    hidden, weight, targets, slope = linear_inputs(tokens, width, vocabulary, device)
    outputs = linear_logprobs(hidden, weight, targets, plan="tiled", return_entropy=entropy)
    outputs = outputs if entropy else (outputs,)
    gradients = torch.autograd.grad(outputs, (hidden, weight), [slope] * len(outputs))
    return [*(x.detach() for x in outputs), *gradients]


@cache
def linear_inputs(tokens: int, width: int, vocabulary: int, device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device)
    hidden, weight = normal(tokens, width).bfloat16(), (normal(vocabulary, width) / width**0.5).bfloat16()
    targets = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, normal(tokens)


def linear(device: str) -> Checks:
    """Logprobs from hidden states, forward and backward, against float64: ours, naive ones and installed kernels."""
    import linear_logprobs as bench  # it asks for the device when it is imported
    from rivals import rivals

    case = bench.draw(pick(device, bench.ON_GPU, bench.Shape("bfloat16", 64, 32, 256)))
    known = bench.known(case)
    exact = cache(lambda: bench.truth(case, known)[:3])
    ours = {
        "ours": linear_logprobs,
        "ours, tiled": partial(linear_logprobs, plan="tiled"),
        "ours, saved": partial(linear_logprobs, plan="saved"),
        "ours, separable": partial(linear_logprobs, gradient=known),
        "ours, target_logprobs of logits": lambda h, w, y: target_logprobs(F.linear(h, w), y),
    }

    def check(function: Any, limit: float | None) -> Figures:
        run = bench.both_ways(case, function)
        errors = bench.errors(run(), exact())
        value_error, found = errors["value_error"], float(torch.tensor(errors["gradient_errors"]).max())  # nan stays
        if limit is not None and not value_error <= 5e-2:
            raise AssertionError(f"a logprob is off by {value_error:.1e}, more than 5e-2")
        return {"found": found, "limit": limit, "value_error": value_error, **timed(run)}

    def check_rival(function: Any) -> Figures:
        try:
            return check(function, None)
        except Exception as error:
            raise Skipped(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None

    functions, missing = rivals()
    rows: Checks = {name: partial(check, function, BOUNDS[torch.bfloat16]) for name, function in ours.items()}
    rows |= {name: partial(check_rival, function) for name, function in functions.items()}
    return rows | {name: partial(skip, why) for name, why in missing.items()}
