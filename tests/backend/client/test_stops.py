"""Stops of a sample: strings in decoded text, over the borders of tokens; token ids; end tokens of a model."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lossfns import LossInputError, ModelInput
from lossfns.backend import LocalSamplingClient, SamplingParams
from lossfns.backend.model import hf
from lossfns.backend.types import SampledSequence

WORDS = ["a", "b", "c", "d", "ab", "bc", "cd", "abc", "Ġ", "Ġa", "Ċ", "Ã", "©", "<end>", "<turn>", "s", "t", "st"]
ID = {word: i for i, word in enumerate(WORDS)}


def byte_pairs(**options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer in which a text has many spellings. It encodes "abc" as one token."""
    merges = [("a", "b"), ("b", "c"), ("c", "d"), ("ab", "c"), ("Ġ", "a"), ("s", "t")]
    tokenizer = Tokenizer(models.BPE(ID, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


class Script(nn.Module):
    """A model that always continues with the same tokens: greedy sampling repeats a script."""

    def __init__(self, script: Sequence[int], size: int = len(WORDS)) -> None:
        super().__init__()
        self.unembed = nn.Parameter(torch.eye(size))
        self.script, self.steps = list(script), 0

    @property
    def head(self) -> Tensor:
        return self.unembed

    def hidden(self, rows: int) -> Tensor:
        token = self.script[min(self.steps, len(self.script) - 1)]
        self.steps += 1
        return 20 * torch.eye(len(self.unembed))[[token] * rows]

    def prefill(self, tokens: Tensor, lengths: Sequence[int], max_new_tokens: int) -> tuple[Tensor, Any]:
        return self.hidden(len(lengths)), Rows(len(lengths))

    def step(self, tokens: Tensor, cache: Any) -> Tensor:
        return self.hidden(cache.count)


class Rows:
    def __init__(self, count: int) -> None:
        self.count = count

    def select(self, rows: Tensor) -> "Rows":
        return Rows(len(rows))


def sample(script: Sequence[str], stop: Any, tokenizer: Any = None, prompt: Sequence[str] = ("d",)) -> SampledSequence:
    """Sample the script, and return the sample; generation must not have gone on beyond it."""
    model = Script([ID[word] for word in script])
    client = LocalSamplingClient(model, tokenizer or byte_pairs())
    params = SamplingParams(max_tokens=len(script), temperature=0, stop=stop)
    result = client.sample(ModelInput.from_ints([ID[word] for word in prompt]), 1, params).result().sequences[0]
    assert len(result.logprobs) == len(result.tokens) == model.steps
    assert [WORDS[i] for i in result.tokens] == list(script)[: len(result.tokens)]
    return result


STOPS: dict[str, tuple[list[str], Any, int]] = {
    "spelled by one token": (["d", "abc", "d", "d"], "abc", 2),
    "spelled by other tokens than the stop alone": (["d", "a", "b", "c", "d"], "abc", 4),
    "over the border of two tokens": (["d", "ab", "cd", "d"], "bc", 3),
    "inside a token": (["d", "abc", "d"], "b", 2),
    "the first token": (["ab", "c", "d"], "ab", 1),
    "inside the first token": (["abc", "d"], "b", 1),
    "begins with a space that the first token has": (["Ġa", "d"], " a", 1),
    "the last token that is allowed": (["d", "d", "a", "b"], "ab", 4),
    "several stops, of which the second comes": (["d", "c", "d", "d"], ["ab", "cd"], 3),
    "several stops, of which the first to come ends": (["d", "a", "b", "c"], ["abc", "ab"], 3),
    "a line": (["d", "Ċ", "a"], "\n", 2),
    "a character of two tokens": (["d", "Ã", "©", "d"], "é", 3),
    "the text of a special token": (["d", "<turn>", "d"], "<turn>", 2),
    "a token id": (["d", "abc", "d"], ID["abc"], 2),
    "token ids": (["d", "abc", "d"], [ID["bc"], ID["abc"]], 2),
    "strings and token ids": (["d", "a", "b", "d"], [ID["abc"], "ab"], 3),
}


@pytest.mark.parametrize("name", STOPS)
def test_a_stop_string_is_found_in_the_text_over_token_borders(name: str) -> None:
    script, stop, length = STOPS[name]
    result = sample(script, stop)
    assert (len(result.tokens), result.stop_reason) == (length, "stop")


@pytest.mark.parametrize("stop", ["dd", "abcd", ["ba", ID["s"]], None, []])
def test_without_a_stop_a_sample_ends_at_its_length(stop: Any) -> None:
    result = sample(["d", "abc", "a", "b"], stop)
    assert (len(result.tokens), result.stop_reason) == (4, "length")


def test_a_stop_that_begins_in_the_prompt_is_none() -> None:
    assert sample(["b", "c", "d"], "ab", prompt=["d", "a"]).stop_reason == "length"
    assert sample(["b", "c", "d"], "bc", prompt=["d", "a"]).stop_reason == "stop"


def test_samples_of_a_batch_end_each_at_its_own_stop() -> None:
    """A batch of all prompts against one prompt at a time, with the library's model."""
    client = llama()
    prompts = [ModelInput.from_ints([i, i + 1]) for i in range(12)]
    free = SamplingParams(max_tokens=12, temperature=0)
    text = byte_pairs().decode
    whole = [client.sample(prompt, 1, free).result().sequences[0] for prompt in prompts]
    stop = text(whole[0].tokens)[2:4]
    params = SamplingParams(max_tokens=12, temperature=0, stop=[stop])
    batch = [response.sequences[0] for response in client.sample_batch(prompts, 1, params).result()]
    lengths = set()
    for got, free_sample in zip(batch, whole, strict=True):
        ends = [n for n in range(1, 13) if stop in text(free_sample.tokens[:n])]
        n = min(ends, default=len(free_sample.tokens))
        assert got.tokens == free_sample.tokens[:n]
        assert got.logprobs == pytest.approx(free_sample.logprobs[:n], abs=1e-4)
        assert got.stop_reason == ("stop" if ends else free_sample.stop_reason)
        lengths.add(n)
    assert len(lengths) > 1


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("", "stop: expected strings with a character"),
        (["a", ""], "stop: expected strings with a character"),
        ([["a"]], "stop: expected token ids or strings"),
        (len(WORDS), r"stop: expected a whole number from 0 to 17, got 18"),
        ([True], "stop: expected a whole number"),
        (b"a", "stop: expected token ids or strings"),
    ],
)
def test_a_stop_that_is_none_is_refused(stop: Any, message: str) -> None:
    with pytest.raises(LossInputError, match=message):
        sample(["d"], stop)


