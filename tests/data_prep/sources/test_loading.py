"""Do readers take the shards of published sources: webdataset, and our own loader mixing two of them?"""

from __future__ import annotations

import gc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset

from data_prep.schema import Manifest
from data_prep.sources.synsets import classes_of
from tests.data.delivered import batches
from tests.data.sets import small_run
from tests.data_prep.sources.archive import tar_of
from tests.data_prep.sources.built import LOOPBACK, run
from tests.data_prep.sources.conftest import Server, picture

SYNSETS = ("n01440764", "n02012849")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, server: Server) -> dict[str, Path]:
    """A data set of ImageNet-22k with categories, and one of LAION-400M with captions."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "tars").mkdir()
    for number, synset in enumerate(SYNSETS):
        files = [(f"{synset}_{n}.JPEG", picture(100 * number + n)) for n in range(6)]
        (folder / "tars" / f"{synset}.tar").write_bytes(tar_of(files))
    urls = [server.put(f"/load/{n}.jpg", picture(300 + n)) for n in range(10)]
    captions = [f"a caption number {n}" for n in range(10)]
    pq.write_table(
        pa.table({"URL": urls, "TEXT": captions, "NSFW": ["UNLIKELY"] * 10}), folder / "part.parquet"
    )
    out = {name: folder / "out" / name for name in ("names", "talk")}
    labelled = ["imagenet22k", "--from", folder / "tars", "--scratch", folder / "a", "--allow-missing"]
    captioned = ["laion400m", "--from", folder / "part.parquet", "--scratch", folder / "b", *LOOPBACK]
    assert run(*labelled, "--shard-size", "5", "--out", out["names"]) == 0
    assert run(*captioned, "--out", out["talk"]) == 0
    return out


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:unclosed file:ResourceWarning"
)
def test_webdataset_reads_them(built):
    for name, num_samples in (("names", 12), ("talk", 10)):
        urls = [str(path) for path in sorted(built[name].glob("*.tar"))]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
        assert len(samples) == num_samples == Manifest.read(built[name]).num_samples
        for sample in samples:
            assert sample["jpg"].size == tuple(sample["json"]["size"])
            if name == "talk":
                assert sample["txt"] == sample["json"]["captions"][0]
            else:
                assert sample["cls"] == classes_of("22k-swin").number[sample["json"]["synset"]]
    gc.collect()


def test_our_loader_mixes_them_with_their_classes_and_captions(built):
    categories = {classes_of("22k-swin").number[synset] for synset in SYNSETS}
    delivered = batches(small_run(), built, 3, tokenizer=built["talk"] / "tokenizer")
    seen = torch.cat([batch.category for batch in delivered])
    assert set(seen[seen >= 0].tolist()) == categories
    assert all(torch.isfinite(batch.views.float()).all() for batch in delivered)
    assert any(batch.token_mask.any() for batch in delivered)
