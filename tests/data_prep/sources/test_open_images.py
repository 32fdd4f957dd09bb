"""Are images of Open Images joined with their labels, verified by their MD5, and turned?"""

from __future__ import annotations

import base64
import hashlib
import io
import json

import duckdb
import numpy as np
import pytest
from PIL import Image

from data_prep.schema import Manifest
from data_prep.sources.open_images import read_names
from tests.data_prep.sources.built import LOOPBACK, run, samples
from tests.data_prep.sources.conftest import picture

HEADER = (
    "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,OriginalSize,OriginalMD5,"
    "Thumbnail300KURL,Rotation\n"
)
NAMES = 'LabelName,DisplayName\n/m/01,Cat\n/m/02,"Bow, arrow"\n/m/03,Cat\n'


def _image(name: str, url: str, content: bytes, rotation: str) -> str:
    md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
    title = '"a, ""title"" of\ntwo lines"'
    return f'{name},train,{url},http://x,"https://cc/by/2.0/",http://y,A,{title},9,{md5},,{rotation}\n'


def _tables(folder, rows: list[str]) -> list[str]:
    (folder / "images.csv").write_text(HEADER + "".join(rows))
    (folder / "human.csv").write_text(
        "ImageID,Source,LabelName,Confidence\n0a,verification,/m/01,1\n0a,verification,/m/02,0\n0b,v,/m/03,1\n0c,v,/m/01,2\n"
    )
    (folder / "machine.csv").write_text(
        "ImageID,Source,LabelName,Confidence\n0a,machine,/m/01,0.4\n0b,machine,/m/99,0.7\n"
    )
    (folder / "names.csv").write_text(NAMES)
    labels = [str(folder / "human.csv"), str(folder / "machine.csv")]
    return ["--from", str(folder / "images.csv"), "--labels", *labels, "--names", str(folder / "names.csv")]


def test_originals_are_joined_turned_and_compared_with_their_hash(tmp_path, server):
    first, second, wrong = picture(1), picture(2), picture(3)
    rows = [
        _image("0a", server.put("/oi/a.jpg", first), first, ""),
        _image("0b", server.put("/oi/b.jpg", second), second, "90.0"),
        _image("0c", server.url + "/oi/c.jpg", second, "0.0"),  # its label has a confidence of 2
        _image("0d", server.put("/oi/d.jpg", wrong), first, "0.0"),
        _image("0e", server.url + "/oi/e.jpg", second, "45"),
        _image("0g", server.url + "/oi/g.jpg", second, "inf"),
        "0f,train,too few\n",
    ]
    out = tmp_path / "out"
    command = ["open_images", *_tables(tmp_path, rows), "--images", "original"]
    assert run(*command, "--scratch", tmp_path / "s", "--out", out, *LOOPBACK) == 0
    found = {sample["image_id"]: sample for sample in samples(out).values()}
    assert set(found) == {"0a", "0b"} and Manifest.read(out).dropped == {"hash_mismatch": 1}
    assert found["0a"]["image"] == first and found["0a"]["tags"] == [["Cat (/m/01)", 1.0]]
    assert found["0a"]["absent"] == ["Bow, arrow"] and found["0b"]["unnamed"] == [["/m/99", 0.7]]
    turned = np.asarray(Image.open(io.BytesIO(found["0b"]["image"])))
    expected = np.rot90(np.asarray(Image.open(io.BytesIO(second))))
    assert turned.shape == expected.shape and found["0b"]["size"] == [48, 64]
    assert np.abs(turned.astype(int) - expected).mean() < 3  # encoded again at quality 95
    assert found["0b"]["changed"] == "rotation" and found["0b"]["rotation"] == 90
    listed = json.loads((tmp_path / "s" / "rows" / "rows.json").read_text())
    assert listed["rejects"] == {"columns": 1, "rotation": 2, "tags": 1}
    assert Manifest.read(out).tags == ("Cat (/m/01)", "Bow, arrow", "Cat (/m/03)")


def test_images_of_the_bucket_are_named_by_subset_and_id_and_an_unknown_rotation_is_none(tmp_path, server):
    server.put("/train/0a.jpg", picture(5))
    command = [
        "open_images",
        *_tables(tmp_path, [_image("0a", "http://gone.example.com/", picture(1), "NaN")]),
    ]
    out = tmp_path / "out"
    assert run(*command, "--bucket", server.url, "--scratch", tmp_path / "s", "--out", out, *LOOPBACK) == 0
    (sample,) = samples(out).values()
    assert sample["image"] == picture(5) and sample["license"] == "https://cc/by/2.0/"


def test_what_the_database_cannot_do_is_told_in_a_sentence(tmp_path, monkeypatch, capsys):
    def failing(*arguments, **more):
        raise duckdb.ConversionException("Conversion Error: no such number\n\nLINE 1: SELECT")

    monkeypatch.setattr("data_prep.sources.open_images.normalised", failing)
    assert (
        run("open_images", *_tables(tmp_path, []), "--scratch", tmp_path / "s", "--out", tmp_path / "o") == 1
    )
    error = capsys.readouterr().err
    assert "error: a table cannot be queried as it is (Conversion Error: no such number)" in error


def test_names_need_a_label_and_a_name(tmp_path):
    (tmp_path / "names.csv").write_text("/m/01,Cat\nDog\n")
    with pytest.raises(ValueError, match="row 2 is \\['Dog'\\]"):
        read_names(tmp_path / "names.csv")
    (tmp_path / "names.csv").write_text("/m/01,Cat\n/m/01,Dog\n")
    with pytest.raises(ValueError, match="2 rows for 1 labels"):
        read_names(tmp_path / "names.csv")