# End tokens


def llama(tokenizer: Any = None, generation: Any = None, **config: Any) -> LocalSamplingClient:
    """A client of a small model, whose settings declare end tokens."""
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings: dict[str, Any] = {"eos_token_id": None, "bos_token_id": None, **size, **config}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **settings))
        with torch.no_grad():
            model.lm_head.weight.normal_(std=0.5)
    model.generation_config.eos_token_id = generation
    return LocalSamplingClient(hf.CausalLM(model), tokenizer or byte_pairs())


ALL = ModelInput.from_ints([ID["a"], ID["d"]])
DECLARED: dict[str, Any] = {
    "the tokenizer": lambda end: llama(byte_pairs(eos_token=WORDS[end])),
    "a list of the tokenizer's": lambda end: llama(Listed([ID["<end>"], end])),
    "the configuration": lambda end: llama(eos_token_id=end),
    "a list of the configuration's": lambda end: llama(eos_token_id=[ID["<end>"], end]),
    "the generation settings": lambda end: llama(generation=end),
    "a list of the generation settings'": lambda end: llama(generation=[ID["<end>"], end]),
    "the generation settings, beside the tokenizer": lambda end: llama(byte_pairs(eos_token="<end>"), generation=end),
}


class Listed:
    """A tokenizer with several end tokens."""

    def __init__(self, ids: list[int]) -> None:
        self.eos_token_id = ids
        self.decode = byte_pairs().decode


@pytest.mark.parametrize("stop", [None, "<turn>", [ID["<turn>"]]], ids=["alone", "with a string", "with an id"])
@pytest.mark.parametrize("name", DECLARED)
def test_every_declared_end_token_ends_a_turn(name: str, stop: Any) -> None:
    """The end token is one that the same model draws early without it."""
    params = SamplingParams(max_tokens=40, temperature=1, seed=3)
    free = llama().sample(ALL, 1, params).result().sequences[0]
    assert len(free.tokens) == 40 and free.stop_reason == "length"
    end = free.tokens[4]
    first = free.tokens.index(end) + 1
    if stop is not None:
        params = SamplingParams(max_tokens=40, temperature=1, seed=3, stop=stop)
        first = min([first, *(free.tokens.index(i) + 1 for i in [ID["<turn>"]] if i in free.tokens)])
    if "list" in name or "beside" in name:
        first = min([first, *(free.tokens.index(i) + 1 for i in [ID["<end>"]] if i in free.tokens)])
    result = DECLARED[name](end).sample(ALL, 1, params).result().sequences[0]
    assert (result.tokens, result.stop_reason) == (free.tokens[:first], "stop")
