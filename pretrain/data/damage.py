"""Is one place of a file damaged, or can nothing of it be read now?"""

from __future__ import annotations

import errno
import os
from pathlib import Path

# What file systems say of a damaged place: the disk's error, and checksums that are not right. Those behind a network
# say EIO too while their server is away.
OF_DAMAGE = frozenset((errno.EIO, errno.ENODATA, errno.EBADMSG, errno.EUCLEAN))
NUM_PLACES = 8  # of a file, that are tried
PLACE = 512  # bytes


def can_be_read_elsewhere(path: Path, num_bytes: int) -> bool:
    """Does a file of that size give any of a few places of it, from where it lies and not from memory?"""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for who writes to it
    except OSError:
        return False
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # the whole file: its pages may be large
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # and nothing beside a place is read with it
        starts = range(0, num_bytes, max(num_bytes // NUM_PLACES, PLACE))
        return any(_is_readable(descriptor, start) for start in starts)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _is_readable(descriptor: int, start: int) -> bool:
    try:
        return len(os.pread(descriptor, PLACE, start)) > 0
    except OSError:
        return False
