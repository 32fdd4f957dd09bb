"""Where in a shard does each sample lie? The offsets of `000000.tar.idx`, in the layout that Energon reads too.

Standard library only, as `schema.py`: training imports it.
"""

from __future__ import annotations

import os
import sys
from array import array
from itertools import pairwise
from pathlib import Path

from data_prep.schema import TAR_BLOCK

ANEW = "remove that .idx, the next start makes it anew"  # what mends a broken index; training indexes shards


def index_path(tar: str | os.PathLike[str]) -> Path:
    """Where the index of shard `tar` lies: `000000.tar` -> `000000.tar.idx`."""
    tar = Path(tar)
    return tar.with_name(tar.name + ".idx")


def read_index(tar: str | os.PathLike[str]) -> array:
    """The n + 1 byte offsets of shard `tar`: sample i lies in [offsets[i], offsets[i + 1]).

    Raises FileNotFoundError without an index and ValueError when the offsets do not rise in tar blocks.
    """
    path = index_path(tar)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: copy it again from where the shard came from, or build again"
        )
    content = path.read_bytes()
    if len(content) % 8 or len(content) < 16:
        raise ValueError(f"{path} holds {len(content)} bytes, it must be 8 per sample and 8 more: {ANEW}")
    offsets = array("Q", content)
    if sys.byteorder == "big":
        offsets.byteswap()
    rising = all(before < after for before, after in pairwise(offsets))
    if offsets[0] != 0 or not rising or any(offset % TAR_BLOCK for offset in offsets):
        raise ValueError(f"{path}: offsets must start at 0 and rise in multiples of {TAR_BLOCK}: {ANEW}")
    return offsets


def index_bytes(offsets: list[int]) -> bytes:
    """The content of an index file: little-endian uint64."""
    values = array("Q", offsets)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()
