"""Log-probabilities of tokens, from hidden states without the logits, or from logits without a copy of them."""

from lossfns.logprobs.linear import linear_logprobs as linear_logprobs
from lossfns.logprobs.target import target_logprobs as target_logprobs
