"""How often the host waits, by call: the table of docs/client.md holds what is measured here."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import test_client
import torch
from accelerator import DEVICE, NAME, recorded_waits, waits_of
from test_client import DATA, EMBEDDED, distances, users_loss

import lossfns
from lossfns import ModelInput, target_logprobs, targets_from_labels, weights_from_labels
from lossfns.backend import AdamParams, SamplingParams
from lossfns.logprobs import linear_logprobs

PAGE = Path(__file__).parents[2] / "docs/client.md"


def count(call: Callable[[], Any]) -> int:
    return len(waits_of(call))


def measured() -> dict[str, int]:
    client = test_client.client("tied", NAME)
    sampler = client.save_weights_and_get_sampling_client()
    loss, prompt = lossfns.cross_entropy(), ModelInput.from_ints([1, 2, 3])
    logits = torch.zeros(2, 4, 9, device=DEVICE, requires_grad=True)
    labels = torch.ones(2, 5, dtype=torch.long, device=DEVICE)
    hidden, weight = (torch.zeros(n, 3, device=DEVICE, requires_grad=True) for n in (5, 9))
    ids = torch.ones(5, dtype=torch.long, device=DEVICE)

    def padded(form: Any) -> Any:
        lp = target_logprobs(logits, targets_from_labels(labels))
        result = form.padded(lp, weights_from_labels(labels))
        result[0].backward()
        return result

    def datums() -> None:
        loss(DATA, [torch.zeros(d.model_input.length, device=DEVICE, requires_grad=True) for d in DATA])

    deferred = padded(loss.deferred())[1]
    tokens = len(sampler.sample(prompt, 2, SamplingParams(max_tokens=4, seed=1)).result().sequences[0].tokens)
    sampled = count(lambda: sampler.sample(prompt, 2, SamplingParams(max_tokens=4, seed=1)).result())
    logprobs = linear_logprobs(hidden, weight, ids)
    table = {
        "a loss and its metrics, of datums": count(datums),
        "a loss and its metrics, `padded` or `packed`": count(lambda: padded(loss)),
        "`loss.deferred()`, in every form, and its backward pass": count(lambda: padded(loss.deferred())),
        "`finalise()` of deferred metrics": count(deferred.finalise),
        "`linear_logprobs`": count(lambda: linear_logprobs(hidden, weight, ids)),
        "its backward pass": backward(logprobs),
        "`forward`": count(lambda: client.forward(DATA, "cross_entropy").result()),
        "`forward_backward`": count(lambda: client.forward_backward(DATA, "cross_entropy").result()),
        "`forward_backward_custom`, a loss of `lossfns`": count(
            lambda: client.forward_backward_custom(DATA, loss).result()
        ),
        "`forward_backward_custom`, any other function": count(
            lambda: client.forward_backward_custom(DATA, users_loss).result()
        ),
        "`forward_backward_custom`, over embeddings": count(
            lambda: client.forward_backward_custom(EMBEDDED, distances, output="embedding").result()
        ),
        "`optim_step`": step(test_client.client("tied", NAME)),
        "`sample`, for each token": sampled // tokens,
        "`compute_logprobs`": count(lambda: sampler.compute_logprobs(prompt).result()),
    }
    assert sampled % tokens == 0
    return table


def backward(logprobs: torch.Tensor) -> int:
    with recorded_waits() as waits:
        logprobs.sum().backward()
    return len(waits)


def step(client: Any) -> int:
    for _ in range(2):
        client.forward_backward(DATA, "cross_entropy").result()
        with recorded_waits() as waits:
            client.optim_step(AdamParams(grad_clip_norm=1.0), "num_loss_tokens").result()
    return len(waits)


def documented() -> dict[str, int]:
    _, _, table = PAGE.read_text().partition("| call | waits |\n|---|---|\n")
    cells = (re.fullmatch(r"\| (.*) \| (\d+) \|", row).groups() for row in table.partition("\n\n")[0].splitlines())
    return {label: int(number) for label, number in cells}


def test_the_table_of_waits_is_what_is_measured() -> None:
    assert documented() == measured()
