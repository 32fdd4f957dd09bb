"""Is what cannot be used counted and told, with value, rule and remedy, before anything is trained?"""

from __future__ import annotations

import io
import json
import math
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

from pretrain.data.faults import BadSample
from pretrain.evaluate.masks import read_numbers
from pretrain.transfer import examples
from pretrain.transfer.arguments import parse
from pretrain.transfer.asked import prepared
from pretrain.transfer.coco import CocoSet, outline_of
from pretrain.transfer.detect import things_of
from pretrain.transfer.examples import Drops
from pretrain.transfer.formats import MAX_BAD
from pretrain.transfer.mask_folder import MaskFolder, MaskPlaces
from pretrain.transfer.masked_shards import MaskedShards
from pretrain.transfer.outlines import check_outline, runs_of
from pretrain.transfer.places import Named, open_sets
from pretrain.transfer.work import left_out

# pycocotools (https://github.com/ppwwyyxx/cocoapi) hands arrays to numpy in a way that is to end.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MANY = 0.5  # share of bad ones that is let pass


def change(coco: Path, edit: Callable[[dict[str, Any]], object], split: str = "train") -> Path:
    path = coco / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def of_first(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["annotations"][0].update(fields)


BROKEN = {
    "unknown_image": (of_first(image_id=99), "image 99, which is not listed"),
    "unknown_category": (of_first(category_id=30), r"category 30, and the listed ones are \[10, 20\]"),
    "bad_box": (of_first(bbox=[3, 4, 0, 5]), r"\[3, 4, 0, 5\], it must be"),
    "box_outside": (of_first(bbox=[64, 4, 5, 5]), "outside of image 1 of 64 x 48 pixels"),
    "mask_size": (
        of_first(segmentation={"size": [9, 9], "counts": "0"}),
        r"\[9, 9\], its image has \[48, 64\]",
    ),
    "bad_mask": (of_first(segmentation=[[1, 2, 3]]), "polygons or RLE"),
    "missing_image": (
        lambda content: content["images"][0].update(file_name="none.png"),
        "none.png of image 1",
    ),
    "bad_image_entry": (lambda content: content["images"][0].pop("width"), "height and width"),
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segmentation": {"size": [48, 64], "counts": [10]}}, "must sum to its 3072 pixels"),
        ({"segmentation": {"size": [48, 64], "counts": [-1, 3073]}}, "must sum to its 3072 pixels"),
        ({"segmentation": {"size": [48, 64], "counts": "!!!!bad"}}, "broken RLE '!!!!bad'"),
        ({"segmentation": {"size": [48, 64], "counts": ""}}, "it is empty"),
        ({"segmentation": {"size": [48, 64], "counts": "PT"}}, "broken RLE 'PT': .* ends within a number"),
        ({"segmentation": {"size": [48, 64], "counts": "oooooooo0"}}, "more than 7 characters"),
        ({"segmentation": {"size": [48, 64], "counts": "0"}}, "RLE of '0', whose runs must sum to its 3072"),
        ({"segmentation": {"size": [48, 64], "counts": "@11"}}, "whose runs must sum to its 3072 pixels"),
        ({"segmentation": {"size": 7, "counts": "0"}}, r"has a mask of 7, its image has \[48, 64\]"),
        ({"segmentation": {"size": [48.0, 64], "counts": "0"}}, r"has a mask of \[48.0, 64\]"),
        ({"segmentation": [[1, 2, 3, 4, 1e12, 6]]}, r"whose numbers must be real and within \+-256"),
        ({"segmentation": [[1, 2, 3, 4, 5, 10**400]]}, r"whose numbers must be real and within \+-256"),
        ({"segmentation": [[1, 2, 3, 4, 5, math.nan]]}, r"whose numbers must be real and within \+-256"),
        ({"segmentation": [["1", 2, 3, 4, 5, 6]]}, r"whose numbers must be real and within \+-256"),
        ({"segmentation": [[True, 2, 3, 4, 5, 6]]}, r"whose numbers must be real and within \+-256"),
        ({"segmentation": [[0, 0, 200, 9] * 100]}, "40000 pixels long: at most 3520 in an image of 48 x 64"),
        ({"bbox": [3, 4, 5, 10**400]}, r"must be \[x, y, width, height\] in pixels, within \+-256"),
        ({"bbox": [3, 4, math.nan, 5]}, r"must be \[x, y, width, height\] in pixels, within \+-256"),
        ({"area": None}, "has area None, it must be pixels, 0 or more, or be left out"),
        ({"area": "12"}, "has area '12', it must be"),
        ({"area": math.nan}, "has area nan, it must be"),
        ({"area": -1}, "has area -1, it must be"),
        ({"area": 10**400}, r"has area 10+\.+0+, it must be"),
        ({"image_id": [1]}, r"annotation 1 is of image \[1\], which is not listed"),
        ({"category_id": {}}, r"annotation 1 is of category {}, and the listed ones"),
        ({"iscrowd": "no"}, "iscrowd 'no', it must be 0 or 1"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(fields: dict[str, Any], message: str, coco: Path) -> None:
    path = change(coco, of_first(**fields))
    with pytest.raises(ValueError, match=rf"1 of 4 cannot be used .*{message}"):
        CocoSet(path, coco / "images", 0.0)


@pytest.mark.parametrize("reason", BROKEN)
def test_an_annotation_that_cannot_be_used_is_counted_or_refused(reason: str, coco: Path) -> None:
    edit, message = BROKEN[reason]
    path = change(coco, edit)
    with pytest.raises(
        ValueError, match=rf"1 of 4 cannot be used \({reason} 1.*{message}.*--max-bad 0.*mend"
    ):
        CocoSet(path, coco / "images", 0.0)
    found = CocoSet(path, coco / "images", MANY)
    assert found.dropped == {reason: 1}
    kept = [thing["id"] for index in range(len(found)) for thing in found.example(index).things]
    assert sorted(kept) == [2, 3, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ('{"images": ' + "[" * 100_000 + "]" * 100_000 + "}", "is no JSON .*recursion"),
        (
            '{"images": [{"id": 36893488147419103232}], "annotations": [], "categories": []}',
            "an integer `id` of its own, of 64 bits",
        ),
        ('[{"image_id": 1}]', r"holds list, but COCO's format has the lists .*results of a detector"),
        ('{"images": [], "annotations": []}', "lists"),
        ('{"images": [], "annotations": [], "categories": []}', "0 images must each have an integer `id`"),
        (
            '{"images": [{"id": 1}], "annotations": [7], "categories": [{"id": 1}]}',
            "annotations must be objects, not 7",
        ),
        (
            '{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "a"}, '
            '{"id": 2, "name": "a"}]}',
            "names 'a' twice: .* rename one",
        ),
    ],
)
def test_another_format_is_told(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        CocoSet(path, tmp_path, 0.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"file_name": "../images/1.png"}, r"'../images/1.png' names no file below .*images"),
        ({"file_name": "/etc/hostname"}, "'/etc/hostname' names no file"),
        ({"file_name": ["1.png"]}, r"\['1.png'\] names no file"),
        ({"height": 8193, "width": 8192}, r"1 has 8193 x 8192 pixels, more than the limit of 67108864"),
    ],
)
def test_entries_that_lead_elsewhere_or_are_too_large_are_refused(
    fields: dict[str, Any], message: str, coco: Path
) -> None:
    path = change(coco, lambda content: content["images"][0].update(fields))
    with pytest.raises(ValueError, match=rf"1 of 4 cannot be used \(bad_image_entry 1, first: .*{message}"):
        CocoSet(path, coco / "images", 0.0)


