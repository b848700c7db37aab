"""Logprobs from hidden states and the unembedding: ``linear_logprobs`` (ours) and alternatives, on the same inputs.

Sections:

- training: forward and backward with an arbitrary gradient, at each shape; also the bare matrix products of our plans
- frozen: the same with a frozen unembedding, as under LoRA
- skipped: three quarters of the tokens have no gradient; ours finds them in the backward pass, or knows them from
  ``rows=``
- forward: no gradients, as for reference logprobs
- entropy: logprobs and entropies, with a gradient through both
- grpo: from hidden states to gradients of GRPO (clip, k3, a quarter of each sequence masked)

For each run the script prints the median time in milliseconds, the extra memory at the peak (outputs included), and the
errors against float64: the largest error of a value, and the largest relative norm of a gradient's error. Ratios are to
the first line; they are medians over rounds. Then it prints the limits that ours has to meet and the measured values.

    python benchmarks/linear_logprobs.py [--only training grpo] [--shape bfloat16:4096x1024x65536] [--rounds 3]

The script lists the packages that are not installed; benchmarks/requirements.txt names all of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from logprobs_report import PICTURE, picture, report
from memory import elsewhere, peak
from rivals import Logprobs, installed, liger_scaled, naive, rivals, trl_chunked, versions
from side_by_side import keep_freed_memory, load, race, save
from torch import Tensor

from lossfns import Datum, ModelInput, TensorData, grpo, token_gradient
from lossfns.logprobs.linear import linear_logprobs
from lossfns.logprobs.tiles import TILE_TOKENS, TILE_VOCAB, blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATIENCE = 6.0
"""The time limit of each run in seconds. It is checked between rounds."""


class Shape(NamedTuple):
    dtype: str
    tokens: int
    width: int
    vocabulary: int

    @staticmethod
    def parse(text: str) -> Shape:
        dtype, _, sizes = text.partition(":")
        return Shape(dtype, *map(int, sizes.split("x")))

    def __str__(self) -> str:
        return f"{self.dtype}:{self.tokens}x{self.width}x{self.vocabulary}"


LARGE, SMALL, SINGLE = map(
    Shape.parse, ("bfloat16:4096x1024x65536", "bfloat16:2048x1024x32768", "float32:2048x512x32768")
)
GROUPS, ON_GPU = Shape.parse("bfloat16:4096x1024x32768"), Shape.parse("bfloat16:16384x4096x131072")

# Inputs


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    g: Tensor  # ∂loss/∂logprob
    tilt: Tensor  # ∂loss/∂entropy


def draw(shape: Shape) -> Case:
    """Draw inputs whose logits have a standard deviation of 1."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=DEVICE)
    dtype, (n, d, v) = getattr(torch, shape.dtype), shape[1:]
    weight = torch.empty(v, d, dtype=dtype, device=DEVICE)
    for rows in blocks(v, 4096):
        weight[rows] = (normal(len(weight[rows]), d) / d**0.5).to(dtype)
    targets = torch.randint(v, (n,), generator=generator, device=DEVICE)
    return Case(normal(n, d).to(dtype).requires_grad_(), weight.requires_grad_(), targets, normal(n), normal(n))


def tiny(shape: Shape) -> Case:
    return draw(shape._replace(tokens=64, vocabulary=512))


# Runs: they have no arguments, and return the values, then the gradients

Run = Callable[[], tuple[Tensor, ...]]
Runs = dict[str, Run]
Truth = Callable[[], tuple[Tensor, ...]]


def backward(case: Case, outputs: Any, slopes: Any) -> tuple[Tensor, ...]:
    inputs = [x for x in (case.hidden, case.weight) if x.requires_grad]
    return torch.autograd.grad(outputs, inputs, slopes)


def both_ways(case: Case, function: Logprobs) -> Run:
    def run() -> tuple[Tensor, ...]:
        logprobs = function(case.hidden, case.weight, case.targets)
        return logprobs.detach(), *backward(case, logprobs, case.g.to(logprobs.dtype))

    return run


def uncompared(run: Run) -> tuple[Tensor, ...]:
    run()
    return ()


def products(case: Case, count: int) -> Run:
    """Return a run of a plan's matrix products alone, in its tiles: logits, logits again, ∂hidden, ∂weight."""
    hidden, weight = case.hidden.detach(), case.weight.detach()

    def run() -> tuple[Tensor, ...]:
        for rows in blocks(len(hidden), TILE_TOKENS):
            for columns in blocks(len(weight), TILE_VOCAB):
                for _ in range(2 if count == 4 else 1):
                    z = hidden[rows] @ weight[columns].T
                z @ weight[columns]
                if count > 2:
                    z.T @ hidden[rows]
        return ()

    return run


