"""The losses by family: each preset with its equation."""

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
