"""Is CLIP's list joined with the texts of YFCC100M, in both forms of them, and are photos found in the bucket?"""

from __future__ import annotations

import bz2
import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from data_prep.rows import Normalise, normalised
from data_prep.schema import Manifest
from data_prep.sources.yfcc15m import FIELDS, HASH_OF, TABLE, Yfcc15m, photo_hash, read_texts
from tests.data_prep.sources.built import LOOPBACK, run, samples
from tests.data_prep.sources.conftest import picture

# photo id -> (title, description, marker), as they stand in the TSV
PHOTOS = {
    "101": ("My+cat", "It+is+%3Cb%3Efat%3C%2Fb%3E+%26amp%3B+old", "0"),
    "102": ("IMG_1.", "", "0"),
    "103": ("", "only+described", "0"),
    "104": ("", "http%3A%2F%2Fexample.com", "0"),
    "105": ("a+video", "moves", "1"),
    "106": ("gone", "not+in+the+bucket", "0"),
}


def _address(photo: str) -> str:
    return f"http://farm1.staticflickr.com/2/{photo}_x.jpg"


def _line(photo: str, num_columns: int) -> str:
    title, description, marker = PHOTOS[photo]
    cells = [
        photo,
        "uid",
        "nick",
        "taken",
        "uploaded",
        "device",
        title,
        description,
        "tags",
        "",
        "",
        "",
        "",
        "page",
    ]
    cells += [
        _address(photo),
        "Attribution+License",
        "licenseurl",
        "s",
        "f",
        "secret",
        "original",
        "jpg",
        marker,
    ]
    if num_columns == 25:
        cells = ["7", photo, photo_hash(_address(photo)), *cells[1:]]
    assert len(cells) == num_columns
    return "\t".join(cells)


def _texts(path: Path, form: str) -> Path:
    if form != "sqlite":
        lines = [_line(photo, int(form)) for photo in PHOTOS] + ["damaged\tline"]
        path.write_bytes(bz2.compress("\n".join(lines).encode()))
        return path
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(
            f"CREATE TABLE {TABLE} (photoid integer, uid text, {', '.join(f'{n} text' for n in FIELDS[1:])})"
        )
        for photo, (title, description, marker) in PHOTOS.items():
            values = (int(photo), "u", title, description, _address(photo), "Attribution+License", marker)
            connection.execute(f"INSERT INTO {TABLE} VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        connection.commit()
    return path


def _list(path: Path) -> Path:
    rows = [(n, photo, photo_hash(_address(photo))) for n, photo in enumerate(PHOTOS)]
    rows[1] = (1, "102", "")  # no hash: it follows from the address
    rows[2] = (2, "103", hashlib.md5(_address("103").encode()).hexdigest())  # with its zeros
    rows.append((9, "999", "abcdef0123456789abcdef"))
    path.write_bytes(bz2.compress("".join(f"{n}\t{p}\t{h}\n" for n, p, h in rows).encode()))
    return path


def test_the_hash_of_a_photo_drops_the_leading_zero_of_every_byte():
    addresses = [_address(str(number)) for number in range(200)]
    whole = [hashlib.md5(address.encode()).hexdigest() for address in addresses]
    by_hand = [
        "".join(pair.removeprefix("0") for pair in map("".join, zip(h[::2], h[1::2], strict=True)))
        for h in whole
    ]
    assert [photo_hash(address) for address in addresses] == by_hand
    assert len({len(text) for text in by_hand}) > 3 and any(
        pair == "00" for h in whole for pair in [h[i : i + 2] for i in range(0, 32, 2)]
    )
    connection = duckdb.connect()
    query = f"SELECT {HASH_OF.format(address='a')} FROM (SELECT unnest(?) AS a)"
    assert [row[0] for row in connection.execute(query, [addresses]).fetchall()] == by_hand
    connection.close()


@pytest.mark.parametrize("form", ["23", "25", "sqlite"])
def test_all_forms_of_the_texts_say_the_same(tmp_path, form):
    texts = [row for block in read_texts(_texts(tmp_path / "texts", form)) for row in block.rows]
    assert texts == [[p, t, d, _address(p), "Attribution+License", m] for p, (t, d, m) in PHOTOS.items()]


def test_a_list_becomes_shards_with_title_and_description_apart(tmp_path, server):
    for photo in ("101", "102", "103", "105"):
        name = photo_hash(_address(photo))
        server.put(f"/data/images/{name[:3]}/{name[3:6]}/{name}.jpg", picture(int(photo)))
    out = tmp_path / "out"
    texts = _texts(tmp_path / "texts.bz2", "23")
    command = ["--from", _list(tmp_path / "subset.tsv.bz2"), "--texts", texts, "--images", server.url]
    assert run("yfcc15m", *command, "--scratch", tmp_path / "scratch", "--out", out, *LOOPBACK) == 0
    found = {sample["photo"]: sample for sample in samples(out).values()}
    assert {photo: sample["txt"] for photo, sample in found.items()} == {
        "101": "My cat. It is fat & old",
        "102": "IMG_1.",
        "103": "only described",
    }
    assert found["101"]["title"] == "My cat" and found["101"]["description"] == "It is fat & old"
    assert found["101"]["license"] == "Attribution License" and found["103"]["image"] == picture(103)
    assert Manifest.read(out).dropped == {"http_404": 1}
    listed = json.loads((tmp_path / "scratch" / "rows" / "rows.json").read_text())
    assert listed["rejects"] == {"no_caption": 1, "no_metadata": 1, "video": 1} and listed["num_inputs"] == 7
    assert listed["side_rejects"] == {"texts.bz2": 1}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("joined", ["IMG_1.", "My cat. It is fat & old", "gone. not in the bucket", "only described"]),
        ("title", ["IMG_1.", "My cat", "gone"]),
        ("description", ["It is fat & old", "not in the bucket", "only described"]),
        ("separate", ["IMG_1.", "My cat", "gone", "only described"]),
    ],
)
def test_the_rule_of_captions_decides_what_a_row_needs(tmp_path, rule, expected):
    source = Yfcc15m(
        str(_list(tmp_path / "list")), (str(_texts(tmp_path / "texts", "sqlite")),), tmp_path, rule
    )
    listed, texts = source.inputs()
    rows = normalised(
        tmp_path / "rows",
        [listed],
        source.query,
        Normalise(metadata_threads=1),
        {},
        prefix="y",
        sides={"texts": texts},
    )
    found = pq.read_table(tmp_path / "rows" / rows.parts[0].name).to_pylist()
    assert sorted(row["caption"] for row in found) == expected


def test_another_database_is_refused_by_the_names_of_its_columns(tmp_path):
    with closing(sqlite3.connect(tmp_path / "x.sql")) as connection:
        connection.execute(f"CREATE TABLE {TABLE} (photoid integer, title text)")
        connection.commit()
    with pytest.raises(ValueError, match="lacks the columns \\['description'"):
        list(read_texts(tmp_path / "x.sql"))
