"""The engine: forward, loss, backward and optimizer step on one model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lossfns.backend.engine import passes, state
from lossfns.backend.engine.batch import ModelInputs, inputs_with_targets, inputs_without_targets
from lossfns.backend.engine.budget import UNMEASURED, Budget
from lossfns.backend.engine.builtins import bind_builtin
from lossfns.backend.engine.differentiate import (
    Differentiated,
    Outputs,
    computed_columns,
    evaluate_loss,
    objective_of,
    packed_columns,
    tensor_class,
)
from lossfns.backend.engine.forward import Forward, compute_embeddings, compute_logprobs
from lossfns.backend.engine.gradients import Gradients, summed_in_float32
from lossfns.backend.engine.optimizer import adam_settings, clip_factor, gradient_divisor, gradient_norm, take_step
from lossfns.backend.engine.pooling import Pool
from lossfns.backend.engine.ranks import Ranks, SingleProcess
from lossfns.backend.types import OptimStepResponse
from lossfns.errors import LossInputError
from lossfns.logprobs.head import head_of
from lossfns.loss import BoundLoss, Loss, LossFn


class Engine:
    """A model, its accumulated gradient and its optimizer.

    Args:
        model: a module with ``forward(tokens [N], lengths) -> hidden [N, D]`` and ``head`` [V, D].
        ranks: the processes that share the model.
        memory_budget: bytes that a request may take; None takes most of the free memory.
    """

    def __init__(self, model: nn.Module, ranks: SingleProcess | Ranks, memory_budget: float | None = None) -> None:
        self.model, self.ranks = model, ranks
        with torch.no_grad():
            head = head_of(model).weight
        self.output_dtype = torch.promote_types(head.dtype, torch.float32)
        ranks.shard(model)
        self.parameters = list(model.parameters())
        self.budget = Budget(model, head, ranks, memory_budget)
        self.gradients = Gradients(self.parameters)
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        """Discard the moments, the count of steps and the accumulated gradient."""
        self.optimizer = torch.optim.AdamW(self.parameters)
        self.steps = 0
        self.gradients.clear()

    # Forward

    def logprobs(self, data: Sequence[Any], loss_fn: Any = None) -> Forward:
        """Prepare the forward pass that computes the logprobs of the targets, in the shape of the targets.

        It also computes what else of the model a loss reads: entropy and Σp².
        """
        inputs = inputs_with_targets(data, self.budget.vocabulary)
        extras = computed_columns(loss_fn, data)
        graph = [name for name in extras if name in loss_fn.gradient_columns]
        compute = partial(compute_logprobs, extras=extras, differentiates=graph) if extras else compute_logprobs
        return self.forward_pass("logprobs", data, inputs, compute, inputs.targets[0].shape[1:], extras)

    def embeddings(self, data: Sequence[Any], pool: Pool) -> Forward:
        """Prepare the forward pass that computes embeddings [B, D]: hidden states pooled over each datum's tokens."""
        inputs = inputs_without_targets(data, self.budget.vocabulary)
        return self.forward_pass("embedding", data, inputs, partial(compute_embeddings, pool=pool), [self.budget.dim])

    def forward_pass(
        self,
        name: str,
        data: Sequence[Any],
        inputs: ModelInputs,
        compute: Callable[..., Tensor],
        shape: Sequence[int],
        extras: tuple[str, ...] = (),
    ) -> Forward:
        """Prepare the forward pass that computes outputs called ``name``, in rows of ``shape``, and extras.

        Inputs longer than the model's context are refused here, so that all ranks refuse them before any computes.
        """
        context = getattr(self.model, "context_length", math.inf)
        for i, length in enumerate(inputs.lengths):
            if length > context:
                expected = f"sequences of at most {context} tokens, the context of the model"
                raise LossInputError("model_input", expected, f"{length}", "Cut it.", datum=i)
        width = [math.prod(shape) + len(extras)] if extras else shape
        empty = torch.empty(0, *width, dtype=self.output_dtype, device=self.parameters[0].device)
        empty_outputs = Outputs(name, empty, inputs.output_lengths, tensor_class(data), extras, tuple(shape))
        return Forward(inputs, partial(self.ranks.run, partial(compute, self.model)), empty_outputs)

    def outputs(self, forward: Forward) -> Outputs:
        """Run a forward pass without gradient."""
        with torch.no_grad():
            return forward.outputs(passes.forward_only(forward, self.budget.plan(forward.inputs)))

    def forward(self, data: list[Any], loss_fn: Any, config: Any) -> Differentiated:
        """Compute logprobs and the value of a built-in loss, without gradient."""
        forward = self.logprobs(data)
        bound = bind_builtin(loss_fn, config, data, multi_target=forward.inputs.targets[0].ndim == 2)
        columns = packed_columns(bound, data, forward.empty_outputs)
        return evaluate_loss(bound, columns, self.outputs(forward)).finalise()

    # Backward. Callers run these methods in a ``with gradients.all_or_nothing()`` block.

    def forward_backward(self, data: list[Any], loss_fn: Any, config: Any) -> Differentiated:
        """Compute a built-in loss, and add its gradient to the accumulated one."""
        forward = self.logprobs(data)
        bound = bind_builtin(loss_fn, config, data, multi_target=forward.inputs.targets[0].ndim == 2)
        result = self.backward(bound, data, forward)
        if result.metrics["tokens"] == 0:
            expected, fix = "at least one active token in the batch", "Leave the call out: it would add no gradient."
            raise LossInputError("weights", expected, "only zeros", fix, loss=loss_fn)
        return result

    def backward(self, loss_fn: LossFn | Loss | BoundLoss, data: list[Any], forward: Forward) -> Differentiated:
        """Compute any loss of the contract, and add its gradient to the accumulated one.

        The loss is differentiated with respect to detached outputs. This gradient is then backpropagated through the
        graph of the forward pass. So the parameters get the full gradient, and a custom loss costs what a built-in one
        does.
        """
        objective = objective_of(loss_fn, self.ranks.agreeing)
        with torch.enable_grad():  # restores the mode at its end, whatever the loss has set
            extras, compensation = forward.empty_outputs.extras, self.gradients.compensation_bytes
            losses = len(objective.bound.loss.parts) if objective.bound else 1
            plan = self.budget.plan(forward.inputs, objective.group, compensation, losses or 1, extras)
            step = partial(passes.forward_backward, objective, data, forward, plan)
            if plan.costs.footprint is UNMEASURED:
                deferred, plan = self.budget.measured(step, plan, forward.inputs, extras)
            else:
                with summed_in_float32(self.model) if len(plan.micro_batches) > 1 else nullcontext():
                    deferred = step()
            result = deferred.finalise(self.gradients.are_finite())
            self.gradients.record(objective, result)
        return result._replace(micro_batches=len(plan.micro_batches), peak_memory=plan.peak_memory)

    # Step

    def optim_step(self, adam: Any, normalization: Any = None) -> OptimStepResponse:
        """Divide the accumulated gradient, clip it, take a step of AdamW with it, and clear it."""
        parameters = [p for p in self.parameters if p.grad is not None]
        settings = adam_settings(adam, {p.dtype for p in parameters})
        divisor = gradient_divisor(normalization, self.gradients.accumulated)
        if not parameters:
            fix = "Call forward_backward first."
            raise LossInputError("optim_step", "an accumulated gradient", "none since the last step", fix)
        norm = gradient_norm(parameters) / divisor
        if not math.isfinite(norm):
            self.gradients.clear()
            fix = "The gradient is dropped and the weights are as they were. Its norm overflowed: try a smaller batch."
            raise LossInputError("optim_step", "a finite gradient", f"a norm of {norm}", fix)
        factor = clip_factor(norm, float(adam.grad_clip_norm)) / divisor
        take_step(self.optimizer, parameters, settings, factor)
        self.gradients.clear()
        self.steps += 1
        return OptimStepResponse({"grad_norm": norm, "lr": settings["lr"]})

    # State

    def state(self) -> dict[str, Tensor]:
        """Return the weights, the optimizer's moments and the state of torch's random numbers.

        The random state is that of rank 0, which draws the samples.
        """
        random = self.ranks.on_rank_zero(state.random, self.parameters[0].device)
        return state.weights(self.model) | state.moments(self.model, self.optimizer) | random

    def load_weights(self, tensors: Mapping[str, Tensor], path: str) -> None:
        """Load weights, or refuse them and change nothing. The optimizer starts afresh.

        New adapters stay as they are if ``tensors`` has none: they start on these weights.

        Args:
            tensors: named as ``state`` names them.
            path: the checkpoint, which errors name.
        """
        tensors = state.with_new_adapters(self.model, self.ranks.distribute(tensors))
        state.check_weights(self.model, tensors, path)
        self.replace_weights(tensors)

    def replace_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Load weights that ``check_weights`` has accepted. The optimizer starts afresh."""
        state.replace_weights(self.model, tensors)
        self.reset_optimizer()

    def load_state(self, tensors: Mapping[str, Tensor], path: str, data: Mapping[str, Any]) -> None:
        """Load all of ``state``, or refuse it and change nothing.

        Training then continues as if it had not been interrupted.
        """
        tensors = self.ranks.distribute(tensors)
        state.check_weights(self.model, tensors, path)
        state.check_complete(self.model, tensors, data, path)
        state.check_random(tensors, self.parameters[0].device, path)
        self.replace_weights(tensors)
        state.load_moments(self.model, self.optimizer, tensors)
        state.load_random(tensors, self.parameters[0].device)
        self.steps = data["steps"]
