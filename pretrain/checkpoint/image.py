"""How is a safetensors file written without copying its tensors? It lies in memory, and they are views of it."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: where the tensors begin
ITEM = 4  # bytes of a float32


class Image:
    """The whole content of a file of float32 vectors, in memory that is taken once and overwritten for every save.

    `lengths` are those of the vectors by name; `starts`, kept as metadata, say where in the flattened parameter of
    that name each begins. On a machine with a GPU the memory is pinned, so that copies from there do not wait.
    """

    def __init__(self, lengths: Mapping[str, int], starts: Mapping[str, int], *, is_pinned: bool) -> None:
        header: dict[str, Any] = {"__metadata__": {"starts": json.dumps(starts)}}
        end = 0
        for name, length in lengths.items():
            header[name] = {"dtype": "F32", "shape": [length], "data_offsets": [end, end + ITEM * length]}
            end += ITEM * length
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)  # the format lets a header end in spaces
        begin = 8 + len(text)
        self.content = bytearray(begin + end)
        self.content[:begin] = struct.pack("<Q", len(text)) + text
        self.views: dict[str, Tensor] = {}
        for name, length in lengths.items():
            offset = begin + header[name]["data_offsets"][0]
            empty = torch.empty(0)
            self.views[name] = (
                torch.frombuffer(self.content, dtype=torch.float32, count=length, offset=offset)
                if length
                else empty
            )
        if is_pinned:
            _pin(self.content)


def _pin(content: bytearray) -> None:
    """Keeps memory in its place for copies of a GPU; without it they wait, and are right all the same."""
    address = torch.frombuffer(content, dtype=torch.uint8).data_ptr()
    torch.cuda.cudart().cudaHostRegister(address, len(content), 0)
