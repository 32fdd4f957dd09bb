"""What is a check, and how do all ranks pass through all checks whatever happens on one of them?

Each rank looks, within bounded time; what it found, or the error that stopped it, goes to rank 0, which judges what
all ranks told together. No look ends another, and one that raises is a failure of its own check. In some checks the
ranks wait for each other: who does not come through one says so on the board, and none of them tries another.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from pretrain.config import Run
from pretrain.preflight.board import Board, Silent
from pretrain.preflight.options import Options
from pretrain.preflight.ranks import Ranks
from pretrain.preflight.told import FAILED, WARNING, Judged, Place, Problem, Told

OK, SKIPPED = "ok", "skipped"
BROKEN = (
    "broken"  # on the board: a check in which ranks wait for each other, and that one did not come through
)
LEFT = "left"  # the same, left by an error: nobody comes to those who wait in it
LOOKS_AGAIN = 1.0  # seconds after which a rank that waits in a check looks at the board
GRACE = 5.0  # seconds for what a rank finds itself about an error that another has told
ENDS = "the check ends by itself"
HANGS = "see the mounts and the network of that node, and its kernel log (dmesg)"
UNPLANNED = (
    "see that node's output; a fault of this check if the node is well: leave it out by PREFLIGHT_SKIP"
)


@dataclass
class Here:
    """What a check knows of this rank, and of what it is to train."""

    ranks: Ranks
    board: Board
    options: Options
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    run: Run | None = None  # None: nothing is to be trained, or the arguments are wrong
    paths: argparse.Namespace | None = None  # of pretrain/main.py
    arguments: tuple[str, ...] = ()
    mistake: str = ""  # what is wrong with the arguments
    num_gpus: int = 0  # ranks that have a GPU
    model: dict[str, float] | None = (
        None  # on rank 0: parameters, bytes of a checkpoint and of a rank's host memory
    )
    sample_bytes: float | None = (
        None  # on rank 0: the mean in a shard, of the source whose samples are largest
    )

    @property
    def is_mixed(self) -> bool:
        """Have some ranks a GPU and some none, which cannot talk to each other?"""
        return 0 < self.num_gpus < self.ranks.world

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Check:
    """`look` finds on each rank, or on the first of each node; `judge` says on rank 0 what all of that means."""

    text: str  # what is checked, in a few words
    look: Callable[[Here], Any]  # JSON data, or None where there is nothing to say
    judge: Callable[[Sequence[Told], Here], Judged]
    who: Literal["rank", "node"] = "node"
    needs_run: bool = False  # it is about what is to be trained
    is_together: bool = False  # the ranks wait for each other in it

    def is_looked_at(self, ranks: Ranks) -> bool:
        return self.who == "rank" or ranks.is_node_first


@dataclass(frozen=True)
class Row:
    """What is told of a check."""

    name: str
    status: str
    value: str
    rule: str
    problems: tuple[Problem, ...]


def look_at_all(checks: Mapping[str, Check], here: Here) -> dict[str, dict[str, Any]]:
    """By check, {"value"} or {"error"} of this rank, and {"seconds"}; {"skipped"} for what would wait in vain."""
    found: dict[str, dict[str, Any]] = {}
    for name, check in checks.items():
        if not check.is_looked_at(here.ranks):
            continue
        if check.is_together and here.board.has(BROKEN):
            found[name] = {"skipped": here.board.hear(BROKEN)}
            continue
        here.board.begin(f"{name} ({check.text})")
        begun = time.monotonic()
        found[name] = _looked(check, here) | {"seconds": round(time.monotonic() - begun, 3)}
        if check.is_together and "error" in found[name]:
            here.board.tell(BROKEN, name)
            if found[name]["remedy"] != HANGS:
                here.board.tell(LEFT, name)
    here.board.begin("waiting for the others")
    return found


def _looked(check: Check, here: Here) -> dict[str, Any]:
    """In a thread: a file system or a network that never answers must not keep this rank from telling so.

    Nor does it wait its time out for ranks that have left the check by an error.
    """
    answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            if here.is_gpu:
                torch.cuda.set_device(here.device)  # of this thread
            answers.put({"value": check.look(here)})
        except Exception as error:  # any of them is what the check found
            is_planned = isinstance(error, (ValueError, OSError))
            answers.put({"error": explained(error), "remedy": "" if is_planned else UNPLANNED})

    threading.Thread(target=ask, daemon=True).start()
    left, until = "", time.monotonic() + here.options.check_seconds
    while (seconds := until - time.monotonic()) > 0:
        with contextlib.suppress(queue.Empty):
            return answers.get(timeout=min(seconds, LOOKS_AGAIN))
        if check.is_together and not left and here.board.has(LEFT):
            left, until = here.board.hear(LEFT), min(until, time.monotonic() + GRACE)
    if left:
        return {"skipped": left}
    return {"error": f"no answer within {here.options.check_seconds:g} s", "remedy": HANGS}


def explained(error: BaseException) -> str:
    """The message of an error; of one that nobody planned also its kind and its place."""
    text = (str(error).strip() or repr(error)).splitlines()[0]
    if isinstance(error, (ValueError, OSError)):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{where}"


def gather(here: Here, found: Mapping[str, Any]) -> tuple[list[Told], list[Problem]]:
    """On rank 0 what every rank found, and a problem for each that fell silent; on the others nothing."""
    ranks, board = here.ranks, here.board
    board.tell(f"found/{ranks.rank}", found)
    told, silent = [], []
    for rank in range(ranks.world) if ranks.rank == 0 else ():
        arrived = board.hear(f"arrived/{rank}")
        place = Place(rank, arrived["node"], arrived["host"])
        try:
            told.append(Told(place, board.hear(f"found/{rank}", 0.1 if silent else None)))
        except Silent:
            doing = board.doing(rank)
            silent.append(
                Problem(place, f"died or hangs at: {doing}", "see its output, and the node's kernel log")
            )
    return told, silent


def judge(name: str, check: Check, told: Sequence[Told], here: Here) -> Row:
    """The row of a check, of what all ranks found."""
    found = [Told(one.place, one.value[name]) for one in told if name in one.value]
    problems = [
        Problem(one.place, one.value["error"], one.value["remedy"], rule=ENDS)
        for one in found
        if "error" in one.value
    ]
    values = [Told(one.place, one.value["value"]) for one in found if one.value.get("value") is not None]
    skipped = [one.value["skipped"] for one in found if "skipped" in one.value]
    if not values and not problems and skipped:
        return Row(name, SKIPPED, f"not tried, since {skipped[0]} did not end well", check.text, ())
    if not values and not problems:
        return Row(name, SKIPPED, "nothing to check here", check.text, ())
    judged = Judged("see below", check.text)
    if values:
        try:
            judged = check.judge(values, here)
        except Exception as error:  # as with a look
            problems.append(Problem(None, explained(error), UNPLANNED, rule=ENDS))
    problems += judged.problems
    statuses = {problem.status for problem in problems}
    status = FAILED if FAILED in statuses else WARNING if statuses else OK
    return Row(name, status, judged.value, judged.rule, tuple(problems))
