"""In which one piece of memory do several tensors lie?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from pretrain.data.faults import DataError

ALIGNED = 8  # bytes, of the widest numbers
FREE, TAKEN = 0, 1
MOST_KEPT = 3  # pieces: one that is written, one that waits, one that is copied
Form = tuple[torch.dtype, tuple[int, ...]]  # type and shape of a tensor


class Span(NamedTuple):
    """Where a tensor lies in the buffer."""

    start: int  # bytes
    size: int  # bytes
    dtype: torch.dtype
    shape: tuple[int, ...]


class Rooms:
    """Shared memory for batches, written again once whoever was sent it has copied it and called `give_back`.

    Fresh memory costs the worker a page fault for every 4 KiB.
    """

    def __init__(self) -> None:
        self._kept: list[UInt8[Tensor, " bytes"]] = []  # the one taken last comes last

    def take(self, size: int) -> UInt8[Tensor, " bytes"]:
        """At least `size` bytes, whatever stands in them; DataError where the machine has no room for them."""
        free = [room for room in self._kept if room[-1] == FREE and len(room) == size + 1]
        room = free[0] if free else _shared_memory(size + 1)  # the last byte says whether it is taken
        room[-1] = TAKEN
        self._kept = [*(one for one in self._kept if one is not room), room][-MOST_KEPT:]
        return room

    def has_lent(self, buffer: UInt8[Tensor, " bytes"]) -> bool:
        """Whether this was taken from here."""
        return any(room.data_ptr() == buffer.data_ptr() for room in self._kept)


def give_back(buffer: UInt8[Tensor, " bytes"]) -> None:
    """Lets the process that took this from its Rooms write it anew."""
    buffer[-1] = FREE


def room_for(forms: Mapping[str, Form], rooms: Rooms | None = None) -> dict[str, Tensor]:
    """Tensors of these forms, without numbers, that lie in one piece of memory.

    With `rooms` other processes can be sent it without a copy: a batch is then held once, not twice. DataError
    where they have no room for it.
    """
    spans, size = _placed(forms.values())
    buffer = torch.empty(size, dtype=torch.uint8) if rooms is None else rooms.take(size)
    return {name: part(buffer, span) for name, span in zip(forms, spans, strict=True)}


def _shared_memory(size: int) -> UInt8[Tensor, " bytes"]:
    """Bytes of processes together, as torch's own collate makes them: to share a tensor that is there would copy it,
    and where that has no room, in a thread that loses the batch."""
    try:
        return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
    except RuntimeError as error:
        raise DataError(
            f"no room in the memory that processes share (/dev/shm) for a batch of {size / 2**20:,.0f} MiB "
            f"({error}): give the container more (--shm-size, or --ipc=host), or lower --workers"
        ) from error


def in_one(
    tensors: Sequence[Tensor], is_shared: bool = False
) -> tuple[UInt8[Tensor, " bytes"], tuple[Span, ...]]:
    """One tensor that holds all of these, and where: the memory that they share, or a copy, shared if so said."""
    memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    is_there = not is_shared or all(tensor.is_shared() for tensor in tensors)
    if len(memory) == 1 and is_there and all(tensor.is_contiguous() for tensor in tensors):
        (storage,) = memory.values()
        starts = [tensor.storage_offset() * tensor.element_size() for tensor in tensors]
        spans = (
            Span(start, tensor.nbytes, tensor.dtype, tuple(tensor.shape))
            for start, tensor in zip(starts, tensors, strict=True)
        )
        return torch.empty(0, dtype=torch.uint8).set_(storage), tuple(spans)
    placed, size = _placed([(tensor.dtype, tuple(tensor.shape)) for tensor in tensors])
    buffer = _shared_memory(size) if is_shared else torch.empty(size, dtype=torch.uint8)
    for tensor, span in zip(tensors, placed, strict=True):
        part(buffer, span).copy_(tensor)
    return buffer, placed


def _placed(forms: Iterable[Form]) -> tuple[tuple[Span, ...], int]:
    """Where tensors of these forms lie one behind the other, and the bytes of all."""
    spans, size = [], 0
    for dtype, shape in forms:
        spans.append(Span(size, math.prod(shape) * dtype.itemsize, dtype, shape))
        size += -(-spans[-1].size // ALIGNED) * ALIGNED
    return tuple(spans), size


def part(buffer: Tensor, span: Span) -> Tensor:
    """The tensor that lies there."""
    return buffer[span.start : span.start + span.size].view(span.dtype).view(span.shape)
