"""The columns of a batch: how each is made from the examples, the samples and the clients of a run.

One table, ``MAKERS``, has a maker for each column. A column whose meaning depends on the loss has one for each loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lossfns.advantages import group_advantages
from lossfns.datum import Datum
from lossfns.errors import LossInputError
from lossfns.frame import datum_from_tokens
from lossfns.losses.unpaired import kto_reference_point
from lossfns.train.losses import AnyLoss, OwnLoss, method_of

CHUNK = 256
"""Sequences in one request without a gradient."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The datums of a step, and what is known about them.

    Attributes:
        data: the datums.
        policy, reference, teacher: clients; None if the run has none.
        groups: the label of each datum's group: its problem, or the whole batch.
        sampled: the sampler's logprobs of each datum, in the frame of its targets; for samples.
        rewards: the reward of each sample.
        labels: 1 for each answer that is desirable or chosen, 0 for the others.
        scale: the scale of the advantages, ``"std"`` or ``"none"``.
        history: the metrics of the steps before.
        metrics: metrics of the batch itself.
    """

    data: list[Datum]
    policy: Any
    reference: Any = None
    teacher: Any = None
    groups: Sequence[int] = ()
    sampled: Sequence[Any] = ()
    rewards: Sequence[float] = ()
    labels: Sequence[float] = ()
    scale: str = "std"
    history: Sequence[Mapping[str, float]] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


def target_logprobs(client: Any, data: Sequence[Datum]) -> list[Any]:
    """Return the logprobs of each datum's targets under a client's weights."""
    plain = list(map(without_columns, data))
    parts = (plain[i : i + CHUNK] for i in range(0, len(plain), CHUNK))
    outputs = [client.forward(part, "cross_entropy").result().loss_fn_outputs for part in parts]
    return [output["logprobs"] for part in outputs for output in part]


def without_columns(datum: Datum) -> Datum:
    """Return a datum with its targets and weights alone: the built-in cross-entropy refuses other fields."""
    return Datum(datum.model_input, {name: datum.loss_fn_inputs[name] for name in ("target_tokens", "weights")})


def weights_of(datum: Datum) -> np.ndarray:
    row: np.ndarray = datum.loss_fn_inputs["weights"].to_numpy()
    return row


def tokens_of(datum: Datum) -> list[int]:
    """Return all tokens of a datum: its input, and its last target."""
    return [*datum.model_input.to_ints(), int(datum.loss_fn_inputs["target_tokens"].to_numpy()[-1])]


# Makers


def advantages(batch: Batch) -> list[float]:
    """Return the advantage of each sample relative to its group."""
    values: list[float] = group_advantages(batch.rewards, batch.groups, scale=batch.scale).tolist()
    return values


def is_right(batch: Batch) -> list[float]:
    """Return the labels of the data; for samples, 1 where the reward is above ½, and 0 elsewhere."""
    return list(batch.labels) or [float(reward > 0.5) for reward in batch.rewards]


def win_rate(batch: Batch) -> list[float]:
    """Return the share of the samples of the same problem that each sample beats; a tie counts ½."""
    members: dict[int, list[float]] = {}
    for reward, group in zip(batch.rewards, batch.groups):
        members.setdefault(group, []).append(reward)

    def beaten(reward: float, others: Sequence[float]) -> float:
        return sum((reward > other) + 0.5 * (reward == other) for other in others) / len(others)

    return [beaten(reward, members[group]) for reward, group in zip(batch.rewards, batch.groups)]


def weights_if_right(batch: Batch) -> list[Any]:
    """Return the weights of each right sample, and zeros for each wrong sample."""
    return [weights_of(datum) * right for datum, right in zip(batch.data, is_right(batch))]


def kl_of_other_answers(batch: Batch) -> list[float]:
    """Return the reference point of KTO: the log-ratios of answers to other prompts of the batch.

    Each prompt gets the answer of the next datum. An answer begins with the first token that is trained.
    """
    starts = [int(np.flatnonzero(weights_of(datum))[0]) + 1 for datum in batch.data]
    tokens = [tokens_of(datum) for datum in batch.data]
    pairs = zip(tokens, starts, [*tokens[1:], tokens[0]], [*starts[1:], starts[0]])
    others = [datum_from_tokens([*a[:i], *b[j:]], prompt_length=i) for a, i, b, j in pairs]
    clients = (batch.policy, batch.reference)
    logprobs, ref_logprobs = ([x.to_torch() for x in target_logprobs(each, others)] for each in clients)
    weights = [weights_of(datum).tolist() for datum in others]
    return [kto_reference_point(logprobs, ref_logprobs, weights)] * len(batch.data)


DECAY = 0.9
"""The share of a moving average that one step keeps."""


def mean_margin_before(batch: Batch) -> list[float]:
    """Return M₀ of β-DPO: the moving average of the mean margin over the steps before, 0 before the first one."""
    margins = [row["margin"] for row in batch.history if "margin" in row]
    mean = margins[0] if margins else 0.0
    for margin in margins[1:]:
        mean = DECAY * mean + (1 - DECAY) * margin
    return [mean] * len(batch.data)


def mean_of_classes(batch: Batch) -> list[float]:
    """Return z of BCO: the moving average of the mean of two means, the log-ratios of desirable and of other answers.

    A batch with answers of one kind alone leaves the average as it is.
    """
    logprobs, ref_logprobs = (target_logprobs(client, batch.data) for client in (batch.policy, batch.reference))
    changes = [lp.to_numpy() - ref.to_numpy() for lp, ref in zip(logprobs, ref_logprobs)]
    log_ratios = [float(weights_of(datum) @ change) for datum, change in zip(batch.data, changes)]
    kinds = ([x for x, label in zip(log_ratios, batch.labels) if label == kind] for kind in (1, 0))
    means = [np.mean(kind) for kind in kinds if kind]
    before = [row["reference_point"] for row in batch.history if "reference_point" in row]
    z = float(np.mean(means))
    if before:
        z = DECAY * before[-1] + (1 - DECAY) * z if len(means) == 2 else before[-1]
    return [z] * len(batch.data)


class Maker(NamedTuple):
    """How a column is made.

    Attributes:
        methods: the training methods that can make it.
        make: returns a number or a row for each datum of a batch.
    """

    methods: tuple[str, ...]
    make: Callable[[Batch], Sequence[Any]]


EVERY = ("supervised", "preference", "unpaired", "policy", "distillation")
POLICY, PAIRED = ("policy",), ("preference",)

MAKERS: dict[str, Maker] = {
    "advantages": Maker(POLICY, advantages),
    "rewards": Maker(POLICY, lambda batch: batch.rewards),
    "sppo/rewards": Maker(POLICY, win_rate),
    "old_logprobs": Maker(POLICY, lambda batch: batch.sampled),
    "sampler_logprobs": Maker(POLICY, lambda batch: batch.sampled),
    "ref_logprobs": Maker(EVERY, lambda batch: target_logprobs(batch.reference, batch.data)),
    "teacher_logprobs": Maker(("policy", "distillation"), lambda batch: target_logprobs(batch.teacher, batch.data)),
    "groups": Maker(("policy", "preference", "unpaired"), lambda batch: batch.groups),
    "labels": Maker(("policy", "unpaired", "preference"), is_right),
    "nll_weights": Maker(POLICY, weights_if_right),
    "kto/reference_point": Maker(("unpaired", "preference"), kl_of_other_answers),
    "beta_dpo/reference_point": Maker(PAIRED, mean_margin_before),
    "bco/reference_point": Maker(("unpaired", "preference"), mean_of_classes),
}
"""The maker of each column. The key is ``LOSS/COLUMN`` for a column whose meaning depends on the loss."""

OUTPUTS = ("entropy", "sum_square_probs")
"""Columns that the model in this process supplies itself."""

MISSING_SOURCES = {
    "target_margin": "scores of both sides of a pair",
    "reference_point": "an estimate that the caller keeps, such as the value of each prompt under the reference",
    "sft_weights": "demonstrations of an expert among the samples",
    "ce_weights": "the tokens that a tool returned",
    "positive_weights": "weights that separate the samples by the sign of their advantages",
    "values": "a value head",
    "old_values": "a value head",
    "returns": "a value head",
}
"""The sources of the columns that a run cannot make."""


def readers(loss: AnyLoss, column: str) -> Iterator[str]:
    """Yield the names of the losses that read a column: those of the parts of a sum first, then the loss's own."""
    parts = {} if isinstance(loss, OwnLoss) else loss.parts
    for part in parts.values():
        if column in part.loss.reads:
            yield from readers(part.loss, column)
    yield loss.name


