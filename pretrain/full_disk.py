"""Did an error come of a disk that is full? Some libraries write by their own code, and say it in their own words."""

from __future__ import annotations

import errno
import re

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, one's share of it, the largest file allowed
TORCH = "inline_container.cc"  # of torch's writer, which keeps no number of the system
NUMBER = re.compile(r"\(os error (\d+)\)")  # of safetensors, which is written in Rust


def is_no_room(error: BaseException) -> bool:
    """Of an error that was raised while files were written."""
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    told = NUMBER.search(str(error))
    return (told is not None and int(told[1]) in NO_ROOM) or TORCH in str(error)
