"""Is a list of the LAION family read, filtered and downloaded as it was published?"""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.rows import Input, Normalise, normalised
from data_prep.schema import Manifest
from data_prep.sources.laion400m import Laion, columns_of
from tests.data_prep.sources.built import LOOPBACK, run, samples
from tests.data_prep.sources.conftest import picture

NAN = float("nan")


def _part(path, rows):
    """A part with the columns of LAION-400M; rows of (URL, TEXT, HEIGHT, WIDTH, NSFW, similarity)."""
    url, text, height, width, nsfw, similarity = zip(*rows, strict=True)
    table = {
        "SAMPLE_ID": pa.array([7.0] * len(rows), pa.float64()),  # not unique
        "URL": pa.array(url, pa.string()),
        "TEXT": pa.array(text, pa.string()),
        "HEIGHT": pa.array(height, pa.int32()),
        "WIDTH": pa.array(width, pa.int32()),
        "LICENSE": pa.array(["?", None] * len(rows), pa.string())[: len(rows)],
        "NSFW": pa.array(nsfw, pa.string()),
        "similarity": pa.array(similarity, pa.float64()),
    }
    pq.write_table(pa.table(table), path)


def test_parts_become_shards_and_every_row_is_accounted_for(tmp_path, server):
    urls = [server.put(f"/laion/{n}.jpg", picture(n)) for n in range(4)]
    broken = server.put("/laion/broken.jpg", picture(9)[:200])
    folder = tmp_path / "in"
    folder.mkdir()
    _part(
        folder / "part-00000.parquet",
        [
            (urls[0], "first  text", 48, 64, "UNLIKELY", 0.31),
            (urls[0], "better text", 48, 64, "UNLIKELY", 0.35),
            (urls[1], "unsure", 48, 64, "UNSURE", 0.30),
            (urls[2], "adult", 48, 64, "NSFW", 0.4),
            (None, "no address", 48, 64, "UNLIKELY", 0.4),
            (urls[3], None, 48, 64, "UNLIKELY", 0.4),
        ],
    )
    _part(
        folder / "part-00001.parquet",
        [
            (urls[3], "junk in NSFW", 48, 64, "0.2", NAN),
            (broken, "broken", 48, 64, None, 0.33),
            (f"{server.url}/laion/gone.jpg", "gone", 48, 64, "UNLIKELY", 0.33),
            ("file:///etc/hostname", "inside", 48, 64, "UNLIKELY", 0.33),
        ],
    )
    out = tmp_path / "out"
    command = ["laion400m", "--from", folder, "--scratch", tmp_path / "work", "--out", out, *LOOPBACK]
    assert run(*command) == 0
    manifest = Manifest.read(out)
    found = samples(out)
    assert sorted(sample["txt"] for sample in found.values()) == ["better text", "junk in NSFW", "unsure"]
    assert all(key.startswith("laion400m-") for key in found)
    one = next(sample for sample in found.values() if sample["txt"] == "better text")
    assert one["image"] == picture(0) and one["similarity"] == 0.35 and one["nsfw"] == "UNLIKELY"
    assert one["url"] == urls[0] and one["source"] == "laion400m" and len(one["phash"]) == 16
    assert "similarity" not in next(sample for sample in found.values() if sample["txt"] == "junk in NSFW")
    assert sum(manifest.dropped.values()) == 2 and manifest.dropped["http_404"] == 1
    listed = json.loads((tmp_path / "work" / "rows" / "rows.json").read_text())
    assert listed["rejects"] == {"duplicate_url": 1, "no_caption": 1, "no_url": 1, "nsfw": 1, "url_scheme": 1}
    assert listed["num_inputs"] == 10 == sum(listed["rejects"].values()) + manifest.num_samples + 2
    assert run(*command) == 0  # complete already


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, "abcde"),
        ({"min_similarity": 0.3}, "acd"),
        ({"min_width": 256, "min_height": 256}, "ab"),
        ({"max_punsafe": 0.5}, "abe"),
        ({"max_pwatermark": 0.5}, "bcde"),
        ({"refuse_nsfw": ("unlikely",)}, "bcdef"),
        ({"refuse_nsfw": ()}, "abcdef"),
        ({"refuse_nsfw": ("NSFW", "untagged")}, "ab"),
    ],
)
def test_filters_keep_what_they_say_and_nothing_unknown(tmp_path, options, kept):
    table = {  # as Re-LAION spells it, with the columns of LAION-2B
        "url": [f"http://a.example.com/{name}" for name in "abcdef"],
        "caption": list("abcdef"),
        "similarity": [0.3, 0.29, 0.4, 0.5, NAN, 0.1],
        "width": [256, 300, 256, None, 255, 10],
        "height": [256, 300, 255, 256, 256, 10],
        "punsafe": [0.1, 0.5, 0.6, None, 0.0, 1.0],
        "pwatermark": [0.9, 0.5, 0.1, 0.0, 0.0, 1.0],
        "NSFW": ["UNLIKELY", "UNSURE", None, "rubbish", "", " nsfw "],
        "hash": [1, 2, 3, 4, 5, 6],
    }
    pq.write_table(pa.table(table), tmp_path / "part.parquet")
    source = Laion((str(tmp_path / "part.parquet"),), tmp_path / "work", **options)
    rows = normalised(
        tmp_path / "rows",
        [Input(source.source[0])],
        source.query,
        Normalise(metadata_threads=1),
        {},
        prefix="x",
    )
    found = pq.read_table(tmp_path / "rows" / rows.parts[0].name).to_pylist()
    assert "".join(sorted(row["caption"] for row in found)) == kept
    assert rows.num_rows + sum(rows.rejects.values()) == 6
    untagged = len(set(kept) & set("cde")) if source.refuse_nsfw else 0
    assert rows.notes == ({"nsfw_untagged": untagged} if untagged else {})


def test_a_list_without_the_nsfw_column_needs_the_filter_off(tmp_path):
    columns = ["URL", "TEXT"]
    with pytest.raises(ValueError, match=r"have no nsfw, .* --refuse-nsfw without a value"):
        Laion(("x",), tmp_path).query(columns)
    assert "'nsfw'" not in Laion(("x",), tmp_path, refuse_nsfw=()).query(columns)


def test_missing_and_doubled_columns_are_named_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"have no caption, one of .* must be there"):
        columns_of(["URL", "similarity"])
    with pytest.raises(ValueError, match="'TEXT' and 'caption' both give the caption"):
        columns_of(["url", "TEXT", "caption"])
    with pytest.raises(ValueError, match=r"have no punsafe, the filter `<= 0.5` needs it"):
        Laion(("x",), tmp_path, max_punsafe=0.5).query(["URL", "TEXT"])
