"""Logprobs from hidden states and the unembedding, as other libraries compute them.

Each rival is a function ``(hidden [N, D], weight [V, D], targets [N]) -> logprobs [N]``, in its default precision. If
it needs a package, there is a function that imports the package and returns the rival.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(1).gather(1, targets[:, None]).squeeze(1)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")


def torch_linear_cross_entropy(**options: Any) -> Callable[[], Logprobs]:
    """PyTorch's own. Without options it is ``cross_entropy`` on logits in the dtype of the inputs."""

    def make() -> Logprobs:
        chosen = torch.nn.LinearCrossEntropyOptions(**options) if options else None
        return lambda h, w, y: -F.linear_cross_entropy(h, w, y, reduction="none", options=chosen)

    return make


def cut_cross_entropy(**options: Any) -> Callable[[], Logprobs]:
    def make() -> Logprobs:
        from cut_cross_entropy import linear_cross_entropy

        return lambda h, w, y: -linear_cross_entropy(h, w, y, reduction="none", **options)

    return make


def liger_chunked() -> Logprobs:
    """The function with which Liger's GRPO loss computes logprobs."""
    from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction as function

    return lambda h, w, y: function.apply(h, w, y, None, 1.0, 4096)


def liger_scaled(entropy: bool = False) -> Any:
    """On an H100 a handwritten kernel; elsewhere a copy of verl's function, in chunks of 512 tokens."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as function

    if entropy:
        return lambda h, w, y: function.apply(h, w, y, return_entropy=True)
    return lambda h, w, y: -function.apply(h, w, y)


def liger_triton() -> Logprobs:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as function

    return lambda h, w, y: -function.apply(h, w, y, None, None, -100, 0.0, 0.0, "none")[0]


def trl_chunked(outputs: tuple[str, ...] = ()) -> Any:
    """TRL's function, with the tile size of its trainer."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as columns

    def logprobs(h: Tensor, w: Tensor, y: Tensor) -> Any:
        found = ChunkedLogProbFunction.apply(h, w, None, y, 1.0, columns, None, 1.0, outputs)
        return found[:2] if outputs else found[0]

    return logprobs


RIVALS: dict[str, tuple[str, Callable[[], Logprobs]]] = {
    "naive": ("torch", lambda: naive),
    "cross_entropy": ("torch", lambda: cross_entropy),
    "torch LCE": ("torch", torch_linear_cross_entropy()),
    "torch LCE, chunked": ("torch", torch_linear_cross_entropy(acc_policy="auto")),
    "torch LCE, 512 rows": (
        "torch",
        torch_linear_cross_entropy(acc_policy="compact", chunking_method=None, batch_chunk_size=512),
    ),
    "CCE torch_compile": ("cut-cross-entropy", cut_cross_entropy(impl="torch_compile")),
    "Liger chunked": ("liger-kernel", liger_chunked),
    "Liger scaled": ("liger-kernel", liger_scaled),
    "TRL chunked": ("trl", trl_chunked),
}
"""For each name, the package and a function that returns the rival.

``torch LCE`` is ``torch.nn.functional.linear_cross_entropy``.
"""

KERNELS: dict[str, tuple[str, Callable[[], Logprobs]]] = {
    "Liger Triton": ("liger-kernel", liger_triton),
    "CCE kernel": ("cut-cross-entropy", cut_cross_entropy(impl="cce")),
    "CCE kernel, exact": ("cut-cross-entropy", cut_cross_entropy(impl="cce", filter_eps=None)),
}
"""The rivals that need a GPU."""

PACKAGES = ("torch", "triton", "liger-kernel", "trl", "cut-cross-entropy", "transformers", "lossfns")


def installed(table: dict[str, tuple[str, Callable[[], Any]]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the functions of a table whose packages are installed, and for each other one the reason."""
    functions, missing = {}, {}
    for name, (package, make) in table.items():
        try:
            functions[name] = make()
        except (ImportError, AttributeError, RuntimeError) as error:
            missing[name] = f"{package} not installed" if version(package) is None else f"{package}: {error}"
    return functions, missing


@cache
def rivals() -> tuple[dict[str, Logprobs], dict[str, str]]:
    functions, missing = installed(RIVALS)
    if not torch.cuda.is_available():
        return functions, missing | dict.fromkeys(KERNELS, "needs a GPU")
    kernels, absent = installed(KERNELS)
    return functions | kernels, missing | absent


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    return {package: version(package) for package in PACKAGES}
