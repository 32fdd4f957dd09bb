"""How is a test kept from taking more memory than it may?"""

from __future__ import annotations

from contextlib import AbstractContextManager

from pretrain.limited_memory import at_most


def little_memory(more: int = 2**30) -> AbstractContextManager[int]:
    """Within it the process gets no more than that many bytes beside those that it has."""
    return at_most(more)
