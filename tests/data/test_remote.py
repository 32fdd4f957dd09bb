"""Do data sets behind a URL give the same batches, within their limit of bytes, while the store fails?"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import fsspec
import pytest
from fsspec.implementations.arrow import wrap_exceptions

from data_prep import places, stores
from data_prep.schema import Shard
from pretrain.config import Mixing, Source
from pretrain.data import cache, remote, sources
from pretrain.data.cache import Cache, Full, cache_folder, lock_of
from pretrain.data.faults import BadSample, DataAway, DataError, NobodyThere
from pretrain.data.loader import Loader
from pretrain.data.remote import RemoteFolder
from pretrain.data.shards import ShardFolder
from pretrain.named_folders import named_folders, named_places
from pretrain.place import is_url
from pretrain.retries import GaveUp, patiently
from tests.data.delivered import assert_same, batches
from tests.data.s3 import BUCKET, Store, s3_store
from tests.data.sets import good_set, sample, small_run, write_tokenizer


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with s3_store() as store:
        yield store


@pytest.fixture(autouse=True)
def reachable(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is found by its environment; every test has a cache of its own and begins without faults."""
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("M3I_CACHE", str(tmp_path / "cache"))
    store.faults.refused = store.faults.stalled = 0.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sets")
    write_tokenizer(good_set(root / "talk", (8, 4), has_category=False) / "tokenizer")
    return {"names": good_set(root / "names", has_text=False), "talk": root / "talk"}


