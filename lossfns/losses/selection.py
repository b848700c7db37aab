"""Selection of the tokens of a group by a number: the largest ones, or the smallest up to a mean. No sort is needed.

A selection is the set of tokens on one side of a number, which a search finds bit by bit. It has no gradient. For
``torch.compile`` each selection is one operation, since its search would be dozens of kernels.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from lossfns.segments import active_counts, by_sequence, group_index, group_labels, sequence_sum, slot_sum, to_tokens
from lossfns.tokens import Tokens

LOWEST, LARGEST_INT32 = -(2**31), 2**31 - 1
MINUS_INFINITY = -2139095041
"""The key of −∞; lower keys are those of no number."""


def largest_share(t: Tokens, x: Tensor, among: Tensor, share: float) -> Tensor:
    """Select max(1, ⌊share·n⌋) tokens of each group, those of the largest x: ``[N]`` bool, True at the selected ones.

    n is the number of active tokens of the group; only the tokens of ``among`` compete. x is compared in float32. If
    the selection ends between tokens of equal x, none of these is selected.
    """
    slot = group_index(group_labels(t))
    count = (share * slot_sum(slot, active_counts(t)).double()).floor().clamp(min=1)
    selected: Tensor = select_largest(torch.where(among, x.float(), torch.nan), slot, count, t.lengths, t.equal)
    return selected


def smallest_with_mean(t: Tokens, x: Tensor, bound: float) -> Tensor:
    """Drop tokens of the largest x from each group until the mean x of the rest is at most the bound: ``[N]`` bool.

    It is True at the active tokens that are kept. x is at least 0, in float32, and 0 at inactive tokens. Tokens of
    equal x are dropped together.
    """
    slot = group_index(group_labels(t))
    kept: Tensor = keep_smallest(x.float(), t.active, slot, bound, t.lengths, t.equal)
    return kept


# The operations


def select_largest_of(x: Tensor, slot: Tensor, count: Tensor, lengths: Optional[Tensor], equal: bool) -> Tensor:  # noqa: UP045
    """True at the ``count`` tokens of the largest x in each group: ``[N]``. ``slot`` and ``count`` are ``[B]``."""
    t, room = Tokens(x, x, lengths, equal=equal), torch.empty_like(x)

    def are_more(key: Tensor) -> Tensor:
        return slot_sum(slot, sequence_sum(t, at_least(t, x, number_of(key), room)).double()) > count

    lowest = torch.full_like(slot, LOWEST, dtype=torch.int32)
    return at_least(t, x, number_of(largest_key(lowest, 32, are_more) + 1), room).bool()


def keep_smallest_of(
    x: Tensor,
    active: Tensor,
    slot: Tensor,
    bound: float,
    lengths: Tensor | None,
    equal: bool,
) -> Tensor:
    """True at the active tokens of the smallest x in each group whose mean is at most the bound: ``[N]``."""
    t = Tokens(x, x, lengths, equal=equal, active=active)
    distance = x.double().sub_(bound)
    # Tokens up to the bound are all kept. What they are below it pays for the excess of others, the smallest first.
    excess, saved = distance.clamp(min=0), distance.clamp_(max=0).mul_(active)
    credit = -slot_sum(slot, sequence_sum(t, saved))
    farthest = 2 * credit + bound  # no excess beyond the credit is paid, and sums stay exact if the search ends here
    room, wide_room = torch.empty_like(x), torch.empty_like(excess)

    def is_paid(key: Tensor) -> Tensor:
        """Whether the excess of the tokens below the number of the key is at most the credit."""
        number = key.view(torch.float32)
        largest = (number.double() - bound).clamp(min=0)
        limited = sequence_sum(t, with_value(t, torch.minimum, excess, largest, wide_room))
        below = limited - largest * sequence_sum(t, at_least(t, x, number, room))
        return (largest <= farthest) & (slot_sum(slot, below) <= credit)

    # The number is between the bound and n times the bound, so that its key is less than 2²⁸ above that of the bound.
    # From 2⁹⁶ it reaches the largest number of float32, and the number above 0 has key 1.
    lowest = torch.full_like(slot, max(1, bits_of(min(bound, 2.0**96))), dtype=torch.int32)
    number = largest_key(lowest, 28, is_paid).view(torch.float32)
    return active & ~at_least(t, x, number, room).bool()


def as_operation(name: str, function: Callable[..., Tensor]) -> Any:
    """Return the function as one operation of torch, for compilers and for ``torch.func.vmap``."""
    operation = torch.library.custom_op(f"lossfns::{name}", mutates_args=())(function)

    def shape_of_result(x: Tensor, *others: Any) -> Tensor:
        return torch.empty_like(x, dtype=torch.bool)

    def by_entry(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        entries = [
            operation(*(x if d is None else x.select(d, i) for x, d in zip(args, in_dims)))
            for i in range(info.batch_size)
        ]
        return torch.stack(entries), 0

    operation.register_fake(shape_of_result)
    operation.register_vmap(by_entry)
    return operation


select_largest = as_operation("select_largest", select_largest_of)
keep_smallest = as_operation("keep_smallest", keep_smallest_of)


# The search


def largest_key(lowest: Tensor, bits: int, holds: Callable[[Tensor], Tensor]) -> Tensor:
    """The largest key from ``lowest`` to ``lowest + 2**bits - 1`` for which ``holds(key)`` is True: ``[B]``, int32.

    It is True up to some key, and False beyond. The search adds one bit to the key after the other, from the highest to
    the lowest: it is faster than to sort all tokens, and no shape depends on a value.
    """
    key = lowest
    for place in reversed(range(bits)):
        higher = key - -(1 << place)  # 2³¹ is no int32, but −2³¹ is one
        key = torch.where(holds(higher), higher, key)
    return key


def number_of(key: Tensor) -> Tensor:
    """The float32 number of an int32 key. Keys are in the order of their numbers, and those from 0 are their bits."""
    key = key.clamp(min=MINUS_INFINITY)
    return (key ^ ((key >> 31) & LARGEST_INT32)).view(torch.float32)


def bits_of(x: float) -> int:
    """The bits of a number in float32, which is its key if it is at least 0."""
    bits: int = struct.unpack("i", struct.pack("f", x))[0]
    return bits


def at_least(t: Tokens, x: Tensor, y: Tensor, room: Tensor) -> Tensor:
    """1 where x is at least the y of its sequence, else 0: ``[N], [B] -> [N]``, written into ``room`` in its dtype."""
    # Comparisons that write numbers are several times faster than bools, and fresh memory would cost as much again.
    return with_value(t, torch.ge, x, y, room)


def with_value(t: Tokens, operation: Callable[..., Tensor], x: Tensor, y: Tensor, room: Tensor) -> Tensor:
    """An operation of each x and the y of its sequence: ``[N], [B] -> [N]``, written into ``room``."""
    if t.equal:
        operation(by_sequence(t, x), y[:, None], out=by_sequence(t, room))
    else:
        operation(x, to_tokens(t, y), out=room)
    return room
