"""Parameters and results of requests, in the shapes of the hosted SDKs. The SDKs' own objects are accepted as well."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lossfns.datum import TensorData


@dataclass(frozen=True, kw_only=True)
class AdamParams:
    """Settings of one AdamW step, with decoupled weight decay. Defaults are those of the hosted services.

    Args:
        learning_rate: at least 0.
        beta1, beta2: decay of the first and second moment, in [0, 1).
        eps: added to the root of the second moment, above 0 in the dtype of the weights.
        weight_decay: at least 0; each step takes ``learning_rate * weight_decay`` of every weight.
        grad_clip_norm: the largest norm of the whole gradient; 0 does not clip.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Settings of a sampling request.

    Args:
        max_tokens: the largest number of tokens of a sample.
        seed: seed of the draws; None draws from torch's own random numbers.
        stop: a token id, a string, or a list of them, in addition to the end tokens of the model and the tokenizer.
            A string is searched in the decoded text. The token with which a stop ends is the last one of the sample.
            An empty list switches the end tokens off as well.
        temperature: a number above 1e-6, or 0, which takes the most probable token.
        top_k: draw from the k most probable tokens; -1 draws from all.
        top_p: draw from the most probable tokens that together have this probability, in (0, 1].
    """

    max_tokens: int = 128
    seed: int | None = None
    stop: Any = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """Result of a forward or forward-backward request.

    Attributes:
        loss_fn_output_type: ``"TensorData"``.
        loss_fn_outputs: for each datum ``{"logprobs": [N] or [N, K]}`` or ``{"embedding": [D]}``, float32.
        metrics: numbers by name; a custom loss may return other values as well.
    """

    loss_fn_output_type: str
    loss_fn_outputs: list[dict[str, TensorData]]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimStepResponse:
    """Result of a step: metrics ``grad_norm`` (after normalisation, before clipping) and ``lr``, the learning rate."""

    metrics: dict[str, float]


@dataclass(frozen=True)
class SampledSequence:
    """One sample: its tokens, a stop included, their logprobs at temperature 1, and why it ended."""

    stop_reason: Literal["stop", "length"]
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class SampleResponse:
    """The samples of one prompt, and the logprobs of the prompt's tokens (None first) if they were requested."""

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None


@dataclass(frozen=True)
class SaveResponse:
    """The path of the saved file, for ``load_state`` and ``create_sampling_client``."""

    path: str


@dataclass(frozen=True)
class LoadWeightsResponse:
    """The path of the loaded file."""

    path: str


@dataclass(frozen=True)
class ModelData:
    """The model's class, its name, and the name of its tokenizer, if it has one."""

    arch: str
    model_name: str
    tokenizer_id: str | None


@dataclass(frozen=True)
class GetInfoResponse:
    """Description of a client's model.

    Attributes:
        model_data: the model's class, name and tokenizer.
        model_id: an id that differs between the clients of a process.
        is_lora, lora_rank: whether the model has adapters, and their rank.
        model_name: the model's name.
        parameters: number of parameters, adapters included.
        device, dtype: of the first parameter.
        steps: optimizer steps so far.
        profile: the service that the client follows, ``"tinker"`` or ``"fireworks"``.
        attention: the implementation of packed attention, None if the model does not name it.
    """

    model_data: ModelData
    model_id: str
    is_lora: bool
    lora_rank: int | None
    model_name: str
    parameters: int
    device: str
    dtype: str
    steps: int
    profile: str
    attention: str | None
