"""Is a content on a list of blocked hashes left out, however long the list and whatever the row says of itself?"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.download.blocked import blocked_by
from data_prep.download.collection import Finalise
from data_prep.download.store import Item
from data_prep.download.table import Row
from data_prep.limits import Limits
from data_prep.schema import Manifest
from tests.data_prep.download.lists import describe
from tests.data_prep.download.misbehaving import picture, serving
from tests.data_prep.sources.built import LOOPBACK, run

ROW = Row("r-0", "http://a.example.com/", None, None, None, {})  # nothing was published of its content


def _listed(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_blocked_contents_are_found_among_many_by_either_hash_and_no_other_is(tmp_path):
    contents = [str(number).encode() for number in range(3000)]
    sha256 = [hashlib.sha256(one).hexdigest().upper() for one in contents[:1000]]
    md5 = [hashlib.md5(one).hexdigest() for one in contents[1000:2000]]
    first = _listed(tmp_path / "first.txt", ["# sha256", "", *sha256, *sha256[:5]])
    (tmp_path / "second.txt.gz").write_bytes(gzip.compress("\n".join(md5).encode()))
    blocked = pickle.loads(pickle.dumps(blocked_by([first, str(tmp_path / "second.txt.gz")], tmp_path)))
    assert [bool(blocked.found(one)) for one in contents] == [True] * 2000 + [False] * 1000
    assert blocked.found(contents[7]) == f"sha256 {sha256[7].lower()}"
    assert blocked.path.stat().st_size == 16 + 1000 * 32 + 1000 * 16
    assert not blocked_by([_listed(tmp_path / "none.txt", ["# none yet"])], tmp_path).found(b"anything")


@pytest.mark.parametrize("line", ["abc", "g" * 64, f"{'0' * 64}\tname.jpg", f"{'0' * 32} # why"])
def test_a_line_that_would_block_nothing_is_an_error(tmp_path, line):
    with pytest.raises(ValueError, match="cannot be blocked"):
        blocked_by([_listed(tmp_path / "list.txt", ["0" * 64, line])], tmp_path)


def test_a_blocked_image_is_left_out_as_it_was_served_and_as_it_would_be_stored(tmp_path):
    buffer = io.BytesIO()
    Image.new("CMYK", (64, 64), (10, 20, 30, 40)).save(buffer, "JPEG")
    content = buffer.getvalue()
    limits = Limits(min_side=16)
    stored = Finalise(describe, limits)(Item(ROW, content)).sample.image
    assert stored != content
    for number, seen in enumerate((content, stored)):
        path = _listed(tmp_path / f"{number}.txt", [hashlib.sha256(seen).hexdigest()])
        made = Finalise(describe, limits, blocked_by([path], tmp_path))(Item(ROW, content))
        assert made.sample is None and [drop.reason for drop in made.dropped] == ["blocked_hash"]
    other = blocked_by([_listed(tmp_path / "other.txt", ["0" * 64])], tmp_path)
    assert Finalise(describe, limits, other)(Item(ROW, content)).sample is not None


def test_block_hashes_of_the_command_line_reach_the_downloaded_bytes_and_the_settings(tmp_path):
    path = _listed(tmp_path / "list.txt", [hashlib.md5(picture(1)).hexdigest()])
    with serving() as server:
        table = {"URL": [f"{server.url}/good/{number}" for number in range(3)], "TEXT": ["a", "b", "c"]}
        table["NSFW"] = ["UNLIKELY"] * 3
        pq.write_table(pa.table(table), tmp_path / "part.parquet")
        command = ["laion400m", "--from", tmp_path / "part.parquet", "--scratch", tmp_path / "s", *LOOPBACK]
        limits = ["--min-side", "16", "--block-hashes", path]
        assert run(*command, *limits, "--out", tmp_path / "out") == 0
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.num_samples == 2 and manifest.dropped == {"blocked_hash": 1}
    assert len(json.loads(json.dumps(manifest.builder))["download"]["blocked"]) == 64
