"""Sampling: from the weights of the training client, with their logprobs, under the given settings."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np

from lossfns.conformance.base import Check, Finding, refuse, require, worst
from lossfns.conformance.bench import Bench
from lossfns.conformance.checks.outputs import NATS, apart
from lossfns.conformance.client import Row
from lossfns.conformance.rows import BATCH, tokens

PROMPT = tuple(tokens(1, 5))


def name() -> str:
    """Return a name for saved weights that no other run has."""
    return f"lossfns-{uuid.uuid4().hex[:12]}"


def sampler_of(bench: Bench) -> Any:
    """Return a sampling client of the start's weights. It is made once in a session."""
    if bench.sampler is None:
        path = bench.idle().save_for_sampler(name())
        bench.sampler = bench.connection.sampler(path)
    return bench.sampler


def draw(bench: Bench, sampler: Any = None, n: int = 1, **settings: Any) -> list[Any]:
    """Return samples that continue the prompt."""
    connection = bench.connection
    params = connection.types.SamplingParams(**{"max_tokens": 8, **settings})
    prompt = connection.types.ModelInput.from_ints(list(PROMPT))
    future = (sampler or sampler_of(bench)).sample(prompt=prompt, num_samples=n, sampling_params=params)
    return list(connection.wait(future, "sample").sequences)


def sampling(bench: Bench) -> None:
    """The server samples from saved weights: as many sequences as asked for, each with logprobs."""
    trainer = bench.idle()
    try:
        sequences = draw(bench, bench.connection.sampler(trainer.save_for_sampler(name())), n=3)
    except Exception as error:
        refuse(error)
    require(len(sequences) == 3, f"{len(sequences)} sequences for num_samples=3", "sampling-settings")
    for sequence in sequences:
        require(sequence.logprobs is not None, "a sequence has no logprobs", "sampler-logprobs")
        n, m = len(sequence.tokens), len(sequence.logprobs)
        require(n == m, f"a sequence has {n} tokens and {m} logprobs", "sampler-logprobs")


def sequence_ids(bench: Bench) -> None:
    """Each sample has a sequence id of its own, where the SDK knows them."""
    ids = [getattr(sequence, "sequence_id", None) for sequence in draw(bench, n=2) + draw(bench, n=2)]
    if all(i is None for i in ids) and not hasattr(draw(bench)[0], "sequence_id"):
        return
    require(all(ids) and len(set(ids)) == len(ids), f"the sequence ids are {ids}")


def sampled_logprobs(bench: Bench) -> Finding:
    """The logprobs of sampled tokens are those of the training client, at temperature 1."""
    findings = []
    for temperature in (1.0, 0.5):
        sequences = draw(bench, n=2, temperature=temperature, seed=7)
        rows = []
        for sequence in sequences:
            ids = [*PROMPT, *sequence.tokens]
            rows.append(Row(tuple(ids[:-1]), {}).having(target_tokens=ids[1:], weights=np.ones(len(ids) - 1)))
        training = [lp[len(PROMPT) - 1 :] for lp in bench.start_logprobs(rows)]
        sampled = [np.asarray(sequence.logprobs, np.float64) for sequence in sequences]
        findings.append(apart(sampled, training, f"logprobs of samples at temperature {temperature:g}, and of forward",
            2 * NATS))  # fmt: skip
    return worst(findings)


def prompt_logprobs(bench: Bench) -> Finding:
    """compute_logprobs gives None for the first token, and forward's logprobs for the others."""
    row = BATCH[1]
    ids = [*row.tokens, int(row.fields["target_tokens"][-1])]
    prompt = bench.connection.types.ModelInput.from_ints(ids)
    found = bench.connection.wait(sampler_of(bench).compute_logprobs(prompt), "compute_logprobs")
    require(len(found) == len(ids), f"{len(found)} logprobs for {len(ids)} tokens")
    require(found[0] is None, f"the logprob of the first token is {found[0]}")
    sampled = np.asarray(found[1:], np.float64)
    return apart([sampled], bench.start_logprobs([row]), "compute_logprobs and forward", 2 * NATS)


