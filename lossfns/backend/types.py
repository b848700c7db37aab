"""Requests' parameters and results, in the shapes of the hosted SDKs. Their own objects are accepted as well."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lossfns.datum import TensorData


@dataclass(frozen=True, kw_only=True)
class AdamParams:
    """AdamW with decoupled weight decay; ``grad_clip_norm`` 0 is off. The hosted services' defaults."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """``stop`` is a list of token ids or of strings; a string's tokens end the sample and stay in it."""

    max_tokens: int = 128
    seed: int | None = None
    stop: Any = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """``loss_fn_outputs[i]`` holds the ``"logprobs"`` or the ``"embedding"`` of datum i; metrics by name."""

    loss_fn_output_type: str
    loss_fn_outputs: list[dict[str, TensorData]]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimStepResponse:
    """``grad_norm`` as it was after normalisation and before clipping, and ``lr``."""

    metrics: dict[str, float]


@dataclass(frozen=True)
class SampledSequence:
    """Tokens (a stop included), their logprobs at temperature 1, and why the sample ended."""

    stop_reason: Literal["stop", "length"]
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class SampleResponse:
    """Sequences of one prompt, and the prompt's own logprobs (``None`` first) if they were asked for."""

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None


@dataclass(frozen=True)
class SaveResponse:
    """Where the file is: the path that ``load_state`` and ``create_sampling_client`` take."""

    path: str


@dataclass(frozen=True)
class LoadWeightsResponse:
    """The file that was loaded."""

    path: str


@dataclass(frozen=True)
class ModelData:
    """The model's class, its name, and its tokenizer's."""

    arch: str
    model_name: str
    tokenizer_id: str | None


@dataclass(frozen=True)
class GetInfoResponse:
    """What runs, and where; ``steps`` are the optimizer steps so far, ``profile`` the service it follows.

    ``attention`` is the route that packed attention takes, None if the model does not tell.
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
