"""Losses in every form: on the device against the CPU, compiled against eager, and beside a hand-written one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_checks.measure import Checks, Figures, compared, error_of, pick, timed
from loss_overhead import BETA, HIGH, LOW, equations
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lossfns import Datum, Loss, ModelInput, TensorData, grpo
from lossfns.testing.public import presets
from lossfns.tokens import LOGPROB_COLUMNS, MODEL_COLUMNS


def losses(device: str) -> Checks:
    """Every loss in every form on the device, in float64, against its datum form on the CPU."""
    return {name: partial(forms_of_loss, preset(), device) for name, preset in presets().items()}


def forms_of_loss(loss: Loss, device: str) -> Figures:
    columns = ragged_columns(loss)
    expected = value_and_gradient(partial(from_datums, loss, columns), columns["logprobs"], "cpu")
    forms = (from_datums, from_padded, from_packed, from_deferred)
    found = [value_and_gradient(partial(form, loss, columns), columns["logprobs"], device) for form in forms]
    errors = {form.__name__.removeprefix("from_"): error_of(x, expected) for form, x in zip(forms, found)}
    worst = max(errors, key=lambda form: errors[form])
    return {"found": errors[worst], "limit": 1e-12, "note": worst}


def ragged_columns(loss: Loss) -> dict[str, list[Tensor]]:
    """Draw the rows of a small batch, in float64 on the CPU: for each column one tensor for each sequence."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(n, 3) if loss.rows.rank == 2 else (n,) for n in (5, 9, 3, 7)]

    def drawn(draw: Callable[..., Tensor]) -> list[Tensor]:
        return [draw(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    columns = {"logprobs": [-3 * x - 0.1 for x in drawn(torch.rand)]}
    columns["weights"] = [(x > 0.3).double() for x in drawn(torch.rand)]
    for row in columns["weights"]:
        row[-1] = 1
    for name in loss.reads:
        if name in (*LOGPROB_COLUMNS, "teacher_logprobs"):
            columns[name] = [(lp + x / 5).clamp(max=0) for lp, x in zip(columns["logprobs"], drawn(torch.randn))]
        elif name in DATUM_NUMBERS:
            columns[name] = [x.new_full(x.shape, n) for x, n in zip(columns["logprobs"], DATUM_NUMBERS[name])]
        else:
            columns[name] = drawn(torch.rand if name in MODEL_COLUMNS else torch.randn)
    return columns


DATUM_NUMBERS = {
    "groups": (1, 1, 1, 1),
    "labels": (1, 0, 1, 0),
    "rewards": (0.5, -1, 0, 2),
    "reference_point": (0.25, 0.25, 0.25, 0.25),
    "target_margin": (0.5, 0.5, 1, 1),
}
"""The columns with one number for each datum, for a batch of four."""


def value_and_gradient(call: Callable[[list[Tensor]], Tensor], rows: list[Tensor], device: str) -> list[Tensor]:
    leaves = [row.to(device, copy=True).requires_grad_() for row in rows]
    value = call(leaves)
    value.backward()
    return [value.cpu(), torch.cat([leaf.grad.cpu().flatten() for leaf in leaves if leaf.grad is not None])]


def from_datums(loss: Loss, columns: dict[str, list[Tensor]], leaves: list[Tensor]) -> Tensor:
    rows = {name: x for name, x in columns.items() if name != "logprobs"}
    targets = [{"target_tokens": TensorData.from_torch(torch.zeros(x.shape, dtype=torch.long))} for x in leaves]
    data = [Datum(ModelInput.from_ints([0] * len(x)), field) for x, field in zip(leaves, targets)]
    return loss.bind(**rows)(data, leaves)[0]


def from_padded(loss: Loss, columns: dict[str, list[Tensor]], leaves: list[Tensor]) -> Tensor:
    padded = {name: pad_sequence(x, batch_first=True).to(leaves[0].device) for name, x in columns.items()}
    return loss.padded(**padded | {"logprobs": pad_sequence(leaves, batch_first=True)})[0]


def from_packed(loss: Loss, columns: dict[str, list[Tensor]], leaves: list[Tensor]) -> Tensor:
    packed = {name: torch.cat(x).to(leaves[0].device) for name, x in columns.items()}
    lengths = torch.tensor([len(x) for x in leaves], device=leaves[0].device)
    return loss.packed(**packed | {"logprobs": torch.cat(leaves)}, lengths=lengths)[0]


def from_deferred(loss: Loss, columns: dict[str, list[Tensor]], leaves: list[Tensor]) -> Tensor:
    padded = {name: pad_sequence(x, batch_first=True).to(leaves[0].device) for name, x in columns.items()}
    value, metrics = loss.deferred().padded(**padded | {"logprobs": pad_sequence(leaves, batch_first=True)})
    metrics.finalise()
    return value


# Compiled losses


def compiled(device: str) -> Checks:
    """Losses with ``torch.compile`` against eager ones, on the same device in float32."""
    checks: Checks = {}
    for name in pick(device, ("dapo", "gspo_token", "dpo", "cross_entropy"), ("cross_entropy",)):
        loss = presets()[name]()
        run = partial(padded_step, padded_columns(loss, *pick(device, (512, 512), (4, 16)), device))
        checks[f"{name}, eager"] = partial(timed, partial(run, loss))
        checks[f"{name}, compiled"] = partial(compared, partial(run, loss.compiled()), partial(run, loss), 1e-5)
    return checks


def padded_columns(loss: Loss, sequences: int, length: int, device: str) -> dict[str, Tensor]:
    """Draw a batch without padding, in float32. The first quarter of each sequence is masked.

    Log-ratios are multiples of 1/16, so that no ratio is so near to a clip bound that rounding decides its gradient.
    """
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, sequences, length, generator=generator)
    logprobs = -3 * torch.rand(sequences, length, generator=generator) - 1
    columns = {
        "logprobs": logprobs,
        "weights": (torch.arange(length) >= length // 4).float().expand(sequences, -1),
        "advantages": normal(),
        "old_logprobs": logprobs + (1.6 * normal()).round() / 16,
        "ref_logprobs": logprobs + (1.6 * normal()).round() / 16,
    }
    return {name: columns[name].contiguous().to(device) for name in ("logprobs", "weights", *loss.reads)}


Result = tuple[Tensor, Tensor, Any]
"""A loss, its gradient and its metrics."""


def value_gradient_metrics(call: Callable[[Tensor], tuple[Tensor, Any]], logprobs: Tensor) -> Result:
    leaf = logprobs.detach().requires_grad_()
    value, metrics = call(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0], metrics


def padded_step(columns: dict[str, Tensor], loss: Any) -> Result:
    return value_gradient_metrics(lambda lp: loss.padded(**columns | {"logprobs": lp}), columns["logprobs"])


# Forms of one loss


def forms(device: str) -> Checks:
    """GRPO with KL and its metrics, as padded and packed tensors and as datums, beside a hand-written padded one."""
    checks: Checks = {}
    for sequences, length in pick(device, ((512, 512), (4096, 256)), ((4, 16),)):
        runs = forms_of_grpo(sequences, length, device)
        for name, run in runs.items():
            checks[f"{sequences}x{length} {name}"] = partial(compared, run, runs["hand-written"], 1e-5)
    return checks


def forms_of_grpo(sequences: int, length: int, device: str) -> dict[str, Callable[[], Result]]:
    """Return for each form a function that computes loss, gradient and metrics."""
    loss = grpo(clip=(LOW, HIGH), kl_beta=BETA)
    fused = loss.compiled()
    columns = padded_columns(loss, sequences, length, device)
    flat = {name: x.flatten() for name, x in columns.items()}
    lengths = torch.full((sequences,), length, device=device)
    bound, data = datums_of(loss, columns)

    def hand_written(logprobs: Tensor) -> tuple[Tensor, Any]:
        weights, *others = (columns[name] for name in ("weights", *loss.reads))
        terms, metrics = equations(logprobs, *others)
        tokens = weights.sum()
        value = (terms * weights).sum() / tokens
        means = torch.stack([value.detach(), *((x * weights).sum() / tokens for x in metrics.values())])
        return value, dict(zip(("loss", *metrics), means.tolist()))

    def padded(loss: Any, logprobs: Tensor) -> tuple[Tensor, Any]:
        return by_name(*loss.padded(**columns | {"logprobs": logprobs}))

    def packed(loss: Any, logprobs: Tensor) -> tuple[Tensor, Any]:
        return by_name(*loss.packed(**flat | {"logprobs": logprobs.flatten()}, lengths=lengths))

    calls: dict[str, Callable[[Tensor], tuple[Tensor, Any]]] = {"hand-written": hand_written}
    for form in (padded, packed):
        kinds = {"": loss, ", deferred": loss.deferred()}
        if device == "cuda" or form is padded:  # a CPU compiles one graph, which takes seconds
            kinds |= {", compiled": fused, ", compiled, deferred": fused.deferred()}
        calls |= {f"{form.__name__}{name}": partial(form, kind) for name, kind in kinds.items()}
    calls["datums"] = lambda logprobs: bound(data, list(logprobs.unbind()))
    return {name: partial(value_gradient_metrics, call, columns["logprobs"]) for name, call in calls.items()}


def by_name(value: Tensor, metrics: Any) -> tuple[Tensor, Any]:
    """Return the metrics by name; those of a deferred loss stay tensors on the device."""
    return value, getattr(metrics, "tensors", metrics)


def datums_of(loss: Loss, columns: dict[str, Tensor]) -> tuple[Any, list[Datum]]:
    """Return the loss with all columns bound, and datums that carry only targets."""
    sequences, length = columns["logprobs"].shape
    targets = {"target_tokens": TensorData.from_torch(torch.zeros(length, dtype=torch.long))}
    data = [Datum(ModelInput.from_ints([0] * length), targets) for _ in range(sequences)]
    return loss.bind(**{name: list(x.cpu()) for name, x in columns.items() if name != "logprobs"}), data
