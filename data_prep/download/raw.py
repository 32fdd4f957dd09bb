"""Is a raw shard whole, and what does it hold? Every row has a status, and every success its bytes.

A raw shard is what img2dataset leaves for a run of rows: `00007.tar`, `00007.parquet`, `00007_stats.json`. None of
them is believed: it reports success with an empty tar, and exit code 0 on a full disk.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.download.fetch import may_pass

GOOD = "good"  # the count of rows whose bytes are there
_COLUMNS = ["row", "url", "key", "status", "error_message", "sha256"]


class Unverified(Exception):
    """A raw shard that cannot be used; says what is wrong with it, and whether our own network is to blame."""

    def __init__(self, what: str, is_outage: bool = False) -> None:
        super().__init__(what)
        self.is_outage = is_outage


@dataclass(frozen=True)
class Raw:
    """The files of one raw shard: rows [first, first + count) of the list."""

    folder: str
    number: int  # in its folder, as img2dataset counts
    first: int
    count: int

    def path(self, ending: str) -> Path:
        """Its file with this ending: `.tar`, `.parquet`, `_stats.json`."""
        return Path(self.folder) / f"{self.number:05d}{ending}"

    def remove(self) -> None:
        """Remove its files; img2dataset will make them again."""
        for ending in ("_stats.json", ".tar", ".parquet"):  # the commit marker of img2dataset first
            self.path(ending).unlink(missing_ok=True)

    def sizes(self) -> list[int]:
        """Bytes of its tar and parquet, -1 for one that is missing."""
        paths = (self.path(".tar"), self.path(".parquet"))
        return [path.stat().st_size if path.is_file() else -1 for path in paths]

    def settle(self) -> list[int]:
        """Its sizes, once its files would survive a power cut."""
        for ending in (".tar", ".parquet"):
            with open(self.path(ending), "rb") as file:
                os.fsync(file.fileno())
        return self.sizes()

    def verify(self, urls: list[str]) -> Counter[str]:
        """Rows by outcome, GOOD or a reason, when every row of `urls` has one and every byte is there.

        Raises Unverified.
        """
        if not self.path("_stats.json").is_file():
            raise Unverified("it was not finished")
        try:
            records = self._records()
            asked = [(self.first + index, url) for index, url in enumerate(urls)]
            if [(record["row"], record["url"]) for record in records] != asked:
                raise Unverified(f"{len(records)} rows, or other ones, where {self.count} were asked")
            hashes = {name: hashlib.sha256(content).hexdigest() for name, content in self._contents()}
        except (OSError, ValueError, KeyError, pa.ArrowException, tarfile.TarError) as error:
            raise Unverified(f"unreadable: {type(error).__name__}: {error}"[:300]) from error
        wanted = {record["key"]: record["sha256"] for record in records if record["status"] == "success"}
        if hashes != wanted:
            differing = sum(hashes.get(key) != wanted.get(key) for key in hashes.keys() | wanted.keys())
            raise Unverified(f"{differing} images of {len(wanted)} are missing, damaged or unasked for")
        return Counter(_outcome(record)[0] for record in records)

    def outcomes(self) -> Iterator[tuple[bytes | None, str, str]]:
        """(content, "", "") or (None, reason, detail) of its rows, in their order."""
        with open(self.path(".tar"), "rb") as file:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                places = {
                    _key(member): (member.offset_data, member.size) for member in tar if _is_image(member)
                }
            for record in self._records():
                reason, detail = _outcome(record)
                if reason != GOOD:
                    yield None, reason, detail
                    continue
                offset, size = places[record["key"]]
                file.seek(offset)
                yield file.read(size), "", ""

    def _records(self) -> list[dict]:
        table = pq.read_table(self.path(".parquet"), columns=_COLUMNS, use_threads=False).sort_by("row")
        return table.to_pylist()

    def _contents(self) -> Iterator[tuple[str, bytes]]:
        with tarfile.open(self.path(".tar"), mode="r:") as tar:
            for member in tar:
                if _is_image(member):
                    yield _key(member), tar.extractfile(member).read()


def is_outage(counts: Counter[str], limit: float) -> bool:
    """Whether so many rows failed for reasons that pass that our own network, not the list, must be at fault."""
    passing = sum(count for reason, count in counts.items() if may_pass(reason) or reason == "dns")
    return passing > limit * counts.total() and counts.total() >= 20


def _outcome(record: dict) -> tuple[str, str]:
    if record["status"] == "success":
        return GOOD, ""
    if record["status"] not in ("failed_to_download", "failed_to_resize"):
        raise Unverified(f"row {record['row']} has status {record['status']!r}")
    reason, _, detail = (record["error_message"] or "unknown").partition(": ")
    return reason, detail


def _is_image(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.name.endswith(".json")


def _key(member: tarfile.TarInfo) -> str:
    return member.name.partition(".")[0]
