"""Logprobs from hidden states without the logits."""
