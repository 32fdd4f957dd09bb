"""How is a checkpoint written while training goes on?

A thread of every rank copies what the rank owns while the next step makes its gradient, then writes the copy, reads
it again and tells the first rank's thread what it wrote, which publishes the checkpoint when all have told. They talk
through the key-value store of the process group, never by collective calls, which are the training's.
"""

from __future__ import annotations

import errno
import json
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_prep.claim import ClaimLost, Require, unclaimed
from pretrain import intact
from pretrain.checkpoint.names import folder_in, step_name, steps_in
from pretrain.checkpoint.snapshot import Snapshot, Trainable
from pretrain.checkpoint.store import Content, put
from pretrain.checkpoint.stores import store_at
from pretrain.collectives import from_first_rank, rank, world_size
from pretrain.facts import DataFacts
from pretrain.place import Place, is_url
from pretrain.retries import is_passing

SPARE_BYTES = 16 * 2**20  # for the small files
MOST_NEEDED = 2  # checkpoints that are kept beside the others, since the evidence of refused steps needs them
PATIENCE = 3600.0  # seconds that one rank's thread waits for another's
LONGEST_PAUSE = 0.5  # seconds between two looks at what others have told


class Lasting(OSError):
    """What failed would fail again: something is missing, forbidden, or a fault of ours."""


KINDS: dict[str, type[OSError]] = {"lost": ClaimLost, "lasting": Lasting, "passing": OSError}


