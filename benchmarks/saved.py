"""How many bytes does autograd hold on to at once?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Peak:
    """Bytes held for the backward pass now, and the most so far; every memory counted once."""

    def __init__(self, uncounted: Collection[Tensor] = ()) -> None:
        self.bytes = self._now = 0
        self._uncounted = {_memory(tensor) for tensor in uncounted}
        self._holders: Counter[int] = Counter()

    def hold(self, tensor: Tensor) -> Held:
        return Held(tensor, self)

    def change(self, memory: int, size: int, by: int) -> None:
        """One holder more (by=1) or less (by=-1) of a memory of this size."""
        if memory in self._uncounted:
            return
        was_held = self._holders[memory] > 0
        self._holders[memory] += by
        self._now += size * ((self._holders[memory] > 0) - was_held)
        self.bytes = max(self.bytes, self._now)


class Held:
    """A tensor that autograd keeps, counted until autograd lets it go."""

    def __init__(self, tensor: Tensor, peak: Peak) -> None:
        self.tensor, self._peak = tensor, peak
        self._place = (_memory(tensor), tensor.untyped_storage().nbytes())
        peak.change(*self._place, by=1)

    def __del__(self) -> None:
        self._peak.change(*self._place, by=-1)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def peak_saved(uncounted: Collection[Tensor] = ()) -> Iterator[Peak]:
    """Measures what is saved within, forward and backward; `uncounted` are there anyway, such as parameters."""
    peak = Peak(uncounted)
    with torch.autograd.graph.saved_tensors_hooks(peak.hold, lambda held: held.tensor):
        yield peak
