"""The time that shared prefixes save in trees: conversations in turns, with a group of completions on each turn.

- tree: the client, which computes each common prefix once, on any number of levels
- independent: the same client with a model that cannot continue a segment, so that it computes every sequence whole

Both compute the same logprobs and gradients. The script checks this before it times them: logprobs to 1e-5 and
gradients to 1e-4 in relative norm, in float64 gradients to 1e-10. "tokens" is the ratio of the computed tokens,
which bounds the gain where attention costs little.

    python benchmarks/trees.py [--rounds 5] [--case "4 turns of 4"] [--model decoder llama]

The models are the embedded decoder and a Llama of Hugging Face's transformers (extra ``hf``).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from memory import elsewhere, peak
from prefix import gradient, logprobs, request_grpo
from side_by_side import device_name, keep_freed_memory, load, race, ratio, save, table
from torch import Tensor, nn

from lossfns import datum_from_tokens
from lossfns.backend import LocalTrainingClient
from lossfns.backend.model.decoder import Decoder
from lossfns.backend.model.prefixes import share_prefixes

VOCABULARY = 4096


class Case(NamedTuple):
    """Conversations with the same system prompt. On each turn follow a message and a group of completions.

    The next turn continues the last completion of the group. Completions have ``completion`` tokens, or up to 24 fewer.
    """

    name: str
    system: int
    message: int
    completion: int
    turns: int
    group: int
    conversations: int = 1


CASES = (
    Case("4 turns of 4", 128, 64, 64, 4, 4),
    Case("4 turns of 4, long prompt", 512, 64, 64, 4, 4),
    Case("2 of 8 turns of 2", 64, 32, 48, 8, 2, conversations=2),
    Case("nothing in common", 0, 128, 128, 1, 1, conversations=8),
)


def sequences(case: Case) -> list[tuple[np.ndarray, int]]:
    """Return random sequences, each with the number of tokens before its last completion."""
    rng = np.random.default_rng(0)
    draw = partial(rng.integers, 0, VOCABULARY)
    system, rows = draw(size=case.system), []
    for _ in range(case.conversations):
        talk = system
        for _ in range(case.turns):
            talk = np.append(talk, draw(size=case.message))
            completions = [draw(size=case.completion - 8 * (i % 4)) for i in range(case.group)]
            rows += [(np.append(talk, completion), len(talk)) for completion in completions]
            talk = rows[-1][0]
    return rows


def datums(case: Case) -> list[Any]:
    """Return datums with random advantages, and logprobs near those of an untrained model."""
    rng, data = np.random.default_rng(1), []
    for tokens, prompt_length in sequences(case):
        count = len(tokens) - 1
        sampled, reference = rng.normal(-np.log(VOCABULARY), 0.2, (2, count))
        fields = {"logprobs": sampled, "ref_logprobs": reference, "advantages": rng.normal(size=1).repeat(count)}
        data.append(datum_from_tokens(tokens.tolist(), prompt_length=prompt_length, **fields))
    return data


def decoder(dtype: torch.dtype) -> nn.Module:
    return Decoder(vocab_size=VOCABULARY, dim=256, layers=4, heads=4, kv_heads=2, hidden=704).to(dtype)


def llama(dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    from lossfns.backend.model.hf import CausalLM

    size = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=4096, **size)
    torch.manual_seed(0)
    return CausalLM(LlamaForCausalLM(config)).to(dtype)


MODELS: dict[str, Callable[[torch.dtype], nn.Module]] = {"decoder": decoder, "llama": llama}


def independent(model: nn.Module) -> nn.Module:
    """Let the model take whole sequences only."""

    class Independent(type(model)):  # type: ignore[misc]
        def forward(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
            return super().forward(tokens, lengths)

    model.__class__ = Independent
    return model


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {"tree": lambda model: model, "independent": independent}


def prepare(case: Case, model: str, kind: str, dtype: torch.dtype) -> tuple[LocalTrainingClient, Callable[[], None]]:
    """Return a client and a request to it, which takes it from tokens to gradients."""
    client = LocalTrainingClient(KINDS[kind](MODELS[model](dtype)), dtype=dtype)
    return client, partial(request_grpo, client, datums(case))


def difference(case: Case, model: str, dtype: torch.dtype, bounds: tuple[float, float]) -> dict[str, float]:
    """Return how far logprobs and gradients are apart; fail if it is more than the bounds."""
    both = [prepare(case, model, kind, dtype) for kind in KINDS]
    ours, theirs = (logprobs(client, datums(case)) for client, _ in both)
    a, b = (gradient(*each) for each in both)
    apart = {"logprobs": float(np.abs(ours - theirs).max()), "gradient": float((a - b).norm() / b.norm())}
    assert apart["logprobs"] <= bounds[0] and apart["gradient"] <= bounds[1], apart
    return apart


def measure(case: Case, model: str, rounds: int) -> dict[str, Any]:
    apart = difference(case, model, torch.float32, (1e-5, 1e-4))
    # The client returns logprobs in float32. The norms of transformers' Llama compute in float32.
    apart64 = difference(case, model, torch.float64, (1e-5, 1e-10 if model == "decoder" else 1e-6))
    runs = {kind: prepare(case, model, kind, torch.float32)[1] for kind in KINDS}
    times = race(runs, rounds)
    return {
        "milliseconds": {kind: round(1e3 * statistics.median(t), 1) for kind, t in times.items()},
        "faster": round(ratio(times, "independent", "tree"), 3),
        "apart": apart,
        "apart_in_float64": apart64,
    }


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=MODELS)
    options = parser.parse_args()
    results = []
    for model in options.model:
        for case in (case for case in CASES if case.name in options.case):
            tokens = [datum.model_input.to_ints() for datum in datums(case)]
            whole, computed = sum(map(len, tokens)), len(share_prefixes(list(map(np.array, tokens))).order)
            memory = {kind: peak(lambda of=(case, model, kind, torch.float32): prepare(*of)[1]) for kind in KINDS}
            measured = elsewhere(partial(measure, case, model, options.rounds))
            fewer = round(whole / computed, 2)
            results.append({"case": case.name, "model": model, "tokens": fewer, **measured, "peak_bytes": memory})
    print(f"grpo, forward + backward in float32; {device_name()}, torch {torch.__version__}")
    header = ["case", "tokens", "tree", "independent", "faster", "logprobs apart", "gradient apart", "in float64"]
    lines = [
        [f"{row['case']}, {row['model']}", f"{row['tokens']:.2f}x"]
        + [f"{row['milliseconds'][kind]:.0f} ms, {row['peak_bytes'][kind] / 2**20:.0f} MiB" for kind in KINDS]
        + [f"{row['faster']:.2f}x", *(f"{row['apart'][name]:.1e}" for name in ("logprobs", "gradient"))]
        + [f"{row['apart_in_float64']['gradient']:.1e}"]
        for row in results
    ]
    print(table(header, lines))
    done = [(row["case"], row["model"]) for row in results]
    rows = [row for row in load("trees") if (row["case"], row["model"]) not in done] + results
    print(f"written: {save('trees', rows).name}")


if __name__ == "__main__":
    main()
