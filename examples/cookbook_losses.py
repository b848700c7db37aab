"""The custom losses of ``tinker_cookbook`` for ``lossfns check``: imported and not changed.

Run ``pip install tinker-cookbook``, then ``lossfns check examples/cookbook_losses.py:dpo``. ``docs/findings.md`` has
the results.
"""

from itertools import chain
from types import CellType, CodeType, FunctionType, SimpleNamespace

import torch
from tinker_cookbook.distillation.sdft import reverse_kl_custom_loss
from tinker_cookbook.preference import train_dpo
from tinker_cookbook.recipes.decisions.forecasting import brier_score_loss
from tinker_cookbook.recipes.decisions.train import probability_loss
from tinker_cookbook.rl.data_processing import compute_advantages


def dpo(data, logprobs_list):
    """Call ``dpo_loss_fn``, a closure that ``train_dpo.do_update`` defines, with the values that it closes over."""
    ref = [torch.tensor(datum.loss_fn_inputs["ref_logprobs"].data) for datum in data]
    closure = inner(
        train_dpo.do_update,
        "dpo_loss_fn",
        config=SimpleNamespace(dpo_beta=0.1),
        chosen_data=data[0::2],
        rejected_data=data[1::2],
        chosen_ref_logprob_seqs=ref[0::2],
        rejected_ref_logprob_seqs=ref[1::2],
    )
    return closure(data, logprobs_list)


def inner(outer, name, **cells):
    """Return the function ``name`` that ``outer`` defines in its body, with ``cells`` as its closure."""
    code = next(c for c in outer.__code__.co_consts if isinstance(c, CodeType) and c.co_name == name)
    return FunctionType(code, outer.__globals__, name, None, tuple(CellType(cells[v]) for v in code.co_freevars))


def reverse_kl(data, logprobs_list):
    """Call ``distillation.sdft.reverse_kl_custom_loss``. Its datums have K candidates at each position."""
    assert logprobs_list[0].ndim == 2, "[N, K]"
    return reverse_kl_custom_loss(data, logprobs_list)


def brier(data, logprobs_list):
    """Call ``probability_loss(brier_score_loss)`` of ``recipes.decisions``. The last position has K choices."""
    assert logprobs_list[0].ndim == 2, "[N, K]"
    return probability_loss(brier_score_loss)(data, logprobs_list)


def advantages(rewards, groups):
    """Call ``rl.data_processing.compute_advantages`` for these groups; return one number for each reward."""
    members = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    trajectories = [SimpleNamespace(get_total_rewards=lambda m=m: [rewards[i] for i in m]) for m in members.values()]
    by_index = dict(zip(chain(*members.values()), torch.cat(compute_advantages(trajectories)).tolist()))
    return [by_index[i] for i in range(len(rewards))]
