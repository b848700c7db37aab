"""Servers with one planted defect each: the server of this project, patched in a process of its own.

python -m tests.conformance.faulty NAME --port P
"""

from __future__ import annotations

import argparse
import asyncio
import os
from dataclasses import replace
from typing import Any

import numpy as np

from lossfns.backend.client.training import LocalTrainingClient
from lossfns.backend.engine import engine
from lossfns.backend.types import ForwardBackwardOutput
from lossfns.datum import Datum
from lossfns.server import app, endpoints, results, sampling, wire
from lossfns.server.command import serve
from lossfns.server.futures import Futures, Refused
from lossfns.server.model import ServedModel
from lossfns.server.wire import Pass
from tests.conformance.faulty_later import LATER
from tests.conformance.faulty_losses import LOSSES
from tests.conformance.faulty_service import SERVICE
from tests.conformance.faulty_steps import STEPS
from tests.conformance.planting import Defect, answers, logprobs, metrics, requests, settings, weights, with_fields

# Answers and data


def loss_is_a_mean_times_tokens() -> None:
    def edit(request: Pass, result: ForwardBackwardOutput) -> ForwardBackwardOutput:
        total = sum(x["logprobs"].to_numpy().size for x in result.loss_fn_outputs)
        count = result.metrics.get("tokens:sum", 1.0) or 1.0
        return replace(result, metrics={**result.metrics, "loss:sum": result.metrics["loss:sum"] / count * total})

    answers(edit)


def keys_without_colon() -> None:
    metrics(lambda m: {name.partition(":")[0]: x for name, x in m.items()})()


def outputs_reversed() -> None:
    answers(lambda request, result: replace(result, loss_fn_outputs=result.loss_fn_outputs[::-1]))


def always_cross_entropy() -> None:
    def edit(request: Pass) -> Pass:
        if request.loss_fn == "cross_entropy":
            return request
        data = [with_fields(d, logprobs=None, advantages=None, sequence_ratio_mask=None) for d in request.data]
        return request._replace(loss_fn="cross_entropy", config={}, data=data)

    requests(edit)


def config_ignored() -> None:
    requests(lambda request: request._replace(config={}))


def narrow_clip() -> None:
    narrow = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
    requests(lambda r: r._replace(config=narrow) if r.loss_fn == "ppo" and not r.config else r)


def status_501() -> None:
    submit = endpoints.forward_backward

    async def refused(service: Any, request: Pass, *args: Any) -> Any:
        if request.loss_fn in ("cispo", "dro", "gspo"):
            raise Refused(501, f"{request.loss_fn} is not implemented")
        return await submit(service, request, *args)

    endpoints.forward_backward = refused


def never_answers_ppo() -> None:
    async def run(client: Any, request: Pass, *args: Any) -> Any:
        if request.loss_fn == "ppo":
            await asyncio.sleep(3600)
        return await original(client, request, *args)

    original, endpoints.run_pass = endpoints.run_pass, run


def dies_of_targets() -> None:
    def edit(request: Pass) -> Pass:
        if request.data[0].loss_fn_inputs["target_tokens"].to_numpy().ndim == 2:
            os._exit(1)
        return request

    requests(edit)


# Patches of gradients


def gradient_is_a_mean() -> None:
    """The gradient is divided by the number of datums, and the reported loss is not."""
    backward = LocalTrainingClient._forward_backward

    def edited(self: Any, data: Any, loss_fn: Any, config: Any) -> Any:
        result = self._forward(data, loss_fn, config)
        n = len(data)
        name = "weights" if loss_fn == "cross_entropy" else "advantages"
        small = [with_fields(d, **{name: d.loss_fn_inputs[name].to_numpy() / n}) for d in data]
        backward(self, small, loss_fn, config)
        return result

    LocalTrainingClient._forward_backward = edited


def gradient_replaced() -> None:
    backward = LocalTrainingClient._forward_backward

    def edited(self: Any, *args: Any) -> Any:
        self._engine.gradients.clear()
        return backward(self, *args)

    LocalTrainingClient._forward_backward = edited


def forward_accumulates() -> None:
    requests(lambda request: request._replace(forward_only=False))


def step_keeps_gradient() -> None:
    step = engine.Engine.optim_step

    def edited(self: Any, *args: Any) -> Any:
        before = [(p, p.grad) for p in self.model.parameters()]
        result = step(self, *args)
        for p, gradient in before:
            p.grad = gradient
        return result

    engine.Engine.optim_step = edited


