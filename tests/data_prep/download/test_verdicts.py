"""Does every way in which a server can fail end in its own verdict, and is nothing of img2dataset believed?"""

from __future__ import annotations

import builtins
import hashlib
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_prep.download import downloaded
from data_prep.download.raw import Raw, Unverified
from data_prep.download.store import Store
from data_prep.plan import shard_ranges
from data_prep.samples import Collection, Made
from tests.data_prep.download.lists import describe, quick, rows_of
from tests.data_prep.download.misbehaving import BEHAVIOURS, GOOD, serving

VERDICTS = {  # path on the misbehaving server, or a whole URL -> a sample ("good"), or why it is left out
    "good": "good",
    "trap": "good",
    "good/a b": "good",
    "good/ü": "good",
    "turned": "good",
    "cmyk": "good",
    "png16": "good",
    "gzip": "good",
    "no-length": "good",
    "jpeg-as-html": "good",
    "to-good": "good",
    "to-accents": "good",
    "reset-once": "good",
    "busy-once": "good",
    "busy-senseless": "good",
    "noai-for-others": "good",
    "missing": "http_404",
    "forbidden": "http_403",
    "gone": "http_410",
    "broken": "http_500",
    "busy": "http_503",
    "busy-for-long": "http_503",
    "noai-on-404": "http_404",
    "to-nowhere": "http_302",
    "drip": "timeout",
    "drip-header": "timeout",
    "hang": "timeout",
    "huge": "too_large",
    "endless": "too_large",
    "gzip-bomb": "too_large",
    "tiny": "too_small",
    "reset": "connection",
    "http://127.0.0.1:1/refused": "connection",
    "cut": "incomplete",
    "cut-chunk": "incomplete",
    "short-length": "corrupt",
    "empty": "empty",
    "nothing": "empty",
    "html": "not_an_image",
    "html-as-jpeg": "not_an_image",
    "svg": "not_an_image",
    "garbage": "bad_reply",
    "many-headers": "bad_reply",
    "to-itself": "redirects",
    "to-file": "bad_url",
    "to-data": "bad_url",
    "to-private": "private_address",
    "to-metadata": "private_address",
    "noai": "opted_out",
    "noimageai": "opted_out",
    "noindex": "opted_out",
    "noimageindex": "opted_out",
    "noai-for-us": "opted_out",
    "file:///etc/hostname": "bad_url",
    "data:image/gif;base64,R0lGODlhAQABAAAAACw=": "bad_url",
    "ftp://127.0.0.1/picture.jpg": "bad_url",
    "http:///picture.jpg": "bad_url",
    "http://127.0.0.1:99999/": "bad_url",
    "http://127.0.0.2/": "private_address",
    "http://0x7f000002/": "private_address",
    "http://2130706434/": "private_address",
    "http://[::1]/": "private_address",
    "http://[::ffff:127.0.0.2]/": "private_address",
    "http://10.0.0.1/": "private_address",
    "http://169.254.169.254/latest/meta-data/": "private_address",
}
HASHES = {  # published hashes of a good image -> verdict
    ("sha256", hashlib.sha256(GOOD).hexdigest()): "good",
    ("sha256", hashlib.sha256(GOOD).hexdigest().upper()): "good",
    ("sha256", "0" * 64): "hash_mismatch",
    ("md5", hashlib.md5(GOOD).hexdigest()): "good",
    ("md5", "0" * 32): "hash_mismatch",
}
SHARD = 40  # rows


