"""A look at one batch of a run: the gradient report of its loss, and what each token's logprob gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from lossfns.errors import LossInputError
from lossfns.export.coefficients import token_coefficients
from lossfns.inspect.gradients import GradReport, column_rows, grad_report, json_safe, kind_rows
from lossfns.inspect.probe import loss_of, split_by_datum, visible_columns
from lossfns.train.remote import Client
from lossfns.train.run import BATCH, Run, Trained, write_json

SEQUENCES, TOKENS, CONTEXT = 8, 320, 60
"""The most sequences, the most tokens of each, and the most masked tokens before the first active token."""

Decode = Callable[[Sequence[int]], str]


def write_look(run: Run, client: Client, decode: Decode) -> None:
    """Look at the last batch of a run, if it has trained on any, and write ``batch.json``. All ranks call this.

    Args:
        run: the run.
        client: the client that it trains.
        decode: turns token ids into text.
    """
    if run.trained is not None:
        content = look_at(client, decode, run.trained)
        if run.ranks.rank == 0:
            write_json(run.folder, BATCH, content)


def look_at(client: Client, decode: Decode, trained: Trained) -> dict[str, Any]:
    """Return the content of ``batch.json``: the gradients of a batch under the present weights.

    A batch whose gradients cannot be computed has the reason instead.
    """
    place = {"phase": trained.phase, "step": trained.step}
    try:
        outputs = client.forward(list(trained.data), "cross_entropy").result().loss_fn_outputs
        logprobs = [torch.from_numpy(output["logprobs"].to_numpy()) for output in outputs]
        report = grad_report(trained.loss, trained.data, logprobs)
        rows = sequences(decode, trained, report, logprobs)
    except LossInputError as error:
        return {**place, "reason": str(error)}
    summary = {"loss_fn": report.loss_fn, "loss": report.loss, "l1": report.l1, "cancellation": report.cancellation}
    tables = {"tokens": kind_rows(report), "columns": column_rows(report)}
    content: dict[str, Any] = json_safe({**place, **summary, **tables, "sequences": rows})
    return content


def sequences(decode: Decode, trained: Trained, report: GradReport, logprobs: list[Tensor]) -> list[dict[str, Any]]:
    """Return the tokens of the datums in ``largest_datums``, each with its gradient and the columns that explain it."""
    columns = visible_columns(trained.loss, trained.data, report.shapes)
    flags = {"active": report.active, "clipped": report.clipped}
    by_datum: dict[str, list[Tensor]] = {
        "gradient": report.gradients,
        "logprob": logprobs,
        **{name: split_by_datum(x, report.shapes) for name, x in flags.items() if x is not None},
        **({"advantage": split_by_datum(columns["advantages"], report.shapes)} if "advantages" in columns else {}),
        **({"coefficient": token_coefficients(trained.loss, trained.data)} if loss_of(trained.loss) else {}),
    }
    share = report.sequences()["share"]
    return [
        {
            "datum": i,
            "side": ("chosen", "rejected")[i % 2] if report.pairs else "",
            "share": share[i],
            **token_row(decode, trained.data[i], {name: rows[i] for name, rows in by_datum.items()}),
        }
        for i in largest_datums(report)
    ]


def largest_datums(report: GradReport) -> list[int]:
    """Return the datums of the sequences or pairs with the largest Σ|g|, at most ``SEQUENCES`` datums, in order.

    Half of them become more likely and half less likely, if the batch has enough of both kinds.
    """
    share, total = (report.sequences()[name] for name in ("share", "sum"))
    size = 2 if report.pairs else 1  # both sides of a pair stay together
    largest = sorted(range(len(share) // size), key=lambda i: -sum(share[size * i : size * (i + 1)]))
    more = [i for i in largest if total[size * i] < 0]
    less = [i for i in largest if not total[size * i] < 0]
    in_turns = [i for both in zip_longest(more, less) for i in both if i is not None]
    return [size * i + j for i in sorted(in_turns[: SEQUENCES // size]) for j in range(size)]


def token_row(decode: Decode, datum: Any, columns: dict[str, Tensor]) -> dict[str, Any]:
    """Return the tokens of a datum as texts, and a list of numbers for each column. The first token has none.

    K targets of a position are summed. A long beginning without active tokens is left out, and so is the end of a long
    sequence. ``before`` and ``after`` count the omitted tokens.
    """
    columns = {name: x.double().reshape(len(x), -1).sum(1) for name, x in columns.items()}
    active = columns["active"].nonzero().flatten().tolist()
    first = max(0, (active[0] if active else 0) - CONTEXT)
    end = first + TOKENS
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
    last = targets[-1:].reshape(-1)[:1].tolist()
    texts = pieces(decode, [*datum.model_input.to_ints(), *last])
    count = len(texts) - 1
    return {
        "before": first,
        "after": max(0, count - end),
        "prompt": texts[0] if first == 0 else "",
        "tokens": texts[1:][first:end],
        **{name: x[first:end].tolist() for name, x in columns.items()},
    }


def pieces(decode: Decode, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds. An incomplete character is added by the token that completes it.

    >>> from lossfns.backend.model.tokenizer import ByteTokenizer
    >>> pieces(ByteTokenizer().decode, [97, 195, 169, 256])
    ['a', '', 'é', '']
    """
    texts, done = [], ""
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end])
        complete = not text.endswith("\ufffd")
        texts.append(text[len(done) :] if complete and text.startswith(done) else "")
        done = text if complete else done
    return texts
