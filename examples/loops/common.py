"""The parts of the loops that a project already has: options, processes, a model, batches from text, and saving.

Batches have the tensors of most projects: ``input_ids``, ``attention_mask`` and ``labels`` [B, T], which are not
shifted. A label of -100 says that the token is not trained.
"""

import argparse
import os
import sys
from string import ascii_lowercase, digits

import torch
import torch.distributed as dist
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def options(**defaults):
    """Return the options of the command line, by names and types of their defaults: ``steps=9`` is ``--steps``."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default in defaults.items():
        kind = {"action": "store_true"} if default is False else {"type": type(default), "default": default}
        parser.add_argument("--" + name.replace("_", "-"), **kind, help=" ")
    return parser.parse_args()


def start():
    """Start the processes of ``torchrun``, or a group of this one alone. Return the rank and the number of ranks."""
    if "RANK" in os.environ:
        dist.init_process_group()
    else:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return dist.get_rank(), dist.get_world_size()


def stop():
    """Wait for the other ranks, and end their group. A process of ``torchrun`` then ends at once.

    The modules of FSDP keep the threads of gloo, and a thread that frees a tensor while Python shuts down can abort.
    """
    dist.barrier()
    dist.destroy_process_group()
    if "RANK" in os.environ:
        sys.stdout.flush()
        os._exit(0)


def load(name, seed, dtype="float32", **settings):
    """Return a tokenizer that can pad, and a model without dropout, on the GPU if there is one.

    Args:
        name: a Hugging Face id or a folder, or ``tiny`` for a Llama of 0.1 million random weights.
        seed: the seed of these weights, and of all random numbers that follow.
        dtype: the dtype of the weights. In bfloat16, the steps of a low learning rate are rounded away.
        settings: for the tokenizer, such as ``padding_side``.
    """
    torch.manual_seed(seed)
    if name == "tiny":
        tokenizer, model = tiny_llama(**settings)
    else:
        tokenizer, model = AutoTokenizer.from_pretrained(name, **settings), AutoModelForCausalLM.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return tokenizer, model.to(device, getattr(torch, dtype)).eval()


def tiny_llama(**settings):
    """Return a tokenizer of lower-case characters, digits and signs, and a Llama with random weights."""
    vocabulary = ["<pad>", "<eos>", "<unk>", *ascii_lowercase, *digits, *" .,:?'-"]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(ids), **shape, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **settings), LlamaForCausalLM(config)


def collate(tokenizer, rows, device):
    """Return (prompt, answer) pairs as tensors, padded on the right. The labels are those of the answers."""
    prompts = [tokenizer(prompt).input_ids for prompt, _ in rows]
    answers = [[*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for _, answer in rows]
    ids = [prompt + answer for prompt, answer in zip(prompts, answers)]
    batch = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt").to(device)
    is_prompt = torch.arange(batch.input_ids.shape[1]) < torch.tensor([[len(prompt)] for prompt in prompts])
    untrained = is_prompt.to(device) | (batch.attention_mask == 0)
    return {**batch, "labels": batch.input_ids.masked_fill(untrained, -100)}


def save(folder, tokenizer, model):
    """Write the model to a folder. All ranks of a sharded model call it; the first one writes."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not dist.is_initialized() or dist.get_rank() == 0:
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder, state_dict=state)