@pytest.fixture(scope="module")
def urls(store: Store, folders: dict[str, Path]) -> dict[str, str]:
    return {name: store.put(folder, f"sets/{name}") for name, folder in folders.items()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bucket_gives_the_batches_of_the_folder(
    folders: dict[str, Path], urls: dict[str, str], workers: int
) -> None:
    forkserver._forkserver._stop()  # of earlier tests: workers have its environment, which lacks the store
    run = small_run(mixing=Mixing(window=1))
    for here, there in zip(batches(run, folders, 6), batches(run, urls, 6, workers=workers), strict=True):
        assert_same(here, there)


def test_a_store_that_refuses_and_stalls_costs_time_and_nothing_else(
    store: Store, folders: dict[str, Path], urls: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.faults.refused, store.faults.stalled, store.faults.stall = 0.25, 0.1, 0.2
    monkeypatch.setattr(remote, "PIECE", 2048)  # many requests for small shards
    before = store.faults.num_refused
    loader = Loader(small_run(), urls, None, rank=0, world=1)
    delivered = [next(loader) for _ in range(6)]
    assert not loader.dropped and store.faults.num_refused > before + 5
    loader.close()
    for here, there in zip(batches(small_run(), folders, 6), delivered, strict=True):
        assert_same(here, there)


def test_what_was_copied_is_not_asked_for_again(store: Store, urls: dict[str, str]) -> None:
    batches(small_run(), urls, 4)
    before = store.faults.num_requests
    batches(small_run(), urls, 4)
    # two manifests, two listings, the tokenizer's listing and files: no shard
    assert store.faults.num_requests - before < 20
    assert len(list((cache_folder() / "shards").glob("*.tar"))) == 5


def test_where_samples_lie_is_told_without_a_store_that_is_away(
    store: Store, urls: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = Loader(small_run(), urls, None, rank=0, world=1)
    positions = next(loader).position.tolist()
    store.faults.refused = 1.0
    before = store.faults.num_requests
    here = loader.samples(positions)
    assert all(sample["key"] for sample in here)
    for copy in (cache_folder() / "shards").glob("*.tar"):
        copy.unlink()
    for source in loader._steps.sources.opened:
        source.shards.close()
    assert loader.samples(positions) == [{**sample, "key": None} for sample in here]
    assert store.faults.num_requests == before
    loader.close()


def test_the_next_window_is_copied_before_it_is_read(store: Store, tmp_path: Path) -> None:
    url = store.put(good_set(tmp_path / "many", (4,) * 6), "sets/many")
    run = small_run(data={"many": Source("category")}, batch=4, mixing=Mixing(window=1))
    loader = Loader(run, {"many": url}, None, rank=0, world=1)
    next(loader)
    shards = cache_folder() / "shards"
    until = time.monotonic() + 20
    while len(list(shards.glob("*.tar"))) < 2:
        assert time.monotonic() < until, "20 seconds and the second window is not there"
        time.sleep(0.02)
    assert len(list(shards.glob("*.tar"))) == 2  # and no more than that
    loader.close()


def test_the_cache_stays_within_its_limit_and_drops_what_was_used_longest_ago(
    store: Store, tmp_path: Path
) -> None:
    folder = good_set(tmp_path / "many", (4,) * 6)
    url = store.put(folder, "sets/limited")
    opened = ShardFolder(url)
    limit = sum(shard.num_bytes for shard in opened.manifest.shards[:3])
    opened._remote.cache = Cache(cache_folder(), limit)
    for index in range(0, 24, 4):
        assert opened.sample(index) == sample(index)
        held = list((cache_folder() / "shards").glob("*.tar"))
        assert sum(path.stat().st_size for path in held) <= limit
    kept = {path.stem for path in (cache_folder() / "shards").glob("*.tar")}
    newest = [shard.sha256 for shard in opened.manifest.shards[4:]]
    assert kept >= set(newest) and opened.manifest.shards[0].sha256 not in kept
    assert opened.sample(0) == sample(0)  # its file is gone, it is copied again
    opened.close()


def test_files_that_were_dropped_are_closed(store: Store, tmp_path: Path) -> None:
    opened = ShardFolder(store.put(good_set(tmp_path / "many", (4,) * 3), "sets/closed"))
    opened.sample(0)
    for path in (cache_folder() / "shards").glob("*.tar"):
        path.unlink()
    opened.sample(4)
    assert list(opened._files._open) == [1]
    opened.close()


def test_a_missing_and_a_truncated_shard_are_replaced_counted_and_exact_after_a_resume(
    store: Store, tmp_path: Path
) -> None:
    url = store.put(good_set(tmp_path / "gone", (6,) * 5), "sets/gone")
    run = small_run(data={"gone": Source("category")}, batch=10, max_bad=1.0, mixing=Mixing(window=1))
    loader = Loader(run, {"gone": url}, None, rank=0, world=1)
    store.files.rm_file(f"{BUCKET}/sets/gone/000001.tar")
    store.files.pipe_file(f"{BUCKET}/sets/gone/000003.tar", b"\0" * 512)
    straight = [next(loader) for _ in range(6)]  # two epochs
    assert loader.dropped == {"gone: missing_shard": 12, "gone: truncated_shard": 12}
    loader.close()
    with pytest.warns(
        UserWarning, match=r"000001.tar has no bytes.*\(2 such shards; .*what changed is used as it is"
    ):
        resumed = batches(run, {"gone": url}, 3, start_step=3)
    for one, other in zip(straight[3:], resumed, strict=True):
        assert_same(one, other)


def test_a_shard_that_differs_from_the_manifest_is_no_data(store: Store, tmp_path: Path) -> None:
    folder = good_set(tmp_path / "rotten", (4, 4))
    content = bytearray((folder / "000001.tar").read_bytes())
    content[1500] ^= 1
    (folder / "000001.tar").write_bytes(content)
    opened = ShardFolder(store.put(folder, "sets/rotten"))
    with pytest.raises(BadSample, match=r"000001.tar has sha256 .*, the manifest says") as caught:
        opened.sample(4)
    assert caught.value.reason == "changed_shard"
    before = store.faults.num_requests
    with pytest.raises(BadSample):
        opened.sample(5)
    assert store.faults.num_requests == before  # it is not copied for every sample
    assert not list((cache_folder() / "shards").glob("*"))
    opened.close()


@pytest.mark.parametrize("change", ["deleted", "truncated"])
def test_a_shard_that_is_lost_while_it_is_copied_is_a_bad_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    folder = good_set(tmp_path / "names", (6, 6))
    monkeypatch.setattr(remote, "PIECE", 2048)
    opened = ShardFolder(f"file://{folder}")
    real = opened._remote.store.piece

    def piece(shard: Shard, start: int, end: int) -> bytes:
        if start == 2048:
            path = folder / shard.name
            path.unlink() if change == "deleted" else path.write_bytes(path.read_bytes()[:1024])
        return real(shard, start, end)

    monkeypatch.setattr(opened._remote.store, "piece", piece)
    with pytest.raises(BadSample) as caught:
        opened.sample(0)
    assert caught.value.reason == {"deleted": "missing_shard", "truncated": "truncated_shard"}[change]
    assert not list((cache_folder() / "shards").glob("*"))
    opened.close()


def test_what_a_killed_process_had_begun_makes_room_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PATIENCE", 0.3)
    opened = ShardFolder(f"file://{good_set(tmp_path / 'names', (6, 6))}")
    sizes = [shard.num_bytes for shard in opened.manifest.shards]
    opened._remote.cache = Cache(cache_folder(), max(sizes))
    begun = cache_folder() / "shards" / f"{'a' * 64}.part"
    begun.parent.mkdir(parents=True)
    begun.write_bytes(bytes(max(sizes)))
    told = pytest.raises(
        DataError, match=r"is full of shards that are being written, M3I_CACHE_GIB allows .*: raise it"
    )
    with opened._remote.cache.locked(lock_of("a" * 64)), told:
        opened.sample(0)
    assert opened.sample(0) == sample(0) and not begun.exists()
    opened.close()


def test_a_rarely_drawn_source_keeps_its_window_beside_a_fast_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = {"slow": good_set(tmp_path / "slow", (9,) * 12), "fast": good_set(tmp_path / "fast", (2,) * 60)}
    run = small_run(
        data={"slow": Source("category", 1.0), "fast": Source("category", 20.0)},
        batch=20,
        mixing=Mixing(window=4),
    )
    urls = {name: f"file://{folder}" for name, folder in sets.items()}
    needed = sum(sources._held_bytes(ShardFolder(folder), 4) for folder in sets.values())
    monkeypatch.setenv("M3I_CACHE_GIB", repr((needed + 4096) / 2**30))
    copied: Counter[str] = Counter()
    real = RemoteFolder._copy
    monkeypatch.setattr(
        RemoteFolder, "_copy", lambda self, *rest: copied.update([self.url[-4:]]) or real(self, *rest)
    )
    batches(
        run, urls, 40
    )  # 38 samples of the slow source, of the 36 of one window; the fast one has many windows
    assert copied["slow"] <= 12 and copied["fast"] > 60


def test_what_a_store_lacks_is_told_at_start(store: Store, tmp_path: Path, urls: dict[str, str]) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"s3://bucket/nothing/manifest.json is missing: name the URL"
    ):
        ShardFolder(f"s3://{BUCKET}/nothing")
    with pytest.raises(
        ValueError, match=r"nosuch://x cannot be opened \(Protocol .*\): name a folder or a URL"
    ):
        ShardFolder("nosuch://x")
    url = store.put(good_set(tmp_path / "short", (4, 4)), "sets/short")
    store.files.rm_file(f"{BUCKET}/sets/short/000001.tar")
    with pytest.raises(ValueError, match=r"sets/short/000001.tar has no bytes, the manifest says \d+"):
        ShardFolder(url)


def test_a_store_without_keys_is_not_asked_again(
    urls: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.store.PATIENCE_AT_START", 3600.0)
    connections = fsspec.get_filesystem_class("s3")
    connections.clear_instance_cache()  # they have the keys of earlier tests
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    told = r"manifest.json may not be read: .*nobody.*: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET"
    with pytest.raises(DataError, match=told) as caught:
        ShardFolder(urls["names"])
    assert not isinstance(caught.value, DataAway), "no other start will do"
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    connections.clear_instance_cache()
    with pytest.raises(DataError, match=r"Unable to locate credentials: set AWS_PROFILE"):
        ShardFolder(urls["names"])
    connections.clear_instance_cache()


def test_a_name_that_no_bucket_can_have_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.data.store.PATIENCE_AT_START", 3600.0)
    told = r'^s3://Bad_Bucket!/set/manifest.json .*\(Invalid bucket name "Bad_Bucket!"\): a bucket.s has 3 to'
    with pytest.raises(ValueError, match=told):
        ShardFolder("s3://Bad_Bucket!/set")


def test_a_store_that_takes_a_question_and_never_answers_ends_the_start_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pretrain.data.store.PATIENCE_AT_START", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/set"
        with pytest.raises(DataAway, match=r"has failed for 0.5 seconds, .*no answer within 0.5 seconds"):
            ShardFolder(url)


@pytest.fixture
def refusing() -> Iterator[Callable[[int], str]]:
    """The URL of a set that a server on the web answers by a status alone, and never by more."""

    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(int(self.path.split("/")[1]))
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield lambda status: f"http://127.0.0.1:{server.server_port}/{status}"
    server.shutdown()
    server.server_close()


def test_a_server_that_refuses_who_asks_is_not_asked_again(
    refusing: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.store.PATIENCE_AT_START", 3600.0)
    for status in (401, 403):
        with pytest.raises(
            DataError, match=rf"may not be read: {status}.*: mend the keys, or their"
        ) as caught:
            ShardFolder(refusing(status))
        assert not isinstance(caught.value, DataAway), "no other start will do"
        with pytest.raises(PermissionError, match=r"is refused by the store \(.*mend the keys"):
            places.place_of(refusing(status)).exists("manifest.json")
    with pytest.raises(FileNotFoundError, match=r"manifest.json is missing"):
        ShardFolder(refusing(404))
    assert not places.place_of(refusing(404)).exists("manifest.json")


def test_a_file_of_which_a_failing_server_tells_nothing_is_not_missing(
    refusing: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "PATIENCE", 0.0)
    url = refusing(503)
    with pytest.raises(OSError, match=r"has failed for 0 seconds, at last with FileNotFoundError"):
        places.place_of(url).exists("manifest.json")
    with pytest.raises(GaveUp):
        patiently(lambda: fsspec.filesystem("http").info(f"{url}/000000.tar"), url, 0.0)
    with pytest.raises(FileNotFoundError):
        patiently(lambda: fsspec.filesystem("http").info(f"{refusing(404)}/000000.tar"), url, 0.0)


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_a_file_that_this_machine_cannot_ask_for_is_not_missing(
    error: Exception, refusing: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec's client of the web calls it missing, and aiohttp hides of such errors those of sockets alone."""
    monkeypatch.setattr("aiohttp.TCPConnector._create_connection", Mock(side_effect=error))
    with pytest.raises(GaveUp, match="failed for 0 seconds"):
        patiently(lambda: fsspec.filesystem("http").info(f"{refusing(404)}/000000.tar"), "url", 0.0)


def test_a_file_that_clients_of_other_stores_call_missing_is_missing() -> None:
    @wrap_exceptions  # of fsspec's file systems by Arrow
    def ask_hdfs() -> bytes:
        raise OSError("HDFS file 'set/manifest.json' does not exist")

    def ask_hub(status: int) -> bytes:
        told = OSError()  # as the errors of requests and httpx
        told.response = SimpleNamespace(status_code=status)
        raise FileNotFoundError("datasets/set (repository not found)") from told

    with pytest.raises(FileNotFoundError, match="does not exist"):
        patiently(ask_hdfs, "hdfs://set", 0.0)
    with pytest.raises(FileNotFoundError, match="repository not found"):
        patiently(lambda: ask_hub(404), "hf://set", 0.0)
    with pytest.raises(PermissionError, match=r"repository not found.*mend the keys"):
        patiently(lambda: ask_hub(401), "hf://set", 0.0)


@pytest.mark.parametrize(
    ("url", "reason"),
    [("http://127.0.0.1:{port}/set", "Connection refused"), ("http://no.such.host.invalid/set", "not known")],
)
def test_an_address_where_nobody_listens_is_told_soon_and_in_plain_words(
    url: str, reason: str, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.store.PATIENCE_AT_START", 3600.0)
    monkeypatch.setattr("pretrain.data.store.REFUSED_AT_START", 0.2)
    told = (
        rf"/set cannot be read, nobody takes connections there \(.*{reason}\): mend the address, .*and start"
    )
    for ask in (ShardFolder, sources.tokenizer_beside):  # a training asks for the tokenizer first
        with pytest.raises(NobodyThere, match=told):
            ask(url.format(port=free_port))


def test_a_server_that_is_no_store_of_the_set_is_told_soon(
    refusing: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.store.PATIENCE_AT_START", 3600.0)
    monkeypatch.setattr("pretrain.data.store.REFUSED_AT_START", 0.2)
    for url, why in (
        (refusing(200).replace("http:", "https:"), "WRONG_VERSION_NUMBER"),
        (refusing(400), "400"),
    ):
        with pytest.raises(NobodyThere, match=rf"no store answers there \(.*{why}.*mend the address"):
            ShardFolder(url)


@pytest.mark.parametrize(
    ("url", "endpoint", "told"),
    [
        ("s3://bucket/set", "nonsense", "Invalid endpoint: nonsense: write AWS_ENDPOINT_URL as https://HOST"),
        (
            "s3://bucket/set",
            "http://localhost:99999",
            r"`http://localhost:99999` was not .*: write AWS_ENDPOINT_URL",
        ),
        (
            "http://localhost:99999/set",
            "http://127.0.0.1:1",
            r"is no URL \(Port out of range.*write http://HOST",
        ),
        ("http://[::1]:80/set", "http://127.0.0.1:1", "names no host that is asked by its name"),
        ("s3://bucket//set", "http://127.0.0.1:1", "has two slashes in its path.*write one"),
    ],
)
def test_an_address_that_is_none_is_told_at_once(
    url: str, endpoint: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.store.PATIENCE_AT_START", 3600.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # connected to another test's store
    with pytest.raises(ValueError, match=told):
        sources.tokenizer_beside(named_places("--data", [f"one={url}"])["one"])


def test_an_address_that_served_before_is_waited_for(
    free_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.store.REFUSED_AT_START", 0.0)
    monkeypatch.setattr("pretrain.data.store.PATIENCE_AT_START", 0.5)
    opened = RemoteFolder(f"http://127.0.0.1:{free_port}/set", Cache.of_environment())
    opened.folder.mkdir(parents=True)
    (opened.folder / "manifest.json").write_text("{}")
    begun = time.monotonic()
    with pytest.raises(DataAway, match=r"nobody takes connections there \(Connection refused\)") as caught:
        opened.copy_manifest()
    assert not isinstance(caught.value, NobodyThere)
    assert time.monotonic() - begun >= 0.5


def test_a_request_that_is_never_answered_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.store.ATTEMPT", 0.2)
    opened = ShardFolder(f"file://{good_set(tmp_path / 'names', (3,))}")
    answered = threading.Event()
    own, silent = opened._remote.store._connect()[0], iter([answered, answered])
    real = own.cat_file

    def cat_file(*arguments: object, **options: object) -> bytes:
        for answer in silent:  # of the first two requests
            answer.wait()
        return real(*arguments, **options)

    monkeypatch.setattr(own, "cat_file", cat_file)
    begun = time.monotonic()
    assert opened.sample(0) == sample(0)
    assert 0.2 + 0.4 <= time.monotonic() - begun < remote.PATIENCE  # the second had twice as long
    answered.set()
    opened.close()


def test_a_store_on_the_web_that_tells_no_sizes_serves(tmp_path: Path) -> None:
    folder = good_set(tmp_path / "names", (3, 4))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    opened = ShardFolder(f"http://127.0.0.1:{server.server_port}/names")
    assert [opened.sample(n) for n in range(7)] == [ShardFolder(folder).sample(n) for n in range(7)]
    opened.close()
    server.shutdown()
    server.server_close()


def test_a_cache_that_may_not_be_written_is_told_by_its_name(
    tmp_path: Path, urls: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("M3I_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        ValueError, match=r"M3I_CACHE=.*/cache must be a folder that may be written.*local disk"
    ):
        ShardFolder(urls["names"])


def test_a_store_that_fails_ends_the_start_soon(
    urls: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.store.PATIENCE_AT_START", 0.1)
    monkeypatch.setattr("pretrain.data.store.Store._connect", lambda self: (Broken(), "bucket"))
    with pytest.raises(
        DataAway, match=r"manifest.json has failed for 0.1 seconds, .*no route.*nothing is lost"
    ):
        ShardFolder(urls["names"])


class Broken:
    def cat_file(self, path: str) -> bytes:
        raise OSError("no route")


def test_a_cache_without_locks_is_told_at_the_start(
    urls: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Lustre, unless it was mounted with them."""
    refuses = Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented"))
    monkeypatch.setattr(cache.fcntl, "flock", refuses)
    with pytest.raises(ValueError, match=r"M3I_CACHE=.*may be written and locked \(.*name one on a local"):
        ShardFolder(urls["names"])


def test_files_that_a_folder_has_no_more_are_not_read_from_its_copy(tmp_path: Path) -> None:
    there = tmp_path / "set" / "tokenizer"
    (there / "sub").mkdir(parents=True)
    for name in ("vocab.txt", "sub/old.json"):
        (there / name).write_text("a")
    opened = RemoteFolder(f"file://{tmp_path / 'set'}", Cache.of_environment())
    copy = opened.copy_folder("tokenizer")
    (there / "sub" / "old.json").unlink()
    opened.copy_folder("tokenizer")
    assert [path.name for path in copy.rglob("*") if path.is_file()] == ["vocab.txt"]
    (there / "vocab.txt").unlink()
    assert not opened.copy_folder("tokenizer").exists()


def test_a_copy_that_was_cut_off_is_made_again(urls: dict[str, str]) -> None:
    opened = ShardFolder(urls["names"])
    first = opened.sample(0)
    opened.close()
    copy = opened._remote.cache.path_of(opened.manifest.shards[0])
    os.truncate(copy, 1024)
    assert opened.sample(0) == first and copy.stat().st_size == opened.manifest.shards[0].num_bytes
    opened.close()


def test_a_full_cache_is_looked_at_again_without_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, looks, asked = ShardFolder(f"file://{good_set(tmp_path / 'set')}"), threading.Semaphore(0), Mock()

    def full(self: Cache, *rest: object, **options: object) -> None:
        looks.release()
        raise Full

    monkeypatch.setattr(Cache, "reserve", full)
    monkeypatch.setattr("pretrain.data.store.Store.require_size", asked)
    opened.fetch_ahead([0])
    assert all(looks.acquire(timeout=20) for _ in range(3))
    opened.close()
    assert not asked.called


def test_names_that_lead_out_of_the_cache_are_refused(
    store: Store, tmp_path: Path, folders: dict[str, Path]
) -> None:
    url = store.put(folders["talk"], "sets/evil")
    marker = {"Bucket": BUCKET, "Key": "sets/evil/tokenizer/", "Body": b""}
    store.files.call_s3("put_object", **marker)  # by which browsers of buckets show a folder
    run = small_run(data={"talk": Source("text")})
    Loader(run, {"talk": url}, None, rank=0, world=1).close()
    store.files.pipe_file(f"{BUCKET}/sets/evil/tokenizer/../../../../evil.txt", b"evil")
    with pytest.raises(ValueError, match=r"holds '../../../../evil.txt', which would be written outside"):
        Loader(run, {"talk": url}, None, rank=0, world=1)
    assert not list(tmp_path.rglob("evil.txt"))


@pytest.mark.parametrize("told", ["nan", "0", "-3", "ten"])
def test_a_limit_that_is_none_is_refused(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M3I_CACHE_GIB", told)
    with pytest.raises(ValueError, match=f"M3I_CACHE_GIB='{told}' must be a positive number"):
        Cache.of_environment()


def test_a_limit_below_three_windows_is_refused(
    urls: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M3I_CACHE_GIB", "0.00001")
    with pytest.raises(ValueError, match=r"M3I_CACHE_GIB=.* is too little: 3 windows .* raise it or lower"):
        Loader(small_run(), urls, None, rank=0, world=1)


def test_any_file_system_of_fsspec_serves(folders: dict[str, Path]) -> None:
    memory = fsspec.filesystem("memory")
    for path in folders["names"].iterdir():
        memory.pipe_file(f"/sets/names/{path.name}", path.read_bytes())
    for url in ("memory://sets/names", f"file://{folders['names']}"):
        opened = ShardFolder(url)
        assert [opened.sample(n) for n in range(21)] == [
            ShardFolder(folders["names"]).sample(n) for n in range(21)
        ]
        opened.close()


def test_only_tools_that_take_urls_are_given_them(tmp_path: Path) -> None:
    assert named_places("--data", ["a=s3://b/c/", f"d={tmp_path}"]) == {"a": "s3://b/c", "d": tmp_path}
    assert is_url("s3://b/c") and not is_url(tmp_path)
    with pytest.raises(ValueError, match="memory:// names no folder of that store"):
        named_places("--data", ["a=memory://"])
    with pytest.raises(ValueError, match=r"--data a=s3://b/c is a URL: copy the data set to a folder"):
        named_folders("--data", ["a=s3://b/c"])
