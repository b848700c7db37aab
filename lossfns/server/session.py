"""Sessions, and the losses that were uploaded in them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from lossfns.loss import LossFn


class UploadedLoss(NamedTuple):
    """A loss that a client has uploaded.

    Attributes:
        loss: the loss of a batch.
        ranks: the dimensions of each input by name.
        request: the body of ``create_custom_loss``, from which a restarted server rebuilds the loss.
    """

    loss: LossFn
    ranks: dict[str, int]
    request: dict[str, Any]


class Session:
    """A client's session: its models, samplers and uploaded losses live as long as it does."""

    def __init__(self, session_id: str, user_metadata: Mapping[str, str] | None = None) -> None:
        self.session_id, self.user_metadata = session_id, dict(user_metadata or {})
        self.losses: dict[str, UploadedLoss] = {}
        self.last_seen = time.monotonic()
        self.finished = False


def session_of(name: str) -> str:
    """Return the session in the id of a model, a sampler or a request."""
    return name.partition(":")[0]
