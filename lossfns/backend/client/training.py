"""The training client: the calls and futures of the hosted services, on a local model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lossfns.backend.client.profiles import request_cost, with_reductions
from lossfns.backend.client.reference import LocalReferenceClient, UnadaptedClient, response
from lossfns.backend.client.requests import (
    check_custom_targets,
    check_flag,
    check_loss_type,
    check_output,
    check_path,
    check_save,
    copy_data,
    refuse_existing,
)
from lossfns.backend.client.sampling import LocalSamplingClient
from lossfns.backend.engine.names import renamed
from lossfns.backend.engine.pooling import POOLS
from lossfns.backend.engine.state import (
    adapters_change_nothing,
    check_description,
    description,
    load_weights,
    parameters_with_moments,
    weights,
)
from lossfns.backend.futures import APIFuture, async_of, async_submit, log, raise_refused_wait
from lossfns.backend.model import lora
from lossfns.backend.storage import checkpoint
from lossfns.backend.storage.folder import Processes
from lossfns.backend.types import ForwardBackwardOutput, LoadWeightsResponse, OptimStepResponse, SaveResponse
from lossfns.errors import LossInputError
from lossfns.loss import LossFn


class LocalTrainingClient(LocalReferenceClient):
    """A model with forward_backward, forward_backward_custom, optim_step and checkpoints.

    Requests run in the order of submission on one thread and return futures at once. Gradients add up over
    ``forward_backward`` and ``forward_backward_custom`` until ``optim_step``, which clears them. A request that fails
    leaves weights and gradients as they were. An error that nobody reads is raised by the next request.

    Its arguments are those of ``LocalReferenceClient``.

    >>> from lossfns import cross_entropy, datum_from_tokens
    >>> client = LocalTrainingClient(seed=1)
    >>> data = [datum_from_tokens([72, 105, 33], prompt_length=1)]
    >>> builtin = client.forward_backward(data, "cross_entropy").result()
    >>> custom = client.forward_backward_custom(data, cross_entropy()).result()
    >>> builtin.loss_fn_outputs[0]["logprobs"].shape, "loss:sum" in custom.metrics
    ([2], True)
    """

    def forward_backward(
        self, data: list[Any], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Compute a built-in loss, a raw sum over tokens, and add its gradient to the accumulated one.

        Args:
            data: datums with ``target_tokens`` and the fields that the loss reads.
            loss_fn: the name of a built-in loss.
            loss_fn_config: settings of the built-in loss by name.

        The result has the logprobs of each datum, in the shape of its targets, and metrics named
        ``name:reduction``. The future raises LossInputError for an unknown name, setting or field, for data that do
        not fit together, and for a loss or gradient that is not finite.
        """
        self._profile.check_at_call(data)
        return self._worker.submit_gradient(self._forward_backward, copy_data(data), loss_fn, loss_fn_config)

    def forward_backward_custom(
        self,
        data: list[Any],
        loss_fn: LossFn,
        *,
        loss_type_input: str | None = None,
        output: str = "logprobs",
        pooling: str = "mean",
    ) -> APIFuture[ForwardBackwardOutput]:
        """Compute any loss ``(data, logprobs_list) -> (loss, metrics)`` and add its gradient to the accumulated one.

        Forward, loss and backward are one request, and nothing runs between them. A batch that fits the memory budget
        takes one pass over the model. A larger batch takes two, if the loss is not one of ``lossfns``.

        Args:
            data: datums with ``target_tokens``; the loss gets them as they are.
            loss_fn: a loss of ``lossfns``, bound or not, or a function. A function gets a CPU tensor for each datum.
            loss_type_input: ``"logprobs"`` or None, as in Tinker's SDK.
            output: ``"logprobs"``, or ``"embedding"`` for a loss over the pooled hidden states [D] of each datum. Model
                inputs are then whole, unshifted sequences, and targets are not needed.
            pooling: how embeddings are pooled: the ``"mean"`` over the tokens, or the ``"last"`` token.

        A loss that reads ``entropy`` or ``sum_square_probs`` gets those of the model, from the same pass, with their
        gradient where the loss differentiates them. Numbers that are bound or in the datums replace them, as constants.

        The metrics are those of the loss, ``passes``, ``micro_batches`` and ``peak_memory`` (bytes), and those of the
        profile. Under ``"tinker"``, ``loss:sum`` is the loss and ``surrogate_loss:sum`` is Σ lp·∂L/∂lp. Under
        ``"fireworks"``, ``loss:sum`` is that surrogate and ``response_tokens`` counts the entries with a gradient.

        Raises LossInputError at the call for missing targets or an unknown option. The future raises it for a loss that
        breaks the contract or is not finite, and whatever the loss itself raises. Under ``"fireworks"`` the call waits
        for the result, so that all errors are raised there.
        """
        future = self._submit_custom(data, loss_fn, loss_type_input=loss_type_input, output=output, pooling=pooling)
        if self._profile.custom_call_waits:
            future.result()
        return future

    @async_of(forward_backward_custom)
    async def forward_backward_custom_async(self, *args: Any, **kwargs: Any) -> APIFuture[ForwardBackwardOutput]:
        """``forward_backward_custom`` for code that awaits the call as well as the future that it returns.

        Where the call waits, it does not block the event loop.
        """
        future = self._submit_custom(*args, **kwargs)
        if self._profile.custom_call_waits:
            await future
        return future

    def optim_step(
        self, optim_params: Any = None, grad_accumulation_normalization: Any = None, *, adam_params: Any = None
    ) -> APIFuture[OptimStepResponse]:
        """Normalise and clip the accumulated gradient, take one AdamW step with it, and clear it.

        Args:
            optim_params: ``AdamParams``, or any object with the same attributes.
            grad_accumulation_normalization: the count that divides the gradient before it is clipped:
                ``"num_loss_tokens"``, the positions that have had a gradient since the last step;
                ``"num_sequences"``, the datums with such a position; or none (``"none"``, None).
            adam_params: the former name of ``optim_params``.

        The result's metrics are ``grad_norm``, the norm after the division and before clipping, and ``lr``. The future
        raises LossInputError without a gradient, for a gradient that is not finite, for settings out of range, and
        for a division of a loss that already is a mean. It raises NotRun if a gradient submitted before the step fails:
        part of the gradient would be missing.
        """
        if optim_params is not None and adam_params is not None:
            got = "Specify optim_params or legacy adam_params, not both"
            raise LossInputError("optim_params", "one of the two", got, "They mean the same.")
        params = optim_params if adam_params is None else adam_params
        return self._worker.submit_step(self._engine.optim_step, params, grad_accumulation_normalization)

    def save_state(
        self,
        name: str | Path,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: Mapping[str, str] | None = None,
    ) -> APIFuture[SaveResponse]:
        """Save weights, optimizer, number of steps and random state. The file appears whole or not at all.

        Args:
            name: the path of the file; under a mesh, of a folder.
            ttl_seconds: None. A local file does not expire.
            overwrite: whether to replace a file that exists.
            user_metadata: strings by name for the file, in addition to those of the client.

        Raises LossInputError at the call for an unusable argument. The future raises it for a name that exists, a place
        that cannot be written to, and an accumulated gradient, which is not part of a checkpoint.
        """
        check_save(name, ttl_seconds, user_metadata)
        check_flag("overwrite", overwrite)
        return self._worker.submit(self._save_state, name, overwrite, dict(user_metadata or {}))

    def load_state(self, path: str | Path, weights_access_token: str | None = None) -> APIFuture[LoadWeightsResponse]:
        """Load the weights of a checkpoint, and start the optimizer afresh.

        An accumulated gradient is dropped, with a warning in the log. Adapters that have made no step start on the
        weights of a checkpoint without adapters.

        Args:
            path: a path that ``save_state`` or ``save_weights_for_sampler`` has written.
            weights_access_token: not used.

        The future raises LossInputError, with the client as it was, for a file that is missing, damaged or of another
        model.
        """
        check_path("path", path)
        return self._worker.submit(self._load_state, path)

    def load_state_with_optimizer(
        self, path: str | Path, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Load all of ``save_state``: training continues as if it had not been interrupted.

        This sets the random state of torch, which the whole process shares. Arguments and errors are those of
        ``load_state``; weights for a sampler are refused as well.
        """
        check_path("path", path)
        return self._worker.submit(self._load_state_with_optimizer, path)

    def save_weights_for_sampler(
        self,
        name: str | Path,
        ttl_seconds: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> APIFuture[SaveResponse]:
        """Save only the weights, for ``create_sampling_client`` and ``load_state``.

        Arguments and errors are those of ``save_state``. A file that exists is never replaced, and an accumulated
        gradient does not matter.
        """
        check_save(name, ttl_seconds, user_metadata)
        return self._worker.submit(self._save_weights, name, dict(user_metadata or {}))

    def save_weights_and_get_sampling_client(
        self, name: str | None = None, retry_config: Any = None
    ) -> LocalSamplingClient:
        """Copy the weights and return a client that samples from the copy, which later steps do not change.

        Args:
            name: not used, as no file is written.
            retry_config: not used, as nothing is sent.
        """
        return self._worker.submit(self._copy_to_sampler).result()

    async def save_weights_and_get_sampling_client_async(
        self, name: str | None = None, retry_config: Any = None
    ) -> LocalSamplingClient:
        """``save_weights_and_get_sampling_client`` without blocking the event loop."""
        return await self._worker.submit(self._copy_to_sampler)

    def export(self, path: str | Path, merge: bool = False) -> APIFuture[SaveResponse]:
        """Write the model to a folder that ``transformers`` and ``peft`` load. The folder appears whole or not at all.

        Args:
            path: a folder that is new or empty.
            merge: whether to merge adapters into the weights. Without it a model with adapters becomes a folder for
                ``peft``: the adapter and the name of its base model. A base model that cannot be loaded from where it
                came is written beside the adapter, in the folder ``base``.

        A model of ``transformers`` keeps its architecture, and the embedded ``Decoder`` becomes a ``LlamaForCausalLM``.
        The tokenizer of the client is written as well. Weights narrower than float32 become float32 if adapters are
        merged into them. Loaded elsewhere, the model gives the same logprobs. Needs the extra ``hf``.

        The future raises LossInputError for a path that holds something, and for a model, a tokenizer or adapters that
        the formats do not have.
        """
        check_path("path", path)
        check_flag("merge", merge)
        return self._worker.submit(self._export, path, merge)

    def create_sampling_client(self, model_path: str | Path, retry_config: Any = None) -> LocalSamplingClient:
        """Return a client that samples from the weights of a file.

        Args:
            model_path: a checkpoint of this model.
            retry_config: not used, as nothing is sent.

        Raises LossInputError for a file that is missing, damaged or of another model.
        """
        check_path("model_path", model_path)
        return self._worker.submit(self._sampling_client, model_path).result()

    async def create_sampling_client_async(
        self, model_path: str | Path, retry_config: Any = None
    ) -> LocalSamplingClient:
        """``create_sampling_client`` without blocking the event loop."""
        check_path("model_path", model_path)
        return await self._worker.submit(self._sampling_client, model_path)

    def reference(self) -> LocalReferenceClient:
        """Return a client of this model with its adapters switched off: the reference policy, without a second copy.

        Its requests run in one order with those of this client, on the same thread and weights. Raises LossInputError
        for a model without adapters, and for adapters that were not zero when the client started: without them the
        model is not the policy that the client started from.
        """
        if not lora.adapted_layers(self.model):
            fix = "Pass a copy of the model to LocalReferenceClient, before the first step."
            raise LossInputError("reference", "a model with adapters, which can be switched off", "none", fix)
        if not self._starts_unadapted:
            fix = "Pass a copy of the model to LocalReferenceClient, before the first step."
            raise LossInputError("reference", "adapters that are zero at the start", "adapters trained before", fix)
        return UnadaptedClient(self)

    forward_backward_async = async_submit(forward_backward)
    optim_step_async = async_submit(optim_step)
    save_state_async = async_submit(save_state)
    load_state_async = async_submit(load_state)
    load_state_with_optimizer_async = async_submit(load_state_with_optimizer)
    save_weights_for_sampler_async = async_submit(save_weights_for_sampler)
    export_async = async_submit(export)

    def _submit_custom(
        self, data: Any, loss_fn: Any, *, loss_type_input: Any = None, output: Any = "logprobs", pooling: Any = "mean"
    ) -> APIFuture[ForwardBackwardOutput]:
        check_output(output, pooling)
        check_loss_type(loss_type_input)
        self._profile.check_at_call(data)
        if output == "logprobs":
            check_custom_targets(data)
        # The loss gets the datums themselves, as from the services. The list is a copy: the caller may change it.
        datums = list(data) if isinstance(data, list) else data
        request = self._forward_backward_custom
        return self._worker.submit_gradient(request, copy_data(data), datums, loss_fn, output, pooling)

    # Run by the worker

    def _forward_backward(self, data: Any, loss_fn: Any, config: Any) -> ForwardBackwardOutput:
        with self._engine.gradients.all_or_nothing():  # a failure of the response also drops the gradient
            result = self._engine.forward_backward(data, loss_fn, config)
            metrics = self._profile.builtin_metrics(loss_fn, result) | with_reductions(request_cost(result))
            return response(result, metrics)

    def _forward_backward_custom(
        self, fields: Any, data: Any, loss_fn: Any, output: str, pooling: str
    ) -> ForwardBackwardOutput:
        if output == "embedding":
            forward = self._engine.embeddings(fields, POOLS[pooling])
        else:
            forward = self._engine.logprobs(fields, loss_fn)
            self._profile.check_custom_data(fields)
        with self._engine.gradients.all_or_nothing():
            result = self._engine.backward(loss_fn, data, forward)
            raise_refused_wait()
            return response(result, request_cost(result) | self._profile.custom_metrics(result))

    def _save_state(self, path: str | Path, overwrite: bool, metadata: dict[str, str]) -> SaveResponse:
        if any(p.grad is not None for p in self.model.parameters()):
            fix = "Call optim_step first: gradients are not part of a checkpoint."
            raise LossInputError("save_state", "no accumulated gradient", "one", fix)
        tensors = self._engine.state()
        return self._write(path, tensors, "state", metadata, overwrite, stepped=parameters_with_moments(tensors))

    def _save_weights(self, path: str | Path, metadata: dict[str, str]) -> SaveResponse:
        return self._write(path, weights(self.model), "sampler", metadata, overwrite=False)

    def _write(
        self,
        path: str | Path,
        tensors: Mapping[str, Tensor],
        kind: str,
        metadata: dict[str, str],
        overwrite: bool,
        **more: Any,
    ) -> SaveResponse:
        data = more | {
            "kind": kind,
            "names": "public",
            "steps": self._engine.steps,
            "model": self._name,
            "source": getattr(self.model, "source", None),
            "dtype": str(next(self.model.parameters()).dtype),
            "starts_unadapted": self._starts_unadapted,
            **description(self.model),
            "user_metadata": self.user_metadata | metadata,
        }
        try:
            if not overwrite:
                self.ranks.on_rank_zero(refuse_existing, path)
            return SaveResponse(str(checkpoint.save(path, tensors, data, self._processes(), overwrite=overwrite)))
        except LossInputError as error:
            error.field = "name" if error.field == "path" else error.field
            raise

    def _export(self, path: str | Path, merge: bool) -> SaveResponse:
        from lossfns.backend.model.pretrained import save_pretrained  # imports transformers

        model = self.ranks.copy_model()
        return SaveResponse(str(self.ranks.on_rank_zero(save_pretrained, model, self._tokenizer, path, merge)))

    def _load(self, path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return renamed(self.model, *checkpoint.load(path, self._processes(), self.ranks.empty_for))

    def _processes(self) -> Processes:
        ranks = self.ranks
        return Processes(ranks.rank, ranks.size, ranks.group, ranks.gather, ranks.on_rank_zero, ranks.all_or_none)

    def _load_state(self, path: str | Path) -> LoadWeightsResponse:
        tensors, data = self._load(path)
        check_description(self.model, data, str(path))
        with self._logging_dropped_gradient(path):
            self._engine.load_weights(tensors, str(path))
        self._starts_unadapted = adapters_change_nothing(self.model)
        return LoadWeightsResponse(str(path))

    def _load_state_with_optimizer(self, path: str | Path) -> LoadWeightsResponse:
        tensors, data = self._load(path)
        if data.get("kind") == "sampler":
            fix = "Take load_state, or a file of save_state."
            raise LossInputError("path", "a checkpoint with an optimizer", f"{path}, weights for a sampler", fix)
        check_description(self.model, data, str(path))
        with self._logging_dropped_gradient(path):
            self._engine.load_state(tensors, str(path), data)
        self._starts_unadapted = data.get("starts_unadapted") is not False
        return LoadWeightsResponse(str(path))

    @contextmanager
    def _logging_dropped_gradient(self, path: str | Path) -> Iterator[None]:
        count = int(self._engine.gradients.accumulated.sequences)
        yield
        if count:
            log.warning("Loading %s has dropped the accumulated gradient of %d sequences.", path, count)

    def _copy_to_sampler(self) -> LocalSamplingClient:
        return LocalSamplingClient(self.ranks.copy_model(), self._tokenizer, self.ranks)

    def _sampling_client(self, path: str | Path) -> LocalSamplingClient:
        tensors, data = renamed(self.model, *checkpoint.load(path))
        check_description(self.model, data, str(path))
        sampler = self._copy_to_sampler()
        load_weights(sampler.model, tensors, str(path))
        return sampler
