"""Can a file of weights run code, or take more memory than its bytes are worth?"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import intact
from pretrain.checkpoint import load_teacher
from pretrain.command import require_place
from pretrain.initial.asked import Init
from pretrain.initial.compared import timm_heads
from pretrain.initial.files import LARGEST_HEADER, open_weights
from pretrain.initial.start import choose

SAID = (
    r"is not read: take the file from its authors again|name that file itself|no regular file|copy it again"
)


def header(fields: dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(shape: list[int], offsets: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": offsets}


SAFETENSORS = {
    "a header longer than memory": header({}, length=2**62),
    "a header longer than the file": header({}, length=1000),
    "a header of nothing": header({}, length=0),
    "a header that may be, of a file that ends": struct.pack("<Q", LARGEST_HEADER),
    "no header at all": b"\x01",
    "tensors that overlap": header({"a": one([2], [0, 8]), "b": one([2], [4, 12])}, bytes(12)),
    "a negative shape": header({"a": one([-1], [0, 4])}, bytes(4)),
    "a shape larger than its bytes": header({"a": one([10**12], [0, 4])}, bytes(4)),
    "a shape whose product overflows": header({"a": one([2**40, 2**40], [0, 4])}, bytes(4)),
    "bytes that lie behind the end": header({"a": one([2**40], [0, 2**42])}, bytes(4)),
    "no JSON": struct.pack("<Q", 8) + b"{{{{{{{{",
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_hostile_safetensors_header_is_told(name: str, tmp_path: Path, peak: Callable[[], int]) -> None:
    (tmp_path / "model.safetensors").write_bytes(SAFETENSORS[name])
    with pytest.raises(ValueError, match=SAID):
        open_weights(tmp_path)
    assert peak() < 2**24


WHOLE = {"shape": [16], "parts": [[0, 0, 16]]}
CHECKPOINTS = {  # layout, header, what is told
    "more values than bytes": (
        {"shape": [2**40], "parts": [[0, 0, 2**40]]},
        {},
        r"4,398,046,511,104 bytes of values, where",
    ),
    "one rank's bytes twice": (
        {"shape": [32], "parts": [[0, 0, 16], [0, 16, 16]]},
        {},
        r"where the whole of x lies",
    ),
    "a part that is missing": ({"shape": [16], "parts": [[0, 8, 8]]}, {}, r"where the whole of x lies"),
    "a negative shape": ({"shape": [-1], "parts": [[0, 0, -1]]}, {}, r"where the whole of x lies"),
    "no parts": ({"shape": [16]}, {}, r"is no list of parameters and their parts"),
    "fewer bytes": (WHOLE, {"x": one([2], [0, 8])}, r"holds 8 bytes of x, where .* 16 float32"),
    "no bytes": (WHOLE, {}, r"holds 0 bytes of x, where"),
    "tensors that overlap": (WHOLE, {"x": one([16], [0, 64]), "y": one([16], [0, 64])}, "that share bytes"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_is_no_larger_than_its_bytes(name: str, tmp_path: Path, peak: Callable[[], int]) -> None:
    (folder := tmp_path / "teacher").mkdir()
    entry, fields, told = CHECKPOINTS[name]
    (folder / "layout.json").write_text(json.dumps({"parameters": {"x": entry}}))
    (folder / "rank_00000.safetensors").write_bytes(header(fields, bytes(64)))
    (folder / "buffers.safetensors").write_bytes(header({}))
    intact.mark(tmp_path, intact.digest(tmp_path, intact.files_in(tmp_path)))
    with pytest.raises(ValueError, match=rf"{told}.*take another checkpoint"):
        load_teacher(tmp_path)
    assert peak() < 2**24


class Calls:
    """A pickle that calls a function when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize(
    ("function", "argument", "named"),
    [(os.mkdir, "harm", r"posix mkdir"), (bytearray, 2**33, r"(builtins|__builtin__) bytearray")],
)
def test_a_pickle_that_calls_is_not_read(
    function: Callable[..., Any], argument: Any, named: str, tmp_path: Path, peak: Callable[[], int]
) -> None:
    harm = tmp_path / "harm"
    path = tmp_path / "weights.pth"
    called = Calls(function, str(harm) if argument == "harm" else argument)
    torch.save({"model": {"a": torch.zeros(1)}, "x": called}, path)
    with pytest.raises(
        ValueError, match=rf"would call '{named}' when it is read.*save its state_dict\(\) alone"
    ):
        open_weights(path)
    assert not harm.exists() and peak() < 2**24


