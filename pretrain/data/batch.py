"""What does one rank receive for one step?"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

NO_CATEGORY = NO_TAG = -1
MOST_TAGS = 64  # of one image; of more the most confident are kept


@dataclass(frozen=True)
class Batch:
    """Images 2k and 2k + 1 form pair k when two images are mixed; b counts images, g patches a side.

    Where both views of an image are inputs, rows 2k and 2k + 1 of `mask` are those of view 1 and view 2 of image
    k: it has b x views / mixed rows, one an input.
    `boxes` hold the crop of each view in pixels of the (possibly flipped) whole image: top, left, height,
    width, then 1 if the image was flipped; `sizes` the image's height and width in pixels.
    A view that no target needs is all zero, and so is its box.
    """

    views: UInt8[Tensor, "b 2 3 s s"]
    boxes: Float[Tensor, "b 2 5"]
    sizes: Float[Tensor, "b 2"]
    mask: Bool[Tensor, "inputs g g"]  # True where a mixed input shows its second image, a masked one nothing
    category: Int[Tensor, " b"]  # NO_CATEGORY where there is none
    tokens: Int[Tensor, "b length"]  # of the caption; padding where there is none
    token_mask: Bool[Tensor, "b length"]  # True on real tokens; row all False where there is no caption
    tags: Int[Tensor, "b most"]  # most confident first, then NO_TAG; 0 or MOST_TAGS wide all through a run
    has_tags: Bool[Tensor, " b"]  # the source tells tags; none of this image's may be sure enough
    position: Int[Tensor, " b"]  # of the sample in the run's global order

    @property
    def num_bytes(self) -> int:
        """Of all its tensors."""
        return sum(getattr(self, field.name).nbytes for field in dataclasses.fields(self))

    @property
    def has_category(self) -> Bool[Tensor, " b"]:
        return self.category != NO_CATEGORY

    @property
    def has_text(self) -> Bool[Tensor, " b"]:
        return self.token_mask.any(dim=1)

    def both_ways(self) -> Batch:
        """Both views of every image as inputs: row 2k is image k as it is, row 2k + 1 with its views exchanged.

        For a batch whose mask has two rows an image: these are the rows of the mask, which stays as it is.
        """
        assert len(self.mask) == 2 * len(self.views), "one mask an input, two inputs an image"
        rows = {
            f.name: getattr(self, f.name).repeat_interleave(2, dim=0)
            for f in dataclasses.fields(self)
            if f.name not in ("views", "boxes", "mask")
        }
        exchanged = {
            name: torch.stack([pair, pair.flip(1)], dim=1).flatten(0, 1)
            for name, pair in (("views", self.views), ("boxes", self.boxes))
        }
        return Batch(mask=self.mask, **exchanged, **rows)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; the copy overlaps with compute when the memory is pinned."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True) for f in dataclasses.fields(self)
        }
        return Batch(**moved)
