"""A sampling session: the weights that it samples from, and the requests that are sampled together."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

from lossfns.backend.client.sampling import LocalSamplingClient
from lossfns.backend.types import SampleResponse, SamplingParams
from lossfns.errors import LossInputError

SEQUENCES_AT_ONCE = 64
"""The most sequences that are sampled at once, unless one request asks for more."""


class SampleRequest(NamedTuple):
    """A prompt that waits for its samples."""

    prompt: Any
    samples: int
    params: SamplingParams
    response: asyncio.Future[SampleResponse]


class Sampler:
    """A sampling session.

    Requests that come during a run wait. Those with the same settings are then sampled together, which is much faster.
    A request with a seed is sampled alone, so that its seed decides.

    Attributes:
        base_model: the name of the base model.
        path: the path of its weights; None for a base model, and for weights that were not written.
        client: the sampling client once it is loaded.
        reloadable: whether ``client`` can be loaded again.
        lock: held while the client is loaded.
    """

    def __init__(self, base_model: str, path: str | None, client: LocalSamplingClient | None = None) -> None:
        self.base_model, self.path, self.client = base_model, path, client
        self.reloadable = client is None
        self.lock = asyncio.Lock()
        self._waiting: list[SampleRequest] = []
        self._task: asyncio.Task[None] | None = None

    async def sample(
        self, client: LocalSamplingClient, prompt: Any, count: int, params: SamplingParams
    ) -> SampleResponse:
        """Sample ``count`` continuations of a prompt by ``client``, the loaded one."""
        if params.seed is not None:
            return await client.sample(prompt, count, params)
        request = SampleRequest(prompt, count, params, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(client))
        return await request.response

    async def _run(self, client: LocalSamplingClient) -> None:
        while self._waiting:
            first = self._waiting[0]
            alike = [r for r in self._waiting if (r.samples, r.params) == (first.samples, first.params)]
            batch = alike[: max(1, SEQUENCES_AT_ONCE // first.samples)]
            batch_ids = set(map(id, batch))
            self._waiting = [request for request in self._waiting if id(request) not in batch_ids]
            try:
                prompts = [request.prompt for request in batch]
                responses = await client.sample_batch(prompts, first.samples, first.params)
            except LossInputError as error:
                await self._run_each(client, batch, error)
            except Exception as error:
                for request in batch:
                    request.response.set_exception(error)
            else:
                for request, response in zip(batch, responses, strict=True):
                    request.response.set_result(response)

    async def _run_each(self, client: LocalSamplingClient, batch: list[SampleRequest], error: LossInputError) -> None:
        """Sample one by one after ``error``, so that it fails only the requests that cause it."""
        for request in batch:
            try:
                if len(batch) == 1:  # it would fail again
                    raise error
                request.response.set_result(await client.sample(request.prompt, request.samples, request.params))
            except Exception as failure:
                request.response.set_exception(failure)
