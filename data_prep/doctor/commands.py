"""Which commands look after finished data sets? `check`, `stats`, `leakage`, `diff` and `repair`, for __main__."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from data_prep.check import REMEDY, Report, examine
from data_prep.doctor import diff as differences
from data_prep.doctor import leakage
from data_prep.doctor.drops import Verdict, judge, read_drops
from data_prep.doctor.evaluation import read_evaluation
from data_prep.doctor.finished import BadDataSet, data_sets, reached
from data_prep.doctor.published import beside_papers, table
from data_prep.doctor.repair import Job, damage_of, repair
from data_prep.doctor.stats_page import stats_page
from data_prep.doctor.tell import as_text
from data_prep.rows.inputs import split_path
from data_prep.schema import Manifest
from data_prep.stats import as_record, describe

SHOWN = 20  # faults of a data set, or verdicts, in the terminal; all are in the JSON file
NAMED = 1000  # bad shards of a data set that are named there

Where = Annotated[str, tyro.conf.Positional]  # a data set or the folder above its splits, on disk or a URL
Json = Annotated[str, tyro.conf.arg(name="json")]


@dataclass(frozen=True)
class Check:
    """Read every byte of a data set again; all bad shards are named, and the exit code is 1 when there are any."""

    folder: Where  # a data set, or the folder above its splits; a path or a URL
    workers: int = 2  # processes
    first: bool = False  # stop at the first bad shard
    dropped: tuple[str, ...] = ()  # lists of a training run, dropped-rank_*.jsonl: judge those samples alone
    report: Json = ""  # file or URL for the whole result

    def run(self) -> int:
        """1 when anything is wrong."""
        _require_folders(self.report)
        places = data_sets(reached(self.folder))
        if self.dropped:
            verdicts = judge(read_drops(self.dropped), places)
            _write_json(self.report, {"verdicts": [verdict.record() for verdict in verdicts]})
            return _tell_verdicts(verdicts)
        reports = []
        for place in places:
            report = examine(place, self.workers, self.first)
            _tell_report(report)
            reports.append(report)
            if self.first and report.faults:
                break
        _write_json(self.report, {"data_sets": [report.record() for report in reports]})
        return int(any(report.faults for report in reports))


@dataclass(frozen=True)
class Stats:
    """What is in a data set: sizes, captions, languages, tags, categories, duplicates, beside the papers' counts."""

    folder: Where  # a data set, or the folder above its splits; a path or a URL
    workers: int = 2  # processes
    languages: int = 5000  # captions whose language is estimated, spread over all shards; 0 for none
    distance: int = 4  # bits of 64 within which two pictures look alike; -1 looks for no such pairs
    report: Json = ""  # file or URL for the whole result
    page: str = ""  # HTML file or URL with pictures and histograms

    def __post_init__(self) -> None:
        if not -1 <= self.distance <= 16:
            raise ValueError(f"distance={self.distance} must lie in [-1, 16], of 64 bits: pass --distance 4")
        if self.languages < 0:
            raise ValueError(f"languages={self.languages} is a number of captions: pass --languages 5000")

    def run(self) -> int:
        """Describe the data set, or each one below the folder."""
        _require_folders(self.report, self.page)
        descriptions = []
        for place in data_sets(reached(self.folder)):
            distance = None if self.distance < 0 else self.distance
            descriptions.append(describe(place, self.workers, self.languages, distance))
            print(as_text(descriptions[-1]))
        rows = beside_papers([(one.manifest, one.num_classes) for one in descriptions])
        if rows:
            print(table(rows))
        papers = [{**asdict(row), "share": row.share} for row in rows]
        _write_json(
            self.report, {"data_sets": [as_record(one) for one in descriptions], "beside_papers": papers}
        )
        _write_page(self.page, lambda: stats_page(descriptions, rows))
        return 0


@dataclass(frozen=True)
class Leakage:
    """Which training samples show a picture of an evaluation set, also encoded again, resized, cut or mirrored?

    The exit code is 1 when there are any."""

    folder: Where  # the training set, or the folder above its splits; a path or a URL
    against: tuple[str, ...]  # evaluation sets: data sets, or folders of images; paths or URLs
    workers: int = 2  # processes
    distance: int = 6  # bits of 64 within which two pictures are taken for the same
    report: Json = ""  # file or URL for the whole result, with the keys that training may exclude
    page: str = ""  # HTML file or URL with pairs side by side

    def __post_init__(self) -> None:
        if not 0 <= self.distance <= 16:
            raise ValueError(f"distance={self.distance} must lie in [0, 16], of 64 bits: pass --distance 6")

    def run(self) -> int:
        """1 when a sample was found."""
        _require_folders(self.report, self.page)
        places = data_sets(reached(self.folder))
        evaluation = read_evaluation([reached(text) for text in self.against], self.workers)
        found = [leakage.find_leakage(place, evaluation, self.distance, self.workers) for place in places]
        print(leakage.as_text(found, evaluation, self.distance))
        if self.report:
            _write_json(self.report, leakage.as_record(found, evaluation, self.distance))
        _write_page(self.page, lambda: leakage.leakage_page(found, evaluation, self.distance))
        return int(any(one.hits for one in found))


