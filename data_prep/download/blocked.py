"""Which contents may never be kept? Millions of published hashes in one file that every worker maps into memory.

The file holds two numbers, of SHA-256 and of MD5 digests (64 bits, little-endian each), and then the digests, each
kind sorted. It is named by its own SHA-256: another list is another file.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import tempfile
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

KINDS = {"sha256": 32, "md5": 16}  # algorithm -> bytes of a digest, in the order of the file
_HEAD = struct.Struct("<2Q")


@dataclass(frozen=True)
class Blocked:
    """A finished list of digests; small and picklable, for the file is opened where it is used."""

    path: Path
    identity: str  # sha256 of the file

    def found(self, content: bytes) -> str:
        """Which digest of `content` is in the list, as "md5 0123..."; "" for none."""
        mapped, counts = _mapped(self.path)
        start = _HEAD.size
        for (algorithm, width), count in zip(KINDS.items(), counts, strict=True):
            if count:
                digest = hashlib.new(algorithm, content, usedforsecurity=False).digest()
                places = range(start, start + count * width, width)
                index = bisect_left(
                    places, digest, key=lambda place, width=width: mapped[place : place + width]
                )
                if index < count and mapped[places[index] : places[index] + width] == digest:
                    return f"{algorithm} {digest.hex()}"
            start += count * width
        return ""


def blocked_by(paths: Sequence[str], work: Path) -> Blocked:
    """The list of all hexadecimal digests in these files, one a line, kept in the folder `work`.

    Raises ValueError for a line that is no SHA-256 or MD5 (`rows.blocks` says which may stand there),
    FileNotFoundError for a file that is missing.
    """
    # here: the engine imports this package too, and needs no database
    from data_prep.rows.blocks import blocked_hashes
    from data_prep.rows.inputs import fetched

    digests = {algorithm: [np.empty(0, f"S{width}")] for algorithm, width in KINDS.items()}
    for path in paths:
        for entries in blocked_hashes(fetched(path, work)):
            for algorithm, width in KINDS.items():
                packed = bytes.fromhex("".join(one for one in entries if len(one) == 2 * width))
                digests[algorithm].append(np.frombuffer(packed, f"S{width}"))
    sorted_digests = [np.unique(np.concatenate(digests[algorithm])) for algorithm in KINDS]
    content = _HEAD.pack(*map(len, sorted_digests)) + b"".join(one.tobytes() for one in sorted_digests)
    identity = hashlib.sha256(content).hexdigest()
    target = work / f"blocked-{identity[:16]}.bin"
    if not target.is_file():
        with tempfile.NamedTemporaryFile(dir=work, prefix="blocked-", suffix=".tmp", delete=False) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(file.name, 0o644)  # workers may be other users
        os.replace(file.name, target)  # two that make it at once make the same
    return Blocked(target, identity)


@cache
def _mapped(path: Path) -> tuple[mmap.mmap, tuple[int, ...]]:
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return mapped, _HEAD.unpack_from(mapped)
