"""``Loss``: a numerator over a denominator, both sums over rows, callable as ``(data, logprobs_list)``."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec

import torch
from torch import Tensor

from lossfns import terms as eq
from lossfns.checks import check_knobs, number
from lossfns.errors import LossInputError, did_you_mean, warn
from lossfns.pack import pack, pack_weights
from lossfns.segments import active_mean, nonempty, sequence_sum, spread
from lossfns.tokens import COLUMNS, ON_POLICY, PAIRS, TOKENS, Tokens
from lossfns.values import doubt, judge, readings
from lossfns.weigh import Weighing, check_weigh

Statistics = dict[str, Tensor]
Terms = Callable[[Tokens], tuple[Tensor, Statistics]]
KL = Callable[[Tensor, Tensor], Tensor]
P = ParamSpec("P")


@dataclass(frozen=True, repr=False, eq=False)
class Loss:
    """L = Σ share·term / Σ count over the rows (tokens, targets or pairs) of a batch.

    Attributes:
        name, knobs: for ``repr``, metrics and logs.
        reads: the columns it needs besides ``logprobs`` and ``weights``.
        terms: ``t -> (loss of each row, statistics of each row)``, pure torch; reads packed ``Tokens``.
        share: ``t -> coefficient of each row`` within its sequence or pair; reads no logprobs.
        count: ``t -> this batch's part of the denominator``, which adds over micro-batches and ranks;
            ``None`` for a raw sum, whose denominator is 1 however the batch is split.
        rows: what a row is: ``"tokens"``, ``"targets"`` or ``"pairs"``.
    """

    name: str
    knobs: Mapping[str, Any]
    reads: tuple[str, ...]
    terms: Terms
    share: Callable[[Tokens], Tensor]
    count: Callable[[Tokens], Tensor] | None
    rows: str = TOKENS

    @property
    def signed(self) -> bool:
        """Whether weights may be negative: for plain likelihood, where they are coefficients."""
        return self.rows != PAIRS and not self.reads

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={show(value)}' for name, value in self.knobs.items())})"

    def __call__(self, data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        """The contract: a 0-d loss and plain float metrics, all columns read from the datums."""
        return BoundLoss(self)(data, logprobs_list)

    def bind(self, **columns: Any) -> BoundLoss:
        """The loss with side columns, and optionally ``denominator=`` or ``align=``; see ``BoundLoss``."""
        return BoundLoss(self).bind(**columns)

    def denominator(self, data: Sequence[Any]) -> float:
        """This batch's part of the denominator, before any forward pass; adds over chunks and ranks."""
        return BoundLoss(self).denominator(data)


def show(value: Any) -> str:
    return getattr(value, "__name__", repr(value))


def evaluate(loss: Loss, t: Tokens, denominator: Tensor | float | None = None) -> tuple[Tensor, Statistics]:
    """The one reduction: Σ share·term / denominator, and the sum of each statistic over the active rows.

    Without a ``denominator`` the batch's own ``count`` is used. A raw sum is never divided.
    """
    term, statistics = loss.terms(t)
    share = loss.share(t)
    total = torch.dot(share.to(term.dtype), term)
    if loss.count is not None:
        total = total / (loss.count(t) if denominator is None else denominator)
    active = (share != 0 if loss.rows == PAIRS else t.active).to(total.dtype)
    sums = {name: torch.dot(active, x.detach().to(active.dtype)) for name, x in statistics.items()}
    return total, {"rows": active.sum(), **sums}


