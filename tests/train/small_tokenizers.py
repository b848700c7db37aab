"""Small tokenizers of ``transformers``, made here, with chat templates like those of well-known models."""

from __future__ import annotations

from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

MERGES = ["h e", "l l", "he ll", "hell o", "Ċ Ċ", "Ġ Ġ", "Ġ 4", "2 +", "2+ 2", "= 4", "o w"]

CHATML = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

TOOLS = """{%- if tools %}{{ '<|im_start|>system\nTools: ' }}{% for t in tools %}{{ t | tojson }}{% endfor %}
{{- '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}
{%- for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' + c.function.arguments | tojson + '</call>' }}
{%- endfor %}
{%- if m.role == 'tool' %}{{ ' from ' + (m.name or '') + ' ' + (m.tool_call_id or '') }}{% endif %}{{ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

THINKS = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}
{%- endif %}
{{- m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""Only the last answer has its reasoning, and a place for it: earlier answers are written in another way."""

NO_SYSTEM = """{%- for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{{- '<|im_start|>' + m.role + '\n' + m.content.strip() + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

NO_END = """{%- for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""

TWO_ENDS = CHATML.replace("'<|im_end|>\n' }}{% endfor", "'<|end_text|><|im_end|>\n' }}{% endfor")
"""An answer ends with two special tokens, of which the second is the declared end token."""

LATE_END = CHATML.replace("m.role + '\n'", "m.role + '\nso<|im_end|>'")
OTHER_START = CHATML[: CHATML.rindex("{{")] + "{{ '<|im_start|>model\n' }}{% endif %}"
CUTS = CHATML.replace("m.content", "m.content[:3]")


def byte_pairs(template: str | None = None, **special: Any) -> Any:
    """Return a byte-level tokenizer with a few merges, of which some cover the border of a prompt and its answer."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    pairs = [tuple(merge.split(" ")) for merge in MERGES]
    for a, b in pairs:
        vocabulary[a + b] = len(vocabulary)
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    names = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"} | special
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **{k: v for k, v in names.items() if v})
    made.chat_template = template
    return made


def word_pieces() -> Any:
    """Return a tokenizer that begins each text with <s> and a space, as those of sentencepiece do."""
    words = ["<s>", "</s>", "<unk>", "▁", *map(chr, range(33, 127)), "lo", "hel"]
    core = tokenizers.Tokenizer(tokenizers.models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    core.decoder = tokenizers.decoders.Metaspace()
    core.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
