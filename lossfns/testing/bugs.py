"""The catalogue of bugs. Laws, mutants and golden vectors call a bug by the same id."""

from __future__ import annotations

from typing import NamedTuple


class Bug(NamedTuple):
    """A bug that a loss may have.

    Attributes:
        description: the bug in words.
        sources: where it has been seen, such as ``owner/repository#number``.
    """

    description: str
    sources: tuple[str, ...] = ()


BUGS: dict[str, Bug] = {
    # The contract
    "not-the-contract": Bug("it does not return (0-d tensor attached to the logprobs, dict of floats)",
        ("thinking-machines-lab/tinker-cookbook#703",)),
    "inputs-mutated": Bug("it changes its inputs in place", ()),
    "state-between-calls": Bug("the result of a call depends on the calls before it", ("tensor cached by a closure",)),
    "gradient-missing": Bug("a datum's logprobs are left out of the graph, so that its gradient is None; "
        "the SDKs raise on that", ("fw-ai/cookbook",)),
    "host-sync-per-datum": Bug("it moves a value to the host for each datum: .item() or float() in the loop",
        ("torchtune#522", "NVIDIA-NeMo/RL#3751", "pytorch/rl#1783")),
    "branch-on-values": Bug("Python branches on a tensor's value, or .item() is part of the maths: a trace bakes it in",
        ("create_custom_loss of tinker 0.38",)),
    "no-grad-for-detach": Bug("no_grad is used for a stop-gradient, which vanishes in a trace; use .detach()",
        ("create_custom_loss of tinker 0.38",)),
    "low-precision": Bug("the maths runs in bfloat16 or float16",
        ("huggingface/transformers#31267", "allenai/open-instruct#1387", "huggingface/trl#4303")),
    "silent-truncation": Bug("a row of the wrong length is cut or broadcast in silence, not refused",
        ("Fireworks' and Tinker's documented examples",)),
    "detached-term": Bug("part of the value has no gradient, or another one than its own", ()),
    # Masks
    "mask-after-exp": Bug("the mask multiplies what may be inf or nan, after exp or log or as it came: 0·inf = nan",
        ("PrimeIntellect-ai/prime-rl#2084", "NVIDIA-NeMo/RL#4120", "OpenRLHF/OpenRLHF#1240")),
    "where-after-exp": Bug("where() after exp or log: the loss is right, the gradient is 0·inf = nan",
        ("PrimeIntellect-ai/prime-rl#2085", "huggingface/trl#5413")),
    "mask-missing": Bug("masked tokens count in the numerator",
        ("ROLL#444", "huggingface/trl#6654")),
    "kl-unmasked": Bug("the KL term of masked tokens leaks in",
        ("slime#1370", "miles#1383", "Search-R1#21")),
    "padding-in-denominator": Bug("the denominator counts masked tokens: padding rescales the loss",
        ("CosyVoice#1449",)),
    "padding-in-sequence-ratio": Bug("the sequence's mean log-ratio counts masked tokens",
        ("fw-ai/cookbook", "Soup#744")),
    "mask-by-token-id": Bug("tokens are masked by id (pad = eos), not by position",
        ("Automodel#1336", "Megatron-Bridge#4660")),
    "empty-sequence-nan": Bug("a fully masked sequence divides 0 by 0",
        ("nanochat#618", "OLMo-core#657", "Automodel#3797")),
    "empty-sequence-counted": Bug("a fully masked sequence still counts in the denominator",
        ("huggingface/trl", "linkedin/Liger-Kernel")),
    "weights-squared": Bug("the weights are applied twice", ("allenai/open-instruct#535",)),
    "weights-binarised": Bug("fractional weights are read as a mask of zeros and ones", ()),
    "negative-weights-lost": Bug("negative weights are dropped, clamped or made positive; the two-pass protocol sends "
        "gradients as weights", ("hosted servers' weights = −dL/dlogprob",)),
    # Normalisation
    "mean-of-means": Bug("chunks are averaged first and their means averaged then: S/n of each, not ΣS/Σn",
        ("huggingface/transformers#24725", "huggingface/transformers#34191", "torchtune#1875",
         "verl-project/verl#5625", "rllm#782")),
    "mixed-denominators": Bug("two terms of the loss have different denominators (KL by sequence, policy by token)",
        ("huggingface/trl#2995",)),
    "divided-twice": Bug("the loss is divided by the size of the batch or group once more",
        ("swift#10117", "huggingface/trl#6024")),
    "world-size-factor": Bug("the number of ranks scales the gradient", ("arctic#119", "huggingface/trl#3538")),
    "constant-factor": Bug("the gradient is off by a constant factor; Adam hides it, clipping by norm does not",
        ("swift#10117", "huggingface/trl#5619")),
    "epsilon-in-denominator": Bug("a constant is added to the denominator, which small batches feel",
        ("verl-project/verl", "1e-8 and 1 in masked means")),
    "broadcast": Bug("[B] meets [B, 1]: the loss runs over all pairs of datums", ("RLinf#1565",)),
    "cross-talk": Bug("a datum's gradient depends on another's values (whitening or clipping over the batch)", ()),
    "zero-advantage-denominator": Bug("tokens whose advantage is 0 leave the denominator",
        ("Fireworks' NUM_LOSS_TOKENS",)),
    # Frame
    "frame-shift": Bug("a column is off by one token against the logprobs",
        ("wyf3/llm_related#33", "allenai/open-instruct#1549", "NeMo-Speech#6409")),
    "target-dropped": Bug("the first or last target of a sequence is never trained",
        ("OpenRLHF/OpenRLHF#973", "arctic#110")),
    "datum-misaligned": Bug("a column belongs to another datum: sorted, reversed or regrouped",
        ("arctic#110", "PrimeIntellect-ai/prime-rl#600")),
    "datum-ignored": Bug("some datums have no effect: only the first or the last is used", ("fw-ai/cookbook#376",)),
    "order-dependent": Bug("the loss depends on the order of the datums", ()),
    "targets-transposed": Bug("[N, K] is read as [K, N], or summed along the wrong axis", ("NovaSky-AI/SkyRL#1777",)),
    "renormalised-targets": Bug("the K candidates' logprobs are renormalised among themselves",
        ("the teacher's mass beyond K is lost",)),
    # Policy
    "sign-flipped": Bug("the loss is maximised: a good token becomes less likely", ()),
    "advantage-sign-lost": Bug("the sign of the advantage is lost: bad tokens are reinforced too", ()),
    "advantage-inert": Bug("advantages have no effect", ("fw-ai/cookbook#212",)),
    "advantages-pooled": Bug("per-token advantages are summed, averaged or replaced by one of their sequence",
        ("AReaL#501",)),
    "missing-stop-gradient": Bug("a factor that should be constant carries gradient", ("unsloth-zoo#870",)),
    "no-gradient": Bug("the ratio is detached or constant: there is no gradient at all",
        ("mlx-lm-lora#50",)),
    "old-logprobs-inert": Bug("old logprobs have no effect: the ratio is always 1",
        ("GMISWE/tinker-cloud#66", "linkedin/Liger-Kernel#1082")),
    "ratio-inverted": Bug("the ratio is exp(old − new)", ()),
    "ratio-not-exponentiated": Bug("the log-ratio stands where the ratio should", ()),
    "ratio-product": Bug("the sequence ratio is the product of its tokens' ratios, not their geometric mean",
        ("unsloth-zoo#870", "NVIDIA-NeMo/RL#2269", "walkinglabs/hands-on-modern-rl#75")),
    "ratio-sum": Bug("the sequence ratio is the sum (or arithmetic mean) of its tokens' ratios",
        ("unsloth-zoo#870",)),
    "clip-max-for-min": Bug("max and min are swapped: clipping removes the gradient where it should stay",
        ("spinningup#255",)),
    "clip-without-min": Bug("the clipped ratio stands alone: both bounds cut, whatever the advantage's sign",
        ("GMPO#4",)),
    "clip-as-epsilon": Bug("absolute bounds and epsilons are mixed up: the ratio 1 lies outside the bounds",
        ("NovaSky-AI/SkyRL#924",)),
    "clip-inert": Bug("clipping has no effect", ("huggingface/trl#3120",)),
    "clip-gradient-leaks": Bug("a clipped token's value is flat but its gradient is not 0", ()),
    "clip-drops-tokens": Bug("a bound that should limit a token's weight takes the token's gradient away", ()),
    "dual-clip-on-positive": Bug("the dual clip acts on positive advantages too", ("tianshou#433",)),
    "dual-clip-below-one": Bug("the dual clip's constant is below 1, so that it cuts on-policy tokens",
        ("PPOxFamily#95",)),
    "tis-inverted": Bug("the correction is exp(sampler − old)", ()),
    "tis-uncapped": Bug("the sampler correction has no cap", ("huggingface/trl#7120",)),
    "tis-inert": Bug("the sampler correction has no effect", ("linkedin/Liger-Kernel#1082",)),
    "exp-overflow": Bug("exp of a large log-ratio overflows: inf or nan at a finite input",
        ("PrimeIntellect-ai/prime-rl#2084",)),
    "penalty-sign": Bug("the penalty on leaving the old policy rewards it", ()),
    "half-missing": Bug("the half of a penalty ½β(lp − old)² is missing: it pulls twice as hard", ()),
    "penalty-gated": Bug("the penalty leaves out tokens whose advantage is 0", ("fw-ai/cookbook",)),
    # KL
    "k1-in-loss": Bug("k1 = lp − ref is differentiated: its expected gradient is 0, a constant push on each sample",
        ("allenai/open-instruct#534", "huggingface/trl#3025", "NovaSky-AI/SkyRL#1445")),
    "kl-sign": Bug("the KL term pushes away from the reference", ()),
    "kl-detached": Bug("the KL term has no gradient", ("PrimeIntellect-ai/prime-rl#1390",)),
    "kl-scaled-by-advantage": Bug("the KL term is multiplied by the advantage", ()),
    "ref-inert": Bug("reference logprobs have no effect", ("linkedin/Liger-Kernel#387",)),
    # Knobs and metrics
    "another-loss": Bug("it is not the loss that it claims to be",
        ("NovaSky-AI/SkyRL#1053", "huggingface/trl#6808", "swift#10167")),
    "inert-knob": Bug("a setting has no effect on the loss", ("NVIDIA-NeMo/RL#3792", "unsloth-zoo#890")),
    "metric-not-mergeable": Bug("a metric of chunks does not merge to the whole's: only the last chunk is reported",
        ("verl-project/verl#3129", "fw-ai/cookbook#376")),
    "metric-scaled-twice": Bug("a metric is scaled twice (beta in the margin, the batch in the loss)",
        ("thinking-machines-lab/tinker-cookbook#21", "verl-project/verl#4711")),
    "metric-counts-nonbinding": Bug("the clip fraction counts tokens where clipping does not bind",
        ("huggingface/trl#6021",)),
    # Supervised
    "not-likelihood": Bug("the gradient changes with the logprobs: it is of probabilities, or another function", ()),
    # Preference
    "pair-masks-swapped": Bug("one side's mask is used for both sides", ("CosyVoice#1449",)),
    "sides-swapped": Bug("the rejected side is preferred", ()),
    "pair-layout": Bug("pairs are read as halves of the batch, not as neighbours 2i and 2i + 1", ()),
    "reference-misused": Bug("the reference enters with the wrong sign or for the wrong side",
        ("huggingface/trl#6527",)),
    "side-detached": Bug("one side of the pair gets no gradient", ()),
    "mean-logprob-margin": Bug("the margin is of mean logprobs where the method sums them",
        ("huggingface/trl#1265", "swift#9925", "linkedin/Liger-Kernel#510")),
    "pairs-miscounted": Bug("the mean over pairs divides by the number of sequences", ()),
    "odd-datum-dropped": Bug("an odd datum is dropped in silence", ()),
    "log-of-sigmoid": Bug("log(sigmoid(x)) underflows: inf or nan for a large margin", ()),
    "log-odds-nan": Bug("log(1 − p) is nan or inf, in value or gradient, near p = 1",
        ("huggingface/trl#2564", "huggingface/trl#3237", "axolotl#3910")),
    "log-odds-biased": Bug("a constant or a clamp inside the log-odds biases them", ("ColossalAI#6407",)),
    # Advantages
    "std-over-n": Bug("the standard deviation divides by n, not n − 1", ("unsloth-zoo#832",)),
    "constant-group-noise": Bug("a group of equal rewards gets advantages from rounding noise",
        ("atropos#481",)),
    "group-of-one-nan": Bug("a group of one gets nan", ("fw-ai/cookbook",)),
    "groups-by-position": Bug("groups are taken by position; interleaved prompts are mixed",
        ("PrimeIntellect-ai/prime-rl#600", "R1-V#67")),
    "groups-ignored": Bug("statistics are taken over the whole batch", ()),
    "not-centred": Bug("advantages of a group do not sum to 0", ()),
    "order-lost": Bug("a higher reward does not get the higher advantage", ()),
}  # fmt: skip
"""Id → bug."""
