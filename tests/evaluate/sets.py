"""What is the smallest data set that probes can be tried on? Flat colours on black, by category, with captions."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.files import sha256_file
from data_prep.index import index_bytes, index_path
from data_prep.schema import Manifest, Shard, write_manifest
from data_prep.tokenizer import train_tokenizer

COLORS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 40, 210), "gray": (128, 128, 128)}
SHARD = "000000.tar"
HEIGHT, WIDTH, GROUND = 40, 56, 20  # pixels; the first GROUND columns are black ground, the rest is the thing


def write_set(
    folder: Path, split: str, num_each: int, *, text: bool = True, masks: bool = True, seed: int = 0
) -> Path:
    """`num_each` noisy images of each color; with `text` captions and a tokenizer, with `masks` the thing's."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    offsets, num_samples = [], num_each * len(COLORS)
    with tarfile.open(folder / SHARD, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(num_samples):
            category = number % len(COLORS)
            name = list(COLORS)[category]
            offsets.append(tar.offset)
            members = {"png": _image(COLORS[name], generator)}
            captions = [f"a photo of a {name} thing"] if text else []
            members |= {"txt": captions[0].encode()} if text else {}
            members |= {"cls": str(category).encode()}
            members |= {"mask.png": _mask()} if masks else {}
            record = {"captions": captions} | ({"objects": [{"name": name}]} if masks else {})
            members |= {"json": json.dumps(record).encode()}
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{number:06d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        offsets.append(tar.offset)
    index_path(folder / SHARD).write_bytes(index_bytes(offsets))
    if text:
        train_tokenizer(folder, [SHARD], vocab_size=200)
    tar_file = folder / SHARD
    shard = Shard(SHARD, num_samples, tar_file.stat().st_size, sha256_file(tar_file))
    write_manifest(
        folder,
        Manifest("colors", split, tuple(COLORS), num_samples, text, True, (shard,)),
    )
    return folder


def _image(color: tuple[int, int, int], generator: np.random.Generator) -> bytes:
    pixels = np.array(color) + generator.normal(0, 12, (HEIGHT, WIDTH, 3))
    pixels[:, :GROUND] -= color
    return _png(pixels.clip(0, 255))


def _mask() -> bytes:
    return _png(np.broadcast_to(np.arange(WIDTH) >= GROUND, (HEIGHT, WIDTH)))


def _png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(content, "PNG")
    return content.getvalue()
