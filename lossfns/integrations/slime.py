"""slime: the hooks ``--custom-pg-loss-reducer-function-path`` and ``--custom-tis-function-path``.

Signatures and scaling as in slime at 624b824a8, 2026-08-21 (``slime/backends/megatron_utils/loss.py``,
``docs/en/get_started/customization.md``). The policy loss of miles, its fork, calls both in the same way (at 1718d1612,
``miles/backends/training_utils/loss/hub/losses.py``). slime computes the term of each token itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lossfns import terms as eq
from lossfns.checks import check_knobs
from lossfns.combine import tis_log_weight
from lossfns.errors import LossInputError
from lossfns.integrations.trainer import fixed_length_of, is_weighed
from lossfns.pack import blank
from lossfns.segments import Level, token_level
from lossfns.tokens import TOKENS, Tokens
from lossfns.weigh import Weighing, check_weigh, token_mean

Reducer = Callable[[Tensor], Tensor]
"""A function from the terms of the tokens ``[N]`` of a micro-batch to a 0-d loss."""


def pg_loss_reducer(weigh: Weighing) -> Callable[..., Reducer]:
    """Write a weighing as slime's reducer of the policy loss.

    slime divides the result by the number of samples of the step, or by that of its tokens under
    ``--calculate-per-token-loss``.

    Args:
        weigh: ``sequence_mean``, ``sequence_sum_mean`` or ``fixed_length(L)``; ``token_mean`` under
            ``--calculate-per-token-loss``, and there nothing else.

    Returns:
        ``make(total_lengths, response_lengths, loss_masks, calculate_per_token_loss)``, which returns the reducer.

    Raises:
        LossInputError: if this is no weighing of tokens; in a call, if slime divides by another count, or if context
            parallelism has split the samples.

    >>> from lossfns import sequence_mean
    >>> reduce = pg_loss_reducer(sequence_mean)([5, 4], [2, 1], [torch.ones(2), torch.ones(1)])
    >>> reduce(torch.tensor([1.0, 3.0, 5.0]))
    tensor(7.)
    """
    check_weigh(weigh, TOKENS)
    length = fixed_length_of(weigh) or 1.0
    if weigh.count is None:
        fix = "Take sequence_sum_mean, or token_mean under --calculate-per-token-loss."
        raise LossInputError("weigh", "a mean, since slime divides", repr(weigh), fix)

    def make(
        total_lengths: Sequence[int],
        response_lengths: Sequence[int],
        loss_masks: Sequence[Tensor],
        calculate_per_token_loss: bool = False,
    ) -> Reducer:
        if calculate_per_token_loss != is_weighed(weigh, token_mean):
            divided_by = "tokens" if calculate_per_token_loss else "samples"
            fix = "--calculate-per-token-loss belongs to token_mean, and to no other weighing."
            raise LossInputError("weigh", f"one that divides by the number of {divided_by}", repr(weigh), fix)

        def reduce(pg_loss: Tensor) -> Tensor:
            t = samples(pg_loss, loss_masks, {})
            return torch.dot(weigh.share(t).to(pg_loss.dtype), t.logprobs) / length

        return reduce

    return make


def tis(cap: float = 2.0, level: Level = token_level) -> Callable[..., tuple[Tensor, Any, dict[str, Tensor]]]:
    """Write ``with_tis(cap, level)`` as slime's function of truncated importance sampling.

    Args:
        cap, level: as for ``with_tis``.

    Returns:
        ``fn(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **rest)``, which returns the weighted
        terms, the masks as they are, and ``tis`` (the weight) and ``tis_clipfrac`` of each token.

    Raises:
        LossInputError: in a call, if context parallelism has split the samples.

    >>> fn, train, rollout, masks = tis(cap=2.0), [torch.tensor([-1.0])], [torch.tensor([-6.0])], [torch.ones(1)]
    >>> fn(None, pg_loss=torch.ones(1), train_log_probs=train, rollout_log_probs=rollout, loss_masks=masks)[0]
    tensor([2.])
    """
    check_knobs({"cap": cap, "level": level})

    def fn(
        args: Any,
        *,
        pg_loss: Tensor,
        train_log_probs: Sequence[Tensor],
        rollout_log_probs: Sequence[Tensor],
        loss_masks: Sequence[Tensor],
        **rest: Any,
    ) -> tuple[Tensor, Any, dict[str, Tensor]]:
        columns = {"old_logprobs": torch.cat([*train_log_probs]), "sampler_logprobs": torch.cat([*rollout_log_probs])}
        t = samples(pg_loss, loss_masks, columns)
        log_weight = tis_log_weight(t, level)
        weight = eq.importance_weight(log_weight, cap)
        capped = (log_weight > math.log(cap)).to(weight.dtype)
        return pg_loss * weight, loss_masks, {"tis": weight, "tis_clipfrac": capped}

    return fn


def samples(pg_loss: Tensor, masks: Sequence[Tensor], columns: Mapping[str, Tensor]) -> Tokens:
    """Return the terms of the tokens in the place of logprobs, with their samples, masks and columns."""
    weights = torch.cat([*masks]).to(pg_loss.device, pg_loss.dtype)
    active = weights != 0
    for name, x in {"pg_loss": pg_loss, **columns}.items():
        if x.shape != weights.shape:
            fix = "Without context parallelism every rank has whole samples."
            raise LossInputError(name, f"shape {tuple(weights.shape)}, that of loss_masks", str(tuple(x.shape)), fix)
    lengths = torch.tensor([len(mask) for mask in masks], device=pg_loss.device)
    blanked = {name: blank(x, active) for name, x in columns.items()}
    return Tokens(blank(pg_loss, active), weights, lengths, blanked)