def rewritten(path: Path, change: Callable[[bytes], bytes], how: int = zipfile.ZIP_STORED) -> Path:
    """An archive of torch.save with another pickle, or packed."""
    torch.save({"a": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(content) if name.endswith(".pkl") else content)
    return path


def larger(content: bytes) -> bytes:
    """A tensor of 2^30 numbers in a storage of 4."""
    assert content.count(b"K\x04\x85") == 1
    return content.replace(b"K\x04\x85", b"J\x00\x00\x00\x40\x85")


def test_a_tensor_larger_than_its_storage_is_told(tmp_path: Path, peak: Callable[[], int]) -> None:
    with pytest.raises(ValueError, match="is no sound file of weights.*" + SAID):
        open_weights(rewritten(tmp_path / "weights.pth", larger))
    assert peak() < 2**26


def test_a_tensor_that_repeats_its_bytes_is_told(tmp_path: Path, peak: Callable[[], int]) -> None:
    """2 kB that LayerScale, or a search for what is not finite, would multiply out to gigabytes."""
    path = tmp_path / "weights.pth"
    told = r"holds 'b' of shape \(32768, 32768\), 4,294,967,296 bytes made of 4 by repeating them.*" + SAID
    torch.save({"model": [{"a": torch.zeros(3)}, {"b": torch.zeros(1).expand(2**15, 2**15)}]}, path)
    with pytest.raises(ValueError, match=told):
        open_weights(path)
    shared = torch.zeros(2**14)
    torch.save({str(number): shared.view(-1) for number in range(64)}, path)
    with pytest.raises(ValueError, match=r"holds tensors of 4,194,304 bytes in .* at most 4 times the file"):
        open_weights(path)
    torch.save({"tied": shared, "to": shared.view(-1), "ids": torch.arange(9).expand(1, -1)}, path)
    assert len(open_weights(path).tensors) == 3  # as models that are whole have them
    assert peak() < 2**24


def test_a_pickle_by_another_way_to_call_is_not_read(tmp_path: Path) -> None:
    path = rewritten(tmp_path / "weights.pth", lambda _: pickle.dumps(Calls(os.getcwd), protocol=4))
    with pytest.raises(ValueError, match=r"would call 'STACK_GLOBAL'"):
        open_weights(path)
    path = rewritten(tmp_path / "weights.pth", lambda _: b"\xffnonsense")
    with pytest.raises(ValueError, match=r"holds a damaged pickle"):
        open_weights(path)


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, peak: Callable[[], int]) -> None:
    path = rewritten(tmp_path / "weights.pth", lambda content: content, zipfile.ZIP_DEFLATED)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("weights/data/9", "w") as bomb,
    ):
        for _ in range(64):
            bomb.write(bytes(2**20))
    assert path.stat().st_size < 2**18
    with pytest.raises(ValueError, match=r"would grow when it is read: \d+ of \d+ entries are compressed"):
        open_weights(path)
    assert peak() < 2**24