class Saver:
    """Writes the checkpoints of an engine to a place and deletes old ones; one save is under way at a time.

    `place` holds one folder a checkpoint: a folder on a file system that all ranks see, or a URL. Step 0 is kept,
    from which evaluation tells what pre-training changed, with the newest `run.keep_last` and, where
    `run.keep_every` is not 0, every checkpoint whose step is a multiple of it. All ranks make one, and call `save`
    and `finish` alike; `require` raises ClaimLost once another process has taken the place over, and all ranks have
    `is_lost` then, each when its thread hears of it. `given_up` tells steps of checkpoints from which the run will
    not go on: they are not counted as kept; `needed` steps that are kept all the same, MOST_NEEDED of them, the first
    first. `beside` hears what the thread does, "" while it waits for others: so that of several the one is known that
    hangs. ValueError for a URL that nothing here opens; OSError when the place cannot be used.
    """

    def __init__(
        self,
        engine: Trainable,
        place: Place,
        facts: DataFacts,
        tokenizer: Path | None,
        require: Require = unclaimed,
        given_up: Callable[[], Collection[int]] = set,
        needed: Callable[[], Sequence[int]] = list,
        beside: Callable[[str], None] = lambda doing: None,
    ) -> None:
        self._engine, self.place, self._require = engine, place, require
        self._store, self._beside = store_at(place), beside
        self._given_up, self._needed = given_up, needed
        from_first_rank(self._store.tidy)
        self._run_token = from_first_rank(lambda: secrets.token_hex(4))
        self._snapshot = Snapshot(engine, facts, tokenizer)
        self._board = dist.distributed_c10d._get_default_store()
        self._attempts = 0
        self._thread: threading.Thread | None = None
        self._problem: str | None = None  # of the last save that ended
        self._kind = ""  # of that problem: a key of KINDS
        self.is_lost = False  # the place, to another process: nothing of this run would ever be saved again
        self.saved_step: int | None = None  # of the newest checkpoint that this process wrote, or restored
        self._news: list[str] = []

    def save(self, wait: bool = False) -> None:
        """Begins the checkpoint of the engine's present step; all ranks call it.

        It returns when training may go on. What became of it `poll` tells, with no error that ends the run; with
        `wait` this returns when the checkpoint is there, or raises OSError as `finish` does.
        """
        if self._thread is not None and self._thread.is_alive():
            begun = time.monotonic()
            self._thread.join()
            self._news.append(
                f"WAITED {time.monotonic() - begun:.1f} s for the checkpoint before: it takes longer than save_every "
                "steps do; raise save_every or name a faster place"
            )
        files = self._snapshot.take()
        self._attempts += 1
        attempt = f"{self._run_token}{self._attempts}"
        self._thread = threading.Thread(
            target=self._write, args=(self._engine.steps_done, attempt, files), name="checkpoint", daemon=True
        )
        self._thread.start()
        if wait:
            self.finish()

    @property
    def room(self) -> int:
        """Bytes that the next checkpoint takes on a disk, with those of small files; behind a URL these alone."""
        return SPARE_BYTES + (0 if is_url(self.place) else self._snapshot.num_bytes)

    def poll(self) -> list[str]:
        """Lines to say about saves that ended since the last call; on the first rank, the others have none."""
        told, self._news = self._news, []
        return told if rank() == 0 else []

    def finish(self) -> None:
        """Returns when no save is under way; OSError on all ranks when the last one failed, Lasting where the next
        would fail alike, ClaimLost once the place is another process's.
        """
        if self._thread is not None:
            self._thread.join()
        dist.barrier()  # with the first rank goes the store through which the threads of the others still hear
        if self._problem is not None:
            raise KINDS[self._kind](self._problem)

    def _write(self, step: int, attempt: str, files: dict[str, Content]) -> None:
        """The thread: what became of the attempt, for `poll` and `finish`."""
        begun, folder = time.monotonic(), folder_in(self.place, step)
        tried = _tried(lambda: self._attempt(step_name(step), attempt, files))
        error = tried["error"]
        self._kind = tried["kind"]
        if self._kind == "lost":
            self._problem, self.is_lost = f"checkpoint {folder} was not written: {error}", True
            return
        self._problem = error and (
            f"checkpoint {folder} could not be written ({error}); earlier ones are untouched: free space there, mend "
            "the place, or name another"
        )
        if error:
            self._news.append(f"NOT SAVED: {self._problem}; the next one is tried as usual")
            if rank() == 0:
                _tried(lambda: self._store.give_up(step_name(step), attempt))
            return
        self._news.append(f"saved {folder} in {time.monotonic() - begun:.1f} s beside training")
        self.saved_step = step
        if rank() != 0:
            return
        with self._busy("deletes old checkpoints"):
            left = _tried(lambda: self._prune(step))["error"]
        if left:
            self._news.append(f"NOT DELETED: old checkpoints in {self.place}: {left}")

    def _attempt(self, name: str, attempt: str, files: dict[str, Content]) -> None:
        """OSError on all ranks when any of them fails."""
        with self._busy(f"copies its part of {name}"):
            copied = _tried(self._snapshot.copy)  # what went wrong is told where the others look for it
        self._agreed(f"{attempt}/begun", lambda: self._make_room(name, attempt))
        with self._busy(f"writes its part of {name}"):
            told = copied if copied["error"] else _tried(lambda: self._put_all(name, attempt, files))
        self._tell(f"{attempt}/rank_{rank()}", told)
        self._agreed(f"{attempt}/ended", lambda: self._publish(name, attempt))

    @contextmanager
    def _busy(self, doing: str) -> Iterator[None]:
        self._beside(doing)
        try:
            yield
        finally:
            self._beside("")

    def _make_room(self, name: str, attempt: str) -> None:
        with self._busy(f"makes room for {name}"):
            self._require()
            free, needed = self._store.room(), self._snapshot.num_bytes + SPARE_BYTES
            if free is not None and free < needed:
                raise OSError(
                    errno.ENOSPC, f"{free / 2**20:.0f} MiB are free, it needs {needed / 2**20:.0f} MiB"
                )
            self._store.begin(name, attempt)

    def _put_all(self, name: str, attempt: str, files: dict[str, Content]) -> intact.Digests:
        partial = self._store.unfinished(name, attempt)
        return {file: put(partial, file, content) for file, content in files.items()}

    def _publish(self, name: str, attempt: str) -> None:
        """OSError with what any rank has failed by."""
        together: intact.Digests = {}
        for index in range(world_size()):
            told = self._heard(f"{attempt}/rank_{index}")
            if told["error"]:
                raise KINDS[told["kind"]](f"rank {index}: {told['error']}")
            together |= told["value"]
        with self._busy(f"publishes {name}"):
            self._require()
            self._store.publish(name, attempt, together)

    def _prune(self, newest: int) -> None:
        """Deletes what is older than the checkpoints that are kept, of which only whole ones that are not given up
        count, and not needed.
        """
        self._require()
        run, num_kept, gone, old = self._engine.run, 0, self._given_up(), list[int]()
        for step in sorted((s for s in steps_in(self.place) if 0 < s <= newest), reverse=True):
            is_wanted = num_kept < run.keep_last and step not in gone
            if is_wanted and self._store.child(step_name(step)).problem(hashes=False) is None:
                num_kept += 1
            elif not run.keep_every or step % run.keep_every:
                old.append(step)
        needed = [step for step in self._needed() if step in old][:MOST_NEEDED] if old else []
        for step in set(old) - set(needed):
            self._store.remove(step_name(step))

    def _agreed(self, key: str, work: Callable[[], None]) -> None:
        """The first rank does `work`, the others wait for it; OSError on all of them when it fails."""
        if rank() == 0:
            self._tell(key, _tried(work))
        heard = self._heard(key)
        if heard["error"]:
            raise KINDS[heard["kind"]](heard["error"])

    def _tell(self, key: str, told: dict[str, Any]) -> None:
        self._board.set(f"checkpoint/{key}", json.dumps(told))

    def _heard(self, key: str) -> dict[str, Any]:
        """What another rank's thread tells, when it does."""
        key, begun, pause = f"checkpoint/{key}", time.monotonic(), 0.002
        while not self._board.check([key]):  # not `wait`, during which no other thread may use the store
            if time.monotonic() - begun > PATIENCE:
                return _told(OSError(f"a rank did not answer within {PATIENCE:g} s"))
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        return json.loads(self._board.get(key))


def _tried(work: Callable[[], Any]) -> dict[str, Any]:
    """{"error", "kind", "value"} of work in a thread, whose exceptions nobody would see: every one is told."""
    try:
        return {"error": None, "kind": "", "value": work()}
    except Exception as error:
        return _told(error)


def _told(error: Exception) -> dict[str, Any]:
    if isinstance(error, ClaimLost):
        kind = "lost"
    else:
        kind = "passing" if is_passing(error) and not isinstance(error, Lasting) else "lasting"
    return {"error": str(error) or repr(error), "kind": kind, "value": None}
