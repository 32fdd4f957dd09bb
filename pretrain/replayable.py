"""From which checkpoint can a refused step be run again, and which ones does the evidence of a run need?

From one on the way to the step: it has taken the same batches. The run may have gone back since and left more out, so
the newest before the step may lie on another way; and one that it has given up may be just the one that led there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from pretrain.checkpoint import folder_in, left_out, steps_in
from pretrain.checkpoint.stores import store_at
from pretrain.data.left_out import after_kept
from pretrain.evidence import REFUSED, bundles_of
from pretrain.place import Place


def checkpoint_before(place: Place, step: int, without: set[int]) -> Place:
    """The newest whole checkpoint on the way to a step that left out the batches `without`; ValueError if none is."""
    for earlier in _before(steps_in(place), step, without, lambda one: left_out(folder_in(place, one))):
        folder = folder_in(place, earlier)
        if store_at(folder).problem(hashes=True) is None:
            return folder
    raise ValueError(
        f"no whole checkpoint on the way to step {step} lies in {place}: the step cannot be run again"
    )


def needed(out: Path, place: Place) -> list[int]:
    """Steps of the checkpoints from which the kept bundles of a run are run again, those of the newest first."""
    steps, known, found = steps_in(place), dict[int, set[int]](), list[int]()

    def holes(step: int) -> set[int]:
        if step not in known:
            known[step] = left_out(folder_in(place, step))
        return known[step]

    for bundle in bundles_of(out):
        try:
            told = json.loads((bundle / REFUSED).read_text())
            way = _before(steps, told["step"], set(told["left_out"]), holes)
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # not whole, as a crash leaves it
            continue
        found += [one for one in (next(way, None),) if one is not None and one not in found]
    return found


def _before(
    steps: Collection[int], step: int, without: set[int], holes: Callable[[int], set[int]]
) -> Iterator[int]:
    """Steps of those checkpoints on the way to a step, the newest first; `holes` are what one of them left out."""
    for earlier in sorted((one for one in steps if one <= step), reverse=True):
        try:
            left = holes(earlier)
        except (FileNotFoundError, ValueError, KeyError):  # not whole
            continue
        last = earlier - 1  # the batch of this index was taken last; what was left out behind it says nothing
        if left <= without and (not earlier or after_kept(last, left) == after_kept(last, without)):
            yield earlier
