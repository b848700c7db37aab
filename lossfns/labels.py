"""Targets and weights from labels and masks ``[B, T]``: the one place where padded batches are shifted by one.

Position j of the results belongs to token j + 1, like ``logits[:, :-1]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossfns.devices import to_device
from lossfns.errors import LossInputError, show
from lossfns.pack import as_row, as_tensor


def targets_from_labels(labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Return the ids of tokens 1 to T − 1, and 0 where a label is ignored: ``[B, T] -> [B, T − 1]``.

    Args:
        labels: ``[B, T]`` token ids, not shifted; ``ignore_index`` where a token is not trained.
        ignore_index: the label of such a token.

    Raises:
        LossInputError: if labels are no token ids ``[B, T]`` with T of at least 2.

    >>> targets_from_labels(torch.tensor([[-100, 5, 6]]))
    tensor([[5, 6]])
    """
    following = check_ids("labels", labels)[:, 1:]
    return following.masked_fill(following == check_ignore_index(ignore_index), 0)


def weights_from_labels(labels: Tensor, *, attention_mask: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """Return 1 for each trained token, else 0: float32 ``[B, T] -> [B, T − 1]``.

    Args:
        labels: ``[B, T]`` token ids, not shifted; ``ignore_index`` where a token is not trained.
        attention_mask: ``[B, T]``, 0 at padding. After padding on the left, no token predicts the first real one: the
            mask gives it weight 0, even if it has a label.
        ignore_index: the label of a token that is not trained.

    Raises:
        LossInputError: if labels are no token ids ``[B, T]`` with T of at least 2, or the mask has another shape.

    >>> weights_from_labels(torch.tensor([[-100, -100, 5, 6]]))
    tensor([[0., 1., 1.]])
    """
    trained = check_ids("labels", labels)[:, 1:] != check_ignore_index(ignore_index)
    if attention_mask is not None:
        trained = trained & (weights_from_mask(check_same_shape("attention_mask", attention_mask, labels)) != 0)
    return trained.float()


def weights_from_mask(attention_mask: Tensor, prompt_lengths: Any = None) -> Tensor:
    """Return 1 for each token that follows a token of its row, else 0: float32 ``[B, T] -> [B, T − 1]``.

    Args:
        attention_mask: ``[B, T]``, above 0 at tokens and 0 at padding, which may be on either side.
        prompt_lengths: ``[B]`` tokens of each prompt, counted from the first real token. They get weight 0.

    Raises:
        LossInputError: if the mask is not ``[B, T]`` with T of at least 2, or the lengths are not B whole numbers.

    >>> weights_from_mask(torch.tensor([[0, 1, 1, 1]]), prompt_lengths=[2])
    tensor([[0., 0., 1.]])
    """
    real = check_shiftable("attention_mask", attention_mask) > 0
    trained = real[:, :-1] & real[:, 1:]
    if prompt_lengths is not None:
        lengths = to_device(as_tensor(as_row(prompt_lengths, "prompt_lengths", None)), real.device)
        if lengths.shape != real.shape[:1] or lengths.is_floating_point() or lengths.dtype == torch.bool:
            got = f"{lengths.dtype} of shape {tuple(lengths.shape)}"
            raise LossInputError("prompt_lengths", f"{len(real)} whole numbers, one per row", got, "Count its tokens.")
        trained = trained & (real.cumsum(1)[:, 1:] > lengths[:, None])
    return trained.float()


def check_ids(name: str, x: Any) -> Tensor:
    """Refuse anything but token ids ``[B, T]`` with T of at least 2."""
    if check_shiftable(name, x).is_floating_point() or x.dtype == torch.bool:
        raise LossInputError(name, "token ids", str(x.dtype), "Pass integers.")
    return x  # type: ignore[no-any-return]


def check_ignore_index(ignore_index: Any) -> int:
    """Refuse anything but an integer."""
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise LossInputError("ignore_index", "an integer", show(ignore_index), "Labels that are ignored have it.")
    return ignore_index


def check_shiftable(name: str, x: Any) -> Tensor:
    """Refuse anything but a tensor ``[B, T]`` with T of at least 2."""
    if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] < 2:
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        fix = "Position j of the result belongs to token j + 1, so a row needs two tokens."
        raise LossInputError(name, "a tensor [B, T] of at least 2 tokens", got, fix)
    return x


def check_same_shape(name: str, x: Any, labels: Tensor) -> Tensor:
    """Refuse a tensor whose shape is not that of the labels."""
    if not isinstance(x, Tensor) or x.shape != labels.shape:
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise LossInputError(name, f"shape {tuple(labels.shape)}, that of labels", got, "Pass both unshifted.")
    if x.device != labels.device:
        raise LossInputError(name, f"a tensor on {labels.device}, like labels", str(x.device), "Move it with .to().")
    return x
