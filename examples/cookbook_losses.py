"""The custom losses of ``tinker_cookbook``, imported and handed to ``lossfns check`` as they are; nothing is copied.

``pip install tinker-cookbook``, then ``lossfns check examples/cookbook_losses.py:dpo``. ``docs/findings.md`` says what
comes out.
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
    """``dpo_loss_fn``, which ``train_dpo.do_update`` defines inside its loop, with what it closes over there."""
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
    """The function of this name that another one defines in its body, closed over these values."""
    code = next(c for c in outer.__code__.co_consts if isinstance(c, CodeType) and c.co_name == name)
    return FunctionType(code, outer.__globals__, name, None, tuple(CellType(cells[v]) for v in code.co_freevars))


def reverse_kl(data, logprobs_list):
    """``distillation.sdft.reverse_kl_custom_loss``; its datums have K candidates at each position."""
    assert logprobs_list[0].ndim == 2, "[N, K]"
    return reverse_kl_custom_loss(data, logprobs_list)


def brier(data, logprobs_list):
    """``recipes.decisions``: ``probability_loss(brier_score_loss)``; its datums have K choices at the last position."""
    assert logprobs_list[0].ndim == 2, "[N, K]"
    return probability_loss(brier_score_loss)(data, logprobs_list)


def advantages(rewards, groups):
    """``rl.data_processing.compute_advantages``, given groups and giving back one number for each reward."""
    members = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    given = [SimpleNamespace(get_total_rewards=lambda own=own: [rewards[i] for i in own]) for own in members.values()]
    found = dict(zip(chain(*members.values()), torch.cat(compute_advantages(given)).tolist()))
    return [found[i] for i in range(len(rewards))]