def renamed(path: Path, names: Callable[[str], str], *more: tuple[str, bytes]) -> Path:
    """An archive of torch.save with other names of its entries, and others first."""
    torch.save({"a": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = [(names(name), archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (*more, *entries):
            archive.writestr(name, content)
    return path


def hostile_pickle(folder: Path) -> bytes:
    torch.save({"a": torch.zeros(4), "x": Calls(bytearray, 2**31)}, folder / "hostile.pth")
    with zipfile.ZipFile(folder / "hostile.pth") as archive:
        return archive.read("hostile/data.pkl")


def test_another_pickle_than_the_judged_one_is_not_read(tmp_path: Path, peak: Callable[[], int]) -> None:
    """Torch finds its pickle whatever its capitals: one of another name beside it would be judged in its place."""
    path, hostile = tmp_path / "weights.pth", hostile_pickle(tmp_path)
    told = r"holds \d pickles in \d entries, .* one data\.pkl belongs there.*" + SAID
    for names, entry in (
        (lambda name: name.replace("data.pkl", "decoy.pkl"), "weights/data.PKL"),
        (lambda name: name.replace("data.pkl", "decoy"), "weights/DATA.pkl"),
        (lambda name: name, "weights/data.PKL"),
        (lambda name: name, "weights/constants.pkl"),
        (lambda name: name.replace("weights/data.pkl", "other/data.pkl"), "weights/Data.Pkl"),
    ):
        with pytest.raises(ValueError, match=told):
            open_weights(renamed(path, names, (entry, hostile)))
    archive = renamed(path, lambda name: name, ("weights/data.pkl~", hostile)).read_bytes()
    path.write_bytes(archive.replace(b"weights/data.pkl~", b"weights/data.pkl\0"))
    with pytest.raises(ValueError, match=SAID):
        open_weights(path)
    for first in ("weights/VERSION", "other/version"):
        with pytest.raises(ValueError, match=r"holds 1 pickles in .*" + SAID):
            open_weights(renamed(path, lambda name: name, (first, b"")))
    assert len(open_weights(renamed(path, lambda name: name)).tensors) == 1
    assert peak() < 2**26


def test_an_archive_with_two_tables_of_contents_is_not_read(tmp_path: Path, peak: Callable[[], int]) -> None:
    """zipfile takes the record of 64 bits that lies before its locator, torch the one that the locator names."""
    path, hostile = tmp_path / "weights.pth", hostile_pickle(tmp_path)
    content, tables = b"", []
    for change in (lambda _: hostile, lambda good: good):
        archive = rewritten(path, change).read_bytes()
        table, end = archive.index(b"PK\x01\x02"), archive.rindex(b"PK\x05\x06")
        entries, size = struct.unpack("<HI", archive[end + 10 : end + 16])
        content += moved(archive, table, end, len(content))
        tables.append(at := len(content))
        content += struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, entries, entries, size, at - size)
    content += struct.pack("<IIQI", 0x07064B50, 0, tables[0], 1)
    content += struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=SAID):
        open_weights(path)
    assert peak() < 2**26


def moved(archive: bytes, table: int, end: int, by: int) -> bytes:
    """Entries and table of an archive as they are further down in a file."""
    moved, at = bytearray(archive[:end]), table
    while at < end:
        name, extra, comment = struct.unpack("<HHH", archive[at + 28 : at + 34])
        (place,) = struct.unpack("<I", archive[at + 42 : at + 46])
        moved[at + 42 : at + 46] = struct.pack("<I", place + by)
        at += 46 + name + extra + comment
    return bytes(moved)


def test_an_archive_that_lies_about_its_sizes_is_told(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(64)}, path)
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02", 0, content.rindex(b"weights/data/0"))
    content[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"would grow when it is read|damaged archive"):
        open_weights(path)


def test_a_pickle_outside_an_archive_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(
        ValueError, match=r"no archive as torch\.save writes since version 1\.6.*save it again"
    ):
        open_weights(path)


def test_a_file_that_was_cut_off_is_to_be_copied_again(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(100)}, tmp_path / "a.pth")
    (tmp_path / "a.safetensors").write_bytes(header({}))
    for name, length in (("a.pth", 900), ("a.pth", 0), ("a.safetensors", 5), ("a.safetensors", 0)):
        os.truncate(tmp_path / name, length)
        with pytest.raises(ValueError, match=rf"{name} has {length} bytes.*: copy it again"):
            open_weights(tmp_path / name)


def test_an_index_leads_to_no_other_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "other.safetensors").write_bytes(header({}))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(ValueError, match=r"names the file '\.\./other\.safetensors', which lies elsewhere"):
        open_weights(folder)
    index.write_text(json.dumps({"weight_map": {"a": f"{tmp_path}/other.safetensors"}}))
    with pytest.raises(ValueError, match=r"which lies elsewhere"):
        open_weights(folder)
    index.write_text("[" * 10**6)
    with pytest.raises(ValueError, match=r"is no JSON"):
        open_weights(folder)


