"""Copies between the host and a device, with as few waits as possible.

The host runs ahead of a GPU. It waits when it reads a number, and when it copies to the GPU in the usual way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(x: Tensor | np.ndarray[Any, Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return an array or a tensor on a device. A copy from the host does not wait for the work of the device.

    >>> to_device(np.array([1, 2]), torch.device("cpu"), torch.float32)
    tensor([1., 2.])
    """
    tensor = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
    # CUDA has read ordinary memory when the copy returns. A copy to the host, or to Apple's GPU, has to be waited for.
    return tensor.to(device, dtype, non_blocking=tensor.device.type == "cpu" and device.type != "mps")


def copy_to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors on the host, without their graphs. Those of one device are copied bit for bit in one transfer.

    >>> copy_to_host([torch.tensor([1.5, 2.5]), torch.tensor(3)])
    [tensor([1.5000, 2.5000]), tensor(3)]
    """
    away = [x.detach() for x in tensors if x.device.type != "cpu"]
    if not away:
        return [x.detach() for x in tensors]
    copied = torch.cat([x.reshape(-1).view(torch.uint8) for x in away]).cpu()
    parts = iter(torch.split(copied, [x.nbytes for x in away]))
    # The clone begins at an address that fits the dtype.
    return [x.detach() if x.device.type == "cpu" else next(parts).clone().view(x.dtype).view(x.shape) for x in tensors]
