"""How do all rows of some raw shards get a verified outcome? Run, verify, run again, in small pieces, quarantine.

A run works in a folder of its own: `job.json` and `input.parquet` for the engine, `engine.log`, and `out/` with what
img2dataset writes. What is verified is never downloaded again; what is not is removed and is.
"""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.download.options import Download
from data_prep.download.raw import Raw, Unverified, is_outage
from data_prep.download.table import Table
from data_prep.download.watch import DISK, ENDED, LOG_NAME, MEMORY, ROWS_DONE, Allowed, watch
from data_prep.files import write_atomic

NUM_PIECES = 20  # of a shard that fails as a whole; what fails still is quarantined
QUARANTINED = "quarantined"  # the reason of rows that no run could bring to an outcome
_LOG_TAIL = 2000  # characters in an error message
_FULL = ("No space left on device", "Errno 28", "Errno 122")

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Run:
    """Rows [first, first + count) of a table, `size` in a raw shard, downloaded into `folder`."""

    folder: Path
    table: Table
    first: int
    count: int
    size: int

    @property
    def output(self) -> Path:
        """The folder of the raw shards."""
        return self.folder / "out"

    def raws(self) -> list[Raw]:
        """Its raw shards, finished or not."""
        starts = range(0, self.count, self.size)
        return [
            Raw(str(self.output), number, self.first + start, min(self.size, self.count - start))
            for number, start in enumerate(starts)
        ]


@dataclass(frozen=True)
class Outcome:
    """A verified raw shard: its files (several when it went in pieces), and the count of its rows by outcome."""

    raws: tuple[Raw, ...]
    counts: Counter[str]


