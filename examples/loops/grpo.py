"""GRPO in plain PyTorch: a Hugging Face causal LM learns to write the characters that its prompt asks for.

``python examples/loops/grpo.py`` trains a tiny Llama from random weights. Train another model with ``--model
HuggingFaceTB/SmolLM2-135M-Instruct --learning-rate 2e-5``; put your task in place of ``PROMPTS`` and ``reward``.
"""

import copy

import torch
from common import load, options

from lossfns import group_advantages, grpo, target_logprobs, weights_from_mask

KINDS = {"digits": "0123456789", "vowels": "aeiou", "signs": ".,:?'-"}
PROMPTS = [f"{verb} {kind}:" for verb in ("write", "say", "repeat") for kind in KINDS]


def reward(prompt, text):
    """Return the share of the characters that are of the kind that the prompt asks for."""
    return sum(character in KINDS[prompt.split()[1].strip(":")] for character in text) / max(len(text), 1)


def logprobs(model, ids, mask):
    """Return the logprob of each token but the first, [B, T - 1]. Positions start after the padding on the left."""
    logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    return target_logprobs(logits[:, :-1], ids[:, 1:])


args = options(model="tiny", learning_rate=5e-3, steps=21, seed=0)
tokenizer, model = load(args.model, args.seed, padding_side="left")
reference = copy.deepcopy(model)
loss_fn = grpo(clip=(0.8, 1.2), kl_beta=0.001)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 6}
ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
for step in range(args.steps):
    prompts = [PROMPTS[i] for i in torch.randperm(len(PROMPTS))[:8] for _ in range(8)]  # 8 groups of 8
    inputs = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, **sampling, **ends)
    completions = ids[:, inputs.input_ids.shape[1] :]
    ended = (completions == tokenizer.eos_token_id).long()
    mask = torch.cat([inputs.attention_mask, (ended.cumsum(1) <= ended).long()], 1)  # up to the first end token
    weights = weights_from_mask(mask, inputs.attention_mask.sum(1))
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    rewards = [reward(prompt, text) for prompt, text in zip(prompts, texts)]
    advantages = group_advantages(rewards, prompts)
    with torch.no_grad():
        old, ref = logprobs(model, ids, mask), logprobs(reference, ids, mask)
    for _ in range(2):  # updates; from the second on, the ratios differ from 1
        for part in torch.arange(len(ids)).split(32):  # micro-batches, which add up to the batch
            columns = {"advantages": advantages[part], "old_logprobs": old[part], "ref_logprobs": ref[part]}
            now = logprobs(model, ids[part], mask[part])
            loss, metrics = loss_fn.padded(now, weights[part], **columns, denominator=weights.sum())
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if step % 5 == 0:
        print(f"step {step:3}  reward {sum(rewards) / len(rewards):.3f}  {prompts[0]!r} -> {texts[0]!r}", flush=True)
