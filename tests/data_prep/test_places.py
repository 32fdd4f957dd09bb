"""Is a file whole or absent wherever it is written, and does every failure name its remedy?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_prep import stores
from data_prep.places import Place, place_of
from data_prep.stores import Content, NotVerified, connected
from tests.data.s3 import BUCKET, Store, s3_store
from tests.data_prep.rclone import rclone_server


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with s3_store() as opened, pytest.MonkeyPatch.context() as patch:
        for name, value in {**opened.environment, "AWS_MAX_ATTEMPTS": "1"}.items():  # no retries but ours
            patch.setenv(name, value)
        yield opened


@pytest.fixture
def s3(store, request) -> Iterator[Place]:
    yield place_of(f"s3://{BUCKET}/{request.node.name.partition('[')[0]}")
    store.faults.refused, store.faults.methods = 0.0, ("GET", "HEAD")


@pytest.fixture(params=["disk", "s3", "memory"])
def place(request, tmp_path) -> Place:
    if request.param == "s3":
        return request.getfixturevalue("s3")
    return place_of(tmp_path / "set" if request.param == "disk" else f"memory://{tmp_path.name}/set")


def test_what_is_written_is_read_listed_and_removed_alike(place, tmp_path):
    (tmp_path / "made").write_bytes(b"made here")
    assert place.names() == place.folders() == [] and not place.listed() and not place.exists("a.tar")
    place.write("b.json", b"{}")
    place.write("b.json", b"[1]")
    place.write("inner/c.json", b"")
    place.put("a.tar", tmp_path / "made")
    assert (tmp_path / "made").exists()
    place.move("moved.tar", tmp_path / "made")
    assert not (tmp_path / "made").exists()
    assert place.names() == ["a.tar", "b.json", "moved.tar"] and place.folders() == ["inner"]
    assert place.names("*.tar") == ["a.tar", "moved.tar"] and place.child("inner").names() == ["c.json"]
    assert place.read("b.json") == b"[1]" and place.size("a.tar") == 9 and place.exists("inner/c.json")
    assert place.listed()["a.tar"] == place.entry("a.tar") and place.child("inner").name == "inner"
    place.remove("a.tar")
    place.remove("a.tar")
    place.remove_folder("inner")
    place.remove_folder("inner")
    assert place.names() == ["b.json", "moved.tar"] and not place.folders()


def test_a_file_is_read_at_any_position(place, monkeypatch):
    monkeypatch.setattr("data_prep.places.READ_AHEAD", 64)
    content = os.urandom(1000)
    place.write("x", content)
    with place.open("x") as file:
        for start, length in [(0, 10), (990, 50), (100, 500), (5, 0), (1000, 5)]:
            file.seek(start)
            assert file.read(length) == content[start : start + length]


def test_a_file_that_changes_is_listed_with_another_state(place):
    place.write("x", b"one")
    before = place.entry("x").state
    place.write("x", b"two")
    assert place.entry("x").state != before or not before  # memory tells no state


def test_of_many_that_create_a_name_one_alone_does(place):
    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(lambda number: place.create("claim", b"%d" % number), range(8)))
    if place.url.startswith("memory"):
        pytest.skip("memory knows no condition")
    assert sum(won) == 1 and place.read("claim") == b"%d" % won.index(True)


def test_missing_files_and_names_that_lead_out_are_refused(place):
    with pytest.raises(FileNotFoundError):
        place.read("nothing")
    with pytest.raises(FileNotFoundError):
        place.size("nothing")
    if place.local is None:
        with pytest.raises(ValueError, match=r"leads out of"):
            place.write("../other", b"")


def test_an_upload_in_parts_is_verified_without_reading_it_again(s3, store, tmp_path, monkeypatch):
    for module in ("data_prep.places", "data_prep.stores"):
        monkeypatch.setattr(f"{module}.PART", 5 * 2**20)
    path = tmp_path / "large"
    path.write_bytes(os.urandom(12 * 2**20))
    store.faults.methods, store.faults.num_requests = ("GET",), 0
    s3.put("large", path)
    assert s3.entry("large").state.endswith("-3") and store.faults.num_requests == 0
    assert s3.read("large") == path.read_bytes()


def test_a_store_that_holds_other_bytes_is_noticed(place):
    if place.local is not None:
        pytest.skip("a disk is trusted")
    place.write("x", b"abd")
    path = connected(place.url)._strip_protocol(f"{place}/x")
    with pytest.raises(NotVerified, match="reads back with other bytes"):
        Content.of_bytes(b"abc").require(connected(place.url), path, f"{place}/x")
    with pytest.raises(NotVerified, match="has 3 bytes where 4 were put"):
        Content.of_bytes(b"abcd").require(connected(place.url), path, f"{place}/x")


def test_a_quarter_of_all_requests_refused_changes_nothing(s3, store):
    store.faults.refused, store.faults.methods = 0.25, ("GET", "HEAD", "PUT", "DELETE", "POST")
    before = store.faults.num_refused
    for number in range(8):
        s3.write(f"{number}", b"%d" % number)
    assert [s3.read(f"{number}") for number in range(8)] == [b"%d" % number for number in range(8)]
    s3.remove("3")
    assert s3.names() == [f"{number}" for number in range(8) if number != 3]
    assert store.faults.num_refused > before


def test_an_upload_that_fails_for_good_leaves_nothing_and_says_what_to_do(
    s3, store, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(stores, "PATIENCE", 0.2)
    monkeypatch.setattr(stores, "SILENT", 0.0)
    path = tmp_path / "made"
    path.write_bytes(b"x" * 1000)
    store.faults.refused, store.faults.methods = 1.0, ("PUT", "POST")
    with pytest.raises(OSError, match=rf"{s3}/a.tar has failed for .* run the same command again"):
        s3.put("a.tar", path)
    store.faults.refused = 0.0
    assert not s3.exists("a.tar") and path.exists()
    assert f"{s3}/a.tar fails: " in capfd.readouterr().err


def test_a_missing_bucket_and_an_unknown_kind_of_url_are_told(store):
    with pytest.raises(
        FileNotFoundError, match=r"s3://nobody-has-it/x/a cannot .* must exist before a build"
    ):
        place_of("s3://nobody-has-it/x").write("a", b"")
    with pytest.raises(ValueError, match=r"cannot be opened .* such as s3://bucket/folder"):
        place_of("qq://a/b")
    with pytest.raises(ValueError, match="names no folder of that store"):
        place_of("s3://")


def test_a_server_with_keys_takes_the_right_ones_and_names_the_wrong(tmp_path, free_port, monkeypatch):
    with rclone_server(tmp_path / "server", free_port) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        place = place_of("s3://bucket/set")
        place.write("a", b"content")
        assert (server.folder / "set" / "a").read_bytes() == place.read("a") == b"content"
        assert place.names() == ["a"] and place.create("claim", b"1") and not place.create("claim", b"2")
        with place.open("a") as file:
            file.seek(3)
            assert file.read() == b"tent"
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(PermissionError, match=r"is refused by the store .* mend the keys"):
            place_of("s3://bucket/set").write("b", b"")


def test_missing_keys_are_told_at_once(store, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(PermissionError, match=r"needs keys .* set AWS_PROFILE"):
        place_of(f"s3://{BUCKET}/x").write("a", b"")


def test_a_name_that_no_bucket_can_have_is_told_at_once(store):
    with pytest.raises(
        ValueError, match=r'\(Invalid bucket name "Bad_Bucket!"\): a bucket.s has 3 to 63 small'
    ):
        place_of("s3://Bad_Bucket!/set").names()


def test_a_local_copy_is_whole_or_absent(tmp_path, monkeypatch):
    place, path = place_of(tmp_path / "set"), tmp_path / "made"
    path.write_bytes(b"x" * 1000)
    monkeypatch.setattr(os, "replace", _fails)
    with pytest.raises(OSError, match="the power went"):
        place.put("a.tar", path)
    assert list(Path(place.url).iterdir()) == []


def _fails(*_: object) -> None:
    raise OSError("the power went")


@pytest.mark.parametrize("text", ["s3:/bucket/set", "s3:bucket/set", "gs:/bucket"])
def test_a_url_with_a_slash_too_few_is_no_folder_to_be_made(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"two slashes.*write (s3|gs)://bucket"):
        place_of(text)
    assert place_of(f"./{text}").local is not None
