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

from lossfns import export as export
from lossfns.advantages import group_advantages as group_advantages
from lossfns.advantages import group_metrics as group_metrics
from lossfns.combine import with_dual_clip as with_dual_clip
from lossfns.combine import with_kl as with_kl
from lossfns.combine import with_tis as with_tis
from lossfns.datum import Datum as Datum
from lossfns.datum import EncodedTextChunk as EncodedTextChunk
from lossfns.datum import ModelInput as ModelInput
from lossfns.datum import TensorData as TensorData
from lossfns.errors import LossInputError as LossInputError
from lossfns.errors import LossWarning as LossWarning
from lossfns.export.token_gradient import token_gradient as token_gradient
from lossfns.frame import align_sampler_logprobs as align_sampler_logprobs
from lossfns.frame import datum_from_model_input_weights as datum_from_model_input_weights
from lossfns.frame import datum_from_tokens as datum_from_tokens
from lossfns.loss import BoundLoss as BoundLoss
from lossfns.loss import Loss as Loss
from lossfns.loss import evaluate as evaluate
from lossfns.losses.policy import cispo as cispo
from lossfns.losses.policy import dapo as dapo
from lossfns.losses.policy import dro as dro
from lossfns.losses.policy import grpo as grpo
from lossfns.losses.policy import gspo as gspo
from lossfns.losses.policy import gspo_token as gspo_token
from lossfns.losses.policy import importance_sampling as importance_sampling
from lossfns.losses.policy import ppo as ppo
from lossfns.losses.policy import reinforce as reinforce
from lossfns.losses.preference import dpo as dpo
from lossfns.losses.preference import orpo as orpo
from lossfns.losses.supervised import cross_entropy as cross_entropy
from lossfns.losses.supervised import multi_target_cross_entropy as multi_target_cross_entropy
from lossfns.metrics import merge_metrics as merge_metrics
from lossfns.pack import pack as pack
from lossfns.segments import geometric_level as geometric_level
from lossfns.segments import sequence_level as sequence_level
from lossfns.segments import token_level as token_level
from lossfns.terms import k1 as k1
from lossfns.terms import k2 as k2
from lossfns.terms import k3 as k3
from lossfns.tokens import ON_POLICY as ON_POLICY
from lossfns.tokens import Rows as Rows
from lossfns.tokens import Tokens as Tokens
from lossfns.version import __version__ as __version__
from lossfns.weigh import Weighing as Weighing
from lossfns.weigh import datum_mean as datum_mean
from lossfns.weigh import datum_sum as datum_sum
from lossfns.weigh import fixed_length as fixed_length
from lossfns.weigh import pair_mean as pair_mean
from lossfns.weigh import pair_sum as pair_sum
from lossfns.weigh import sequence_mean as sequence_mean
from lossfns.weigh import sequence_sum_mean as sequence_sum_mean
from lossfns.weigh import token_mean as token_mean
from lossfns.weigh import token_sum as token_sum
