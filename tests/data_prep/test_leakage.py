"""Are copies of evaluation pictures found in a training set, however they were altered, and no others?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from data_prep.__main__ import main
from tests.data_prep.pictures import Item, built, encoded, picture

NUM_STRANGERS = 12


def _cut(image: Image.Image, *parts: float) -> Image.Image:
    width, height = image.size
    left, top, right, bottom = parts
    return image.crop(
        (round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height))
    )


ALTERED: dict[
    str, Callable[[Image.Image], bytes]
] = {  # of the evaluation's picture 100 + i: the training sample
    "the same bytes": lambda image: encoded(image),
    "encoded again": lambda image: encoded(image, quality=30),
    "another format": lambda image: encoded(image, "PNG"),
    "half as large": lambda image: encoded(image.resize((image.width // 2, image.height // 2))),
    "stretched": lambda image: encoded(image.resize((128, 128))),
    "cut at all sides": lambda image: encoded(_cut(image, 0.03, 0.03, 0.03, 0.03)),
    "cut at the left": lambda image: encoded(_cut(image, 0.04, 0, 0, 0)),
    "mirrored": lambda image: encoded(ImageOps.mirror(image)),
    "grey": lambda image: encoded(image.convert("L")),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A training set with altered copies among strangers, and a folder of evaluation images."""
    above = tmp_path_factory.mktemp("leakage")
    originals = {name: picture(100 + number, (192, 144)) for number, name in enumerate(ALTERED)}
    copies = [alter(originals[name]) for name, alter in ALTERED.items()]
    strangers = [encoded(picture(number, (192, 144))) for number in range(NUM_STRANGERS)]
    items = [Item(f"x-{number}", image) for number, image in enumerate([*strangers, *copies])]
    items.append(Item("flat", encoded(Image.new("RGB", (64, 64), "white"))))
    (above / "images" / "class").mkdir(parents=True)
    for number, (name, image) in enumerate(originals.items()):
        where = above / "images" / ("class" if number % 2 else "")
        (where / f"{name}.jpg").write_bytes(encoded(image))
    (above / "images" / "flat.png").write_bytes(encoded(Image.new("RGB", (64, 64), "grey"), "PNG"))
    (above / "images" / "broken.jpg").write_bytes(b"no image")
    (above / "images" / "notes.txt").write_text("not looked at")
    return built(above / "set", items, shard_size=8), above / "images"


def test_every_altered_copy_is_found_and_no_stranger(folders, tmp_path, capsys):
    training, images = folders
    command = ["leakage", str(training), "--against", str(images), "--workers", "1"]
    assert main([*command, "--json", str(tmp_path / "l.json"), "--page", str(tmp_path / "l.html")]) == 1
    text, record = capsys.readouterr().out, json.loads((tmp_path / "l.json").read_text())
    found = {hit["key"]: Path(hit["picture"]).stem for hit in record["hits"]}
    assert found == {f"x-{NUM_STRANGERS + number}": name for number, name in enumerate(ALTERED)}
    assert record["exclude"] == {str(training): sorted(found, key=lambda key: int(key[2:]))}
    assert [hit["key"] for hit in record["hits"] if hit["is_same_bytes"]] == [f"x-{NUM_STRANGERS}"]
    assert record["by_distance"]["same bytes"] == {"samples": 1, "pictures": 1}
    assert len(record["unreadable"]) == 1 and "broken.jpg" in text
    assert "1 flat training pictures and 1 of the evaluation" in text
    page = (tmp_path / "l.html").read_text()
    assert page.count("<figure>") == 2 * len(ALTERED) and "The same bytes" in page


def test_an_evaluation_set_may_be_a_data_set_and_nothing_found_is_code_0(folders, tmp_path, capsys):
    training, _ = folders
    items = [Item(f"e-{number}", encoded(picture(500 + number))) for number in range(3)]
    evaluation = built(tmp_path / "val", items)
    assert main(["leakage", str(training), "--against", str(evaluation), "--workers", "1"]) == 0
    assert "against 3 pictures" in capsys.readouterr().out
    assert (
        main(["leakage", str(training), "--against", str(training), "--workers", "1", "--distance", "0"]) == 1
    )
    assert f"in all               {NUM_STRANGERS + len(ALTERED) + 1} samples" in capsys.readouterr().out


def _doubled(image: Image.Image) -> Image.Image:
    """A picture that is its own mirror image."""
    whole = Image.new("RGB", (2 * image.width, image.height))
    whole.paste(image)
    whole.paste(ImageOps.mirror(image), (image.width, 0))
    return whole


def test_copies_of_pictures_that_are_their_own_mirror_image_are_found_and_no_strangers(tmp_path, capsys):
    alterations = [alter for name, alter in ALTERED.items() if name != "cut at the left"]
    originals = [_doubled(picture(700 + number, (96, 144))) for number in range(len(alterations))]
    copies = [alter(original) for alter, original in zip(alterations, originals, strict=True)]
    strangers = [encoded(_doubled(picture(800 + number, (96, 144)))) for number in range(NUM_STRANGERS)]
    items = [Item(f"x-{number}", image) for number, image in enumerate([*strangers, *copies])]
    (tmp_path / "images").mkdir()
    for number, original in enumerate(originals):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(encoded(original))
    training = built(tmp_path / "set", items, shard_size=8)
    report = tmp_path / "l.json"
    command = ["leakage", str(training), "--against", str(tmp_path / "images"), "--workers", "1"]
    assert main([*command, "--json", str(report)]) == 1
    found = {hit["key"]: int(Path(hit["picture"]).stem) for hit in json.loads(report.read_text())["hits"]}
    assert found == {f"x-{NUM_STRANGERS + number}": number for number in range(len(copies))}


@pytest.mark.parametrize(
    ("against", "message"),
    [
        ("missing", "is no folder: name a data set, or a folder of images"),
        ("empty", "holds no images: name a data set"),
        ("broken", "none of the 1 files of"),
        ("file.tar", "is a file: name a data set, or a folder of images; build a data set of a tar first"),
    ],
)
def test_what_is_no_evaluation_set_is_refused(folders, tmp_path, capsys, against, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.tar").write_bytes(b"")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"no image")
    assert main(["leakage", str(folders[0]), "--against", str(tmp_path / against), "--workers", "1"]) == 1
    assert message in capsys.readouterr().err
