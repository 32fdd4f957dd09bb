"""How does a test make a tiny data set, whole or damaged?"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image

from data_prep.files import sha256_file
from data_prep.index import index_bytes, index_path
from data_prep.schema import Manifest, Shard, write_manifest
from pretrain.config import Mask, Run, Source, Text, Views
from pretrain.data.colour import Change, change_colours
from pretrain.data.views import draw_views, make_views
from pretrain.objectives import OBJECTIVES

CATEGORIES = ("ant", "bee", "cow")
WORDS = ("a", "red", "green", "blue", "ant", "bee", "cow", "sees", "the", "sun")


def picture(seed: int, height: int = 40, width: int = 52) -> np.ndarray:
    """Smooth random colours, uint8 [height, width, 3]."""
    coarse = np.random.RandomState(seed).randint(0, 256, (4, 5, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def two_views(
    image: torch.Tensor, settings: Views, generator: Random, num_views: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views and boxes of one image, as the loader makes them."""
    drawn = draw_views(image.shape[0], image.shape[1], settings, generator, num_views)
    return make_views(image, drawn, settings.size)


def recoloured(view: torch.Tensor, change: Change) -> torch.Tensor:
    """A view [3, s, s] with changed colours."""
    levels = np.ascontiguousarray(view.permute(1, 2, 0).numpy())
    return torch.from_numpy(change_colours(levels, change)).permute(2, 0, 1)


def encoded(pixels: np.ndarray, form: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def sample(
    seed: int, has_text: bool = True, has_category: bool = True, tags: object = None
) -> dict[str, bytes]:
    """One good sample: extension -> content; `tags` go into its .json as they are."""
    random = Random(seed)
    members = {"jpg": encoded(picture(seed), quality=90)}
    captions = [" ".join(random.choices(WORDS, k=random.randint(3, 12))) for _ in range(3)]
    if has_text:
        members["txt"] = captions[0].encode()
    if has_category:
        members["cls"] = str(seed % len(CATEGORIES)).encode()
    record = {"captions": captions if has_text else [], "number": seed}
    members["json"] = json.dumps(record if tags is None else {**record, "tags": tags}).encode()
    return members


def write_set(
    folder: Path,
    shards: Sequence[Sequence[dict[str, bytes]]],
    categories: tuple[str, ...] = CATEGORIES,
    tags: tuple[str, ...] = (),
) -> Path:
    """A complete data set of the given samples; labels as the first sample has them."""
    folder.mkdir(parents=True)
    recorded = []
    for number, samples in enumerate(shards):
        path = folder / f"{number:06d}.tar"
        offsets = []
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index, members in enumerate(samples):
                offsets.append(tar.offset)
                for extension, content in members.items():
                    member = tarfile.TarInfo(f"{number:06d}_{index:06d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
            offsets.append(tar.offset)
        index_path(path).write_bytes(index_bytes(offsets))
        recorded.append(Shard(path.name, len(samples), path.stat().st_size, sha256_file(path)))
    first = shards[0][0]
    manifest = Manifest(
        name=folder.name,
        split="train",
        categories=categories if "cls" in first else (),
        num_samples=sum(shard.num_samples for shard in recorded),
        has_text="txt" in first,
        has_category="cls" in first,
        shards=tuple(recorded),
        tags=tags,
    )
    write_manifest(folder, manifest)
    return folder


def good_set(folder: Path, sizes: Sequence[int] = (7, 5, 9), **labels: bool) -> Path:
    """A data set of good samples in shards of the given sizes."""
    ends = np.cumsum(sizes)
    return write_set(
        folder,
        [
            [sample(n, **labels) for n in range(end - size, end)]
            for size, end in zip(sizes, ends, strict=True)
        ],
    )


def write_tokenizer(folder: Path) -> Path:
    """A word-level Hugging Face tokenizer of WORDS."""
    from transformers import BertTokenizerFast

    folder.mkdir(parents=True)
    vocabulary = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def small_run(**changes: object) -> Run:
    """M3I at 16 pixels and 4 x 4 patches, on a labelled source `names` and a captioned one `talk`."""
    settings: dict[str, object] = {
        "name": "small",
        "objective": OBJECTIVES["m3i"],
        "data": {"names": Source("category", 2.0), "talk": Source("text", 1.0)},
        "batch": 8,
        "steps": 2000,
        "text": Text(length=10),
        "views": Views(size=16),
        "mask": Mask(patch=4, min_block=4),
    }
    return Run(**{**settings, **changes})
