"""Log-probabilities of tokens from hidden states, without the logits."""

from lossfns.logprobs.linear import linear_logprobs as linear_logprobs
