"""Many processes, one model: ``torchrun`` starts them, and each runs the same script with the same calls.

Weights, gradients and moments are sharded by FSDP2. Every rank is given the whole batch of a request, runs the model
over its part of the datums and gets the values of all: it evaluates the loss on the whole batch, as one process does,
and goes back through its own part. Gradients are summed over ranks, in float32. So whatever a loss divides by or
couples, gradient and metrics are those of one process, on every rank.
"""

from __future__ import annotations

import atexit
import copy
import math
import os
import re
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lossfns.backend.engine.batch import Rows
from lossfns.backend.futures import RequestThread
from lossfns.backend.storage import checkpoint
from lossfns.errors import LossInputError
from lossfns.loss import BoundLoss, Loss

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


def start(device: str = "auto") -> DeviceMesh | None:
    """All processes that ``torchrun`` has started, as the ``mesh`` of clients; None in a process on its own.

    ``device`` is ``"cpu"``, ``"cuda"`` or ``"auto"``, a GPU for each process where there are any.

    >>> start() is None
    True
    """
    if "RANK" not in os.environ:
        return None
    from torch.distributed.device_mesh import init_device_mesh  # half a second, which one process need not spend

    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(gpu_of(int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))))
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return init_device_mesh(kind, (dist.get_world_size(),))


def gpu_of(local_rank: int) -> int:
    """A GPU for each process of this machine."""
    if local_rank >= torch.cuda.device_count():
        got, fix = f"{torch.cuda.device_count()} for process {local_rank + 1}", "Start fewer processes on this machine."
        raise LossInputError("device", "a GPU for each process", got, fix)
    return local_rank


@cache
def request_thread(device: torch.device) -> RequestThread:
    """Return the one thread of all clients of this process: their collectives have one order, the same on all ranks."""
    return RequestThread(initializer=partial(torch.cuda.set_device, device) if device.type == "cuda" else None)


