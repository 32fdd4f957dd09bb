"""How does a batch go from one process to another in one piece?

Every tensor that a worker sends costs the trainer a connection, about a millisecond each.
"""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass, replace

import torch
from jaxtyping import UInt8
from torch import Tensor

from pretrain.data.batch import Batch
from pretrain.data.room import Rooms, Span, give_back, in_one, part
from pretrain.data.steps import Delivery

MOST_TOLD = 2048  # bytes in a message of at most PIPE_BUF, 4,096; spans and handles take the other half


@dataclass(frozen=True)
class Packed:
    """A delivery whose tensors are parts of one, and of a second where the device has something left to do.

    Its message stays below what a pipe takes in one piece: of a worker that is killed in the middle of a longer one,
    the trainer would wait for the rest for ever. `told` lies in memory of its own where it is long.
    """

    buffer: UInt8[Tensor, " bytes"]
    spans: tuple[Span, ...]  # of the batch's fields
    left: UInt8[Tensor, " more"] | None
    # Pickled: what of the delivery is no tensor, and the spans in `left`.
    told: bytes | UInt8[Tensor, " long"]
    is_lent: bool  # the buffer, of the sender's Rooms

    def taken(self) -> Packed:
        """The same in memory of this process, page-locked where there is a GPU; the sender's is given back."""
        buffer, left = _own(self.buffer), None if self.left is None else _own(self.left)
        if self.is_lent:
            give_back(self.buffer)
        return replace(self, buffer=buffer, left=left, is_lent=False)


def _own(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if torch.cuda.is_available() else tensor.clone()


def pack(delivery: Delivery, rooms: Rooms | None = None) -> Packed:
    """The batch is not copied where its tensors lie in one piece, as `room_for` makes them, perhaps in `rooms`.

    What else is long lies in shared memory if the batch does; DataError where that has no room.
    """
    batch, unfinished, *rest = delivery
    buffer, spans = in_one([getattr(batch, field.name) for field in dataclasses.fields(Batch)])
    is_shared = buffer.is_shared()
    left, left_spans = None, ()
    if unfinished is not None:
        left, left_spans = in_one([unfinished.changes, *map(_tensor, unfinished.files)], is_shared)
        unfinished = unfinished._replace(changes=None, files=())
    told: bytes | Tensor = pickle.dumps((left_spans, unfinished, *rest))
    if len(told) > MOST_TOLD:
        told, _ = in_one([_tensor(told)], is_shared)
    return Packed(buffer, spans, left, told, rooms is not None and rooms.has_lent(buffer))


def _tensor(content: bytes) -> UInt8[Tensor, " n"]:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def unpack(packed: Packed) -> Delivery:
    """What was packed; the tensors share the memory of the buffer."""
    names = [field.name for field in dataclasses.fields(Batch)]
    fields = [part(packed.buffer, span) for span in packed.spans]
    told = packed.told if isinstance(packed.told, bytes) else packed.told.numpy().tobytes()
    left_spans, unfinished, *rest = pickle.loads(told)
    if unfinished is not None:
        changes, *files = (part(packed.left, span) for span in left_spans)
        unfinished = unfinished._replace(
            changes=changes, files=tuple(file.numpy().tobytes() for file in files)
        )
    return Delivery(Batch(**dict(zip(names, fields, strict=True))), unfinished, *rest)
