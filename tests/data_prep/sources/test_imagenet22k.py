"""Is ImageNet-22k read from its published archives, with published class numbers, and the same shards?"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from data_prep.schema import Manifest
from data_prep.sources import archives
from data_prep.sources.imagenet22k import ImageNet22k
from data_prep.sources.imagenet_maps import read_maps
from data_prep.sources.synsets import classes_of
from data_prep.sources.tar_index import members_of
from tests.data_prep.sources.archive import header, tar_of
from tests.data_prep.sources.built import run, samples
from tests.data_prep.sources.conftest import picture

COUNTS = {
    "n00004475": 3,
    "n01440764": 6,
    "n02012849": 5,
    "n03126707": 4,
}  # organism; tench; crane (bird, machine)

IN_1K = ("n01440764", "n02012849", "n03126707")


def _files(synset: str, count: int) -> list[tuple[str, bytes]]:
    files = [(f"{synset}_{n}.JPEG", picture(hash_of(synset) + n)) for n in range(count)]
    if synset == "n01440764":
        files[1] = (files[1][0], picture(77, "PNG"))  # a PNG that is called .JPEG
        files[2] = (files[2][0], picture(78, mode="CMYK"))
        files[3] = (files[3][0], files[3][1][:-100])  # cut off
        files.append((files[4][0], picture(79)))  # a name twice
    return files


def hash_of(synset: str) -> int:
    return int(synset[1:]) % 9973


def _tars() -> dict[str, bytes]:
    return {f"{synset}.tar": tar_of(_files(synset, count)) for synset, count in COUNTS.items()}


def _layout(folder: Path, layout: str) -> Path:
    folder.mkdir()
    if layout == "fall11":
        path = folder / "fall11_whole.tar"
        path.write_bytes(tar_of([(name, content) for name, content in _tars().items()]))
        return path
    if layout == "winter21":  # a whole tar with a folder in it, beside other files
        path = folder / "winter21_whole.tar"
        named = [(f"winter21_whole/{name}", content) for name, content in _tars().items()]
        path.write_bytes(tar_of([("winter21_whole/README", b"text"), *named]))
        return folder
    for name, content in _tars().items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("layout", ["fall11", "winter21", "folder"])
def test_every_layout_gives_the_same_samples(tmp_path, layout):
    source, out = _layout(tmp_path / "in", layout), tmp_path / "out"
    command = [
        "imagenet22k",
        "--from",
        source,
        "--scratch",
        tmp_path / "scratch",
        "--out",
        out,
        "--index-processes",
        "1",
        "--allow-missing",
    ]
    assert run(*command, "--prompts", "a photo of {}.", "--shard-size", "5") == 0
    manifest, found = Manifest.read(out), samples(out)
    assert manifest.dropped == {"duplicate_name": 1, "truncated": 1}
    assert Counter(sample["synset"] for sample in found.values()) == {**COUNTS, "n01440764": 5}
    numbers = classes_of("22k-swin").number
    assert all(sample["cls"] == numbers[sample["synset"]] for sample in found.values())
    crane = next(sample for sample in found.values() if sample["synset"] == "n02012849")
    assert crane["category"] == "crane (n02012849)" and crane["txt"] == "a photo of a crane."
    assert crane["tags"] == [["crane (n02012849)", 1.0]] and len(manifest.categories) == 21841
    by_name = {sample["source_name"]: sample for sample in found.values()}
    assert by_name["n01440764/n01440764_1.JPEG"]["image"] == picture(77, "PNG")
    assert (
        "mode" in by_name["n01440764/n01440764_2.JPEG"]["changed"].lower()
        or by_name["n01440764/n01440764_2.JPEG"]["changed"]
    )
    assert by_name["n01440764/n01440764_4.JPEG"]["image"] == picture(
        hash_of("n01440764") + 4
    )  # the first of two
    assert [by_name[name]["synset"] for name in by_name] != sorted(
        by_name[name]["synset"] for name in by_name
    )


def test_shards_do_not_depend_on_layout_workers_or_a_second_index(tmp_path):
    shards = []
    for number, (layout, seed) in enumerate([("fall11", 0), ("folder", 0), ("folder", 1)]):
        source = _layout(tmp_path / f"in{number}", layout)
        out = tmp_path / f"out{number}"
        command = ["--from", source, "--scratch", tmp_path / f"s{number}", "--out", out, "--seed", seed]
        assert run("imagenet22k", *command, "--shard-size", "4", "--allow-missing") == 0
        shards.append([shard.sha256 for shard in Manifest.read(out).shards])
    assert shards[0] == shards[1] != shards[2]


def test_a_validation_split_takes_so_many_of_every_class_and_small_classes_stay_out(tmp_path):
    source, out = _layout(tmp_path / "in", "folder"), tmp_path / "out"
    command = [
        "imagenet22k",
        "--from",
        source,
        "--scratch",
        tmp_path / "s",
        "--out",
        out,
        "--index-processes",
        "1",
        "--allow-missing",
    ]
    assert run(*command, "--classes", "22k", "--val-per-class", "2", "--min-images", "4") == 0
    train, val = samples(out / "train"), samples(out / "val")
    assert Counter(sample["synset"] for sample in val.values()).keys() == {
        "n01440764",
        "n02012849",
        "n03126707",
    }
    names = [sample["source_name"] for sample in (*train.values(), *val.values())]
    assert len(set(names)) == len(names) == 6 + 5 + 4 - 1
    dropped = [Counter(Manifest.read(out / split).dropped) for split in ("train", "val")]
    assert (
        dropped[0] + dropped[1] == {"truncated": 1, "duplicate_name": 1} and dropped[0]["duplicate_name"] == 1
    )
    assert len(val) + dropped[1]["truncated"] == 2 * 3


@pytest.mark.parametrize("is_json", [False, True])
def test_published_maps_give_numbers_and_splits(tmp_path, is_json):
    source, out = _layout(tmp_path / "in", "fall11"), tmp_path / "out"
    number = classes_of("22k-swin").number
    train = [(f"{s}/{s}_{n}.JPEG", number[s]) for s, count in COUNTS.items() for n in range(1, count)]
    val = [(f"{s}/{s}_0.JPEG", number[s]) for s in COUNTS]
    paths = [tmp_path / f"ILSVRC2011fall_whole_map_{split}.txt" for split in ("train", "val")]
    for path, pairs in zip(paths, (train, val), strict=True):
        path.write_text(
            json.dumps(pairs) if is_json else "".join(f"{name}\t{label}\n" for name, label in pairs)
        )
    command = [
        "imagenet22k",
        "--from",
        source,
        "--scratch",
        tmp_path / "s",
        "--out",
        out,
        "--index-processes",
        "1",
        "--allow-missing",
    ]
    assert run(*command, "--maps", *paths) == 0
    found = samples(out / "val")
    assert {sample["source_name"]: sample["cls"] for sample in found.values()} == dict(val)
    assert len(samples(out / "train")) == len(train) - 1


def test_maps_that_contradict_themselves_are_refused(tmp_path):
    for text, message in [
        ("n01440764/n01440764_1.JPEG\t0\nn01440764/n01440764_2.JPEG\t1\n", "has the numbers 0 and 1"),
        ("n01440764/n01440764_1.JPEG\t0\nn02012849/n02012849_2.JPEG\t0\n", "two synsets have one number"),
        ("n01440764/n01440764_1.JPEG\t7\n", "neither 0, 1, ..."),
        ("nothing here\n", "holds no pairs"),
    ]:
        (tmp_path / "map.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_maps([tmp_path / "map.txt"], tmp_path / "map.parquet")


def _map(path: Path, names: list[str]) -> Path:
    number = classes_of("22k-swin").number
    path.write_text("".join(f"{name[:9]}/{name}\t{number[name[:9]]}\n" for name in names))
    return path


def test_an_image_that_is_listed_twice_is_refused_in_one_map_and_across_both(tmp_path, capsys):
    source = _layout(tmp_path / "in", "fall11")
    names = [f"n00004475_{n}.JPEG" for n in range(3)]
    command = ["imagenet22k", "--from", source, "--scratch", tmp_path / "s", "--out", tmp_path / "out"]
    for train, val, splits in [
        ([*names[:2], names[0]], [names[2]], "train and train"),
        (names, [names[0]], "train and val"),
    ]:
        maps = [_map(tmp_path / "train.txt", train), _map(tmp_path / "val.txt", val)]
        assert run(*command, "--maps", *maps) == 1
        assert f"n00004475/n00004475_0.JPEG is listed for {splits}" in capsys.readouterr().err


def test_images_that_a_map_names_and_the_archives_lack_are_counted(tmp_path):
    source, out = _layout(tmp_path / "in", "fall11"), tmp_path / "out"
    names = [f"{synset}_{n}.JPEG" for synset, count in COUNTS.items() for n in range(count)]
    missing = ["n00004475_900.JPEG", "n00004475_901.JPEG"]
    train = _map(tmp_path / "train.txt", [*names[1:], *missing])
    command = ["imagenet22k", "--from", source, "--scratch", tmp_path / "s", "--out", out]
    assert run(*command, "--maps", train) == 0
    manifest = Manifest.read(out)
    assert manifest.dropped == {"duplicate_name": 1, "missing_image": 2, "truncated": 1}
    assert manifest.num_samples == len(names) - 1 - 1 and manifest.builder["left_out"] == {"not_in_map": 1}


def test_synsets_without_archives_are_an_error_unless_allowed(tmp_path, capsys):
    source = _layout(tmp_path / "in", "folder")
    command = ["imagenet22k", "--from", source, "--scratch", tmp_path / "s", "--out", tmp_path / "out"]
    assert run(*command) == 1
    assert "hold images of 4 of 21841 synsets" in capsys.readouterr().err
    whole = [f"{synset}_0.JPEG" for synset in COUNTS]
    assert run(*command, "--maps", _map(tmp_path / "more.txt", [*whole, "n01443537_1.JPEG"])) == 1
    assert "4 of 5 synsets" in capsys.readouterr().err
    assert run(*command, "--allow-missing") == 0
    assert "hold images of 4 of 21841 synsets" in capsys.readouterr().out
    builder = Manifest.read(tmp_path / "out").builder
    assert (builder["synsets_expected"], builder["synsets_found"]) == (21841, 4) and not builder["left_out"]
    command[-1] = tmp_path / "whole"
    assert run(*command, "--maps", _map(tmp_path / "map.txt", whole)) == 0


def test_images_outside_the_classes_are_counted(tmp_path):
    source, out = _layout(tmp_path / "in", "folder"), tmp_path / "out"
    command = ["imagenet22k", "--from", source, "--scratch", tmp_path / "s", "--out", out, "--allow-missing"]
    assert run(*command, "--classes", "1k", "--min-images", "5") == 0
    left_out = Manifest.read(out).builder["left_out"]
    assert left_out == {
        "other_synset": sum(COUNTS[synset] for synset in COUNTS if synset not in IN_1K),
        "few_images": 4,
    }


def test_millions_of_items_are_a_few_numbers_until_a_worker_reads_its_own(tmp_path):
    source = ImageNet22k(
        (str(_layout(tmp_path / "in", "folder")),), tmp_path / "s", index_processes=1, allow_missing=True
    )
    (collection,) = source.collections()
    items = collection.items
    assert len(items) == sum(COUNTS.values()) + 1
    assert len(items[3:9]) == 6 and [one.key for one in items[3:9]] == [one.key for one in items][3:9]
    assert items[-1].key.endswith(f"{len(items) - 1:09d}") and len(items[5:99]) == len(items) - 5
    assert len(repr(items[0 : len(items)])) < 300


def test_cut_and_damaged_archives_are_an_error_unless_so_many_are_allowed(tmp_path, capsys):
    folder = _layout(tmp_path / "in", "folder")
    tar = folder / "n00004475.tar"
    whole = tar.read_bytes()
    with open(tar, "rb") as file:
        _, second, _ = members_of(file)
    command = [
        "imagenet22k",
        "--from",
        folder,
        "--scratch",
        tmp_path / "s",
        "--index-processes",
        "1",
        "--allow-missing",
    ]
    cut, junk = whole[: second.offset - 512], b"this is no tar" * 100
    overwritten = whole[: second.offset - 512] + b"garbage!" * 64 + whole[second.offset :]
    for number, (content, num_left) in enumerate([(cut, 1), (overwritten, 1), (junk, 0)]):
        tar.write_bytes(content)
        out = tmp_path / f"out{number}"
        assert run(*command, "--out", out) == 1 and not out.exists()
        error = capsys.readouterr().err
        assert (
            "1 archives are damaged" in error and "n00004475.tar in" in error and "--max-damaged 1" in error
        )
        assert run(*command, "--out", out, "--max-damaged", "1") == 0
        assert "are lost: n00004475.tar in" in capsys.readouterr().out
        assert Manifest.read(out).builder["damaged_archives"] == 1
        found = Counter(sample["synset"] for sample in samples(out).values())
        assert found["n00004475"] == num_left
    tar.write_bytes(whole)  # in the same scratch folder
    assert run(*command, "--out", tmp_path / "mended") == 0
    assert Manifest.read(tmp_path / "mended").builder["damaged_archives"] == 0


def test_a_cut_whole_tar_is_an_error_unless_allowed(tmp_path, capsys):
    path = _layout(tmp_path / "in", "fall11")
    with open(path, "rb") as file:
        _, second, *_ = members_of(file)
    command = [
        "imagenet22k",
        "--from",
        path,
        "--scratch",
        tmp_path / "s",
        "--out",
        tmp_path / "out",
        "--allow-missing",
    ]
    whole = path.read_bytes()
    for end, num_damaged in [(second.offset - 512, 1), (second.offset + 600, 2)]:
        path.write_bytes(whole[:end])
        assert run(*command) == 1
        assert f"{num_damaged} archives are damaged" in capsys.readouterr().err
    assert run(*command, "--max-damaged", "2") == 0
    assert Manifest.read(tmp_path / "out").builder["damaged_archives"] == 2


def test_a_folder_without_archives_is_refused(tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "x.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="none holds no tars: pass"):
        ImageNet22k((str(tmp_path / "none"),), tmp_path / "s").collections()


def test_an_index_by_several_processes_is_the_same_and_continues_where_it_stopped(tmp_path, monkeypatch):
    source = str(_layout(tmp_path / "in", "fall11"))
    monkeypatch.setattr(archives, "CHUNK", 1)
    many = archives.index_archives([source], tmp_path / "many", 2)
    one = archives.index_archives([source], tmp_path / "one", 1)
    rows = [[pq.read_table(table).to_pylist() for table in index.tables] for index in (many, one)]
    assert rows[0] == rows[1] and len(rows[0]) == len(COUNTS) and many.fingerprint == one.fingerprint
    listed: list[str] = []
    index_chunk = archives._index_chunk

    def counting(tars, folder, number):
        listed.extend(tar.synset for tar in tars)
        index_chunk(tars, folder, number)

    monkeypatch.setattr(archives, "_index_chunk", counting)
    Path(one.tables[2].replace(".parquet", ".json")).unlink()
    assert archives.index_archives([source], tmp_path / "one", 1) == one and listed == [sorted(COUNTS)[2]]


def test_archives_behind_a_url_or_in_this_folder_give_the_same_samples(tmp_path, monkeypatch):
    source = _layout(tmp_path / "in", "fall11")
    monkeypatch.chdir(source.parent)
    fsspec.filesystem("memory").pipe_file("/in22k/fall11_whole.tar", source.read_bytes())
    shards = []
    for number, archive in enumerate([source.name, "memory://in22k/fall11_whole.tar"]):
        out = tmp_path / f"out{number}"
        command = [
            "--from",
            archive,
            "--scratch",
            tmp_path / f"s{number}",
            "--index-processes",
            "1",
            "--allow-missing",
        ]
        assert run("imagenet22k", *command, "--out", out) == 0
        shards.append((Manifest.read(out).shards, Manifest.read(out).builder["inputs_sha256"]))
    assert shards[0] == shards[1]


def test_a_packed_whole_tar_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "winter21_whole.tar.gz"
    path.write_bytes(gzip.compress(tar_of([("n01440764.tar", header(b"x", 0))])))
    with pytest.raises(ValueError, match="packed by gzip, unpack it first"):
        ImageNet22k((str(path),), tmp_path / "s").collections()
