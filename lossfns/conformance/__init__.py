"""A black-box conformance suite for training servers, over the public SDK ``tinker`` only: ``lossfns conformance``.

The suite needs no access to a server's weights. Equal gradients change logprobs equally, so it compares gradients by
their effect on the logprobs of a few datums, and loss values with the loss of the server's own logprobs.
"""
