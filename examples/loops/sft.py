"""SFT in plain PyTorch with gradient accumulation. Any number of processes and parts trains the same model.

``python examples/loops/sft.py`` trains a tiny Llama from random weights. ``torchrun --nproc-per-node 2
examples/loops/sft.py`` trains it with DDP, or, with ``--fsdp``, with FSDP2. Train another model with ``--model
HuggingFaceTB/SmolLM2-135M-Instruct --learning-rate 1e-4``; put your data in place of ``ROWS``.
"""

from contextlib import nullcontext

import torch
from common import collate, load, options, save, start, stop
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lossfns import cross_entropy, target_logprobs, targets_from_labels, weights_from_labels

ANIMALS, COLOURS, PLACES = ("cat", "dog", "horse", "fox"), ("red", "black", "white"), ("barn", "garden", "wood", "sea")
ROWS = [(f"{a}, {c}, {p}:", f" the {c} {a} sleeps in the {p}.") for a in ANIMALS for c in COLOURS for p in PLACES]


def evaluate(model, batch, **settings):
    """Return the loss, and its metrics on the device. The host waits when they are finalised."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logprobs = target_logprobs(logits[:, :-1], targets_from_labels(batch["labels"]))
    return cross_entropy().deferred().padded(logprobs, weights_from_labels(batch["labels"]), **settings)


args = options(model="tiny", dtype="float32", learning_rate=5e-3, steps=61, accumulate=2, fsdp=False, seed=0, out="")
rank, ranks = start()
tokenizer, model = load(args.model, args.seed, args.dtype)
for module in (*model.get_decoder().layers, model) if args.fsdp else ():
    fully_shard(module)
parallel = model if args.fsdp else DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
held_out, training = ROWS[::7], [row for i, row in enumerate(ROWS) if i % 7]
for step in range(args.steps):
    if step % 10 == 0:
        prompt = tokenizer(held_out[0][0], return_tensors="pt").to(model.device)
        with torch.no_grad():
            loss, metrics = evaluate(model, collate(tokenizer, held_out, model.device))
            text = tokenizer.decode(model.generate(**prompt, do_sample=False, max_new_tokens=40)[0])
        if rank == 0:
            print(f"step {step:3}  held-out loss {metrics.finalise()['loss']:.3f}  {text!r}", flush=True)
    batch = [training[i] for i in torch.randperm(len(training))[:16]][rank::ranks]
    parts = [collate(tokenizer, batch[i :: args.accumulate], model.device) for i in range(args.accumulate)]
    tokens = sum(weights_from_labels(part["labels"]).sum() for part in parts)
    torch.distributed.all_reduce(tokens)  # the trained tokens of all parts and ranks
    for part in parts:
        with parallel.no_sync() if not args.fsdp and part is not parts[-1] else nullcontext():
            loss, part["metrics"] = evaluate(parallel, part, denominator=tokens / ranks)  # undo the mean over ranks
            loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    for part in parts:
        part["metrics"].finalise()  # check the values, when the work of the step is queued
if args.out:
    save(args.out, tokenizer, model)
stop()