def test_url_of_lvis_does_not_lead_out_of_the_folder(coco: Path) -> None:
    change(coco, as_lvis)
    path = change(coco, lambda content: content["images"][0].update(coco_url="http://x/../1.png"))
    with pytest.raises(ValueError, match=r"'\.\./1\.png' names no file below"):
        CocoSet(path, coco / "images", 0.0)


def test_images_may_lie_in_folders_of_their_own(coco: Path) -> None:
    (coco / "images" / "some").mkdir()
    (coco / "images" / "1.png").rename(coco / "images" / "some" / "1.png")
    path = change(coco, lambda content: content["images"][0].update(file_name="some/1.png"))
    assert CocoSet(path, coco / "images", 0.0).example(0).image.shape == (3, 48, 64)


def test_runs_are_read_as_pycocotools_reads_them(monkeypatch: pytest.MonkeyPatch, coco: Path) -> None:
    """Ragged masks and the whole image; no mask is decoded for it."""
    draw = np.random.default_rng(0)
    masks = [draw.random((480, 640)) < share for share in (0.0, 0.001, 0.5, 1.0)]
    masks += [np.cumsum(draw.normal(size=(480, 640)), 0) > 0]
    outlines = [outline_of(mask.astype(np.uint8)) for mask in masks]
    for mask, outline in zip(masks, outlines, strict=True):
        flat = np.concatenate([[False], mask.ravel("F")]).astype(np.int8)
        starts = np.flatnonzero(np.diff(flat))
        assert runs_of(outline["counts"]) == np.diff([0, *starts, mask.size]).tolist()
    monkeypatch.delattr(rle, "decode")
    for outline in outlines:
        check_outline("it", outline, 480, 640)


