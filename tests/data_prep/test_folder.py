"""Does the folder source take every layout and every bad file that people have?"""

from __future__ import annotations

import errno
import io
import json
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from data_prep.__main__ import main
from data_prep.build import Options, build
from data_prep.check import check
from data_prep.images import check_image
from data_prep.limits import BadImage, Limits
from data_prep.schema import Manifest
from data_prep.sources.captions_table import clean_caption
from data_prep.sources.folder import Folder
from data_prep.sources.listing import FileRef
from tests.paths import SHARED, needs_shared

OPTIONS = Options(workers=1, max_bad=1.0)


def _picture(mode: str = "RGB", size: tuple[int, int] = (48, 40), seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 4), dtype=np.uint8), "RGBA").convert(mode)
    return small.resize(size)


def _encoded(form: str, mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    _picture(mode, options.pop("size", (48, 40)), options.pop("seed", 0)).save(buffer, form, **options)
    return buffer.getvalue()


def _samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """Name in the source -> members of its sample."""
    grouped: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                grouped.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return {json.loads(parts["json"])["source_name"]: parts for parts in grouped.values()}


def _build(source: Path, out: Path, options: Options = OPTIONS) -> Manifest:
    (collection,) = Folder(str(source)).collections()
    build(collection, out, options)
    return check(out)


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_class_folders_of_mixed_formats_keep_their_original_bytes(tmp_path):
    files = {
        "cat/a.jpg": _encoded("JPEG"),
        "cat/b.png": _encoded("PNG", "RGB"),
        "dog/c.webp": _encoded("WEBP"),
        "dog/d.jpeg": _encoded("PNG", "L"),  # the content decides, not the name
        "dog/notes.txt": b"not an image",
    }
    manifest = _build(_write(tmp_path / "in", files), tmp_path / "out")
    samples = _samples(tmp_path / "out")
    assert manifest.categories == ("cat", "dog") and manifest.num_samples == 4 and not manifest.has_text
    for name, extension in [
        ("cat/a.jpg", "jpg"),
        ("cat/b.png", "png"),
        ("dog/c.webp", "webp"),
        ("dog/d.jpeg", "png"),
    ]:
        assert samples[name][extension] == files[name]
    assert [samples[name]["cls"] for name in ("cat/a.jpg", "dog/c.webp")] == [b"0", b"1"]
    assert manifest.tags == ("cat", "dog")
    assert json.loads(samples["dog/c.webp"]["json"])["tags"] == [["dog", 1.0]]


def test_splits_share_their_categories(tmp_path):
    files = {
        "train/b/1.jpg": _encoded("JPEG"),
        "train/c/2.jpg": _encoded("JPEG"),
        "val/c/3.jpg": _encoded("JPEG"),
    }
    train, val = Folder(str(_write(tmp_path, files))).collections()
    assert (train.split, val.split) == ("train", "val")
    assert train.categories == val.categories == ("b", "c")


def test_bad_images_are_dropped_and_counted_by_reason_and_name(tmp_path):
    jpeg, png = _encoded("JPEG", size=(96, 96)), _encoded("PNG", size=(96, 96))
    broken = bytearray(png)
    broken[len(png) // 2] ^= 0xFF
    bomb = bytearray(_encoded("PNG", "L", size=(64, 64)))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height in the header, with its checksum
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    files = {
        "x/good.jpg": jpeg,
        "x/truncated.jpg": jpeg[: len(jpeg) // 2],
        "x/corrupt.png": bytes(broken),
        "x/text.png": b"this is no image at all",
        "x/empty.jpg": b"",
        "x/bomb.png": bytes(bomb),
        "x/tiny.png": _encoded("PNG", size=(8, 200)),
        "x/ribbon.png": _encoded("PNG", size=(40, 900)),
        "x/listing.gif": _encoded("PPM"),
    }
    manifest = _build(_write(tmp_path / "in", files), tmp_path / "out")
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    reasons = {
        "x/truncated.jpg": "truncated",
        "x/corrupt.png": "corrupt",
        "x/text.png": "not_an_image",
        "x/empty.jpg": "empty",
        "x/bomb.png": "too_large",
        "x/tiny.png": "too_small",
        "x/ribbon.png": "too_long",
        "x/listing.gif": "not_an_image",
    }
    assert {entry["name"]: entry["reason"] for entry in dropped} == reasons
    assert manifest.dropped == dict(Counter(reasons.values())) and manifest.num_samples == 1


def test_a_disk_that_fails_stops_the_build_and_the_next_run_loses_nothing(tmp_path, monkeypatch, capsys):
    source = _write(tmp_path / "in", {f"x/{i}.jpg": _encoded("JPEG", seed=i) for i in range(9)})
    command = ["build", "folder", "--from", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]
    command += ["--max-bad", "1"]
    read = FileRef.read

    def failing(ref, at_most=None):
        if ref.path.endswith("5.jpg"):
            raise OSError(errno.EIO, "Input/output error")
        return read(ref, at_most)

    with monkeypatch.context() as patch:
        patch.setattr(FileRef, "read", failing)
        assert main(command) == 1
    assert "5.jpg cannot be read ([Errno 5] Input/output error)" in (shown := capsys.readouterr().err)
    assert "run the same command again" in shown and not list((tmp_path / "out").glob("*.tar"))
    assert main(command) == 0
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.num_samples == 9 and not manifest.dropped


def test_a_file_that_vanished_is_left_out_and_a_folder_that_vanished_stops_the_build(tmp_path):
    source = _write(tmp_path / "in", {f"x/{i}.jpg": _encoded("JPEG", seed=i) for i in range(3)})
    (collection,) = Folder(str(source)).collections()
    (source / "x" / "1.jpg").unlink()
    build(collection, tmp_path / "out", Options(workers=1, max_bad=1))
    assert Manifest.read(tmp_path / "out").dropped == {"vanished": 1}
    for path in (source / "x").iterdir():
        path.unlink()  # as the folder where a disk was mounted
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=r"cannot be read .*run the same command again"):
            build(collection, tmp_path / "other", Options(workers=1, max_bad=1))
        if (source / "x").exists():
            (source / "x").rmdir()


def test_damage_inside_a_jpeg_stream_is_seen():
    content = bytearray(_encoded("JPEG", size=(128, 128), quality=95))
    middle = len(content) // 2
    content[middle : middle + 8] = b"\xff\xd0\xff\xd3\xff\xd5\xff\xd1"
    with pytest.raises(BadImage):
        check_image(bytes(content), Limits())


def test_a_rotated_photograph_is_turned_upright_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    checked = check_image(_encoded("JPEG", size=(64, 40), exif=exif), Limits())
    image = Image.open(io.BytesIO(checked.content))
    assert checked.changed == "turned" and checked.size == image.size == (40, 64)
    assert image.getexif().get(0x0112, 1) == 1


def test_cmyk_16_bit_and_animated_images_become_plain_ones():
    cmyk = check_image(_encoded("JPEG", "CMYK"), Limits())
    assert Image.open(io.BytesIO(cmyk.content)).mode == "RGB" and cmyk.changed == "mode_CMYK"
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 40), 128 * 257, np.uint16)).save(buffer, "PNG")
    deep = check_image(buffer.getvalue(), Limits())
    assert np.asarray(Image.open(io.BytesIO(deep.content))).max() == 128
    buffer = io.BytesIO()
    _picture().save(buffer, "WEBP", save_all=True, append_images=[_picture(seed=1)], duration=10)
    still = check_image(buffer.getvalue(), Limits())
    assert still.extension == "jpg" and getattr(Image.open(io.BytesIO(still.content)), "n_frames", 1) == 1


