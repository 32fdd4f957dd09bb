"""Where in a shard do its samples lie, and which files is a sample made of?"""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
from array import array
from pathlib import Path
from zlib import adler32

from data_prep.index import ANEW, index_bytes, index_path, read_index
from data_prep.schema import TAR_BLOCK, Shard
from pretrain.data.faults import BadSample

REGULAR_FILE = (b"0", b"\0")  # tar type flags
# Name, size, checksum, type flag and magic.
HEADER = struct.Struct(f"100s 24x 12s 12x 8s c 100x 5s {TAR_BLOCK - 262}x")
CHECKSUM_AT, CHECKSUM_END = 148, 156
CHECKSUM_AS_COUNTED = 8 * ord(" ")  # it is no part of its own sum


def offsets_of(descriptor: int, path: Path, shard: Shard) -> array:
    """Where the samples of an open shard lie; it is indexed if it is not yet, and its headers tell the same where the
    index cannot be read. Raises BadSample, and OSError when reading the shard fails."""
    has_index = is_read = True
    try:
        offsets = read_index(path)
    except OSError as error:
        has_index, is_read = not isinstance(error, FileNotFoundError), False
        offsets = _index(descriptor, path)
    except ValueError as error:
        raise BadSample("broken_index", str(error)) from error
    remedy = ANEW if is_read else "copy that shard again"
    if len(offsets) != shard.num_samples + 1:
        raise BadSample(
            "broken_index",
            f"{path}.idx holds {len(offsets)} offsets, the manifest's {shard.num_samples} samples need one more: "
            f"{remedy}",
        )
    if offsets[-1] > shard.num_bytes:
        raise BadSample(
            "broken_index",
            f"{path}.idx ends its samples at byte {offsets[-1]}, the manifest's shard at {shard.num_bytes}: {remedy}",
        )
    if is_read and _goes_on(descriptor, offsets[-1]):  # its last sample would lack members
        raise BadSample(
            "broken_index",
            f"{path}.idx ends its samples at byte {offsets[-1]}, where the shard has another member: {remedy}",
        )
    if not has_index:
        _keep_index(path, offsets)
    return offsets


def _goes_on(descriptor: int, at: int) -> bool:
    """Whether a shard has a member there; zeros end it, or its end where it is cut off."""
    try:
        return bool(os.pread(descriptor, TAR_BLOCK, at).strip(b"\0"))
    except OSError:  # of the place alone, or of the whole file: who reads a sample is told which
        return False


def _index(descriptor: int, path: Path) -> array:
    """Offsets of the samples of a shard that came without an index, from its headers: one short read a member.

    Raises BadSample for what is no whole shard of data_prep.
    """
    offsets, last_key, at = array("Q"), None, 0
    while (header := os.pread(descriptor, TAR_BLOCK, at)).strip(b"\0"):  # a block of zeros ends an archive
        try:
            name, size = _read_header(header)
        except BadSample as error:
            raise BadSample(
                "broken_index", f"{path} has no index and cannot get one: byte {at}: {error}"
            ) from error
        key = name.partition(".")[0]
        if key != last_key:
            offsets.append(at)
            last_key = key
        at += TAR_BLOCK + -(-size // TAR_BLOCK) * TAR_BLOCK
    if not header:
        raise BadSample(
            "truncated_shard", f"{path} has no index and cannot get one: it ends before its end mark"
        )
    offsets.append(at)
    return offsets


def _keep_index(path: Path, offsets: array) -> None:
    """Writes the index of a shard for the next time, where this process may."""
    # Workers may index the same shard at once, and those of two containers have the same host and number.
    partial = path.with_name(f".{path.name}.idx.{secrets.token_hex(8)}")
    try:
        partial.write_bytes(index_bytes(offsets.tolist()))
        with partial.open("rb") as file:  # a power cut could empty it, and a broken index costs the shard
            os.fsync(file.fileno())
        partial.replace(index_path(path))
    except OSError:  # a data set that others own
        with contextlib.suppress(OSError):
            partial.unlink()


def read_members(record: bytes) -> tuple[str, dict[str, bytes]]:
    """Key and members of the USTAR records of one sample, as data_prep writes them.

    A strict reader of that one format: tarfile takes 20 times as long for a sample. Raises BadSample
    `broken_record`.
    """
    key, members, at = "", {}, 0
    while at < len(record):
        name, size = _read_header(record, at)
        at += TAR_BLOCK
        member_key, _, extension = name.partition(".")
        if members and member_key != key:
            raise BadSample("broken_record", f"member {name!r} follows members of {key!r}")
        key = member_key
        members[extension] = record[at : at + size]
        at += -(-size // TAR_BLOCK) * TAR_BLOCK
        if at > len(record):
            raise BadSample("broken_record", f"member {name!r} of {size} bytes exceeds its sample")
    return key, members


def _read_header(record: bytes, at: int = 0) -> tuple[str, int]:
    """Name and content size of the USTAR member (POSIX.1-1988) whose header stands there; raises BadSample.

    Adler-32 (RFC 1950) starts with a sum of all bytes, modulo 65521, which no header of ASCII characters reaches; to
    sum in Python takes six times as long.
    """
    try:
        name, size, checksum, kind, magic = HEADER.unpack_from(record, at)
        counted, size = int(checksum.strip(b"\0 "), 8), int(size.strip(b"\0 "), 8)
        name = name.partition(b"\0")[0].decode("ascii")
    except (struct.error, ValueError) as error:
        raise BadSample("broken_record", f"no tar header where one must stand: {error}") from error
    if size < 0:  # whoever goes on from here would go back, for ever
        raise BadSample("broken_record", f"the header of {name!r} tells a size of {size} bytes")
    before, behind = record[at : at + CHECKSUM_AT], record[at + CHECKSUM_END : at + TAR_BLOCK]
    summed = (adler32(behind, adler32(before)) & 0xFFFF) - 1 + CHECKSUM_AS_COUNTED
    if summed != counted or magic != b"ustar" or kind not in REGULAR_FILE:
        raise BadSample("broken_record", f"the header of {name!r} is broken or not of a plain USTAR file")
    return name, size
