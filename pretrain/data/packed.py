"""How does a batch go from one process to another in one piece?

Every tensor that a worker sends costs the trainer a connection, about a millisecond each.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from pretrain.data.batch import Batch
from pretrain.data.steps import Delivery

ALIGNED = 8  # bytes, of the widest numbers


class _Place(NamedTuple):
    """Where a tensor lies in the buffer."""

    start: int  # bytes
    size: int  # bytes
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """A delivery whose tensors are parts of one."""

    buffer: UInt8[Tensor, " bytes"]
    places: tuple[_Place, ...]
    rest: tuple  # what of the delivery is no tensor

    def pin_memory(self) -> Packed:
        """The same in page-locked memory; called by torch's DataLoader."""
        return replace(self, buffer=self.buffer.pin_memory())


def pack(delivery: Delivery) -> Packed:
    batch, unfinished, *rest = delivery
    tensors = [getattr(batch, field.name) for field in dataclasses.fields(Batch)]
    if unfinished is not None:
        # Files too: a message longer than a pipe takes at once would leave the trainer in the middle of it if its
        # worker is killed.
        files = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in unfinished.files]
        tensors += [unfinished.changes, *files]
        unfinished = unfinished._replace(changes=None, files=())
    places, size = [], 0
    for tensor in tensors:
        places.append(_Place(size, tensor.nbytes, tensor.dtype, tuple(tensor.shape)))
        size += -(-tensor.nbytes // ALIGNED) * ALIGNED
    buffer = torch.empty(size, dtype=torch.uint8)
    for tensor, place in zip(tensors, places, strict=True):
        _part(buffer, place).copy_(tensor)
    return Packed(buffer, tuple(places), (unfinished, *rest))


def unpack(packed: Packed) -> Delivery:
    """What was packed; the tensors share the memory of the buffer."""
    tensors = [_part(packed.buffer, place) for place in packed.places]
    names = [field.name for field in dataclasses.fields(Batch)]
    unfinished, *rest = packed.rest
    fields, others = tensors[: len(names)], tensors[len(names) :]
    if unfinished is not None:
        files = tuple(file.numpy().tobytes() for file in others[1:])
        unfinished = unfinished._replace(changes=others[0], files=files)
    return Delivery(Batch(**dict(zip(names, fields, strict=True))), unfinished, *rest)


def _part(buffer: Tensor, place: _Place) -> Tensor:
    return buffer[place.start : place.start + place.size].view(place.dtype).view(place.shape)
