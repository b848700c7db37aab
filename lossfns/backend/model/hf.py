"""Causal language models of ``transformers`` in the place of our own decoder; needs the extra ``hf``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lossfns.backend.model import lora
from lossfns.backend.model.attention import Attend, Layout, choose_route
from lossfns.backend.model.cache import Cache
from lossfns.errors import LossInputError
from lossfns.logprobs.linear import head_of


def load(
    source: str | Path, *, dtype: torch.dtype | str = "auto", device: str | torch.device = "cpu"
) -> tuple[CausalLM, Any]:
    """Model and tokenizer from a folder, the name of a repository or a GGUF file: an entry of a service's ``models``.

    ``dtype="auto"`` keeps the file's own; what a GGUF file has quantised becomes float32.

    >>> from lossfns.backend import LocalServiceClient
    >>> service = LocalServiceClient({"smollm2": lambda: load("SmolLM2-135M-Instruct.Q4_1.gguf")})
    """
    path, given = Path(source), {}
    if path.suffix == ".gguf":
        source, given = path.parent, {"gguf_file": path.name}
    hf = transformers()
    try:
        model = hf.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="eager", **given)
        tokenizer = hf.AutoTokenizer.from_pretrained(source, **given)
    except OSError as error:
        expected, got = "a folder, a GGUF file or the name of a repository", f"{path} ({str(error).splitlines()[0]})"
        raise LossInputError("source", expected, got, "Is the path right, and the repository within reach?") from error
    return CausalLM(model).to(device), tokenizer


class CausalLM(nn.Module):
    """A causal language model of ``transformers`` over packed sequences, in eval mode and with our attention.

    The model that is given is taken over, not copied. A few tokens go through it first: one that computes
    something else of packed sequences than of each alone is refused, as are attention sinks and chunks. Those
    that mix tokens other than by attention (Mamba and other hybrids) are thus refused, and those whose
    attention or head has parts unknown here.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        register()
        known = isinstance(model, transformers().PreTrainedModel)
        if not known or not model.can_generate() or model.config.is_encoder_decoder:
            fix = "Pass AutoModelForCausalLM.from_pretrained(...)."
            raise LossInputError("model", "a causal language model of transformers", f"a {type(model).__name__}", fix)
        self.model = model.eval()
        self.context = context(model.config.get_text_config())
        self.shape = described(model)
        self.lora_targets = parts(self)
        check(self)

    # The head

    @property
    def head(self) -> Tensor:
        """Unembedding weight [V, D], adapters included and in their precision."""
        return lora.adapted_weight(self.model.get_output_embeddings())

    @property
    def head_bias(self) -> Tensor | None:
        """[V], or None."""
        bias: Tensor | None = getattr(self.model.get_output_embeddings(), "bias", None)
        return bias

    @property
    def head_softcap(self) -> float | None:
        """c of logits c·tanh(z / c), as Gemma 2 has it."""
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    @property
    def head_temperature(self) -> float:
        """What logits are divided by: Granite's scaling, or one over Cohere's."""
        config = self.model.config.get_text_config()
        return float(getattr(config, "logits_scaling", None) or 1 / (getattr(config, "logit_scale", None) or 1))

    # Running

    @property
    def attention(self) -> str:
        """The route that its attention takes."""
        config, weight = self.model.config.get_text_config(), self.model.get_output_embeddings().weight
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        softcap = getattr(config, "attn_logit_softcapping", None) is not None
        return choose_route(weight.device, weight.dtype, head_dim, softcap)

    def forward(self, tokens: Tensor, lengths: Sequence[int], parents: Sequence[int | None] | None = None) -> Tensor:
        """Hidden states [N, D] after the final norm, of segments laid end to end in ``tokens`` [N]."""
        before = [0 if parent is None else lengths[parent] for parent in parents or [None] * len(lengths)]
        self._check_length(max(map(sum, zip(before, lengths))), "model_input", "Cut it.")
        layout = Layout(lengths, parents, tokens.device)
        return self._run(tokens, layout.positions, layout.attend)

    def prefill(self, tokens: Tensor, lengths: Sequence[int], max_new_tokens: int) -> tuple[Tensor, Cache]:
        """Read packed prompts. Return the hidden state of the last token of each, [B, D], and a cache of them.

        The cache holds ``max_new_tokens`` more tokens for each prompt.
        """
        self._check_length(max(lengths) + max_new_tokens, "max_tokens", "Ask for fewer, or shorten the prompt.")
        layout, cache = Layout(lengths, device=tokens.device), Cache.empty(lengths, max_new_tokens, tokens.device)
        hidden = self._run(tokens, layout.positions, cache.prefill(layout))
        return hidden[cache.lengths.cumsum(0) - 1], cache

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Append one token to each cached sequence, ``tokens`` [B]. Return their hidden states [B, D]."""
        return self._run(tokens, *cache.step())

    def _run(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The model without its head over ``tokens`` [N]; only ``attend`` knows which see one another."""
        output = self.model.base_model(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, attend=attend
        )
        hidden: Tensor = output[0][0]
        return hidden

    def _check_length(self, longest: int, field: str, fix: str) -> None:
        if longest > self.context:
            expected = f"sequences of at most {self.context} tokens, the context of the model"
            raise LossInputError(field, expected, f"{longest}", fix)

    # Memory and precision

    @property
    def checkpointing(self) -> bool:
        """Whether each layer keeps its input alone and runs again in the backward pass; may be set."""
        return any("forward" in vars(layer) for layer in self._layers())

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        # Not by the library's own switch, which is for training mode and so brings dropout with it.
        if on and not self._layers():
            got, fix = f"{type(self.model).__name__}, which names none", "Leave checkpointing off."
            raise LossInputError("checkpointing", "a model with layers to run again", got, fix)
        for layer in self._layers():
            vars(layer).pop("forward", None)
            if on:
                layer.forward = MethodType(recomputed, layer)

    def _layers(self) -> list[nn.Module]:
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [module for module in self.modules() if isinstance(module, GradientCheckpointingLayer)]

    def _apply(self, fn: Any, recurse: bool = True) -> CausalLM:
        """``to`` and its like, except that buffers keep their dtype: rotary frequencies are of no use in bfloat16."""
        before = [(module, name, x) for module in self.modules() for name, x in module._buffers.items()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, x in before:
            moved = module._buffers[name]
            module._buffers[name] = x if x is None or moved is None else x.to(moved.device)
        return self


def recomputed(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A layer's forward, of which nothing is kept for the backward pass but its input."""
    return checkpoint(
        partial(type(layer).forward, layer), *args, use_reentrant=False, preserve_rng_state=False, **kwargs
    )


# Our attention, as transformers calls it

NAME = "lossfns"
HARMLESS = {"position_ids", "use_cache", "output_attentions", "is_causal"}
"""Keywords that change nothing here: positions are in queries and keys already, and all attention is causal."""


def register() -> None:
    """Make ``NAME`` a way to attend that a model's configuration can name."""
    transformers().AttentionInterface.register(NAME, attention)
    transformers().AttentionMaskInterface.register(NAME, mask)


def mask(*args: Any, use_vmap: bool = False, local_size: int | None = None, **kwargs: Any) -> int | None:
    """In the place of a mask how many tokens a layer sees, None for all: the layout knows the rest."""
    if use_vmap:
        raise unknown("a mask of its own")
    return local_size


def attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: int | None,
    *,
    attend: Attend | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """q [1, H, N, d], k and v [1, Hkv, N, d] -> [1, N, H, d], by whoever knows which tokens see one another."""
    others = sorted(name for name, value in more.items() if value is not None and name not in HARMLESS)
    if others:
        raise unknown(f"{type(module).__name__} with {', '.join(others)}")
    if attention_mask != sliding_window:
        seen = f"{attention_mask or 'all'} tokens by its mask, {sliding_window or 'all'} by its window"
        raise unknown(f"{type(module).__name__}, which sees {seen}")
    if dropout:
        raise unknown(f"dropout of {dropout} in training mode")
    if attend is None:
        raise unknown(f"{type(module).__name__}, to which the model does not pass keywords on")
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    return attend(q, k, v, scale=scaling, window=sliding_window, softcap=softcap)[None], None


def unknown(got: str) -> LossInputError:
    expected = "causal attention, with or without a sliding window and a softcap"
    return LossInputError("model", expected, got, "It would be computed wrongly here.")


# What a model is


def context(config: Any) -> float:
    """How many tokens a sequence may have at most."""
    known = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in [rope, *(x for x in rope.values() if isinstance(x, dict))]:
        if kind.get("rope_type") in ("dynamic", "longrope"):
            # Beyond this length its frequencies depend on the longest sequence of a batch.
            known.append(kind.get("original_max_position_embeddings"))
    return min((n for n in known if n), default=math.inf)


INCIDENTAL = ("token_id", "dtype", "version", "use_cache", "quantization_config")
"""Endings of settings that do not change what a model computes from given weights."""


def described(model: Any) -> dict[str, Any]:
    """The architecture and its settings, for checkpoints."""
    config = model.config.to_diff_dict()
    kept = {key: value for key, value in config.items() if key[0] != "_" and not key.endswith(INCIDENTAL)}
    return {"architecture": type(model).__name__, **kept}


def parts(model: CausalLM) -> dict[str, tuple[str, ...]]:
    """The linear layers of attention, of all else and of the head, for ``lora.adapt``."""
    head = model.model.get_output_embeddings()
    linear = [(name, module) for name, module in model.named_modules() if lora.is_linear(module)]
    attn = [name for name, module in linear if module is not head and "att" in name]
    unembed = [name for name, module in linear if module is head]
    mlp = [name for name, _ in linear if name not in (*attn, *unembed)]
    return {"attn": tuple(attn), "mlp": tuple(mlp), "unembed": tuple(unembed)}


@torch.no_grad()
def check(model: CausalLM) -> None:
    """Set our attention, and refuse a model that gives other logits with it, packed, than alone and with its own."""
    lengths, parents = [2, 2, 5], [None, 0, 0]  # most tokens come after some that they must not see
    vocabulary = model.model.get_input_embeddings().num_embeddings
    prefix, first, second = (torch.arange(1, 10, device=model.head.device) * 7919 % vocabulary).split(lengths)
    model.model.set_attn_implementation("eager")
    one, two = (
        model.model(input_ids=torch.cat((prefix, rest))[None], use_cache=False).logits[0] for rest in (first, second)
    )
    model.model.set_attn_implementation(NAME)
    try:
        packed, beside = (
            head_of(model).logits(model(torch.cat((prefix, rest, second)), lengths, parents)).float()
            for rest in (first, first.flip(0))
        )
    except LossInputError:
        raise
    except Exception as error:
        raise refused(model, f"{type(error).__name__}: {error}") from error
    away, eps = distance(packed, torch.cat((one, two[len(prefix) :])).float()), torch.finfo(model.head.dtype).eps
    if not away < eps**0.5:
        raise refused(model, f"logits that differ by {away:.1%}")
    # In half precision a short convolution is no more than that. But by the same kernels, its neighbour shows.
    away = distance(beside[-len(second) :], packed[-len(second) :])
    if not away < eps**0.75:
        raise refused(model, f"logits that another sequence changes by {away:.1%}")


def distance(a: Tensor, b: Tensor) -> float:
    """How far logits [N, V] are from others, relative to how they spread: as softmax sees them, of the median token.

    The median, since rounding may send a token to another expert.
    """
    centred = (b - b.mean(1, keepdim=True)).norm(dim=1)
    away = (a - b - (a - b).mean(1, keepdim=True)).norm(dim=1)
    return float((away / centred).median())


def refused(model: CausalLM, got: str) -> LossInputError:
    fix = "Only models whose tokens meet in attention alone, by transformers' AttentionInterface, can be packed."
    expected = f"of a {type(model.model).__name__} the same for packed sequences as for each alone"
    return LossInputError("model", expected, got, fix)


def transformers() -> Any:
    """The library, or an error that names the extra."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("models of Hugging Face need transformers: pip install 'lossfns[hf]'") from error
    return transformers