def all_gradients_halved() -> None:
    step = engine.take_step
    engine.take_step = lambda optimizer, parameters, settings, factor: step(optimizer, parameters, settings, factor / 2)


def clip_ignored() -> None:
    engine.clip_factor = lambda norm, clip: 1.0


# Patches of state


def create_from_state_422() -> None:
    load = endpoints.POST["load_weights"]

    async def refused(service: Any, body: Any, digest: Any) -> Any:
        if body.get("model_id") is None:
            raise Refused(422, "model_id: field required")
        return await load(service, body, digest)

    endpoints.POST["load_weights"] = refused


def optimizer_lost() -> None:
    service = endpoints.Service.__init__

    def edited(self: Any, *args: Any, **options: Any) -> None:
        service(self, *args, **options)
        local = self.local
        local.create_training_client_from_state_with_optimizer = local.create_training_client_from_state

    endpoints.Service.__init__ = edited


def mixed_targets_halved() -> None:
    """Datums of different numbers of targets in one request count half."""

    def edit(request: Pass) -> Pass:
        widths = {datum.loss_fn_inputs["target_tokens"].to_numpy().shape[1:] for datum in request.data}
        if len(widths) == 1:
            return request
        halved = [with_fields(d, weights=d.loss_fn_inputs["weights"].to_numpy() / 2) for d in request.data]
        return request._replace(data=halved)

    requests(edit)


def save_refused() -> None:
    async def refused(service: Any, body: Any, digest: Any) -> Any:
        raise Refused(422, "path: field required")

    endpoints.POST["save_weights"] = refused


def settings_stick() -> None:
    """A weight decay that was given once is kept for all later steps."""
    read, kept = engine.adam_settings, {"weight_decay": 0.0}

    def edited(adam: Any, dtypes: Any) -> dict[str, Any]:
        given = read(adam, dtypes)
        kept["weight_decay"] = max(kept["weight_decay"], given["weight_decay"])
        return given | kept

    engine.adam_settings = edited


# Patches of failures and sequence ids


def cuts_to_the_shortest() -> None:
    def edit(request: Pass) -> Pass:
        def cut(datum: Datum) -> Datum:
            fields = {name: x.to_numpy() for name, x in datum.loss_fn_inputs.items()}
            n = min((len(x) for x in fields.values()), default=0)
            made = with_fields(datum, **{name: x[:n] for name, x in fields.items()})
            return Datum(wire.TokenInput(np.asarray(datum.model_input.to_ints())[:n]), made.loss_fn_inputs)

        return request._replace(data=[cut(datum) for datum in request.data])

    requests(edit)


def blames_itself() -> None:
    fail = app.Future.set_error
    app.Future.set_error = lambda self, error, category="user": fail(self, error, "server")


def runs_repeated_requests() -> None:
    Futures.repeated = lambda self, request_id, digest: None
    submit = ServedModel.submit
    ServedModel.submit = lambda self, seq_id, *args: submit(self, max(seq_id, self.next_seq), *args)


def runs_in_order_of_arrival() -> None:
    submit = ServedModel.submit

    def edited(self: Any, seq_id: int, *args: Any) -> Any:
        place = max([self.next_seq - 1, *self.waiting]) + 1
        future = submit(self, place, *args)
        return future

    ServedModel.submit = edited


# Patches of sampling and of the protocol


def no_sequence_ids() -> None:
    sample = endpoints.POST["asample"]

    async def edited(service: Any, body: Any, digest: Any) -> Any:
        return {name: x for name, x in (await sample(service, body, digest)).items() if name != "sample_sequence_ids"}

    endpoints.POST["asample"] = edited


def ids_repeated() -> None:
    sample = endpoints.POST["asample"]

    async def edited(service: Any, body: Any, digest: Any) -> Any:
        answer = await sample(service, body, digest)
        return {**answer, "sample_sequence_ids": ["a"] * len(answer["sample_sequence_ids"])}

    endpoints.POST["asample"] = edited


def forward_drifts() -> None:
    calls: list[int] = []

    def edit(request: Pass, i: int, x: np.ndarray) -> np.ndarray:
        calls.append(i)
        return x - 0.02 * len(calls)

    logprobs(edit)()


def json_results() -> None:
    app.encode = lambda result, accept: results.encode(result, "application/json")


def seed_ignored() -> None:
    read = sampling.sampling_params
    sampling.sampling_params = lambda body: read({k: x for k, x in body.items() if k != "seed"})


def sparse_to_the_left() -> None:
    read = wire.sparse_tensor

    def edited(dtype: str, values: Any, crow: Any, col: Any, shape: Any, place: str) -> Any:
        row = np.repeat(np.arange(len(crow) - 1), np.diff(crow))
        return read(dtype, values, crow, np.arange(len(values)) - crow[row], shape, place)

    wire.sparse_tensor = edited