class Alone:
    """The only process, which has all of a model; its methods are those of ``Ranks``."""

    mesh, thread, call, group, rank, size = None, None, None, None, 0, 1

    @staticmethod
    def first(function: Callable[..., T], *arguments: Any) -> T:
        return function(*arguments)

    ask = together = first

    def gather(self, word: T) -> list[T]:
        return [word]

    def everywhere(self, loss_fn: T) -> T:
        return loss_fn

    def least(self, room: float) -> float:
        return room

    def abreast(self, parts: list[slice]) -> list[slice]:
        return parts

    def most(self, lengths: Sequence[int]) -> int:
        return sum(lengths)

    def hold(self, model: nn.Module) -> None:
        self.model = model

    def whole(self, compute: Callable[[], T]) -> T:
        return compute()

    def run(self, function: Callable[[Rows], Tensor], rows: Rows) -> Tensor:
        return function(rows)

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def room(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def save(self, path: str | Path, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> Path:
        return checkpoint.save(path, tensors, data)

    def load(self, path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return checkpoint.load(path)


class Ranks:
    """One of many processes, and its share of a model."""

    def __init__(self, mesh: DeviceMesh, device: str | torch.device = "auto") -> None:
        if mesh.ndim != 1:
            fix = "start() makes one of all processes."
            raise LossInputError("mesh", "one dimension, over which the model is sharded", repr(mesh), fix)
        if device != "auto" and torch.device(device).type != mesh.device_type:
            fix = "start(device) makes a mesh of other devices."
            raise LossInputError("device", f"auto or {mesh.device_type}, which the mesh is of", repr(device), fix)
        gpu = mesh.device_type == "cuda"
        self.mesh, self.device = mesh, torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        self.group, self.rank, self.size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.thread = request_thread(self.device)
        self.ran: Any = None  # the model, once it has run in shards

    # What the ranks tell one another

    def call(self, request: Callable[..., T], *arguments: Any) -> T:
        """Run a request of a client, once it is sure that all ranks run the same."""
        self.compare(request, arguments)
        try:
            return request(*arguments)
        except BaseException:
            if self.ran is not None:
                self.ran.reset_iter_state()  # what was left half done is over for FSDP, too
            raise

    def ask(self, method: Callable[..., T], *arguments: Any) -> T:
        """Call one of these methods from elsewhere: when all requests before it are done."""
        return self.thread.submit(method, *arguments).result()

    def compare(self, request: Callable[..., Any], arguments: Sequence[Any]) -> None:
        """Refuse a request that is not the same on every rank: its gradient would be one of nothing."""
        words = self.gather(f"{title(request)} ({checksum(arguments)})")
        for rank, word in enumerate(words):
            if word != words[0]:
                got = f"{words[0]} on rank 0 and {word} on rank {rank}"
                fix = "Every rank makes the same calls with the same whole batch: seed whatever draws it."
                raise LossInputError("request", "the same on all ranks, of the same data", got, fix)

    def gather(self, word: T) -> list[T]:
        """What each rank says."""
        words: list[Any] = [None] * self.size
        dist.all_gather_object(words, word, group=self.group)
        return words

    def together(self, function: Callable[..., T], *arguments: Any) -> T:
        """The function's result, if it succeeds on every rank; if it fails on one, an error on each."""
        try:
            result = function(*arguments)
        except Exception as error:
            self.gather(f"{type(error).__name__}: {error}")
            raise
        for rank, failed in enumerate(self.gather(None)):
            if failed is not None:
                got = f"an error on rank {rank} ({failed})"
                raise LossInputError("request", "success on all ranks", got, "Mend it there.")
        return result

    def first(self, function: Callable[..., T], *arguments: Any) -> T:
        """What the function gives on rank 0, the only one that calls it."""
        box: list[Any] = [self.together(nothing if self.rank else function, *arguments)]
        dist.broadcast_object_list(box, group_src=0, group=self.group)
        result: T = box[0]
        return result

    def everywhere(self, loss_fn: Any) -> Any:
        """A loss that fails on all ranks if it does on one, as one that draws numbers may."""
        if isinstance(loss_fn, (Loss, BoundLoss)) or not callable(loss_fn):
            return loss_fn

        def agreed(data: list[Any], logprobs_list: list[Tensor]) -> Any:
            result = self.together(loss_fn, data, logprobs_list)
            losses = self.gather(value_of(result))
            if not np.allclose(losses, losses[0], rtol=1e-3, equal_nan=True):
                fix = "Seed what it draws: every rank evaluates it on the whole batch."
                raise LossInputError("loss", "the same on all ranks", " and ".join(map(str, losses)), fix)
            return result

        return agreed

    # Micro-batches

    def least(self, room: float) -> float:
        """The room that there is on every rank."""
        return min(self.gather(room))

    def abreast(self, parts: list[slice]) -> list[slice]:
        """As many micro-batches in one as there are ranks to run them."""
        groups = (parts[i : i + self.size] for i in range(0, len(parts), self.size))
        return [slice(group[0].start, group[-1].stop) for group in groups]

    def most(self, lengths: Sequence[int]) -> int:
        """The tokens of the rank that has the most."""
        bounds = shares(lengths, self.size)
        return max(sum(lengths[low:high]) for low, high in pairwise(bounds))

    # The model

    def hold(self, model: nn.Module) -> None:
        """Shard a model in place: each rank keeps its part of every parameter of rank 0."""
        for x in chain(model.parameters(), model.buffers()):
            dist.broadcast(x.detach(), group_src=0, group=self.group)
        self.model = model
        self.skeleton = replaced(model, {name: p.to("meta") for name, p in model.named_parameters()})
        self.root = sharded(model, self.mesh)
        self.weights = model.state_dict()

    def whole(self, compute: Callable[[], Tensor]) -> Tensor:
        """What is computed as long as the weights are whole; the gradient goes back to the shards."""
        self.ran = self.root
        result: Tensor = self.root(compute)
        return result

    def run(self, function: Callable[[Rows], Tensor], rows: Rows) -> Tensor:
        """The values of all datums, of which each rank computes some.

        The graph is that of this rank's alone, so the gradient of the whole goes on through its part of it.
        """
        low, high = shares(rows.lengths, self.size)[self.rank : self.rank + 2]
        counts = np.cumsum([0, *rows.counts]).tolist()
        part = slice(low, high) if low < high else slice(0, 1)  # a rank without datums computes one for nothing
        start, stop, end = counts[low], counts[high], counts[-1]
        own = self.whole(partial(function, rows.part(part)))[: stop - start]
        values = own.new_zeros(end, *own.shape[1:])
        values[start:stop] = own.detach()
        dist.all_reduce(values, group=self.group)
        return torch.cat([values[:start], own, values[stop:]])

    def copy(self) -> nn.Module:
        """The whole model as it is now, in no need of the other ranks."""
        return replaced(self.skeleton, {name: entire(p.detach()).clone() for name, p in self.model.named_parameters()})

    # Checkpoints

    def save(self, path: str | Path, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> Path:
        """A folder, of which each rank writes a part; random numbers are those of rank 0, which samples."""
        from lossfns.backend.storage import folder as folders

        random = self.first(lambda: {name: x for name, x in tensors.items() if name.startswith("random.")})
        return folders.save(path, {**tensors, **random}, data, self, tied(self.model))

    def load(self, path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and data of a checkpoint of any number of processes; parameters and moments in shards."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        from lossfns.backend.storage import folder as folders

        if Path(path).is_dir():
            return folders.load(path, self)
        tensors, data = self.together(checkpoint.load, path)
        for name, x in tensors.items():
            own = self.room(name, x.shape, x.dtype)
            if isinstance(own, DTensor):
                tensors[name] = distribute_tensor(x.to(self.device), self.mesh, own.placements, src_data_rank=None)
        return tensors, data

    def room(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An empty tensor for one of a checkpoint: sharded like the parameter that it, or its moment, is of."""
        own = self.weights.get(name.split(".", 1 if name.startswith("model.") else 2)[-1])
        if own is None or own.shape != torch.Size(shape):
            return torch.empty(tuple(shape), dtype=dtype)
        return torch.empty_like(own, dtype=dtype)


def nothing(*arguments: Any) -> Any:
    """What the other ranks do meanwhile."""


# A model in shards


class Whole(nn.Module):
    """Calls a function as long as the weights of a model are whole."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Tensor]) -> Tensor:
        return function().clone()  # FSDP hooks on to what is returned, which must be no view


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """FSDP2 of each layer and of the rest. Gradients are summed, as a loss has its denominator already."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    shard = partial(fully_shard, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    for layer in layers(model):
        shard(layer)
    root = Whole(model)
    shard(root, reshard_after_forward=True)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return root


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """The items of the outermost lists of modules, which is where transformers have their layers."""
    for module in model.children():
        yield from module if isinstance(module, nn.ModuleList) else layers(module)


def shares(lengths: Sequence[int], size: int) -> list[int]:
    """Where the datums of each rank begin, and the last ones end, such that the most tokens of a rank are the fewest.

    >>> shares([4, 1, 1, 2], 2)
    [0, 1, 4]
    """
    ends = np.cumsum([0, *lengths])

    def bounds(room: int) -> list[int]:
        starts = [0]
        for _ in range(size):
            starts.append(int(np.searchsorted(ends, ends[starts[-1]] + room, "right")) - 1)
        return starts

    room = bisect_left(range(int(ends[-1])), True, key=lambda room: bounds(room)[-1] == len(lengths))
    return bounds(room)


def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a module with these tensors for its parameters; those that are tied remain so."""
    own = model.named_parameters()
    return copy.deepcopy(model, {id(p): nn.Parameter(tensors[name], p.requires_grad) for name, p in own})


def tied(model: nn.Module) -> dict[str, str]:
    """``model.<name>`` of weights that are another's, and of those."""
    names: dict[nn.Parameter, str] = {}
    every = model.named_parameters(remove_duplicate=False)
    return {f"model.{name}": f"model.{names[p]}" for name, p in every if names.setdefault(p, name) != name}


def entire(x: Any) -> Any:
    """A tensor from the shards of all ranks; one that is no shard is itself."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def shard_of(x: Any) -> Any:
    """This rank's shard, where operations need no other; a tensor that is no shard is itself."""
    return x.to_local() if hasattr(x, "to_local") else x


# What a request is


def title(request: Any) -> str:
    return str(getattr(request, "__name__", type(request).__name__)).strip("_")


def checksum(arguments: Sequence[Any]) -> str:
    """Eight digits that are the same for the same arguments; of what cannot be read, the request has to tell."""
    try:
        return f"{zlib.crc32(repr(digest(arguments)).encode()):08x}"
    except Exception as error:
        return type(error).__name__


def digest(x: Any) -> Any:
    """What ranks can compare of an argument: the content of data, what represents anything else."""
    if isinstance(x, (list, tuple)):
        numbers = all(isinstance(item, (int, float)) for item in x)
        return digest(np.array(x)) if numbers else [digest(item) for item in x]
    if isinstance(x, Mapping):
        return {str(key): digest(x[key]) for key in x}
    if isinstance(x, BoundLoss):
        return digest(vars(x))
    if isinstance(x, Tensor):
        return digest(x.detach().cpu().double().numpy())
    if hasattr(x, "loss_fn_inputs"):
        return digest([x.model_input, x.loss_fn_inputs])
    if hasattr(x, "to_ints"):
        return digest(np.array(x.to_ints()))
    if hasattr(x, "to_numpy"):
        return digest(x.to_numpy())
    if isinstance(x, np.ndarray):
        return x.shape, zlib.crc32(np.ascontiguousarray(x).data)
    if isinstance(x, nn.Module):
        return [(name, tuple(p.shape), p.dtype) for name, p in x.named_parameters()]
    return re.sub(" at 0x[0-9a-f]+", "", repr(x))  # where it is in memory is another matter


def value_of(result: Any) -> float:
    """The loss in what a loss has returned; nan for anything else, which is refused later."""
    loss = result[0] if isinstance(result, tuple) and result else None
    return float(loss.detach()) if isinstance(loss, Tensor) and loss.numel() == 1 and loss.isreal() else math.nan
