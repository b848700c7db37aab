"""The checkpoints of a run, in its folder or on its server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lossfns.backend.client.training import LocalTrainingClient
from lossfns.backend.storage import checkpoint
from lossfns.errors import LossInputError
from lossfns.train import remote
from lossfns.train.options import Options
from lossfns.train.remote import REFERENCE, Client, RemoteTrainingClient
from lossfns.train.run import CHECKPOINTS, OLD_CHECKPOINT, REFERENCES, Run, State, replaced


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first.

    There are two if a run was killed just after it was resumed with another number of processes. A run on a server has
    a file that names the checkpoint there.
    """
    if (folder / remote.CHECKPOINT).is_file():
        return [folder / remote.CHECKPOINT]
    paths = [folder / name for name in (*CHECKPOINTS, OLD_CHECKPOINT) if checkpoint.exists(folder / name)]
    return sorted(paths, key=lambda path: checkpoint.metadata(path).get("steps", 0), reverse=True)


def save_checkpoint(client: Client, folder: Path, state: State) -> None:
    """Save the weights, the optimizer and the state of the run, and remove the checkpoint of the other form."""
    metadata = {"run": json.dumps(state._asdict())}
    if isinstance(client, RemoteTrainingClient):
        return save_to(client, folder, remote.CHECKPOINT, metadata)
    name, other = CHECKPOINTS if client.ranks.size == 1 else CHECKPOINTS[::-1]
    save_to(client, folder, name, metadata)
    for old in (other, OLD_CHECKPOINT):
        client.ranks.when_idle(client.ranks.on_rank_zero, checkpoint.remove, folder / old)


def load_newest(client: Client, folder: Path) -> State:
    """Load the newest checkpoint into the client and return the state of the run; an empty state if there is none."""
    if not checkpoints(folder):
        return State({}, [], {})
    path = checkpoints(folder)[0]
    client.load_state_with_optimizer(path).result()
    try:
        data = checkpoint.metadata(path) if isinstance(client, LocalTrainingClient) else remote.read_pointer(path)
        return State(**json.loads(data["user_metadata"]["run"]))
    except (KeyError, TypeError, ValueError):
        got = f"{path}, which was saved by something else"
        raise LossInputError("--resume", "a checkpoint of the run", got, "Put the run's own back.") from None


def reference_policy(run: Run, client: Client, options: Options) -> Client:
    """Return the policy that the method starts from: the model with its new adapters off, or else a frozen copy."""
    if isinstance(client, LocalTrainingClient) and options.lora and not options.init and not options.warmup_steps:
        return client.reference()  # type: ignore[return-value]  # only its forward is called
    return frozen_copy(run, client)


def frozen_copy(run: Run, client: Client) -> Client:
    """Return a reference policy: a client with the weights that ``client`` had at the run's first call."""
    if isinstance(client, RemoteTrainingClient):
        run.once("reference", lambda: save_to(client, run.folder, REFERENCE))
        return client.from_state(run.folder / REFERENCE)
    ranks, device = client.ranks, next(client.model.parameters()).device
    model = ranks.when_idle(ranks.copy_model)
    reference = LocalTrainingClient(model, tokenizer=client.get_tokenizer(), device=device, mesh=ranks.mesh)

    def save() -> str:
        name = REFERENCES[0] if ranks.size == 1 else REFERENCES[1]
        save_to(reference, run.folder, name)
        return name

    reference.load_state(run.folder / run.once("reference", save)).result()
    return reference


def save_to(client: Client, folder: Path, name: str, metadata: Mapping[str, str] | None = None) -> None:
    """Save the client's state under a name in the run folder. One process writes a file, several write a folder.

    Raises:
        OSError: if it cannot be written. The client's error advises another name, which a run cannot choose.
    """
    try:
        if isinstance(client, LocalTrainingClient) and client.ranks.size > 1:
            client.save_state(folder / name, overwrite=True, user_metadata=metadata).result()
            return
        with replaced(folder, name) as path:
            client.save_state(path, user_metadata=metadata).result()
    except LossInputError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise
