"""A LoRA step of a real model: the local client beside the loop that a careful user writes with transformers and peft.

- ours: ``LocalTrainingClient``, one request and one step of AdamW
- plain: a padded batch with attention mask and labels, transformers' default attention, adapters of ``peft``,
  ``F.cross_entropy`` or a GRPO loss on gathered log-softmax of the completions' logits, and ``torch.optim.AdamW``

Both adapt the same layers, with or without the unembedding, and start from the same adapters. The script checks that
the gradients agree (to 1e-4 in relative norm). It times whole steps in processes of their own, which alternate: in one
process, the OpenMP threads of each side would slow the other. Peak memory is measured in other processes. Needs the
extras ``hf``, ``lora`` and, for the default model, ``smollm2``.

    python benchmarks/real_model.py [--model smollm2] [--rounds 5] [--case "4 of 26"] [--rank 16]
"""

from __future__ import annotations

import argparse
import os
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers
from memory import elsewhere, peak
from side_by_side import device_name, keep_freed_memory, load, save, seconds, table
from torch import Tensor

from lossfns import ON_POLICY, cross_entropy, datum_from_tokens, grpo
from lossfns.backend import AdamParams, LocalTrainingClient
from lossfns.backend.model import hf, lora
from lossfns.backend.model.sources import located

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RATE, ALPHA = 1e-5, 32


class Case(NamedTuple):
    """Sequences of a prompt and a completion; with ``group``, all have the same prompt and are trained by GRPO."""

    name: str
    prompts: list[int]
    completions: list[int]
    group: bool
    limit: float  # the largest ratio of the times, ours to plain


CASES = (
    Case("4 of 26", [10, 12, 11, 13], [14, 16, 15, 13], group=False, limit=1.0),
    Case("8 of 16 to 512", [8, 32, 48, 80, 96, 128, 160, 192], [8, 48, 96, 144, 192, 240, 288, 320], False, 0.7),
    Case("8 of one prompt of 512", [512] * 8, [48, 56, 64, 64, 72, 80, 88, 96], group=True, limit=0.45),
)


def rows_of(case: Case, vocabulary: int) -> list[np.ndarray]:
    """Return the tokens of each sequence, drawn at random."""
    rng = np.random.default_rng(0)
    common = rng.integers(0, vocabulary, max(case.prompts))
    prompts = [common if case.group else rng.integers(0, vocabulary, n) for n in case.prompts]
    return [np.append(prompt, rng.integers(0, vocabulary, n)) for prompt, n in zip(prompts, case.completions)]


def advantages_of(case: Case) -> np.ndarray:
    return np.random.default_rng(1).normal(size=len(case.prompts))


class Side(NamedTuple):
    """One of the two: its trainable parameters by layer, and a whole step, which returns their gradients on request."""

    parameters: dict[str, Tensor]
    step: Callable[[], Any]
    gradients: Callable[[], None]


def ours(model: str, case: Case, unembed: bool, rank: int) -> Side:
    causal, _ = hf.load(model, dtype=torch.float32)
    parts = ["attn", "mlp", "unembed"] if unembed else ["attn", "mlp"]
    client = LocalTrainingClient(lora.adapt(causal, rank=rank, parts=parts, alpha=ALPHA, seed=0), device="cpu")
    rows = rows_of(case, causal.model.config.vocab_size)
    data = [datum_from_tokens(row.tolist(), prompt_length=n) for row, n in zip(rows, case.prompts)]
    on_policy = {"advantages": advantages_of(case).tolist(), "old_logprobs": ON_POLICY}
    loss = grpo(kl_beta=0.0).bind(**on_policy) if case.group else cross_entropy()

    def gradients() -> None:
        client.forward_backward_custom(data, loss).result()

    def step() -> None:
        gradients()
        client.optim_step(AdamParams(learning_rate=RATE)).result()

    return Side(prepared(client.model), step, gradients)


def plain(model: str, case: Case, unembed: bool, rank: int) -> Side:
    base = transformers.AutoModelForCausalLM.from_pretrained(located(model), dtype=torch.float32)
    targets = [*LAYERS, "lm_head"] if unembed else list(LAYERS)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=targets))
    parameters = prepared(adapted.train())
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    compute = partial(grpo_loss if case.group else sft_loss, adapted, *padded(case, base.config.vocab_size))

    def gradients() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(compute())

    def step() -> None:
        gradients()
        optimizer.step()

    return Side(parameters, step, gradients)


def padded(case: Case, vocabulary: int) -> tuple[Tensor, ...]:
    """Return ids, mask, labels (−100 outside of the completions) and advantages, padded on the right."""
    rows = rows_of(case, vocabulary)
    ids, mask, labels = (torch.full((len(rows), max(map(len, rows))), x) for x in (0, 0, -100))
    for i, (row, prompt) in enumerate(zip(rows, case.prompts)):
        ids[i, : len(row)], mask[i, : len(row)] = torch.from_numpy(row), 1
        labels[i, prompt : len(row)] = ids[i, prompt : len(row)]
    return ids, mask, labels, torch.from_numpy(advantages_of(case)).float()