FIRST: dict[str, Defect] = {
    "metrics-empty": Defect("loss-sum-missing", metrics(lambda m: {})),
    "forward-drifts": Defect("state-between-calls", forward_drifts),
    "columns-reversed": Defect("targets-flattened", logprobs(lambda r, i, x: x[:, ::-1] if x.ndim == 2 else x)),
    "one-column-halved": Defect(
        "targets-flattened", weights(lambda w: w / 2 if w.ndim == 2 and w.shape[1] == 1 else w)
    ),
    "weights-flipped": Defect("sign-flipped", weights(np.negative)),
    "mixed-targets-halved": Defect("targets-flattened", mixed_targets_halved),
    "save-refused": Defect("refused", save_refused),
    "settings-stick": Defect("adam-settings", settings_stick),
    "ids-repeated": Defect("sequence-ids-missing", ids_repeated),
    "metric-nan": Defect("metric-keys", metrics(lambda m: {**m, "speed:mean": float("nan")})),
    "keys-without-colon": Defect("metric-keys", keys_without_colon),
    "flattened-targets": Defect("targets-flattened", logprobs(lambda request, i, x: x.ravel())),
    "loss-mean-times-tokens": Defect("loss-not-summed", loss_is_a_mean_times_tokens),
    "status-501": Defect("no-answer", status_501),
    "create-from-state-422": Defect("refused", create_from_state_422),
    "no-sequence-ids": Defect("sequence-ids-missing", no_sequence_ids),
    "json-results": Defect("not-the-protocol", json_results),
    "always-cross-entropy": Defect("another-loss", always_cross_entropy),
    "config-ignored": Defect("config-ignored", config_ignored),
    "narrow-clip": Defect("other-defaults", narrow_clip),
    "outputs-reversed": Defect("output-order", outputs_reversed),
    "two-paths": Defect("two-numeric-paths", logprobs(lambda r, i, x: x if r.forward_only else x * 1.01)),
    "batch-leak": Defect("batch-leak", logprobs(lambda r, i, x: x - 0.1 * (len(r.data) - 1))),
    "weights-binarised": Defect("weights-binarised", weights(lambda w: (w != 0).astype(np.float32))),
    "weights-ignored": Defect("weights-ignored", weights(np.ones_like)),
    "negative-weights-dropped": Defect("negative-weights-lost", weights(lambda w: np.maximum(w, 0))),
    "gradient-mean": Defect("gradient-averaged", gradient_is_a_mean),
    "gradient-replaced": Defect("accumulation-lost", gradient_replaced),
    "forward-accumulates": Defect("forward-has-gradient", forward_accumulates),
    "gradient-kept": Defect("gradient-kept", step_keeps_gradient),
    "gradient-halved": Defect("gradient-scale", all_gradients_halved),
    "eps-ignored": Defect("adam-settings", settings(eps=1e-8)),
    "beta2-fixed": Defect("adam-bias", settings(betas=lambda betas: (betas[0], 0.999 if betas[0] else betas[1]))),
    "decay-ignored": Defect("decay-wrong", settings(weight_decay=0.0)),
    "clip-ignored": Defect("clip-ignored", clip_ignored),
    "optimizer-lost": Defect("optimizer-lost", optimizer_lost),
    "cuts-to-the-shortest": Defect("bad-request-accepted", cuts_to_the_shortest),
    "blames-itself": Defect("failure-miscategorised", blames_itself),
    "repeated-requests-run": Defect("replayed", runs_repeated_requests),
    "order-of-arrival": Defect("sequence-order", runs_in_order_of_arrival),
    "seed-ignored": Defect("sampling-settings", seed_ignored),
    "sparse-to-the-left": Defect("sparse-misread", sparse_to_the_left),
    "never-answers-ppo": Defect("no-answer", never_answers_ppo),
    "dies-of-targets": Defect("server-died", dies_of_targets),
}
"""Name → defect. The suite was written beside these; the others came later, and no check knew of them."""

DEFECTS = FIRST | LOSSES | STEPS | SERVICE | LATER
"""Name → defect: all of them."""


def main() -> None:
    """Serve with one defect."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("name", choices=sorted(DEFECTS))
    p.add_argument("--port", type=int, default=0)
    args = p.parse_args()
    DEFECTS[args.name].plant()
    serve(app.create_app(), port=args.port)


if __name__ == "__main__":
    main()
