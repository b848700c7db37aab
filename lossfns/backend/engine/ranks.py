"""Data parallelism: ``torchrun`` starts many processes, and each runs the same script with the same calls.

FSDP2 shards weights, gradients and moments. Every rank is given the whole batch of a request, runs the model over its
part of the datums, and receives the outputs of all. It evaluates the loss on the whole batch, as one process does, and
goes back through its own part. Gradients are summed over ranks, in float32. So whatever a loss divides by or couples,
gradient and metrics are those of one process, on every rank.
"""

from __future__ import annotations

import atexit
import copy
import math
import os
import re
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lossfns.backend.engine.batch import ModelInputs
from lossfns.backend.engine.names import OPTIMIZER, public_names
from lossfns.backend.futures import RequestThread
from lossfns.errors import LossInputError
from lossfns.loss import BoundLoss

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


def start(device: str = "auto") -> DeviceMesh | None:
    """Return the ``mesh`` for clients, of all processes that ``torchrun`` has started; None for a single process.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``, which takes a GPU for each process where there are any.

    Raises:
        LossInputError: if this machine has fewer GPUs than processes.

    >>> start() is None
    True
    """
    if "RANK" not in os.environ:
        return None
    from torch.distributed.device_mesh import init_device_mesh  # takes half a second, so not without torchrun

    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(gpu_of(int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))))
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return init_device_mesh(kind, (dist.get_world_size(),))


def gpu_of(local_rank: int) -> int:
    """Return the index of this process's GPU; refuse to share one."""
    if local_rank >= torch.cuda.device_count():
        got, fix = f"{torch.cuda.device_count()} for process {local_rank + 1}", "Start fewer processes on this machine."
        raise LossInputError("device", "a GPU for each process", got, fix)
    return local_rank


@cache
def request_thread(device: torch.device) -> RequestThread:
    """Return the thread that runs the requests of all clients, so that collectives have the same order on all ranks."""
    return RequestThread(initializer=partial(torch.cuda.set_device, device) if device.type == "cuda" else None)


