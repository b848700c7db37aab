"""Bugs of training servers. A bug of the loss itself keeps its id from the catalogue of ``lossfns check``."""

from __future__ import annotations

from lossfns.testing.bugs import BUGS, Bug

SERVER_BUGS: dict[str, Bug] = {
    # Protocol
    "no-answer": Bug("the server does not answer, or answers with a 5xx or 429 that the SDK repeats for minutes and "
        "that blocks every later request", ("SkyRL's 501 for what it does not have",)),
    "refused": Bug("the server refuses a valid request", ()),
    "server-died": Bug("a request ends the server", ()),
    "not-the-protocol": Bug("an answer is not what this version of the SDK reads",
        ("JSON where the SDK reads protobuf",)),
    "sequence-ids-missing": Bug("samples have no sequence ids, which the SDK asserts", ()),
    # Outputs
    "datum-count": Bug("there is not one record for each datum", ()),
    "output-shape": Bug("logprobs do not have the shape of target_tokens", ("[N, K] flattened to [N]",)),
    "output-order": Bug("records are in another order than the datums", ()),
    "output-values": Bug("logprobs are no logprobs: above 0, not finite, or not float32", ()),
    "targets-ignored": Bug("target_tokens are ignored: the logprobs are those of the next input token", ()),
    "batch-leak": Bug("the logprobs of a datum depend on the others in its batch: padding, packing or attention", ()),
    "two-numeric-paths": Bug("forward and forward_backward compute different logprobs", ("NovaSky-AI/SkyRL#2068",)),
    "loss-sum-missing": Bug("the metrics have no loss:sum: the SDK's custom losses then die with KeyError after the "
        "backward pass, and poison the client", ("NovaSky-AI/SkyRL", "modelscope/twinkle")),
    "metric-keys": Bug("metrics are not finite numbers named name:reduction with a reduction that the SDK knows: the "
        "SDK raises or drops them", ("Tinkerbell's keys without a colon", "modelscope/twinkle's loss:avg")),
    # Values and gradients
    "loss-not-summed": Bug("the loss is a mean, or a mean times a count, where the service sums over tokens",
        ("hatchery-core",)),
    "value-not-gradient": Bug("the reported loss is not the loss whose gradient is applied", ()),
    "gradient-averaged": Bug("gradients are averaged over datums, tokens or calls where they add up", ()),
    "config-ignored": Bug("loss_fn_config has no effect: defaults are used", ()),
    "other-defaults": Bug("without a loss_fn_config the defaults are not those of the service", ("TuFT's 0.9/1.1",
        "NovaSky-AI/SkyRL's cispo")),
    "ratio-clamped": Bug("the importance ratio or its logarithm is clamped, which the formula is not: beyond the "
        "bounds a token has no gradient", ("Tinkerbell's [0.01, 100]", "verl's ±20")),
    "weights-ignored": Bug("the weights of cross_entropy have no effect", ()),
    "accumulation-lost": Bug("a forward_backward replaces the gradient of the one before it", ()),
    "forward-has-gradient": Bug("forward leaves a gradient or changes the weights", ()),
    "gradient-kept": Bug("optim_step does not clear the gradient", ()),
    "targets-flattened": Bug("[N, K] targets are flattened, cut to their first column or averaged",
        ("NovaSky-AI/SkyRL",)),
    "sparse-misread": Bug("a CSR tensor is not read as the dense tensor that it stands for", ()),
    "chunks-misread": Bug("a batch that the SDK sends in several chunks is not the batch sent in one", ()),
    # Optimizer
    "step-inert": Bug("optim_step does not change the weights", ()),
    "adam-settings": Bug("settings of AdamParams are ignored: betas, eps or the learning rate", ()),
    "adam-bias": Bug("AdamW's moments are wrong: bias correction, betas or the order of updates", ()),
    "clip-ignored": Bug("grad_clip_norm is ignored, clips by value, or clips when it is 0", ()),
    "decay-wrong": Bug("weight_decay is ignored, or is added to the gradient (L2) instead of decoupled", ()),
    "gradient-scale": Bug("all gradients are off by one constant factor", ()),
    # State
    "state-lost": Bug("a client that is created from a state does not have the weights that were saved", ()),
    "optimizer-lost": Bug("the optimizer's moments or step count are not restored with the state", ()),
    "optimizer-kept": Bug("moments survive a load that should start the optimizer afresh", ()),
    "models-shared": Bug("two training clients share weights or gradients", ()),
    "save-disturbs": Bug("saving changes what training does next", ()),
    # Failures
    "bad-request-accepted": Bug("a malformed request is accepted: something is cut, filled or guessed in silence", ()),
    "failure-miscategorised": Bug("a malformed request fails as the server's fault, so that the SDK or the user tries "
        "it again", ()),
    "failure-leaves-gradient": Bug("a request that failed has left part of its gradient", ()),
    "failure-poisons": Bug("after a request that failed, a valid one fails or blocks", ()),
    "replayed": Bug("a request that the SDK repeats under the same sequence id runs twice", ()),
    "sequence-order": Bug("requests run in the order of arrival, not of their sequence ids", ()),
    # Sampling
    "sampler-weights": Bug("the sampler has other weights than the training client, or shares them", ()),
    "sampler-logprobs": Bug("logprobs of samples are not those of the model at temperature 1", ()),
    "prompt-logprobs": Bug("compute_logprobs is off by one, or has no None for the first token", ()),
    "sampling-settings": Bug("a setting of SamplingParams is ignored: max_tokens, stop, seed, temperature or top_k",
        ()),
    "custom-loss": Bug("a custom loss does not give the gradient or the metrics of its function", ()),
}  # fmt: skip
"""Id → bug, for bugs that only a server can have."""

ALL_BUGS = BUGS | SERVER_BUGS
"""Id → bug: those of losses and those of servers."""

SYMPTOMS = {
    "not enough values to unpack": "metric-keys",
    "which this SDK version only supports as proto": "not-the-protocol",
    "Proto deserialization failed": "not-the-protocol",
    "validation error": "not-the-protocol",
    "KeyError: 'loss:sum'": "loss-sum-missing",
    "sequence_id": "sequence-ids-missing",
    "is poisoned": "failure-poisons",
}
"""Part of an error of the SDK → the bug behind it."""


def symptom(error: str, otherwise: str) -> str:
    """Return the bug that an error of the SDK stands for, or ``otherwise``."""
    return next((bug for part, bug in SYMPTOMS.items() if part in error), otherwise)