@dataclass(frozen=True)
class Run:
    """What came of one download of everything above."""

    collection: Collection
    made: dict[str, Made]  # by path or URL, and by hash
    work: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run of the engine over all rows, with its raw shards kept."""
    folder = tmp_path_factory.mktemp("verdicts")
    with serving() as server:
        urls = [url if ":" in url else f"{server.url}/{url}" for url in VERDICTS]
        hashed = [{"url": f"{server.url}/good", name: value} for name, value in HASHES]
        rows = rows_of(folder / "rows", urls + hashed, part_size=31)
        options = quick(raw_shard_size=SHARD, ahead=True, keep_raw=True)
        collection = downloaded(
            rows, folder / "work", options, describe, name="urls", split="train", settings={}
        )
        collection.prepare(shard_ranges(collection, 1))
    items = list(collection.items[:])
    made = dict(zip([*VERDICTS, *HASHES], map(collection.make, items), strict=True))
    return Run(collection, made, folder / "work")


def _verdict(made: Made) -> str:
    assert (made.sample is None) == bool(made.dropped)
    return "good" if made.sample else made.dropped[0].reason


def test_the_server_has_no_behaviour_without_a_verdict() -> None:
    assert not BEHAVIOURS.keys() - VERDICTS.keys()


@pytest.mark.parametrize(("what", "verdict"), [*VERDICTS.items(), *HASHES.items()], ids=str)
def test_every_failure_has_its_verdict(run: Run, what: str, verdict: str) -> None:
    assert _verdict(run.made[what]) == verdict


def test_items_are_the_rows_in_their_order_with_the_bytes_that_were_served(run: Run) -> None:
    items = list(run.collection.items[0 : len(run.collection.items)])
    assert [item.row.key for item in items] == [f"r-{number}" for number in range(len(items))]
    assert items[0].content == GOOD
    assert items[list(VERDICTS).index("turned")].content.startswith(
        b"\xff\xd8"
    )  # raw: turned by finalise alone
    assert items[0].row.caption == 'Picture "0'


def test_slices_are_lazy_and_any_cut_gives_the_same_items(run: Run) -> None:
    items = run.collection.items
    whole = [item.row.key for item in items[:]]
    assert [item.row.key for start in range(0, len(items), 17) for item in items[start : start + 17]] == whole
    assert len(items[5:9]) == 4 and len(items[5:3]) == 0
    assert sum(run.collection.shard_sizes) == len(items) == len(whole)


def test_counts_of_outcomes_add_up_to_the_rows(run: Run) -> None:
    counts = Store(run.work, run.collection.items.store.table, run.collection.items.store.options).counts()
    assert counts.total() == len(VERDICTS) + len(HASHES)
    assert counts["opted_out"] == 5 and counts["timeout"] == 3
    assert sum(Counter(map(_verdict, run.made.values())).values()) == counts.total()


def test_a_sample_tells_where_it_came_from(run: Run) -> None:
    sample = run.made["turned"].sample
    assert sample.record["url"].endswith("/turned") and sample.record["source"] == "test"
    assert len(sample.record["phash"]) == 16 and "turned" in sample.record["changed"]
    assert sample.size == (56, 48)  # upright
    assert sample.captions == (f'Picture "{list(VERDICTS).index("turned")}',)


def _lose_a_member(raw: Raw) -> None:
    _rewrite(raw, lambda names: names[2:])


def _lose_all_members(raw: Raw) -> None:
    _rewrite(raw, lambda names: [])


def _repeat_nothing_but_swap_bytes(raw: Raw) -> None:
    content = raw.path(".tar").read_bytes()
    assert GOOD in content
    raw.path(".tar").chmod(0o644)
    raw.path(".tar").write_bytes(content.replace(GOOD, GOOD[:-1] + b"\0", 1))


def _cut_the_tar(raw: Raw) -> None:
    content = raw.path(".tar").read_bytes()
    raw.path(".tar").write_bytes(content[: len(content) // 2])


def _lose_the_parquet(raw: Raw) -> None:
    raw.path(".parquet").write_bytes(b"PAR1")


def _lose_rows(raw: Raw) -> None:
    table = pq.read_table(raw.path(".parquet"))
    pq.write_table(table.slice(1), raw.path(".parquet"))


def _lose_a_status(raw: Raw) -> None:
    table = pq.read_table(raw.path(".parquet"))
    statuses = [None, *table["status"].to_pylist()[1:]]
    pq.write_table(
        table.set_column(table.column_names.index("status"), "status", [statuses]), raw.path(".parquet")
    )


def _lose_the_stats(raw: Raw) -> None:
    raw.path("_stats.json").unlink()


DAMAGES = (
    _lose_a_member,
    _lose_all_members,
    _repeat_nothing_but_swap_bytes,
    _cut_the_tar,
    _lose_the_parquet,
    _lose_rows,
    _lose_a_status,
    _lose_the_stats,
)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_a_raw_shard_that_lacks_anything_is_not_verified(
    run: Run, damage: Callable[[Raw], None], tmp_path: Path
) -> None:
    raw, urls = _copied(run, tmp_path)
    assert raw.verify(urls).total() == SHARD
    damage(raw)
    with pytest.raises(Unverified):
        raw.verify(urls)


def test_a_raw_shard_of_other_addresses_is_not_verified(run: Run, tmp_path: Path) -> None:
    raw, urls = _copied(run, tmp_path)
    with pytest.raises(Unverified, match="other ones"):
        raw.verify([*urls[1:], urls[0]])


def _copied(run: Run, folder: Path) -> tuple[Raw, list[str]]:
    out = next(run.work.glob("runs/*/out"))
    shutil.copytree(out, folder / "out")
    urls = [item.row.url for item in run.collection.items[:SHARD]]
    return Raw(str(folder / "out"), 0, 0, SHARD), urls


def _rewrite(raw: Raw, choose: Callable[[list[str]], list[str]]) -> None:
    path = raw.path(".tar")
    former = path.rename(path.with_suffix(".old"))
    with tarfile.open(former) as old, tarfile.open(path, "w") as new:
        for name in choose(old.getnames()):
            new.addfile(old.getmember(name), old.extractfile(name))


def test_the_same_folder_refuses_another_shard_size_and_another_list(run: Run, tmp_path: Path) -> None:
    store = run.collection.items.store
    with pytest.raises(ValueError, match="raw_shard_size: 40 there, 41 asked"):
        replace(store, options=quick(raw_shard_size=41)).claim()
    with pytest.raises(ValueError, match="another list"):
        replace(store, table=replace(store.table, identity="0" * 64)).claim()
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"mine\.txt"):
        replace(store, work=tmp_path).claim()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


class _Killed(BaseException):
    """What no code under test catches."""


def test_a_work_folder_whose_first_seconds_were_killed_can_be_gone_on_with(run: Run, tmp_path: Path) -> None:
    store = replace(run.collection.items.store, work=tmp_path / "work")
    num_kills = 0
    for steps in range(12):
        for folders in ([], ["shards"], ["shards", "runs"]):  # as earlier versions may have left it
            shutil.rmtree(store.work, ignore_errors=True)
            for name in folders:
                (store.work / name).mkdir(parents=True)
            with pytest.MonkeyPatch.context() as patch:
                _kill_after(steps, patch)
                try:
                    store.claim()
                except _Killed:
                    num_kills += 1
            store.claim()
            assert {path.name for path in store.work.iterdir()} == {"download.json", "lock", "runs", "shards"}
    assert num_kills > 15


def _kill_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Die before something is done to the file system for the time after `steps` times."""
    left = [steps]

    def mortal(act: Callable[..., Any]) -> Callable[..., Any]:
        def do(*words: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise _Killed
            return act(*words, **named)

        return do

    for module, name in ((os, "mkdir"), (os, "replace"), (os, "unlink"), (builtins, "open")):
        patch.setattr(module, name, mortal(getattr(module, name)))


def test_other_tries_of_the_same_list_are_the_same_data_set(run: Run) -> None:
    store = run.collection.items.store
    again = replace(store, options=replace(store.options, threads=3, timeout=1.0, ahead=False))
    again.claim()
    assert len(again) == len(store)
