"""Causal language models of ``transformers`` as models of the backend. Needs the extra ``hf``.

``CausalLM`` replaces a model's attention by ``Layout.attend``, so that it runs on packed sequences with shared
prefixes. Everything else is the library's own code.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lossfns.backend.model import lora
from lossfns.backend.model.attention import Attend, Layout, choose_route
from lossfns.backend.model.cache import Cache
from lossfns.backend.model.properties import (
    architecture,
    check_router_loss,
    check_text_alone,
    context_length,
    warn_of_noise,
    without_peft,
)
from lossfns.backend.model.sources import located, source_error
from lossfns.errors import LossInputError
from lossfns.logprobs.head import Adapter, head_of


def load(
    source: str | Path, *, dtype: torch.dtype | str = "auto", device: str | torch.device = "cpu"
) -> tuple[CausalLM, Any]:
    """Load a model and its tokenizer: the pair that an entry of a service's ``models`` returns.

    Args:
        source: a folder, a GGUF file, the name of a repository of Hugging Face, or ``"smollm2"``:
            SmolLM2-135M-Instruct from the extra of that name. A repository that is in the local cache of Hugging Face
            is taken from there, without a connection.
        dtype: ``"auto"`` keeps the dtype of the file; quantised weights of a GGUF file become float32.
        device: the device to put the model on.

    A GGUF file is converted once, and kept in a cache; see ``gguf_cache.converted``. The adapters of an adapter folder
    of ``peft`` are merged into the weights of its base model. A folder without a tokenizer has that of its base model.

    Raises:
        LossInputError: nothing is found at ``source``, or a model that ``CausalLM`` refuses, or adapters on weights
            narrower than float32.

    >>> from lossfns.backend import LocalServiceClient
    >>> service = LocalServiceClient({"smollm2": lambda: load("SmolLM2-135M-Instruct.Q4_1.gguf")})
    """
    transformers()
    try:
        found = located(source)
        model, info = transformers().AutoModelForCausalLM.from_pretrained(
            found, dtype=dtype, attn_implementation="eager", output_loading_info=True, trust_remote_code=False
        )
        tokenizer = tokenizer_of(found, model.name_or_path if lora.wrapped_layers(model) else found)
    except LossInputError:
        raise
    except Exception as error:  # ValueError: not a causal language model, or no path at all
        if not isinstance(error, (OSError, ValueError)) and type(error).__name__ != "SafetensorError":
            raise
        raise source_error(source, error) from error
    if missing := sorted(info["missing_keys"]):  # transformers would draw them at random
        got = f"{source} without {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        raise LossInputError("source", "a model with all of its weights", got, "Is it whole, and a language model?")
    lora.merge(model)
    return CausalLM(model).to(device), tokenizer


def load_tokenizer(source: str | Path) -> Any:
    """Load the tokenizer that ``load`` returns beside the model.

    Raises:
        LossInputError: no tokenizer is found.
    """
    transformers()
    try:
        found = located(source)
        return tokenizer_of(found, base_of(found))
    except LossInputError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise source_error(source, error) from error


def sizes(source: str | Path) -> tuple[int | None, float]:
    """Return the number of token ids and the context of the model at ``source``.

    None and infinity stand for what is not known: a tokenizer may have no configuration of a model beside it.

    Raises:
        LossInputError: nothing is found at ``source``.
    """
    try:
        config = transformers().AutoConfig.from_pretrained(base_of(located(source)), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, LossInputError):
            raise
        return None, math.inf
    text = config.get_text_config()
    return getattr(text, "vocab_size", None), context_length(text)


def base_of(found: str | Path) -> str | Path:
    """Return the base model that an adapter folder names; any other source as it is."""
    adapters = Path(found) / "adapter_config.json"
    return json.loads(adapters.read_text())["base_model_name_or_path"] if adapters.exists() else found


def tokenizer_of(source: str | Path, base: str | Path) -> Any:
    """Load the tokenizer of ``source``; that of ``base`` if there is none."""
    hf = transformers()
    try:
        return hf.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError):
        if base == source:
            raise
        return hf.AutoTokenizer.from_pretrained(base, trust_remote_code=False)


class CausalLM(nn.Module):
    """A causal language model of ``transformers`` over packed sequences, in eval mode.

    Args:
        model: for example from ``AutoModelForCausalLM.from_pretrained``. It is changed in place, not copied. Adapters
            of ``peft`` take part as they are, trained or frozen.

    Attributes:
        model: the model of ``transformers``.
        prefix: the place of its tensors within this module.
        context_length: the most tokens that a sequence may have.
        shape: architecture and settings, as a checkpoint records them.

    Dropout and noise that the configuration asks for are not computed: a ``LossWarning`` names them.

    Raises:
        LossInputError: not a causal language model, one that reads more than text, one whose configuration asks for the
            auxiliary loss of a router, or one that cannot be packed. To find out, a few tokens go through the model
            before and after its attention is replaced, and the logits are compared. Models that mix tokens other
            than by attention (Mamba and other hybrids) are refused, and models whose attention or head has parts
            that are not known here. Attention sinks and chunked attention are refused by name.
    """

    prefix = "model."

    def __init__(self, model: Any) -> None:
        super().__init__()
        register_attention()
        model = without_peft(model)
        pretrained = isinstance(model, transformers().PreTrainedModel)
        if not pretrained or not model.can_generate() or model.config.is_encoder_decoder:
            fix = "Pass AutoModelForCausalLM.from_pretrained(...)."
            raise LossInputError("model", "a causal language model of transformers", f"a {type(model).__name__}", fix)
        check_text_alone(model)
        check_router_loss(model)
        if lora.wrapped_layers(model):
            lora.declare_adapted(model)
        self.model = model.eval()
        self.context_length = context_length(model.config.get_text_config())
        self.shape = architecture(model)
        check_packing(self)
        warn_of_noise(model)

    @property
    def source(self) -> str | None:
        """Where the model of transformers was loaded from: a path or the name of a repository, or None."""
        name: str = self.model.name_or_path
        return (os.path.abspath(name) if os.path.exists(name) else name) or None

    @property
    def lora_targets(self) -> dict[str, tuple[str, ...]]:
        """Names of the linear layers of each part, for ``lora.adapt``."""
        return linear_layers_by_part(self)

    # The head

    @property
    def head(self) -> Tensor:
        """Unembedding weight [V, D], its adapter included."""
        return lora.adapted_weight(self.model.get_output_embeddings())

    @property
    def factored_head(self) -> tuple[Tensor, Adapter | None]:
        """Unembedding weight [V, D] without its adapter, and the adapter or None: ``head`` as two parts."""
        return lora.factored_weight(self.model.get_output_embeddings())

    @property
    def head_bias(self) -> Tensor | None:
        """Bias [V] of the unembedding, or None."""
        bias: Tensor | None = getattr(self.model.get_output_embeddings(), "bias", None)
        return bias

    @property
    def head_softcap(self) -> float | None:
        """c of the logits c·tanh(z / c), as in Gemma 2, or None."""
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    @property
    def head_temperature(self) -> float:
        """Divisor of the logits: Granite's ``logits_scaling``, or 1 / ``logit_scale`` of Cohere; else 1."""
        config = self.model.config.get_text_config()
        return float(getattr(config, "logits_scaling", None) or 1 / (getattr(config, "logit_scale", None) or 1))

    # Running

    @property
    def attention(self) -> str:
        """Name of the route that the attention of a packed batch takes, from ``choose_route``."""
        config, weight = self.model.config.get_text_config(), self.model.get_output_embeddings().weight
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        softcap = getattr(config, "attn_logit_softcapping", None) is not None
        return choose_route(weight.device, weight.dtype, head_dim, softcap)

    def forward(self, tokens: Tensor, lengths: Sequence[int], previous: Sequence[int | None] | None = None) -> Tensor:
        """Return hidden states [N, D] after the final norm; the arguments are those of ``Decoder.forward``."""
        layout = Layout(lengths, previous, tokens.device)
        self._check_length(layout.max_key_length, "model_input", "Shorten it.")
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
        """Append one token to each cached sequence, ``tokens`` [B]. Return the hidden states [B, D] of these tokens."""
        return self._run(tokens, *cache.step())

    def _run(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run the model without its head over ``tokens`` [N]; only ``attend`` knows which tokens see one another."""
        output = self.model.base_model(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, attend=attend
        )
        hidden: Tensor = output[0][0]
        return hidden

    def _check_length(self, longest: int, field: str, fix: str) -> None:
        if longest > self.context_length:
            expected = f"sequences of at most {self.context_length} tokens, the context of the model"
            raise LossInputError(field, expected, f"{longest}", fix)

    # Memory and precision

    @property
    def checkpointing(self) -> bool:
        """Whether each layer keeps only its input for the backward pass, and runs again there. It can be set."""
        return any("forward" in vars(layer) for layer in self._layers)

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        # The library's own switch works only in training mode, which also turns dropout on.
        if on and not self._layers:
            got, fix = f"{type(self.model).__name__}, which names none", "Leave checkpointing off."
            raise LossInputError("checkpointing", "a model with layers to run again", got, fix)
        for layer in self._layers:
            vars(layer).pop("forward", None)
            if on:
                layer.forward = MethodType(checkpointed_forward, layer)

    @cached_property
    def _layers(self) -> list[nn.Module]:
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [module for module in self.modules() if isinstance(module, GradientCheckpointingLayer)]

    def _apply(self, fn: Any, recurse: bool = True) -> CausalLM:
        """Move or convert parameters; buffers are moved but keep their dtype, as rotary frequencies need float32."""
        before = [(module, name, x) for module in self.modules() for name, x in module._buffers.items()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, x in before:
            moved = module._buffers[name]
            module._buffers[name] = x if x is None or moved is None else x.to(moved.device)
        return self


def checkpointed_forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a layer, and keep only its input for the backward pass."""
    return checkpoint(
        partial(type(layer).forward, layer), *args, use_reentrant=False, preserve_rng_state=False, **kwargs
    )


# Our attention, as transformers calls it

ATTENTION = "lossfns"
"""The name of our attention in a model's configuration."""

IGNORED_KEYWORDS = {"position_ids", "use_cache", "output_attentions", "is_causal"}
"""Keywords that change nothing here: positions are in queries and keys already, and all attention is causal."""


def register_attention() -> None:
    """Make ``ATTENTION`` an attention that a model's configuration can name."""
    transformers().AttentionInterface.register(ATTENTION, attention_forward)
    transformers().AttentionMaskInterface.register(ATTENTION, attention_window)


def attention_window(*args: Any, use_vmap: bool = False, local_size: int | None = None, **kwargs: Any) -> int | None:
    """Return, in place of a mask, how many tokens a layer sees; None is all. The layout knows the rest."""
    if use_vmap:
        raise attention_error("a mask of its own")
    return local_size


def attention_forward(
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
    """Attend from q [1, H, N, d] to k and v [1, Hkv, N, d] by ``attend``; refuse keywords that it does not take.

    Returns:
        [1, N, H, d], and None in place of the attention weights.
    """
    others = sorted(name for name, value in more.items() if value is not None and name not in IGNORED_KEYWORDS)
    if others:
        raise attention_error(f"{type(module).__name__} with {', '.join(others)}")
    if attention_mask != sliding_window:
        seen = f"{attention_mask or 'all'} tokens by its mask, {sliding_window or 'all'} by its window"
        raise attention_error(f"{type(module).__name__}, which sees {seen}")
    if dropout:
        raise attention_error(f"dropout of {dropout} in training mode")
    if attend is None:
        raise attention_error(f"{type(module).__name__}, to which the model does not pass keywords on")
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    return attend(q, k, v, scale=scaling, window=sliding_window, softcap=softcap)[None], None


def attention_error(got: str) -> LossInputError:
    """Return the error for a model whose attention is not known here."""
    expected = "causal attention, with or without a sliding window and a softcap"
    return LossInputError("model", expected, got, "It would be computed wrongly here.")


# Layers, and the check


def linear_layers_by_part(model: CausalLM) -> dict[str, tuple[str, ...]]:
    """Return the names of the linear layers of attention, of the head, and of all else as the MLP."""
    head = model.model.get_output_embeddings()
    linear = [(name, module) for name, module in model.named_modules() if lora.is_linear(module)]
    attn = [name for name, module in linear if module is not head and "att" in name]
    unembed = [name for name, module in linear if module is head]
    mlp = [name for name, _ in linear if name not in (*attn, *unembed)]
    return {"attn": tuple(attn), "mlp": tuple(mlp), "unembed": tuple(unembed)}


@torch.no_grad()
def check_packing(model: CausalLM) -> None:
    """Switch a model to our attention; refuse the model if that changes the logits of packed sequences."""
    lengths, previous = [2, 2, 5], [None, 1, 1]  # most tokens follow tokens that they must not see
    vocabulary = len(model.model.get_input_embeddings().weight)
    tokens = torch.arange(1, 10, device=model.head.device) * 7919 % vocabulary
    prefix, first, second = torch.split(tokens, lengths)
    model.model.set_attn_implementation("eager")
    first_alone, second_alone = (
        model.model(input_ids=torch.cat((prefix, suffix))[None], use_cache=False).logits[0]
        for suffix in (first, second)
    )
    model.model.set_attn_implementation(ATTENTION)
    try:
        packed, other_neighbour = (
            head_of(model).logits(model(torch.cat((prefix, suffix, second)), lengths, previous)).float()
            for suffix in (first, first.flip(0))
        )
    except LossInputError:
        raise
    except Exception as error:
        raise packing_error(model, f"{type(error).__name__}: {error}") from error
    alone = torch.cat((first_alone, second_alone[len(prefix) :])).float()
    eps = max(torch.finfo(dtype).eps for dtype in (model.head.dtype, torch.float32))  # norms are in float32 at the most
    difference = relative_difference(packed, alone)
    if not difference < eps**0.5:
        raise packing_error(model, f"logits that differ by {difference:.1%}")
    # In half precision, the effect of a short convolution is no larger than the rounding differences between two
    # kernels. So our attention runs twice, with different neighbours of the last sequence. If sequences do not affect
    # one another, its logits are nearly equal.
    difference = relative_difference(other_neighbour[-len(second) :], packed[-len(second) :])
    if not difference < eps**0.75:
        raise packing_error(model, f"logits that another sequence changes by {difference:.1%}")


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return ‖a − b‖ / ‖b‖ of logits [N, V], each centred over V (softmax ignores a shift), for the median token.

    The median, because rounding may send a token to another expert.
    """
    scale = (b - b.mean(1, keepdim=True)).norm(dim=1)
    difference = (a - b - (a - b).mean(1, keepdim=True)).norm(dim=1)
    return float((difference / scale).median())


def packing_error(model: CausalLM, got: str) -> LossInputError:
    """Return the error for a model that cannot be packed."""
    expected = f"a {type(model.model).__name__} with the same logits for packed sequences as alone"
    fix = "Only models whose tokens interact in attention alone, by transformers' AttentionInterface, can be packed."
    return LossInputError("model", expected, got, fix)


def transformers() -> Any:
    """Import the library, or raise an error that names the extra. Progress bars are off if no terminal shows them."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("models of Hugging Face need transformers: pip install 'lossfns[hf]'") from error
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    return transformers