@dataclass(frozen=True)
class Diff:
    """How does the second data set differ from the first? 0 the same, 1 they differ, 2 trouble, as diff(1)."""

    first: Where
    second: Where
    samples: bool = False  # compare the samples of the shards that differ, by key
    workers: int = 2  # processes
    report: Json = ""  # file or URL for the whole result

    def run(self) -> int:
        """As diff(1)."""
        try:
            found = differences.diff(reached(self.first), reached(self.second), self.samples, self.workers)
            _write_json(self.report, found.record())
        except (BadDataSet, ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(differences.as_text(found))
        return int(not found.is_same)


@dataclass(frozen=True)
class Mirror:
    """Copy what is bad from another place of the same data set."""

    place: Annotated[str, tyro.conf.arg(name="from")]  # a path or a URL


def repair_all(jobs: Sequence[Job], workers: int) -> int:
    """Mend some data sets and tell it; 1 when anything could not be mended."""
    num_failed = 0
    for job in jobs:
        damage = damage_of(job.place, workers)
        if damage.is_none:
            print(f"{job.place}: nothing to repair, every shard has the bytes of the manifest")
            continue
        done = repair(job.place, damage, job.remake, job.tokenizer)
        for name in done.shards:
            print(f"{job.place}/{name}: mended, it has the sha256 of the manifest")
        for name in done.indices:
            print(f"{job.place}/{name}: its index was made again")
        if done.has_new_tokenizer:
            print(f"{job.place}: its tokenizer was made again")
        for name, why in done.failed:
            print(f"error: {job.place}/{name} is still bad: {why}", file=sys.stderr)
        num_failed += len(done.failed)
    return int(num_failed > 0)


def _tell_report(report: Report) -> None:
    hashes = f"; {report.num_phash:,} perceptual hashes agree" if report.num_phash else ""
    if not report.faults:
        print(f"{report.place}: {summary(report.manifest)}; every byte is as built{hashes}")
        return
    for fault in report.faults[:SHOWN]:
        print(f"{report.place}/{fault.where}: {fault.problem}", file=sys.stderr)
    more = len(report.faults) + report.num_more - SHOWN
    if more > 0:
        print(f"... and {more:,} more faults: pass --json FILE for a list", file=sys.stderr)
    bad = report.bad_shards
    shown = ", ".join(bad[:NAMED]) + (", ..." if len(bad) > NAMED else "")
    extent = "" if report.is_complete else " so far (stopped at the first)"
    print(
        f"error: {report.place}: {len(bad)} of {len(report.manifest.shards)} shards are bad{extent}"
        f"{': ' + shown if bad else ''}: {REMEDY}",
        file=sys.stderr,
    )


def _tell_verdicts(verdicts: Sequence[Verdict]) -> int:
    num_bad = sum(verdict.is_bad for verdict in verdicts)
    for verdict in verdicts[:SHOWN]:
        index = "the shard" if verdict.index < 0 else f"sample {verdict.index} {verdict.key}".rstrip()
        print(
            f"{verdict.place or verdict.source}/{verdict.shard}: {index}: {verdict.found}\n    ({verdict.said})"
        )
    if len(verdicts) > SHOWN:
        print(f"... and {len(verdicts) - SHOWN:,} more: pass --json FILE for a list")
    print(f"{num_bad:,} of {len(verdicts):,} that training left out are bad here")
    return int(num_bad > 0)


def summary(manifest: Manifest) -> str:
    """A data set in half a line."""
    left_out = ", ".join(f"{reason} {count:,}" for reason, count in manifest.dropped.items()) or "nothing"
    return f"{manifest.num_samples:,} samples in {len(manifest.shards)} shards, left out: {left_out}"


def _require_folders(*files: str) -> None:
    """FileNotFoundError now, and not after hours, when a report cannot be written."""
    for file in filter(None, files):
        place, _ = split_path(file)
        if place.local is not None and not place.local.is_dir():
            raise FileNotFoundError(f"{file}: there is no folder {place}: make it, or name another file")


def _write_json(file: str, record: dict) -> None:
    if file:
        place, name = split_path(file)
        place.write(name, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))


def _write_page(file: str, draw: Callable[[], str]) -> None:
    if file:
        place, name = split_path(file)
        content = draw().encode("utf-8")
        place.write(name, content)
        print(f"{file}: {len(content) / 2**20:.1f} MiB, open it in a browser")


DOCTOR = {
    "check": Check,
    "stats": Stats,
    "leakage": Leakage,
    "diff": Diff,
}  # name of a command -> its settings, which know how to run()
