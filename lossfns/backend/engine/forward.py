"""The forward pass: from the inputs of datums to logprobs of their targets, or to their embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lossfns.backend.engine.batch import ModelInputs, PackedInputs, index_or_all, pack_inputs
from lossfns.backend.engine.differentiate import Outputs
from lossfns.backend.engine.memory import trim_heap
from lossfns.backend.engine.pooling import Pool
from lossfns.backend.model.prefixes import unshared
from lossfns.errors import LossInputError
from lossfns.logprobs.linear import model_outputs

SpareBytes = Callable[[int], float]
"""``spare_bytes(tokens)``: the bytes of logits that a forward pass over so many tokens may keep for its backward."""


class Forward(NamedTuple):
    """The forward pass of a request.

    Attributes:
        inputs: the inputs of all datums.
        compute: ``compute(inputs, spare_bytes)`` returns the outputs of some of the datums, with their graph.
        empty_outputs: the outputs of all datums before they are computed: ``values`` has no rows, but the final
            dtype, device and trailing dimensions.
    """

    inputs: ModelInputs
    compute: Callable[..., Tensor]
    empty_outputs: Outputs

    def micro_batch(self, part: slice, spare_bytes: SpareBytes) -> Tensor:
        """Return the outputs of a micro-batch; with gradients enabled, refuse outputs that no parameter can change."""
        inputs = self.inputs.part(part)
        if len(inputs.tokens) < len(self.inputs.tokens):
            trim_heap(self.empty_outputs.values.device)  # the previous micro-batch has freed memory
        values = self.compute(inputs, spare_bytes)
        if torch.is_grad_enabled() and not values.requires_grad:
            got, fix = "a model in which all that computes them is frozen", "Train a part that they depend on."
            raise LossInputError(self.empty_outputs.name, "outputs that parameters can move", got, fix)
        return values

    def on_host(self) -> Forward:
        """Return the forward pass with logprobs on the host, where reading a loss and its gradient is no wait."""
        if self.empty_outputs.name != "logprobs":
            return self
        return self._replace(compute=partial(self.compute, result_device=torch.device("cpu")))

    def outputs(self, values: Tensor) -> Outputs:
        """Return the outputs of all datums, given their values."""
        return self.empty_outputs._replace(values=values)


def compute_logprobs(
    model: nn.Module,
    inputs: ModelInputs,
    spare_bytes: SpareBytes,
    result_device: torch.device | None = None,
    *,
    extras: Sequence[str] = (),
    differentiates: Sequence[str] = (),
) -> Tensor:
    """Return the logprobs of the targets, in float32 at least: [N] or [N, K], on the model's or the result device.

    With ``extras``, names in ``MODEL_COLUMNS``, these are the last columns of the result: [N, 1 + E] or [N, K + E].
    Those that are not in ``differentiates`` are constants.
    """
    packed, hidden = hidden_states(model, inputs, result_device)
    assert packed.targets is not None
    rows, spare = index_or_all(hidden, packed.hidden_rows), spare_bytes(packed.tokens_in_memory)
    outputs = model_outputs(model, rows, packed.targets, extras, differentiates, spare, result_device)
    values = torch.cat([x.view(len(x), -1) for x in outputs], 1) if extras else outputs[0]
    return index_or_all(values, packed.inverse)


def compute_embeddings(model: nn.Module, inputs: ModelInputs, spare_bytes: SpareBytes, pool: Pool) -> Tensor:
    """Return the pooled hidden states of each datum: [B, D], in float32 at least. No logits are computed."""
    packed, hidden = hidden_states(model, inputs)
    hidden = index_or_all(hidden, packed.hidden_rows)
    return pool(hidden.to(torch.promote_types(hidden.dtype, torch.float32)), inputs.lengths)


def hidden_states(
    model: nn.Module, inputs: ModelInputs, result_device: torch.device | None = None
) -> tuple[PackedInputs, Tensor]:
    """Return the packed inputs and the hidden states after the final norm.

    Common prefixes are computed once if the model can share them.
    """
    device = next(model.parameters()).device
    if not can_share(model):
        packed = pack_inputs(inputs, unshared(inputs.tokens), device, result_device)
        return packed, model(packed.tokens, packed.lengths)
    packed = pack_inputs(inputs, inputs.shared, device, result_device)
    return packed, model(packed.tokens, packed.lengths, packed.previous)


def can_share(model: nn.Module) -> bool:
    """Return whether segments of a batch may continue others."""
    return "previous" in signature(model.forward).parameters
