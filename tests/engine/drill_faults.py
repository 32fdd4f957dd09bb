"""What can befall one rank of the drill? Each fault is installed in a forked rank before it trains."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import pretrain.train
from data_prep import stores as builders_stores
from pretrain import resume
from pretrain.checkpoint import stores
from pretrain.data import store
from pretrain.data.batch import Batch
from pretrain.data.loader import Loader
from tests.paths import ROOT

PACKAGE = str(ROOT / "pretrain")
SAVING = str(ROOT / "pretrain" / "checkpoint")  # of it
START = "start"  # the calls of PACKAGE before a start has its first batch

DISK_BYTES = 64 * 2**20  # of a disk that holds the checkpoints of a run, and no more than that

Fault = Callable[[], None]


def kill_at_call(number: int, where: str, batch: int) -> Fault:
    """SIGKILL at the so-manieth call of a function in files that begin so, in any thread, from the so-manieth batch
    of the start on: Python is slow while calls are counted. For batch 0 before the first batch, from the start on.
    """

    def install() -> None:
        count = 0

        def profile(frame: FrameType, event: str, argument: object) -> None:
            nonlocal count
            if event == "call" and frame.f_code.co_filename.startswith(where):
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        if batch:
            at_batch(batch, lambda: _follow(profile))
            return
        at_batch(1, lambda: os.kill(os.getpid(), signal.SIGKILL))
        _follow(profile)

    return install


def _follow(profile: Callable[[FrameType, str, object], None] | None) -> None:
    threading.setprofile(profile)
    sys.setprofile(profile)


def count_calls(path: Path) -> Fault:
    """Leaves the numbers of calls that `kill_at_call` may choose from in a file, when the run has ended."""

    def install() -> None:
        counts = dict.fromkeys((PACKAGE, SAVING, START), 0)

        def starting(frame: FrameType, event: str, argument: object) -> None:
            counts[START] += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

        def profile(frame: FrameType, event: str, argument: object) -> None:
            for where in (PACKAGE, SAVING) if event == "call" else ():
                counts[where] += frame.f_code.co_filename.startswith(where)

        at_batch(1, lambda: _follow(profile))
        _follow(starting)
        train = pretrain.train.train

        def counted(*arguments: Any) -> None:
            train(*arguments)
            _follow(None)
            path.write_text(json.dumps(counts))

        pretrain.train.train = counted

    return install


def at_batch(number: int, work: Callable[[], object]) -> None:
    """`work` is done when the rank gets the so-manieth batch of this start."""
    own, count = Loader.__next__, 0

    def following(loader: Loader) -> Batch:
        nonlocal count
        batch = own(loader)
        count += 1
        if count == number:
            work()
        return batch

    Loader.__next__ = following


def in_batch(number: int, work: Callable[[Batch], Batch]) -> Fault:
    """`work` is done to the batch of this number in the run's order, whenever the rank gets it."""

    def install() -> None:
        own = Loader.__next__

        def changed(loader: Loader) -> Batch:
            batch = own(loader)
            return work(batch) if int(batch.position[0]) // loader._steps.run.batch == number else batch

        Loader.__next__ = changed

    return install


def patient(seconds: float = 0.0) -> Callable[[Batch], Batch]:
    """From this batch on a store that fails is given up after so many seconds, 0: as usual.

    No test is as impatient from its start: the first answer of a store takes seconds on a loaded machine.
    """
    usual = stores.PATIENCE, builders_stores.PATIENCE

    def change(batch: Batch) -> Batch:
        stores.PATIENCE, builders_stores.PATIENCE = (seconds, seconds) if seconds else usual
        return batch

    return change


def without(batches: set[int]) -> Fault:
    """The run does without these batches from the beginning."""

    def install() -> None:
        own = resume.batches_left_out
        resume.batches_left_out = lambda *arguments: own(*arguments) | batches

    return install


def both(*faults: Fault) -> Fault:
    return lambda: [fault() for fault in faults] and None


def poison(batch: Batch) -> Batch:
    """A NaN where the decoder reads where the views lie."""
    return dataclasses.replace(batch, boxes=torch.full_like(batch.boxes, torch.nan))


def lose_weights_once(step: int) -> Fault:
    """The student is NaN after it has made this step for the first time; a fault of all ranks at once."""

    def install() -> None:
        from pretrain.engine import Engine

        own, is_first = Engine.step, True

        def changed(engine: Engine, *arguments: Any, **options: Any) -> Any:
            nonlocal is_first
            losses = own(engine, *arguments, **options)
            if is_first and engine.steps_done == step:
                is_first = False
                for weights in engine.owned.masters().values():
                    weights.fill_(torch.nan)
                engine.owned.publish()
            return losses

        Engine.step = changed

    return install


def poisoned_in(number: int) -> Fault:
    """The batch of this number is bad whenever the rank gets it."""
    return in_batch(number, poison)


@contextmanager
def small_disk(folder: Path) -> Iterator[str]:
    """A disk of DISK_BYTES at `folder`; gives why there is none, or ""."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        yield done.stderr.strip()
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path) -> Callable[[Batch], Batch]:
    """Somebody else fills the disk when the rank gets the batch."""

    def change(batch: Batch) -> Batch:
        with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
            for size in (2**16, 1):
                with suppress(OSError):
                    while file.write(bytes(size)):
                        pass
        return batch

    return change


def free(disk: Path) -> Callable[[Batch], Batch]:
    """There is room again when the rank gets the batch."""

    def change(batch: Batch) -> Batch:
        (disk / "filler").unlink()
        return batch

    return change


def at_the_start(number: int) -> Fault:
    """The rank sends itself a signal before the first collective call."""

    def install() -> None:
        own = pretrain.train.resolve_config

        def changed(*arguments: Any) -> Any:
            os.kill(os.getpid(), number)
            return own(*arguments)

        pretrain.train.resolve_config = changed

    return install


def data_refused(url: str) -> Fault:
    """The rank's data lie at an address where nobody takes connections."""

    def install() -> None:
        store.REFUSED_AT_START = 0.1
        own = pretrain.train.open_loader

        def changed(run: Any, paths: Any, *arguments: Any, **options: Any) -> Loader:
            away = dataclasses.replace(paths, data=dict.fromkeys(paths.data, url))
            return own(run, away, *arguments, **options)

        pretrain.train.open_loader = changed

    return install


def broken(batch: Batch) -> Batch:
    """As a GPU with broken memory fails."""
    raise RuntimeError("CUDA error: uncorrectable ECC error encountered")


def signalled(number: int) -> Callable[[Batch], Batch]:
    """The rank sends itself a signal when it gets the batch."""

    def send(batch: Batch) -> Batch:
        os.kill(os.getpid(), number)
        return batch

    return send


def asked_with_workers(batch: int) -> Fault:
    """SIGTERM to the rank and all that it has started, as a queue sends it, when the rank gets the batch."""

    def send(given: Batch) -> Batch:
        os.system(f"kill -{int(signal.SIGTERM)} 0")
        return given

    return both(os.setpgrp, in_batch(batch, send))