class SingleProcess:
    """A single process that holds the whole model. It has the methods of ``Ranks``."""

    mesh, thread, call, group = None, None, None, None
    rank, size = 0, 1

    @staticmethod
    def on_rank_zero(function: Callable[..., T], *arguments: Any) -> T:
        return function(*arguments)

    when_idle = all_or_none = on_rank_zero

    def gather(self, value: T) -> list[T]:
        return [value]

    def agreeing(self, loss_fn: T) -> T:
        return loss_fn

    def min(self, number: float) -> float:
        return number

    def one_per_rank(self, micro_batches: list[slice]) -> list[slice]:
        return micro_batches

    def max_tokens(self, lengths: Sequence[int]) -> int:
        return sum(lengths)

    def shard(self, model: nn.Module) -> None:
        self.model = model

    def with_full_weights(self, compute: Callable[[], T]) -> T:
        return compute()

    def run(self, compute: Callable[..., Tensor], inputs: ModelInputs, *arguments: Any, **options: Any) -> Tensor:
        return compute(inputs, *arguments, **options)

    def copy_model(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def empty_for(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def distribute(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return tensors


class Ranks:
    """One of many processes, and its shards of a model.

    Args:
        mesh: the processes, from ``start``.
        device: ``"auto"``, or the kind of device of the mesh.
    """

    def __init__(self, mesh: DeviceMesh, device: str | torch.device = "auto") -> None:
        if getattr(mesh, "ndim", None) != 1:
            fix = "start() makes one of all processes."
            raise LossInputError("mesh", "one dimension, over which the model is sharded", repr(mesh), fix)
        if device != "auto" and torch.device(device).type != mesh.device_type:
            fix = "start(device) makes a mesh of other devices."
            raise LossInputError("device", f"auto or {mesh.device_type}, the device of the mesh", repr(device), fix)
        gpu = mesh.device_type == "cuda"
        self.mesh, self.device = mesh, torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        self.group, self.rank, self.size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.thread = request_thread(self.device)
        self.started_root: Any = None  # ``root``, once it has run

    # Agreement

    def call(self, request: Callable[..., T], *arguments: Any) -> T:
        """Run a request of a client, after a check that all ranks run the same request."""
        self.check_same(request, arguments)
        try:
            return request(*arguments)
        except BaseException:
            if self.started_root is not None:
                gradients = [p.grad for p in self.parameters]
                self.started_root.reset_iter_state()  # FSDP discards its state of the failed pass
                for p, gradient in zip(self.parameters, gradients):
                    p.grad = gradient  # PyTorch 2.15 discards the gradients of earlier requests as well
            raise

    def when_idle(self, method: Callable[..., T], *arguments: Any) -> T:
        """Call a method of this object from another thread: the method runs when all earlier requests are done."""
        return self.thread.submit(method, *arguments).result()

    def check_same(self, request: Callable[..., Any], arguments: Sequence[Any]) -> None:
        """Refuse a request that is not the same on every rank: its gradient would mix several batches."""
        summaries = self.gather(f"{request_name(request)} ({checksum(arguments)})")
        for rank, summary in enumerate(summaries):
            if summary != summaries[0]:
                got = f"{summaries[0]} on rank 0 and {summary} on rank {rank}"
                fix = "Every rank makes the same calls with the same whole batch: seed whatever draws it."
                raise LossInputError("request", "the same on all ranks, of the same data", got, fix)

    def gather(self, value: T) -> list[T]:
        """Return the values that the ranks pass, in the order of the ranks."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def all_or_none(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return the function's result if it succeeds on every rank; raise an error on each if it fails on one."""
        try:
            result = function(*arguments)
        except Exception as error:
            self.gather(f"{type(error).__name__}: {error}")
            raise
        for rank, failure in enumerate(self.gather(None)):
            if failure is not None:
                got = f"an error on rank {rank} ({failure})"
                raise LossInputError("request", "success on all ranks", got, "Fix it on that rank.")
        return result

    def on_rank_zero(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call the function on rank 0 only, and return its result on every rank."""
        results: list[Any] = [self.all_or_none(do_nothing if self.rank else function, *arguments)]
        dist.broadcast_object_list(results, group_src=0, group=self.group)
        result: T = results[0]
        return result

    def agreeing(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        """Make a callable loss fail on all ranks if it fails on one, or if its values differ between ranks."""

        def agreed(data: list[Any], logprobs_list: list[Tensor]) -> Any:
            result = self.all_or_none(loss_fn, data, logprobs_list)
            losses = self.gather(loss_or_nan(result))
            if not np.allclose(losses, losses[0], rtol=1e-3, equal_nan=True):
                fix = "Seed what it draws: every rank evaluates it on the whole batch."
                raise LossInputError("loss", "the same on all ranks", " and ".join(map(str, losses)), fix)
            return result

        return agreed

    # Micro-batches

    def min(self, number: float) -> float:
        """Return the smallest of the ranks' numbers."""
        return min(self.gather(number))

    def one_per_rank(self, micro_batches: list[slice]) -> list[slice]:
        """Merge adjacent micro-batches, one for each rank, into one that all ranks compute together."""
        groups = (micro_batches[i : i + self.size] for i in range(0, len(micro_batches), self.size))
        return [slice(group[0].start, group[-1].stop) for group in groups]

    def max_tokens(self, lengths: Sequence[int]) -> int:
        """Return the tokens of the rank that has the most of these datums' tokens."""
        bounds = rank_bounds(lengths, self.size)
        return max(sum(lengths[low:high]) for low, high in pairwise(bounds))

    # The model

    def shard(self, model: nn.Module) -> None:
        """Shard a model in place: each rank keeps its part of every parameter of rank 0."""
        for x in chain(model.parameters(), model.buffers()):
            dist.broadcast(x.detach(), group_src=0, group=self.group)
        self.model = model
        self.skeleton = copied_with(model, {name: p.to("meta") for name, p in model.named_parameters()})
        self.root = fully_sharded(model, self.mesh)
        self.parameters = list(model.parameters())
        public = public_names(model)
        self.weights = {public[name]: x for name, x in model.state_dict().items()}

    def with_full_weights(self, compute: Callable[[], Tensor]) -> Tensor:
        """Call a function while the weights are gathered. The gradient of its result goes back to the shards."""
        self.started_root = self.root
        result: Tensor = self.root(compute)
        return result

    def run(self, compute: Callable[..., Tensor], inputs: ModelInputs, *arguments: Any, **options: Any) -> Tensor:
        """Return ``compute(inputs, *arguments)``, the outputs of all datums; each rank computes a part of them.

        The outputs are on the device of the ranks, which sums them, whatever ``result_device`` is in the options.
        Outputs of other ranks are constants here. Each rank backpropagates through its own outputs.
        """
        low, high = rank_bounds(inputs.lengths, self.size)[self.rank : self.rank + 2]
        ends = np.cumsum([0, *inputs.output_lengths]).tolist()
        # A rank without datums computes one, and drops its outputs.
        part = slice(low, high) if low < high else slice(0, 1)
        start, stop, end = ends[low], ends[high], ends[-1]
        outputs = self.with_full_weights(partial(compute, inputs.part(part), *arguments))[: stop - start]
        values = outputs.new_zeros(end, *outputs.shape[1:])
        values[start:stop] = outputs.detach()
        dist.all_reduce(values, group=self.group)
        return torch.cat([values[:start], outputs, values[stop:]])

    def copy_model(self) -> nn.Module:
        """Return a copy of the whole model as it is now, which needs no other rank."""
        weights = {name: full_tensor(p.detach()).clone() for name, p in self.model.named_parameters()}
        return copied_with(self.skeleton, weights)

    # Tensors of a checkpoint

    def empty_for(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an empty tensor to load ``name`` into, sharded like its parameter."""
        parameter = self.weights.get(name.split("/", 2)[-1] if name.startswith(OPTIMIZER) else name)
        if parameter is None or parameter.shape != torch.Size(shape):
            return torch.empty(tuple(shape), dtype=dtype)
        return torch.empty_like(parameter, dtype=dtype)

    def distribute(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Shard whole tensors like their parameters."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        sharded = dict(tensors)
        for name, x in tensors.items():
            like = self.empty_for(name, x.shape, x.dtype)
            if isinstance(like, DTensor) and not isinstance(x, DTensor):
                sharded[name] = distribute_tensor(x.to(self.device), self.mesh, like.placements, src_data_rank=None)
        return sharded


def do_nothing(*arguments: Any) -> Any:
    """Take the place of the function on the other ranks in ``on_rank_zero``."""


# A model in shards


class WithFullWeights(nn.Module):
    """Calls a function while the weights of a model are gathered."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Tensor]) -> Tensor:
        return function().clone()  # FSDP puts hooks on the result, which must not be a view


def fully_sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Apply FSDP2 to each layer and to the rest. Gradients are summed, because a loss already has its denominator."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    shard = partial(fully_shard, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    for layer in transformer_layers(model):
        shard(layer)
    root = WithFullWeights(model)
    shard(root, reshard_after_forward=True)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return root


def transformer_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the items of the outermost lists of modules, which is where transformers have their layers."""
    for module in model.children():
        yield from module if isinstance(module, nn.ModuleList) else transformer_layers(module)


def rank_bounds(lengths: Sequence[int], size: int) -> list[int]:
    """Split the datums over ranks in order, so that the largest count of tokens on a rank is as small as possible.

    Datums ``bounds[r]`` to ``bounds[r + 1]`` are those of rank r.

    >>> rank_bounds([4, 1, 1, 2], 2)
    [0, 1, 4]
    """
    ends = np.cumsum([0, *lengths])

    def bounds(max_tokens: int) -> list[int]:
        starts = [0]
        for _ in range(size):
            starts.append(int(np.searchsorted(ends, ends[starts[-1]] + max_tokens, "right")) - 1)
        return starts

    max_tokens = bisect_left(range(int(ends[-1])), True, key=lambda n: bounds(n)[-1] == len(lengths))
    return bounds(max_tokens)


def copied_with(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a module with these tensors for its parameters. Tied parameters remain tied."""
    parameters = model.named_parameters()
    # deepcopy takes the copies that its memo already has, by the ids of their originals.
    return copy.deepcopy(model, {id(p): nn.Parameter(tensors[name], p.requires_grad) for name, p in parameters})


def full_tensor(x: Any) -> Any:
    """Gather a sharded tensor from all ranks; return any other tensor as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def local_shards(tensors: Iterable[Any]) -> list[Any]:
    """Return this rank's shard of each sharded tensor, for elementwise operations; any other tensor as it is."""
    return [x.to_local() if hasattr(x, "to_local") else x for x in tensors]


# Comparing requests


def request_name(request: Any) -> str:
    """Return the name of a request's function, for errors."""
    return str(getattr(request, "__name__", type(request).__name__)).strip("_")


def checksum(arguments: Sequence[Any]) -> str:
    """Return the CRC32 of the arguments; the exception's name where they cannot be read.

    The request itself reports what is wrong with them.
    """
    try:
        return f"{zlib.crc32(repr(comparable(arguments)).encode()):08x}"
    except Exception as error:
        return type(error).__name__


def comparable(x: Any) -> Any:
    """Return what ranks compare of an argument: the content of data, the ``repr`` of anything else."""
    if isinstance(x, (list, tuple)):
        numbers = all(isinstance(item, (int, float)) for item in x)
        return comparable(np.array(x)) if numbers else [comparable(item) for item in x]
    if isinstance(x, Mapping):
        return {str(key): comparable(x[key]) for key in x}
    if isinstance(x, BoundLoss):
        return comparable(vars(x))
    if isinstance(x, Tensor):
        return comparable(x.detach().cpu().double().numpy())
    if hasattr(x, "loss_fn_inputs"):
        return comparable([x.model_input, x.loss_fn_inputs])
    if hasattr(x, "to_ints"):
        return comparable(np.array(x.to_ints()))
    if hasattr(x, "to_numpy"):
        return comparable(x.to_numpy())
    if isinstance(x, np.ndarray):
        return x.shape, zlib.crc32(np.ascontiguousarray(x).data)
    if isinstance(x, nn.Module):
        return [(name, tuple(p.shape), p.dtype) for name, p in x.named_parameters()]
    return re.sub(" at 0x[0-9a-f]+", "", repr(x))  # addresses differ between processes


def loss_or_nan(result: Any) -> float:
    """Return the number in a callable's result; nan where there is none, which is refused later."""
    loss = result[0] if isinstance(result, tuple) and result else None
    return float(loss.detach()) if isinstance(loss, Tensor) and loss.numel() == 1 and loss.isreal() else math.nan
