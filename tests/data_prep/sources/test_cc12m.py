"""Is Conceptual 12M read without quoting, and is an image that changed since left out?"""

from __future__ import annotations

import gzip
import hashlib
import json

from data_prep.schema import Manifest
from tests.data_prep.sources.built import LOOPBACK, run, samples
from tests.data_prep.sources.conftest import picture


def test_a_table_and_its_hashes_become_shards(tmp_path, server):
    good = [server.put(f"/cc/{n} a.jpg".replace(" ", "%20"), picture(20 + n)) for n in range(3)]
    changed = server.put("/cc/changed.jpg", picture(30))
    lines = [
        f'{good[0]}\t"<PERSON> opens a quote'.encode(),
        good[1].encode() + b"\tcaf\xe9 &amp; bar",
        f"{good[2].replace('%20', ' ')}\tspace in the address".encode(),
        f"{changed}\tchanged since".encode(),
        f"{good[0]}\ttwice".encode(),
        b"http://127.0.0.1\tone\ttoo many",
    ]
    (tmp_path / "cc12m.tsv").write_bytes(b"\n".join(lines) + b"\n")
    hashes = [
        (url, hashlib.sha256(content).hexdigest(), hashlib.md5(content).hexdigest())
        for url, content in [(good[0], picture(20)), (good[1], picture(21)), (changed, picture(31))]
    ]
    hashes.append(hashes[0])  # a line twice
    (tmp_path / "hashes.tsv.gz").write_bytes(
        gzip.compress("".join("\t".join(h) + "\n" for h in hashes).encode())
    )
    command = [
        "--from",
        tmp_path / "cc12m.tsv",
        "--hashes",
        tmp_path / "hashes.tsv.gz",
        "--person",
        "somebody",
    ]
    out = tmp_path / "out"
    assert run("cc12m", *command, "--scratch", tmp_path / "scratch", "--out", out, *LOOPBACK) == 0
    found = {sample["txt"]: sample for sample in samples(out).values()}
    assert set(found) == {'"somebody opens a quote', "café &amp; bar", "space in the address"}
    assert found["café &amp; bar"]["image"] == picture(21)
    assert Manifest.read(out).dropped == {"hash_mismatch": 1}
    listed = json.loads((tmp_path / "scratch" / "rows" / "rows.json").read_text())
    assert listed["rejects"] == {"columns": 1, "duplicate_url": 1} and listed["num_repaired"] == 1