TABLE = (
    b"image\tcaption\tlicence\n"
    b'pics/a.png\tA cat "on" a mat\tCC0\n'
    b"pics/a.png\tanother\x00 \x07caption \xc3\xa9\tCC0\r\n"
    b"pics/b.jpg\tbroken \xff\xfe text\tCC0\n"
    b"pics/c.jpg\tgood\tCC BY\n"
    b"pics/c.jpg\tbroken \xe9\tCC BY\n"
    b"pics/gone.jpg\twhere is it?\tCC0\n"
    b"../../etc/passwd\tno such image\tCC0\n"
    b"pics/c.jpg\ttoo few cells\n"
    b"pics/d.jpg\t \t\n"
)


@pytest.fixture(params=["folder", "tar"])
def captioned(request, tmp_path) -> Path:
    """The same images with a captions.tsv, as a folder and as a tar with traps in it."""
    jpeg = _encoded("JPEG")
    files = {
        "pics/a.png": _encoded("PNG", "RGBA"),
        "pics/b.jpg": jpeg,
        "pics/c.jpg": jpeg,
        "pics/d.jpg": jpeg,
    }
    folder = _write(tmp_path / "in", {**files, "captions.tsv": TABLE, "pics/untold.jpg": jpeg})
    if request.param == "folder":
        return folder
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for path in sorted(folder.rglob("*")):
            tar.add(path, path.relative_to(folder).as_posix(), recursive=False)
        for name, kind in [
            ("pics/link.jpg", tarfile.SYMTYPE),
            ("pics/hard.jpg", tarfile.LNKTYPE),
            ("p.jpg", tarfile.FIFOTYPE),
        ]:
            trap = tarfile.TarInfo(name)
            trap.type, trap.linkname = kind, "/etc/passwd"
            tar.addfile(trap)
    return tmp_path / "in.tar"