def maker_of(loss: AnyLoss, column: str) -> Maker | None:
    """Return the maker of a column for a loss; None if nothing makes it."""
    keys = [*(f"{name}/{column}" for name in readers(loss, column)), column]
    return next((MAKERS[key] for key in keys if key in MAKERS), None)


def compares_samples(loss: AnyLoss) -> bool:
    """Return whether a loss reads a column that compares the samples of a problem with one another."""
    makers = (maker_of(loss, column) for column in loss.reads)
    return any(maker is not None and maker.make in (advantages, win_rate) for maker in makers)


def check_columns(loss: AnyLoss, *, teacher: bool, outputs: bool) -> None:
    """Refuse a loss that reads a column which nothing in the run can make.

    Args:
        loss: the loss.
        teacher: whether the run has a teacher.
        outputs: whether the model is in this process, and supplies its entropy.

    Raises:
        LossInputError: naming the column and the source that the run lacks.
    """
    method = method_of(loss)
    for column in loss.reads:
        if column in OUTPUTS and outputs:
            continue
        if column == "teacher_logprobs" and not teacher:
            raise LossInputError("--teacher", f"a teacher, whose logprobs {loss.name} reads", "none", "Name a model.")
        maker = maker_of(loss, column)
        if maker is None or method not in maker.methods:
            default = "the model itself, in this process" if column in OUTPUTS else "your code"
            what = MISSING_SOURCES.get(column, default)
            got = f"{loss.name}, which reads {column}: it takes {what}"
            fix = f"Train it in a loop of your own, with loss.bind({column}=...)."
            raise LossInputError("--loss", "a loss whose columns a run can make", got, fix)
    if method == "distillation" and not teacher:
        raise LossInputError("--teacher", f"a teacher, from which {loss.name} learns", "none", "Name a model.")


def columns_of(loss: AnyLoss, batch: Batch) -> dict[str, Sequence[Any]]:
    """Make the columns that the loss reads, except those that the model supplies or that the datums hold."""
    missing = [name for name in loss.reads if name not in OUTPUTS and name not in batch.data[0].loss_fn_inputs]
    makers = {name: maker_of(loss, name) for name in missing}
    return {name: maker.make(batch) for name, maker in makers.items() if maker is not None}