def sampler_is_a_copy(bench: Bench) -> Finding:
    """A sampler keeps the weights that were saved while training goes on."""
    trainer, row = bench.fresh(), BATCH[1]
    sampler = bench.connection.sampler(trainer.save_for_sampler(name()))
    trainer.forward_backward(BATCH)
    trainer.step(learning_rate=1e-2)
    prompt = bench.connection.types.ModelInput.from_ints([*row.tokens, int(row.fields["target_tokens"][-1])])
    found = bench.connection.wait(sampler.compute_logprobs(prompt), "compute_logprobs")
    sampled = np.asarray(found[1:], np.float64)
    return apart([sampled], bench.start_logprobs([row]), "a sampler after a step, and the save", 2 * NATS)


def sampler_is_current(bench: Bench) -> Finding:
    """A sampler has the weights of the moment of the save, after the last step."""
    trainer = bench.fresh()
    trainer.forward_backward(BATCH)
    trainer.step(learning_rate=1e-2)
    row = BATCH[1]
    prompt = bench.connection.types.ModelInput.from_ints([*row.tokens, int(row.fields["target_tokens"][-1])])
    sampler = bench.connection.sampler(trainer.save_for_sampler(name()))
    found = bench.connection.wait(sampler.compute_logprobs(prompt), "compute_logprobs")
    return apart([np.asarray(found[1:], np.float64)], trainer.forward([row]).logprobs,
        "a sampler of weights after a step, and the training client", 2 * NATS)  # fmt: skip


def max_tokens(bench: Bench) -> None:
    """A sample ends after max_tokens, with the reason length, if nothing stops it."""
    for n in (1, 5):
        for sequence in draw(bench, n=2, max_tokens=n):
            length, reason = len(sequence.tokens), str(sequence.stop_reason)
            require(length <= n, f"max_tokens={n} gives {length} tokens")
            # The last token that fits may be one that stops the sample.
            require(reason in ("length", "stop") if length == n else reason == "stop",
                f"a sample of {length} of {n} tokens ended with the reason {reason!r}")  # fmt: skip


def seeds(bench: Bench) -> None:
    """The same seed gives the same sample, and another seed another one."""
    first, again = (draw(bench, seed=11, max_tokens=12)[0].tokens for _ in range(2))
    require(list(first) == list(again), "one seed gives two samples")
    others = [draw(bench, seed=seed, max_tokens=12)[0].tokens for seed in range(12, 18)]
    require(any(list(other) != list(first) for other in others), "six other seeds give the same sample")


def greedy(bench: Bench) -> None:
    """top_k 1 and temperature 0 both take the most probable token."""
    by_k, cold = draw(bench, top_k=1, seed=1)[0], draw(bench, temperature=0.0, seed=2)[0]
    require(list(by_k.tokens) == list(cold.tokens), f"top_k=1 gives {by_k.tokens}, temperature=0 {cold.tokens}")


def stop_tokens(bench: Bench) -> None:
    """A stop token ends a sample, with the reason stop."""
    ids = list(draw(bench, temperature=0.0, max_tokens=6)[0].tokens)
    stop = ids[2]
    stopped = draw(bench, temperature=0.0, max_tokens=6, stop=[int(stop)])[0]
    kept = ids[: ids.index(stop) + 1]
    require(list(stopped.tokens) in (kept, kept[:-1]), f"stop=[{stop}] gives {list(stopped.tokens)} of {ids}")
    require(str(stopped.stop_reason) == "stop", f"the reason is {stopped.stop_reason!r}")


NEEDS = ("sampling",)

CHECKS = (
    Check.of(sampling, "refused", "full", needs=("forward",)),
    Check.of(sequence_ids, "sequence-ids-missing", "full", needs=NEEDS),
    Check.of(sampled_logprobs, "sampler-logprobs", "full", needs=NEEDS),
    Check.of(prompt_logprobs, "prompt-logprobs", "full", needs=NEEDS),
    Check.of(sampler_is_current, "sampler-weights", "full", needs=NEEDS),
    Check.of(sampler_is_a_copy, "sampler-weights", "full", needs=NEEDS),
    Check.of(max_tokens, "sampling-settings", "full", needs=NEEDS),
    Check.of(seeds, "sampling-settings", "full", needs=NEEDS),
    Check.of(greedy, "sampling-settings", "full", needs=NEEDS),
    Check.of(stop_tokens, "sampling-settings", "full", needs=NEEDS),
)
