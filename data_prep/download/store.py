"""What of a download is done, and where does it lie? A work folder with frozen settings and a marker a raw shard.

`download.json` holds what must not change; `shards/0000007.json` says that shard 7 was verified, and in which files;
`runs/` holds the raw files. A marker outlives its files, which are removed once their shard is finished.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.download.options import IMG2DATASET, Download
from data_prep.download.raw import Raw
from data_prep.download.runs import QUARANTINED, Advance, Outcome, Run, completed
from data_prep.download.table import Row, Table
from data_prep.files import write_atomic
from data_prep.progress import progress_bar
from data_prep.settings import difference

SETTINGS_NAME, LOCK_NAME = "download.json", "lock"
UNFINISHED = f"{SETTINGS_NAME}.*tmp"  # settings that whoever wrote them was killed at
FOLDERS = ("shards", "runs")


@dataclass(frozen=True)
class Item:
    """One row and what its URL gave: bytes, or the reason why not."""

    row: Row
    content: bytes | None
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Store:
    """The raw shards of one list of URLs; picklable, used by builder and workers alike."""

    work: Path
    table: Table
    options: Download

    def __len__(self) -> int:
        return -(-len(self.table) // self.options.raw_shard_size)

    def span(self, number: int) -> tuple[int, int]:
        """(first row, number of rows) of a raw shard."""
        first = number * self.options.raw_shard_size
        return first, min(self.options.raw_shard_size, len(self.table) - first)

    def claim(self) -> None:
        """Make the work folder ours; ValueError when it was begun with another list or shard size."""
        frozen = {
            "rows": self.table.identity,
            "num_rows": len(self.table),
            "raw_shard_size": self.options.raw_shard_size,
            "img2dataset": IMG2DATASET,
        }
        self.work.mkdir(parents=True, exist_ok=True)
        foreign = sorted(entry.name for entry in self.work.iterdir() if not _is_begun(entry))
        if foreign and not (self.work / SETTINGS_NAME).is_file():
            raise FileExistsError(
                f"{self.work} holds {foreign[:3]}, a download needs an empty folder: choose another one"
            )
        with _held(self.work / LOCK_NAME):  # parts of a build begin together
            self._freeze(frozen)
            for folder in FOLDERS:
                (self.work / folder).mkdir(exist_ok=True)

    def _freeze(self, frozen: Mapping[str, Any]) -> None:
        """Write the settings, before anything else is, or compare them with those that are there."""
        path = self.work / SETTINGS_NAME
        if path.is_file():
            there = json.loads(path.read_text(encoding="utf-8"))
            if differing := difference({name: there.get(name) for name in frozen}, frozen):
                raise ValueError(
                    f"{self.work} was begun with other settings or another list ({differing}): a row would land in"
                    " another shard; use the former ones, choose another work folder, or remove that one"
                )
            return
        for leftover in self.work.glob(UNFINISHED):
            leftover.unlink()
        write_atomic(path, json.dumps(frozen, indent=1, sort_keys=True).encode())

    def items(self, first: int, count: int) -> Iterator[Item]:
        """Rows [first, first + count), of one raw shard, with their outcomes, in order; downloaded where not there.

        The raw files stay until `release`. Raises OSError (no space left, an outage, an engine that cannot start).
        The shard is locked from first row to last.
        """
        number = first // self.options.raw_shard_size
        with self._locked(f"{number:07d}"):
            outcome = self._found(number)
            if outcome is None and (first, count) == self.span(number):
                outcome = self._download(_run_name([number]), [number], {number}, _nothing)[number]
            elif outcome is None:  # a part of a shard, to try: it leaves no marker
                folder = self._trial(first, count)
                outcome = completed(Run(folder, self.table, first, count, count), self.options, _nothing)[0]
            yield from self._rows(outcome, first, count)

    def release(self, first: int, count: int) -> None:
        """Remove the raw files of rows [first, first + count), of one raw shard, unless they are to be kept.

        Those of other rows stay. To be called when what was made of these rows is stored, for there is no way back.
        """
        if self.options.keep_raw:
            return
        number = first // self.options.raw_shard_size
        if (first, count) != self.span(number):
            shutil.rmtree(self._trial(first, count), ignore_errors=True)
        elif self._marker(number).is_file():
            with self._locked(f"{number:07d}"):
                self._release(self._marked(number))

    def _trial(self, first: int, count: int) -> Path:
        """Where a part of a raw shard is downloaded."""
        return self.work / "runs" / f"{first // self.options.raw_shard_size:07d}-{first}+{count}"

    def _rows(self, outcome: Outcome, first: int, count: int) -> Iterator[Item]:
        place, end = first, first + count
        for raw in outcome.raws:
            if raw.first + raw.count > first and raw.first < end:
                yield from self._lost(place, raw.first)
                rows = self.table.rows(raw.first, raw.count)
                for number, (row, told) in enumerate(zip(rows, raw.outcomes(), strict=True), start=raw.first):
                    if first <= number < end:
                        yield Item(row, *told)
                place = raw.first + raw.count
        yield from self._lost(place, end)

    def _lost(self, first: int, end: int) -> Iterator[Item]:
        """Rows between the pieces of a raw shard."""
        for row in self.table.rows(first, end - first) if end > first else ():
            yield Item(row, None, QUARANTINED, "img2dataset never came to an end with it")

    def ahead(self, ranges: Iterable[range]) -> None:
        """Download the raw shards that these ranges of rows fill and that are not here, `run_shards` in one run.

        A range that is a part of a raw shard, to try, is left to whoever reads it. Raises as `items` does.
        """
        numbers = {self.span(number): number for number in range(len(self))}
        spans = [(rows.start, len(rows)) for rows in ranges]
        asked = sorted(numbers[span] for span in spans if span in numbers)
        left = {number for number in asked if self._found(number) is None}
        num_rows = sum(self.span(number)[1] for number in asked)
        num_done = num_rows - sum(self.span(number)[1] for number in left)
        with progress_bar(num_rows, "download", "row", done=num_done) as bar:
            for _, group in groupby(asked, lambda number: number // self.options.run_shards):
                together = tuple(group)
                num_here = sum(self.span(number)[1] for number in left.intersection(together))
                if num_here:
                    name = _run_name(together)
                    with self._locked(name):
                        self._download(name, together, left, _bounded(bar, num_done, num_here))
                    num_done += num_here

    def counts(self) -> Counter[str]:
        """Rows by outcome, of every raw shard that was ever verified."""
        total: Counter[str] = Counter()
        for path in sorted((self.work / "shards").glob("*.json")):
            total.update(json.loads(path.read_text(encoding="utf-8"))["counts"])
        return total

    def _download(
        self, name: str, together: Sequence[int], left: Set[int], advance: Advance
    ) -> dict[int, Outcome]:
        """Complete those of the shards `together` that are `left` in the run of this name, and mark them."""
        start, end = together[0], together[-1] + 1
        first = self.span(start)[0]
        count = sum(self.span(end - 1)) - first
        run = Run(self.work / "runs" / name, self.table, first, count, self.options.raw_shard_size)
        settled = {number - start for number in range(start, end) if number not in left}
        run.output.mkdir(parents=True, exist_ok=True)
        for raw in run.raws():
            if raw.number in settled:
                raw.path("_stats.json").touch()  # all that img2dataset looks at
        found = {
            start + number: done for number, done in completed(run, self.options, advance, settled).items()
        }
        for number, outcome in found.items():
            self._mark(number, outcome)
        return found

    def _marker(self, number: int) -> Path:
        return self.work / "shards" / f"{number:07d}.json"

    def _mark(self, number: int, outcome: Outcome) -> None:
        raws = [
            {**asdict(raw), "folder": str(Path(raw.folder).relative_to(self.work))} for raw in outcome.raws
        ]
        sizes = [raw.settle() for raw in outcome.raws]
        content = {"raws": raws, "sizes": sizes, "counts": dict(sorted(outcome.counts.items()))}
        write_atomic(self._marker(number), json.dumps(content, sort_keys=True).encode())

    def _found(self, number: int) -> Outcome | None:
        """What the marker of a shard says, when its files are still there."""
        if not self._marker(number).is_file():
            return None
        outcome = self._marked(number)
        sizes = json.loads(self._marker(number).read_text(encoding="utf-8"))["sizes"]
        if [raw.sizes() for raw in outcome.raws] == sizes:
            return outcome
        for raw in outcome.raws:  # finished with, or damaged since
            raw.remove()
        return None

    def _marked(self, number: int) -> Outcome:
        content = json.loads(self._marker(number).read_text(encoding="utf-8"))
        raws = tuple(Raw(**{**raw, "folder": str(self.work / raw["folder"])}) for raw in content["raws"])
        return Outcome(raws, Counter(content["counts"]))

    def _release(self, outcome: Outcome) -> None:
        """Remove raw files; their run's folder goes with the last of them, unless it is in use."""
        for raw in outcome.raws:
            raw.remove()
        names = {Path(raw.folder).relative_to(self.work / "runs").parts[0] for raw in outcome.raws}
        for folder in (self.work / "runs" / name for name in names):
            if folder.is_dir() and not any(folder.rglob("*.tar")):
                shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with _held(self.work / "shards" / f"{name}.lock"):
            yield


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """One process at a time; another one waits, and the lock dies with its holder."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_begun(entry: Path) -> bool:
    """Whether this may lie in a folder whose settings are not written: whoever began it was killed."""
    is_empty_folder = entry.name in FOLDERS and entry.is_dir() and not any(entry.iterdir())
    return is_empty_folder or entry.name == LOCK_NAME or entry.match(UNFINISHED)


def _run_name(numbers: Sequence[int]) -> str:
    """The folder of a run over these raw shards: the same after an interruption, another one for each part."""
    name, num_shards = f"{numbers[0]:07d}x{len(numbers)}", numbers[-1] - numbers[0] + 1
    if len(numbers) == num_shards:
        return name
    return f"{name}-{hashlib.sha256(repr(tuple(numbers)).encode()).hexdigest()[:8]}"


def _nothing(rows: int) -> None:
    """The build has its own display."""


def _bounded(bar: tqdm, before: int, most: int) -> Advance:
    """Show `before` plus the rows of this run, of which a rerun may count some twice."""

    def advance(rows: int) -> None:
        bar.update(max(0, before + min(rows, most) - bar.n))

    return advance
