"""lossfns: the reference implementation of LLM post-training losses, in pure PyTorch.

Every loss is an object with the contract of the hosted training APIs,
``(data, logprobs_list) -> (loss, metrics)``:

    >>> import torch
    >>> from lossfns import datum_from_tokens, grpo
    >>> loss_fn = grpo(clip=(0.8, 1.2), kl_beta=0.001)
    >>> data = [datum_from_tokens([1, 2, 3], prompt_length=1), datum_from_tokens([1, 2, 4], prompt_length=1)]
    >>> logprobs = [torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-1.0, -3.0], requires_grad=True)]
    >>> old = [[-1.0, -2.0], [-1.0, -3.0]]
    >>> bound = loss_fn.bind(advantages=[1.0, -1.0], old_logprobs=old, ref_logprobs=old)
    >>> loss, metrics = bound(data, logprobs)
    >>> loss.backward()
    >>> logprobs[0].grad
    tensor([-0.2500, -0.2500])

A batch may be split in any way. ``D = bound.denominator(data)`` adds over micro-batches and ranks.
Bind ``denominator=D`` and the columns of each part: the losses of the parts then sum exactly to the loss of the batch.
"""

from lossfns import export, kl, rollout
from lossfns.advantages import group_advantages, group_metrics
from lossfns.combine import with_dual_clip, with_kl, with_rollout_weight, with_tis
from lossfns.datum import Datum, EncodedTextChunk, ModelInput, TensorData
from lossfns.describe import describe
from lossfns.errors import LossInputError, LossWarning
from lossfns.export.coefficients import token_coefficients
from lossfns.export.token_gradient import token_gradient
from lossfns.frame import (
    align_sampler_logprobs,
    datum_from_candidates,
    datum_from_model_input_weights,
    datum_from_tokens,
)
from lossfns.kl import binary_kl, binary_tv, k1_plus, k3_plus, k3_uncapped, k_abs, k_squared
from lossfns.labels import targets_from_labels, weights_from_labels, weights_from_mask
from lossfns.logprobs.linear import linear_logprobs
from lossfns.logprobs.target import target_logprobs
from lossfns.loss import BoundLoss, Loss, evaluate
from lossfns.losses.contrastive import info_nce
from lossfns.losses.distillation import (
    raw_support,
    renormalised_support,
    sampled_reverse_kl,
    tail_support,
    top_k_forward_kl,
    top_k_jsd,
    top_k_mixed_kl,
    top_k_reverse_kl,
)
from lossfns.losses.policy import dapo, grpo, importance_sampling, ppo, reinforce
from lossfns.losses.preference import dpo, orpo
from lossfns.losses.regression import dro
from lossfns.losses.sequence import gspo, gspo_token
from lossfns.losses.supervised import cross_entropy, dft, focal, multi_target_cross_entropy, sft_phi, unlikelihood
from lossfns.losses.trust import sapo
from lossfns.losses.unpaired import kto
from lossfns.losses.weighted import cispo
from lossfns.metrics import merge_metrics
from lossfns.pack import pack
from lossfns.rollout import TokenWeight
from lossfns.sampler import (
    accepted_weights,
    proximal_logprobs,
    rollout_summary,
    support_logprobs,
    top_p_support,
)
from lossfns.segments import geometric_level, maximum_level, sequence_level, token_level
from lossfns.terms import k1, k2, k3
from lossfns.tokens import ON_POLICY, Rows, Tokens
from lossfns.version import __version__ as __version__
from lossfns.weigh import (
    Weighing,
    datum_mean,
    datum_sum,
    fixed_length,
    pair_mean,
    pair_sum,
    sequence_mean,
    sequence_sum_mean,
    token_mean,
    token_sum,
)

__all__ = [
    "ON_POLICY",
    "BoundLoss",
    "Datum",
    "EncodedTextChunk",
    "Loss",
    "LossInputError",
    "LossWarning",
    "ModelInput",
    "Rows",
    "TensorData",
    "TokenWeight",
    "Tokens",
    "Weighing",
    "accepted_weights",
    "align_sampler_logprobs",
    "binary_kl",
    "binary_tv",
    "cispo",
    "cross_entropy",
    "dapo",
    "datum_from_candidates",
    "datum_from_model_input_weights",
    "datum_from_tokens",
    "datum_mean",
    "datum_sum",
    "describe",
    "dft",
    "dpo",
    "dro",
    "evaluate",
    "export",
    "fixed_length",
    "focal",
    "geometric_level",
    "group_advantages",
    "group_metrics",
    "grpo",
    "gspo",
    "gspo_token",
    "importance_sampling",
    "info_nce",
    "k1",
    "k1_plus",
    "k2",
    "k3",
    "k3_plus",
    "k3_uncapped",
    "k_abs",
    "k_squared",
    "kl",
    "kto",
    "linear_logprobs",
    "maximum_level",
    "merge_metrics",
    "multi_target_cross_entropy",
    "orpo",
    "pack",
    "pair_mean",
    "pair_sum",
    "ppo",
    "proximal_logprobs",
    "raw_support",
    "reinforce",
    "renormalised_support",
    "rollout",
    "rollout_summary",
    "sampled_reverse_kl",
    "sapo",
    "sequence_level",
    "sequence_mean",
    "sequence_sum_mean",
    "sft_phi",
    "support_logprobs",
    "tail_support",
    "target_logprobs",
    "targets_from_labels",
    "token_coefficients",
    "token_gradient",
    "token_level",
    "token_mean",
    "token_sum",
    "top_k_forward_kl",
    "top_k_jsd",
    "top_k_mixed_kl",
    "top_k_reverse_kl",
    "top_p_support",
    "unlikelihood",
    "weights_from_labels",
    "weights_from_mask",
    "with_dual_clip",
    "with_kl",
    "with_rollout_weight",
    "with_tis",
]
