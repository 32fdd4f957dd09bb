"""Does a run get on from start to start, on machines whose disks are new each time? The bucket remembers.

    python -m pretrain.restarts CHECKPOINTS TASK MOST

As jobs/restarts.sh, for machine 0 of a task of a cloud (jobs/cloud/skypilot.yaml). Ends with 1 when MOST starts of
TASK in a row came to no newer checkpoint, else with 0, and prints 1 where it has counted this start. It has not where
the place of the checkpoints cannot be asked for PATIENCE seconds, which is no fault of the run.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import asdict, dataclass
from functools import partial

from data_prep import places
from pretrain.checkpoint import latest, step_of
from pretrain.exits import FAILED, FINISHED
from pretrain.place import Place, place_of
from pretrain.retries import patiently

RECORD = "restarts.json"  # beside the checkpoints
PATIENCE = 600.0  # seconds that the place may fail, while the other machines wait
NO_STEP = -1


@dataclass(frozen=True)
class Restarts:
    """What the starts of a task have come to."""

    task: str
    step: int  # of the newest checkpoint that one of them began with
    vain: int = 0  # starts in a row since then that made no newer one


def main(arguments: list[str] | None = None) -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.restarts", description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkpoints", type=place_of, help="folder or URL, as --checkpoints of pretrain/main.py"
    )
    parser.add_argument("task", help="its name, which stays when it is started again")
    parser.add_argument("most", type=int, help="starts in a row that may come to no newer checkpoint")
    asked = parser.parse_args(arguments)
    try:
        place, task, most = asked.checkpoints, asked.task, asked.most
        ask = partial(count, place, task, most)
        counted = patiently(ask, str(place), PATIENCE, attempt=PATIENCE, final=(ValueError,))
    except (OSError, ValueError) as error:  # of what is wrong for good the training tells
        print(f"this start is not counted: {asked.checkpoints} does not serve ({error})", file=sys.stderr)
        return FINISHED
    if counted.vain < asked.most:
        print(1)
        return FINISHED
    reached = "none" if counted.step == NO_STEP else f"that of step {counted.step}"
    print(
        f"{counted.vain} starts in a row made no checkpoint in {asked.checkpoints}, whose newest is {reached}; "
        f"RESTARTS={asked.most} of them end the task: look in its log why they ended, then launch it again, which "
        "goes on from the newest",
        file=sys.stderr,
    )
    return FAILED


def count(checkpoints: Place, task: str, most: int) -> Restarts:
    """Counts a start in RECORD, which is forgotten after `most` in vain: who launches again begins to count anew."""
    place = places.place_of(str(checkpoints))
    before = recorded(place)
    with warnings.catch_warnings(action="ignore"):  # of broken checkpoints the training tells
        newest = latest(checkpoints)
    step = NO_STEP if newest is None else step_of(newest)
    now = Restarts(task, step)
    if before is not None and before.task == task and step <= before.step:
        now = Restarts(task, before.step, before.vain + 1)
    if now.vain < most:
        place.write(RECORD, json.dumps(asdict(now)).encode())
    else:
        place.remove(RECORD)
    return now


def recorded(place: places.Place) -> Restarts | None:
    """What the starts before have left; None without, or where it is no such record."""
    try:
        found = Restarts(**json.loads(place.read(RECORD)))
        if not (type(found.step) is type(found.vain) is int):
            raise ValueError(f"step={found.step!r} and vain={found.vain!r} must be whole numbers")
        return found
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        print(f"{place}/{RECORD} is damaged ({error}): starts are counted anew", file=sys.stderr)
        return None


if __name__ == "__main__":
    sys.exit(main())
