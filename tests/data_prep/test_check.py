"""Does the check name the first bad shard and member, whatever was changed?"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.build import Options, build
from data_prep.check import BadDataSet, _check_sample, _Member, check
from data_prep.samples import json_bytes
from data_prep.schema import index_path, parse_manifest
from data_prep.sources.scenes import Scenes, draw_scene


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "scenes"
    build(Scenes(count=6, heldout=0, size=32).collections()[0], folder, Options(shard_size=3, workers=1))
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "scenes"))


def _members(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return tar.getmembers()


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x01
    path.write_bytes(content)


def _named(folder: Path) -> str:
    with pytest.raises(BadDataSet) as found:
        check(folder)
    return str(found.value)


def test_a_whole_data_set_passes_with_code_0(folder, capsys):
    assert main(["check", str(folder)]) == 0
    assert "every byte is as built" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["jpg", "txt", "cls", "mask.png", "json"])
@pytest.mark.parametrize("where", ["header", "first", "middle", "last", "padding"])
def test_one_flipped_bit_is_found_and_its_shard_and_member_named(folder, part, where):
    path = folder / "000001.tar"
    member = next(m for m in _members(path) if m.name.endswith(f"-00000004.{part}"))
    place = {
        "header": member.offset + 130,
        "first": member.offset_data,
        "middle": member.offset_data + member.size // 2,
        "last": member.offset_data + member.size - 1,
        "padding": member.offset_data + member.size,
    }
    _flip(path, place[where])
    message = _named(folder)
    assert "000001.tar" in message and f"member {member.name}" in message and "build it again" in message


def test_the_first_of_several_faults_is_named(folder):
    for name in ("000000.tar", "000001.tar"):
        for member in _members(folder / name)[6::5]:  # captions, from the second sample on
            _flip(folder / name, member.offset_data)
    assert f"000000.tar: member {_members(folder / '000000.tar')[6].name}" in _named(folder)


def test_a_truncated_shard_is_found_with_the_member_that_is_cut(folder):
    path = folder / "000001.tar"
    member = _members(path)[7]
    with open(path, "r+b") as file:
        file.truncate(member.offset_data + 3)
    message = _named(folder)
    assert "000001.tar" in message and f"member {member.name}: it is cut off" in message


@pytest.mark.parametrize("part", ["jpg", "txt", "cls", "mask.png", "json"])
def test_a_missing_member_is_named(folder, part):
    path = folder / "000000.tar"
    with tarfile.open(path) as tar:
        kept = [(m.name, tar.extractfile(m).read()) for m in tar]
    missing = next(name for name, _ in kept if name.endswith(f"-00000001.{part}"))
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in kept:
            if name != missing:
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    message = _named(folder)
    key = missing.partition(".")[0]
    assert "000000.tar" in message and re.search(rf"member {key}\.\S*{part}\S* is missing", message)


def test_missing_shards_and_indices_are_named(folder):
    index_path(folder / "000001.tar").unlink()
    assert "000001.tar.idx is missing" in _named(folder)
    (folder / "000001.tar").unlink()
    assert "000001.tar: the shard is missing" in _named(folder)


def test_a_changed_index_is_found(folder):
    _flip(index_path(folder / "000000.tar"), 9)
    assert "000000.tar" in _named(folder) and "idx" in _named(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["shards"][1].update(sha256="0" * 64), "000001.tar: its sha256 is"),
        (
            lambda m: m["shards"][1].update(num_bytes=10240),
            r"000001.tar: it has \d+ bytes, the manifest says 10240",
        ),
        (lambda m: m["categories"].reverse(), r"000000.tar: member scenes-00000000.cls: category"),
        (
            lambda m: m.update(categories=["one"]),
            r"category '\d+' must be a number in \[0, 1\), the categories",
        ),
        (lambda m: m.update(has_category=False), "has_category=false, but every sample has a .cls: copy"),
        (lambda m: m.update(has_text=False), "has_text=false, but every sample has a .txt: copy"),
        (lambda m: m.update(num_samples=7), "manifest.json is not a manifest: num_samples=7"),
        (lambda m: m["shards"].pop(), "must equal the 3"),
        (
            lambda m: m.update(tags=["one"]),
            r"member scenes-00000000.json: tag \['\w+', [\d.]+\] must be one of the 1",
        ),
    ],
)
def test_a_changed_manifest_is_found(folder, change, message):
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    assert re.search(message, _named(folder))


def test_a_shard_that_the_manifest_does_not_know_is_found(folder):
    shutil.copy(folder / "000000.tar", folder / "000009.tar")
    assert "000009.tar is not in the manifest" in _named(folder)


def test_a_broken_tokenizer_is_found(folder):
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    assert "tokenizer does not load" in _named(folder)


def test_a_bad_data_set_ends_the_command_with_code_1(folder, capsys):
    _flip(folder / "000000.tar", 600)
    assert main(["check", str(folder)]) == 1
    assert "member scenes-00000000.jpg" in capsys.readouterr().err


def test_stats_tell_counts_captions_and_categories(folder, capsys):
    assert main(["stats", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "6 samples in 2 shards" in text and "captions     18" in text and "categories   24" in text
    tags = sum(len(draw_scene(index, 0, 32)[1].objects) for index in range(6))
    assert f"tags         {tags} of 24 names" in text
    assert "left out     nothing" in text


def _labelled(record: dict, **parts: bytes) -> list[_Member]:
    """The members of a sample whose record is `record`."""
    checksums = {
        **{e: zlib.crc32(content) for e, content in parts.items()},
        "json": zlib.crc32(json_bytes(record)),
    }
    parts = {"jpg": b"image", **parts, "json": json_bytes({**record, "crc32": checksums})}
    return [_Member(f"x.{e}", "x", e, content, 0, 0) for e, content in parts.items()]


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([["star", 0.5], ["unheard", 0.5]], r"tag \['unheard', 0.5\] must be one of the 24 names"),
        ([["star", 1.5]], r"tag \['star', 1.5\] must .* confidence in \[0, 1\]"),
        (None, "tags=None must be a list"),
    ],
)
def test_tags_outside_the_vocabulary_or_the_unit_interval_are_named(folder, tags, message):
    record = {"sha256": hashlib.sha256(b"image").hexdigest(), "size": [1, 1], "tags": tags}
    manifest = replace(parse_manifest(folder), has_text=False, has_category=False)
    with pytest.raises(BadDataSet, match=f"member x.json: {message}"):
        _check_sample("x", _labelled(record), manifest)


@pytest.mark.parametrize("field", ["sha256", "size", "category", "objects"])
def test_a_record_without_a_needed_field_is_named(folder, field):
    record = {"sha256": "", "size": [1, 1], "category": "a", "objects": []}
    del record[field]
    sample = _labelled(record, **{"cls": b"0", "mask.png": b"mask"})
    with pytest.raises(BadDataSet, match=rf"member x.json: it lacks \['{field}'\]"):
        _check_sample("x", sample, parse_manifest(folder))
