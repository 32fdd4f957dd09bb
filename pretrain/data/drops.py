"""Which samples did a run leave out, at which step? Lines of JSON, right also after a resume."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from data_prep.schema import Manifest, write_atomic
from pretrain.appended import Appended
from pretrain.data.faults import OF_SHARDS, WHOLE_SHARD, DataError, Dropped, beyond_chance, check_bad_share

# Of shards that another copy mends: a whole one is lost no more, until it is found as bad again.
MENDED_BY_A_COPY = ("missing_shard", "truncated_shard", "broken_index", "changed_shard")
NAME = "dropped-rank_{:05d}.jsonl"  # in the folder of a run
TAKEN = ".taken_by_"  # ends, with a rank's number, the name of a list that this rank takes over


class Drops:
    """Counts of one rank by source and reason, from a step on.

    `path`, if given, gets a line for each; what it tells of `start_step` and later belongs to a run that did not get
    so far, and is removed by `begin`, the rest counted. `manifests` of all sources say how much a lost shard holds;
    one is lost no more, until it is found so again, when `is_whole` says so now of a source and a shard's name.
    `counts` are for telling: they may be of fewer ranks, each of which read more. Judged is what is read from now on.
    Lines for which the disk has no room are kept until it has; that is told, and no reason to end a run.
    """

    def __init__(
        self,
        path: Path | None,
        start_step: int,
        manifests: Mapping[str, Manifest],
        is_whole: Callable[[str, str], bool] = lambda source, shard: False,
    ) -> None:
        self.counts: dict[str, int] = {}  # "source: reason" -> samples
        self._single: dict[str, int] = {}  # the same, of samples whose shard is there, of this start
        self._lost: dict[
            tuple[str, str], int
        ] = {}  # source and name of a shard that is not as it was -> samples
        self._manifests, self._path = manifests, path
        self._last = ""
        found = [] if path is None else _lines(path)
        self._kept = [line for line in found if line["step"] < start_step]
        self._file: Appended | None = None  # from `begin` to `close`
        told = [Dropped(*(line[name] for name in Dropped._fields)) for line in self._kept]
        self._tell(told)
        mended = {(one.source, one.shard) for one in told if one.reason in MENDED_BY_A_COPY}
        for place in mended & self._lost.keys():
            if is_whole(*place):
                del self._lost[place]

    def begin(self) -> None:
        """The run goes on from its step: what a later one had told is gone."""
        if self._path is not None:
            self._file = Appended(self._path, whole=_text(self._kept).encode())

    def add(self, step: int, dropped: Sequence[Dropped]) -> None:
        """A whole shard counts once, also if it is told at every resume."""
        dropped = [
            one for one in dropped if one.index != WHOLE_SHARD or (one.source, one.shard) not in self._lost
        ]
        self._tell(dropped)
        for sample in dropped:
            if sample.reason not in OF_SHARDS:
                self._single[sample.kind] = self._single.get(sample.kind, 0) + 1
        if self._file is not None:
            for sample in dropped:
                self._file.add(_text([{"step": step, **sample._asdict()}]).encode())

    def close(self) -> None:
        """What found no room is written now, or told; nothing is written after it, as another start has the list."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _tell(self, dropped: Sequence[Dropped]) -> None:
        for sample in dropped:
            self.counts[sample.kind] = self.counts.get(sample.kind, 0) + 1
            self._last = str(sample)
            is_known = (sample.source, sample.shard) in self._lost or sample.source not in self._manifests
            if sample.reason in OF_SHARDS and not is_known:
                shards = self._manifests[sample.source].shards
                samples = [shard.num_samples for shard in shards if shard.name == sample.shard]
                self._lost[sample.source, sample.shard] = sum(samples)

    def check(self, num_images: int, limit: float) -> None:
        """DataError when single samples are more than `limit` of those read for `num_images` since the start, or the
        shards that were lost hold more than that of a source: one of few thousand shards may go, at any time."""
        check_bad_share(self._single, num_images, limit, self._last, beyond_chance)
        for name, manifest in self._manifests.items():
            lost = {shard: samples for (source, shard), samples in self._lost.items() if source == name}
            if sum(lost.values()) > limit * manifest.num_samples:
                raise DataError(
                    f"{len(lost)} of {len(manifest.shards)} shards of source {name!r} are lost ({', '.join(lost)}; "
                    f"the last: {self._last}), {sum(lost.values())} of {manifest.num_samples} samples: copy them "
                    f"again, or raise max_bad={limit}"
                )


def file_of(folder: Path, rank: int, world: int) -> Path:
    """Where a rank lists its drops in the folder of a run; it takes over the lists of ranks that are no more.

    Such a list is renamed first: should this start be killed before it is removed, another one with so many ranks
    that there is one of this number again finds it taken.
    """
    own = folder / NAME.format(rank)
    for path in folder.glob(NAME.replace("{:05d}", "*[0-9]")):
        number = int(path.stem.rpartition("_")[2])
        if number >= world and number % world == rank:
            path.rename(folder / f"{path.stem}-{time.time_ns()}{TAKEN}{rank}")
    taken = sorted(
        path for path in folder.glob(f"*{TAKEN}*[0-9]") if int(path.suffix[len(TAKEN) :]) % world == rank
    )
    if taken:
        # A start that was killed before it removed a list has told it already: what two lists tell alike counts once.
        told: Counter[str] = Counter()
        for path in (own, *taken):
            told |= Counter(_text([record]) for record in _lines(path))
        write_atomic(own, "".join(told.elements()).encode())
        for path in taken:
            path.unlink()
    return own


def _lines(path: Path) -> list[dict[str, object]]:
    """The records of a file, without those that a crash damaged."""
    found = []
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
