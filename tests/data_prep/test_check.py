"""Does the check name the first bad shard and member, whatever was changed?"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import struct
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.build import Options, build
from data_prep.check import BadDataSet, check, examine
from data_prep.doctor.members import Member
from data_prep.doctor.page import SIDE, thumbnail
from data_prep.doctor.verify import _verify_pixels, verify_sample
from data_prep.images import check_image
from data_prep.index import index_path
from data_prep.limits import Limits
from data_prep.places import place_of
from data_prep.samples import json_bytes
from data_prep.schema import parse_manifest, write_manifest
from data_prep.sources.scenes import Scenes, draw_scene
from pretrain.data.drop_list import Cause, Record
from tests.data_prep.malformed_images import HEIGHT, TOO_LARGE, WIDTH, _chunk
from tests.data_prep.malformed_images import encoded as file_of
from tests.data_prep.pictures import encoded, picture


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
    assert main(["check", str(folder), "--workers", "1"]) == 0
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
    index_path(folder / "000001.tar").mkdir()
    assert "000001.tar: 000001.tar.idx is a folder where a file must be: remove that folder first" in _named(
        folder
    )
    (folder / "000001.tar").unlink()
    assert "000001.tar: the shard is missing" in _named(folder)


@pytest.mark.parametrize(("make", "kind"), [(Path.mkdir, "folder"), (os.mkfifo, "pipe")])
@pytest.mark.parametrize("name", ["000001.tar", "000001.tar.idx"])
def test_what_is_no_file_is_named_and_not_waited_for(folder, name, make, kind):
    (folder / name).unlink()
    make(folder / name)
    assert f"000001.tar: {name} is a {kind} where a file must be: remove that {kind} first" in _named(folder)


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
        (
            lambda m: m.update(num_samples=7),
            r"manifest.json is not a manifest: num_samples=7 [^;]*: build it again$",
        ),
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
    assert "000009.tar: it is not in the manifest" in _named(folder)


def test_a_broken_tokenizer_is_found(folder):
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    assert "tokenizer does not load" in _named(folder)


def _report(folder: Path, tmp_path: Path, *more: str) -> tuple[int, dict]:
    path = tmp_path / "report.json"
    code = main(["check", str(folder), "--json", str(path), *more])
    return code, json.loads(path.read_text())["data_sets"][0]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_all_bad_shards_and_members_are_listed_with_any_number_of_processes(
    folder, tmp_path, workers, capsys
):
    _flip(folder / "000000.tar", 600)
    _flip(folder / "000000.tar", _members(folder / "000000.tar")[6].offset_data)
    (folder / "000001.tar").unlink()
    shutil.copy(folder / "000000.tar", folder / "strange.tar")
    code, report = _report(folder, tmp_path, "--workers", workers)
    assert code == 1 and report["bad_shards"] == ["000000.tar", "000001.tar"] and report["is_complete"]
    assert [fault["where"] for fault in report["faults"]] == [
        *["000000.tar"] * 2,
        "000001.tar",
        "strange.tar",
    ]
    told = capsys.readouterr().err
    assert "2 of 2 shards are bad: 000000.tar, 000001.tar" in told and "strange.tar: it is not in" in told


def test_the_first_bad_shard_ends_the_check_when_asked(folder, tmp_path, capsys):
    for name in ("000000.tar", "000001.tar"):
        _flip(folder / name, 600)
    code, report = _report(folder, tmp_path, "--workers", "1", "--first")
    assert code == 1 and report["bad_shards"] == ["000000.tar"] and not report["is_complete"]
    assert "so far (stopped at the first)" in capsys.readouterr().err


def test_a_good_data_set_is_told_good_in_json(folder, tmp_path):
    code, report = _report(folder, tmp_path, "--workers", "1")
    assert code == 0 and report["is_good"] and report["num_samples"] == 6 and report["faults"] == []


def test_a_key_in_two_shards_is_found(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    shutil.copy(folder / "000000.tar", folder / "000001.tar")
    shutil.copy(folder / "000000.tar.idx", folder / "000001.tar.idx")
    manifest["shards"][1] = {**manifest["shards"][0], "name": "000001.tar"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    report = examine(place_of(folder), workers=1)
    assert len(report.faults) == 3
    assert report.faults[0].problem == "member scenes-00000000: its key was there before, in 000000.tar"


def test_items_that_are_neither_in_a_shard_nor_left_out_for_a_reason_are_found(folder):
    manifest = parse_manifest(folder)
    assert manifest.num_items == manifest.num_samples == sum(shard.num_items for shard in manifest.shards)
    write_manifest(folder, replace(manifest, num_items=manifest.num_items + 2, dropped={"empty": 1}))
    assert "2 of" in (named := _named(folder)) and "are in none of its shards, 1 of them" in named
    first = replace(manifest.shards[0], dropped={"empty": 1})
    write_manifest(folder, replace(manifest, shards=(first, *manifest.shards[1:])))
    assert "its shards count {'empty': 1} left out, it says {}" in _named(folder)


def test_a_list_of_drops_that_does_not_count_what_the_manifest_counts_is_found(folder):
    (folder / "dropped.jsonl").write_text('{"name": "a", "reason": "corrupt", "detail": ""}\n')
    assert "dropped.jsonl: it counts corrupt 1, the manifest {}" in _named(folder)


@pytest.mark.parametrize(
    ("phash", "message"),
    [(lambda right: right, ""), (lambda right: right ^ 0xFF, "is 8 bits from that of"), (None, "must be 16")],
)
def test_a_recorded_perceptual_hash_is_verified(folder, phash, message):
    image = encoded(picture(0))
    checked = check_image(image, Limits())
    text = "nonsense" if phash is None else f"{phash(int(checked.phash, 16)):016x}"
    record = {"sha256": hashlib.sha256(image).hexdigest(), "size": list(checked.size), "phash": text}
    manifest = replace(parse_manifest(folder), has_text=False, has_category=False, tags=())
    sample = _labelled(record)
    sample[0] = replace(sample[0], content=image)
    if message:
        with pytest.raises(BadDataSet, match=f"member x.json: .*{message}"):
            verify_sample("x", sample, manifest)
    else:
        assert verify_sample("x", sample, manifest)


def test_an_image_that_training_refuses_for_its_size_is_at_fault(folder):
    image = dict(TOO_LARGE)["jpeg"]()
    manifest = replace(parse_manifest(folder), has_text=False, has_category=False, tags=())
    sample = _labelled({"sha256": hashlib.sha256(image).hexdigest(), "size": [8193, 8193]})
    sample[0] = replace(sample[0], content=image)
    with pytest.raises(BadDataSet, match=r"training cannot use it \(too_large: 8193 x 8193 pixels"):
        verify_sample("x", sample, manifest)


def test_samples_that_training_left_out_are_judged_one_by_one(folder, tmp_path, capsys):
    _flip(folder / "000001.tar", 600)
    common = {"source": "scenes", "message": "m"}
    drops = [
        {**common, "step": 3, "shard": "000001.tar", "index": 0, "reason": "undecodable"},
        {**common, "step": 9, "shard": "000001.tar", "index": 0, "reason": "undecodable"},
        {**common, "step": 4, "shard": "000001.tar", "index": 2, "reason": "timeout"},
        {**common, "step": 4, "shard": "000001.tar", "index": -1, "reason": "changed_shard"},
        {**common, "step": 5, "shard": "000007.tar", "index": 1, "reason": "timeout"},
        {**common, "step": 6, "shard": "000000.tar", "index": 99, "reason": "timeout"},
        Record(7, 0, None, {Cause("scenes", "", "timeout"): 2}),  # of samples that were listed before
    ]
    path = tmp_path / "dropped-rank_00000.jsonl"
    lines = [drop.text() if isinstance(drop, Record) else json.dumps(drop) + "\n" for drop in drops]
    path.write_text("".join(lines))
    found = tmp_path / "verdicts.json"
    assert main(["check", str(folder), "--dropped", str(path), "--json", str(found)]) == 1
    verdicts = json.loads(found.read_text())["verdicts"]
    assert [(one["shard"], one["index"], one["is_bad"]) for one in verdicts] == [
        ("000000.tar", 99, True),
        ("000001.tar", -1, True),
        ("000001.tar", 0, True),
        ("000001.tar", 2, False),
        ("000007.tar", 1, True),
    ]
    assert verdicts[2]["key"] == "scenes-00000003" and "its sha256 is not that of" in verdicts[2]["found"]
    assert verdicts[3]["found"].startswith("nothing is wrong with it now")
    assert "4 of 5 that training left out are bad here" in capsys.readouterr().out


def test_a_line_that_training_did_not_write_is_refused(folder, tmp_path, capsys):
    path = tmp_path / "dropped-rank_00000.jsonl"
    path.write_text('{"step": 1}\n')
    assert main(["check", str(folder), "--dropped", str(path)]) == 1
    assert "line 1 is '{\"step\": 1}', it must be an object with" in capsys.readouterr().err


def test_a_bad_data_set_ends_the_command_with_code_1(folder, capsys):
    _flip(folder / "000000.tar", 600)
    assert main(["check", str(folder), "--workers", "1"]) == 1
    assert "member scenes-00000000.jpg" in capsys.readouterr().err


def test_stats_tell_counts_captions_and_categories(folder, capsys):
    assert main(["stats", str(folder), "--workers", "1"]) == 0
    text = capsys.readouterr().out
    assert "6 samples in 2 shards" in text and "captions     18" in text and "categories   24" in text
    tags = sum(len(draw_scene(index, 0, 32)[1].objects) for index in range(6))
    assert f"tags         {tags} of 24 names" in text
    assert "left out     nothing" in text


def _labelled(record: dict, **parts: bytes) -> list[Member]:
    """The members of a sample whose record is `record`."""
    checksums = {
        **{e: zlib.crc32(content) for e, content in parts.items()},
        "json": zlib.crc32(json_bytes(record)),
    }
    parts = {"jpg": b"image", **parts, "json": json_bytes({**record, "crc32": checksums})}
    return [Member(f"x.{e}", "x", e, content, 0, 0) for e, content in parts.items()]


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
        verify_sample("x", _labelled(record), manifest)


GOOD = file_of("PNG")
BOMB = bytearray(file_of("BMP"))
BOMB[18:26] = struct.pack("<ii", 60_000, 60_000)


@pytest.mark.parametrize("damaged", [GOOD[:-12] + _chunk(b"iCCP", b"\0") + GOOD[-12:], bytes(BOMB)])
def test_whatever_pillow_says_of_a_damaged_picture_is_told_as_damage(damaged):
    """Of a colour profile of one byte it raises IndexError, of too many pixels an error of its own."""
    image, mask = (Member(f"x.{e}", "x", e, c, 0, 0) for e, c in (("png", GOOD), ("mask.png", damaged)))
    with pytest.raises(BadDataSet, match=r"member x.mask.png: it does not decode"):
        _verify_pixels(image, mask, {"size": [WIDTH, HEIGHT], "objects": []})
    with Image.open(io.BytesIO(thumbnail(damaged))) as shown:
        assert shown.size == (SIDE, SIDE)


@pytest.mark.parametrize("field", ["sha256", "size", "category", "objects"])
def test_a_record_without_a_needed_field_is_named(folder, field):
    record = {"sha256": "", "size": [1, 1], "category": "a", "objects": []}
    del record[field]
    sample = _labelled(record, **{"cls": b"0", "mask.png": b"mask"})
    with pytest.raises(BadDataSet, match=rf"member x.json: it lacks \['{field}'\]"):
        verify_sample("x", sample, parse_manifest(folder))
