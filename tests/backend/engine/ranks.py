"""Scenarios for ``test_ranks``, which return tensors by name and are run by one process and by two.

``torchrun --nproc-per-node 2 ranks.py FOLDER`` runs all of them and saves the results of each rank in the folder.
"""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from tiny import RATE, SHAPE, texts
from torch import Tensor

import lossfns
from lossfns import Datum, LossInputError, ModelInput, datum_from_tokens
from lossfns.backend import AdamParams, Decoder, LocalTrainingClient, SamplingParams
from lossfns.backend.engine.ranks import full_tensor, start
from lossfns.backend.model import lora
from lossfns.backend.model.tokenizer import ByteTokenizer
from lossfns.cli import main
from lossfns.train.run import Run

Result = dict[str, Tensor]
LAYERS = 2


def client(
    mesh: Any, seed: int = 0, *, rank: int = 0, budget: float | None = None, **shape: Any
) -> LocalTrainingClient:
    model = Decoder(**SHAPE | {"layers": LAYERS} | shape, seed=seed)
    if rank:
        lora.adapt(model, rank=rank, parts=("attn", "mlp", "unembed"), seed=1)
    return LocalTrainingClient(model, tokenizer=ByteTokenizer(), device="cpu", memory_budget=budget, mesh=mesh)


def parameters(c: LocalTrainingClient) -> Result:
    return {name: full_tensor(p.detach()).clone() for name, p in c.model.named_parameters()}


def gradients(c: LocalTrainingClient) -> Result:
    return {name: full_tensor(p.grad).clone() for name, p in c.model.named_parameters() if p.grad is not None}


def columns(rng: Random, data: list[Datum], loss: lossfns.Loss) -> dict[str, Any]:
    """Values for all columns that a loss reads, with old logprobs near those of an untrained model."""
    rows = {
        "advantages": [rng.uniform(-1, 1) for _ in data],
        "old_logprobs": [[rng.uniform(-3.6, -3.2) for _ in range(d.model_input.length)] for d in data],
        "ref_logprobs": [[rng.uniform(-3.6, -3.2) for _ in range(d.model_input.length)] for d in data],
    }
    return {name: rows[name] for name in loss.reads if name in rows}


def group(rng: Random, size: int = 6) -> list[Datum]:
    """Completions of one prompt, which is long enough to be computed once."""
    prompt = [rng.randrange(31) for _ in range(20)]
    rows = [prompt + [rng.randrange(31) for _ in range(rng.randint(2, 9))] for _ in range(size)]
    return [datum_from_tokens(row, prompt_length=len(prompt)) for row in rows]