def completed(
    run: Run, options: Download, advance: Advance, settled: Set[int] = frozenset()
) -> dict[int, Outcome]:
    """The outcome of every raw shard of the run by its number, less those that are `settled` already.

    Raises OSError: no space left; ConnectionError when nearly all rows fail for reasons that pass; ChildProcessError
    when the engine brings nothing about at all.
    """
    run.output.mkdir(parents=True, exist_ok=True)
    found: dict[int, Outcome] = {}
    for attempt in range(options.reruns + 2):
        left = _collect(run, options, found, settled)
        if not left:
            return found
        if attempt > options.reruns:
            break
        ended = _started(run, options, len(left), advance)
        if ended == MEMORY:
            options = replace(options, threads=max(1, options.threads // 2))
        if ended != ENDED or attempt > 0:
            _say(f"download {run.folder.name}: run {attempt + 1} of {options.reruns + 1} {ended}")
    _refuse_outage(left, options)
    for number, (raw, wrong) in left.items():
        _say(f"raw shard {raw.path('.tar')}: {wrong}; trying it in {NUM_PIECES} pieces")
        found[number] = _in_pieces(run, raw, options, advance)
    return found


def _collect(
    run: Run, options: Download, found: dict[int, Outcome], settled: Set[int]
) -> dict[int, tuple[Raw, Unverified]]:
    """Verify what is new; what is left, with the reason, after its files were removed."""
    left = {}
    for raw in run.raws():
        if raw.number in found or raw.number in settled:
            continue
        try:
            counts = raw.verify(run.table.read(raw.first, raw.count, ["url"])["url"].to_pylist())
            if is_outage(counts, options.outage):
                raise Unverified(f"looks like an outage: {dict(counts.most_common(4))}", is_outage=True)
            found[raw.number] = Outcome((raw,), counts)
        except Unverified as wrong:
            raw.remove()
            left[raw.number] = (raw, wrong)
    return left


def _refuse_outage(left: Mapping[int, tuple[Raw, Unverified]], options: Download) -> None:
    """ConnectionError when one of these failed so that it must be tried again another day, not given up."""
    for raw, wrong in left.values():
        if wrong.is_outage:
            raise ConnectionError(
                f"rows {raw.first} to {raw.first + raw.count - 1}: {wrong}, more than outage={options.outage} allows:"
                " the network or the resolver here seems to be down; mend it and run the same command again"
            )


def _started(run: Run, options: Download, num_left: int, advance: Advance) -> str:
    """One run of the engine over whatever has no stats file; how it ended. Raises OSError when the disk is full."""
    _require_space(run, options)
    _write_job(run, options)
    shutil.rmtree(run.output / ROWS_DONE, ignore_errors=True)
    rounds = -(-num_left // options.processes)
    allowed = Allowed(options.stall, rounds * options.shard_deadline, options.run_memory, options.min_free)
    ended = watch(run.folder / "job.json", run.output, allowed, advance)
    if ended == DISK or any(mark in log_tail(run.folder) for mark in _FULL):
        raise _no_space(run, options)
    return ended


def _require_space(run: Run, options: Download) -> None:
    if shutil.disk_usage(run.output).free < options.min_free:
        raise _no_space(run, options)


def _no_space(run: Run, options: Download) -> OSError:
    free = shutil.disk_usage(run.output).free
    return OSError(
        errno.ENOSPC,
        f"no space left in {run.output} ({free / 2**20:,.0f} MiB free, min_free asks for"
        f" {options.min_free / 2**20:,.0f}): free some space and run the same command again, what was verified stays",
    )


def _write_job(run: Run, options: Download) -> None:
    """Input and settings of the engine. The rows are named by number: a caption cannot harm what never sees it."""
    urls = run.table.read(run.first, run.count, ["url"])
    numbers = pa.array(range(run.first, run.first + run.count), pa.int64())
    pq.write_table(urls.append_column("row", numbers), run.folder / "input.parquet")
    policy = asdict(options.policy())
    policy.pop("parsed")
    job = {
        "input": str(run.folder.resolve() / "input.parquet"),
        "output": str(run.output.resolve()),
        "shard_size": run.size,
        "processes": options.processes,
        "threads": options.threads,
        "distributor": options.distributor,
        "policy": policy,
    }
    (run.folder / LOG_NAME).unlink(missing_ok=True)
    write_atomic(run.folder / "job.json", json.dumps(job).encode())


def _in_pieces(run: Run, raw: Raw, options: Download, advance: Advance) -> Outcome:
    """The rows of one raw shard as many small ones, one by one; those that end the engine are quarantined."""
    size = -(-raw.count // NUM_PIECES)
    pieces = Run(run.folder / f"pieces-{raw.number:05d}", run.table, raw.first, raw.count, size)
    pieces.output.mkdir(parents=True, exist_ok=True)
    alone = replace(options, processes=1, distributor="multiprocessing")
    found: dict[int, Outcome] = {}
    hopeless: dict[int, Raw] = {}
    left = _collect(pieces, options, found, set(hopeless))
    while left:
        num_left = len(left)
        _started(pieces, alone, num_left, advance)
        left = _collect(pieces, options, found, set(hopeless))
        _refuse_outage(left, options)
        if left:  # one process takes them in order: the first that is left is the one that it did not survive
            first = min(left)
            hopeless[first], _ = left.pop(first)
            hopeless[first].path("_stats.json").touch()  # img2dataset passes it by
        if not found and (not left or len(hopeless) > 1):
            raise ChildProcessError(
                errno.ECHILD,
                f"img2dataset brings nothing about for rows {raw.first} to {raw.first + raw.count - 1}: see"
                f" {pieces.folder / LOG_NAME}, which ends with: {log_tail(pieces.folder)}",
            )
    counts = sum((outcome.counts for outcome in found.values()), Counter())
    counts[QUARANTINED] += sum(piece.count for piece in hopeless.values())
    return Outcome(tuple(raw for number in sorted(found) for raw in found[number].raws), +counts)


def log_tail(folder: Path) -> str:
    """The end of what the engine said."""
    try:
        with open(folder / LOG_NAME, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - _LOG_TAIL))
            return file.read().decode("utf-8", "replace").strip()
    except FileNotFoundError:
        return ""


def _say(text: str) -> None:
    print(text, file=sys.stderr)