def test_captions_are_read_cleaned_and_the_bad_ones_dropped_and_counted(captioned, tmp_path):
    manifest = _build(captioned, tmp_path / "out")
    samples = _samples(tmp_path / "out")
    assert (
        set(samples) == {"pics/a.png", "pics/b.jpg", "pics/c.jpg"}
        and manifest.has_text
        and not manifest.has_category
    )
    record = json.loads(samples["pics/a.png"]["json"])
    assert record["captions"] == ['A cat "on" a mat', "another caption é"] and record["extra"] == {
        "licence": "CC0"
    }
    assert samples["pics/a.png"]["txt"].decode() == 'A cat "on" a mat'
    assert json.loads(samples["pics/c.jpg"]["json"])["captions"] == ["good", "broken é"]  # Windows-1252
    assert json.loads(samples["pics/b.jpg"]["json"])["captions"] == ["broken ÿþ text"]
    assert manifest.dropped == {
        "caption_columns": 1,
        "caption_empty": 1,
        "missing_image": 2,
        "no_caption": 1,
    }


def test_a_broken_caption_costs_the_image_only_when_it_was_the_last(tmp_path):
    files = {"a.jpg": _encoded("JPEG"), "captions.tsv": b"image\tcaption\na.jpg\t\x01 \na.jpg\tfine\n"}
    assert _build(_write(tmp_path / "in", files), tmp_path / "out").num_samples == 1


def test_too_many_bad_files_stop_the_command_with_code_1_and_the_counts(tmp_path, capsys):
    files = {f"x/{i}.jpg": _encoded("JPEG", seed=i) for i in range(9)}
    _write(tmp_path / "in", {**files, "x/bad.jpg": b"\xff\xd8\xff nonsense"})
    command = [
        "build",
        "folder",
        "--from",
        str(tmp_path / "in"),
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "1",
    ]
    assert main(command) == 1
    shown = capsys.readouterr().err
    assert (
        "1 of 10 inputs" in shown
        and "max_bad=0.01" in shown
        and not (tmp_path / "out" / "manifest.json").exists()
    )
    assert main([*command, "--max-bad", "0.1"]) == 0


def test_captions_lose_control_characters_and_are_composed():
    assert clean_caption("e\u0301\x00\tx\u200d\x1b[0m".encode()) == "é x\u200d[0m"


def test_a_changed_input_is_not_taken_for_the_old_one(tmp_path):
    source = _write(tmp_path / "in", {"x/a.jpg": _encoded("JPEG")})
    _build(source, tmp_path / "out")
    _write(source, {"x/b.jpg": _encoded("JPEG", seed=1)})
    with pytest.raises(ValueError, match="inputs_sha256"):
        _build(source, tmp_path / "out")


def test_prompts_give_every_image_the_captions_of_its_class_in_all_splits(tmp_path):
    files = {
        f"{split}/{kind}/1.jpg": _encoded("JPEG")
        for split in ("train", "val")
        for kind in ("ice-cream", "dog")
    }
    command = [
        "build",
        "folder",
        "--from",
        str(_write(tmp_path / "in", files)),
        "--out",
        str(tmp_path / "out"),
    ]
    prompts = ["a photo of {}.", "{}"]
    assert main([*command, "--prompts", *prompts, "--workers", "1", "--seed", "3"]) == 0
    for split in ("train", "val"):
        folder = tmp_path / "out" / split
        manifest, samples = check(folder), _samples(folder)
        assert manifest.has_text and manifest.has_category and manifest.builder["prompts"] == prompts
        told = {name: json.loads(parts["json"])["captions"] for name, parts in samples.items()}
        assert told == {
            "ice-cream/1.jpg": ["a photo of an ice cream.", "an ice cream"],
            "dog/1.jpg": ["a photo of a dog.", "a dog"],
        }
        assert samples["dog/1.jpg"]["txt"] == b"a photo of a dog." and samples["dog/1.jpg"]["cls"] == b"0"
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        assert tokenizer.unk_token_id not in tokenizer("a photo of an ice cream")["input_ids"]


def test_without_prompts_a_data_set_from_before_them_is_complete(tmp_path):
    source = _write(tmp_path / "in", {"x/a.jpg": _encoded("JPEG")})
    assert "prompts" not in _build(source, tmp_path / "out").builder
    (other,) = Folder(str(source), prompts=("{}",)).collections()
    with pytest.raises(ValueError, match=r'prompts: nothing there, \["{}"\] asked'):
        build(other, tmp_path / "out", OPTIONS)