def test_an_image_of_another_size_is_a_bad_sample(coco: Path) -> None:
    Image.new("RGB", (10, 12)).save(coco / "images" / "2.png")
    found = CocoSet(coco / "annotations" / "instances_train.json", coco / "images", 0.0)
    with pytest.raises(BadSample, match=r"12 x 10 pixels.*says 48 x 64"):
        found.example(1)


def test_polygons_and_both_kinds_of_rle_are_the_same_mask(coco: Path) -> None:
    folder = coco / "images"
    mask = np.zeros((48, 64), np.uint8)
    mask[8:24, 4:20] = 1
    counts = [4 * 48 + 8, *[16, 32] * 15, 16, 64 * 48 - 4 * 48 - 8 - 15 * 48 - 16]
    outlines = (outline_of(mask), {"size": [48, 64], "counts": counts})
    masks = []
    for outline in (None, *outlines):
        if outline:
            change(coco, of_first(segmentation=outline))
        found = CocoSet(coco / "annotations" / "instances_train.json", folder, 0.0)
        masks.append(things_of(found.example(0), found).masks[0])
    assert all(torch.equal(one, torch.from_numpy(mask)) for one in masks)
    assert rle.area(outlines[0]) == 256


def test_crowds_are_not_taught_and_boxes_end_at_the_edge(coco: Path) -> None:
    change(coco, of_first(bbox=[-3, 8, 20, 90]))
    path = change(coco, lambda content: content["annotations"][1].update(iscrowd=1))
    found = CocoSet(path, coco / "images", 0.0)
    assert things_of(found.example(0), found).boxes.tolist() == [[0, 8, 17, 48]]
    assert things_of(found.example(0), found).labels.tolist() == [1]  # category 20 is the second name
    assert len(things_of(found.example(1), found).labels) == 0


def test_corners_where_sizes_belong_are_refused(coco: Path) -> None:
    """As many boxes as a real file has: of a handful, chance may lay some over an edge."""

    def repeat(content: dict[str, Any], boxes: list[list[int]]) -> None:
        thing = content["annotations"][0]
        content["annotations"] = [thing | {"id": i, "bbox": boxes[i % len(boxes)]} for i in range(100)]

    corners, inside, over = [20, 20, 60, 40], [4, 8, 16, 16], [50, 4, 30, 8]
    path = change(coco, lambda content: repeat(content, [corners]))
    told = (
        r"100 of 100 boxes reach over the edge .*first \[20, 20, 60, 40\] in 64 x 48 pixels, where 5 may; .*"
    )
    for allowed in (0.0, 0.9):
        with pytest.raises(ValueError, match=told + r"fit as \[left, top, right, bottom\]: convert them"):
            CocoSet(path, coco / "images", allowed)
    path = change(coco, lambda content: repeat(content, [inside] * 9 + [over]))
    with pytest.raises(ValueError, match=r"10 of 100 boxes .*mend them, or raise --max-bad where things"):
        CocoSet(path, coco / "images", 0.0)
    assert CocoSet(path, coco / "images", 0.1).dropped == {"box_clipped": 10}


