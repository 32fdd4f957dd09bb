"""Are both parts of Tencent ML-Images read with their scored tags?"""

from __future__ import annotations

import json

import pytest

from data_prep.rows.lines import BadLine
from data_prep.schema import Manifest
from data_prep.sources.tencent_ml import read_dictionary, scored_tags
from tests.data_prep.sources.archive import tar_of
from tests.data_prep.sources.built import LOOPBACK, run, samples
from tests.data_prep.sources.conftest import picture

DICTIONARY = (
    "index\tcategory id\tparent's index\tcategory name\n"
    "0\tn00001740\t-1\tentity\n"
    "1\t/m/01440\t0\tcrane\n"
    "2\tn02012849\t0\tcrane\n"
    "3\tn01440764\t0\ttench, Tinca tinca\n"
)


def test_urls_and_image_ids_become_data_sets_with_tags_of_the_dictionary(tmp_path, server):
    urls = [server.put(f"/t/{n}_o.jpg", picture(50 + n)) for n in range(3)]
    (tmp_path / "dictionary.txt").write_text(DICTIONARY)
    (tmp_path / "train_urls_from_openimages.txt").write_text(
        f"{urls[0]}\t1:0.8\t0:0.9\n{urls[1]} 2:1 3\n{urls[2]}\t4:1\n{server.url}/t/gone.jpg\t0:1\n{urls[0]}\n\n"
    )
    (tmp_path / "val_image_id_from_imagenet.txt").write_text(
        "n01440764/n01440764_8.JPEG\t3:1\t0:0.5\nn01440764/n01440764_9.JPEG\t3:1\nn02012849/n02012849_1.JPEG\t2:x\n"
        "n01440764/n01440764_8.JPEG\t1:1\n"
    )
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "n01440764.tar").write_bytes(tar_of([("n01440764_8.JPEG", picture(60))]))
    command = [
        "--dictionary",
        tmp_path / "dictionary.txt",
        "--urls",
        tmp_path / "train_urls_from_openimages.txt",
    ]
    command += ["--image-ids", tmp_path / "val_image_id_from_imagenet.txt", "--archives", tmp_path / "tars"]
    out = tmp_path / "out"
    assert run("tencent_ml", *command, "--scratch", tmp_path / "s", "--out", out, *LOOPBACK) == 0
    names = ["entity", "crane (/m/01440)", "crane (n02012849)", "tench, Tinca tinca"]
    train, val = Manifest.read(out / "train-openimages"), Manifest.read(out / "val-imagenet")
    assert list(train.tags) == list(val.tags) == names
    found = {sample["url"]: sample["tags"] for sample in samples(out / "train-openimages").values()}
    assert found == {urls[0]: [[names[1], 0.8], [names[0], 0.9]], urls[1]: [[names[2], 1.0], [names[3], 1.0]]}
    listed = json.loads((tmp_path / "s" / "train-openimages" / "rows" / "rows.json").read_text())
    assert listed["rejects"] == {"empty_line": 1, "no_tags": 1, "tags": 1} and train.dropped == {
        "http_404": 1
    }
    (sample,) = samples(out / "val-imagenet").values()
    assert sample["image"] == picture(60) and sample["tags"] == [[names[3], 1.0], [names[0], 0.5]]
    assert val.dropped == {"duplicate_name": 1, "missing_image": 1, "tags": 1}


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        ("http://x/a\t5:0.8\t6:1", ["http://x/a", "[[5,0.8],[6,1.0]]"]),
        ("http://x/a 5  6:.5", "tags"),
        ("http://x/a 5\t6:0.5 ", ["http://x/a", "[[5,1.0],[6,0.5]]"]),
        ("http://x/a 5:1 5:0.2", ["http://x/a", "[[5,0.2]]"]),
        ("http://x/a 5:1e-3", ["http://x/a", "[[5,0.001]]"]),
        ("http://x/a", "no_tags"),
        ("   ", "no_tags"),
        ("http://x/a 10:1", "tags"),
        ("http://x/a -1:1", "tags"),
        ("http://x/a 5:1.1", "tags"),
        ("http://x/a 5:nan", "tags"),
        ("http://x/a 5:0.5:0.5", "tags"),
    ],
)
def test_tags_are_split_on_any_whitespace_and_checked(line, verdict):
    if isinstance(verdict, str):
        with pytest.raises(BadLine, match=verdict):
            scored_tags(line, 10)
    else:
        assert scored_tags(line, 10) == verdict


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DICTIONARY.replace("2\tn02012849", "7\tn02012849"), "it must hold 2"),
        (DICTIONARY.replace("\t-1\t", "\t9\t"), "has the parent '9'"),
        (DICTIONARY.replace("\t", " "), "tab-separated"),
        ("header\n", "holds no tags"),
        (DICTIONARY.replace("/m/01440", "n02012849"), "one id and one name"),
    ],
)
def test_a_dictionary_out_of_order_is_refused(tmp_path, text, message):
    (tmp_path / "dictionary.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_dictionary(tmp_path / "dictionary.txt")


def test_parents_lead_to_the_root(tmp_path):
    (tmp_path / "dictionary.txt").write_text(DICTIONARY)
    assert read_dictionary(tmp_path / "dictionary.txt").parents == (-1, 0, 0, 0)
