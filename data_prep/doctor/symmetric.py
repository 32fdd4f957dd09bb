"""How are copies found of a picture that is its own mirror image? By half of the bits, and then by its pixels.

Such a picture has no odd horizontal frequencies, so that noise alone decides their 32 bits, and a copy encoded again
differs in up to 16 of them. The even ones are as firm as those of any picture, but 32 bits are too few to tell it
from hundreds of millions of others: who agrees in them is decoded and compared in grey.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from data_prep.doctor.members import read_sample
from data_prep.doctor.near import Index, index_of, look_up
from data_prep.doctor.perceptual import TEXTURED, grey_of, hash_of, whole_cuts
from data_prep.pixels import HASH_SIDE
from data_prep.places import Place

EVEN = np.uint64(0xAAAA_AAAA_AAAA_AAAA)  # bits of a hash that even horizontal frequencies decide
MIRRORED = 0.02  # of the variance of a picture that its odd part may have
SAME = 0.95  # correlation of two small grey pictures that show the same
SHARE = 3  # of the bits that two pictures may differ in: a third of them among the even ones


@dataclass(frozen=True)
class View:
    """What a picture that is its own mirror image, or the middle of it, looks like."""

    even: int  # its hash, EVEN bits only
    look: Float[np.ndarray, "32 32"]  # grey, mean 0 and length 1


@dataclass(frozen=True)
class Symmetric:
    """The views of all such pictures of an evaluation, to look others up among."""

    views: tuple[View, ...]
    owners: tuple[int, ...]  # the picture of each
    index: Index  # of the different hashes
    places: dict[int, list[int]]  # hash -> positions in `views`


def symmetric_views(pixels: UInt8[np.ndarray, "h w"]) -> list[View]:
    """A picture and what is left of it by cuts at all sides, those of them that are their own mirror image."""
    views = []
    for part in whole_cuts(pixels):
        look = _look(part)
        if look is not None and np.square((look - look[:, ::-1]) / 2).sum() <= MIRRORED:
            views.append(View(hash_of(part) & int(EVEN), look))
    return views


def symmetric_of(views: list[tuple[int, View]], distance: int, num_queries: int) -> Symmetric:
    """An index of (picture, view) pairs for copies whose hashes differ in about `distance` bits."""
    places: dict[int, list[int]] = {}
    for position, (_, view) in enumerate(views):
        places.setdefault(view.even, []).append(position)
    index = index_of(np.array(sorted(places), np.uint64), distance // SHARE, num_queries)
    return Symmetric(tuple(view for _, view in views), tuple(owner for owner, _ in views), index, places)


def find_symmetric(
    known: Symmetric, hashes: np.ndarray, place: Place, shard: str
) -> dict[int, tuple[int, int]]:
    """Distance in even bits and picture of the copies in one shard, by their number in it; `hashes`: uint64 of all.

    Reads the samples that agree in enough bits, few where nothing is shown twice.
    """
    if not known.views:
        return {}
    even = hashes & EVEN
    textured = np.flatnonzero(np.bitwise_count(even) >= TEXTURED // 2)
    samples, values = look_up(known.index, even[textured])
    found: dict[int, tuple[int, int]] = {}
    for sample, value in zip(textured[samples].tolist(), values.tolist(), strict=True):
        look = _look(grey_of(read_sample(place, shard, sample)[0].content))
        bits = int(np.bitwise_count(even[sample] ^ known.index.values[value]))
        for position in known.places[int(known.index.values[value])] if look is not None else ():
            if float((look * known.views[position].look).sum()) >= SAME:
                one = (bits, known.owners[position])
                found[sample] = min(found.get(sample, one), one)
    return found


def _look(pixels: UInt8[np.ndarray, "h w"]) -> Float[np.ndarray, "32 32"] | None:
    """A picture in small, freed of brightness and contrast; None for a flat one."""
    small = cv2.resize(pixels, (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    small -= small.mean()
    length = float(np.linalg.norm(small))
    return small / length if length > HASH_SIDE else None  # a deviation of one level