def test_a_set_of_crowds_alone_is_refused(coco: Path) -> None:
    path = change(coco, lambda content: [thing.update(iscrowd=1) for thing in content["annotations"]])
    with pytest.raises(ValueError, match="has no annotation that can be used but crowds"):
        CocoSet(path, coco / "images", 0.0)


def as_lvis(content: dict[str, Any]) -> None:
    """The fields that LVIS has beyond COCO."""
    for image in content["images"]:
        name = image.pop("file_name")
        image |= {"coco_url": f"http://x/images/{name}", "neg_category_ids": [20]}
        image["not_exhaustive_category_ids"] = [10] if image["id"] == 1 else []
    for category, frequency in zip(content["categories"], "rf", strict=True):
        category["frequency"] = frequency


def test_lvis_is_known_by_its_fields(coco: Path) -> None:
    found = CocoSet(change(coco, as_lvis), coco / "images", 0.0)
    assert found.example(3).image.shape == (3, 48, 64)
    assert found.federation is not None
    assert found.federation.negative == dict.fromkeys(range(1, 5), frozenset({20}))
    assert found.federation.not_exhaustive == {1: {10}, 2: set(), 3: set(), 4: set()}
    assert found.federation.frequency == {10: "r", 20: "f"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["images"][2].pop("neg_category_ids"), "has neg_category_ids=None of image 3, a list of"),
        (lambda c: c["categories"][1].pop("frequency"), "has frequency=None of category 20, one of"),
    ],
)
def test_a_file_that_has_the_fields_of_lvis_in_part_is_refused(
    edit: Callable[[dict[str, Any]], Any], message: str, coco: Path
) -> None:
    change(coco, as_lvis)
    with pytest.raises(ValueError, match=message):
        CocoSet(change(coco, edit), coco / "images", 0.0)


def test_the_recipe_of_lvis_wants_the_fields_of_lvis(
    runs: dict[str, Path], coco: Path, tmp_path: Path
) -> None:
    words = [str(runs["vit"]), "--data", str(coco), "--out", str(tmp_path / "out")]
    lvis, plain = (parse(["detect", *words, "--recipe", name]) for name in ("lvis", "coco"))
    told = r"--recipe lvis is of LVIS's .*{} has neg_category_ids and .* of no image.*: .*recipe of COCO, such as"
    with pytest.raises(ValueError, match=told.format("instances_train.json")):
        prepared(lvis)
    prepared(plain)
    change(coco, as_lvis)
    with pytest.raises(ValueError, match=told.format("instances_val.json")):
        prepared(lvis)
    change(coco, as_lvis, "val")
    assert all(one.federation for one in prepared(lvis)[2])


def mask_places(root: Path) -> MaskPlaces:
    """Two images with masks of the numbers 0, 1, 2 and 255."""
    for name in ("images", "masks"):
        (root / name).mkdir()
    (root / "classes.txt").write_text("-\nsky\nsea\n")
    for stem in "ab":
        Image.new("RGB", (8, 6)).save(root / "images" / f"{stem}.jpg")
        numbers = np.repeat(np.array([[0, 1, 2, 255, 0, 1, 2, 255]], np.uint8), 6, axis=0)
        Image.fromarray(numbers).save(root / "masks" / f"{stem}.png")
    return MaskPlaces(root / "images", root / "masks", root / "classes.txt")


def test_numbers_of_masks_become_classes(tmp_path: Path) -> None:
    found = MaskFolder(mask_places(tmp_path), 0.0)
    assert found.names == ("sky", "sea")
    assert found.example(0).classes[0].tolist() == [255, 0, 1, 255] * 2


