"""Requests' parameters and results, in the shapes of the hosted SDKs. Their own objects are accepted as well."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lossfns import TensorData


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
    """``loss_fn_outputs[i]["logprobs"]`` of each datum, and metrics named ``name:reduction``."""

    loss_fn_output_type: str
    loss_fn_outputs: list[dict[str, TensorData]]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimStepResponse:
    metrics: dict[str, float]


@dataclass(frozen=True)
class SampledSequence:
    """Tokens (a stop included), their logprobs at temperature 1, and why the sample ended."""

    stop_reason: Literal["stop", "length"]
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class SampleResponse:
    sequences: list[SampledSequence]


@dataclass(frozen=True)
class SaveResponse:
    path: str