def test_a_link_leads_to_no_other_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "other").write_bytes(header({}))
    (folder / "model.safetensors").symlink_to(tmp_path / "other")
    with pytest.raises(
        ValueError,
        match=r"is a link that leads out of the folder, to .*: copy it .* or name that file itself",
    ):
        open_weights(folder)


def test_a_link_that_leads_back_to_itself_is_told(tmp_path: Path) -> None:
    (link := tmp_path / "internimage.pth").symlink_to(link)
    for place in (tmp_path, link):
        with pytest.raises(ValueError, match=r"internimage\.pth is a link that leads back to itself: copy"):
            open_weights(place)
    with pytest.raises(OSError, match=r"leads back to itself: delete it, or name another place"):
        require_place("--out", link)


def test_links_of_a_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "12ab").write_bytes(header({"a": one([1], [0, 4])}, bytes(4)))
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/12ab")
    assert torch.equal(open_weights(snapshot).tensors["a"], torch.zeros(1))


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"is no regular file"):
        open_weights(tmp_path)
    with pytest.raises(ValueError, match=r"ends in '\.zip', which is no file of weights: give \.safetensors"):
        (tmp_path / "weights.zip").write_bytes(b"")
        open_weights(tmp_path / "weights.zip")


def test_a_config_that_is_no_config_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(header({}))
    (tmp_path / "config.json").write_text(" " * 2**23)
    with pytest.raises(ValueError, match=r"config\.json has 8,388,608 bytes, more than"):
        open_weights(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"is a JSON list, no object"):
        open_weights(tmp_path)


def test_containers_without_end_and_names_that_are_none_are_told(tmp_path: Path) -> None:
    endless: dict[str, Any] = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "weights.pth")
    init = Init(tmp_path / "weights.pth", None, False)
    with pytest.raises(ValueError, match=r"more than 8 containers in one another, or one that holds itself"):
        choose(open_weights(tmp_path / "weights.pth").tensors, init)
    for name in (0, 7, ("a",)):
        torch.save({"model": {name: torch.zeros(1)}}, tmp_path / "weights.pth")
        with pytest.raises(
            ValueError, match=r"has a key of type (int|tuple) where the name of a tensor belongs"
        ):
            choose(open_weights(tmp_path / "weights.pth").tensors, init)
    with pytest.raises(ValueError, match=r"has model_args \[4\], where arguments by name belong"):
        timm_heads({"architecture": "vit_tiny_patch16_224", "model_args": [4]})


def test_a_key_that_is_small_in_the_file_alone_is_not_read(tmp_path: Path, peak: Callable[[], int]) -> None:
    """Halves that are the same: a hash of the key walks over 2^60 of them, and its words are gigabytes."""
    shared: Any = ("a" * 2**14,) * 2**14
    for _ in range(60):
        shared = (shared, shared)
    deep: Any = ()
    for _ in range(200):
        deep = (deep,)
    for name in (shared[0], deep, ("a" * 2**19,) * 3):
        torch.save({"model": [("x", name), torch.zeros(1)]}, tmp_path / "weights.pth")
        with pytest.raises(ValueError, match=r"holds tuples in one another that would be .*" + SAID):
            open_weights(tmp_path / "weights.pth")
    classes = tuple(f"class number {number}" for number in range(20_000))
    torch.save({"meta": {"CLASSES": classes, 7: ((1, 2), 3)}, "a": torch.zeros(1)}, tmp_path / "weights.pth")
    assert open_weights(tmp_path / "weights.pth").tensors["meta"]["CLASSES"] == classes
    assert peak() < 2**26


@pytest.fixture
def peak() -> Callable[[], int]:
    """Bytes by which the process's highest use of memory has grown since the test began."""
    reset = Path("/proc/self/clear_refs")
    reset.write_text("5")
    before = highest()
    return lambda: highest() - before


def highest() -> int:
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