def coupled(data: list[Any], logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """A loss that is not a sum over datums."""
    sums = torch.stack([lp.sum() for lp in logprobs_list])
    return sums.softmax(0).square().sum() * sums.mean() ** 2, {"largest": float(sums.detach().max())}


# Scenarios: each is run with a mesh and without


def five_steps(mesh: Any, loss: lossfns.Loss, draw: Callable[[Random], list[Any]], **options: Any) -> Result:
    """Parameters and metrics of training, with data of its own in each step."""
    c, rng = client(mesh, **options), Random(1)
    metrics = []
    for _ in range(5):
        data = draw(rng)
        bound = loss.bind(**columns(rng, data, loss))
        pending, step = c.forward_backward_custom(data, bound), c.optim_step(RATE)
        metrics.append({**pending.result().metrics, **step.result().metrics})
    names = sorted(set(metrics[0]) - {"peak_memory", "micro_batches", "passes"})
    return parameters(c) | {f"metric {name}": torch.tensor([float(m[name]) for m in metrics]) for name in names}


def pairs(rng: Random) -> list[Any]:
    return texts(rng, count=6, longest=9)


def accumulated(mesh: Any) -> Result:
    """Gradients of two requests, one of a loss that is not a sum over datums; then a step that normalises and clips."""
    c, rng = client(mesh), Random(2)
    c.forward_backward_custom(pairs(rng), coupled).result()
    c.forward_backward(group(rng), "cross_entropy").result()
    found = {f"gradient {name}": x for name, x in gradients(c).items()}
    adam = AdamParams(learning_rate=1e-2, grad_clip_norm=0.1)
    norm = c.optim_step(adam, "num_sequences").result().metrics["grad_norm"]
    return found | parameters(c) | {"norm": torch.tensor(norm)}


def micro_batches(mesh: Any) -> Result:
    """Gradients of a batch that exceeds the budget, streamed and in two passes."""
    results: Result = {}
    loss = lossfns.sum_losses(sft=lossfns.cross_entropy(), few=lossfns.cross_entropy(weigh=lossfns.sequence_sum_mean))
    few = [[float(i < 3)] * d.model_input.length for i, d in enumerate(many())]  # most micro-batches have none of them
    summed = loss.bind(few_weights=few)
    for name, loss_fn in (("streamed", lossfns.cross_entropy()), ("coupled", coupled), ("summed", summed)):
        c = within_budget(mesh, losses=2 if loss_fn is summed else 1)
        assert count_of(c, loss_fn) > 1
        results |= {f"{name} {parameter}": x for parameter, x in gradients(c).items()}
    return results


def within_budget(mesh: Any, losses: int = 1) -> LocalTrainingClient:
    engine = client(None)._engine
    costs = engine.budget.costs(engine.logprobs(many()).inputs, losses=losses)
    return client(mesh, budget=costs.step_bytes(24))


def many() -> list[Any]:
    """Datums of 88 tokens."""
    return texts(Random(3), count=16, longest=12)


def count_of(c: LocalTrainingClient, loss_fn: Any) -> float:
    """The number of micro-batches that these datums take."""
    return c.forward_backward_custom(many(), loss_fn).result().metrics["micro_batches"]


def embeddings(mesh: Any) -> Result:
    """Pooled hidden states, and the gradient of a loss on them."""
    c, data = client(mesh), pairs(Random(4))

    def spread_out(data: list[Any], vectors: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        return torch.stack(vectors).var(0).sum(), {}

    outputs = c.forward(data, "cross_entropy", output="embedding").result().loss_fn_outputs
    c.forward_backward_custom(data, spread_out, output="embedding").result()
    return gradients(c) | {f"embedding {i}": out["embedding"].to_torch() for i, out in enumerate(outputs)}


def one_datum(mesh: Any) -> Result:
    """Fewer datums than ranks."""
    c, data = client(mesh), texts(Random(5), count=1)
    c.forward_backward(data, "cross_entropy").result()
    logprobs = c.forward(data, "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_torch()
    return gradients(c) | {"logprobs": logprobs}


def recomputed(mesh: Any) -> Result:
    """Layers that keep only their input for the backward pass."""
    c = client(mesh)
    c.model.checkpointing = True
    c.forward_backward(group(Random(6)), "cross_entropy").result()
    return gradients(c)


def samples(mesh: Any) -> Result:
    """Samples from the trained weights, and the logprobs of a second sampler."""
    c = client(mesh)
    c.forward_backward(pairs(Random(7)), "cross_entropy").result()
    c.optim_step(AdamParams(learning_rate=0.1)).result()
    prompt = ModelInput.from_ints([1, 2, 3])
    sampler = c.save_weights_and_get_sampling_client()
    drawn = sampler.sample(prompt, 4, SamplingParams(max_tokens=5, seed=3)).result().sequences
    logprobs = c.save_weights_and_get_sampling_client().compute_logprobs(prompt).result()
    return {
        "tokens": torch.tensor([t for s in drawn for t in s.tokens]),
        "logprobs": torch.tensor([*(x for s in drawn for x in s.logprobs), *logprobs[1:]]),
    }


SCENARIOS: dict[str, Callable[[Any], Result]] = {
    "sft": lambda mesh: five_steps(mesh, lossfns.cross_entropy(), pairs),
    "grpo, token mean": lambda mesh: five_steps(mesh, lossfns.grpo(weigh=lossfns.token_mean), group),
    "grpo, sequence mean": lambda mesh: five_steps(
        mesh, lossfns.with_entropy(lossfns.grpo(weigh=lossfns.sequence_mean), 0.1), group
    ),
    "dpo": lambda mesh: five_steps(mesh, lossfns.dpo(), pairs),
    "untied": lambda mesh: five_steps(mesh, lossfns.cross_entropy(), pairs, tied=False),
    "adapters": lambda mesh: five_steps(mesh, lossfns.grpo(), group, rank=2),
    "accumulated": accumulated,
    "micro-batches": micro_batches,
    "embeddings": embeddings,
    "one datum": one_datum,
    "recomputed": recomputed,
    "samples": samples,
}


# Checkpoints


def save(mesh: Any, path: Path) -> None:
    """Save the state after two steps, over an older one."""
    c, rng = client(mesh, seed=1), Random(8)
    c.save_state(path).result()
    for _ in range(2):
        c.forward_backward(pairs(rng), "cross_entropy").result()
        c.optim_step(RATE).result()
    c.save_state(path, overwrite=True, user_metadata={"who": "ranks"}).result()


def export(mesh: Any, path: Path, exported: Path) -> None:
    """Write the model of a checkpoint for transformers, from all ranks together."""
    c = client(mesh, seed=2)
    c.load_state(path).result()
    c.export(exported).result()


def go_on(mesh: Any, path: Path) -> Result:
    """The state of a checkpoint, and the state three steps later."""
    c, rng = client(mesh, seed=2), Random(9)
    c.load_state_with_optimizer(path).result()
    steps = torch.tensor(c.get_info().steps)
    loaded = {f"loaded {name}": x for name, x in parameters(c).items()}
    for _ in range(3):
        c.forward_backward(pairs(rng), "cross_entropy").result()
        c.optim_step(RATE).result()
    other = client(mesh, seed=3)
    other.load_state(path).result()
    weights = {f"weights {name}": x for name, x in parameters(other).items()}
    sampler = c.create_sampling_client(path)
    logprobs = torch.tensor(sampler.compute_logprobs(ModelInput.from_ints([1, 2, 3])).result()[1:])
    return parameters(c) | loaded | weights | {"steps": steps, "sampler": logprobs}


# The command line


def rows_of(folder: Path) -> Path:
    """Write rows that every method can read."""
    row = {"completion": "4", "answer": "4", "chosen": "4", "rejected": "5"}
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}: 2+2=", **row}) + "\n" for i in range(12)))
    return path


def command(folder: Path, method: str, out: Path) -> int:
    sizes = ["--steps", "4", "--batch", "4", "--save-every", "2", "--device", "cpu"]
    sizes += [] if method == "sft" else ["--warmup-steps", "2"]
    sizes += ["--group", "4"] if method == "grpo" else []
    return main(["train", method, "--data", str(folder / "rows.jsonl"), "--out", str(out), *sizes])


def stopped(folder: Path, out: Path, rank: int) -> None:
    """A run in which one rank is told to stop, in its third step."""
    log = Run.log

    def interrupting(run: Run, step: int, *logged: Any) -> None:
        log(run, step, *logged)
        if step == 2 and run.ranks.rank == rank:
            signal.raise_signal(signal.SIGINT)

    Run.log = interrupting  # type: ignore[method-assign]
    try:
        command(folder, "sft", out)
    finally:
        Run.log = log  # type: ignore[method-assign]


# Mistakes that only many ranks can make


MISTAKES = {
    "other data",
    "other calls",
    "other advantages",
    "other models",
    "a loss that draws",
    "a loss that fails on one",
    "saved over",
    "unread",
    "too long",
}


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except LossInputError as error:
        return str(error)
    return "nothing"


def mistakes(mesh: Any, folder: Path) -> tuple[dict[str, str], Result]:
    """The error that each rank gets, and the gradient of the correct requests."""
    rank, c = mesh.get_rank(), client(mesh)
    good, own = pairs(Random(10)), pairs(Random(20 + rank))
    unread = c.forward_backward(good, "cross_entropy", {"no such": 1})
    if rank == 0:
        assert c.get_info().steps == 0  # which one may ask without the others, and nothing is told to it alone
    told_unread = refused(lambda: (unread.future().exception(), c.forward_backward(good, "cross_entropy"))[1])

    def fails_on_one(data: list[Any], logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        if rank == 1:
            raise KeyError("advantage")
        return torch.cat(logprobs_list).sum(), {}

    def draws(data: list[Any], logprobs_list: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        return torch.cat(logprobs_list).sum() * (1 + rank), {}

    biased = lossfns.importance_sampling().bind(
        advantages=[float(rank)] * len(good), old_logprobs=[torch.zeros(d.model_input.length) for d in good]
    )
    c.forward_backward(good, "cross_entropy").result()
    told = {
        "other data": refused(lambda: c.forward_backward(own, "cross_entropy").result()),
        "other calls": refused(lambda: (c.forward(good, "cross_entropy") if rank else c.optim_step(RATE)).result()),
        "other advantages": refused(lambda: c.forward_backward_custom(good, biased).result()),
        "a loss that draws": refused(lambda: c.forward_backward_custom(good, draws).result()),
        "other models": refused(lambda: client(mesh, dim=8 + 8 * rank)),
        "unread": told_unread,
        "too long": refused(lambda: client(mesh, budget=1e4).forward_backward(good, "cross_entropy").result()),
        "saved over": refused(lambda: c.save_weights_for_sampler(folder / "rows.jsonl").result()),
    }
    try:
        c.forward_backward_custom(good, fails_on_one).result()
    except (KeyError, LossInputError) as error:
        told["a loss that fails on one"] = f"{type(error).__name__}: {error}"
    c.forward_backward(good, "cross_entropy").result()
    return told, gradients(c)


if __name__ == "__main__":
    folder, mesh = Path(sys.argv[1]), start("cpu")
    assert mesh is not None
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # runs need not draw
    rank = mesh.get_rank()
    results = {name: scenario(mesh) for name, scenario in SCENARIOS.items()}
    results["from one"] = go_on(mesh, folder / "one")
    save(mesh, folder / "two")
    export(mesh, folder / "two", folder / "exported")
    results["from two"] = go_on(mesh, folder / "two")
    told, results["mistakes"] = mistakes(mesh, folder)
    for method in ("sft", "dpo", "grpo"):
        assert command(folder, method, folder / f"two-{method}") == 0
    stopped(folder, folder / "two-stopped", rank=1)
    assert main(["train", "--resume", str(folder / "one-stopped")]) == 0
    torch.save(results, folder / f"rank{rank}.pt")
    counts = count_of(within_budget(mesh), coupled)
    (folder / f"rank{rank}.json").write_text(json.dumps({"told": told, "micro_batches": counts}))
