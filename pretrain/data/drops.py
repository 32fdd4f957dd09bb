"""How many samples did a run leave out, and are they too many? Right also after a resume."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from data_prep.schema import WHOLE_SHARD, Manifest
from pretrain.appended import Appended
from pretrain.data.drop_list import Cause, Named, Record, records
from pretrain.data.faults import OF_SHARDS, DataError, Dropped, beyond_chance, check_bad_share


class Drops:
    """Counts of one rank by source and reason, from a step on.

    `path`, if given, is the list of this `rank` (drop_list.py); what it tells of `start_step` and later belongs to a
    run that did not get so far, and is removed by `begin`, the rest counted. `manifests` of all sources say how much
    a lost shard holds; one is lost no more, until it is found so again, when `is_whole` says so now of a source and a
    shard's name: another copy mends whatever the reason was.
    `counts` are for telling: they may be of fewer ranks, each of which read more. Judged is what is read from now on.
    Lines for which the disk has no room are kept until it has; that is told, and no reason to end a run.
    """

    def __init__(
        self,
        path: Path | None,
        start_step: int,
        manifests: Mapping[str, Manifest],
        is_whole: Callable[[str, str], bool] = lambda source, shard: False,
        rank: int = 0,
    ) -> None:
        self.counts: dict[str, int] = {}  # "source: reason" -> samples
        self._single: dict[str, int] = {}  # the same, of samples whose shard is there, of this start
        self._lost: dict[tuple[str, str], int] = {}  # source and shard that is not as it was -> samples
        self._manifests, self._path, self._rank, self._start_step = manifests, path, rank, start_step
        self._last = ""
        self._named = Named()
        self._file: Appended | None = None  # from `begin` to `close`
        for record in self._before():
            for cause, count in record.causes().items():
                self._count(cause, count)
            if record.sample is not None:
                self._named.add(record.sample)
                self._last = str(record.sample)
        for place in [place for place in self._lost if is_whole(*place)]:
            del self._lost[place]

    def begin(self) -> None:
        """The run goes on from its step: what a later one had told is gone."""
        if self._path is not None:
            kept = "".join(record.text() for record in self._before())
            self._file = Appended(self._path, whole=kept.encode())

    def add(self, step: int, dropped: Sequence[Dropped]) -> None:
        """A whole shard counts once, also if it is told at every resume."""
        again: Counter[Cause] = Counter()
        for sample in dropped:
            if sample.index == WHOLE_SHARD and (sample.source, sample.shard) in self._lost:
                continue
            self._count(Cause.of(sample), 1)
            self._last = str(sample)
            if sample.reason not in OF_SHARDS:
                self._single[sample.kind] = self._single.get(sample.kind, 0) + 1
            if self._file is None:
                continue
            if self._named.add(sample):
                self._file.add(Record(step, self._rank, sample, {}).text().encode())
            else:
                again[Cause.of(sample)] += 1
        if again:
            self._file.add(Record(step, self._rank, None, again).text().encode())

    def close(self) -> None:
        """What found no room is written now, or told; nothing is written after it, as another start has the list."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _before(self) -> Iterator[Record]:
        """What the list tells of the steps before the start."""
        found = () if self._path is None else records(self._path)
        return (record for record in found if record.step < self._start_step)

    def _count(self, cause: Cause, count: int) -> None:
        self.counts[cause.kind] = self.counts.get(cause.kind, 0) + count
        place = cause.source, cause.shard
        if cause.shard and place not in self._lost and cause.source in self._manifests:
            shards = self._manifests[cause.source].shards
            self._lost[place] = sum(shard.num_samples for shard in shards if shard.name == cause.shard)

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
