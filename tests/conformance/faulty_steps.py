"""Defects of steps, of saved states, and of clients beside each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch

from lossfns.backend.client.training import LocalTrainingClient
from lossfns.backend.engine import engine, state
from lossfns.backend.engine.engine import Engine
from lossfns.backend.types import LoadWeightsResponse
from lossfns.server.service import Service
from tests.conformance.planting import Defect, settings

# Steps


def around_step(before: Callable[[Any, Any], Any], after: Callable[[Any], Any] = lambda self: None) -> None:
    """Run functions of the engine before each step, where the settings are the second argument, and after it."""
    step = Engine.optim_step

    def edited(self: Any, adam: Any, *args: Any) -> Any:
        before(self, adam)
        result = step(self, adam, *args)
        after(self)
        return result

    Engine.optim_step = edited


def scale_gradient(model: Any, factor: float) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= factor


def gradient_doubled() -> None:
    around_step(lambda self, adam: scale_gradient(self.model, 2.0))


def calls_averaged() -> None:
    backward = LocalTrainingClient._forward_backward

    def counted(self: Any, *args: Any) -> Any:
        self._engine.calls = getattr(self._engine, "calls", 0) + 1
        return backward(self, *args)

    def average(self: Any, adam: Any) -> None:
        scale_gradient(self.model, 1 / max(1, getattr(self, "calls", 1)))
        self.calls = 0

    LocalTrainingClient._forward_backward = counted
    around_step(average)


def decay_in_gradient() -> None:
    take_step = engine.take_step

    def edited(optimizer: Any, parameters: Any, given: Any, factor: float) -> None:
        for p in parameters:
            p.grad.add_(p.detach(), alpha=given["weight_decay"] / factor)
        take_step(optimizer, parameters, given | {"weight_decay": 0.0}, factor)

    engine.take_step = edited


def clips_at_zero() -> None:
    factor = engine.clip_factor
    engine.clip_factor = lambda norm, clip: factor(norm, clip or 1.0)


def clips_each_value() -> None:
    def clip(self: Any, adam: Any) -> None:
        for p in self.model.parameters():
            if p.grad is not None and adam.grad_clip_norm:
                p.grad.clamp_(-adam.grad_clip_norm, adam.grad_clip_norm)

    engine.clip_factor = lambda norm, clip: 1.0
    around_step(clip)


def no_bias_correction() -> None:
    take_step = engine.take_step

    def edited(optimizer: Any, parameters: Any, given: Any, factor: float) -> None:
        for p in parameters:
            zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            optimizer.state[p] = {**zeros, **optimizer.state[p], "step": torch.tensor(1e6)}
        take_step(optimizer, parameters, given, factor)

    engine.take_step = edited


def one_gradient_for_all() -> None:
    """A step of any model clears the gradients of all models."""
    engines: WeakSet[Engine] = WeakSet()
    make = Engine.__init__

    def made(self: Any, *args: Any) -> None:
        make(self, *args)
        engines.add(self)

    Engine.__init__ = made
    around_step(lambda self, adam: None, lambda self: [other.gradients.clear() for other in list(engines)])


# States


def load_forgets_weights() -> None:
    LocalTrainingClient._load_state = lambda self, path: LoadWeightsResponse(str(path))


def load_keeps_moments() -> None:
    def load(self: Any, tensors: Any) -> None:
        state.replace_weights(self.model, tensors)
        self.gradients.clear()

    Engine.replace_weights = load


def create_restores_moments() -> None:
    make = Service.__init__

    def made(self: Any, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        self.local.create_training_client_from_state = self.local.create_training_client_from_state_with_optimizer

    Service.__init__ = made


def step_count_lost() -> None:
    load = state.load_moments

    def edited(model: Any, optimizer: Any, tensors: Any) -> None:
        load(model, optimizer, tensors)
        for moments in optimizer.state.values():
            moments["step"] = torch.tensor(0.0)

    state.load_moments = edited


def save_resets_moments() -> None:
    save = LocalTrainingClient._save_state

    def edited(self: Any, *args: Any) -> Any:
        result = save(self, *args)
        self._engine.reset_optimizer()
        return result

    LocalTrainingClient._save_state = edited


STEPS: dict[str, Defect] = {
    "rate-fixed": Defect("adam-settings", settings(lr=1e-4)),
    "betas-fixed": Defect("adam-settings", settings(betas=(0.9, 0.95))),
    "decay-in-gradient": Defect("decay-wrong", decay_in_gradient),
    "clips-at-zero": Defect("clip-ignored", clips_at_zero),
    "clips-each-value": Defect("clip-ignored", clips_each_value),
    "no-bias-correction": Defect("adam-bias", no_bias_correction),
    "gradient-doubled": Defect("gradient-scale", gradient_doubled),
    "calls-averaged": Defect("gradient-averaged", calls_averaged),
    "one-gradient-for-all": Defect("models-shared", one_gradient_for_all),
    "load-forgets-weights": Defect("state-lost", load_forgets_weights),
    "load-keeps-moments": Defect("optimizer-kept", load_keeps_moments),
    "create-restores-moments": Defect("optimizer-kept", create_restores_moments),
    "step-count-lost": Defect("optimizer-lost", step_count_lost),
    "save-resets-moments": Defect("save-disturbs", save_resets_moments),
}
"""Name → defect."""