def sft_loss(model: Any, ids: Tensor, mask: Tensor, labels: Tensor, *_: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def grpo_loss(model: Any, ids: Tensor, mask: Tensor, labels: Tensor, advantages: Tensor) -> Tensor:
    longest = int((labels != -100).sum(1).max())  # the prompts have one length, so that completions line up
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1]
    wanted = labels[:, -longest:]
    logprobs = logits.log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None]).squeeze(-1)
    ratio, active = (logprobs - logprobs.detach()).exp(), (wanted != -100).float()
    surrogate = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    return -(surrogate * active).sum() / active.sum()


def prepared(model: Any) -> dict[str, Tensor]:
    """Return the adapters by layer and factor, after setting them: the same on both sides, and none of them zero."""
    named = {name.rpartition("model.")[2]: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in sorted(named):
            named[name].copy_(0.02 * torch.randn(named[name].shape, generator=generator))
    return named


def apart(a: Side, b: Side) -> float:
    """Return the relative difference of the gradients in norm."""
    for side in (a, b):
        side.gradients()
    assert a.parameters.keys() == b.parameters.keys(), a.parameters.keys() ^ b.parameters.keys()
    x, y = (flat(side.parameters) for side in (a, b))
    return float((x - y).norm() / y.norm())


def flat(parameters: dict[str, Tensor]) -> Tensor:
    return torch.cat([p.grad.flatten() for _, p in sorted(parameters.items()) if p.grad is not None])


SIDES = {"ours": ours, "plain": plain}


def steps(side: str, rounds: int, *given: Any) -> list[float]:
    """Return the seconds of the first step of a process, and of as many others as ``rounds``."""
    step = SIDES[side](*given).step
    return [seconds(step)[0] for _ in range(rounds + 1)]


def warm(side: str, *given: Any) -> Callable[[], Any]:
    """Return a step after the first: what the first one keeps, such as moments, does not count as its peak memory."""
    step = SIDES[side](*given).step
    step()
    return step


def difference(given: Any) -> float:
    found = apart(*(make(*given) for make in SIDES.values()))
    assert found < 1e-4, found
    return found


def compared(times: list[dict[str, float]]) -> tuple[dict[str, float], float]:
    """Return the median milliseconds of each side, and the median ratio, ours to plain, of pairs of processes."""
    medians = {side: round(1e3 * statistics.median(each[side] for each in times), 1) for side in SIDES}
    return medians, round(statistics.median(each["ours"] / each["plain"] for each in times), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as lossfns.backend.model.hf.load takes it")
    parser.add_argument("--rounds", type=int, default=5, help="steps after the first one, in each process")
    parser.add_argument("--processes", type=int, default=3, help="processes of each side")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--case", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--head", nargs="+", default=["frozen", "adapted"], help="with an adapter or without")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="peft")
    keep_freed_memory()
    results = []
    for case in (case for case in CASES if case.name in options.case):
        for unembed in (head == "adapted" for head in options.head):
            given = (options.model, case, unembed, options.rank)
            memory = {side: peak(partial(warm, side, *given)) for side in SIDES}
            pairs = [
                {side: elsewhere(partial(steps, side, options.rounds, *given)) for side in SIDES}
                for _ in range(options.processes)
            ]
            later = [{side: statistics.median(t[1:]) for side, t in pair.items()} for pair in pairs]
            row = {"case": case.name, "unembedding": unembed, "rank": options.rank, "model": options.model}
            row["gradients_apart"] = elsewhere(partial(difference, given))
            row["milliseconds"], row["ratio"] = compared(later)
            firsts = [{side: t[0] for side, t in pair.items()} for pair in pairs]
            row["first_step_milliseconds"], row["first_step_ratio"] = compared(firsts)
            row |= {"peak_bytes": memory, "peak_ratio": round(memory["ours"] / memory["plain"], 3)}
            row |= {
                "limit": case.limit,
                "rounds": options.rounds,
                "processes": options.processes,
                "load": round(os.getloadavg()[0], 1),
            }
            row["versions"] = {name: metadata.version(name) for name in ("transformers", "peft", "torch")}
            results.append(row)
            print(report([row]) if len(results) == 1 else report([row]).splitlines()[-1], flush=True)
    print(f"LoRA of rank {options.rank} on {options.model}, float32; {device_name()}, torch {torch.__version__}")
    print(report(results))
    key = ("case", "unembedding", "rank", "model")
    done = [[row[name] for name in key] for row in results]
    rows = [row for row in load("real_model") if [row[name] for name in key] not in done] + results
    print(f"written: {save('real_model', rows).name}")


def report(rows: list[dict[str, Any]]) -> str:
    header = ["case", "head", "ours", "plain", "ratio", "limit", "first step", "peak memory", "gradients apart"]
    lines = [
        [row["case"], "adapted" if row["unembedding"] else "frozen"]
        + [f"{row['milliseconds'][side]:.0f} ms" for side in SIDES]
        + [f"{row['ratio']:.2f}x", f"{row['limit']:.2f}x"]
        + [f"{row['first_step_ratio']:.2f}x of {row['first_step_milliseconds']['plain']:.0f} ms"]
        + [f"{row['peak_ratio']:.2f}x of {row['peak_bytes']['plain'] / 2**20:.0f} MiB"]
        + [f"{row['gradients_apart']:.0e}"]
        for row in rows
    ]
    return table(header, lines)


if __name__ == "__main__":
    main()
