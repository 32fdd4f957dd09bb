"""Which pictures stand in for photographs in tests? Smooth random ones, each of its own number, with fine noise."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.build import Options, build
from data_prep.images import check_image
from data_prep.limits import Limits
from data_prep.samples import Collection, Made, Sample


def picture(number: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """An RGB picture in which much happens at all scales; the same number gives the same pixels."""
    generator = np.random.default_rng(number)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    noise = generator.normal(0, 4, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@dataclass(frozen=True)
class Item:
    """One sample to build."""

    key: str
    image: bytes
    caption: str = ""
    record: str = "{}"  # JSON
    with_phash: bool = True


def make(item: Item) -> Made:
    """The sample of an item."""
    checked = check_image(item.image, Limits())
    record = json.loads(item.record) | ({"phash": checked.phash} if item.with_phash else {})
    captions = (item.caption,) if item.caption else ()
    return Made(Sample(item.key, checked.content, checked.extension, checked.size, captions, record=record))


def built(
    folder: Path,
    items: Sequence[Item],
    shard_size: int = 3,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> Path:
    """A data set of the items."""
    collection = Collection(
        **{"name": "pictures", "split": "train", **more},
        has_split_folder=False,
        categories=(),
        settings=settings or {"source": "pictures"},
        items=list(items),
        make=make,
        num_bytes=1,
    )
    build(collection, folder, Options(shard_size=shard_size, workers=1))
    return folder