def truth(case: Case, slope: Callable[[Tensor, slice], Tensor], tilt: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return logprobs, ∂hidden, ∂weight and entropies in float64. ``slope`` returns ∂loss/∂logprob."""
    hidden, weight = case.hidden.detach().double(), case.weight.detach().double()
    logprobs, entropy = (torch.empty(len(hidden), dtype=torch.float64, device=DEVICE) for _ in range(2))
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for rows in blocks(len(hidden), 256):
        logp = (hidden[rows] @ weight.T).log_softmax(1)
        p, chosen = logp.exp(), case.targets[rows][:, None]
        logprobs[rows] = logp.gather(1, chosen).squeeze(1)
        entropy[rows] = -torch.linalg.vecdot(p, logp)
        g = slope(logprobs[rows], rows).double()[:, None]
        if tilt is not None:
            logp.add_(entropy[rows][:, None]).mul_(tilt[rows][:, None].double()).add_(g)
        d = p.mul_(g if tilt is None else logp).neg_().scatter_add_(1, chosen, g)
        d_hidden[rows] = d @ weight
        d_weight += d.T @ hidden[rows]
    return logprobs, d_hidden, d_weight, entropy


def known(case: Case) -> Callable[[Tensor, slice], Tensor]:
    return lambda _, rows: case.g[rows]


# Sections: each returns the runs of a case by name, and the exact result


def training(case: Case) -> tuple[Runs, Truth]:
    plans = {
        "ours": linear_logprobs,
        "ours, tiled": partial(linear_logprobs, plan="tiled"),
        "ours, saved": partial(linear_logprobs, plan="saved"),
        "ours, separable": partial(linear_logprobs, gradient=known(case)),
    }
    runs = {name: both_ways(case, function) for name, function in (rivals()[0] | plans).items()}
    return runs | {f"{n} products": products(case, n) for n in (3, 4)}, lambda: truth(case, known(case))[:3]


def frozen(case: Case) -> tuple[Runs, Truth]:
    case = case._replace(weight=case.weight.detach())
    functions = brisk() | {"ours": linear_logprobs}
    runs = {name: both_ways(case, function) for name, function in functions.items()}
    return runs | {"2 products": products(case, 2)}, lambda: truth(case, known(case))[:2]


def forward(case: Case) -> tuple[Runs, Truth]:
    def without_gradients(function: Logprobs) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(case.hidden, case.weight, case.targets),)

    functions = brisk() | {"ours": linear_logprobs}
    runs = {name: partial(without_gradients, function) for name, function in functions.items()}
    return runs, lambda: truth(case, known(case))[:1]


def brisk() -> dict[str, Logprobs]:
    """Return the rivals without the one that takes several seconds on a CPU."""
    return {name: function for name, function in rivals()[0].items() if name != "torch LCE, chunked"}


def skipped(case: Case) -> tuple[Runs, Truth]:
    rows = torch.arange(len(case.targets), device=DEVICE) % 4 == 0
    some = case._replace(g=case.g * rows)

    def values_of(run: Run) -> tuple[Tensor, ...]:
        logprobs, *gradients = run()
        return logprobs * rows, *gradients

    tiled = partial(linear_logprobs, plan="tiled")
    runs = {
        "ours, tiled, all rows": partial(uncompared, both_ways(case, tiled)),
        "ours, tiled, found in backward": partial(values_of, both_ways(some, tiled)),
        "ours, tiled, rows known": both_ways(some, partial(tiled, rows=rows)),
        "ours, rows known": both_ways(some, partial(linear_logprobs, rows=rows)),
        "naive": partial(values_of, both_ways(some, naive)),
    }

    def exact() -> tuple[Tensor, ...]:
        logprobs, d_hidden, d_weight, _ = truth(some, known(some))
        return logprobs * rows, d_hidden, d_weight

    return runs, exact


def entropy(case: Case) -> tuple[Runs, Truth]:
    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logp = (hidden @ weight.T).float().log_softmax(1)
        return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)

    def scaled(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropies = others["Liger scaled"](*inputs)
        return -nll, entropies

    def run(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        pair = function(case.hidden, case.weight, case.targets)
        slopes = [slope.to(x.dtype) for slope, x in zip((case.g, case.tilt), pair)]
        return torch.cat([x.detach().float() for x in pair]), *backward(case, pair, slopes)

    others, _ = installed(ENTROPIES)
    wrapped = {name: scaled if name == "Liger scaled" else function for name, function in others.items()}
    functions = {"naive": plain, **wrapped, "ours, tiled": partial(linear_logprobs, plan="tiled", return_entropy=True)}
    runs: Runs = {name: partial(run, function) for name, function in functions.items()}
    without = {"ours, tiled, without": partial(uncompared, both_ways(case, partial(linear_logprobs, plan="tiled")))}

    def exact() -> tuple[Tensor, ...]:
        logprobs, d_hidden, d_weight, entropies = truth(case, known(case), case.tilt)
        return torch.cat([logprobs, entropies]), d_hidden, d_weight

    return runs | without, exact


ENTROPIES = {
    "Liger scaled": ("liger-kernel", partial(liger_scaled, entropy=True)),
    "TRL chunked": ("trl", partial(trl_chunked, ("entropy",))),
}

# GRPO

SEQUENCES, CLIP, BETA = 8, 0.2, 0.04


class Rollouts(NamedTuple):
    mask: Tensor  # [N], a quarter of each sequence 0
    advantages: Tensor  # [B]
    old: Tensor  # [N]
    ref: Tensor  # [N]

    def loss(self, logprobs: Tensor, index: Any = slice(None)) -> Tensor:
        """Return GRPO of some of the tokens, written as in its equation, divided by the count of all tokens."""
        advantages = self.advantages.repeat_interleave(len(self.mask) // SEQUENCES)[index]
        ratio, d = (logprobs - self.old[index]).exp(), self.ref[index] - logprobs
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        terms = BETA * (d.exp() - d - 1) - torch.minimum(ratio * advantages, clipped * advantages)
        return (terms * self.mask[index]).sum() / self.mask.sum()

    def slope(self, logprobs: Tensor, index: Any) -> Tensor:
        """∂loss/∂logprob."""
        with torch.enable_grad():
            leaf = logprobs.detach().requires_grad_()
            return torch.autograd.grad(self.loss(leaf, index), leaf)[0]

    def data(self) -> list[Datum]:
        """Return the batch as datums for our losses."""
        length = len(self.mask) // SEQUENCES
        per_token = {"weights": self.mask, "old_logprobs": self.old, "ref_logprobs": self.ref}
        columns = {name: x.cpu().split(length) for name, x in per_token.items()}
        columns["advantages"] = self.advantages.cpu()[:, None].expand(-1, length).contiguous().unbind()
        columns["target_tokens"] = torch.zeros(SEQUENCES, length, dtype=torch.long).unbind()
        rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
        fields = [{name: TensorData.from_torch(x) for name, x in row.items()} for row in rows]
        return [Datum(ModelInput.from_ints([0] * length), field) for field in fields]


def rollouts(case: Case) -> Rollouts:
    """Return rollouts of a policy whose logprobs have since moved by 0.1."""
    n, generator = len(case.targets), torch.Generator().manual_seed(1)
    with torch.no_grad():
        parts = [naive(case.hidden[rows], case.weight, case.targets[rows]) for rows in blocks(n, 256)]
    noise, advantages = torch.randn(2, n, generator=generator), torch.randn(SEQUENCES, generator=generator)
    old, ref = torch.cat(parts) + 0.1 * noise.to(DEVICE)
    mask = (torch.arange(n) % (n // SEQUENCES) >= n // SEQUENCES // 4).float()
    return Rollouts(mask.to(DEVICE), advantages.to(DEVICE), old, ref)


def grpo_loss(case: Case) -> tuple[Runs, Truth]:
    batch = rollouts(case)
    data, rows, ours = batch.data(), batch.mask != 0, grpo(clip=(1 - CLIP, 1 + CLIP), kl_beta=BETA)

    def from_logprobs(function: Logprobs) -> tuple[Tensor, ...]:
        loss = batch.loss(function(case.hidden, case.weight, case.targets).float())
        return loss.detach(), *backward(case, loss, None)

    def through_our_loss(**options: Any) -> tuple[Tensor, ...]:
        logprobs = linear_logprobs(case.hidden, case.weight, case.targets, rows=rows, **options)
        loss, _ = ours(data, logprobs.split(len(rows) // SEQUENCES))
        return loss.detach(), *backward(case, loss, None)

    def liger(loss_of: Callable[..., Any]) -> tuple[Tensor, ...]:
        by_sequence = [x.view(SEQUENCES, -1) for x in (case.targets, batch.mask)]
        hidden, others = case.hidden.view(SEQUENCES, -1, case.hidden.shape[1]), (batch.ref, batch.old)
        ref_and_old = [x.view(SEQUENCES, -1) for x in others]
        loss, _ = loss_of(hidden, case.weight, *by_sequence, batch.advantages, None, *ref_and_old)
        return loss.detach(), *backward(case, loss, None)

    functions = {name: f for name, f in rivals()[0].items() if name in ("naive", "CCE torch_compile", "TRL chunked")}
    runs: Runs = {name: partial(from_logprobs, function) for name, function in functions.items()}
    runs |= {name: partial(liger, loss) for name, loss in installed(LIGER_GRPO)[0].items()}
    runs |= {
        "ours": through_our_loss,
        "ours, tiled": partial(through_our_loss, plan="tiled"),
        "ours, separable": partial(through_our_loss, gradient=token_gradient(ours, data, DEVICE)),
    }

    def exact() -> tuple[Tensor, ...]:
        logprobs, d_hidden, d_weight, _ = truth(case, batch.slope)
        return batch.loss(logprobs), d_hidden, d_weight

    return runs, exact


def liger_grpo(**options: Any) -> Callable[[], Any]:
    def make() -> Any:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        return LigerFusedLinearGRPOLoss(beta=BETA, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="dapo", **options)

    return make


LIGER_GRPO = {
    "Liger GRPO": ("liger-kernel", liger_grpo()),
    f"Liger GRPO, {SEQUENCES} at once": ("liger-kernel", liger_grpo(chunk_size=SEQUENCES)),
}

SECTIONS: dict[str, tuple[Callable[[Case], tuple[Runs, Truth]], tuple[Shape, ...]]] = {
    "training": (training, (SMALL, SINGLE, LARGE)),
    "frozen": (frozen, (SMALL,)),
    "skipped": (skipped, (SMALL,)),
    "forward": (forward, (SMALL,)),
    "entropy": (entropy, (SMALL,)),
    "grpo": (grpo_loss, (GROUPS,)),
}

# Measuring


def prepared(section: str, shape: Shape, name: str) -> Run:
    """Return a run that is warmed up on a tiny shape, so that all compilation is done."""
    make, _ = SECTIONS[section]
    for _ in range(2):
        make(tiny(shape))[0][name]()
    return make(draw(shape))[0][name]


def peaks(section: str, shape: Shape) -> dict[str, int]:
    """Return the peak memory of each run, in bytes."""
    make, _ = SECTIONS[section]
    names = here(lambda: list(make(tiny(shape))[0]))
    found = {}
    for name in names:
        if not name.endswith("products"):
            print(f"memory: {section} {shape} {name}", file=sys.stderr)
            found[name] = peak(partial(prepared, section, shape, name))
    return found


def here(function: Callable[[], Any]) -> Any:
    """Call the function. On a CPU, call it in a fork: this process may not compute before its last fork."""
    return function() if DEVICE == "cuda" else elsewhere(function)


def errors(result: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, Any]:
    """Return the largest error of a value and, for each gradient, the norm of its error over that of the exact one."""
    if not result:
        return {}
    (value, *gradients), (true_value, *true_gradients) = result, exact
    apart = [float((a - b).norm() / b.norm()) for a, b in zip(gradients, true_gradients)]
    return {"value_error": float((value - true_value).abs().max()), "gradient_errors": apart}


def measure(section: str, shape: Shape, taken: dict[str, int], rounds: int) -> dict[str, Any]:
    print(f"time: {section} {shape}", file=sys.stderr)
    make, _ = SECTIONS[section]
    runs, exact = make(draw(shape))
    right, found = exact(), {name: {} for name in runs}
    times = race(runs, rounds, PATIENCE, lambda name, result: found[name].update(errors(result, right)))
    for name, row in found.items():
        row |= {"seconds": [round(t, 5) for t in times[name]], "bytes": taken.get(name)}
    missing = rivals()[1] | installed(ENTROPIES)[1] | installed(LIGER_GRPO)[1]
    return {"section": section, "shape": str(shape), "versions": versions(), "missing": missing, "runs": found}


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--shape", nargs="+", type=Shape.parse, help="dtype:NxDxV, for every section that is run")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    more = (ON_GPU,) if DEVICE == "cuda" else ()
    todo = [(section, shape) for section in args.only for shape in args.shape or (*SECTIONS[section][1], *more)]
    rivals()  # imported once, before the forks
    taken = {key: peaks(*key) for key in todo}
    rows = []
    for key in todo:
        rows.append(measure(*key, taken[key], args.rounds))
        path = keep(rows[-1])
    print(report(rows))
    print(f"written: {path.name}, {picture(load('linear_logprobs'), PICTURE).name}")


def keep(row: dict[str, Any]) -> Path:
    """Save a row, instead of the older one of the same section and shape."""
    others = [old for old in load("linear_logprobs") if place(old) != place(row)]
    return save("linear_logprobs", [*others, row])


def place(row: dict[str, Any]) -> tuple[str, str]:
    return row["section"], row["shape"]


if __name__ == "__main__":
    main()
