"""Does every rank still get on, and which one does not? Signs of life in OUT/ranks, and the end of a run that hangs.

Each rank writes what it does to a file of its own every few seconds, from a thread. A rank that does not get on for
`timeout` seconds, as all do that wait for one, writes its stacks to OUT/stacks and looks at the others' signs: those
that write none have died or been stopped; else those that are behind the others hang. The first rank that is alive
tells which, with their last steps; all of them end with the exit code LOST. Where all have come equally far, the one
hangs whose thread has been at its part of a checkpoint for long: the others' threads wait for it.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from pretrain.exits import LOST, RankLost
from pretrain.host import host_name

TIMEOUT = 1800.0  # seconds, of the command line's --timeout
FIRST = 3.0  # times the timeout that the first step may take: caches fill, kernels compile
SIGNS = 10  # signs of life in a timeout
MOST_SECONDS = 3.0  # between two of them
MOST_SIGNS = 500  # a second, of all ranks together: a network file system should not notice
FEW = 16  # ranks that write every sign at once, so that the last word of one that dies is exact
LONG = 0.5  # of the timeout: what a thread does beside training for so long may hang
SILENT = 4  # signs missed by a rank that is gone
SIGN_BYTES = 512  # of which no more than a few hundred are used: it is overwritten in place
RANKS, STACKS = "ranks", "stacks"  # folders of a run
REMEDY = "The same command goes on from the last checkpoint"


class Sign(NamedTuple):
    """What a rank last said of itself."""

    rank: int
    host: str
    process: int
    number: int  # of the sign: it grows while the process lives
    entered: int  # things it has begun; all ranks begin the same
    step: int  # accepted steps
    doing: str
    ended: bool  # by itself: it has said why
    beside: str  # what a thread does beside training, other than waiting for others
    beside_seconds: float  # that it has done so

    def told(self) -> str:
        """`rank 3 (host b, process 71) after step 12, while it waits for a batch`."""
        where = f"rank {self.rank} (host {self.host}, process {self.process})"
        beside = f" and, beside that, {self.beside}" if self.beside else ""
        return f"{where} after step {self.step}, while it {self.doing}{beside}"


@contextmanager
def meeting(rank: int, timeout: float) -> Iterator[None]:
    """Around what all ranks do together before a Watchdog is there: ends this process with LOST after `timeout`."""

    def end() -> None:
        print(
            f"\nerror: rank {rank} (host {host_name()}) has waited {timeout:.0f} s for others at the start: a rank "
            f"that does not say so too has died or hangs. {REMEDY}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LOST)

    timer = threading.Timer(timeout, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Watchdog:
    """Use as `with Watchdog(...) as watchdog` around the training of a rank; `at` before all that may hang."""

    def __init__(self, out: Path, rank: int, world: int, timeout: float) -> None:
        self._folder, self._stacks = out / RANKS, out / STACKS
        self._rank, self._world, self._timeout = rank, world, timeout
        self._gap = 0.0 if world <= FEW else world / MOST_SIGNS  # seconds between two signs at least
        self.interval = max(min(timeout / SIGNS, MOST_SECONDS), self._gap)
        self._said = -math.inf  # when the last sign was given
        self._told = 0  # things begun that it told of
        self._number = self._entered = self._step = 0
        self._doing, self._limit = "starts", FIRST * timeout
        self._since = time.monotonic()
        self._beside, self._beside_since = "", self._since
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watchdog:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._rank == 0:  # of more ranks, earlier
            for path in self._folder.glob("rank_*.json"):
                if int(path.stem.removeprefix("rank_")) >= self._world:
                    path.unlink(missing_ok=True)
        (self._stacks / f"rank_{self._rank:05d}.txt").unlink(missing_ok=True)
        self._say()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        self._ended = not isinstance(error, RankLost)
        self._say()

    def at(self, step: int, doing: str, *, times: float = 1.0) -> None:
        """This rank begins something after `step` accepted steps; it may take `times` as long as the timeout."""
        self._limit = times * self._timeout
        self._step, self._doing = step, doing
        self._entered += 1
        self._since = time.monotonic()
        if self._since - self._said >= self._gap:
            self._say()

    def beside(self, doing: str) -> None:
        """A thread of this rank begins something beside training, or, by "", waits for others or ends it."""
        self._beside, self._beside_since = doing, time.monotonic()

    @property
    def here(self) -> str:
        """This rank, and what it does."""
        return self._sign().told()

    def lost(self) -> tuple[str, bool]:
        """Who is gone or behind, and is this the rank to tell it; "" when all are there. Waits for some signs."""
        before = self._signs()
        time.sleep(SILENT * self.interval)
        after = self._signs()
        alive = [sign for sign in after if sign.rank == self._rank or self._is_alive(sign, before)]
        is_teller = min(sign.rank for sign in alive) == self._rank
        if any(sign.ended for sign in after):  # whoever ends by itself says why
            return "", is_teller
        gone = [sign for sign in after if sign not in alive]
        if gone:
            told = "; ".join(sign.told() for sign in gone)
            return f"{told}: gone without a word or stopped", is_teller
        fewest = min(sign.entered for sign in after)
        behind = [sign for sign in after if sign.entered == fewest]
        if len(behind) == len(after):  # also where they wait for a checkpoint
            long = [sign for sign in after if sign.beside and sign.beside_seconds >= LONG * self._timeout]
            behind = long or behind
        if len(behind) == len(after):
            return f"all {self._world} ranks wait for each other: {after[0].told()}", is_teller
        return f"{'; '.join(sign.told() for sign in behind)}: the others wait for it", is_teller

    def _is_alive(self, sign: Sign, before: list[Sign]) -> bool:
        return any(old.rank == sign.rank and old.number != sign.number for old in before)

    def _signs(self) -> list[Sign]:
        """The last sign of every rank that has given one; of this one also where none can be written or read."""
        signs = []
        for number in range(self._world):
            if number == self._rank:
                signs.append(self._sign())
                continue
            try:
                signs.append(Sign(**json.loads(self._path(number).read_text())))
            except (OSError, ValueError, TypeError):
                continue
        return signs

    def _path(self, number: int) -> Path:
        return self._folder / f"rank_{number:05d}.json"

    def _say(self) -> None:
        """Overwrites this rank's sign; what was written outlives the process, also by SIGKILL."""
        with self._lock, suppress(OSError):  # of a full disk the save tells; the run goes on without signs
            self._number += 1
            self._said, self._told = time.monotonic(), self._entered
            try:
                file = os.open(self._path(self._rank), os.O_WRONLY | os.O_CREAT)
            except FileNotFoundError:  # the folder was removed while the run goes on
                self._folder.mkdir(exist_ok=True)
                file = os.open(self._path(self._rank), os.O_WRONLY | os.O_CREAT)
            try:  # closed each time, since that is when a network file system shows it to others
                os.pwrite(file, json.dumps(self._sign()._asdict()).ljust(SIGN_BYTES).encode(), 0)
            finally:
                os.close(file)

    def _sign(self) -> Sign:
        own = (self._number, self._entered, self._step, self._doing, self._ended)
        beside = (self._beside, time.monotonic() - self._beside_since)
        return Sign(self._rank, host_name(), os.getpid(), *own, *beside)

    def _watch(self) -> None:
        while not self._is_over.wait(self._gap or self.interval):
            if self._told < self._entered or time.monotonic() - self._said >= self.interval:
                self._say()
            if time.monotonic() - self._since > self._limit:
                self._end()

    def _end(self) -> None:
        """Stacks, the name of the culprit, and the end of this process, whatever its main thread waits for."""
        entered, limit = self._entered, self._limit
        self._dump()
        has_looked = threading.Event()
        signs = threading.Thread(target=self._keep_saying, args=(has_looked,), daemon=True)
        signs.start()
        told, is_teller = self.lost()
        has_looked.set()
        signs.join()
        if entered != self._entered:
            return  # it went on meanwhile
        if is_teller and told:
            stacks = f"stacks of the ranks that could write them: {self._stacks}"
            print(
                f"\nerror: no progress in {limit:.0f} s (--timeout): {told}; {stacks}. {REMEDY}",
                file=sys.stderr,
            )
            sys.stderr.flush()
        time.sleep((1 if is_teller else 2) * self.interval)  # until it is told
        os._exit(LOST)

    def _keep_saying(self, until: threading.Event) -> None:
        while not until.wait(self.interval):
            self._say()

    def _dump(self) -> None:
        try:
            self._stacks.mkdir(parents=True, exist_ok=True)
            with (self._stacks / f"rank_{self._rank:05d}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"the stacks of rank {self._rank} cannot be written: {error}", file=sys.stderr)
