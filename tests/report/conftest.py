"""What do the report's tests share? A tiny captioned data set and a fake run on it."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.files import sha256_file
from data_prep.index import index_bytes, index_path
from data_prep.schema import Manifest, Shard, write_manifest
from pretrain.config import Run
from pretrain.recipes import load
from tests.fakes import shrink
from tests.report.fake_run import write_run

CATEGORIES = ("apple", "boat", "cat")
HOSTILE = '<script>alert(1)</script> & "quotes"'
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "an",
    *CATEGORIES,
    "script",
    "alert",
    "<",
    ">",
    "(",
    ")",
    "/",
    "1",
]


def write_tokenizer(folder: Path) -> None:
    """A WordPiece tokenizer of a few words."""
    from transformers import BertTokenizerFast

    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)


def write_data(folder: Path, count: int, captions: list[str], broken: int | None = None) -> Path:
    """A data set of `count` noisy pictures in one shard, with captions and categories in turn.

    The image of sample `broken` is cut off.
    """
    folder.mkdir(parents=True)
    shard, offsets = folder / "000000.tar", [0]
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(count):
            pixels = np.random.RandomState(number).randint(0, 256, (40, 56, 3), dtype=np.uint8)
            memory = io.BytesIO()
            Image.fromarray(pixels).save(memory, "PNG")
            caption = captions[number % len(captions)]
            members = {
                "png": memory.getvalue()[: 100 if number == broken else None],
                "txt": caption.encode(),
                "cls": str(number % len(CATEGORIES)).encode(),
                "json": json.dumps({"captions": [caption]}).encode(),
            }
            for extension, content in members.items():
                info = tarfile.TarInfo(f"k{number}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            offsets.append(tar.offset)
    index_path(shard).write_bytes(index_bytes(offsets))
    entry = Shard("000000.tar", count, shard.stat().st_size, sha256_file(shard))
    split = folder.name
    write_manifest(folder, Manifest("tiny", split, CATEGORIES, count, True, True, (entry,), {"truncated": 3}))
    write_tokenizer(folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train/ and heldout/."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder / "train", 24, [HOSTILE, "a boat"])
    write_data(folder / "heldout", 9, ["a cat", "a boat", "a cat", HOSTILE])
    return folder


def small_run() -> Run:
    return shrink(load("m3i.demo"))


@pytest.fixture(scope="session")
def run_folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with everything that a report can use."""
    train = data / "train"
    run = small_run()
    folders = dict.fromkeys(run.data, train)
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", run, CATEGORIES, train / "tokenizer", folders)
