"""What do shards with masks, such as the embedded scenes, say of each pixel and of each thing?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.schema import IMAGE_EXTENSIONS
from pretrain.data.decode import decode_image
from pretrain.data.faults import BadSample
from pretrain.data.shards import ShardFolder
from pretrain.evaluate.masks import Mask, read_numbers
from pretrain.transfer.coco import outline_of
from pretrain.transfer.examples import IGNORED, Example

GROUND = "ground"  # of pixels that belong to no thing


class MaskedShards:
    """An AnnotatedSet for segmentation, with GROUND as the first class, or for detection.

    Raises what ShardFolder does, and ValueError for shards without masks.
    """

    has_masks, federation, shown = True, None, None

    def __init__(self, folder: Path, *, with_ground: bool) -> None:
        self.shards, self.place = ShardFolder(folder), folder
        self.sha256 = self.shards.sha256  # of the manifest, which has those of the shards
        categories = tuple(self.shards.manifest.categories)
        if not 1 <= len(categories) < IGNORED:
            raise ValueError(
                f"{folder} has {len(categories)} categories, 1 to {IGNORED - 1} are needed to name the things of its "
                "masks: name another data set"
            )
        self._kinds = {name: number for number, name in enumerate(categories)}
        self.with_ground = with_ground
        self.names = (GROUND, *categories) if with_ground else categories
        self.category_ids = tuple(range(1, len(categories) + 1))
        self.image_ids = tuple(range(len(self.shards)))
        shards = [shard for shard in self.shards.manifest.shards if shard.num_samples]
        self.files = {shard.sha256: str(self.shards.folder / shard.name) for shard in shards}
        self.dropped: dict[str, int] = {}
        try:
            self.example(0)
        except BadSample as error:
            if error.reason == "no_mask":
                raise ValueError(f"{folder}: {error}: name a data set with masks, such as scenes") from error

    def __len__(self) -> int:
        return len(self.shards)

    def example(self, index: int) -> Example:
        members = self.shards.sample(index)
        content = next((members[name] for name in IMAGE_EXTENSIONS if name in members), None)
        if content is None:
            raise BadSample("no_image", f"sample {index} has none of {IMAGE_EXTENSIONS}")
        image = decode_image(content)
        mask = read_numbers(members, *image.shape[:2])
        if mask is None:
            raise BadSample("no_mask", f"sample {index} has no mask")
        if unknown := sorted(set(mask.kinds) - self._kinds.keys()):
            raise BadSample(
                "unknown_category", f"sample {index} has {unknown}, no categories of its manifest"
            )
        image = image.permute(2, 0, 1)
        if self.with_ground:
            table = torch.tensor([0, *(self._kinds[kind] + 1 for kind in mask.kinds)], dtype=torch.uint8)
            return Example(image, index, classes=table[mask.numbers.int()])
        return Example(image, index, things=tuple(self._things(index, mask)))

    def _things(self, index: int, mask: Mask) -> list[dict[str, Any]]:
        numbers = mask.numbers.numpy()
        found = []
        for number, kind in enumerate(mask.kinds, 1):
            pixels = numbers == number
            rows, columns = np.nonzero(pixels.any(1))[0], np.nonzero(pixels.any(0))[0]
            if not len(rows):
                continue  # hidden
            left, top = int(columns[0]), int(rows[0])
            found.append(
                {
                    "image_id": index,
                    "category_id": self._kinds[kind] + 1,
                    "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
                    "area": int(pixels.sum()),
                    "iscrowd": 0,
                    "segmentation": outline_of(pixels.astype(np.uint8)),
                }
            )
        return found
