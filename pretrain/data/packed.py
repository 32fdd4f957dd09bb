"""How does a batch go from one process to another in one piece?

Every tensor that a worker sends costs the trainer a connection, about a millisecond each.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

import torch
from jaxtyping import UInt8
from torch import Tensor

from pretrain.data.batch import Batch
from pretrain.data.room import Place, give_back, in_one, part
from pretrain.data.steps import Delivery


@dataclass(frozen=True)
class Packed:
    """A delivery whose tensors are parts of one, and of a second where the device has something left to do."""

    buffer: UInt8[Tensor, " bytes"]
    places: tuple[Place, ...]  # of the batch's fields
    left: UInt8[Tensor, " more"] | None
    left_places: tuple[Place, ...]
    rest: tuple  # what of the delivery is no tensor

    def taken(self) -> Packed:
        """The same in memory of this process, page-locked where there is a GPU; the sender's is given back."""
        own = replace(self, buffer=_own(self.buffer), left=None if self.left is None else _own(self.left))
        give_back(self.buffer)
        return own


def _own(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if torch.cuda.is_available() else tensor.clone()


def pack(delivery: Delivery) -> Packed:
    """The batch is not copied where its tensors lie in one piece, as `room_for` makes them.

    What the device has left to do lies in shared memory if the batch does; DataError where that has no room.
    """
    batch, unfinished, *rest = delivery
    buffer, places = in_one([getattr(batch, field.name) for field in dataclasses.fields(Batch)])
    left, left_places = None, ()
    if unfinished is not None:
        # Files too: a message longer than a pipe takes at once would leave the trainer in the middle of it if its
        # worker is killed.
        is_shared = buffer.is_shared()
        files = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in unfinished.files]
        left, left_places = in_one([unfinished.changes, *files], is_shared)
        unfinished = unfinished._replace(changes=None, files=())
    return Packed(buffer, places, left, left_places, (unfinished, *rest))


def unpack(packed: Packed) -> Delivery:
    """What was packed; the tensors share the memory of the buffer."""
    names = [field.name for field in dataclasses.fields(Batch)]
    fields = [part(packed.buffer, place) for place in packed.places]
    unfinished, *rest = packed.rest
    if unfinished is not None:
        changes, *files = (part(packed.left, place) for place in packed.left_places)
        unfinished = unfinished._replace(
            changes=changes, files=tuple(file.numpy().tobytes() for file in files)
        )
    return Delivery(Batch(**dict(zip(names, fields, strict=True))), unfinished, *rest)