def test_masks_that_do_not_fit_are_counted_or_refused(tmp_path: Path) -> None:
    places = mask_places(tmp_path)
    Image.new("L", (5, 5)).save(places.masks / "a.png")
    with pytest.raises(ValueError, match=r"1 of 2 cannot be used \(mask_size 1.*\(5, 5\) pixels.*\(8, 6\)"):
        MaskFolder(places, 0.0)
    Image.new("RGB", (8, 6)).save(places.masks / "a.png")
    Image.new("L", (8, 6)).save(places.masks / "c.png")
    found = MaskFolder(places, MANY)
    assert found.dropped == {"missing_image": 1, "mask_colours": 1} and len(found) == 1
    Image.new("L", (8, 6), 7).save(places.masks / "b.png")
    with pytest.raises(BadSample, match=r"number 7.*names 3"):
        found.example(0)
    Image.new("L", (8, 6), 255).save(places.masks / "b.png")
    with pytest.raises(BadSample, match=r"b.png has no pixel of a class"):
        found.example(0)
    places.classes.unlink()
    with pytest.raises(FileNotFoundError, match=r"classes.txt is missing: write the names"):
        MaskFolder(places, 0.0)


def test_images_that_share_a_mask_are_told(tmp_path: Path) -> None:
    places = mask_places(tmp_path)
    image = next(path for path in places.images.iterdir() if path.stem == "a")
    other = ".webp" if image.suffix != ".webp" else ".png"
    Image.open(image).save(image.with_suffix(other))
    with pytest.raises(
        ValueError, match=r"2 of 3 cannot be used \(shared_mask 2, first: .*rename all but one"
    ):
        MaskFolder(places, 0.0)
    found = MaskFolder(places, MANY)
    assert found.dropped == {"shared_mask": 2} and len(found) == 1
    assert left_out({"train": found.dropped, "heldout": {}}) == ["left out of the train set: shared_mask 2"]


