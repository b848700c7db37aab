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
from lossfns.advantages import (
    asymre_advantages,
    batch_advantages,
    gae,
    gdpo_advantages,
    gigpo_advantages,
    gpg_advantages,
    group_advantages,
    group_metrics,
    groups_with_signal,
    hierarchical_advantages,
    kl_penalties,
    leave_one_out_advantages,
    maxrl_advantages,
    opo_advantages,
    optimal_token_advantages,
    pass_at_k_advantages,
    rae_advantages,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    remax_advantages,
    returns_to_go,
    token_rewards,
    whiten,
)
from lossfns.combine import with_dual_clip, with_kl, with_rollout_weight, with_tis
from lossfns.datum import Datum, EncodedTextChunk, ModelInput, TensorData
from lossfns.describe import describe
from lossfns.entropy import adapt_entropy_coef, with_clip_b, with_entropy, with_sampled_entropy, with_top_entropy
from lossfns.errors import LossInputError, LossWarning
from lossfns.export.coefficients import token_coefficients
from lossfns.export.token_gradient import token_gradient
from lossfns.frame import (
    align_sampler_logprobs,
    datum_from_candidates,
    datum_from_model_input_weights,
    datum_from_tokens,
    pair_from_tokens,
)
from lossfns.kl import binary_kl, binary_tv, k1_plus, k3_plus, k3_uncapped, k_abs, k_squared
from lossfns.labels import targets_from_labels, weights_from_labels, weights_from_mask
from lossfns.logprobs.linear import linear_logprobs
from lossfns.logprobs.target import target_logprobs
from lossfns.loss import BoundLoss, Loss, evaluate
from lossfns.losses.contrastive import info_nce
from lossfns.losses.coupled import clip_cov, kl_cov, m2po, real
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
from lossfns.losses.grouped import alpha_dpo, aot, aot_unpaired, beta_dpo, dr_dpo
from lossfns.losses.links import chi_po, discopop, f_dpo, focal_po, gpo, spo
from lossfns.losses.masks import dppo_kl, dppo_tv, opsm, with_binary_kl_mask, with_opsm, with_tv_mask, with_vaco_mask
from lossfns.losses.policy import bnpo, dapo, dr_grpo, gpg, grpo, importance_sampling, ppo, reinforce
from lossfns.losses.preference import dpo, dpo_norm, exo, hinge, ipo, robust_dpo
from lossfns.losses.prime import prime_dppo, prime_ref_kl, prime_symmetric
from lossfns.losses.rec import rec, rec_ring
from lossfns.losses.reference_free import alphapo, cpo, orpo, simpo
from lossfns.losses.regression import a2po, dro, kimi15, sppo_token
from lossfns.losses.reward_models import bradley_terry, bradley_terry_margin, process_reward
from lossfns.losses.sequence import gmpo, gspo, gspo_token, luspo, rloo
from lossfns.losses.shifts import bpo, dpo_shift, dpop, ld_dpo, minor_dpo, odpo, r_dpo, wpo
from lossfns.losses.sides import apo_down, apo_zero, bco_pair, c2_dpo, cal_dpo, nca, sppo_hard
from lossfns.losses.summed import chord, echo, mpo, oreal, rpo, vapo_nll
from lossfns.losses.supervised import (
    cross_entropy,
    dft,
    eaft,
    focal,
    multi_target_cross_entropy,
    sft_phi,
    unlikelihood,
)
from lossfns.losses.trust import ce_gppo, fipo, sapo
from lossfns.losses.unpaired import bco, kto, kto_reference_point, sppo
from lossfns.losses.value import explained_variance, value_loss
from lossfns.losses.weighted import capped_importance_sampling, cispo, cispo_sequence, opmd, rollout_is, topr, vespo
from lossfns.margins import (
    Reward,
    alpha_reward,
    exponential_link,
    forward_kl_reward,
    hinge_link,
    js_reward,
    log_odds_mean,
    log_ratio_mean,
    log_ratio_sum,
    logistic_link,
    logprob_mean,
    logprob_sum,
    savage_link,
    squared_link,
    truncated_quadratic_link,
)
from lossfns.metrics import merge_metrics
from lossfns.pack import pack
from lossfns.regions import one_side, ratio_weight, two_side, unit_weight
from lossfns.rollout import TokenWeight
from lossfns.sampler import accepted_weights, proximal_logprobs, rollout_summary, support_logprobs, top_p_support
from lossfns.segments import geometric_level, maximum_level, sequence_level, token_level
from lossfns.sums import sum_losses
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
    "Reward",
    "Rows",
    "TensorData",
    "TokenWeight",
    "Tokens",
    "Weighing",
    "a2po",
    "accepted_weights",
    "adapt_entropy_coef",
    "align_sampler_logprobs",
    "alpha_dpo",
    "alpha_reward",
    "alphapo",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "asymre_advantages",
    "batch_advantages",
    "bco",
    "bco_pair",
    "beta_dpo",
    "binary_kl",
    "binary_tv",
    "bnpo",
    "bpo",
    "bradley_terry",
    "bradley_terry_margin",
    "c2_dpo",
    "cal_dpo",
    "capped_importance_sampling",
    "ce_gppo",
    "chi_po",
    "chord",
    "cispo",
    "cispo_sequence",
    "clip_cov",
    "cpo",
    "cross_entropy",
    "dapo",
    "datum_from_candidates",
    "datum_from_model_input_weights",
    "datum_from_tokens",
    "datum_mean",
    "datum_sum",
    "describe",
    "dft",
    "discopop",
    "dpo",
    "dpo_norm",
    "dpo_shift",
    "dpop",
    "dppo_kl",
    "dppo_tv",
    "dr_dpo",
    "dr_grpo",
    "dro",
    "eaft",
    "echo",
    "evaluate",
    "exo",
    "explained_variance",
    "exponential_link",
    "export",
    "f_dpo",
    "fipo",
    "fixed_length",
    "focal",
    "focal_po",
    "forward_kl_reward",
    "gae",
    "gdpo_advantages",
    "geometric_level",
    "gigpo_advantages",
    "gmpo",
    "gpg",
    "gpg_advantages",
    "gpo",
    "group_advantages",
    "group_metrics",
    "groups_with_signal",
    "grpo",
    "gspo",
    "gspo_token",
    "hierarchical_advantages",
    "hinge",
    "hinge_link",
    "importance_sampling",
    "info_nce",
    "ipo",
    "js_reward",
    "k1",
    "k1_plus",
    "k2",
    "k3",
    "k3_plus",
    "k3_uncapped",
    "k_abs",
    "k_squared",
    "kimi15",
    "kl",
    "kl_cov",
    "kl_penalties",
    "kto",
    "kto_reference_point",
    "ld_dpo",
    "leave_one_out_advantages",
    "linear_logprobs",
    "log_odds_mean",
    "log_ratio_mean",
    "log_ratio_sum",
    "logistic_link",
    "logprob_mean",
    "logprob_sum",
    "luspo",
    "m2po",
    "maximum_level",
    "maxrl_advantages",
    "merge_metrics",
    "minor_dpo",
    "mpo",
    "multi_target_cross_entropy",
    "nca",
    "odpo",
    "one_side",
    "opmd",
    "opo_advantages",
    "opsm",
    "optimal_token_advantages",
    "oreal",
    "orpo",
    "pack",
    "pair_from_tokens",
    "pair_mean",
    "pair_sum",
    "pass_at_k_advantages",
    "ppo",
    "prime_dppo",
    "prime_ref_kl",
    "prime_symmetric",
    "process_reward",
    "proximal_logprobs",
    "r_dpo",
    "rae_advantages",
    "ratio_weight",
    "raw_support",
    "real",
    "rec",
    "rec_ring",
    "reinforce",
    "reinforce_plus_plus_advantages",
    "reinforce_plus_plus_baseline_advantages",
    "remax_advantages",
    "renormalised_support",
    "returns_to_go",
    "rloo",
    "robust_dpo",
    "rollout",
    "rollout_is",
    "rollout_summary",
    "rpo",
    "sampled_reverse_kl",
    "sapo",
    "savage_link",
    "sequence_level",
    "sequence_mean",
    "sequence_sum_mean",
    "sft_phi",
    "simpo",
    "spo",
    "sppo",
    "sppo_hard",
    "sppo_token",
    "squared_link",
    "sum_losses",
    "support_logprobs",
    "tail_support",
    "target_logprobs",
    "targets_from_labels",
    "token_coefficients",
    "token_gradient",
    "token_level",
    "token_mean",
    "token_rewards",
    "token_sum",
    "top_k_forward_kl",
    "top_k_jsd",
    "top_k_mixed_kl",
    "top_k_reverse_kl",
    "top_p_support",
    "topr",
    "truncated_quadratic_link",
    "two_side",
    "unit_weight",
    "unlikelihood",
    "value_loss",
    "vapo_nll",
    "vespo",
    "weights_from_labels",
    "weights_from_mask",
    "whiten",
    "with_binary_kl_mask",
    "with_clip_b",
    "with_dual_clip",
    "with_entropy",
    "with_kl",
    "with_opsm",
    "with_rollout_weight",
    "with_sampled_entropy",
    "with_tis",
    "with_top_entropy",
    "with_tv_mask",
    "with_vaco_mask",
    "wpo",
]
