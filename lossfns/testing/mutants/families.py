"""What the wrong policy-gradient losses claim to be, and the families that they are made from."""

from __future__ import annotations

from functools import partial

from torch import Tensor

import lossfns
from lossfns.testing.mutants import parts
from lossfns.testing.mutants.parts import (
    CLIP,
    Clip,
    nowhere,
    policy,
    sequence_mean,
    sequence_ratio,
    sequence_ratio_by_token,
    weighted,
)
from lossfns.tokens import Tokens

mutant = partial(parts.mutant, kind="policy")
gspo = partial(policy, ratio=sequence_ratio, reduce=sequence_mean)
gspo_token = partial(policy, ratio=sequence_ratio_by_token, reduce=sequence_mean)
cispo = partial(policy, term=weighted, binds=nowhere)

LIKE_PPO = lossfns.ppo()
LIKE_PPO_SEQUENCE_MEAN = lossfns.ppo(weigh=lossfns.sequence_mean)
LIKE_DAPO = lossfns.dapo()
LIKE_GRPO = lossfns.grpo(kl_beta=0.1)
LIKE_GSPO = lossfns.gspo(clip=CLIP)
LIKE_GSPO_TOKEN = lossfns.gspo_token(clip=CLIP)
LIKE_CISPO = lossfns.cispo(clip=CLIP)
LIKE_DRO = lossfns.dro(beta=0.5)
LIKE_DUAL_CLIP = lossfns.ppo(dual_clip=3.0)
LIKE_TIS = lossfns.with_tis(lossfns.ppo(), cap=2.0)


def outside(t: Tokens, r: Tensor, clip: Clip) -> Tensor:
    """Where the ratio is outside the bounds, whether or not that matters."""
    low, high = clip
    return t.active & ((r < low) | (r > high))