@dataclass(frozen=True)
class BoundLoss:
    """A ``Loss`` with its side columns: what goes to ``forward_backward_custom(data, loss_fn)``.

    A bound column replaces the datums' own. ``denominator`` replaces the batch's count, so that chunks sum
    exactly to the whole; ``align="truncate"`` cuts the rows of a datum to the shortest instead of
    refusing; ``grad_l1=True`` adds the metric Σ|∂L/∂logprob|.
    """

    loss: Loss
    columns: Mapping[str, Any] = field(default_factory=dict)
    divisor: float | None = None
    align: str = "strict"
    grad_l1: bool = False

    def bind(
        self,
        *,
        denominator: float | None = None,
        align: str | None = None,
        grad_l1: bool | None = None,
        **columns: Any,
    ) -> BoundLoss:
        """The same with more bound; what is bound again is replaced."""
        with named(self.loss):
            check_bound(self.loss, columns, denominator, align)
        return replace(
            self,
            columns={**self.columns, **columns},
            divisor=self.divisor if denominator is None else float(denominator),
            align=align or self.align,
            grad_l1=self.grad_l1 if grad_l1 is None else grad_l1,
        )

    def denominator(self, data: Sequence[Any]) -> float:
        """This batch's part of the denominator; 1 for a raw sum, which ignores any bound denominator."""
        if self.loss.count is None:
            return 1.0
        with named(self.loss):
            t = pack_weights(data, self.loss.reads, self.columns, rows=self.loss.rows, align=self.align)
            count = float(self.loss.count(t))
            if math.isnan(count):
                raise not_divisible(count)
        return count

    def __call__(self, data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        with named(self.loss):
            return self.measured(self.packed(data, logprobs_list))

    def value(self, data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Tensor:
        """The loss alone, for a chunk of a batch whose metrics are taken as a whole; nothing goes to the host."""
        with named(self.loss):
            return evaluate(self.loss, self.packed(data, logprobs_list), self.divisor)[0]

    def packed(self, data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> Tokens:
        return pack(data, logprobs_list, self.loss.reads, self.columns, rows=self.loss.rows, align=self.align)

    def part(self, which: slice) -> BoundLoss:
        """The same for some of the datums: every bound column is cut to theirs."""
        columns = {name: given if given is ON_POLICY else given[which] for name, given in self.columns.items()}
        return replace(self, columns=columns)

    def measured(self, t: Tokens) -> tuple[Tensor, dict[str, float]]:
        """Loss and metrics of a packed batch; metrics and checks take one transfer to the host."""
        loss = self.loss
        total, sums = evaluate(loss, t, self.divisor)
        totals = {
            "loss": total.detach(),
            "tokens": t.active.sum(),
            "sequences_empty": (~nonempty(t)).sum(),
            **({} if loss.count is None else {"count": loss.count(t)}),
            **({"grad_l1": grad_l1(total, t)} if self.grad_l1 else {}),
        }
        device = [*totals.values(), *sums.values(), *readings(t, loss.rows)]
        host = torch.stack([x.to(total.dtype) for x in device]).tolist()
        judge(host[len(totals) + len(sums) :], t, signed=loss.signed)
        metrics = self.metrics(dict(zip(totals, host)), dict(zip(sums, host[len(totals) :])))
        assert t.lengths is not None  # the door made them
        return total, metrics | {"sequences": float(len(t.lengths))}

    def metrics(self, totals: dict[str, float], sums: dict[str, float]) -> dict[str, float]:
        """Metrics of the contract from host sums; each statistic becomes its mean over the active rows."""
        rows = sums.pop("rows")
        count = totals.get("count", 1.0)
        if self.divisor is None and rows == 0:
            fix = "Bind denominator= where this is one chunk of a larger batch."
            raise LossInputError("weights", "at least one active token in the batch", "only zeros", fix)
        if math.isnan(count) or (self.divisor is None and count <= 0):
            raise not_divisible(count)
        if not math.isfinite(totals["loss"]):
            fix = "A finite log_ratio_cap keeps exp from overflowing."
            raise LossInputError("loss", "a finite value", f"{totals['loss']:g}", fix)
        means = {name: total / rows if rows else 0.0 for name, total in sums.items()}
        pairs = {"pairs": rows} if self.loss.rows == PAIRS else {}
        divisor = count if self.divisor is None or self.loss.count is None else self.divisor
        metrics = {**totals, "denominator": divisor, **pairs, **means}
        doubt(metrics)
        return metrics


SUMS = ("tokens", "sequences", "sequences_empty", "pairs", "count")
DIVIDED = ("loss", "grad_l1")


def merge_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of a whole batch from those of its chunks, exactly.

    Counts add; statistics are averaged by their rows; the loss (and ``grad_l1``) is Σ loss·denominator / Σ count,
    which is Σ loss for chunks that were bound to the whole batch's denominator, and for raw sums.
    """
    if not parts:
        raise LossInputError("parts", "the metrics of at least one chunk", "none", "Merge after the first chunk.")
    row_name = "pairs" if "pairs" in parts[0] else "tokens"
    added = [name for name in parts[0] if name in SUMS or name.endswith(":sum")]
    sums = {name: sum(part[name] for part in parts) for name in added}
    rows = sums[row_name] or 1.0
    denominator = sums.get("count", 1.0)
    divided = [name for name in DIVIDED if name in parts[0]]
    totals = {name: sum(part[name] * part["denominator"] for part in parts) / (denominator or 1.0) for name in divided}
    means = [name for name in parts[0] if name not in (*added, *divided, "denominator")]
    merged = {name: sum(part[name] * part[row_name] for part in parts) / rows for name in means}
    return {**totals, **sums, "denominator": denominator, **merged}


def grad_l1(total: Tensor, t: Tokens) -> Tensor:
    """Σ|∂L/∂logprob| over the batch."""
    if not total.requires_grad:
        fix = "Pass leaves with requires_grad=True, outside no_grad."
        raise LossInputError("logprobs_list", "tensors that require grad, for grad_l1", "constants", fix)
    return torch.autograd.grad(total, t.logprobs, retain_graph=True)[0].abs().sum()


def not_divisible(count: float) -> LossInputError:
    fix = "A mean needs weights with a positive sum; token_sum takes any."
    return LossInputError("weights", "a denominator above 0", f"{count:g}", fix)


@contextmanager
def named(loss: Loss) -> Iterator[None]:
    """Name the loss in an error that passes through."""
    try:
        yield
    except LossInputError as error:
        error.loss = loss.name
        raise


def check_bound(loss: Loss, columns: Mapping[str, Any], denominator: float | None, align: str | None) -> None:
    known = {*COLUMNS, *loss.reads}
    for name, value in columns.items():
        if name not in known:
            got, fix = f"the name {name!r}", did_you_mean(name, known | {"denominator", "align", "grad_l1"})
            raise LossInputError("bind", "the name of a column", got, fix)
        if value is None or (value is ON_POLICY and name != "old_logprobs"):
            fix = "Leave it out to read the datums' own."
            raise LossInputError(name, "one row per datum", repr(value), fix)
        if name != "weights" and name not in loss.reads:
            warn(f"{loss!r} does not read {name}: binding it has no effect")
    if denominator is not None:
        fix = "Take it from loss.denominator(whole_batch)."
        value = denominator.item() if isinstance(denominator, Tensor) and denominator.numel() == 1 else denominator
        number("denominator", value, "a finite number above 0", lambda d: d > 0, fix)
    if align not in (None, "strict", "truncate"):
        raise LossInputError(
            "align", "'strict' or 'truncate'", repr(align), did_you_mean(str(align), ("strict", "truncate"))
        )


def weighed(terms: Terms, reads: Sequence[str], weigh: Weighing, rows: str = TOKENS) -> Loss:
    """A loss from its terms and a weighing of its rows; ``method`` names it."""
    check_weigh(weigh, rows)
    return Loss("loss", {}, tuple(reads), terms, weigh.share, weigh.count, rows)


def method(preset: Callable[P, Loss]) -> Callable[P, Loss]:
    """A preset as a named loss: its name and arguments become the loss's ``name`` and ``knobs``, once checked."""
    signature = inspect.signature(preset)

    @functools.wraps(preset)
    def build(*args: P.args, **kwargs: P.kwargs) -> Loss:
        for name in kwargs:
            if name not in signature.parameters:
                hint = did_you_mean(name, signature.parameters)
                raise TypeError(f"{preset.__name__}() has no knob {name!r}. {hint}")
        knobs = signature.bind(*args, **kwargs)
        knobs.apply_defaults()
        with_name = functools.partial(replace, name=preset.__name__, knobs=dict(knobs.arguments))
        try:
            check_knobs(knobs.arguments)
            return with_name(preset(*args, **kwargs))
        except LossInputError as error:
            error.loss = preset.__name__
            raise

    return build


def innermost(loss: Loss, *columns: str) -> None:
    """Refuse to wrap what is no loss, or one whose term already contains what the combinator must not touch."""
    if not isinstance(loss, Loss):
        raise LossInputError("loss", "a Loss such as ppo()", show(loss), "Call the preset: ppo(), not ppo.")
    for name in columns:
        if name in loss.reads:
            fix = "Apply with_kl last, with_tis before it, dual_clip first: with_kl(with_tis(ppo()), kl_beta=0.01)."
            raise LossInputError("loss", f"a loss that does not read {name}", repr(loss), fix)
    if loss.rows != TOKENS:
        fix = "It works on a term of each token."
        raise LossInputError("loss", "a loss whose rows are tokens", f"{loss!r} over {loss.rows}", fix)


@method
def with_kl(loss: Loss, kl_beta: float = 1e-3, kl: KL = eq.k3) -> Loss:
    """l + β·KL(lp, ref): the same share and denominator as the loss itself, not importance-weighted.

    Reads ``ref_logprobs`` besides the loss's own columns; with ``kl_beta=0`` it is the loss.
    """
    innermost(loss, "ref_logprobs")
    if kl_beta == 0:
        return loss
    if kl is eq.k1:
        warn("k1 in a loss has an expected gradient of 0: use k2 or k3")

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        term, statistics = loss.terms(t)
        divergence = kl(t.logprobs, t.ref_logprobs)
        return term + kl_beta * divergence, {**statistics, "kl_ref": divergence.detach()}

    return replace(loss, reads=(*loss.reads, "ref_logprobs"), terms=terms)


def token_level(t: Tokens, log_weight: Tensor) -> Tensor:
    """Each token by itself."""
    return log_weight


def sequence_level(t: Tokens, log_weight: Tensor) -> Tensor:
    """Σ over the sequence's active tokens: the product of its ratios."""
    return spread(t, sequence_sum(t, log_weight))


def geometric_level(t: Tokens, log_weight: Tensor) -> Tensor:
    """Mean over the sequence's active tokens: the geometric mean of its ratios."""
    return spread(t, active_mean(t, log_weight))


@method
def with_tis(loss: Loss, cap: float = 2.0, level: Callable[[Tokens, Tensor], Tensor] = token_level) -> Loss:
    """min(exp(old − sampler), cap)·l: truncated importance sampling for logprobs that the sampler got wrong.

    Reads ``sampler_logprobs`` and ``old_logprobs`` besides the loss's own columns. The weight is constant.
    """
    innermost(loss, "ref_logprobs", "sampler_logprobs")

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        term, statistics = loss.terms(t)
        log_weight = level(t, t.old_logprobs - t.sampler_logprobs)
        weight = eq.importance_weight(log_weight, cap)
        capped = log_weight > math.log(cap)
        return weight * term, {**statistics, "tis_weight": weight, "tis_capped": capped}

    return replace(loss, reads=tuple(dict.fromkeys((*loss.reads, "old_logprobs", "sampler_logprobs"))), terms=terms)


@method
def dual_clip(loss: Loss, c: float | None = 3.0) -> Loss:
    """min(l, −c·A) where A < 0: bounds what a token with a large ratio can be pushed down by.

    Ye et al. 2020, arXiv:1912.09729. ``c=None`` leaves the loss as it is.
    """
    innermost(loss, "ref_logprobs", "sampler_logprobs")
    if "advantages" not in loss.reads:
        raise LossInputError("loss", "a loss that reads advantages", repr(loss), "There is nothing to clip by.")
    if c is None:
        return loss

    def terms(t: Tokens) -> tuple[Tensor, Statistics]:
        term, statistics = loss.terms(t)
        binds = (t.advantages < 0) & (term.detach() > -c * t.advantages)
        return eq.dual_clipped(term, t.advantages, c), {**statistics, "clip_dual": binds}

    return replace(loss, terms=terms)
