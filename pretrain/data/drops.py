"""Which samples did a run leave out, at which step? Lines of JSON, right also after a resume."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from data_prep.schema import write_atomic
from pretrain.data.faults import Dropped, check_bad_share

NAME = "dropped-rank_{:05d}.jsonl"  # in the folder of a run


class Drops:
    """Counts of one rank by source and reason, from a step on.

    `path`, if given, gets a line for each; what it tells of `start_step` and later belongs to a run that did not get
    so far, and is removed, the rest counted.
    """

    def __init__(self, path: Path | None, start_step: int) -> None:
        self.counts: dict[str, int] = {}  # "source: reason" -> samples
        self.last: str | None = None
        self._path = path
        if path is None:
            return
        kept = [line for line in _lines([path]) if line["step"] < start_step]
        write_atomic(path, _text(kept).encode())
        self._add(Dropped(*(line[name] for name in Dropped._fields)) for line in kept)

    def add(self, step: int, dropped: Sequence[Dropped]) -> None:
        self._add(dropped)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(_text({"step": step, **sample._asdict()} for sample in dropped))

    def _add(self, dropped: Iterable[Dropped]) -> None:
        for sample in dropped:
            self.counts[sample.kind] = self.counts.get(sample.kind, 0) + 1
            self.last = str(sample)

    def check(self, num_images: int, limit: float) -> None:
        """DataError when they are more than `limit` of all that were read for `num_images`."""
        if self.last is not None:
            check_bad_share(self.counts, num_images, limit, self.last)


def file_of(folder: Path, rank: int, world: int) -> Path:
    """Where a rank lists its drops in the folder of a run; it takes over the lists of ranks that are no more."""
    own = folder / NAME.format(rank)
    numbered = {
        int(path.stem.rpartition("_")[2]): path for path in folder.glob(NAME.replace("{:05d}", "*[0-9]"))
    }
    gone = [path for number, path in sorted(numbered.items()) if number >= world and number % world == rank]
    if gone:
        write_atomic(own, _text(_lines([own, *gone])).encode())
        for path in gone:
            path.unlink()
    return own


def _lines(paths: Sequence[Path]) -> list[dict[str, object]]:
    """The records of some files, without those that a crash damaged."""
    found = []
    for path in paths:
        for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and {"step", *Dropped._fields} <= record.keys():
                found.append(record)
    return found


def _text(records: Iterable[Mapping[str, object]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