@pytest.mark.parametrize("prompt", ["a photo", "", "a photo of a {}.", "The {}"])
def test_a_prompt_without_a_place_for_the_name_or_with_a_second_article_is_refused(tmp_path, prompt):
    with pytest.raises(ValueError, match=r"must hold {}, .* no article before it: pass --prompts"):
        Folder(str(tmp_path), prompts=("{}", prompt))


def test_prompts_without_class_folders_or_beside_a_table_are_refused(tmp_path):
    source = _write(tmp_path, {"a.jpg": _encoded("JPEG")})
    with pytest.raises(ValueError, match=r"has no class folders, .* such as 'a.jpg': move"):
        Folder(str(source), prompts=("{}",)).collections()
    _write(source, {"captions.tsv": b"image\tcaption\na.jpg\tfine\n"})
    with pytest.raises(ValueError, match=r"has a captions.tsv, .* leave out --prompts"):
        Folder(str(source), prompts=("{}",)).collections()


@pytest.mark.parametrize(("images", "masks", "told"), [
    ("images", "masks", "'images' and 'masks'"),
    ("images/train", "masks/train", "'images' and 'masks'"),
    ("images/a", "images/b", None),
    ("a/images/cat", "b/masks/dog", None),
    ("a/images", "b/masks", "'images' and 'masks'"),
    ("ade/Images/training", "ade/annotations/training", "'ade/Images' and 'ade/annotations'"),
    ("photographs/cat", "masks/cat", None),
])  # fmt: skip
def test_images_beside_their_masks_are_no_classes(tmp_path, images, masks, told):
    source = _write(tmp_path, {f"{images}/1.jpg": _encoded("JPEG"), f"{masks}/1.png": _encoded("PNG")})
    if told is None:
        assert Folder(str(source)).collections()
        return
    with pytest.raises(ValueError, match=rf"has images in {told}, .* name the folder of the images"):
        Folder(str(source)).collections()


def test_classes_tsv_gives_the_numbers_and_must_name_every_class(tmp_path):
    jpeg = _encoded("JPEG")
    source = _write(
        tmp_path / "in", {"a/1.jpg": jpeg, "b/1.jpg": jpeg, "classes.tsv": b"label\tname\n1\ta\n0\tb\n"}
    )
    assert Folder(str(source)).collections()[0].categories == ("b", "a")
    _write(source, {"classes.tsv": b"label\tname\n0\ta\n"})
    with pytest.raises(ValueError, match=r"does not name the classes \['b'\]"):
        Folder(str(source)).collections()


@needs_shared
def test_clothing10_becomes_three_splits_with_the_labels_of_classes_tsv(tmp_path):
    source = SHARED / "data" / "clothing10"
    collections = {collection.split: collection for collection in Folder(str(source)).collections()}
    assert {split: len(collection.items) for split, collection in collections.items()} == {
        "train": 1000,
        "val": 250,
        "test": 245,
    }
    build(collections["val"], tmp_path / "val", OPTIONS)
    manifest = check(tmp_path / "val")
    named = dict(line.split("\t") for line in (source / "classes.tsv").read_text().splitlines()[1:])
    assert dict(enumerate(manifest.categories)) == {int(label): name for label, name in named.items()}
    assert manifest.num_samples == 250 and manifest.has_category and not manifest.dropped
    name, parts = next(iter(_samples(tmp_path / "val").items()))
    tar_name, _, member = name.partition("/")
    with tarfile.open(source / "val" / tar_name) as tar:
        assert parts["jpg"] == tar.extractfile(member).read()
    assert manifest.categories[int(parts["cls"])] == tar_name.removesuffix(".tar")


@needs_shared
@pytest.mark.parametrize(
    ("name", "num_samples", "num_captions"), [("emoji-names", 1664, 1664), ("coco-free", 111, 555)]
)
def test_captioned_tars_are_read_directly_and_their_tokenizer_loads_offline(
    tmp_path, name, num_samples, num_captions
):
    manifest = _build(SHARED / "data" / f"{name}.tar", tmp_path / "out")
    samples = _samples(tmp_path / "out")
    records = [json.loads(parts["json"]) for parts in samples.values()]
    assert manifest.num_samples == len(samples) == num_samples and not manifest.dropped
    assert sum(len(record["captions"]) for record in records) == num_captions
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    words = tokenizer(records[0]["captions"][0])["input_ids"]
    assert words[0] == tokenizer.cls_token_id and words[-1] == tokenizer.sep_token_id
    assert tokenizer.unk_token_id not in words and len(tokenizer) <= 8192
    decoded = tokenizer.decode(words, skip_special_tokens=True)
    assert decoded.replace(" ", "") == records[0]["captions"][0].lower().replace(" ", "")
