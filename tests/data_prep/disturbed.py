"""What do the drills build, and how is it disturbed? Light to import: every process that is killed does so anew."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.build import Options
from data_prep.places import place_of
from data_prep.samples import Collection, Made
from data_prep.sources.scenes import Scenes

SCENES = Scenes(count=18, heldout=0.0, size=32)
OPTIONS = Options(shard_size=4, workers=1)
Make = Callable[[int], Made]


def collection() -> Collection:
    """18 scenes, in 5 shards."""
    return SCENES.collections()[0]


def slow(index: int, make: Make, seconds: float) -> Made:
    """As from a source that reads from far away."""
    time.sleep(seconds)
    return make(index)


def raises_at(index: int, make: Make, number: int) -> Made:
    """The source breaks."""
    if index == number:
        raise RuntimeError("the source broke")
    return make(index)


def fails_the_store(index: int, make: Make, faults: Any) -> Made:
    """From the third shard on nothing can be written."""
    if index == 9:
        faults.refused, faults.methods = 1.0, ("PUT", "POST")
    return make(index)


def kills_itself(index: int, make: Make) -> Made:
    """As the kernel kills a process that takes too much memory, whenever it comes to this item."""
    if index == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return make(index)


def kills_itself_once(index: int, make: Make, mark: Path) -> Made:
    """As before, but not a second time; `mark` says that it happened."""
    if index == 9 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return make(index)


def steals_the_claim(index: int, make: Make, place: str, number: int) -> Made:
    """Another builder takes the place over while a shard is in the making."""
    if index == number:
        place_of(place).write(".build/claim", json.dumps({"owner": "y"}).encode())
    return make(index)
