"""Does the manifest refuse what is not a data set, with a remedy?"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from data_prep.files import write_atomic
from data_prep.index import index_bytes, index_path, read_index
from data_prep.labels import fill_prompt, tags_of
from data_prep.schema import Manifest, Shard, parse_manifest, write_manifest
from tests.paths import ROOT

SHARD = Shard("000000.tar", 2, 2048, "0" * 64)
MANIFEST = Manifest(
    "toys", "train", ("cat", "dog"), 2, False, True, (SHARD,), {"corrupt": 1}, {"seed": 0}, ("pet", "cat")
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "000000.tar").write_bytes(bytes(2048))
    index_path(tmp_path / "000000.tar").write_bytes(index_bytes([0, 1024, 2048]))
    write_manifest(tmp_path, MANIFEST)
    return tmp_path


def test_what_was_written_is_read_back(folder):
    assert Manifest.read(folder) == MANIFEST
    assert read_index(folder / "000000.tar").tolist() == [0, 1024, 2048]


def test_counts_of_items_are_read_back_and_a_manifest_without_them_stays_as_it_was(folder):
    old = (folder / "manifest.json").read_text()
    assert "num_items" not in old and old.count("dropped") == 1
    shard = replace(SHARD, num_items=3, dropped={"corrupt": 1})
    counted = replace(MANIFEST, shards=(shard,), num_items=3)
    write_manifest(folder, counted)
    assert Manifest.read(folder) == counted and hash(shard)
    with pytest.raises(ValueError, match="2 of 4 items gave no sample, but only 1 are told in dropped"):
        replace(shard, num_items=4)
    with pytest.raises(ValueError, match="num_items=1 must be a number not below its 2 samples"):
        replace(shard, num_items=1)
    with pytest.raises(ValueError, match=r"dropped=\{'corrupt': -1\} must count reasons"):
        replace(shard, dropped={"corrupt": -1})
    with pytest.raises(ValueError, match="num_items=2 of data set 'toys' must be a number not below the 3"):
        replace(counted, num_items=2)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("schema", 2, "must be 1"),
        ("num_samples", 3, "must equal the 2"),
        ("num_samples", "2", "must be of type int"),
        ("shards", [], "no shards"),
        ("categories", [1], "categories must be names"),
        ("tags", ["cat", None], "tags must be names"),
        ("tags", ["cat", "pet", "cat"], "names a tag twice, 'cat'"),
        ("categories", ["cat", "pet", "pet"], "names a category twice, 'pet': .* build it again"),
        (
            "shards",
            [{"name": "../evil.tar", "num_samples": 2, "num_bytes": 2048, "sha256": "0" * 64}],
            "must match",
        ),
        ("extra", 1, "unknown to schema"),
    ],
)
def test_a_contradictory_manifest_is_refused(folder, field, value, message):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=message):
        Manifest.read(folder)


@pytest.mark.parametrize("num_samples", [3, 10**9, 10**18, 10**19])
def test_more_samples_than_the_bytes_of_a_shard_can_hold_are_refused(folder, num_samples):
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    record["shards"][0]["num_samples"] = record["num_samples"] = num_samples
    path.write_text(json.dumps(record))
    for read in (Manifest.read, parse_manifest):
        told = f"is not a manifest: 000000.tar: num_samples={num_samples} must be at most 2: each .* again"
        with pytest.raises(ValueError, match=told):
            read(folder)


def test_a_manifest_from_before_there_were_tags_is_one_without_tags(folder):
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    del record["tags"]
    path.write_text(json.dumps(record))
    assert Manifest.read(folder) == replace(MANIFEST, tags=())


def test_tags_are_read_as_they_stand():
    record = {"tags": [["dog", 0.25], ["cat", 1]]}
    assert tags_of(record, ("cat", "dog")) == [("dog", 0.25), ("cat", 1.0)]
    assert tags_of({"tags": []}, ("cat", "dog")) == []


@pytest.mark.parametrize(
    "tags", [None, "cat", {"cat": 1}, ["cat"], [["cat"]], [[1, "cat"]], [["cow", 0.5]], [["cat", "0.5"]]]
)
def test_what_is_no_list_of_known_names_and_confidences_is_refused(tags):
    with pytest.raises(ValueError, match=r"tag.* must be"):
        tags_of({"tags": tags}, ("cat", "dog"))


@pytest.mark.parametrize("confidence", [-0.01, 1.01, math.nan, math.inf, True, None])
def test_a_confidence_outside_0_to_1_is_refused(confidence):
    with pytest.raises(ValueError, match=r"confidence in \[0, 1\]"):
        tags_of({"tags": [["dog", 0.5], ["cat", confidence]]}, ("cat", "dog"))


@pytest.mark.parametrize(
    ("category", "name"),
    [
        ("cat", "a cat"),
        ("apple", "an apple"),
        ("paper_plane", "a paper plane"),
        ("t-shirt", "a t shirt"),
        ("hourglass", "an hourglass"),
        ("7", "a 7"),
    ],
)
def test_a_prompt_says_the_name_with_its_article(category, name):
    assert fill_prompt("a photo of {}, {}.", category) == f"a photo of {name}, {name}."


def test_a_missing_manifest_names_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"written last.*build"):
        Manifest.read(tmp_path)
    (tmp_path / "train").mkdir()
    write_manifest(tmp_path / "train", MANIFEST)
    with pytest.raises(FileNotFoundError, match=r"\['train'\] below it"):
        Manifest.read(tmp_path)


def test_a_missing_or_short_shard_is_refused(folder):
    (folder / "000000.tar").write_bytes(bytes(512))
    with pytest.raises(ValueError, match="has 512 bytes, the manifest says 2048"):
        Manifest.read(folder)
    (folder / "000000.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"000000\.tar is missing"):
        Manifest.read(folder)


@pytest.mark.parametrize("offsets", [[512, 1024], [0, 512, 512], [0, 100]])
def test_an_impossible_index_is_refused(tmp_path, offsets):
    index_path(tmp_path / "a.tar").write_bytes(index_bytes(offsets))
    with pytest.raises(ValueError, match="offsets must start at 0"):
        read_index(tmp_path / "a.tar")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_writing_fails_whole(folder, monkeypatch, error):
    def full(*_):
        raise error

    before = (folder / "manifest.json").read_bytes()
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(type(error)):
        write_manifest(folder, replace(MANIFEST, name="other"))
    assert (folder / "manifest.json").read_bytes() == before
    assert not list(folder.glob("*.tmp"))


def test_two_writers_of_one_file_do_not_mix(tmp_path, monkeypatch):
    path, flushed = tmp_path / "list.json", os.fsync

    def while_another_writes(descriptor):
        monkeypatch.setattr(os, "fsync", flushed)
        write_atomic(path, b"of the other, longer")
        flushed(descriptor)

    monkeypatch.setattr(os, "fsync", while_another_writes)
    write_atomic(path, b"ours")
    assert path.read_bytes() == b"ours"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_is_written_through_and_stays(tmp_path, is_there):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "page.html", tmp_path / "link.html"
    if is_there:
        target.write_bytes(b"old")
    link.symlink_to("elsewhere/page.html")
    write_atomic(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new" and not target.is_symlink()
    assert len(list(tmp_path.rglob("*"))) == 3


def test_the_schema_imports_nothing_but_the_standard_library():
    code = (
        "import sys; import data_prep.files, data_prep.labels, data_prep.schema;"
        "names = {name.partition('.')[0] for name in sys.modules} - {'data_prep'};"
        "print(sorted(names & {'numpy', 'PIL', 'torch', 'tqdm', 'tyro', 'tokenizers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
