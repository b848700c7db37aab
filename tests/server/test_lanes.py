"""One loss by three ways through the SDK and the server: the same gradient of the parameters.

The ways are a custom loss over the batch, a loss of one datum that the server rebuilds and runs, and a built-in.
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from batches import CASES, LOGPROBS, Batch, Case
from serving import tinker

import lossfns
from lossfns import LossInputError, export
from lossfns.backend import Decoder
from lossfns.server import local_service
from lossfns.server.service import Service
from lossfns.testing.public import presets

pytestmark = pytest.mark.filterwarnings("ignore:.*log-ratio.*")
types = tinker.types
SINGLE = [case for case in CASES if not case.pairs and not case.loss.couples_groups and case.loss.output == "logprobs"]
NO_CAP: dict[str, Any] = {"log_ratio_cap": None}
FOLDABLE = [
    lossfns.cross_entropy(weigh=lossfns.sequence_mean),
    lossfns.importance_sampling(**NO_CAP),
    lossfns.ppo(**NO_CAP, weigh=lossfns.fixed_length(5)),
    lossfns.dapo(**NO_CAP),
    lossfns.grpo(**NO_CAP, kl_beta=0, weigh=lossfns.sequence_mean),
    lossfns.gspo_token(**NO_CAP, clip=(0.7, 1.5)),
    lossfns.cispo(**NO_CAP, clip=(0.8, 1.28), weigh=lossfns.sequence_mean),
    lossfns.with_tis(lossfns.ppo(**NO_CAP), cap=1.3),
    lossfns.with_tis(lossfns.gspo_token(**NO_CAP, clip=(0.7, 1.5)), cap=1.3, level=lossfns.sequence_level),
]


def tiny() -> Decoder:
    torch.manual_seed(0)
    return Decoder(vocab_size=32, dim=16, layers=1, heads=2, kv_heads=1, hidden=16)


class Lanes:
    """A model on a server in this process, whose gradients are read off its parameters."""

    def __init__(self, service: Service, client: Any) -> None:
        self.client, self.model = client, service.models[client.model_id].client.model

    def data(self, batch: Batch, rng: Random) -> list[Any]:
        """Datums of random tokens in the shapes of a batch."""
        data = []
        for row in batch.weights:
            shape = [len(row) // batch.targets, batch.targets] if batch.targets else [len(row)]
            targets = types.TensorData(data=[rng.randrange(32) for _ in row], dtype="int64", shape=shape)
            tokens = types.ModelInput.from_ints([rng.randrange(32) for _ in range(shape[0])])
            ones = types.TensorData(data=[1.0] * len(row), dtype="float32", shape=shape)
            fields = {"target_tokens": targets, "weights": ones}
            data.append(types.Datum(model_input=tokens, loss_fn_inputs=fields))
        return data

    def near(self, batch: Batch, data: list[Any]) -> Batch:
        """The batch with the model's logprobs, and with columns as far from them as they were."""
        outputs = self.client.forward(data, "cross_entropy").result().loss_fn_outputs
        rows = [output["logprobs"].to_torch().flatten().tolist() for output in outputs]

        def moved(column: list[list[float]]) -> list[list[float]]:
            triples = zip(column, batch.logprobs, rows)
            return [[min(x + c - a, -1e-4) for c, a, x in zip(*triple)] for triple in triples]

        names = [name for name in (*LOGPROBS, "teacher_logprobs") if name in batch.columns]
        return Batch(rows, batch.weights, batch.columns | {n: moved(batch.columns[n]) for n in names}, batch.targets)

    def gradient(self, future: Any) -> tuple[torch.Tensor, dict[str, float]]:
        """The gradient of the parameters after a request, and its metrics; then a step of length 0 clears it."""
        metrics = future.result().metrics
        gradient = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None]).clone()
        self.client.optim_step(types.AdamParams(learning_rate=0.0)).result()
        return gradient, metrics


def all_losses() -> list[lossfns.Loss]:
    """Every loss of single datums with its defaults, every combination, and the losses that can be folded."""
    kept = [case for case in SINGLE if case.loss.name not in presets() or case.default]
    losses = {str(case): case.loss for case in kept if not case.loss.gradient_columns}
    return [*losses.values(), *(loss for loss in FOLDABLE if str(loss) not in losses)]


def test_three_lanes_through_the_sdk_have_one_gradient() -> None:
    service = Service({"tiny": tiny}, device="cpu")
    folded = uploaded = 0
    with local_service(service) as sdk:
        lanes = Lanes(service, sdk.create_lora_training_client("tiny", rank=4, seed=1).result())
        client = lanes.client
        for loss in all_losses():
            rng = Random(1)
            batch = Case(loss, lambda: (0.0, [])).batch(rng)
            if "gspo_token" in repr(loss):  # its built-in takes a mask
                batch.weights = [[float(w != 0) for w in row] for row in batch.weights]
            data = lanes.data(batch, rng)
            bound = loss.bind(**lanes.near(batch, data).bound(loss.reads))
            expected, metrics = lanes.gradient(client.forward_backward_custom(data, bound))
            found = {}

            fn = export.as_datum_fn(loss)
            ready = export.with_denominators(bound, data)
            ranks = dict.fromkeys(fn.__code__.co_varnames, 2 if batch.targets else 1)
            try:
                handle = sdk.create_custom_loss(fn, ranks).result()
            except ValueError as error:  # the SDK creates each traced loss once in a session
                assert "already created" in str(error), loss
            else:
                assert handle.loss_id is not None
                found["per datum"], own = lanes.gradient(client.forward_backward_custom(ready, handle))
                assert own["loss:sum"] == pytest.approx(metrics["loss:sum"], rel=1e-5, abs=1e-6), loss
                assert own["passes:max"] == 1.0, loss
                uploaded += 1
            try:
                arguments = export.fold(bound, data)
            except LossInputError:
                pass
            else:
                found["built-in"], _ = lanes.gradient(client.forward_backward(*arguments))
                folded += 1
            for lane, gradient in found.items():
                difference = ((gradient - expected).norm() / expected.norm()).item()
                assert difference < 1e-6, (loss, lane, difference)
    assert uploaded > 60 and folded >= len(FOLDABLE), (uploaded, folded)
