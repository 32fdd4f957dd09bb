"""Do the counts of a data set add up, are duplicates found, and does the page hold together?"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.doctor.published import beside_papers, table
from data_prep.places import place_of
from data_prep.schema import SAMPLE_BYTES, Manifest, Shard
from tests.data_prep.pictures import Item, built, encoded, picture

NUM = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Seven pictures, then the first once more by its bytes and the second encoded again."""
    images = [encoded(picture(number), quality=90) for number in range(NUM)]
    images += [images[0], encoded(picture(1), quality=40)]
    texts = ["a photo of a dog on the grass", "ein Hund auf einer sehr schoenen gruenen Wiese"]
    items = []
    for number, image in enumerate(images):
        record = {
            "tags": [["dog", 0.5], ["grass", 0.25]],
            "NSFW": ["UNLIKELY", "UNSURE"][number % 2],
            "similarity": 0.3 + number / 100,
            "extra": {"licence": "CC0", "depth": None},
            "url": f"https://example.org/{number}" * 3,
        }
        items.append(Item(f"p-{number}", image, texts[number % 2], json.dumps(record), number != 3))
    return built(tmp_path_factory.mktemp("stats") / "set", items, tags=("dog", "grass", "cat"))


@pytest.fixture(scope="module")
def told(folder, tmp_path_factory) -> tuple[dict, str]:
    """What stats says as JSON and as a page."""
    out = tmp_path_factory.mktemp("told")
    command = [
        "stats",
        str(folder),
        "--workers",
        "1",
        "--json",
        str(out / "s.json"),
        "--page",
        str(out / "s.html"),
    ]
    assert main(command) == 0
    return json.loads((out / "s.json").read_text())["data_sets"][0], (out / "s.html").read_text()


def test_counts_sizes_captions_tags_and_columns_are_those_that_were_built(told):
    record, _ = told
    assert record["num_samples"] == 9 and record["widths"] == {"min": 96, "median": 96, "mean": 96, "max": 96}
    assert record["words"] == {"min": 8, "median": 8, "mean": 8.0, "max": 8}
    assert record["tags"] == {"dog": 9, "grass": 9} and record["tag_scores"]["mean"] == 0.375
    assert record["languages"] == {"en": 5, "de": 4} and record["languages_are_estimated_from"] == 9
    fields = record["fields"]
    assert fields["NSFW"]["texts"] == {"UNLIKELY": 5, "UNSURE": 4}
    assert fields["similarity"]["numbers"] == {"min": 0.3, "median": 0.34, "mean": 0.34, "max": 0.38}
    assert fields["extra.licence"]["texts"] == {"CC0": 9} and fields["extra.depth"]["missing"] == 9


def test_equal_bytes_and_equal_looks_are_told_apart(told):
    record, _ = told
    exact, near = record["exact_duplicates"], record["near_duplicates"]
    assert (exact["num_groups"], exact["num_samples"], exact["num_extra"]) == (1, 2, 1)
    assert exact["examples"] == [[["000000.tar", 0], ["000002.tar", 1]]]
    assert (near["num_groups"], near["num_samples"]) == (2, 4)
    assert [["000000.tar", 1], ["000002.tar", 2]] in near["examples"]
    assert record["perceptual_hashes_computed"] == 1


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag not in ("meta", "img", "br", "rect"):
            self.open.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        return

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_needs_no_other_file_and_shows_the_duplicates(told):
    _, page = told
    tags = _Tags()
    tags.feed(page)
    assert not tags.open
    assert len(tags.sources) == 9 + 2 + 4 and all(
        source.startswith("data:image/jpeg") for source in tags.sources
    )
    assert page.count("p-0 in 000000.tar") == 3 and "a photo of a dog" in page and "<svg" in page


def test_captions_cannot_write_into_the_page(tmp_path):
    item = Item("x", encoded(picture(0)), '<script>alert("x")</script> & more')
    folder = built(tmp_path / "set", [item])
    assert main(["stats", str(folder), "--workers", "1", "--page", str(tmp_path / "s.html")]) == 0
    page = (tmp_path / "s.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page


def test_a_page_has_a_limit_and_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.doctor.page.MOST_BYTES", 12_000)
    assert main(["stats", str(folder), "--workers", "1", "--page", str(tmp_path / "s.html")]) == 0
    page = (tmp_path / "s.html").read_text()
    assert re.search(r"\d+ more pictures are left out", page) and len(page) < 60_000


def test_several_processes_tell_what_one_tells(folder, tmp_path):
    for workers in ("1", "2"):
        assert main(["stats", str(folder), "--workers", workers, "--json", str(tmp_path / workers)]) == 0
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_counts_stand_beside_those_of_the_papers():
    shard = Shard("000000.tar", 124_000, 124_000 * SAMPLE_BYTES, "0" * 64)
    kinds = [
        ("cc12m", "train"),
        ("mine", "train"),
        ("tencent_ml", "train-imagenet"),
        ("tencent_ml", "train-openimages"),
    ]
    manifests = [Manifest(*kind, (), 124_000, True, False, (shard,)) for kind in kinds]
    rows = beside_papers([(manifest, 7) for manifest in manifests])
    names = ["cc12m/train", "tencent_ml/train-imagenet", "tencent_ml/train-openimages"]
    assert [row.name for row in rows] == [*names, "image-text pairs (cc12m)", "Tencent train (tencent_ml)"]
    assert (rows[-1].num_here, rows[-1].num_published, rows[-1].classes_here) == (248_000, 17_609_752, 7)
    assert rows[0].share == 0.01 and "Changpinyo" in rows[0].source
    assert "12,400,000" in table(rows) and "427,000,000" in table(rows) and "1.000%" in table(rows)


def test_reports_may_go_behind_a_url(tmp_path):
    folder = built(tmp_path / "set", [Item(f"x-{number}", encoded(picture(number))) for number in range(3)])
    where = f"memory://{tmp_path.name}/reports"
    command = [
        "stats",
        str(folder),
        "--workers",
        "1",
        "--json",
        f"{where}/s.json",
        "--page",
        f"{where}/s.html",
    ]
    assert main(command) == 0
    place = place_of(where)
    assert json.loads(place.read("s.json"))["data_sets"] and place.read("s.html").startswith(b"<!")
