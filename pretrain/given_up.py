"""Which checkpoints has a run gone back from to an older one, so that nobody takes them for its last?"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

from pretrain.checkpoint import folder_in, read_json, steps_in
from pretrain.collectives import rank
from pretrain.evidence import Journal, Rewind
from pretrain.place import Place


def given_up_by(out: Path, place: Place) -> set[int]:
    """Steps as `given_up` in the place of a run that has its folder `out`, for its readers, who are told."""
    gone = given_up(place, Journal(out).rewinds())
    tell(gone, place)
    return gone


def tell(gone: Collection[int], place: Place) -> None:
    """Warns once of checkpoints that are left aside, if any."""
    if gone and rank() == 0:
        warnings.warn(
            f"the checkpoints of steps {sorted(gone)} in {place} are not used: the run has gone back from them to an "
            "older one",
            stacklevel=2,
        )


def given_up(place: Place, rewinds: Sequence[Rewind]) -> set[int]:
    """Steps of the checkpoints from which the run has gone back to an older one since they were written."""
    oldest = min((one.to for one in rewinds), default=None)
    if oldest is None:
        return set()
    later = (step for step in steps_in(place) if step > oldest)
    return {step for step in later if any(one.to < step for one in since(folder_in(place, step), rewinds))}


def since(folder: Place, rewinds: Sequence[Rewind]) -> Sequence[Rewind]:
    """Rewinds after a checkpoint was written; none where it does not say how many there were before.

    All of them where those before are of another --out, from which the checkpoint was taken.
    """
    try:
        known = read_json(folder, "state.json")["guard"]
        count, last = known["rewinds"], known.get("last_rewind")
    except (FileNotFoundError, ValueError, KeyError):  # broken, or written by an older version
        return ()
    if count > len(rewinds) or (count and last is not None and rewinds[count - 1].time != last):
        return rewinds
    return rewinds[count:]