def header_of(side: int) -> bytes:
    """A PNG file that says it has side x side grey pixels, and ends there."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return file.getvalue()[:12] + head + struct.pack(">I", zlib.crc32(head)) + file.getvalue()[33:]


@pytest.mark.parametrize("side", [60_000, 8_200])  # beyond Pillow's limit, and beyond ours alone
def test_masks_too_large_are_told_before_memory_is_taken(side: int, tmp_path: Path, shards: Path) -> None:
    places = mask_places(tmp_path)
    (places.masks / "a.png").write_bytes(header_of(side))
    with pytest.raises(ValueError, match=r"1 of 2 cannot be used \(unreadable 1, first: .*a\.png: .*limit"):
        MaskFolder(places, 0.0)
    found = MaskFolder(mask_places(Path(tempfile.mkdtemp(dir=tmp_path))), 0.0)
    (found.places.masks / "a.png").write_bytes(header_of(side))
    with pytest.raises(BadSample, match=r"a\.png: .*limit"):
        found.example(0)
    with pytest.raises(BadSample, match=r"cannot be read: .*limit"):
        read_numbers({"mask.png": header_of(side), "json": b"{}"}, 8, 6)


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"sky\nsky\n", "names 'sky' twice"), (b"sky\n\xff\n", "is no UTF-8"), (b"sky\n\n\nsea", "an empty")],
)
def test_names_of_classes_that_do_not_tell_them_apart(tmp_path: Path, content: bytes, told: str) -> None:
    places = mask_places(tmp_path)
    places.classes.write_bytes(content)
    with pytest.raises(ValueError, match=told):
        MaskFolder(places, MANY)


def test_classes_saved_with_a_byte_order_mark_keep_their_names(tmp_path: Path) -> None:
    places = mask_places(tmp_path)
    places.classes.write_bytes("-\nsky\nsea\n".encode("utf-8-sig"))
    assert MaskFolder(places, 0.0).names == ("sky", "sea")


def test_masks_that_name_nothing_are_told_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "heldout"):
        (tmp_path / split).mkdir()
        places = mask_places(tmp_path / split)
    for path in places.images.iterdir():  # of other bytes than those that teach
        Image.new("RGB", (8, 6), "white").save(path)
    Image.new("L", (8, 6), 255).save(places.masks / "b.png")
    told = r"held-out images: 1 of 2 cannot be used \(nothing_named 1, first: .*b\.png .*raise --max-bad"
    with pytest.raises(ValueError, match=told):
        open_sets("segment", Named(tmp_path), 0.0)
    monkeypatch.setattr(
        examples, "LOOKED_AT", 1
    )  # of a larger set some are read, and one bad one may be chance
    Image.new("L", (8, 6), 255).save(places.masks / "a.png")
    open_sets("segment", Named(tmp_path), 0.001)


def test_of_few_images_one_may_be_unusable_as_the_help_says(capsys: pytest.CaptureFixture[str]) -> None:
    drops = Drops({"bad_mask": 1}, {"bad_mask": "a.png"})
    drops.require_few("images", 2, MAX_BAD)
    drops.add("bad_mask", "b.png")
    for total in (2, 199):
        with pytest.raises(ValueError, match=rf"2 of {total} .* allows 1:"):
            drops.require_few("images", total, MAX_BAD)
    with pytest.raises(SystemExit):
        parse(["segment", "--help"])
    assert "of fewer than 100 as of 100 (0.01: one is let through in any case)" in " ".join(
        capsys.readouterr().out.split()
    )


def test_things_of_shards_are_what_their_masks_show(shards: Path) -> None:
    found = MaskedShards(shards / "train", with_ground=False)
    (thing,) = found.example(1).things
    assert (thing["bbox"], thing["area"], found.names[thing["category_id"] - 1]) == (
        [20, 0, 36, 40],
        1440,
        "green",
    )
    classes = MaskedShards(shards / "train", with_ground=True).example(1).classes
    assert classes[0].tolist() == [0] * 20 + [2] * 36


def test_sets_are_found_by_their_layout(coco: Path, shards: Path, tmp_path: Path) -> None:
    train, heldout = open_sets("detect", Named(coco), 0.0)
    assert len(train) == len(heldout) == 4
    assert len(open_sets("segment", Named(shards), 0.0)[1]) == 4
    with pytest.raises(FileNotFoundError, match="`segment` reads shards with masks"):
        open_sets("segment", Named(train=coco / "annotations", heldout=coco), 0.0)
    with pytest.raises(ValueError, match="no train data set is named: give --data"):
        open_sets("detect", Named(), 0.0)
    change(coco, lambda content: content["categories"][0].update(name="blue"), "val")
    with pytest.raises(ValueError, match="must be the same"):
        open_sets("detect", Named(coco), 0.0)


def test_images_that_teach_and_test_are_refused(coco: Path, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(shards / "train")
    with pytest.raises(ValueError, match=r"1 image files in common, such as .*000000\.tar: scores on"):
        open_sets("segment", Named(train=shards / "train", heldout=tmp_path / "link"), 0.0)
    shutil.copytree(shards / "train", tmp_path / "copy")
    with pytest.raises(ValueError, match=r"1 image files in common, such as .*copy/000000\.tar: scores on"):
        open_sets("segment", Named(train=shards / "train", heldout=tmp_path / "copy"), 0.0)
    change(coco, lambda content: content["images"][2].update(file_name="4.png"), "val")
    with pytest.raises(ValueError, match=r"1 image files in common, such as .*4\.png.*name two sets"):
        open_sets("detect", Named(coco), 0.0)
    folder = tmp_path / "masked"
    folder.mkdir()
    mask_places(folder)
    with pytest.raises(ValueError, match="2 image files in common"):
        open_sets("segment", Named(train=folder, heldout=folder), 0.0)
    linked = tmp_path / "linked"
    shutil.copytree(folder, linked)
    (linked / "images" / "a.jpg").unlink()
    (linked / "images" / "a.jpg").symlink_to(folder / "images" / "a.jpg")
    with pytest.raises(ValueError, match="1 image files in common"):
        open_sets("segment", Named(train=folder, heldout=linked), 0.0)


def test_a_set_that_changed_is_another_one(coco: Path, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "masked").mkdir()
    places = mask_places(tmp_path / "masked")
    path = coco / "annotations" / "instances_train.json"
    before = MaskFolder(places, 0.0).sha256, CocoSet(path, coco / "images", 0.0).sha256
    Image.new("L", (8, 6), 1).save(places.masks / "b.png")
    change(coco, of_first(bbox=[4, 8, 16, 15]))
    after = MaskFolder(places, 0.0).sha256, CocoSet(path, coco / "images", 0.0).sha256
    assert before[0] != after[0] and before[1] != after[1]
    one, other = (MaskedShards(shards / split, with_ground=True) for split in ("train", "heldout"))
    assert one.sha256 != other.sha256
