"""DPO in plain PyTorch: a Hugging Face causal LM learns to prefer the answer that fits its prompt.

``python examples/loops/dpo.py`` trains a tiny Llama from random weights. Train another model with ``--model
HuggingFaceTB/SmolLM2-135M-Instruct --learning-rate 2e-5``; put your data in place of ``PAIRS``.
"""

import copy
from itertools import permutations, product

import torch
from common import collate, load, options

from lossfns import dpo, target_logprobs, targets_from_labels, weights_from_labels

COLOURS, ANIMALS = ("red", "black", "white", "grey", "brown", "green"), ("cat", "dog", "hen", "horse", "fox", "mouse")
PAIRS = [  # (prompt, chosen, rejected)
    (f"a {colour} {animal} is", f" {colour}.", f" {other}.")
    for (colour, other), animal in product(permutations(COLOURS, 2), ANIMALS)
]


def logprobs(model, batch):
    """Return the logprob of each token but the first, [B, T - 1]."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return target_logprobs(logits[:, :-1], targets_from_labels(batch["labels"]))


def evaluate(pairs, **settings):
    """Return loss and metrics of pairs. All chosen rows come first, then all rejected rows."""
    rows = [(prompt, chosen) for prompt, chosen, _ in pairs] + [(prompt, rejected) for prompt, _, rejected in pairs]
    batch = collate(tokenizer, rows, model.device)
    with torch.no_grad():
        ref = logprobs(reference, batch)
    weights = weights_from_labels(batch["labels"])
    return loss_fn.padded(logprobs(model, batch), weights, layout="halves", ref_logprobs=ref, **settings)


args = options(model="tiny", learning_rate=3e-3, steps=31, seed=0)
tokenizer, model = load(args.model, args.seed)
reference = copy.deepcopy(model)
loss_fn = dpo(beta=0.1)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
shuffled = [PAIRS[i] for i in torch.randperm(len(PAIRS))]
held_out, training = shuffled[:40], shuffled[40:]
for step in range(args.steps):
    if step % 10 == 0:
        with torch.no_grad():
            loss, metrics = evaluate(held_out)
        print(f"step {step:3}  held-out accuracy {metrics['accuracy']:.3f}  margin {metrics['margin']:.2f}", flush=True)
    batch = [training[i] for i in torch.randperm(len(training))[:16]]
    for part in batch[:8], batch[8:]:  # micro-batches, which add up to the batch
        loss, metrics = evaluate(part, denominator=len(batch))
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
