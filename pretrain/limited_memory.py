"""How is code that reads a stranger's file kept from taking more memory than it may?"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def at_most(more: int) -> Iterator[int]:
    """Within it the process gets no more than that many bytes beside those that it has: what asks for more fails.

    It is given the limit, in bytes as `data_bytes` counts them.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [data_bytes() + more, *(one for one in (soft, hard) if one != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield min(limits)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def data_bytes() -> int:
    """That the process has for itself, as RLIMIT_DATA counts them."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmData"))
    return 1024 * int(line.split()[1])
