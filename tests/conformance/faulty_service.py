"""Defects of the protocol: answers, failures, sparse tensors and sampling."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from lossfns.backend.client import sampling
from lossfns.backend.client.sampling import LocalSamplingClient
from lossfns.backend.client.training import LocalTrainingClient
from lossfns.backend.engine import state
from lossfns.backend.model import generate
from lossfns.datum import TensorData
from lossfns.errors import LossInputError
from lossfns.export.builtins import BUILTINS
from lossfns.server import endpoints, wire
from lossfns.server import sampling as served_sampling
from lossfns.server.app import App, refusal
from lossfns.server.model import ServedModel
from lossfns.server.service import Service
from lossfns.server.wire import Pass
from tests.conformance.faulty_steps import around_step
from tests.conformance.planting import Defect, metrics, requests, weights, with_fields

# Answers


def at_request(number: int, act: Callable[[], Any]) -> Callable[[], None]:
    """Return a defect that answers with ``act()`` from the given request on."""

    def plant() -> None:
        guard, seen = App.guarded, [0]

        def guarded(self: App, handler: Any) -> Any:
            right = guard(self, handler)

            async def answer(request: Any) -> Any:
                seen[0] += 1
                return await right(request) if seen[0] < number else await act()

            return answer

        App.guarded = guarded

    return plant


async def never() -> None:
    await asyncio.sleep(3600)


async def status_500() -> Any:
    return refusal(500, "out of memory")


async def die() -> None:
    os._exit(1)


def steps_hang() -> None:
    async def hang(*args: Any) -> Any:
        await never()

    endpoints.POST["optim_step"] = hang


def loss_avg(m: dict[str, float]) -> dict[str, float]:
    return {name.replace("loss:sum", "loss:avg"): x for name, x in m.items()}


# Failures


def failures_stay(requests_lost: int) -> Callable[[], None]:
    """Return a defect by which requests that follow a failed one fail as well."""

    def plant() -> None:
        run = ServedModel._run

        async def edited(self: Any, call: Any) -> None:
            left = getattr(self, "left", 0)
            if left:
                self.left = left - 1
                self._set_error(call, "a request before this one has failed", "server")
                return
            await run(self, call)
            if call.future.error is not None:
                self.left = requests_lost

        ServedModel._run = edited

    return plant


def failure_leaves_gradient() -> None:
    run = endpoints.run_pass

    async def edited(client: Any, request: Pass, losses: Any) -> Any:
        try:
            return await run(client, request, losses)
        except LossInputError:
            if isinstance(request.data, list) and len(request.data) > 1 and not request.forward_only:
                for datum in request.data:
                    await run(client, request._replace(data=[datum]), losses)
            raise

    endpoints.run_pass = edited


def unknown_is_cross_entropy() -> None:
    def edit(request: Pass) -> Pass:
        if request.loss_fn in BUILTINS or request.loss_fn == "custom":
            return request
        data = [with_fields(datum, logprobs=None, advantages=None) for datum in request.data]
        return request._replace(loss_fn="cross_entropy", config={}, data=data)

    requests(edit)


# Sparse tensors


def sparse(edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[], None]:
    """Return a defect that edits the dense form of a CSR tensor."""

    def plant() -> None:
        read = wire.sparse_tensor

        def edited(dtype: str, *args: Any) -> TensorData:
            return TensorData.from_numpy(edit(read(dtype, *args).to_numpy()))

        wire.sparse_tensor = edited

    return plant


# Sampling


def sampled_weights_are_old() -> None:
    """A sampler gets the weights from before the last step."""

    def keep(self: Any, adam: Any) -> None:
        self.old = {name: x.clone() for name, x in state.weights(self.model).items()}

    around_step(keep)
    save = LocalTrainingClient._write

    def edited(self: Any, path: Any, tensors: Any, kind: str, *args: Any, **more: Any) -> Any:
        old = getattr(self._engine, "old", tensors)
        return save(self, path, old if kind == "sampler" else tensors, kind, *args, **more)

    LocalTrainingClient._write = edited


def sampler_is_live() -> None:
    load = Service._load_sampler

    def edited(self: Service, sampler: Any) -> LocalSamplingClient:
        model = self.models.get((sampler.path or "").removeprefix("tinker://").partition("/")[0])
        loaded = load(self, sampler)
        return loaded if model is None else LocalSamplingClient(model.client.model, loaded.get_tokenizer())

    Service._load_sampler = edited


def sampled_logprobs_tempered() -> None:
    sample, head_of = sampling.generate, generate.head_of

    def edited(*args: Any, temperature: float, **options: Any) -> Any:
        generate.head_of = lambda model: head_of(model)._replace(temperature=temperature or 1.0)
        return sample(*args, temperature=1.0 if temperature else 0.0, **options)

    sampling.generate = edited


def sampled_logprobs_shifted() -> None:
    sample = sampling.generate
    sampling.generate = lambda *args, **options: [
        s._replace(logprobs=s.logprobs[1:] + s.logprobs[:1]) for s in sample(*args, **options)
    ]


def prompt_logprobs_shifted() -> None:
    compute = LocalSamplingClient._compute_logprobs
    LocalSamplingClient._compute_logprobs = lambda self, prompt: (lambda x: [*x[1:], None])(compute(self, prompt))


def sampling_setting(**fixed: Any) -> Callable[[], None]:
    """Return a defect that fixes settings of sampling."""

    def plant() -> None:
        read = served_sampling.sampling_params
        served_sampling.sampling_params = lambda body: replace(read(body), **fixed)

    return plant


SERVICE: dict[str, Defect] = {
    "silent": Defect("no-answer", at_request(1, never)),
    "silent-later": Defect("no-answer", at_request(90, never)),
    "steps-hang": Defect("no-answer", steps_hang),
    "status-500-later": Defect("no-answer", at_request(60, status_500)),
    "dies-later": Defect("server-died", at_request(120, die)),
    "loss-avg": Defect("loss-sum-missing", metrics(loss_avg)),
    "failure-poisons": Defect("failure-poisons", failures_stay(10**9)),
    "error-of-another-request": Defect("failure-poisons", failures_stay(1)),
    "failure-leaves-gradient": Defect("failure-leaves-gradient", failure_leaves_gradient),
    "unknown-is-cross-entropy": Defect("bad-request-accepted", unknown_is_cross_entropy),
    "nan-is-zero": Defect("bad-request-accepted", weights(np.nan_to_num)),
    "sparse-zero-lost": Defect("sparse-misread", sparse(lambda x: x + (x == 0) if x.dtype == np.int64 else x)),
    "sparse-columns-reversed": Defect("sparse-misread", sparse(lambda x: np.ascontiguousarray(x[:, ::-1]))),
    "sampler-behind": Defect("sampler-weights", sampled_weights_are_old),
    "sampler-live": Defect("sampler-weights", sampler_is_live),
    "samples-tempered": Defect("sampler-logprobs", sampled_logprobs_tempered),
    "samples-shifted": Defect("sampler-logprobs", sampled_logprobs_shifted),
    "prompt-shifted": Defect("prompt-logprobs", prompt_logprobs_shifted),
    "max-tokens-fixed": Defect("sampling-settings", sampling_setting(max_tokens=5)),
    "temperature-fixed": Defect("sampling-settings", sampling_setting(temperature=1.0)),
    "stop-ignored": Defect("sampling-settings", sampling_setting(stop=None)),
}
"""Name → defect."""
