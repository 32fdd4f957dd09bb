"""Is every source built alike on disk and on S3, its inputs too, and read by webdataset and by our loader?"""

from __future__ import annotations

import gc
import hashlib
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import webdataset

from data_prep import claim
from data_prep.__main__ import SOURCES
from data_prep.check import check
from data_prep.places import place_of
from data_prep.schema import Manifest
from pretrain.config import Source
from pretrain.objective import Target
from pretrain.objectives import OBJECTIVES
from tests.data.delivered import batches
from tests.data.sets import small_run
from tests.data_prep.rclone import BUCKET, rclone_server
from tests.data_prep.sources.conftest import Server
from tests.data_prep.sources.published import MINIATURES, Miniature, built_all, built_from

SUPERVISION = {  # what the loader is asked to take from a source, and from which of its splits
    "scenes": ("category", "train"),
    "folder": ("text", "."),
    "laion400m": ("text", "."),
    "cc12m": ("text", "."),
    "yfcc15m": ("text", "."),
    "imagenet22k": ("category", "train"),
    "tencent_ml": ("tags", "train-openimages"),
    "open_images": ("tags", "."),
}


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def above(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("every")


@pytest.fixture(scope="module")
def on_disk(above: Path, server: Server) -> dict[str, Miniature]:
    """Every source, built into above / "disk" / its name."""
    return built_all(above, server)


@pytest.fixture(scope="module")
def bucket(above: Path) -> Iterator[Path]:
    """The folder that a server with keys serves as s3://bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with rclone_server(above / "server", port) as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        patch.setattr(claim, "SETTLE", 0.01)
        yield store.folder


def test_the_table_has_every_source():
    assert MINIATURES.keys() == SUPERVISION.keys() == SOURCES.keys()


@pytest.mark.parametrize("name", MINIATURES)
def test_a_build_keeps_what_is_good_and_counts_what_is_not(on_disk, above, name):
    told: Counter[str] = Counter()
    for split, num_samples in on_disk[name].splits.items():
        manifest = check(above / "disk" / name / split)
        assert manifest.num_samples == num_samples
        told.update(manifest.dropped)
    assert told == on_disk[name].dropped


@pytest.mark.parametrize("name", MINIATURES)
def test_inputs_and_output_on_s3_give_the_bytes_of_a_build_on_disk(on_disk, above, bucket, name):
    place = place_of(f"s3://{BUCKET}/in/{name}")
    for path in (path for path in (above / "in" / name).rglob("*") if path.is_file()):
        place.put(str(path.relative_to(above / "in" / name)), path)
    built_from(name, on_disk[name], str(place), above / "scratch-s3" / name, f"s3://{BUCKET}/out/{name}")
    there = _files(bucket / "out" / name)
    assert there == _files(above / "disk" / name)
    assert len([file for file in there if file.endswith("manifest.json")]) == len(on_disk[name].splits)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:unclosed file:ResourceWarning"
)
@pytest.mark.parametrize("name", MINIATURES)
def test_webdataset_reads_every_sample(on_disk, above, name):
    for split, num_samples in on_disk[name].splits.items():
        urls = [str(path) for path in sorted((above / "disk" / name / split).glob("*.tar"))]
        read = list(webdataset.WebDataset(urls, shardshuffle=False))
        assert len(read) == num_samples
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode("pil"):
            (image,) = (sample[form] for form in ("jpg", "png") if form in sample)
            assert image.size == tuple(sample["json"]["size"])
            assert sample.get("txt") == next(iter(sample["json"]["captions"]), None)
        for sample in read:
            (image,) = (sample[form] for form in ("jpg", "png") if form in sample)
            assert hashlib.sha256(image).hexdigest().encode() in sample["json"]
    gc.collect()


def test_our_loader_mixes_all_of_them_with_their_classes_captions_and_tags(on_disk, above):
    places = {name: above / "disk" / name / split for name, (_, split) in SUPERVISION.items()}
    data = {name: Source(kind) for name, (kind, _) in SUPERVISION.items()}
    tokenizer = places["laion400m"] / "tokenizer"
    m3i = OBJECTIVES["m3i"]
    objective = replace(
        m3i, targets={**m3i.targets, "tags": Target("tags", "bernoulli", "same", "raw", "none")}
    )
    delivered = batches(small_run(data=data, objective=objective), places, 6, tokenizer=tokenizer)
    assert all(torch.isfinite(batch.views.float()).all() for batch in delivered)
    assert any(batch.token_mask.any() for batch in delivered) and any(b.has_tags.any() for b in delivered)
    seen = {int(number) for batch in delivered for number in batch.category if number >= 0}
    num_kinds = len(
        Manifest.read(places["scenes"]).categories
    )  # the numbers of ImageNet's two classes follow them
    assert seen - set(range(num_kinds)) == {num_kinds, num_kinds + 1} and min(seen) < num_kinds
